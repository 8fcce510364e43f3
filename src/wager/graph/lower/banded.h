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

// Lanes over right rows, for wide bands. A panel is VECTOR right rows transposed, [features][VECTOR]; panel p holds the rows that start at
// p * VECTOR + offset, so that a block of VECTOR rows of the left side meets whole panels. A thread goes through neighbouring blocks and keeps
// their panels in a ring: each is transposed once.
constexpr int BLOCK_ROWS = VECTOR / 2, BLOCK_PANELS = 3;  // a register tile

template <int S>
static inline void wg_exchange(vec (&x)[VECTOR]) {  // the off-diagonal squares of side S change places
    ivec low, high;
    for (int l = 0; l < VECTOR; l++) {
        low[l] = l & S ? VECTOR + l - S : l;
        high[l] = l & S ? VECTOR + l : l + S;
    }
    for (int i = 0; i < VECTOR; i++) {
        if (i & S) continue;
        const vec a = x[i], b = x[i + S];
        x[i] = __builtin_shuffle(a, b, low);
        x[i + S] = __builtin_shuffle(a, b, high);
    }
    if constexpr (S > 1) wg_exchange<S / 2>(x);
}
static void wg_panel(const float* const* rows, long features, float* panel) {
    long k = 0;
    for (; k + VECTOR <= features; k += VECTOR) {
        vec x[VECTOR];
        for (int i = 0; i < VECTOR; i++) x[i] = *(const vec*)(rows[i] + k);
        wg_exchange<VECTOR / 2>(x);
        for (int i = 0; i < VECTOR; i++) *(vec*)(panel + (k + i) * VECTOR) = x[i];
    }
    for (; k < features; k++)
        for (int i = 0; i < VECTOR; i++) panel[k * VECTOR + i] = rows[i][k];
}

// BLOCK_ROWS rows times NR panels; meanwhile `ahead` rows are asked for, which come next.
template <int NR>
static inline void wg_band_tile(long features, const float* const* a, const float* const* panels, float* to, long step,
                                const float* const* ahead, long count) {
    constexpr int R = BLOCK_ROWS;
    constexpr long LINE = 16;
    vec c[R][NR] = {};
    for (long from = 0; from < features; from += LINE) {
        for (long i = 0; i < count; i++) __builtin_prefetch(ahead[i] + from, 0, 2);
        const long end = from + LINE < features ? from + LINE : features;
        for (long k = from; k < end; k++) {
            vec y[NR];
            for (int j = 0; j < NR; j++) y[j] = *(const vec*)(panels[j] + k * VECTOR);
            for (int i = 0; i < R; i++)
                for (int j = 0; j < NR; j++) c[i][j] += y[j] * a[i][k];
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < NR; j++) *(vec*)(to + i * step + j * VECTOR) = c[i][j];
}

static inline void wg_copy(float* to, const float* from, long n) {
    if (n < VECTOR) {
        for (long i = 0; i < n; i++) to[i] = from[i];
        return;
    }
    for (long i = 0; i + VECTOR < n; i += VECTOR) *(vec*)(to + i) = *(const vec*)(from + i);
    *(vec*)(to + n - VECTOR) = *(const vec*)(from + n - VECTOR);
}

static inline long wg_panels_of(long diagonals) { return (diagonals + 2 * (VECTOR - 1)) / VECTOR; }

// The same products as wg_band_products. Scratch per thread: a ring of wg_panels_of(diagonals) panels, and a block's sums.
static void wg_band_panels(const Banded& w, const float* left, const float* right, float* out, const float* zeros, float* scratch) {
    constexpr int R = BLOCK_ROWS, HALVES = VECTOR / R;
    const long groups = (w.length + VECTOR - 1) / VECTOR, ring = wg_panels_of(w.diagonals), panel = w.features * VECTOR, step = ring * VECTOR;
    const long threads = omp_get_num_threads(), thread = omp_get_thread_num(), items = w.batch * groups;
    float* const kept = scratch + thread * (ring * panel + VECTOR * step);
    float* const sums = kept + ring * panel;
    const long tiles = HALVES * ((ring + BLOCK_PANELS - 1) / BLOCK_PANELS);  // about as many
    for (long item = items * thread / threads, first = item; item < items * (thread + 1) / threads; item++) {
        const long n = item / groups, g = item % groups;
        const int64_t *from = w.right + n * w.others, *to = w.out + n * w.length;
        const float *rows[VECTOR], *ahead[2 * VECTOR], *a[VECTOR];
        for (long p = item == first || g == 0 ? g : g + ring - 1; p < g + ring; p++) {
            for (int i = 0; i < VECTOR; i++) rows[i] = wg_row(right, from, p * VECTOR + w.offset + i, w.others, zeros);
            wg_panel(rows, w.features, kept + p % ring * panel);
        }
        for (int i = 0; i < VECTOR; i++) {
            const long m = g * VECTOR + i;
            a[i] = wg_row(left, w.left + n * w.length, m, w.length, zeros);
            ahead[i] = wg_row(right, from, m + ring * VECTOR + w.offset, w.others, zeros);
            ahead[VECTOR + i] = wg_row(left, w.left + n * w.length, m + VECTOR, w.length, zeros);
        }
        const long held = w.length - g * VECTOR < VECTOR ? w.length - g * VECTOR : VECTOR;
        long done = 0;
        for (long row = 0; row < held; row += R) {
            for (long i = row; i < row + R && i < held; i++)  // where the sums will go: asked for while they are made
                if (to[g * VECTOR + i] >= 0)
                    for (long d = 0; d < w.diagonals; d += 16) __builtin_prefetch(out + to[g * VECTOR + i] + d, 1, 2);
            const long wanted = (row + R - 1 + w.diagonals + VECTOR - 1) / VECTOR;
            for (long p = 0, size; p < wanted; p += size, done++) {
                const float* b[BLOCK_PANELS];
                size = wanted - p >= 3 && wanted - p != 4 ? 3 : (wanted - p >= 2 ? 2 : 1);
                for (long j = 0; j < size; j++) b[j] = kept + (g + p + j) % ring * panel;
                const float* const* next = ahead + (done < tiles ? 2 * VECTOR * done / tiles : 0);
                const long count = done < tiles ? 2 * VECTOR * (done + 1) / tiles - 2 * VECTOR * done / tiles : 0;
                float* const s = sums + row * step + p * VECTOR;
                switch (size) {
                    case 3: wg_band_tile<3>(w.features, a + row, b, s, step, next, count); break;
                    case 2: wg_band_tile<2>(w.features, a + row, b, s, step, next, count); break;
                    default: wg_band_tile<1>(w.features, a + row, b, s, step, next, count);
                }
            }
        }
        for (long i = 0; i < held; i++)  // only now: what was just stored cannot be read at another offset before it is in the cache
            if (to[g * VECTOR + i] >= 0) wg_copy(out + to[g * VECTOR + i], sums + i * step + i, w.diagonals);
    }
}

// out[m, f] = sum over d of left[m, d] * right[m + offset + d, f]. Row i of a tile meets the right rows b[i], ... b[i + diagonals - 1].
template <int NR>
static inline void wg_band_block(long diagonals, const float* const* b, const float* const* a, long f, float* const* out) {
    constexpr int T = BAND_ROWS;
    vec c[T][NR] = {}, y[NR];
    const float* coefficient[T];
    for (int i = 0; i < T; i++) coefficient[i] = a[i] - i;
    const auto next = [&](long r) __attribute__((always_inline)) {
        for (int j = 0; j < NR; j++) {
            y[j] = *(const vec*)(b[r] + f + j * VECTOR);
            __builtin_prefetch(b[r] + f + (NR + j) * VECTOR);
        }
    };
    const auto some = [&](long r) __attribute__((always_inline)) {
        next(r);
        for (int i = 0; i < T; i++)
            if (i <= r && r - i < diagonals)
                for (int j = 0; j < NR; j++) c[i][j] += y[j] * coefficient[i][r];
    };
    const long all = diagonals < T - 1 ? T - 1 : diagonals;  // from T - 1 up to here every row of the tile takes part
    for (long r = 0; r < T - 1; r++) some(r);
    for (long r = T - 1; r < all; r++) {
        next(r);
        for (int i = 0; i < T; i++)
            for (int j = 0; j < NR; j++) c[i][j] += y[j] * coefficient[i][r];
    }
    for (long r = all; r < diagonals + T - 1; r++) some(r);
    for (int i = 0; i < T; i++)
        if (out[i])
            for (int j = 0; j < NR; j++) *(vec*)(out[i] + f + j * VECTOR) = c[i][j];
}
static void wg_band_sums(const Banded& w, const float* left, const float* right, float* out, const float* zeros) {
    constexpr int T = BAND_ROWS;
    const long groups = (w.length + T - 1) / T;
#pragma omp for schedule(static)
    for (long item = 0; item < w.batch * groups; item++) {
        const long n = item / groups, m = item % groups * T;
        const float *a[T], *b[MAX_BAND];
        float* to[T];
        for (long r = 0; r < w.diagonals + T - 1; r++) b[r] = wg_row(right, w.right + n * w.others, m + w.offset + r, w.others, zeros);
        for (int i = 0; i < T; i++) {
            a[i] = wg_row(left, w.left + n * w.length, m + i, w.length, zeros);
            to[i] = m + i < w.length && w.out[n * w.length + m + i] >= 0 ? out + w.out[n * w.length + m + i] : nullptr;
        }
        long f = 0;
        if (VECTOR == 16) {
            for (long left = w.features / VECTOR; left >= 3 && left != 4; left -= 3, f += 3 * VECTOR) wg_band_block<3>(w.diagonals, b, a, f, to);
            for (; f + 2 * VECTOR <= w.features; f += 2 * VECTOR) wg_band_block<2>(w.diagonals, b, a, f, to);
        }
        for (; f + VECTOR <= w.features; f += VECTOR) wg_band_block<1>(w.diagonals, b, a, f, to);
        for (; f < w.features; f++)
            for (int i = 0; i < T; i++) {
                if (!to[i]) continue;
                float total = 0.0f;
                for (long d = 0; d < w.diagonals; d++) total += b[i + d][f] * a[i][d];
                to[i][f] = total;
            }
    }
}

extern "C" void wager_band_products(const Banded* w, const float* left, const float* right, float* out, const float* zeros, float*, long threads) {
#pragma omp parallel num_threads(threads)
    wg_band_products(*w, left, right, out, zeros);
}
extern "C" void wager_band_panels(const Banded* w, const float* left, const float* right, float* out, const float* zeros, float* scratch,
                                  long threads) {
#pragma omp parallel num_threads(threads)
    wg_band_panels(*w, left, right, out, zeros, scratch);
}
// Floats of scratch per thread.
extern "C" long wager_band_products_scratch(const Banded*) { return 0; }
extern "C" long wager_band_panels_scratch(const Banded* w) { return (w->features + VECTOR) * wg_panels_of(w->diagonals) * VECTOR; }
extern "C" long wager_band_sums_scratch(const Banded*) { return 0; }
extern "C" void wager_band_sums(const Banded* w, const float* left, const float* right, float* out, const float* zeros, float*, long threads) {
#pragma omp parallel num_threads(threads)
    wg_band_sums(*w, left, right, out, zeros);
}
