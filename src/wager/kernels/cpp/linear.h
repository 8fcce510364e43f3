// The arguments of a linear layer, for whoever calls one.
#pragma once
#include <cstdint>

struct Linear {
    const float* x;
    const char* weights;
    const float *bias, *scales, *table, *residual;  // bias [panels * 16]; scales per output, table and residual may be null
    float* y;
    int64_t rows, inputs, outputs;  // inputs padded to the format's step; outputs of y: half of the weight's rows when gated
    int32_t format, gate, threads;  // gate: 0 none, 1 silu, 2 gelu (tanh)
};

extern "C" void wager_linear(const Linear* a);
