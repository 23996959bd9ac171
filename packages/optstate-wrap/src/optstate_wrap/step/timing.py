"""How long the parts of a step take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["PARTS", "Timer"]

PARTS = ("materialize_ms", "inner_step_ms", "commit_ms")


class Timer:
    """Adds up milliseconds by part of a step, where it is on.

    On a GPU it waits for the device at every border: for measuring, not for training.
    """

    def __init__(self) -> None:
        self.on = False
        self.spent = dict.fromkeys(PARTS, 0.0)

    def start(self) -> None:
        """Begin a step."""
        self.spent = dict.fromkeys(PARTS, 0.0)

    def report(self, total: float) -> dict[str, float]:
        """The step's parts, ``step_time_ms`` and what no part accounts for, ``overhead_ms``."""
        rest = total - sum(self.spent.values())
        return {"step_time_ms": total, **self.spent, "overhead_ms": rest}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is inside to the part ``name``."""
        if not self.on:
            yield
            return
        began = now()
        try:
            yield
        finally:
            self.spent[name] += now() - began


def now() -> float:
    """Milliseconds on a clock, with what GPUs were asked to do done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() * 1e3
