// A vector of floats of the machine's width, and what the kernels need of it. GCC/Clang vector extensions: no intrinsics, any target.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(VL * 2), aligned(2), may_alias));

typedef uint8_t vb __attribute__((vector_size(VL), aligned(1), may_alias));

typedef uint16_t bf16;  // the upper half of a float's bits
struct fp8 {            // e4m3: sign, 4 bits of exponent around 7, 3 of mantissa; up to 448, no infinity, 0x7f is NaN
    uint8_t bits;
};

static inline vf load(const float* p) { return *(const vf*)p; }
#if defined(__AVX2__) && !defined(__AVX512F__)
// GCC widens half a vector at a time.
static inline vf load(const bf16* p) { return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16); }
#else
static inline vf load(const bf16* p) { return (vf)(__builtin_convertvector(*(const vh*)p, vu) << 16); }
#endif
static inline vf load_half(const uint16_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vu h = __builtin_convertvector(*(const vh*)p, vu), bits = (h & 0x7fffu) << 13;
    vu finite = (vu)((vf)bits * 0x1p112f);  // also subnormal numbers: the product is exact
    return (vf)(((h & 0x7c00u) == 0x7c00u ? bits | 0x7f800000u : finite) | (h & 0x8000u) << 16);
#endif
}
static inline vf load(const fp8* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    vu code = (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    vu code = __builtin_convertvector(*(const vb*)p, vu);
#endif
    vu size = code & 0x7fu, finite = (vu)((vf)(size << 20) * 0x1p120f);  // also subnormal numbers: the product is exact
    return (vf)((size == 0x7fu ? vu{} + 0x7fc00000u : finite) | (code & 0x80u) << 24);
}
static inline void store(float* p, vf v) { *(vf*)p = v; }
static inline float widen(float x) { return x; }
static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
static inline float widen(fp8 x) {
    uint32_t size = x.bits & 0x7fu, sign = (x.bits & 0x80u) << 24, bits = size << 20;
    float f;
    std::memcpy(&f, &bits, 4);
    f *= 0x1p120f;
    std::memcpy(&bits, &f, 4);
    bits = (size == 0x7fu ? 0x7fc00000u : bits) | sign;
    std::memcpy(&f, &bits, 4);
    return f;
}
static inline void narrow(float x, float* out) { *out = x; }
static inline void narrow(float x, bf16* out) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        *out = (bf16)((bits >> 16) | 0x40);
        return;
    }
    *out = (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The codes of a vector in e4m3: to nearest, ties to even; what is too large becomes the largest number, NaN stays NaN.
static inline vu fp8_codes(vf x) {
    vu bits = (vu)x, size = bits & 0x7fffffffu;
    vu normal = ((size + 0x7ffffu + ((size >> 20) & 1u)) >> 20) - (120u << 3);
    vf tiny = (vf)size * 512.0f + 12582912.0f;  // in steps of 2^-9, rounded by the addition
    vu code = size < 0x3c800000u ? (vu)tiny & 0xffu : normal;
    code = size > 0x43e00000u ? vu{} + 0x7eu : code;  // beyond 448
    return (size > 0x7f800000u ? vu{} + 0x7fu : code) | (bits >> 24 & 0x80u);
}
static inline void narrow_n(const float* from, long count, fp8* to) {
    long i = 0;
    for (; i + VL <= count; i += VL) *(vb*)(to + i) = __builtin_convertvector(fp8_codes(load(from + i)), vb);
    for (; i < count; i++) {
        vf one{};
        one[0] = from[i];
        to[i].bits = (uint8_t)fp8_codes(one)[0];
    }
}
static inline void narrow(float x, fp8* out) { narrow_n(&x, 1, out); }
static inline void narrow_n(const float* from, long count, float* to) { std::memcpy(to, from, count * 4); }
static inline void narrow_n(const float* from, long count, bf16* to) {
    long i = 0;
    for (; i + VL <= count; i += VL) {
        vu bits = *(const vu*)(from + i);
        vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
        *(vh*)(to + i) = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, vh);
    }
    for (; i < count; i++) narrow(from[i], to + i);
}

static inline vf vmax(vf a, vf b) {  // a > b ? a : b, which is what the instruction does, also with NaN; GCC would compare and blend
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// Lane l of the result is lane INDEX of a and b laid one after the other.
template <int... INDEX>
static inline vf pick(vf a, vf b, std::integer_sequence<int, INDEX...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, INDEX...);
#else
    return __builtin_shuffle(a, b, vi{INDEX...});
#endif
}
// Of blocks of 2 * STEP lanes, the first half (HALF 0) or second half (HALF 1) of a, and beside it the same half of b.
template <int STEP, int HALF, int... LANE>
static inline vf halves(vf a, vf b, std::integer_sequence<int, LANE...>) {
    return pick(a, b, std::integer_sequence<int, (LANE % (2 * STEP) < STEP ? LANE + HALF * STEP : VL + LANE + (HALF - 1) * STEP)...>{});
}
using Lanes = std::make_integer_sequence<int, VL>;
template <int STEP>
static inline vf fold(vf a, vf b) { return halves<STEP, 0>(a, b, Lanes{}) + halves<STEP, 1>(a, b, Lanes{}); }

// Lane l of the result is the sum over the lanes of v[l]. A tree of pairs, the same for every l. With a UNIT, v holds every UNIT-th vector
// of VL, UNIT * l belongs to v[l], and the last levels of the tree, between neighbours, are left to `join`.
template <int STEP = 1, int UNIT = 1>
static inline vf sums(const vf* v) {
    if constexpr (STEP == VL / 2) return fold<STEP>(v[0], v[STEP / UNIT]);
    else return fold<STEP>(sums<STEP * 2, UNIT>(v), sums<STEP * 2, UNIT>(v + STEP / UNIT));
}
template <int UNIT, int STEP = 1>
static inline vf join(const vf* partial) {
    if constexpr (STEP == UNIT) return partial[0];
    else return fold<STEP>(join<UNIT, STEP * 2>(partial), join<UNIT, STEP * 2>(partial + STEP));
}

template <int STEP = VL / 2>
static inline float sum(vf v) {
    if constexpr (STEP == 0) return v[0];
    else return sum<STEP / 2>(v + halves<STEP, 1>(v, v, Lanes{}));
}
template <int STEP = VL / 2>
static inline float highest(vf v) {
    if constexpr (STEP == 0) return v[0];
    else return highest<STEP / 2>(vmax(v, halves<STEP, 1>(v, v, Lanes{})));
}

// exp for x <= 0 (and a little above): 2^n * p(r), relative error below 2e-7; far below the smallest float it is 0.
static inline vf exp_v(vf x) {
    const vf lowest = vf{} - 87.0f;
    vi underflow = x < lowest;
    x = vmax(x, lowest);
    vf n = x * 1.44269504f;
    n = (n + 12582912.0f) - 12582912.0f;  // round to nearest integer
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi scale = (__builtin_convertvector(n, vi) + 127) << 23;
    vf result = p * (vf)scale;
    return (vf)((vi)result & ~underflow);
}
