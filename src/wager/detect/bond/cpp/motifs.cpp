// Induced motif counts per node of a simple undirected graph in CSR form (rows sorted): triangles, paths of three nodes, K4, diamonds, C4, degree.
//
// Every edge (u, v) with common neighbours W: a pair of W that is adjacent closes a K4 (seen once per each of its six edges), one that is
// not makes a diamond with chord (u, v) (seen once). Four-cycles through v, induced or not, are pairs of common neighbours with any other
// node; a K4 holds three through each node and a diamond one, the rest is induced.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

extern "C" void wager_motifs(const int64_t* start, const int64_t* neighbor, int64_t n, double* out_N6, int threads) {
    const auto degree = [&](int64_t v) { return start[v + 1] - start[v]; };
    std::vector<double> triangle(n, 0), k4(n, 0), diamond(n, 0);
#pragma omp parallel num_threads(threads)
    {
        std::vector<int64_t> mark(n, -1), common, touched;
        std::vector<int64_t> paths(n, 0);
        std::vector<double> my_k4(n, 0), my_diamond(n, 0), my_triangle(n, 0);
#pragma omp for schedule(dynamic, 32)
        for (int64_t u = 0; u < n; ++u) {
            for (int64_t e = start[u]; e < start[u + 1]; ++e) mark[neighbor[e]] = u;
            for (int64_t e = start[u]; e < start[u + 1]; ++e) {
                const int64_t v = neighbor[e];
                if (v < u) continue;
                common.clear();
                for (int64_t f = start[v]; f < start[v + 1]; ++f)
                    if (mark[neighbor[f]] == u) common.push_back(neighbor[f]);
                for (const int64_t w : common) my_triangle[w] += 1;  // each triangle once per edge: the opposite node counts it
                for (size_t a = 0; a < common.size(); ++a) {
                    const int64_t w = common[a];
                    const int64_t* at = neighbor + start[w];
                    for (size_t b = a + 1; b < common.size(); ++b) {
                        at = std::lower_bound(at, neighbor + start[w + 1], common[b]);
                        const bool joined = at != neighbor + start[w + 1] && *at == common[b];
                        for (const int64_t node : {u, v, w, common[b]}) (joined ? my_k4 : my_diamond)[node] += 1;
                    }
                }
            }
            touched.clear();
            double cycles = 0;
            for (int64_t e = start[u]; e < start[u + 1]; ++e)
                for (int64_t f = start[neighbor[e]]; f < start[neighbor[e] + 1]; ++f) {
                    const int64_t w = neighbor[f];
                    if (w == u) continue;
                    if (paths[w] == 0) touched.push_back(w);
                    cycles += static_cast<double>(paths[w]++);
                }
            for (const int64_t w : touched) paths[w] = 0;
            out_N6[u * 6 + 4] = cycles;
        }
#pragma omp critical
        for (int64_t v = 0; v < n; ++v) triangle[v] += my_triangle[v], k4[v] += my_k4[v], diamond[v] += my_diamond[v];
    }
    for (int64_t v = 0; v < n; ++v) {
        double ends = 0;
        for (int64_t e = start[v]; e < start[v + 1]; ++e) ends += static_cast<double>(degree(neighbor[e]) - 1);
        const double d = static_cast<double>(degree(v)), t = triangle[v], four = k4[v] / 6;
        double* out = out_N6 + v * 6;
        out[0] = t, out[1] = d * (d - 1) / 2 - t + ends - 2 * t, out[2] = four, out[3] = diamond[v];
        out[4] -= diamond[v] + 3 * four, out[5] = d;
    }
}
