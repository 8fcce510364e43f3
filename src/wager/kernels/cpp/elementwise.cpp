// Norms, activations, rotary embedding, and storing keys and values: one pass over memory each, float32 activations.
#include <algorithm>
#include <cmath>
#include <vector>

#include "activations.h"
#include "pool.h"
#include "simd.h"

constexpr long PARALLEL_ABOVE = 1 << 14;  // elements under which starting threads costs more than it saves
constexpr long CLAIM = 1 << 12;           // elements that a thread claims at once

template <typename F>
static void each_row(int threads, long rows, long width, F&& body) {
    long chunk = std::max<long>(1, CLAIM / std::max<long>(1, width));
    each(rows * width > PARALLEL_ABOVE ? threads : 1, (rows + chunk - 1) / chunk, [&](long c) {
        for (long r = c * chunk; r < std::min(rows, (c + 1) * chunk); r++) body(r);
    });
}

template <typename W>
static void norm_row(const float* x, const W* weight, long width, float eps, float offset, float* y) {
    vf squares{};
    long d = 0;
    for (; d + VL <= width; d += VL) squares += load(x + d) * load(x + d);
    float total = sum(squares);
    for (; d < width; d++) total += x[d] * x[d];
    float factor = 1.0f / std::sqrt(total / (float)width + eps);
    d = 0;
    for (; d + VL <= width; d += VL) store(y + d, load(x + d) * factor * (load(weight + d) + offset));
    for (; d < width; d++) y[d] = x[d] * factor * (widen(weight[d]) + offset);
}

template <typename W>
static void rms_norm(const float* x, long stride, float* residual, const W* weight, long rows, long width, float eps, float offset, float* y, int threads) {
    each_row(threads, rows, width, [&](long r) {
        const float* from = x + r * stride;
        if (residual) {
            float* sum_row = residual + r * width;
            for (long d = 0; d < width; d++) sum_row[d] += from[d];
            from = sum_row;
        }
        norm_row(from, weight, width, eps, offset, y + r * width);
    });
}

// Mean and variance in two passes over a row that is in cache: no cancellation. `total` takes the sum with the residual, or is null.
template <typename W>
static void layer_norm(const float* x, long stride, const float* residual, float* total, const W* weight, const W* bias, long rows, long width, float eps, float* y, int threads) {
    each_row(threads, rows, width, [&](long r) {
        const float* from = x + r * stride;
        float* to = y + r * width;
        if (residual) {
            for (long d = 0; d < width; d++) total[r * width + d] = residual[r * width + d] + from[d];
            from = total + r * width;
        }
        vf sums_v{}, squares{};
        long d = 0;
        for (; d + VL <= width; d += VL) sums_v += load(from + d);
        float mean = sum(sums_v);
        for (; d < width; d++) mean += from[d];
        mean /= (float)width;
        for (d = 0; d + VL <= width; d += VL) squares += (load(from + d) - mean) * (load(from + d) - mean);
        float variance = sum(squares);
        for (; d < width; d++) variance += (from[d] - mean) * (from[d] - mean);
        float factor = 1.0f / std::sqrt(variance / (float)width + eps);
        for (d = 0; d + VL <= width; d += VL) {
            vf v = (load(from + d) - mean) * factor * load(weight + d);
            store(to + d, bias ? v + load(bias + d) : v);
        }
        for (; d < width; d++) to[d] = (from[d] - mean) * factor * widen(weight[d]) + (bias ? widen(bias[d]) : 0.0f);
    });
}

struct RopeWrite {
    const float *q, *k, *v, *cos, *sin;  // q [T, H, K], k [T, G, K], v [T, G, V]; tokens their strides apart
    const int64_t* slots;
    float* y;  // [T, H, K]
    void *k_pool, *v_pool;
    int64_t q_token, k_token, v_token, tokens, heads, kv_heads, key_dim, value_dim, pairs;
    int32_t interleaved, threads;
};

template <typename E>
static void rope_write(const RopeWrite& a) {
    each_row(a.threads, a.tokens, (a.heads + 2 * a.kv_heads) * a.key_dim, [&](long t) {
        const float *cos = a.cos + t * a.pairs, *sin = a.sin + t * a.pairs;
        for (long h = 0; h < a.heads; h++)
            rope_row(a.q + t * a.q_token + h * a.key_dim, cos, sin, a.pairs, a.key_dim, a.interleaved, a.y + (t * a.heads + h) * a.key_dim);
        if (a.slots[t] < 0) return;
        thread_local std::vector<float> turned;
        turned.resize(a.kv_heads * a.key_dim);
        for (long h = 0; h < a.kv_heads; h++)
            rope_row(a.k + t * a.k_token + h * a.key_dim, cos, sin, a.pairs, a.key_dim, a.interleaved, turned.data() + h * a.key_dim);
        narrow_n(turned.data(), a.kv_heads * a.key_dim, (E*)a.k_pool + a.slots[t] * a.kv_heads * a.key_dim);
        narrow_n(a.v + t * a.v_token, a.kv_heads * a.value_dim, (E*)a.v_pool + a.slots[t] * a.kv_heads * a.value_dim);
    });
}

struct Silu {
    static vf of(vf x) { return silu_v(x); }
};
struct GeluTanh {
    static vf of(vf x) { return gelu_tanh_v(x); }
};

template <typename F>
static void gated(const float* gate_up, long rows, long width, float* y, int threads) {
    each_row(threads, rows, width, [&](long r) {
        const float *gate = gate_up + r * 2 * width, *up = gate + width;
        float* to = y + r * width;
        long d = 0;
        for (; d + VL <= width; d += VL) store(to + d, F::of(load(gate + d)) * load(up + d));
        for (; d < width; d++) {
            vf one = vf{} + gate[d];
            to[d] = F::of(one)[0] * up[d];
        }
    });
}

template <typename E>
static void write_rows(const float* x, long token_stride, const int64_t* slots, long tokens, long width, E* pool, int threads) {
    each_row(threads, tokens, width, [&](long t) {
        if (slots[t] < 0) return;
        narrow_n(x + t * token_stride, width, pool + slots[t] * width);
    });
}

extern "C" {
// residual may be null; where given it becomes residual + x. Rows of x are `stride` floats apart.
void wager_rms_norm_f32(const float* x, long stride, float* residual, const float* weight, long rows, long width, float eps, float offset, float* y, int threads) {
    rms_norm(x, stride, residual, weight, rows, width, eps, offset, y, threads);
}
void wager_rms_norm_bf16(const float* x, long stride, float* residual, const bf16* weight, long rows, long width, float eps, float offset, float* y, int threads) {
    rms_norm(x, stride, residual, weight, rows, width, eps, offset, y, threads);
}
// total, residual and bias may be null.
void wager_layer_norm_f32(const float* x, long stride, const float* residual, float* total, const float* weight, const float* bias, long rows, long width, float eps, float* y, int threads) {
    layer_norm(x, stride, residual, total, weight, bias, rows, width, eps, y, threads);
}
void wager_layer_norm_bf16(const float* x, long stride, const float* residual, float* total, const bf16* weight, const bf16* bias, long rows, long width, float eps, float* y, int threads) {
    layer_norm(x, stride, residual, total, weight, bias, rows, width, eps, y, threads);
}
void wager_rope_write_f32(const RopeWrite* a) { rope_write<float>(*a); }
void wager_rope_write_bf16(const RopeWrite* a) { rope_write<bf16>(*a); }
void wager_rope_write_fp8(const RopeWrite* a) { rope_write<fp8>(*a); }
void wager_silu_mul(const float* gate_up, long rows, long width, float* y, int threads) { gated<Silu>(gate_up, rows, width, y, threads); }
void wager_gelu_tanh_mul(const float* gate_up, long rows, long width, float* y, int threads) { gated<GeluTanh>(gate_up, rows, width, y, threads); }
void wager_rope(const float* x, long token_stride, long head_stride, const float* cos, const float* sin, long tokens, long heads, long pairs, long width, int interleaved, float* y, int threads) {
    each_row(threads, tokens, heads * width, [&](long t) {
        for (long h = 0; h < heads; h++)
            rope_row(x + t * token_stride + h * head_stride, cos + t * pairs, sin + t * pairs, pairs, width, interleaved, y + (t * heads + h) * width);
    });
}
void wager_write_f32(const float* x, long token_stride, const int64_t* slots, long tokens, long width, float* pool, int threads) {
    write_rows(x, token_stride, slots, tokens, width, pool, threads);
}
void wager_write_bf16(const float* x, long token_stride, const int64_t* slots, long tokens, long width, bf16* pool, int threads) {
    write_rows(x, token_stride, slots, tokens, width, pool, threads);
}
void wager_write_fp8(const float* x, long token_stride, const int64_t* slots, long tokens, long width, fp8* pool, int threads) {
    write_rows(x, token_stride, slots, tokens, width, pool, threads);
}
// Sum of float32 values, for the bandwidth measurement: reads memory once, every piece as several streams side by side, which loads more of it
// at a time than one stream does. Values that do not fill the vectors of all streams are left out: fewer than 16 vectors a piece.
double wager_stream_read(const float* x, long count, int threads) {
    constexpr long PIECE = 1 << 16, STREAMS = 4;
    std::vector<double> totals((count + PIECE - 1) / PIECE);
    each(threads, (long)totals.size(), [&](long block) {
        long first = block * PIECE, part = std::min(PIECE, count - first) / STREAMS / (2 * VL) * (2 * VL);
        vf s[STREAMS][2] = {};
        for (long i = 0; i < part; i += 2 * VL)
            for (int j = 0; j < STREAMS; j++)
                for (int v = 0; v < 2; v++) s[j][v] += load(x + first + j * part + i + v * VL);
        for (int j = 0; j < STREAMS; j++)
            for (int v = 0; v < 2; v++)
                for (int lane = 0; lane < VL; lane++) totals[block] += s[j][v][lane];
    });
    double total = 0;
    for (double part : totals) total += part;
    return total;
}
}
