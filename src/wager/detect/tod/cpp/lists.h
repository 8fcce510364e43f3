// Candidate lists of query rows, and the group of rows that a thread works on.
//
// A row's threshold is the k-th smallest upper bound among its candidates. A list that runs full is cut at the threshold; if near-ties keep
// it full, float64 settles them on the spot, so a list never overflows.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "distance.h"
#include "panels.h"

namespace {
constexpr int GROUP = 96;  // query rows that visit panels together
constexpr float INFINITE = std::numeric_limits<float>::infinity(), UNKNOWN = std::numeric_limits<float>::max();
constexpr float BOX_SHARE = 1 + 0x1p-17f;  // covers the roundings of a distance to a box, and directions that are not quite orthonormal

struct Base {
    const double* exact;  // all base rows
    const float *panel, *norm2, *norm, *longest;  // float32: norms of each column, the largest of each panel
    const int8_t* words;
    const int32_t *half, *odd;          // half the squared length of the levels, rounded down, plus OFFSET times their sum; the bit lost
    const float *residual, *coarsest;   // distance of each column from its levels, the largest of each panel
    const float *low_box, *high_box;    // of each panel along each direction
    const int32_t* row;                 // of a column, counted from first_row
    int64_t first_row, columns, panels, d, dims;
};

struct Queries {
    const double* exact;
    const float *minus_twice, *norm2, *norm, *place;  // minus_twice_RD: -2 times the centred float32 row
    const uint8_t* words;                             // levels + OFFSET, [row][4 * words]
    const int32_t* length;                            // squared length of the levels
    const float* residual;
    const int64_t* own;  // the base row that a query is, or -1
};

struct Lists {  // of all query rows
    int k, capacity;
    float slack;  // the float32 error bound is slack * (|a| + |b|)^2
    double scale2;
    int32_t* index;
    float *low, *high;
    int32_t* count;
    float* threshold;
};

struct Problem {
    Base base;
    Queries queries;
    Lists lists;
};

// What one thread holds of the group it works on.
struct Group {
    int rows = 0;
    int64_t row[GROUP];
    alignas(64) float limit[GROUP];  // threshold
    alignas(64) float reach[GROUP];  // threshold * BOX_SHARE
    alignas(64) float root[GROUP];   // square root of the threshold, plus the row's residual
    std::vector<float> query, near, far;  // [row][d]; [dims][GROUP] places less and plus their error
    std::vector<uint8_t> words;           // [row][4 * words]
    std::vector<float> bound, away;       // of each panel: squared distances from the group's box, and from its middle
    std::vector<int32_t> nearest;
    std::vector<uint8_t> visited;
    std::vector<float> scratch;
    std::vector<Pair> pairs;
    int64_t settled = 0;
};

inline void set_threshold(Group& g, int slot, float value, const Problem& problem) {
    problem.lists.threshold[g.row[slot]] = g.limit[slot] = value;
    g.reach[slot] = value * BOX_SHARE;
    g.root[slot] = std::sqrt(value) * (1 + 0x1p-20f) + problem.queries.residual[g.row[slot]];
}

// The k nearest of a list in float64; the others are beaten for good.
inline void settle(Group& g, int slot, const Problem& problem) {
    const auto& [base, queries, lists] = problem;
    const int64_t row = g.row[slot], at = row * lists.capacity;
    const int n = lists.count[row];
    g.pairs.clear();
    for (int t = 0; t < n; ++t) {
        const int64_t j = lists.index[at + t];
        g.pairs.emplace_back(squared(queries.exact + row * base.d, base.exact + j * base.d, base.d), j);
    }
    std::partial_sort(g.pairs.begin(), g.pairs.begin() + lists.k, g.pairs.end());
    for (int t = 0; t < lists.k; ++t) {
        const double scaled = g.pairs[t].first * lists.scale2;
        lists.index[at + t] = static_cast<int32_t>(g.pairs[t].second);
        lists.low[at + t] = static_cast<float>(scaled * (1 - 0x1p-20));
        lists.high[at + t] = std::nextafter(static_cast<float>(scaled * (1 + 0x1p-20)), INFINITE);
    }
    lists.count[row] = lists.k, g.settled += n;
    set_threshold(g, slot, std::min(g.limit[slot], lists.high[at + lists.k - 1]), problem);
}

// Tighten the threshold to the k-th smallest upper bound and drop what lies above it.
inline void prune(Group& g, int slot, const Problem& problem) {
    const Lists& lists = problem.lists;
    const int64_t row = g.row[slot], at = row * lists.capacity;
    const int n = lists.count[row];
    if (n < lists.k) return;
    g.scratch.assign(lists.high + at, lists.high + at + n);
    std::nth_element(g.scratch.begin(), g.scratch.begin() + (lists.k - 1), g.scratch.end());
    if (g.scratch[lists.k - 1] < g.limit[slot]) set_threshold(g, slot, g.scratch[lists.k - 1], problem);
    int kept = 0;
    for (int t = 0; t < n; ++t) {
        lists.index[at + kept] = lists.index[at + t];
        lists.low[at + kept] = lists.low[at + t], lists.high[at + kept] = lists.high[at + t];
        kept += lists.low[at + kept] <= g.limit[slot];
    }
    lists.count[row] = kept;
    if (kept > lists.capacity * 3 / 4) settle(g, slot, problem);
}

inline void push(Group& g, int slot, int64_t column, float low, float high, const Problem& problem) {
    const auto& [base, queries, lists] = problem;
    const int64_t row = g.row[slot], j = base.first_row + base.row[column];
    if (j == queries.own[row] || !(low <= g.limit[slot])) return;
    const int64_t at = row * lists.capacity + lists.count[row]++;
    lists.index[at] = static_cast<int32_t>(j), lists.low[at] = low, lists.high[at] = high;
    if (lists.count[row] == lists.capacity) prune(g, slot, problem);
}
}  // namespace
