"""The Lloyd-Max quantizer of a normal distribution, in 1 to 4 bits, for ``CoState``.

Layout: ``normal_codes`` uint8, packed as in ``formats.packing``; a code's top bit is the sign, the
bits below are the index of the magnitude's level. ``scale`` bfloat16, one per block.

Mathematics. With b bits there are 2^(b - 1) levels L for magnitudes. They minimize the squared
error of a normal distribution with standard deviation 1 (Max, IRE Trans. Inf. Theory 6, 1960;
Lloyd, IEEE Trans. Inf. Theory 28, 1982):

    bits   levels
    1      .7979
    2      .4528 1.510
    3      .2451 .7560 1.344 2.152
    4      .1284 .3880 .6568 .9423 1.256 1.618 2.069 2.733

Each magnitude is rounded to the nearest of these levels times the standard deviation of a normal
distribution with the block's mean magnitude. The stored scale is then the least-squares fit of the
block to its levels,

    s = sum(|x| L) / sum(L^2),

rounded towards zero to bfloat16. By the Cauchy-Schwarz inequality the norm of s L is at most the
norm of x. Both sums are computed from the sums and counts of the magnitudes above each threshold. A
block whose magnitudes sum to less than 2^-100 has scale 0.

There is no level for zero. An element that has never had a gradient has a second moment of zero,
which decodes it to zero whatever its code. There is no level for numbers that are not finite
either. They count as zeros. The second moment of such an element is not finite, so that it decodes
to NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from optstate_codecs import exact
from optstate_codecs.formats.block import block_size as tile_block_size
from optstate_codecs.formats.block import block_sums, load_scale, scaled, store_scale
from optstate_codecs.formats.packing import load_codes, pack, store_codes, unpack
from optstate_codecs.triton_lib import (
    INF_BITS,
    as_bits,
    as_float,
    constant,
    exceeds,
    jit,
    reciprocal,
    row_sum,
    spread,
    tl,
)

__all__ = ["LEVELS", "decode", "device_options", "encode", "load", "store"]

# multiples of 1 / FRACTION, which float32 represents
FRACTION_BITS = 22
FRACTION = 1 << FRACTION_BITS
LEVELS = {
    bits: tuple(round(level * FRACTION) / FRACTION for level in levels)
    for bits, levels in {
        1: (0.79788456,),
        2: (0.45278003, 1.5104176),
        3: (0.24509418, 0.75600528, 1.3439093, 2.1519457),
        4: (
            0.12839503,
            0.3880483,
            0.65675912,
            0.94234046,
            1.2562312,
            1.6180464,
            2.0690172,
            2.7325896,
        ),
    }.items()
}
LARGEST_SCALE, SMALLEST_SUM = 2.0**120, 2.0**-100
# half the standard deviation of a normal distribution whose mean magnitude is 1
HALF_SIGMA = math.sqrt(math.pi / 8)


def encode(x: Tensor, parts: Sequence[Tensor], bits: int, block_size: int) -> None:
    """Encode flat ``x`` into ``parts``, as ``Format.encode``."""
    codes, scale = parts
    first, *_ = levels = LEVELS[bits]
    x = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    magnitude = x.abs()
    counts = exact.row_counts(x, block_size)
    total = block_sums(magnitude, block_size)
    mean = total * counts.reciprocal()
    product, squares = total * first, counts * (first * first)
    code = torch.signbit(x).to(torch.int32) << (bits - 1)
    for lower, upper in pairwise(levels):
        threshold = mean * ((lower + upper) * HALF_SIGMA)
        above = magnitude > scaled(torch.ones_like(x), threshold, block_size)
        larger = magnitude.masked_fill(~above, 0.0)
        product = product + block_sums(larger, block_size) * (upper - lower)
        count = block_sums(above.to(x.dtype), block_size)
        squares = squares + count * (upper * upper - lower * lower)
        code = code + above.to(torch.int32)
    fit = product * squares.reciprocal()
    fit = fit.clamp(max=LARGEST_SCALE) * (total >= SMALLEST_SUM).to(x.dtype)
    # towards zero
    fit = (fit.view(torch.int32) & ~0xFFFF).view(torch.float32)
    codes.copy_(pack(code, bits))
    scale.copy_(fit.view(-1))


def decode(parts: Sequence[Tensor], bits: int, block_size: int) -> Tensor:
    """Decode ``parts``, as ``Format.decode``."""
    codes, scale = parts
    code = unpack(codes, bits)
    sign = 1 << (bits - 1)
    index = code & (sign - 1)
    x = torch.full_like(code, LEVELS[bits][0], dtype=torch.float32)
    for number, level in enumerate(LEVELS[bits][1:], start=1):
        x = x.masked_fill(index >= number, level)
    x = torch.where(code >= sign, -x, x)
    return scaled(x, scale.to(torch.float32).view(-1, 1), block_size)


def device_options(bits: int) -> int:
    """OPTIONS of the device functions: the bits, and from bit 4 on the levels, 24 bits each."""
    options = bits
    for index, level in enumerate(LEVELS[bits]):
        options += round(level * FRACTION) << (4 + 24 * index)
    return options


_FRACTION = constant(FRACTION)
_LARGEST_SCALE, _SMALLEST_SUM = constant(LARGEST_SCALE), constant(SMALLEST_SUM)
_HALF_SIGMA, _SIGN = constant(HALF_SIGMA), constant(-0x80000000)


@jit
def load(codes, scale, offsets, rows, left, MARKED: tl.constexpr, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load and decode a tile, in update units."""
    bits: tl.constexpr = OPTIONS & 15
    packed: tl.constexpr = OPTIONS >> 4
    half: tl.constexpr = 1 << (bits - 1)
    factor = load_scale(scale, offsets, rows, left)
    unit = spread(factor, offsets)
    field = load_codes(codes, offsets, rows, left, bits, 0)
    # one number for each piece: broadcast here, it would fix another layout for the whole tile
    x = unit * ((packed & 0xFFFFFF) / _FRACTION)
    for index in tl.static_range(1, half):
        level = unit * (((packed >> (24 * index)) & 0xFFFFFF) / _FRACTION)
        x = tl.where((field & (half - 1)) >= index, level, x)
    return as_float(as_bits(x) ^ ((field << (32 - bits)) & _SIGN)), as_bits(factor)


@jit
def store(codes, scale, x, random, offsets, rows, left, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Encode and store a tile, and return it decoded; ``random`` is unused."""
    bits: tl.constexpr = OPTIONS & 15
    packed: tl.constexpr = OPTIONS >> 4
    half: tl.constexpr = 1 << (bits - 1)
    first: tl.constexpr = (packed & 0xFFFFFF) / _FRACTION
    total = row_sum(tl.abs(x), rows)
    # sums of finite numbers may overflow, too
    if tl.max(as_bits(total), axis=0) >= INF_BITS:
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
        total = row_sum(tl.abs(x), rows)
    size: tl.constexpr = tile_block_size(offsets, rows)
    count = tl.minimum(tl.maximum(left - rows * size, 1), size).to(tl.float32)
    mean = total * reciprocal(count)
    product, squares = total * first, count * (first * first)
    code = (as_bits(x) >> (32 - bits)) & half
    for index in tl.static_range(1, half):
        lower = ((packed >> (24 * index - 24)) & 0xFFFFFF) / _FRACTION
        upper = ((packed >> (24 * index)) & 0xFFFFFF) / _FRACTION
        # elements after the tensor's end are zeros, which no threshold is below
        above = exceeds(x, spread(mean * ((lower + upper) * _HALF_SIGMA), offsets))
        product += row_sum(tl.abs(x * above), rows) * (upper - lower)
        squares += row_sum(above, rows) * (upper * upper - lower * lower)
        # the bits of 1.0
        code = code + (as_bits(above) >> 29)
    fit = product * reciprocal(squares)
    fit = as_float(as_bits(tl.minimum(fit, _LARGEST_SCALE)) & -65536)
    fit = tl.where(total >= _SMALLEST_SUM, fit, 0.0)
    store_scale(scale, fit, offsets, rows, left)
    store_codes(codes, code << 16, offsets, rows, left, bits)
    kept = spread(fit * first, offsets)
    for index in tl.static_range(1, half):
        upper = ((packed >> (24 * index)) & 0xFFFFFF) / _FRACTION
        kept = tl.where((code & (half - 1)) >= index, spread(fit * upper, offsets), kept)
    return as_float(as_bits(kept) ^ (as_bits(x) & _SIGN))
