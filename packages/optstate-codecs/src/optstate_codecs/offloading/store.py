"""The interface of state stores, and the store in host memory.

A store provides memory for slabs, and the host memory that chunks are copied from and to.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate_codecs.offloading.pinned import empty_pinned
from optstate_codecs.offloading.slabs import Chunk, Memory, Region, Slab

__all__ = ["HostStateStore", "StateStore"]


class StateStore(ABC):
    """Where packed state lives between steps."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self.process = os.getpid()

    @property
    def shared(self) -> bool:
        """Whether a forked process would have the same memory, and not a copy."""
        return True

    def check_process(self) -> None:
        """Raise in a forked process if it shares memory with the one that steps.

        Raises:
            RuntimeError: it does.
        """
        if self.shared and os.getpid() != self.process:
            raise RuntimeError(
                f"store={self.name!r}: process {os.getpid()} was forked from {self.process}, which "
                "offloaded this optimizer and has the state; step and read it there, or make an "
                "optimizer in this process"
            )

    @abstractmethod
    def new(self, nbytes: int) -> Memory:
        """Allocate memory for a slab, uint8 [nbytes].

        Raises:
            MemoryError, OSError: there is none left.
        """

    def allocate(self, nbytes: int) -> Slab:
        """Make a slab."""
        memory = self.new(nbytes)
        return Slab([memory], memory)

    def writable(self, memory: Memory) -> bool:
        """Whether no snapshot or manifest refers to this memory."""
        return not memory.holders

    def target(self, slab: Slab) -> Memory:
        """The memory that a step may write a slab to: its own, or another if that must stay."""
        for memory in (slab.memory, *slab.family):
            if self.writable(memory):
                return memory
        slab.family.append(self.new(slab.nbytes))
        return slab.family[-1]

    def prepare(self, chunk: Chunk) -> None:  # noqa: B027
        """Begin to get a chunk ready that will be loaded soon."""

    def ready(self, chunk: Chunk) -> bool:
        """Whether ``source`` would return without waiting."""
        return True

    def source(self, chunk: Chunk) -> Iterable[tuple[Tensor, Region]]:
        """The chunk's bytes in host memory, to be copied from."""
        return chunk.pieces(chunk.memory)

    def sent(self, chunk: Chunk, event: Any) -> None:  # noqa: B027
        """Take the event after which the source has been copied from; None: it has been."""

    def reserve(self, chunk: Chunk) -> None:  # noqa: B027
        """Make sure, before the chunk is stepped, that ``sink`` and ``stored`` will succeed.

        Raises:
            OSError: the previous content of the sink could not be written.
        """

    def sink(self, chunk: Chunk) -> Iterable[tuple[Tensor, Region]]:
        """Host memory to copy the chunk to; ``chunk.memory`` says where it will be kept."""
        return chunk.pieces(chunk.memory)

    def stored(self, chunk: Chunk) -> None:  # noqa: B027
        """Keep the chunk, which is in its sink after the event ``chunk.stored``; None: now."""

    def check(self) -> None:  # noqa: B027
        """Raise if the result of a step could not be stored."""

    def wait(self) -> None:  # noqa: B027
        """Wait until everything that was stored is kept.

        Raises:
            OSError: something could not be kept.
        """

    def commit(self, describe: Callable[[], dict[str, Any]]) -> None:  # noqa: B027
        """Record that a step is complete, so that the slabs belong together as they are now.

        Args:
            describe: returns the content of a manifest, see ``manifest.describe``.
        """

    def restate(self) -> bool:
        """Keep group values that have changed since ``commit``; returns whether any have."""
        return False

    def supersede(self) -> None:  # noqa: B027
        """Note that group values no longer belong to the committed state, until ``commit``."""

    def protect(self, memories: Iterable[Memory]) -> None:  # noqa: B027
        """Set the memories that a manifest refers to."""

    def forget(self) -> None:  # noqa: B027
        """Discard prepared chunks: the state that is kept has been changed."""

    def close(self, remove: bool = False) -> None:  # noqa: B027
        """Release resources that outlive the process, or ``remove`` them."""


class HostStateStore(StateStore):
    """Keeps state in host memory of exact size, page-locked for GPUs.

    Args:
        pin: whether to lock the pages; None: if there is a GPU.
    """

    name = "host"

    def __init__(self, pin: bool | None = None) -> None:
        super().__init__()
        self.pin = torch.cuda.is_available() if pin is None else pin

    @property
    def shared(self) -> bool:
        return self.pin and torch.cuda.is_available()

    def new(self, nbytes: int) -> Memory:
        return Memory(empty_pinned(nbytes, self.pin))
