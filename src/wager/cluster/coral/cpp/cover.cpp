// The cheapest numbers of columns whose whole-numbered rates add up to `units` or more: the covering knapsack, by dynamic program.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

extern "C" {

// most[i]: copies of column i at most, negative where there is no limit. Returns the least cost (infinite where all together are too few); counts [columns].
double wager_coral_cover(int units, int columns, const double* cost, const int* rate, const int* most, int* counts) {
    std::vector<double> least(units + 1, INFINITY);
    std::vector<int> last(units + 1, -1), free, copies;
    for (int i = 0; i < columns; ++i) {
        counts[i] = 0;
        if (rate[i] <= 0) continue;
        if (most[i] < 0) free.push_back(i);
        else copies.insert(copies.end(), std::min(most[i], (units + rate[i] - 1) / rate[i]), i);
    }
    least[0] = 0;
    for (int w = 1; w <= units; ++w)
        for (int i : free) {
            const double with = cost[i] + least[std::max(0, w - rate[i])];
            if (with < least[w]) {
                least[w] = with;
                last[w] = i;
            }
        }
    std::vector<std::vector<uint8_t>> taken(copies.size(), std::vector<uint8_t>(units + 1, 0));
    for (size_t k = 0; k < copies.size(); ++k)
        for (int w = units, i = copies[k]; w > 0; --w) {
            const double with = cost[i] + least[std::max(0, w - rate[i])];
            if (with < least[w]) {
                least[w] = with;
                taken[k][w] = 1;
            }
        }
    if (std::isinf(least[units])) return INFINITY;
    int w = units;
    for (size_t k = copies.size(); k-- > 0;)
        if (taken[k][w]) {
            ++counts[copies[k]];
            w = std::max(0, w - rate[copies[k]]);
        }
    for (; w > 0; w = std::max(0, w - rate[last[w]])) ++counts[last[w]];
    return least[units];
}
}
