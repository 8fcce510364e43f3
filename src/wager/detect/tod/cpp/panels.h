// The layout that the neighbour scan shares with what prepares it: base points in panels of WIDTH columns.
//
// float32: panel[p][feature][lane]. int8 (levels of the common grid, four features to a word): words[p][feature / 4][lane][feature % 4].
#pragma once
#include <cstdint>

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;
#else
constexpr int LANES = 8, ROWS = 6;
#endif
constexpr int VECTORS = 2, WIDTH = LANES * VECTORS;

#if defined(__AVX512VNNI__)
constexpr bool HAS_INT8 = true;
#else
constexpr bool HAS_INT8 = false;  // without an instruction for it, int8 is not quicker than float32
#endif

// A row's place along a unit direction, computed in float64 and rounded to float32, is off by less than this share of the row's norm.
constexpr float PLACE_ERROR = 0x1p-20f;

// Scaled rows lie in [-1, 1]; LEVELS steps each side. A query is stored with OFFSET added, as an unsigned byte.
constexpr int LEVELS = 127, OFFSET = 128;
constexpr int32_t NOWHERE = 1 << 30;  // half of the squared length of a padding column: out of reach
inline int64_t words_of(int64_t d) { return (d + 3) / 4; }
