// What attention is asked to do, and how that is cut into items of work.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "attention_pairs.h"

constexpr int TILE = 64;      // query rows (tokens times heads of the group) of a tile, at most; more when one token has more heads
constexpr int DIRECT = 8;      // query rows up to which bfloat16 keys are used where they lie
constexpr long PIECE = 1024;  // keys of a piece, a multiple of PAIR_KEYS
constexpr long BLOCK_BYTES = 128 << 10;  // of keys and values that an item takes in at once: they and the next fit a part of the second-level cache
constexpr double SERIAL_PRODUCTS = 1 << 17;  // below, waking other threads costs more than they save

template <typename E>
constexpr bool PAIRS = HAS_PAIRS && std::is_same_v<E, bf16>;
template <typename E>
constexpr int BLOCK = PAIRS<E> ? PAIR_KEYS : KEYS;

struct Args {
    const float* q;  // [T, H, K], tokens q_token apart
    const float *new_k, *new_v;  // rows to store first, [T, G * K] and [T, G * V], or null; tokens new_k_token and new_v_token apart
    const int64_t* slots;        // where they go; -1: nowhere
    const float* sinks;          // [H] or null: a score per head that takes part in the softmax but carries no value
    int64_t q_token, new_k_token, new_v_token;
    const void *k_pool, *v_pool;
    long k_slot, k_head, v_slot, v_head;  // strides in elements
    const int32_t *tables, *starts, *contexts;
    const int64_t* positions;
    const int64_t* mask;  // [T, words] or null
    float* out;           // [T, H, V]
    int64_t tokens, spans, table_width, heads, kv_heads, key_dim, value_dim, block_size, window, words;  // window 0: none
    float scale, softcap;                                                                              // softcap 0: none
    int threads;
};

struct Item {
    int32_t span, head, heads, first, count;  // key/value heads [head, head + heads), query tokens [first, first + count) of the span
    int64_t key0, key1;
    int64_t partial;  // row of the partial results, -1: the only piece
};

// One more than the highest mask bit of some rows: cached rows of a tree that is grown level by level may precede the span's own.
static long masked_keys(const Args& a, long row, long count) {
    for (long w = a.words - 1; w >= 0; w--) {
        uint64_t any = 0;
        for (long i = row; i < row + count; i++) any |= (uint64_t)a.mask[i * a.words + w];
        if (any) return w * 64 + 64 - __builtin_clzll(any);
    }
    return 0;
}

// The keys that some query of a tile may see: [from, last).
struct Range {
    long from, last;
};

static Range range_of(const Args& a, int32_t span, long first, long count) {
    long context = a.contexts[span], row = a.starts[span] + first;
    Range range{0, context + (a.mask ? masked_keys(a, row, count) : first + count)};
    if (!a.window) return range;
    long lowest = *std::min_element(a.positions + row, a.positions + row + count);
    range.from = std::max<long>(0, std::min(lowest - a.window + 1, context)) / PAIR_KEYS * PAIR_KEYS;
    return range;
}

struct Plan {
    std::vector<Item> items;
    std::vector<std::pair<long, long>> tiles;  // first item and number of pieces, for tiles cut into several
    long partial_rows = 0;
    int threads = 1;
};

// Key/value heads that an item takes: as many as a block leaves room for, while there are pieces enough for the threads; one for many queries.
template <typename E>
static long heads_together(const Args& a, long rows, long pieces) {
    if (rows > DIRECT) return 1;
    long fitting = std::max<long>(1, BLOCK_BYTES / (BLOCK<E> * (a.key_dim + a.value_dim) * (long)sizeof(E)));
    return std::clamp<long>(pieces * a.kv_heads / (4 * a.threads), 1, std::min<long>(fitting, a.kv_heads));
}

template <typename E>
static Plan plan_of(const Args& a) {
    Plan plan;
    long group = a.heads / a.kv_heads, tile = std::max<long>(1, TILE / group), pieces = 0;
    double products = 0;
    std::vector<std::pair<Item, Range>> tiles;
    for (int32_t span = 0; span < a.spans; span++) {
        long length = a.starts[span + 1] - a.starts[span];
        for (long first = 0; first < length; first += tile) {
            long count = std::min(tile, length - first);
            Range range = range_of(a, span, first, count);
            tiles.push_back({{span, 0, 0, (int32_t)first, (int32_t)count, 0, 0, -1}, range});
            pieces += (range.last - range.from + PIECE - 1) / PIECE;
            products += (double)(range.last - range.from) * count * a.heads * (a.key_dim + a.value_dim);
        }
    }
    for (auto& [item, range] : tiles) {
        long heads = heads_together<E>(a, item.count * group, pieces);
        for (item.head = 0; item.head < a.kv_heads; item.head += (int32_t)heads) {
            long begin = (long)plan.items.size();
            item.heads = (int32_t)std::min(heads, a.kv_heads - item.head);
            for (item.key0 = range.from; item.key0 < range.last; item.key0 = item.key1) {
                item.key1 = std::min(range.last, (item.key0 / PIECE + 1) * PIECE);
                plan.items.push_back(item);
            }
            long count = (long)plan.items.size() - begin;
            if (count < 2) continue;
            for (long c = begin; c < begin + count; c++) plan.items[c].partial = plan.partial_rows, plan.partial_rows += item.heads * item.count * group;
            plan.tiles.push_back({begin, count});
        }
    }
    plan.threads = products > SERIAL_PRODUCTS ? a.threads : 1;
    return plan;
}
