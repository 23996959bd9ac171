"""Chooses between a compiled kernel and the reference, by their costs.

A built kernel is always the cheaper way, so the question is only when to build one. Nobody knows
how many steps will follow. As in the ski-rental problem, the reference steps until it has taken as
long as a build takes; then the kernel is built. So nobody waits more than twice as long as with
knowledge of the future, and short runs build nothing. The build runs in the background, unless a
single step of the reference would take longer.

Both ways give the same bits, so that a run may change from one to the other. Each kernel is
compared with the reference before it is used. Where torch rounds the ends of tensors otherwise than
the rest, which no kernel does, the size of the optimizer chooses once and for all.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.engine.cpu.build import BackgroundBuild, CannotBuild, find
from optstate_codecs.engine.cpu.calls import call_kernel
from optstate_codecs.engine.cpu.kernels import (
    CompiledKernel,
    KernelSpec,
    compiled_kernel,
    kernel_of,
    source,
)
from optstate_codecs.engine.cpu.record import Unrecordable
from optstate_codecs.engine.eager import step_slice
from optstate_codecs.exact import TAIL, rounds_once
from optstate_codecs.rounding import Counter, stream_key
from optstate_codecs.rules.base import Scalar

__all__ = ["KernelChoice", "choice_of", "same_roundings", "warn_without_compiler"]

_warned: set[str] = set()

# seconds to trace the reference and look for a built kernel, and to build one
LOOK_SECONDS, BUILD_SECONDS = 0.05, 0.7
# of the reference, until it has been timed; and elements from which on kernels are built at once
# where the choice must never change
SECONDS_PER_ELEMENT = 6e-8
LARGE = 1 << 20


class KernelChoice:
    """How the parameters of one ``KernelSpec`` are stepped, in all optimizers of this process.

    Attributes:
        spec: of the kernel.
        kernel: steps them; None: the reference does.
        final: whether that stays so.
    """

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.kernel: CompiledKernel | None = None
        self.final = False
        self._source: str | None = None
        self._build: BackgroundBuild | None = None
        self._seconds, self._elements = 0.0, 0

    def spent(self, seconds: float, elements: int) -> None:
        """Note that the reference took so long for so many elements."""
        self._seconds += seconds
        self._elements += elements

    def require(self) -> None:
        """Build the kernel now, if there is one.

        Raises:
            CannotBuild: there is no working compiler.
        """
        self.kernel, self.final = compiled_kernel(self.spec), True

    def decide(self, elements: int, total: int, scalars: Sequence[Sequence[Scalar]]) -> None:
        """Look for the kernel, or have it built, if that is due before a step.

        Args:
            elements: that the step takes with this kernel.
            total: elements of all parameters of the optimizer.
            scalars: ``Rule.scalars`` of the first steps, to compare both ways with.

        Raises:
            CannotBuild: there is no working compiler; raised once, then the reference steps.
        """
        try:
            if same_roundings():
                self._by_cost(elements, scalars)
            elif total >= LARGE:
                self.require()
            else:
                self.final = True
        except CannotBuild:
            self.final = True
            raise

    def _by_cost(self, elements: int, scalars: Sequence[Sequence[Scalar]]) -> None:
        rate = self._seconds / self._elements if self._elements else SECONDS_PER_ELEMENT
        coming = elements * rate
        if self._seconds + coming < LOOK_SECONDS:
            return
        if self._source is None:
            try:
                self._source = source(self.spec)
            except Unrecordable:
                self.final = True
                return
            if run := find(self._source):
                self._accept(run, scalars)
                return
        if self._build is None and self._seconds + coming >= BUILD_SECONDS:
            self._build = BackgroundBuild(self._source)
        if self._build is not None and (self._build.done or coming >= BUILD_SECONDS):
            self._accept(self._build.result(), scalars)

    def _accept(self, run: Any, scalars: Sequence[Sequence[Scalar]]) -> None:
        kernel, self.final = kernel_of(self.spec, run), True
        if agrees(self.spec, kernel, scalars):
            self.kernel = kernel
            return
        warnings.warn(
            "a compiled CPU kernel gives other bits than the reference, which steps instead and is "
            "several times slower; options in CXX such as -ffast-math change arithmetic",
            RuntimeWarning,
            stacklevel=2,
        )


def warn_without_compiler(error: CannotBuild) -> None:
    """Warn, once a process, that there is no compiler."""
    if not _warned:
        _warned.add(str(error))
        warnings.warn(
            f"no working C++ compiler ({error}), so optimizers on the CPU step several times "
            "slower; install g++ or clang++ or set CXX, or choose backend='eager'",
            RuntimeWarning,
            stacklevel=2,
        )


@cache
def choice_of(spec: KernelSpec) -> KernelChoice:
    """The one choice of a kernel in this process."""
    return KernelChoice(spec)


@cache
def same_roundings() -> bool:
    """Whether torch rounds the ends of tensors as the rest, and so as kernels do."""
    names = ("add", "addcmul", "lerp")
    return all(rounds_once(name) is rounds_once(name, TAIL) for name in names)


@torch.inference_mode(False)
@torch.no_grad()
def agrees(spec: KernelSpec, kernel: CompiledKernel, scalars: Sequence[Sequence[Scalar]]) -> bool:
    """Whether the kernel's steps have the reference's bits, NaN and zeros among the gradients."""
    numel = 2 * kernel.block_size + 5
    generator = torch.Generator("cpu").manual_seed(0)

    def random(dtype: torch.dtype) -> Tensor:
        drawn = torch.randn(numel, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(dtype)

    components = spec.components
    reference = {
        c.key(name): torch.zeros(c.length(numel), dtype=c.dtype, device="cpu")
        for name, parts in components.items()
        for c in (part for _, part in parts)
    }
    reference = {"param": random(spec.write.dtype), **reference}
    ours = {key: tensor.clone() for key, tensor in reference.items()}
    seed, param = 1, 2
    keys = [k for s in kernel.streams for k in stream_key(seed, param, s // 2)]
    mean = random(torch.float32)[:1] if spec.centered else None
    for count, row in enumerate(scalars, 1):
        grad = random(spec.grad_dtype) * 10.0 ** (1 - count)
        grad[: numel // 3] *= 0
        if count == len(scalars) - 1:
            grad[numel // 2] = float("nan")
        parts = {name: [reference[key] for key, _ in part] for name, part in components.items()}
        part = grad.to(torch.float32)
        part = part if mean is None else part - mean
        counter = Counter(seed, count, param)
        new = step_slice(spec.step_spec, reference["param"], part, parts, row, counter, 0)
        reference["param"].copy_(new)
        given = [ours["param"], grad, *([] if mean is None else [mean])]
        given += [ours[key] for key in kernel.keys]
        addresses = [tensor.data_ptr() for tensor in given]
        scalars_given = [*map(float, row), 1.0]
        call_kernel(kernel, [numel], [count], [addresses], scalars_given, [keys], 1)
    return all(map(_same_bits, reference.values(), ours.values()))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point():
        words = {2: torch.int16, 4: torch.int32}[a.itemsize]
        both = a.isnan() & b.isnan()
        return bool(((a.view(words) == b.view(words)) | both).all())
    return torch.equal(a, b)
