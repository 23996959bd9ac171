"""Torch's square root for compiled kernels, where it is not rounded correctly.

On x86 processors torch calls MKL's vector function with the mode below. Torch's library exports it,
so that kernels can call it too and have the bits of ``torch.optim``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["MODE", "set_torch_root", "torch_root"]

NAME = "vmsSqrt"
# sets the number of threads for the calling thread and returns the one before
THREADS = "MKL_Set_Num_Threads_Local"
# high accuracy, subnormals kept, errors ignored
MODE = 0x2 | 0x140000 | 0x100


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


@cache
def torch_root() -> Any | None:
    """The function, or None where it does not exist or has other bits than ``torch.sqrt``."""
    try:
        library = _library()
        function, _ = getattr(library, NAME), getattr(library, THREADS)
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    generator = torch.Generator("cpu").manual_seed(0)
    # one count fills no vector
    for count in (1024, 7):
        normal = torch.randn(2, count, generator=generator, dtype=torch.float32, device="cpu")
        x = normal[0].abs() * torch.exp2(20 * normal[1])
        root = torch.empty_like(x)
        function(count, x.data_ptr(), root.data_ptr(), MODE)
        if not torch.equal(root, x.sqrt()):
            return None
    return function


def set_torch_root(run: Any) -> None:
    """Tell the library of ``run`` where these functions are."""
    for symbol, name in (("torch_root", NAME), ("root_threads", THREADS)):
        address = ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value
        ctypes.c_void_p.in_dll(run.library, symbol).value = address
