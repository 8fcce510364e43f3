// Linears by the tiles of AMX: up to 32 rows by two panels at a time, sums in four registers, activations in two and weights in two.
//
// Panels are what the instructions take as B: 16 rows of [16][2] bfloat16 or of [16][4] uint8. Activations are laid out in lines of a
// row's next 64 bytes, the lines of all rows of a pass side by side.
//
// Bits. Integer products are summed exactly, as by vectors. TDPBF16PS sums 32 inputs in two chains, one of the even and one of the odd
// inputs, each from zero, adds the two, and adds that to the sum before; subnormal numbers count as zero. Where tiles serve, `Chains`
// sums fewer rows in just that way, so that a row has the same bits alone and in a batch. wager_use_tiles (linear.cpp) compares both.
#pragma once
#include <algorithm>

#include "amx_tiles.h"
#include "linear_tiles.h"
#ifdef WAGER_TILES

constexpr int TILE = 16;  // most rows of a register

// Subnormal operands and results of vector operations count as zero while this lives. The barriers keep loads and stores inside.
struct Flushed {
    const unsigned saved = _mm_getcsr();
    Flushed() { set(saved | 0x8040); }
    ~Flushed() { set(saved); }
    static void set(unsigned csr) { asm volatile("ldmxcsr %0" : : "m"(csr) : "memory"); }
};

// w x + sum, rounded once: products may be smaller than any normal number.
static inline vf fused(vf w, float x, vf sum) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)w, _mm512_set1_ps(x), (__m512)sum);
#else
    return (vf)_mm256_fmadd_ps((__m256)w, _mm256_set1_ps(x), (__m256)sum);
#endif
}

// Pairs of bfloat16 weights times activations rounded to bfloat16 (kept as float32), summed as TDPBF16PS does.
struct Chains {
    static constexpr int MANY = VL == 16 ? 8 : 6, PIECE = 64, SPAN = 32;
    static constexpr long SLICE = KC * 2;
    static constexpr bool ZEROS = false;
    static long bytes(long inputs) { return inputs * 2 * NR; }
    static constexpr int panels(int rows) { return panels_for(rows, SUMS / 2); }
    template <int R, int P>
    static inline void tile(const Work& work, const Span& s) {
        const Rows<float, R> x(work, s.row);
        const long panel_bytes = bytes(work.a.inputs);
        const Flushed flushed;
        Sums<R, P> acc;
        acc.begin(s);
        const char *w = s.w + bytes(s.k0), *ahead = s.ahead;
        for (long k = s.k0; k < s.k1; k += SPAN) {
            vf even[R][P][NV] = {}, odd[R][P][NV] = {};
            for (long i = k; i < k + SPAN; i += 2, w += PIECE, ahead += s.step) {
                vu pair[P][NV];
                for (int p = 0; p < P; p++) {
                    if (s.ahead) fetch(ahead + p * panel_bytes);
                    for (int v = 0; v < NV; v++) pair[p][v] = *(const vu*)(w + p * panel_bytes + v * VL * 4);
                }
                for (int r = 0; r < R; r++)
                    for (int p = 0; p < P; p++)
                        for (int v = 0; v < NV; v++) {
                            even[r][p][v] = fused((vf)(pair[p][v] << 16), x.at(r, i), even[r][p][v]);
                            odd[r][p][v] = fused((vf)(pair[p][v] & 0xffff0000u), x.at(r, i + 1), odd[r][p][v]);
                        }
            }
            for (int r = 0; r < R; r++)
                for (int p = 0; p < P; p++)
                    for (int v = 0; v < NV; v++) acc.at[r][p][v] += even[r][p][v] + odd[r][p][v];
        }
        acc.end(s);
    }
};

// How many rows the registers of the first and of the second half of a pass hold; no second half up to 16 rows. One configuration serves
// all passes of a call: where rows do not divide evenly, passes have one row less than the registers.
struct Halves {
    int rows[2];
    explicit Halves(long largest) : rows{(int)(largest > TILE ? (largest + 1) / 2 : largest), (int)(largest > TILE ? largest / 2 : 0)} {}
};

enum { SUM00, SUM01, SUM10, SUM11, X0, X1, W0, W1 };  // registers: sums by half and panel, activations by half, weights by panel

// BYTES of a row of activations.
template <int BYTES>
struct Configured {
    explicit Configured(long largest) {
        const Halves halves(largest);
        TileConfig config;
        auto tile = [&](int t, int rows, int bytes) { config.rows[t] = (uint8_t)rows, config.bytes[t] = (uint16_t)(rows ? bytes : 0); };
        for (int half = 0; half < 2; half++) {
            for (int panel = 0; panel < 2; panel++) tile(SUM00 + 2 * half + panel, halves.rows[half], 4 * NR);
            tile(X0 + half, halves.rows[half], BYTES), tile(W0 + half, BYTES / 4, 4 * NR);
        }
        amx::configure(config);
    }
    ~Configured() { amx::release(); }
};

static inline void fetch_lines(const char* from, long bytes, long panel_bytes) {
    for (long i = 0; i < bytes; i += 64) fetch(from + i), fetch(from + i + panel_bytes);
}

// `rows` rows of 16 sums that begin `ld` apart, in a register that holds `held`.
template <int T>
static inline void load_sums(const float* from, long ld, int rows, int held) {
    if (rows == held) return amx::load<T>(from, ld * 4);
    float whole[TILE * NR] = {};
    for (int r = 0; r < rows; r++) std::memcpy(whole + r * NR, from + r * ld, NR * 4);
    amx::load<T>(whole, NR * 4);
}
template <int T>
static inline void store_sums(float* to, long ld, int rows, int held) {
    if (rows == held) return amx::store<T>(to, ld * 4);
    float whole[TILE * NR];
    amx::store<T>(whole, NR * 4);
    for (int r = 0; r < rows; r++) std::memcpy(to + r * ld, whole + r * NR, NR * 4);
}

// w16a16. A step takes 32 inputs.
struct PairTiles {
    static constexpr int MANY = 2 * TILE, PIECE = 1024, BYTES = 64;
    static constexpr long SLICE = 512;  // of two panels 32 KiB: with the lines of the rows in the first cache
    static constexpr bool ZEROS = false;
    static long bytes(long inputs) { return inputs * 2 * NR; }
    static void tile(int rows, const Work& work, const Span& s) {
        const Halves held(Tiles<PairTiles>{work.a.rows}.largest);
        held.rows[1] ? pass<true>(rows, held, work, s) : pass<false>(rows, held, work, s);
    }
    template <bool BOTH>
    static inline void pass(int rows, const Halves& held, const Work& work, const Span& s) {
        const long panel_bytes = bytes(work.a.inputs);
        const int first = std::min(rows, held.rows[0]), second = rows - first;
        float *y0 = s.y, *y1 = s.y + first * s.ldy;
        if (s.start) {
            amx::load<SUM00>(s.start, 0), amx::load<SUM01>(s.start + NR, 0);
            if (BOTH) amx::load<SUM10>(s.start, 0), amx::load<SUM11>(s.start + NR, 0);
        } else {
            load_sums<SUM00>(y0, s.ldy, first, held.rows[0]), load_sums<SUM01>(y0 + NR, s.ldy, first, held.rows[0]);
            if (BOTH) load_sums<SUM10>(y1, s.ldy, second, held.rows[1]), load_sums<SUM11>(y1 + NR, s.ldy, second, held.rows[1]);
        }
        const char *w = s.w + bytes(s.k0), *ahead = s.ahead;
        const element* x = work.x + s.row * work.steps + s.k0 / 2 * rows;
        for (long k = s.k0; k < s.k1; k += 32, w += PIECE, x += rows * TILE, ahead += s.step) {
            amx::load<X0>(x, BYTES), amx::load<W0>(w, 64), amx::load<W1>(w + panel_bytes, 64);
            if (BOTH) amx::load<X1>(x + first * TILE, BYTES);
            if (s.ahead) fetch_lines(ahead, s.step, panel_bytes);
            amx::dpbf16<SUM00, X0, W0>(), amx::dpbf16<SUM01, X0, W1>();
            if (BOTH) amx::dpbf16<SUM10, X1, W0>(), amx::dpbf16<SUM11, X1, W1>();
        }
        store_sums<SUM00>(y0, s.ldy, first, held.rows[0]), store_sums<SUM01>(y0 + NR, s.ldy, first, held.rows[0]);
        if (BOTH) store_sums<SUM10>(y1, s.ldy, second, held.rows[1]), store_sums<SUM11>(y1 + NR, s.ldy, second, held.rows[1]);
    }
};

// Formats of int8 activations. A step takes a group: its integer sums are scaled and added by vectors.
template <typename F>
struct QuadTiles {
    static constexpr int MANY = 2 * TILE, PIECE = F::BYTES, BYTES = F::GROUP;
    static constexpr long SLICE = 1024;  // as PairTiles
    static constexpr bool ZEROS = false;  // sums of activations are in Acts
    static long bytes(long inputs) { return inputs / F::GROUP * F::BYTES; }
    static void tile(int rows, const Work& work, const Span& s) {
        const Halves held(Tiles<QuadTiles>{work.a.rows}.largest);
        held.rows[1] ? pass<true>(rows, held, work, s) : pass<false>(rows, held, work, s);
    }
    // A group's codes as bytes, as they lie in the panel or in `room`.
    static inline const char* codes(const char* group, char* room) {
        if (F::BITS == 8) return group + F::HEAD;
        constexpr int WORDS = 8 / F::BITS, LINES = F::GROUP / 4;
        for (int i = 0; i < LINES; i++)
            for (int v = 0; v < NV; v++) {
                vu raw = *(const vu*)(group + F::HEAD + i / WORDS * 64 + v * VL * 4);
                *(vi*)(room + i * 64 + v * VL * 4) = word<F>(raw, i % WORDS);
            }
        return room;
    }
    template <bool BOTH>
    static inline void pass(int rows, const Halves& held, const Work& work, const Span& s) {
        const Acts& acts = work.acts;
        const long panel_bytes = bytes(work.a.inputs);
        const int first = std::min(rows, held.rows[0]);
        alignas(64) float sums[MANY][2 * NR];
        alignas(64) int32_t part[MANY][2 * NR];
        alignas(64) char room[2][1024];
        for (int r = 0; r < rows; r++) std::memcpy(sums[r], s.start ? s.start : s.y + r * s.ldy, sizeof(sums[r]));
        const char *w = s.w + bytes(s.k0), *ahead = s.ahead;
        const element* x = work.x + s.row * work.steps + s.k0 / 4 * rows;
        for (long g = s.k0 / F::GROUP; g < s.k1 / F::GROUP; g++, w += F::BYTES, x += rows * LINE<QuadTiles>, ahead += s.step) {
            amx::load<X0>(x, BYTES), amx::load<W0>(codes(w, room[0]), 64), amx::load<W1>(codes(w + panel_bytes, room[1]), 64);
            if (BOTH) amx::load<X1>(x + first * LINE<QuadTiles>, BYTES);
            if (s.ahead) fetch_lines(ahead, s.step, panel_bytes);
            product<SUM00, X0, W0>(part[0]), product<SUM01, X0, W1>(part[0] + NR);
            if (BOTH) product<SUM10, X1, W0>(part[first]), product<SUM11, X1, W1>(part[first] + NR);
            for (int i = 0; i < 2 * NV; i++) {
                const Scaled<F> group(w + i / NV * panel_bytes, i % NV);
                for (int r = 0; r < rows; r++) {
                    const long at = (s.row + r) * acts.groups + g;
                    vi total = *(const vi*)(part[r] + i * VL) + acts.offsets[at];
                    store(sums[r] + i * VL, group.add(load(sums[r] + i * VL), total, acts.scales[at], acts.offsets[at]));
                }
            }
        }
        for (int r = 0; r < rows; r++) std::memcpy(s.y + r * s.ldy, sums[r], sizeof(sums[r]));
    }
    template <int C, int A, int B>
    static inline void product(int32_t* to) {
        amx::zero<C>(), amx::dpbsud<C, A, B>(), amx::store<C>(to, 2 * NR * 4);
    }
};

template <>
constexpr int LINE<PairTiles> = PairTiles::BYTES / 4;
template <>
struct Held<PairTiles> : Configured<PairTiles::BYTES> {
    explicit Held(long rows) : Configured(Tiles<PairTiles>{rows}.largest) {}
};
template <typename F>
constexpr int LINE<QuadTiles<F>> = QuadTiles<F>::BYTES / 4;
template <typename F>
struct Held<QuadTiles<F>> : Configured<F::GROUP> {
    explicit Held(long rows) : Configured<F::GROUP>(Tiles<QuadTiles<F>>{rows}.largest) {}
};
#endif
