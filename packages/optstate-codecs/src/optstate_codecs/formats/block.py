"""Formats with one scale for each block of elements, and the functions that they share.

``BlockFormat`` declares their components and options. Functions in torch find scales and mark
blocks; device functions load and store scales and packed codes.

A *marked* block holds an element that is not finite, and has a negative scale. Where all codes of a
format stand for numbers, one of them means NaN in marked blocks, and only there, so that kernels
look for that code in marked blocks only.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.device import (
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
from optstate_codecs.formats.base import Component, Format
from optstate_codecs.formats.packing import group
from optstate_codecs.rounding import Draw

__all__ = [
    "SCALE_MAX",
    "SCALE_MIN",
    "SMALLEST",
    "SMALLEST_SCALE",
    "BlockFormat",
    "all_on_host",
    "block_amax",
    "block_size",
    "blocked",
    "clamped_scale",
    "fill_marked",
    "finite_amax",
    "load_bytes",
    "load_codes",
    "load_scale",
    "mark",
    "nan_where_marked",
    "power_of_two_scale",
    "scaled",
    "store_codes",
    "store_marked",
    "store_scale",
]

# scales of a block that is not all zero: their reciprocals are normal numbers
SMALLEST_SCALE = 2.0**-100
# as float32 bits, the smallest scale and, for most formats, the largest: 2^120
SCALE_MIN, SCALE_MAX = (127 - 100) << 23, (127 + 120) << 23
MANTISSA = 0x7FFFFF


class BlockFormat(Format):
    """Codes, and one scale for each block of consecutive elements (the last may be shorter).

    Components: ``codes``, one per element and shaped like the parameter, or packed into bytes as
    ``formats.packing`` says where a code has fewer than 8 bits; and ``scale``, one per block.

    A subclass is a frozen dataclass. The options that it offers are fields, which stand in place of
    the properties here; the other properties keep the value that they have here.
    """

    #: elements that share a scale, a power of two from 16 to 8192
    block_size: int
    code_dtype: ClassVar[torch.dtype] = torch.uint8
    #: the values that ``rounding`` may have
    roundings: ClassVar[tuple[str, ...]] = ("nearest", "stochastic")
    #: whether codes are a sign and a magnitude, and not two's complements
    sign_magnitude: ClassVar[bool] = True

    @property
    def bits(self) -> int:
        """Bits of a code where ``code_dtype`` is uint8."""
        return 8

    @property
    def scale_dtype(self) -> torch.dtype:
        """float32, or bfloat16."""
        return torch.float32

    @property
    def signed(self) -> bool:
        """Whether codes have a sign. Without one, positive numbers stay positive."""
        return True

    @property
    def domain(self) -> str:
        """What is stored of a moment: itself ("linear") or its root ("sqrt", unsigned only)."""
        return "linear"

    @property
    def rounding(self) -> str:
        """One of ``roundings``: "nearest", "stochastic", or "paired": mirrored every other step."""
        return "nearest"

    @property
    def units(self) -> str:
        """What a first moment is stored as: itself ("value") or m / sqrt(v) ("update")."""
        return "value"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.block_size(self.block_size)
        checks.flag("signed", self.signed)
        checks.one_of("domain", self.domain, ("linear", "sqrt"))
        checks.one_of("rounding", self.rounding, self.roundings)
        checks.one_of("units", self.units, ("value", "update"))
        if self.signed and self.domain == "sqrt":
            raise ValueError("domain='sqrt': needs signed=False")
        if not self.signed and self.units == "update":
            raise ValueError("units='update': needs signed=True")

    @property
    def components(self) -> tuple[Component, ...]:
        return (
            Component("codes", self.code_dtype, *group(self.bits)),
            Component("scale", self.scale_dtype, self.block_size),
        )

    @property
    def keeps_positive(self) -> bool:
        return not self.signed

    @property
    def keeps_sign(self) -> bool:
        return self.signed

    @property
    def in_update_units(self) -> bool:
        return self.units == "update"

    @property
    def uses_random(self) -> bool:
        return self.rounding != "nearest"

    @property
    def in_pairs(self) -> bool:
        return self.rounding == "paired"

    def rounding_bits(self, x: Tensor, draw: Draw | None) -> Tensor | int:
        """The number to add to positions before their low 16 bits, a fraction, are cut off.

        Args:
            x: the values that are rounded, flat.
            draw: random numbers; needed where ``uses_random``. Those of "paired" round values: for
                codes with a sign and a magnitude they are mirrored again where ``x`` is negative.
        """
        if self.rounding == "nearest":
            return 1 << 15
        draw = self.require_draw(draw)
        if self.rounding == "stochastic":
            return draw.bits16(x.numel(), x.device)
        bits = draw.paired16(x.numel(), x.device)
        return bits ^ (torch.signbit(x).to(torch.int32) * 0xFFFF) if self.sign_magnitude else bits


def blocked(x: Tensor, block_size: int) -> Tensor:
    """View flat ``x`` as [blocks, elements]; a tail is padded with zeros (and so copied)."""
    if x.numel() <= block_size:
        return x.view(1, -1) if x.numel() else x.view(0, 1)
    tail = -x.numel() % block_size
    if tail:
        x = torch.nn.functional.pad(x, (0, tail))
    return x.view(-1, block_size)


def block_amax(x: Tensor, block_size: int) -> Tensor:
    """Each block's largest finite magnitude, [blocks, 1]; 0 where there is none."""
    finite = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    return blocked(finite.abs_(), block_size).amax(dim=1, keepdim=True)


def scaled(x: Tensor, factor: Tensor, block_size: int) -> Tensor:
    """Flat ``x`` times its block's ``factor`` ([blocks, 1]); a new tensor."""
    return (blocked(x, block_size) * factor).view(-1)[: x.numel()]


def power_of_two_scale(amax: Tensor, top: int, largest: int = SCALE_MAX) -> tuple[Tensor, Tensor]:
    """The smallest powers of two under which codes reach ``amax``, and their reciprocals.

    Args:
        amax: each block's largest magnitude; the scale and reciprocal of 0 are 0.
        top: the largest value of a code under a scale of 1, as float32 bits.
        largest: the largest scale, as float32 bits.
    """
    exponent, mantissa = divmod(top, 1 << 23)
    bits = ((amax.view(torch.int32) + (MANTISSA - mantissa)) & ~MANTISSA) - (exponent - 127 << 23)
    bits = bits.clamp_(SCALE_MIN, largest)
    some = amax > 0
    return bits.view(torch.float32) * some, (0x7F000000 - bits).view(torch.float32) * some


def all_on_host(flags: Tensor) -> bool:
    """Whether all ``flags`` are set, as far as the host can tell without waiting for a device."""
    if flags.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(flags.all())


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
_SCALE_MIN, _SCALE_MAX = constant(SCALE_MIN), constant(SCALE_MAX)


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
def clamped_scale(bits):  # type: ignore[no-untyped-def]
    """A scale's bits, at least ``SCALE_MIN`` and at most ``SCALE_MAX``."""
    return tl.minimum(tl.maximum(bits, _SCALE_MIN), _SCALE_MAX)


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
