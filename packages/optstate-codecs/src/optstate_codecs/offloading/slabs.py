"""Slabs and chunks: how packed state is laid out in a store, and in which pieces it moves.

A slab is one allocation of a store. It holds the state of several small parameters or of one large
parameter. A chunk is the unit of transfer: a whole slab, or the state of a part of a large
parameter, which is one region of the slab for each component.
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

# where a parameter's components begin in its slab, by state key
Starts = dict[str, int]


@dataclass(eq=False)
class Memory:
    """One allocation of a store.

    Attributes:
        tensor: uint8, the whole allocation as the host reads and writes it.
        offset: where it begins in the file, if it is in a file.
        holders: one object for each snapshot that needs the content unchanged.
    """

    tensor: Tensor
    offset: int = 0
    # a set, since the garbage collector may close a snapshot at any time, on any thread
    holders: set[object] = field(default_factory=set)


@dataclass(eq=False)
class Slab:
    """One allocation's worth of state.

    Attributes:
        family: the memories that the slab uses in turns.
        memory: the memory that holds the state after the last complete step.
        target: the memory that takes the state of the step under way; None before that.
        chunks: the chunks in which the slab moves.
        stale: whether the optimizer's state tensors still show an earlier memory.
    """

    family: list[Memory]
    memory: Memory
    target: Memory | None = None
    chunks: list[Chunk] = field(default_factory=list)
    stale: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of state, including alignment."""
        return self.memory.tensor.numel()


@dataclass(frozen=True)
class Region:
    """Consecutive bytes that begin at ``start`` in the slab and at ``offset`` on the device."""

    start: int
    offset: int
    nbytes: int


@dataclass(eq=False)
class Chunk:
    """State that moves together.

    Attributes:
        device: where it is stepped.
        memory: the memory that holds its latest state.
        number: its index among all chunks, which is the stage of its parameters.
        slot: the index of its slot in the device's ring.
        regions: where its bytes are.
        stored: the event after which the memory holds the state; None if no copy is under way.
    """

    device: torch.device
    memory: Memory
    number: int = 0
    slot: int = 0
    regions: list[Region] = field(default_factory=list)
    stored: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return max((r.offset + r.nbytes for r in self.regions), default=0)

    def pieces(self, memory: Memory) -> Iterator[tuple[Tensor, Region]]:
        """The chunk's bytes in a memory of its slab, region by region."""
        for region in self.regions:
            yield memory.tensor[region.start : region.start + region.nbytes], region


@dataclass(eq=False)
class Part:
    """Elements ``start`` to ``stop`` of a parameter in storage order, or all of it.

    Attributes:
        chunk: the chunk that holds its state; None if the state stays on the device.
        offsets: where its components begin on the device, by state key.
        device_view: the part as the engine steps it, with its state on the device.
    """

    start: int
    stop: int
    chunk: Chunk | None
    offsets: dict[str, int] = field(default_factory=dict)
    device_view: ParamStep | None = None

    @classmethod
    def whole(cls, param_step: ParamStep) -> list[Part]:
        """A parameter as a single part."""
        return [cls(0, param_step.param.numel(), None)]


@dataclass(eq=False)
class PlacementEntry:
    """Where one parameter's state is.

    Attributes:
        param_step: the parameter as it was stepped last.
        slab: the slab that holds its state; None if the state stays on the device.
        starts: where its components begin in the slab, by state key.
        parts: its parts, in order.
        like: meta tensors with the shapes, dtypes and strides of the components.
        values: the state tensors as they were shown, to notice those that the user replaced.
        version: the version of the step count, to notice changes in place.
        versions: the versions of the other tensors, likewise.
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
        """Whether a state tensor was changed in place since the last call."""
        before, self.versions = self.versions, [self.values[key]._version for key in self.starts]
        return before != self.versions

    def view(self, key: str, memory: Memory) -> Tensor:
        """A component as it lies in a memory of the slab."""
        return own_storage_view(memory.tensor, self.starts[key], self.like[key])


def own_storage_view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """``view_bytes_as`` with its own storage: ``torch.save`` refuses storages of mixed dtypes."""
    if like.numel() == 0:
        return torch.empty_like(like, device="cpu")
    # through numpy the tensor shares the memory without being a view of it
    return view_bytes_as(torch.from_numpy(memory.numpy()[start : start + like.nbytes]), 0, like)


def components(param_step: ParamStep) -> dict[str, Component]:
    """The components of a parameter's state, by state key."""
    return {c.key(name): c for name, d in param_step.stored.items() for c in d.components}


def layout(param_step: ParamStep) -> dict[str, Tensor]:
    """Meta tensors with the shapes, dtypes and strides of a parameter's components."""
    meta = torch.device("meta")
    return {
        key: empty_state(param_step.param, c, meta) for key, c in components(param_step).items()
    }


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """``nbytes`` rounded up to a multiple of ``alignment``."""
    return -(-nbytes // alignment) * alignment


def size_of(param_step: ParamStep) -> int:
    """Bytes of a parameter's state in a slab."""
    numel = param_step.param.numel()
    return sum(aligned(component.nbytes(numel)) for component in components(param_step).values())


def divisible(param_step: ParamStep) -> bool:
    """Whether a parameter may be stepped in parts: no format needs the whole tensor or its rows."""
    whole = any(isinstance(f, Format) and f.whole for f in param_step.stored.values())
    fixed = any(component.entries is not None for component in components(param_step).values())
    return is_dense(param_step.param) and not whole and not fixed


def arrange(
    param_steps: Sequence[ParamStep], chunk_bytes: int, cut: bool
) -> Iterator[tuple[list[ParamStep], list[list[Part]]]]:
    """Distribute parameters over slabs and chunks.

    Args:
        param_steps: the parameters of one device, in order.
        chunk_bytes: the size that a chunk should not exceed.
        cut: whether parameters may be stepped in parts.

    Yields:
        The parameters of each slab, and the parts of each of them, whose ``chunk`` is not set yet.
        Parameters of one part each share a chunk; of one with several parts, each part is a chunk.
    """
    together: list[ParamStep] = []
    filled = 0
    for param_step in param_steps:
        size, numel = size_of(param_step), param_step.param.numel()
        if size > chunk_bytes and cut and divisible(param_step):
            most = max(1, numel * chunk_bytes // size // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
            # as many parts of that size as it takes, made as even as the alignment allows
            step = -(-numel // -(-numel // most) // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
            starts = range(0, numel, step)
            yield [param_step], [[Part(start, min(start + step, numel), None) for start in starts]]
            continue
        if together and filled + size > chunk_bytes:
            yield together, list(map(Part.whole, together))
            together, filled = [], 0
        together.append(param_step)
        filled += size
    if together:
        yield together, list(map(Part.whole, together))


def device_view_of(
    param_step: ParamStep, part: Part, whole: bool, slot: Tensor, step: Tensor, stage: int
) -> ParamStep:
    """A part as the engine steps it.

    Args:
        param_step: the parameter, whose state is offloaded.
        part: the part, with its ``offsets``.
        whole: whether the part is the whole parameter.
        slot: uint8, the device memory that the chunk is loaded into.
        step: the part's step count.
        stage: the stage of the chunk.
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
        # the formats of the whole parameter, which may depend on its size
        formats=param_step.bound,
        offset=param_step.offset + part.start,
        stage=stage,
    )


def in_order(tensor: Tensor, like: Tensor) -> Tensor:
    """The elements of ``tensor`` in the storage order of ``like``, 1-d; a view if possible."""
    return tensor.permute(storage_order(like)).reshape(-1)


def entries_of(
    param_steps: Sequence[ParamStep],
    parts_of: list[list[Part]],
    slab: Slab,
    given: Sequence[Starts] | None = None,
) -> list[PlacementEntry]:
    """Make the entries of a slab's parameters, and its chunks.

    Args:
        param_steps: the parameters of the slab.
        parts_of: the parts of each, from ``arrange``.
        slab: a slab without chunks.
        given: where the components of each begin, if the slab has them already. There may be gaps,
            where state of other parameters was.
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
