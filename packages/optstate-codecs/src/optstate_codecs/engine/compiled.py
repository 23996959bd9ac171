"""The reference as compiled loops: the fast path on a CPU.

The very functions of the reference are recorded once for each set of formats, rule, dtypes and
write, turned into C that steps one block after another, and built with the C++ compiler of the
machine. Hyper-parameters, step counts and sizes are arguments, so nothing is built twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from optstate_codecs.engine import eager
from optstate_codecs.engine.cpu.build import CannotBuild, build
from optstate_codecs.engine.cpu.emit import emit
from optstate_codecs.engine.cpu.lower import Lowered, lower
from optstate_codecs.engine.cpu.record import Unrecordable, record
from optstate_codecs.engine.eager import How, step_slice
from optstate_codecs.engine.unit import Job, Unit
from optstate_codecs.formats import Component, Format
from optstate_codecs.layout import same_order, storage_order
from optstate_codecs.rounding import Draw, stream_key
from optstate_codecs.rules import Moment, Rule
from optstate_codecs.writes import MASTER, Write

__all__ = ["Kind", "Loops", "loops", "source", "step", "try_step"]

DTYPES = (torch.float32, torch.bfloat16)
# elements a row where no format has blocks
PLAIN = 1024
# rows that are recorded: more than one, and no power of two, so that no count means two things
ROWS = 3
STREAMS = 4


@dataclass(frozen=True)
class Kind:
    """What decides which loops step a tensor.

    Attributes:
        rule, variant: the mathematics, and what of the hyper-parameters picks its operations.
        moments: of the rule.
        formats: one for each.
        write: of the parameter; it knows the dtype.
        grad: the gradient's dtype.
    """

    rule: Rule
    variant: Hashable
    moments: tuple[Moment, ...]
    formats: tuple[Format, ...]
    write: Write
    grad: torch.dtype

    @property
    def how(self) -> How:
        """The operations, as the reference takes them."""
        names = [moment.name for moment in self.moments]
        formats = dict(zip(names, self.formats, strict=True))
        return How(self.rule, self.variant, self.moments, formats, self.write)

    @property
    def components(self) -> dict[str, list[tuple[str, Component]]]:
        """The state's components and their keys, by owner."""
        owners = {**self.how.formats, MASTER: self.write}
        return {n: [(c.key(n), c) for c in owner.components] for n, owner in owners.items()}

    @property
    def block(self) -> int:
        """Elements a row.

        Raises:
            Unrecordable: formats have blocks of different sizes.
        """
        spans = {format.span for format in self.formats} - {1, 2}
        if len(spans) > 1:
            raise Unrecordable("blocks of different sizes")
        return spans.pop() if spans else PLAIN


@dataclass(frozen=True, eq=False)
class Loops:
    """Built loops, and what they want in which order; see ``cpu.emit``.

    Attributes:
        run: the function.
        block: elements a row.
        keys: state keys of the tensors that follow parameter and gradient.
        streams: of the random numbers.
    """

    run: Any
    block: int
    keys: tuple[str, ...]
    streams: tuple[int, ...]


class _Draw(Draw):
    """Random numbers that are an input of the record."""

    def __init__(self, inputs: Mapping[str, Tensor], stream: int) -> None:
        super().__init__(0, 0, 0, stream)
        object.__setattr__(self, "inputs", inputs)

    def at(self, start: int) -> Draw:
        return self

    def bits16(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        return self.__dict__["inputs"][f"draw{self.stream}"]

    def paired16(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        return self.__dict__["inputs"][f"mirrored{self.stream}"]


class _Counter:
    """Stands in for ``rounding.Counter``."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self._inputs = inputs

    def stream(self, stream: int) -> Draw:
        return _Draw(self._inputs, stream)


def source(kind: Kind, scalars: int) -> tuple[str, tuple[int, ...]]:
    """C that steps tensors of a kind, and the streams of random numbers it wants keys for.

    Args:
        kind: what to step.
        scalars: how many numbers the rule folds for a step.

    Raises:
        Unrecordable: there is no C for one of the operations.
    """
    block = kind.block
    owners = kind.components
    tensors = {"param": (kind.write.dtype, 1), "grad": (kind.grad, 1)}
    for parts in owners.values():
        tensors |= {key: (c.dtype, c.span) for key, c in parts}
    numbers = [f"scalar{i}" for i in range(scalars)]
    draws = {f"draw{s}": (s, False) for s in range(STREAMS)}
    draws |= {f"mirrored{s}": (s, True) for s in range(STREAMS)}

    def step(inputs: Mapping[str, Tensor]) -> None:
        parts = {name: [inputs[key] for key, _ in found] for name, found in owners.items()}
        given = [inputs[name] for name in numbers]
        slope = inputs["grad"].to(torch.float32) * inputs["factor"]
        old = inputs["param"]
        new = step_slice(kind.how, old, slope, parts, given, _Counter(inputs), 0)
        if new is not old:
            old.copy_(new)

    def lowered(assume: bool) -> Lowered:
        count = ROWS * block
        inputs = {
            name: torch.zeros(-(-count // span), dtype=dtype)
            for name, (dtype, span) in tensors.items()
        }
        inputs |= {name: torch.ones(()) for name in (*numbers, "factor")}
        inputs |= {name: torch.zeros(count, dtype=torch.int32) for name in draws}
        return lower(record(step, inputs, assume=assume), ROWS, block, fast=assume)

    text = emit(lowered(True), lowered(False), tensors, [*numbers, "factor"], draws, block)
    return text, tuple(stream for stream, _ in draws.values())


@cache
def loops(kind: Kind, scalars: int) -> Loops | None:
    """Built loops for a kind, or None where one of its operations has no form in C.

    Raises:
        CannotBuild: there is no working compiler.
    """
    try:
        text, streams = source(kind, scalars)
    except Unrecordable:
        return None
    keys = tuple(key for parts in kind.components.values() for key, _ in parts)
    return Loops(build(text), kind.block, keys, streams)


_warned: set[str] = set()


def try_step(job: Job) -> bool:
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


def step(job: Job) -> None:
    """Step every unit that loops exist for, and the others by the reference.

    Raises:
        CannotBuild: there is no working compiler; nothing has changed.
    """
    variants = [job.rule.variant(hyper) for hyper in job.hypers]
    together: dict[Loops, list[tuple[int, _Standing]]] = {}
    left = []
    for place, (unit, grad) in enumerate(zip(job.units, job.grads, strict=True)):
        standing = _standings.get(unit)
        if standing is None or not standing.holds(unit, grad, variants[unit.group]):
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
        units, grads = [job.units[i] for i in left], [job.grads[i] for i in left]
        eager.step(replace(job, units=units, grads=grads))


@dataclass(eq=False)
class _Standing:
    """Where a unit stands: its loops, and what of it they want that stays from step to step.

    Attributes:
        loops: or None, where the reference steps it.
        variant, grad: what it was chosen for.
        parts: the state's tensors.
        addresses: of the parameter and of what ``loops`` want of the state.
        keys: of the random numbers.
    """

    loops: Loops | None
    variant: Hashable
    grad: tuple[torch.dtype, tuple[int, ...]]
    parts: list[Tensor]
    addresses: list[int]
    keys: list[int]

    def holds(self, unit: Unit, grad: Tensor, variant: Hashable) -> bool:
        """Whether all is where it was."""
        return (
            unit.param.data_ptr() == self.addresses[0]
            and all(map(is_, unit.state.values(), self.parts))
            and self.variant == variant
            and self.grad == (grad.dtype, grad.stride())
        )


_standings: WeakKeyDictionary[Unit, _Standing] = WeakKeyDictionary()


def _stand(job: Job, unit: Unit, grad: Tensor, variant: Hashable) -> _Standing:
    built = None
    if _fits(unit, grad):
        formats = tuple(unit.formats[moment.name] for moment in unit.moments)
        kind = Kind(job.rule, variant, unit.moments, formats, unit.write, grad.dtype)
        built = loops(kind, len(job.rule.scalars(job.hypers[unit.group], 1.0)))
    addresses, keys = [unit.param.data_ptr()], []
    if built is not None:
        addresses += [unit.state[key].data_ptr() for key in built.keys]
        keys = [k for s in built.streams for k in stream_key(unit.seed, unit.index, s // 2)]
    parts = list(unit.state.values())
    return _Standing(built, variant, (grad.dtype, grad.stride()), parts, addresses, keys)


def _fits(unit: Unit, grad: Tensor) -> bool:
    """Whether loops can take a unit's layout and dtypes."""
    param = unit.param
    return (
        unit.state["step"].device.type == "cpu"
        and param.dtype in DTYPES
        and grad.dtype in DTYPES
        and param.stride() == grad.stride()
        and param.permute(storage_order(param)).is_contiguous()
        and all(
            same_order(unit.state[c.key(name)], c, param)
            for name, declared in unit.stored.items()
            for c in declared.components
        )
    )


def _run(job: Job, built: Loops, members: list[tuple[int, _Standing]]) -> None:
    """Step units of the same loops in one call."""
    units = [job.units[place] for place, _ in members]
    torch._foreach_add_([unit.state["step"] for unit in units], 1.0)
    factor = 1.0 if job.factor is None else float(job.factor)
    table: list[int] = []
    scalars: list[Any] = []
    keys: list[int] = []
    folded: dict[tuple[int, float], list[Any]] = {}
    rows = 0
    for unit, (place, standing) in zip(units, members, strict=True):
        count, numel = float(unit.state["step"]), unit.param.numel()
        param, *parts = standing.addresses
        table += [numel, rows, int(count), param, job.grads[place].data_ptr(), *parts]
        which = (unit.group, count)
        if which not in folded:
            folded[which] = [*job.rule.scalars(job.hypers[unit.group], count), factor]
        scalars += folded[which]
        keys += standing.keys
        rows += -(-numel // built.block)
    tables = (
        torch.tensor(table, dtype=torch.int64),
        torch.tensor(scalars, dtype=torch.float32),
        torch.tensor(keys, dtype=torch.int64).to(torch.int32),
    )
    addresses = [tensor.data_ptr() for tensor in tables]
    built.run(len(units), rows, *addresses, torch.get_num_threads())
