"""Constant tables, made once and kept; what is made inside a mode is not kept.

A mode (``torch.inference_mode``, a ``FakeTensorMode``, a compiler that traces) decides which kind
of tensor is made in it: an inference tensor, or one without numbers. Kept, it would be wrong in
later steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

__all__ = ["cached_table", "forget_tables", "in_mode"]

P = ParamSpec("P")

_forget: list[Callable[[], None]] = []


def in_mode() -> bool:
    """Whether tensors that are made now may be of another kind than usual."""
    return (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def cached_table(
    maxsize: int | None = None,
) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """``functools.lru_cache`` for functions that make a constant tensor.

    Inside a mode the function makes the table anew at each call. It has to name dtype and device
    of the table, so that the table does not depend on torch's defaults at the first call.

    Args:
        maxsize: how many tables are kept; None: all.

    Example:
        >>> @cached_table()
        ... def levels(device: torch.device) -> Tensor:
        ...     return torch.tensor([0.5, 1.5], dtype=torch.float32, device=device)
    """

    def decorate(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
        kept = lru_cache(maxsize)(make)
        _forget.append(kept.cache_clear)

        @wraps(make)
        def table(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            if in_mode():
                return make(*args, **kwargs)
            return kept(*args, **kwargs)  # type: ignore[arg-type]

        return table

    return decorate


def forget_tables() -> None:
    """Drop all tables that are kept. They are made again when they are needed."""
    for forget in _forget:
        forget()
