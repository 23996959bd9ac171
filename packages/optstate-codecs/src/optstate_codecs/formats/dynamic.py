"""dynamic8: the 8-bit dynamic exponent map (Dettmers et al., arXiv:2110.02861, 1.3 and 2.1).

Seven ranges below the block's scale, each ``base`` times the one below, are divided into 1, 2, 4,
... 64 linear steps (twice as many when unsigned), so that the largest elements have the finest
relative steps. The paper's ranges are decades, base 10. The default here is base 8, which binary
arithmetic computes without a table at no loss of accuracy (see the docs on formats).

Layout: ``codes`` uint8, one per element, shaped like the parameter; ``scale`` float32, one per
block of ``block_size`` consecutive elements (the last block may be shorter).

Mathematics. Let b be the base and k = 0 (signed) or 1 (unsigned). A position t in
[2^(d+k), 2^(d+k+1)] of range d = 0..6 stands for the magnitude

    z = b^(d-7) * ((b - 1) t / 2^(d+k) - (b - 2)) - b^-7.

Neighbouring ranges share a point, the first point is 0, and the last is 1 - b^-7. As a function
of z, t is concave and piecewise linear,

    t = 2^k * min over d of ((2/b)^d (b^7 z + 1) + 2^d (b - 2)) / (b - 1),

so that nearest rounding is floor(t + 1/2) and stochastic rounding is floor(t + u), with u uniform
in [0, 1), without a search. t is in units of 2^-16, and u has 16 bits. The code is t - 2^k:

    signed    bit 7 is the sign, 0 is zero, 1..127 are t = 2..128
    unsigned  0 is zero, 1..254 are t = 3..256; a positive number never becomes 0

In marked blocks, whose scale is negative, codes 128 (signed: minus zero) and 255 (unsigned) are
NaN; these codes are unused otherwise.

A scale is the smallest power of two that covers the block's largest finite magnitude. It changes
only when that magnitude crosses a power of two, so that stored values are rarely rounded again;
scaling by it is exact, and multiplying gradients by 2^k gives the same codes.

With ``domain="sqrt"`` the root of the moment is stored. The update divides by the root, and seven
ranges of the root are fourteen ranges of the second moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optstate_codecs import exact
from optstate_codecs.formats.base import DeviceFunctions, rounded
from optstate_codecs.formats.block import (
    SCALE_MIN,
    BlockFormat,
    block_amax,
    blocked,
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
from optstate_codecs.rounding import Draw
from optstate_codecs.tables import cached_table
from optstate_codecs.triton_lib import (
    INF_BITS,
    as_bits,
    as_float,
    at_least_if_positive,
    byte_float,
    constant,
    fma,
    jit,
    spread,
    third_byte,
    third_byte_signed,
    tl,
    widened,
)

__all__ = ["Dynamic8"]

SIGNED_NAN = 128
UNSIGNED_NAN = 255
RANGES = 7
BASES = (8, 10)
HALF = 1 << 15
# as float32 bits, the last point, 1 - 8^-7, and the largest scale, 2^126
LARGEST, SCALE_MAX = 0x3F7FFFF8, (127 + 126) << 23
# rounds a float's bits up to the next power of two, unless it is within the last point
COVER = 0x800007


@dataclass(frozen=True)
class Dynamic8(BlockFormat):
    """8-bit dynamic exponent codes with a power-of-two scale per block.

    Rounding to nearest errs by at most 0.7 % of the scale when signed and half of that when
    unsigned. In each lower range the error is smaller, and the relative error larger.

    Args:
        block_size: elements that share a scale, a power of two from 16 to 8192.
        signed: True for first moments, False for second moments.
        base: ratio of neighbouring ranges, 8, or 10 as in the paper.
        domain: "linear" stores the moment, "sqrt" (unsigned only) its root.
        rounding: "nearest", or "stochastic", which is unbiased in the domain.
        units: "value" stores the moment; "update" (signed only) stores m / sqrt(v).
    """

    name: ClassVar[str] = "dynamic8"
    block_size: int = 2048
    signed: bool = True
    base: int = 8
    domain: str = "linear"
    rounding: str = "nearest"
    units: str = "value"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base not in BASES:
            raise ValueError(f"base={self.base!r}: must be 8 or 10")

    @classmethod
    def first_moment(cls, block_size: int = 2048) -> Dynamic8:
        """The variant for first moments: in update units, rounded stochastically."""
        return cls(block_size, rounding="stochastic", units="update")

    @classmethod
    def second_moment(cls, block_size: int = 2048) -> Dynamic8:
        """The variant for second moments: unsigned roots, rounded stochastically."""
        return cls(block_size, signed=False, domain="sqrt", rounding="stochastic")

    @property
    def device_functions(self) -> DeviceFunctions | None:
        # values may exceed the largest scale, roots and update units do not
        saturate = self.domain == "linear" and self.units == "value"
        options = (
            self.signed * SIGNED
            + (self.rounding == "stochastic") * STOCHASTIC
            + saturate * SATURATE
        )
        return DeviceFunctions(load, store, options, marks=True) if self.base == 8 else None

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        codes, scale = parts
        if self.domain == "sqrt":
            x = exact.sqrt(x)
        block_scale, inverse = power_of_two_scale(
            block_amax(x, self.block_size), LARGEST, SCALE_MAX
        )
        unit = inverse * float(self.base) ** RANGES
        if self._is_recorded:
            # the unit is a power of two, so that the product is exact
            magnitude = torch.addcmul(
                torch.ones_like(unit), blocked(x.abs(), self.block_size), unit
            )
            position = computed_position(magnitude.view(-1)[: x.numel()])
        else:
            magnitude = scaled(x, unit, self.block_size).abs_().add_(1)
            position = position_of(magnitude, self.base)
        position = position.clamp_(max=128)
        bits = self.rounding_bits(x, draw)
        # after this addition, the low bits of the float are t in units of 2^-16 (2^-15)
        if self.signed:
            fixed = position.add_(127).view(torch.int32)
            code = (fixed + bits >> 16).bitwise_and_(127)
            code.add_(torch.signbit(x), alpha=128)
        else:
            lowest = (x > 0).to(x.dtype).add_(2)
            fixed = torch.maximum(position.mul_(2), lowest).add_(254).view(torch.int32)
            code = (fixed * 2 + bits >> 16).bitwise_and_(255)
        code, block_scale = mark(code, block_scale, x, self._nan_code, self.block_size)
        codes.copy_(code)
        scale.copy_(block_scale.view(-1))

    @property
    def _is_recorded(self) -> bool:
        """Whether operations are traced for a kernel that computes this map from short tables."""
        return (
            self.base == 8 and bool(exact.recorded.get()) and exact.rounds_once("addcmul") is True
        )

    @property
    def _nan_code(self) -> int:
        return SIGNED_NAN if self.signed else UNSIGNED_NAN

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        if self._is_recorded:
            x = values_of(codes.to(torch.int32), self.signed)
        else:
            values = value_table(self.signed, self.base, codes.device)
            x = values.index_select(0, codes.to(torch.int32))
        x = fill_marked(x, codes, scale, self._nan_code, self.block_size)
        x = scaled(x, scale.abs().view(-1, 1), self.block_size)
        return x.mul_(x) if self.domain == "sqrt" else x


def lines(base: int) -> list[tuple[float, float]]:
    """Slope and offset of t as a function of b^7 z + 1 in each range, signed."""
    return [((2 / base) ** d / (base - 1), 2**d * (base - 2) / (base - 1)) for d in range(RANGES)]


def position_of(magnitude: Tensor, base: int) -> Tensor:
    """The signed map's position t for ``magnitude`` = b^7 z + 1; a new tensor."""
    (slope, offset), *rest = lines(base)
    # rounded once, as the kernels' fused multiply-add is
    position = exact.multiply_add(magnitude, slope, offset)
    line = torch.empty_like(magnitude)
    for slope, offset in rest:
        exact.multiply_add(magnitude, slope, offset, out=line)
        torch.minimum(position, line, out=position)
    return position


@cached_table()
def value_table(signed: bool, base: int, device: torch.device) -> Tensor:
    """The values of the 256 codes under a scale of 1, float32."""
    unit = rounded(float(base) ** -RANGES)
    magnitudes = []
    for t in range(1, 129) if signed else range(2, 257):
        top = t if signed else t / 2
        d = int(top).bit_length() - 1
        # below 2^24, in halves when unsigned; the product of two float32 numbers is exact in
        # float64, so that only the table rounds it
        whole = (base / 2) ** d * ((base - 1) * top - (base - 2) * 2**d) - 1
        magnitudes.append(rounded(whole) * unit)
    values = [*magnitudes, *(-m for m in magnitudes)] if signed else [*magnitudes, 0.0]
    return torch.tensor(values, dtype=torch.float32, device=device)


def computed_position(magnitude: Tensor) -> Tensor:
    """``position_of`` for base 8, in the form that is cheapest in compiled loops.

    A range is three binades, so that a float's exponent selects its line.
    """
    # by the low five bits of the exponent field: 31 is 2^0, 0 is 2^1, and so on
    exponents = [(field + 1) % 32 // 3 for field in range(32)]
    chosen = [lines(8)[min(d, RANGES - 1)] for d in exponents]
    field = magnitude.view(torch.int32) >> 23 & 31
    slope, offset = (_chosen(column, field) for column in zip(*chosen, strict=True))
    return torch.addcmul(offset, magnitude, slope)


def values_of(codes: Tensor, signed: bool) -> Tensor:
    """Compute the values of ``value_table`` for base 8, in the form cheapest in compiled loops.

    All numbers here have at most 24 bits, so that nothing is rounded.
    """
    t = (codes.bitwise_and(127) + 1 if signed else codes + 2).to(torch.float32)
    # by the low bits of the exponent field of t, which is 128 or 256 at most
    first = 127 if signed else 128
    ranges = [min((field - first) % 16, RANGES - 1) for field in range(16)]
    steps = [(0.5 ** (not signed) * 7 * 4.0**d, -6 * 8.0**d - 1) for d in ranges]
    unit = 8.0**-RANGES
    field = t.view(torch.int32) >> 23 & 15
    factor, offset = (_chosen([unit * x for x in c], field) for c in zip(*steps, strict=True))
    x = torch.addcmul(offset, t, factor)
    if signed:
        x = (x.view(torch.int32) | (codes >> 7 << 31)).view(torch.float32)
    return x


def _chosen(numbers: Sequence[float], index: Tensor) -> Tensor:
    table = torch.tensor(numbers, dtype=torch.float32, device=index.device)
    return table.index_select(0, index)


# The same on a tile, base 8 only: a range is three binades, so that its number and its two powers
# follow from the exponent of the float.
SIGNED, STOCHASTIC, SATURATE = 1, 2, 4
_SIGNED, _STOCHASTIC, _SATURATE = constant(SIGNED), constant(STOCHASTIC), constant(SATURATE)
_SCALE_MIN, _SCALE_MAX = constant(SCALE_MIN), constant(SCALE_MAX)
_SIGNED_NAN, _UNSIGNED_NAN = constant(SIGNED_NAN), constant(UNSIGNED_NAN)
_COVER, _HALF = constant(COVER), constant(HALF)


@jit
def decode_tile(code, t, unit, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of ``code`` from the bits of 2 t (signed) or t; ``unit`` is the scale times 8^-7."""
    range_bits = t & 0x03800000
    x = as_float(as_bits(fma(as_float(t - range_bits), 3.5, -6.0)) + 3 * range_bits)
    x = fma(x, unit, -unit)
    if OPTIONS & _SIGNED:
        x = as_float(as_bits(x) | ((code << 24) & -2147483648))
    return x


@jit
def load(codes, scale, offsets, rows, left, MARKED: tl.constexpr, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load and decode a tile, in the format's domain and units."""
    code = tl.load(codes + offsets, mask=offsets < left, other=0)
    factor = load_scale(scale, offsets, rows, left)
    unit = tl.abs(factor) * 4.76837158203125e-07
    # 2 t (signed) or t (unsigned) as floats, whose exponents end in the three bits of d
    if offsets.shape[0] == 1:
        # one scale: decoding all 256 codes once and looking values up takes a third of the work
        all_codes = tl.arange(0, 256)
        if OPTIONS & _SIGNED:
            t = as_bits(fma(as_float(all_codes & 127 | 0x4B000000), 2.0, -16777214.0))
        else:
            t = as_bits(as_float(all_codes | 0x4B000000) - 8388606.0)
        table = decode_tile(all_codes, t, tl.sum(unit, axis=0), OPTIONS)
        x = tl.gather(table, tl.reshape(widened(code), offsets.shape[1]), 0)[None, :]
    else:
        if OPTIONS & _SIGNED:
            t = as_bits(fma(byte_float(code & 127), 2.0, -16777214.0))
        else:
            t = as_bits(byte_float(code) - 8388606.0)
        x = decode_tile(code.to(tl.int32), t, spread(unit, offsets), OPTIONS)
    nan: tl.constexpr = _SIGNED_NAN if OPTIONS & _SIGNED else _UNSIGNED_NAN
    if MARKED:
        x = nan_where_marked(x, code, factor, nan)
    return x, as_bits(factor)


@jit
def store(codes, scale, x, random, offsets, rows, left, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Encode and store a tile; ``random`` is ``Draw.bits16``."""
    amax, tile_amax = finite_amax(x, rows, (OPTIONS & _SIGNED) != 0)
    scale_bits = (amax + _COVER) & 0x7F800000
    scale_bits = tl.minimum(tl.maximum(scale_bits, _SCALE_MIN), _SCALE_MAX)
    factor = tl.where(amax > 0, as_float(scale_bits), 0.0)
    inverse = tl.where(amax > 0, as_float(0x7F000000 - scale_bits), 0.0)

    # z + 8^-7 in units of 2^-17 * 8^-7, at least 2^17: a range is three binades, and a third of
    # the bits of a float with exponent 144 + e has the exponent 48 + e // 3
    magnitude = tl.abs(x) if OPTIONS & _SIGNED else x
    z = as_bits(fma(magnitude, spread(inverse * 274877906944.0, offsets), 131072.0))
    range_bits = tl.umulhi(z, 0x55555556) & 0x03800000
    r = as_float(z - range_bits * 3)
    if not (OPTIONS & _STOCHASTIC):
        random = _HALF
    if OPTIONS & _SIGNED:
        t = as_float(as_bits(fma(r, 1.0 / 917504.0, 6.0 / 7.0)) + range_bits)
        if OPTIONS & _SATURATE:
            t = tl.minimum(t, 128.0)
        code = third_byte_signed(as_bits(t + 127.0) + random, x)
    else:
        t = as_float(as_bits(fma(r, 2.0 / 917504.0, 12.0 / 7.0)) + range_bits)
        if OPTIONS & _SATURATE:
            t = tl.minimum(t, 256.0)
        t = at_least_if_positive(t, 3.0, x)
        code = third_byte(as_bits(t + 254.0) * 2 + random)
    store_scale(scale, factor, offsets, rows, left)
    tl.store(codes + offsets, code, mask=offsets < left)
    if tile_amax >= INF_BITS:
        nan: tl.constexpr = _SIGNED_NAN if OPTIONS & _SIGNED else _UNSIGNED_NAN
        store_marked(codes, scale, code, factor, x, offsets, rows, left, nan, 8)
