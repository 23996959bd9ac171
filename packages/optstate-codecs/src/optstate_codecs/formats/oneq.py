"""1Q: the root of a second moment on a logarithmic grid, at 2, 3, 4, 6 or 8 bits.

Layout: ``codes`` uint8, side by side as ``formats.packing`` says; ``scale`` bfloat16, a power of
two for each block of ``block_size`` consecutive elements (the last block may be shorter).

Mathematics. Code 0 is zero, and only zero. Code n stands for the root

    scale * 2^(i div 2^k) * (1 + (i mod 2^k) / 2^k),    i = n - 1,

a float of k mantissa bits, so that position on the grid is the difference of two floats' bits:

    bits   k   levels an octave   largest over smallest
    2      0   1                  4
    3      0   1                  64
    4      1   2                  128
    6      3   8                  224
    8      5   32                 248

The scale is the smallest that has the block's largest root within the grid. When it moves, it moves
by whole octaves, and every level but the lowest or highest is a level still: nothing is rounded
anew. A positive root below the lowest level becomes the lowest, so that steps are too short there
and never too long. Between two levels the upper one is taken with a probability that makes the mean
of the root exact, and a little (``LIFT``) above: steps divide by it, and the mean of reciprocals is
larger than the reciprocal of the mean. With two bits it is less: so many roots are raised to the
lowest level that those above have to make up for it.

A block with elements that are not finite has a negative scale, twice as large as it would have
been, which frees the highest octave: the highest code is NaN there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks, exact
from optstate_codecs.device import (
    INF_BITS,
    as_bits,
    as_float,
    constant,
    jit,
    row_max,
    spread,
    tl,
)
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
    load_codes,
    load_scale,
    nan_where_marked,
    power_of_two_scale,
    scaled,
    store_codes,
    store_scale,
)
from optstate_codecs.formats.packing import pack, unpack
from optstate_codecs.rounding import Draw

__all__ = ["OneQ"]

ONE, MANTISSA = 0x3F800000, 0x7FFFFF
# by bits: the mantissa bits of a level
MANTISSA_BITS = {2: 0, 3: 0, 4: 1, 6: 3, 8: 5}
# and n, s where a share f of the way to the next level counts as f + n 2^(16 - s) f (1 - f)
LIFT = {2: (-11, 20), 3: (3, 20), 4: (1, 19), 6: (1, 21), 8: (1, 23)}
# the largest scale, 2^100, as float32 bits: twice the largest is a float still
SCALE_MAX = (127 + 100) << 23


@dataclass(frozen=True)
class OneQ(BlockFormat):
    """Roots of second moments on a logarithmic grid, rounded stochastically.

    Args:
        bits: of a code: 2, 3, 4, 6 or 8.
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
        step = self._scale(block_amax(x, self.block_size))
        mantissa_bits = MANTISSA_BITS[self.bits]
        # in units of 2^-16 codes
        base = step.view(torch.int32).clamp(min=SCALE_MIN) - (1 << (23 - mantissa_bits))
        below = blocked(x, self.block_size).view(torch.int32) - base
        position = below.view(-1)[: x.numel()] >> (7 - mantissa_bits)
        part = position & 0xFFFF
        times, shift = LIFT[self.bits]
        position += (part * (65536 - part) >> shift) * times
        position += self.rounding_bits(x, draw)
        code = torch.maximum(position >> 16, (x > 0).to(torch.int32)).clamp_(max=self._last)
        code, step = self._mark(code, step, x)
        codes.copy_(pack(code, self.bits))
        scale.copy_(step.view(-1))

    @property
    def _last(self) -> int:
        return (1 << self.bits) - 1

    def _scale(self, amax: Tensor) -> Tensor:
        """Each block's scale; 0 for blocks of zeros."""
        top = (self._last - 1 << 23 - MANTISSA_BITS[self.bits]) + ONE
        return power_of_two_scale(amax, top, SCALE_MAX)[0]

    def _levels(self, code: Tensor) -> Tensor:
        """What each code stands for under a scale of 1, float32."""
        bits = (code - 1 << 23 - MANTISSA_BITS[self.bits]) + ONE
        return bits.view(torch.float32) * (code > 0)

    def _mark(self, code: Tensor, step: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        finite = torch.isfinite(x)
        if all_on_host(finite):
            return code, step
        some = blocked((~finite).to(step.dtype), self.block_size).amax(1, keepdim=True)
        down = scaled(torch.full_like(x, 1 << MANTISSA_BITS[self.bits]), some, self.block_size)
        code = torch.where(code > 0, (code - down.to(torch.int32)).clamp(min=1), code)
        step = torch.where(some > 0, -2 * step.clamp(min=SMALLEST_SCALE), step)
        return code.masked_fill(~finite, self._last), step

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        code = unpack(codes, self.bits)
        scale = scale.to(torch.float32)
        x = fill_marked(self._levels(code), code, scale, self._last, self.block_size)
        x = scaled(x, scale.abs().view(-1, 1), self.block_size)
        return x.mul_(x)


# The same on a tile, of roots. OPTIONS: the bits; the mantissa bits from bit 4 on; of the lift, s
# from bit 8 on and n + 16 from bit 16 on.
_ONE, _MANTISSA = constant(ONE), constant(MANTISSA)
_SCALE_MIN, _SCALE_MAX = constant(SCALE_MIN), constant(SCALE_MAX)


@jit
def load(codes, scale, offsets, rows, left, MARKED: tl.constexpr, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Decode a tile."""
    bits: tl.constexpr = OPTIONS & 15
    place: tl.constexpr = 23 - ((OPTIONS >> 4) & 15)
    factor = load_scale(scale, offsets, rows, left)
    field = load_codes(codes, offsets, rows, left, bits, place)
    # times a power of two: an addition to the exponent
    base = as_bits(tl.abs(factor)) - (1 << place)
    # as an unsigned number, less than nothing is more than the bits of any float: zero stays zero
    below = (-field).to(tl.uint32)
    x = as_float(tl.minimum((field + spread(base, offsets)).to(tl.uint32), below).to(tl.int32))
    if MARKED:
        x = nan_where_marked(x, field >> place, factor, (1 << bits) - 1)
    return x, as_bits(factor)


@jit
def store(codes, scale, x, random, offsets, rows, left, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Encode a tile; ``random`` is what ``Draw.bits16`` gives."""
    bits: tl.constexpr = OPTIONS & 15
    mantissa_bits: tl.constexpr = (OPTIONS >> 4) & 15
    shift: tl.constexpr = (OPTIONS >> 8) & 255
    times: tl.constexpr = (OPTIONS >> 16) - 16
    last: tl.constexpr = (1 << bits) - 2
    octave: tl.constexpr = last >> mantissa_bits
    fraction: tl.constexpr = (last - (octave << mantissa_bits)) << (23 - mantissa_bits)
    top, worst = finite_amax(x, rows, False)
    scale_bits = ((top + (_MANTISSA - fraction)) & ~_MANTISSA) - (octave << 23)
    scale_bits = tl.minimum(tl.maximum(scale_bits, _SCALE_MIN), _SCALE_MAX)
    factor = tl.where(top > 0, as_float(scale_bits), 0.0)

    base = scale_bits - (1 << (23 - mantissa_bits))
    # in units of 2^-16 codes
    position = (as_bits(x) - spread(base, offsets)) >> (7 - mantissa_bits)
    part = position & 0xFFFF
    position = position + (part * (65536 - part) >> shift) * times + random
    # the bits of zero are zero, those of any other number more than these
    position = tl.maximum(position, tl.minimum(as_bits(x), 65536))
    store_scale(scale, factor, offsets, rows, left)
    store_codes(codes, position, offsets, rows, left, bits)
    if worst >= INF_BITS:
        bad = x - x != 0.0
        some = row_max(bad.to(tl.int32), rows)
        code = position >> 16
        lower = tl.maximum(code - (spread(some, offsets) << mantissa_bits), 1)
        code = tl.where(bad, last + 1, tl.where(code > 0, lower, code))
        store_codes(codes, code << 16, offsets, rows, left, bits)
        marked = tl.where(some > 0, -2.0 * tl.maximum(factor, SMALLEST), factor)
        store_scale(scale, marked, offsets, rows, left)
