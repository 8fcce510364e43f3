#pragma once
// (node, token) -> child, for nodes with many children.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

// Open addressing with deletion by shifting back.
struct ChildIndex {
    std::vector<uint64_t> keys;
    std::vector<int32_t> values;
    size_t used = 0;
    static constexpr uint64_t FREE = ~0ull;
    static uint64_t key(int32_t node, int32_t token) { return (uint64_t)(uint32_t)node << 32 | (uint32_t)token; }
    size_t home(uint64_t k) const { return (k * 0x9E3779B97F4A7C15ull >> 20) & (keys.size() - 1); }
    size_t find(uint64_t k) const {
        size_t i = home(k);
        while (keys[i] != FREE && keys[i] != k) i = (i + 1) & (keys.size() - 1);
        return i;
    }
    int32_t get(int32_t node, int32_t token) const {
        if (keys.empty()) return -1;
        size_t i = find(key(node, token));
        return keys[i] == FREE ? -1 : values[i];
    }
    void put(int32_t node, int32_t token, int32_t child) {
        if (2 * (used + 1) > keys.size()) grow();
        size_t i = find(key(node, token));
        if (keys[i] == FREE) used++;
        keys[i] = key(node, token), values[i] = child;
    }
    void erase(int32_t node, int32_t token) {
        if (keys.empty()) return;
        size_t hole = find(key(node, token)), mask = keys.size() - 1;
        if (keys[hole] == FREE) return;
        used--;
        for (size_t i = (hole + 1) & mask; keys[i] != FREE; i = (i + 1) & mask)
            if (((i - home(keys[i])) & mask) >= ((i - hole) & mask)) keys[hole] = keys[i], values[hole] = values[i], hole = i;
        keys[hole] = FREE;
    }
    void grow() {
        std::vector<uint64_t> old_keys(std::max<size_t>(64, 2 * keys.size()), FREE);
        std::vector<int32_t> old_values(old_keys.size());
        old_keys.swap(keys), old_values.swap(values);
        for (size_t i = 0; i < old_keys.size(); i++)
            if (old_keys[i] != FREE) {
                size_t j = find(old_keys[i]);
                keys[j] = old_keys[i], values[j] = old_values[i];
            }
    }
};

}  // namespace
