"""Shards of DTensors (FSDP2, tensor parallelism): local tensors, their place, and back.

The engine steps the local shard of a ``DTensor``. State is made for the shard and lies beside it as
plain tensors. A state dict shows components as DTensors with the parameter's placements, so that
``torch.distributed.checkpoint`` can save them on some number of workers and load them on another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from optstate_codecs.formats import FP32, Component, Format
from optstate_codecs.state.layout import stored_formats

__all__ = [
    "any_distributed",
    "check_placements",
    "component_shard",
    "is_distributed",
    "local_of",
    "local_slice",
    "rewrapped",
    "shard_formats",
    "shard_offset",
    "sharding_groups",
    "summed",
]

_PLAIN = {Tensor, Parameter}
# random numbers of a kernel are counted from multiples of this
OFFSET_MULTIPLE = 16
# scales of smaller blocks would take more than a bit an element
SMALLEST_BLOCK = 32
# elements of a moment that may be kept in float32 because its blocks would be cut
FEW = 1 << 16


def is_distributed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``, of which this process holds a shard."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "placements")


def any_distributed(tensors: Iterable[Tensor]) -> bool:
    """Whether any of ``tensors`` is a ``DTensor``; fast where all are plain."""
    return not set(map(type, tensors)) <= _PLAIN and any(map(is_distributed, tensors))


def local_of(tensor: Tensor) -> Tensor:
    """The local shard of a ``DTensor``, the very tensor; any other tensor itself."""
    # to_local() would make a view of a parameter's shard at each call
    return tensor._local_tensor if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def shard_formats(formats: Mapping[str, Format], param: Any) -> dict[str, Format]:
    """The formats that store moments of a DTensor, the same for any number of workers.

    The global size decides which moments are coded. Blocks run inside rows: a block size that does
    not divide the rows becomes the largest power of two that does, so that no border of a shard
    cuts a block. Vectors, and rows without such a divisor of ``SMALLEST_BLOCK`` or more, keep
    moments of up to ``FEW`` elements in float32; larger ones keep their block size.

    Raises:
        ValueError: a format needs the whole tensor.
    """
    row = _local_row(param) if param.dim() > 1 else 0
    few = param.numel() <= FEW
    return {
        name: _in_rows(name, format, row, few)
        for name, format in stored_formats(formats, param.numel()).items()
    }


def _local_row(param: Any) -> int:
    """Elements of a row on each worker; 0 where workers have rows of different lengths."""
    if not param.dim():
        return 1
    last, row = param.dim() - 1, param.shape[-1]
    workers = torch.Size([param.device_mesh.size(n) for n, dim in _dims(param) if dim == last])
    return 0 if row % workers.numel() else row // workers.numel()


def _in_rows(name: str, format: Format, row: int, few: bool) -> Format:
    if format.whole:
        raise ValueError(
            f"formats[{name!r}]={format.spec!r}: needs the whole tensor, so it cannot store a "
            "shard of a DTensor"
        )
    block = getattr(format, "block_size", 1)
    divisor = row & -row
    if divisor >= block or block == 1:
        return format
    if divisor < SMALLEST_BLOCK:
        return FP32() if few else format
    given: Any = format
    smaller: Format = replace(given, block_size=divisor)
    return smaller


def check_placements(name: str, tensor: Tensor) -> None:
    """Raise unless every placement of a ``DTensor`` is a shard or a replica.

    Raises:
        TypeError: one is a partial sum, whose local values mean nothing by themselves.
    """
    placements = tensor.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        shown = ", ".join(map(str, placements))
        raise TypeError(
            f"{name}: is a DTensor with placements ({shown}), must be sharded or replicated"
        )


def _shard_dim(placement: Any) -> int | None:
    """The tensor dimension that a placement shards, None for a replica."""
    return None if placement.is_replicate() else placement.dim


def _dims(tensor: Any) -> list[tuple[int, int]]:
    """The mesh dimensions that shard ``tensor`` into several, each with its tensor dimension."""
    return [
        (number, dim)
        for number, placement in enumerate(tensor.placements)
        if (dim := _shard_dim(placement)) is not None and tensor.device_mesh.size(number) > 1
    ]


def shard_offset(tensor: Any) -> int:
    """The number of the shard's first element, from which its random numbers are counted.

    Where the shard is one run of the global tensor's elements, and begins at a multiple of 16,
    the number is that of the element in the global tensor, so that draws do not depend on the
    number of workers. Elsewhere each shard has a range of its own. Replicas draw the same.
    """
    dims = _dims(tensor)
    if not dims:
        return 0
    numel = tensor.numel()
    if all(dim == 0 for _, dim in dims) and tensor.dim():
        start: int = _start(tensor)[0] * (numel // max(tensor.shape[0], 1))
        if start % OFFSET_MULTIPLE == 0:
            return start
    coordinate, mesh, shard = tensor.device_mesh.get_coordinate(), tensor.device_mesh, 0
    for number, _ in dims:
        shard = shard * mesh.size(number) + coordinate[number]
    own: int = shard
    return own * (-(-numel // OFFSET_MULTIPLE) * OFFSET_MULTIPLE)


def _start(tensor: Any) -> tuple[int, ...]:
    """The global index of the shard's first element."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(offset)


def component_shard(param: Any, component: Component) -> torch.Size | None:
    """The global shape of a component whose shards are the component's for each shard of ``param``.

    None where blocks of the global tensor are cut by the border of a shard, so that the shards'
    components are no shards of one tensor.
    """
    row = _local_row(param)
    if not component.per_element and (component.entries or not row or row % component.span):
        return None
    return torch.Size(component.shape(param.shape))


def rewrapped(local: Tensor, param: Any, shape: Sequence[int]) -> Tensor:
    """``local`` as the shard of a tensor of the global ``shape``, placed as ``param`` is.

    The two share memory.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    size = torch.Size(shape)
    stride = param.stride() if size == param.shape else _contiguous(size)
    # from_local() would copy offloaded state to the mesh's device
    spec = DTensorSpec(
        param.device_mesh, param.placements, TensorMeta(size, tuple(stride), local.dtype)
    )
    kind: Any = DTensor
    wrapped: Tensor = kind(local, spec, requires_grad=False)
    return wrapped


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def local_slice(value: Tensor, param: Any) -> Tensor:
    """The local shard of ``value``: a DTensor of any placements, or a whole tensor on each worker.

    Args:
        value: of the parameter's dimensions, each of the parameter's size or, the last, a share.
        param: that gives mesh and placements.
    """
    if is_distributed(value):
        if value.placements != param.placements or value.device_mesh != param.device_mesh:  # type: ignore[attr-defined]
            value = value.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
        return local_of(value)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(
        value.shape, param.device_mesh, param.placements
    )
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        if size != value.shape[dim]:
            value = value.narrow(dim, min(offset, value.shape[dim]), size)
    return value


def sharding_groups(tensor: Any) -> tuple[Any, ...]:
    """The process groups whose members hold different shards of ``tensor``; none of a plain one."""
    if not is_distributed(tensor):
        return ()
    return tuple(tensor.device_mesh.get_group(number) for number, _ in _dims(tensor))


def summed(values: Mapping[tuple[Any, ...], Tensor], largest: bool = False) -> Tensor:
    """The sum over all workers of 0-d ``values``, or the largest, each over its process groups.

    Args:
        values: by the groups that hold shards of what a value was made of.
        largest: take the maximum instead.
    """
    import torch.distributed as dist

    total: Tensor | None = None
    for groups, value in values.items():
        for group in groups:
            dist.all_reduce(value, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
        if total is None:
            total = value
        else:
            total = torch.maximum(total, value) if largest else total + value
    assert total is not None
    return total
