"""Compiled kernels: a ``KernelSpec`` traced, compiled and built, once a process."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optstate_codecs import exact
from optstate_codecs.engine.cpu.build import build
from optstate_codecs.engine.cpu.emit import MEANS, emit, width
from optstate_codecs.engine.cpu.loop import KernelInputs
from optstate_codecs.engine.cpu.lower import lower
from optstate_codecs.engine.cpu.record import Unrecordable, record
from optstate_codecs.engine.cpu.torch_root import set_torch_root, torch_root
from optstate_codecs.engine.cpu.value import ELEMENT, SHORTEST_ROW, Lowered
from optstate_codecs.engine.eager import StepSpec, step_slice
from optstate_codecs.exact import count_name
from optstate_codecs.formats import Component, Format
from optstate_codecs.rounding import Counter, Draw
from optstate_codecs.rules import Moment, Rule
from optstate_codecs.writes import MASTER, Write

__all__ = ["CompiledKernel", "KernelSpec", "compiled_kernel", "kernel_of", "source"]

# elements a block where no format has blocks
UNBLOCKED = 1024
# blocks that are recorded: more than one, and odd, so that an element count has one meaning
BLOCKS = 3
STREAMS = 4


@dataclass(frozen=True)
class KernelSpec:
    """Everything that the C code of a kernel depends on.

    Attributes:
        rule, variant, moments, write, plain: as in a ``StepSpec``.
        formats: one a moment.
        grad_dtype: the gradient's dtype.
        scalars: how many ``Rule.scalars`` returns.
        centered: whether means are subtracted from the gradient.
    """

    rule: Rule
    variant: Hashable
    moments: tuple[Moment, ...]
    formats: tuple[Format, ...]
    write: Write
    plain: bool
    grad_dtype: torch.dtype
    scalars: int
    centered: bool = False

    @property
    def step_spec(self) -> StepSpec:
        """The operations, as the reference takes them."""
        names = [moment.name for moment in self.moments]
        formats = dict(zip(names, self.formats, strict=True))
        return StepSpec(self.rule, self.variant, self.moments, formats, self.write, self.plain)

    @property
    def has_torch_roots(self) -> bool:
        """Whether roots are torch's own, with the errors that they have on some processors."""
        return self.step_spec.square_root is torch.sqrt and not exact.sqrt_is_exact()

    @property
    def components(self) -> dict[str, list[tuple[str, Component]]]:
        """The state's components with their keys, by moment; the write's last."""
        owners = {m.name: f.components for m, f in zip(self.moments, self.formats, strict=True)}
        owners[MASTER] = self.write.components
        return {name: [(c.key(name), c) for c in found] for name, found in owners.items()}

    @property
    def block_size(self) -> int:
        """Elements a block: whole rows of every format."""
        return max([UNBLOCKED, *self._rows])

    @property
    def _rows(self) -> list[int]:
        """The lengths of rows that share a scale."""
        return sorted(
            {c.span for f in self.formats for c in f.components if c.span >= SHORTEST_ROW}
        )

    @property
    def inputs(self) -> KernelInputs:
        """The kernel's inputs."""
        tensors = {"param": (self.write.dtype, ELEMENT), "grad": (self.grad_dtype, ELEMENT)}
        if self.centered:
            tensors[MEANS] = (torch.float32, ELEMENT)
        for parts in self.components.values():
            tensors |= {key: (c.dtype, Fraction(c.shared, c.span)) for key, c in parts}
        draws = {f"draw{stream}": (stream, False) for stream in range(STREAMS)}
        draws |= {f"mirrored{stream}": (stream, True) for stream in range(STREAMS)}
        scalars = [*(f"scalar{number}" for number in range(self.scalars)), "factor"]
        counts = {count_name(size): size for size in self._rows}
        masked = any(map(_pads_with_numbers, self.formats))
        return KernelInputs(tensors, scalars, draws, counts, self.block_size, masked)


@cache
def _pads_with_numbers(format: Format) -> bool:
    """Whether bytes of zeros under a scale of 1 are numbers other than 0."""
    codes, *scales = format.components
    parts = [torch.zeros(codes.length(format.span), dtype=codes.dtype, device="cpu")]
    parts += [torch.ones(1, dtype=c.dtype, device="cpu") for c in scales]
    return bool(scales) and bool(format.decode(parts).any())


@dataclass(frozen=True, eq=False)
class CompiledKernel:
    """A built kernel and the order of its inputs.

    Attributes:
        run: the C function, see ``emit``.
        block_size: elements a block.
        keys: state keys of the tensors that follow parameter and gradient.
        streams: of the random numbers, in the order of their keys.
        width: columns of the table.
        scalars: how many there are for each tensor.
        centered: whether means are subtracted from gradients.
    """

    run: Any
    block_size: int
    keys: tuple[str, ...]
    streams: tuple[int, ...]
    width: int
    scalars: int
    centered: bool


@dataclass(frozen=True)
class _InputDraw(Draw):
    """A draw whose random bits are inputs of the record."""

    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def at(self, start: int) -> Draw:
        return self

    def bits16(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        return self.inputs[f"draw{self.stream}"]

    def paired16(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        return self.inputs[f"mirrored{self.stream}"]


@dataclass(frozen=True)
class _InputCounter(Counter):
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def stream(self, stream: int) -> Draw:
        return _InputDraw(0, 0, 0, stream, inputs=self.inputs)


@torch.inference_mode(False)
def source(spec: KernelSpec) -> str:
    """The C source of a kernel.

    Raises:
        Unrecordable: there is no C for one of the operations.
    """
    inputs, components = spec.inputs, spec.components

    def step(tensors: Mapping[str, Tensor]) -> None:
        old = tensors["param"]
        grad = tensors["grad"].to(torch.float32)
        if spec.centered:
            grad = grad - tensors[MEANS]
        grad = grad * tensors["factor"]
        parts = {name: [tensors[key] for key, _ in owned] for name, owned in components.items()}
        scalars = [tensors[name] for name in inputs.scalars[:-1]]
        counter = _InputCounter(0, 0, 0, inputs=tensors)
        new = step_slice(spec.step_spec, old, grad, parts, scalars, counter, 0)
        if new is not old:
            old.copy_(new)

    def lowered(fast: bool) -> Lowered:
        count = BLOCKS * inputs.block_size
        tensors = {
            name: torch.zeros(int(count * space), dtype=dtype, device="cpu")
            for name, (dtype, space) in inputs.tensors.items()
        }
        tensors |= {
            name: torch.ones((count // size, 1), dtype=torch.float32, device="cpu")
            for name, size in inputs.counts.items()
        }
        tensors |= {
            name: torch.ones((), dtype=torch.float32, device="cpu") for name in inputs.scalars
        }
        tensors |= {
            name: torch.zeros(count, dtype=torch.int32, device="cpu") for name in inputs.draws
        }
        found = record(step, tensors, assume=fast)
        return lower(found, count, fast=fast, torch_root=spec.has_torch_roots)

    if spec.has_torch_roots and torch_root() is None:
        raise Unrecordable("torch.sqrt, which is not rounded correctly here")
    return emit(lowered(True), lowered(False), inputs)


@cache
def compiled_kernel(spec: KernelSpec) -> CompiledKernel | None:
    """The built kernel, or None where one of its operations has no form in C.

    Raises:
        CannotBuild: there is no working compiler.
    """
    try:
        text = source(spec)
    except Unrecordable:
        return None
    return kernel_of(spec, build(text))


def kernel_of(spec: KernelSpec, run: Any) -> CompiledKernel:
    """The kernel whose function ``run`` was built from ``source(spec)``."""
    inputs = spec.inputs
    if spec.has_torch_roots:
        set_torch_root(run)
    keys = [key for parts in spec.components.values() for key, _ in parts]
    streams = [stream for stream, _ in inputs.draws.values()]
    shape = width(inputs), len(inputs.scalars), spec.centered
    return CompiledKernel(run, spec.block_size, tuple(keys), tuple(streams), *shape)
