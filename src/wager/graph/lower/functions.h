// What all generated code stands on: the vector type, and functions that the compiler vectorises.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__AVX512F__)
constexpr long VECTOR = 16;
#else
constexpr long VECTOR = 8;
#endif
typedef float vec __attribute__((vector_size(VECTOR * 4), aligned(4), may_alias));

// 2^n e^r with |r| <= log(2)/2; the polynomial is minimax (relative error 6e-9), n is added to the exponent's bits.
static inline float wg_exp(float x) {
    float z = x < -87.3f ? -87.3f : (x > 88.7f ? 88.7f : x);
    float n = __builtin_rintf(z * 1.44269504088896341f);
    float r = __builtin_fmaf(n, -0.693359375f, z);
    r = __builtin_fmaf(n, 2.12194440e-4f, r);
    float y = 1.3458e-3f;
    y = __builtin_fmaf(y, r, 8.36771e-3f);
    y = __builtin_fmaf(y, r, 4.167429e-2f);
    y = __builtin_fmaf(y, r, 1.6666531e-1f);
    y = __builtin_fmaf(y, r, 4.9999972e-1f);
    y = __builtin_fmaf(y, r, 1.0f);
    y = __builtin_fmaf(y, r, 1.0f);
    int32_t bits;
    __builtin_memcpy(&bits, &y, 4);
    bits += (int32_t)((uint32_t)(int32_t)n << 23);
    __builtin_memcpy(&y, &bits, 4);
    return x > 88.7228f ? __builtin_inff() : y;
}
#if defined(__AVX512F__)
#include <immintrin.h>
// The same on a whole vector. The power of two is one instruction, which overflows to infinity and underflows to zero by itself.
static inline vec wg_exp(vec v) {
    const __m512 low = _mm512_set1_ps(-104.0f), high = _mm512_set1_ps(89.5f);
    const __m512 x = _mm512_min_ps(high, _mm512_max_ps(low, (__m512)v));  // operands in this order keep NaN
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.3458e-3f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.36771e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.167429e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666531e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.9999972e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    return (vec)_mm512_scalef_ps(y, n);
}
static inline vec wg_sigmoid(vec x) { return 1.0f / (1.0f + wg_exp(-x)); }
static inline vec wg_silu(vec x) { return x / (1.0f + wg_exp(-x)); }
static inline vec wg_relu(vec x) { return x < 0.0f ? vec{} : x; }
#endif
static inline float wg_sigmoid(float x) { return 1.0f / (1.0f + wg_exp(-x)); }
static inline float wg_silu(float x) { return x / (1.0f + wg_exp(-x)); }
static inline float wg_tanh(float x) {  // two forms: no cancellation near zero
    float s = x * x;
    float small = x * (1.0f + s * (-0.33333333f + s * (0.13333333f + s * (-0.053968254f + s * 0.021869488f))));
    float large = 1.0f - 2.0f / (wg_exp(2.0f * x) + 1.0f);
    return s < 0.02f ? small : large;
}
static inline float wg_gelu_tanh(float x) {
    return 0.5f * x * (1.0f + wg_tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
static inline float wg_gelu(float x) { return 0.5f * x * (1.0f + __builtin_erff(x * 0.70710678118654752f)); }
static inline float wg_relu(float x) { return x < 0.0f ? 0.0f : x; }  // keeps NaN
// Sums of neighbours in memory: two running vectors, folded pairwise at the end.
typedef int32_t ivec __attribute__((vector_size(VECTOR * 4)));
template <int W>
static inline float wg_fold(vec v) {
    ivec other;
    for (int l = 0; l < VECTOR; l++) other[l] = l ^ W;
    v += __builtin_shuffle(v, other);
    if constexpr (W > 1)
        return wg_fold<W / 2>(v);
    else
        return v[0];
}
template <bool SQUARE>
static inline float wg_total(const float* x, long n) {
    vec a = {}, b = {};
    long i = 0;
    for (; i + 2 * VECTOR <= n; i += 2 * VECTOR) {
        const vec u = *(const vec*)(x + i), v = *(const vec*)(x + i + VECTOR);
        a += SQUARE ? u * u : u;
        b += SQUARE ? v * v : v;
    }
    float s = wg_fold<VECTOR / 2>(a + b);
    for (; i < n; i++) s += SQUARE ? x[i] * x[i] : x[i];
    return s;
}
static inline long wg_floordiv(long a, long b) { long q = a / b; return q - ((a % b != 0) & ((a < 0) != (b < 0))); }
static inline long wg_mod(long a, long b) { long r = a % b; return r + ((r != 0) & ((r < 0) != (b < 0))) * b; }

