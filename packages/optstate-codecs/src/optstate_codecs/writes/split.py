"""A master weight of 24 or 32 bits, split into a 16-bit parameter and a correction in the state.

Layout: the parameter, bfloat16 or float16, and ``master_correction``, int8 (24 bits) or int16
(32 bits), one per element, shaped like the parameter.

Mathematics. A *word* is a sign and a magnitude of 31 bits. The upper 15 bits of the magnitude are
those of the parameter, and the lower 16 extend its significand. For bfloat16 the word is the
float32 itself. For float16 it is the float32 with float16's exponent, and below float16's normal
numbers a multiple of 2^-40. With w the word of the new value,

    parameter = (w + 2^15) >> 16        rounded to nearest
    correction = w - parameter * 2^16   from -2^15 to 2^15 - 1: the lower 16 bits of w

so that 32 bits are exact: with bfloat16 for every float32 that does not overflow, with float16 for
multiples of 2^-40, which all numbers from 2^-17 up are. For 24 bits, w is first rounded
stochastically to a multiple of 2^8: the upper 8 of the element's 16 random bits of stream 0 are
added to it, and the lower 8 bits of the sum are dropped.

A value halfway between two parameters is rounded to the larger magnitude, not to the even one.
Values that overflow, NaN and infinities are rounded to nearest, with a correction of 0. If the
parameter was changed since, the value read back is within half a spacing of the parameter; zero
does not become negative, and parameters that are not finite are read unchanged.

All arithmetic uses integers, except for float16's smallest numbers, where floats are scaled by
exact powers of two. Every device therefore writes the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optstate_codecs.formats.base import Component, DeviceFunctions
from optstate_codecs.rounding import Draw
from optstate_codecs.triton_lib import (
    MAGNITUDE,
    as_bits,
    as_float,
    constant,
    jit,
    tl,
    to_bf16_bits,
)
from optstate_codecs.writes.base import Write

__all__ = ["CORRECTION", "SplitMaster"]

#: the state key of the correction
CORRECTION = "master_correction"

# a word's sign, and the words of infinity
SIGN = -(2**31)
BF16_INFINITY, FP16_INFINITY = 0x7F800000, 0x7C000000
# float32 magnitudes, as bits, from which rounding to nearest overflows
BF16_OVERFLOW, FP16_OVERFLOW = 0x7F7F8000, 0x477FF000
# float16's smallest normal number, 2^-14, as float32 bits and as a word; the exponents' difference
FP16_NORMAL, FP16_NORMAL_WORD, REBIAS = 0x38800000, 1 << 26, 112 << 23
# below 2^23 floats have fractions, so that adding 1/2 rounds them
WHOLE = 2.0**23


@dataclass(frozen=True)
class SplitMaster(Write):
    """Keep the rounding error of a 16-bit parameter, so that both make up a master weight.

    Args:
        dtype: the parameter's dtype, bfloat16 or float16.
        bits: parameter and correction together, 24 or 32.
    """

    bits: int

    @property
    def components(self) -> tuple[Component, ...]:
        return (Component("correction", torch.int8 if self.bits == 24 else torch.int16),)

    @property
    def uses_random(self) -> bool:
        return self.bits == 24

    @property
    def device_functions(self) -> DeviceFunctions:
        return DeviceFunctions(load, store, (self.bits == 24) * SHORT + self._bf16 * BF16)

    @property
    def _bf16(self) -> bool:
        return self.dtype == torch.bfloat16

    def read(self, old: Tensor, parts: Sequence[Tensor]) -> Tensor:
        rounded = old.view(torch.int16).to(torch.int32) << 16
        top = rounded & 0x7FFFFFFF
        word = (top + (parts[0].to(torch.int32) << (32 - self.bits))).clamp_(min=0)
        if self._bf16:
            magnitude, infinity = word, BF16_INFINITY
        else:
            small = (word.to(torch.float32) * 2.0**-40).view(torch.int32)
            magnitude = torch.where(word < FP16_NORMAL_WORD, small, (word >> 3) + REBIAS)
            infinity = FP16_INFINITY
        value = (magnitude | rounded & SIGN).view(torch.float32)
        return torch.where(top < infinity, value, old.to(torch.float32))

    def write(self, value: Tensor, parts: Sequence[Tensor], draw: Draw) -> Tensor:
        bits = value.view(torch.int32)
        magnitude = bits & 0x7FFFFFFF
        if self._bf16:
            word, overflow = bits, BF16_OVERFLOW
        else:
            small = value.abs().clamp_(max=2.0**-14).mul_(2.0**40)
            small = torch.where(small < WHOLE, small + 0.5, small).to(torch.int32)
            word = torch.where(magnitude < FP16_NORMAL, small, magnitude - REBIAS << 3)
            word, overflow = word | bits & SIGN, FP16_OVERFLOW
        if self.bits == 24:
            # rounding up from here on would overflow the parameter
            overflow -= 0x100 if self._bf16 else 0x20
        rounded = value.to(self.dtype).view(torch.int16).to(torch.int32) << 16
        word = torch.where(magnitude < overflow, word, rounded)
        if self.bits == 24:
            word += draw.bits16(value.numel(), value.device) >> 8
        parts[0].copy_(word >> (32 - self.bits))
        return (word + 0x8000 >> 16).to(torch.int16).view(self.dtype)

    def convert(self, saved: Tensor) -> Tensor:
        """Convert a correction of either width to this one's; the parameter stays the same."""
        if saved.dtype == torch.int8 and self.bits == 32:
            return saved.to(torch.int16) << 8
        if saved.dtype == torch.int16 and self.bits == 24:
            # to nearest, but within the correction's range, so that the parameter stays
            return (saved.to(torch.int32) + 128 >> 8).clamp_(max=127).to(torch.int8)
        return saved


SHORT, BF16 = 1, 2
_SHORT, _BF16 = constant(SHORT), constant(BF16)
_BF16_INFINITY, _FP16_INFINITY = constant(BF16_INFINITY), constant(FP16_INFINITY)
_BF16_OVERFLOW, _FP16_OVERFLOW = constant(BF16_OVERFLOW), constant(FP16_OVERFLOW)
_FP16_NORMAL, _FP16_NORMAL_WORD = constant(FP16_NORMAL), constant(FP16_NORMAL_WORD)
_SIGN, _REBIAS, _WHOLE = constant(SIGN), constant(REBIAS), constant(WHOLE)


@jit
def load(param, corrections, offsets, mask, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a tile's master weights; bfloat16 parameters are read as 16-bit integers."""
    stored = tl.load(param + offsets, mask=mask, other=0)
    correction = tl.load(corrections + offsets, mask=mask, other=0).to(tl.int32)
    if OPTIONS & _SHORT:
        correction = correction << 8
    bits = stored.to(tl.int16, bitcast=True).to(tl.int32) << 16
    top = bits & MAGNITUDE
    word = tl.maximum(top + correction, 0)
    if OPTIONS & _BF16:
        value = as_float(word | (bits & _SIGN))
        return tl.where(top < _BF16_INFINITY, value, as_float(bits))
    else:
        small = as_bits(word.to(tl.float32) * 9.094947017729282e-13)
        magnitude = tl.where(word < _FP16_NORMAL_WORD, small, (word >> 3) + _REBIAS)
        value = as_float(magnitude | (bits & _SIGN))
        return tl.where(top < _FP16_INFINITY, value, stored.to(tl.float32))


@jit
def store(param, corrections, x, random, offsets, mask, OPTIONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Split a tile and store it; ``random`` is ``Draw.bits16``."""
    bits = as_bits(x)
    magnitude = bits & MAGNITUDE
    if OPTIONS & _BF16:
        word = bits
        rounded = to_bf16_bits(x)
        overflow = _BF16_OVERFLOW - 256 * (OPTIONS & _SHORT)
    else:
        small = tl.minimum(tl.abs(x), 6.103515625e-05) * 1099511627776.0
        small = tl.where(small < _WHOLE, small + 0.5, small).to(tl.int32)
        word = tl.where(magnitude < _FP16_NORMAL, small, (magnitude - _REBIAS) << 3)
        word = word | (bits & _SIGN)
        rounded = x.to(tl.float16).to(tl.int16, bitcast=True)
        overflow = _FP16_OVERFLOW - 32 * (OPTIONS & _SHORT)
    word = tl.where(magnitude < overflow, word, rounded.to(tl.int32) << 16)
    if OPTIONS & _SHORT:
        word = word + (random >> 8)
        correction = word >> 8
    else:
        correction = word
    top = ((word + 0x8000) >> 16).to(tl.int16)
    tl.store(corrections + offsets, correction.to(corrections.dtype.element_ty), mask=mask)
    tl.store(param + offsets, top.to(param.dtype.element_ty, bitcast=True), mask=mask)
