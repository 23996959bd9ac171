"""minifloat: small floating-point codes with a scale per block; 4 or 8 bits, signed or unsigned.

Layout: ``codes`` uint8, one per element, or one per two elements where a code has 4 bits (the first
element in the low half); ``scale``, one per block of ``block_size`` consecutive elements (the last
block may be shorter), float32 for 8-bit codes and bfloat16 for 4-bit codes.

Mathematics. With m mantissa bits, code n represents the magnitude

    z(n) = (1 + (n mod 2^m) / 2^m) * 2^(n div 2^m) - 1,

in units of the scale: the floats with m mantissa bits from 1 on, minus 1. So z(0) = 0, steps near
zero are 2^-m, and they double wherever z + 1 passes a power of two. The bits of the float z + 1,
minus the bits of 1.0, are the code followed by the fraction to round. Encoding is one multiply-add
and integer arithmetic, and decoding is the reverse.

    4 bits  e2m2 unsigned   0 .25 .5 .75 1 1.5 2 2.5 3 4 5 6 7 9 11  15 in marked blocks: NaN
            e1m2 signed     0 .25 .5 .75 1 1.5 2 2.5, with a sign    8 in marked blocks: NaN
    8 bits  e4m4 unsigned   254 positive ones, over six decades      255 there: NaN

An unsigned format keeps code 0 for exact zeros: a positive number becomes at least code 1. In a
signed format the top bit is the sign. In marked blocks, whose scale is negative, the highest code
(unsigned) or minus zero (signed) is NaN (``formats.block``). A NaN does not affect other elements.

Scales. An unsigned scale is the smallest power of two under which the block's largest finite
magnitude is within the grid. It changes only when that magnitude crosses a power of two, so that a
slowly changing second moment is not rounded again for another reason. A signed scale puts the
largest magnitude on the last point, up to rounding the scale up to bfloat16, because all of a first
moment changes at every step.

Lift. Unbiased rounding gives a second moment a variance, and the mean of 1 / root is larger than
the reciprocal of the mean root, so that steps are too long by the square of the relative spread.
``lift`` c compensates: it raises the probability f of rounding up to f + c f (1 - f).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks, exact
from optstate_codecs.formats.base import DeviceFunctions, float32_bits, rounded
from optstate_codecs.formats.block import (
    SCALE_MAX,
    SCALE_MIN,
    BlockFormat,
    block_amax,
    clamped_scale,
    fill_marked,
    finite_amax,
    load_scale,
    mark,
    nan_where_marked,
    power_of_two_scale,
    scaled,
    store_marked,
    store_scale,
)
from optstate_codecs.formats.packing import load_bytes, pack, store_codes, unpack
from optstate_codecs.rounding import Draw
from optstate_codecs.triton_lib import (
    INF_BITS,
    as_bits,
    as_float,
    at_least_if_positive,
    constant,
    fma,
    jit,
    mirrored,
    nibbles,
    reciprocal,
    spread,
    tl,
    widened,
)

__all__ = ["Minifloat"]

ONE = 0x3F800000
MANTISSA = 0x7FFFFF
LIFTS = {0.0: 0, 1 / 128: 7, 1 / 64: 6, 1 / 32: 5, 1 / 16: 4}


@dataclass(frozen=True)
class Minifloat(BlockFormat):
    """Minifloat codes of 4 or 8 bits with a scale per block.

    Args:
        exponent_bits: 1 to 5; each bit squares the ratio of the largest to the smallest value.
        mantissa_bits: at least 1; each bit halves every step. Exponent bits, mantissa bits and,
            where ``signed``, one sign bit must add up to 4 or 8.
        block_size: elements that share a scale, a power of two from 16 to 8192.
        signed: True for first moments, False for second moments.
        domain: "linear" stores the moment, "sqrt" (unsigned only) its root.
        rounding: "nearest"; "stochastic", which is unbiased in the domain; or "paired":
            stochastic, with the random numbers of step 2k mirrored in step 2k + 1, so that errors
            cancel in a running mean.
        lift: raises the probability of rounding up; 0, 1/128, 1/64, 1/32 or 1/16.
        units: "value" stores the moment; "update" (signed only) stores m / sqrt(v).
    """

    name: ClassVar[str] = "minifloat"
    roundings: ClassVar[tuple[str, ...]] = ("nearest", "stochastic", "paired")
    exponent_bits: int = 2
    mantissa_bits: int = 2
    block_size: int = 128
    signed: bool = False
    domain: str = "linear"
    rounding: str = "nearest"
    lift: float = 0.0
    units: str = "value"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole_number("exponent_bits", self.exponent_bits)
        checks.whole_number("mantissa_bits", self.mantissa_bits)
        if self.bits not in (4, 8) or not 1 <= self.exponent_bits <= 5 or self.mantissa_bits < 1:
            raise ValueError(
                f"exponent_bits={self.exponent_bits}, mantissa_bits={self.mantissa_bits}: must be "
                f"1 to 5, at least 1, and 4 or 8 bits with the sign, got {self.bits}"
            )
        if self.lift not in LIFTS:
            raise ValueError(f"lift={self.lift!r}: must be one of 0, 1/128, 1/64, 1/32, 1/16")

    @classmethod
    def second_moment4(cls, block_size: int = 128) -> Minifloat:
        """4 bits for second moments: e2m2 roots, rounded stochastically and lifted."""
        return cls(2, 2, block_size, domain="sqrt", rounding="stochastic", lift=1 / 32)

    @classmethod
    def second_moment8(cls, block_size: int = 2048) -> Minifloat:
        """8 bits for second moments: e4m4 roots, rounded stochastically and lifted."""
        return cls(4, 4, block_size, domain="sqrt", rounding="stochastic", lift=1 / 128)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.exponent_bits + self.mantissa_bits + self.signed

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bits == 4 else torch.float32

    @property
    def device_functions(self) -> DeviceFunctions:
        options = (
            self.signed * SIGNED
            + (self.bits == 4) * PACKED
            + self.uses_random * STOCHASTIC
            # values may exceed the largest scale, roots and update units do not
            + (self.domain == "linear" and self.units == "value") * SATURATE
            + self.in_pairs * PAIRED
            + (self.mantissa_bits << 4)
            + (LIFTS[self.lift] << 8)
            + (self._nan_code << 12)
        )
        return DeviceFunctions(load, store, options, marks=True)

    @property
    def _nan_code(self) -> int:
        return 1 << (self.bits - 1) if self.signed else (1 << self.bits) - 1

    @property
    def _last(self) -> int:
        """The code of the largest magnitude, without the sign."""
        return self._nan_code - 1

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        codes, scale = parts
        if self.domain == "sqrt":
            x = exact.sqrt(x)
        block_scale, inverse = self._scales(block_amax(x, self.block_size))
        position = scaled(x.abs(), inverse, self.block_size).add_(1).view(torch.int32).sub_(ONE)
        # now in units of 2^-16 codes
        position >>= 7 - self.mantissa_bits
        if self.lift:
            fraction = position & 0xFFFF
            position += (fraction * (65536 - fraction)) >> (16 + LIFTS[self.lift])
        position += self.rounding_bits(x, draw)
        code = (position >> 16).clamp_(max=self._last)
        if self.signed:
            code += torch.signbit(x).to(torch.int32) * self._nan_code
        else:
            code = torch.maximum(code, (x > 0).to(torch.int32))
        code, block_scale = mark(code, block_scale, x, self._nan_code, self.block_size)
        codes.copy_(pack(code) if self.bits == 4 else code)
        scale.copy_(block_scale.view(-1))

    def _scales(self, amax: Tensor) -> tuple[Tensor, Tensor]:
        """Each block's scale and its reciprocal; (0, 0) for blocks of zeros."""
        whole, part = divmod(self._last, 1 << self.mantissa_bits)
        top = rounded(math.ldexp(1 + part / (1 << self.mantissa_bits), whole) - 1)
        if not self.signed:
            return power_of_two_scale(amax, float32_bits(top))
        bits = ((amax * (1 / top)).view(torch.int32) + 0xFFFF) & ~0xFFFF
        nonzero = amax > 0
        scale = bits.clamp_(SCALE_MIN, SCALE_MAX).view(torch.float32)
        return scale * nonzero, scale.reciprocal() * nonzero

    def _values(self, magnitude: Tensor) -> Tensor:
        """z of each magnitude (int32 code without sign), float32."""
        bits = (magnitude << (23 - self.mantissa_bits)) + ONE
        return bits.view(torch.float32) - 1

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        code = unpack(codes) if self.bits == 4 else codes.to(torch.int32)
        if self.signed:
            x = self._values(code & self._nan_code - 1)
            x = torch.where(code >= self._nan_code, -x, x)
        else:
            x = self._values(code)
        scale = scale.to(torch.float32)
        x = fill_marked(x, code, scale, self._nan_code, self.block_size)
        x = scaled(x, scale.abs().view(-1, 1), self.block_size)
        return x.mul_(x) if self.domain == "sqrt" else x


# The same on a tile. OPTIONS holds the flags below, the mantissa bits from bit 4 on, the shift that
# makes the lift from bit 8 on, and from bit 12 on the NaN code of marked blocks, which is one above
# the code of the largest magnitude.
SIGNED, PACKED, STOCHASTIC, SATURATE, PAIRED = 1, 2, 4, 8, 1 << 20
_SIGNED, _PACKED = constant(SIGNED), constant(PACKED)
_STOCHASTIC, _SATURATE, _PAIRED = constant(STOCHASTIC), constant(SATURATE), constant(PAIRED)
_ONE, _MANTISSA = constant(ONE), constant(MANTISSA)


@jit
def value_of(field, sign, unit, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Decode magnitudes, as bits of floats in ``field``, and signs, in bit 31 of ``sign``."""
    # field and 2.0 make up the float 2 (z + 1): its exponent field has room for the code's bits
    x = fma(as_float(field | 0x40000000), 0.5 * unit, -unit)
    if OPTIONS & _SIGNED:
        x = as_float(as_bits(x) | (sign & -2147483648))
    return x


@jit
def load(codes, scale, offsets, rows, left, MARKED: tl.constexpr, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load and decode a tile, in the format's domain and units."""
    factor = load_scale(scale, offsets, rows, left)
    unit = spread(tl.abs(factor), offsets)
    nan: tl.constexpr = (OPTIONS >> 12) & 255
    bit: tl.constexpr = 23 - ((OPTIONS >> 4) & 7)
    if OPTIONS & _PACKED:
        field: tl.constexpr = (7 if OPTIONS & _SIGNED else 15) << bit
        low, high = nibbles(load_bytes(codes, offsets, rows, left), bit)
        x = tl.interleave(
            value_of(low & field, low << (28 - bit), unit, OPTIONS),
            value_of(high & field, high << (28 - bit), unit, OPTIONS),
        )
        if MARKED:
            x = nan_where_marked(x, (tl.interleave(low, high) >> bit) & 15, factor, nan)
    else:
        code = tl.load(codes + offsets, mask=offsets < left, other=0)
        word = widened(code)
        magnitude = (word & 127) if OPTIONS & _SIGNED else word
        x = value_of(magnitude << bit, word << 24, unit, OPTIONS)
        if MARKED:
            x = nan_where_marked(x, code, factor, nan)
    return x, as_bits(factor)


@jit
def scales(amax, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``Minifloat._scales`` of each block, from the bits ``amax`` of its largest magnitude."""
    mantissa: tl.constexpr = (OPTIONS >> 4) & 7
    nan: tl.constexpr = (OPTIONS >> 12) & 255
    fraction: tl.constexpr = ((nan - 1) % (1 << mantissa)) / (1 << mantissa)
    largest: tl.constexpr = (1 + fraction) * (1 << ((nan - 1) >> mantissa)) - 1
    if OPTIONS & _SIGNED:
        bits = (as_bits(as_float(amax) * (1.0 / largest)) + 0xFFFF) & -65536
    else:
        # folded by the compiler
        last = as_bits(amax * 0.0 + largest)
        exponent = (last & ~_MANTISSA) - _ONE
        bits = ((amax + (_MANTISSA - (last & _MANTISSA))) & ~_MANTISSA) - exponent
    bits = clamped_scale(bits)
    scale = as_float(bits)
    if OPTIONS & _SIGNED:
        inverse = reciprocal(scale)
    else:
        inverse = as_float(0x7F000000 - bits)
    # a block of zeros is encoded as zeros under any scale
    return tl.where(amax > 0, scale, 0.0), inverse


@jit
def store(codes, scale, x, random, offsets, rows, left, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Encode and store a tile; ``random`` is ``Draw.bits16`` or ``Draw.paired16``."""
    packed: tl.constexpr = (OPTIONS & _PACKED) != 0
    nan: tl.constexpr = (OPTIONS >> 12) & 255
    mantissa: tl.constexpr = (OPTIONS >> 4) & 7
    lift: tl.constexpr = (OPTIONS >> 8) & 15
    amax, tile_amax = finite_amax(x, rows, (OPTIONS & _SIGNED) != 0)
    factor, inverse = scales(amax, OPTIONS)

    magnitude = tl.abs(x) if OPTIONS & _SIGNED else x
    z = as_bits(fma(magnitude, spread(inverse, offsets), 1.0))
    # in units of 2^-16 codes
    position = (z >> (7 - mantissa)) - (_ONE >> (7 - mantissa))
    if lift:
        fraction = position & 0xFFFF
        position = position + ((fraction * (65536 - fraction)) >> (16 + lift))
    if OPTIONS & _PAIRED:
        random = mirrored(random, x)
    if OPTIONS & _STOCHASTIC:
        position = position + random
    else:
        position = position + 0x8000
    if OPTIONS & _SATURATE:
        position = tl.minimum(position, (nan << 16) - 1)
    if OPTIONS & _SIGNED:
        if packed:
            position = position | ((as_bits(x) >> 31) & 0x80000)
        else:
            position = position | ((as_bits(x) >> 31) & 0x800000)
    else:
        position = at_least_if_positive(position, 65536, x)
    store_scale(scale, factor, offsets, rows, left)
    store_codes(codes, position, offsets, rows, left, 4 if packed else 8)
    if tile_amax >= INF_BITS:
        code = (position >> 16) & (15 if packed else 255)
        store_marked(codes, scale, code, factor, x, offsets, rows, left, nan, 4 if packed else 8)
