"""The C++ vectors F, I and M of generated code: LANES floats, 32-bit integers and flags.

With AVX-512 there are 16 of each, with AVX2 there are 8, and elsewhere one, which leaves vectors to
the compiler.
"""

__all__ = ["VECTOR_TYPES"]

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
INLINE I ld(const uint16_t *p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
}
INLINE I ld(const int16_t *p) {
    return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)p));
}
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

VECTOR_TYPES = _AVX512 + _AVX2 + _SINGLE
