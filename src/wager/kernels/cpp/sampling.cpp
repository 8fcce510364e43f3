// From logits to one token a row: temperature, min-p, top-k, top-p, then a draw by inverting the distribution function or by an exponential
// race. The smallest set that a filter keeps is found by counting float bits in buckets, not by sorting the vocabulary.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"
#include "simd.h"

constexpr long BLOCK = 256;         // of the distribution function
constexpr int SHIFT = 20;           // buckets by a float's upper bits: exponent and 3 bits of the fraction
constexpr int BUCKETS = 1 << 10;    // of numbers in [0, 1]
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;

struct SamplingArgs {
    const float* logits;
    long rows, vocabulary, stride;
    const float *temperature, *min_p, *top_p;
    const int64_t* top_k;
    const double* uniforms;            // by inversion; null: by race, with numbers of (seed, position, token)
    const uint64_t *seeds, *positions;
    int64_t* tokens;
    float* kept;                       // [rows, vocabulary] or null: relative weights of what stays, 0 elsewhere
    int threads;
};

static uint64_t mix(uint64_t x) {  // SplitMix64's finaliser (Steele et al., 2014), as in serve/sampling/rng.py
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

struct Cut {
    float threshold = 0;  // weights above it stay
    long ties = 0;        // and so many of those equal to it, the first ones
};

// The leading weights >= floor until `count` of them or the mass `mass` is reached, whichever is first. `kept` gets the mass of what stays.
static Cut leading(const float* p, long n, float floor, long count, double mass, double* kept) {
    thread_local std::vector<long> counts;
    thread_local std::vector<double> masses;
    thread_local std::vector<float> inside;
    counts.assign(BUCKETS, 0), masses.assign(BUCKETS, 0.0), inside.clear();
    for (long i = 0; i < n; i++)
        if (p[i] >= floor && p[i] > 0) counts[bits_of(p[i]) >> SHIFT]++, masses[bits_of(p[i]) >> SHIFT] += p[i];
    long above = 0, last = -1;
    double sum = 0;
    for (int b = BUCKETS - 1; b >= 0; b--) {
        if (!counts[b]) continue;
        if (last >= 0) above += counts[last], sum += masses[last];  // the bucket above is wholly inside
        last = b;
        if (above + counts[b] >= count || sum + masses[b] >= mass) break;
    }
    if (last < 0) return *kept = 0, Cut{};
    for (long i = 0; i < n; i++)
        if (p[i] >= floor && p[i] > 0 && (long)(bits_of(p[i]) >> SHIFT) == last) inside.push_back(p[i]);
    std::sort(inside.begin(), inside.end(), [](float a, float b) { return a > b; });
    Cut cut;
    for (float value : inside) {
        if (value != cut.threshold) cut = {value, 0};
        cut.ties++, above++, sum += value;
        if (above >= count || sum >= mass) break;
    }
    return *kept = sum, cut;
}

static void keep(float* p, long n, Cut cut) {
    for (long i = 0; i < n; i++) {
        if (p[i] > cut.threshold) continue;
        if (p[i] == cut.threshold && cut.ties > 0) cut.ties--;
        else p[i] = 0;
    }
}

static void filter(float* p, long n, float min_p, long top_k, float top_p) {
    double mass = 0;
    float floor = min_p;  // the largest weight is 1
    bool limited = top_k > 0 && top_k < n;
    if (limited) keep(p, n, leading(p, n, floor, top_k, INFINITY, &mass));
    else if (floor > 0)
        for (long i = 0; i < n; i++) p[i] = p[i] >= floor ? p[i] : 0;
    if (top_p >= 1) return;
    if (!limited)
        for (long i = 0; i < n; i++) mass += p[i];
    keep(p, n, leading(p, n, 0, n, (double)top_p * mass, &mass));
}

static void weigh(const float* logits, long n, float temperature, float* p) {
    float top = -INFINITY;
    for (long i = 0; i < n; i++) top = std::max(top, logits[i]);
    vf inverse = vf{} + 1.0f / temperature;
    long i = 0;
    for (; i + VL <= n; i += VL) store(p + i, exp_v((load(logits + i) - top) * inverse));
    for (; i < n; i++) p[i] = exp_v(vf{} + (logits[i] - top) * inverse[0])[0];
}

static int64_t invert(const float* p, long n, double uniform) {
    long blocks = (n + BLOCK - 1) / BLOCK;
    std::vector<double> sums(blocks);
    double total = 0;
    for (long b = 0; b < blocks; b++) {
        for (long i = b * BLOCK; i < std::min(n, (b + 1) * BLOCK); i++) sums[b] += p[i];
        total += sums[b];
    }
    double target = uniform * total, before = 0;
    long block = 0, last = 0;
    for (; block < blocks; block++) {
        if (sums[block] > 0) last = block;
        if (before + sums[block] > target) break;
        before += sums[block];
    }
    if (block == blocks) before -= sums[block = last];  // rounding left none: the last that has weight
    int64_t chosen = block * BLOCK;
    for (long i = block * BLOCK; i < std::min(n, (block + 1) * BLOCK); i++) {
        before += p[i];
        if (p[i] > 0) chosen = i;
        if (before > target) break;
    }
    return chosen;
}

// The first of exponential clocks that run at rates p: token i is first with probability p_i / sum p. -log u >= 1 - u, so most logarithms
// need not be taken.
static int64_t race(const float* p, long n, uint64_t seed, uint64_t position) {
    uint64_t base = mix(mix(seed + GOLDEN) + position * GOLDEN + GOLDEN);
    double best = INFINITY;
    int64_t chosen = 0;
    for (long i = 0; i < n; i++) {
        if (!(p[i] > 0)) continue;
        double u = ((double)(mix(base + (uint64_t)(i + 1) * GOLDEN) >> 11) + 1.0) * 0x1p-53;  // (0, 1]
        if (1.0 - u >= best * p[i]) continue;
        double time = -std::log(u) / p[i];
        if (time < best) best = time, chosen = i;
    }
    return chosen;
}

extern "C" void wager_sample(const SamplingArgs* arguments) {
    const SamplingArgs& a = *arguments;
    each(a.rows * a.vocabulary > 1 << 15 ? a.threads : 1, a.rows, [&](long r) {
        thread_local std::vector<float> own;
        own.resize(a.kept ? 0 : a.vocabulary);
        float* p = a.kept ? a.kept + r * a.vocabulary : own.data();
        weigh(a.logits + r * a.stride, a.vocabulary, a.temperature[r], p);
        filter(p, a.vocabulary, a.min_p[r], a.top_k[r], a.top_p[r]);
        if (a.tokens) a.tokens[r] = a.uniforms ? invert(p, a.vocabulary, a.uniforms[r]) : race(p, a.vocabulary, a.seeds[r], a.positions[r]);
    });
}

// Repetition over prompt and output, frequency and presence over the output, in place: [rows, vocabulary] with counts of the output's tokens
// and which tokens the prompt has.
extern "C" void wager_penalise(float* logits, const float* counts, const uint8_t* prompt, long rows, long vocabulary, const float* repetition, const float* frequency, const float* presence, int threads) {
    each(rows * vocabulary > 1 << 15 ? threads : 1, rows, [&](long r) {
        for (long i = r * vocabulary; i < (r + 1) * vocabulary; i++) {
            float x = logits[i];
            if (counts[i] > 0 || prompt[i]) x = x > 0 ? x / repetition[r] : x * repetition[r];
            float used = frequency[r] * counts[i];
            x -= used;
            logits[i] = x - (counts[i] > 0 ? presence[r] : 0.0f);
        }
    });
}
