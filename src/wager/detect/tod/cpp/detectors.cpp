// The parts of detectors that loop over neighbour lists: angles (ABOD), chains (COF), shared neighbours (SOD), the sweep of LOCI.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

extern "C" {

// Variance (ddof 0) of <a-q, b-q> / (|a-q|^2 |b-q|^2) over pairs a < b of each row's neighbours; points equal to q form no angle.
void wager_angle_variance(const double* query, const double* base, const int64_t* index, int64_t rows, int64_t k, int64_t d,
                          double* out, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> edge(static_cast<size_t>(k) * d), length(k), value;
#pragma omp for schedule(dynamic, 32)
        for (int64_t r = 0; r < rows; ++r) {
            int64_t m = 0;
            for (int64_t t = 0; t < k; ++t) {
                const double* b = base + index[r * k + t] * d;
                double sum = 0;
                bool equal = true;
                for (int64_t f = 0; f < d; ++f) {
                    const double e = b[f] - query[r * d + f];
                    edge[m * d + f] = e, sum += e * e, equal &= b[f] == query[r * d + f];
                }
                if (!equal) length[m++] = sum;
            }
            value.clear();
            for (int64_t a = 0; a < m; ++a)
                for (int64_t b = a + 1; b < m; ++b) {
                    double dot = 0;
#pragma omp simd reduction(+ : dot)
                    for (int64_t f = 0; f < d; ++f) dot += edge[a * d + f] * edge[b * d + f];
                    value.push_back(dot / length[a] / length[b]);
                }
            if (value.empty()) {
                out[r] = 0;
                continue;
            }
            double mean = 0, variance = 0;
            for (double v : value) mean += v;
            mean /= value.size();
            for (double v : value) variance += (v - mean) * (v - mean);
            out[r] = variance / value.size();
        }
    }
}

// Average chaining distance of each row over its set-based nearest path (index_RK, row 0 of the path being the query itself).
void wager_chaining(const double* query, const double* base, const int64_t* index, int64_t rows, int64_t k, int64_t d, double* out,
                    int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<const double*> path(k + 1);
#pragma omp for schedule(dynamic, 32)
        for (int64_t r = 0; r < rows; ++r) {
            path[0] = query + r * d;
            for (int64_t t = 0; t < k; ++t) path[t + 1] = base + index[r * k + t] * d;
            double total = 0;
            for (int64_t t = 1; t <= k; ++t) {
                double best = INFINITY;
                for (int64_t s = 0; s < t; ++s) {
                    double sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (int64_t f = 0; f < d; ++f) {
                        const double e = path[t][f] - path[s][f];
                        sum += e * e;
                    }
                    best = std::min(best, sum);
                }
                total += 2.0 * (k + 1 - t) / (static_cast<double>(k + 1) * k) * std::sqrt(best);
            }
            out[r] = total;
        }
    }
}

// The `wanted` rows that share most neighbours with each row (itself left out), ties by smaller index; tie[r] says that the cut lies in a tie.
void wager_shared(const int64_t* index, int64_t n, int64_t k, int64_t wanted, int64_t* out, uint8_t* tie, int threads) {
    std::vector<int64_t> start(n + 1, 0), holder(n * k), fill;
    for (int64_t t = 0; t < n * k; ++t) ++start[index[t] + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    fill.assign(start.begin(), start.end() - 1);
    for (int64_t r = 0; r < n; ++r)
        for (int64_t t = 0; t < k; ++t) holder[fill[index[r * k + t]]++] = r;
#pragma omp parallel num_threads(threads)
    {
        std::vector<int32_t> shared(n, 0);
        std::vector<int64_t> touched;
        const auto better = [&](int64_t a, int64_t b) { return shared[a] != shared[b] ? shared[a] > shared[b] : a < b; };
#pragma omp for schedule(dynamic, 32)
        for (int64_t r = 0; r < n; ++r) {
            touched.clear();
            for (int64_t t = 0; t < k; ++t)
                for (int64_t h = start[index[r * k + t]]; h < start[index[r * k + t] + 1]; ++h)
                    if (holder[h] != r && shared[holder[h]]++ == 0) touched.push_back(holder[h]);
            for (int64_t j = 0; static_cast<int64_t>(touched.size()) <= wanted && j < n; ++j)
                if (j != r && shared[j] == 0) touched.push_back(j);  // nothing in common: the smallest indices fill up
            const int64_t take = std::min<int64_t>(wanted + 1, touched.size());
            std::partial_sort(touched.begin(), touched.begin() + take, touched.end(), better);
            std::copy(touched.begin(), touched.begin() + wanted, out + r * wanted);
            tie[r] = take > wanted && shared[touched[wanted]] == shared[touched[wanted - 1]];
            for (int64_t j : touched) shared[j] = 0;
        }
    }
}

// Score of each row over its reference rows: distance to their mean in the features where they vary little.
void wager_subspace(const double* x, const int64_t* ref, int64_t n, int64_t m, int64_t d, double alpha, double* out, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> mean(d), var(d);
#pragma omp for schedule(dynamic, 32)
        for (int64_t r = 0; r < n; ++r) {
            std::fill(mean.begin(), mean.end(), 0.0), std::fill(var.begin(), var.end(), 0.0);
            for (int64_t t = 0; t < m; ++t)
                for (int64_t f = 0; f < d; ++f) mean[f] += x[ref[r * m + t] * d + f];
            for (double& v : mean) v /= m;
            for (int64_t t = 0; t < m; ++t)
                for (int64_t f = 0; f < d; ++f) {
                    const double e = x[ref[r * m + t] * d + f] - mean[f];
                    var[f] += e * e;
                }
            double total = 0, sum = 0;
            int64_t relevant = 0;
            for (int64_t f = 0; f < d; ++f) var[f] /= m, total += var[f];
            for (int64_t f = 0; f < d; ++f)
                if (var[f] < alpha * total / d) {
                    const double e = x[r * d + f] - mean[f];
                    sum += e * e, ++relevant;
                }
            out[r] = relevant ? std::sqrt(sum / relevant) : 0.0;
        }
    }
}

// LOCI for the points first..first+count. distance_NN is the full matrix; event_distance/event_row list all ordered pairs by ascending
// distance. For each point the radii of `critical` are visited upwards; counts of alpha-neighbours are carried along by one sweep over the
// events that all LANES points of a group share, so a group costs one pass over the pairs.
void wager_loci(const double* distance, const double* event_distance, const int32_t* event_row, int64_t n, double alpha, double kappa,
                double r_max, int64_t minimum, double* out, int threads) {
    constexpr int LANES = 16;
    typedef double vd __attribute__((vector_size(LANES * 8)));
    const int64_t groups = (n + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads)
    {
        std::vector<vd> member(n);
        std::vector<int64_t> count(n);
        struct Radius {
            double reach, radius;  // alpha * radius, radius
            int lane;
        };
        std::vector<Radius> radii;
        std::vector<std::vector<int32_t>> order(LANES);
#pragma omp for schedule(dynamic)
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t p0 = g * LANES;
            const int lanes = static_cast<int>(std::min<int64_t>(LANES, n - p0));
            std::fill(member.begin(), member.end(), vd{}), std::fill(count.begin(), count.end(), 0), radii.clear();
            vd sum{}, square{};
            int64_t size[LANES] = {}, next[LANES] = {};
            bool stopped[LANES] = {};
            for (int l = 0; l < lanes; ++l) {
                const double* row = distance + (p0 + l) * n;
                order[l].resize(n), std::iota(order[l].begin(), order[l].end(), 0);
                std::sort(order[l].begin(), order[l].end(), [row](int32_t a, int32_t b) { return row[a] < row[b]; });
                for (int64_t j = 0; j < n; ++j)
                    if (row[j] > 0 && row[j] <= r_max)
                        for (const double r : {row[j], row[j] / alpha}) radii.push_back({r * alpha, r, l});
                out[p0 + l] = 0;
            }
            std::sort(radii.begin(), radii.end(), [](const Radius& a, const Radius& b) { return a.radius < b.radius; });
            int64_t e = 0;
            for (const Radius& at : radii) {
                for (; e < n * n && event_distance[e] < at.reach; ++e) {
                    const int32_t q = event_row[e];
                    sum += member[q];
                    square += member[q] * static_cast<double>(2 * count[q] + 1);
                    ++count[q];
                }
                const int l = at.lane;
                if (stopped[l]) continue;
                const double* row = distance + (p0 + l) * n;
                for (; next[l] < n && row[order[l][next[l]]] <= at.radius; ++next[l]) {
                    const int32_t q = order[l][next[l]];
                    member[q][l] = 1, ++size[l];
                    sum[l] += static_cast<double>(count[q]), square[l] += static_cast<double>(count[q]) * count[q];
                }
                const double mean = sum[l] / size[l];
                if (mean < minimum) continue;
                const double variance = std::max(0.0, (square[l] * size[l] - sum[l] * sum[l])) / size[l] / size[l];
                const double mdef = 1 - count[p0 + l] / mean, sigma = std::sqrt(variance) / mean;
                out[p0 + l] = mdef / sigma;
                stopped[l] = mdef > kappa * sigma;
            }
        }
    }
}
}
