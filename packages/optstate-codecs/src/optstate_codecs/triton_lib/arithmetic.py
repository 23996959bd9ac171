"""Device functions for float arithmetic: fused multiply-add, roots, bit casts and bfloat16.

In the interpreter, and only there, a fused multiply-add is computed in float64, since the
interpreter's own rounds twice.
"""

from __future__ import annotations

from optstate_codecs.triton_lib.core import INTERPRET, constant, jit, tl

__all__ = [
    "INF_BITS",
    "MAGNITUDE",
    "ROUNDER",
    "as_bits",
    "as_float",
    "at_least_if_positive",
    "exceeds",
    "fma",
    "from_bf16_bits",
    "lerp",
    "minus_product",
    "reciprocal",
    "sqrt",
    "to_bf16_bits",
]

INF_BITS = constant(0x7F800000)
MAGNITUDE = constant(0x7FFFFFFF)
# added to a float of magnitude below 2^22, this rounds it to an integer, half to even
ROUNDER = constant(12582912.0)

SQRT = constant("sqrt.approx.ftz.f32 $0, $1;")
RECIPROCAL = constant("rcp.approx.ftz.f32 $0, $1;")
EXCEEDS = constant("{ .reg .f32 a; abs.f32 a, $1; set.gt.f32.f32 $0, a, $2; }")
MINUS_PRODUCT = constant("{ .reg .f32 b; neg.f32 b, $2; fma.rn.f32 $0, $1, b, $3; }")
FROM_BF16 = constant("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
RAISE_F32, RAISE_S32 = (
    constant(f"""{{
    .reg .pred some;
    setp.gt.f32 some, $2, 0f00000000;
    mov.b32 $0, $1;
    @some max.{kind} $0, $1, $3;
}}""")
    for kind in ("f32", "s32")
)


@jit
def fma(a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c, rounded once."""
    if INTERPRET:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@jit
def minus_product(c, a, b):  # type: ignore[no-untyped-def]
    """c - a * b, rounded once."""
    if INTERPRET:
        return fma(a, -b, c)
    else:
        # Triton subtracts from zero to change a sign, which no instruction takes in
        return tl.inline_asm_elementwise(MINUS_PRODUCT, "=f,f,f,f", [a, b, c], tl.float32, True, 1)


@jit
def exceeds(x, threshold):  # type: ignore[no-untyped-def]
    """1.0 where the magnitude of x is above the threshold, else 0.0, without a predicate."""
    if INTERPRET:
        return (tl.abs(x) > threshold).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(EXCEEDS, "=f,f,f", [x, threshold], tl.float32, True, 1)


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
def at_least_if_positive(t, LOWEST: tl.constexpr, x):  # type: ignore[no-untyped-def]
    """``t``, float32 or int32, raised to ``LOWEST`` where ``x`` is positive."""
    if INTERPRET:
        return tl.where(x > 0, tl.maximum(t, LOWEST), t)
    elif t.dtype == tl.float32:
        low = tl.full(t.shape, LOWEST, tl.float32)
        return tl.inline_asm_elementwise(RAISE_F32, "=f,f,f,f", [t, x, low], tl.float32, True, 1)
    else:
        low = tl.full(t.shape, LOWEST, tl.int32)
        return tl.inline_asm_elementwise(RAISE_S32, "=r,r,f,r", [t, x, low], tl.int32, True, 1)


@jit
def sqrt(x):  # type: ignore[no-untyped-def]
    """Square root within an ulp; subnormal numbers count as zero on a GPU."""
    if INTERPRET:
        return tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise(SQRT, "=f,f", [x], tl.float32, True, 1)


@jit
def reciprocal(x):  # type: ignore[no-untyped-def]
    """1 / x within an ulp; subnormal numbers count as zero on a GPU."""
    if INTERPRET:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(RECIPROCAL, "=f,f", [x], tl.float32, True, 1)


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
def from_bf16_bits(bits16):  # type: ignore[no-untyped-def]
    """The float32 of a bfloat16's 16 bits, int16."""
    if INTERPRET:
        return as_float(bits16.to(tl.int32) << 16)
    else:
        return tl.inline_asm_elementwise(FROM_BF16, "=f,=f,r", [bits16], tl.float32, True, 2)
