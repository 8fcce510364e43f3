// Rows brought into an order in which neighbours in space are neighbours in memory, so that whole panels can be ruled out by their boxes.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "panels.h"

namespace {
constexpr int64_t TASK_ROWS = 8192, SAMPLE = 256;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// Hand the nearest levels of a scaled row to `take`; how far the row lies from them at most.
template <typename Take>
float levels(const double* row, const double* centre, double scale, int64_t d, Take take) {
    double sum = 0;
    for (int64_t t = 0; t < d; ++t) {
        const double v = (row[t] - centre[t]) * scale, level = std::min<double>(LEVELS, std::max<double>(-LEVELS, std::nearbyint(v * LEVELS)));
        const double off = v - level / LEVELS;
        sum += off * off;
        take(t, static_cast<int>(level));
    }
    return std::nextafter(static_cast<float>(std::sqrt(sum) * (1 + 0x1p-30)), INFINITE);
}

// Where a scaled row lies along the directions.
void place_row(const double* row, const double* centre, double scale, const double* direction, int64_t d, int64_t dims, std::vector<double>& along,
               float* place) {
    std::fill(along.begin(), along.end(), 0.0);
    for (int64_t t = 0; t < d; ++t) {
        const double v = (row[t] - centre[t]) * scale;
        for (int64_t m = 0; m < dims; ++m) along[m] += v * direction[t * dims + m];
    }
    for (int64_t m = 0; m < dims; ++m) place[m] = static_cast<float>(along[m]);
}

// The direction along which a sample of the rows varies most.
int64_t widest(const float* place, int64_t dims, const int32_t* order, int64_t n) {
    const int64_t step = std::max<int64_t>(1, n / SAMPLE);
    std::vector<double> sum(dims, 0.0), square(dims, 0.0);
    int64_t seen = 0;
    for (int64_t i = 0; i < n; i += step, ++seen)
        for (int64_t m = 0; m < dims; ++m) {
            const double v = place[order[i] * dims + m];
            sum[m] += v, square[m] += v * v;
        }
    int64_t best = 0;
    double most = -1;
    for (int64_t m = 0; m < dims; ++m) {
        const double spread = square[m] - sum[m] * sum[m] / seen;
        if (spread > most) most = spread, best = m;
    }
    return best;
}

void split(const float* place, int64_t dims, int32_t* order, int64_t n, int64_t leaf) {
    if (n <= leaf) return;
    const int64_t half = (n / leaf + 1) / 2 * leaf, m = widest(place, dims, order, n);
    const int64_t cut = half < n ? half : n / 2;
    std::nth_element(order, order + cut, order + n, [=](int32_t a, int32_t b) { return place[a * dims + m] < place[b * dims + m]; });
#pragma omp task if (n > TASK_ROWS)
    split(place, dims, order, cut, leaf);
#pragma omp task if (n > TASK_ROWS)
    split(place, dims, order + cut, n - cut, leaf);
#pragma omp taskwait
}
}  // namespace

extern "C" {

// Centred, scaled rows: low_RD = factor * row in float32, their squared norms and norms (rounded up).
void wager_knn_rows(const double* x, const double* centre, double scale, int64_t rows, int64_t d, float factor, float* low, float* norm2,
                    float* norm, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        double sum = 0;
        for (int64_t t = 0; t < d; ++t) {
            const float v = static_cast<float>((x[r * d + t] - centre[t]) * scale);
            low[r * d + t] = factor * v, sum += static_cast<double>(v) * v;
        }
        norm2[r] = static_cast<float>(sum);
        norm[r] = std::nextafter(static_cast<float>(std::sqrt(sum)), INFINITE);
    }
}

// Places of rows along `dims` directions.
void wager_knn_places(const double* x, const double* centre, double scale, const double* direction, int64_t rows, int64_t d, int64_t dims,
                      float* place, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> along(dims);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) place_row(x + r * d, centre, scale, direction, d, dims, along, place + r * dims);
    }
}

// Halve the rows along their widest direction until `leaf` are left; `order` holds row numbers and is permuted.
void wager_knn_order(const float* place, int64_t dims, int32_t* order, int64_t rows, int64_t leaf, int threads) {
#pragma omp parallel num_threads(threads)
#pragma omp single
    split(place, dims, order, rows, leaf);
}

// Panels of the rows in `order`: centred float32 rows, squared norms (infinite for padding), norms and each panel's longest, and each panel's box
// along the directions, low_MP and high_MP, widened by what rounding can do to a place.
void wager_knn_pack(const double* base, const double* centre, double scale, const int32_t* order, const float* place, int64_t n, int64_t d,
                    int64_t dims, float* panel, float* norm2, float* norm, float* longest, float* low, float* high, int threads) {
    const int64_t panels = (n + WIDTH - 1) / WIDTH;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t filled = std::min<int64_t>(WIDTH, n - p * WIDTH);
        longest[p] = 0;
        for (int64_t l = 0; l < WIDTH; ++l) {
            double sum = 0;
            const double* row = base + (l < filled ? order[p * WIDTH + l] : 0) * d;
            for (int64_t t = 0; t < d; ++t) {
                const float v = l < filled ? static_cast<float>((row[t] - centre[t]) * scale) : 0.0f;
                panel[(p * d + t) * WIDTH + l] = v;
                sum += static_cast<double>(v) * v;
            }
            norm2[p * WIDTH + l] = l < filled ? static_cast<float>(sum) : INFINITE;
            norm[p * WIDTH + l] = std::nextafter(static_cast<float>(std::sqrt(sum)), INFINITE);
            longest[p] = std::max(longest[p], norm[p * WIDTH + l]);
        }
        for (int64_t m = 0; m < dims; ++m) {
            float least = INFINITE, most = -INFINITE;
            for (int64_t l = 0; l < filled; ++l) {
                const float v = place[order[p * WIDTH + l] * dims + m];
                least = std::min(least, v), most = std::max(most, v);
            }
            low[m * panels + p] = least - PLACE_ERROR * longest[p], high[m * panels + p] = most + PLACE_ERROR * longest[p];
        }
    }
}

// Panels of int8 levels of the rows in `order`, and what the scan needs beside them (see `Base`).
void wager_knn_pack_levels(const double* base, const double* centre, double scale, const int32_t* order, int64_t n, int64_t d, int8_t* words,
                           int32_t* half, int32_t* odd, float* residual, float* coarsest, int threads) {
    const int64_t panels = (n + WIDTH - 1) / WIDTH, count = words_of(d);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
        int8_t* const panel = words + p * count * WIDTH * 4;
        std::fill(panel, panel + count * WIDTH * 4, 0);
        coarsest[p] = 0;
        for (int64_t l = 0, c = p * WIDTH; l < WIDTH; ++l, ++c) {
            half[c] = NOWHERE, odd[c] = 0, residual[c] = 0;
            if (c >= n) continue;
            int32_t length = 0, sum = 0;
            residual[c] = levels(base + order[c] * d, centre, scale, d, [&](int64_t t, int level) {
                panel[(t / 4 * WIDTH + l) * 4 + t % 4] = static_cast<int8_t>(level);
                length += level * level, sum += level;
            });
            half[c] = (length >> 1) + OFFSET * sum, odd[c] = length & 1;
            coarsest[p] = std::max(coarsest[p], residual[c]);
        }
    }
}

// int8 levels of query rows, with OFFSET added; their squared lengths and residuals.
void wager_knn_row_levels(const double* x, const double* centre, double scale, int64_t rows, int64_t d, uint8_t* words, int32_t* length,
                          float* residual, int threads) {
    const int64_t bytes = words_of(d) * 4;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        std::fill(words + r * bytes, words + (r + 1) * bytes, static_cast<uint8_t>(OFFSET));
        length[r] = 0;
        residual[r] = levels(x + r * d, centre, scale, d, [&](int64_t t, int level) {
            words[r * bytes + t] = static_cast<uint8_t>(level + OFFSET), length[r] += level * level;
        });
    }
}
}
