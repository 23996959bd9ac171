"""Device functions for random bits and stochastic rounding: ``rounding`` in Triton."""

from __future__ import annotations

from optstate_codecs.triton_lib.arithmetic import MAGNITUDE, as_bits, as_float, fma, to_bf16_bits
from optstate_codecs.triton_lib.core import constant, jit, tl

__all__ = ["dithered", "half", "hash_tile", "mirrored", "paired_tile", "to_bf16_bits_stochastic"]

# the largest finite bfloat16, as float32
BF16_MAX = constant(0x7F7F0000)
# the constants of the hash, as in ``rounding``
M1 = constant(0x7FEB352D)
M2 = constant(0x846CA68B)
GOLDEN = constant(0x9E3779B9)
ODD = constant(747796405)


@jit
def mix32(x):  # type: ignore[no-untyped-def]
    """``rounding.mix32`` on the device; ``x`` is uint32."""
    x = (x ^ (x >> 16)) * M1
    x = (x ^ (x >> 15)) * M2
    return x ^ (x >> 16)


@jit
def columns(offsets):  # type: ignore[no-untyped-def]
    """The places of elements in their piece, [elements].

    Pieces begin at even offsets. The compiler does not know that of ``offsets``, but it knows the
    last bits of these, so that it computes at compile time what depends on them.
    """
    return tl.arange(0, offsets.shape[len(offsets.shape) - 1])


@jit
def partial_hash(key, step, start, offsets):  # type: ignore[no-untyped-def]
    """``rounding.hash_words`` for a tile, before the last multiplication; uint32.

    Elements 2 i and 2 i + 1 share a word. ``key`` is a stream key, both halves in an int64;
    ``step`` int32; ``start`` the index of the tile's first element, int64, even; ``offsets`` from
    there, int32. A tile never crosses a multiple of 2^33.
    """
    turn = (step & -2).to(tl.uint32)
    k0 = mix32((key & 0xFFFFFFFF).to(tl.uint32) + turn)
    k1 = mix32(((key >> 32) & 0xFFFFFFFF).to(tl.uint32) ^ (turn * GOLDEN))
    k1 = k1 + ((start >> 33) & 0xFFFFFFFF).to(tl.uint32) * GOLDEN
    # neighbours halve to the same number, and the compiler hashes it once
    column = columns(offsets)
    pairs = ((offsets - column) >> 1) + (column >> 1)
    x = pairs.to(tl.uint32) + (((start >> 1) & 0xFFFFFFFF).to(tl.uint32) + k0)
    x = (x ^ (x >> 16)) * M1
    return (x ^ (x >> 15)) + k1


@jit
def hash_tile(key, step, start, offsets):  # type: ignore[no-untyped-def]
    """``rounding.hash_words`` for a tile, without its last shift, which ``half`` does."""
    odd = tl.where((step & 1) == 1, ODD, 1).to(tl.uint32)
    return partial_hash(key, step, start, offsets) * (odd * M2)


@jit
def paired_tile(key, step, start, offsets):  # type: ignore[no-untyped-def]
    """As ``hash_tile``, with the words of the even step before, mirrored where ``step`` is odd."""
    # the last shift combines the high half into the low one: flipping the high half flips both
    return (partial_hash(key, step, start, offsets) * M2) ^ ((-(step & 1)).to(tl.uint32) << 16)


@jit
def half(word, offsets, STREAM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The 16 random bits that an element's ``word`` holds for a stream, int32."""
    # the last shift of the hash changes only the low half
    low, high = ((word ^ (word >> 16)) & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32)
    return tl.where((columns(offsets) & 1) == STREAM % 2, low, high)


@jit
def mirrored(bits16, x):  # type: ignore[no-untyped-def]
    """``bits16``, or ``65535 - bits16`` where ``x`` is negative."""
    return bits16 ^ ((as_bits(x) >> 31) & 0xFFFF)


@jit
def dithered(x, bits16):  # type: ignore[no-untyped-def]
    """``x`` plus ``Draw.dither``: a multiple of 2^-16 in [-1/2, 1/2)."""
    # the float with these bits is 2^23 + bits16: no integer conversion
    return fma(as_float(bits16 | 0x4B000000) - 8421376.0, 1.0 / 65536.0, x)


@jit
def to_bf16_bits_stochastic(x, bits16):  # type: ignore[no-untyped-def]
    """``rounding.stochastic_round_bf16``; the 16 bits as int16."""
    bits = as_bits(x)
    raised = ((bits + bits16) >> 16).to(tl.int16)
    return tl.where((bits & MAGNITUDE) < BF16_MAX, raised, to_bf16_bits(x))
