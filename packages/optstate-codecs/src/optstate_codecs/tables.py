"""A cache for constant tensors, which is bypassed inside torch's modes.

A mode (``torch.inference_mode``, a ``FakeTensorMode``, a compiler that traces) changes the kind of
tensor made in it: an inference tensor, or one without data. Later steps could not use it.
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
    """Whether a mode is active that changes the kind of new tensors."""
    return (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def cached_table(
    maxsize: int | None = None,
) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """``functools.lru_cache`` for functions that return a constant tensor.

    Inside a mode the function runs at each call. It has to pass dtype and device explicitly, so
    that the tensor does not depend on torch's defaults at the first call.

    Args:
        maxsize: how many tensors are cached; None: all.

    Examples:
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
    """Clear all caches; tables are made again on the next call."""
    for forget in _forget:
        forget()
