"""The reference as compiled loops: the fast path on a CPU.

The very functions of the reference are recorded once for each set of formats, rule, dtypes and
write, turned into C that steps one block after another, and built with the C++ compiler of the
machine (``engine.cpu``). Hyper-parameters, step counts and sizes are arguments, so nothing is built
twice. A row of decoded numbers on each thread's stack is all the memory that a step takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from optstate_codecs.counts import counted, taken
from optstate_codecs.engine import eager
from optstate_codecs.engine.cpu.build import CannotBuild
from optstate_codecs.engine.cpu.kernels import CompiledKernel, KernelSpec, loops
from optstate_codecs.engine.request import ParamStep, StepRequest
from optstate_codecs.rounding import stream_key

__all__ = ["step", "try_step"]

DTYPES = (torch.float32, torch.bfloat16)

_warned: set[str] = set()


def try_step(request: StepRequest) -> bool:
    """``step``, or False with one warning where there is no working compiler."""
    if _warned:
        return False
    try:
        step(request)
    except CannotBuild as error:
        _warned.add(str(error))
        warnings.warn(
            f"no working C++ compiler ({error}), so optimizers on the CPU step several times "
            "slower; install g++ or clang++ or set CXX, or choose backend='eager'",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def step(request: StepRequest) -> None:
    """Step every unit that loops exist for, and the others by the reference.

    Raises:
        CannotBuild: there is no working compiler; nothing has changed.
    """
    variants = [request.rule.variant(hyper) for hyper in request.hypers]
    together: dict[CompiledKernel, list[tuple[int, _Standing]]] = {}
    left = []
    for place, (param_step, grad) in enumerate(
        zip(request.param_steps, request.grads, strict=True)
    ):
        standing = _standings.get(param_step)
        if request.grad_means is not None and request.grad_means.starts[place] >= 0:
            left.append(place)
            continue
        if standing is None or not standing.holds(grad, variants[param_step.group]):
            standing = _standings[param_step] = _stand(
                request, param_step, grad, variants[param_step.group]
            )
        if standing.loops is None:
            left.append(place)
        else:
            together.setdefault(standing.loops, []).append((place, standing))
    if request.found_inf is not None and bool(request.found_inf):
        return
    for built, members in together.items():
        _run(request, built, members)
    if left:
        eager.step(request.part(left))


@dataclass(eq=False)
class _Standing:
    """Where a unit stands: its loops, and what of it they want that stays from step to step.

    Attributes:
        loops: or None, where the reference steps it.
        variant, grad: what it was chosen for.
        addresses: of the parameter and of what ``loops`` want of the state.
        keys: of the random numbers.
    """

    loops: CompiledKernel | None
    variant: Hashable
    grad: tuple[torch.dtype, tuple[int, ...]]
    addresses: list[int]
    keys: list[int]

    def holds(self, grad: Tensor, variant: Hashable) -> bool:
        """Whether it is right for this step of its unit, which has not moved."""
        return self.variant == variant and self.grad == (grad.dtype, grad.stride())


_standings: WeakKeyDictionary[ParamStep, _Standing] = WeakKeyDictionary()


def _stand(
    request: StepRequest, param_step: ParamStep, grad: Tensor, variant: Hashable
) -> _Standing:
    built = None
    if _fits(param_step, grad):
        stored = param_step.bound
        formats = tuple(stored[moment.name] for moment in param_step.moments)
        scalars = len(request.rule.scalars(request.hypers[param_step.group], 1.0))
        what = param_step.moments, formats, param_step.write, param_step.plain
        built = loops(KernelSpec(request.rule, variant, *what, grad.dtype, scalars))
    addresses, keys = [param_step.param.data_ptr()], list[int]()
    if built is not None:
        addresses += [param_step.state[key].data_ptr() for key in built.keys]
        keys = [
            k for s in built.streams for k in stream_key(param_step.seed, param_step.index, s // 2)
        ]
    return _Standing(built, variant, (grad.dtype, grad.stride()), addresses, keys)


def _fits(param_step: ParamStep, grad: Tensor) -> bool:
    """Whether loops can take a unit's layout and dtypes."""
    param = param_step.param
    return (
        param_step.state["step"].device.type == "cpu"
        and param.dtype in DTYPES
        and grad.dtype in DTYPES
        and not any(format.whole for format in param_step.bound.values())
        and param_step.in_one_order(grad)
    )


def _run(request: StepRequest, built: CompiledKernel, members: list[tuple[int, _Standing]]) -> None:
    """Step units of the same loops in one call."""
    param_steps = [request.param_steps[place] for place, _ in members]
    counts = counted(
        [param_step.state["step"] for param_step in param_steps], request.draw is not None
    )
    request.counted += param_steps
    factor = 1.0 if request.factor is None else float(request.factor)
    table: list[int] = []
    scalars: list[Any] = []
    keys: list[int] = []
    folded: dict[tuple[int, float], list[Any]] = {}
    rows = 0
    for param_step, count, (place, standing) in zip(param_steps, counts, members, strict=True):
        numel = param_step.param.numel()
        param, *parts = standing.addresses
        draw = taken(count) if request.draw is None else request.draw
        table += [
            numel,
            rows,
            draw,
            param_step.offset,
            param,
            request.grads[place].data_ptr(),
            *parts,
        ]
        which = (param_step.group, count)
        if which not in folded:
            folded[which] = [*request.rule.scalars(request.hypers[param_step.group], count), factor]
        scalars += folded[which]
        keys += standing.keys
        rows += -(-numel // built.block)
    tables = (
        torch.tensor(table, dtype=torch.int64, device="cpu"),
        torch.tensor(scalars, dtype=torch.float32, device="cpu"),
        torch.tensor(keys, dtype=torch.int64, device="cpu").to(torch.int32),
    )
    addresses = [tensor.data_ptr() for tensor in tables]
    built.run(len(param_steps), rows, *addresses, torch.get_num_threads())
    request.done += param_steps
