"""Linear 8-bit integers with one scale per block, for first moments.

Layout: ``codes`` int8, one per element, shaped like the parameter; ``scale`` float32, one per
block of ``block_size`` consecutive elements (the last block may be shorter).
An element is code * scale, with scale = (largest finite magnitude of the block) / 127.
Code -128 is NaN: a non-finite element stays non-finite and leaves its block alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.device import (
    INF_BITS,
    MAGNITUDE,
    ROUNDER,
    as_bits,
    as_float,
    constant,
    dithered,
    jit,
    tl,
)
from optstate_codecs.formats.base import (
    Component,
    DeviceFunctions,
    Format,
    block_amax,
    mark_nonfinite,
    scaled,
)
from optstate_codecs.formats.blocks import finite_amax
from optstate_codecs.rounding import Draw

__all__ = ["Int8"]

NAN_CODE = -128
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Int8(Format):
    """Linear int8 codes under an absmax scale; error at most scale / 2 when rounding to nearest.

    Args:
        block_size: elements that share a scale, a power of two from 16 to 8192.
        rounding: "nearest" (half to even) or "stochastic".
        units: "value", or "update" to hold m / sqrt(v), see ``optstate_codecs.moments``.
    """

    name: ClassVar[str] = "int8"
    block_size: int = 256
    rounding: str = "nearest"
    units: str = "value"

    def __post_init__(self) -> None:
        checks.block_size(self.block_size)
        checks.one_of("rounding", self.rounding, ("nearest", "stochastic"))
        checks.one_of("units", self.units, ("value", "update"))

    @property
    def components(self) -> tuple[Component, ...]:
        return (
            Component("codes", torch.int8),
            Component("scale", torch.float32, self.block_size),
        )

    @property
    def keeps_positive(self) -> bool:
        return False

    @property
    def device_functions(self) -> DeviceFunctions | None:
        return DeviceFunctions(load, store, int(self.rounding == "stochastic"))

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        codes, scale = parts
        step = block_amax(x, self.block_size) * (1 / 127)
        # a block too small for a normal scale is stored as zeros
        step = torch.where(step >= TINY, step, torch.zeros_like(step))
        inverse = torch.where(step > 0, 1 / step, step)
        code = scaled(x, inverse, self.block_size)
        if self.rounding == "stochastic":
            code.add_(self._need(draw).centred(x.numel(), x.device))
        codes.copy_(mark_nonfinite(code.round_().clamp_(-127, 127), x, NAN_CODE))
        scale.copy_(step.view(-1))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scale = parts
        x = codes.to(torch.float32).masked_fill_(codes == NAN_CODE, float("nan"))
        return scaled(x, scale.view(-1, 1), self.block_size)


_NAN_CODE, _TINY = constant(NAN_CODE), constant(TINY)


@jit
def load(codes, scale, offsets, rows, left, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Decode a tile, in the format's units."""
    code = tl.load(codes + offsets, mask=offsets < left, other=0).to(tl.int32)
    factor = tl.load(scale + rows, mask=rows * offsets.shape[1] < left, other=0.0)
    x = tl.where(code == _NAN_CODE, float("nan"), code.to(tl.float32))
    return x * factor[:, None]


@jit
def store(codes, scale, x, random, offsets, rows, left, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Encode a tile; OPTIONS 1 adds ``random`` before rounding."""
    top, worst = finite_amax(x, True)
    factor = as_float(top) * (1.0 / 127.0)
    factor = tl.where(factor >= _TINY, factor, 0.0)
    tl.store(scale + rows, factor, mask=rows * offsets.shape[1] < left)
    inverse = tl.where(factor > 0, tl.math.div_rn(1.0 + factor * 0.0, factor), 0.0)
    position = x * inverse[:, None]
    if OPTIONS == 1:
        position = dithered(position, random)
    code = as_bits(position + ROUNDER) - 0x4B400000
    code = tl.minimum(tl.maximum(code, -127), 127)
    if worst >= INF_BITS:
        code = tl.where((as_bits(x) & MAGNITUDE) >= INF_BITS, _NAN_CODE, code)
    tl.store(codes + offsets, code.to(tl.int8), mask=offsets < left)
