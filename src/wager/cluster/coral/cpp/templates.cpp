// The best pipeline of every multiset of machines: which machines share a stage, what part of the latency budget a stage has.
//
// A rate is reachable if the layers that the stages can hold at that rate add up to all. Over subsets of the machines (bits of a mask) and units of
// the budget that is a dynamic program: most layers of `mask` with `u` units = max over its first stage. From a rate that is reached, the best rate
// of the arrangement that reached it follows layer by layer; when nothing beats it, it is the optimum.
//
// Multisets are taken by size. Two that together have the machines of a larger one replace it when they serve as much: then only whether the larger
// one serves more is asked, which one pass of the program answers.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int MOST_MACHINES = 8, MOST_UNITS = 64;
constexpr double BETTER = 1 + 1e-9;

// Tables of tokens/s [unit][kind][layers + 1] for stages of 1 to `most` units; the stages of a pipeline have `units` together.
struct Grid {
    int units, most;
    const double* tables;
};

struct Arrangement {
    double rate = 0;
    int grid = -1, stages = 0;
    int mask[MOST_MACHINES], units[MOST_MACHINES];
};

class Search {
  public:
    Search(const std::vector<Grid>& grids, int kinds, int layers) : grids_(grids), kinds_(kinds), layers_(layers) {}

    // The best arrangement whose rate is above `floor`; grid -1 where there is none.
    Arrangement best(const int* kinds, int count, double floor) {
        kind_ = kinds;
        count_ = count;
        Arrangement found;
        found.rate = floor;
        for (bool better = true; better;) {
            better = false;
            for (size_t g = 0; g < grids_.size(); ++g)
                while (reach(grids_[g], std::max(found.rate * BETTER, 1e-30), found)) {
                    found.grid = (int)g;
                    better = grids_.size() > 1;
                }
        }
        return found;
    }

  private:
    // Rows of tokens/s by layers of the machines of a stage.
    struct Stage {
        const double* rows[MOST_MACHINES];
        int count = 0;
        double rate(int layers) const {
            double sum = 0;
            for (int i = 0; i < count; ++i) sum += rows[i][layers];
            return sum;
        }
    };

    Stage stage_of(const Grid& g, int mask, int units) const {
        Stage stage;
        for (int k = 0; k < count_; ++k)
            if (mask >> k & 1)
                stage.rows[stage.count++] = g.tables + ((int64_t)(units - 1) * kinds_ + kind_[k]) * (layers_ + 1);
        return stage;
    }

    // Most layers that a stage holds at a rate; it holds `low`.
    int held(const Stage& stage, double rate, int low) const {
        if (low >= layers_ || stage.rate(low + 1) < rate) return low;
        int high = layers_;
        for (++low; low < high;) {
            const int middle = (low + high + 1) / 2;
            if (stage.rate(middle) >= rate) low = middle;
            else high = middle - 1;
        }
        return low;
    }

    // Whether all layers are held at `rate`; then `found` becomes an arrangement that does, with its best rate.
    bool reach(const Grid& g, double rate, Arrangement& found) {
        const int all = (1 << count_) - 1;
        for (int mask = 1; mask <= all; ++mask) {
            const int fewer = mask & (mask - 1);
            for (int u = 1; u <= g.most; ++u) {
                const int low = std::max(u > 1 ? held_[mask][u - 1] : 0, fewer ? held_[fewer][u] : 0);
                held_[mask][u] = (int16_t)held(stage_of(g, mask, u), rate, low);
            }
        }
        std::fill_n(most_[0], g.units + 1, (int16_t)0);
        for (int mask = 2; mask <= all; ++mask)
            if (!(mask & 1) || mask == all) join(g, mask);  // the first machine's stage is taken off first
        if (count_ == 1) join(g, all);
        if (most_[all][g.units] < layers_) return false;
        arrange(g, found);
        raise(g, rate, found);
        return true;
    }

    // most_[mask] from smaller masks: its first machine's stage, then the rest.
    void join(const Grid& g, int mask) {
        int16_t* into = most_[mask];
        std::fill_n(into, g.units + 1, (int16_t)0);
        const int first = mask & -mask, others = mask ^ first;
        for (int part = others;; part = (part - 1) & others) {
            const int16_t *mine = held_[part | first], *rest = most_[others ^ part];
            for (int u = 1, before = 0; u <= g.most; ++u) {
                if (mine[u] == before) continue;  // no better than with fewer units
                before = mine[u];
                for (int total = u; total <= g.units; ++total)
                    into[total] = std::max(into[total], (int16_t)(rest[total - u] + mine[u]));
            }
            if (!part) break;
        }
    }

    void arrange(const Grid& g, Arrangement& found) const {
        int mask = (1 << count_) - 1, units = g.units;
        found.stages = 0;
        while (mask && most_[mask][units] > 0) take_off(g, mask, units, found);
        found.mask[0] |= mask;  // who holds nothing slows no stage
    }

    void take_off(const Grid& g, int& mask, int& units, Arrangement& found) const {
        const int first = mask & -mask, others = mask ^ first;
        for (int part = others;; part = (part - 1) & others)
            for (int u = 1, stage = part | first; u <= std::min(g.most, units); ++u)
                if (held_[stage][u] && most_[mask ^ stage][units - u] + held_[stage][u] == most_[mask][units]) {
                    found.mask[found.stages] = stage;
                    found.units[found.stages++] = u;
                    mask ^= stage;
                    units -= u;
                    return;
                }
    }

    // Give back the layers that are too many, always from the slowest stage: what is left is the arrangement's best rate.
    void raise(const Grid& g, double at_least, Arrangement& a) const {
        Stage stage[MOST_MACHINES];
        int layers[MOST_MACHINES], extra = -layers_;
        double rate[MOST_MACHINES];
        for (int s = 0; s < a.stages; ++s) {
            stage[s] = stage_of(g, a.mask[s], a.units[s]);
            layers[s] = held(stage[s], at_least, 0);
            rate[s] = stage[s].rate(layers[s]);
            extra += layers[s];
        }
        for (; extra > 0; --extra) {
            const int s = (int)(std::min_element(rate, rate + a.stages) - rate);
            rate[s] = --layers[s] ? stage[s].rate(layers[s]) : INFINITY;
        }
        a.rate = *std::min_element(rate, rate + a.stages);
    }

    const std::vector<Grid>& grids_;
    const int kinds_, layers_;
    const int* kind_ = nullptr;
    int count_ = 0;
    int16_t held_[1 << MOST_MACHINES][MOST_UNITS + 1], most_[1 << MOST_MACHINES][MOST_UNITS + 1];
};

// Numbers of multisets: those of one size, ordered by largest machine first, from 0.
class Ranks {
  public:
    Ranks(int kinds, int size) : binomial_(kinds + size, std::vector<int64_t>(size + 1, 0)) {
        for (int n = 0; n < kinds + size; ++n)
            for (int k = 0; k <= std::min(n, size); ++k)
                binomial_[n][k] = k == 0 || k == n ? 1 : binomial_[n - 1][k - 1] + binomial_[n - 1][k];
    }
    int64_t of(const int* ascending, int count) const {
        int64_t rank = 0;
        for (int i = 0; i < count; ++i) rank += binomial_[ascending[i] + i][i + 1];
        return rank;
    }

  private:
    std::vector<std::vector<int64_t>> binomial_;
};

struct Library {
    int kinds, most_machines;
    const int64_t* first;   // [most_machines] where the multisets of each size begin
    const int8_t* machines; // [multisets, most_machines] ascending
    const uint8_t* fits;    // [multisets]
    double *rates, *together;
    int8_t *stages, *units, *grids;
    uint8_t* useful;
};

// The most that two multisets serve that share out the machines of a larger one.
double parts(const Library& lib, const Ranks& ranks, const int* kind, int count) {
    double best = 0;
    for (int mask = 1; mask < 1 << (count - 1); ++mask) {
        int left[MOST_MACHINES], right[MOST_MACHINES], l = 0, r = 0;
        for (int k = 0; k < count; ++k) (mask >> k & 1 ? left[l++] : right[r++]) = kind[k];
        best = std::max(best, lib.together[lib.first[l - 1] + ranks.of(left, l)] + lib.together[lib.first[r - 1] + ranks.of(right, r)]);
    }
    return best;
}

void solve(const Library& lib, const Ranks& ranks, Search& search, int64_t at, int count, bool every) {
    int kind[MOST_MACHINES];
    for (int k = 0; k < count; ++k) kind[k] = lib.machines[at * lib.most_machines + k];
    const double replaced = count > 1 ? parts(lib, ranks, kind, count) : 0;
    lib.together[at] = replaced;
    if (!lib.fits[at]) return;
    const bool exact = every || kind[0] == kind[count - 1];
    const Arrangement found = search.best(kind, count, exact ? 0 : replaced);
    if (found.grid < 0) return;
    lib.rates[at] = found.rate;
    lib.useful[at] = found.rate > replaced * BETTER;
    lib.together[at] = std::max(found.rate, replaced);
    lib.grids[at] = (int8_t)found.grid;
    for (int s = 0; s < found.stages; ++s) {
        lib.units[at * lib.most_machines + s] = (int8_t)found.units[s];
        for (int k = 0; k < count; ++k)
            if (found.mask[s] >> k & 1) lib.stages[at * lib.most_machines + k] = (int8_t)s;
    }
}

}  // namespace

extern "C" {

// units, most [grids]; tables [grids][most][kinds][layers + 1]. Out: rates (0: none, or not above its parts), together, stages [.., machines], units of
// each stage [.., machines], grids, useful. `every`: the exact rate also where two smaller multisets serve as much.
void wager_coral_templates(int kinds, int layers, int most_machines, int grids, const int* units, const int* most, const double* const* tables,
                           const int64_t* first, const int64_t* counts, const int8_t* machines, const uint8_t* fits, int every, double* rates,
                           double* together, int8_t* stages, int8_t* stage_units, int8_t* grid, uint8_t* useful) {
    std::vector<Grid> all;
    for (int g = 0; g < grids; ++g) all.push_back({units[g], most[g], tables[g]});
    const Ranks ranks(kinds, most_machines);
    const Library lib{kinds, most_machines, first, machines, fits, rates, together, stages, stage_units, grid, useful};
    for (int count = 1; count <= most_machines; ++count) {
#pragma omp parallel
        {
            Search search(all, kinds, layers);
#pragma omp for schedule(dynamic, 256)
            for (int64_t i = 0; i < counts[count - 1]; ++i) solve(lib, ranks, search, first[count - 1] + i, count, every != 0);
        }
    }
}
}
