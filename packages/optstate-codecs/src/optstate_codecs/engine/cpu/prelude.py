"""The C++ that generated code starts with: the functions of its expressions.

Every function takes vectors, see ``vectors``, and single values, for those that a block shares.
"""

from optstate_codecs.engine.cpu.vectors import VECTOR_TYPES

__all__ = ["PRELUDE"]

_HEAD = """
#include <stdint.h>
#include <string.h>
#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER
INLINE int32_t as_int(float x) { int32_t y; memcpy(&y, &x, 4); return y; }
INLINE float as_float(int32_t x) { float y; memcpy(&y, &x, 4); return y; }
INLINE float to_f(int32_t x) { return (float)x; }
INLINE int32_t to_i(float x) { return (int32_t)x; }
INLINE int32_t shl(int32_t x, int32_t n) { return (int32_t)((uint32_t)x << n); }
INLINE int32_t shr(int32_t x, int32_t n) { return (int32_t)((uint32_t)x >> n); }
INLINE float select_f(bool flag, float a, float b) { return flag ? a : b; }
INLINE int32_t select_i(bool flag, int32_t a, int32_t b) { return flag ? a : b; }
INLINE float magnitude(float x) { return __builtin_fabsf(x); }
INLINE int32_t magnitude_int(int32_t x) { return __builtin_abs(x); }
INLINE float sqrt_(float x) { return __builtin_sqrtf(x); }
INLINE float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE float rint_(float x) { return __builtin_rintf(x); }
INLINE float floor_(float x) { return __builtin_floorf(x); }
INLINE float lesser(float a, float b) { return b < a ? b : a; }
INLINE float greater(float a, float b) { return b > a ? b : a; }
INLINE int32_t least_int(int32_t a, int32_t b) { return b < a ? b : a; }
INLINE int32_t most_int(int32_t a, int32_t b) { return b > a ? b : a; }
INLINE int32_t least_unsigned(int32_t a, int32_t b) {
    return (uint32_t)b < (uint32_t)a ? b : a;
}
INLINE void prefetch(const void *p, int64_t bytes) {
    for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch((const char *)p + k);
}
INLINE uint32_t mix32(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}
"""

# functions of what was defined so far, for single values and vectors alike
_BOTH = """
INLINE F_ to_float(I_ bf16) { return as_float(shl(bf16, 16)); }
INLINE I_ to_bf16(F_ x) {
    const I_ bits = as_int(x);
    return select_i(x != x, I_(0x7fc0), shr(bits + I_(0x7fff) + (shr(bits, 16) & I_(1)), 16));
}
INLINE F_ at_least(F_ x, F_ low) { return greater(x, low); }
INLINE F_ at_most(F_ x, F_ high) { return lesser(x, high); }
INLINE F_ least(F_ a, F_ b) { return select_f(b != b, b, lesser(a, b)); }
INLINE F_ most(F_ a, F_ b) { return select_f(b != b, b, greater(a, b)); }
INLINE F_ lerp_once(F_ a, F_ b, F_ w) {
    const M_ near = magnitude(w) < F_(0.5f);
    return fma_(select_f(near, w, w - F_(1.0f)), b - a, select_f(near, a, b));
}
INLINE F_ lerp_twice(F_ a, F_ b, F_ w) {
    const M_ near = magnitude(w) < F_(0.5f);
    return select_f(near, a, b) + select_f(near, w, w - F_(1.0f)) * (b - a);
}
INLINE F_ finite_or(F_ x, F_ nan, F_ high, F_ low) {
    const F_ most = F_(3.402823466e38f);
    return select_f(x != x, nan, select_f(x > most, high, select_f(x < -most, low, x)));
}
/* x / y rounded once, from the reciprocal of y rounded once; x a root, y from 2^-60 to 1 */
INLINE F_ divide(F_ x, F_ y, F_ inverse) {
    const F_ q = x * inverse;
    return fma_(fma_(-q, y, x), inverse, q);
}
/* random words, see rounding.hash_words */
INLINE I_ word(I_ x, I_ key, I_ factor) {
    x = (x ^ shr(x, 16)) * I_(0x7feb352d);
    x = ((x ^ shr(x, 15)) + key) * factor;
    return x ^ shr(x, 16);
}
"""

_NEIGHBOURS = """
/* K vectors of neighbouring values to K vectors of every K-th value, and back; K a power of two */
#if LANES > 1
template <int K> struct Lanes {
    INLINE_MEMBER static void split(const I *x, I *out) {
        I a[K / 2], b[K / 2], c[K / 2], d[K / 2];
        for (int k = 0; k < K / 2; k++) {
            a[k] = even(x[2 * k], x[2 * k + 1]);
            b[k] = odd(x[2 * k], x[2 * k + 1]);
        }
        Lanes<K / 2>::split(a, c);
        Lanes<K / 2>::split(b, d);
        for (int k = 0; k < K / 2; k++) out[2 * k] = c[k], out[2 * k + 1] = d[k];
    }
    INLINE_MEMBER static void join(const I *x, I *out) {
        I a[K / 2], b[K / 2], c[K / 2], d[K / 2];
        for (int k = 0; k < K / 2; k++) a[k] = x[2 * k], b[k] = x[2 * k + 1];
        Lanes<K / 2>::join(a, c);
        Lanes<K / 2>::join(b, d);
        for (int k = 0; k < K / 2; k++) {
            out[2 * k] = zip_low(c[k], d[k]);
            out[2 * k + 1] = zip_high(c[k], d[k]);
        }
    }
};
template <> struct Lanes<1> {
    INLINE_MEMBER static void split(const I *x, I *out) { out[0] = x[0]; }
    INLINE_MEMBER static void join(const I *x, I *out) { out[0] = x[0]; }
};
#endif
template <int K, class T> INLINE void ld_lanes(const T *p, I *out) {
#if LANES > 1
    if ((K & (K - 1)) == 0) {
        I x[K];
        for (int k = 0; k < K; k++) x[k] = ld(p + k * LANES);
        Lanes<((K & (K - 1)) == 0 ? K : 1)>::split(x, out);
        return;
    }
#endif
    for (int k = 0; k < K; k++) {
        int32_t x[LANES];
        for (int j = 0; j < LANES; j++) x[j] = p[j * K + k];
        out[k] = ld(x);
    }
}
template <int K> INLINE void st_lanes(int32_t *p, const I *x) {
#if LANES > 1
    if ((K & (K - 1)) == 0) {
        I out[K];
        Lanes<((K & (K - 1)) == 0 ? K : 1)>::join(x, out);
        for (int k = 0; k < K; k++) st(p + k * LANES, out[k]);
        return;
    }
#endif
    for (int k = 0; k < K; k++) {
        int32_t lane[LANES];
        st(lane, x[k]);
        for (int j = 0; j < LANES; j++) p[j * K + k] = lane[j];
    }
}
"""

# the same for groups of three: which bytes, or lanes, each result takes from which operand
_THREES = """
#if LANES == 16
alignas(16) static const int8_t bytes3[9][16] = {BYTES};
alignas(64) static const int32_t first3[3][16] = {FIRST}, last3[3][16] = {LAST};
template <> INLINE_MEMBER void ld_lanes<3, uint8_t>(const uint8_t *p, I *out) {
    for (int k = 0; k < 3; k++) {
        __m128i found = _mm_setzero_si128();
        for (int m = 0; m < 3; m++) {
            const __m128i part = _mm_loadu_si128((const __m128i *)(p + 16 * m));
            const __m128i at = _mm_load_si128((const __m128i *)bytes3[3 * k + m]);
            found = _mm_or_si128(found, _mm_shuffle_epi8(part, at));
        }
        out[k] = _mm512_cvtepu8_epi32(found);
    }
}
template <> INLINE_MEMBER void st_lanes<3>(int32_t *p, const I *x) {
    for (int m = 0; m < 3; m++) {
        const __m512i first = _mm512_load_si512(first3[m]), last = _mm512_load_si512(last3[m]);
        const __m512i two = _mm512_permutex2var_epi32(x[0].v, first, x[1].v);
        st(p + 16 * m, I(_mm512_permutex2var_epi32(two, last, x[2].v)));
    }
}
#endif
"""

_TABLES = """
/* entries of a table, whose length is a multiple of 16 */
template <int N> INLINE float look_up(const float (&table)[N], int32_t at) { return table[at]; }
#if LANES == 16
template <int N> INLINE F look_up(const float (&table)[N], I at) {
    if (N == 16) return _mm512_permutexvar_ps(at.v, _mm512_loadu_ps(table));
    if (N == 32)
        return _mm512_permutex2var_ps(
            _mm512_loadu_ps(table), at.v, _mm512_loadu_ps(table + N - 16));
    return _mm512_i32gather_ps(at.v, table, 4);
}
#elif LANES == 8
template <int N> INLINE F look_up(const float (&table)[N], I at) {
    return _mm256_i32gather_ps(table, at.v, 4);
}
#endif
/* the sum of N numbers in the order of exact.row_sums, N a power of two */
template <int N> INLINE float row_sum(const float *row) {
    float x[N];
    for (int j = 0; j < N / 2; j++) x[j] = row[j] + row[j + N / 2];
    for (int half = N / 4; half > 0; half /= 2)
        for (int j = 0; j < half; j++) x[j] += x[j + half];
    return x[0];
}
"""


def _threes() -> str:
    """``_THREES`` with its tables."""
    bytes_ = [
        [at if 0 <= (at := 3 * j + k - 16 * m) < 16 else -1 for j in range(16)]
        for k in range(3)
        for m in range(3)
    ]
    places = [[divmod(16 * m + j, 3) for j in range(16)] for m in range(3)]
    first = [[16 * lane + group if lane < 2 else 0 for group, lane in row] for row in places]
    last = [[j if row[j][1] < 2 else 16 + row[j][0] for j in range(16)] for row in places]
    text = _THREES
    for name, rows in (("BYTES", bytes_), ("FIRST", first), ("LAST", last)):
        text = text.replace(f"{{{name}}}", _initializer(rows))
    return text


def _initializer(rows: list[list[int]]) -> str:
    return "{" + ", ".join("{" + ", ".join(map(str, row)) + "}" for row in rows) + "}"


def _both() -> str:
    single = _BOTH.replace("F_", "float").replace("I_", "int32_t").replace("M_", "bool")
    vectors = _BOTH.replace("F_", "F").replace("I_", "I").replace("M_", "M")
    return f"{single}#if LANES > 1\n{vectors}#endif\n"


PRELUDE = _HEAD + VECTOR_TYPES + _both() + _NEIGHBOURS + _threes() + _TABLES
