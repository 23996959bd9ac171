"""The step in plain torch operations: the reference, and the path for any device.

A tensor is stepped in slices, so that decoded moments never exist for more than one slice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optstate_codecs.engine.capture import capturing
from optstate_codecs.engine.unit import Job, Unit
from optstate_codecs.layout import FlatState, FlatView, slices, storage_order
from optstate_codecs.moments import decode_slice, encode_slice
from optstate_codecs.rounding import Counter
from optstate_codecs.rules import Rule
from optstate_codecs.writes import MASTER

__all__ = ["step"]


def step(job: Job) -> None:
    """Step every unit: its parameter and its state change in place.

    Raises:
        RuntimeError: a CUDA graph is being recorded; step counts are read by the host here.
    """
    if capturing():
        unit = job.units[0]
        raise RuntimeError(
            f"CUDA graph capture: parameter {unit.index} ({unit.param.dtype}, {unit.param.device}) "
            "is stepped by the reference, which cannot be captured; the kernel needs triton, a "
            "CUDA device, and dense float32, bfloat16 or float16 laid out as its gradient"
        )
    if job.found_inf is not None and bool(job.found_inf):
        return
    for unit, grad in zip(job.units, job.grads, strict=True):
        unit.state["step"] += 1
        _step_unit(unit, grad, job.rule, job.hypers[unit.group], job.factor)


def _step_unit(unit: Unit, grads: Tensor, rule: Rule, hyper: Any, factor: Tensor | None) -> None:
    count = float(unit.state["step"])
    order = storage_order(unit.param)
    param, grad = FlatView(unit.param, order), FlatView(grads, order)
    state = FlatState(unit.state, unit.stored, order)
    counter = Counter(unit.seed, int(count), unit.index)
    compute = torch.float64 if unit.param.dtype == torch.float64 else torch.float32

    for start, stop in slices(unit.param):
        parts = state.slice(start, stop)
        value = unit.write.read(param.read(start, stop), parts[MASTER]).to(compute)
        slope = grad.read(start, stop).to(compute)
        if factor is not None:
            slope = slope * factor.to(slope.device, compute)
        decoded = decode_slice(unit.moments, unit.formats, parts, compute, stop - start)
        rule.update(value, slope, decoded, hyper, count)
        encode_slice(unit.moments, unit.formats, decoded, parts, counter, start)
        draw = counter.stream(0).at(start)
        param.write(start, stop, unit.write.write(value, parts[MASTER], draw))
