"""Parameters whose gradients are waited for together, and hooks that wait for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakMethod

from torch import Tensor

from optstate_codecs.custom_op import untraced

__all__ = ["Bucket", "in_buckets", "weakly"]


@dataclass(eq=False)
class Bucket:
    """Neighbouring parameters that are stepped together, and those that have their gradient."""

    params: list[Any]
    here: set[Tensor] = field(default_factory=set)


def in_buckets(params: Sequence[Tensor], size: int) -> list[Bucket]:
    """Neighbours on one device that require gradients, in buckets of ``size`` bytes or of one."""
    found: list[Bucket] = []
    filled = 0
    for param in params:
        if not param.requires_grad:
            continue
        if not found or filled + param.nbytes > size or found[-1].params[0].device != param.device:
            found.append(Bucket([]))
            filled = 0
        found[-1].params.append(param)
        filled += param.nbytes
    return found


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A call of ``method`` that does nothing once its object is gone.

    For hooks on tensors, through which Python does not see: a strong reference would be a cycle
    that it never collects.
    """
    return untraced(partial(_call, WeakMethod(method)))


def _call(method: WeakMethod[Any], *args: Any) -> None:
    alive = method()
    if alive is not None:
        alive(*args)
