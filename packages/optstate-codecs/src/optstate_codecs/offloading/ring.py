"""Rings of three device slots through which chunks of state are loaded, stepped and stored.

While one chunk is loaded, another is stepped and a third is stored, so that a GPU's two copy
engines and its processors work at the same time. The host never waits: every order is one between
streams.
- A load waits until the slot's last store, and the chunk's own, are done.
- The worker waits for the chunk's load, and for the slot's last store.
- A store waits for the worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.offloading.copies import (
    SLOTS,
    CopyStreams,
    HeldQueue,
    Slot,
    record,
    wait_for,
)
from optstate_codecs.offloading.slabs import Chunk
from optstate_codecs.offloading.store import StateStore

__all__ = ["WAITING", "Ring", "Rings"]

# bytes of gradients that partial steps may hold until the state they need has been loaded
WAITING = 1 << 29


@dataclass(eq=False)
class ChunkSlot(Slot):
    """A slot of fixed size.

    Attributes:
        chunk: whose state the memory holds; None: nothing that may be stepped.
        unstored: the chunk whose latest state is in this memory only, or None.
        stepped: the event after which the worker has stepped the chunk.
    """

    memory: Tensor
    chunk: Chunk | None = None
    unstored: Chunk | None = None
    stepped: Any = None


class Ring:
    """The slots of one device; a chunk always comes to the slot with its number.

    The order of chunks is learnt from the step before, so that the first chunks of the next step
    are loaded while the model computes.

    Args:
        device: where chunks are stepped; on a CPU they are copied at once.
        nbytes: size of the largest chunk.
        store: where the chunks are kept.
    """

    def __init__(self, device: torch.device, nbytes: int, store: StateStore) -> None:
        self.device = device
        self.store = store
        self.nbytes = nbytes
        self.slots = [
            ChunkSlot(torch.empty(nbytes, dtype=torch.uint8, device=device)) for _ in range(SLOTS)
        ]
        self.streams = CopyStreams(device, worker=True)
        self.streams.share([slot.memory for slot in self.slots])
        self._next: dict[Chunk, Chunk] = {}
        self._last: Chunk | None = None

    def enter(self, chunk: Chunk) -> None:
        """Have the chunk's state in its slot for the worker."""
        if self._last is not None:
            self._next[self._last] = chunk
        self._last = chunk
        self.store.reserve(chunk)
        slot = self.slots[chunk.slot]
        if slot.chunk is not chunk:
            self._load(chunk)
        # a chunk that has stayed in its slot since the last step may still be on its way out
        wait_for(self.streams.worker, slot.loaded, slot.freed)

    def hold(self, chunk: Chunk) -> None:
        """Note that the chunk is stepped from here on: its slot has its only latest state."""
        self.slots[chunk.slot].unstored = chunk

    def leave(self, chunk: Chunk) -> None:
        """Store the chunk once the worker has stepped it, and load the slot's next chunk."""
        self._store(chunk)
        # errors of a load ahead are ignored here: the load that is needed raises them
        with suppress(Exception):
            self._look_ahead(chunk)

    def _store(self, chunk: Chunk) -> None:
        slot, streams = self.slots[chunk.slot], self.streams
        slot.stepped = record(slot.stepped, streams.worker)
        with streams.on(streams.store):
            wait_for(streams.store, slot.stepped)
            for to, region in self.store.sink(chunk):
                inside = slot.memory[region.offset : region.offset + region.nbytes]
                to.copy_(inside, non_blocking=True)
            chunk.stored = record(chunk.stored, streams.store)
        slot.freed = chunk.stored
        self.store.stored(chunk)
        slot.unstored = None

    def _load(self, chunk: Chunk) -> None:
        slot, load = self.slots[chunk.slot], self.streams.load
        self.store_rest()
        slot.chunk = None
        source = self.store.source(chunk)
        with self.streams.on(load):
            wait_for(load, *dict.fromkeys((slot.freed, chunk.stored)))
            for data, region in source:
                inside = slot.memory[region.offset : region.offset + region.nbytes]
                inside.copy_(data, non_blocking=True)
            slot.loaded = record(slot.loaded, load)
        slot.chunk = chunk
        self.store.sent(chunk, slot.loaded)

    def _look_ahead(self, chunk: Chunk) -> None:
        """Load the slot's next chunk, and have the store prepare the one after it."""
        follower = self._following(chunk)
        if follower is not None and self.store.ready(follower):
            self._load(follower)
            follower = self._following(follower)
        if follower is not None:
            self.store.prepare(follower)

    def _following(self, chunk: Chunk) -> Chunk | None:
        """The next other chunk in this one's slot, as far as it is known."""
        found = self._next.get(chunk)
        # chunks take the slots in turn, except where one step ends and the next begins
        for _ in range(2 * SLOTS):
            if found is None or found.slot == chunk.slot:
                return None if found is chunk else found
            found = self._next.get(found)
        return None

    def expect(self, order: Sequence[Chunk]) -> None:
        """Take the chunks of a step, in order, before any is entered, and load the first."""
        for chunk, follower in pairwise(order):
            self._next[chunk] = follower
        self._next.setdefault(order[-1], order[0])
        slots = set()
        for chunk in order[:SLOTS]:
            if chunk.slot not in slots and self.slots[chunk.slot].chunk is not chunk:
                self._load(chunk)
            slots.add(chunk.slot)

    def store_rest(self) -> None:
        """Store chunks that were stepped and not stored because of an exception."""
        for slot in self.slots:
            if slot.unstored is not None:
                self._store(slot.unstored)

    def forget(self, order: bool = False) -> None:
        """Discard loaded chunks, all of which are stored, and with ``order`` also their order."""
        for slot in self.slots:
            slot.chunk = None
        self.store.forget()
        if order:
            self._next.clear()
            self._last = None

    def wait(self) -> None:
        """Wait on the host until all chunks are stored."""
        self.store_rest()
        self.streams.wait()


class Rings(dict[torch.device, Ring]):
    """The rings of all devices, and objects that partial steps on worker streams still read.

    Args:
        store: where chunks are kept.
    """

    def __init__(self, store: StateStore) -> None:
        super().__init__()
        self.store = store
        self._held = HeldQueue(WAITING, least=1)

    def fit(self, device: torch.device, nbytes: int) -> None:
        """Make the device's ring, or a larger one if a chunk of ``nbytes`` does not fit."""
        if device not in self or self[device].nbytes < nbytes:
            self.pop(device, None)
            self[device] = Ring(device, nbytes, self.store)

    def expect(self, order: Sequence[Chunk]) -> None:
        """Take the chunks of a step, in order, before any is entered."""
        for device, ring in self.items():
            if mine := [chunk for chunk in order if chunk.device == device]:
                ring.expect(mine)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Run the body on the worker streams, after all work of the current streams so far.

        Chunks are entered and left in the body.
        """
        with ExitStack() as stack:
            for ring in self.values():
                stack.enter_context(ring.streams.on(ring.streams.worker, follow=True))
            yield

    def hold(self, held: object, nbytes: int) -> None:
        """Keep tensors that a partial step reads until current streams have waited for it."""
        workers = [(device, ring.streams.worker) for device, ring in self.items()]
        self._held.add(held, nbytes, [(device, record(None, one)) for device, one in workers])

    def join(self) -> None:
        """Have the current streams wait for all that has been stepped."""
        for ring in self.values():
            ring.streams.join(ring.streams.worker)
        self._held.clear()

    def flush(self, order: bool = False) -> None:
        """Store and discard all chunks, and with ``order`` their order: kept state may change."""
        self.wait()
        for ring in self.values():
            ring.forget(order)

    def wait(self) -> None:
        """Wait on the host until the store keeps all that has been stepped."""
        for ring in self.values():
            ring.wait()
        self.store.wait()
