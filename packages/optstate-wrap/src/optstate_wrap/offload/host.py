"""Records in host memory, and how those of a step's rows come from there and go back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.offloading import CHUNK_BYTES, HostStateStore, StreamingExecutor
from optstate_codecs.state.layout import view_bytes_as
from optstate_wrap.offload.slabs import Slab, Spares, layout
from optstate_wrap.offload.transfers import SLOTS, Item, Slot, StateRing
from optstate_wrap.state.param_chunks import ParamChunk
from optstate_wrap.state.record import Coded, OffloadedTensor, Record
from optstate_wrap.state.store import DeviceStore, Records, Store
from optstate_wrap.step.scratch import copyable_as_bytes

__all__ = ["HostStore", "make_store"]

STORES = ("device", "host")


class Placed(dict[str, Any]):
    """A record whose tensors are in slabs; a copy of it is an ordinary one."""

    slabs: tuple[Slab, ...] = ()

    def __reduce__(self) -> Any:
        return dict, (), None, None, iter(self.items())


class HostStore(Store):
    """Records in host memory, each row's tensors side by side in one slab.

    The rows that a step expects are brought to the device ahead of it, and go back behind it. What
    they become is stored in a spare slab, so that what was stored stays what it is until ``swap``.

    Args:
        pin_memory: page-locked slabs, for copies at the full speed of the bus; None: where the
            parameters are on a GPU.
        chunk_bytes: of what the codecs' engine steps, what moves at a time.
        resident_bytes: of that, what stays on the device.
    """

    name = "host"

    def __init__(
        self,
        pin_memory: bool | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        resident_bytes: int = 0,
    ) -> None:
        super().__init__()
        self.pin_memory = pin_memory
        self.chunk_bytes = chunk_bytes
        self.resident_bytes = resident_bytes
        self._begin()

    def _begin(self) -> None:
        self.spares = Spares()
        self._lanes: dict[torch.device, StateRing] = {}
        self._forget_rows()

    def _forget_rows(self) -> None:
        self._rows: Sequence[Sequence[ParamChunk]] = ()
        self._wanted: list[dict[torch.device, list[Item]]] = []
        self._brought: list[dict[torch.device, Slot]] = []
        self._entered = 0
        self._lent: set[int] = set()

    def make_executor(self) -> StreamingExecutor:
        place = HostStateStore(self.pin_memory)
        return StreamingExecutor("auto", place, self.chunk_bytes, self.resident_bytes)

    def records(self, param: Tensor) -> list[Record]:
        self.wait()
        return super().records(param)

    def wait(self) -> None:
        for lane in self._lanes.values():
            lane.wait()

    def expect(self, rows: Sequence[Sequence[ParamChunk]]) -> None:
        self._forget_rows()
        self._rows = rows
        most: defaultdict[torch.device, int] = defaultdict(int)
        # what a row's records are does not change before it is stepped
        self._wanted = [self._items(row) for row in rows]
        for wanted in self._wanted:
            for device, items in wanted.items():
                most[device] = max(most[device], layout([item.tensor for item in items])[1])
        for device, nbytes in most.items():
            if device not in self._lanes:
                self._lanes[device] = StateRing(device)
            self._lanes[device].wanted = nbytes

    def load(self, chunk: Sequence[ParamChunk]) -> list[Record | None]:
        if self._entered == len(self._rows) or self._rows[self._entered] is not chunk:
            self._lent = set()
            return super().load(chunk)  # nobody steps it
        self._leave()
        ahead = self._entered + SLOTS
        for wanted in self._wanted[len(self._brought) : ahead]:
            brought = {device: self._lanes[device].bring(i) for device, i in wanted.items()}
            self._brought.append(brought)
        views: dict[int, Tensor] = {}
        for device, slot in self._brought[self._entered].items():
            self._lanes[device].enter(slot)
            views |= slot.views
        self._entered += 1
        self._lent = {id(view) for view in views.values()}
        return [
            _shown(self.entries[piece.param][piece.part], views) if piece.param in self else None
            for piece in chunk
        ]

    def is_staged(self, tensor: Tensor) -> bool:
        return id(tensor) in self._lent

    def _leave(self) -> None:
        """The row that was loaded last does not need its slots any more."""
        if self._entered:
            for device, slot in self._brought[self._entered - 1].items():
                self._lanes[device].leave(slot)

    def _items(self, row: Sequence[ParamChunk]) -> dict[torch.device, list[Item]]:
        """What is to be brought to each device for a row: nothing where there is no state yet."""
        found: dict[torch.device, list[Item]] = {}
        for piece in row:
            found.setdefault(piece.param.device, [])
            if piece.param not in self:
                continue
            record = self.entries[piece.param][piece.part]
            slabs = record.slabs if isinstance(record, Placed) else ()
            for tensor, device in _held(record, piece.param):
                slab = next((slab for slab in slabs if _holds(slab, tensor)), None)
                if slab is None and self.synchronize is not None:
                    self.synchronize()  # it may be where the session stores it
                found.setdefault(device, []).append(Item(tensor, slab))
        return found

    def to_store(self, records: Records) -> Records:
        found: dict[torch.device, list[Tensor]] = {}
        for record in (record for parts in records for record in parts):
            for tensor in _movable(record):
                found.setdefault(tensor.device, []).append(tensor)
        moved: dict[int, Tensor] = {}
        slabs: dict[int, Slab] = {}
        slots = self._brought[self._entered - 1] if self._entered else {}
        for device, tensors in found.items():
            offsets, nbytes = layout(tensors)
            slab = self.spares.take(nbytes, device, self.pin_memory)
            slot = slots.get(device)
            sent = slot is not None and slot.busy
            if slot is not None and sent:
                self._lanes[device].send(slot, tensors, slab)
            else:
                self.wait()  # for what is still copied to the slab, or from it
            for tensor, offset in zip(tensors, offsets, strict=True):
                moved[id(tensor)] = view_bytes_as(slab.memory, offset, tensor)
                slabs[id(tensor)] = slab
                if not sent:
                    moved[id(tensor)].copy_(tensor)
        return [[_put(record, moved, slabs) for record in parts] for parts in records]

    def swap(self, params: Sequence[Tensor], records: Records) -> None:
        old = [record for param in params for record in self.entries.get(param, ())]
        super().swap(params, records)
        self.discard(old)

    def discard(self, records: Sequence[Record]) -> None:
        for record in records:
            if isinstance(record, Placed):
                for slab in record.slabs:
                    slab.records -= 1
                    if not slab.records:
                        self.spares.give(slab)
                record.slabs = ()

    def replace(self, kept: dict[Tensor, list[Record]]) -> None:
        super().replace(kept)
        self.spares = Spares()

    def clear(self) -> None:
        super().clear()
        self._begin()

    def drop(self, param: Tensor) -> None:
        self.discard(self.entries[param])
        super().drop(param)

    def end(self, whole: bool) -> None:
        self._forget_rows()
        for lane in self._lanes.values():
            lane.end(whole)
        if whole:
            self.spares.end()

    def to_device(self, record: Record, param: Tensor) -> Record:
        # what is not coded comes in copies, which a step may change
        return {
            key: value.to(param.device)
            if isinstance(value, Coded)
            else value.copy_to_device()
            if isinstance(value, OffloadedTensor)
            else value
            for key, value in record.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        self.wait()
        state = super().__getstate__()
        names = (
            "pin_memory",
            "chunk_bytes",
            "resident_bytes",
            "entries",
            "_layouts",
            "synchronize",
        )
        return {name: state[name] for name in names if name in state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def _movable(record: Record) -> Iterator[Tensor]:
    """The tensors of a record that are worth a place in a slab: not 0-d ones, nor sharded."""
    for value in record.values():
        if isinstance(value, Coded):
            yield from value.parts
        elif isinstance(value, Tensor) and value.dim() > 0 and copyable_as_bytes(value):
            yield value


def _held(record: Record, param: Tensor) -> Iterator[tuple[Tensor, torch.device]]:
    """The tensors of a kept record that are away, and where they are used."""
    for value in record.values():
        if isinstance(value, Coded):
            for part in value.parts:
                yield part, param.device
        elif isinstance(value, OffloadedTensor):
            yield value.tensor, value.device


def _holds(slab: Slab, tensor: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == slab.memory.untyped_storage().data_ptr()


def _shown(record: Record, views: dict[int, Tensor]) -> Record:
    """A kept record with what was brought of it."""
    new: Record = {}
    for key, value in record.items():
        if isinstance(value, Coded):
            new[key] = replace(value, parts=tuple(views[id(part)] for part in value.parts))
        else:
            new[key] = views[id(value.tensor)] if isinstance(value, OffloadedTensor) else value
    return new


def _put(record: Record, moved: dict[int, Tensor], slabs: dict[int, Slab]) -> Record:
    new = Placed()
    for key, value in record.items():
        if isinstance(value, Coded):
            new[key] = replace(value, parts=tuple(moved[id(part)] for part in value.parts))
        elif id(value) in moved:
            new[key] = OffloadedTensor(moved[id(value)], value.device)
        else:
            new[key] = value
    new.slabs = tuple({slabs[id(tensor)] for tensor in _movable(record)})
    for slab in new.slabs:
        slab.records += 1
    return new


def make_store(where: str | Store, pin_memory: bool | None) -> Store:
    """The store of that name, or the one that is given."""
    if isinstance(where, Store):
        return where
    checks.one_of("store", where, STORES)
    return HostStore(pin_memory) if where == "host" else DeviceStore()
