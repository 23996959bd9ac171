"""fp8: e4m3 codes (Micikevicius et al., arXiv:2209.05433) with a power-of-two scale per block.

Layout: ``codes`` uint8, one per element, shaped like the parameter; ``scale`` float32, one per
block of ``block_size`` consecutive elements (the last block may be shorter). The codes are the
bytes of float8_e4m3fn, and ``codes.view(torch.float8_e4m3fn)`` reads them as such. As uint8 they
can be pickled, and read on devices without that dtype.

Mathematics. The top bit of a code is the sign. The other seven bits are n, whose magnitude is

    n div 8 = 0:  (n mod 8) / 8 * 2^-6        otherwise:  (1 + (n mod 8) / 8) * 2^(n div 8 - 7)

up to 448 = 1.75 * 2^8 for n = 126. Code 127 is NaN, so that a non-finite element stays non-finite
and does not affect its block. The scale of a block with NaN is negative, so that kernels look for
NaN in such blocks only. Otherwise a scale is the smallest power of two that brings the block's
largest finite magnitude to 448 or below. Encoding and decoding use integer arithmetic: FP8 hardware
is not needed, and every device gives the same bits.
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
    clamped_scale,
    finite_amax,
    load_scale,
    mark,
    nan_where_marked,
    power_of_two_scale,
    scaled,
    store_marked,
    store_scale,
)
from optstate_codecs.rounding import Draw
from optstate_codecs.tables import cached_table
from optstate_codecs.triton_lib import (
    INF_BITS,
    as_bits,
    as_float,
    at_least_if_positive,
    constant,
    jit,
    mirrored,
    spread,
    third_byte_signed,
    tl,
    top_byte,
)

__all__ = ["FP8"]

NAN_CODE = 127
LAST = 126
# 2^-6, the smallest normal number, and 2^-7, as float32 bits
NORMAL, BELOW = (127 - 6) << 23, (127 - 7) << 23
# 448 = 1.75 * 2^8 as float32 bits; magnitudes above 1.75 of a binade need the next scale
LARGEST = 0x43E00000
COVER, TOP = 0x1FFFFF, 8 << 23


@dataclass(frozen=True)
class FP8(BlockFormat):
    """float8_e4m3fn codes with a power-of-two scale per block; relative steps of 1/8 to 1/16.

    Args:
        block_size: elements that share a scale, a power of two from 16 to 8192.
        signed: True for first moments; False keeps positive numbers above zero.
        rounding: "nearest"; "stochastic", unbiased; or "paired", see ``Minifloat``.
        units: "value" stores the moment; "update" (signed only) stores m / sqrt(v).
    """

    name: ClassVar[str] = "fp8"
    roundings: ClassVar[tuple[str, ...]] = ("nearest", "stochastic", "paired")
    block_size: int = 2048
    signed: bool = True
    rounding: str = "nearest"
    units: str = "value"

    @classmethod
    def first_moment(cls, block_size: int = 2048) -> FP8:
        """The variant for first moments: in update units, with "paired" rounding."""
        return cls(block_size, rounding="paired", units="update")

    @property
    def device_functions(self) -> DeviceFunctions:
        options = (
            self.signed * SIGNED
            + self.uses_random * STOCHASTIC
            # values may exceed the largest scale, update units do not
            + (self.units == "value") * SATURATE
            + self.in_pairs * PAIRED
        )
        return DeviceFunctions(load, store, options, marks=True)

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        codes, scale = parts
        block_scale, inverse = power_of_two_scale(block_amax(x, self.block_size), LARGEST)
        magnitude = scaled(x.abs(), inverse, self.block_size)
        # below 2^-6, adding 2^-6 gives floats that are spaced as the subnormal codes are
        small = (magnitude + 2.0**-6).view(torch.int32) - NORMAL
        position = torch.where(magnitude < 2.0**-6, small, magnitude.view(torch.int32) - BELOW)
        position >>= 4
        position += self.rounding_bits(x, draw)
        code = (position >> 16).clamp_(max=LAST)
        if not self.signed:
            code = torch.maximum(code, (x > 0).to(torch.int32))
        code, block_scale = mark(code, block_scale, x, NAN_CODE, self.block_size)
        code += (torch.signbit(x) & torch.isfinite(x)).to(torch.int32) << 7
        codes.copy_(code)
        scale.copy_(block_scale.view(-1))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        values = value_table(codes.device)
        x = values.index_select(0, codes.to(torch.int32))
        return scaled(x, scale.abs().view(-1, 1), self.block_size)


@cached_table()
def value_table(device: torch.device) -> Tensor:
    """The values of the 256 codes under a scale of 1, float32."""
    subnormal = [n / 8 * 2.0**-6 for n in range(8)]
    normal = [(1 + n % 8 / 8) * 2.0 ** (n // 8 - 7) for n in range(8, NAN_CODE)]
    values = [*subnormal, *normal, float("nan")]
    return torch.tensor([*values, *(-v for v in values)], dtype=torch.float32, device=device)


# The same on a tile. An e4m3 number times 2^-120 has its exponent and mantissa bits as a float32,
# also if it is subnormal; rounding to a multiple of 2^-149 replaces the addition of 2^-6.
SIGNED, STOCHASTIC, SATURATE, PAIRED = 1, 2, 4, 8
_SIGNED, _STOCHASTIC = constant(SIGNED), constant(STOCHASTIC)
_SATURATE, _PAIRED = constant(SATURATE), constant(PAIRED)
_NAN_CODE, _COVER, _TOP = constant(NAN_CODE), constant(COVER), constant(TOP)
DOWN, UP = constant(2.0**-120), constant(2.0**120)


@jit
def load(codes, scale, offsets, rows, left, MARKED: tl.constexpr, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load and decode a tile, in the format's units."""
    code = tl.load(codes + offsets, mask=offsets < left, other=0)
    factor = load_scale(scale, offsets, rows, left)
    small = as_float((top_byte(code) >> 4) & -2014314496)
    if OPTIONS & _SATURATE:
        x = (small * UP) * spread(tl.abs(factor), offsets)
    else:
        x = small * spread(tl.abs(factor) * UP, offsets)
    if MARKED:
        x = nan_where_marked(x, code, factor, _NAN_CODE)
    return x, as_bits(factor)


@jit
def store(codes, scale, x, random, offsets, rows, left, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Encode and store a tile; ``random`` is ``Draw.bits16`` or ``Draw.paired16``."""
    amax, tile_amax = finite_amax(x, rows, (OPTIONS & _SIGNED) != 0)
    bits = clamped_scale(((amax + _COVER) & 0x7F800000) - _TOP)
    factor = tl.where(amax > 0, as_float(bits), 0.0)
    inverse = tl.where(amax > 0, as_float(0x7F000000 - bits), 0.0)
    if OPTIONS & _SATURATE:
        small = (tl.abs(x) * spread(inverse, offsets)) * DOWN
    else:
        small = tl.abs(x) * spread(inverse * DOWN, offsets)
    if OPTIONS & _PAIRED:
        random = mirrored(random, x)
    if OPTIONS & _STOCHASTIC:
        position = (as_bits(small) >> 4) + random
    else:
        position = (as_bits(small) >> 4) + 0x8000
    if OPTIONS & _SATURATE:
        position = tl.minimum(position, (_NAN_CODE << 16) - 1)
    if not (OPTIONS & _SIGNED):
        position = at_least_if_positive(position, 65536, x)
    code = third_byte_signed(position, x)
    store_scale(scale, factor, offsets, rows, left)
    tl.store(codes + offsets, code, mask=offsets < left)
    if tile_amax >= INF_BITS:
        store_marked(codes, scale, code, factor, x, offsets, rows, left, _NAN_CODE, 8)
