"""Which slab and chunk each parameter's state is in, and the state's moves to a store and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import is_

import torch
from torch import Tensor

from optstate_codecs.engine.request import ParamStep
from optstate_codecs.offloading.copies import SLOTS
from optstate_codecs.offloading.ring import Rings
from optstate_codecs.offloading.slabs import (
    Chunk,
    Part,
    PlacementEntry,
    Slab,
    Starts,
    arrange,
    components,
    device_view_of,
    entries_of,
    layout,
    size_of,
)
from optstate_codecs.offloading.store import StateStore

__all__ = ["CHUNK_BYTES", "RESIDENT", "Placement"]

# copies of half the size are as fast, but cost the host twice the work
CHUNK_BYTES = 1 << 26

# the stage of parameters whose state stays on the device
RESIDENT = -1

# a parameter's number and its offset, by which it is known from step to step
Key = tuple[int, int]


class Placement:
    """A table of where each parameter's state is, with the slabs and the rings that it needs.

    To place a parameter's state is to copy it to the store and to make the tensors of
    ``param_step.state`` views of the slab. Parameters never move.

    Args:
        store: where state is kept.
        chunk_bytes: bytes of state that move at a time; three times as much is on the device.
        resident_bytes: bytes of state that stay on each device, the first parameters' first.

    Attributes:
        slabs: the slabs that state is in.
        chunks: the chunks of all slabs, by number.
        slab_of: the slab of each chunk, by number.
        rings: the device memory that chunks pass through.
        pending: whether writes of state or of a manifest may be under way.
        generation: counts how often the device views were replaced.
        watch: called with each parameter whose state tensors were replaced, or None.
    """

    def __init__(
        self, store: StateStore, chunk_bytes: int = CHUNK_BYTES, resident_bytes: int = 0
    ) -> None:
        self.store = store
        self.chunk_bytes = chunk_bytes
        self.resident_bytes = resident_bytes
        self.slabs: list[Slab] = []
        self.chunks: list[Chunk] = []
        self.slab_of: list[Slab] = []
        self.rings = Rings(store)
        self.pending = False
        self.generation = 0
        self.watch: Callable[[ParamStep], None] | None = None
        self._entries: dict[Key, PlacementEntry] = {}
        # entries with several parts by the tensor that holds their counts, and entries by slab
        self._parted: dict[int, list[PlacementEntry]] = {}
        self._sharing: dict[int, list[PlacementEntry]] = {}
        self._resident: dict[torch.device, int] = {}

    @property
    def entries(self) -> list[PlacementEntry]:
        """The entries of all parameters, in the order in which they were placed."""
        return list(self._entries.values())

    def entry(self, param_step: ParamStep) -> PlacementEntry:
        """The entry of a parameter that has been placed."""
        return self._entries[_key(param_step)]

    def synchronize(self) -> None:
        """Wait until all is stored, and make the state tensors views of where it is."""
        self.store.check_process()
        self.rings.join()
        self.keep_targets()
        self.pending = self.store.restate() or self.pending
        if self.pending:
            # the caller may change the state that it can see from here on
            self.rings.flush()
            self.pending = False
        if any(slab.stale for slab in self.slabs):
            for entry in self._entries.values():
                if entry.slab is not None and entry.slab.stale:
                    self._view_slab(entry)
            for slab in self.slabs:
                slab.stale = False

    def keep_targets(self) -> None:
        """Have each slab keep the memory that the step has written it to."""
        for slab in self.slabs:
            target = slab.target
            if target is not None and target is not slab.memory:
                # chunks that the step has not reached are copied to where the others are now
                missed = [chunk for chunk in slab.chunks if chunk.memory is slab.memory]
                if missed:
                    self.rings.wait()
                for chunk in missed:
                    pairs = zip(chunk.pieces(slab.memory), chunk.pieces(target), strict=True)
                    for (old, _), (new, _) in pairs:
                        new.copy_(old)
                    chunk.memory = target
                slab.memory, slab.stale = target, True
            slab.target = None

    def _view_slab(self, entry: PlacementEntry, anew: bool = False) -> None:
        """Make state tensors views of their slab; unless ``anew``, not those the user replaced."""
        assert entry.slab is not None
        if anew:
            entry.values = dict(entry.param_step.state)
        state, shown = entry.param_step.state, entry.values
        untouched = not entry.param_step.moved()
        for key in entry.starts:
            value = entry.view(key, entry.slab.memory)
            if state.get(key) is shown.get(key):
                state[key] = value
            shown[key] = value
        if untouched:
            entry.param_step.note()
        entry.changed()
        if self.watch is not None:
            self.watch(entry.param_step)

    def _keep_on_device(self, entry: PlacementEntry) -> None:
        """Move state that is to stay there to its parameter's device."""
        param_step = entry.param_step
        for key in components(param_step):
            param_step.state[key] = param_step.state[key].to(param_step.param.device)
        param_step.note()
        entry.values = dict(param_step.state)
        if self.watch is not None:
            self.watch(param_step)

    def reload_edited(self, param_steps: Sequence[ParamStep]) -> None:
        """Discard loaded chunks if kept state of these parameters was changed in place."""
        entries = [self._entries.get(_key(param_step)) for param_step in param_steps]
        slabs = {id(entry.slab): entry.slab for entry in entries if entry is not None}
        # asks every entry of a slab, so that none reports an old change at a later step
        together = [entry for number in slabs for entry in self._sharing.get(number, ())]
        if sum(entry.changed() for entry in together):
            self.rings.flush()

    def place(self, param_steps: Sequence[ParamStep], cut: bool) -> None:
        """Place the state of every parameter that is not placed as it is now.

        Args:
            param_steps: the parameters.
            cut: whether large parameters may be stepped in parts.
        """
        new: dict[torch.device, list[ParamStep]] = {}
        changed = False
        for param_step in param_steps:
            entry = self._entries.get(_key(param_step))
            if entry is not None and self._is_current(entry, param_step, cut):
                continue
            changed = True
            self.synchronize()
            if entry is None or not self._update(entry, param_step, cut):
                self._remove(_key(param_step))
                new.setdefault(param_step.param.device, []).append(param_step)
        for device, together in new.items():
            self._add(device, together, cut)
        if changed:
            self._rebuild()

    @staticmethod
    def _is_current(entry: PlacementEntry, param_step: ParamStep, cut: bool) -> bool:
        return (
            entry.param_step is param_step
            and (cut or len(entry.parts) == 1)
            and len(param_step.state) == len(entry.values)
            and all(map(is_, param_step.state.values(), entry.values.values()))
        )

    def _update(self, entry: PlacementEntry, param_step: ParamStep, cut: bool) -> bool:
        """Copy replaced state to its entry; False where it is laid out in another way."""
        before, after = components(entry.param_step), components(param_step)
        like = layout(param_step)
        alike = before == after and all(
            entry.like[key].stride() == like[key].stride()
            and entry.like[key].shape == param_step.state[key].shape
            for key in after
        )
        same_device = param_step.param.device == entry.param_step.param.device
        if not alike or not same_device or not (cut or len(entry.parts) == 1):
            return False
        slab = entry.slab
        if slab is None:
            entry.param_step = param_step
            self._keep_on_device(entry)
            return True
        if any(
            param_step.state[key].data_ptr() != entry.view(key, slab.memory).data_ptr()
            for key in after
        ):
            target = self.store.target(slab)
            if target is not slab.memory:
                target.tensor.copy_(slab.memory.tensor)
                slab.memory, slab.stale = target, True
            # all values are copied first: the user may have exchanged views of this very slab
            given = {key: param_step.state[key].clone() for key in after}
            for key, value in given.items():
                entry.view(key, target).copy_(value)
            for chunk in slab.chunks:
                chunk.memory = target
            self.rings[param_step.param.device].forget()
        entry.param_step = param_step
        self._view_slab(entry, anew=True)
        return True

    def _add(self, device: torch.device, param_steps: Sequence[ParamStep], cut: bool) -> None:
        """Make entries for parameters of a device, which have none."""
        offloaded = []
        for param_step in param_steps:
            size = size_of(param_step)
            left = self.resident_bytes - self._resident.get(device, 0)
            # with nothing resident, empty state is offloaded too: a manifest counts its steps
            if size > left or not self.resident_bytes:
                offloaded.append(param_step)
                continue
            self._resident[device] = self._resident.get(device, 0) + size
            entry = PlacementEntry(param_step, None, {}, Part.whole(param_step), layout(param_step))
            self._entries[_key(param_step)] = entry
            self._keep_on_device(entry)
        for together, parts in arrange(offloaded, self.chunk_bytes, cut):
            self._add_slab(together, parts)

    def _add_slab(self, param_steps: Sequence[ParamStep], parts: list[list[Part]]) -> None:
        """Copy state to a new slab."""
        slab = self.store.allocate(sum(map(size_of, param_steps)))
        entries = entries_of(param_steps, parts, slab)
        for entry in entries:
            for key in entry.starts:
                entry.view(key, slab.memory).copy_(entry.param_step.state[key])
        self._add_entries(slab, entries)

    def _add_entries(self, slab: Slab, entries: Sequence[PlacementEntry]) -> None:
        for entry in entries:
            self._view_slab(entry, anew=True)
            self._entries[_key(entry.param_step)] = entry
        self.slabs.append(slab)

    def resume(
        self, slabs: Sequence[tuple[Slab, Sequence[ParamStep], Sequence[Starts], bool]]
    ) -> None:
        """Take over slabs that hold the state of parameters already.

        Args:
            slabs: each with its parameters in order, where their components begin, and whether
                they are in parts.
        """
        for slab, param_steps, starts, cut in slabs:
            parts = list(map(Part.whole, param_steps))
            if cut:
                ((_, parts),) = arrange(param_steps, self.chunk_bytes, True)
            self._add_entries(slab, entries_of(param_steps, parts, slab, starts))
        self._rebuild()
        self.store.protect(slab.memory for slab, *_ in slabs)

    def release(self, param_steps: Sequence[ParamStep]) -> None:
        """Remove the entries of parameters; their state tensors do not change."""
        self.synchronize()
        for param_step in param_steps:
            self._remove(_key(param_step))

    def keep_only(self, param_steps: Sequence[ParamStep]) -> None:
        """Remove the entries of all other parameters, whose state is gone."""
        known = set(map(_key, param_steps))
        if gone := [key for key in self._entries if key not in known]:
            self.synchronize()
            for key in gone:
                self._remove(key)
            self._rebuild()

    def _remove(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None and entry.slab is None:
            self._resident[entry.param_step.param.device] -= size_of(entry.param_step)

    def _rebuild(self) -> None:
        """Number the chunks, and make the rings large enough and all device views anew."""
        self.rings.flush(order=True)
        entries = self._entries.values()
        self._parted, self._sharing = {}, {}
        for entry in entries:
            if len(entry.parts) > 1:
                self._parted.setdefault(id(_count_base(entry.param_step)), []).append(entry)
            if entry.slab is not None:
                self._sharing.setdefault(id(entry.slab), []).append(entry)
        self.slabs = [slab for slab in self.slabs if id(slab) in self._sharing]
        pairs = [(chunk, slab) for slab in self.slabs for chunk in slab.chunks]
        self.chunks = [chunk for chunk, _ in pairs]
        self.slab_of = [slab for _, slab in pairs]
        for number, chunk in enumerate(self.chunks):
            chunk.number = number
        for device in dict.fromkeys(chunk.device for chunk in self.chunks):
            together = [chunk for chunk in self.chunks if chunk.device == device]
            for number, chunk in enumerate(together):
                chunk.slot = number % SLOTS
            self.rings.fit(device, max(chunk.nbytes for chunk in together))
        for entry in entries:
            self._view_on_device(entry)
        self.generation += 1

    def _view_on_device(self, entry: PlacementEntry) -> None:
        param_step, step = entry.param_step, entry.param_step.state["step"]
        # the parts of a parameter of which only some were stepped have counts of their own
        counts = [
            part.device_view.state["step"] for part in entry.parts if part.device_view is not None
        ]
        if not counts or counts[0] is not step or entry.version != step._version:
            counts = [step, *step.repeat(len(entry.parts) - 1).unbind()]
        for part, count in zip(entry.parts, counts, strict=True):
            if part.chunk is None:
                part.device_view = replace(param_step, stage=RESIDENT)
                continue
            slot = self.rings[part.chunk.device].slots[part.chunk.slot]
            whole = len(entry.parts) == 1
            part.device_view = device_view_of(
                param_step, part, whole, slot.memory, count, part.chunk.number
            )
        entry.version = step._version

    def copy_counts(self, entries: Sequence[PlacementEntry]) -> None:
        """Copy a parameter's step count to those of its parts where it was changed in place."""
        for entry in entries:
            step = entry.param_step.state["step"]
            if len(entry.parts) > 1 and entry.version != step._version:
                for part in entry.parts[1:]:
                    assert part.device_view is not None
                    part.device_view.state["step"].copy_(step)

    def note_counts(self, param_steps: Sequence[ParamStep]) -> None:
        """Note that a step has written step counts, which is no change by the user.

        Counts in one tensor share a version, so parameters that were not stepped are noted too.
        """
        for base in {id(_count_base(param_step)) for param_step in param_steps}:
            for entry in self._parted.get(base, ()):
                entry.version = entry.param_step.state["step"]._version


def _key(param_step: ParamStep) -> Key:
    return param_step.index, param_step.offset


def _count_base(param_step: ParamStep) -> Tensor:
    """The tensor that holds a parameter's step count, alone or with others."""
    step: Tensor = param_step.state["step"]
    return step if step._base is None else step._base
