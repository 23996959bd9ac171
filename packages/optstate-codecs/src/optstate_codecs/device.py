"""Triton where it is installed, and the few operations all device functions share.

Without triton the functions below and those beside each format and rule are plain Python that
nothing calls. With ``TRITON_INTERPRET=1`` they run on CPU tensors; there, and only there, a fused
multiply-add is computed in float64, since the interpreter's own rounds twice.
"""

from __future__ import annotations

import os
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover - exercised by the isolated session
    triton = None
    tl = None

__all__ = ["HAS_TRITON", "INTERPRETED", "VARIABLE", "jit", "kernels_run", "tl", "triton"]

HAS_TRITON = triton is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# stands in for backend="auto"
VARIABLE = "OPTSTATE_BACKEND"


def kernels_run(where: torch.device) -> bool:
    """Whether what is no step, and so has no backend of its own, is done by kernels there."""
    wanted = os.environ.get(VARIABLE, "auto") in ("auto", "triton")
    return HAS_TRITON and wanted and (where.type == "cuda" or INTERPRETED)


def jit(function: Any) -> Any:
    """``triton.jit``, or the function itself where there is no triton."""
    return triton.jit(function) if HAS_TRITON else function


def constant(value: Any) -> Any:
    """A module-level constant that device functions may read."""
    return tl.constexpr(value) if HAS_TRITON and not INTERPRETED else value


INTERPRET = constant(INTERPRETED)
INF_BITS = constant(0x7F800000)
MAGNITUDE = constant(0x7FFFFFFF)
# added to a float of magnitude below 2^22, this rounds it to an integer, half to even
ROUNDER = constant(12582912.0)
# the largest finite bfloat16, as float32
BF16_MAX = constant(0x7F7F0000)
M1 = constant(0x7FEB352D)
M2 = constant(0x846CA68B)
GOLDEN = constant(0x9E3779B9)
ODD = constant(747796405)


@jit
def fma(a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c, rounded once."""
    if INTERPRET:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@jit
def lerp(start, end, weight, FAR: tl.constexpr):  # type: ignore[no-untyped-def]
    """``torch.lerp``, which starts from the nearer end: FAR says that ``weight`` is 0.5 or more."""
    if FAR:
        return fma(end - start, weight - 1.0, end)
    else:
        return fma(end - start, weight, start)


@jit
def as_bits(x):  # type: ignore[no-untyped-def]
    """The bits of a float32."""
    return x.to(tl.int32, bitcast=True)


@jit
def as_float(bits):  # type: ignore[no-untyped-def]
    """The float32 with these bits."""
    return bits.to(tl.float32, bitcast=True)


@jit
def mix32(x):  # type: ignore[no-untyped-def]
    """``rounding.mix32`` on the device; ``x`` is uint32."""
    x = (x ^ (x >> 16)) * M1
    x = (x ^ (x >> 15)) * M2
    return x ^ (x >> 16)


@jit
def unfinished(key, step, start, offsets):  # type: ignore[no-untyped-def]
    """``rounding.hash_words`` for a tile, before the last multiplication; uint32.

    Elements 2 i and 2 i + 1 share a word. ``key`` is a stream key, both halves in an int64;
    ``step`` int32; ``start`` the number of the tile's first element, int64, even; ``offsets`` from
    there, int32. A tile never crosses a multiple of 2^33.
    """
    turn = (step & -2).to(tl.uint32)
    k0 = mix32((key & 0xFFFFFFFF).to(tl.uint32) + turn)
    k1 = mix32(((key >> 32) & 0xFFFFFFFF).to(tl.uint32) ^ (turn * GOLDEN))
    k1 = k1 + ((start >> 33) & 0xFFFFFFFF).to(tl.uint32) * GOLDEN
    # the compiler sees that neighbours halve to the same number, and computes it once
    x = (offsets >> 1).to(tl.uint32) + (((start >> 1) & 0xFFFFFFFF).to(tl.uint32) + k0)
    x = (x ^ (x >> 16)) * M1
    return (x ^ (x >> 15)) + k1


@jit
def hash_tile(key, step, start, offsets):  # type: ignore[no-untyped-def]
    """``rounding.hash_words`` for a tile, less its last shift, which is ``half``'s."""
    odd = tl.where((step & 1) == 1, ODD, 1).to(tl.uint32)
    return unfinished(key, step, start, offsets) * (odd * M2)


@jit
def paired_tile(key, step, start, offsets):  # type: ignore[no-untyped-def]
    """As ``hash_tile``, with the words of the even step before, mirrored where ``step`` is odd."""
    # the low half gets the high half added last: flipping one flips both
    return (unfinished(key, step, start, offsets) * M2) ^ ((-(step & 1)).to(tl.uint32) << 16)


@jit
def half(word, offsets, STREAM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The 16 random bits that an element's ``word`` holds for a stream, int32."""
    # the last shift of the hash changes only the low half
    low, high = ((word ^ (word >> 16)) & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32)
    return tl.where((offsets & 1) == STREAM % 2, low, high)


@jit
def mirrored(bits16, x):  # type: ignore[no-untyped-def]
    """``bits16``, or 65535 less that where ``x`` is negative."""
    return bits16 ^ ((as_bits(x) >> 31) & 0xFFFF)


@jit
def dithered(x, bits16):  # type: ignore[no-untyped-def]
    """``x`` plus ``Draw.centred``: a multiple of 2^-16 in [-1/2, 1/2)."""
    # the float with these bits is 2^23 + bits16: no integer conversion
    return fma(as_float(bits16 | 0x4B000000) - 8421376.0, 1.0 / 65536.0, x)


@jit
def byte_float(byte):  # type: ignore[no-untyped-def]
    """2^23 + an unsigned byte, as float32, without an integer conversion."""
    if INTERPRET:
        return as_float(byte.to(tl.int32) | 0x4B000000)
    else:
        return tl.inline_asm_elementwise(
            """
            prmt.b32 $0, $4, 0x4B000000, 0x7440;
            prmt.b32 $1, $4, 0x4B000000, 0x7441;
            prmt.b32 $2, $4, 0x4B000000, 0x7442;
            prmt.b32 $3, $4, 0x4B000000, 0x7443;
            """,
            "=f,=f,=f,=f,r",
            [byte],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )


@jit
def widened(byte):  # type: ignore[no-untyped-def]
    """An unsigned byte as int32."""
    if INTERPRET:
        return byte.to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            """
            prmt.b32 $0, $4, 0, 0x4440;
            prmt.b32 $1, $4, 0, 0x4441;
            prmt.b32 $2, $4, 0, 0x4442;
            prmt.b32 $3, $4, 0, 0x4443;
            """,
            "=r,=r,=r,=r,r",
            [byte],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )


@jit
def top_byte(byte):  # type: ignore[no-untyped-def]
    """An unsigned byte as the top eight bits of an int32."""
    if INTERPRET:
        return byte.to(tl.int32) << 24
    else:
        return tl.inline_asm_elementwise(
            """
            prmt.b32 $0, $4, 0, 0x0444;
            prmt.b32 $1, $4, 0, 0x1444;
            prmt.b32 $2, $4, 0, 0x2444;
            prmt.b32 $3, $4, 0, 0x3444;
            """,
            "=r,=r,=r,=r,r",
            [byte],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )


def _nibbles(bit: int) -> str:
    """Shifts that bring the low and the high halves of four bytes to bits ``bit`` to bit + 3."""
    lines = []
    for place in range(8):
        by = bit - 8 * (place % 4) - 4 * (place // 4)
        shift = f"shl.b32 ${place}, $8, {by};" if by >= 0 else f"shr.b32 ${place}, $8, {-by};"
        lines.append(shift)
    return "\n".join(lines)


NIBBLES_20, NIBBLES_21, NIBBLES_22 = map(constant, map(_nibbles, (20, 21, 22)))


@jit
def nibbles(byte, BIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """A byte's low and high half as bits BIT (20 to 22) to BIT + 3 of two int32, among others."""
    if INTERPRET:
        return byte.to(tl.int32) << BIT, (byte.to(tl.int32) >> 4) << BIT
    else:
        wide: tl.constexpr = NIBBLES_21 if BIT == 21 else NIBBLES_22
        return tl.inline_asm_elementwise(
            NIBBLES_20 if BIT == 20 else wide,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [byte],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=4,
        )


@jit
def nibble_floats(byte):  # type: ignore[no-untyped-def]
    """136 + n for the two's complements n in the low and the high half of a byte, float32."""
    if INTERPRET:
        word = byte.to(tl.int32) ^ 0x88
        low, high = (word & 15) << 16, (word >> 4) << 16
        return as_float(low | 0x43000000), as_float(high | 0x43000000)
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high;
            shr.b32 high, $8, 4;
            lop3.b32 low, $8, 0x0f0f0f0f, 0x08080808, 0x6a;
            lop3.b32 high, high, 0x0f0f0f0f, 0x08080808, 0x6a;
            prmt.b32 $0, low, 0x43000000, 0x7044;
            prmt.b32 $1, low, 0x43000000, 0x7144;
            prmt.b32 $2, low, 0x43000000, 0x7244;
            prmt.b32 $3, low, 0x43000000, 0x7344;
            prmt.b32 $4, high, 0x43000000, 0x7044;
            prmt.b32 $5, high, 0x43000000, 0x7144;
            prmt.b32 $6, high, 0x43000000, 0x7244;
            prmt.b32 $7, high, 0x43000000, 0x7344;
            }
            """,
            "=f,=f,=f,=f,=f,=f,=f,=f,r",
            [byte],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )


@jit
def pair_of_nibbles(low, high):  # type: ignore[no-untyped-def]
    """Bits 16 to 19 of two int32 as the low and the high half of a byte."""
    if INTERPRET:
        return (((low >> 16) & 15) | ((high >> 12) & 240)).to(tl.uint8)
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, even, odd;
            prmt.b32 a, $1, $2, 0x0062;
            prmt.b32 b, $3, $4, 0x0062;
            prmt.b32 even, a, b, 0x5410;
            prmt.b32 a, $5, $6, 0x0062;
            prmt.b32 b, $7, $8, 0x0062;
            prmt.b32 odd, a, b, 0x5410;
            shl.b32 odd, odd, 4;
            lop3.b32 $0, even, odd, 0x0f0f0f0f, 0xe4;
            }
            """,
            "=r,r,r,r,r,r,r,r,r",
            [low, high],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )


@jit
def third_byte(word):  # type: ignore[no-untyped-def]
    """Bits 16 to 23 of an int32, as uint8."""
    if INTERPRET:
        return ((word >> 16) & 255).to(tl.uint8)
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high;
            prmt.b32 low, $1, $2, 0x0062;
            prmt.b32 high, $3, $4, 0x0062;
            prmt.b32 $0, low, high, 0x5410;
            }
            """,
            "=r,r,r,r,r",
            [word],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )


@jit
def third_byte_signed(word, x):  # type: ignore[no-untyped-def]
    """Bits 16 to 22 of an int32 below the sign of a float32, as uint8."""
    if INTERPRET:
        return (((word >> 16) & 127) | ((as_bits(x) >> 24) & 128)).to(tl.uint8)
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, code, sign;
            prmt.b32 low, $1, $2, 0x0062;
            prmt.b32 high, $3, $4, 0x0062;
            prmt.b32 code, low, high, 0x5410;
            prmt.b32 low, $5, $6, 0x0073;
            prmt.b32 high, $7, $8, 0x0073;
            prmt.b32 sign, low, high, 0x5410;
            lop3.b32 $0, code, sign, 0x7f7f7f7f, 0xe4;
            }
            """,
            "=r,r,r,r,r,r,r,r,r",
            [word, x],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )


@jit
def at_least_if_positive(t, LOWEST: tl.constexpr, x):  # type: ignore[no-untyped-def]
    """``t``, float32 or int32, raised to ``LOWEST`` where ``x`` is positive."""
    if INTERPRET:
        return tl.where(x > 0, tl.maximum(t, LOWEST), t)
    elif t.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .pred some;
            setp.gt.f32 some, $2, 0f00000000;
            mov.b32 $0, $1;
            @some max.f32 $0, $1, $3;
            }
            """,
            "=f,f,f,f",
            [t, x, tl.full(t.shape, LOWEST, tl.float32)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .pred some;
            setp.gt.f32 some, $2, 0f00000000;
            mov.b32 $0, $1;
            @some max.s32 $0, $1, $3;
            }
            """,
            "=r,r,f,r",
            [t, x, tl.full(t.shape, LOWEST, tl.int32)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@jit
def sqrt(x):  # type: ignore[no-untyped-def]
    """Square root within an ulp; subnormal numbers count as zero on a GPU."""
    if INTERPRET:
        return tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@jit
def reciprocal(x):  # type: ignore[no-untyped-def]
    """1 / x within an ulp; subnormal numbers count as zero on a GPU."""
    if INTERPRET:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@jit
def _larger(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def piece_starts(LENGTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where each piece of a tile begins, where one is LENGTH long; rows follow each other.

    The first pieces of all rows come first, then the second pieces, and so on.
    """
    piece = tl.arange(0, PIECES)
    return (piece % ROWS) * (LENGTH * (PIECES // ROWS)) + (piece // ROWS) * LENGTH


@jit
def by_rows(x, rows):  # type: ignore[no-untyped-def]
    """A tile's pieces [pieces, elements] as [pieces of a row, rows, elements]."""
    return tl.reshape(x, [x.shape[0] // rows.shape[0], rows.shape[0], x.shape[1]])


@jit
def spread(number, offsets):  # type: ignore[no-untyped-def]
    """One number for each row as one for each of a tile's pieces, [pieces, 1]."""
    if offsets.shape[0] == number.shape[0]:
        return number[:, None]
    else:
        fold: tl.constexpr = offsets.shape[0] // number.shape[0]
        every = tl.broadcast_to(number[None, :], [fold, number.shape[0]])
        return tl.reshape(every, [offsets.shape[0]])[:, None]


@jit
def row_max(x, rows):  # type: ignore[no-untyped-def]
    """Each row's largest integer."""
    if x.shape[0] == rows.shape[0]:
        return tl.max(x, axis=1)
    else:
        return tl.max(tl.max(by_rows(x, rows), axis=0), axis=1)


@jit
def row_sum(x, rows):  # type: ignore[no-untyped-def]
    """Each row's sum."""
    if x.shape[0] == rows.shape[0]:
        return tl.sum(x, axis=1)
    else:
        return tl.sum(tl.sum(by_rows(x, rows), axis=0), axis=1)


@jit
def row_amax(x, rows, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each row's largest magnitude, as bits: at least ``INF_BITS`` where a row is not finite.

    Where not ``SIGNED``, no number is below zero.
    """
    if INTERPRET:
        return row_max(as_bits(x) & MAGNITUDE, rows)
    else:
        x = tl.abs(x) if SIGNED else x
        if x.shape[0] != rows.shape[0]:
            # a thread holds all pieces of a row that it holds one of: no exchange
            x = tl.reduce(by_rows(x, rows), 0, _larger)
        return as_bits(tl.reduce(x, 1, _larger)) & MAGNITUDE


@jit
def to_bf16_bits(x):  # type: ignore[no-untyped-def]
    """Round float32 to bfloat16 to nearest even; the 16 bits as int16."""
    if INTERPRET:
        bits = as_bits(x)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where((bits & MAGNITUDE) > INF_BITS, 0x7FFF, rounded).to(tl.int16)
    else:
        return x.to(tl.bfloat16).to(tl.int16, bitcast=True)


@jit
def to_bf16_bits_stochastic(x, bits16):  # type: ignore[no-untyped-def]
    """``rounding.stochastic_round_bf16``; the 16 bits as int16."""
    bits = as_bits(x)
    raised = ((bits + bits16) >> 16).to(tl.int16)
    return tl.where((bits & MAGNITUDE) < BF16_MAX, raised, to_bf16_bits(x))


@jit
def from_bf16_bits(bits16):  # type: ignore[no-untyped-def]
    """The float32 of a bfloat16's 16 bits, int16."""
    if INTERPRET:
        return as_float(bits16.to(tl.int32) << 16)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=f,=f,r",
            [bits16],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
