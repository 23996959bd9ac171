"""A ring of device slots through which the state of batches is loaded, used and stored.

While the current stream steps a batch in one slot, the next batch's state comes to the second. The
last batch's state leaves the third slot, which then takes the batch after the next. The host never
waits: every order is one between streams.
- A load waits for the last store to the slabs that it reads, and for the last store from its slot.
- The current stream waits for the load of the batch that it steps.
- A store waits for the current stream, and so for all loads of earlier batches. It writes a spare
  slab, which no later load reads.
On a CPU, copies are made at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optstate_codecs.offloading.copies import SLOTS, CopyStreams, Slot, record, wait_for
from optstate_codecs.state.layout import view_bytes_as
from optstate_wrap.offload.slabs import VIEW_ALIGNMENT, RecordSlab, pack

__all__ = ["BatchSlot", "Item", "StateRing"]


@dataclass(frozen=True, eq=False)
class Item:
    """A tensor to load, and the slab that holds it, or None."""

    tensor: Tensor
    slab: RecordSlab | None


@dataclass(eq=False)
class BatchSlot(Slot):
    """A slot for the state of a batch, of any size.

    Attributes:
        views: the tensors that were loaded, by the identity of those that they were loaded from.
        busy: whether the current stream uses the slot.
    """

    views: dict[int, Tensor] = field(default_factory=dict)
    busy: bool = False


class StateRing:
    """The slots and streams of one device.

    Attributes:
        wanted: the least number of bytes of a slot that is allocated from now on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wanted = 0
        self.streams = CopyStreams(device)
        self._most = 0
        self._slots = [BatchSlot() for _ in range(SLOTS)]
        self._turn = 0

    def load(self, items: Sequence[Item]) -> BatchSlot:
        """Begin to load tensors into the next slot, which the batch before must have left."""
        slot = self._slots[self._turn]
        assert not slot.busy
        self._turn = (self._turn + 1) % SLOTS
        tensors = [item.tensor for item in items]
        offsets, nbytes = pack(tensors)
        memory, load = self._fit(slot, nbytes), self.streams.load
        slabs = dict.fromkeys(item.slab for item in items if item.slab is not None)
        wait_for(load, slot.freed, *(slab.stored for slab in slabs))
        if load is not None and any(tensor.is_cuda for tensor in tensors):
            # the current stream may not have made it yet
            self.streams.follow(load)
        pairs = zip(tensors, offsets, strict=True)
        slot.views = {id(tensor): view_bytes_as(memory, offset, tensor) for tensor, offset in pairs}
        with self.streams.on(load):
            for source, to in _runs(memory, items, offsets):
                to.copy_(source, non_blocking=True)
            slot.loaded = record(slot.loaded, load)
        return slot

    def enter(self, slot: BatchSlot) -> None:
        """Let the current stream use the tensors that were loaded into the slot."""
        slot.busy = True
        # the load itself has waited for earlier users of the slot
        wait_for(self.streams.current, slot.loaded)

    def store(self, slot: BatchSlot, tensors: Sequence[Tensor], slab: RecordSlab) -> None:
        """Begin to store tensors in a slab, in the layout of ``pack``, and leave the slot."""
        offsets, nbytes = pack(tensors)
        old, memory = slot.memory, self._fit(slot, nbytes)
        to = [view_bytes_as(memory, at, one) for one, at in zip(tensors, offsets, strict=True)]
        # tensors stepped in place are there already; those that move must not be overwritten
        moved = [
            (view, tensor.clone() if old is memory and _inside(tensor, memory) else tensor)
            for view, tensor in zip(to, tensors, strict=True)
            if tensor.nbytes and view.data_ptr() != tensor.data_ptr()
        ]
        for view, tensor in moved:
            view.copy_(tensor)
        slot.freed = record(slot.freed, self.streams.current)
        store = self.streams.store
        with self.streams.on(store):
            wait_for(store, slot.freed)
            slab.memory[:nbytes].copy_(memory[:nbytes], non_blocking=True)
            slab.stored = record(slab.stored, store)
            slot.freed = record(slot.freed, store)
        slot.busy = False
        slot.views = {}

    def leave(self, slot: BatchSlot) -> None:
        """Free the slot once the current stream has done its work with it, if it used it."""
        if slot.busy:
            slot.freed = record(slot.freed, self.streams.current)
        slot.busy = False
        slot.views = {}

    def end(self, whole: bool) -> None:
        """Leave all slots; after a ``whole`` step, free the memory of slots that are too large."""
        for slot in self._slots:
            self.leave(slot)
            if whole and slot.memory is not None and slot.memory.numel() > 2 * self._most:
                slot.memory = None
        if whole:
            self._most = 0

    def _fit(self, slot: BatchSlot, nbytes: int) -> Tensor:
        """The slot's memory, which is allocated anew if it is too small."""
        self._most = max(self._most, nbytes)
        if slot.memory is None or slot.memory.numel() < nbytes:
            slot.memory = None
            size = max(nbytes, self.wanted)
            slot.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
            self.streams.share([slot.memory])
        return slot.memory


def _runs(
    memory: Tensor, items: Sequence[Item], offsets: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The copies to make, as source and destination; neighbours in a slab are one copy."""
    source, start, stop, to = memory, 0, 0, 0
    for item, offset in zip(items, offsets, strict=True):
        tensor, slab = item.tensor, item.slab
        if not tensor.nbytes:
            continue
        if slab is None:
            yield tensor, view_bytes_as(memory, offset, tensor)
            continue
        begin = tensor.data_ptr() - slab.memory.data_ptr()
        near = 0 <= begin - stop < VIEW_ALIGNMENT
        if not (slab.memory is source and near and offset == to + begin - start):
            if stop:
                yield source[start:stop], memory[to : to + stop - start]
            source, start, to = slab.memory, begin, offset
        stop = begin + tensor.nbytes
    if stop:
        yield source[start:stop], memory[to : to + stop - start]


def _inside(tensor: Tensor, memory: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
