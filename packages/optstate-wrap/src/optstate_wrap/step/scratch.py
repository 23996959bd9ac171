"""Reusable memory for copies of tensors from before a step, which undo it if it fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optstate_codecs.offloading.pinned import empty_pinned
from optstate_codecs.state.layout import is_dense, view_bytes_as

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

    def copy_of(self, tensor: Tensor, on_host: bool = False) -> Tensor:
        """A copy that is valid until ``reset``.

        Args:
            tensor: to copy.
            on_host: copy a GPU's tensor to page-locked host memory. The copy is complete for work
                that is later submitted to the current stream.
        """
        if not copyable_as_bytes(tensor):
            return tensor.clone()
        on_host = on_host and tensor.is_cuda
        device = None if on_host else tensor.device
        blocks = self._blocks.setdefault(device, [])
        number, offset = self._used.get(device, (0, 0))
        size = tensor.nbytes
        while number < len(blocks) and offset + size > blocks[number].numel():
            number, offset = number + 1, 0
        if number == len(blocks):
            # each block is larger than the last, so that there are few
            room = max(BLOCK << min(number, 8), size)
            blocks.append(
                empty_pinned(room)
                if on_host
                else torch.empty(room, dtype=torch.uint8, device=tensor.device)
            )
        self._used[device] = (number, offset + -(-size // ALIGNMENT) * ALIGNMENT)
        return view_bytes_as(blocks[number], offset, tensor).copy_(tensor, non_blocking=on_host)

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
        return {"_blocks": {}, "_used": {}}


def copyable_as_bytes(tensor: Tensor) -> bool:
    """Whether a tensor's memory is one run of bytes: strided, not sharded and without gaps."""
    return tensor.layout is torch.strided and not hasattr(tensor, "to_local") and is_dense(tensor)
