"""A master weight of 24 or 32 bits, split into a 16-bit parameter and a correction in the state.

Layout: the parameter, bfloat16 or float16, and ``master_correction``, int8 (24 bits) or int16
(32 bits), one per element, shaped like the parameter.

Mathematics. A *word* is a sign and a magnitude of 31 bits whose upper 15 are those of the parameter
and whose lower 16 go on with its significand. For bfloat16 it is the float32 itself. For float16 it
is the float32 with float16's exponent, and below float16's normal numbers a multiple of 2^-40. With
w the word of the new value,

    parameter = (w + 2^15) >> 16        rounded to nearest
    correction = w - parameter * 2^16   from -2^15 to 2^15 - 1: the lower 16 bits of w

so 32 bits lose nothing: bfloat16 holds every float32 that it does not overflow, float16 those that
are multiples of 2^-40, as all from 2^-17 up are. For 24 bits w is first rounded stochastically to a
multiple of 2^8, by adding the upper 8 of the element's 16 random bits of stream 0 and leaving out
the lower 8 of the sum.

A value half-way between two parameters goes to the larger magnitude, where nearest rounding takes
the even one. A value that overflows, NaN and infinities are rounded to nearest as ever, with a
correction of 0. Whatever the parameter was set to in the meantime, what is read back lies within
half a spacing of it: a zero does not turn negative, and what is not finite is read as it is.

Integers do all of it but float16's smallest numbers, where powers of two keep floats exact; so
every device writes the same bits.
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

#: the state key of what is kept beside the parameter
CORRECTION = "master_correction"

# a word's sign, and the words of infinity
SIGN = -(2**31)
BF16_INFINITY, FP16_INFINITY = 0x7F800000, 0x7C000000
# the float32 magnitudes, as bits, from which nearest rounding overflows
BF16_OVERFLOW, FP16_OVERFLOW = 0x7F7F8000, 0x477FF000
# 2^-14 as float32 bits, float16's smallest normal number; its word; what exponents differ by
FP16_NORMAL, FP16_NORMAL_WORD, REBIAS = 0x38800000, 1 << 26, 112 << 23
# below 2^23 a float has room for the half that rounds it
WHOLE = 2.0**23


@dataclass(frozen=True)
class SplitMaster(Write):
    """Keep what rounding a 16-bit parameter leaves, so that both make a master weight.

    Args:
        dtype: of the parameter, bfloat16 or float16.
        bits: of parameter and correction together, 24 or 32.
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
            # rounded up from here on, the parameter would overflow
            overflow -= 0x100 if self._bf16 else 0x20
        rounded = value.to(self.dtype).view(torch.int16).to(torch.int32) << 16
        word = torch.where(magnitude < overflow, word, rounded)
        if self.bits == 24:
            word += draw.bits16(value.numel(), value.device) >> 8
        parts[0].copy_(word >> (32 - self.bits))
        return (word + 0x8000 >> 16).to(torch.int16).view(self.dtype)

    def convert(self, saved: Tensor) -> Tensor:
        """A correction of either width as this one's; the parameter stays the same."""
        if saved.dtype == torch.int8 and self.bits == 32:
            return saved.to(torch.int16) << 8
        if saved.dtype == torch.int16 and self.bits == 24:
            # to nearest, but never on to another parameter
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
    """The master weights of a tile; bfloat16 parameters come as 16-bit integers."""
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
    """Split a tile; ``random`` is what ``Draw.bits16`` gives."""
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
