"""How kernels see stored dtypes: Triton's types, pointers from addresses, and loads as float32."""

from __future__ import annotations

from typing import Any

import torch

from optstate_codecs.triton_lib import from_bf16_bits, jit, tl

__all__ = ["load_float", "pointer_at", "triton_type"]

# bfloat16 as 16-bit integers, so that our own conversions run
_TYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "int16",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
}


def triton_type(dtype: torch.dtype) -> Any:
    """The type that a kernel accesses elements of ``dtype`` as."""
    return getattr(tl, _TYPES[dtype])


@jit
def load_float(pointer, offsets, mask, BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements as float32; BF16 says that they are bfloat16."""
    if BF16:
        return from_bf16_bits(tl.load(pointer + offsets, mask=mask, other=0))
    else:
        return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@jit
def pointer_at(entry, DTYPE: tl.constexpr, DIVISIBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pointer whose address a table holds at ``entry``, a multiple of DIVISIBLE bytes."""
    # the compiler cannot infer alignment from memory: without the hint, loads are 2 or 4 bytes wide
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), DIVISIBLE)
