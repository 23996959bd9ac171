"""Host memory for the state of rows, used again for the next row that is as large."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.offloading.pinned import empty_pinned

__all__ = ["ALIGNMENT", "Slab", "Spares", "layout"]

Kind = tuple[int, torch.device]

# steps after which a size that none of them wanted is not kept any more
PATIENCE = 8
# views of any dtype begin at multiples of 16 bytes
ALIGNMENT = 16


@dataclass(eq=False)
class Slab:
    """The state of a row, tensor by tensor.

    Attributes:
        memory: uint8, on the host.
        device: that copies from it and to it; another may take it for free too early.
        records: how many are in it; what has none may be written.
        stored: the event after which what was last copied to it is there.
    """

    memory: Tensor
    device: torch.device
    records: int = 0
    stored: Any = None


class Spares:
    """Slabs that nobody needs, by size.

    A step that makes state of the sizes that were there takes and gives each size in turns, so that
    one spare slab of each is enough, or as many as a split parameter has. Of a size that is wanted
    in some steps only, as where gradients come and go, one stays for a while.
    """

    def __init__(self) -> None:
        self._free: defaultdict[Kind, list[Slab]] = defaultdict(list)
        self._step = 0
        # the last step that wanted the size
        self._wanted: dict[Kind, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all that is spare."""
        return sum(slab.memory.numel() for free in self._free.values() for slab in free)

    def take(self, nbytes: int, device: torch.device, pin: bool | None) -> Slab:
        """A slab of that many bytes, page-locked if ``pin``; None: where ``device`` is a GPU."""
        kind = nbytes, device
        self._wanted[kind] = self._step
        free = self._free[kind]
        if free:
            return free.pop()
        return Slab(empty_pinned(nbytes, device.type == "cuda" if pin is None else pin), device)

    def give(self, slab: Slab) -> None:
        """Nobody needs the slab; copies from it and to it may still be under way."""
        kind = slab.memory.numel(), slab.device
        now = self._wanted.get(kind) == self._step
        if now or (kind in self._wanted and not self._free[kind]):
            self._free[kind].append(slab)

    def end(self) -> None:
        """A step is over."""
        for kind, step in list(self._wanted.items()):
            if step <= self._step - PATIENCE:
                del self._wanted[kind], self._free[kind]
            elif step < self._step:
                del self._free[kind][1:]
        self._step += 1


def layout(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each of some tensors begins in a row of bytes, and how many bytes that has."""
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, size
