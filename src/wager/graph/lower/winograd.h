// Minimal filtering: windows of R x R taps at the points of lattices, in tiles of M x M outputs. Transform<M, R> (generated) holds the exact
// one-dimensional transforms. A lattice is a set of output points whose neighbours lie one tap apart in the input: all points of an ordinary
// convolution, the points of one residue class of a dilated one, the outputs of one phase of a transposed one.

struct Lattice {
    int64_t weight, rows, columns;
    int64_t in_row, in_column, row_step, column_step;  // where the first window starts (may lie outside) and the distance of taps, in pixels
    int64_t out_base, out_row, out_column;             // element offsets of the output
};

struct Tile {
    int32_t image, lattice, row, column;
};

struct Winograd {
    long height, width, channels, features, in_step, out_step;
    long tile, window;
    long tiles, block;          // tiles of one weight are neighbours; `block` of them are transformed at a time
    long alone;                 // 1: a thread carries a block through all three steps by itself; 0: all threads share each step
    long weights;
    const int64_t* start;       // first tile of each weight, and the end
    const float* const* weight; // per weight [point][block of features][c][WIDTH]
    const Lattice* lattice;
    const Tile* tiles_at;
    float* scratch;
    Epilogue epilogue;
};

template <int M, int R>
struct Filtering {
    static constexpr int A = M + R - 1;
    const Winograd& w;
    const long padded = (w.features + WIDTH - 1) / WIDTH * WIDTH;
    const long v_step = w.block * w.channels + 16, m_step = w.block * padded + 16;  // never a multiple of the page: no aliasing of sets
    long size() const { return A * A * (v_step + m_step); }

    void input(const float* in, long tile, float* V) const {
        const Tile& t = w.tiles_at[tile];
        const Lattice& l = w.lattice[t.lattice];
        const float* p[A][A];
        for (int i = 0; i < A; i++)
            for (int j = 0; j < A; j++) {
                const long y = l.in_row + (t.row + i) * l.row_step, x = l.in_column + (t.column + j) * l.column_step;
                const bool inside = y >= 0 && y < w.height && x >= 0 && x < w.width;
                p[i][j] = inside ? in + t.image * w.in_step + (y * w.width + x) * w.channels : nullptr;
            }
        for (long c = 0; c < w.channels; c += VECTOR) {
            vec d[A][A], e[A][A];
            for (int j = 0; j < A; j++) {
                vec column[A], made[A];
                for (int i = 0; i < A; i++) column[i] = p[i][j] ? *(const vec*)(p[i][j] + c) : vec{};
                Transform<M, R>::input(column, made);
                for (int i = 0; i < A; i++) d[i][j] = made[i];
            }
            for (int i = 0; i < A; i++) Transform<M, R>::input(d[i], e[i]);
            for (int i = 0; i < A; i++)
                for (int j = 0; j < A; j++) *(vec*)(V + (i * A + j) * v_step + c) = e[i][j];
        }
    }

    // Products of one point for one block of features and the tiles [from, end) of the block.
    template <int MR>
    long rows(long at, long end, const float* V, const float* B, float* C) const {
        for (; at + MR <= end; at += MR) {
            const float* a[MR];
            vec c[MR][2] = {};
            for (int i = 0; i < MR; i++) a[i] = V + (at + i) * w.channels;
            wg_run<MR>(c, a, w.channels, B);
            for (int i = 0; i < MR; i++)
                for (int j = 0; j < 2; j++) *(vec*)(C + (at + i) * padded + j * VECTOR) = c[i][j];
        }
        return at;
    }
    void product(long point, long block, long from, long end, const float* U, const float* V, float* C) const {
        const float* B = U + (point * (padded / WIDTH) + block) * w.channels * WIDTH;
        V += point * v_step, C += point * m_step + block * WIDTH;
        long at = rows<ROWS>(from, end, V, B, C);
        if (ROWS > 6) at = rows<6>(at, end, V, B, C);
        at = rows<4>(at, end, V, B, C);
        at = rows<2>(at, end, V, B, C);
        rows<1>(at, end, V, B, C);
    }

    void output(const float* C, long tile, float* out) const {
        const Tile& t = w.tiles_at[tile];
        const Lattice& l = w.lattice[t.lattice];
        float* to = out + t.image * w.out_step + l.out_base + t.row * l.out_row + t.column * l.out_column;
        const long high = l.rows - t.row < M ? l.rows - t.row : M, wide = l.columns - t.column < M ? l.columns - t.column : M;
        for (long f = 0; f < w.features; f += VECTOR) {
            vec d[M][A], e[M][M];
            for (int j = 0; j < A; j++) {
                vec column[A], made[M];
                for (int i = 0; i < A; i++) column[i] = *(const vec*)(C + (i * A + j) * m_step + f);
                Transform<M, R>::output(column, made);
                for (int i = 0; i < M; i++) d[i][j] = made[i];
            }
            for (int i = 0; i < M; i++) Transform<M, R>::output(d[i], e[i]);
            const vec bias = *(const vec*)(w.epilogue.bias + f);
            for (int i = 0; i < high; i++)
                for (int j = 0; j < wide; j++) {
                    vec y = e[i][j] + bias;
                    if (w.epilogue.activation == RELU) y = y < 0.0f ? vec{} : y;
                    if (w.epilogue.activation == PRELU) y = y > 0.0f ? y : y * *(const vec*)(w.epilogue.slope + f);
                    float* place = to + i * l.out_row + j * l.out_column + f;
                    *(vec*)place = y;
                    if (w.epilogue.activation > PRELU) wg_activate_row(place, VECTOR, w.epilogue.activation, nullptr);
                }
        }
    }

    void alone(const float* in, float* out) const {
        const long blocks = (w.tiles + w.block - 1) / w.block; 
#pragma omp for schedule(dynamic, 1)
        for (long b = 0; b < blocks; b++) {
            float *V = w.scratch + omp_get_thread_num() * size(), *C = V + A * A * v_step;
            long from = b * w.block, end = from + w.block < w.tiles ? from + w.block : w.tiles;
            for (long t = from; t < end; t++) input(in, t, V + (t - from) * w.channels);
            for (long u = 0; u < w.weights; u++) {
                const long low = w.start[u] > from ? w.start[u] : from, high = w.start[u + 1] < end ? w.start[u + 1] : end;
                if (low < high)
                    for (long point = 0; point < A * A; point++)
                        for (long f = 0; f < padded / WIDTH; f++) product(point, f, low - from, high - from, w.weight[u], V, C);
            }
            for (long t = from; t < end; t++) output(C + (t - from) * padded, t, out);
        }
    }

    void together(const float* in, float* out) const {
        const long blocks = padded / WIDTH;
        float *V = w.scratch, *C = V + A * A * v_step;
        for (long from = 0; from < w.tiles; from += w.block) {
            const long end = from + w.block < w.tiles ? from + w.block : w.tiles;
#pragma omp for schedule(dynamic, 4)
            for (long t = from; t < end; t++) input(in, t, V + (t - from) * w.channels);
#pragma omp for schedule(dynamic, 1)
            for (long item = 0; item < A * A * blocks; item++)
                for (long u = 0; u < w.weights; u++) {
                    const long low = w.start[u] > from ? w.start[u] : from, high = w.start[u + 1] < end ? w.start[u + 1] : end;
                    if (low < high) product(item / blocks, item % blocks, low - from, high - from, w.weight[u], V, C);
                }
#pragma omp for schedule(dynamic, 4)
            for (long t = from; t < end; t++) output(C + (t - from) * padded, t, out);
        }
    }
};

template <int M, int R>
static void wg_filter(const Winograd& w, const float* in, float* out) {
    const Filtering<M, R> f{w};
    w.alone ? f.alone(in, out) : f.together(in, out);
}

// [batch][rows][columns] to [batch][columns][rows].
struct Layout {
    long batch, rows, columns;
};
static void wg_layout(const Layout& l, const float* in, float* out) {
    constexpr long B = 32;
    const long down = (l.rows + B - 1) / B, across = (l.columns + B - 1) / B;
#pragma omp for schedule(static)
    for (long item = 0; item < l.batch * down * across; item++) {
        const long n = item / (down * across), r0 = item / across % down * B, c0 = item % across * B;
        const long r1 = r0 + B < l.rows ? r0 + B : l.rows, c1 = c0 + B < l.columns ? c0 + B : l.columns;
        const float* x = in + n * l.rows * l.columns;
        float* y = out + n * l.rows * l.columns;
        float piece[B][B + 1];  // read line by line first: rows a multiple of the page apart would evict one another
        for (long r = r0; r < r1; r++) __builtin_memcpy(piece[r - r0], x + r * l.columns + c0, (c1 - c0) * 4);
        for (long c = c0; c < c1; c++)
            for (long r = r0; r < r1; r++) y[c * l.rows + r] = piece[r - r0][c - c0];
    }
}

enum Kind { WINDOW, WINOGRAD, LAYOUT };
struct Operation {
    int64_t kind, in, out;
    const void* what;
};

static void wg_operation(const Operation& op, float* const* buffers, const float* zeros) {
    const float* in = buffers[op.in];
    float* out = buffers[op.out];
    if (op.kind == WINDOW) return wg_window(*(const Window*)op.what, in, out, zeros);
    if (op.kind == LAYOUT) return wg_layout(*(const Layout*)op.what, in, out);
    wg_dispatch(*(const Winograd*)op.what, in, out);
}

// A chain of operators in one parallel region; buffers by number, `zeros` as long as the widest pixel.
extern "C" void wager_chain(const Operation* ops, long count, float* const* buffers, const float* zeros, long threads) {
#pragma omp parallel num_threads(threads)
    for (long i = 0; i < count; i++) wg_operation(ops[i], buffers, zeros);
}
extern "C" long wager_width() { return WIDTH; }
