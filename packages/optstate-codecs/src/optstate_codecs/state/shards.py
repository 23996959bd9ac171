"""The state of DTensors in state dicts: saved as shards, loaded from shards or whole tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.engine.request import ParamStep
from optstate_codecs.formats import FP32, Format
from optstate_codecs.rules import Moment
from optstate_codecs.sharding import (
    component_shape,
    is_distributed,
    local_of,
    local_slice,
    placed_like,
    rewrapped,
    shard_formats,
)
from optstate_codecs.state.building import decode_stored
from optstate_codecs.state.components import components_of
from optstate_codecs.state.dim_order import DIM_ORDER, order_in
from optstate_codecs.state.layout import bound, stored_formats
from optstate_codecs.writes import CORRECTION

__all__ = ["as_owner", "as_shards", "shard_of", "whole_of_shards"]


def as_owner(decoded: Mapping[str, Tensor], param: Tensor) -> dict[str, Tensor]:
    """Decoded moments as DTensors where the parameter is one; the step count stays plain."""
    return {
        key: value if key == "step" else placed_like(value, param) for key, value in decoded.items()
    }


def as_shards(param_step: ParamStep, param: Tensor) -> dict[str, Tensor]:
    """The components of a DTensor's state as DTensors of the same placements; memory is shared."""
    return {
        key: rewrapped(param_step.state[key], param, component_shape(param, component))
        for key, component in components_of(param_step.stored).items()
    }


def shard_of(
    where: str,
    owner: Tensor,
    stored: Mapping[str, Any],
    moments: Sequence[Moment],
    source: Mapping[str, Format],
) -> tuple[dict[str, Any], dict[str, Format]]:
    """The part of a saved state that belongs to a DTensor's shard, and the formats it is in.

    Args:
        where: names the state in messages.
        owner: the parameter.
        stored: DTensors, or the same whole tensors on each worker.
        moments: the rule's.
        source: the formats of the saved group.

    Raises:
        KeyError, ValueError: components are missing, or their shapes are neither those of a
            DTensor's state nor those of a plain tensor's.
    """
    local = local_of(owner)
    found, sized = dict(stored), shard_formats(source, owner)
    if CORRECTION in stored:
        found[CORRECTION] = local_slice(stored[CORRECTION], owner)
    parts = components_of(bound(sized, owner))
    shapes = {key: (component_shape(owner, c), c.shape(owner.shape)) for key, c in parts.items()}
    if all(isinstance(v := stored.get(key), Tensor) and v.shape in shapes[key] for key in parts):
        for key, component in parts.items():
            value = stored[key]
            whole = value if is_distributed(value) else value.view(shapes[key][0])
            found[key] = local_slice(whole, owner).reshape(component.shape(local.shape))
        return found, sized
    # of a plain tensor, whose blocks do not end with rows: decoded whole, and cut
    sized = stored_formats(source, owner.numel())
    parts = components_of(bound(sized, owner))
    for key, component in parts.items():
        given, expected = stored.get(key), component.shape(owner.shape)
        if given is None:
            raise KeyError(f"{where}: missing key {key!r}")
        if not isinstance(given, Tensor) or given.shape != expected or is_distributed(given):
            shape = tuple(given.shape) if isinstance(given, Tensor) else given
            raise ValueError(
                f"{where}[{key!r}]: shape {shape}, must be {shapes.get(key, expected)}"
            )
    like = torch.empty_strided(owner.shape, owner.stride(), dtype=owner.dtype, device=local.device)
    keys = [key for key, component in parts.items() if component.suffix]
    order = order_in(where, like, stored, keys) or tuple(range(like.dim()))
    decoded = decode_stored(like, stored, moments, sized, order)
    for key in (*parts, DIM_ORDER):
        found.pop(key, None)
    found |= {name: local_slice(value, owner) for name, value in decoded.items()}
    return found, dict.fromkeys(sized, FP32())


def whole_of_shards(
    where: str, param: Tensor, stored: Mapping[str, Any], source: dict[str, Format]
) -> tuple[Mapping[str, Any], dict[str, Format]]:
    """State of a plain tensor that was gathered from shards, and its formats; others unchanged.

    Blocks of shards end with rows, see ``sharding.shard_formats``.

    Raises:
        TypeError: it has not been gathered; the message names the entry.
    """
    for key, value in stored.items():
        if isinstance(value, Tensor) and is_distributed(value):
            raise TypeError(
                f"{where}[{key!r}]: is a DTensor, must be a plain tensor as the parameter is; "
                "gather it first, as StateDictOptions(full_state_dict=True) does"
            )
    plain = bound(source, param)
    shapes = {key: c.shape(param.shape) for key, c in components_of(plain).items()}
    if _has_shapes(stored, shapes) or any(format.whole for format in plain.values()):
        return stored, source
    sized = shard_formats(source, param)
    parts = components_of(bound(sized, param))
    if not _has_shapes(stored, {key: component_shape(param, c) for key, c in parts.items()}):
        return stored, source
    shaped = {key: stored[key].reshape(c.shape(param.shape)) for key, c in parts.items()}
    return {**stored, **shaped}, sized


def _has_shapes(stored: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether all of these components are present, with these shapes."""
    return all(
        isinstance(value := stored.get(key), Tensor) and tuple(value.shape) == tuple(shape)
        for key, shape in shapes.items()
    )
