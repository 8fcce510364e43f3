// What attention does in registers: tiles of scores, the online softmax of a block of keys, and tiles of the value sum.
//
// Split order: bfloat16 numbers that lie side by side share a 32-bit lane, so a shift makes a vector of the even ones and a mask one of the
// odd ones, cheaper than widening in order. Queries, sums and widened copies of bfloat16 rows keep this order: 2 * VL numbers are the VL
// even ones, then the VL odd ones. A dot product and a weighted sum do not care. Rows of other types stay in their own order.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "simd.h"

constexpr int KEYS = 32;                     // keys of a block
constexpr int PAIR_KEYS = 64;                // the same where pairs are multiplied: they take half the room
constexpr int PAIR = 2 * VL;                 // widths are padded to this
constexpr int MANY = VL < 16 ? 3 : 6;        // rows of a tile where there are many, so that MANY * 4 sums and their operands fill the registers

typedef uint32_t packed __attribute__((vector_size(VL * 4), aligned(2), may_alias));

// The first or second half of PAIR numbers, in split order where they are bfloat16.
template <int HALF>
static inline vf half(const float* p) { return load(p + HALF * VL); }
template <int HALF>
static inline vf half(const bf16* p) {
    vu both = (vu) * (const packed*)p;
    return HALF ? (vf)(both & 0xffff0000u) : (vf)(both << 16);
}
template <int HALF>
static inline vf half(const fp8* p) { return load(p + HALF * VL); }

// Left alone, GCC folds loads into some products of a tile, loads again for others, and spills sums instead. So operands are made to sit in
// registers, and where a loop needs all 16 of them (TIGHT) its multiplication is spelled out: sum + a * b in one rounding.
template <bool WANTED>
static inline vf in_register(vf v) {
#if defined(__AVX__) && !defined(__AVX512F__)
    if (WANTED) asm("" : "+x"(v));
#endif
    return v;
}
template <bool TIGHT>
static inline vf add_product(vf sum, vf a, vf b) {
#if defined(__FMA__) && !defined(__AVX512F__)
    if (TIGHT) {
        asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
        return sum;
    }
#endif
    return sum + a * b;
}

static inline long padded_width(long width) { return (width + PAIR - 1) / PAIR * PAIR; }

// Where element d of a row of E lies in split order.
template <typename E>
static inline long place(long d) {
    return std::is_same_v<E, bf16> ? d / PAIR * PAIR + d % 2 * VL + d % PAIR / 2 : d;
}

// A row widened to float32, in split order; `to` has a padded width, and its padding is left as it is.
template <typename E>
static inline void widen_row(const E* from, long width, float* to) {
    long d = 0;
    for (; d + PAIR <= width; d += PAIR) store(to + d, half<0>(from + d)), store(to + d + VL, half<1>(from + d));
    for (; d < width; d++) to[place<E>(d)] = widen(from[d]);
}

// Fetches the rows of the next block into the second-level cache, a share at every call, so that memory works while sums are made.
struct Ahead {
    static constexpr long LINE = 64, ONE = 256;
    const char *at = nullptr, *end = nullptr, *rows[2 * PAIR_KEYS];
    int count = 0, keys = 0, row = 0;  // the first `keys` rows are keys, the others values
    long bytes[2] = {0, 0};
    long quota = 0, due = 0;  // of lines at a call and until now, ONE for each

    void start(int new_keys, long key_bytes, long value_bytes) {
        at = end = nullptr, count = row = 0, keys = new_keys;
        bytes[0] = (key_bytes + LINE - 1) / LINE * LINE, bytes[1] = (value_bytes + LINE - 1) / LINE * LINE;
    }
    void add(const void* from) { rows[count++] = (const char*)from; }
    void share(long calls) { quota = ((keys * bytes[0] + (count - keys) * bytes[1]) / LINE * ONE + calls - 1) / calls, due = 0; }
    void fetch() {
        for (due += quota; due >= ONE; due -= ONE) {
            if (at == end) {
                if (row == count) return;
                at = rows[row], end = at + bytes[row >= keys], row++;
            }
            __builtin_prefetch(at, 0, 2);
            at += LINE;
        }
    }
};

template <int HALF, int ROWS, int TOGETHER, typename E>
static inline void multiply(const float* q, long padded, const E* const* keys, long d, vf (&products)[ROWS][TOGETHER]) {
    constexpr bool TIGHT = ROWS * TOGETHER > 8, LOADED = !TIGHT && sizeof(E) == 4;
    vf queries[ROWS];
    for (int r = 0; r < ROWS; r++) queries[r] = in_register<LOADED>(load(q + r * padded + HALF * VL));
    for (int i = 0; i < TOGETHER; i++) {
        vf x = in_register<LOADED>(half<HALF>(keys[i * (VL / TOGETHER)] + d));
        for (int r = 0; r < ROWS; r++) products[r][i] = add_product<TIGHT>(products[r][i], x, queries[r]);
    }
}

// Scores of ROWS queries with TOGETHER keys, UNIT apart, as lanes of `partial`: what is left to add is between different UNITs.
template <int ROWS, int TOGETHER, typename E>
static inline void score_tile(const float* q, long padded, const E* const* keys, vf* partial) {
    constexpr int UNIT = VL / TOGETHER;
    vf products[ROWS][TOGETHER] = {};
    for (long d = 0; d < padded; d += PAIR) {
        multiply<0, ROWS, TOGETHER>(q + d, padded, keys, d, products);
        multiply<1, ROWS, TOGETHER>(q + d, padded, keys, d, products);
    }
    for (int r = 0; r < ROWS; r++) partial[r * UNIT] = sums<UNIT, UNIT>(products[r]);
}

// Scores of ROWS queries with a block of keys. Every score is one chain over the width per lane, then one tree over the lanes, whatever ROWS.
// A function of its own, like add_slice, so that the compiler has all registers for its loop.
template <int ROWS, typename E>
static __attribute__((noinline)) void scores_of(const float* q, long padded, const E* const* keys, int count, float scale, float* out, Ahead& ahead) {
    constexpr bool FEW = VL < 16 && (ROWS > 3 || (ROWS == 3 && sizeof(E) < 4));  // a shifted and a masked half need registers too
    constexpr int TOGETHER = ROWS == 1 && VL > 4 ? 8 : FEW ? 2 : 4, UNIT = VL / TOGETHER;
    for (int j = 0; j < count; j += VL) {
        vf partial[ROWS * UNIT];
        for (int u = 0; u < UNIT; u++) score_tile<ROWS, TOGETHER>(q, padded, keys + j + u, partial + u);
        for (int r = 0; r < ROWS; r++) store(out + r * KEYS + j, join<UNIT>(partial + r * UNIT) * scale);
        ahead.fetch();
    }
}

// sums = sums * rescale + p * values over `count` keys, for ROWS queries and WIDTH pairs of vectors; the sums stay in registers.
template <int ROWS, int WIDTH, typename E>
static __attribute__((noinline)) void add_slice(const float* p, const E* const* values, int count, long d, long padded, float* acc, const float* rescale) {
    constexpr bool TIGHT = ROWS * WIDTH > 4;
    vf sums[ROWS][2 * WIDTH];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 2 * WIDTH; i++) sums[r][i] = load(acc + r * padded + d + i * VL) * rescale[r];
    auto add = [&](int j) {
        vf weights[ROWS];
        for (int r = 0; r < ROWS; r++) weights[r] = p[r * KEYS + j] - vf{};
        for (int i = 0; i < WIDTH; i++) {
            vf even = half<0>(values[j] + d + i * PAIR);
            for (int r = 0; r < ROWS; r++) sums[r][2 * i] = add_product<TIGHT>(sums[r][2 * i], even, weights[r]);
            vf odd = half<1>(values[j] + d + i * PAIR);
            for (int r = 0; r < ROWS; r++) sums[r][2 * i + 1] = add_product<TIGHT>(sums[r][2 * i + 1], odd, weights[r]);
        }
    };
    int j = 0;
    for (; !TIGHT && j + 2 <= count; j += 2) add(j), add(j + 1);
    for (; j < count; j++) add(j);
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < 2 * WIDTH; i++) store(acc + r * padded + d + i * VL, sums[r][i]);
}

static inline vf softcap_v(vf x, float cap) {  // cap * tanh(x / cap), by its series where 1 - e would cancel
    vf t = x * (1.0f / cap), magnitude = t < 0.0f ? -t : t, s = t * t;
    vf e = exp_v(-2.0f * magnitude), far = (1.0f - e) / (1.0f + e);
    vf near = s * 0.021869489f - 0.053968254f;
    near = near * s + 0.133333333f;
    near = near * s - 0.333333333f;
    near = near * s * t + t;
    return cap * (magnitude < 0.25f ? near : t < 0.0f ? -far : far);
}

// The softmax of some queries takes in a block of `count` keys: scores become weights, also those that fill the last vector, rows `stride` apart; `rescale` is what earlier sums must be multiplied with. `totals` are
// VL partial sums a row. A query that has seen no key yet has top -inf, and weights and sums of 0. `fresh` holds `rows` numbers, padded to VL.
static inline void weigh(float* scores, long rows, long stride, int count, float* top, float* totals, float* rescale, float* fresh) {
    for (long r = 0; r < rows; r++) {
        vf most = load(scores + r * stride);
        for (int j = VL; j < count; j += VL) most = vmax(most, load(scores + r * stride + j));
        fresh[r] = std::max(top[r], highest(most));
    }
    for (long r = 0; r < rows; r += VL) {
        vf now = load(fresh + r), base = now == -INFINITY ? vf{} : now;
        store(rescale + r, exp_v(load(top + r) - base));
        store(top + r, now);
        store(fresh + r, base);
    }
    for (long r = 0; r < rows; r++) {
        vf added{};
        for (int j = 0; j < count; j += VL) {
            vf e = exp_v(load(scores + r * stride + j) - fresh[r]);
            store(scores + r * stride + j, e);
            added += e;
        }
        store(totals + r * VL, load(totals + r * VL) * rescale[r] + added);
    }
}

// Calls tile(row, constant of the number of rows) for tiles that together are all rows.
template <typename F>
static inline void in_tiles(long rows, F&& tile) {
    using std::integral_constant;
    long r = 0;
    if (rows == 4) return tile(r, integral_constant<int, 4>{});
    for (; r + MANY <= rows; r += MANY) tile(r, integral_constant<int, MANY>{});
    for (; r + 3 <= rows; r += 3) tile(r, integral_constant<int, 3>{});
    if (r + 2 == rows) tile(r, integral_constant<int, 2>{});
    if (r + 1 == rows) tile(r, integral_constant<int, 1>{});
}
