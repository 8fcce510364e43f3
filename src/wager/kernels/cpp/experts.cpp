// Experts of a mixture in one call: rows are sorted by expert, every expert that is hit runs its gated MLP over its rows, and each token adds
// its experts' outputs in the order of their numbers. Products and sums are rounded one by one, as the operators on their own do it.
#include <algorithm>
#include <vector>

#include "linear.h"
#include "pool.h"
#include "simd.h"

struct Expert {
    Linear gate_up, down;  // x, y and rows are filled in here
};

struct ExpertArgs {
    const float* x;           // [T, D]
    const float* weights;     // [T, C]
    const int64_t* chosen;    // [T, C], numbers of experts
    float* y;                 // [T, D]; holds what the sums start from
    const Expert* experts;
    int64_t tokens, choices, count, width;
    int32_t threads;
};

static void run_expert(const ExpertArgs& a, const Expert& expert, const int64_t* order, long first, long rows, float* made, int threads) {
    thread_local std::vector<float> gathered, gated;
    gathered.resize(rows * a.width), gated.resize(rows * expert.gate_up.outputs);
    for (long i = 0; i < rows; i++) std::copy_n(a.x + order[first + i] / a.choices * a.width, a.width, gathered.data() + i * a.width);
    Linear gate_up = expert.gate_up, down = expert.down;
    gate_up.x = gathered.data(), gate_up.y = gated.data(), down.x = gated.data(), down.y = made + first * a.width;
    gate_up.rows = down.rows = rows, gate_up.threads = down.threads = threads;
    wager_linear(&gate_up);
    wager_linear(&down);
    for (long i = 0; i < rows; i++) {
        float weight = a.weights[order[first + i]], *row = down.y + i * a.width;
        for (long d = 0; d < a.width; d++) row[d] *= weight;
    }
}

extern "C" void wager_experts(const ExpertArgs* arguments) {
    const ExpertArgs& a = *arguments;
    long pairs = a.tokens * a.choices;
    std::vector<long> starts(a.count + 1), hit;
    std::vector<int64_t> order(pairs), place(pairs);
    for (long i = 0; i < pairs; i++) starts[a.chosen[i] + 1]++;
    for (long e = 0; e < a.count; e++) {
        if (starts[e + 1]) hit.push_back(e);
        starts[e + 1] += starts[e];
    }
    std::vector<long> next(starts.begin(), starts.end() - 1);
    for (long i = 0; i < pairs; i++) place[i] = next[a.chosen[i]]++, order[place[i]] = i;
    thread_local std::vector<float> scratch;
    scratch.resize(pairs * a.width);
    float* made = scratch.data();
    // Enough experts: one thread takes a whole expert, without waiting in between. Few: all threads share each one's outputs.
    bool many = a.threads > 1 && (long)hit.size() >= 2 * a.threads;
    auto one = [&](long h) { run_expert(a, a.experts[hit[h]], order.data(), starts[hit[h]], starts[hit[h] + 1] - starts[hit[h]], made, many ? 1 : a.threads); };
    if (many) each(a.threads, (long)hit.size(), one);
    else
        for (long h = 0; h < (long)hit.size(); h++) one(h);
    each(pairs * a.width > 1 << 16 ? a.threads : 1, a.tokens, [&](long t) {
        std::vector<int64_t> rows(place.begin() + t * a.choices, place.begin() + (t + 1) * a.choices);
        std::sort(rows.begin(), rows.end());
        float* to = a.y + t * a.width;
        for (int64_t row : rows) {
            const float* from = made + row * a.width;
            for (long d = 0; d < a.width; d++) to[d] += from[d];
        }
    });
}
