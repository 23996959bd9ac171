"""dynamic4 and linear4: the 4-bit maps of Li et al., arXiv:2309.01507, for comparison.

Layout: ``codes`` uint8, one per two elements, the first in the low half; ``scale`` float32, the
largest finite magnitude of each block of ``block_size`` consecutive elements. With rank-1
normalization, tensors of two dimensions or more have ``scale0``, ``scale1`` ... instead
(``formats.rank1``).

Values, over the scale; rounding is to the nearest:

    dynamic4   signed: 0, 1, and with both signs the centers of 1, 2 and 4 equal parts of the
               decades below 1: .0055 .0325 .0775 .2125 .4375 .6625 .8875
    linear4    unsigned: 1/16, 2/16 ... 1 except 3/16; without zero, so that no second moment is 0

Elements that are not finite need a code. ``linear4`` has NaN in place of 3/16; the gap is not
larger, as a ratio, than that from 1/16 to 2/16. ``dynamic4`` keeps the published map and marks
blocks by a negative scale: in marked blocks the highest code is NaN, and finite elements nearest to
it take the value below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.formats.base import Component, Format
from optstate_codecs.formats.block import SMALLEST_SCALE, BlockFormat, block_amax, blocked, scaled
from optstate_codecs.formats.packing import pack, unpack
from optstate_codecs.formats.rank1 import Axes
from optstate_codecs.rounding import Draw

__all__ = ["Dynamic4", "Linear4"]

LAST = 15
_SIDE = (0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875)
# the code of NaN is LAST
_LINEAR = (*(n / 16 for n in range(1, 17) if n != 3), float("nan"))


def _table(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)


def _lifted(scale: Tensor) -> Tensor:
    """Raise scales above 0 to ``SMALLEST_SCALE``, whose reciprocal is a normal number."""
    return torch.where(scale > 0, scale.clamp(min=SMALLEST_SCALE), scale)


def _inverse(scale: Tensor) -> Tensor:
    """The reciprocal of a scale; 0 for 0."""
    return torch.where(scale > 0, scale.reciprocal(), scale)


def _nearest(unit: Tensor, table: Tensor) -> Tensor:
    """The index of the value in ascending ``table`` that is nearest to each of ``unit``; int32."""
    return torch.bucketize(unit, (table[1:] + table[:-1]) / 2, out_int32=True)


@dataclass(frozen=True)
class Dynamic4(BlockFormat):
    """The signed 4-bit dynamic exponent map, for first moments; see the module.

    Args:
        block_size: elements that share a scale, a power of two from 16 to 8192.
    """

    name: ClassVar[str] = "dynamic4"
    values: ClassVar[tuple[float, ...]] = (*(-v for v in reversed(_SIDE)), 0.0, *_SIDE, 1.0)
    bits: ClassVar[int] = 4
    block_size: int = 128

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        codes, scale = parts
        block_scale = _lifted(block_amax(x, self.block_size))
        unit = scaled(_finite(x), _inverse(block_scale), self.block_size)
        code = _nearest(unit, _table(self.values, x.device))
        nonfinite = ~torch.isfinite(x)
        marked = blocked(nonfinite.to(block_scale.dtype), self.block_size).amax(1, keepdim=True)
        limit = LAST - marked.expand(-1, self.block_size).reshape(-1)[: x.numel()]
        code = torch.minimum(code, limit.to(torch.int32)).masked_fill_(nonfinite, LAST)
        codes.copy_(pack(code))
        negative = -block_scale.clamp(min=SMALLEST_SCALE)
        scale.copy_(torch.where(marked > 0, negative, block_scale).view(-1))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        code = unpack(codes)
        x = _table(self.values, codes.device).index_select(0, code)
        marked = scaled((code == LAST).to(x.dtype), (scale < 0).view(-1, 1), self.block_size)
        x = x.masked_fill_(marked > 0, float("nan"))
        return scaled(x, scale.abs().view(-1, 1), self.block_size)


@dataclass(frozen=True)
class Linear4(BlockFormat):
    """The unsigned 4-bit linear map without zero, for second moments; see the module.

    Elements with a scale of 0 stay 0; under another scale, 0 becomes a sixteenth of the scale.

    Args:
        block_size: elements that share a scale, a power of two from 16 to 8192.
        normalization: "block"; or "rank1", where an element's scale is the smallest of the maxima
            along its row, its column and so on, and 32 bits are stored for each index of each
            dimension. Tensors with fewer than two dimensions longer than one have blocks.

    Examples:
        >>> Linear4(normalization="rank1").for_shape((256, 64), (0, 1)).nbytes(256 * 64)
        9472
    """

    name: ClassVar[str] = "linear4"
    values: ClassVar[tuple[float, ...]] = _LINEAR[:LAST]
    bits: ClassVar[int] = 4
    signed: ClassVar[bool] = False
    marks: ClassVar[bool] = False
    block_size: int = 128
    normalization: str = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("normalization", self.normalization, ("block", "rank1"))

    def for_shape(self, shape: Sequence[int], order: Sequence[int]) -> Format:
        axes = Axes.of(shape, order)
        if self.normalization == "block" or len(axes.dims) < 2 or not axes.numel:
            return self
        return _Rank1Linear4(axes)

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        codes, scale = parts
        block_scale = _lifted(block_amax(x, self.block_size))
        unit = scaled(_finite(x), _inverse(block_scale), self.block_size)
        codes.copy_(_linear_codes(x, unit))
        scale.copy_(block_scale.view(-1))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        return scaled(_linear_values(codes), scale.view(-1, 1), self.block_size)


@dataclass(frozen=True)
class _Rank1Linear4(Format):
    """``Linear4(normalization="rank1")`` for a tensor with these axes."""

    name: ClassVar[str] = Linear4.name
    axes: Axes

    @property
    def keeps_sign(self) -> bool:
        return False

    @property
    def components(self) -> tuple[Component, ...]:
        return Component("codes", torch.uint8, 2), *self.axes.components

    @property
    def whole(self) -> bool:
        return True

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        codes, *scales = parts
        finite = _finite(x)
        maxima = [_lifted(maximum) for maximum in self.axes.maxima(finite)]
        codes.copy_(_linear_codes(x, finite * _inverse(self.axes.scale(maxima))))
        for scale, maximum in zip(scales, maxima, strict=True):
            scale.copy_(maximum)

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, *scales = parts
        return _linear_values(codes)[: self.axes.numel] * self.axes.scale(scales)


def _linear_codes(x: Tensor, unit: Tensor) -> Tensor:
    """Packed codes of ``unit``; the code of NaN where ``x`` is not finite."""
    code = _nearest(unit, _table(Linear4.values, x.device))
    return pack(code.masked_fill_(~torch.isfinite(x), LAST))


def _linear_values(codes: Tensor) -> Tensor:
    return _table(_LINEAR, codes.device).index_select(0, unpack(codes))
