"""Formats with one scale for each block of elements, and the functions that they share.

``BlockFormat`` declares their components and options. The torch functions compute scales and mark
blocks; the device functions do the same on tiles.

A *marked* block has a negative scale, because at least one of its elements is not finite. Where a
format needs all its codes for numbers, one code means NaN in marked blocks and a number in others.
A kernel therefore compares codes with the NaN code only where a block is marked.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks, exact
from optstate_codecs.formats.base import Component, Format
from optstate_codecs.formats.packing import group, store_codes
from optstate_codecs.rounding import Draw
from optstate_codecs.triton_lib import (
    INF_BITS,
    MAGNITUDE,
    as_bits,
    as_float,
    constant,
    jit,
    row_amax,
    row_max,
    spread,
    tl,
)

__all__ = [
    "SCALE_MAX",
    "SCALE_MIN",
    "SMALLEST",
    "SMALLEST_SCALE",
    "BlockFormat",
    "all_on_host",
    "block_amax",
    "block_size",
    "block_sums",
    "blocked",
    "clamped_scale",
    "fill_marked",
    "finite_amax",
    "load_scale",
    "mark",
    "nan_where_marked",
    "power_of_two_scale",
    "scaled",
    "store_marked",
    "store_scale",
]

# scales of a block that is not all zero: their reciprocals are normal numbers
SMALLEST_SCALE = 2.0**-100
# as float32 bits, the smallest scale and, for most formats, the largest: 2^120
SCALE_MIN, SCALE_MAX = (127 - 100) << 23, (127 + 120) << 23
MANTISSA = 0x7FFFFF


class BlockFormat(Format):
    """Codes with one scale per block of consecutive elements; the last block may be shorter.

    Components: ``codes``, one per element and shaped like the parameter, or packed into bytes
    (``formats.packing``) where a code has fewer than 8 bits; ``scale``, one per block.

    A subclass is a frozen dataclass. Its fields are the options that it offers; they override the
    properties below, whose values hold for a format without that option.
    """

    #: elements that share a scale, a power of two from 16 to 8192
    block_size: int
    code_dtype: ClassVar[torch.dtype] = torch.uint8
    #: the values that ``rounding`` may have
    roundings: ClassVar[tuple[str, ...]] = ("nearest", "stochastic")
    #: whether a code is a sign and a magnitude; otherwise it is a two's complement
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
        """Whether codes have a sign; unsigned formats keep positive numbers positive."""
        return True

    @property
    def domain(self) -> str:
        """Whether the moment is stored ("linear") or its root ("sqrt"; unsigned formats only)."""
        return "linear"

    @property
    def rounding(self) -> str:
        """One of ``roundings``; "paired" is stochastic and mirrors every other step's numbers."""
        return "nearest"

    @property
    def units(self) -> str:
        """Whether a first moment m is stored ("value") or m / sqrt(v) ("update")."""
        return "value"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.block_size(self.block_size)
        # properties that are not options need no check, and every step creates formats
        options = self.__dict__
        if "signed" in options:
            checks.flag("signed", self.signed)
        if "domain" in options:
            checks.one_of("domain", self.domain, ("linear", "sqrt"))
            if self.signed and self.domain == "sqrt":
                raise ValueError("domain='sqrt': needs signed=False")
        if "rounding" in options:
            checks.one_of("rounding", self.rounding, self.roundings)
        if "units" in options:
            checks.one_of("units", self.units, ("value", "update"))
            if self.units == "update" and not self.signed:
                raise ValueError("units='update': needs signed=True")

    @property
    def codes_suffix(self) -> str:
        """Suffix of the codes' component."""
        return "codes"

    @property
    def components(self) -> tuple[Component, ...]:
        codes = self.codes_suffix, self.code_dtype, self.bits
        return _components(*codes, self.scale_dtype, self.block_size)

    @property
    def marks(self) -> bool:
        return True

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
        """The bits to add to positions on the code grid before the low 16 bits are dropped.

        Positions are in units of 2^-16 codes. Where they are magnitudes, the numbers of "paired"
        are mirrored again for negative ``x``, so that the mirrored step rounds the other way.

        Args:
            x: the values to round, flat.
            draw: random numbers; required where ``uses_random``.
        """
        if self.rounding == "nearest":
            return 1 << 15
        draw = self.require_draw(draw)
        if self.rounding == "stochastic":
            return draw.bits16(x.numel(), x.device)
        bits = draw.paired16(x.numel(), x.device)
        return bits ^ (torch.signbit(x).to(torch.int32) * 0xFFFF) if self.sign_magnitude else bits


@lru_cache(maxsize=256)
def _components(
    codes: str, code_dtype: torch.dtype, bits: int, scale_dtype: torch.dtype, block_size: int
) -> tuple[Component, ...]:
    scale = Component("scale", scale_dtype, block_size)
    return Component(codes, code_dtype, *group(bits)), scale


def blocked(x: Tensor, block_size: int) -> Tensor:
    """View flat ``x`` as [blocks, elements]; an incomplete block is padded, which copies ``x``."""
    if x.numel() <= block_size:
        return x.view(1, -1) if x.numel() else x.view(0, 1)
    tail = -x.numel() % block_size
    if tail:
        x = torch.nn.functional.pad(x, (0, tail))
    return x.view(-1, block_size)


def block_amax(x: Tensor, block_size: int) -> Tensor:
    """Each block's largest finite magnitude, [blocks, 1]; 0 if no element is finite."""
    finite = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    return blocked(finite.abs_(), block_size).amax(dim=1, keepdim=True)


def block_sums(x: Tensor, block_size: int) -> Tensor:
    """Each block's sum, [blocks, 1]; of flat ``x``."""
    if tail := -x.numel() % block_size:
        # a short block too, so that sums are in the same order wherever a slice ends
        x = torch.nn.functional.pad(x, (0, tail))
    return exact.row_sums(x.view(-1, block_size))


def scaled(x: Tensor, factor: Tensor, block_size: int) -> Tensor:
    """Multiply flat ``x`` by its block's ``factor`` ([blocks, 1]) into a new tensor."""
    return (blocked(x, block_size) * factor).view(-1)[: x.numel()]


def power_of_two_scale(amax: Tensor, top: int, largest: int = SCALE_MAX) -> tuple[Tensor, Tensor]:
    """The smallest power of two under which codes cover each ``amax``, and its reciprocal.

    Args:
        amax: each block's largest magnitude, [blocks, 1]; 0 gives (0, 0).
        top: the largest value that codes represent under a scale of 1, as float32 bits.
        largest: upper bound of the scale, as float32 bits.
    """
    exponent, mantissa = divmod(top, 1 << 23)
    bits = ((amax.view(torch.int32) + (MANTISSA - mantissa)) & ~MANTISSA) - (exponent - 127 << 23)
    bits = bits.clamp_(SCALE_MIN, largest)
    nonzero = amax > 0
    return bits.view(torch.float32) * nonzero, (0x7F000000 - bits).view(torch.float32) * nonzero


def all_on_host(flags: Tensor) -> bool:
    """Whether all ``flags`` are known to be set, without waiting for a device."""
    if flags.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(flags.all())


def mark(
    code: Tensor, scale: Tensor, x: Tensor, nan_code: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Give elements of ``x`` that are not finite the NaN code, and mark their blocks.

    Args:
        code: codes of ``x``, flat integers. In marked blocks, finite elements that have
            ``nan_code`` get code 0 instead.
        scale: [blocks, 1], at least 0.
        x: the encoded values, flat.
        nan_code: the code that means NaN in marked blocks.
        block_size: elements that share a scale.
    """
    finite = torch.isfinite(x)
    if all_on_host(finite):
        return code, scale
    marked = blocked((~finite).to(scale.dtype), block_size).amax(1, keepdim=True)
    collides = scaled((code == nan_code).to(scale.dtype), marked, block_size)
    code = code.masked_fill(collides > 0, 0).masked_fill(~finite, nan_code)
    return code, torch.where(marked > 0, -scale.clamp(min=SMALLEST_SCALE), scale)


def fill_marked(x: Tensor, codes: Tensor, scale: Tensor, nan_code: int, block_size: int) -> Tensor:
    """``x`` with NaN where ``codes`` have ``nan_code`` in marked blocks; ``x`` and codes flat."""
    marked = (scale < 0).view(-1, 1)
    if all_on_host(~marked):
        return x
    is_nan = scaled((codes == nan_code).to(x.dtype), marked, block_size)
    return x.masked_fill(is_nan > 0, float("nan"))


SMALLEST = constant(SMALLEST_SCALE)
_SCALE_MIN, _SCALE_MAX = constant(SCALE_MIN), constant(SCALE_MAX)


@jit
def block_size(offsets, rows):  # type: ignore[no-untyped-def]
    """Elements per block of a tile."""
    return offsets.shape[0] * offsets.shape[1] // rows.shape[0]


@jit
def load_scale(scale, offsets, rows, left):  # type: ignore[no-untyped-def]
    """Load each block's scale as float32; bfloat16 is read as 16-bit integers."""
    stored = tl.load(scale + rows, mask=rows * block_size(offsets, rows) < left, other=0)
    if scale.dtype.element_ty == tl.int16:
        return as_float(stored.to(tl.int32) << 16)
    else:
        return stored


@jit
def store_scale(scale, value, offsets, rows, left):  # type: ignore[no-untyped-def]
    """Store each block's scale; for bfloat16, ``value`` must be exact in bfloat16."""
    if scale.dtype.element_ty == tl.int16:
        value = (as_bits(value) >> 16).to(tl.int16)
    tl.store(scale + rows, value, mask=rows * block_size(offsets, rows) < left)


@jit
def clamped_scale(bits):  # type: ignore[no-untyped-def]
    """Clamp a scale's bits to ``SCALE_MIN`` and ``SCALE_MAX``."""
    return tl.minimum(tl.maximum(bits, _SCALE_MIN), _SCALE_MAX)


@jit
def finite_amax(x, rows, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each block's largest finite magnitude, and the tile's largest of all, as float32 bits."""
    amax = row_amax(x, rows, SIGNED)
    tile_amax = tl.max(amax, axis=0)
    if tile_amax >= INF_BITS:
        finite = tl.abs(x) < float("inf")
        amax = row_max(tl.where(finite, as_bits(x) & MAGNITUDE, 0), rows)
    return amax, tile_amax


@jit
def nan_where_marked(x, code, factor, NAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x`` with NaN where ``code`` is NAN in marked blocks."""
    return tl.where((code == NAN) & (spread(factor, x) < 0.0), float("nan"), x)


@jit
def store_marked(  # type: ignore[no-untyped-def]
    codes, scale, code, factor, x, offsets, rows, left, NAN: tl.constexpr, BITS: tl.constexpr
):
    """Store a tile that holds elements which are not finite once more, marked as by ``mark``.

    The first store is unconditional, so that codes need not stay in registers until this branch.
    """
    nonfinite = x - x != 0.0
    marked = row_max(nonfinite.to(tl.int32), rows) > 0
    code = tl.where((code == NAN) & (spread(marked.to(tl.int32), x) > 0), 0, code.to(tl.int32))
    code = tl.where(nonfinite, NAN, code)
    store_codes(codes, code << 16, offsets, rows, left, BITS)
    factor = tl.where(marked, -tl.maximum(factor, SMALLEST), factor)
    store_scale(scale, factor, offsets, rows, left)
