"""Regions of a file as tensors."""

from __future__ import annotations

import ctypes
import mmap
import os
from weakref import finalize

import torch
from torch import Tensor

__all__ = ["GRANULARITY", "mapped"]

#: what regions begin at multiples of
GRANULARITY = mmap.ALLOCATIONGRANULARITY


def mapped(file: int, offset: int, nbytes: int) -> Tensor:
    """Bytes of a file in memory: what is written to them is in the file.

    Python's ``mmap`` would keep a descriptor of the file for each, and there are thousands.

    Args:
        file: its descriptor, which may be closed while the tensor lives.
        offset: where they begin, a multiple of ``GRANULARITY``.
        nbytes: how many.

    Returns:
        uint8 [nbytes].

    Raises:
        OSError: the system does not map them.
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
    # not at the interpreter's end, when tensors may still be looked at
    finalize(region, libc.munmap, ctypes.c_void_p(address), size).atexit = False
    return torch.frombuffer(region, dtype=torch.uint8)
