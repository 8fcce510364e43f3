// Norms, activations, rotary embedding, and storing keys and values: one pass over memory each, float32 activations.
#include <cmath>

#include "activations.h"
#include "pool.h"
#include "simd.h"

constexpr long PARALLEL_ABOVE = 1 << 16;  // elements under which starting threads costs more than it saves
constexpr long CLAIM = 1 << 14;           // elements that a thread claims at once

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
        E* to = pool + slots[t] * width;
        const float* from = x + t * token_stride;
        for (long d = 0; d < width; d++) narrow(from[d], to + d);
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
// Sum of float32 values, whole blocks of 8 vectors: streams memory once, for the bandwidth measurement.
double wager_stream_read(const float* x, long count, int threads) {
    constexpr long PIECE = 1 << 16;
    std::vector<double> totals((count + PIECE - 1) / PIECE);
    each(threads, (long)totals.size(), [&](long block) {
        vf s[8] = {};
        for (long i = block * PIECE; i + 8 * VL <= std::min(count, (block + 1) * PIECE); i += 8 * VL)
            for (int j = 0; j < 8; j++) s[j] += load(x + i + j * VL);
        for (int j = 0; j < 8; j++)
            for (int lane = 0; lane < VL; lane++) totals[block] += s[j][lane];
    });
    double total = 0;
    for (double part : totals) total += part;
    return total;
}
}
