"""Host memory of exact size, page-locked where a GPU is to copy from it and to it."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["empty_pinned"]


class _Region(mmap.mmap):
    """Anonymous memory that is unlocked before the system takes it back."""

    locked = 0

    def __del__(self) -> None:
        if self.locked:
            with suppress(Exception):  # at the interpreter's end, CUDA may be gone already
                # a copy that is under way must not lose its memory
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaHostUnregister(self.locked)  # type: ignore[no-untyped-call]


def empty_pinned(nbytes: int, pin: bool = True) -> Tensor:
    """A row of bytes on the host; copies between it and a GPU need not wait for each other.

    ``torch.empty(pin_memory=True)`` takes the next power of two from the system and keeps it when
    it is freed; this takes whole pages, and gives them back.

    Args:
        nbytes: how many.
        pin: lock the pages; else it is ordinary memory.

    Returns:
        uint8 [nbytes].

    Raises:
        MemoryError: the system does not give or lock that much.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    try:
        region = _Region(-1, nbytes)
    except OSError as error:
        raise MemoryError(f"host memory: {nbytes} bytes for optimizer state: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # not every system has large pages
            region.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(region, dtype=torch.uint8)
    if pin and torch.cuda.is_available():
        address = memory.data_ptr()
        code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))  # type: ignore[no-untyped-call]
        if code:
            raise MemoryError(
                f"host memory: {nbytes} bytes for optimizer state could not be page-locked "
                f"(CUDA error {code}); the limit of locked memory (ulimit -l) may be too low"
            )
        region.locked = address
    return memory
