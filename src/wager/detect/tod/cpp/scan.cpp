// Candidates for the k nearest neighbours: a scan in float32 or int8 under a proved error bound, over the panels that boxes do not rule out.
//
// A group of query rows visits the panels nearest to it first, which makes its thresholds small. A panel is passed over where the distance to its
// box exceeds the threshold of every row, and only the rows that can reach it are multiplied with it, ROWS at a time in registers.
#include <omp.h>

#include <numeric>

#include "tiles.h"

namespace {
constexpr int PARTS = GROUP / LANES;
constexpr int64_t FIRST = 64;  // panels visited in order of distance

// Slots of the group whose threshold reaches into the panel's box.
int reaching(const Group& g, int64_t p, const Base& base, int16_t* slots) {
    vf sum[PARTS] = {};
    for (int64_t m = 0; m < base.dims; ++m) {
        const vf least = all(base.low_box[m * base.panels + p]), most = all(base.high_box[m * base.panels + p]);
        const float *near = g.near.data() + m * GROUP, *far = g.far.data() + m * GROUP;
#pragma GCC unroll 16
        for (int v = 0; v < PARTS; ++v) {
            const vf gap = larger(larger(least - load(far + v * LANES), load(near + v * LANES) - most), vf{});
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
        for (uint32_t mask = below(sum[v], load(g.reach + v * LANES)); mask; mask &= mask - 1)
            slots[found++] = static_cast<int16_t>(v * LANES + __builtin_ctz(mask));
    return found;
}

void visit(Group& g, int64_t p, const Problem& problem, const std::array<Tile, ROWS>& tiles) {
    int16_t slots[GROUP];
    const int found = reaching(g, p, problem.base, slots);
    for (int from = 0; from < found; from += ROWS) tiles[std::min(ROWS, found - from) - 1](g, slots + from, p, problem);
}

// Copies of the group's rows, and their places less and plus what rounding can do to them.
void gather(Group& g, const int32_t* order, int rows, const Problem& problem) {
    const auto& [base, queries, lists] = problem;
    const int64_t bytes = words_of(base.d) * 4;
    g.rows = rows;
    for (int s = 0; s < GROUP; ++s) {
        const int64_t row = g.row[s] = order[std::min(s, rows - 1)];
        g.limit[s] = g.reach[s] = -INFINITE;
        if (s < rows) set_threshold(g, s, lists.threshold[row], problem);
        if (queries.words)
            std::copy_n(queries.words + row * bytes, bytes, g.words.data() + s * bytes);
        else
            std::copy_n(queries.minus_twice + row * base.d, base.d, g.query.data() + s * base.d);
        const float error = PLACE_ERROR * queries.norm[row];
        for (int64_t m = 0; m < base.dims; ++m) {
            const float at = queries.place[row * base.dims + m];
            g.near[m * GROUP + s] = at - error, g.far[m * GROUP + s] = at + error;
        }
    }
}

// For every panel: squared distance between its box and the group's, and between their middles (times four).
void survey(Group& g, const Base& base) {
    std::fill(g.bound.begin(), g.bound.end(), 0.0f), std::fill(g.away.begin(), g.away.end(), 0.0f);
    for (int64_t m = 0; m < base.dims; ++m) {
        const float least = *std::min_element(g.near.data() + m * GROUP, g.near.data() + (m + 1) * GROUP);
        const float most = *std::max_element(g.far.data() + m * GROUP, g.far.data() + (m + 1) * GROUP);
        const float *low = base.low_box + m * base.panels, *high = base.high_box + m * base.panels;
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

void search(Group& g, const Problem& problem, const std::array<Tile, ROWS>& tiles) {
    const int64_t panels = problem.base.panels, first = std::min(FIRST, panels);
    survey(g, problem.base);
    std::iota(g.nearest.begin(), g.nearest.end(), 0);
    std::partial_sort(g.nearest.begin(), g.nearest.begin() + first, g.nearest.end(),
                      [&](int32_t a, int32_t b) { return g.away[a] != g.away[b] ? g.away[a] < g.away[b] : a < b; });
    std::fill(g.visited.begin(), g.visited.end(), 0);
    for (int64_t i = 0; i < first; ++i) {
        visit(g, g.nearest[i], problem, tiles);
        g.visited[g.nearest[i]] = 1;
        for (int s = 0; s < g.rows; ++s)
            if (g.limit[s] == UNKNOWN) prune(g, s, problem);
    }
    for (int s = 0; s < g.rows; ++s) prune(g, s, problem);
    float widest = 0;
    for (int64_t p = 0; p < panels; ++p) {
        if (p % 64 == 0) widest = *std::max_element(g.reach, g.reach + g.rows);
        if (!g.visited[p] && g.bound[p] <= widest) visit(g, p, problem, tiles);
    }
}
}  // namespace

extern "C" {

int wager_knn_width() { return WIDTH; }
int wager_knn_has_int8() { return HAS_INT8; }

// Scan the panels of base rows first_row.. against the query rows in `order` and update their lists: in int8 where levels are given, else in float32.
// Returns how many pairs float64 decided on the way.
int64_t wager_knn_scan(const double* query, const float* minus_twice, const float* query_norm2, const float* query_norm, const float* place,
                       const uint8_t* query_words, const int32_t* length, const float* query_residual, const int64_t* own,
                       const int32_t* order, int64_t rows, const double* exact, const float* panel, const float* norm2, const float* norm,
                       const float* longest, const float* low_box, const float* high_box, const int8_t* words, const int32_t* half,
                       const int32_t* odd, const float* residual, const float* coarsest, const int32_t* base_row, int64_t first_row,
                       int64_t columns, int64_t d, int64_t dims, int k, int capacity, float slack, double scale, int32_t* index,
                       float* low, float* high, int32_t* count, float* threshold, int threads) {
    const Problem problem{
        {exact, panel, norm2, norm, longest, words, half, odd, residual, coarsest, low_box, high_box, base_row, first_row, columns,
         (columns + WIDTH - 1) / WIDTH, d, dims},
        {query, minus_twice, query_norm2, query_norm, place, query_words, length, query_residual, own},
        {k, capacity, slack, scale * scale, index, low, high, count, threshold}};
    const auto& tiles = query_words ? INT8 : FP32;
    const int64_t groups = (rows + GROUP - 1) / GROUP;
    int64_t settled = 0;
#pragma omp parallel num_threads(threads) reduction(+ : settled)
    {
        Group g;
        query_words ? g.words.resize(GROUP * words_of(d) * 4) : g.query.resize(GROUP * d);
        g.near.resize(GROUP * dims), g.far.resize(GROUP * dims);
        for (auto* each : {&g.bound, &g.away}) each->resize(problem.base.panels);
        g.nearest.resize(problem.base.panels), g.visited.resize(problem.base.panels);
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < groups; ++group) {
            gather(g, order + group * GROUP, static_cast<int>(std::min<int64_t>(GROUP, rows - group * GROUP)), problem);
            search(g, problem, tiles);
        }
        settled = g.settled;
    }
    return settled;
}
}
