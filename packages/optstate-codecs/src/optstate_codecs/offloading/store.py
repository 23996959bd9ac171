"""The contract of a place: memory for slabs, and how chunks come from there and go back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate_codecs.offloading.pinned import empty_pinned
from optstate_codecs.offloading.slabs import Chunk, Memory, Region, Slab

__all__ = ["HostStateStore", "StateStore"]


class StateStore(ABC):
    """Where state lives while it is not stepped."""

    name: ClassVar[str]

    @abstractmethod
    def new(self, nbytes: int) -> Memory:
        """Memory for a slab, uint8 [nbytes].

        Raises:
            MemoryError, OSError: there is none.
        """

    def allocate(self, nbytes: int) -> Slab:
        """A slab that has not been stepped."""
        memory = self.new(nbytes)
        return Slab([memory], memory)

    def writable(self, memory: Memory) -> bool:
        """Whether nobody wants it as it is."""
        return not memory.holders

    def target(self, slab: Slab) -> Memory:
        """What a step may write a slab into: its memory, or another where that is to stay."""
        for memory in (slab.memory, *slab.family):
            if self.writable(memory):
                return memory
        slab.family.append(self.new(slab.nbytes))
        return slab.family[-1]

    def prepare(self, chunk: Chunk) -> None:  # noqa: B027
        """The chunk will be wanted soon."""

    def ready(self, chunk: Chunk) -> bool:
        """Whether ``source`` would not have to wait."""
        return True

    def source(self, chunk: Chunk) -> Iterable[tuple[Tensor, Region]]:
        """The chunk's bytes in host memory, to be copied from."""
        return chunk.pieces(chunk.memory)

    def sent(self, chunk: Chunk, event: Any) -> None:  # noqa: B027
        """The source has been copied from once ``event`` has happened (None: it has)."""

    def reserve(self, chunk: Chunk) -> None:  # noqa: B027
        """See that ``sink`` and ``stored`` will do before the chunk is stepped.

        Raises:
            OSError: what the sink was for before could not be kept.
        """

    def sink(self, chunk: Chunk) -> Iterable[tuple[Tensor, Region]]:
        """Host memory to copy the chunk to; ``chunk.memory`` says where it will be kept."""
        return chunk.pieces(chunk.memory)

    def stored(self, chunk: Chunk) -> None:  # noqa: B027
        """The chunk is in its sink once ``chunk.stored`` has happened (None: it is)."""

    def check(self) -> None:  # noqa: B027
        """Raise if a step could not be stored."""

    def wait(self) -> None:  # noqa: B027
        """Wait until everything is kept that has been stored.

        Raises:
            OSError: something could not be.
        """

    def commit(self, describe: Callable[[], dict[str, Any]]) -> None:  # noqa: B027
        """A step is complete: what slabs hold now belongs together.

        Args:
            describe: what there is, and where.
        """

    def restate(self) -> bool:
        """Keep what has changed beside the slabs since ``commit``; whether anything has."""
        return False

    def supersede(self) -> None:  # noqa: B027
        """What was committed has nothing to do with what groups hold until the next time."""

    def protect(self, memories: Iterable[Memory]) -> None:  # noqa: B027
        """What is known outside of this process is kept in these."""

    def forget(self) -> None:  # noqa: B027
        """What has been prepared is no longer what is kept."""

    def close(self, remove: bool = False) -> None:  # noqa: B027
        """Let go of what outlives the process, and remove it where nothing is to be kept."""


class HostStateStore(StateStore):
    """Host memory of exact size, page-locked for GPUs.

    Args:
        pin: lock the pages; None: where there is a GPU.
    """

    name = "host"

    def __init__(self, pin: bool | None = None) -> None:
        self.pin = torch.cuda.is_available() if pin is None else pin

    def new(self, nbytes: int) -> Memory:
        return Memory(empty_pinned(nbytes, self.pin))
