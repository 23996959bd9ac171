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


def try_step(job: StepRequest) -> bool:
    """``step``, or False with one warning where there is no working compiler."""
    if _warned:
        return False
    try:
        step(job)
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


def step(job: StepRequest) -> None:
    """Step every unit that loops exist for, and the others by the reference.

    Raises:
        CannotBuild: there is no working compiler; nothing has changed.
    """
    variants = [job.rule.variant(hyper) for hyper in job.hypers]
    together: dict[CompiledKernel, list[tuple[int, _Standing]]] = {}
    left = []
    for place, (unit, grad) in enumerate(zip(job.units, job.grads, strict=True)):
        standing = _standings.get(unit)
        if job.centres is not None and job.centres.places[place] >= 0:
            left.append(place)
            continue
        if standing is None or not standing.holds(grad, variants[unit.group]):
            standing = _standings[unit] = _stand(job, unit, grad, variants[unit.group])
        if standing.loops is None:
            left.append(place)
        else:
            together.setdefault(standing.loops, []).append((place, standing))
    if job.found_inf is not None and bool(job.found_inf):
        return
    for built, members in together.items():
        _run(job, built, members)
    if left:
        eager.step(job.part(left))


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


def _stand(job: StepRequest, unit: ParamStep, grad: Tensor, variant: Hashable) -> _Standing:
    built = None
    if _fits(unit, grad):
        stored = unit.bound
        formats = tuple(stored[moment.name] for moment in unit.moments)
        scalars = len(job.rule.scalars(job.hypers[unit.group], 1.0))
        what = unit.moments, formats, unit.write, unit.plain
        built = loops(KernelSpec(job.rule, variant, *what, grad.dtype, scalars))
    addresses, keys = [unit.param.data_ptr()], list[int]()
    if built is not None:
        addresses += [unit.state[key].data_ptr() for key in built.keys]
        keys = [k for s in built.streams for k in stream_key(unit.seed, unit.index, s // 2)]
    return _Standing(built, variant, (grad.dtype, grad.stride()), addresses, keys)


def _fits(unit: ParamStep, grad: Tensor) -> bool:
    """Whether loops can take a unit's layout and dtypes."""
    param = unit.param
    return (
        unit.state["step"].device.type == "cpu"
        and param.dtype in DTYPES
        and grad.dtype in DTYPES
        and not any(format.whole for format in unit.bound.values())
        and unit.in_one_order(grad)
    )


def _run(job: StepRequest, built: CompiledKernel, members: list[tuple[int, _Standing]]) -> None:
    """Step units of the same loops in one call."""
    units = [job.units[place] for place, _ in members]
    counts = counted([unit.state["step"] for unit in units], job.draw is not None)
    job.counted += units
    factor = 1.0 if job.factor is None else float(job.factor)
    table: list[int] = []
    scalars: list[Any] = []
    keys: list[int] = []
    folded: dict[tuple[int, float], list[Any]] = {}
    rows = 0
    for unit, count, (place, standing) in zip(units, counts, members, strict=True):
        numel = unit.param.numel()
        param, *parts = standing.addresses
        draw = taken(count) if job.draw is None else job.draw
        table += [numel, rows, draw, unit.offset, param, job.grads[place].data_ptr(), *parts]
        which = (unit.group, count)
        if which not in folded:
            folded[which] = [*job.rule.scalars(job.hypers[unit.group], count), factor]
        scalars += folded[which]
        keys += standing.keys
        rows += -(-numel // built.block)
    tables = (
        torch.tensor(table, dtype=torch.int64, device="cpu"),
        torch.tensor(scalars, dtype=torch.float32, device="cpu"),
        torch.tensor(keys, dtype=torch.int64, device="cpu").to(torch.int32),
    )
    addresses = [tensor.data_ptr() for tensor in tables]
    built.run(len(units), rows, *addresses, torch.get_num_threads())
    job.done += units
