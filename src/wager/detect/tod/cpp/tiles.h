// M rows of a group against one panel, in float32 or in int8: the pairs that may be nearer than the row's threshold become candidates.
#pragma once
#include <array>
#include <cmath>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "lists.h"

namespace {
typedef float vf __attribute__((vector_size(LANES * 4)));

inline vf all(float v) { return v - vf{}; }

inline vf load(const float* from) {
    vf v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// One bit a lane: a <= b.
inline uint32_t below(const vf& a, const vf& b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(reinterpret_cast<const __m512&>(a), reinterpret_cast<const __m512&>(b), _CMP_LE_OQ);
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<const __m256&>(a), reinterpret_cast<const __m256&>(b), _CMP_LE_OQ));
#else
    uint32_t mask = 0;
    for (int l = 0; l < LANES; ++l) mask |= static_cast<uint32_t>(a[l] <= b[l]) << l;
    return mask;
#endif
}

inline vf larger(const vf& a, const vf& b) { return a > b ? a : b; }

using Tile = void (*)(Group&, const int16_t*, int64_t, const Problem&);

// Squared distances |b|^2 - 2 <a, b> + |a|^2 in float32, off by at most slack (|a| + |b|)^2.
template <int M>
void tile_fp32(Group& g, const int16_t* slots, int64_t p, const Problem& problem) {
    const auto& [base, queries, lists] = problem;
    vf acc[M][VECTORS];
    const float* a[M];
    for (int r = 0; r < M; ++r) {
        a[r] = g.query.data() + slots[r] * base.d;
        for (int u = 0; u < VECTORS; ++u) acc[r][u] = load(base.norm2 + p * WIDTH + u * LANES);
    }
    const float* b = base.panel + p * base.d * WIDTH;
    for (int64_t t = 0; t < base.d; ++t, b += WIDTH) {
        vf v[VECTORS];
#pragma GCC unroll 2
        for (int u = 0; u < VECTORS; ++u) v[u] = load(b + u * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < M; ++r)
#pragma GCC unroll 2
            for (int u = 0; u < VECTORS; ++u) acc[r][u] += a[r][t] * v[u];
    }
    // Cheap test before the exact one: slack (|a| + |b|)^2 <= 2 slack (|a|^2 + |b|^2), and as much again covers every rounding on the way,
    // because slack is at least 16 roundings of a float.
    const float margin = 4 * lists.slack, longest2 = base.longest[p] * base.longest[p];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
        const int slot = slots[r];
        const float norm2 = queries.norm2[g.row[slot]], norm = queries.norm[g.row[slot]];
        const vf reachable = all(g.limit[slot] - norm2 + margin * (norm2 + longest2));
        uint64_t hits = 0;
#pragma GCC unroll 2
        for (int u = 0; u < VECTORS; ++u) hits |= static_cast<uint64_t>(below(acc[r][u], reachable)) << (u * LANES);
        if (!hits) continue;
        alignas(64) float value[WIDTH];
        std::memcpy(value, acc[r], sizeof value);
        for (; hits; hits &= hits - 1) {
            const int l = __builtin_ctzll(hits);
            const float reach = base.norm[p * WIDTH + l] + norm, bound = lists.slack * reach * reach, middle = value[l] + norm2;
            push(g, slot, p * WIDTH + l, middle - bound, middle + bound, problem);
        }
    }
}

#if defined(__AVX512VNNI__)
// Squared distances between levels in whole numbers, which is exact. A point lies within its residual of its levels, so the distance of two
// points differs from that of their levels by at most the sum of the residuals.
template <int M>
void tile_int8(Group& g, const int16_t* slots, int64_t p, const Problem& problem) {
    const auto& [base, queries, lists] = problem;
    const int64_t words = words_of(base.d);
    __m512i acc[M][VECTORS];  // <a, b> - half of |b|^2
    const uint8_t* a[M];
    for (int r = 0; r < M; ++r) {
        a[r] = g.words.data() + slots[r] * 4 * words;
        for (int u = 0; u < VECTORS; ++u)
            acc[r][u] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(base.half + p * WIDTH + u * LANES));
    }
    const int8_t* b = base.words + p * words * WIDTH * 4;
    for (int64_t t = 0; t < words; ++t, b += WIDTH * 4) {
        __m512i v[VECTORS];
#pragma GCC unroll 2
        for (int u = 0; u < VECTORS; ++u) v[u] = _mm512_loadu_si512(b + u * LANES * 4);
#pragma GCC unroll 8
        for (int r = 0; r < M; ++r) {
            int32_t word;
            std::memcpy(&word, a[r] + 4 * t, 4);
            const __m512i four = _mm512_set1_epi32(word);
#pragma GCC unroll 2
            for (int u = 0; u < VECTORS; ++u) acc[r][u] = _mm512_dpbusd_epi32(acc[r][u], four, v[u]);
        }
    }
    constexpr float STEP = 1.0f / LEVELS, MORE = 1 + 0x1p-18f;
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
        const int slot = slots[r];
        const int64_t row = g.row[slot];
        const float reach = (g.root[slot] + base.coarsest[p]) * LEVELS, square = reach * reach * MORE;
        const int32_t most = square < NOWHERE ? static_cast<int32_t>(square) + 1 : NOWHERE;
        const __m512i least = _mm512_set1_epi32((queries.length[row] - most) >> 1);
        const uint32_t hits[VECTORS] = {_mm512_cmpge_epi32_mask(acc[r][0], least), _mm512_cmpge_epi32_mask(acc[r][1], least)};
        if (!(hits[0] | hits[1])) continue;
        for (int u = 0; u < VECTORS; ++u) {
            if (!hits[u]) continue;
            const __m512i whole = _mm512_sub_epi32(
                _mm512_add_epi32(_mm512_set1_epi32(queries.length[row]), _mm512_loadu_si512(base.odd + p * WIDTH + u * LANES)),
                _mm512_slli_epi32(acc[r][u], 1));
            const __m512 root = _mm512_mul_ps(_mm512_sqrt_ps(_mm512_cvtepi32_ps(whole)), _mm512_set1_ps(STEP));
            const __m512 apart = _mm512_add_ps(_mm512_loadu_ps(base.residual + p * WIDTH + u * LANES), _mm512_set1_ps(queries.residual[row]));
            const __m512 inner = _mm512_max_ps(_mm512_fmadd_ps(root, _mm512_set1_ps(1 - 0x1p-20f), -apart), _mm512_setzero_ps());
            const __m512 outer = _mm512_fmadd_ps(root, _mm512_set1_ps(1 + 0x1p-20f), apart);
            alignas(64) float low[LANES], high[LANES];
            _mm512_store_ps(low, _mm512_mul_ps(_mm512_mul_ps(inner, inner), _mm512_set1_ps(1 - 0x1p-20f)));
            _mm512_store_ps(high, _mm512_mul_ps(_mm512_mul_ps(outer, outer), _mm512_set1_ps(1 + 0x1p-20f)));
            for (uint32_t left = hits[u]; left; left &= left - 1) {
                const int l = __builtin_ctz(left);
                push(g, slot, p * WIDTH + u * LANES + l, low[l], high[l], problem);
            }
        }
    }
}
#endif

template <int... M>
constexpr std::array<Tile, sizeof...(M)> fp32_tiles(std::integer_sequence<int, M...>) {
    return {tile_fp32<M + 1>...};
}
constexpr std::array<Tile, ROWS> FP32 = fp32_tiles(std::make_integer_sequence<int, ROWS>{});

#if defined(__AVX512VNNI__)
template <int... M>
constexpr std::array<Tile, sizeof...(M)> int8_tiles(std::integer_sequence<int, M...>) {
    return {tile_int8<M + 1>...};
}
constexpr std::array<Tile, ROWS> INT8 = int8_tiles(std::make_integer_sequence<int, ROWS>{});
#else
constexpr std::array<Tile, ROWS> INT8 = FP32;  // never chosen, see HAS_INT8
#endif
}  // namespace
