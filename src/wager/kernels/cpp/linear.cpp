// y = x W^T + b over weights packed in panels (formats.h), with an epilogue: add a residual, or combine gate and up halves.
//
// Every output is one chain of operations over k in ascending order (grouped formats: one chain per group and one over the groups), whatever
// the number of rows: a row's result does not depend on what else is in the batch. Rows are laid out tile by tile. Few rows are one tile: the
// weights stream from memory once and several panels advance together, so that enough chains are in flight. Many rows: a slice of some panels
// stays in a cache while a block of rows passes over it, and the block in the second while further panels take their turns.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include "activations.h"
#include "formats.h"
#include "linear.h"
#include "linear_amx.h"
#include "linear_tiles.h"
#include "pool.h"

constexpr int SLACK = 3;  // panels allocated beyond the last, so that a tile may read four
#ifndef WAGER_CLAIM_BYTES
#define WAGER_CLAIM_BYTES 1 << 15
#endif
constexpr long CLAIM_BYTES = WAGER_CLAIM_BYTES;  // weights worth claiming at once
constexpr long BLOCK = 64;                       // inputs that stay together: the largest group
constexpr long ROWS_IN_CACHE = 96;               // of a slice, for the second cache
constexpr int WIDE = 128;                        // outputs of a unit when there are many rows
#ifdef WAGER_TILES
static long tile_rows = 0;  // fewest rows that go by tiles; 0: none do
#endif

// All rows of the `count` times P panels that begin at `panel`, into `out`. `after`: the weights that this thread uses next, or null.
template <typename K, int P>
static void block(const Work& work, long panel, long count, float* out, long ldo, const char* after) {
    const Linear& a = work.a;
    static const float zeros[4 * NR] = {};
    long width = P * NR, unit_bytes = P * K::bytes(a.inputs);
    auto start = [&](long u) { return a.scales ? zeros : a.bias + panel * NR + u * width; };
    const char* w = a.weights + panel * K::bytes(a.inputs);
    if (a.rows <= MR) {
        const long far = PREFETCH * 4 / P, last = std::max<long>(0, a.inputs - far * a.inputs / K::bytes(a.inputs)) / BLOCK * BLOCK;
        for (long u = 0; u < count; u++, w += unit_bytes) {
            float* to = out + u * width;
            if (last) rows_tile<K, P>((int)a.rows, work, {0, 0, last, w, to, ldo, start(u), w + far, K::PIECE});
            const char* next = u + 1 < count ? w + unit_bytes : after;
            rows_tile<K, P>((int)a.rows, work, {0, last, a.inputs, w, to, ldo, last ? nullptr : start(u), next, K::PIECE});
        }
        return;
    }
    const Tiles<K> tiles{a.rows};
    const long per_block = std::min(tiles.count, std::max<long>(1, ROWS_IN_CACHE / K::MANY)), sharers = std::min<long>(per_block, 8);
    const long inputs = tiles.count > 2 || VL < 16 ? K::SLICE : K::SLICE / 2;  // of a slice; two tiles fetch half as much meanwhile
    auto size_at = [&](long k) { return K::bytes(std::min(a.inputs, k + inputs)) - K::bytes(k); };
    for (long k0 = 0; k0 < a.inputs; k0 += inputs) {
        long k1 = std::min(a.inputs, k0 + inputs), slice = size_at(k0);
        for (long t0 = 0; t0 < tiles.count; t0 += per_block)
            for (long u = 0; u < count; u++) {
                const char *from = w + u * unit_bytes, *next = nullptr;  // what comes after this slice, unless it was here before
                long size = slice;
                if (u + 1 < count) next = t0 ? nullptr : from + unit_bytes + K::bytes(k0);
                else if (t0 + per_block >= tiles.count) next = k1 < a.inputs ? w + K::bytes(k1) : after, size = size_at(k1 < a.inputs ? k1 : 0);
                const long share = size / sharers, step = (share * K::PIECE + slice - 1) / slice;
                for (long t = t0; t < std::min(tiles.count, t0 + per_block); t++) {  // the first tiles fetch it, each its share
                    long row = tiles.begin(t), rows = tiles.begin(t + 1) - row;
                    const char* ahead = next && t - t0 < sharers ? next + share * (t - t0) : nullptr;
                    rows_tile<K, P>((int)rows, work, {row, k0, k1, from, out + row * ldo + u * width, ldo, k0 ? nullptr : start(u), ahead, step});
                }
            }
    }
}

static void scale_and_bias(const Linear& a, long panel, int width, float* out, long ldo) {
    for (long r = 0; r < a.rows; r++)
        for (int i = 0; i < width; i += VL) {
            float* to = out + r * ldo + i;
            store(to, load(to) * load(a.scales + panel * NR + i) + load(a.bias + panel * NR + i));
        }
}

// `panels` panels from `first` on, with what follows the product; the thread most likely goes on at panel `next`.
template <typename K, int P>
static void unit(const Work& work, long first_panel, long panels, long next) {
    const Linear& a = work.a;
    const char* after = a.weights + next * K::bytes(a.inputs);
    long width = panels * NR, first = first_panel * NR, count = std::min<long>(width, a.outputs - first), units = (panels + P - 1) / P;
    if (!a.gate && !a.residual && count == width && panels % P == 0) {
        block<K, P>(work, first_panel, units, a.y + first, a.outputs, after);
        if (a.scales) scale_and_bias(a, first_panel, (int)width, a.y + first, a.outputs);
        return;
    }
    thread_local std::vector<float> scratch;
    width = units * P * NR;
    scratch.resize(2 * a.rows * width);
    float *made = scratch.data(), *up = made + a.rows * width;
    long up_panel = a.outputs / NR + first_panel;
    block<K, P>(work, first_panel, units, made, width, a.gate ? a.weights + up_panel * K::bytes(a.inputs) : after);
    if (a.scales) scale_and_bias(a, first_panel, (int)width, made, width);
    if (a.gate) {
        block<K, P>(work, up_panel, units, up, width, after);
        if (a.scales) scale_and_bias(a, up_panel, (int)width, up, width);
        for (long i = 0; i < a.rows * width; i += VL) store(made + i, (a.gate == 1 ? silu_v(load(made + i)) : gelu_tanh_v(load(made + i))) * load(up + i));
    }
    for (long r = 0; r < a.rows; r++) {
        float *to = a.y + r * a.outputs + first, *from = made + r * width;
        const float* residual = a.residual ? a.residual + r * a.outputs + first : nullptr;
        for (long i = 0; i < count; i++) to[i] = residual ? residual[i] + from[i] : from[i];
    }
}

template <typename K, int P>
static void units(const Work& work) {
    const Linear& a = work.a;
    long panels = (a.outputs + NR - 1) / NR, per_unit = a.rows > 4 * MR && panels >= a.threads * 3 * (WIDE / NR) ? WIDE / NR / P * P : P;
    long n = (panels + per_unit - 1) / per_unit, bytes = per_unit * K::bytes(a.inputs);
    long chunk = std::max<long>(1, std::min(CLAIM_BYTES / std::max<long>(1, bytes), n / (a.threads * 4)));
    int threads = a.rows * a.inputs * a.outputs > 200000 ? a.threads : 1;
    each(threads, (n + chunk - 1) / chunk, [&](long c) {
        [[maybe_unused]] const Held<K> held(a.rows);
        for (long u = c * chunk, end = std::min(n, u + chunk); u < end; u++) {
            long next = u + 1 < end ? u + 1 : std::min(n - 1, (c + threads) * chunk);  // others claim the chunks in between
            unit<K, P>(work, u * per_unit, per_unit == P ? P : std::min(per_unit, panels - u * per_unit), next * per_unit);
        }
    });
}

// `rows` rows of `steps` elements each, side by side in lines of LENGTH elements.
template <int LENGTH>
static void lines(const element* from, long rows, long steps, element* to) {
    for (long k = 0; k < steps; k += LENGTH)
        for (long r = 0; r < rows; r++, to += LENGTH) std::memcpy(to, from + r * steps + k, LENGTH * sizeof(element));
}

// The same in lines of one: to[k * rows + r].
template <int... R>
static void side_by_side(const element* from, long rows, long steps, element* to, std::integer_sequence<int, R...>) {
    auto turn = [=](auto count) {
        constexpr int n = decltype(count)::value;
        for (long k = 0; k < steps; k++)
            for (int r = 0; r < n; r++) to[k * n + r] = from[r * steps + k];
    };
    (void)((rows == R + 1 && (turn(std::integral_constant<int, R + 1>{}), true)) || ...);
}

// Rows tile by tile, the rows of a tile side by side. `fill(row, input, count, to)` writes `count` inputs of a row from `input` on as elements.
template <typename K, typename Fill>
static void lay_out(Work& work, std::vector<uint32_t>& to, Fill&& fill) {
    const Linear& a = work.a;
    const Tiles<K> tiles{a.rows};
    const long steps = work.steps, each_step = a.inputs / steps, blocks = (a.inputs + BLOCK - 1) / BLOCK;
    const int threads = a.rows * steps > 1 << 13 ? a.threads : 1;
    const long parts = tiles.count < threads ? threads : 1;
    to.resize(a.rows * steps + (LINE<K> > 1 ? LINE<K> : 0));  // a tile register may take a line more
    work.x = to.data();
    each(threads, tiles.count * parts, [&](long i) {
        thread_local std::vector<uint32_t> tile;
        const long t = i / parts, part = i % parts, row = tiles.begin(t), rows = tiles.begin(t + 1) - row;
        const long begin = blocks * part / parts * BLOCK, count = std::min(a.inputs, blocks * (part + 1) / parts * BLOCK) - begin;
        tile.resize(rows * count / each_step);
        uint32_t* const from = tile.data();
        for (long r = 0; r < rows; r++) fill(row + r, begin, count, from + r * count / each_step);
        element* const place = to.data() + row * steps + rows * begin / each_step;
        if constexpr (LINE<K> > 1) lines<LINE<K>>(from, rows, count / each_step, place);
        else side_by_side(from, rows, count / each_step, place, std::make_integer_sequence<int, MR>{});
    });
}

template <typename K>
static void group_sums(const Linear& a, std::vector<float>& to) {
    long groups = a.inputs / 32;
    to.resize(a.rows * groups);
    for (long i = 0; i < a.rows * groups; i++) {
        vf total{};
        for (int k = 0; k < 32; k += VL) total += load(a.x + i * 32 + k);
        to[i] = sum(total);
    }
}

template <typename K>
static void run(const Work& work) {
    if constexpr (LINE<K> > 1) return units<K, 2>(work);
    else switch (K::panels((int)Tiles<K>{work.a.rows}.largest)) {
        case 4: return units<K, 4>(work);
        case 3: return units<K, 3>(work);
        case 2: return units<K, 2>(work);
        default: return units<K, 1>(work);
    }
}

// float32 activations
template <typename K>
static void linear(const Linear& a) {
    static thread_local std::vector<uint32_t> rows;
    static thread_local std::vector<float> sums;
    Work work{a, {}, (const element*)a.x, a.inputs, nullptr};
    if (K::ZEROS) group_sums<K>(a, sums), work.sums = sums.data();
    if (a.rows > 1) lay_out<K>(work, rows, [&](long r, long k, long count, uint32_t* to) { std::memcpy(to, a.x + r * a.inputs + k, count * 4); });
    run<K>(work);
}

template <typename F, typename K>
static void integer_linear(const Linear& a) {
    static thread_local std::vector<uint32_t> rows;
    static thread_local std::vector<float> scales;
    static thread_local std::vector<int32_t> offsets;
    const long groups = a.inputs / F::GROUP;
    scales.resize(a.rows * groups), offsets.resize(a.rows * groups);
    float* scale = scales.data();
    int32_t* offset = offsets.data();
    Work work{a, {scale, offset, a.inputs, groups}, nullptr, a.inputs / 4, nullptr};
    lay_out<K>(work, rows, [&](long r, long k, long count, uint32_t* to) {
        for (long g = k / F::GROUP; g < (k + count) / F::GROUP; g++, to += F::GROUP / 4)
            quantise_group(a.x + r * a.inputs + g * F::GROUP, F::GROUP, F::OFFSET, (int8_t*)to, scale + r * groups + g, offset + r * groups + g);
    });
    run<K>(work);
}

template <typename F>
static void integer_linear(const Linear& a) {
#ifdef WAGER_TILES
    if (tile_rows && a.rows >= tile_rows) return integer_linear<F, QuadTiles<F>>(a);
#endif
    integer_linear<F, Integer<F>>(a);
}

static void wide_linear(const Linear& a) {
    static thread_local std::vector<uint32_t> rows;
    static thread_local std::vector<float> scales;
    const long groups = a.inputs / W16::GROUP;
    scales.resize(a.rows * groups);
    float* scale = scales.data();
    Work work{a, {scale, nullptr, a.inputs, groups}, nullptr, a.inputs / 2, nullptr};
    lay_out<Wide>(work, rows, [&](long r, long k, long count, uint32_t* to) {
        for (long g = k / W16::GROUP; g < (k + count) / W16::GROUP; g++, to += W16::GROUP / 2)
            widen_group(a.x + r * a.inputs + g * W16::GROUP, W16::GROUP, (int16_t*)to, scale + r * groups + g);
    });
    run<Wide>(work);
}

template <typename K>
static void pair_linear(const Linear& a) {
    static thread_local std::vector<uint32_t> rows;
    Work work{a, {}, nullptr, a.inputs / 2, nullptr};
    lay_out<K>(work, rows, [&](long r, long k, long count, uint32_t* to) { narrow_n(a.x + r * a.inputs + k, count, (bf16*)to); });
    run<K>(work);
}

#ifdef WAGER_TILES
static void chain_linear(const Linear& a) {
    static thread_local std::vector<uint32_t> rows;
    Work work{a, {}, nullptr, a.inputs, nullptr};
    lay_out<Chains>(work, rows, [&](long r, long k, long count, uint32_t* to) {
        for (long i = 0; i < count; i++) {
            bf16 rounded;
            narrow(a.x[r * a.inputs + k + i], &rounded);
            ((float*)to)[i] = widen(rounded);
        }
    });
    run<Chains>(work);
}
#endif

static void pair_linear(const Linear& a) {
#ifdef WAGER_TILES
    if (tile_rows && a.rows >= tile_rows) return pair_linear<PairTiles>(a);
    if (tile_rows) return chain_linear(a);
#endif
    pair_linear<Plain<B16>>(a);
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

// Panels of W16, codes chosen as in quantize.py. Returns how many groups hold a value that is not finite.
template <typename W>
static long pack_wide(const W* weight, long outputs, long inputs, char* packed, int threads) {
    constexpr long G = W16::GROUP;
    long panels = (outputs + NR - 1) / NR, groups = (inputs + G - 1) / G;
    std::atomic<long> broken{0};
    each(threads, panels, [&](long p) {
        for (long i = 0; i < groups * NR; i++) {
            long g = i / NR, n = i % NR, row = p * NR + n, count = std::min(G, inputs - g * G);
            if (row >= outputs) continue;
            float values[G] = {}, most = 0;
            for (long k = 0; k < count; k++) values[k] = widen(weight[row * inputs + g * G + k]);
            for (long k = 0; k < G; k++) most = std::max(most, values[k] == values[k] ? std::fabs(values[k]) : INFINITY);
            int exponent = 0;
            if (most == INFINITY) broken++;
            else std::frexp(most, &exponent);
            exponent = std::max(exponent, -100) - W16::BITS;
            float scale = std::ldexp(1.0f, exponent), inverse = std::ldexp(1.0f, -exponent);
            char* group = packed + (p * groups + g) * W16::BYTES;
            narrow(scale, (bf16*)group + n);
            int16_t* codes = (int16_t*)(group + W16::HEAD) + 2 * n;
            for (long k = 0; k < G; k++) codes[k / 2 * 2 * NR + k % 2] = (int16_t)std::nearbyint(most == INFINITY ? 0.0f : values[k] * inverse);
        }
    });
    return broken;
}

#ifdef WAGER_TILES
// Whether tiles and Chains give the same bits on numbers of both signs: large rows and outputs, and such whose sums are hardly normal.
static bool same_bits() {
    constexpr long ROWS = 39, INPUTS = 96, OUTPUTS = 2 * NR;
    uint32_t state = 1;
    auto number = [&](uint32_t exponent, uint32_t spread) {
        state = state * 1664525u + 1013904223u;
        return (bf16)((state >> 31) << 15 | (exponent + (state >> 24) % spread) << 7 | ((state >> 16) & 127u));
    };
    std::vector<float> x(ROWS * INPUTS), bias(OUTPUTS), y(ROWS * OUTPUTS), alone(ROWS * OUTPUTS);
    std::vector<bf16> weights((2 + SLACK) * NR * INPUTS);
    for (long i = 0; i < ROWS * INPUTS; i++) x[i] = widen(number(i / INPUTS % 4 ? 120 : 57, 16));
    for (long i = 0; i < OUTPUTS * INPUTS; i++) weights[i] = number(i / 2 % NR % 4 ? 120 : 57, 16);
    for (long o = 0; o < OUTPUTS; o++) bias[o] = widen(number(o % 4 ? 120 : 0, 8));
    tile_rows = ROWS;
    Linear a{x.data(), (const char*)weights.data(), bias.data(), nullptr, nullptr, nullptr, y.data(), ROWS, INPUTS, OUTPUTS, 3, 0, 1};
    wager_linear(&a);
    a.rows = 1, a.y = alone.data();
    for (long r = 0; r < ROWS; r++, a.x += INPUTS, a.y += OUTPUTS) wager_linear(&a);
    return !std::memcmp(y.data(), alone.data(), y.size() * sizeof(float));
}
#endif

extern "C" {
// Has linears of `fewest` rows and more use tiles, none if it is 0; the caller has asked the system. Returns what holds from now on: `fewest`,
// 0 too where this build is without them, -1: none, because tiles here sum otherwise than Chains.
int wager_use_tiles([[maybe_unused]] int fewest) {
#ifdef WAGER_TILES
    const bool wrong = fewest && !same_bits();
    tile_rows = wrong ? 0 : fewest;
    return wrong ? -1 : fewest;
#else
    return 0;
#endif
}
void wager_linear(const Linear* a) {
    switch (a->format) {
        case 0: return linear<Plain<F32>>(*a);
        case 1: return linear<Plain<BF16>>(*a);
        case 2: return linear<Plain<I8>>(*a);
        case 3: return pair_linear(*a);
        case 4: return integer_linear<W8>(*a);
        case 5: return linear<Weighted<Grouped<4, false>, Table>>(*a);
        case 6: return integer_linear<Grouped<4, false>>(*a);
        case 7: return linear<Weighted<Grouped<4, false>, Codes<4>>>(*a);
        case 8: return linear<Weighted<Grouped<8, false>, Codes<8>>>(*a);
        case 9: return integer_linear<Grouped<8, false>>(*a);
        case 10: return linear<Weighted<Grouped<4, true>, Codes<4>>>(*a);
        case 11: return integer_linear<Grouped<4, true>>(*a);
        case 12: return linear<Plain<F16>>(*a);
        case 13: return wide_linear(*a);
    }
}
// Both write ceil(outputs / 16) + 3 panels.
void wager_pack_f32(const float* weight, long outputs, long inputs, float* packed, int threads) { pack(weight, outputs, inputs, packed, threads); }
void wager_pack_bf16(const bf16* weight, long outputs, long inputs, bf16* packed, int threads) { pack(weight, outputs, inputs, packed, threads); }
// `packed` has room for ceil(outputs / 16) + 3 panels, the last three zero.
long wager_pack_wide_f32(const float* weight, long outputs, long inputs, char* packed, int threads) { return pack_wide(weight, outputs, inputs, packed, threads); }
long wager_pack_wide_bf16(const bf16* weight, long outputs, long inputs, char* packed, int threads) { return pack_wide(weight, outputs, inputs, packed, threads); }
}
