// Candidates for the k nearest neighbours: a float32 scan under a proved error bound over the panels that boxes do not rule out.
//
// A group of query rows visits the panels nearest to it first, which makes its thresholds small: a row's threshold is the k-th smallest upper bound
// (computed squared distance + error) so far. A later panel is passed over where the distance to its box exceeds the threshold of every row, and
// only the rows that can reach it are multiplied with it, ROWS at a time in registers. A pair whose lower bound does not exceed the row's threshold is kept.
// A list that runs full of near-ties is decided in float64 on the spot, so it never overflows.
#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "distance.h"
#include "panels.h"

namespace {
constexpr int GROUP = 96, PARTS = GROUP / LANES;  // query rows that visit panels together
constexpr int64_t FIRST = 12;                     // panels visited before any is ruled out
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float BOX_SHARE = 1 + 0x1p-17f;  // covers the roundings of a distance to a box, and directions that are not quite orthonormal
typedef float vf __attribute__((vector_size(LANES * 4)));

inline vf all(float v) { return v - vf{}; }

inline vf load(const float* from) {
    vf v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// One bit a lane: a <= b.
inline uint32_t below(const vf& a, const vf& b) {
#if defined(__AVX512F__)
    __m512 x, y;
    std::memcpy(&x, &a, sizeof x), std::memcpy(&y, &b, sizeof y);
    return _mm512_cmp_ps_mask(x, y, _CMP_LE_OQ);
#elif defined(__AVX2__)
    __m256 x, y;
    std::memcpy(&x, &a, sizeof x), std::memcpy(&y, &b, sizeof y);
    return _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_LE_OQ));
#else
    uint32_t mask = 0;
    for (int l = 0; l < LANES; ++l) mask |= static_cast<uint32_t>(a[l] <= b[l]) << l;
    return mask;
#endif
}

inline vf larger(const vf& a, const vf& b) {
#if defined(__AVX512F__)
    __m512 x, y;
    std::memcpy(&x, &a, sizeof x), std::memcpy(&y, &b, sizeof y);
    x = _mm512_max_ps(x, y);
    vf out;
    std::memcpy(&out, &x, sizeof out);
    return out;
#else
    return a > b ? a : b;
#endif
}

struct Base {
    const double* exact;  // all base rows
    const float *panel, *norm2, *norm, *low, *high;
    const int32_t* row;  // of a column, counted from first_row
    int64_t first_row, columns, panels, d, dims;
};

struct Queries {
    const double* exact;
    const float *minus_twice, *norm2, *norm, *place;  // minus_twice_RD: -2 times the centred float32 row
    const int64_t* own;                               // the base row that a query is, or -1
};

struct Lists {  // of all query rows
    int k, capacity;
    float slack;  // the error bound is slack * (|a| + |b|)^2
    double scale2;
    int32_t* index;
    float *low, *high;
    int32_t* count;
    float* threshold;
};

// What one thread holds of the group it works on.
struct Group {
    int rows = 0;
    int64_t row[GROUP];
    alignas(64) float limit[GROUP];  // threshold
    alignas(64) float reach[GROUP];  // threshold * BOX_SHARE
    std::vector<float> query, near, far;  // [row][d]; [dims][GROUP] places less and plus their error
    std::vector<float> centre, bound, away;
    std::vector<int32_t> nearest;
    std::vector<uint8_t> visited;
    std::vector<float> scratch;
    std::vector<Pair> pairs;
    int64_t decided = 0;
};

void set_threshold(Group& g, int slot, float value, const Lists& lists) {
    lists.threshold[g.row[slot]] = g.limit[slot] = value;
    g.reach[slot] = value * BOX_SHARE;
}

// The k nearest of a list in float64; the others are beaten for good.
void settle(Group& g, int slot, const Base& base, const Queries& queries, const Lists& lists) {
    const int64_t row = g.row[slot], at = row * lists.capacity;
    const int n = lists.count[row];
    g.pairs.clear();
    for (int t = 0; t < n; ++t) {
        const int64_t j = lists.index[at + t];
        g.pairs.emplace_back(squared(queries.exact + row * base.d, base.exact + j * base.d, base.d), j);
    }
    std::partial_sort(g.pairs.begin(), g.pairs.begin() + lists.k, g.pairs.end());
    for (int t = 0; t < lists.k; ++t) {
        const double scaled = g.pairs[t].first * lists.scale2;
        lists.index[at + t] = static_cast<int32_t>(g.pairs[t].second);
        lists.low[at + t] = static_cast<float>(scaled * (1 - 0x1p-20));
        lists.high[at + t] = std::nextafter(static_cast<float>(scaled * (1 + 0x1p-20)), INFINITE);
    }
    lists.count[row] = lists.k, g.decided += n;
    set_threshold(g, slot, std::min(g.limit[slot], lists.high[at + lists.k - 1]), lists);
}

// Tighten the threshold to the k-th smallest upper bound and drop what lies above it.
void prune(Group& g, int slot, const Base& base, const Queries& queries, const Lists& lists) {
    const int64_t row = g.row[slot], at = row * lists.capacity;
    const int n = lists.count[row];
    if (n < lists.k) return;
    g.scratch.assign(lists.high + at, lists.high + at + n);
    std::nth_element(g.scratch.begin(), g.scratch.begin() + (lists.k - 1), g.scratch.end());
    set_threshold(g, slot, std::min(g.limit[slot], g.scratch[lists.k - 1]), lists);
    int kept = 0;
    for (int t = 0; t < n; ++t)
        if (lists.low[at + t] <= g.limit[slot]) {
            lists.index[at + kept] = lists.index[at + t];
            lists.low[at + kept] = lists.low[at + t], lists.high[at + kept] = lists.high[at + t];
            ++kept;
        }
    lists.count[row] = kept;
    if (kept > lists.capacity * 3 / 4) settle(g, slot, base, queries, lists);
}

void push(Group& g, int slot, int64_t column, float low, float high, const Base& base, const Queries& queries, const Lists& lists) {
    const int64_t row = g.row[slot], j = base.first_row + base.row[column];
    if (j == queries.own[row]) return;
    const int64_t at = row * lists.capacity + lists.count[row]++;
    lists.index[at] = static_cast<int32_t>(j), lists.low[at] = low, lists.high[at] = high;
    if (lists.count[row] == lists.capacity) prune(g, slot, base, queries, lists);
}

// M rows of the group against one panel.
template <int M>
void tile(Group& g, const int16_t* slots, int64_t p, const Base& base, const Queries& queries, const Lists& lists, float shrink) {
    vf acc[M][VECTORS] = {};
    const float* a[M];
    for (int r = 0; r < M; ++r) a[r] = g.query.data() + slots[r] * base.d;
    const float* b = base.panel + p * base.d * WIDTH;
    for (int64_t t = 0; t < base.d; ++t, b += WIDTH) {
        vf v[VECTORS];
#pragma GCC unroll 2
        for (int u = 0; u < VECTORS; ++u) v[u] = load(b + u * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < M; ++r)
#pragma GCC unroll 2
            for (int u = 0; u < VECTORS; ++u) acc[r][u] += a[r][t] * v[u];
    }
    vf b2[VECTORS], shrunk[VECTORS];
    for (int u = 0; u < VECTORS; ++u) b2[u] = load(base.norm2 + p * WIDTH + u * LANES), shrunk[u] = b2[u] * shrink;
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
        const int slot = slots[r];
        const int64_t row = g.row[slot];
        const vf reachable = all(g.limit[slot] - queries.norm2[row] * shrink);
        uint64_t hits = 0;
#pragma GCC unroll 2
        for (int u = 0; u < VECTORS; ++u) hits |= static_cast<uint64_t>(below(shrunk[u] + acc[r][u], reachable)) << (u * LANES);
        if (!hits) continue;
        alignas(64) float value[WIDTH];
        for (int u = 0; u < VECTORS; ++u) {
            const vf sum = (b2[u] + queries.norm2[row]) + acc[r][u];
            std::memcpy(value + u * LANES, &sum, sizeof sum);
        }
        for (; hits; hits &= hits - 1) {
            const int l = __builtin_ctzll(hits);
            const float reach = base.norm[p * WIDTH + l] + queries.norm[row], bound = lists.slack * reach * reach;
            if (value[l] - bound <= g.limit[slot]) push(g, slot, p * WIDTH + l, value[l] - bound, value[l] + bound, base, queries, lists);
        }
    }
}

using Tile = void (*)(Group&, const int16_t*, int64_t, const Base&, const Queries&, const Lists&, float);
template <int... M>
constexpr std::array<Tile, sizeof...(M)> tiles_of(std::integer_sequence<int, M...>) {
    return {tile<M + 1>...};
}
constexpr auto TILES = tiles_of(std::make_integer_sequence<int, ROWS>{});

// Slots of the group whose threshold reaches into the panel's box.
int reaching(const Group& g, int64_t p, const Base& base, int16_t* slots) {
    vf sum[PARTS] = {};
    uint32_t mask[PARTS];
    for (int64_t m = 0; m < base.dims; ++m) {
        const vf least = all(base.low[m * base.panels + p]), most = all(base.high[m * base.panels + p]);
#pragma GCC unroll 16
        for (int v = 0; v < PARTS; ++v) {
            const vf gap = larger(larger(least - load(g.far.data() + m * GROUP + v * LANES), load(g.near.data() + m * GROUP + v * LANES) - most), vf{});
            sum[v] += gap * gap;
        }
        if (m % 4 == 3 && m + 1 < base.dims) {
            uint32_t any = 0;
#pragma GCC unroll 16
            for (int v = 0; v < PARTS; ++v) any |= below(sum[v], load(g.reach + v * LANES));
            if (!any) return 0;
        }
    }
    int found = 0;
    for (int v = 0; v < PARTS; ++v)
        for (mask[v] = below(sum[v], load(g.reach + v * LANES)); mask[v]; mask[v] &= mask[v] - 1)
            slots[found++] = static_cast<int16_t>(v * LANES + __builtin_ctz(mask[v]));
    return found;
}

void visit(Group& g, int64_t p, const Base& base, const Queries& queries, const Lists& lists, float shrink) {
    int16_t slots[GROUP];
    const int found = reaching(g, p, base, slots);
    for (int from = 0; from < found; from += ROWS) TILES[std::min(ROWS, found - from) - 1](g, slots + from, p, base, queries, lists, shrink);
}

// Copies of the group's rows, and their places less and plus what rounding can do to them.
void gather(Group& g, const int32_t* order, int rows, const Base& base, const Queries& queries, const Lists& lists) {
    g.rows = rows;
    for (int s = 0; s < GROUP; ++s) {
        g.row[s] = order[std::min(s, rows - 1)];
        g.limit[s] = g.reach[s] = -INFINITE;
        if (s < rows) set_threshold(g, s, lists.threshold[g.row[s]], lists);
        std::memcpy(g.query.data() + s * base.d, queries.minus_twice + g.row[s] * base.d, base.d * sizeof(float));
        const float error = PLACE_ERROR * queries.norm[g.row[s]];
        for (int64_t m = 0; m < base.dims; ++m) {
            const float at = queries.place[g.row[s] * base.dims + m];
            g.near[m * GROUP + s] = at - error, g.far[m * GROUP + s] = at + error;
        }
    }
}

// For every panel: squared distance between its box and the group's, and between the middles (times four).
void survey(Group& g, const Base& base) {
    std::fill(g.bound.begin(), g.bound.end(), 0.0f), std::fill(g.away.begin(), g.away.end(), 0.0f);
    for (int64_t m = 0; m < base.dims; ++m) {
        const float* places = g.near.data() + m * GROUP;
        const float least = *std::min_element(places, places + GROUP);
        const float most = *std::max_element(g.far.data() + m * GROUP, g.far.data() + (m + 1) * GROUP);
        const float *low = base.low + m * base.panels, *high = base.high + m * base.panels;
        float *bound = g.bound.data(), *away = g.away.data();
#pragma omp simd
        for (int64_t p = 0; p < base.panels; ++p) {
            const float before = low[p] - most, after = least - high[p];
            float gap = before > after ? before : after;
            gap = gap > 0 ? gap : 0;
            const float middle = (low[p] + high[p]) - (least + most);
            bound[p] += gap * gap, away[p] += middle * middle;
        }
    }
}

void search(Group& g, const Base& base, const Queries& queries, const Lists& lists, float shrink) {
    survey(g, base);
    const int64_t first = std::min(FIRST, base.panels);
    std::iota(g.nearest.begin(), g.nearest.end(), 0);
    std::partial_sort(g.nearest.begin(), g.nearest.begin() + first, g.nearest.end(),
                      [&](int32_t a, int32_t b) { return g.away[a] != g.away[b] ? g.away[a] < g.away[b] : a < b; });
    std::fill(g.visited.begin(), g.visited.end(), 0);
    for (int64_t i = 0; i < first; ++i) {
        visit(g, g.nearest[i], base, queries, lists, shrink);
        g.visited[g.nearest[i]] = 1;
        for (int s = 0; s < g.rows; ++s)
            if (g.limit[s] == std::numeric_limits<float>::max()) prune(g, s, base, queries, lists);
    }
    for (int s = 0; s < g.rows; ++s) prune(g, s, base, queries, lists);
    float widest = *std::max_element(g.reach, g.reach + g.rows);
    for (int64_t p = 0; p < base.panels; ++p) {
        if (p % 64 == 0) widest = *std::max_element(g.reach, g.reach + g.rows);
        if (!g.visited[p] && g.bound[p] <= widest) visit(g, p, base, queries, lists, shrink);
    }
}
}  // namespace

extern "C" {

int wager_knn_width() { return WIDTH; }

// Scan the panels of base rows first_row.. against the query rows in `order` and update their lists. Returns how many pairs float64 decided.
int64_t wager_knn_scan(const double* exact_query, const float* minus_twice, const float* query_norm2, const float* query_norm,
                       const float* query_place, const int64_t* own, const int32_t* order, int64_t rows, const double* exact_base,
                       const float* panel, const float* norm2, const float* norm, const float* low_box, const float* high_box,
                       const int32_t* base_row, int64_t first_row, int64_t columns, int64_t d, int64_t dims, int k, int capacity,
                       float slack, double scale, int32_t* index, float* low, float* high, int32_t* count, float* threshold, int threads) {
    const Base base{exact_base, panel, norm2, norm, low_box, high_box, base_row, first_row, columns, (columns + WIDTH - 1) / WIDTH, d, dims};
    const Queries queries{exact_query, minus_twice, query_norm2, query_norm, query_place, own};
    const Lists lists{k, capacity, slack, scale * scale, index, low, high, count, threshold};
    // Cheap test before the exact one: slack (|a| + |b|)^2 <= 2 slack (|a|^2 + |b|^2), and as much again covers every rounding on the way,
    // because slack is at least 16 roundings of a float.
    const float shrink = 1.0f - 4.0f * slack;
    const int64_t groups = (rows + GROUP - 1) / GROUP;
    int64_t decided = 0;
#pragma omp parallel num_threads(threads) reduction(+ : decided)
    {
        Group g;
        g.query.resize(GROUP * d), g.near.resize(GROUP * dims), g.far.resize(GROUP * dims);
        g.bound.resize(base.panels), g.away.resize(base.panels), g.nearest.resize(base.panels), g.visited.resize(base.panels);
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < groups; ++group) {
            gather(g, order + group * GROUP, static_cast<int>(std::min<int64_t>(GROUP, rows - group * GROUP)), base, queries, lists);
            search(g, base, queries, lists, shrink);
        }
        decided = g.decided;
    }
    return decided;
}
}
