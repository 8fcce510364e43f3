// How weights are stored in a panel of 16 output rows, and how an inner step multiplies them. Panels interleave outputs along the input, so
// that one load holds the same input of 16 outputs.
//
//   format   activations   panel bytes                                    inner step
//   F32      float32       [k][16] float                                  1 input
//   BF16     float32       [k][16] bfloat16                               1 input
//   I8       float32       [k][16] int8, one scale per output             1 input
//   B16      bfloat16      [k / 2][16][2] bfloat16                        2 inputs
//   W8       int8          [k / 4][16][4] uint8 = int8 + 128              4 inputs, groups of 64
//   Q4       float32       per 32 inputs: [16] scales bfloat16, then [4][16][4] bytes; the low nibbles of a word are inputs 8 j .. 8 j + 3,
//                          the high ones 8 j + 4 .. 8 j + 7; a nibble numbers one of 16 values
//   W4       int8          as Q4 with value = nibble - 8
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd.h"

constexpr int NR = 16;       // outputs of a panel
constexpr int NV = NR / VL;  // vectors of a panel row
typedef int8_t vq __attribute__((vector_size(VL), aligned(1), may_alias));

// acc += sum over the four bytes of w (unsigned) times the four of x (signed).
static inline vi dot4(vi acc, vi w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX512BW__)
    const __m512i bytes = _mm512_set1_epi32(0x00ff00ff);
    __m512i even = _mm512_and_si512((__m512i)w, bytes), odd = _mm512_and_si512(_mm512_srli_epi16((__m512i)w, 8), bytes);
    __m512i four = _mm512_set1_epi32(x);
    __m512i x_even = _mm512_srai_epi16(_mm512_slli_epi16(four, 8), 8), x_odd = _mm512_srai_epi16(four, 8);
    __m512i sum = _mm512_add_epi32(_mm512_madd_epi16(even, x_even), _mm512_madd_epi16(odd, x_odd));
    return (vi)_mm512_add_epi32((__m512i)acc, sum);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i bytes = _mm256_set1_epi32(0x00ff00ff);
    __m256i even = _mm256_and_si256((__m256i)w, bytes), odd = _mm256_and_si256(_mm256_srli_epi16((__m256i)w, 8), bytes);
    __m256i four = _mm256_set1_epi32(x);
    __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), x_odd = _mm256_srai_epi16(four, 8);
    __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(even, x_even), _mm256_madd_epi16(odd, x_odd));
    return (vi)_mm256_add_epi32((__m256i)acc, sum);
#else
    for (int b = 0; b < 4; b++) acc += (vi)(((vu)w >> (8 * b)) & 255u) * (int32_t)(int8_t)(x >> (8 * b));
    return acc;
#endif
}

// acc += w[0] x[0] + w[1] x[1] over pairs of bfloat16.
static inline vf dot2(vf acc, vu w, uint32_t x) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
#else
    acc += (vf)(w & 0xffff0000u) * widen((bf16)(x >> 16));
    acc += (vf)(w << 16) * widen((bf16)x);
    return acc;
#endif
}

// The value that the low four bits of each lane number in a table of 16.
static inline vf look_up(const float* table, vu index) {
#if defined(__AVX512F__)
    return (vf)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
    __m256i i = (__m256i)index;
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i), high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), i);
    return (vf)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
#else
    vf out;
    for (int i = 0; i < VL; i++) out[i] = table[index[i] & 15];
    return out;
#endif
}

struct F32 {
    typedef float X;
    typedef vf Weight;
    static constexpr int STEP = 1, BYTES = 64;  // inputs and panel bytes of a step
    static inline Weight weight(const char* w, int v) { return load((const float*)w + v * VL); }
    static inline vf mac(vf acc, Weight w, X x) { return acc + w * x; }
};
struct BF16 : F32 {
    static constexpr int BYTES = 32;
    static inline Weight weight(const char* w, int v) { return load((const bf16*)w + v * VL); }
};
struct I8 : F32 {
    static constexpr int BYTES = 16;
    static inline Weight weight(const char* w, int v) {
#if defined(__AVX512F__)
        return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)w)));
#elif defined(__AVX2__)
        return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(w + v * VL))));
#else
        return __builtin_convertvector(__builtin_convertvector(*(const vq*)(w + v * VL), vi), vf);
#endif
    }
};
struct B16 {
    typedef uint32_t X;
    typedef vu Weight;
    static constexpr int STEP = 2, BYTES = 64;
    static inline Weight weight(const char* w, int v) { return *(const vu*)(w + v * VL * 4); }
    static inline vf mac(vf acc, Weight w, X x) { return dot2(acc, w, x); }
};

// Grouped formats accumulate a group of inputs on their own and scale the sum.
struct Acts {  // quantised activations: int8 values, and per row and group their scale and -offset * sum
    const int8_t* values;
    const float* scales;
    const int32_t* offsets;
    long inputs, groups;
};
struct W8 {
    typedef vi Part;
    static constexpr int GROUP = 64, BYTES = 1024, WORDS = 1, HEAD = 0, OFFSET = 128;  // WORDS: vectors of weights per 64 bytes
    static inline vi word(vu raw, int) { return (vi)raw; }
};
struct W4 {
    typedef vi Part;
    static constexpr int GROUP = 32, BYTES = 288, WORDS = 2, HEAD = 32, OFFSET = 8;
    static inline vi word(vu raw, int i) { return (vi)((raw >> (4 * i)) & 0x0f0f0f0fu); }
};
