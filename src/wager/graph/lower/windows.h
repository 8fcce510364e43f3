// Products over windows: out[pixel, f] = act(bias[f] + sum over taps, c of in[base(pixel) + delta(tap) + c] * weight[tap, c, f]).
// A bit mask per pixel says which taps lie inside the tensor; taps outside for a whole tile of pixels cost nothing.
#include <omp.h>


constexpr int ROWS = VECTOR == 16 ? 12 : 6;  // pixels of a full tile: with two vectors of features they fill the registers
constexpr long WIDTH = 2 * VECTOR;           // features of a tile

enum Activation { NONE, RELU, PRELU, TANH, SIGMOID, SILU, GELU, GELU_TANH };

struct Epilogue {
    const float* bias;   // per feature, zero-padded to a multiple of WIDTH
    const float* slope;  // per feature, for PRELU (leaky ReLU repeats one value)
    long activation;
};

struct Group {  // pixels that share their weights
    long pixels;
    const int32_t* base;
    const uint64_t* mask;
    const int32_t* place;
    const float* weight;
    const int64_t* delta;
};

struct Window {
    long repeats, in_step, out_step;  // whole copies of the tables, e.g. the images of a batch
    long groups, taps, channels, features, feature_step;
    long rows, row_step;  // where row_step: the input is first copied to `copy`, its rows of channels this far apart
    float* copy;
    long dot;  // 1: lanes run over channels (few features), weights [tap][feature][channel, padded to vectors]; 0: over features, weights [block][tap][c][WIDTH]
    const Group* group;
    Epilogue epilogue;
};

static inline float wg_activate(float x, long activation, float slope) {
    switch (activation) {
        case RELU: return wg_relu(x);
        case PRELU: return x > 0.0f ? x : x * slope;
        case TANH: return wg_tanh(x);
        case SIGMOID: return wg_sigmoid(x);
        case SILU: return wg_silu(x);
        case GELU: return wg_gelu(x);
        case GELU_TANH: return wg_gelu_tanh(x);
        default: return x;
    }
}

// A row of values in place; one loop per function so that each vectorises.
template <typename F>
static inline void wg_map(float* x, long n, F f) {
#pragma omp simd
    for (long i = 0; i < n; i++) x[i] = f(x[i]);
}
static inline void wg_activate_row(float* x, long n, long activation, const float* slope) {
    switch (activation) {
        case RELU: wg_map(x, n, [](float v) { return wg_relu(v); }); break;
        case PRELU:
#pragma omp simd
            for (long i = 0; i < n; i++) x[i] = x[i] > 0.0f ? x[i] : x[i] * slope[i];
            break;
        case TANH: wg_map(x, n, [](float v) { return wg_tanh(v); }); break;
        case SIGMOID: wg_map(x, n, [](float v) { return wg_sigmoid(v); }); break;
        case SILU: wg_map(x, n, [](float v) { return wg_silu(v); }); break;
        case GELU: wg_map(x, n, [](float v) { return wg_gelu(v); }); break;
        case GELU_TANH: wg_map(x, n, [](float v) { return wg_gelu_tanh(v); }); break;
        default: break;
    }
}

constexpr long AHEAD = 48;  // rows of weights: every line of them is asked for, into the second cache, since the first has few places for misses

// c[MR][2 vectors] += rows a[MR][K] times B[K][WIDTH].
template <int MR>
static inline __attribute__((always_inline)) void wg_run(vec (&c)[MR][2], const float* const* a, long K, const float* B) {
#pragma GCC unroll 2
    for (long k = 0; k < K; k++) {
        for (long l = 0; l < WIDTH; l += 16) __builtin_prefetch(B + (k + AHEAD) * WIDTH + l, 0, 2);
        const vec b0 = *(const vec*)(B + k * WIDTH), b1 = *(const vec*)(B + k * WIDTH + VECTOR);
#pragma GCC unroll 12
        for (int i = 0; i < MR; i++) {
            const float x = a[i][k];
            c[i][0] += b0 * x;
            c[i][1] += b1 * x;
        }
    }
}

// One tile of MR pixels and WIDTH features, the taps [t0, t1). `partial` (when not null) keeps unfinished sums.
template <int MR>
static void wg_tile(const Window& w, const Group& g, const float* in, const float* zeros, long at, long t0, long t1, long block,
                    float* partial, float* out) {
    vec c[MR][2];
    for (int i = 0; i < MR; i++) {
        c[i][0] = t0 ? *(const vec*)(partial + i * WIDTH) : *(const vec*)(w.epilogue.bias + block * WIDTH);
        c[i][1] = t0 ? *(const vec*)(partial + i * WIDTH + VECTOR) : *(const vec*)(w.epilogue.bias + block * WIDTH + VECTOR);
    }
    const float* B = g.weight + block * w.taps * w.channels * WIDTH;
    uint64_t any = 0;
    for (int i = 0; i < MR; i++) any |= g.mask[at + i];
    for (long t = t0; t < t1; t++) {
        if (!(any >> t & 1)) continue;
        const float* a[MR];
        for (int i = 0; i < MR; i++) a[i] = g.mask[at + i] >> t & 1 ? in + g.base[at + i] + g.delta[t] : zeros;
        wg_run<MR>(c, a, w.channels, B + t * w.channels * WIDTH);
    }
    if (t1 < w.taps) {
        for (int i = 0; i < MR; i++) *(vec*)(partial + i * WIDTH) = c[i][0], *(vec*)(partial + i * WIDTH + VECTOR) = c[i][1];
        return;
    }
    const long left = w.features - block * WIDTH < WIDTH ? w.features - block * WIDTH : WIDTH;
    const float* slope = w.epilogue.slope ? w.epilogue.slope + block * WIDTH : nullptr;
    if (left == WIDTH && w.feature_step == 1 && w.epilogue.activation <= PRELU) {
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < 2; j++) {
                vec y = c[i][j];
                if (w.epilogue.activation == RELU) y = y < 0.0f ? vec{} : y;
                if (w.epilogue.activation == PRELU) y = y > 0.0f ? y : y * *(const vec*)(slope + j * VECTOR);
                *(vec*)(out + g.place[at + i] + block * WIDTH + j * VECTOR) = y;
            }
        return;
    }
    alignas(64) float row[WIDTH];
    for (int i = 0; i < MR; i++) {
        *(vec*)row = c[i][0], *(vec*)(row + VECTOR) = c[i][1];
        wg_activate_row(row, left, w.epilogue.activation, slope);
        float* to = out + g.place[at + i] + block * WIDTH * w.feature_step;
        for (long f = 0; f < left; f++) to[f * w.feature_step] = row[f];
    }
}

// How many of the pixels [at, end) make the next tile: a tile runs all taps that any of its pixels has, so pixels with other taps waste work;
// large tiles load fewer weights for each pixel.
static inline int wg_next(const Group& g, long at, long end) {
    if (at + ROWS <= end && g.mask[at] == g.mask[at + ROWS - 1]) return ROWS;  // pixels are sorted by their taps
    static const int sizes[] = {1, 2, 4, 6, 7, 8, 12};
    uint64_t any = 0;
    long useful = 0, seen = 0;
    int best = 1;
    float most = -1.0f;
    for (const int size : sizes) {
        if (size > ROWS || at + size > end) break;
        for (; seen < size; seen++) any |= g.mask[at + seen], useful += __builtin_popcountll(g.mask[at + seen]);
        const long done = (long)__builtin_popcountll(any) * (size < 4 ? 4 : size);
        const float worth = (done ? (float)useful / done : 1.0f) * size / (size + 1);
        if (worth >= most) most = worth, best = size;
    }
    return best;
}

// Pixels [from, end) of a group, one block of features. Taps are cut so that the weights in use stay in the second-level cache.
static void wg_window_block(const Window& w, const Group& g, const float* in, const float* zeros, long from, long end, long block,
                            float* partial, float* out) {
    const long per_tap = w.channels * WIDTH * 4, budget = 160 << 10;
    const long step = per_tap * w.taps <= budget || end - from <= ROWS ? w.taps : (budget / per_tap ? budget / per_tap : 1);
    for (long t0 = 0; t0 < w.taps; t0 += step) {
        const long t1 = t0 + step < w.taps ? t0 + step : w.taps;
        for (long at = from, size; at < end; at += size) {
            size = wg_next(g, at, end);
            float* const kept = partial + (at - from) * WIDTH;
            switch (size) {
                case 12: wg_tile<ROWS>(w, g, in, zeros, at, t0, t1, block, kept, out); break;
                case 8: wg_tile<ROWS < 8 ? ROWS : 8>(w, g, in, zeros, at, t0, t1, block, kept, out); break;
                case 7: wg_tile<ROWS < 7 ? ROWS : 7>(w, g, in, zeros, at, t0, t1, block, kept, out); break;
                case 6: wg_tile<6>(w, g, in, zeros, at, t0, t1, block, kept, out); break;
                case 4: wg_tile<4>(w, g, in, zeros, at, t0, t1, block, kept, out); break;
                case 2: wg_tile<2>(w, g, in, zeros, at, t0, t1, block, kept, out); break;
                default: wg_tile<1>(w, g, in, zeros, at, t0, t1, block, kept, out);
            }
        }
    }
}

static inline float wg_sum(vec x) {
    float s[VECTOR];
    *(vec*)s = x;
    for (int d = VECTOR / 2; d > 0; d /= 2)
        for (int i = 0; i < d; i++) s[i] += s[i + d];
    return s[0];
}

// A vector of which only the first n entries exist; the others are zero.
static inline vec wg_load(const float* x, long n) {
    if (n >= VECTOR) return *(const vec*)x;
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), x);
#else
    float some[VECTOR] = {};
    for (long i = 0; i < n; i++) some[i] = x[i];
    return *(const vec*)some;
#endif
}

// Few features: MR pixels times NF features of sums over channel vectors, starting at feature f.
template <int MR, int NF>
static void wg_dot(const Window& w, const Group& g, const float* in, const float* zeros, long at, long f, float* out) {
    vec c[MR][NF] = {};
    const long padded = (w.channels + VECTOR - 1) / VECTOR * VECTOR;
    uint64_t any = 0;
    for (int i = 0; i < MR; i++) any |= g.mask[at + i];
    for (long t = 0; t < w.taps; t++) {
        if (!(any >> t & 1)) continue;
        const float* a[MR];
        for (int i = 0; i < MR; i++) a[i] = g.mask[at + i] >> t & 1 ? in + g.base[at + i] + g.delta[t] : zeros;
        const float* B = g.weight + (t * w.features + f) * padded;
        for (long k = 0; k < w.channels; k += VECTOR) {
            vec b[NF];
            for (int j = 0; j < NF; j++) b[j] = *(const vec*)(B + j * padded + k);
            for (int i = 0; i < MR; i++) {
                const vec x = wg_load(a[i] + k, w.channels - k);
                for (int j = 0; j < NF; j++) c[i][j] += x * b[j];
            }
        }
    }
    alignas(64) float y[16] = {}, slope[16] = {};
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NF; j++) {
            y[i * NF + j] = wg_sum(c[i][j]) + w.epilogue.bias[f + j];
            if (w.epilogue.slope) slope[i * NF + j] = w.epilogue.slope[f + j];
        }
    wg_activate_row(y, 16, w.epilogue.activation, slope);
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NF; j++) out[g.place[at + i] + (f + j) * w.feature_step] = y[i * NF + j];
}

template <int MR, int NF>
static inline void wg_dots(const Window& w, const Group& g, const float* in, const float* zeros, long at, long end, long f, float* out) {
    for (; at + MR <= end; at += MR) wg_dot<MR, NF>(w, g, in, zeros, at, f, out);
    for (; at < end; at++) wg_dot<1, NF>(w, g, in, zeros, at, f, out);
}

static void wg_dot_block(const Window& w, const Group& g, const float* in, const float* zeros, long from, long end, float* out) {
    long f = 0;
    for (; f + 3 <= w.features && w.features - f != 4; f += 3) wg_dots<4, 3>(w, g, in, zeros, from, end, f, out);
    for (; f + 2 <= w.features; f += 2) wg_dots<6, 2>(w, g, in, zeros, from, end, f, out);
    for (; f < w.features; f++) wg_dots<12, 1>(w, g, in, zeros, from, end, f, out);
}

constexpr long PIXELS = 192;  // of one work item at most

// Called by every thread of a parallel region; ends with a barrier.
static void wg_window(const Window& w, const float* in, float* out, const float* zeros) {
    const long blocks = w.dot ? 1 : (w.features + WIDTH - 1) / WIDTH, threads = omp_get_num_threads();
    if (w.row_step) {
#pragma omp for schedule(static)
        for (long r = 0; r < w.rows; r++) __builtin_memcpy(w.copy + r * w.row_step, in + r * w.channels, w.channels * 4);
        in = w.copy;
    }
    long chunk = PIXELS, total = 0;
    for (;; chunk = (chunk / 2 + ROWS - 1) / ROWS * ROWS) {  // smaller pieces until every thread has several
        total = 0;
        for (long g = 0; g < w.groups; g++) total += (w.group[g].pixels + chunk - 1) / chunk;
        const long items = total * blocks * w.repeats;
        if (chunk <= 2 * ROWS || items >= 4 * threads) break;
        if (w.groups == 1 && total == 1 && items >= 2 * threads && items % threads == 0) break;  // even shares as they are
    }
#pragma omp for schedule(dynamic, 1)
    for (long item = 0; item < total * blocks * w.repeats; item++) {
        const long n = item / (total * blocks), block = item / total % blocks;
        long part = item % total, at = 0;
        while (part >= (w.group[at].pixels + chunk - 1) / chunk) part -= (w.group[at].pixels + chunk - 1) / chunk, at++;
        const Group& g = w.group[at];
        const long from = part * chunk, end = from + chunk < g.pixels ? from + chunk : g.pixels;
        alignas(64) float partial[PIXELS * WIDTH];
        if (w.dot)
            wg_dot_block(w, g, in + n * w.in_step, zeros, from, end, out + n * w.out_step);
        else
            wg_window_block(w, g, in + n * w.in_step, zeros, from, end, block, partial, out + n * w.out_step);
    }
}
