"""Stochastic rounding of many tensors on a CPU with a compiled kernel.

The kernel is that of a step whose rule adds the gradient to the parameter, or puts it in its place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate_codecs.engine.cpu.build import CannotBuild
from optstate_codecs.engine.cpu.calls import call_kernel
from optstate_codecs.engine.cpu.choice import KernelChoice, choice_of, warn_without_compiler
from optstate_codecs.engine.cpu.kernels import CompiledKernel, KernelSpec
from optstate_codecs.rounding import stream_key
from optstate_codecs.rules import Moment, Rule
from optstate_codecs.rules.base import Scalar, SquareRoot
from optstate_codecs.triton_lib import BACKEND_VARIABLE
from optstate_codecs.writes import Stochastic

__all__ = ["SOURCES", "round_with", "rounding_choice", "rounding_kernel"]

#: dtypes that kernels round from
SOURCES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class _Rounding(Rule):
    """The rule whose parameter becomes the gradient, or with ``add`` the sum of both."""

    name: ClassVar[str] = "rounding"
    hyper_type: ClassVar[type[Any]] = dict
    add: bool = False

    def defaults(self) -> dict[str, Any]:
        return {}

    def moments(self, hyper: Any) -> tuple[Moment, ...]:
        return ()

    def scalars(self, hyper: Any, step: Scalar) -> list[Scalar]:
        return []

    def apply(
        self,
        param: Tensor,
        grad: Tensor,
        moments: Mapping[str, Tensor],
        scalars: Sequence[Scalar],
        variant: Any,
        square_root: SquareRoot = torch.sqrt,
    ) -> None:
        if self.add:
            param.add_(grad)
        else:
            param.copy_(grad)


def rounding_choice(source: torch.dtype, add: bool) -> KernelChoice | None:
    """The choice between kernel and torch operations; None where OPTSTATE_BACKEND excludes it."""
    if os.environ.get(BACKEND_VARIABLE, "auto") not in ("auto", "compile"):
        return None
    write = Stochastic(torch.bfloat16)
    return choice_of(KernelSpec(_Rounding(add), None, (), (), write, False, source, 0))


def rounding_kernel(choice: KernelChoice, elements: int) -> CompiledKernel | None:
    """The kernel for so many elements, if there is one by now."""
    if not choice.final:
        try:
            if os.environ.get(BACKEND_VARIABLE) == "compile":
                choice.require()
            else:
                choice.decide(elements, elements, [[]] * 4)
        except CannotBuild as error:
            warn_without_compiler(error)
    return choice.kernel


def round_with(
    kernel: CompiledKernel,
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    keys: Sequence[tuple[int, int, int]],
    counts: Sequence[int],
) -> None:
    """Round sources into targets of equal, dense layouts.

    Args:
        kernel: of the sources' dtype.
        targets: bfloat16.
        sources: one for each target.
        keys: seed, number and stream of each.
        counts: key the draws beside them.
    """
    words = [list(stream_key(seed, number, stream // 2)) for seed, number, stream in keys]
    call_kernel(
        kernel,
        [target.numel() for target in targets],
        counts,
        [[t.data_ptr(), s.data_ptr()] for t, s in zip(targets, sources, strict=True)],
        [1.0],
        [pair * len(kernel.streams) for pair in words],
        torch.get_num_threads(),
    )
