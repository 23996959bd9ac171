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

Each magnitude is rounded to the nearest of these levels times the block's root mean square. The
stored scale is then the least-squares fit of the block to its levels,

    s = sum(|x| L) / sum(L^2),

rounded towards zero to bfloat16. By the Cauchy-Schwarz inequality the norm of s L is at most the
norm of x. A block with a root mean square of zero, or so small that squares underflow, has scale 0.

There is no level for zero. An element that has never had a gradient has a second moment of zero,
which decodes it to zero whatever its code. There is no level for numbers that are not finite
either. They count as zeros. The second moment of such an element is not finite, so that it decodes
to NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from optstate_codecs import exact
from optstate_codecs.formats.block import block_counts, blocked, load_scale, scaled, store_scale
from optstate_codecs.formats.block import block_size as tile_block_size
from optstate_codecs.formats.packing import load_codes, pack, store_codes, unpack
from optstate_codecs.triton_lib import (
    INF_BITS,
    MAGNITUDE,
    as_bits,
    as_float,
    constant,
    jit,
    reciprocal,
    row_sum,
    spread,
    sqrt,
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
LARGEST_SCALE = 2.0**120


def encode(x: Tensor, parts: Sequence[Tensor], bits: int, block_size: int) -> None:
    """Encode flat ``x`` into ``parts``, as ``Format.encode``."""
    codes, scale = parts
    levels = LEVELS[bits]
    x = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    magnitude = x.abs()
    mean_square = _sums(x * x, block_size) * block_counts(x, block_size).reciprocal()
    root = exact.sqrt(mean_square)
    level = torch.full_like(x, levels[0])
    code = torch.signbit(x).to(torch.int32) << (bits - 1)
    for lower, upper in pairwise(levels):
        threshold = scaled(torch.ones_like(x), root * ((lower + upper) / 2), block_size)
        above = magnitude > threshold
        level = level.masked_fill(above, upper)
        code = code + above.to(torch.int32)
    fit = _sums(level * magnitude, block_size) * _sums(level * level, block_size).reciprocal()
    fit = fit.clamp(max=LARGEST_SCALE) * (mean_square > 0).to(x.dtype)
    # towards zero
    fit = (fit.view(torch.int32) & ~0xFFFF).view(torch.float32)
    codes.copy_(pack(code, bits))
    scale.copy_(fit.view(-1))


def _sums(x: Tensor, block_size: int) -> Tensor:
    return exact.row_sums(blocked(x, block_size))


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
# below every sum of squared levels; rows after the tensor's end have sums of zero
_SMALLEST = constant(2.0**-10)
_LARGEST_SCALE, _SIGN = constant(LARGEST_SCALE), constant(-0x80000000)


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
    total = row_sum(x * x, rows)
    # squares of finite numbers may overflow, too
    if tl.max(as_bits(total) & MAGNITUDE, axis=0) >= INF_BITS:
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
        total = row_sum(x * x, rows)
    size: tl.constexpr = tile_block_size(offsets, rows)
    count = tl.minimum(tl.maximum(left - rows * size, 1), size).to(tl.float32)
    mean_square = total * reciprocal(count)
    root = spread(sqrt(mean_square), offsets)
    magnitude = tl.abs(x)
    level = tl.full(x.shape, (packed & 0xFFFFFF) / _FRACTION, tl.float32)
    code = (as_bits(x) >> (32 - bits)) & half
    for index in tl.static_range(1, half):
        lower = ((packed >> (24 * index - 24)) & 0xFFFFFF) / _FRACTION
        upper = ((packed >> (24 * index)) & 0xFFFFFF) / _FRACTION
        above = magnitude > root * ((lower + upper) / 2)
        level = tl.where(above, upper, level)
        code = code + above.to(tl.int32)
    squares = row_sum(tl.where(offsets < left, level * level, 0.0), rows)
    fit = row_sum(level * magnitude, rows) * reciprocal(tl.maximum(squares, _SMALLEST))
    fit = as_float(as_bits(tl.minimum(fit, _LARGEST_SCALE)) & -65536)
    fit = tl.where(mean_square > 0.0, fit, 0.0)
    store_scale(scale, fit, offsets, rows, left)
    store_codes(codes, code << 16, offsets, rows, left, bits)
    return as_float(as_bits(level * spread(fit, offsets)) ^ (as_bits(x) & _SIGN))
