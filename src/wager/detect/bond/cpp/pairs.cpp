// Sums over all pairs of rows, sum_j f(z_i . z_j), and their gradient, without the N x N matrix and without writing any pair to memory.
//
// Columns lie in panels of LANES: panel[p][feature][lane]. f is sigmoid^2 (kind 0), softplus (1) or softplus(-t) (2). Because t_ij = t_ji, the
// gradient of sum_i g_i sum_j f(t_ij) at row i is sum_j f'(t_ij) (g_i + g_j) z_j: one pass over rows, no two threads write the same place.
// Sums of a row run in a fixed order, whatever the number of threads.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {
constexpr int LANES = 8, ROWS = 4;
constexpr int64_t FLUSH = 256;  // panels added up in float before they join a double
typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));

inline vf load(const float* from) {
    vf v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// e^x for x <= 0, relative error about 2^-22: 2^n e^r with |r| <= ln(2)/2.
inline vf exp_negative(vf x) {
    const vf low = vf{} - 87.0f;
    x = x > low ? x : low;
    const vf magic = vf{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const vf shifted = x * 1.44269504f + magic;
    const vf n = shifted - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = vf{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vf)((vi)p + (((vi)shifted - (vi)magic) << 23));
}

// log(1 + e) for 0 <= e <= 1, by the series of 2 atanh(e / (2 + e)): the argument is at most 1/3.
inline vf log_one_plus(vf e) {
    const vf s = e / (e + 2.0f), q = s * s;
    vf p = vf{} + 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    return 2.0f * (s + s * q * p);
}

inline vf sigmoid(vf t) {
    const vf e = exp_negative(t > 0 ? -t : t);
    return (t > 0 ? vf{} + 1.0f : e) / (e + 1.0f);
}

template <int KIND>
inline vf value(vf t) {
    if (KIND == 0) {
        const vf p = sigmoid(t);
        return p * p;
    }
    if (KIND == 2) t = -t;
    return (t > 0 ? t : vf{}) + log_one_plus(exp_negative(t > 0 ? -t : t));
}

template <int KIND>
inline vf slope(vf t) {
    const vf p = sigmoid(t);
    return KIND == 0 ? 2.0f * p * p * (1.0f - p) : KIND == 1 ? p : p - 1.0f;
}

// t[r] = rows g + r of z times one panel.
inline void products(const float* z, int64_t g, int m, int64_t h, const float* panel, vf* t) {
    for (int r = 0; r < ROWS; ++r) t[r] = vf{};
    const float* row[ROWS];
    for (int r = 0; r < ROWS; ++r) row[r] = z + (g + (r < m ? r : 0)) * h;
    for (int64_t f = 0; f < h; ++f) {
        const vf b = load(panel + f * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) t[r] += row[r][f] * b;
    }
}

std::vector<float> packed(const float* z, int64_t n, int64_t h) {
    const int64_t panels = (n + LANES - 1) / LANES;
    std::vector<float> out(static_cast<size_t>(panels) * h * LANES, 0.0f);
    for (int64_t j = 0; j < n; ++j)
        for (int64_t f = 0; f < h; ++f) out[(j / LANES * h + f) * LANES + j % LANES] = z[j * h + f];
    return out;
}

// 1 in lanes that hold a column, 0 in the padding of the last panel.
inline vf present(int64_t panel, int64_t n) {
    vf v;
    for (int l = 0; l < LANES; ++l) v[l] = panel * LANES + l < n ? 1.0f : 0.0f;
    return v;
}

inline double sum(vf v) {
    double s = 0;
    for (int l = 0; l < LANES; ++l) s += v[l];
    return s;
}

template <int KIND>
void forward(const float* z, int64_t n, int64_t h, float* out, int threads) {
    const std::vector<float> panel = packed(z, n, h);
    const int64_t panels = (n + LANES - 1) / LANES;
    const vf last = present(panels - 1, n);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t g = 0; g < n; g += ROWS) {
        const int m = static_cast<int>(std::min<int64_t>(ROWS, n - g));
        double total[ROWS] = {};
        for (int64_t p0 = 0; p0 < panels; p0 += FLUSH) {
            vf part[ROWS] = {}, t[ROWS];
            for (int64_t p = p0; p < std::min(panels, p0 + FLUSH); ++p) {
                products(z, g, m, h, panel.data() + p * h * LANES, t);
                for (int r = 0; r < ROWS; ++r) part[r] += p + 1 == panels ? value<KIND>(t[r]) * last : value<KIND>(t[r]);
            }
            for (int r = 0; r < ROWS; ++r) total[r] += sum(part[r]);
        }
        for (int r = 0; r < m; ++r) out[g + r] = static_cast<float>(total[r]);
    }
}

template <int KIND>
void backward(const float* z, const float* grad, int64_t n, int64_t h, float* out, int threads) {
    const std::vector<float> panel = packed(z, n, h), weight = packed(grad, n, 1);
    const int64_t panels = (n + LANES - 1) / LANES;
    const vf last = present(panels - 1, n);
#pragma omp parallel num_threads(threads)
    {
        std::vector<vf> part(static_cast<size_t>(h) * ROWS);
        std::vector<double> total(static_cast<size_t>(h) * ROWS);
#pragma omp for schedule(dynamic, 16)
        for (int64_t g = 0; g < n; g += ROWS) {
            const int m = static_cast<int>(std::min<int64_t>(ROWS, n - g));
            std::fill(total.begin(), total.end(), 0.0);
            for (int64_t p0 = 0; p0 < panels; p0 += FLUSH) {
                std::fill(part.begin(), part.end(), vf{});
                for (int64_t p = p0; p < std::min(panels, p0 + FLUSH); ++p) {
                    const float* b = panel.data() + p * h * LANES;
                    vf c[ROWS];
                    products(z, g, m, h, b, c);
                    for (int r = 0; r < ROWS; ++r) {
                        c[r] = slope<KIND>(c[r]) * (load(weight.data() + p * LANES) + grad[g + (r < m ? r : 0)]);
                        if (p + 1 == panels) c[r] *= last;
                    }
                    for (int64_t f = 0; f < h; ++f) {
                        const vf v = load(b + f * LANES);
#pragma GCC unroll 4
                        for (int r = 0; r < ROWS; ++r) part[f * ROWS + r] += c[r] * v;
                    }
                }
                for (size_t i = 0; i < part.size(); ++i) total[i] += sum(part[i]);
            }
            for (int r = 0; r < m; ++r)
                for (int64_t f = 0; f < h; ++f) out[(g + r) * h + f] = static_cast<float>(total[f * ROWS + r]);
        }
    }
}
}  // namespace

extern "C" {
void wager_pair_sums(const float* z, int64_t n, int64_t h, int64_t kind, float* out, int threads) {
    (kind == 0 ? forward<0> : kind == 1 ? forward<1> : forward<2>)(z, n, h, out, threads);
}

void wager_pair_slopes(const float* z, const float* grad, int64_t n, int64_t h, int64_t kind, float* out, int threads) {
    (kind == 0 ? backward<0> : kind == 1 ? backward<1> : backward<2>)(z, grad, n, h, out, threads);
}
}
