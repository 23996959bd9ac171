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


def _both() -> str:
    single = _BOTH.replace("F_", "float").replace("I_", "int32_t").replace("M_", "bool")
    vectors = _BOTH.replace("F_", "F").replace("I_", "I").replace("M_", "M")
    return f"{single}#if LANES > 1\n{vectors}#endif\n"


PRELUDE = _HEAD + VECTOR_TYPES + _both() + _NEIGHBOURS
