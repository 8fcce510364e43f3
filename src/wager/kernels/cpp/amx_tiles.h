// The tile instructions of AMX that the linear uses, one function each. Template arguments number tile registers, 0 to 7.
//
// WAGER_TILES: this build has them. WAGER_AMX_EMULATED, for tests, takes them from amx_emulated.h.
#pragma once
#include <cstdint>

#if defined(WAGER_AMX_EMULATED) || (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__))
#define WAGER_TILES 1

struct alignas(64) TileConfig {  // rows and bytes of a row of every register; both 0: not used
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

#if defined(WAGER_AMX_EMULATED)
#include "amx_emulated.h"
#else
namespace amx {
static inline void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
static inline void release() { asm volatile("tilerelease" : : : "memory"); }
template <int T>
static inline void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
// Rows that begin `stride` bytes apart.
template <int T>
static inline void load(const void* from, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline void store(void* to, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}
// C += A B. A holds pairs of bfloat16 along a row, B the pairs of 16 outputs in a row.
template <int C, int A, int B>
static inline void dpbf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
// C += A B in int32: four int8 of A by four uint8 of B at a time.
template <int C, int A, int B>
static inline void dpbsud() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
}  // namespace amx
#endif
#endif
