"""Room for what tensors were before a step, used again from chunk to chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optstate_codecs.offloading.pinned import empty_pinned
from optstate_codecs.state.layout import is_dense, view_bytes_as

__all__ = ["Scratch", "copyable_as_bytes"]

BLOCK = 1 << 20
ALIGNMENT = 64
#: bytes that are kept from step to step: memory that the system gives anew is slow at first
KEPT = 1 << 25


class Scratch:
    """Copies of tensors, side by side in a few blocks of memory.

    On a CPU, the copies of a chunk stay in the cache, and so does what they were copied from, for
    the step that follows.
    """

    def __init__(self) -> None:
        # None is what is away
        self._blocks: dict[torch.device | None, list[Tensor]] = {}
        self._used: dict[torch.device | None, tuple[int, int]] = {}

    def copy_of(self, tensor: Tensor, away: bool = False) -> Tensor:
        """A copy, good until ``reset``; ``away`` from a GPU it is in page-locked host memory.

        There it is for the stream that is the current one.
        """
        if not copyable_as_bytes(tensor):
            return tensor.clone()
        away = away and tensor.is_cuda
        where = None if away else tensor.device
        blocks = self._blocks.setdefault(where, [])
        number, offset = self._used.get(where, (0, 0))
        size = tensor.nbytes
        while number < len(blocks) and offset + size > blocks[number].numel():
            number, offset = number + 1, 0
        if number == len(blocks):
            # ever larger ones, so that there are few
            room = max(BLOCK << min(number, 8), size)
            here = tensor.device
            blocks.append(
                empty_pinned(room) if away else torch.empty(room, dtype=torch.uint8, device=here)
            )
        self._used[where] = (number, offset + -(-size // ALIGNMENT) * ALIGNMENT)
        return view_bytes_as(blocks[number], offset, tensor).copy_(tensor, non_blocking=away)

    def reset(self) -> None:
        """The room may be used again."""
        self._used.clear()

    def release(self) -> None:
        """Give back what is more than ``KEPT`` on a CPU, and all on other devices.

        What is away stays: to lock pages takes longer than a step.
        """
        self.reset()
        for where, blocks in self._blocks.items():
            if where is None:
                continue
            total = 0
            for number, block in enumerate(blocks):
                total += block.numel()
                if total > KEPT or where.type != "cpu":
                    del blocks[number:]
                    break

    def __getstate__(self) -> dict[str, Any]:
        return {"_blocks": {}, "_used": {}}


def copyable_as_bytes(tensor: Tensor) -> bool:
    """Whether a tensor can be copied as a row of bytes: neither sparse, sharded nor with gaps."""
    return tensor.layout is torch.strided and not hasattr(tensor, "to_local") and is_dense(tensor)
