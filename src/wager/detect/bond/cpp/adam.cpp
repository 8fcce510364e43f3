// One Adam step on a stretch of a large matrix, in one pass over its values and both moments.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

namespace {
struct Step {
    float decay, rate, root;  // weight decay; rate / (1 - beta1^t); sqrt(1 - beta2^t)
};
constexpr float BETA1 = 0.9f, BETA2 = 0.999f, EPS = 1e-8f;

inline void one(float& w, float& m, float& v, float g, const Step& s) {
    g += s.decay * w;
    m = BETA1 * m + (1 - BETA1) * g;
    v = BETA2 * v + (1 - BETA2) * g * g;
    w -= s.rate * m / (std::sqrt(v) / s.root + EPS);
}

void stretch(float* w, float* m, float* v, const float* g, int64_t n, const Step& s) {
    int64_t i = 0;
#if defined(__AVX2__) && defined(__FMA__)
    const __m256 decay = _mm256_set1_ps(s.decay), rate = _mm256_set1_ps(s.rate), unroot = _mm256_set1_ps(1 / s.root);
    const __m256 b1 = _mm256_set1_ps(BETA1), c1 = _mm256_set1_ps(1 - BETA1), b2 = _mm256_set1_ps(BETA2), c2 = _mm256_set1_ps(1 - BETA2);
    for (; i + 8 <= n; i += 8) {
        const __m256 x = _mm256_loadu_ps(w + i), grad = _mm256_fmadd_ps(decay, x, _mm256_loadu_ps(g + i));
        const __m256 mean = _mm256_fmadd_ps(b1, _mm256_loadu_ps(m + i), _mm256_mul_ps(c1, grad));
        const __m256 square = _mm256_fmadd_ps(b2, _mm256_loadu_ps(v + i), _mm256_mul_ps(c2, _mm256_mul_ps(grad, grad)));
        const __m256 below = _mm256_fmadd_ps(_mm256_sqrt_ps(square), unroot, _mm256_set1_ps(EPS));
        _mm256_storeu_ps(m + i, mean);
        _mm256_storeu_ps(v + i, square);
        _mm256_storeu_ps(w + i, _mm256_sub_ps(x, _mm256_div_ps(_mm256_mul_ps(rate, mean), below)));
    }
#endif
    for (; i < n; ++i) one(w[i], m[i], v[i], g[i], s);
}
}  // namespace

extern "C" void wager_adam(float* w, float* m, float* v, const float* g, int64_t n, int64_t time, double rate, double decay, int threads) {
    const Step s{static_cast<float>(decay), static_cast<float>(rate / (1 - std::pow(0.9, time))),
                 static_cast<float>(std::sqrt(1 - std::pow(0.999, time)))};
    const int64_t part = (n + threads - 1) / threads;
#pragma omp parallel for num_threads(threads)
    for (int t = 0; t < threads; ++t) {
        const int64_t from = std::min(n, t * part), count = std::min(n, from + part) - from;
        stretch(w + from, m + from, v + from, g + from, count, s);
    }
}
