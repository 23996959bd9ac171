"""What state is kept in away from the device, and what of it moves together.

A slab is one allocation of a place, and holds the state of several small parameters or of one large
one. A chunk is what moves at a time: a whole slab, or the state of a part of a large parameter,
which is one region for each component.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.engine.request import ParamStep
from optstate_codecs.formats import Component, Format
from optstate_codecs.state.layout import empty_state, is_dense, storage_order, view_bytes_as

__all__ = ["Chunk", "Memory", "Part", "PlacementEntry", "Region", "Slab", "Starts", "arrange"]

# components begin where any dtype, and any access of a thread, may begin
ALIGNMENT = 128
# parts begin where blocks of any size begin
BLOCK_ALIGNMENT = 8192


# of a unit's components in its slab, by state key
Starts = dict[str, int]


@dataclass(eq=False)
class Memory:
    """One allocation of a place.

    Attributes:
        tensor: uint8, all of it, as the host reads and writes it.
        offset: where it begins in the file, if it is in one.
        holders: of snapshots that want it as it is, one object each.
    """

    tensor: Tensor
    offset: int = 0
    # a set: who collects garbage may close a snapshot at any time, on any thread
    holders: set[object] = field(default_factory=set)


@dataclass(eq=False)
class Slab:
    """One allocation's worth of state.

    Attributes:
        family: the allocations that it takes in turns.
        memory: that holds what it was after the last whole step.
        target: that takes what the step under way makes of it; None before that.
        chunks: that it moves in.
        stale: whether the optimizer's tensors still show memory it was in before.
    """

    family: list[Memory]
    memory: Memory
    target: Memory | None = None
    chunks: list[Chunk] = field(default_factory=list)
    stale: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of state, with what alignment takes."""
        return self.memory.tensor.numel()


@dataclass(frozen=True)
class Region:
    """A row of bytes: ``start`` in the slab, ``offset`` in what is on the device."""

    start: int
    offset: int
    nbytes: int


@dataclass(eq=False)
class Chunk:
    """What moves at a time.

    Attributes:
        device: that steps it.
        memory: that holds the latest there is of it.
        number: its place among all chunks, which is the stage of its units.
        slot: of the ring of the device.
        stored: the event after which that is there; None where nothing is under way.
    """

    device: torch.device
    memory: Memory
    number: int = 0
    slot: int = 0
    regions: list[Region] = field(default_factory=list)
    stored: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on the device."""
        return max((r.offset + r.nbytes for r in self.regions), default=0)

    def pieces(self, memory: Memory) -> Iterator[tuple[Tensor, Region]]:
        """Its bytes in a memory of the slab, region by region."""
        for region in self.regions:
            yield memory.tensor[region.start : region.start + region.nbytes], region


@dataclass(eq=False)
class Part:
    """A unit, or elements ``start`` to ``stop`` of it in storage order, as a chunk has it.

    Attributes:
        offsets: of its components on the device, by state key.
        device_view: what the engine steps: the same with its state on the device.
    """

    start: int
    stop: int
    chunk: Chunk | None
    offsets: dict[str, int] = field(default_factory=dict)
    device_view: ParamStep | None = None


@dataclass(eq=False)
class PlacementEntry:
    """Where a unit's state is.

    Attributes:
        param_step: as it was stepped last.
        slab: None where it stays on the device.
        starts: of its components in the slab, by state key.
        parts: in order.
        like: the components as they lie there, on no device.
        values: the unit's state as it was shown, to see whether somebody else has changed it.
        version: of its step count, likewise.
        versions: of the other values, likewise.
    """

    param_step: ParamStep
    slab: Slab | None
    starts: dict[str, int]
    parts: list[Part]
    like: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    version: int = -1
    versions: list[int] = field(default_factory=list)

    def changed(self) -> bool:
        """Whether somebody has changed a value in place since this was asked last."""
        before, self.versions = self.versions, [self.values[key]._version for key in self.starts]
        return before != self.versions

    def view(self, key: str, memory: Memory) -> Tensor:
        """A component as it is kept in a memory of the slab."""
        return own_storage_view(memory.tensor, self.starts[key], self.like[key])


def own_storage_view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """``view_bytes_as`` on the host, with a storage of its own: savers refuse mixed dtypes."""
    if like.numel() == 0:
        return torch.empty_like(like, device="cpu")
    # not a view of the memory, though in it
    return view_bytes_as(torch.from_numpy(memory.numpy()[start : start + like.nbytes]), 0, like)


def components(param_step: ParamStep) -> dict[str, Component]:
    """What a unit's state is stored as, by state key."""
    return {c.key(name): c for name, d in param_step.stored.items() for c in d.components}


def layout(param_step: ParamStep) -> dict[str, Tensor]:
    """The components of a unit's state as they lie in memory, on no device."""
    meta = torch.device("meta")
    return {
        key: empty_state(param_step.param, c, meta) for key, c in components(param_step).items()
    }


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of ``alignment``."""
    return -(-nbytes // alignment) * alignment


def size_of(param_step: ParamStep) -> int:
    """Bytes of a unit's state in a slab."""
    numel = param_step.param.numel()
    return sum(aligned(component.nbytes(numel)) for component in components(param_step).values())


def divisible(param_step: ParamStep) -> bool:
    """Whether a unit may be stepped in parts: no format looks at the whole tensor or its rows."""
    whole = any(isinstance(f, Format) and f.whole for f in param_step.stored.values())
    fixed = any(component.entries is not None for component in components(param_step).values())
    return is_dense(param_step.param) and not whole and not fixed


def arrange(
    param_steps: Sequence[ParamStep], chunk_bytes: int, cut: bool
) -> Iterator[tuple[list[ParamStep], list[list[Part]]]]:
    """Sort units into slabs and chunks.

    Args:
        param_steps: of one device, in order.
        chunk_bytes: that a chunk should have at most.
        cut: whether parameters may be stepped in parts.

    Yields:
        for each slab its units, and the parts of each, ``chunk`` still missing. Units of one part
        each are one chunk together; of one unit with several parts, each is a chunk.
    """
    together: list[ParamStep] = []
    filled = 0
    for param_step in param_steps:
        size, numel = size_of(param_step), param_step.param.numel()
        if size > chunk_bytes and cut and divisible(param_step):
            most = max(1, numel * chunk_bytes // size // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
            # parts as even as their borders allow
            step = -(-numel // -(-numel // most) // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
            starts = range(0, numel, step)
            yield [param_step], [[Part(start, min(start + step, numel), None) for start in starts]]
            continue
        if together and filled + size > chunk_bytes:
            yield together, [[Part(0, one.param.numel(), None)] for one in together]
            together, filled = [], 0
        together.append(param_step)
        filled += size
    if together:
        yield together, [[Part(0, one.param.numel(), None)] for one in together]


def device_view_of(
    param_step: ParamStep, part: Part, whole: bool, slot: Tensor, step: Tensor, stage: int
) -> ParamStep:
    """The unit that the engine steps for a part.

    Args:
        param_step: whose state is away.
        part: with its ``offsets``.
        whole: whether it is all of the unit.
        slot: uint8, the device memory that the chunk comes to.
        step: the part's step count.
        stage: of the chunk.
    """
    state: dict[str, Any] = {"step": step}
    for key, component in components(param_step).items():
        entries = component.part(part.start, part.stop)
        kept, start = param_step.state[key], part.offsets[key]
        if whole:
            state[key] = view_bytes_as(slot, start, kept)
        else:
            nbytes = (entries.stop - entries.start) * component.dtype.itemsize
            state[key] = slot[start : start + nbytes].view(component.dtype)
    if whole:
        return replace(param_step, state=state, stage=stage)
    return replace(
        param_step,
        param=in_order(param_step.param.detach(), param_step.param)[part.start : part.stop],
        state=state,
        # as the whole stores them, however small the part is
        formats=param_step.bound,
        offset=param_step.offset + part.start,
        stage=stage,
    )


def in_order(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor's elements in a row, in the storage order of ``like``; a view where they lie so."""
    return tensor.permute(storage_order(like)).reshape(-1)


def entries_of(
    param_steps: Sequence[ParamStep],
    parts_of: list[list[Part]],
    slab: Slab,
    given: Sequence[Starts] | None = None,
) -> list[PlacementEntry]:
    """Give units their places in a slab, and make its chunks.

    Args:
        param_steps: of the slab, as many as ``parts_of``.
        parts_of: their parts, from ``arrange``.
        slab: without chunks yet.
        given: where the components of each begin, if they are there already; others that were
            between them may be no more.
    """
    entries, start = [], 0
    together = Chunk(param_steps[0].param.device, slab.memory)
    for number, (param_step, parts) in enumerate(zip(param_steps, parts_of, strict=True)):
        starts, like = {}, layout(param_step)
        for key, value in like.items():
            starts[key] = start if given is None else given[number][key]
            start += aligned(value.nbytes)
        if len(parts) == 1:
            parts[0].chunk, parts[0].offsets = together, starts
        else:
            slab.chunks += [_chunk_of(param_step, part, starts, slab) for part in parts]
        entries.append(PlacementEntry(param_step, slab, starts, parts, like))
    if not slab.chunks:
        together.regions = [Region(0, 0, slab.nbytes)]
        slab.chunks = [together]
    return entries


def _chunk_of(param_step: ParamStep, part: Part, starts: dict[str, int], slab: Slab) -> Chunk:
    part.chunk = Chunk(param_step.param.device, slab.memory)
    filled = 0
    for key, component in components(param_step).items():
        entries, size = component.part(part.start, part.stop), component.dtype.itemsize
        nbytes = (entries.stop - entries.start) * size
        part.offsets[key] = filled
        part.chunk.regions.append(Region(starts[key] + entries.start * size, filled, nbytes))
        filled += aligned(nbytes)
    return part.chunk
