"""Float16 under a scale per block: 16 bits for first moments, at any size of gradient.

Layout: ``codes`` float16, one an element; ``scale`` float32, a power of two for each block of
``block_size`` consecutive elements (the last block may be shorter).

Mathematics. The scale brings the block's largest finite magnitude into [1/2, 1), so an element down
to 2^-14 of it keeps 11 bits, whatever its size: plain float16 would lose momenta below 6e-8. NaN
and infinities are float16's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.formats import Component, Format
from optstate_codecs.formats.base import block_amax, scaled
from optstate_codecs.rounding import Draw

__all__ = ["FP16"]

# scales from 2^-126 to 2^126 have normal reciprocals
LOWEST, HIGHEST = -126, 126


@dataclass(frozen=True)
class FP16(Format):
    """Float16 under a power of two per block, rounded to nearest.

    Args:
        block_size: elements that share a scale, a power of two from 16 to 8192.
    """

    name: ClassVar[str] = "fp16"
    block_size: int = 2048

    def __post_init__(self) -> None:
        checks.block_size(self.block_size)

    @property
    def components(self) -> tuple[Component, ...]:
        return (
            Component("codes", torch.float16),
            Component("scale", torch.float32, self.block_size),
        )

    @property
    def keeps_positive(self) -> bool:
        return False

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        codes, scale = parts
        _, exponent = torch.frexp(block_amax(x, self.block_size))
        power = exponent.clamp_(LOWEST, HIGHEST).to(torch.float32)
        codes.copy_(scaled(x, torch.exp2(-power), self.block_size))
        scale.copy_(torch.exp2(power).view(-1))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        return scaled(codes.to(torch.float32), scale.view(-1, 1), self.block_size)
