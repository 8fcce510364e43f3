// Matrix products on strided tiles, blocked for registers. E is what is done to an element of C when its sum is complete; with E::vectors a
// whole register of them at a time, before they are stored.
#pragma once
#include "functions.h"

struct wg_as_is {
    static constexpr bool active = false, vectors = false;
    static inline float on(float x) { return x; }
};

// C[MR x NR vectors] (+)= A[MR x K] B[K x NR vectors]; A has strides (ar, ac), B and C are contiguous along columns.
// STREAM: B comes from far away and is read once, so that asking for it ahead pays.
template <int MR, int NR, bool STREAM, class E>
static inline void wg_micro(long K, const float* A, long ar, long ac, const float* B, long ldb, float* C, long ldc, bool add, bool last) {
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
    if constexpr (E::vectors)
        if (last)
            for (int i = 0; i < MR; i++)
                for (int j = 0; j < NR; j++) c[i][j] = E::on(c[i][j]);
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) *(vec*)(C + i * ldc + j * VECTOR) = c[i][j];
    if (E::active && !E::vectors && last)
        for (int i = 0; i < MR; i++) {
            float* row = C + i * ldc;
#pragma omp simd
            for (int l = 0; l < NR * VECTOR; l++) row[l] = E::on(row[l]);
        }
}

template <int NR, bool STREAM, class E>
static inline void wg_rows(long M, long K, const float* A, long ar, long ac, const float* B, long ldb, float* C, long ldc, bool add, bool last) {
    long i = 0;
#if defined(__AVX512F__)
    constexpr int TALL = NR >= 4 ? 6 : (NR == 3 ? 8 : (NR == 2 ? 12 : 16));
#else
    constexpr int TALL = NR >= 2 ? 6 : 8;
#endif
    if (TALL > 8 && M % 8 == 0 && M % TALL != 0)
        for (; i + 8 <= M; i += 8) wg_micro<8, NR, STREAM, E>(K, A + i * ar, ar, ac, B, ldb, C + i * ldc, ldc, add, last);
    const long tall = M > TALL && M % TALL && M % TALL < 3 ? M - TALL : M;  // one or two rows alone would wait for their own sums
    for (; i + TALL <= tall; i += TALL) wg_micro<TALL, NR, STREAM, E>(K, A + i * ar, ar, ac, B, ldb, C + i * ldc, ldc, add, last);
    for (; i + 4 <= M; i += 4) wg_micro<4, NR, STREAM, E>(K, A + i * ar, ar, ac, B, ldb, C + i * ldc, ldc, add, last);
    for (; i + 3 <= M; i += 3) wg_micro<3, NR, STREAM, E>(K, A + i * ar, ar, ac, B, ldb, C + i * ldc, ldc, add, last);
    for (; i + 2 <= M; i += 2) wg_micro<2, NR, STREAM, E>(K, A + i * ar, ar, ac, B, ldb, C + i * ldc, ldc, add, last);
    for (; i < M; i++) wg_micro<1, NR, STREAM, E>(K, A + i * ar, ar, ac, B, ldb, C + i * ldc, ldc, add, last);
}

// C[M x N] (+)= A[M x K] B, B being panels of two vectors of columns one after another: [N / width][K][width].
template <class E>
static inline void wg_panels(long M, long N, long K, const float* A, long ar, long ac, const float* B, float* C, long ldc, bool add) {
    constexpr long W = 2 * VECTOR;
    for (long j = 0; j < N; j += W) wg_rows<2, true, E>(M, K, A, ar, ac, B + j * K, W, C + j, ldc, add, true);
}

// Panels of two vectors, copied first so that rows neither evict one another (large strides alias in the cache) nor cost address
// translations; worth it when several row blocks read them. Whole rows of up to WIDE columns are copied, since neighbours come cheaper.
template <class E>
static inline void wg_packed(long M, long N, long K, const float* A, long ar, long ac, const float* B, long ldb, float* C, long ldc, bool add) {
    constexpr long PANEL = 2 * VECTOR, WIDE = 8 * PANEL, ROOM = 128 * WIDE;
    alignas(64) static thread_local float copy[ROOM];
    for (long j = 0; j < N; j += WIDE) {
        const long wide = N - j < WIDE ? N - j : WIDE, most = ROOM / wide;
        for (long k = 0; k < K; k += most) {
            const long depth = K - k < most ? K - k : most;
            for (long r = 0; r < depth; r++)
                for (long c = 0; c < wide; c += PANEL) {
                    float* to = copy + c * depth + r * PANEL;
                    const float* from = B + (k + r) * ldb + j + c;
                    *(vec*)to = *(const vec*)from;
                    *(vec*)(to + VECTOR) = *(const vec*)(from + VECTOR);
                }
            for (long c = 0; c < wide; c += PANEL)
                wg_rows<2, false, E>(M, depth, A + k * ac, ar, ac, copy + c * depth, PANEL, C + j + c, ldc, add || k > 0, k + depth == K);
        }
    }
}

// C[M x N] (+)= A[M x K] B[K x N], B and C contiguous along columns.
template <class E>
static inline void wg_plain(long M, long N, long K, const float* A, long ar, long ac, const float* B, long ldb, float* C, long ldc, bool add) {
    const long whole = N / (2 * VECTOR) * (2 * VECTOR);
    if (M >= 12 && ldb > 256)
        wg_packed<E>(M, whole, K, A, ar, ac, B, ldb, C, ldc, add);
    else
        for (long j = 0; j < whole; j += 2 * VECTOR) wg_rows<2, false, E>(M, K, A, ar, ac, B + j, ldb, C + j, ldc, add, true);
    long j = whole;
    for (; j + VECTOR <= N; j += VECTOR) wg_rows<1, false, E>(M, K, A, ar, ac, B + j, ldb, C + j, ldc, add, true);
    for (long i = 0; i < M; i++)
        for (long jj = j; jj < N; jj++) {
            float s = add ? C[i * ldc + jj] : 0.0f;
            for (long k = 0; k < K; k++) s += A[i * ar + k * ac] * B[k * ldb + jj];
            C[i * ldc + jj] = E::on(s);
        }
}

// MR x NR entries of C as sums along K, over which both A and B are contiguous.
template <int MR, int NR, class E>
static inline void wg_dot(long K, const float* A, long ar, const float* B, long bc, float* C, long cr, long cc, bool add) {
    vec c[MR][NR] = {};
    long k = 0;
    for (; k + VECTOR <= K; k += VECTOR) {
        vec b[NR];
        for (int j = 0; j < NR; j++) b[j] = *(const vec*)(B + j * bc + k);
        for (int i = 0; i < MR; i++) {
            const vec a = *(const vec*)(A + i * ar + k);
            for (int j = 0; j < NR; j++) c[i][j] += a * b[j];
        }
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) {
            float s = add ? C[i * cr + j * cc] : 0.0f;
            s += wg_fold<VECTOR / 2>(c[i][j]);
            for (long r = k; r < K; r++) s += A[i * ar + r] * B[j * bc + r];
            C[i * cr + j * cc] = E::on(s);
        }
}

template <int NR, class E>
static inline void wg_dot_rows(long M, long K, const float* A, long ar, const float* B, long bc, float* C, long cr, long cc, bool add) {
    long i = 0;
    for (; i + 4 <= M; i += 4) wg_dot<4, NR, E>(K, A + i * ar, ar, B, bc, C + i * cr, cr, cc, add);
    for (; i < M; i++) wg_dot<1, NR, E>(K, A + i * ar, ar, B, bc, C + i * cr, cr, cc, add);
}

template <class E>
static inline void wg_dots(long M, long N, long K, const float* A, long ar, const float* B, long bc, float* C, long cr, long cc, bool add) {
    long j = 0;
    for (; j + 4 <= N; j += 4) wg_dot_rows<4, E>(M, K, A, ar, B + j * bc, bc, C + j * cc, cr, cc, add);
    for (; j < N; j++) wg_dot_rows<1, E>(M, K, A, ar, B + j * bc, bc, C + j * cc, cr, cc, add);
}

// No fast form: anything goes.
template <class E>
static inline void wg_slow(long M, long N, long K, const float* A, long ar, long ac, const float* B, long br, long bc, float* C, long cr,
                           long cc, bool add) {
    for (long i = 0; i < M; i++)
        for (long j = 0; j < N; j++) {
            float s = add ? C[i * cr + j * cc] : 0.0f;
            for (long k = 0; k < K; k++) s += A[i * ar + k * ac] * B[k * br + j * bc];
            C[i * cr + j * cc] = E::on(s);
        }
}
