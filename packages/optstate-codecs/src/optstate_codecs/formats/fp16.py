"""fp16: float16 codes with a power-of-two scale per block, for first moments of any magnitude.

Layout: ``codes`` float16, one per element, shaped like the parameter; ``scale`` float32, one for
each block of ``block_size`` consecutive elements (the last block may be shorter).

Mathematics. The scale brings a block's largest finite magnitude into [1/2, 1), so that elements
down to 2^-13 of it keep 11 bits at any magnitude. Float16 without a scale loses bits below 6e-5 and
everything below 3e-8. NaN and infinities are those of float16. Scales are powers of two with exact
reciprocals, both computed with integers from the exponent of the magnitude, so that every device
writes the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optstate_codecs.formats.base import DeviceFunctions
from optstate_codecs.formats.block import (
    BlockFormat,
    block_amax,
    finite_amax,
    load_scale,
    scaled,
    store_scale,
)
from optstate_codecs.rounding import Draw
from optstate_codecs.triton_lib import as_float, constant, jit, spread, tl

__all__ = ["FP16"]

# smallest and largest exponent field of a scale; the reciprocals of both are normal numbers
LOWEST, HIGHEST = 1, 253


@dataclass(frozen=True)
class FP16(BlockFormat):
    """Float16 codes with a power-of-two scale per block, rounded to nearest.

    Args:
        block_size: elements that share a scale, a power of two from 16 to 8192.
    """

    name: ClassVar[str] = "fp16"
    code_dtype: ClassVar[torch.dtype] = torch.float16
    marks: ClassVar[bool] = False
    block_size: int = 2048

    @property
    def device_functions(self) -> DeviceFunctions | None:
        return DeviceFunctions(load, store)

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        codes, scale = parts
        amax = block_amax(x, self.block_size)
        field = ((amax.view(torch.int32) >> 23) + 1).clamp_(LOWEST, HIGHEST)
        codes.copy_(scaled(x, ((254 - field) << 23).view(torch.float32), self.block_size))
        scale.copy_((field << 23).view(torch.float32).view(-1))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        return scaled(codes.to(torch.float32), scale.view(-1, 1), self.block_size)


_LOWEST, _HIGHEST = constant(LOWEST), constant(HIGHEST)


@jit
def load(codes, scale, offsets, rows, left, MARKED: tl.constexpr, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Decode a tile."""
    x = tl.load(codes + offsets, mask=offsets < left, other=0.0).to(tl.float32)
    return x * spread(load_scale(scale, offsets, rows, left), offsets), rows


@jit
def store(codes, scale, x, random, offsets, rows, left, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Encode a tile."""
    mask = offsets < left
    amax, _ = finite_amax(tl.where(mask, x, 0.0), rows, True)
    field = tl.minimum(tl.maximum((amax >> 23) + 1, _LOWEST), _HIGHEST)
    inverse = spread(as_float((254 - field) << 23), offsets)
    tl.store(codes + offsets, (x * inverse).to(tl.float16), mask=mask)
    store_scale(scale, as_float(field << 23), offsets, rows, left)
