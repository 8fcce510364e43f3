// Gathering rows of a table, stable sorting by key, and reducing segments: each output has one owner, so the bits never depend on threads.
#include <algorithm>
#include <cmath>
#include <utility>
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
        const W *from = table + ids[r] * width, *next = table + ids[std::min(rows - 1, r + 2)] * width;
        long d = 0;
        for (; d + VL <= width; d += VL) {
            __builtin_prefetch(next + d, 0, 2);
            store(y + r * width + d, load(from + d));
        }
        for (; d < width; d++) y[r * width + d] = widen(from[d]);
    });
}

// Radix sorts from the least significant digit: every pass keeps the order of equal digits, so the sort is stable.
constexpr int DIGIT_BITS = 11;
constexpr long DIGITS = 1 << DIGIT_BITS, SORT_PART = 1 << 14;  // keys that are worth a thread

struct Digits {  // of keys of `bits` bits: as few passes as there must be, of the same size
    int bits, passes = std::max(1, (bits + DIGIT_BITS - 1) / DIGIT_BITS), each = std::max(1, (bits + passes - 1) / passes);
    long operator()(uint64_t key, int pass) const { return key >> pass * each & ((1L << each) - 1); }
};

// Keys of at most 32 bits and as many rows: key and row travel as one number, and threads share out the rows of a pass. `from` and `to` hold
// count numbers each.
static void sort_pairs(const int64_t* keys, long count, int64_t lowest, Digits digit, uint64_t* from, uint64_t* to, int64_t* order, int threads) {
    const long parts = std::max<long>(1, std::min<long>(threads, count / SORT_PART));
    auto begin = [=](long part) { return count * part / parts; };
    std::vector<long> starts(parts * DIGITS);
    each(threads, parts, [&](long part) {
        for (long i = begin(part); i < begin(part + 1); i++) from[i] = ((uint64_t)keys[i] - (uint64_t)lowest) << 32 | (uint64_t)i;
    });
    for (int pass = 0; pass < digit.passes; pass++, std::swap(from, to)) {
        each(threads, parts, [&](long part) {
            long* counts = &starts[part * DIGITS];
            std::fill_n(counts, DIGITS, 0);
            for (long i = begin(part); i < begin(part + 1); i++) counts[digit(from[i] >> 32, pass)]++;
        });
        long total = 0;
        for (long d = 0; d < DIGITS; d++)
            for (long part = 0; part < parts; part++) total += std::exchange(starts[part * DIGITS + d], total);
        each(threads, parts, [&](long part) {
            long* next = &starts[part * DIGITS];
            const bool last = pass + 1 == digit.passes;
            for (long i = begin(part); i < begin(part + 1); i++) {
                long at = next[digit(from[i] >> 32, pass)]++;
                if (last) order[at] = (int64_t)(from[i] & 0xffffffff);
                else to[at] = from[i];
            }
        });
    }
}

// Any keys: rows travel, keys are looked up. `from` holds count rows.
static void sort_rows(const int64_t* keys, long count, int64_t lowest, Digits digit, int64_t* from, int64_t* order) {
    int64_t* to = order;
    for (long i = 0; i < count; i++) to[i] = i;
    for (int pass = 0; pass < digit.passes; pass++) {
        std::swap(from, to);
        long starts[DIGITS + 1] = {};
        auto of = [&](int64_t row) { return digit((uint64_t)keys[row] - (uint64_t)lowest, pass); };
        for (long i = 0; i < count; i++) starts[of(i) + 1]++;
        for (long d = 0; d < DIGITS; d++) starts[d + 1] += starts[d];
        for (long i = 0; i < count; i++) to[starts[of(from[i])]++] = from[i];
    }
    if (to != order) std::copy_n(to, count, order);
}

static void sort_by_key(const int64_t* keys, long count, int64_t* order, int threads) {
    if (!count) return;
    int64_t lowest = keys[0], highest = keys[0];
    for (long i = 1; i < count; i++) lowest = std::min(lowest, keys[i]), highest = std::max(highest, keys[i]);
    const uint64_t range = (uint64_t)highest - (uint64_t)lowest;
    const Digits digits{range ? 64 - __builtin_clzll(range) : 1};
    const bool pairs = digits.bits <= 32 && count >> 32 == 0;
    std::vector<uint64_t> room(pairs ? 2 * count : count);
    if (pairs) sort_pairs(keys, count, lowest, digits, room.data(), room.data() + count, order, threads);
    else sort_rows(keys, count, lowest, digits, (int64_t*)room.data(), order);
}

// Where each key in [0, segments) begins in sorted keys.
static void segment_starts(const int64_t* keys, long count, long segments, int64_t* starts) {
    std::fill_n(starts, segments + 1, 0);
    for (long i = 0; i < count; i++)
        if (keys[i] < segments) starts[std::max<int64_t>(keys[i] + 1, 0)]++;
    for (long s = 0; s < segments; s++) starts[s + 1] += starts[s];
}

enum { SUM, MEAN, MAX };

constexpr long AHEAD = 8;  // rows that are fetched before their turn

// Columns [d, d + N * VL) of a segment's rows, in their order.
template <int MODE, int N>
static void reduce_columns(const float* values, const int64_t* rows, long begin, long end, long width, long d, float* to) {
    vf made[N];
    for (vf& v : made) v = vf{} + (MODE == MAX ? -INFINITY : 0.0f);
    for (long i = begin; i < end; i++) {
        const float* from = values + (rows ? rows[i] : i) * width + d;
        if (rows && i + AHEAD < end)
            for (int n = 0; n < N; n++) __builtin_prefetch(values + rows[i + AHEAD] * width + d + n * VL);
        for (int n = 0; n < N; n++) {
            vf v = load(from + n * VL);
            made[n] = MODE == MAX ? (v > made[n] || v != v ? v : made[n]) : made[n] + v;
        }
    }
    for (int n = 0; n < N; n++) store(to + d + n * VL, made[n]);
}

template <int MODE>
static void reduce(const float* values, const int64_t* rows, const int64_t* starts, long segments, long width, float* y, int threads) {
    long total = segments ? starts[segments] - starts[0] : 0, per = segments ? std::max<long>(1, total / segments) : 1;
    each_chunk(threads, segments, width * per, [&](long s) {
        float* to = y + s * width;
        const long begin = starts[s], end = starts[s + 1];
        long d = 0;
        for (; d + 4 * VL <= width; d += 4 * VL) reduce_columns<MODE, 4>(values, rows, begin, end, width, d, to);
        for (; d + VL <= width; d += VL) reduce_columns<MODE, 1>(values, rows, begin, end, width, d, to);
        std::fill(to + d, to + width, MODE == MAX ? -INFINITY : 0.0f);
        if (d < width)
            for (long i = begin; i < end; i++) {
                const float* from = values + (rows ? rows[i] : i) * width;
                for (long e = d; e < width; e++) to[e] = MODE == MAX ? (from[e] > to[e] || from[e] != from[e] ? from[e] : to[e]) : to[e] + from[e];
            }
        if (MODE == MEAN && end > begin)
            for (long e = 0; e < width; e++) to[e] /= (float)(end - begin);
    });
}

extern "C" {
void wager_embedding_f32(const float* table, const int64_t* ids, long rows, long width, float* y, int threads) { embed(table, ids, rows, width, y, threads); }
void wager_embedding_bf16(const bf16* table, const int64_t* ids, long rows, long width, float* y, int threads) { embed(table, ids, rows, width, y, threads); }
void wager_sort_by_key(const int64_t* keys, long count, int64_t* order, int threads) { sort_by_key(keys, count, order, threads); }
void wager_segment_starts(const int64_t* keys, long count, long segments, int64_t* starts) { segment_starts(keys, count, segments, starts); }
// Segment s is rows [starts[s], starts[s + 1]) of `values`, or of the row numbers `rows` into it. mode: 0 sum, 1 mean, 2 max.
void wager_segment_reduce(const float* values, const int64_t* rows, const int64_t* starts, long segments, long width, int mode, float* y, int threads) {
    if (mode == SUM) reduce<SUM>(values, rows, starts, segments, width, y, threads);
    else if (mode == MEAN) reduce<MEAN>(values, rows, starts, segments, width, y, threads);
    else reduce<MAX>(values, rows, starts, segments, width, y, threads);
}
}
