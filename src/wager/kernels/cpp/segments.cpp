// Gathering rows of a table, stable sorting by key, and reducing segments: each output has one owner, so the bits never depend on threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"
#include "simd.h"

constexpr long CLAIM = 1 << 14;  // elements that a thread claims at once

template <typename F>
static void each_chunk(int threads, long rows, long width, F&& body) {
    long chunk = std::max<long>(1, CLAIM / std::max<long>(1, width));
    each(rows * width > 4 * CLAIM ? threads : 1, (rows + chunk - 1) / chunk, [&](long c) {
        for (long r = c * chunk; r < std::min(rows, (c + 1) * chunk); r++) body(r);
    });
}

template <typename W>
static void embed(const W* table, const int64_t* ids, long rows, long width, float* y, int threads) {
    each_chunk(threads, rows, width, [&](long r) {
        const W* from = table + ids[r] * width;
        long d = 0;
        for (; d + VL <= width; d += VL) store(y + r * width + d, load(from + d));
        for (; d < width; d++) y[r * width + d] = widen(from[d]);
    });
}

// Radix sort of (key - lowest) from the least significant digit: every pass keeps the order of equal digits, so the sort is stable.
static void sort_by_key(const int64_t* keys, long count, int64_t lowest, int64_t highest, int64_t* order) {
    constexpr int BITS = 11;
    uint64_t range = (uint64_t)highest - (uint64_t)lowest;
    std::vector<int64_t> other(count);
    int64_t *from = other.data(), *to = order;
    for (long i = 0; i < count; i++) to[i] = i;
    for (int shift = 0; shift < 64 && (shift == 0 || range >> shift); shift += BITS) {
        std::swap(from, to);
        long starts[(1 << BITS) + 1] = {};
        auto digit = [&](int64_t i) { return (((uint64_t)keys[i] - (uint64_t)lowest) >> shift) & ((1 << BITS) - 1); };
        for (long i = 0; i < count; i++) starts[digit(i) + 1]++;
        for (int d = 0; d < 1 << BITS; d++) starts[d + 1] += starts[d];
        for (long i = 0; i < count; i++) to[starts[digit(from[i])]++] = from[i];
    }
    if (to != order) std::copy_n(to, count, order);
}

enum { SUM, MEAN, MAX };

template <int MODE>
static void reduce(const float* values, const int64_t* rows, const int64_t* starts, long segments, long width, float* y, int threads) {
    long total = segments ? starts[segments] - starts[0] : 0, per = segments ? std::max<long>(1, total / segments) : 1;
    each_chunk(threads, segments, width * per, [&](long s) {
        float* to = y + s * width;
        std::fill_n(to, width, MODE == MAX ? -INFINITY : 0.0f);
        for (long i = starts[s]; i < starts[s + 1]; i++) {
            const float* from = values + (rows ? rows[i] : i) * width;
            long d = 0;
            for (; d + VL <= width; d += VL) {
                vf v = load(from + d), before = load(to + d);
                store(to + d, MODE == MAX ? (v > before || v != v ? v : before) : before + v);
            }
            for (; d < width; d++) to[d] = MODE == MAX ? (from[d] > to[d] || from[d] != from[d] ? from[d] : to[d]) : to[d] + from[d];
        }
        long count = starts[s + 1] - starts[s];
        if (MODE == MEAN && count)
            for (long d = 0; d < width; d++) to[d] /= (float)count;
    });
}

extern "C" {
void wager_embedding_f32(const float* table, const int64_t* ids, long rows, long width, float* y, int threads) { embed(table, ids, rows, width, y, threads); }
void wager_embedding_bf16(const bf16* table, const int64_t* ids, long rows, long width, float* y, int threads) { embed(table, ids, rows, width, y, threads); }
void wager_sort_by_key(const int64_t* keys, long count, long lowest, long highest, int64_t* order) { sort_by_key(keys, count, lowest, highest, order); }
// Segment s is rows [starts[s], starts[s + 1]) of `values`, or of the row numbers `rows` into it. mode: 0 sum, 1 mean, 2 max.
void wager_segment_reduce(const float* values, const int64_t* rows, const int64_t* starts, long segments, long width, int mode, float* y, int threads) {
    if (mode == SUM) reduce<SUM>(values, rows, starts, segments, width, y, threads);
    else if (mode == MEAN) reduce<MEAN>(values, rows, starts, segments, width, y, threads);
    else reduce<MAX>(values, rows, starts, segments, width, y, threads);
}
}
