"""Copy streams between a device and the host, their slots, and a queue of tensors in use.

A CUDA device runs copies from the host, copies to the host and its own work at the same time, as
long as they are on different streams. On a CPU there are no streams and no events: both are None
here, every wait does nothing, and a copy is complete when ``copy_`` returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SLOTS", "CopyStreams", "HeldQueue", "Slot", "record", "wait_for"]

# with two, a load would wait for the store before it
SLOTS = 3


@dataclass(eq=False)
class Slot:
    """Device memory that chunks of state occupy one after the other.

    Attributes:
        memory: uint8; None until it is allocated.
        loaded: the event after which the latest load is complete.
        freed: the event after which the memory may be overwritten; None: at any time.
    """

    memory: Tensor | None = None
    loaded: Any = None
    freed: Any = None


class CopyStreams:
    """The streams of one device that run beside its current stream.

    Args:
        device: the device; on a CPU there are no streams.
        worker: also make a stream for work that the current stream does not wait for at once.

    Attributes:
        load, store: the streams of copies from the host and of copies to it, or None.
        worker: the stream of the work, or None.
    """

    def __init__(self, device: torch.device, worker: bool = False) -> None:
        self.device = device
        self.load: Any = None
        self.store: Any = None
        self.worker: Any = None
        if device.type == "cuda":
            self.load = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.store = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if worker:
                self.worker = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def on(self, stream: Any, follow: bool = False) -> Iterator[None]:
        """Run the body on one of the streams, after ``follow`` if set; None: where it runs anyway.

        ``torch.cuda.stream`` needs more queries, which count for short copies.
        """
        if stream is None:
            yield
            return
        if follow:
            self.follow(stream)
        outer, before = torch.cuda.current_device(), torch.cuda.current_stream(self.device)
        torch.cuda.set_stream(stream)
        try:
            yield
        finally:
            torch.cuda.set_stream(before)
            if outer != self.device.index:
                torch.cuda.set_device(outer)

    @property
    def current(self) -> Any:
        """The device's current stream, or None."""
        return None if self.load is None else torch.cuda.current_stream(self.device)

    def follow(self, stream: Any) -> None:
        """Have a stream wait for all work that the current stream has been given so far."""
        if stream is not None:
            stream.wait_stream(self.current)

    def join(self, stream: Any) -> None:
        """Have the current stream wait for all work that a stream has been given so far."""
        if stream is not None:
            self.current.wait_stream(stream)

    def share(self, memories: Sequence[Tensor]) -> None:
        """Let the streams use memory that was just allocated on the current stream.

        They wait for earlier users of the memory, and it is not reused before they are done.
        """
        for stream in (self.load, self.store, self.worker):
            self.follow(stream)
            for memory in memories if stream is not None else ():
                memory.record_stream(stream)

    def wait(self) -> None:
        """Wait on the host until all copies have been made."""
        for stream in (self.load, self.store):
            if stream is not None:
                stream.synchronize()


def wait_for(stream: Any, *events: Any) -> None:
    """Have a stream wait for events; those that are None, or all without a stream, are skipped."""
    if stream is not None:
        for event in events:
            if event is not None:
                stream.wait_event(event)


def record(event: Any, stream: Any) -> Any:
    """Record an event, None: a new one, after a stream's work so far; returns the event."""
    if stream is None:
        return event
    if event is None:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


class HeldQueue:
    """Objects that are kept until work that reads them is done, up to a number of bytes.

    Above the limit, current streams wait for the work that reads the oldest objects. Then the
    objects are dropped, and their memory may be used again. So the memory that is held depends on
    no timing. (With ``record_stream``, a host far ahead of the device would allocate ever more.)

    Args:
        limit: bytes that may be held.
        least: how many of the newest objects are held whatever their size.
    """

    def __init__(self, limit: int, least: int = 0) -> None:
        self.limit = limit
        self.least = least
        self._queue: deque[tuple[object, int, list[tuple[torch.device, Any]]]] = deque()
        self._nbytes = 0

    def add(self, held: object, nbytes: int, events: list[tuple[torch.device, Any]]) -> None:
        """Hold an object until the events have happened, each on its device; None: it has."""
        self._queue.append((held, nbytes, events))
        self._nbytes += nbytes
        while self._nbytes > self.limit and len(self._queue) > self.least:
            _, size, before = self._queue.popleft()
            self._nbytes -= size
            for device, event in before:
                if event is not None:
                    torch.cuda.current_stream(device).wait_event(event)

    def clear(self) -> None:
        """Drop all objects: current streams have waited for all work that reads them."""
        self._queue.clear()
        self._nbytes = 0
