"""Formats that only change the dtype: fp32, which is exact, and bf16.

Layout: one component under the moment's own name, shaped like the parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks
from optstate_codecs.formats.base import Component, DeviceFunctions, Format
from optstate_codecs.rounding import Draw, stochastic_round_bf16
from optstate_codecs.triton_lib import (
    from_bf16_bits,
    jit,
    tl,
    to_bf16_bits,
    to_bf16_bits_stochastic,
)

__all__ = ["BF16", "FP32"]


@dataclass(frozen=True)
class FP32(Format):
    """The moment itself in float32 under ``torch.optim``'s state key: 32 bits per element."""

    name: ClassVar[str] = "fp32"

    @property
    def components(self) -> tuple[Component, ...]:
        return (Component("", torch.float32),)

    @property
    def device_functions(self) -> DeviceFunctions | None:
        return DeviceFunctions(load_fp32, store_fp32, returns=True)

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        if x.data_ptr() != parts[0].data_ptr():
            parts[0].copy_(x)

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]


@dataclass(frozen=True)
class BF16(Format):
    """The moment in bfloat16: 16 bits per element.

    Args:
        rounding: "stochastic" keeps the running mean unbiased. "nearest" loses changes below 1/256
            of the moment; a second moment at beta2 = .999 has no larger ones.
    """

    name: ClassVar[str] = "bf16"
    rounding: str = "stochastic"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("rounding", self.rounding, ("stochastic", "nearest"))

    @property
    def components(self) -> tuple[Component, ...]:
        return (Component("", torch.bfloat16),)

    @property
    def uses_random(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def device_functions(self) -> DeviceFunctions | None:
        return DeviceFunctions(load_bf16, store_bf16, int(self.uses_random), returns=True)

    def encode(self, x: Tensor, parts: Sequence[Tensor], draw: Draw | None = None) -> None:
        if self.rounding == "nearest":
            parts[0].copy_(x)
        else:
            bits = self.require_draw(draw).bits16(x.numel(), x.device)
            parts[0].copy_(stochastic_round_bf16(x, bits))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].to(torch.float32)


@jit
def load_fp32(values, unused, offsets, rows, left, MARKED: tl.constexpr, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a float32 tile."""
    return tl.load(values + offsets, mask=offsets < left, other=0.0), rows


@jit
def store_fp32(values, unused, x, random, offsets, rows, left, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store a float32 tile and return it."""
    tl.store(values + offsets, x, mask=offsets < left)
    return x


@jit
def load_bf16(values, unused, offsets, rows, left, MARKED: tl.constexpr, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a bfloat16 tile, as 16-bit integers."""
    return from_bf16_bits(tl.load(values + offsets, mask=offsets < left, other=0)), rows


@jit
def store_bf16(values, unused, x, random, offsets, rows, left, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round a tile to bfloat16, stochastically where OPTIONS is 1; store and return it."""
    if OPTIONS == 1:
        bits = to_bf16_bits_stochastic(x, random)
    else:
        bits = to_bf16_bits(x)
    tl.store(values + offsets, bits, mask=offsets < left)
    return from_bf16_bits(bits)
