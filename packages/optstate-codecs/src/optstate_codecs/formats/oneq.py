"""oneq (1Q): the root of a second moment on a logarithmic grid, in 2, 3, 4, 6 or 8 bits.

Layout: ``codes`` uint8, packed as in ``formats.packing``; ``scale`` bfloat16, a power of two, one
per block of ``block_size`` consecutive elements (the last block may be shorter).

Mathematics. Code 0 is used for exact zeros only. Code n represents the root

    scale * 2^(i div 2^k) * (1 + (i mod 2^k) / 2^k),    i = n - 1,

a float with k mantissa bits, so that a position on the grid is the difference of two floats' bits:

    bits   k   levels per octave  largest over smallest
    2      0   1                  4
    3      0   1                  64
    4      1   2                  128
    6      3   8                  224
    8      5   32                 248

The scale is the smallest for which the block's largest root is within the grid. It changes by whole
octaves, which maps levels to levels, except at the ends of the grid: nothing is rounded again. A
positive root below the lowest level becomes the lowest, so that steps are too short there and never
too long. Rounding between two levels is stochastic. The probability of the upper level is slightly
higher than unbiased (``LIFT``): steps divide by the root, and the mean of reciprocals is larger
than the reciprocal of the mean. With 2 bits it is lower than unbiased, because so many roots are
raised to the lowest level that the others have to compensate.

A block with elements that are not finite is marked: its scale is negative and twice as large as it
would be otherwise. This frees the highest octave, and the highest code is NaN there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks, exact
from optstate_codecs.formats.base import DeviceFunctions
from optstate_codecs.formats.block import (
    SCALE_MIN,
    SMALLEST,
    SMALLEST_SCALE,
    BlockFormat,
    all_on_host,
    block_amax,
    blocked,
    fill_marked,
    finite_amax,
    load_scale,
    nan_where_marked,
    power_of_two_scale,
    scaled,
    store_scale,
)
from optstate_codecs.formats.packing import load_codes, pack, store_codes, unpack
from optstate_codecs.rounding import Draw
from optstate_codecs.triton_lib import (
    INF_BITS,
    as_bits,
    as_float,
    constant,
    jit,
    row_max,
    spread,
    tl,
)

__all__ = ["OneQ"]

ONE, MANTISSA = 0x3F800000, 0x7FFFFF
# for each number of bits: the mantissa bits of a level
MANTISSA_BITS = {2: 0, 3: 0, 4: 1, 6: 3, 8: 5}
# and n, s: a fraction f of the way to the next level is raised to f + n 2^(16 - s) f (1 - f)
LIFT = {2: (-11, 20), 3: (3, 20), 4: (1, 19), 6: (1, 21), 8: (1, 23)}
# the largest scale, 2^100, as float32 bits; a marked block may have twice that
SCALE_MAX = (127 + 100) << 23


@dataclass(frozen=True)
class OneQ(BlockFormat):
    """Roots of second moments on a logarithmic grid, rounded stochastically.

    Args:
        bits: bits of a code: 2, 3, 4, 6 or 8.
        block_size: elements that share a scale, a power of two from 16 to 8192.
    """

    name: ClassVar[str] = "oneq"
    signed: ClassVar[bool] = False
    domain: ClassVar[str] = "sqrt"
    rounding: ClassVar[str] = "stochastic"
    scale_dtype: ClassVar[torch.dtype] = torch.bfloat16
    bits: int = 4
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("bits", self.bits, tuple(MANTISSA_BITS))

    @property
    def device_functions(self) -> DeviceFunctions:
        times, shift = LIFT[self.bits]
        options = self.bits + (MANTISSA_BITS[self.bits] << 4) + (shift << 8) + (times + 16 << 16)
        return DeviceFunctions(load, store, options, marks=True)

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        codes, scale = parts
        x = exact.sqrt(x)
        block_scale = self._scale(block_amax(x, self.block_size))
        mantissa_bits = MANTISSA_BITS[self.bits]
        # in units of 2^-16 codes
        base = block_scale.view(torch.int32).clamp(min=SCALE_MIN) - (1 << (23 - mantissa_bits))
        below = blocked(x, self.block_size).view(torch.int32) - base
        position = below.view(-1)[: x.numel()] >> (7 - mantissa_bits)
        fraction = position & 0xFFFF
        times, shift = LIFT[self.bits]
        position += (fraction * (65536 - fraction) >> shift) * times
        position += self.rounding_bits(x, draw)
        code = torch.maximum(position >> 16, (x > 0).to(torch.int32)).clamp_(max=self._last)
        code, block_scale = self._mark(code, block_scale, x)
        codes.copy_(pack(code, self.bits))
        scale.copy_(block_scale.view(-1))

    @property
    def _last(self) -> int:
        return (1 << self.bits) - 1

    def _scale(self, amax: Tensor) -> Tensor:
        """Each block's scale; 0 for blocks of zeros."""
        top = (self._last - 1 << 23 - MANTISSA_BITS[self.bits]) + ONE
        return power_of_two_scale(amax, top, SCALE_MAX)[0]

    def _levels(self, code: Tensor) -> Tensor:
        """The value of each code under a scale of 1, float32."""
        bits = (code - 1 << 23 - MANTISSA_BITS[self.bits]) + ONE
        return bits.view(torch.float32) * (code > 0)

    def _mark(self, code: Tensor, block_scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        finite = torch.isfinite(x)
        if all_on_host(finite):
            return code, block_scale
        marked = blocked((~finite).to(block_scale.dtype), self.block_size).amax(1, keepdim=True)
        down = scaled(torch.full_like(x, 1 << MANTISSA_BITS[self.bits]), marked, self.block_size)
        code = torch.where(code > 0, (code - down.to(torch.int32)).clamp(min=1), code)
        negative = -2 * block_scale.clamp(min=SMALLEST_SCALE)
        code = code.masked_fill(~finite, self._last)
        return code, torch.where(marked > 0, negative, block_scale)

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        code = unpack(codes, self.bits)
        scale = scale.to(torch.float32)
        x = fill_marked(self._levels(code), code, scale, self._last, self.block_size)
        x = scaled(x, scale.abs().view(-1, 1), self.block_size)
        return x.mul_(x)


# The same on a tile of roots. OPTIONS holds the bits, the mantissa bits from bit 4 on, and LIFT's s
# from bit 8 on and n + 16 from bit 16 on.
_ONE, _MANTISSA = constant(ONE), constant(MANTISSA)
_SCALE_MIN, _SCALE_MAX = constant(SCALE_MIN), constant(SCALE_MAX)


@jit
def load(codes, scale, offsets, rows, left, MARKED: tl.constexpr, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load and decode a tile, as roots."""
    bits: tl.constexpr = OPTIONS & 15
    shift: tl.constexpr = 23 - ((OPTIONS >> 4) & 15)
    factor = load_scale(scale, offsets, rows, left)
    field = load_codes(codes, offsets, rows, left, bits, shift)
    # multiplying by a power of two adds to the exponent
    base = as_bits(tl.abs(factor)) - (1 << shift)
    # 0 for code 0; for other codes, unsigned, above the bits of any float: so zero stays zero
    below = (-field).to(tl.uint32)
    x = as_float(tl.minimum((field + spread(base, offsets)).to(tl.uint32), below).to(tl.int32))
    if MARKED:
        x = nan_where_marked(x, field >> shift, factor, (1 << bits) - 1)
    return x, as_bits(factor)


@jit
def store(codes, scale, x, random, offsets, rows, left, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Encode and store a tile of roots; ``random`` is ``Draw.bits16``."""
    bits: tl.constexpr = OPTIONS & 15
    mantissa_bits: tl.constexpr = (OPTIONS >> 4) & 15
    shift: tl.constexpr = (OPTIONS >> 8) & 255
    times: tl.constexpr = (OPTIONS >> 16) - 16
    last: tl.constexpr = (1 << bits) - 2
    octave: tl.constexpr = last >> mantissa_bits
    fraction: tl.constexpr = (last - (octave << mantissa_bits)) << (23 - mantissa_bits)
    amax, tile_amax = finite_amax(x, rows, False)
    scale_bits = ((amax + (_MANTISSA - fraction)) & ~_MANTISSA) - (octave << 23)
    scale_bits = tl.minimum(tl.maximum(scale_bits, _SCALE_MIN), _SCALE_MAX)
    factor = tl.where(amax > 0, as_float(scale_bits), 0.0)

    base = scale_bits - (1 << (23 - mantissa_bits))
    # in units of 2^-16 codes
    position = (as_bits(x) - spread(base, offsets)) >> (7 - mantissa_bits)
    part = position & 0xFFFF
    position = position + (part * (65536 - part) >> shift) * times + random
    # the bits of 0 are 0, and those of positive numbers are above 65536
    position = tl.maximum(position, tl.minimum(as_bits(x), 65536))
    store_scale(scale, factor, offsets, rows, left)
    store_codes(codes, position, offsets, rows, left, bits)
    if tile_amax >= INF_BITS:
        nonfinite = x - x != 0.0
        marked = row_max(nonfinite.to(tl.int32), rows)
        code = position >> 16
        lower = tl.maximum(code - (spread(marked, offsets) << mantissa_bits), 1)
        code = tl.where(nonfinite, last + 1, tl.where(code > 0, lower, code))
        store_codes(codes, code << 16, offsets, rows, left, bits)
        negative = tl.where(marked > 0, -2.0 * tl.maximum(factor, SMALLEST), factor)
        store_scale(scale, negative, offsets, rows, left)
