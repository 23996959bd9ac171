"""Gradients that wait until enough of them are there to be added in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optstate_codecs.stochastic import round_

__all__ = ["Addition", "Pending"]


@dataclass(eq=False)
class Addition:
    """A new gradient and the sum that it is to be added to.

    Attributes:
        param: whose gradients they are.
        number: its place in the accumulator.
        count: how many additions it has had, this one included.
        total: the sum, which is ``param.grad``.
        new: the new gradient.
        version: of ``total`` when the gradient came.
    """

    param: Tensor
    number: int
    count: int
    total: Tensor
    new: Tensor
    version: int

    @property
    def wanted(self) -> bool:
        """Whether the sum is still the parameter's gradient."""
        return self.param.grad is self.total

    @property
    def untouched(self) -> bool:
        """Whether nobody has zeroed, scaled or replaced the sum since the gradient came."""
        return self.wanted and self.total._version == self.version


class Pending:
    """The additions that wait on one device, all made on one stream.

    Gradients are added, and their memory is given back, on the stream that they were made on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._additions: dict[int, Addition] = {}
        self._raw: int | None = None
        self._stream: torch.cuda.Stream | None = None

    def append(self, addition: Addition, seed: int) -> None:
        """Let ``addition`` wait; those of another stream, or to the same sum, are made first."""
        stream = self._current()
        if addition.number in self._additions or stream != self._raw:
            self.add(seed)
        if stream != self._raw:
            self._raw, self._stream = stream, torch.cuda.current_stream(self.device)
        self._additions[addition.number] = addition
        self.bytes += addition.new.nbytes

    def add(self, seed: int, *, stale: bool = False) -> None:
        """Add what waits, in one launch a dtype.

        Args:
            seed: of the draws.
            stale: whether the backward has ended long since, so that sums which somebody has
                touched are left as they are.
        """
        waiting, self._additions, self.bytes = self._additions.values(), {}, 0
        additions = [a for a in waiting if (a.untouched if stale else a.wanted)]
        if not additions:
            return
        made_on = self._stream
        if made_on is None or self._raw == self._current():
            _add(additions, seed)
            return
        with torch.cuda.stream(made_on):
            _add(additions, seed)
        torch.cuda.current_stream(self.device).wait_stream(made_on)

    def _current(self) -> int | None:
        if self.device.type != "cuda":
            return None
        # as the kernel's launcher does: it costs a tenth of a torch.cuda.Stream
        stream: int = torch._C._cuda_getCurrentRawStream(self.device.index)
        return stream


def _add(additions: list[Addition], seed: int) -> None:
    round_(
        [addition.total for addition in additions],
        [addition.new for addition in additions],
        seed,
        [addition.number for addition in additions],
        [addition.count for addition in additions],
        add=True,
    )
