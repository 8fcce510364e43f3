// What happens to activations between linears: gates, rotation, and rounding to bfloat16, int8 or int16.
#pragma once
#include <cmath>

#include "simd.h"

static inline vf tanh_v(vf x) {
    vf magnitude = x < 0.0f ? -x : x;
    vf e = exp_v(-2.0f * magnitude);
    vf t = (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -t : t;
}
static inline vf silu_v(vf x) {
    vf e = exp_v(x < 0.0f ? x : -x);  // both branches without overflow
    return x * (x < 0.0f ? e : vf{} + 1.0f) / (1.0f + e);
}
static inline vf gelu_tanh_v(vf x) { return 0.5f * x * (1.0f + tanh_v(0.7978845608f * (x + 0.044715f * x * x * x))); }

static inline void rope_row(const float* x, const float* cos, const float* sin, long pairs, long width, bool interleaved, float* y) {
    for (long i = 0; i < pairs; i++) {
        long ia = interleaved ? 2 * i : i, ib = interleaved ? 2 * i + 1 : i + pairs;
        float a = x[ia], b = x[ib];
        y[ia] = a * cos[i] - b * sin[i];
        y[ib] = b * cos[i] + a * sin[i];
    }
    for (long i = 2 * pairs; i < width; i++) y[i] = x[i];
}

// Keeps the compiler from fusing products with the additions that follow: near ties they would round differently from the definition.
static inline void as_they_are(float (&values)[64]) { asm("" : "+m"(values)); }

// Symmetric int8 per group of inputs: scale = max |x| / 127, value = nearest integer of x (127 / max), ties to even. `offsets` get
// -offset * sum of the group's values. A group with a value that is not finite gets the scale NaN, so that the output shows it.
static inline void quantise_group(const float* x, int group, int offset, int8_t* values, float* scale, int32_t* out) {
    vf most{}, sums{};
    for (int i = 0; i < group; i += VL) {
        vf v = load(x + i);
        most = vmax(most, v < 0.0f ? -v : v);
        sums += v - v;  // NaN where v is not finite
    }
    float top = highest(most);
    float inverse = top > 1e-30f ? 127.0f / top : 0.0f;
    *scale = top / 127.0f + sum(sums);
    int32_t total = 0;
    float scaled[64];
    for (int i = 0; i < group; i++) scaled[i] = x[i] * inverse;
    as_they_are(scaled);
    for (int i = 0; i < group; i++) {
        float v = (scaled[i] + 12582912.0f) - 12582912.0f;  // round to nearest integer, ties to even
        values[i] = (int8_t)(v == v ? v : 0);
        total += values[i];
    }
    *out = -offset * total;
}

// As quantise_group, in int16 with 4095 for the largest: a group's products with 14-bit weights then sum within an int32.
static inline void widen_group(const float* x, int group, int16_t* values, float* scale) {
    vf most{}, sums{};
    for (int i = 0; i < group; i += VL) {
        vf v = load(x + i);
        most = vmax(most, v < 0.0f ? -v : v);
        sums += v - v;  // NaN where v is not finite
    }
    float top = highest(most), inverse = top > 1e-30f ? 4095.0f / top : 0.0f;
    *scale = top / 4095.0f + sum(sums);
    float scaled[64];
    for (int i = 0; i < group; i++) scaled[i] = x[i] * inverse;
    as_they_are(scaled);
    for (int i = 0; i < group; i++) {
        float v = (scaled[i] + 12582912.0f) - 12582912.0f;
        values[i] = (int16_t)(v == v ? v : 0);
    }
}
