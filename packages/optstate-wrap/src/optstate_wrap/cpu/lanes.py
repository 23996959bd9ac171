"""Copies between a device and the host that run beside the device's own work."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from optstate_codecs.offloading.pinned import empty_pinned
from optstate_codecs.state.layout import view_bytes_as

__all__ = ["CopyStreams", "pinned_like"]

# bytes of gradients that may wait on the device for their copies
WAITING = 1 << 27


def pinned_like(tensor: Tensor) -> Tensor:
    """Host memory for a tensor's copy, page-locked where the tensor is on a GPU."""
    like = torch.empty_like(tensor, device="meta")
    return view_bytes_as(empty_pinned(tensor.nbytes, tensor.is_cuda), 0, like)


class CopyStreams:
    """One stream for each way between a device and the host; without CUDA all is done at once.

    Both ways run at the same time, and neither waits for the other nor the device's own work for
    them, but where ``begin``, ``end`` and ``hold`` say so.

    Args:
        device: the one at the far end.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams = device.type == "cuda"
        if self.streams:
            self.down = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.up = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._held: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._waiting = 0

    @contextmanager
    def downwards(self) -> Iterator[None]:
        """What is inside runs after what the device has been given so far, towards the host."""
        if not self.streams:
            yield
            return
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.down):
            yield

    @contextmanager
    def upwards(self) -> Iterator[None]:
        """What is inside runs towards the device."""
        if not self.streams:
            yield
            return
        with torch.cuda.stream(self.up):
            yield

    def arrival(self) -> torch.cuda.Event | None:
        """An event for when all copies downwards so far have arrived."""
        return self.down.record_event() if self.streams else None

    def hold(self, tensor: Tensor, event: torch.cuda.Event | None) -> None:
        """Keep a tensor until its copy has arrived, and so many only that memory is bounded.

        The device's own work waits for the oldest copies before their memory is used again, so
        that how much there is depends on no timing. (``record_stream`` would let a host that is
        far ahead of the device allocate ever more.)
        """
        if event is None:
            return
        self._held.append((tensor, event))
        self._waiting += tensor.nbytes
        while self._waiting > WAITING:
            old, arrived = self._held.popleft()
            torch.cuda.current_stream(self.device).wait_event(arrived)
            self._waiting -= old.nbytes

    def begin(self) -> None:
        """Copies from here on see what the device has been given, and what was copied upwards."""
        if self.streams:
            now = torch.cuda.current_stream(self.device)
            self.up.wait_stream(now)
            self.down.wait_stream(now)
            self.down.wait_stream(self.up)

    def end(self) -> None:
        """The device's own work from here on waits for all copies so far; the host does not."""
        if self.streams:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self.down)
            now.wait_stream(self.up)
        self._held.clear()
        self._waiting = 0
