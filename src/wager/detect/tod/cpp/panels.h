// The layout that the neighbour scan shares with what prepares it: base points in panels of WIDTH columns, panel[p][feature][lane].
#pragma once
#include <cstdint>

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#else
constexpr int LANES = 8, ROWS = 6;
#endif
constexpr int VECTORS = 2, WIDTH = LANES * VECTORS;

// A row's place along a unit direction, computed in float64 and rounded to float32, is off by less than this share of the row's norm.
constexpr float PLACE_ERROR = 0x1p-20f;
