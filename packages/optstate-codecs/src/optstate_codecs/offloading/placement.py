"""Where the state of each unit is, in slabs and on devices, and what is kept up as that changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.engine.executor import ResidentExecutor
from optstate_codecs.engine.request import ParamStep, StepRequest
from optstate_codecs.offloading.ring import SLOTS, Ring
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
from optstate_codecs.state.layout import storage_order

__all__ = ["CHUNK_BYTES", "HERE", "Placement", "bank_of"]

# copies of half of it reach the bus's speed too, but the host then has twice as much to do; three
# times this is on the device
CHUNK_BYTES = 1 << 26
# the stage of units whose state is on the device
HERE = -1


class Placement:
    """The seats of units, the slabs that they share, and the rings that chunks pass through.

    Seating a unit copies its state to the place and makes its ``state`` show it there; parameters
    never move.

    Args:
        backend: of the engine's session.
        place: where state is kept.
        chunk_bytes: of state that moves at a time; three times as much is taken on the device.
        resident_bytes: of state that stays on each device, the first parameters' as far as it goes.

    Attributes:
        slabs: that state is in.
        watch: is told of a unit whose state is shown elsewhere than before.
        every: gives the units of all state that there is, where all of it is to be in the place
            after a step; None where state may stay elsewhere until it is stepped.
    """

    def __init__(
        self,
        backend: str,
        place: StateStore,
        chunk_bytes: int = CHUNK_BYTES,
        resident_bytes: int = 0,
    ) -> None:
        self.backend = backend
        self.place = place
        self.chunk_bytes = chunk_bytes
        self.resident_bytes = resident_bytes
        self.slabs: list[Slab] = []
        self._entries: dict[tuple[int, int], PlacementEntry] = {}
        self._chunks: list[Chunk] = []
        self._slab_of: list[Slab] = []
        # seats with several parts by where their counts are, and the seats of each slab
        self._parted: dict[int, list[PlacementEntry]] = {}
        self._sharing: dict[int, list[PlacementEntry]] = {}
        self._rings: dict[torch.device, Ring] = {}
        self._resident: dict[torch.device, int] = {}
        self._executor = ResidentExecutor(backend)
        self._pending = False
        # steps taken apart, which the current stream has not waited for
        self._behind: deque[tuple[list[tuple[torch.device, Any]], int, tuple[StepRequest, ...]]] = (
            deque()
        )
        self._begun = False
        self.watch: Callable[[ParamStep], None] | None = None
        self.every: Callable[[], Sequence[ParamStep]] | None = None

    @property
    def entries(self) -> list[PlacementEntry]:
        """Where the state of each unit is, in the order that they came in."""
        return list(self._entries.values())

    def join(self) -> None:
        """Have the current stream wait for all that has been stepped, apart or not."""
        for ring in self._rings.values():
            ring.join()
        self._behind.clear()

    def synchronize(self) -> None:
        """Wait until all is stored, and make the units' state show where."""
        self.join()
        self._swap()
        self._pending = self.place.restate() or self._pending
        if self._pending:
            self._wait()
            for ring in self._rings.values():
                # who sees the state may change it
                ring.forget()
            self._pending = False
        if any(slab.stale for slab in self.slabs):
            for entry in self._entries.values():
                if entry.slab is not None and entry.slab.stale:
                    self._show(entry)
            for slab in self.slabs:
                slab.stale = False

    def supersede(self) -> None:
        """State and groups' values are about to be replaced, which a step will have to keep."""
        self.synchronize()
        self.place.supersede()

    def _swap(self) -> None:
        for slab in self.slabs:
            if slab.target is None:
                continue
            if slab.target is not slab.memory:
                self._complete(slab, [c for c in slab.chunks if c.memory is slab.memory])
                slab.memory, slab.stale = slab.target, True
            slab.target = None

    def _complete(self, slab: Slab, missed: Sequence[Chunk]) -> None:
        """Bring what a step has not reached over to where the rest of the slab is now."""
        assert slab.target is not None
        if missed:
            self._wait()
        for chunk in missed:
            pairs = zip(chunk.pieces(slab.memory), chunk.pieces(slab.target), strict=True)
            for (old, _), (new, _) in pairs:
                new.copy_(old)
            chunk.memory = slab.target

    def _wait(self) -> None:
        for ring in self._rings.values():
            ring.wait()
        self.place.wait()

    def _show(self, entry: PlacementEntry) -> None:
        """Make a unit's state the tensors in its slab, where nobody has put others."""
        assert entry.slab is not None
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

    def _bring(self, entry: PlacementEntry) -> None:
        """Have a unit's state beside its parameter, to stay there."""
        param_step = entry.param_step
        for key in components(param_step):
            param_step.state[key] = param_step.state[key].to(param_step.param.device)
        param_step.note()
        if self.watch is not None:
            self.watch(param_step)

    def _take(self, entry: PlacementEntry) -> None:
        """Show a unit's state where it is now, whatever was there."""
        entry.values = dict(entry.param_step.state)
        self._show(entry)

    def _look_for_changes(self, param_steps: Sequence[ParamStep]) -> None:
        """See that what somebody has changed where it is kept is not what is on the device."""
        entries = [
            self._entries.get((param_step.index, param_step.offset)) for param_step in param_steps
        ]
        slabs = {id(entry.slab): entry.slab for entry in entries if entry is not None}
        # every one that moves along, so that none is asked about an old change later
        together = [entry for number in slabs for entry in self._sharing.get(number, ())]
        if sum(entry.changed() for entry in together):
            self._wait()
            for ring in self._rings.values():
                ring.forget()

    def _seat(self, param_steps: Sequence[ParamStep], cut: bool) -> None:
        """See that every unit's state is where it belongs, and has a twin."""
        new: dict[torch.device, list[ParamStep]] = {}
        changed = False
        for param_step in param_steps:
            entry = self._entries.get((param_step.index, param_step.offset))
            if entry is not None and self._holds(entry, param_step, cut):
                continue
            changed = True
            self.synchronize()
            if entry is None or not self._adopt(entry, param_step, cut):
                self._drop((param_step.index, param_step.offset))
                new.setdefault(param_step.param.device, []).append(param_step)
        for device, together in new.items():
            self._place(device, together, cut)
        if changed:
            self._rebuild()

    @staticmethod
    def _holds(entry: PlacementEntry, param_step: ParamStep, cut: bool) -> bool:
        return (
            entry.param_step is param_step
            and (cut or len(entry.parts) == 1)
            and len(param_step.state) == len(entry.values)
            and all(map(is_, param_step.state.values(), entry.values.values()))
        )

    def _adopt(self, entry: PlacementEntry, param_step: ParamStep, cut: bool) -> bool:
        """Take what a unit's state is now into its seat, if it is laid out like what was there."""
        before, after, like = (
            components(entry.param_step),
            components(param_step),
            layout(param_step),
        )
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
            self._bring(entry)
            entry.values = dict(param_step.state)
            return True
        if any(
            param_step.state[key].data_ptr() != entry.view(key, slab.memory).data_ptr()
            for key in after
        ):
            target = self.place.target(slab)
            if target is not slab.memory:
                target.tensor.copy_(slab.memory.tensor)
                slab.memory, slab.stale = target, True
            # all of it first: somebody may have exchanged what lies here
            given = {key: param_step.state[key].clone() for key in after}
            for key, value in given.items():
                entry.view(key, target).copy_(value)
            for chunk in slab.chunks:
                chunk.memory = target
            self._rings[param_step.param.device].forget()
        entry.param_step = param_step
        self._take(entry)
        return True

    def _place(self, device: torch.device, param_steps: Sequence[ParamStep], cut: bool) -> None:
        """Seat units that have no seat."""
        away = []
        for param_step in param_steps:
            size = size_of(param_step)
            left = self.resident_bytes - self._resident.get(device, 0)
            # with none to stay, empty state goes too: a file's manifest counts its steps
            if size > left or not self.resident_bytes:
                away.append(param_step)
                continue
            self._resident[device] = self._resident.get(device, 0) + size
            part = Part(0, param_step.param.numel(), None)
            entry = PlacementEntry(param_step, None, {}, [part], layout(param_step))
            entry.values = dict(param_step.state)
            self._entries[param_step.index, param_step.offset] = entry
            self._bring(entry)
        for together, rows in arrange(away, self.chunk_bytes, cut):
            self._move_in(together, rows)

    def _move_in(self, param_steps: Sequence[ParamStep], rows: list[list[Part]]) -> None:
        slab = self.place.allocate(sum(map(size_of, param_steps)))
        entries = entries_of(param_steps, rows, slab)
        for entry in entries:
            for key in entry.starts:
                entry.view(key, slab.memory).copy_(entry.param_step.state[key])
            self._take(entry)
            self._entries[entry.param_step.index, entry.param_step.offset] = entry
        self.slabs.append(slab)

    def release(self, param_steps: Sequence[ParamStep]) -> None:
        """Let units go, whose state shows where it is now."""
        self.synchronize()
        for param_step in param_steps:
            self._drop((param_step.index, param_step.offset))

    def _forget_others(self, param_steps: Sequence[ParamStep]) -> None:
        """Drop the seats of state that is no more."""
        known = {(param_step.index, param_step.offset) for param_step in param_steps}
        if gone := [key for key in self._entries if key not in known]:
            self.synchronize()
            for key in gone:
                self._drop(key)
            self._rebuild()

    def _drop(self, key: tuple[int, int]) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None and entry.slab is None:
            self._resident[entry.param_step.param.device] -= size_of(entry.param_step)

    def _rebuild(self) -> None:
        """Number the chunks, make rings that are large enough, and every twin anew."""
        self._wait()
        for ring in self._rings.values():
            ring.clear()
        entries = self._entries.values()
        self._parted = {}
        for entry in entries:
            if len(entry.parts) > 1:
                self._parted.setdefault(id(bank_of(entry.param_step)), []).append(entry)
        self._sharing = {}
        for entry in entries:
            if entry.slab is not None:
                self._sharing.setdefault(id(entry.slab), []).append(entry)
        used = {id(entry.slab) for entry in entries}
        self.slabs = [slab for slab in self.slabs if id(slab) in used]
        pairs = [(chunk, slab) for slab in self.slabs for chunk in slab.chunks]
        self._chunks = [chunk for chunk, _ in pairs]
        self._slab_of = [slab for _, slab in pairs]
        for device in dict.fromkeys(chunk.device for chunk in self._chunks):
            together = [chunk for chunk in self._chunks if chunk.device == device]
            for place, chunk in enumerate(together):
                chunk.slot = place % SLOTS
            nbytes = max(chunk.nbytes for chunk in together)
            if device not in self._rings or self._rings[device].nbytes < nbytes:
                self._rings.pop(device, None)
                self._rings[device] = Ring(device, nbytes, self.place)
        for number, chunk in enumerate(self._chunks):
            chunk.number = number
        for entry in self._entries.values():
            self._view_on_device(entry)
        self._executor = ResidentExecutor(self.backend)

    def _view_on_device(self, entry: PlacementEntry) -> None:
        param_step, step = entry.param_step, entry.param_step.state["step"]
        # the parts of a unit that was stepped in some of them only have counts of their own
        counts = [
            part.device_view.state["step"] for part in entry.parts if part.device_view is not None
        ]
        if not counts or counts[0] is not step or entry.version != step._version:
            counts = [step, *step.repeat(len(entry.parts) - 1).unbind()]
        for part, count in zip(entry.parts, counts, strict=True):
            if part.chunk is None:
                part.device_view = replace(param_step, stage=HERE)
                continue
            slot = self._rings[part.chunk.device].slots[part.chunk.slot]
            whole = len(entry.parts) == 1
            part.device_view = device_view_of(
                param_step, part, whole, slot, count, part.chunk.number
            )
        entry.version = step._version

    def describe(self) -> dict[str, Any]:
        """What there is, and where: see ``DiskStateStore.commit`` and ``places.resume``."""
        numbers = {id(slab): number for number, slab in enumerate(self.slabs)}
        entries = [entry for entry in self._entries.values() if entry.slab is not None]
        return {
            "chunk_bytes": self.chunk_bytes,
            "memories": [slab.memory for slab in self.slabs],
            "counts": _counts([entry.param_step.state["step"] for entry in entries]),
            "slabs": [
                {"bytes": slab.nbytes, "offset": slab.memory.offset}
                | {"others": [m.offset for m in slab.family if m is not slab.memory]}
                for slab in self.slabs
            ],
            "parameters": [
                {
                    "number": entry.param_step.index,
                    "shape": list(entry.param_step.param.shape),
                    "order": list(storage_order(entry.param_step.param)),
                    "slab": numbers[id(entry.slab)],
                    "parts": len(entry.parts),
                    "starts": entry.starts,
                }
                for entry in entries
            ],
        }

    def resume(
        self, slabs: Sequence[tuple[Slab, Sequence[ParamStep], Sequence[Starts], bool]]
    ) -> None:
        """Take over slabs that hold the state of units already, which shows it there.

        Args:
            slabs: each with its units in order, where their components begin, and whether they are
                in parts.
        """
        for slab, param_steps, starts, cut in slabs:
            rows = [[Part(0, param_step.param.numel(), None)] for param_step in param_steps]
            if cut:
                ((_, rows),) = arrange(param_steps, self.chunk_bytes, True)
            for entry in entries_of(param_steps, rows, slab, starts):
                self._take(entry)
                self._entries[entry.param_step.index, entry.param_step.offset] = entry
            self.slabs.append(slab)
        self._rebuild()
        self.place.show(slab.memory for slab, *_ in slabs)


def bank_of(param_step: ParamStep) -> Tensor:
    """What a unit's step count lies in, together with others."""
    step: Tensor = param_step.state["step"]
    return step if step._base is None else step._base


def _counts(steps: Sequence[Tensor]) -> Callable[[], list[float]]:
    """What step counts are now, to be asked for later: a device is not waited for here."""
    if all(step.device.type == "cpu" for step in steps):
        values = [float(step) for step in steps]
        return lambda: values
    together = torch.stack([step.to(steps[0].device) for step in steps])
    copy = together.to("cpu", non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(together.device))

    def read() -> list[float]:
        event.synchronize()
        values: list[float] = copy.tolist()
        return values

    return read
