"""Brings the state of rows to a device and back while others are stepped.

A lane has three slots on its device and two streams. While the current stream steps a row in one
slot, the next one's state comes to the second, and the last one's leaves the third, which then
takes the row after the next. Nothing waits on the host: every order is one between streams.
- A load waits for the last store to the slabs that it reads, and for the store of what was in the
  slot before.
- The current stream waits for the load of the row that it is to step.
- A store waits for the current stream, and so for all loads that there were before the row's: the
  slab that it writes is nobody's, so nobody has begun to load from it since.
On a CPU, copies are made there and then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.state.layout import view_bytes_as
from optstate_wrap.offload.slabs import ALIGNMENT, Slab, layout

__all__ = ["SLOTS", "Item", "Slot", "StateRing"]

SLOTS = 3


@dataclass(frozen=True, eq=False)
class Item:
    """A tensor that is to come to the device, and the slab that it is in, if it is in one."""

    tensor: Tensor
    slab: Slab | None


@dataclass(eq=False)
class Slot:
    """Room on the device for the state of a row.

    Attributes:
        room: uint8.
        views: what was brought, by the identity of what it was brought from.
        busy: whether the current stream uses it.
        loaded: the event after which what was brought is there.
        freed: the event after which nobody needs what was there before; None: nobody does.
    """

    room: Tensor | None = None
    views: dict[int, Tensor] = field(default_factory=dict)
    busy: bool = False
    loaded: Any = None
    freed: Any = None


class StateRing:
    """The slots and streams of one device.

    Attributes:
        wanted: bytes that a slot which is made now should have.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wanted = 0
        self._most = 0
        self._slots = [Slot() for _ in range(SLOTS)]
        self._turn = 0
        self._streams: tuple[Any, Any] | None = None
        if device.type == "cuda":
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for slot in self._slots:
                slot.loaded = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def bring(self, items: Sequence[Item]) -> Slot:
        """Begin to copy tensors to the next slot.

        The row that had the slot before must have left it.
        """
        slot = self._slots[self._turn]
        assert not slot.busy
        self._turn = (self._turn + 1) % SLOTS
        tensors = [item.tensor for item in items]
        offsets, nbytes = layout(tensors)
        room = self._fit(slot, nbytes)
        slabs = dict.fromkeys(item.slab for item in items if item.slab is not None)
        if self._streams is not None:
            load = self._streams[0]
            for event in (slot.freed, *(slab.stored for slab in slabs)):
                if event is not None:
                    load.wait_event(event)
            if any(tensor.is_cuda for tensor in tensors):
                # it has been made by what the current stream may still do
                load.wait_stream(torch.cuda.current_stream(self.device))
        pairs = zip(tensors, offsets, strict=True)
        slot.views = {id(tensor): view_bytes_as(room, offset, tensor) for tensor, offset in pairs}
        with self._on(0) as stream:
            for source, to in _runs(room, items, offsets):
                to.copy_(source, non_blocking=True)
            if stream is not None:
                slot.loaded.record(stream)
        return slot

    def enter(self, slot: Slot) -> None:
        """Let the current stream use what was brought to the slot."""
        slot.busy = True
        if self._streams is not None:
            # this is also after all that used the slot before
            torch.cuda.current_stream(self.device).wait_event(slot.loaded)

    def send(self, slot: Slot, tensors: Sequence[Tensor], slab: Slab) -> None:
        """Begin to copy tensors to a slab, as ``layout`` has them; then the slot is left."""
        offsets, nbytes = layout(tensors)
        old, room = slot.room, self._fit(slot, nbytes)
        to = [
            view_bytes_as(room, offset, tensor)
            for tensor, offset in zip(tensors, offsets, strict=True)
        ]
        # what was stepped in place is there already; what has to move must not be written over
        moved = [
            (view, tensor.clone() if old is room and _inside(tensor, room) else tensor)
            for view, tensor in zip(to, tensors, strict=True)
            if tensor.nbytes and view.data_ptr() != tensor.data_ptr()
        ]
        for view, tensor in moved:
            view.copy_(tensor)
        self._mark(slot)
        with self._on(1) as stream:
            if stream is not None:
                stream.wait_event(slot.freed)
            slab.memory[:nbytes].copy_(room[:nbytes], non_blocking=True)
            if stream is not None:
                slab.stored = _recorded(slab.stored, stream)
                slot.freed.record(stream)
        slot.busy = False
        slot.views = {}

    def leave(self, slot: Slot) -> None:
        """The current stream does not need the slot any more, if it did."""
        if slot.busy:
            self._mark(slot)
        slot.busy = False
        slot.views = {}

    def end(self, whole: bool) -> None:
        """No row has a slot; after a ``whole`` step, slots that are much too large are let go."""
        for slot in self._slots:
            self.leave(slot)
            if whole and slot.room is not None and slot.room.numel() > 2 * self._most:
                slot.room = None
        if whole:
            self._most = 0

    def wait(self) -> None:
        """Wait until everything has been copied."""
        for stream in self._streams or ():
            stream.synchronize()

    def _mark(self, slot: Slot) -> None:
        """Have the slot's next user wait for what the current stream does with it."""
        if self._streams is not None:
            slot.freed = _recorded(slot.freed, torch.cuda.current_stream(self.device))

    def _fit(self, slot: Slot, nbytes: int) -> Tensor:
        """The slot's room, which is made if there is not enough."""
        self._most = max(self._most, nbytes)
        if slot.room is None or slot.room.numel() < nbytes:
            slot.room = None
            size = max(nbytes, self.wanted)
            slot.room = torch.empty(size, dtype=torch.uint8, device=self.device)
            for stream in self._streams or ():
                # what had this memory before is done with it before a copy begins
                stream.wait_stream(torch.cuda.current_stream(self.device))
                slot.room.record_stream(stream)
        return slot.room

    def _on(self, number: int) -> AbstractContextManager[Any]:
        return nullcontext() if self._streams is None else _using(self._streams[number])


def _runs(
    room: Tensor, items: Sequence[Item], offsets: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What is to be copied and to where: neighbours in a slab at once."""
    memory, start, stop, to = room, 0, 0, 0
    for item, offset in zip(items, offsets, strict=True):
        tensor, slab = item.tensor, item.slab
        if not tensor.nbytes:
            continue
        if slab is None:
            yield tensor, view_bytes_as(room, offset, tensor)
            continue
        begin = tensor.data_ptr() - slab.memory.data_ptr()
        gap = begin - stop
        if not (slab.memory is memory and 0 <= gap < ALIGNMENT and offset == to + begin - start):
            if stop:
                yield memory[start:stop], room[to : to + stop - start]
            memory, start, to = slab.memory, begin, offset
        stop = begin + tensor.nbytes
    if stop:
        yield memory[start:stop], room[to : to + stop - start]


@contextmanager
def _using(stream: Any) -> Iterator[Any]:
    """``torch.cuda.stream``, which gives the stream."""
    with torch.cuda.stream(stream):
        yield stream


def _recorded(event: Any, stream: Any) -> Any:
    """The event, or a new one, after what the stream has to do now."""
    if event is None:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _inside(tensor: Tensor, room: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()
