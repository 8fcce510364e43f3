// The inner loops of the linear: a tile of R rows by P panels over a span of inputs, for each family of formats.
#pragma once
#include "activations.h"
#include "formats.h"
#include "linear.h"

constexpr int MR = VL == 16 ? 12 : 6;     // most rows that pass in one tile: no more, and the weights are read once
constexpr int SUMS = VL == 16 ? 24 : 12;  // accumulators that fit the registers
#ifndef WAGER_PREFETCH
#define WAGER_PREFETCH 1536
#endif
constexpr long PREFETCH = WAGER_PREFETCH;  // bytes ahead of each of four panels that advance together; fewer panels fetch further ahead

#ifndef WAGER_KC
#define WAGER_KC (VL == 16 ? 512 : 256)
#endif
constexpr long KC = WAGER_KC;  // steps of a slice: an input, or the two that are multiplied at once

typedef uint32_t __attribute__((may_alias)) element;  // an activation as a kernel reads it: a float, two bfloat16 or int16, or four int8

struct Work {
    const Linear& a;
    Acts acts;
    const element* x;   // `steps` elements per row, tile after tile, a tile's rows side by side
    long steps;
    const float* sums;  // of every group of inputs, where a format has zero points
};

// R rows from `row` on, P panels from `w` on, inputs [k0, k1). `start` is what sums begin with, null: what is in y.
struct Span {
    long row, k0, k1;
    const char* w;
    float* y;
    long ldy;
    const float* start;
    const char* ahead;  // memory to fetch meanwhile, `step` bytes of it per PIECE bytes of a panel; null: none
    long step;
};

// Few rows are one tile, many are tiles of nearly the same size, at most MANY.
template <typename K>
struct Tiles {
    long rows, count = rows <= MR ? 1 : (rows + K::MANY - 1) / K::MANY, largest = (rows + count - 1) / count;
    long begin(long t) const { return rows * t / count; }
};

// Elements of a row that lie side by side, and what a thread holds while it multiplies: one and nothing, but for tile registers (linear_amx.h).
template <typename K>
constexpr int LINE = 1;
template <typename K>
struct Held {
    explicit Held(long) {}
};

constexpr int panels_for(int rows, int sums) {
    int most = sums / (rows * NV);
    return most < 1 ? 1 : most > 4 ? 4 : VL < 16 && most == 3 ? 2 : most;
}

// The elements of a tile's rows, side by side.
template <typename X, int R>
struct Rows {
    typedef X __attribute__((may_alias)) value;
    const value* x;
    Rows(const Work& work, long row) : x((const value*)work.x + row * work.steps) {}
    inline X at(int r, long k) const { return x[k * R + r]; }
};

// Into the second cache: lines on their way to the first would take up the few places that its misses have.
static inline void fetch(const char* from) { __builtin_prefetch(from, 0, 2); }

template <int R, int P>
struct Sums {
    vf at[R][P][NV];
    inline void begin(const Span& s) {
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++)
                for (int v = 0; v < NV; v++) at[r][p][v] = load((s.start ? s.start : s.y + r * s.ldy) + p * NR + v * VL);
    }
    inline void end(const Span& s) const {
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++)
                for (int v = 0; v < NV; v++) store(s.y + r * s.ldy + p * NR + v * VL, at[r][p][v]);
    }
};

// One product per input (or pair of inputs), sums straight in the accumulators.
template <typename F>
struct Plain {
    static constexpr int MANY = VL == 16 ? 8 : 6;  // most rows of a tile when there are more than MR
    static constexpr int PIECE = F::BYTES;
    static constexpr long SLICE = KC * F::STEP;
    static constexpr bool ZEROS = false;
    static long bytes(long inputs) { return inputs / F::STEP * F::BYTES; }
    static constexpr int panels(int rows) { return panels_for(rows, SUMS); }
    template <int R, int P>
    static inline void tile(const Work& work, const Span& s) {
        const Rows<typename F::X, R> x(work, s.row);
        long panel_bytes = bytes(work.a.inputs);
        Sums<R, P> acc;
        acc.begin(s);
        const char *w = s.w + s.k0 / F::STEP * F::BYTES, *ahead = s.ahead;
        for (long k = s.k0 / F::STEP; k < s.k1 / F::STEP; k++, w += F::BYTES, ahead += s.step) {
            typename F::Weight weight[P][NV];
            for (int p = 0; p < P; p++) {
                if (s.ahead) fetch(ahead + p * panel_bytes);
                for (int v = 0; v < NV; v++) weight[p][v] = F::weight(w + p * panel_bytes, v);
            }
            for (int r = 0; r < R; r++) {
                typename F::X value = x.at(r, k);
                for (int p = 0; p < P; p++)
                    for (int v = 0; v < NV; v++) acc.at[r][p][v] = F::mac(acc.at[r][p][v], weight[p][v], value);
            }
        }
        acc.end(s);
    }
};

// A group's scales and zero points of a vector of outputs, and what the group's integer sums add to float32 ones.
template <typename F>
struct Scaled {
    vf scale = vf{} + 1.0f, zero{};
    Scaled(const char* group, int v) {
        const uint16_t* head = (const uint16_t*)group + v * VL;
        if (F::HEAD) scale = load_half(head);
        if (F::ZEROS) zero = load_half(head + NR);
    }
    inline vf add(vf acc, vi total, float x_scale, int32_t x_offset) const {
        vf sum = __builtin_convertvector(total, vf);
        if (F::ZEROS) sum -= zero * ((float)x_offset * (-1.0f / F::OFFSET));
        return acc + sum * (scale * x_scale);
    }
};

// Integer products of int8 activations, scaled group by group.
template <typename F>
struct Integer {
    static constexpr int MANY = VL == 16 ? 8 : 4, PIECE = 64;
    static constexpr long SLICE = 2 * KC;  // a step takes four inputs; twice as many again gained nothing
    static constexpr bool ZEROS = false;  // sums of activations are in Acts
    static long bytes(long inputs) { return inputs / F::GROUP * F::BYTES; }
    static constexpr int panels(int rows) { return panels_for(rows, SUMS * 2 / 3); }
    template <int R, int P>
    static inline void tile(const Work& work, const Span& s) {
        constexpr int WORDS = 8 / F::BITS;  // vectors of codes in a vector of words
        const Rows<int32_t, R> x(work, s.row);
        const Acts& acts = work.acts;
        long panel_bytes = bytes(work.a.inputs);
        Sums<R, P> acc;
        acc.begin(s);
        const char *w = s.w + s.k0 / F::GROUP * F::BYTES, *ahead = s.ahead;
        for (long g = s.k0 / F::GROUP; g < s.k1 / F::GROUP; g++, w += F::BYTES) {
            vi part[R][P][NV];
            for (int r = 0; r < R; r++)
                for (int p = 0; p < P; p++)
                    for (int v = 0; v < NV; v++) part[r][p][v] = Dot<F::BITS>::start(acts.offsets[(s.row + r) * acts.groups + g]);
            for (int j = 0; j < F::GROUP / 4 / WORDS; j++, ahead += s.step) {
                vu raw[P][NV];
                for (int p = 0; p < P; p++) {
                    const char* from = w + p * panel_bytes + F::HEAD + j * 64;
                    if (s.ahead) fetch(ahead + p * panel_bytes);
                    for (int v = 0; v < NV; v++) raw[p][v] = *(const vu*)(from + v * VL * 4);
                }
                for (int i = 0; i < WORDS; i++)
                    for (int r = 0; r < R; r++) {
                        int32_t four = x.at(r, (g * F::GROUP / 4) + j * WORDS + i);
                        for (int p = 0; p < P; p++)
                            for (int v = 0; v < NV; v++) part[r][p][v] = Dot<F::BITS>::add(part[r][p][v], word<F>(raw[p][v], i), four);
                    }
            }
            for (int p = 0; p < P; p++)
                for (int v = 0; v < NV; v++) {
                    const Scaled<F> group(w + p * panel_bytes, v);
                    for (int r = 0; r < R; r++) {
                        long at = (s.row + r) * acts.groups + g;
                        vi total = Dot<F::BITS>::finish(part[r][p][v], acts.offsets[at]);
                        acc.at[r][p][v] = group.add(acc.at[r][p][v], total, acts.scales[at], acts.offsets[at]);
                    }
                }
        }
        acc.end(s);
    }
};

// Integer products of int16 activations, scaled group by group.
struct Wide {
    static constexpr int MANY = 6, PIECE = 64;
    static constexpr long SLICE = 1024;  // more than the first cache holds: sums that come and go cost more than weights from the second
    static constexpr bool ZEROS = false;
    static long bytes(long inputs) { return inputs / W16::GROUP * W16::BYTES; }
    static constexpr int panels(int rows) { return panels_for(rows, SUMS); }
    template <int R, int P>
    static inline void tile(const Work& work, const Span& s) {
        const Rows<int32_t, R> x(work, s.row);
        const Acts& acts = work.acts;
        long panel_bytes = bytes(work.a.inputs);
        Sums<R, P> acc;
        acc.begin(s);
        const char *w = s.w + s.k0 / W16::GROUP * W16::BYTES, *ahead = s.ahead;
        for (long g = s.k0 / W16::GROUP; g < s.k1 / W16::GROUP; g++, w += W16::BYTES) {
            vi part[R][P][NV] = {};
#pragma GCC unroll 4
            for (long j = 0; j < W16::GROUP / 2; j++, ahead += s.step) {
                vi weight[P][NV];
                for (int p = 0; p < P; p++) {
                    if (s.ahead) fetch(ahead + p * panel_bytes);
                    for (int v = 0; v < NV; v++) weight[p][v] = *(const vi*)(w + p * panel_bytes + W16::HEAD + j * 64 + v * VL * 4);
                }
                for (int r = 0; r < R; r++) {
                    int32_t two = x.at(r, g * (W16::GROUP / 2) + j);
                    for (int p = 0; p < P; p++)
                        for (int v = 0; v < NV; v++) part[r][p][v] = dot2(part[r][p][v], weight[p][v], two);
                }
            }
            for (int p = 0; p < P; p++)
                for (int v = 0; v < NV; v++) {
                    vf scale = load((const bf16*)(w + p * panel_bytes) + v * VL);
                    for (int r = 0; r < R; r++)
                        acc.at[r][p][v] += __builtin_convertvector(part[r][p][v], vf) * (scale * acts.scales[(s.row + r) * acts.groups + g]);
                }
        }
        acc.end(s);
    }
};

// Grouped codes and float32 activations. C: how a code becomes a value.
template <typename F, typename C>
struct Weighted {
    static constexpr int MANY = 6, PIECE = 64;
    static constexpr long SLICE = KC;
    static constexpr bool ZEROS = F::ZEROS;
    static long bytes(long inputs) { return inputs / F::GROUP * F::BYTES; }
    static constexpr int panels(int rows) { return panels_for(rows, SUMS / 2); }
    template <int R, int P>
    static inline void tile(const Work& work, const Span& s) {
        constexpr int EACH = 32 / F::BITS;  // codes in a word
        const Rows<float, R> x(work, s.row);
        const C codes{work.a.table};
        long panel_bytes = bytes(work.a.inputs), groups = work.a.inputs / F::GROUP;
        Sums<R, P> acc;
        acc.begin(s);
        const char *w = s.w + s.k0 / F::GROUP * F::BYTES, *ahead = s.ahead;
        for (long k = s.k0; k < s.k1; k += F::GROUP, w += F::BYTES) {
            vf part[R][P][NV] = {};
            for (int j = 0; j < F::GROUP / EACH; j++, ahead += s.step) {
                vu raw[P][NV];
                for (int p = 0; p < P; p++) {
                    const char* from = w + p * panel_bytes + F::HEAD + j * 64;
                    if (s.ahead) fetch(ahead + p * panel_bytes);
                    for (int v = 0; v < NV; v++) raw[p][v] = *(const vu*)(from + v * VL * 4);
                }
                for (int i = 0; i < EACH; i++) {
                    vf weight[P][NV];
                    for (int p = 0; p < P; p++)
                        for (int v = 0; v < NV; v++) weight[p][v] = codes.value(raw[p][v], i);
                    for (int r = 0; r < R; r++) {
                        float value = x.at(r, k + EACH * j + i);
                        for (int p = 0; p < P; p++)
                            for (int v = 0; v < NV; v++) part[r][p][v] += weight[p][v] * value;
                    }
                }
            }
            for (int p = 0; p < P; p++)
                for (int v = 0; v < NV; v++) {
                    const uint16_t* head = (const uint16_t*)(w + p * panel_bytes) + v * VL;
                    vf scale = load_half(head), zero{};
                    if (F::ZEROS) zero = load_half(head + NR);
                    for (int r = 0; r < R; r++) {
                        vf sum = part[r][p][v];
                        if (F::ZEROS) sum -= zero * work.sums[(s.row + r) * groups + k / F::GROUP];
                        acc.at[r][p][v] += sum * scale;
                    }
                }
        }
        acc.end(s);
    }
};

// The tile for a number of rows: those whose sums take P panels, and one less, as tiles beside them have.
template <typename K, int P>
static void rows_tile(int rows, const Work& work, const Span& span) {
    if constexpr (LINE<K> > 1) return K::tile(rows, work, span);
    else switch (rows) {
#define CASE(n) \
    case n: if constexpr (K::panels(n) == P || K::panels(n + 1) == P) K::template tile<n, P>(work, span); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(__AVX512F__)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
}
