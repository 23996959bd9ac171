"""Reusable memory for copies of tensors from before a step, which undo it if it fails."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from optstate_codecs.offloading.pinned import empty_pinned
from optstate_codecs.state.layout import is_dense

__all__ = ["Scratch", "copyable_as_bytes"]

BLOCK = 1 << 20
ALIGNMENT = 64
#: bytes kept from step to step, since newly allocated memory is slow at first
KEPT_BYTES = 1 << 25


class Scratch:
    """Copies of tensors, side by side in a few blocks of memory.

    On a CPU, the copies of a batch and their sources stay in the cache for the step that follows.
    """

    def __init__(self) -> None:
        # by device; None is page-locked host memory
        self._blocks: dict[torch.device | None, list[Tensor]] = {}
        self._used: dict[torch.device | None, tuple[int, int]] = {}
        self._largest: dict[torch.device | None, int] = {}

    def copies_of(self, tensors: Sequence[Tensor], on_host: bool = False) -> list[Tensor]:
        """Copies that are valid until ``reset``, made together.

        Args:
            tensors: to copy.
            on_host: copy a GPU's tensors to page-locked host memory. The copies are complete for
                work that is later submitted to the current stream.
        """
        copies: list[Tensor] = list(tensors)
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for position, tensor in enumerate(tensors):
            if copyable_as_bytes(tensor):
                alike.setdefault((tensor.device, tensor.dtype), []).append(position)
            else:
                copies[position] = tensor.clone()
        for (device, dtype), positions in alike.items():
            given = [tensors[position] for position in positions]
            step = max(1, ALIGNMENT // dtype.itemsize)
            ends = list(accumulate(-(-tensor.numel() // step) * step for tensor in given))
            away = on_host and device.type == "cuda"
            room = self._take(None if away else device, ends[-1] * dtype.itemsize).view(dtype)
            first = room.storage_offset()
            views = [
                room.as_strided(tensor.shape, tensor.stride(), first + start)
                for tensor, start in zip(given, [0, *ends], strict=False)
            ]
            torch._foreach_copy_(views, given, non_blocking=away)
            for position, view in zip(positions, views, strict=True):
                copies[position] = view
        return copies

    def _take(self, device: torch.device | None, size: int) -> Tensor:
        """Unused bytes of one block, which is a new one where the next block has fewer.

        Blocks are as large as the largest request, so that they fit again in later steps.
        """
        blocks = self._blocks.setdefault(device, [])
        number, offset = self._used.get(device, (0, 0))
        largest = self._largest[device] = max(self._largest.get(device, BLOCK), size)
        if number < len(blocks) and offset + size > blocks[number].numel():
            number, offset = number + bool(offset), 0
            # an unused block that is too small would not be used again
            small = number < len(blocks) and size > blocks[number].numel()
            del blocks[number if small else len(blocks) :]
        if number == len(blocks):
            blocks.append(
                empty_pinned(largest)
                if device is None
                else torch.empty(largest, dtype=torch.uint8, device=device)
            )
        self._used[device] = (number, offset + -(-size // ALIGNMENT) * ALIGNMENT)
        return blocks[number][offset : offset + size]

    def reset(self) -> None:
        """Allow the memory of all copies to be used again."""
        self._used.clear()

    def release(self) -> None:
        """Reset, and free all memory of other devices, and more than ``KEPT_BYTES`` of a CPU.

        Page-locked memory is kept, since locking pages takes longer than a step.
        """
        self.reset()
        for device, blocks in self._blocks.items():
            if device is None:
                continue
            total = 0
            for number, block in enumerate(blocks):
                total += block.numel()
                if total > KEPT_BYTES or device.type != "cpu":
                    del blocks[number:]
                    break

    def __getstate__(self) -> dict[str, Any]:
        return {"_blocks": {}, "_used": {}, "_largest": {}}


def copyable_as_bytes(tensor: Tensor) -> bool:
    """Whether a tensor's memory is one run of bytes: strided, not sharded and without gaps."""
    if type(tensor) is Tensor and tensor.layout is torch.strided and tensor.is_contiguous():
        return True  # the usual case, which has to be fast
    return tensor.layout is torch.strided and not hasattr(tensor, "to_local") and is_dense(tensor)
