"""Builds, encodes and decodes the state of a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.engine.request import ParamStep
from optstate_codecs.formats import Format
from optstate_codecs.rounding import Counter
from optstate_codecs.rules import Moment
from optstate_codecs.state.components import components_of
from optstate_codecs.state.dim_order import DIM_ORDER, follows_order, order_entry
from optstate_codecs.state.layout import (
    Declaration,
    FlatState,
    FlatView,
    bound,
    empty_state,
    inverse_order,
    slices,
    storage_order,
)
from optstate_codecs.state.moments import decode_slice, encode_slice, raise_underflow

__all__ = [
    "counts_on_device",
    "decode_moments",
    "decode_param_step",
    "decode_stored",
    "encode_state",
    "initial_state",
    "share_steps",
]


def counts_on_device(group: Mapping[str, Any]) -> bool:
    """Whether a group's step counts are on the device of its parameters instead of on the host.

    ``fused=True`` asks for that, so that skipping a step does not wait for the device, and so does
    ``capturable=True``, so that replaying a CUDA graph counts a step.
    """
    return bool(group["fused"] or group["capturable"])


@torch.inference_mode(False)
def share_steps(states: Sequence[tuple[Tensor, dict[str, Tensor], bool]]) -> None:
    """Put the step counts of several parameters into one tensor, so that one addition counts all.

    Args:
        states: parameter, its state, and ``counts_on_device`` of its group.
    """
    members: dict[torch.device, list[dict[str, Tensor]]] = {}
    for param, state, on_device in states:
        # the host needs to read counts, which it could not on meta
        where = param.device if on_device and not param.is_meta else torch.device("cpu")
        members.setdefault(where, []).append(state)
    for device, group in members.items():
        values = [float(state["step"]) for state in group]
        bank = torch.tensor(values, dtype=torch.float32, device=device)
        for index, state in enumerate(group):
            state["step"] = bank[index]


def initial_state(
    param: Tensor, stored: Mapping[str, Declaration], device: torch.device | None = None
) -> dict[str, Tensor]:
    """The state of a parameter that has not been stepped: everything zero.

    Args:
        param: gives shape, layout and device.
        stored: the format of each moment, bound to the parameter, and, under the name ``MASTER``,
            the parameter's write.
        device: for the state; None: the parameter's.
    """
    state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    for key, component in components_of(stored).items():
        state[key] = empty_state(param, component, device)
    if follows_order(param, stored.values()):
        state[DIM_ORDER] = order_entry(param)
    return state


def encode_state(
    param: Tensor,
    values: Mapping[str, Tensor],
    moments: Sequence[Moment],
    formats: Mapping[str, Format],
    counter: Counter,
) -> dict[str, Tensor]:
    """Encode whole moments, slice by slice.

    Args:
        param: the parameter they belong to; gives shape, layout and device.
        values: each moment, floating point, of the parameter's shape.
        moments: the rule's moments.
        formats: the format of each.
        counter: random numbers, for formats that round stochastically.

    Returns:
        The state by key, without ``step``. Second moments that have underflowed are stored larger
        than given, see ``moments.raise_underflow``.
    """
    formats = bound(formats, param)
    state = initial_state(param, formats)
    del state["step"]
    order = storage_order(param)
    views = {m.name: FlatView(values[m.name], order) for m in moments}
    stored = FlatState(state, formats, order)
    for start, stop in slices(param, formats.values()):
        decoded = {
            name: view.read(start, stop).to(param.device, torch.float32)
            for name, view in views.items()
        }
        decoded = raise_underflow(moments, formats, decoded)
        encode_slice(moments, formats, decoded, stored.slice(start, stop), counter, start)
    return state


def decode_moments(
    shape_as: Tensor,
    state: Mapping[str, Tensor],
    moments: Sequence[Moment],
    formats: Mapping[str, Format],
) -> dict[str, Tensor]:
    """Decode whole moments, slice by slice.

    Args:
        shape_as: a tensor with the shape and memory layout that the components follow.
        state: components by state key.
        moments: the rule's moments.
        formats: the format of each.

    Returns:
        Each moment: float32, of that shape and layout; copies.
    """
    order = storage_order(shape_as)
    ordered = [shape_as.shape[d] for d in order]
    device = next(iter(state.values())).device if state else shape_as.device
    flat = {
        m.name: torch.empty(shape_as.numel(), dtype=torch.float32, device=device) for m in moments
    }
    formats = bound(formats, shape_as)
    stored = FlatState(state, formats, order)
    for start, stop in slices(shape_as, formats.values()):
        parts = stored.slice(start, stop)
        decoded = decode_slice(moments, formats, parts, torch.float32, stop - start)
        for name, value in decoded.items():
            flat[name][start:stop] = value
    return {name: value.view(ordered).permute(inverse_order(order)) for name, value in flat.items()}


def decode_param_step(param_step: ParamStep) -> dict[str, Tensor]:
    """The step count (0-d) and every moment (float32, of the parameter's shape); copies."""
    state = param_step.state
    stored = {key: state[key] for key in param_step.keys[1:]}
    decoded = decode_moments(param_step.param, stored, param_step.moments, param_step.formats)
    return {"step": state["step"].clone(), **decoded}


def decode_stored(
    param: Tensor,
    stored: Mapping[str, Tensor],
    moments: Sequence[Moment],
    formats: Mapping[str, Format],
    order: Sequence[int],
) -> dict[str, Tensor]:
    """Decode whole moments whose blocks follow any order of the parameter's dimensions.

    Args:
        param: gives shape and device.
        stored: components by state key, each in any layout in memory and on any device.
        moments: the moments to decode.
        formats: the format of each, as in a group.
        order: of the dimensions when they were encoded, from the slowest to the fastest.

    Returns:
        Each moment: float32, on the parameter's device, in that order in memory; copies.
    """
    shape = [param.shape[d] for d in order]
    like = torch.empty(shape, dtype=torch.uint8, device="meta").permute(inverse_order(order))
    parts = components_of(bound(formats, like))
    local = {
        key: torch.empty_like(like, dtype=c.dtype, device=param.device).copy_(stored[key])
        if c.per_element
        else stored[key].to(param.device)
        for key, c in parts.items()
    }
    return decode_moments(like, local, moments, formats)
