"""Three places on a device that chunks pass through: one is loaded, one stepped, one stored.

Two would make a load wait for the store before it; with three, a device's two copy engines and its
processors are all at work. What the ring does not do is wait: every order is one between streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from typing import Any

import torch

from optstate_codecs.offloading.slabs import Chunk
from optstate_codecs.offloading.store import StateStore

__all__ = ["SLOTS", "Ring"]

SLOTS = 3


class Ring:
    """Brings chunks to a device and back, each to the slot that it always has.

    Which chunk follows which is learnt from the step before, so that the first chunks of the next
    step are loaded already while the model computes.

    Args:
        device: that steps; on a CPU, chunks are copied there and then.
        nbytes: of the largest chunk.
        place: that the chunks are kept in.
    """

    def __init__(self, device: torch.device, nbytes: int, place: StateStore) -> None:
        self.device = device
        self.place = place
        self.nbytes = nbytes
        self.slots = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._held: list[Chunk | None] = [None] * SLOTS
        # being stepped, or have been and are nowhere but in their slots
        self._unstored: list[Chunk | None] = [None] * SLOTS
        self._freed: list[Any] = [None] * SLOTS
        self._next: dict[Chunk, Chunk] = {}
        self._last: Chunk | None = None
        self._streams: tuple[Any, Any] | None = None
        self._loaded: list[Any] = [None] * SLOTS
        if device.type == "cuda":
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._loaded = [torch.cuda.Event() for _ in range(SLOTS)]  # type: ignore[no-untyped-call]
            self._computed = [torch.cuda.Event() for _ in range(SLOTS)]  # type: ignore[no-untyped-call]
            for stream in self._streams:
                # what used a slot before it was this ring's is done before the ring does
                stream.wait_stream(torch.cuda.current_stream(device))
                for slot in self.slots:
                    slot.record_stream(stream)
            self.worker = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for slot in self.slots:
                slot.record_stream(self.worker)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, what is launched runs after what the current stream was given before.

        Chunks are entered and left in there.
        """
        if self._streams is None:
            yield
            return
        self.worker.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.worker):
            yield

    @contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        """As ``torch.cuda.stream``, without asking several times where one is: a chunk is short."""
        before = torch.cuda.current_stream(self.device)
        torch.cuda.set_stream(stream)
        try:
            yield
        finally:
            torch.cuda.set_stream(before)

    def join(self) -> None:
        """Have the current stream wait for what was worked."""
        if self._streams is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.worker)

    def mark(self) -> Any:
        """An event after what was worked so far; None where that is done already."""
        return None if self._streams is None else self.worker.record_event()

    def enter(self, chunk: Chunk) -> None:
        """Let the worker see the chunk in its slot."""
        if self._last is not None:
            self._next[self._last] = chunk
        self._last = chunk
        self.place.reserve(chunk)
        if self._held[chunk.slot] is not chunk:
            self._load(chunk)
        if self._streams is not None:
            self.worker.wait_event(self._loaded[chunk.slot])
            if self._freed[chunk.slot] is not None:
                # where it has stayed since the last step, it may still be on its way out
                self.worker.wait_event(self._freed[chunk.slot])

    def hold(self, chunk: Chunk) -> None:
        """The chunk is stepped now: from here on, what is in its slot is all there is of it."""
        self._unstored[chunk.slot] = chunk

    def leave(self, chunk: Chunk) -> None:
        """Store the chunk once the worker has stepped it, and load what is to follow."""
        self._store(chunk)
        # who wants that chunk tries again, and says what is wrong
        with suppress(Exception):
            self._look_ahead(chunk)

    def _store(self, chunk: Chunk) -> None:
        slot = chunk.slot
        if self._streams is None:
            self._copy_out(chunk)
        else:
            self._computed[slot].record(self.worker)
            stream = self._streams[1]
            with self._on(stream):
                stream.wait_event(self._computed[slot])
                self._copy_out(chunk)
                if chunk.stored is None:
                    chunk.stored = torch.cuda.Event()  # type: ignore[no-untyped-call]
                chunk.stored.record(stream)
        self._freed[slot] = chunk.stored
        self.place.stored(chunk)
        self._unstored[slot] = None

    def _copy_out(self, chunk: Chunk) -> None:
        slot = self.slots[chunk.slot]
        for to, region in self.place.sink(chunk):
            to.copy_(slot[region.offset : region.offset + region.nbytes], non_blocking=True)

    def _load(self, chunk: Chunk) -> None:
        slot = chunk.slot
        self.store_rest()
        self._held[slot] = None
        source = self.place.source(chunk)
        with nullcontext() if self._streams is None else self._on(self._streams[0]):
            if self._streams is not None:
                for event in {self._freed[slot], chunk.stored} - {None}:
                    self._streams[0].wait_event(event)
            for data, region in source:
                inside = self.slots[slot][region.offset : region.offset + region.nbytes]
                inside.copy_(data, non_blocking=True)
            if self._streams is not None:
                self._loaded[slot].record(self._streams[0])
        self._held[slot] = chunk
        self.place.sent(chunk, self._loaded[slot])

    def _look_ahead(self, chunk: Chunk) -> None:
        """Load what comes to the slot next, and have the place begin with what comes after."""
        follower = self._following(chunk)
        if follower is not None and follower is not chunk and self.place.ready(follower):
            self._load(follower)
            after = self._following(follower)
            if after is not None and after is not follower:
                self.place.prepare(after)
        elif follower is not None and follower is not chunk:
            self.place.prepare(follower)

    def _following(self, chunk: Chunk) -> Chunk | None:
        """The next chunk in this one's slot, as far as it is known."""
        found = self._next.get(chunk)
        # chunks take the slots in turn, but for the borders between one step and the next
        for _ in range(2 * SLOTS):
            if found is None or found.slot == chunk.slot:
                return found
            found = self._next.get(found)
        return None

    def expect(self, order: list[Chunk]) -> None:
        """Say which chunks the step has, in order, before any is entered."""
        for chunk, follower in pairwise(order):
            self._next[chunk] = follower
        self._next.setdefault(order[-1], order[0])
        slots = set()
        for chunk in order[:SLOTS]:
            if chunk.slot not in slots and self._held[chunk.slot] is not chunk:
                self._load(chunk)
            slots.add(chunk.slot)

    def store_rest(self) -> None:
        """Store what should have been, and was not because of an exception."""
        for chunk in self._unstored:
            if chunk is not None:
                self._store(chunk)

    def forget(self) -> None:
        """Chunks are no longer what they were where they are kept; all of them have been stored."""
        self._held = [None] * SLOTS
        self.place.forget()

    def clear(self) -> None:
        """Forget all chunks."""
        self.forget()
        self._next.clear()
        self._last = None

    def wait(self) -> None:
        """Wait until everything is stored."""
        self.store_rest()
        if self._streams is not None:
            for stream in self._streams:
                stream.synchronize()
