"""int8 and int4: linear integer codes with one scale per block, for first moments.

An element is code * scale. The last block may be shorter than ``block_size``.

int8: ``codes`` int8, one per element, shaped like the parameter; ``scale`` float32, the block's
largest finite magnitude divided by 127. Code -128 is NaN: a non-finite element stays non-finite and
does not affect its block.

int4: ``codes`` uint8, two elements per byte as two's complements, the first in the low half;
``scale`` bfloat16, the largest magnitude divided by 7, rounded up. In marked blocks, whose scale is
negative, code -8 is NaN (``formats.block``). Adding 192 to an element divided by its scale gives a
float whose last place is 2^-16. The 16 random bits are added to its bits, and the four bits above
them are the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optstate_codecs.formats.base import DeviceFunctions
from optstate_codecs.formats.block import (
    SCALE_MAX,
    SCALE_MIN,
    BlockFormat,
    block_amax,
    block_size,
    clamped_scale,
    fill_marked,
    finite_amax,
    load_scale,
    mark,
    nan_where_marked,
    scaled,
    store_marked,
    store_scale,
)
from optstate_codecs.formats.packing import load_bytes, pack, store_codes, unpack
from optstate_codecs.rounding import Draw
from optstate_codecs.triton_lib import (
    INF_BITS,
    MAGNITUDE,
    ROUNDER,
    as_bits,
    as_float,
    constant,
    dithered,
    fma,
    jit,
    nibble_floats,
    reciprocal,
    spread,
    tl,
)

__all__ = ["Int4", "Int8"]

NAN_CODE, NAN_CODE4 = -128, 8
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Int8(BlockFormat):
    """int8 codes with an absmax scale per block; nearest rounding errs by at most scale / 2.

    Args:
        block_size: elements that share a scale, a power of two from 16 to 8192.
        rounding: "nearest" (half to even) or "stochastic".
        units: "value" stores the moment; "update" stores m / sqrt(v).
    """

    name: ClassVar[str] = "int8"
    code_dtype: ClassVar[torch.dtype] = torch.int8
    marks: ClassVar[bool] = False
    block_size: int = 256
    rounding: str = "nearest"
    units: str = "value"

    @property
    def device_functions(self) -> DeviceFunctions | None:
        return DeviceFunctions(load, store, int(self.rounding == "stochastic"))

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        codes, scale = parts
        block_scale = block_amax(x, self.block_size) * (1 / 127)
        # a block whose scale would be subnormal is stored as zeros
        block_scale = torch.where(block_scale >= TINY, block_scale, torch.zeros_like(block_scale))
        inverse = torch.where(block_scale > 0, 1 / block_scale, block_scale)
        code = scaled(x, inverse, self.block_size)
        if self.rounding == "stochastic":
            code.add_(self.require_draw(draw).dither(x.numel(), x.device))
        # x - x is NaN where x is not finite, else 0
        code = code.round_().clamp_(-127, 127).add_(x - x).nan_to_num_(nan=NAN_CODE)
        codes.copy_(code)
        scale.copy_(block_scale.view(-1))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        x = codes.to(torch.float32).masked_fill_(codes == NAN_CODE, float("nan"))
        return scaled(x, scale.view(-1, 1), self.block_size)


@dataclass(frozen=True)
class Int4(BlockFormat):
    """4-bit integers from -7 to 7 with an absmax scale per block.

    Args:
        block_size: elements that share a scale, a power of two from 16 to 8192.
        rounding: "nearest"; "stochastic", which is unbiased; or "paired": stochastic, with the
            random numbers of step 2k mirrored in step 2k + 1, so that errors cancel in a running
            mean.
        units: "value" stores the moment; "update" stores m / sqrt(v).
    """

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
    scale_dtype: ClassVar[torch.dtype] = torch.bfloat16
    roundings: ClassVar[tuple[str, ...]] = ("nearest", "stochastic", "paired")
    sign_magnitude: ClassVar[bool] = False
    block_size: int = 128
    rounding: str = "nearest"
    units: str = "value"

    @classmethod
    def first_moment(cls, block_size: int = 128) -> Int4:
        """The variant for first moments: in update units, with "paired" rounding."""
        return cls(block_size, rounding="paired", units="update")

    @property
    def device_functions(self) -> DeviceFunctions:
        options = self.uses_random * STOCHASTIC + (self.units == "value") * SATURATE
        return DeviceFunctions(load4, store4, options, marks=True, returns=True)

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        codes, scale = parts
        amax = block_amax(x, self.block_size)
        bits = ((amax * (1 / 7)).view(torch.int32) + 0xFFFF) & ~0xFFFF
        block_scale = bits.clamp_(SCALE_MIN, SCALE_MAX).view(torch.float32)
        nonzero = amax > 0
        value = scaled(x, block_scale.reciprocal() * nonzero, self.block_size)
        position = value.clamp_(-7, 7).add_(192).view(torch.int32)
        position += self.rounding_bits(x, draw)
        code = (position >> 16) & 15
        code, block_scale = mark(code, block_scale * nonzero, x, NAN_CODE4, self.block_size)
        codes.copy_(pack(code))
        scale.copy_(block_scale.view(-1))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        code = unpack(codes)
        x = ((code ^ 8) - 8).to(torch.float32)
        scale = scale.to(torch.float32)
        x = fill_marked(x, code, scale, NAN_CODE4, self.block_size)
        return scaled(x, scale.abs().view(-1, 1), self.block_size)


_NAN_CODE, _TINY = constant(NAN_CODE), constant(TINY)


@jit
def load(codes, scale, offsets, rows, left, MARKED: tl.constexpr, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load and decode a tile of int8 codes, in the format's units."""
    code = tl.load(codes + offsets, mask=offsets < left, other=0).to(tl.int32)
    factor = tl.load(scale + rows, mask=rows * block_size(offsets, rows) < left, other=0.0)
    x = tl.where(code == _NAN_CODE, float("nan"), code.to(tl.float32))
    return x * spread(factor, offsets), rows


@jit
def store(codes, scale, x, random, offsets, rows, left, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Encode a tile as int8 codes and store it; with OPTIONS 1 ``random`` is added to round."""
    amax, tile_amax = finite_amax(x, rows, True)
    factor = as_float(amax) * (1.0 / 127.0)
    factor = tl.where(factor >= _TINY, factor, 0.0)
    tl.store(scale + rows, factor, mask=rows * block_size(offsets, rows) < left)
    inverse = tl.where(factor > 0, tl.math.div_rn(1.0 + factor * 0.0, factor), 0.0)
    position = x * spread(inverse, offsets)
    if OPTIONS == 1:
        position = dithered(position, random)
    code = as_bits(position + ROUNDER) - 0x4B400000
    code = tl.minimum(tl.maximum(code, -127), 127)
    if tile_amax >= INF_BITS:
        code = tl.where((as_bits(x) & MAGNITUDE) >= INF_BITS, _NAN_CODE, code)
    tl.store(codes + offsets, code.to(tl.int8), mask=offsets < left)


STOCHASTIC, SATURATE = 1, 2
_STOCHASTIC, _SATURATE = constant(STOCHASTIC), constant(SATURATE)
_NAN_CODE4 = constant(NAN_CODE4)


@jit
def load4(codes, scale, offsets, rows, left, MARKED: tl.constexpr, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load and decode a tile of 4-bit codes, in the format's units."""
    factor = load_scale(scale, offsets, rows, left)
    unit = spread(tl.abs(factor), offsets)
    low, high = nibble_floats(load_bytes(codes, offsets, rows, left))
    x = tl.interleave(fma(low, unit, -136.0 * unit), fma(high, unit, -136.0 * unit))
    if MARKED:
        # no finite number has code -8
        x = nan_where_marked(x, (x == -8.0 * unit).to(tl.int32), factor, 1)
    return x, as_bits(factor)


@jit
def store4(codes, scale, x, random, offsets, rows, left, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Encode a tile as 4-bit codes, store it, and return it decoded."""
    amax, tile_amax = finite_amax(x, rows, True)
    bits = clamped_scale((as_bits(as_float(amax) * (1.0 / 7.0)) + 0xFFFF) & -65536)
    factor = tl.where(amax > 0, as_float(bits), 0.0)
    # a block of zeros is encoded as zeros under any scale
    inverse = spread(reciprocal(as_float(bits)), offsets)
    if OPTIONS & _SATURATE:
        value = tl.minimum(tl.maximum(x * inverse, -7.0), 7.0) + 192.0
    else:
        value = fma(x, inverse, 192.0)
    position = as_bits(value) + (random if OPTIONS & _STOCHASTIC else 0x8000)
    store_scale(scale, factor, offsets, rows, left)
    store_codes(codes, position, offsets, rows, left, 4)
    if tile_amax >= INF_BITS:
        code = (position >> 16) & 15
        store_marked(codes, scale, code, factor, x, offsets, rows, left, _NAN_CODE4, 4)
    return (as_float(position & -65536) - 192.0) * spread(factor, offsets)
