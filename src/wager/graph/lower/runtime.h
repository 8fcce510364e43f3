// What generated kernels stand on: a register-blocked matrix product on strided tiles, and functions that vectorise.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <cstddef>

#if defined(__AVX512F__)
constexpr long VECTOR = 16;
#else
constexpr long VECTOR = 8;
#endif
typedef float vec __attribute__((vector_size(VECTOR * 4), aligned(4), may_alias));

static inline float wg_exp(float x) {
    x = x < -87.3f ? -87.3f : (x > 88.7f ? 88.7f : x);
    float n = __builtin_rintf(x * 1.44269504088896341f);
    float r = __builtin_fmaf(n, -0.693359375f, x);
    r = __builtin_fmaf(n, 2.12194440e-4f, r);
    float y = 1.9875691500e-4f;
    y = __builtin_fmaf(y, r, 1.3981999507e-3f);
    y = __builtin_fmaf(y, r, 8.3334519073e-3f);
    y = __builtin_fmaf(y, r, 4.1665795894e-2f);
    y = __builtin_fmaf(y, r, 1.6666665459e-1f);
    y = __builtin_fmaf(y, r, 5.0000001201e-1f);
    y = __builtin_fmaf(y, r * r, r) + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return y * scale;
}
static inline float wg_sigmoid(float x) { return 1.0f / (1.0f + wg_exp(-x)); }
static inline float wg_silu(float x) { return x / (1.0f + wg_exp(-x)); }
static inline float wg_tanh(float x) {  // two forms: no cancellation near zero
    float s = x * x;
    float small = x * (1.0f + s * (-0.33333333f + s * (0.13333333f + s * (-0.053968254f + s * 0.021869488f))));
    float large = 1.0f - 2.0f / (wg_exp(2.0f * x) + 1.0f);
    return s < 0.02f ? small : large;
}
static inline float wg_gelu_tanh(float x) {
    return 0.5f * x * (1.0f + wg_tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
static inline float wg_gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
static inline float wg_relu(float x) { return x < 0.0f ? 0.0f : x; }  // keeps NaN
static inline long wg_floordiv(long a, long b) { long q = a / b; return q - ((a % b != 0) & ((a < 0) != (b < 0))); }
static inline long wg_mod(long a, long b) { long r = a % b; return r + ((r != 0) & ((r < 0) != (b < 0))) * b; }

// C[MR x NR vectors] (+)= A[MR x K] B[K x NR vectors]; A has strides (ar, ac), B and C are contiguous along columns.
// STREAM: B comes from far away and is read once, so that asking for it ahead pays.
template <int MR, int NR, bool STREAM = false>
static inline void wg_micro(long K, const float* A, long ar, long ac, const float* B, long ldb, float* C, long ldc, bool add) {
    vec c[MR][NR];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) c[i][j] = add ? *(const vec*)(C + i * ldc + j * VECTOR) : vec{};
    if (ac == 1) {  // pointers per row: the common case keeps its addresses in registers
        const float* a[MR];
        for (int i = 0; i < MR; i++) a[i] = A + i * ar;
#pragma GCC unroll 2
        for (long k = 0; k < K; k++) {
            if (STREAM) __builtin_prefetch(B + (k + 24) * ldb);
            vec b[NR];
            for (int j = 0; j < NR; j++) b[j] = *(const vec*)(B + k * ldb + j * VECTOR);
            for (int i = 0; i < MR; i++) {
                const float x = a[i][k];
                for (int j = 0; j < NR; j++) c[i][j] += b[j] * x;
            }
        }
    } else {
        for (long k = 0; k < K; k++) {
            vec b[NR];
            for (int j = 0; j < NR; j++) b[j] = *(const vec*)(B + k * ldb + j * VECTOR);
            for (int i = 0; i < MR; i++) {
                const float x = A[i * ar + k * ac];
                for (int j = 0; j < NR; j++) c[i][j] += b[j] * x;
            }
        }
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) *(vec*)(C + i * ldc + j * VECTOR) = c[i][j];
}

template <int NR, bool STREAM = false>
static inline void wg_rows(long M, long K, const float* A, long ar, long ac, const float* B, long ldb, float* C, long ldc, bool add) {
    long i = 0;
#if defined(__AVX512F__)
    constexpr int TALL = NR >= 4 ? 6 : (NR == 3 ? 8 : (NR == 2 ? 12 : 16));
#else
    constexpr int TALL = NR >= 2 ? 6 : 8;
#endif
    if (TALL > 8 && M % 8 == 0 && M % TALL != 0)
        for (; i + 8 <= M; i += 8) wg_micro<8, NR, STREAM>(K, A + i * ar, ar, ac, B, ldb, C + i * ldc, ldc, add);
    const long tall = M > TALL && M % TALL && M % TALL < 3 ? M - TALL : M;  // one or two rows alone would wait for their own sums
    for (; i + TALL <= tall; i += TALL) wg_micro<TALL, NR, STREAM>(K, A + i * ar, ar, ac, B, ldb, C + i * ldc, ldc, add);
    for (; i + 4 <= M; i += 4) wg_micro<4, NR, STREAM>(K, A + i * ar, ar, ac, B, ldb, C + i * ldc, ldc, add);
    for (; i + 3 <= M; i += 3) wg_micro<3, NR, STREAM>(K, A + i * ar, ar, ac, B, ldb, C + i * ldc, ldc, add);
    for (; i + 2 <= M; i += 2) wg_micro<2, NR, STREAM>(K, A + i * ar, ar, ac, B, ldb, C + i * ldc, ldc, add);
    for (; i < M; i++) wg_micro<1, NR, STREAM>(K, A + i * ar, ar, ac, B, ldb, C + i * ldc, ldc, add);
}

// C[M x N] (+)= A[M x K] B, B being panels of two vectors of columns one after another: [N / width][K][width].
static inline void wg_gemm_panels(long M, long N, long K, const float* A, long ar, long ac, const float* B, float* C, long ldc, bool add) {
    constexpr long W = 2 * VECTOR;
    for (long j = 0; j < N; j += W) wg_rows<2, true>(M, K, A, ar, ac, B + j * K, W, C + j, ldc, add);
}

// One panel of two vectors, copied first so that its rows neither evict one another (large strides alias in the cache) nor cost address
// translations; worth it when several row blocks read it.
static inline void wg_packed_panel(long M, long K, const float* A, long ar, long ac, const float* B, long ldb, float* C, long ldc, bool add) {
    constexpr long DEPTH = 256;
    alignas(64) static thread_local float panel[DEPTH * 2 * VECTOR];
    for (long k = 0; k < K; k += DEPTH) {
        const long depth = K - k < DEPTH ? K - k : DEPTH;
        for (long r = 0; r < depth; r++) {
            *(vec*)(panel + r * 2 * VECTOR) = *(const vec*)(B + (k + r) * ldb);
            *(vec*)(panel + r * 2 * VECTOR + VECTOR) = *(const vec*)(B + (k + r) * ldb + VECTOR);
        }
        wg_rows<2>(M, depth, A + k * ac, ar, ac, panel, 2 * VECTOR, C, ldc, add || k > 0);
    }
}

// C[M x N] (+)= A[M x K] B[K x N]; bc is B's column stride (1 for the fast path).
static inline void wg_gemm(long M, long N, long K, const float* A, long ar, long ac, const float* B, long ldb, long bc, float* C,
                           long ldc, bool add) {
    long j = 0;
    if (bc == 1) {
        const bool pack = M >= 12 && ldb > 256;
        for (; j + 2 * VECTOR <= N; j += 2 * VECTOR) {
            if (pack)
                wg_packed_panel(M, K, A, ar, ac, B + j, ldb, C + j, ldc, add);
            else
                wg_rows<2>(M, K, A, ar, ac, B + j, ldb, C + j, ldc, add);
        }
        for (; j + VECTOR <= N; j += VECTOR) wg_rows<1>(M, K, A, ar, ac, B + j, ldb, C + j, ldc, add);
    }
    for (long i = 0; i < M; i++)
        for (long jj = j; jj < N; jj++) {
            float s = add ? C[i * ldc + jj] : 0.0f;
            for (long k = 0; k < K; k++) s += A[i * ar + k * ac] * B[k * ldb + jj * bc];
            C[i * ldc + jj] = s;
        }
}
