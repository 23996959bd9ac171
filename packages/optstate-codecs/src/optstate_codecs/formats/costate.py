"""CoState: a first moment as its sign and a costate, at 1, 2, 3, 4 or 6 bits.

Layout: ``codes`` uint8, two's complements side by side as ``formats.packing`` says; ``scale``
bfloat16, the step of each block of ``block_size`` consecutive elements (the last may be shorter).

Mathematics. What is stored is u = m / sqrt(v), the number the update is made of, whose elements are
near normal with one spread in a block. Its levels are even steps:

    bits   levels in steps              costates
    1      -1/2 1/2                     phase
    2      -3/2 -1/2 1/2 3/2            phase 1/2, amplitude 3/2
    3      -3 -2 -1 0 1 2 3             null 0, phase 1, amplitude 2 and 3
    4      -7 ... 7                     null 0, phase up to 3, amplitude from 4 on: ``Int4``
    6      -31 ... 31                   null 0, phase up to 15, amplitude from 16 on

With 3 bits and more the highest level is the block's largest magnitude, so that nothing is cut off.
``amp_pct`` chooses smaller steps and cuts off what lies above: of a normal distribution with the
block's mean magnitude, that share of the magnitudes lies below the threshold between phase and
amplitude, which is half way between their levels. Two bits need that: a share of 0.8 is theirs
unless another is given. One bit has no threshold, and its step is twice the block's mean magnitude,
the scale of least squares.

Rounding takes the upper or the lower level with probabilities that make the mean exact, and mirrors
them every other step, so that errors cancel in the running mean. One bit rounds to nearest.
``null_pct`` counts a share of the smallest magnitudes as zero, with no draw.

Everything is decoded from what is stored, second moment included: the gradient has no part in it.
A first moment that is not finite has a second moment that is not; with 3 bits and more, blocks with
such elements have a negative scale, and there the lowest code is NaN.
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
from optstate_codecs.device import (
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
from optstate_codecs.formats.base import DeviceFunctions
from optstate_codecs.formats.block import (
    SCALE_MAX,
    SCALE_MIN,
    BlockFormat,
    block_amax,
    block_size,
    blocked,
    clamped_scale,
    fill_marked,
    finite_amax,
    load_codes,
    load_scale,
    mark,
    nan_where_marked,
    scaled,
    store_codes,
    store_marked,
    store_scale,
)
from optstate_codecs.formats.linear import Int4
from optstate_codecs.formats.packing import pack, unpack
from optstate_codecs.rounding import Draw

__all__ = ["CoState"]

# shares of the mean magnitude are multiples of 1 / FRACTION
FRACTION = 4096


@dataclass(frozen=True)
class CoState(BlockFormat):
    """Signs and costates of a first moment, in update units.

    Args:
        bits: of a code: 1, 2, 3, 4 or 6.
        block_size: elements that share a scale, a power of two from 16 to 8192.
        amp_pct: the share of a normal block's magnitudes below the amplitude costate, above 0 and
            below 1; None with one bit. None is 0.8 with two bits, and with more the share that
            makes the largest magnitude the highest level.
        null_pct: the share of them that counts as zero, from 0 to below 1; 0 with one and two
            bits, which have no null costate.
    """

    name: ClassVar[str] = "costate"
    units: ClassVar[str] = "update"
    scale_dtype: ClassVar[torch.dtype] = torch.bfloat16
    roundings: ClassVar[tuple[str, ...]] = ("nearest", "paired")
    sign_magnitude: ClassVar[bool] = False
    bits: int = 3
    block_size: int = 128
    amp_pct: float | None = None
    null_pct: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("bits", self.bits, (1, 2, 3, 4, 6))
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

    @property
    def rounding(self) -> str:
        return "nearest" if self.bits == 1 else "paired"

    @property
    def device_functions(self) -> DeviceFunctions:
        if self == CoState(4, self.block_size):
            return Int4.first_moment(self.block_size).device_functions
        options = self.bits + (self._width << 4) + (self._least << 24)
        return DeviceFunctions(load, store, options, marks=self._null, returns=True)

    @property
    def _null(self) -> bool:
        """Whether there is a level of zero; if not, levels are halves."""
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
    def _width(self) -> int:
        """The step in units of the block's mean magnitude, times FRACTION; 0: of the largest."""
        if self.bits == 1:
            return 2 * FRACTION
        share = 0.8 if self.amp_pct is None and self.bits == 2 else self.amp_pct
        if share is None:
            return 0
        threshold = self._highest / 2 if self._null else 1.0
        return max(1, round(_quantile(share) * math.sqrt(math.pi / 2) / threshold * FRACTION))

    @property
    def _least(self) -> int:
        """The least magnitude that does not count as zero in units of the mean, times FRACTION."""
        return round(_quantile(self.null_pct) * math.sqrt(math.pi / 2) * FRACTION)

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        codes, scale = parts
        amax, mean = block_amax(x, self.block_size), self._mean(x)
        step = mean * (self._width / FRACTION) if self._width else amax * (1 / self._highest)
        step = ((step.view(torch.int32) + 0xFFFF) & ~0xFFFF).clamp_(SCALE_MIN, SCALE_MAX)
        step, some = step.view(torch.float32), (amax > 0).to(x.dtype)
        value = scaled(x, step.reciprocal() * some, self.block_size)
        if self._least:
            least = scaled(torch.ones_like(x), mean * (self._least / FRACTION), self.block_size)
            value = value.masked_fill_(x.abs() < least, 0)
        half = self._half
        value = value.clamp_(self._lowest + half, self._highest + half)
        # the low half of these floats' bits is a fraction, which what is added rounds away
        position = value.add_(192 - half).view(torch.int32) + self.rounding_bits(x, draw)
        code = (position >> 16) & ((1 << self.bits) - 1)
        step = step * some
        if self._null:
            code, step = mark(code, step, x, 1 << self.bits - 1, self.block_size)
        codes.copy_(pack(code, self.bits))
        scale.copy_(step.view(-1))

    def _mean(self, x: Tensor) -> Tensor:
        """Each block's mean magnitude, without what is not finite; [blocks, 1]."""
        finite = blocked(torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0), self.block_size)
        counts = torch.full_like(finite[:, :1], min(self.block_size, x.numel()))
        if tail := x.numel() % self.block_size:
            counts[-1] = tail
        return exact.row_sums(finite.abs()) / counts

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        code = unpack(codes, self.bits)
        sign = 1 << self.bits - 1
        x = ((code ^ sign) - sign).to(torch.float32) + self._half
        scale = scale.to(torch.float32)
        if self._null:
            x = fill_marked(x, code, scale, sign, self.block_size)
        return scaled(x, scale.abs().view(-1, 1), self.block_size)


def _quantile(share: float) -> float:
    """Below which magnitude a share of a standard normal distribution lies."""
    return NormalDist().inv_cdf((1 + share) / 2)


# The same on a tile. OPTIONS: the bits; from bit 4 on the step in units of the mean, 20 bits, and
# from bit 24 on what is the least not to count as zero, both times FRACTION.
_FRACTION = constant(FRACTION)


@jit
def load(codes, scale, offsets, rows, left, MARKED: tl.constexpr, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Decode a tile, in update units."""
    bits: tl.constexpr = OPTIONS & 15
    sign: tl.constexpr = 1 << (bits - 1)
    # above 192, without an integer conversion: the two's complement, its sign flipped
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
    """Encode a tile; ``random`` is what ``Draw.paired16`` gives. Returns it decoded."""
    bits: tl.constexpr = OPTIONS & 15
    width: tl.constexpr = ((OPTIONS >> 4) & 0xFFFFF) / _FRACTION
    least: tl.constexpr = (OPTIONS >> 24) / _FRACTION
    highest: tl.constexpr = (1 << (bits - 1)) - 1
    half: tl.constexpr = 0.0 if bits > 2 else 0.5
    lowest: tl.constexpr = -highest if bits > 2 else -highest - 1
    top, worst = finite_amax(x, rows, True)
    step = as_float(top) * (1.0 / highest) if highest > 0 else as_float(top)
    if width > 0 or least > 0:
        total = row_sum(tl.abs(x), rows)
        if worst >= INF_BITS:
            total = row_sum(tl.where(tl.abs(x) < float("inf"), tl.abs(x), 0.0), rows)
        size: tl.constexpr = block_size(offsets, rows)
        count = tl.minimum(tl.maximum(left - rows * size, 1), size).to(tl.float32)
        mean = total * reciprocal(count)
        if width > 0:
            step = mean * width
    scale_bits = clamped_scale((as_bits(step) + 0xFFFF) & -65536)
    factor = tl.where(top > 0, as_float(scale_bits), 0.0)
    # of zeros, any scale makes zeros
    inverse = spread(reciprocal(as_float(scale_bits)), offsets)
    if width > 0:
        value = tl.minimum(tl.maximum(x * inverse, lowest + half), highest + half) + (192.0 - half)
    else:
        value = fma(x, inverse, 192.0 - half)
    if least > 0:
        value = tl.where(tl.abs(x) < spread(mean * least, offsets), 192.0, value)
    position = as_bits(value) + (0x8000 if bits == 1 else random)
    store_scale(scale, factor, offsets, rows, left)
    store_codes(codes, position, offsets, rows, left, bits)
    if bits > 2:  # noqa: SIM102 - the inner condition is a device value
        if worst >= INF_BITS:
            code = (position >> 16) & ((1 << bits) - 1)
            nan: tl.constexpr = 1 << (bits - 1)
            store_marked(codes, scale, code, factor, x, offsets, rows, left, nan, bits)
    return (as_float(position & -65536) - (192.0 - half)) * spread(factor, offsets)
