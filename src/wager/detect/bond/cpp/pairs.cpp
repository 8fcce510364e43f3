// Sums over all pairs of rows, sum_j f(z_i . z_j), and their gradient, without the N x N matrix and without writing any pair to memory.
//
// Columns lie in panels of LANES: panel[p][feature][lane]. f is sigmoid^2 (kind 0), softplus (1) or softplus(-t) (2). Because t_ij = t_ji, each pair is
// computed once for both its rows; the gradient of sum_i g_i sum_j f(t_ij) at row i is sum_j f'(t_ij) (g_i + g_j) z_j.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 4;
#else
constexpr int LANES = 8, ROWS = 4;
#endif
typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));

inline vf load(const float* from) {
    vf v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// 1 / x, relative error about 2^-23, for normal x below 2^126.
inline vf inverse(vf x) {
#if defined(__AVX512F__)
    __m512 v;
    std::memcpy(&v, &x, sizeof v);
    const __m512 near = _mm512_rcp14_ps(v);
    v = _mm512_mul_ps(near, _mm512_fnmadd_ps(v, near, _mm512_set1_ps(2.0f)));
    std::memcpy(&x, &v, sizeof x);
    return x;
#else
    return 1.0f / x;
#endif
}

// e^x for x <= 87, relative error about 2^-22: 2^n e^r with |r| <= ln(2)/2.
inline vf exp_to_87(vf x) {
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
    const vf s = e * inverse(e + 2.0f), q = s * s;
    vf p = vf{} + 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    return 2.0f * (s + s * q * p);
}

inline vf sigmoid(vf t) {
    const vf high = vf{} + 87.0f, x = -t < high ? -t : high;
    return inverse(exp_to_87(x) + 1.0f);
}

template <int KIND>
inline vf value(vf t) {
    if (KIND == 0) {
        const vf p = sigmoid(t);
        return p * p;
    }
    if (KIND == 2) t = -t;
    return (t > 0 ? t : vf{}) + log_one_plus(exp_to_87(t > 0 ? -t : t));
}

template <int KIND>
inline vf slope(vf t) {
    const vf p = sigmoid(t);
    return KIND == 0 ? 2.0f * p * p * (1.0f - p) : KIND == 1 ? p : p - 1.0f;
}

// t[q][r] = rows g + r of z times panel q of `count` consecutive ones.
inline void products(const float* z, int64_t g, int m, int64_t h, const float* panel, int count, vf (*t)[ROWS]) {
    const float* row[ROWS];
    for (int r = 0; r < ROWS; ++r) row[r] = z + (g + (r < m ? r : 0)) * h;
    int q = 0;
    for (; q + 2 <= count; q += 2) {  // two panels share the loads of a row
        vf a[ROWS] = {}, b[ROWS] = {};
        const float *first = panel + q * h * LANES, *second = first + h * LANES;
        for (int64_t f = 0; f < h; ++f) {
            const vf x = load(first + f * LANES), y = load(second + f * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) a[r] += row[r][f] * x, b[r] += row[r][f] * y;
        }
        for (int r = 0; r < ROWS; ++r) t[q][r] = a[r], t[q + 1][r] = b[r];
    }
    for (; q < count; ++q) {
        vf a[ROWS] = {};
        for (int64_t f = 0; f < h; ++f) {
            const vf x = load(panel + (q * h + f) * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) a[r] += row[r][f] * x;
        }
        for (int r = 0; r < ROWS; ++r) t[q][r] = a[r];
    }
}

std::vector<float> packed(const float* z, int64_t n, int64_t h) {
    const int64_t panels = (n + LANES - 1) / LANES;
    std::vector<float> out(static_cast<size_t>(panels) * h * LANES, 0.0f);
    for (int64_t j = 0; j < n; ++j)
        for (int64_t f = 0; f < h; ++f) out[(j / LANES * h + f) * LANES + j % LANES] = z[j * h + f];
    return out;
}

// 1 in the lanes of a panel that hold a column of [from, n).
inline vf present(int64_t panel, int64_t from, int64_t n) {
    vf v;
    for (int l = 0; l < LANES; ++l) v[l] = panel * LANES + l >= from && panel * LANES + l < n ? 1.0f : 0.0f;
    return v;
}

inline double sum(vf v) {
    double s = 0;
    for (int l = 0; l < LANES; ++l) s += v[l];
    return s;
}

// Every unordered pair once. Rows go in stretches of STRETCH, dealt in turn to a number of slabs that depends on the sizes alone; what a slab finds
// for columns lies in a buffer of its own, and buffers are added in order: the bits do not depend on the number of threads.
constexpr int64_t STRETCH = 64, STRIP = 8, FLUSH = 32, SLAB_BYTES = 256 << 20, MOST_SLABS = 16;

int64_t slabs(int64_t n, int64_t width) { return std::max<int64_t>(1, std::min(MOST_SLABS, SLAB_BYTES / (4 * n * width))); }

// Whether a panel holds columns that some row of the group does not count, or padding.
inline bool edge(int64_t panel, int64_t g, int64_t n) { return panel * LANES < g + ROWS || (panel + 1) * LANES > n; }

template <int KIND>
void forward(const float* z, int64_t n, int64_t h, float* out, int threads) {
    const std::vector<float> panel = packed(z, n, h);
    const int64_t panels = (n + LANES - 1) / LANES, width = panels * LANES, count = slabs(n, 2);
    std::vector<double> total(static_cast<size_t>(count) * width, 0.0);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t slab = 0; slab < count; ++slab) {
        double* mine = total.data() + slab * width;
        std::vector<float> column(width);
        for (int64_t g0 = slab * STRETCH; g0 < n; g0 += count * STRETCH) {
            std::fill(column.begin() + g0 / LANES * LANES, column.end(), 0.0f);
            for (int64_t g = g0; g < std::min(n, g0 + STRETCH); g += ROWS) {
                const int m = static_cast<int>(std::min<int64_t>(ROWS, n - g));
                double sums[ROWS] = {};
                for (int64_t p0 = g / LANES; p0 < panels; p0 += STRIP) {
                    const int strip = static_cast<int>(std::min(STRIP, panels - p0));
                    vf t[STRIP][ROWS], part[ROWS] = {};
                    products(z, g, m, h, panel.data() + p0 * h * LANES, strip, t);
                    for (int q = 0; q < strip; ++q) {
                        vf down = load(column.data() + (p0 + q) * LANES);
                        for (int r = 0; r < m; ++r) {
                            const vf f = value<KIND>(t[q][r]);
                            if (edge(p0 + q, g, n)) {
                                part[r] += f * present(p0 + q, g + r, n);
                                down += f * present(p0 + q, g + r + 1, n);
                            } else {
                                part[r] += f, down += f;
                            }
                        }
                        std::memcpy(column.data() + (p0 + q) * LANES, &down, sizeof down);
                    }
                    for (int r = 0; r < m; ++r) sums[r] += sum(part[r]);
                }
                for (int r = 0; r < m; ++r) mine[g + r] += sums[r];
            }
            for (int64_t j = g0 / LANES * LANES; j < width; ++j) mine[j] += column[j];
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        double all = 0;
        for (int64_t slab = 0; slab < count; ++slab) all += total[slab * width + i];
        out[i] = static_cast<float>(all);
    }
}

// Add c_qr z_q to the rows r of a group, and c_qr z_r to the columns of each panel q; `own` counts for rows, `others` for columns. WHOLE: they are
// the same.
template <bool WHOLE>
inline void gather(const float* z, int64_t g, int m, int64_t h, const float* panel, int strip, const vf (*own)[ROWS], const vf (*others)[ROWS],
                   vf* part, float* column) {
    for (int64_t f = 0; f < h; ++f) {
        float at[ROWS];
        vf a[ROWS];
        for (int r = 0; r < ROWS; ++r) at[r] = r < m ? z[(g + r) * h + f] : 0.0f, a[r] = part[f * ROWS + r];
        for (int q = 0; q < strip; ++q) {
            const vf v = load(panel + (q * h + f) * LANES);
            vf down = load(column + (q * h + f) * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const vf c = own[q][r];
                a[r] += c * v, down += at[r] * (WHOLE ? c : others[q][r]);
            }
            std::memcpy(column + (q * h + f) * LANES, &down, sizeof down);
        }
        for (int r = 0; r < ROWS; ++r) part[f * ROWS + r] = a[r];
    }
}

template <int KIND>
void backward(const float* z, const float* grad, int64_t n, int64_t h, float* out, int threads) {
    const std::vector<float> panel = packed(z, n, h), weight = packed(grad, n, 1);
    const int64_t panels = (n + LANES - 1) / LANES, width = panels * LANES, count = slabs(n, h);
    std::vector<float> total(static_cast<size_t>(count) * width * h, 0.0f);  // as panels
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t slab = 0; slab < count; ++slab) {
        float* mine = total.data() + slab * width * h;
        std::vector<float> column(static_cast<size_t>(width) * h);
        std::vector<vf> part(static_cast<size_t>(h) * ROWS);
        for (int64_t g0 = slab * STRETCH; g0 < n; g0 += count * STRETCH) {
            const int64_t from = g0 / LANES * LANES * h;
            std::fill(column.begin() + from, column.end(), 0.0f);
            for (int64_t g = g0; g < std::min(n, g0 + STRETCH); g += ROWS) {
                const int m = static_cast<int>(std::min<int64_t>(ROWS, n - g));
                std::fill(part.begin(), part.end(), vf{});
                const auto flush = [&] {  // few enough terms for a float, then on to the row's place
                    for (int r = 0; r < m; ++r)
                        for (int64_t f = 0; f < h; ++f) {
                            column[((g + r) / LANES * h + f) * LANES + (g + r) % LANES] += static_cast<float>(sum(part[f * ROWS + r]));
                            part[f * ROWS + r] = vf{};
                        }
                };
                for (int64_t p0 = g / LANES; p0 < panels; p0 += STRIP) {
                    const int strip = static_cast<int>(std::min(STRIP, panels - p0));
                    vf own[STRIP][ROWS], others[STRIP][ROWS];
                    products(z, g, m, h, panel.data() + p0 * h * LANES, strip, own);
                    for (int q = 0; q < strip; ++q)
                        for (int r = 0; r < ROWS; ++r) {
                            const vf c = slope<KIND>(own[q][r]) * (load(weight.data() + (p0 + q) * LANES) + grad[g + (r < m ? r : 0)]);
                            const bool partial = edge(p0 + q, g, n);
                            own[q][r] = partial ? c * present(p0 + q, g + r, n) : c;
                            others[q][r] = partial ? c * present(p0 + q, g + r + 1, n) : c;
                        }
                    const bool whole = !edge(p0, g, n) && !edge(p0 + strip - 1, g, n);
                    (whole ? gather<true> : gather<false>)(z, g, m, h, panel.data() + p0 * h * LANES, strip, own, others, part.data(),
                                                           column.data() + p0 * h * LANES);
                    if ((p0 - g / LANES) / STRIP % FLUSH == FLUSH - 1) flush();
                }
                flush();
            }
            for (size_t i = from; i < column.size(); ++i) mine[i] += column[i];
        }
    }
    for (int64_t i = 0; i < n; ++i)
        for (int64_t f = 0; f < h; ++f) {
            double all = 0;
            for (int64_t slab = 0; slab < count; ++slab) all += total[slab * width * h + (i / LANES * h + f) * LANES + i % LANES];
            out[i * h + f] = static_cast<float>(all);
        }
}
constexpr int64_t WIDE = 32;     // features from which on that is so
constexpr int TOGETHER = 4;      // panels that share the loads and stores of a row's part

// The same for wide rows, where writing every pair's part into its column costs more than computing each pair twice.
template <int KIND>
void backward_wide(const float* z, const float* grad, int64_t n, int64_t h, float* out, int threads) {
    const std::vector<float> panel = packed(z, n, h), weight = packed(grad, n, 1);
    const int64_t panels = (n + LANES - 1) / LANES;
    const vf last = present(panels - 1, 0, n);
#pragma omp parallel num_threads(threads)
    {
        std::vector<vf> part(static_cast<size_t>(h) * ROWS);
        std::vector<double> total(static_cast<size_t>(h) * ROWS);
#pragma omp for schedule(dynamic, 16)
        for (int64_t g = 0; g < n; g += ROWS) {
            const int m = static_cast<int>(std::min<int64_t>(ROWS, n - g));
            std::fill(total.begin(), total.end(), 0.0);
            for (int64_t p0 = 0; p0 < panels; p0 += FLUSH * STRIP) {
                std::fill(part.begin(), part.end(), vf{});
                for (int64_t p = p0; p < std::min(panels, p0 + FLUSH * STRIP); p += TOGETHER) {
                    const int count = static_cast<int>(std::min<int64_t>(TOGETHER, panels - p));
                    vf c[TOGETHER][ROWS] = {};
                    products(z, g, m, h, panel.data() + p * h * LANES, count, c);
                    for (int q = 0; q < count; ++q)
                        for (int r = 0; r < ROWS; ++r) {
                            c[q][r] = slope<KIND>(c[q][r]) * (load(weight.data() + (p + q) * LANES) + grad[g + (r < m ? r : 0)]);
                            if (p + q + 1 == panels) c[q][r] *= last;
                        }
                    const float* b[TOGETHER];  // a missing panel counts nothing, whichever stands for it
                    for (int q = 0; q < TOGETHER; ++q) b[q] = panel.data() + (p + std::min(q, count - 1)) * h * LANES;
                    for (int64_t f = 0; f < h; ++f) {
                        vf v[TOGETHER];
#pragma GCC unroll 4
                        for (int q = 0; q < TOGETHER; ++q) v[q] = load(b[q] + f * LANES);
#pragma GCC unroll 4
                        for (int r = 0; r < ROWS; ++r) {
                            vf a = part[f * ROWS + r];
#pragma GCC unroll 4
                            for (int q = 0; q < TOGETHER; ++q) a += c[q][r] * v[q];
                            part[f * ROWS + r] = a;
                        }
                    }
                }
                for (size_t i = 0; i < part.size(); ++i) total[i] += sum(part[i]);
            }
            for (int r = 0; r < m; ++r)
                for (int64_t f = 0; f < h; ++f) out[(g + r) * h + f] = static_cast<float>(total[f * ROWS + r]);
        }
    }
}

template <int KIND>
void slopes(const float* z, const float* grad, int64_t n, int64_t h, float* out, int threads) {
    (h > WIDE ? backward_wide<KIND> : backward<KIND>)(z, grad, n, h, out, threads);
}
}  // namespace

extern "C" {
void wager_pair_sums(const float* z, int64_t n, int64_t h, int64_t kind, float* out, int threads) {
    (kind == 0 ? forward<0> : kind == 1 ? forward<1> : forward<2>)(z, n, h, out, threads);
}

void wager_pair_slopes(const float* z, const float* grad, int64_t n, int64_t h, int64_t kind, float* out, int threads) {
    (kind == 0 ? slopes<0> : kind == 1 ? slopes<1> : slopes<2>)(z, grad, n, h, out, threads);
}
}
