// Isolation trees: random feature, random cut between its extremes in the node, until depth or purity. The random stream (xorshift32, one seed per
// tree) and the bookkeeping of constant features are those of scikit-learn's extremely randomised trees with one candidate feature, so
// that equal seeds give equal trees.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace {
struct Stream {
    uint32_t state;
    uint32_t next() {
        if (state == 0) state = 1;
        state ^= state << 13, state ^= state >> 17, state ^= state << 5;
        return state % 2147483648u;
    }
};

struct Tree {
    int64_t* feature;  // -1 marks a leaf
    double* cut;
    int64_t *left, *right, *size;
};

struct Pending {
    int64_t start, end, depth, parent, constants;
    bool is_left;
};

// One split of rows [start, end): returns the border, or `end` when every feature is constant.
int64_t split(const float* x, int64_t d, std::vector<int64_t>& row, std::vector<int64_t>& order, std::vector<int64_t>& constant,
              const Pending& at, Stream& random, int64_t& constants, int64_t& feature, double& cut) {
    int64_t last = d, found = 0, drawn = 0, total = at.constants, visited = 0, border = at.end;
    const int64_t known = at.constants;
    while (last > total && (visited < 1 || visited <= found + drawn)) {
        ++visited;
        int64_t pick = drawn + static_cast<int64_t>(random.next() % static_cast<uint64_t>(last - found - drawn));
        if (pick < known) {
            std::swap(order[drawn], order[pick]);
            ++drawn;
            continue;
        }
        pick += found;
        const int64_t f = order[pick];
        float low = x[row[at.start] * d + f], high = low;
        for (int64_t i = at.start + 1; i < at.end; ++i) {
            const float v = x[row[i] * d + f];
            low = std::min(low, v), high = std::max(high, v);
        }
        if (high <= low + 1e-7f) {
            std::swap(order[pick], order[total]);
            ++found, ++total;
            continue;
        }
        --last;
        std::swap(order[last], order[pick]);
        cut = (static_cast<double>(high) - low) * random.next() / 2147483647.0 + low;
        if (cut == high) cut = low;
        feature = f;
        border = std::partition(row.begin() + at.start, row.begin() + at.end, [&](int64_t r) { return x[r * d + f] <= cut; }) - row.begin();
    }
    std::copy(constant.begin(), constant.begin() + known, order.begin());
    std::copy(order.begin() + known, order.begin() + known + found, constant.begin() + known);
    constants = total;
    return border;
}
}  // namespace

extern "C" {

// Grow `trees` trees of at most `nodes` nodes each from sample_TS rows. Returns nothing; size[.] counts the rows of a node.
void wager_forest_grow(const float* x, int64_t d, const int64_t* sample, const uint32_t* seed, int64_t trees, int64_t samples,
                       int64_t depth, int64_t nodes, int64_t* feature, double* cut, int64_t* left, int64_t* right, int64_t* size,
                       int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t t = 0; t < trees; ++t) {
        Tree tree{feature + t * nodes, cut + t * nodes, left + t * nodes, right + t * nodes, size + t * nodes};
        std::vector<int64_t> row(sample + t * samples, sample + (t + 1) * samples), order(d), constant(d);
        std::sort(row.begin(), row.end());
        std::iota(order.begin(), order.end(), 0);
        Stream random{seed[t]};
        std::vector<Pending> stack{{0, samples, 0, -1, 0, false}};
        int64_t used = 0;
        while (!stack.empty()) {
            const Pending at = stack.back();
            stack.pop_back();
            const int64_t id = used++;
            if (at.parent >= 0) (at.is_left ? tree.left : tree.right)[at.parent] = id;
            tree.size[id] = at.end - at.start, tree.feature[id] = -1;
            if (at.depth >= depth || at.end - at.start < 2) continue;
            int64_t constants = at.constants, f = -1;
            double c = 0;
            const int64_t border = split(x, d, row, order, constant, at, random, constants, f, c);
            if (border >= at.end) continue;
            tree.feature[id] = f, tree.cut[id] = c;
            stack.push_back({border, at.end, at.depth + 1, id, constants, false});
            stack.push_back({at.start, border, at.depth + 1, id, constants, true});
        }
    }
}

// Sum over the trees of each row's path length: edges to its leaf plus `extra` for the rows the leaf still holds.
void wager_forest_paths(const float* x, int64_t rows, int64_t d, int64_t trees, int64_t nodes, const int64_t* feature, const double* cut,
                        const int64_t* left, const int64_t* right, const double* extra, double* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 256)
    for (int64_t r = 0; r < rows; ++r) {
        double total = 0;
        for (int64_t t = 0; t < trees; ++t) {
            int64_t at = t * nodes, depth = 0;
            for (; feature[at] >= 0; ++depth) at = t * nodes + (x[r * d + feature[at]] <= cut[at] ? left[at] : right[at]);
            total += depth + extra[at];
        }
        out[r] = total;
    }
}
}
