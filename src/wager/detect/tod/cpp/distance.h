// The float64 distance that decides, and the order among equal ones.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

using Pair = std::pair<double, int64_t>;  // squared distance, row: compared in this order, so ties go to the smaller row

// Squared distance in float64: eight running sums over the features, folded in a fixed order. Every path of the library uses this one
// compiled function, so that equal distances are equal bits.
double squared(const double* a, const double* b, int64_t d);
