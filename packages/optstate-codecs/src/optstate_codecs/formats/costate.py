"""costate: a first moment as its sign and a costate, in 1, 2, 3, 4 or 6 bits.

Layout: ``codes`` uint8, two's complements packed as in ``formats.packing``; ``scale`` bfloat16, one
per block of ``block_size`` consecutive elements (the last block may be shorter).

Mathematics. The stored number is u = m / sqrt(v), from which the update is computed. Its elements
are close to normal, with one spread per block. Its levels are evenly spaced by the scale:

    bits   levels over scale            costates
    1      -1/2 1/2                     phase
    2      -3/2 -1/2 1/2 3/2            phase 1/2, amplitude 3/2
    3      -3 -2 -1 0 1 2 3             null 0, phase 1, amplitude 2 and 3
    4      -7 ... 7                     null 0, phase up to 3, amplitude from 4 on: ``Int4``
    6      -31 ... 31                   null 0, phase up to 15, amplitude from 16 on

With 3 bits and more the highest level is the block's largest magnitude, so that nothing is
clipped. ``amp_pct`` chooses a smaller scale and clips larger magnitudes: of a normal distribution
with the block's mean magnitude, that share of the magnitudes lies below the threshold between phase
and amplitude, which is halfway between their levels. With 2 bits a share is required, 0.8 by
default. With 1 bit there is no threshold, and the scale is twice the block's mean magnitude, which
minimizes the squared error.

Rounding is stochastic and unbiased, with random numbers mirrored every other step ("paired"), so
that errors cancel in the running mean. With 1 bit it is to nearest. ``null_pct`` encodes a share of
the smallest magnitudes as zero, without random numbers.

With ``levels="normal"``, 1 to 4 bits are the Lloyd-Max quantizer of a normal distribution instead:
rounding is to nearest, and the scale is the least-squares fit (``formats.normal_levels``). Its
error is the smallest, but not zero in the mean, so it needs a rule with error feedback.

Decoding uses stored state only, that is codes, scales and the second moment, and not the gradient.
A first moment that is not finite has a second moment that is not finite. With 3 bits and more,
blocks with such elements are marked by a negative scale, and the lowest code is NaN in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks, exact
from optstate_codecs.formats import normal_levels
from optstate_codecs.formats.base import DeviceFunctions
from optstate_codecs.formats.block import (
    SCALE_MAX,
    SCALE_MIN,
    BlockFormat,
    block_amax,
    block_size,
    block_sums,
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
from optstate_codecs.formats.linear import Int4
from optstate_codecs.formats.packing import load_codes, pack, store_codes, unpack
from optstate_codecs.rounding import Draw
from optstate_codecs.triton_lib import (
    INF_BITS,
    as_bits,
    as_float,
    constant,
    fma,
    jit,
    reciprocal,
    row_sum,
    spread,
    tl,
)

__all__ = ["CoState"]

# multiples of the mean magnitude are rounded to 1 / FRACTION
FRACTION = 4096


@dataclass(frozen=True)
class CoState(BlockFormat):
    """Signs and costates of a first moment in update units.

    Args:
        bits: per code: 1, 2, 3, 4 or 6.
        block_size: elements that share a scale, a power of two from 16 to 8192.
        amp_pct: the share of a normal block's magnitudes below the amplitude costate, above 0 and
            below 1. None means 0.8 with 2 bits; with more bits, the largest magnitude becomes the
            highest level. Must be None with 1 bit.
        null_pct: the share of a normal block's magnitudes that is encoded as zero, from 0 to
            below 1. Must be 0 with 1 and 2 bits, which have no null costate.
        levels: "even": evenly spaced, with stochastic rounding. "normal": the levels of smallest
            squared error for a normal distribution, with rounding to nearest; 1 to 4 bits, and
            without ``amp_pct`` and ``null_pct``.
    """

    name: ClassVar[str] = "costate"
    units: ClassVar[str] = "update"
    scale_dtype: ClassVar[torch.dtype] = torch.bfloat16
    sign_magnitude: ClassVar[bool] = False
    bits: int = 3
    block_size: int = 128
    amp_pct: float | None = None
    null_pct: float = 0.0
    levels: str = "even"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("bits", self.bits, (1, 2, 3, 4, 6))
        checks.one_of("levels", self.levels, ("even", "normal"))
        if self.levels == "normal":
            self._check_normal()
        if self.amp_pct is not None:
            checks.unit_interval("amp_pct", self.amp_pct)
            if not 0 < self.amp_pct < 1:
                raise ValueError(f"amp_pct={self.amp_pct!r}: must be None, or above 0 and below 1")
            if self.bits == 1:
                raise ValueError(
                    f"amp_pct={self.amp_pct!r}: must be None with bits=1, which have one costate"
                )
        checks.unit_interval("null_pct", self.null_pct)
        if self.null_pct and not self._null:
            raise ValueError(
                f"null_pct={self.null_pct!r}: must be 0 with bits={self.bits}, which have no code "
                "for the null costate"
            )

    def _check_normal(self) -> None:
        if self.bits not in normal_levels.LEVELS:
            raise ValueError(f"levels='normal': must be 'even' with bits={self.bits}")
        for name, value, neutral in (
            ("amp_pct", self.amp_pct, None),
            ("null_pct", self.null_pct, 0.0),
        ):
            if value != neutral:
                raise ValueError(
                    f"{name}={value!r}: must be {neutral!r} with levels='normal', whose levels are "
                    "fixed"
                )

    @property
    def rounding(self) -> str:
        return "nearest" if self.bits == 1 or self.levels == "normal" else "paired"

    @property
    def codes_suffix(self) -> str:
        # another name, so that state stored without its format is not read as other levels
        return "normal_codes" if self.levels == "normal" else "codes"

    @property
    def device_functions(self) -> DeviceFunctions:
        if self.levels == "normal":
            options = normal_levels.device_options(self.bits)
            return DeviceFunctions(normal_levels.load, normal_levels.store, options, returns=True)
        if self == CoState(4, self.block_size):
            return Int4.first_moment(self.block_size).device_functions
        options = self.bits + (self._scale_per_mean << 4) + (self._null_below << 24)
        return DeviceFunctions(load, store, options, marks=self._null, returns=True)

    @property
    def _null(self) -> bool:
        """Whether zero is a level; otherwise levels are odd multiples of 1/2."""
        return self.bits > 2

    @property
    def _half(self) -> float:
        return 0.0 if self._null else 0.5

    @property
    def _highest(self) -> int:
        return (1 << self.bits - 1) - 1

    @property
    def _lowest(self) -> int:
        return -self._highest if self._null else -self._highest - 1

    @property
    def _scale_per_mean(self) -> int:
        """FRACTION times scale over mean magnitude; 0 where the scale follows the largest."""
        if self.bits == 1:
            return 2 * FRACTION
        share = 0.8 if self.amp_pct is None and self.bits == 2 else self.amp_pct
        if share is None:
            return 0
        threshold = self._highest / 2 if self._null else 1.0
        return max(1, round(_quantile(share) * math.sqrt(math.pi / 2) / threshold * FRACTION))

    @property
    def _null_below(self) -> int:
        """FRACTION times the magnitude, over the mean, below which elements become zero."""
        return round(_quantile(self.null_pct) * math.sqrt(math.pi / 2) * FRACTION)

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        if self.levels == "normal":
            normal_levels.encode(x, parts, self.bits, self.block_size)
            return
        codes, scale = parts
        amax, mean = block_amax(x, self.block_size), self._mean(x)
        if share := self._scale_per_mean:
            block_scale = mean * (share / FRACTION)
        else:
            block_scale = amax * (1 / self._highest)
        bits = (block_scale.view(torch.int32) + 0xFFFF) & ~0xFFFF
        block_scale = bits.clamp_(SCALE_MIN, SCALE_MAX).view(torch.float32)
        nonzero = (amax > 0).to(x.dtype)
        value = scaled(x, block_scale.reciprocal() * nonzero, self.block_size)
        if share := self._null_below:
            least = scaled(torch.ones_like(x), mean * (share / FRACTION), self.block_size)
            value = value.masked_fill_(x.abs() < least, 0)
        half = self._half
        value = value.clamp_(self._lowest + half, self._highest + half)
        # the low 16 bits of these floats are the fraction to round
        position = value.add_(192 - half).view(torch.int32) + self.rounding_bits(x, draw)
        code = (position >> 16) & ((1 << self.bits) - 1)
        block_scale = block_scale * nonzero
        if self._null:
            code, block_scale = mark(code, block_scale, x, 1 << self.bits - 1, self.block_size)
        codes.copy_(pack(code, self.bits))
        scale.copy_(block_scale.view(-1))

    def _mean(self, x: Tensor) -> Tensor:
        """Each block's mean magnitude, [blocks, 1]; elements that are not finite count as 0."""
        finite = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
        return block_sums(finite.abs_(), self.block_size) / exact.row_counts(x, self.block_size)

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        if self.levels == "normal":
            return normal_levels.decode(parts, self.bits, self.block_size)
        codes, scale = parts
        code = unpack(codes, self.bits)
        sign = 1 << self.bits - 1
        x = ((code ^ sign) - sign).to(torch.float32) + self._half
        scale = scale.to(torch.float32)
        if self._null:
            x = fill_marked(x, code, scale, sign, self.block_size)
        return scaled(x, scale.abs().view(-1, 1), self.block_size)


def _quantile(share: float) -> float:
    """The magnitude below which ``share`` of a standard normal distribution lies."""
    return NormalDist().inv_cdf((1 + share) / 2)


# The same on a tile. OPTIONS holds the bits, ``_scale_per_mean`` from bit 4 on (20 bits), and
# ``_null_below`` from bit 24 on.
_FRACTION = constant(FRACTION)


@jit
def load(codes, scale, offsets, rows, left, MARKED: tl.constexpr, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load and decode a tile, in update units."""
    bits: tl.constexpr = OPTIONS & 15
    sign: tl.constexpr = 1 << (bits - 1)
    # the code with its sign bit flipped is read as a float above 192, without a conversion
    base: tl.constexpr = 192.0 + sign - (0.0 if bits > 2 else 0.5)
    factor = load_scale(scale, offsets, rows, left)
    unit = spread(tl.abs(factor), offsets)
    field = load_codes(codes, offsets, rows, left, bits, 16)
    x = fma(as_float(field ^ (0x43400000 | (sign << 16))), unit, -base * unit)
    if MARKED and bits > 2:
        x = nan_where_marked(x, field >> 16, factor, sign)
    return x, as_bits(factor)


@jit
def store(codes, scale, x, random, offsets, rows, left, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Encode and store a tile, and return it decoded; ``random`` is ``Draw.paired16``."""
    bits: tl.constexpr = OPTIONS & 15
    scale_per_mean: tl.constexpr = ((OPTIONS >> 4) & 0xFFFFF) / _FRACTION
    null_below: tl.constexpr = (OPTIONS >> 24) / _FRACTION
    highest: tl.constexpr = (1 << (bits - 1)) - 1
    half: tl.constexpr = 0.0 if bits > 2 else 0.5
    lowest: tl.constexpr = -highest if bits > 2 else -highest - 1
    amax, tile_amax = finite_amax(x, rows, True)
    block_scale = as_float(amax) * (1.0 / highest) if highest > 0 else as_float(amax)
    if scale_per_mean > 0 or null_below > 0:
        total = row_sum(tl.abs(x), rows)
        if tile_amax >= INF_BITS:
            total = row_sum(tl.where(tl.abs(x) < float("inf"), tl.abs(x), 0.0), rows)
        size: tl.constexpr = block_size(offsets, rows)
        count = tl.minimum(tl.maximum(left - rows * size, 1), size).to(tl.float32)
        mean = total * reciprocal(count)
        if scale_per_mean > 0:
            block_scale = mean * scale_per_mean
    scale_bits = clamped_scale((as_bits(block_scale) + 0xFFFF) & -65536)
    factor = tl.where(amax > 0, as_float(scale_bits), 0.0)
    # a block of zeros is encoded as zeros under any scale
    inverse = spread(reciprocal(as_float(scale_bits)), offsets)
    if scale_per_mean > 0:
        value = tl.minimum(tl.maximum(x * inverse, lowest + half), highest + half) + (192.0 - half)
    else:
        value = fma(x, inverse, 192.0 - half)
    if null_below > 0:
        value = tl.where(tl.abs(x) < spread(mean * null_below, offsets), 192.0, value)
    position = as_bits(value) + (0x8000 if bits == 1 else random)
    store_scale(scale, factor, offsets, rows, left)
    store_codes(codes, position, offsets, rows, left, bits)
    if bits > 2:  # noqa: SIM102 - the inner condition is a device value
        if tile_amax >= INF_BITS:
            code = (position >> 16) & ((1 << bits) - 1)
            nan: tl.constexpr = 1 << (bits - 1)
            store_marked(codes, scale, code, factor, x, offsets, rows, left, nan, bits)
    return (as_float(position & -65536) - (192.0 - half)) * spread(factor, offsets)
