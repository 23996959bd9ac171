"""Queues of gradients that are added to their sums in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optstate_codecs.stochastic import round_

__all__ = ["Addition", "Pending"]


@dataclass(eq=False, slots=True)
class Addition:
    """A queued addition of a new gradient to a sum.

    Attributes:
        param: the parameter.
        number: its index in the accumulator.
        count: the number of additions to it, including this one.
        total: the sum, which is ``param.grad``.
        new: the new gradient.
        version: autograd's version of ``total`` when the gradient was queued.
    """

    param: Tensor
    number: int
    count: int
    total: Tensor
    new: Tensor
    version: int

    @property
    def untouched(self) -> bool:
        """Whether the sum has not been zeroed, scaled or replaced since then."""
        return self.param.grad is self.total and self.total._version == self.version


class Pending:
    """The queued additions of one device, whose gradients were computed on one CUDA stream.

    Gradients are added and freed on that stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._additions: dict[int, Addition] = {}
        self._raw: int | None = None
        self._stream: torch.cuda.Stream | None = None

    def append(self, addition: Addition, seed: int) -> None:
        """Queue ``addition``; first make those queued on another stream or for the same sum."""
        stream = self._current()
        if addition.number in self._additions or stream != self._raw:
            self.add(seed)
        if stream != self._raw:
            self._raw, self._stream = stream, torch.cuda.current_stream(self.device)
        self._additions[addition.number] = addition
        self.bytes += addition.new.nbytes

    def add(self, seed: int, *, stale: bool = False) -> None:
        """Make the queued additions, in one launch a dtype, and empty the queue.

        Args:
            seed: of the draws.
            stale: whether their backward was interrupted. Sums that have changed since are then
                left unchanged.
        """
        waiting, self._additions, self.bytes = self._additions.values(), {}, 0
        additions = [a for a in waiting if (a.untouched if stale else a.param.grad is a.total)]
        if not additions:
            return
        stream = self._stream
        if stream is None or self._raw == self._current():
            _add(additions, seed)
            return
        with torch.cuda.stream(stream):
            _add(additions, seed)
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _current(self) -> int | None:
        if self.device.type != "cuda":
            return None
        # as triton's launcher does: it takes a tenth of the time of a torch.cuda.Stream
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
