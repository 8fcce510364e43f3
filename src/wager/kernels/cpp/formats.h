// How weights are stored in a panel of 16 output rows, and how an inner step multiplies them. Panels interleave outputs along the input, so
// that one load holds the same input of 16 outputs.
//
//   format   activations   panel bytes                                    inner step
//   F32      float32       [k][16] float                                  1 input
//   BF16     float32       [k][16] bfloat16                               1 input
//   F16      float32       [k][16] float16                                1 input
//   I8       float32       [k][16] int8, one scale per output             1 input
//   B16      bfloat16      [k / 2][16][2] bfloat16                        2 inputs
//   W8       int8          [k / 4][16][4] uint8 = int8 + 128              4 inputs, groups of 64, one scale per output
//   W16      int16         per 64 inputs [16] scales bfloat16,            2 inputs, groups of 64
//                          then [32][16][2] int16
//
// Other grouped formats hold, per 32 inputs: [16] scales float16, in formats with zero points [16] of them in float16, then the codes in words of
// four bytes per output. Eight bits: [8][16][4] uint8 = int8 + 128. Four bits: [4][16][4] bytes; the low nibbles of a word are inputs
// 8 j .. 8 j + 3, the high ones 8 j + 4 .. 8 j + 7; a nibble is a value + 8, or numbers one of 16 values (Table).
#pragma once
#include "simd.h"

constexpr int NR = 16;       // outputs of a panel
constexpr int NV = NR / VL;  // vectors of a panel row
typedef int8_t vq __attribute__((vector_size(VL), aligned(1), may_alias));

// Sums over an input group of codes (BITS wide, biased by OFFSET, as unsigned bytes) times int8 activations, four inputs a step. The way of
// summing depends on the instructions there are; the integer that comes out does not. `offset` is -OFFSET * sum of the activations.
template <int BITS>
struct Dot {
#if defined(__AVX512VNNI__)
    static inline vi start(int32_t offset) { return vi{} + offset; }
    static inline vi add(vi acc, vi w, int32_t x) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x)); }
    static inline vi finish(vi acc, int32_t) { return acc; }
#elif defined(__AVX512BW__)
    static inline vi start(int32_t offset) { return BITS == 4 ? vi{} : vi{} + offset; }
    static inline vi add(vi acc, vi w, int32_t x) {
        __m512i four = _mm512_set1_epi32(x);
        if (BITS == 4) return (vi)_mm512_add_epi16((__m512i)acc, _mm512_maddubs_epi16((__m512i)w, four));
        const __m512i bytes = _mm512_set1_epi32(0x00ff00ff);
        __m512i even = _mm512_and_si512((__m512i)w, bytes), odd = _mm512_and_si512(_mm512_srli_epi16((__m512i)w, 8), bytes);
        __m512i x_even = _mm512_srai_epi16(_mm512_slli_epi16(four, 8), 8), x_odd = _mm512_srai_epi16(four, 8);
        __m512i sum = _mm512_add_epi32(_mm512_madd_epi16(even, x_even), _mm512_madd_epi16(odd, x_odd));
        return (vi)_mm512_add_epi32((__m512i)acc, sum);
    }
    static inline vi finish(vi acc, int32_t offset) {
        return BITS == 4 ? (vi)_mm512_madd_epi16((__m512i)acc, _mm512_set1_epi16(1)) + offset : acc;
    }
#elif defined(__AVX2__) && !defined(__AVX512F__)
    // Four bits: a pair's sum is at most 15 * 127 * 2, and 8 of those fit 16 bits. Eight bits: |w| <= 128 times x with w's sign, |x| <= 127,
    // so that a pair's sum fits 16 bits.
    static inline vi start(int32_t) { return vi{}; }
    static inline vi add(vi acc, vi w, int32_t x) {
        __m256i four = _mm256_set1_epi32(x);
        if (BITS == 4) return (vi)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)w, four));
        __m256i code = _mm256_xor_si256((__m256i)w, _mm256_set1_epi8((char)0x80));
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(four, code));
        return (vi)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static inline vi finish(vi acc, int32_t offset) {
        return BITS == 4 ? (vi)_mm256_madd_epi16((__m256i)acc, _mm256_set1_epi16(1)) + offset : acc;
    }
#else
    static inline vi start(int32_t offset) { return vi{} + offset; }
    static inline vi add(vi acc, vi w, int32_t x) {
        for (int b = 0; b < 4; b++) acc += (vi)(((vu)w >> (8 * b)) & 255u) * (int32_t)(int8_t)(x >> (8 * b));
        return acc;
    }
    static inline vi finish(vi acc, int32_t) { return acc; }
#endif
};

// acc += w[0] x[0] + w[1] x[1] over pairs of int16: twice the products of a float's step in most instruction sets.
static inline vi dot2(vi acc, vi w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX512BW__)
    return acc + (vi)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return acc + (vi)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x));
#elif defined(__SSE2__) && !defined(__AVX__)
    return acc + (vi)_mm_madd_epi16((__m128i)w, _mm_set1_epi32(x));
#else
    return acc + ((w << 16) >> 16) * (int32_t)(int16_t)x + (w >> 16) * (x >> 16);
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
struct F16 : F32 {
    static constexpr int BYTES = 32;
    static inline Weight weight(const char* w, int v) { return load_half((const uint16_t*)w + v * VL); }
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
struct Acts {  // of quantised activations, per row and group: their scale and, of int8 ones, -offset * sum
    const float* scales;
    const int32_t* offsets;
    long inputs, groups;
};
struct W16 {  // |weight| <= 8192, |activation| <= 4095: 64 products fit an int32
    static constexpr int GROUP = 64, BITS = 13, HEAD = 2 * NR, BYTES = HEAD + 2 * NR * GROUP;
};
struct W8 {
    static constexpr int BITS = 8, GROUP = 64, BYTES = 1024, HEAD = 0, OFFSET = 128;
    static constexpr bool ZEROS = false;
};
template <int B, bool Z>
struct Grouped {
    static constexpr int BITS = B, GROUP = 32, HEAD = Z ? 64 : 32, BYTES = HEAD + NR * GROUP * B / 8, OFFSET = 1 << (B - 1);
    static constexpr bool ZEROS = Z;
};
// The WORDS vectors of four codes that a vector of words holds, as biased bytes.
template <typename F>
static inline vi word(vu raw, int i) { return (vi)(F::BITS == 8 ? raw : (raw >> (4 * i)) & 0x0f0f0f0fu); }

// Values of a word's code i (0 .. 32 / BITS - 1) as floats.
template <int BITS>
struct Codes {
    const float* table;
    inline vf value(vu raw, int i) const {
        const int shift = BITS == 4 ? 8 * (i % 4) + 4 * (i / 4) : 8 * i;
        const vu bias = vu{} + (BITS == 4 ? 0x88888888u : 0x80808080u);
        return __builtin_convertvector((vi)((raw ^ bias) << (32 - BITS - shift)) >> (32 - BITS), vf);
    }
};
struct Table {
    const float* table;
    inline vf value(vu raw, int i) const { return look_up(table, raw >> (8 * (i % 4) + 4 * (i / 4))); }
};
