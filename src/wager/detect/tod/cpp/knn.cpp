// Exact k nearest neighbours: a float32 scan proposes candidates under a proved error bound, float64 decides among them.
//
// Base points lie in panels of WIDTH columns: panel[p][feature][lane]. A group of ROWS query rows meets one panel in registers, and a pair is
// kept when (computed squared distance - bound) does not exceed the row's threshold: the k-th smallest of (computed + bound) seen so far.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#else
constexpr int LANES = 8, ROWS = 6;
#endif
constexpr int VECTORS = 2, WIDTH = LANES * VECTORS;
constexpr int64_t ROW_CHUNK = ROWS * 32, BLOCK_BYTES = 160 * 1024;
typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));

// Whether any lane is set. Lanes are 0 or -1.
inline bool any_of(const vi& hit) {
#if defined(__AVX512F__)
    __m512i lanes;
    std::memcpy(&lanes, &hit, sizeof lanes);
    return _mm512_test_epi32_mask(lanes, lanes) != 0;
#elif defined(__AVX2__)
    __m256i lanes;
    std::memcpy(&lanes, &hit, sizeof lanes);
    return !_mm256_testz_si256(lanes, lanes);
#else
    int32_t any = 0;
    for (int l = 0; l < LANES; ++l) any |= hit[l];
    return any != 0;
#endif
}

struct Candidates {  // of one query row
    int32_t* index;
    float* low;
    float* high;
    int32_t* count;  // -1: overflowed, the row must be searched in float64
    float* threshold;
};

// Tighten the threshold to the k-th smallest upper bound and drop what lies above it.
void prune(Candidates& c, int k, int capacity, std::vector<float>& scratch) {
    const int n = *c.count;
    if (n <= k) return;
    scratch.assign(c.high, c.high + n);
    std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end());
    *c.threshold = std::min(*c.threshold, scratch[k - 1]);
    int kept = 0;
    for (int t = 0; t < n; ++t)
        if (c.low[t] <= *c.threshold) {
            c.index[kept] = c.index[t], c.low[kept] = c.low[t], c.high[kept] = c.high[t];
            ++kept;
        }
    *c.count = kept;
    if (kept > capacity * 3 / 4) *c.count = -1, *c.threshold = -std::numeric_limits<float>::infinity();
}

// Squared distance in float64: eight running sums over the features, folded in a fixed order. Every path of the library uses this one.
inline double squared(const double* a, const double* b, int64_t d) {
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

using Pair = std::pair<double, int64_t>;

void write_row(std::vector<Pair>& pairs, int k, double* distance, int64_t* index) {
    std::partial_sort(pairs.begin(), pairs.begin() + k, pairs.end());
    for (int t = 0; t < k; ++t) distance[t] = std::sqrt(pairs[t].first), index[t] = pairs[t].second;
}
}  // namespace

extern "C" {

int wager_knn_width() { return WIDTH; }

// Panels of the centred float32 base: panel_PDW, squared norms (infinite for padding) and norms.
void wager_knn_pack(const double* base, const double* centre, double scale, int64_t n, int64_t d, float* panel, float* norm2,
                    float* norm, int threads) {
    const int64_t panels = (n + WIDTH - 1) / WIDTH;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < panels; ++p)
        for (int l = 0; l < WIDTH; ++l) {
            const int64_t j = p * WIDTH + l;
            double sum = 0;
            for (int64_t t = 0; t < d; ++t) {
                const float v = j < n ? static_cast<float>((base[j * d + t] - centre[t]) * scale) : 0.0f;
                panel[(p * d + t) * WIDTH + l] = v;
                sum += static_cast<double>(v) * v;
            }
            norm2[j] = j < n ? static_cast<float>(sum) : std::numeric_limits<float>::infinity();
            norm[j] = std::nextafter(static_cast<float>(std::sqrt(sum)), std::numeric_limits<float>::infinity());
        }
}

// Scan panels [0, panels) holding columns column0.. against `rows` query rows (centred, scaled float32) and update their candidates.
// self0 >= 0: row r is base row self0 + r and is not its own neighbour. slack: the bound is slack * (|a| + |b|)^2.
void wager_knn_scan(const float* query, const float* qnorm2, const float* qnorm, int64_t rows, int64_t d, const float* panel,
                    const float* norm2, const float* norm, int64_t panels, int64_t column0, int64_t self0, int k, int capacity,
                    float slack, int32_t* index, float* low, float* high, int32_t* count, float* threshold, int threads) {
    // Cheap test before the exact one: slack (|a| + |b|)^2 <= 2 slack (|a|^2 + |b|^2), and as much again covers every rounding on the way,
    // because slack is at least 16 roundings of a float.
    const float shrink = 1.0f - 4.0f * slack;
    const int64_t block = std::max<int64_t>(1, BLOCK_BYTES / (WIDTH * d * 4));
    const int64_t chunks = (rows + ROW_CHUNK - 1) / ROW_CHUNK;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch, packed(static_cast<size_t>(ROWS) * d);
#pragma omp for schedule(dynamic)
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t r0 = chunk * ROW_CHUNK, r1 = std::min(rows, r0 + ROW_CHUNK);
            for (int64_t p0 = 0; p0 < panels; p0 += block) {
                const int64_t p1 = std::min(panels, p0 + block);
                for (int64_t g = r0; g < r1; g += ROWS) {
                    const int m = static_cast<int>(std::min<int64_t>(ROWS, r1 - g));
                    for (int64_t t = 0; t < d; ++t)
                        for (int r = 0; r < ROWS; ++r) packed[t * ROWS + r] = r < m ? query[(g + r) * d + t] : 0.0f;
                    for (int64_t p = p0; p < p1; ++p) {
                        vf acc[ROWS][VECTORS] = {};
                        const float* b = panel + p * d * WIDTH;
                        const float* a = packed.data();
                        for (int64_t t = 0; t < d; ++t, b += WIDTH, a += ROWS) {
                            vf v[VECTORS];
#pragma GCC unroll 2
                            for (int u = 0; u < VECTORS; ++u) std::memcpy(&v[u], b + u * LANES, sizeof(vf));
#pragma GCC unroll 12
                            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
                                for (int u = 0; u < VECTORS; ++u) acc[r][u] += a[r] * v[u];
                        }
                        vf b2[VECTORS];
                        std::memcpy(b2, norm2 + p * WIDTH, sizeof b2);
#pragma GCC unroll 12
                        for (int r = 0; r < ROWS; ++r) {
                            if (r >= m) break;
                            const int64_t row = g + r;
                            const float reachable = threshold[row] - qnorm2[row] * shrink;
#pragma GCC unroll 2
                            for (int u = 0; u < VECTORS; ++u) {
                                const vi maybe = b2[u] * shrink - 2.0f * acc[r][u] <= reachable;
                                if (!any_of(maybe)) continue;
                                vf b1;
                                std::memcpy(&b1, norm + p * WIDTH + u * LANES, sizeof b1);
                                const vf value = (b2[u] + qnorm2[row]) - 2.0f * acc[r][u];
                                const vf reach = b1 + qnorm[row];
                                const vf bound = slack * reach * reach;
                                const vf lo = value - bound;
                                const vi hit = lo <= threshold[row];
                                if (!any_of(hit)) continue;
                                Candidates c{index + row * capacity, low + row * capacity, high + row * capacity, count + row,
                                             threshold + row};
                                for (int l = 0; l < LANES; ++l) {
                                    const int64_t j = column0 + p * WIDTH + u * LANES + l;
                                    if (!hit[l] || j == self0 + row * (self0 >= 0) || *c.count < 0 || !(lo[l] <= *c.threshold)) continue;
                                    if (!(norm2[p * WIDTH + u * LANES + l] < std::numeric_limits<float>::infinity())) continue;
                                    const int n = (*c.count)++;
                                    c.index[n] = static_cast<int32_t>(j), c.low[n] = lo[l], c.high[n] = value[l] + bound[l];
                                    if (*c.count == capacity) prune(c, k, capacity, scratch);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

// Decide among the candidates in float64, ties by smaller index. Overflowed rows are searched over the whole base. Returns their number;
// `candidates` receives how many pairs were decided exactly.
int64_t wager_knn_decide(const double* query, const double* base, int64_t rows, int64_t n, int64_t d, int64_t self0, int k, int capacity,
                         int32_t* index, float* low, float* high, int32_t* count, float* threshold, double* out_distance,
                         int64_t* out_index, int64_t* candidates, int threads) {
    int64_t overflowed = 0, verified = 0;
#pragma omp parallel num_threads(threads) reduction(+ : overflowed, verified)
    {
        std::vector<float> scratch;
        std::vector<Pair> pairs;
#pragma omp for schedule(dynamic, 16)
        for (int64_t r = 0; r < rows; ++r) {
            Candidates c{index + r * capacity, low + r * capacity, high + r * capacity, count + r, threshold + r};
            if (*c.count >= 0) prune(c, k, capacity * 2, scratch);
            pairs.clear();
            if (*c.count >= 0) {
                for (int t = 0; t < *c.count; ++t) pairs.emplace_back(squared(query + r * d, base + c.index[t] * d, d), c.index[t]);
                verified += *c.count;
            } else {
                for (int64_t j = 0; j < n; ++j)
                    if (self0 < 0 || j != self0 + r) pairs.emplace_back(squared(query + r * d, base + j * d, d), j);
                ++overflowed;
            }
            write_row(pairs, k, out_distance + r * k, out_index + r * k);
        }
    }
    *candidates = verified;
    return overflowed;
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
