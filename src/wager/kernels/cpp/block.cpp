// The two halves of a transformer block around attention, each as one call: norm + qkv + head norms + rotation, and output projection +
// norm + gated MLP. The arithmetic is that of the single operators, in their order, so the bits are the same.
#include <algorithm>
#include <vector>

#include "activations.h"
#include "linear.h"
#include "pool.h"
#include "simd.h"

struct Norm {
    const void* weight;
    float eps, offset;
    int32_t is_bf16;
};

struct BlockInput {
    const float *x, *residual;  // x [T, D]; residual [T, D] or null
    float* total;               // residual + x, written when there is a residual
    Norm norm;
    Linear qkv;                 // y: [T, (H + 2 G) K]
    Norm q_norm, k_norm;        // per head; weight null: none
    const float *cos, *sin;     // [T, R]
    int64_t heads, kv_heads, head_dim, pairs;
    int32_t interleaved;
};

struct BlockOutput {
    Linear output;  // x: attended values [T, H V]; residual: the stream; y: the stream after attention
    Norm norm;
    Linear gate_up, down;  // down.y: [T, D]
};

extern "C" {
void wager_rms_norm_f32(const float* x, long stride, float* residual, const float* weight, long rows, long width, float eps, float offset, float* y, int threads);
void wager_rms_norm_bf16(const float* x, long stride, float* residual, const bf16* weight, long rows, long width, float eps, float offset, float* y, int threads);
}

static void normalise(const Norm& n, const float* x, float* residual, long rows, long width, float* y, int threads) {
    if (n.is_bf16) wager_rms_norm_bf16(x, width, residual, (const bf16*)n.weight, rows, width, n.eps, n.offset, y, threads);
    else wager_rms_norm_f32(x, width, residual, (const float*)n.weight, rows, width, n.eps, n.offset, y, threads);
}

static void heads_of_token(const BlockInput& a, long t) {
    float* row = a.qkv.y + t * a.qkv.outputs;
    thread_local std::vector<float> normed;
    normed.resize(a.head_dim);
    for (long h = 0; h < a.heads + a.kv_heads; h++) {
        float* head = row + h * a.head_dim;
        const Norm& n = h < a.heads ? a.q_norm : a.k_norm;
        if (n.weight) {
            normalise(n, head, nullptr, 1, a.head_dim, normed.data(), 1);
            std::copy(normed.begin(), normed.end(), head);
        }
        rope_row(head, a.cos + t * a.pairs, a.sin + t * a.pairs, a.pairs, 2 * a.pairs, a.interleaved, head);
    }
}

extern "C" {
void wager_block_input(const BlockInput* a) {
    static thread_local std::vector<float> normed;
    long rows = a->qkv.rows, width = a->qkv.inputs;
    normed.resize(rows * width);
    if (a->residual) std::copy_n(a->residual, rows * width, a->total);
    normalise(a->norm, a->x, a->residual ? a->total : nullptr, rows, width, normed.data(), a->qkv.threads);
    Linear qkv = a->qkv;
    qkv.x = normed.data();
    wager_linear(&qkv);
    each(rows * qkv.outputs > 1 << 14 ? qkv.threads : 1, rows, [&](long t) { heads_of_token(*a, t); });
}

void wager_block_output(const BlockOutput* a) {
    static thread_local std::vector<float> normed, gated;
    long rows = a->output.rows, width = a->output.outputs;
    normed.resize(rows * width), gated.resize(rows * a->gate_up.outputs);
    wager_linear(&a->output);
    normalise(a->norm, a->output.y, nullptr, rows, width, normed.data(), a->output.threads);
    Linear gate_up = a->gate_up, down = a->down;
    gate_up.x = normed.data(), gate_up.y = gated.data(), down.x = gated.data();
    wager_linear(&gate_up);
    wager_linear(&down);
}
}
