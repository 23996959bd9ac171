"""Records of ``DTensor``s in packed state dicts: saved as shards, loaded from shards or wholes.

Every component of a coded tensor is a ``DTensor`` with the placements of its parameter, so that
``torch.distributed.checkpoint`` can save it on some number of workers and load it on another. On
loading, codes are kept where the parameter's shards consist of whole blocks; otherwise the tensor
is decoded as a whole, and encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.formats import Component
from optstate_codecs.sharding import (
    component_shape,
    is_distributed,
    local_of,
    local_slice,
    placed_like,
    rewrapped,
)
from optstate_codecs.state.layout import storage_order
from optstate_wrap.state.param_chunks import Layout
from optstate_wrap.state.record import Coded, Record, stored_tensor
from optstate_wrap.state.sharding import needs_whole, shared_formats

__all__ = [
    "as_shard",
    "flat_part",
    "local_record",
    "of_local",
    "shard_of",
    "shards_of",
    "whole_of",
    "whole_record",
]

WAYS = (
    "use state_dict(), which loads on any number of workers, or packed_state_dict(per_rank=True), "
    "which each worker saves for itself"
)


def shards_of(number: int, record: Record, param: Tensor) -> Record:
    """A copy of the record of a ``DTensor``, with all its tensors as ``DTensor``s.

    A coded tensor has the parameter's global shape and memory order, and components placed as the
    parameter is.

    Args:
        number: of the parameter, for messages.
        record: of the shard.
        param: the parameter.

    Raises:
        ValueError: a value is this worker's own, and cannot be shown as a shard.
    """
    shown: Record = {}
    for key, stored in record.items():
        value = stored_tensor(stored)
        if isinstance(value, Coded):
            shown[key] = _shard(f"parameter {number}", key, value, param)
        elif isinstance(value, Tensor) and value.dim() and not is_distributed(value):
            raise ValueError(
                f"packed_state_dict: {key!r} of parameter {number} is a plain tensor of shape "
                f"{tuple(value.shape)}, while the parameter is a DTensor; {WAYS}"
            )
        else:
            shown[key] = value
    return shown


def _shard(where: str, key: str, coded: Coded, param: Tensor) -> Coded:
    local, order = local_of(param), storage_order(param)
    fits = coded.shape == tuple(local.shape) and _same_memory(coded, order)
    if not fits or not _has_whole_blocks(key, coded, param):
        raise ValueError(
            f"packed_state_dict: {key!r} of {where} is stored as {coded.format.spec!r}, of this "
            f"worker's shard of shape {coded.shape} only, while the parameter is a DTensor; {WAYS}"
        )
    parts = []
    whole = coded.format.for_shape(param.shape, order)
    for part, own, component in zip(
        coded.parts, coded.bound.components, whole.components, strict=True
    ):
        shaped = Layout(coded.shape, coded.order).unflatten(part) if own.per_element else part
        if not own.per_element:
            shaped = part.view(own.shape(coded.shape))
        parts.append(rewrapped(shaped.clone(), param, component_shape(param, component)))
    return replace(coded, parts=tuple(parts), shape=tuple(param.shape), order=order)


def _same_memory(coded: Coded, order: Sequence[int]) -> bool:
    """Whether both orders of the dimensions are one order in memory."""
    if not coded.numel:
        return True
    longer = [dim for dim in coded.order if coded.shape[dim] != 1]
    return longer == [dim for dim in order if coded.shape[dim] != 1]


def _has_whole_blocks(key: str, coded: Coded, param: Tensor) -> bool:
    """Whether no border between shards of ``param`` cuts a block of the format."""
    if needs_whole(coded.format, param):
        return False
    return shared_formats({key: coded.format}, param)[key] == coded.format


def shard_of(record: Record, param: Tensor) -> Record | None:
    """The record of a shard, from that of the whole parameter; None if it has to be encoded again.

    Args:
        record: coded tensors of the global shape, with components as ``shards_of`` returns them,
            or as the same whole tensors on each worker; and values as the optimizer made them.
        param: a ``DTensor``, the parameter.
    """
    local, order = local_of(param), storage_order(param)
    new: Record = {}
    for key, value in record.items():
        if not isinstance(value, Coded):
            new[key] = as_shard(value, param)
            continue
        if not _has_whole_blocks(key, value, param) or not _same_memory(value, order):
            return None
        parts = []
        for part, component in zip(value.parts, value.bound.components, strict=True):
            shaped, shape = part, component_shape(param, component)
            if part.shape != shape and is_distributed(part):
                return None
            if part.shape != shape and component.per_element:
                shaped = Layout(value.shape, value.order).unflatten(part)
            elif part.shape != shape:
                shaped = part.view(shape)
            own = local_slice(shaped, param)
            own = own.permute(storage_order(local)) if component.per_element else own
            parts.append(own.reshape(-1).to(param.device, copy=True))
        new[key] = replace(
            value, parts=tuple(parts), shape=tuple(local.shape), order=storage_order(local)
        )
    return new


def as_shard(value: Any, param: Tensor) -> Any:
    """A value of the parameter's shape as a ``DTensor``; any other value unchanged."""
    if not isinstance(value, Tensor) or not value.dim() or value.shape != param.shape:
        return value
    if is_distributed(value) and value.placements == param.placements:  # type: ignore[attr-defined]
        return value
    own = torch.empty_like(local_of(param.detach()), dtype=value.dtype)
    return placed_like(own.copy_(local_slice(value, param)), param)


def local_record(record: Record, param: Tensor) -> Record:
    """The record of a ``DTensor`` with the shards of its values in place of the values."""
    return {
        key: local_of(value)
        if isinstance(value, Tensor) and is_distributed(value) and value.shape == param.shape
        else value
        for key, value in record.items()
    }


def of_local(value: Any, param: Tensor) -> Any:
    """A value of a ``local_record`` as the ``DTensor`` it was; any other value itself."""
    if not isinstance(value, Tensor) or is_distributed(value) or not value.dim():
        return value
    fits = value.shape == local_of(param).shape
    return placed_like(value, param) if fits else value


def whole_record(record: Record, device: torch.device) -> Record:
    """A record of the whole parameter, with flat components on ``device``.

    Args:
        record: with components as in ``shard_of``; every worker has to call this with its own.
        device: of the parameter.
    """
    return {
        key: replace(
            value,
            parts=tuple(
                flat_part(part, component, value.shape, value.order).to(device)
                for part, component in zip(value.parts, value.bound.components, strict=True)
            ),
        )
        if isinstance(value, Coded)
        else value
        for key, value in record.items()
    }


def flat_part(
    part: Tensor, component: Component, shape: Sequence[int], order: Sequence[int]
) -> Tensor:
    """A component of a whole tensor as a flat one, from one that may be in shards.

    Args:
        part: flat; or of the shape with which ``shards_of`` shows it.
        component: that it is.
        shape: of the decoded tensor.
        order: of the decoded tensor's dimensions in the memory of the component.
    """
    part = whole_of(part)
    if component.per_element and tuple(part.shape) == tuple(shape):
        part = part.permute(tuple(order))
    return part.reshape(-1) if part.dim() > 1 else part


def whole_of(value: Any) -> Any:
    """The whole of a ``DTensor``, which every worker has to ask for; any other value itself."""
    if isinstance(value, Tensor) and is_distributed(value):
        return value.full_tensor()  # type: ignore[attr-defined]
    return value
