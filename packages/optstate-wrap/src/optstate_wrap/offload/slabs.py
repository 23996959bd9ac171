"""Host memory for the state of batches, used again for the next batch of the same size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.offloading.pinned import empty_pinned
from optstate_codecs.offloading.slabs import aligned

__all__ = ["VIEW_ALIGNMENT", "RecordSlab", "Spares", "pack"]

# bytes, and the device that copies them: another device might write a slab too early
Size = tuple[int, torch.device]

# steps after which a size that none of them used is no longer kept
PATIENCE = 8
# views of any dtype begin at multiples of 16 bytes
VIEW_ALIGNMENT = 16


@dataclass(eq=False)
class RecordSlab:
    """The state of a batch, tensor by tensor.

    Attributes:
        memory: uint8, on the host.
        device: the device that copies from it and to it.
        records: the number of records in it; without any it may be overwritten.
        stored: the event after which the last copy to it is complete.
    """

    memory: Tensor
    device: torch.device
    records: int = 0
    stored: Any = None


class Spares:
    """Unused slabs, by size.

    A step with state of the same sizes as before takes and gives back each size in turns. So one
    spare slab of each size is enough, or as many as a split parameter has chunks. Of a size that
    only some steps use, as where gradients come and go, one is kept for a few steps.
    """

    def __init__(self) -> None:
        self._free: defaultdict[Size, list[RecordSlab]] = defaultdict(list)
        self._step = 0
        # the last step that used the size
        self._wanted: dict[Size, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all spare slabs."""
        return sum(slab.memory.numel() for free in self._free.values() for slab in free)

    def take(self, nbytes: int, device: torch.device, pin: bool | None) -> RecordSlab:
        """A slab of this size, page-locked if ``pin``; None: if ``device`` is a GPU."""
        size = nbytes, device
        self._wanted[size] = self._step
        free = self._free[size]
        if free:
            return free.pop()
        pin = device.type == "cuda" if pin is None else pin
        return RecordSlab(empty_pinned(nbytes, pin), device)

    def give(self, slab: RecordSlab) -> None:
        """Take back a slab that is no longer used; copies from it and to it may be under way."""
        size = slab.memory.numel(), slab.device
        now = self._wanted.get(size) == self._step
        if now or (size in self._wanted and not self._free[size]):
            self._free[size].append(slab)

    def end(self) -> None:
        """End a step: free slabs of sizes that are no longer used."""
        for size, step in list(self._wanted.items()):
            if step <= self._step - PATIENCE:
                del self._wanted[size], self._free[size]
            elif step < self._step:
                del self._free[size][1:]
        self._step += 1


def pack(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins when they lie side by side, and how many bytes all of them take."""
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += aligned(tensor.nbytes, VIEW_ALIGNMENT)
    return offsets, size
