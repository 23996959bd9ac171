"""A store that keeps records in host memory and loads those of a batch ahead of its step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.offloading import CHUNK_BYTES, HostStateStore, Placement, StreamingExecutor
from optstate_codecs.offloading.copies import SLOTS
from optstate_codecs.state.layout import view_bytes_as
from optstate_wrap.offload.slabs import RecordSlab, Spares, pack
from optstate_wrap.offload.transfers import BatchSlot, Item, StateRing
from optstate_wrap.state.param_chunks import ParamChunk
from optstate_wrap.state.record import Coded, OffloadedTensor, Record
from optstate_wrap.state.store import DeviceStore, Records, Store
from optstate_wrap.step.scratch import copyable_as_bytes

__all__ = ["HostStore", "make_store"]

STORES = ("device", "host")


class SlabRecord(dict[str, Any]):
    """A record whose tensors are in slabs; a copy or pickle of it is an ordinary dict."""

    slabs: tuple[RecordSlab, ...] = ()

    def __reduce__(self) -> Any:
        return dict, (), None, None, iter(self.items())


class HostStore(Store):
    """Keeps records in host memory, with the tensors of each batch side by side in one slab.

    The batches that a step expects are loaded to the device ahead of it, and stored after it. New
    records are stored in a spare slab, so that the old ones stay valid until ``swap``.

    Args:
        pin_memory: page-lock the slabs, for copies at the full speed of the bus; None: if the
            parameters are on a GPU.
        chunk_bytes: bytes that move at a time of the state that the codecs' engine steps.
        resident_bytes: bytes of that state that stay on the device.
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
        self._rings: dict[torch.device, StateRing] = {}
        self._forget_batches()

    def _forget_batches(self) -> None:
        self._batches: Sequence[Sequence[ParamChunk]] = ()
        # what each batch needs, and the slots of those whose loads have begun
        self._wanted: list[dict[torch.device, list[Item]]] = []
        self._slots: list[dict[torch.device, BatchSlot]] = []
        self._entered = 0
        self._staged: set[int] = set()

    def make_executor(self) -> StreamingExecutor:
        store = HostStateStore(self.pin_memory)
        placement = Placement(store, self.chunk_bytes, self.resident_bytes)
        return StreamingExecutor("auto", placement)

    def records(self, param: Tensor) -> list[Record]:
        self.wait()
        return super().records(param)

    def wait(self) -> None:
        for ring in self._rings.values():
            ring.streams.wait()

    def expect(self, batches: Sequence[Sequence[ParamChunk]]) -> None:
        self._forget_batches()
        self._batches = batches
        most: defaultdict[torch.device, int] = defaultdict(int)
        # the records of a batch do not change before it is stepped
        self._wanted = [self._items(batch) for batch in batches]
        for wanted in self._wanted:
            for device, items in wanted.items():
                most[device] = max(most[device], pack([item.tensor for item in items])[1])
        for device, nbytes in most.items():
            if device not in self._rings:
                self._rings[device] = StateRing(device)
            self._rings[device].wanted = nbytes

    def load(self, batch: Sequence[ParamChunk]) -> list[Record | None]:
        if self._entered == len(self._batches) or self._batches[self._entered] is not batch:
            self._staged = set()
            return super().load(batch)  # it is read, not stepped
        self._leave()
        ahead = self._entered + SLOTS
        for wanted in self._wanted[len(self._slots) : ahead]:
            loading = {device: self._rings[device].load(i) for device, i in wanted.items()}
            self._slots.append(loading)
        views: dict[int, Tensor] = {}
        for device, slot in self._slots[self._entered].items():
            self._rings[device].enter(slot)
            views |= slot.views
        self._entered += 1
        self._staged = {id(view) for view in views.values()}
        return [
            _loaded(self.entries[chunk.param][chunk.part], views) if chunk.param in self else None
            for chunk in batch
        ]

    def is_staged(self, tensor: Tensor) -> bool:
        return id(tensor) in self._staged

    def _leave(self) -> None:
        """Free the slots of the batch that was loaded last."""
        if self._entered:
            for device, slot in self._slots[self._entered - 1].items():
                self._rings[device].leave(slot)

    def _items(self, batch: Sequence[ParamChunk]) -> dict[torch.device, list[Item]]:
        """The tensors that each device needs for a batch; none where there is no state yet."""
        found: dict[torch.device, list[Item]] = {}
        for chunk in batch:
            found.setdefault(chunk.param.device, [])
            if chunk.param not in self:
                continue
            record = self.entries[chunk.param][chunk.part]
            slabs = record.slabs if isinstance(record, SlabRecord) else ()
            for tensor, device in _offloaded(record, chunk.param):
                slab = next((slab for slab in slabs if _is_in(tensor, slab)), None)
                if slab is None and self.synchronize is not None:
                    self.synchronize()  # the executor may still store it
                found.setdefault(device, []).append(Item(tensor, slab))
        return found

    def to_store(self, records: Records) -> Records:
        found: dict[torch.device, list[Tensor]] = {}
        for record in (record for parts in records for record in parts):
            for tensor in _for_slab(record):
                found.setdefault(tensor.device, []).append(tensor)
        moved: dict[int, Tensor] = {}
        slabs: dict[int, RecordSlab] = {}
        slots = self._slots[self._entered - 1] if self._entered else {}
        for device, tensors in found.items():
            offsets, nbytes = pack(tensors)
            slab = self.spares.take(nbytes, device, self.pin_memory)
            slot = slots.get(device)
            staged = slot is not None and slot.busy
            if slot is not None and staged:
                self._rings[device].store(slot, tensors, slab)
            else:
                self.wait()  # for copies to the slab or from it
            for tensor, offset in zip(tensors, offsets, strict=True):
                moved[id(tensor)] = view_bytes_as(slab.memory, offset, tensor)
                slabs[id(tensor)] = slab
                if not staged:
                    moved[id(tensor)].copy_(tensor)
        return [[_stored(record, moved, slabs) for record in parts] for parts in records]

    def swap(self, params: Sequence[Tensor], records: Records) -> None:
        old = [record for param in params for record in self.entries.get(param, ())]
        super().swap(params, records)
        self.discard(old)

    def discard(self, records: Sequence[Record]) -> None:
        for record in records:
            if isinstance(record, SlabRecord):
                for slab in record.slabs:
                    slab.records -= 1
                    if not slab.records:
                        self.spares.give(slab)
                record.slabs = ()

    def replace(self, records: dict[Tensor, list[Record]]) -> None:
        super().replace(records)
        self.spares = Spares()

    def clear(self) -> None:
        super().clear()
        self._begin()

    def drop(self, param: Tensor) -> None:
        self.discard(self.entries[param])
        super().drop(param)

    def end(self, whole: bool) -> None:
        self._forget_batches()
        for ring in self._rings.values():
            ring.end(whole)
        if whole:
            self.spares.end()

    def to_device(self, record: Record, param: Tensor) -> Record:
        # values that are not coded are copied, since a step may change them in place
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
        state, arguments = super().__getstate__(), ("pin_memory", "chunk_bytes", "resident_bytes")
        names = (*arguments, "entries", "_layouts", "synchronize")
        return {name: state[name] for name in names if name in state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def _for_slab(record: Record) -> Iterator[Tensor]:
    """The tensors of a record that are stored in a slab: neither 0-d nor sharded ones."""
    for value in record.values():
        if isinstance(value, Coded):
            yield from value.parts
        elif isinstance(value, Tensor) and value.dim() > 0 and copyable_as_bytes(value):
            yield value


def _offloaded(record: Record, param: Tensor) -> Iterator[tuple[Tensor, torch.device]]:
    """The offloaded tensors of a stored record, with the devices where they are used."""
    for value in record.values():
        if isinstance(value, Coded):
            for part in value.parts:
                yield part, param.device
        elif isinstance(value, OffloadedTensor):
            yield value.tensor, value.device


def _is_in(tensor: Tensor, slab: RecordSlab) -> bool:
    return tensor.untyped_storage().data_ptr() == slab.memory.untyped_storage().data_ptr()


def _loaded(record: Record, views: dict[int, Tensor]) -> Record:
    """A stored record with its offloaded tensors replaced by those that were loaded."""
    new: Record = {}
    for key, value in record.items():
        if isinstance(value, Coded):
            new[key] = replace(value, parts=tuple(views[id(part)] for part in value.parts))
        else:
            new[key] = views[id(value.tensor)] if isinstance(value, OffloadedTensor) else value
    return new


def _stored(record: Record, moved: dict[int, Tensor], slabs: dict[int, RecordSlab]) -> Record:
    """A record with its tensors replaced by those that were moved to slabs."""
    new = SlabRecord()
    for key, value in record.items():
        if isinstance(value, Coded):
            new[key] = replace(value, parts=tuple(moved[id(part)] for part in value.parts))
        elif id(value) in moved:
            new[key] = OffloadedTensor(moved[id(value)], value.device)
        else:
            new[key] = value
    new.slabs = tuple({slabs[id(tensor)] for tensor in _for_slab(record)})
    for slab in new.slabs:
        slab.records += 1
    return new


def make_store(where: str | Store, pin_memory: bool | None) -> Store:
    """The store with this name, or the store that is given."""
    if isinstance(where, Store):
        return where
    checks.one_of("store", where, STORES)
    return HostStore(pin_memory) if where == "host" else DeviceStore()
