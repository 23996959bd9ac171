"""Hooks on gradients that hold their object weakly, and spans of parameters stepped together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakMethod

from torch import Tensor

from optstate_codecs.custom_op import untraced

__all__ = ["ParamSpan", "spans_of", "weakly"]


@dataclass(eq=False)
class ParamSpan:
    """Neighbouring parameters that are stepped together, and those that have a gradient now."""

    params: list[Any]
    ready: set[Tensor] = field(default_factory=set)


def spans_of(params: Sequence[Tensor], size: int) -> list[ParamSpan]:
    """Spans of parameters on one device that require gradients, of ``size`` bytes or one each."""
    found: list[ParamSpan] = []
    filled = 0
    for param in params:
        if not param.requires_grad:
            continue
        if not found or filled + param.nbytes > size or found[-1].params[0].device != param.device:
            found.append(ParamSpan([]))
            filled = 0
        found[-1].params.append(param)
        filled += param.nbytes
    return found


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A function that calls ``method``, and does nothing once its object is gone.

    For hooks on tensors: Python's garbage collector does not see through them, so a strong
    reference would form a cycle that is never freed.
    """
    weak: WeakMethod[Any] = WeakMethod(method)

    def call(*args: Any) -> None:
        alive = weak()
        if alive is not None:
            alive(*args)

    return untraced(call)
