// Products with a band of a matrix, for rows that lie anywhere: tables say where each row of a batch entry starts (-1: a row of zeros).
// Row m of the left side meets the rows m + offset + [0, diagonals) of the right side; rows outside [0, others) are zero.

struct Banded {
    int64_t batch, length, others, features, diagonals, offset;
    const int64_t *left, *right, *out;  // [batch][length], [batch][others], [batch][length]; an `out` of -1 is not wanted
};

// Lane i of the sum is the sum of vector i: segments of neighbouring vectors are folded into one another, G per vector so far.
template <int G>
static inline vec wg_halve(vec a, vec b) {
    constexpr int L = VECTOR / G, H = L / 2;
    ivec low, high;
    for (int l = 0; l < VECTOR; l++) {
        const int s = l / H, at = (s < G ? s * L : VECTOR + (s - G) * L) + l % H;
        low[l] = at;
        high[l] = at + H;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}
template <int G>
static inline vec wg_sums(const vec* x) {
    if constexpr (G == VECTOR)
        return x[0];
    else {
        vec half[VECTOR / G / 2];
        for (int i = 0; i < VECTOR / G / 2; i++) half[i] = wg_halve<G>(x[2 * i], x[2 * i + 1]);
        return wg_sums<2 * G>(half);
    }
}

constexpr int BAND_ROWS = 8, BAND_COLUMNS = 2;  // a register tile

static inline const float* wg_row(const float* in, const int64_t* table, long at, long count, const float* zeros) {
    return at < 0 || at >= count || table[at] < 0 ? zeros : in + table[at];
}

// out[m, d] = sum over f of left[m, f] * right[m + offset + d, f]
static void wg_band_products(const Banded& w, const float* left, const float* right, float* out, const float* zeros) {
    constexpr int R = BAND_ROWS, C = BAND_COLUMNS;
    const long groups = (w.length + R - 1) / R, whole = w.features / VECTOR * VECTOR;
#pragma omp for schedule(static)
    for (long item = 0; item < w.batch * groups; item++) {
        const long n = item / groups, m = item % groups * R;
        const float *a[R], *b[2 * C];
        for (int i = 0; i < R; i++) a[i] = wg_row(left, w.left + n * w.length, m + i, w.length, zeros);
        for (long d = 1 - R; d < w.diagonals; d += C) {  // row i of the tile meets the diagonals d + R - 1 - i + j
            for (int j = 0; j < 2 * C; j++)               // of the next tile, too: asked for ahead
                b[j] = wg_row(right, w.right + n * w.others, m + w.offset + d + R - 1 + j, w.others, zeros);
            vec c[R * C] = {};
            for (long k = 0; k < whole; k += VECTOR) {
                vec y[C];
                for (int j = 0; j < C; j++) {
                    y[j] = *(const vec*)(b[j] + k);
                    __builtin_prefetch(b[C + j] + k);
                }
                for (int i = 0; i < R; i++) {
                    const vec x = *(const vec*)(a[i] + k);
                    for (int j = 0; j < C; j++) c[i * C + j] += x * y[j];
                }
            }
            alignas(64) float s[R * C];
            for (int g = 0; g < R * C; g += VECTOR) *(vec*)(s + g) = wg_sums<1>(c + g);
            for (int i = 0; i < R && m + i < w.length; i++)
                for (int j = 0; j < C; j++) {
                    const long at = d + R - 1 + j - i;
                    if (at < 0 || at >= w.diagonals || w.out[n * w.length + m + i] < 0) continue;
                    float total = s[i * C + j];
                    for (long k = whole; k < w.features; k++) total += a[i][k] * b[j][k];
                    out[w.out[n * w.length + m + i] + at] = total;
                }
        }
    }
}

// out[m, f] = sum over d of left[m, d] * right[m + offset + d, f]
template <int NR>
static inline void wg_band_block(long rows, const float* const* b, const float* skewed, long f, float* const* out) {
    constexpr int T = BAND_ROWS;
    vec c[T][NR] = {};
    for (long r = 0; r < rows; r++) {
        vec y[NR];
        for (int j = 0; j < NR; j++) {
            y[j] = *(const vec*)(b[r] + f + j * VECTOR);
            __builtin_prefetch(b[r] + f + (NR + j) * VECTOR);
        }
        for (int i = 0; i < T; i++)
            for (int j = 0; j < NR; j++) c[i][j] += y[j] * skewed[r * T + i];
    }
    for (int i = 0; i < T; i++)
        if (out[i])
            for (int j = 0; j < NR; j++) *(vec*)(out[i] + f + j * VECTOR) = c[i][j];
}
static void wg_band_sums(const Banded& w, const float* left, const float* right, float* out, const float* zeros, float* scratch) {
    constexpr int T = BAND_ROWS;
    const long groups = (w.length + T - 1) / T, rows = w.diagonals + T - 1;
    float* skewed = scratch + omp_get_thread_num() * rows * T;
#pragma omp for schedule(static)
    for (long item = 0; item < w.batch * groups; item++) {
        const long n = item / groups, m = item % groups * T;
        const float* b[MAX_BAND];
        float* to[T];
        for (long r = 0; r < rows; r++) b[r] = wg_row(right, w.right + n * w.others, m + w.offset + r, w.others, zeros);
        for (int i = 0; i < T; i++) {  // column i holds row m + i of the left side, shifted to the rows it meets
            const float* a = wg_row(left, w.left + n * w.length, m + i, w.length, zeros);
            for (long r = 0; r < rows; r++) skewed[r * T + i] = r >= i && r - i < w.diagonals ? a[r - i] : 0.0f;
            to[i] = m + i < w.length && w.out[n * w.length + m + i] >= 0 ? out + w.out[n * w.length + m + i] : nullptr;
        }
        long f = 0;
        for (; VECTOR == 16 && f + 3 * VECTOR <= w.features; f += 3 * VECTOR) wg_band_block<3>(rows, b, skewed, f, to);
        for (; VECTOR == 16 && f + 2 * VECTOR <= w.features; f += 2 * VECTOR) wg_band_block<2>(rows, b, skewed, f, to);
        for (; f + VECTOR <= w.features; f += VECTOR) wg_band_block<1>(rows, b, skewed, f, to);
        for (; f < w.features; f++)
            for (int i = 0; i < T; i++) {
                if (!to[i]) continue;
                float total = 0.0f;
                for (long r = 0; r < rows; r++) total += b[r][f] * skewed[r * T + i];
                to[i][f] = total;
            }
    }
}

extern "C" void wager_band_products(const Banded* w, const float* left, const float* right, float* out, const float* zeros, float*, long threads) {
#pragma omp parallel num_threads(threads)
    wg_band_products(*w, left, right, out, zeros);
}
extern "C" void wager_band_sums(const Banded* w, const float* left, const float* right, float* out, const float* zeros, float* scratch,
                                long threads) {
#pragma omp parallel num_threads(threads)
    wg_band_sums(*w, left, right, out, zeros, scratch);
}
