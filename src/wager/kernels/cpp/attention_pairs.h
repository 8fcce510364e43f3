// What attention does in registers where the processor multiplies pairs of bfloat16 (AVX-512 BF16), for keys and values in bfloat16.
//
// A block of keys is turned to [pairs of dimensions][keys], so that a score is one lane's chain over the dimensions and nothing is added across
// lanes; values become [pairs of keys][dimensions]. Queries and softmax weights enter as the sum of two bfloat16 numbers, which leaves out less
// than 2^-17 of a number: 2 instructions per 32 products, with the cache's numbers as they are.
#pragma once
#include <vector>

#include "attention_tiles.h"

#if defined(__AVX512BF16__)
constexpr bool HAS_PAIRS = true;
constexpr int MOST = 6;  // rows of a tile, so that MOST * 4 sums and their operands fill the registers

typedef uint32_t two __attribute__((may_alias));  // two bfloat16 numbers

static inline vf dot(vf sum, __m512i a, two b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32((int)b)); }

// Room for `count` elements at a cache line's start; what was there is lost.
static inline two* room(std::vector<uint32_t>& memory, long count) {
    if ((long)memory.size() < count + 16) memory.resize(count + 16);
    return (two*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
}

// 32 numbers as 16 pairs (high, low): high is the number in bfloat16, low what is left of it.
static inline void split(vf first, vf second, __m512i& high, __m512i& low) {
    high = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    vf a = first - (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(high)), 16);
    vf b = second - (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(high, 1)), 16);
    low = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}
// `to` gets, of every two numbers, their high parts and then their low ones.
static inline void split_row(const float* from, long padded, two* to) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (long d = 0; d < padded; d += 32) {
        __m512i high, low;
        split(load(from + d), load(from + d + 16), high, low);
        _mm512_storeu_si512(to + d, _mm512_permutex2var_epi32(high, first, low));
        _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi32(high, second, low));
    }
}

// 8 pairs of 16 rows, columns made rows: to[PAIR_KEYS * i] gets pair i of every row. Unless ALL, only `count` pairs of a row may be read, more are 0.
template <bool ALL>
static inline void turn_pairs(const bf16* const* rows, long d, int count, two* to) {
    __mmask8 there = (__mmask8)((1u << count) - 1);
    asm("" : "+r"(rows));  // otherwise GCC keeps the rows' addresses in vector registers
    auto row = [&](int i) { return ALL ? _mm256_loadu_si256((const __m256i*)(rows[i] + d)) : _mm256_maskz_loadu_epi32(there, rows[i] + d); };
    auto rows_of = [&](int i) { return _mm512_inserti64x4(_mm512_castsi256_si512(row(i)), row(i + 4), 1); };
    __m512i quads[8];  // four keys in a quarter: of pairs i and i + 4 of keys 0 to 3, then of keys 4 to 7; behind them those of keys 8 to 15
    for (int half = 0; half < 8; half += 4) {
        __m512i a = rows_of(2 * half), b = rows_of(2 * half + 1), c = rows_of(2 * half + 2), e = rows_of(2 * half + 3);
        __m512i ab = _mm512_unpacklo_epi32(a, b), ab2 = _mm512_unpackhi_epi32(a, b), ce = _mm512_unpacklo_epi32(c, e), ce2 = _mm512_unpackhi_epi32(c, e);
        quads[half] = _mm512_unpacklo_epi64(ab, ce), quads[half + 1] = _mm512_unpackhi_epi64(ab, ce);
        quads[half + 2] = _mm512_unpacklo_epi64(ab2, ce2), quads[half + 3] = _mm512_unpackhi_epi64(ab2, ce2);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_store_si512(to + i * PAIR_KEYS, _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0x88));
        _mm512_store_si512(to + (i + 4) * PAIR_KEYS, _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0xdd));
    }
}
// Keys as [padded / 2][PAIR_KEYS]. An odd width's last number is paired with 0. `at`: where their head begins.
static inline void turn_keys(const bf16* const* keys, long at, long width, long padded, int count, two* to) {
    for (int j = 0; j < count; j += 16)
        for (long d = 0; d < padded; d += 16)
            if (width - d >= 16) turn_pairs<true>(keys + j, at + d, 8, to + d / 2 * PAIR_KEYS + j);
            else turn_pairs<false>(keys + j, at + d, (int)std::max<long>((width - d) / 2, 0), to + d / 2 * PAIR_KEYS + j);
    for (int j = 0; j < PAIR_KEYS && width % 2; j++) to[width / 2 * PAIR_KEYS + j] = keys[j][at + width - 1];
}

// Values as [padded / 32][pairs of keys][32], of every 32 dimensions in the order that two unpacks leave. `at`: where their head begins.
static inline void pair_values(const bf16* const* values, long at, long width, long padded, int pairs, two* to) {
    for (int j = 0; j < pairs; j++)
        for (long d = 0; d < padded; d += 32) {
            __mmask32 there = width - d >= 32 ? 0xffffffffu : (1u << (width - d)) - 1;
            auto row = [&](const bf16* from) { return width - d >= 32 ? _mm512_loadu_si512(from + d) : _mm512_maskz_loadu_epi16(there, from + d); };
            __m512i a = row(values[2 * j] + at), b = row(values[2 * j + 1] + at);
            two* out = to + d * (PAIR_KEYS / 2) + j * 32;
            _mm512_store_si512(out, _mm512_unpacklo_epi16(a, b));
            _mm512_store_si512(out + 16, _mm512_unpackhi_epi16(a, b));
        }
}
// `width` sums in that order, times a factor, in their own order.
static inline void sums_in_order(const float* sums, long width, float factor, float* to) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23), second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (long d = 0; d < width; d += 32) {
        __m512 a = (__m512)(load(sums + d) * factor), b = (__m512)(load(sums + d + 16) * factor);
        __mmask16 low = width - d >= 16 ? 0xffff : (1u << (width - d)) - 1, high = width - d >= 32 ? 0xffff : width - d <= 16 ? 0 : (1u << (width - d - 16)) - 1;
        _mm512_mask_storeu_ps(to + d, low, _mm512_permutex2var_ps(a, first, b));
        _mm512_mask_storeu_ps(to + d + 16, high, _mm512_permutex2var_ps(a, second, b));
    }
}

// Scores of ROWS queries with VECTORS * 16 keys. `q` holds [padded / 32][rows][32], `stride` numbers apart: within 32 dimensions a row's place is
// a constant, so that one address serves all rows. `ahead` fetches evenly, a share per pair of dimensions here and per pair of keys in add_pairs:
// a burst of fetches would make the loop wait for them.
template <int ROWS, int VECTORS>
static __attribute__((noinline)) void pair_scores(const two* q, long stride, long padded, const two* keys, float scale, float* out, Ahead& ahead) {
    vf sums[ROWS][VECTORS] = {};
    for (long chunk = 0; chunk < padded / 32; chunk++, q += stride)
        for (long d = 0; d < 32; d += 2, keys += PAIR_KEYS) {
            ahead.fetch();
            __m512i k[VECTORS];
            for (int i = 0; i < VECTORS; i++) k[i] = _mm512_load_si512(keys + i * 16);
            for (int part = 0; part < 2; part++)
                for (int r = 0; r < ROWS; r++)
                    for (int i = 0; i < VECTORS; i++) sums[r][i] = dot(sums[r][i], k[i], q[r * 32 + d + part]);
        }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < VECTORS; i++) store(out + r * PAIR_KEYS + i * 16, sums[r][i] * scale);
}

// sums = sums * rescale + weights * values over `pairs` pairs of keys, for ROWS queries and VECTORS vectors of sums.
template <int ROWS, int VECTORS>
static __attribute__((noinline)) void add_pairs(const two* weights, const two* values, int pairs, float* acc, long padded, const float* rescale, Ahead& ahead) {
    vf sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < VECTORS; i++) sums[r][i] = load(acc + r * padded + i * 16) * rescale[r];
    for (int j = 0; j < pairs; j++) {
        ahead.fetch();
        __m512i v[VECTORS];
        for (int i = 0; i < VECTORS; i++) v[i] = _mm512_load_si512(values + (i / 2 * (PAIR_KEYS / 2) + j) * 32 + i % 2 * 16);
        for (int part = 0; part < 2; part++)
            for (int r = 0; r < ROWS; r++)
                for (int i = 0; i < VECTORS; i++) sums[r][i] = dot(sums[r][i], v[i], weights[r * PAIR_KEYS + 2 * j + part]);
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < VECTORS; i++) store(acc + r * padded + i * 16, sums[r][i]);
}

// Calls tile(row, constant of the number of rows) for tiles of nearly the same size that together are all rows.
template <typename F>
static inline void in_pair_tiles(long rows, F&& tile) {
    using std::integral_constant;
    long r = 0;
    for (long left = (rows + MOST - 1) / MOST; left; left--) {
        long size = (rows - r + left - 1) / left;
        switch (size) {
            case 6: tile(r, integral_constant<int, 6>{}); break;
            case 5: tile(r, integral_constant<int, 5>{}); break;
            case 4: tile(r, integral_constant<int, 4>{}); break;
            case 3: tile(r, integral_constant<int, 3>{}); break;
            case 2: tile(r, integral_constant<int, 2>{}); break;
            default: tile(r, integral_constant<int, 1>{});
        }
        r += size;
    }
}
#else
constexpr bool HAS_PAIRS = false;
constexpr int MOST = 1;
#endif
