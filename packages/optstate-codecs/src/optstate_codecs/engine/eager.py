"""The step in plain torch operations: the reference, and the path for any device.

A tensor is stepped in slices, so that decoded moments never exist for more than one slice.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from optstate_codecs.engine.unit import Unit
from optstate_codecs.layout import FlatState, FlatView, slices, storage_order
from optstate_codecs.moments import decode_slice, encode_slice
from optstate_codecs.rounding import Counter
from optstate_codecs.writes import round_to_parameter

__all__ = ["step"]


def step(units: Iterable[Unit]) -> None:
    """Step every unit: its parameter and its state change in place."""
    for unit in units:
        unit.state["step"] += 1
        _step_unit(unit)


def _step_unit(unit: Unit) -> None:
    count = unit.state["step"]
    count = float(count) if count.device.type == "cpu" else count
    order = storage_order(unit.param)
    param, grad = FlatView(unit.param, order), FlatView(unit.grad, order)
    moments = unit.rule.moments(unit.hyper)
    state = FlatState(unit.state, unit.formats, order)
    counter = Counter(unit.seed, int(count), unit.index)
    compute = torch.float64 if unit.param.dtype == torch.float64 else torch.float32

    for start, stop in slices(unit.param):
        old = param.read(start, stop)
        value = old.to(compute)
        slope = _unscaled(grad.read(start, stop).to(compute), unit.grad_scale)
        parts = state.slice(start, stop)
        decoded = decode_slice(moments, unit.formats, parts, compute)
        unit.rule.update(value, slope, decoded, unit.hyper, count)
        encode_slice(moments, unit.formats, decoded, parts, counter, start)
        draw = counter.stream(0).at(start)
        param.write(start, stop, round_to_parameter(value, old, unit.write, draw))


def _unscaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    return grad if scale is None else grad * scale.to(grad.device, grad.dtype).reciprocal()
