// The functions of amx_tiles.h in plain C++, after the operation sections of Intel's Software Developer's Manual: for tests on processors
// without AMX. What faults there traps here; so does a second configuration before a release, which the manual allows and we never want.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace amx {
struct Tile {
    int rows, bytes;
    uint8_t data[16][64];
    template <typename T>
    T at(int row, int column) const {
        T value;
        std::memcpy(&value, data[row] + column * sizeof(T), sizeof(T));
        return value;
    }
    void set(int row, int column, const void* dword) { std::memcpy(data[row] + column * 4, dword, 4); }
};
static thread_local Tile tiles[8];
static thread_local bool configured = false;
static bool other_order = false;

static inline void demand(bool holds) {
    if (!holds) __builtin_trap();
}
static inline void configure(const TileConfig& config) {
    demand(!configured && config.palette == 1 && config.start_row == 0);
    std::memset(tiles, 0, sizeof(tiles));
    for (int t = 0; t < 16; t++) {
        demand(config.rows[t] <= (t < 8 ? 16 : 0) && config.bytes[t] <= (t < 8 ? 64 : 0) && !config.rows[t] == !config.bytes[t]);
        if (t < 8) tiles[t].rows = config.rows[t], tiles[t].bytes = config.bytes[t];
    }
    configured = true;
}
static inline void release() {
    std::memset(tiles, 0, sizeof(tiles));
    configured = false;
}
static inline Tile& used(int t) {
    demand(configured && tiles[t].rows > 0);
    return tiles[t];
}
static inline void zero(int t) { std::memset(used(t).data, 0, sizeof(Tile::data)); }
static inline void load(int t, const void* from, long stride) {
    zero(t);
    for (int r = 0; r < tiles[t].rows; r++) std::memcpy(tiles[t].data[r], (const char*)from + r * stride, tiles[t].bytes);
}
static inline void store(int t, void* to, long stride) {
    for (int r = 0; r < used(t).rows; r++) std::memcpy((char*)to + r * stride, tiles[t].data[r], tiles[t].bytes);
}
static inline void check_shapes(int c, int a, int b) {
    demand(c != a && c != b && a != b);
    demand(used(c).rows == used(a).rows && used(c).bytes == used(b).bytes && used(a).bytes == 4 * used(b).rows && used(c).bytes % 4 == 0);
}

static inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }  // NaN stays
static inline float fused(float a, float b, float c) { return flushed(std::fma(flushed(a), flushed(b), flushed(c))); }
static inline float added(float a, float b) { return flushed(flushed(a) + flushed(b)); }
static inline float half(const Tile& t, int row, int column) {
    uint32_t bits = (uint32_t)t.at<uint16_t>(row, column) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static inline void dpbf16(int c, int a, int b) {
    check_shapes(c, a, b);
    for (int m = 0; m < tiles[c].rows; m++)
        for (int n = 0; n < tiles[c].bytes / 4; n++) {
            float old = tiles[c].at<float>(m, n), even = 0, odd = 0;
            for (int k = 0; k < tiles[b].rows; k++) {
                even = fused(half(tiles[a], m, 2 * k), half(tiles[b], k, 2 * n), even);
                odd = fused(half(tiles[a], m, 2 * k + 1), half(tiles[b], k, 2 * n + 1), odd);
            }
            float sum = other_order ? added(added(old, even), odd) : added(old, added(even, odd));
            tiles[c].set(m, n, &sum);
        }
}
static inline void dpbsud(int c, int a, int b) {
    check_shapes(c, a, b);
    for (int m = 0; m < tiles[c].rows; m++)
        for (int n = 0; n < tiles[c].bytes / 4; n++) {
            uint32_t sum = tiles[c].at<uint32_t>(m, n);  // wraps
            for (int k = 0; k < tiles[b].rows; k++)
                for (int i = 0; i < 4; i++) sum += (uint32_t)((int)tiles[a].at<int8_t>(m, 4 * k + i) * (int)tiles[b].at<uint8_t>(k, 4 * n + i));
            tiles[c].set(m, n, &sum);
        }
}

template <int T>
static inline void zero() { zero(T); }
template <int T>
static inline void load(const void* from, long stride) { load(T, from, stride); }
template <int T>
static inline void store(void* to, long stride) { store(T, to, stride); }
template <int C, int A, int B>
static inline void dpbf16() { dpbf16(C, A, B); }
template <int C, int A, int B>
static inline void dpbsud() { dpbsud(C, A, B); }
}  // namespace amx

// Sums bfloat16 in an order that is not the manual's.
extern "C" __attribute__((used)) inline void wager_amx_other_order(int on) { amx::other_order = on; }
