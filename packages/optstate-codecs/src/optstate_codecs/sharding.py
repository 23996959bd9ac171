"""Shards of DTensors (FSDP2, tensor parallelism): local tensors, their place, and back.

The engine steps the local shard of a ``DTensor``. State is made for the shard and lies beside it as
plain tensors. A state dict shows components as DTensors with the parameter's placements, so that
``torch.distributed.checkpoint`` can save them on some number of workers and load them on another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from optstate_codecs.formats import FP32, Component, Format
from optstate_codecs.state.layout import storage_order, stored_formats

__all__ = [
    "any_distributed",
    "check_placements",
    "check_whole_rows",
    "component_shape",
    "is_distributed",
    "local_grad",
    "local_of",
    "local_slice",
    "placed_like",
    "reduced",
    "rewrapped",
    "shard_formats",
    "shard_offset",
    "sharding_groups",
]

_PLAIN = {Tensor, Parameter}
# random numbers of a kernel are counted from multiples of this
OFFSET_MULTIPLE = 16
# scales of smaller blocks would take more than a bit an element
SMALLEST_BLOCK = 32


def is_distributed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``, of which this process holds a shard."""
    kind = type(tensor)
    # a graph of torch 2.6 cannot look up a type in a set
    return kind is not Tensor and kind is not Parameter and hasattr(tensor, "placements")


def any_distributed(tensors: Iterable[Tensor]) -> bool:
    """Whether any of ``tensors`` is a ``DTensor``; fast where all are plain."""
    return not set(map(type, tensors)) <= _PLAIN and any(map(is_distributed, tensors))


def local_of(tensor: Tensor) -> Tensor:
    """The local shard of a ``DTensor``, the very tensor; any other tensor itself."""
    # to_local() would make a view of a parameter's shard at each call
    return tensor._local_tensor if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def shard_formats(formats: Mapping[str, Format], param: Tensor) -> dict[str, Format]:
    """The formats that store moments of a DTensor, the same for any number of workers.

    The global size decides which moments are coded. No border of a shard cuts a block: a block size
    that does not divide the elements between borders becomes the largest power of two that does.
    Where that is less than ``SMALLEST_BLOCK``, as in vectors, moments are stored in float32.

    Args:
        formats: of the group.
        param: a DTensor; of a plain tensor these are the formats that it would have under FSDP2.

    Raises:
        ValueError: a format needs the whole tensor.
    """
    stored, row = stored_formats(formats, param.numel()), _row(param)
    for name, format in stored.items():
        if format.for_shape(param.shape, range(param.dim())).whole:
            raise ValueError(
                f"formats[{name!r}]={format.spec!r}: needs the whole tensor, so it cannot store a "
                "shard of a DTensor"
            )
    return {name: _in_rows(format, row) for name, format in stored.items()}


def _row(param: Any) -> int:
    """Elements, consecutive in memory, that every border of a shard leaves together."""
    local = local_of(param)
    sharded = _sharded(param) if is_distributed(param) else [(0, 0)]
    dims = {dim for _, dim in sharded}
    if not dims:
        return local.numel()
    if dims == {0}:
        # of an index of the first dimension, which is the slowest in memory
        return math.prod(local.shape[1:]) if local.dim() > 1 and storage_order(local)[0] == 0 else 0
    last = local.dim() - 1
    workers = math.prod(param.device_mesh.size(n) for n, dim in sharded if dim == last)
    whole = local.is_contiguous() and param.shape[-1] % workers == 0
    return param.shape[-1] // workers if whole else 0


def _in_rows(format: Format, row: int) -> Format:
    given: Any = format
    block, divisor = getattr(given, "block_size", 1), row & -row
    if block == 1 or (row and row % block == 0):
        return format
    if divisor < SMALLEST_BLOCK:
        return FP32()
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


def _sharded(tensor: Any) -> list[tuple[int, int]]:
    """The mesh dimensions that shard ``tensor``, each with its tensor dimension."""
    return [(n, p.dim) for n, p in enumerate(tensor.placements) if not p.is_replicate()]


def _dims(tensor: Any) -> list[tuple[int, int]]:
    """Those of ``_sharded`` with several workers."""
    return [(n, dim) for n, dim in _sharded(tensor) if tensor.device_mesh.size(n) > 1]


def check_whole_rows(option: str, params: Iterable[Tensor]) -> None:
    """Raise unless every worker has all elements of the rows (first dimension) that it has.

    Raises:
        ValueError: a DTensor is sharded along another dimension.
    """
    for param in params:
        if is_distributed(param) and any(dim for _, dim in _dims(param)):
            placements = ", ".join(map(str, param.placements))  # type: ignore[attr-defined]
            raise ValueError(
                f"{option}: must be 0 for a DTensor with placements ({placements}), whose rows no "
                "worker has whole"
            )


def shard_offset(tensor: Any) -> int:
    """The number of the shard's first element, from which its random numbers are counted.

    Where the shard is one run of the global tensor's elements, and begins at a multiple of 16,
    the number is that of the element in the global tensor, so that draws do not depend on the
    number of workers. Elsewhere each shard has a range of its own. Replicas draw the same.
    """
    dims = _dims(tensor) if is_distributed(tensor) else []
    if not dims:
        return 0
    numel: int = tensor.numel()
    if all(dim == 0 for _, dim in dims) and tensor.dim():
        start = _start(tensor)[0] * (numel // max(tensor.shape[0], 1))
        if start % OFFSET_MULTIPLE == 0:
            return int(start)
    coordinate, mesh, shard = tensor.device_mesh.get_coordinate(), tensor.device_mesh, 0
    for number, _ in dims:
        shard = shard * mesh.size(number) + coordinate[number]
    return shard * (-(-numel // OFFSET_MULTIPLE) * OFFSET_MULTIPLE)


def _start(tensor: Any) -> tuple[int, ...]:
    """The global index of the shard's first element."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(offset)


def component_shape(param: Any, component: Component) -> torch.Size:
    """The global shape of a component whose shards are the component's for each shard of ``param``.

    One that is a flat row of blocks has a row for each index of the parameter's first dimension,
    unless every worker has the whole parameter.
    """
    shape = torch.Size(component.shape(param.shape))
    if is_distributed(param) and not _sharded(param):
        return shape
    flat = not component.per_element and len(shape) == 1 < param.dim()
    return torch.Size((param.shape[0], shape[0] // max(param.shape[0], 1))) if flat else shape


def rewrapped(local: Tensor, param: Any, shape: Sequence[int]) -> Tensor:
    """``local`` as the shard of a tensor of the global ``shape``, placed as ``param`` is.

    The two share memory.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    size = torch.Size(shape)
    stride = param.stride() if size == param.shape else _contiguous(size)
    if local.dim() != len(size):
        local = local.view(-1, *size[1:])
    # from_local() would copy offloaded state to the mesh's device
    spec = DTensorSpec(
        param.device_mesh, param.placements, TensorMeta(size, tuple(stride), local.dtype)
    )
    kind: Any = DTensor
    wrapped: Tensor = kind(local, spec, requires_grad=False)
    return wrapped


def placed_like(local: Tensor, param: Any) -> Tensor:
    """A tensor of the local shape of ``param``, as a DTensor placed like it if it is one.

    Args:
        local: the tensor; the two share memory.
        param: None counts as a plain tensor.
    """
    return rewrapped(local, param, param.shape) if is_distributed(param) else local


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, dtype=torch.uint8, device="meta").stride()


def local_slice(value: Tensor, param: Any) -> Tensor:
    """The local shard of ``value``: a DTensor of any placements, or a whole tensor on each worker.

    Args:
        value: of the parameter's dimensions, each of the parameter's size or, the last, a share.
        param: that gives mesh and placements.
    """
    if is_distributed(value) and value.device_mesh != param.device_mesh:  # type: ignore[attr-defined]
        # torch redistributes inside one mesh only
        value = value.full_tensor()  # type: ignore[attr-defined]
    if is_distributed(value):
        if value.placements != param.placements:  # type: ignore[attr-defined]
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


def reduced(values: Mapping[tuple[Any, ...], Tensor], largest: bool) -> Tensor:
    """The sum, or the largest, of 0-d ``values`` over all workers.

    Args:
        values: by the process groups that hold the shards it was computed from.
        largest: take the maximum instead of the sum.
    """
    import torch.distributed as dist

    for groups, value in values.items():
        for group in groups:
            dist.all_reduce(value, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
    device = next(iter(values.values())).device
    together = torch.stack([value.to(device) for value in values.values()])
    return together.amax() if largest else together.sum()


def local_grad(index: int, param: Any, grad: Any) -> Tensor:
    """The shard of a gradient that belongs to the parameter's shard; a plain gradient itself.

    Raises:
        TypeError, ValueError: only one of the two is a DTensor, or their global shapes differ; the
            message names the gradient.
    """
    name = f"gradient of parameter {index}"
    if is_distributed(grad) != is_distributed(param):
        kinds = ["a plain tensor", "a DTensor"][:: -1 if is_distributed(grad) else 1]
        raise TypeError(f"{name}: is {kinds[0]}, must be {kinds[1]} as the parameter is")
    if is_distributed(grad):
        if grad.shape != param.shape:
            shapes = f"shape {tuple(grad.shape)}, must be {tuple(param.shape)}"
            raise ValueError(f"{name}: {shapes} as the parameter's")
        check_placements(f"parameter {index}", param)
        if grad.placements != param.placements:
            # such as a sum that tensor parallelism has not reduced yet
            grad = grad.redistribute(param.device_mesh, param.placements)
    return local_of(grad)
