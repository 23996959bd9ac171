"""Loops for each kind of tensor: which operations the reference would do, built once a process."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optstate_codecs import exact
from optstate_codecs.engine.cpu.build import build
from optstate_codecs.engine.cpu.emit import emit
from optstate_codecs.engine.cpu.lower import lower
from optstate_codecs.engine.cpu.record import Unrecordable, record
from optstate_codecs.engine.cpu.schedule import KernelInputs
from optstate_codecs.engine.cpu.value import Lowered
from optstate_codecs.engine.eager import StepSpec, step_slice
from optstate_codecs.formats import Component, Format
from optstate_codecs.rounding import Counter, Draw
from optstate_codecs.rules import Moment, Rule
from optstate_codecs.writes import MASTER, Write

__all__ = ["CompiledKernel", "KernelSpec", "loops", "source"]

# elements a row where no format has blocks
PLAIN = 1024
# rows that are recorded: more than one, and odd, so that no count of elements means two things
ROWS = 3
STREAMS = 4


@dataclass(frozen=True)
class KernelSpec:
    """What decides which loops step a tensor.

    Attributes:
        rule, variant: the mathematics, and what of the hyper-parameters picks its operations.
        moments: of the rule.
        formats: one for each.
        write: of the parameter; it knows the dtype.
        plain: as in a ``ParamStep``.
        grad: the gradient's dtype.
        scalars: how many numbers the rule folds for a step.
    """

    rule: Rule
    variant: Hashable
    moments: tuple[Moment, ...]
    formats: tuple[Format, ...]
    write: Write
    plain: bool
    grad: torch.dtype
    scalars: int

    @property
    def how(self) -> StepSpec:
        """The operations, as the reference takes them."""
        names = [moment.name for moment in self.moments]
        formats = dict(zip(names, self.formats, strict=True))
        return StepSpec(self.rule, self.variant, self.moments, formats, self.write, self.plain)

    @property
    def components(self) -> dict[str, list[tuple[str, Component]]]:
        """The state's components with their keys, by moment; the write's last."""
        owners = {m.name: f.components for m, f in zip(self.moments, self.formats, strict=True)}
        owners[MASTER] = self.write.components
        return {name: [(c.key(name), c) for c in found] for name, found in owners.items()}

    @property
    def block(self) -> int:
        """Elements a row.

        Raises:
            Unrecordable: formats have blocks of different sizes, or codes packed too closely.
        """
        if self.rule.has_error_feedback:
            raise Unrecordable("moments are decoded again after they are encoded")
        if any(f.components[0].span not in (1, 2) for f in self.formats):
            raise Unrecordable("more than two codes in a byte, or codes across bytes")
        spans = {format.span for format in self.formats} - {1, 2}
        if len(spans) > 1:
            raise Unrecordable("blocks of different sizes")
        return spans.pop() if spans else PLAIN

    @property
    def given(self) -> KernelInputs:
        """What the loops take."""
        tensors = {"param": (self.write.dtype, 1), "grad": (self.grad, 1)}
        for parts in self.components.values():
            tensors |= {key: (c.dtype, c.span) for key, c in parts}
        draws = {f"draw{stream}": (stream, False) for stream in range(STREAMS)}
        draws |= {f"mirrored{stream}": (stream, True) for stream in range(STREAMS)}
        scalars = [*(f"scalar{place}" for place in range(self.scalars)), "factor"]
        return KernelInputs(tensors, scalars, draws, self.block)


@dataclass(frozen=True, eq=False)
class CompiledKernel:
    """Built loops, and what they want in which order.

    Attributes:
        run: the function, see ``emit``.
        block: elements a row.
        keys: state keys of the tensors that follow parameter and gradient.
        streams: of the random numbers.
    """

    run: Any
    block: int
    keys: tuple[str, ...]
    streams: tuple[int, ...]


@dataclass(frozen=True)
class _GivenDraw(Draw):
    """Random numbers that are an input of the record."""

    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def at(self, start: int) -> Draw:
        return self

    def bits16(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        return self.inputs[f"draw{self.stream}"]

    def paired16(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        return self.inputs[f"mirrored{self.stream}"]


@dataclass(frozen=True)
class _GivenCounter(Counter):
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def stream(self, stream: int) -> Draw:
        return _GivenDraw(0, 0, 0, stream, inputs=self.inputs)


@torch.inference_mode(False)
def source(kind: KernelSpec) -> str:
    """C that steps tensors of a kind.

    Raises:
        Unrecordable: there is no C for one of the operations.
    """
    given, owners = kind.given, kind.components

    def step(inputs: Mapping[str, Tensor]) -> None:
        old = inputs["param"]
        slope = inputs["grad"].to(torch.float32) * inputs["factor"]
        parts = {name: [inputs[key] for key, _ in found] for name, found in owners.items()}
        scalars = [inputs[name] for name in given.scalars[:-1]]
        counter = _GivenCounter(0, 0, 0, inputs=inputs)
        new = step_slice(kind.how, old, slope, parts, scalars, counter, 0)
        if new is not old:
            old.copy_(new)

    def lowered(fast: bool) -> Lowered:
        count = ROWS * given.block
        inputs = {
            name: torch.zeros(count // span, dtype=dtype, device="cpu")
            for name, (dtype, span) in given.tensors.items()
        }
        inputs |= {
            name: torch.ones((), dtype=torch.float32, device="cpu") for name in given.scalars
        }
        inputs |= {
            name: torch.zeros(count, dtype=torch.int32, device="cpu") for name in given.draws
        }
        found = record(step, inputs, assume=fast)
        exactly = kind.how.square_root is exact.sqrt or exact.sqrt_is_exact()
        if not exactly and any(call.name == "sqrt" for call in found.calls):
            raise Unrecordable("torch.sqrt, which is not rounded correctly here")
        return lower(found, ROWS, given.block, fast=fast)

    return emit(lowered(True), lowered(False), given)


@cache
def loops(kind: KernelSpec) -> CompiledKernel | None:
    """Built loops for a kind, or None where one of its operations has no form in C.

    Raises:
        CannotBuild: there is no working compiler.
    """
    try:
        text = source(kind)
    except Unrecordable:
        return None
    keys = [key for parts in kind.components.values() for key, _ in parts]
    streams = [stream for stream, _ in kind.given.draws.values()]
    return CompiledKernel(build(text), kind.block, tuple(keys), tuple(streams))
