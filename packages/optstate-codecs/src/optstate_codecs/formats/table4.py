"""The 4-bit maps of Li et al., arXiv:2309.01507, as published: to compare with, by name.

Layout: ``codes`` uint8, one for two elements, the first in the low half; ``scale`` float32, one per
block of ``block_size`` consecutive elements, its largest finite magnitude.

Values, in units of the scale, rounded to the nearest:

    dynamic4   signed: 0, 1, and of either sign the middles of 1, 2 and 4 even parts of the decades
               below 1: .0055 .0325 .0775 .2125 .4375 .6625 .8875
    linear4    unsigned: 1/16, 2/16 ... 1; no zero, so that a second moment has none

A negative scale says that its block holds elements that are not finite: there, and only there, the
highest value is NaN, and finite elements nearest to it take the one below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.formats.base import Component, Format, block_amax, blocked, scaled
from optstate_codecs.formats.packing import pack, unpack
from optstate_codecs.rounding import Draw

__all__ = ["Dynamic4", "Linear4"]

LAST = 15
SMALLEST_SCALE = 2.0**-100
_SIDE = (0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875)


@dataclass(frozen=True)
class _Table4(Format):
    """Sixteen values under the largest magnitude of a block, to nearest.

    Args:
        block_size: elements that share a scale, a power of two from 16 to 8192.
    """

    block_size: int = 128
    values: ClassVar[tuple[float, ...]]

    def __post_init__(self) -> None:
        checks.block_size(self.block_size)

    @property
    def components(self) -> tuple[Component, ...]:
        return (
            Component("codes", torch.uint8, 2),
            Component("scale", torch.float32, self.block_size),
        )

    def _table(self, device: torch.device) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        codes, scale = parts
        step = block_amax(x, self.block_size)
        step = torch.where(step > 0, step.clamp(min=SMALLEST_SCALE), step)
        inverse = torch.where(step > 0, step.reciprocal(), step)
        table = self._table(x.device)
        unit = scaled(x.nan_to_num(0.0, 0.0, 0.0), inverse, self.block_size)
        code = torch.bucketize(unit, (table[1:] + table[:-1]) / 2, out_int32=True)
        bad = ~torch.isfinite(x)
        some = blocked(bad.to(step.dtype), self.block_size).amax(1, keepdim=True)
        limit = LAST - some.expand(-1, self.block_size).reshape(-1)[: x.numel()]
        code = torch.minimum(code, limit.to(torch.int32)).masked_fill_(bad, LAST)
        codes.copy_(pack(code))
        scale.copy_(torch.where(some > 0, -step.clamp(min=SMALLEST_SCALE), step).view(-1))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        code = unpack(codes)
        x = self._table(codes.device).index_select(0, code)
        marked = scaled((code == LAST).to(x.dtype), (scale < 0).view(-1, 1), self.block_size)
        x = x.masked_fill_(marked > 0, float("nan"))
        return scaled(x, scale.abs().view(-1, 1), self.block_size)


@dataclass(frozen=True)
class Dynamic4(_Table4):
    """The signed 4-bit dynamic exponent map, for first moments; see the module."""

    name: ClassVar[str] = "dynamic4"
    values: ClassVar[tuple[float, ...]] = (*(-v for v in reversed(_SIDE)), 0.0, *_SIDE, 1.0)

    @property
    def keeps_positive(self) -> bool:
        return False


@dataclass(frozen=True)
class Linear4(_Table4):
    """The unsigned 4-bit linear map without zero, for second moments; see the module.

    Elements of a block of zeros stay zero; a zero among others becomes a sixteenth of the largest.
    """

    name: ClassVar[str] = "linear4"
    values: ClassVar[tuple[float, ...]] = tuple((n + 1) / 16 for n in range(16))
