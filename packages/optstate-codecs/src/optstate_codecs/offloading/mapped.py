"""Memory-mapped regions of a file as tensors."""

from __future__ import annotations

import ctypes
import mmap
import os
from weakref import finalize

import torch
from torch import Tensor

__all__ = ["GRANULARITY", "mapped"]

#: regions begin at multiples of it, in bytes
GRANULARITY = mmap.ALLOCATIONGRANULARITY


def mapped(file: int, offset: int, nbytes: int) -> Tensor:
    """Map bytes of a file into memory; writes to the tensor change the file.

    Python's ``mmap`` would keep a file descriptor open for each of thousands of regions.

    Args:
        file: the file's descriptor, which may be closed while the tensor lives.
        offset: where the bytes begin, a multiple of ``GRANULARITY``.
        nbytes: the number of bytes.

    Returns:
        uint8 [nbytes].

    Raises:
        OSError: the system cannot map them.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    libc = ctypes.CDLL(None, use_errno=True)
    size, protection = ctypes.c_size_t(nbytes), mmap.PROT_READ | mmap.PROT_WRITE
    libc.mmap.restype = ctypes.c_void_p
    begin = ctypes.c_int64(offset)
    address = libc.mmap(None, size, protection, mmap.MAP_SHARED, file, begin)
    if address in (None, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, f"mapping {nbytes} bytes of a file: {os.strerror(number)}")
    region = (ctypes.c_uint8 * nbytes).from_address(address)
    # not at interpreter exit, when tensors may still be read
    finalize(region, libc.munmap, ctypes.c_void_p(address), size).atexit = False
    return torch.frombuffer(region, dtype=torch.uint8)
