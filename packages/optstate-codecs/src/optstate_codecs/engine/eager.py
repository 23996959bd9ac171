"""The reference step in plain torch operations, which runs on any device.

A tensor is stepped slice by slice, so that decoded moments exist for one slice only.
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
    """Step every parameter of a request: parameters and state change in place.

    Raises:
        RuntimeError: a CUDA graph is being captured; the host reads step counts here.
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
    pairs = zip(request.param_steps, request.grads, strict=True)
    for position, (param_step, grad) in enumerate(pairs):
        (count,) = counted([param_step.state["step"]], request.draw is not None)
        request.counted.append(param_step)
        mean = request.grad_means.expanded(position, grad) if request.grad_means else None
        _step_param(param_step, count, grad, request, mean)
        request.torn.clear()
        request.done.append(param_step)


def _step_param(
    param_step: ParamStep, count: float, grad: Tensor, request: StepRequest, mean: Tensor | None
) -> None:
    rule, hyper, factor = request.rule, request.hypers[param_step.group], request.factor
    order = storage_order(param_step.param)
    param, grads = FlatView(param_step.param, order), FlatView(grad, order)
    formats = param_step.bound
    means = None if mean is None else FlatView(mean, order)
    state = FlatState(param_step.state, {**formats, MASTER: param_step.write}, order)
    draw = taken(count) if request.draw is None else request.draw
    counter = Counter(param_step.seed, draw, param_step.key, param_step.offset)
    compute = torch.float64 if param_step.param.dtype == torch.float64 else torch.float32

    spec = StepSpec(
        rule, rule.variant(hyper), param_step.moments, formats, param_step.write, param_step.plain
    )
    scalars = rule.scalars(hyper, count)

    for start, stop in slices(param_step.param, formats.values()):
        part = grads.read(start, stop).to(compute)
        if means is not None:
            part = part - means.read(start, stop)
        if factor is not None:
            part = part * factor.to(part.device, compute)
        old, components = param.read(start, stop), state.slice(start, stop)
        new = step_slice(spec, old, part, components, scalars, counter, start)
        param.write(start, stop, new)
        request.torn[:] = [param_step]


@dataclass(frozen=True)
class StepSpec:
    """Everything that the operations of a step depend on.

    Attributes:
        rule: the update rule.
        variant: ``rule.variant``: the hyper-parameters that select operations.
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
        """The square root: ``torch.optim``'s own where it has this step too, else rounded once."""
        return torch.sqrt if self.plain and self.rule.in_torch else exact.sqrt


def step_slice(
    spec: StepSpec,
    old: Tensor,
    grad: Tensor,
    parts: Mapping[str, Sequence[Tensor]],
    scalars: Sequence[Scalar],
    counter: Counter,
    start: int,
) -> Tensor:
    """One step of one slice: ``parts`` change in place, and so may ``old``.

    Args:
        spec: the operations.
        old: the parameter's elements, flat, in its dtype.
        grad: their gradient in the dtype to compute in, float32 or float64.
        parts: the matching slices of the state's components.
        scalars: ``rule.scalars`` for this step.
        counter: keys the random numbers.
        start: the index of the slice's first element.

    Returns:
        The new elements; ``old`` where they were written into it.
    """
    compute = grad.dtype
    value = spec.write.read(old, parts[MASTER]).to(compute)
    decoded = decode_slice(spec.moments, spec.formats, parts, compute, grad.numel())
    spec.rule.apply(value, grad, decoded, scalars, spec.variant, spec.square_root)
    encode_slice(spec.moments, spec.formats, decoded, parts, counter, start)
    if spec.rule.has_error_feedback and spec.moments:
        residual = quantization_residual(spec.moments[0], spec.formats, decoded, parts)
        spec.rule.apply_error_feedback(
            value, residual, decoded, scalars, spec.variant, spec.square_root
        )
    return spec.write.write(value, parts[MASTER], counter.stream(0).at(start))
