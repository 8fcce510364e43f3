// y = x W^T + b over weights packed in panels (formats.h), with an epilogue: add a residual, or combine gate and up halves.
//
// Every output is one chain of operations over k in ascending order (grouped formats: one chain per group and one over the groups), whatever
// the number of rows: a row's result does not depend on what else is in the batch. Few rows: the weights stream from memory once and several
// panels advance together, so that enough chains are in flight. Many rows: a slice of some panels stays in cache while all rows pass over it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "activations.h"
#include "formats.h"
#include "linear.h"
#include "pool.h"

constexpr int MR = VL == 16 ? 12 : 6;                // most rows that pass in one tile
constexpr int SUMS = VL == 16 ? 24 : 12;             // accumulators that fit the registers
constexpr int SLACK = 3;                             // panels allocated beyond the last, so that a tile may read four
#ifndef WAGER_KC
#define WAGER_KC 512
#endif
constexpr long KC = WAGER_KC;  // inputs of a slice
#ifndef WAGER_PREFETCH
#define WAGER_PREFETCH 1024
#endif
constexpr long PREFETCH = WAGER_PREFETCH;  // bytes ahead of the stream
#ifndef WAGER_CLAIM_BYTES
#define WAGER_CLAIM_BYTES 1 << 15
#endif
constexpr long CLAIM_BYTES = WAGER_CLAIM_BYTES;  // weights worth claiming at once

struct Work {
    const Linear& a;
    Acts acts;
    const uint32_t* pairs;
    const float* group_table;
};

constexpr int panels_for(int rows, int sums) { return rows * 4 * NV <= sums ? 4 : rows * 2 * NV <= sums ? 2 : 1; }

// Rows [row, row + R) of P panels over inputs [k0, k1).
template <typename F>
struct Plain {
    static constexpr int MANY = 6;  // rows of a tile when there are more than MR
    static long bytes(long inputs) { return inputs / F::STEP * F::BYTES; }
    static constexpr int panels(int rows) { return panels_for(rows, SUMS); }
    template <int R, int P>
    static inline void tile(const Work& work, long row, const char* w, long k0, long k1, float* y, long ldy, const float* start, bool fetch) {
        const typename F::X* x = (const typename F::X*)(F::STEP == 2 ? (const void*)work.pairs : (const void*)work.a.x);
        long ldx = work.a.inputs / F::STEP, panel_bytes = bytes(work.a.inputs);
        x += row * ldx;
        vf acc[R][P][NV];
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++)
                for (int v = 0; v < NV; v++) acc[r][p][v] = load((start ? start : y + r * ldy) + p * NR + v * VL);
        w += k0 / F::STEP * F::BYTES;
        for (long k = k0 / F::STEP; k < k1 / F::STEP; k++, w += F::BYTES) {
            typename F::Weight weight[P][NV];
            for (int p = 0; p < P; p++) {
                if (fetch) __builtin_prefetch(w + p * panel_bytes + PREFETCH);
                for (int v = 0; v < NV; v++) weight[p][v] = F::weight(w + p * panel_bytes, v);
            }
            for (int r = 0; r < R; r++) {
                typename F::X value = x[r * ldx + k];
                for (int p = 0; p < P; p++)
                    for (int v = 0; v < NV; v++) acc[r][p][v] = F::mac(acc[r][p][v], weight[p][v], value);
            }
        }
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++)
                for (int v = 0; v < NV; v++) store(y + r * ldy + p * NR + v * VL, acc[r][p][v]);
    }
};

// Integer products of int8 activations, scaled group by group.
template <typename F>
struct Integer {
    static constexpr int MANY = VL == 16 ? 8 : 4;
    static long bytes(long inputs) { return inputs / F::GROUP * F::BYTES; }
    static constexpr int panels(int rows) { return panels_for(rows, SUMS * 2 / 3); }
    template <int R, int P>
    static inline void tile(const Work& work, long row, const char* w, long k0, long k1, float* y, long ldy, const float* start, bool fetch) {
        const Acts& acts = work.acts;
        long panel_bytes = bytes(work.a.inputs);
        vf acc[R][P][NV];
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++)
                for (int v = 0; v < NV; v++) acc[r][p][v] = load((start ? start : y + r * ldy) + p * NR + v * VL);
        w += k0 / F::GROUP * F::BYTES;
        for (long g = k0 / F::GROUP; g < k1 / F::GROUP; g++, w += F::BYTES) {
            vi part[R][P][NV];
            for (int r = 0; r < R; r++)
                for (int p = 0; p < P; p++)
                    for (int v = 0; v < NV; v++) part[r][p][v] = vi{} + acts.offsets[(row + r) * acts.groups + g];
            const int32_t* x = (const int32_t*)(acts.values + row * acts.inputs + g * F::GROUP);
            for (int j = 0; j < F::GROUP / 4 / F::WORDS; j++) {
                vu raw[P][NV];
                for (int p = 0; p < P; p++) {
                    const char* from = w + p * panel_bytes + F::HEAD + j * 64;
                    if (fetch) __builtin_prefetch(from + PREFETCH);
                    for (int v = 0; v < NV; v++) raw[p][v] = *(const vu*)(from + v * VL * 4);
                }
                for (int i = 0; i < F::WORDS; i++) {
                    vi weight[P][NV];
                    for (int p = 0; p < P; p++)
                        for (int v = 0; v < NV; v++) weight[p][v] = F::word(raw[p][v], i);
                    for (int r = 0; r < R; r++)
                        for (int p = 0; p < P; p++)
                            for (int v = 0; v < NV; v++)
                                part[r][p][v] = dot4(part[r][p][v], weight[p][v], x[r * (acts.inputs / 4) + j * F::WORDS + i]);
                }
            }
            for (int p = 0; p < P; p++)
                for (int v = 0; v < NV; v++) {
                    vf scale = vf{} + 1.0f;
                    if (F::HEAD) scale = load((const bf16*)(w + p * panel_bytes) + v * VL);
                    for (int r = 0; r < R; r++)
                        acc[r][p][v] += __builtin_convertvector(part[r][p][v], vf) * (scale * acts.scales[(row + r) * acts.groups + g]);
                }
        }
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++)
                for (int v = 0; v < NV; v++) store(y + r * ldy + p * NR + v * VL, acc[r][p][v]);
    }
};

// Four-bit numbers of a table of values, float32 activations.
struct Q4 {
    static constexpr int GROUP = 32, BYTES = 288, MANY = 6;
    static long bytes(long inputs) { return inputs / GROUP * BYTES; }
    static constexpr int panels(int rows) { return panels_for(rows, SUMS / 2); }
    template <int R, int P>
    static inline void tile(const Work& work, long row, const char* w, long k0, long k1, float* y, long ldy, const float* start, bool fetch) {
        long ldx = work.a.inputs, panel_bytes = bytes(ldx);
        const float *x = work.a.x + row * ldx, *table = work.a.table;
        vf acc[R][P][NV];
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++)
                for (int v = 0; v < NV; v++) acc[r][p][v] = load((start ? start : y + r * ldy) + p * NR + v * VL);
        w += k0 / GROUP * BYTES;
        for (long k = k0; k < k1; k += GROUP, w += BYTES) {
            vf part[R][P][NV] = {};
            for (int j = 0; j < 4; j++) {
                vu raw[P][NV];
                for (int p = 0; p < P; p++) {
                    const char* from = w + p * panel_bytes + 32 + j * 64;
                    if (fetch) __builtin_prefetch(from + PREFETCH);
                    for (int v = 0; v < NV; v++) raw[p][v] = *(const vu*)(from + v * VL * 4);
                }
                for (int i = 0; i < 8; i++) {
                    vf weight[P][NV];
                    for (int p = 0; p < P; p++)
                        for (int v = 0; v < NV; v++) weight[p][v] = look_up(table, raw[p][v] >> (8 * (i % 4) + 4 * (i / 4)));
                    for (int r = 0; r < R; r++) {
                        float value = x[r * ldx + k + 8 * j + i];
                        for (int p = 0; p < P; p++)
                            for (int v = 0; v < NV; v++) part[r][p][v] += weight[p][v] * value;
                    }
                }
            }
            for (int p = 0; p < P; p++)
                for (int v = 0; v < NV; v++) {
                    vf scale = load((const bf16*)(w + p * panel_bytes) + v * VL);
                    for (int r = 0; r < R; r++) acc[r][p][v] += part[r][p][v] * scale;
                }
        }
        for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++)
                for (int v = 0; v < NV; v++) store(y + r * ldy + p * NR + v * VL, acc[r][p][v]);
    }
};

template <typename K, int P>
static void rows_tile(int rows, const Work& work, long row, const char* w, long k0, long k1, float* y, long ldy, const float* start, bool fetch) {
    switch (rows) {
#define CASE(n) \
    case n: if constexpr (K::panels(n) == P || (n <= K::MANY && K::panels(K::MANY) == P)) K::template tile<n, P>(work, row, w, k0, k1, y, ldy, start, fetch); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(__AVX512F__)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
    }
}

// All rows of P panels that begin at `panel`, into `out`.
template <typename K, int P>
static void block(const Work& work, long panel, float* out, long ldo) {
    const Linear& a = work.a;
    static const float zeros[4 * NR] = {};
    const float* start = a.scales ? zeros : a.bias + panel * NR;
    const char* w = a.weights + panel * K::bytes(a.inputs);
    if (a.rows <= MR) return rows_tile<K, P>((int)a.rows, work, 0, w, 0, a.inputs, out, ldo, start, true);
    for (long k0 = 0; k0 < a.inputs; k0 += KC) {
        long k1 = std::min<long>(a.inputs, k0 + KC);
        for (long r = 0; r < a.rows; r += K::MANY)
            rows_tile<K, P>((int)std::min<long>(K::MANY, a.rows - r), work, r, w, k0, k1, out + r * ldo, ldo, k0 ? nullptr : start, r == 0);
    }
}

static void scale_and_bias(const Linear& a, long panel, int width, float* out, long ldo) {
    for (long r = 0; r < a.rows; r++)
        for (int i = 0; i < width; i += VL) {
            float* to = out + r * ldo + i;
            store(to, load(to) * load(a.scales + panel * NR + i) + load(a.bias + panel * NR + i));
        }
}

template <typename K, int P>
static void unit(const Work& work, long u) {
    const Linear& a = work.a;
    constexpr int WIDTH = P * NR;
    long first = u * WIDTH, count = std::min<long>(WIDTH, a.outputs - first);
    if (!a.gate && !a.residual && count == WIDTH) {
        block<K, P>(work, u * P, a.y + first, a.outputs);
        if (a.scales) scale_and_bias(a, u * P, WIDTH, a.y + first, a.outputs);
        return;
    }
    thread_local std::vector<float> scratch;
    scratch.resize(2 * a.rows * WIDTH);
    float *made = scratch.data(), *up = made + a.rows * WIDTH;
    block<K, P>(work, u * P, made, WIDTH);
    if (a.scales) scale_and_bias(a, u * P, WIDTH, made, WIDTH);
    if (a.gate) {
        long panel = a.outputs / NR + u * P;
        block<K, P>(work, panel, up, WIDTH);
        if (a.scales) scale_and_bias(a, panel, WIDTH, up, WIDTH);
        for (long i = 0; i < a.rows * WIDTH; i += VL) store(made + i, (a.gate == 1 ? silu_v(load(made + i)) : gelu_tanh_v(load(made + i))) * load(up + i));
    }
    for (long r = 0; r < a.rows; r++) {
        float *to = a.y + r * a.outputs + first, *from = made + r * WIDTH;
        const float* residual = a.residual ? a.residual + r * a.outputs + first : nullptr;
        for (long i = 0; i < count; i++) to[i] = residual ? residual[i] + from[i] : from[i];
    }
}

template <typename K, int P>
static void units(const Work& work) {
    const Linear& a = work.a;
    long n = (a.outputs + P * NR - 1) / (P * NR), bytes = P * K::bytes(a.inputs);
    long chunk = std::max<long>(1, std::min(CLAIM_BYTES / std::max<long>(1, bytes), n / (a.threads * 4)));
    int threads = a.rows * a.inputs * a.outputs > 200000 ? a.threads : 1;
    each(threads, (n + chunk - 1) / chunk, [&](long c) {
        for (long u = c * chunk; u < std::min(n, (c + 1) * chunk); u++) unit<K, P>(work, u);
    });
}

template <typename K>
static void linear(const Work& work) {
    switch (K::panels(work.a.rows <= MR ? (int)work.a.rows : K::MANY)) {
        case 4: return units<K, 4>(work);
        case 2: return units<K, 2>(work);
        default: return units<K, 1>(work);
    }
}

template <typename F>
static void integer_linear(const Linear& a) {
    static thread_local QuantisedRows rows;
    quantise_rows(a.x, a.rows, a.inputs, F::GROUP, F::OFFSET, a.threads, rows);
    linear<Integer<F>>({a, {rows.values.data(), rows.scales.data(), rows.offsets.data(), a.inputs, a.inputs / F::GROUP}, nullptr, nullptr});
}

static void pair_linear(const Linear& a) {
    static thread_local std::vector<bf16> rounded;
    round_rows(a.x, a.rows * a.inputs, a.threads, rounded);
    linear<Plain<B16>>({a, {}, (const uint32_t*)rounded.data(), nullptr});
}

template <typename W>
static void pack(const W* weight, long outputs, long inputs, W* packed, int threads) {
    long panels = (outputs + NR - 1) / NR + SLACK;
    each(threads, panels, [=](long p) {
        for (long n = 0; n < NR; n++) {
            long row = p * NR + n;
            W* to = packed + p * NR * inputs + n;
            for (long k = 0; k < inputs; k++) to[k * NR] = row < outputs ? weight[row * inputs + k] : W(0);
        }
    });
}

extern "C" {
void wager_linear(const Linear* a) {
    Work work{*a, {}, nullptr, nullptr};
    switch (a->format) {
        case 0: return linear<Plain<F32>>(work);
        case 1: return linear<Plain<BF16>>(work);
        case 2: return linear<Plain<I8>>(work);
        case 3: return pair_linear(*a);
        case 4: return integer_linear<W8>(*a);
        case 5: return linear<Q4>(work);
        case 6: return integer_linear<W4>(*a);
    }
}
// Both write ceil(outputs / 16) + 3 panels.
void wager_pack_f32(const float* weight, long outputs, long inputs, float* packed, int threads) { pack(weight, outputs, inputs, packed, threads); }
void wager_pack_bf16(const bf16* weight, long outputs, long inputs, bf16* packed, int threads) { pack(weight, outputs, inputs, packed, threads); }
}
