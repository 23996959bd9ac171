"""The results of one run: its loss curves, times and bytes."""

import math
from dataclasses import dataclass, field
from statistics import fmean, median

from optstate.demo.memory import Memory


@dataclass
class Run:
    """The results of a run with one optimizer.

    Attributes:
        name: The optimizer's full name.
        parameters: Number of trained elements.
        train: Loss of every step, nats a byte.
        validation: Pairs of (steps done, loss on the held-out text).
        step_ms: Milliseconds of every step: data, forward, backward, update.
        update_ms: Milliseconds of every step that `optimizer.step` took.
        memory: Bytes at the end.
    """

    name: str
    parameters: int = 0
    train: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    update_ms: list[float] = field(default_factory=list)
    memory: Memory | None = None

    @property
    def train_loss(self) -> float:
        """Mean over the last tenth of the steps, since a single batch is noisy."""
        return fmean(self.train[-max(1, len(self.train) // 10) :])

    @property
    def validation_loss(self) -> float:
        """The held-out loss after the last step."""
        return self.validation[-1][1]

    @property
    def ms_per_step(self) -> float:
        """Median, so that warm-up steps do not count."""
        return median(self.step_ms)

    @property
    def ms_per_update(self) -> float:
        """Median time of `optimizer.step`."""
        return median(self.update_ms)

    @property
    def state_bytes_per_parameter(self) -> float:
        """Bytes of optimizer state for each trained element."""
        return self.memory.state / self.parameters if self.memory else math.nan
