"""Page-locked (pinned) host memory of exact size, for copies from and to a GPU."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["empty_pinned"]


class _Region(mmap.mmap):
    """Anonymous memory that is unlocked before it is returned to the system."""

    locked = 0

    def __del__(self) -> None:
        if self.locked:
            with suppress(Exception):  # CUDA may be shut down at interpreter exit
                # copies under way still need the memory
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaHostUnregister(self.locked)  # type: ignore[no-untyped-call]


def _flags(pin: bool) -> dict[str, int]:
    """Arguments of mmap, so that a forked process has ordinary memory of its own.

    Locked pages stay shared: the system would copy all of them at once when a process forks.
    """
    if pin or not hasattr(mmap, "MAP_PRIVATE"):
        return {}
    return {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}


def empty_pinned(nbytes: int, pin: bool = True) -> Tensor:
    """Allocate bytes on the host that a GPU can copy asynchronously.

    ``torch.empty(pin_memory=True)`` allocates the next power of two and keeps it when it is freed.
    This allocates whole pages and returns them to the system.

    Args:
        nbytes: the number of bytes.
        pin: whether to lock the pages; else it is ordinary memory.

    Returns:
        uint8 [nbytes].

    Raises:
        MemoryError: the system cannot allocate or lock that much.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    pin = pin and torch.cuda.is_available()
    try:
        region = _Region(-1, nbytes, **_flags(pin))
    except OSError as error:
        raise MemoryError(f"host memory: {nbytes} bytes for optimizer state: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # not every system has large pages
            region.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(region, dtype=torch.uint8)
    if pin:
        address = memory.data_ptr()
        code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))  # type: ignore[no-untyped-call]
        if code:
            raise MemoryError(
                f"host memory: {nbytes} bytes for optimizer state could not be page-locked "
                f"(CUDA error {code}); the limit of locked memory (ulimit -l) may be too low"
            )
        region.locked = address
    return memory
