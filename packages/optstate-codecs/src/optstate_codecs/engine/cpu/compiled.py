"""Steps requests on a CPU: with compiled kernels where they exist, else with the reference.

A kernel is built once for each set of formats, rule, dtypes and write (see ``engine.cpu``).
Hyper-parameters, step counts and sizes are its arguments, so that they cause no other build. A step
takes no memory but one block of decoded values on each thread's stack.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from operator import is_
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.engine import eager
from optstate_codecs.engine.cpu.build import CannotBuild
from optstate_codecs.engine.cpu.calls import KernelCall
from optstate_codecs.engine.cpu.choice import KernelChoice, choice_of, warn_without_compiler
from optstate_codecs.engine.cpu.kernels import KernelSpec
from optstate_codecs.engine.request import ParamStep, StepRequest

__all__ = ["CompiledSteps"]

DTYPES = (torch.float32, torch.bfloat16)
# plans that are kept, one for each set of parameters that had gradients
PLANS = 256


class CompiledSteps:
    """The steps of one optimizer on a CPU, and what stays the same between them.

    Args:
        required: whether kernels must be built at once; otherwise ``choice`` decides.
    """

    def __init__(self, required: bool) -> None:
        self._required = required
        self._plans: OrderedDict[tuple[int, ...], _Plan] = OrderedDict()

    def step(self, request: StepRequest) -> None:
        """Step every parameter that a kernel is chosen for, and the others with the reference.

        Raises:
            CannotBuild: kernels are required and there is no working compiler; nothing has changed.
        """
        key = tuple([param_step.index for param_step in request.param_steps])
        variants = [request.rule.variant(hyper) for hyper in request.hypers]
        plan = self._plans.get(key)
        if plan is None or not plan.is_valid(request, variants):
            plan = self._plans[key] = _Plan(request, variants)
            if len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        for group in plan.undecided:
            self._decide(request, group)
        plan.undecided = [group for group in plan.undecided if not group.is_final]
        if request.found_inf is not None and bool(request.found_inf):
            return
        for group in plan.groups:
            group.step(request)

    def stepped_by_kernels(self, param_steps: Sequence[ParamStep]) -> list[bool]:
        """Whether a kernel took the last step of each parameter."""
        taken = {
            id(param_step): group.call is not None
            for plan in self._plans.values()
            for group in plan.groups
            for param_step in group.param_steps
        }
        return [taken[id(param_step)] for param_step in param_steps]

    def _decide(self, request: StepRequest, group: _Group) -> None:
        choice = group.choice
        if choice is None:
            return
        if self._required:
            choice.require()
        elif not choice.final:
            total = request.total or sum(p.param.numel() for p in request.param_steps)
            hyper = request.hypers[group.param_steps[0].group]
            scalars = [request.rule.scalars(hyper, count) for count in (1.0, 2.0, 3.0, 4.0)]
            try:
                choice.decide(group.elements, total, scalars)
            except CannotBuild as error:
                warn_without_compiler(error)
        if choice.kernel is not None:
            group.call = KernelCall(request, choice.kernel, group.positions)


class _Group:
    """The parameters of a request that one kernel, or the reference, steps.

    Attributes:
        choice: None where no kernel can take them.
        positions: in the request.
        call: of the kernel, once there is one.
    """

    def __init__(self, choice: KernelChoice | None) -> None:
        self.choice = choice
        self.positions: list[int] = []
        self.param_steps: list[ParamStep] = []
        self.elements = 0
        self.call: KernelCall | None = None

    @property
    def is_final(self) -> bool:
        """Whether the kernel, or the reference, will take all other steps too."""
        return self.choice is None or (
            self.choice.final and (self.call is not None) == (self.choice.kernel is not None)
        )

    def append(self, position: int, param_step: ParamStep) -> None:
        """Add a parameter."""
        self.positions.append(position)
        self.param_steps.append(param_step)
        self.elements += param_step.param.numel()

    def step(self, request: StepRequest) -> None:
        """Step these parameters."""
        if self.call is not None:
            self.call.run(request)
            return
        begin = perf_counter()
        eager.step(request.part(self.positions))
        if self.choice is not None:
            self.choice.spent(perf_counter() - begin, self.elements)


class _Plan:
    """The groups that step one set of parameters, and what they depend on."""

    def __init__(self, request: StepRequest, variants: list[Hashable]) -> None:
        self._param_steps, self._variants = request.param_steps, variants
        self._layouts, self._centered = _layouts(request), _centered(request)
        groups: dict[KernelChoice | None, _Group] = {}
        for position, param_step in enumerate(request.param_steps):
            variant = variants[param_step.group]
            choice = _choice(request, position, variant, self._centered[position])
            if choice not in groups:
                groups[choice] = _Group(choice)
            groups[choice].append(position, param_step)
        self.groups = list(groups.values())
        self.undecided = list(self.groups)

    def is_valid(self, request: StepRequest, variants: list[Hashable]) -> bool:
        """Whether it fits this request, if parameters and state have not moved."""
        same = self._param_steps is request.param_steps or (
            len(self._param_steps) == len(request.param_steps)
            and all(map(is_, self._param_steps, request.param_steps))
        )
        if not (same and self._variants == variants and self._centered == _centered(request)):
            return False
        if self._layouts is request.layouts:
            return True
        if self._layouts != _layouts(request):
            return False
        self._layouts = _layouts(request)
        return True


def _layouts(request: StepRequest) -> Sequence[Any]:
    """Dtype and strides of each gradient."""
    return request.layouts or [(grad.dtype, grad.stride()) for grad in request.grads]


def _centered(request: StepRequest) -> list[bool]:
    """Whether a mean is subtracted from each gradient."""
    if request.grad_means is None:
        return [False] * len(request.param_steps)
    return [start >= 0 for start in request.grad_means.starts]


def _choice(
    request: StepRequest, position: int, variant: Hashable, centered: bool
) -> KernelChoice | None:
    param_step, grad = request.param_steps[position], request.grads[position]
    if not _fits(param_step, grad):
        return None
    stored = param_step.bound
    formats = tuple(stored[moment.name] for moment in param_step.moments)
    scalars = len(request.rule.scalars(request.hypers[param_step.group], 1.0))
    stored_as = param_step.moments, formats, param_step.write, param_step.plain
    spec = KernelSpec(request.rule, variant, *stored_as, grad.dtype, scalars, centered)
    return choice_of(spec)


def _fits(param_step: ParamStep, grad: Tensor) -> bool:
    """Whether a kernel can take the layouts and dtypes of a parameter, its state and gradient."""
    param = param_step.param
    return (
        param_step.state["step"].device.type == "cpu"
        and param.dtype in DTYPES
        and grad.dtype in DTYPES
        and not any(format.whole for format in param_step.bound.values())
        and param_step.in_one_order(grad)
    )
