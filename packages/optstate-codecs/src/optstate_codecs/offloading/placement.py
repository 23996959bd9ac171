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
    layout,
    seats_of,
    size_of,
    twin_of,
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

    Seating a unit copies its state to the place and makes ``unit.state`` show it there; parameters
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
        self._seats: dict[tuple[int, int], PlacementEntry] = {}
        self._chunks: list[Chunk] = []
        self._slab_of: list[Slab] = []
        # seats with several parts by where their counts are, and the seats of each slab
        self._parted: dict[int, list[PlacementEntry]] = {}
        self._sharing: dict[int, list[PlacementEntry]] = {}
        self._rings: dict[torch.device, Ring] = {}
        self._resident: dict[torch.device, int] = {}
        self._session = ResidentExecutor(backend)
        self._pending = False
        # steps taken apart, which the current stream has not waited for
        self._behind: deque[tuple[list[tuple[torch.device, Any]], int, tuple[StepRequest, ...]]] = (
            deque()
        )
        self._begun = False
        self.watch: Callable[[ParamStep], None] | None = None
        self.every: Callable[[], Sequence[ParamStep]] | None = None

    @property
    def seats(self) -> list[PlacementEntry]:
        """Where the state of each unit is, in the order that they came in."""
        return list(self._seats.values())

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
            for seat in self._seats.values():
                if seat.slab is not None and seat.slab.stale:
                    self._show(seat)
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

    def _show(self, seat: PlacementEntry) -> None:
        """Make a unit's state the tensors in its slab, where nobody has put others."""
        assert seat.slab is not None
        state, shown = seat.unit.state, seat.values
        untouched = not seat.unit.moved()
        for key in seat.starts:
            value = seat.view(key, seat.slab.memory)
            if state.get(key) is shown.get(key):
                state[key] = value
            shown[key] = value
        if untouched:
            seat.unit.note()
        seat.changed()
        if self.watch is not None:
            self.watch(seat.unit)

    def _bring(self, seat: PlacementEntry) -> None:
        """Have a unit's state beside its parameter, to stay there."""
        unit = seat.unit
        for key in components(unit):
            unit.state[key] = unit.state[key].to(unit.param.device)
        unit.note()
        if self.watch is not None:
            self.watch(unit)

    def _take(self, seat: PlacementEntry) -> None:
        """Show a unit's state where it is now, whatever was there."""
        seat.values = dict(seat.unit.state)
        self._show(seat)

    def _look_for_changes(self, units: Sequence[ParamStep]) -> None:
        """See that what somebody has changed where it is kept is not what is on the device."""
        seats = [self._seats.get((unit.index, unit.offset)) for unit in units]
        slabs = {id(seat.slab): seat.slab for seat in seats if seat is not None}
        # every one that moves along, so that none is asked about an old change later
        together = [seat for number in slabs for seat in self._sharing.get(number, ())]
        if sum(seat.changed() for seat in together):
            self._wait()
            for ring in self._rings.values():
                ring.forget()

    def _seat(self, units: Sequence[ParamStep], cut: bool) -> None:
        """See that every unit's state is where it belongs, and has a twin."""
        new: dict[torch.device, list[ParamStep]] = {}
        changed = False
        for unit in units:
            seat = self._seats.get((unit.index, unit.offset))
            if seat is not None and self._holds(seat, unit, cut):
                continue
            changed = True
            self.synchronize()
            if seat is None or not self._adopt(seat, unit, cut):
                self._drop((unit.index, unit.offset))
                new.setdefault(unit.param.device, []).append(unit)
        for device, together in new.items():
            self._place(device, together, cut)
        if changed:
            self._rebuild()

    @staticmethod
    def _holds(seat: PlacementEntry, unit: ParamStep, cut: bool) -> bool:
        return (
            seat.unit is unit
            and (cut or len(seat.parts) == 1)
            and len(unit.state) == len(seat.values)
            and all(map(is_, unit.state.values(), seat.values.values()))
        )

    def _adopt(self, seat: PlacementEntry, unit: ParamStep, cut: bool) -> bool:
        """Take what a unit's state is now into its seat, if it is laid out like what was there."""
        before, after, like = components(seat.unit), components(unit), layout(unit)
        alike = before == after and all(
            seat.like[key].stride() == like[key].stride()
            and seat.like[key].shape == unit.state[key].shape
            for key in after
        )
        same_device = unit.param.device == seat.unit.param.device
        if not alike or not same_device or not (cut or len(seat.parts) == 1):
            return False
        slab = seat.slab
        if slab is None:
            seat.unit = unit
            self._bring(seat)
            seat.values = dict(unit.state)
            return True
        if any(
            unit.state[key].data_ptr() != seat.view(key, slab.memory).data_ptr() for key in after
        ):
            target = self.place.target(slab)
            if target is not slab.memory:
                target.tensor.copy_(slab.memory.tensor)
                slab.memory, slab.stale = target, True
            # all of it first: somebody may have exchanged what lies here
            given = {key: unit.state[key].clone() for key in after}
            for key, value in given.items():
                seat.view(key, target).copy_(value)
            for chunk in slab.chunks:
                chunk.memory = target
            self._rings[unit.param.device].forget()
        seat.unit = unit
        self._take(seat)
        return True

    def _place(self, device: torch.device, units: Sequence[ParamStep], cut: bool) -> None:
        """Seat units that have no seat."""
        away = []
        for unit in units:
            size = size_of(unit)
            left = self.resident_bytes - self._resident.get(device, 0)
            # with none to stay, empty state goes too: a file's manifest counts its steps
            if size > left or not self.resident_bytes:
                away.append(unit)
                continue
            self._resident[device] = self._resident.get(device, 0) + size
            part = Part(0, unit.param.numel(), None)
            seat = PlacementEntry(unit, None, {}, [part], layout(unit))
            seat.values = dict(unit.state)
            self._seats[unit.index, unit.offset] = seat
            self._bring(seat)
        for together, rows in arrange(away, self.chunk_bytes, cut):
            self._move_in(together, rows)

    def _move_in(self, units: Sequence[ParamStep], rows: list[list[Part]]) -> None:
        slab = self.place.allocate(sum(map(size_of, units)))
        seats = seats_of(units, rows, slab)
        for seat in seats:
            for key in seat.starts:
                seat.view(key, slab.memory).copy_(seat.unit.state[key])
            self._take(seat)
            self._seats[seat.unit.index, seat.unit.offset] = seat
        self.slabs.append(slab)

    def release(self, units: Sequence[ParamStep]) -> None:
        """Let units go, whose state shows where it is now."""
        self.synchronize()
        for unit in units:
            self._drop((unit.index, unit.offset))

    def _forget_others(self, units: Sequence[ParamStep]) -> None:
        """Drop the seats of state that is no more."""
        known = {(unit.index, unit.offset) for unit in units}
        if gone := [key for key in self._seats if key not in known]:
            self.synchronize()
            for key in gone:
                self._drop(key)
            self._rebuild()

    def _drop(self, key: tuple[int, int]) -> None:
        seat = self._seats.pop(key, None)
        if seat is not None and seat.slab is None:
            self._resident[seat.unit.param.device] -= size_of(seat.unit)

    def _rebuild(self) -> None:
        """Number the chunks, make rings that are large enough, and every twin anew."""
        self._wait()
        for ring in self._rings.values():
            ring.clear()
        seats = self._seats.values()
        self._parted = {}
        for seat in seats:
            if len(seat.parts) > 1:
                self._parted.setdefault(id(bank_of(seat.unit)), []).append(seat)
        self._sharing = {}
        for seat in seats:
            if seat.slab is not None:
                self._sharing.setdefault(id(seat.slab), []).append(seat)
        used = {id(seat.slab) for seat in seats}
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
        for seat in self._seats.values():
            self._twin(seat)
        self._session = ResidentExecutor(self.backend)

    def _twin(self, seat: PlacementEntry) -> None:
        unit, step = seat.unit, seat.unit.state["step"]
        # the parts of a unit that was stepped in some of them only have counts of their own
        counts = [part.twin.state["step"] for part in seat.parts if part.twin is not None]
        if not counts or counts[0] is not step or seat.version != step._version:
            counts = [step, *step.repeat(len(seat.parts) - 1).unbind()]
        for part, count in zip(seat.parts, counts, strict=True):
            if part.chunk is None:
                part.twin = replace(unit, stage=HERE)
                continue
            slot = self._rings[part.chunk.device].slots[part.chunk.slot]
            whole = len(seat.parts) == 1
            part.twin = twin_of(unit, part, whole, slot, count, part.chunk.number)
        seat.version = step._version

    def describe(self) -> dict[str, Any]:
        """What there is, and where: see ``DiskStateStore.commit`` and ``places.resume``."""
        numbers = {id(slab): number for number, slab in enumerate(self.slabs)}
        seats = [seat for seat in self._seats.values() if seat.slab is not None]
        return {
            "chunk_bytes": self.chunk_bytes,
            "memories": [slab.memory for slab in self.slabs],
            "counts": _counts([seat.unit.state["step"] for seat in seats]),
            "slabs": [
                {"bytes": slab.nbytes, "offset": slab.memory.offset}
                | {"others": [m.offset for m in slab.family if m is not slab.memory]}
                for slab in self.slabs
            ],
            "parameters": [
                {
                    "number": seat.unit.index,
                    "shape": list(seat.unit.param.shape),
                    "order": list(storage_order(seat.unit.param)),
                    "slab": numbers[id(seat.slab)],
                    "parts": len(seat.parts),
                    "starts": seat.starts,
                }
                for seat in seats
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
        for slab, units, starts, cut in slabs:
            rows = [[Part(0, unit.param.numel(), None)] for unit in units]
            if cut:
                ((_, rows),) = arrange(units, self.chunk_bytes, True)
            for seat in seats_of(units, rows, slab, starts):
                self._take(seat)
                self._seats[seat.unit.index, seat.unit.offset] = seat
            self.slabs.append(slab)
        self._rebuild()
        self.place.show(slab.memory for slab, *_ in slabs)


def bank_of(unit: ParamStep) -> Tensor:
    """What a unit's step count lies in, together with others."""
    step: Tensor = unit.state["step"]
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
