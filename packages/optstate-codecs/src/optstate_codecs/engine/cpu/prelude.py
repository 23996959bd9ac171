"""The C++ that generated code starts with: vectors F, I and M, and the functions of expressions.

F, I and M hold LANES floats, 32-bit integers and flags. With AVX-512 there are 16 of each, with
AVX2 there are 8, and elsewhere one, which leaves vectors to the compiler. Every function also takes
single values, for those that a whole block shares.
"""

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

_AVX512 = """
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define LANES 16
struct M { __mmask16 m; };
INLINE M operator&(M a, M b) { return {(__mmask16)(a.m & b.m)}; }
INLINE M operator|(M a, M b) { return {(__mmask16)(a.m | b.m)}; }
INLINE M operator!(M a) { return {(__mmask16)~a.m}; }
INLINE M none() { return {0}; }
INLINE bool any(M a) { return a.m != 0; }
struct F {
    __m512 v;
    INLINE_MEMBER F(__m512 x) : v(x) {}
    INLINE_MEMBER F(float x) : v(_mm512_set1_ps(x)) {}
};
struct I {
    __m512i v;
    INLINE_MEMBER I() {}
    INLINE_MEMBER I(__m512i x) : v(x) {}
    INLINE_MEMBER I(int32_t x) : v(_mm512_set1_epi32(x)) {}
};
INLINE F operator+(F a, F b) { return a.v + b.v; }
INLINE F operator-(F a, F b) { return a.v - b.v; }
INLINE F operator*(F a, F b) { return a.v * b.v; }
INLINE F operator/(F a, F b) { return a.v / b.v; }
INLINE F operator-(F a) { return _mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f)); }
INLINE M operator<(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OS)}; }
INLINE M operator<=(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OS)}; }
INLINE M operator==(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
INLINE M operator!=(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
INLINE I operator+(I a, I b) { return _mm512_add_epi32(a.v, b.v); }
INLINE I operator-(I a, I b) { return _mm512_sub_epi32(a.v, b.v); }
INLINE I operator*(I a, I b) { return _mm512_mullo_epi32(a.v, b.v); }
INLINE I operator&(I a, I b) { return _mm512_and_si512(a.v, b.v); }
INLINE I operator|(I a, I b) { return _mm512_or_si512(a.v, b.v); }
INLINE I operator^(I a, I b) { return _mm512_xor_si512(a.v, b.v); }
INLINE I operator>>(I a, I b) { return _mm512_srav_epi32(a.v, b.v); }
INLINE I shl(I a, I b) { return _mm512_sllv_epi32(a.v, b.v); }
INLINE I shr(I a, I b) { return _mm512_srlv_epi32(a.v, b.v); }
INLINE M operator<(I a, I b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
INLINE M operator<=(I a, I b) { return {_mm512_cmple_epi32_mask(a.v, b.v)}; }
INLINE M operator==(I a, I b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
INLINE M operator!=(I a, I b) { return {_mm512_cmpneq_epi32_mask(a.v, b.v)}; }
INLINE I as_int(F x) { return _mm512_castps_si512(x.v); }
INLINE F as_float(I x) { return _mm512_castsi512_ps(x.v); }
INLINE F to_f(I x) { return _mm512_cvtepi32_ps(x.v); }
INLINE I to_i(F x) { return _mm512_cvttps_epi32(x.v); }
INLINE F select_f(M m, F a, F b) { return _mm512_mask_blend_ps(m.m, b.v, a.v); }
INLINE I select_i(M m, I a, I b) { return _mm512_mask_blend_epi32(m.m, b.v, a.v); }
INLINE F magnitude(F x) { return _mm512_abs_ps(x.v); }
INLINE I magnitude_int(I x) { return _mm512_abs_epi32(x.v); }
INLINE F sqrt_(F x) { return _mm512_sqrt_ps(x.v); }
INLINE F fma_(F a, F b, F c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
INLINE F rint_(F x) { return _mm512_roundscale_ps(x.v, _MM_FROUND_CUR_DIRECTION); }
INLINE F floor_(F x) { return _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEG_INF); }
INLINE F lesser(F a, F b) { return _mm512_min_ps(b.v, a.v); }
INLINE F greater(F a, F b) { return _mm512_max_ps(b.v, a.v); }
INLINE I least_int(I a, I b) { return _mm512_min_epi32(a.v, b.v); }
INLINE I most_int(I a, I b) { return _mm512_max_epi32(a.v, b.v); }
INLINE I least_unsigned(I a, I b) { return _mm512_min_epu32(a.v, b.v); }
INLINE int32_t largest(I x) { return _mm512_reduce_max_epi32(x.v); }
INLINE F ld(const float *p) { return _mm512_loadu_ps(p); }
INLINE I ld(const int32_t *p) { return _mm512_loadu_si512(p); }
INLINE I ld(const uint16_t *p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
}
INLINE I ld(const int16_t *p) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)p));
}
INLINE I ld(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE I ld(const int8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE void st(float *p, F x) { _mm512_storeu_ps(p, x.v); }
INLINE void st(int32_t *p, I x) { _mm512_storeu_si512(p, x.v); }
INLINE void st(void *p, I x, char) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(x.v));
}
INLINE void st(void *p, I x, short) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(x.v));
}
INLINE I even(I a, I b) {
    const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_epi32(a.v, at, b.v);
}
INLINE I odd(I a, I b) {
    const __m512i at = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_permutex2var_epi32(a.v, at, b.v);
}
INLINE I zip_low(I a, I b) {
    const __m512i at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_epi32(a.v, at, b.v);
}
INLINE I zip_high(I a, I b) {
    const __m512i at =
        _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return _mm512_permutex2var_epi32(a.v, at, b.v);
}
"""

_AVX2 = """
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8
struct M { __m256i m; };
INLINE M operator&(M a, M b) { return {_mm256_and_si256(a.m, b.m)}; }
INLINE M operator|(M a, M b) { return {_mm256_or_si256(a.m, b.m)}; }
INLINE M operator!(M a) { return {_mm256_xor_si256(a.m, _mm256_set1_epi32(-1))}; }
INLINE M none() { return {_mm256_setzero_si256()}; }
INLINE bool any(M a) { return _mm256_movemask_epi8(a.m) != 0; }
struct F {
    __m256 v;
    INLINE_MEMBER F(__m256 x) : v(x) {}
    INLINE_MEMBER F(float x) : v(_mm256_set1_ps(x)) {}
};
struct I {
    __m256i v;
    INLINE_MEMBER I() {}
    INLINE_MEMBER I(__m256i x) : v(x) {}
    INLINE_MEMBER I(int32_t x) : v(_mm256_set1_epi32(x)) {}
};
INLINE M mask(__m256 x) { return {_mm256_castps_si256(x)}; }
INLINE F operator+(F a, F b) { return a.v + b.v; }
INLINE F operator-(F a, F b) { return a.v - b.v; }
INLINE F operator*(F a, F b) { return a.v * b.v; }
INLINE F operator/(F a, F b) { return a.v / b.v; }
INLINE F operator-(F a) { return _mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f)); }
INLINE M operator<(F a, F b) { return mask(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OS)); }
INLINE M operator<=(F a, F b) { return mask(_mm256_cmp_ps(a.v, b.v, _CMP_LE_OS)); }
INLINE M operator==(F a, F b) { return mask(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)); }
INLINE M operator!=(F a, F b) { return mask(_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)); }
INLINE I operator+(I a, I b) { return _mm256_add_epi32(a.v, b.v); }
INLINE I operator-(I a, I b) { return _mm256_sub_epi32(a.v, b.v); }
INLINE I operator*(I a, I b) { return _mm256_mullo_epi32(a.v, b.v); }
INLINE I operator&(I a, I b) { return _mm256_and_si256(a.v, b.v); }
INLINE I operator|(I a, I b) { return _mm256_or_si256(a.v, b.v); }
INLINE I operator^(I a, I b) { return _mm256_xor_si256(a.v, b.v); }
INLINE I operator>>(I a, I b) { return _mm256_srav_epi32(a.v, b.v); }
INLINE I shl(I a, I b) { return _mm256_sllv_epi32(a.v, b.v); }
INLINE I shr(I a, I b) { return _mm256_srlv_epi32(a.v, b.v); }
INLINE M operator<(I a, I b) { return {_mm256_cmpgt_epi32(b.v, a.v)}; }
INLINE M operator<=(I a, I b) { return !M{_mm256_cmpgt_epi32(a.v, b.v)}; }
INLINE M operator==(I a, I b) { return {_mm256_cmpeq_epi32(a.v, b.v)}; }
INLINE M operator!=(I a, I b) { return !M{_mm256_cmpeq_epi32(a.v, b.v)}; }
INLINE I as_int(F x) { return _mm256_castps_si256(x.v); }
INLINE F as_float(I x) { return _mm256_castsi256_ps(x.v); }
INLINE F to_f(I x) { return _mm256_cvtepi32_ps(x.v); }
INLINE I to_i(F x) { return _mm256_cvttps_epi32(x.v); }
INLINE F select_f(M m, F a, F b) {
    return _mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(m.m));
}
INLINE I select_i(M m, I a, I b) { return _mm256_blendv_epi8(b.v, a.v, m.m); }
INLINE F magnitude(F x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v); }
INLINE I magnitude_int(I x) { return _mm256_abs_epi32(x.v); }
INLINE F sqrt_(F x) { return _mm256_sqrt_ps(x.v); }
INLINE F fma_(F a, F b, F c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
INLINE F rint_(F x) { return _mm256_round_ps(x.v, _MM_FROUND_CUR_DIRECTION); }
INLINE F floor_(F x) { return _mm256_floor_ps(x.v); }
INLINE F lesser(F a, F b) { return _mm256_min_ps(b.v, a.v); }
INLINE F greater(F a, F b) { return _mm256_max_ps(b.v, a.v); }
INLINE I least_int(I a, I b) { return _mm256_min_epi32(a.v, b.v); }
INLINE I most_int(I a, I b) { return _mm256_max_epi32(a.v, b.v); }
INLINE I least_unsigned(I a, I b) { return _mm256_min_epu32(a.v, b.v); }
INLINE int32_t largest(I x) {
    int32_t parts[8], found = INT32_MIN;
    _mm256_storeu_si256((__m256i *)parts, x.v);
    for (int k = 0; k < 8; k++) found = parts[k] > found ? parts[k] : found;
    return found;
}
INLINE F ld(const float *p) { return _mm256_loadu_ps(p); }
INLINE I ld(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE I ld(const uint16_t *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE I ld(const int16_t *p) { return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE I ld(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE I ld(const int8_t *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE void st(float *p, F x) { _mm256_storeu_ps(p, x.v); }
INLINE void st(int32_t *p, I x) { _mm256_storeu_si256((__m256i *)p, x.v); }
INLINE __m128i narrowed(I x, int32_t bits) {
    const __m256i low = (x & I(bits)).v;
    return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}
INLINE void st(void *p, I x, char) {
    const __m128i words = narrowed(x, 255);
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(words, words));
}
INLINE void st(void *p, I x, short) { _mm_storeu_si128((__m128i *)p, narrowed(x, 65535)); }
INLINE I even(I a, I b) {
    const __m256 low = _mm256_shuffle_ps(as_float(a).v, as_float(b).v, 0x88);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(low), 0xd8);
}
INLINE I odd(I a, I b) {
    const __m256 high = _mm256_shuffle_ps(as_float(a).v, as_float(b).v, 0xdd);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(high), 0xd8);
}
INLINE I zip_low(I a, I b) {
    return _mm256_permute2x128_si256(
        _mm256_unpacklo_epi32(a.v, b.v), _mm256_unpackhi_epi32(a.v, b.v), 0x20);
}
INLINE I zip_high(I a, I b) {
    return _mm256_permute2x128_si256(
        _mm256_unpacklo_epi32(a.v, b.v), _mm256_unpackhi_epi32(a.v, b.v), 0x31);
}
"""

_SINGLE = """
#else
#define LANES 1
typedef bool M;
typedef float F;
typedef int32_t I;
INLINE M none() { return false; }
INLINE bool any(M a) { return a; }
INLINE int32_t largest(I x) { return x; }
template <class T> INLINE I ld(const T *p) { return *p; }
INLINE F ld(const float *p) { return *p; }
INLINE void st(float *p, F x) { *p = x; }
INLINE void st(int32_t *p, I x) { *p = x; }
INLINE void st(void *p, I x, char) { *(uint8_t *)p = (uint8_t)x; }
INLINE void st(void *p, I x, short) { *(uint16_t *)p = (uint16_t)x; }
#endif
#if LANES > 1
INLINE M operator>(F a, F b) { return b < a; }
INLINE M operator>=(F a, F b) { return b <= a; }
INLINE M operator>(I a, I b) { return b < a; }
INLINE M operator>=(I a, I b) { return b <= a; }
INLINE I operator-(I a) { return I(0) - a; }
INLINE I operator~(I a) { return a ^ I(-1); }
#endif
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


PRELUDE = _HEAD + _AVX512 + _AVX2 + _SINGLE + _both() + _NEIGHBOURS
