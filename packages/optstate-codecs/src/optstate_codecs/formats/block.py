"""Marked blocks, and what else device functions of formats with a scale per block share.

Where every code stands for a number, one code can still mean NaN in *marked* blocks: those whose
scale is negative, because one of their elements is not finite. A kernel then compares codes only
where there is such a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optstate_codecs.formats.base import all_on_host, blocked, scaled
from optstate_codecs.triton_lib import (
    INF_BITS,
    MAGNITUDE,
    as_bits,
    as_float,
    constant,
    jit,
    pair_of_nibbles,
    piece_starts,
    row_amax,
    row_max,
    spread,
    third_byte,
    tl,
    widened,
)

__all__ = [
    "SMALLEST",
    "SMALLEST_SCALE",
    "fill_marked",
    "finite_amax",
    "load_bytes",
    "load_codes",
    "load_scale",
    "mark",
    "nan_where_marked",
    "store_codes",
    "store_marked",
    "store_scale",
]

# the least scale of every format that marks: its reciprocal is a normal number
SMALLEST_SCALE = 2.0**-100


def mark(
    code: Tensor, scale: Tensor, x: Tensor, nan_code: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Give the elements of ``x`` that are not finite the code of NaN, and mark their blocks.

    Args:
        code: flat integers; what has ``nan_code`` by chance becomes 0 in a marked block.
        scale: [blocks, 1], at least 0.
        x: what is encoded, flat.
        nan_code: the code of NaN.
        block_size: elements that share a scale.
    """
    finite = torch.isfinite(x)
    if all_on_host(finite):
        return code, scale
    some = blocked((~finite).to(scale.dtype), block_size).amax(1, keepdim=True)
    chance = scaled((code == nan_code).to(scale.dtype), some, block_size)
    code = code.masked_fill(chance > 0, 0).masked_fill(~finite, nan_code)
    return code, torch.where(some > 0, -scale.clamp(min=SMALLEST_SCALE), scale)


def fill_marked(x: Tensor, codes: Tensor, scale: Tensor, nan_code: int, block_size: int) -> Tensor:
    """``x`` with NaN where ``codes`` say so in marked blocks; all flat but ``scale``."""
    marked = (scale < 0).view(-1, 1)
    if all_on_host(~marked):
        return x
    bad = scaled((codes == nan_code).to(x.dtype), marked, block_size)
    return x.masked_fill(bad > 0, float("nan"))


SMALLEST = constant(SMALLEST_SCALE)


@jit
def block_size(offsets, rows):  # type: ignore[no-untyped-def]
    """Elements a row."""
    return offsets.shape[0] * offsets.shape[1] // rows.shape[0]


@jit
def load_scale(scale, offsets, rows, left):  # type: ignore[no-untyped-def]
    """Each row's scale, float32; bfloat16 ones come as 16-bit integers."""
    stored = tl.load(scale + rows, mask=rows * block_size(offsets, rows) < left, other=0)
    if scale.dtype.element_ty == tl.int16:
        return as_float(stored.to(tl.int32) << 16)
    else:
        return stored


@jit
def store_scale(scale, value, offsets, rows, left):  # type: ignore[no-untyped-def]
    """Keep each row's scale; where bfloat16 is stored, it is one that bfloat16 holds."""
    if scale.dtype.element_ty == tl.int16:
        value = (as_bits(value) >> 16).to(tl.int16)
    tl.store(scale + rows, value, mask=rows * block_size(offsets, rows) < left)


@jit
def finite_amax(x, rows, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each row's largest finite magnitude, and the tile's largest magnitude, as bits."""
    top = row_amax(x, rows, SIGNED)
    worst = tl.max(top, axis=0)
    if worst >= INF_BITS:
        finite = tl.abs(x) < float("inf")
        top = row_max(tl.where(finite, as_bits(x) & MAGNITUDE, 0), rows)
    return top, worst


@jit
def group_places(offsets, rows, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers of a tile's groups of GROUP elements, [pieces, elements / GROUP]."""
    length: tl.constexpr = offsets.shape[1] // GROUP
    starts = piece_starts(length, offsets.shape[0], rows.shape[0])
    return starts[:, None] + tl.arange(0, length)[None, :]


@jit
def load_bytes(codes, offsets, rows, left):  # type: ignore[no-untyped-def]
    """The bytes of a tile whose elements share them two by two, uint8 [pieces, elements / 2]."""
    places = group_places(offsets, rows, 2)
    return tl.load(codes + places, mask=places < left - (left >> 1), other=0)


@jit
def _or(a, b):  # type: ignore[no-untyped-def]
    return a | b


@jit
def byte_offsets(places, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where groups of COUNT bytes begin."""
    if COUNT == 1:
        return places
    else:
        # not so, but a thread reads one byte at a time, since addresses have no alignment here, and
        # what this says makes neighbouring threads read neighbouring groups
        return tl.max_contiguous(places * COUNT, [1, places.shape[1]])


@jit
def load_codes(codes, offsets, rows, left, BITS: tl.constexpr, PLACE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes of a tile in bits PLACE on of int32; see ``formats.packing``."""
    if BITS == 8:
        return widened(tl.load(codes + offsets, mask=offsets < left, other=0)) << PLACE
    else:
        group: tl.constexpr = 8 if BITS % 2 == 1 else (4 if BITS % 4 == 2 else 2)
        count: tl.constexpr = group * BITS // 8
        places = group_places(offsets, rows, group)
        mask = places * group < left
        bytes_ = byte_offsets(places, count)
        word = tl.load(codes + bytes_, mask=mask, other=0).to(tl.int32)
        for place in tl.static_range(1, count):
            byte = tl.load(codes + (bytes_ + place), mask=mask, other=0)
            word = word | (byte.to(tl.int32) << (8 * place))
        every = tl.broadcast_to(word[:, :, None], [word.shape[0], word.shape[1], group])
        every = tl.reshape(every, [offsets.shape[0], offsets.shape[1]])
        return ((every >> (offsets % group * BITS)) & ((1 << BITS) - 1)) << PLACE


@jit
def store_codes(codes, word, offsets, rows, left, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keep bits 16 to 16 + BITS - 1 of each int32, as ``formats.packing`` says."""
    if BITS == 8:
        tl.store(codes + offsets, third_byte(word), mask=offsets < left)
    elif BITS == 4:
        half: tl.constexpr = offsets.shape[1] // 2
        low, high = tl.split(tl.reshape(word, [offsets.shape[0], half, 2]))
        places = group_places(offsets, rows, 2)
        tl.store(codes + places, pair_of_nibbles(low, high), mask=places < left - (left >> 1))
    else:
        group: tl.constexpr = 8 if BITS % 2 == 1 else 4
        count: tl.constexpr = group * BITS // 8
        code = tl.where(offsets < left, (word >> 16) & ((1 << BITS) - 1), 0)
        code = code << (offsets % group * BITS)
        places = group_places(offsets, rows, group)
        groups = tl.reduce(tl.reshape(code, [offsets.shape[0], places.shape[1], group]), 2, _or)
        for place in tl.static_range(count):
            byte = (groups >> (8 * place)).to(tl.uint8)
            tl.store(
                codes + (byte_offsets(places, count) + place), byte, mask=places * group < left
            )


@jit
def nan_where_marked(x, code, factor, NAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x`` with NaN where ``code`` says so in marked rows."""
    return tl.where((code == NAN) & (spread(factor, x) < 0.0), float("nan"), x)


@jit
def store_marked(  # type: ignore[no-untyped-def]
    codes, scale, code, factor, x, offsets, rows, left, NAN: tl.constexpr, BITS: tl.constexpr
):
    """Once more, and as ``mark`` does: for tiles that hold something that is not finite.

    A second store, so that the usual codes need not wait in registers for this.
    """
    bad = x - x != 0.0
    some = row_max(bad.to(tl.int32), rows) > 0
    code = tl.where((code == NAN) & (spread(some.to(tl.int32), x) > 0), 0, code.to(tl.int32))
    code = tl.where(bad, NAN, code)
    store_codes(codes, code << 16, offsets, rows, left, BITS)
    factor = tl.where(some, -tl.maximum(factor, SMALLEST), factor)
    store_scale(scale, factor, offsets, rows, left)
