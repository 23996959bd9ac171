"""Device functions that unpack and pack bytes and half bytes, four bytes at a time on a GPU.

Each has one form for the interpreter and one in PTX, which works on four elements (the last
argument of ``inline_asm_elementwise``) and has no side effects (the one before).
"""

from __future__ import annotations

from optstate_codecs.triton_lib.arithmetic import as_bits, as_float
from optstate_codecs.triton_lib.core import INTERPRET, constant, jit, tl

__all__ = [
    "byte_float",
    "nibble_floats",
    "nibbles",
    "pair_of_nibbles",
    "third_byte",
    "third_byte_signed",
    "top_byte",
    "widened",
]


def _four(instruction: str) -> str:
    """PTX for four elements; # is the element's number."""
    return "\n".join(instruction.replace("#", str(number)) for number in range(4))


def _nibbles(bit: int) -> str:
    """Shifts that bring the low and the high halves of four bytes to bits ``bit`` to bit + 3."""
    lefts = [bit - 8 * (result % 4) - 4 * (result // 4) for result in range(8)]
    shifts = [f"shl.b32 $#, $8, {n};" if n >= 0 else f"shr.b32 $#, $8, {-n};" for n in lefts]
    return "\n".join(shift.replace("#", str(result)) for result, shift in enumerate(shifts))


BYTE_FLOAT = constant(_four("prmt.b32 $#, $4, 0x4B000000, 0x744#;"))
WIDENED = constant(_four("prmt.b32 $#, $4, 0, 0x444#;"))
TOP_BYTE = constant(_four("prmt.b32 $#, $4, 0, 0x#444;"))
NIBBLES_20, NIBBLES_21, NIBBLES_22 = map(constant, map(_nibbles, (20, 21, 22)))
NIBBLE_FLOATS = constant(
    """{
    .reg .b32 low, high;
    shr.b32 high, $8, 4;
    lop3.b32 low, $8, 0x0f0f0f0f, 0x08080808, 0x6a;
    lop3.b32 high, high, 0x0f0f0f0f, 0x08080808, 0x6a;
    """
    + _four("prmt.b32 $#, low, 0x43000000, 0x7#44;\n")
    + "".join(f"prmt.b32 ${4 + n}, high, 0x43000000, 0x7{n}44;\n" for n in range(4))
    + "}"
)
PAIR_OF_NIBBLES = constant("""{
    .reg .b32 a, b, even, odd;
    prmt.b32 a, $1, $2, 0x0062;
    prmt.b32 b, $3, $4, 0x0062;
    prmt.b32 even, a, b, 0x5410;
    prmt.b32 a, $5, $6, 0x0062;
    prmt.b32 b, $7, $8, 0x0062;
    prmt.b32 odd, a, b, 0x5410;
    shl.b32 odd, odd, 4;
    lop3.b32 $0, even, odd, 0x0f0f0f0f, 0xe4;
}""")
THIRD_BYTE = constant("""{
    .reg .b32 low, high;
    prmt.b32 low, $1, $2, 0x0062;
    prmt.b32 high, $3, $4, 0x0062;
    prmt.b32 $0, low, high, 0x5410;
}""")
THIRD_BYTE_SIGNED = constant("""{
    .reg .b32 low, high, code, sign;
    prmt.b32 low, $1, $2, 0x0062;
    prmt.b32 high, $3, $4, 0x0062;
    prmt.b32 code, low, high, 0x5410;
    prmt.b32 low, $5, $6, 0x0073;
    prmt.b32 high, $7, $8, 0x0073;
    prmt.b32 sign, low, high, 0x5410;
    lop3.b32 $0, code, sign, 0x7f7f7f7f, 0xe4;
}""")


@jit
def byte_float(byte):  # type: ignore[no-untyped-def]
    """2^23 + an unsigned byte, as float32, without an integer conversion."""
    if INTERPRET:
        return as_float(byte.to(tl.int32) | 0x4B000000)
    else:
        return tl.inline_asm_elementwise(BYTE_FLOAT, "=f,=f,=f,=f,r", [byte], tl.float32, True, 4)


@jit
def widened(byte):  # type: ignore[no-untyped-def]
    """An unsigned byte as int32."""
    if INTERPRET:
        return byte.to(tl.int32)
    else:
        return tl.inline_asm_elementwise(WIDENED, "=r,=r,=r,=r,r", [byte], tl.int32, True, 4)


@jit
def top_byte(byte):  # type: ignore[no-untyped-def]
    """An unsigned byte as the top eight bits of an int32."""
    if INTERPRET:
        return byte.to(tl.int32) << 24
    else:
        return tl.inline_asm_elementwise(TOP_BYTE, "=r,=r,=r,=r,r", [byte], tl.int32, True, 4)


@jit
def nibbles(byte, BIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The low and high half of a byte as bits BIT (20 to 22) to BIT + 3 of two int32.

    Other bits of the results are arbitrary.
    """
    if INTERPRET:
        return byte.to(tl.int32) << BIT, (byte.to(tl.int32) >> 4) << BIT
    else:
        wide: tl.constexpr = NIBBLES_21 if BIT == 21 else NIBBLES_22
        asm: tl.constexpr = NIBBLES_20 if BIT == 20 else wide
        types: tl.constexpr = (tl.int32, tl.int32)
        return tl.inline_asm_elementwise(asm, "=r,=r,=r,=r,=r,=r,=r,=r,r", [byte], types, True, 4)


@jit
def nibble_floats(byte):  # type: ignore[no-untyped-def]
    """136 + n for the two's complements n in the low and the high half of a byte, float32."""
    if INTERPRET:
        word = byte.to(tl.int32) ^ 0x88
        low, high = (word & 15) << 16, (word >> 4) << 16
        return as_float(low | 0x43000000), as_float(high | 0x43000000)
    else:
        return tl.inline_asm_elementwise(
            NIBBLE_FLOATS, "=f,=f,=f,=f,=f,=f,=f,=f,r", [byte], (tl.float32, tl.float32), True, 4
        )


@jit
def pair_of_nibbles(low, high):  # type: ignore[no-untyped-def]
    """Bits 16 to 19 of two int32 as the low and the high half of a byte."""
    if INTERPRET:
        return (((low >> 16) & 15) | ((high >> 12) & 240)).to(tl.uint8)
    else:
        return tl.inline_asm_elementwise(
            PAIR_OF_NIBBLES, "=r,r,r,r,r,r,r,r,r", [low, high], tl.uint8, True, 4
        )


@jit
def third_byte(word):  # type: ignore[no-untyped-def]
    """Bits 16 to 23 of an int32, as uint8."""
    if INTERPRET:
        return ((word >> 16) & 255).to(tl.uint8)
    else:
        return tl.inline_asm_elementwise(THIRD_BYTE, "=r,r,r,r,r", [word], tl.uint8, True, 4)


@jit
def third_byte_signed(word, x):  # type: ignore[no-untyped-def]
    """Bits 16 to 22 of an int32 below the sign of a float32, as uint8."""
    if INTERPRET:
        return (((word >> 16) & 127) | ((as_bits(x) >> 24) & 128)).to(tl.uint8)
    else:
        return tl.inline_asm_elementwise(
            THIRD_BYTE_SIGNED, "=r,r,r,r,r,r,r,r,r", [word, x], tl.uint8, True, 4
        )
