"""The step in plain torch operations: the reference, and the path for any device.

A tensor is stepped in slices, so that decoded moments never exist for more than one slice.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optstate_codecs import exact
from optstate_codecs.counts import counted, taken
from optstate_codecs.engine.capture import capturing
from optstate_codecs.engine.request import ParamStep, StepRequest
from optstate_codecs.formats import Format
from optstate_codecs.rounding import Counter
from optstate_codecs.rules import Moment, Rule
from optstate_codecs.rules.base import Scalar, SquareRoot
from optstate_codecs.state.layout import FlatState, FlatView, slices, storage_order
from optstate_codecs.state.moments import decode_slice, encode_slice, quantization_residual
from optstate_codecs.writes import MASTER, Write

__all__ = ["StepSpec", "step", "step_slice"]


def step(request: StepRequest) -> None:
    """Step every unit: its parameter and its state change in place.

    Raises:
        RuntimeError: a CUDA graph is being recorded; step counts are read by the host here.
    """
    if capturing():
        param_step = request.param_steps[0]
        raise RuntimeError(
            f"CUDA graph capture: parameter {param_step.index} "
            f"({param_step.param.dtype}, {param_step.param.device}) "
            "is stepped by the reference, which cannot be captured; the kernel needs triton, a "
            "CUDA device, dense float32, bfloat16 or float16 laid out as its gradient, and formats "
            "with device functions"
        )
    if request.found_inf is not None and bool(request.found_inf):
        return
    for place, (param_step, grad) in enumerate(
        zip(request.param_steps, request.grads, strict=True)
    ):
        (count,) = counted([param_step.state["step"]], request.draw is not None)
        request.counted.append(param_step)
        centre = None if request.grad_means is None else request.grad_means.expanded(place, grad)
        _step_param(param_step, count, grad, request, centre)
        request.done.append(param_step)


def _step_param(
    param_step: ParamStep, count: float, grads: Tensor, request: StepRequest, centre: Tensor | None
) -> None:
    rule, hyper, factor = request.rule, request.hypers[param_step.group], request.factor
    order = storage_order(param_step.param)
    param, grad = FlatView(param_step.param, order), FlatView(grads, order)
    formats = param_step.bound
    centres = None if centre is None else FlatView(centre, order)
    state = FlatState(param_step.state, {**formats, MASTER: param_step.write}, order)
    draw = taken(count) if request.draw is None else request.draw
    counter = Counter(param_step.seed, draw, param_step.index, param_step.offset)
    compute = torch.float64 if param_step.param.dtype == torch.float64 else torch.float32

    how = StepSpec(
        rule, rule.variant(hyper), param_step.moments, formats, param_step.write, param_step.plain
    )
    scalars = rule.scalars(hyper, count)

    for start, stop in slices(param_step.param, formats.values()):
        slope = grad.read(start, stop).to(compute)
        if centres is not None:
            slope = slope - centres.read(start, stop)
        if factor is not None:
            slope = slope * factor.to(slope.device, compute)
        old, parts = param.read(start, stop), state.slice(start, stop)
        param.write(start, stop, step_slice(how, old, slope, parts, scalars, counter, start))


@dataclass(frozen=True)
class StepSpec:
    """What decides which operations a step is made of.

    Attributes:
        rule, variant: the mathematics, and what of the hyper-parameters picks its operations.
        moments, formats, write, plain: as in a ``ParamStep``.
    """

    rule: Rule
    variant: Hashable
    moments: tuple[Moment, ...]
    formats: Mapping[str, Format]
    write: Write
    plain: bool

    @property
    def square_root(self) -> SquareRoot:
        """What takes roots: with the bits of ``torch.optim`` where it takes this step too."""
        return torch.sqrt if self.plain and self.rule.in_torch else exact.sqrt


def step_slice(
    how: StepSpec,
    old: Tensor,
    slope: Tensor,
    parts: Mapping[str, Sequence[Tensor]],
    scalars: Sequence[Scalar],
    counter: Counter,
    start: int,
) -> Tensor:
    """One step of one slice: ``parts`` change in place, and so may ``old``.

    Args:
        how: the operations.
        old: the parameter's elements, flat, in its dtype.
        slope: their gradient in the dtype to compute in, float32 or float64.
        parts: the matching slices of the state's components.
        scalars: what the rule folded for this step.
        counter: keys the random numbers.
        start: the place of the slice's first element.

    Returns:
        The new elements; ``old`` where they were written into it.
    """
    compute = slope.dtype
    value = how.write.read(old, parts[MASTER]).to(compute)
    decoded = decode_slice(how.moments, how.formats, parts, compute, slope.numel())
    how.rule.apply(value, slope, decoded, scalars, how.variant, how.square_root)
    encode_slice(how.moments, how.formats, decoded, parts, counter, start)
    if how.rule.has_error_feedback:
        residual = quantization_residual(how.moments[0], how.formats, decoded, parts)
        how.rule.apply_error_feedback(
            value, residual, decoded, scalars, how.variant, how.square_root
        )
    return how.write.write(value, parts[MASTER], counter.stream(0).at(start))
