"""Measures the time that the parts of a step take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["PARTS", "Timer"]

PARTS = ("materialize_ms", "inner_step_ms", "commit_ms")


class Timer:
    """Sums the milliseconds of each part of a step, while ``on``.

    On a GPU it synchronizes before and after each part: use it to measure, not to train.
    """

    def __init__(self) -> None:
        self.on = False
        self.spent = dict.fromkeys(PARTS, 0.0)

    def start(self) -> None:
        """Begin a step with zero in all parts."""
        self.spent = dict.fromkeys(PARTS, 0.0)

    def report(self, total: float) -> dict[str, float]:
        """Milliseconds of each part, of the ``total`` as ``step_time_ms``, and ``overhead_ms``."""
        rest = total - sum(self.spent.values())
        return {"step_time_ms": total, **self.spent, "overhead_ms": rest}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the part ``name``."""
        if not self.on:
            yield
            return
        began = now()
        try:
            yield
        finally:
            self.spent[name] += now() - began


def now() -> float:
    """A clock in milliseconds, read after all work on GPUs is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() * 1e3
