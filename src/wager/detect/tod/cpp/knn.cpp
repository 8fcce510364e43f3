// What float64 says about neighbours: the decision among candidates, the definition, and the rows that distinct points stand for.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "distance.h"

__attribute__((noinline)) double squared(const double* a, const double* b, int64_t d) {
    double s[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    int64_t t = 0;
    for (; t + 8 <= d; t += 8)
        for (int l = 0; l < 8; ++l) {
            const double e = a[t + l] - b[t + l];
            s[l] += e * e;
        }
    for (int l = 0; t < d; ++t, ++l) {
        const double e = a[t] - b[t];
        s[l] += e * e;
    }
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

namespace {
void write_row(std::vector<Pair>& pairs, int k, double* distance, int64_t* index) {
    std::partial_sort(pairs.begin(), pairs.begin() + k, pairs.end());
    for (int t = 0; t < k; ++t) distance[t] = std::sqrt(pairs[t].first), index[t] = pairs[t].second;
}
}  // namespace

extern "C" {

// Decide among the candidates in float64, ties by smaller index. Rows with a negative count are searched over the whole base. Returns their
// number; `candidates` receives how many pairs were decided exactly.
int64_t wager_knn_decide(const double* query, const double* base, const int64_t* own, int64_t rows, int64_t n, int64_t d, int k,
                         int capacity, const int32_t* index, const float* low, const int32_t* count, const float* threshold,
                         double* out_distance, int64_t* out_index, int64_t* candidates, int threads) {
    int64_t whole = 0, verified = 0;
#pragma omp parallel num_threads(threads) reduction(+ : whole, verified)
    {
        std::vector<Pair> pairs;
#pragma omp for schedule(dynamic, 16)
        for (int64_t r = 0; r < rows; ++r) {
            pairs.clear();
            for (int64_t t = r * capacity; t < r * capacity + count[r]; ++t)
                if (low[t] <= threshold[r]) pairs.emplace_back(squared(query + r * d, base + index[t] * d, d), index[t]);
            verified += pairs.size();
            if (count[r] < 0) {
                for (int64_t j = 0; j < n; ++j)
                    if (j != own[r]) pairs.emplace_back(squared(query + r * d, base + j * d, d), j);
                ++whole;
            }
            write_row(pairs, k, out_distance + r * k, out_index + r * k);
        }
    }
    *candidates = verified;
    return whole;
}

// The float64 oracle: every pair, no bound involved.
void wager_knn_exact(const double* query, const double* base, int64_t rows, int64_t n, int64_t d, int64_t self0, int k,
                     double* out_distance, int64_t* out_index, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<Pair> pairs;
#pragma omp for schedule(dynamic, 16)
        for (int64_t r = 0; r < rows; ++r) {
            pairs.clear();
            for (int64_t j = 0; j < n; ++j)
                if (self0 < 0 || j != self0 + r) pairs.emplace_back(squared(query + r * d, base + j * d, d), j);
            write_row(pairs, k, out_distance + r * k, out_index + r * k);
        }
    }
}

// A tree over distinct points returned `width` of them per query row; expand them to the rows they stand for. Group g stands for rows
// member[start[g]..start[g+1]), ascending. self[r] >= 0 is left out. done[r] = 0 when the list may be cut inside a tie.
void wager_knn_expand(const double* query, const double* distinct, int64_t rows, int64_t d, const int64_t* found, int64_t width,
                      int64_t groups, const int64_t* start, const int64_t* member, const int64_t* self, int k, double* out_distance,
                      int64_t* out_index, uint8_t* done, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<Pair> near, pairs;
#pragma omp for schedule(dynamic, 64)
        for (int64_t r = 0; r < rows; ++r) {
            near.clear(), pairs.clear();
            for (int64_t t = 0; t < width; ++t)
                if (found[r * width + t] < groups)
                    near.emplace_back(squared(query + r * d, distinct + found[r * width + t] * d, d), found[r * width + t]);
            std::sort(near.begin(), near.end());
            const bool all = static_cast<int64_t>(near.size()) == groups;
            const double sure = all ? std::numeric_limits<double>::infinity() : near.back().first * (1 - 1e-9);
            int64_t below = 0;
            double last = -1;
            for (const Pair& g : near) {
                if (static_cast<int64_t>(pairs.size()) >= k && g.first > last) break;
                int64_t taken = 0;
                for (int64_t m = start[g.second]; m < start[g.second + 1] && taken < k; ++m) {
                    if (member[m] == self[r]) continue;
                    pairs.emplace_back(g.first, member[m]), ++taken;
                    if (g.first < sure) ++below;
                }
                last = g.first;
            }
            done[r] = below >= k;
            if (done[r]) write_row(pairs, k, out_distance + r * k, out_index + r * k);
        }
    }
}

void wager_squared_distances(const double* query, const double* base, const int64_t* index, int64_t rows, int64_t k, int64_t d,
                             double* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t t = 0; t < k; ++t) out[r * k + t] = squared(query + r * d, base + index[r * k + t] * d, d);
}
}
