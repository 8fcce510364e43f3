// Attention of ragged spans over paged keys and values: prompt chunks, decode tokens and token trees in one kernel.
//
// Work is cut into (span, key/value head, tile of query tokens, piece of the keys). Each piece runs an online softmax in float32 over
// blocks of keys at fixed cache indices; pieces are combined in order. So a query's result depends on its keys alone, not on how queries
// were grouped into chunks or batches.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"
#include "simd.h"

constexpr int KEYS = 32;      // keys of a block
constexpr int TILE = 32;      // query rows (tokens times heads of the group) of a tile, at most; more when one token has more heads
constexpr long PIECE = 1024;  // keys of a piece, a multiple of KEYS

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
    int32_t span, kv_head, first, count;  // query tokens [first, first + count) of the span
    int64_t key0, key1;
    int64_t partial;  // row of the partial results, -1: the only piece
};

static long rounded(long width) { return (width + VL - 1) / VL * VL; }

struct Scratch {
    std::vector<float> q, k, v, acc, top, total, rescale, scores;
};

static bool visible(const Args& a, int32_t span, long i, long context, long key, long position) {
    long row0 = a.starts[span];
    if (key >= context) {
        long j = key - context;
        if (a.mask ? !((a.mask[(row0 + i) * a.words + j / 64] >> (j % 64)) & 1) : j > i) return false;
    }
    if (!a.window) return true;
    long key_position = key < context ? key : a.positions[row0 + std::min(key - context, (long)(a.starts[span + 1] - row0 - 1))];
    return key_position > position - a.window;
}

// One more than the highest mask bit of some rows: cached rows of a tree that is grown level by level may precede the span's own.
static long masked_keys(const Args& a, long row, long count) {
    for (long w = a.words - 1; w >= 0; w--) {
        uint64_t any = 0;
        for (long i = row; i < row + count; i++) any |= (uint64_t)a.mask[i * a.words + w];
        if (any) return w * 64 + 64 - __builtin_clzll(any);
    }
    return 0;
}

template <typename E>
static inline const E* row_of(const Args& a, const E* pool, const int32_t* table, long slot_stride, long offset, long key) {
    return pool + ((long)table[key / a.block_size] * a.block_size + key % a.block_size) * slot_stride + offset;
}

template <typename E>
static void fetch_ahead(const Args& a, const E* pool, const int32_t* table, long slot_stride, long offset, long key0, int count, long width) {
    for (int j = 0; j < count; j++) {
        const char* row = (const char*)row_of(a, pool, table, slot_stride, offset, key0 + j);
        for (long byte = 0; byte < width * (long)sizeof(E); byte += 64) __builtin_prefetch(row + byte);
    }
}

template <typename E>
static void gather(const Args& a, const E* pool, const int32_t* table, long slot_stride, long offset, long key0, int count, long width, long padded, float* to) {
    for (int j = 0; j < count; j++) {
        const E* row = row_of(a, pool, table, slot_stride, offset, key0 + j);
        long d = 0;
        for (; d + VL <= width; d += VL) store(to + j * padded + d, load(row + d));
        for (; d < width; d++) to[j * padded + d] = widen(row[d]);
    }
}

// Scores of one query with a block of keys; VL keys advance together, one accumulator each.
static inline void scores_of(const float* q, const float* keys, int count, long padded, float scale, float softcap, float* out) {
    for (int j = 0; j < KEYS && j < count; j += VL) {
        vf products[VL] = {};
        const float* k = keys + j * padded;
        for (long d = 0; d < padded; d += VL) {
            vf x = load(q + d);
            for (int i = 0; i < VL; i++) products[i] += x * load(k + i * padded + d);
        }
        store(out + j, sums(products) * scale);
    }
    if (softcap > 0)
        for (int j = 0; j < count; j++) out[j] = softcap * std::tanh(out[j] / softcap);
}

// acc = acc * rescale + p * values over `count` keys for ROWS queries at once; their sums stay in registers, by slices of the value width.
template <int ROWS>
static inline void add_values(const float* p, const float* values, int count, long padded, float* acc, const float* rescale) {
    constexpr int SLICE = 4;
    for (long d0 = 0; d0 < padded; d0 += SLICE * VL) {
        int n = (int)std::min<long>(SLICE, (padded - d0) / VL);
        vf sums[ROWS][SLICE];
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < n; i++) sums[r][i] = load(acc + r * padded + d0 + i * VL) * rescale[r];
        auto add = [&](int width) __attribute__((always_inline)) {
            for (int j = 0; j < count; j++)
                for (int i = 0; i < width; i++) {
                    vf value = load(values + j * padded + d0 + i * VL);
                    for (int r = 0; r < ROWS; r++) sums[r][i] += value * p[r * KEYS + j];
                }
        };
        n == SLICE ? add(SLICE) : add(n);
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < n; i++) store(acc + r * padded + d0 + i * VL, sums[r][i]);
    }
}

// One over the softmax's denominator, for sums taken relative to `top`.
static float inverse_total(const Args& a, long head, float top, float total) {
    if (!(total > 0)) return 0.0f;
    return 1.0f / (a.sinks ? total + std::exp(a.sinks[head] - top) : total);
}

template <typename E>
static void run(const Args& a, const Item& item, Scratch& s, float* partial) {
    long group = a.heads / a.kv_heads, rows = item.count * group;
    long kp = rounded(a.key_dim), vp = rounded(a.value_dim);
    long row0 = a.starts[item.span], context = a.contexts[item.span];
    const int32_t* table = a.tables + item.span * a.table_width;
    s.q.assign(rows * kp, 0.0f), s.acc.assign(rows * vp, 0.0f), s.k.assign(KEYS * kp, 0.0f), s.v.assign(KEYS * vp, 0.0f);
    s.top.assign(rows, -INFINITY), s.total.assign(rows, 0.0f), s.scores.resize(group * KEYS), s.rescale.resize(group);
    for (long i = 0; i < item.count; i++)
        for (long h = 0; h < group; h++)
            std::copy_n(a.q + (row0 + item.first + i) * a.q_token + (item.kv_head * group + h) * a.key_dim, a.key_dim, s.q.data() + (i * group + h) * kp);
    for (long key = item.key0; key < item.key1; key += KEYS) {
        int count = (int)std::min<long>(KEYS, item.key1 - key);
        if (key + KEYS < item.key1) {
            int next = (int)std::min<long>(KEYS, item.key1 - key - KEYS);
            fetch_ahead<E>(a, (const E*)a.k_pool, table, a.k_slot, item.kv_head * a.k_head, key + KEYS, next, a.key_dim);
            fetch_ahead<E>(a, (const E*)a.v_pool, table, a.v_slot, item.kv_head * a.v_head, key + KEYS, next, a.value_dim);
        }
        gather<E>(a, (const E*)a.k_pool, table, a.k_slot, item.kv_head * a.k_head, key, count, a.key_dim, kp, s.k.data());
        gather<E>(a, (const E*)a.v_pool, table, a.v_slot, item.kv_head * a.v_head, key, count, a.value_dim, vp, s.v.data());
        for (long i = 0; i < item.count; i++) {
            long token = item.first + i, position = a.positions[row0 + token];
            bool shown[KEYS];
            bool all = key + count <= context && (!a.window || key > position - a.window), any = all;
            if (!all)
                for (int j = 0; j < count; j++) any |= shown[j] = visible(a, item.span, token, context, key + j, position);
            if (!any) continue;
            for (long h = 0; h < group; h++) {
                long r = i * group + h;
                float* p = s.scores.data() + h * KEYS;
                scores_of(s.q.data() + r * kp, s.k.data(), count, kp, a.scale, a.softcap, p);
                for (int j = 0; j < KEYS; j++)
                    if (j >= count || (!all && !shown[j])) p[j] = -INFINITY;
                vf most = load(p);
                for (int j = VL; j < KEYS; j += VL) most = vmax(most, load(p + j));
                float top = std::max(s.top[r], highest(most));
                s.rescale[h] = s.top[r] == -INFINITY ? 0.0f : std::exp(s.top[r] - top);
                vf total{};
                for (int j = 0; j < KEYS; j += VL) {
                    vf e = exp_v(load(p + j) - top);
                    store(p + j, e);
                    total += e;
                }
                s.total[r] = s.total[r] * s.rescale[h] + sum(total);
                s.top[r] = top;
            }
            float* acc = s.acc.data() + i * group * vp;
            long h = 0;
            for (; h + 3 <= group; h += 3) add_values<3>(s.scores.data() + h * KEYS, s.v.data(), count, vp, acc + h * vp, &s.rescale[h]);
            for (; h < group; h++) add_values<1>(s.scores.data() + h * KEYS, s.v.data(), count, vp, acc + h * vp, &s.rescale[h]);
        }
    }
    for (long i = 0; i < item.count; i++)
        for (long h = 0; h < group; h++) {
            long r = i * group + h, out_row = (row0 + item.first + i) * a.heads + item.kv_head * group + h;
            if (item.partial < 0) {
                float inverse = inverse_total(a, item.kv_head * group + h, s.top[r], s.total[r]);
                for (long d = 0; d < a.value_dim; d++) a.out[out_row * a.value_dim + d] = s.acc[r * vp + d] * inverse;
            } else {
                float* to = partial + (item.partial + r) * (a.value_dim + 2);
                to[0] = s.top[r], to[1] = s.total[r];
                std::copy_n(s.acc.data() + r * vp, a.value_dim, to + 2);
            }
        }
}

// Combine the pieces of one tile in order of their keys.
static void combine(const Args& a, const Item* pieces, long count, const float* partial) {
    long group = a.heads / a.kv_heads, width = a.value_dim + 2;
    const Item& item = pieces[0];
    for (long r = 0; r < item.count * group; r++) {
        float top = -INFINITY, total = 0;
        for (long c = 0; c < count; c++) top = std::max(top, partial[(pieces[c].partial + r) * width]);
        float* out = a.out + ((a.starts[item.span] + item.first + r / group) * a.heads + item.kv_head * group + r % group) * a.value_dim;
        std::fill_n(out, a.value_dim, 0.0f);
        for (long c = 0; c < count; c++) {
            const float* from = partial + (pieces[c].partial + r) * width;
            if (from[0] == -INFINITY) continue;
            float factor = std::exp(from[0] - top);
            total += from[1] * factor;
            for (long d = 0; d < a.value_dim; d++) out[d] += from[2 + d] * factor;
        }
        float inverse = inverse_total(a, item.kv_head * group + r % group, top, total);
        for (long d = 0; d < a.value_dim; d++) out[d] *= inverse;
    }
}

template <typename E>
static void store_rows(const float* from, long token_stride, long width, const Args& a, E* pool) {
    for (long t = 0; t < a.tokens; t++)
        if (a.slots[t] >= 0)
            narrow_n(from + t * token_stride, width, pool + a.slots[t] * width);
}

template <typename E>
static void attention(const Args& a) {
    if (a.new_k) store_rows(a.new_k, a.new_k_token, a.kv_heads * a.key_dim, a, (E*)a.k_pool);
    if (a.new_v) store_rows(a.new_v, a.new_v_token, a.kv_heads * a.value_dim, a, (E*)a.v_pool);
    long group = a.heads / a.kv_heads, tile = std::max<long>(1, TILE / group), partial_rows = 0;
    std::vector<Item> items;
    std::vector<std::pair<long, long>> tiles;  // first item and number of pieces, for tiles cut into several
    for (int32_t span = 0; span < a.spans; span++) {
        long length = a.starts[span + 1] - a.starts[span], context = a.contexts[span];
        for (long first = 0; first < length; first += tile) {
            long count = std::min(tile, length - first);
            long last = context + (a.mask ? masked_keys(a, a.starts[span] + first, count) : first + count), from = 0;
            if (a.window) {
                long lowest = a.positions[a.starts[span] + first];
                for (long i = 1; i < count; i++) lowest = std::min<long>(lowest, a.positions[a.starts[span] + first + i]);
                from = std::max<long>(0, std::min(lowest - a.window + 1, context)) / KEYS * KEYS;
            }
            for (int32_t head = 0; head < a.kv_heads; head++) {
                long begin = (long)items.size();
                for (long key = from; key < last; key = (key / PIECE + 1) * PIECE)
                    items.push_back({span, head, (int32_t)first, (int32_t)count, key, std::min(last, (key / PIECE + 1) * PIECE), -1});
                long pieces = (long)items.size() - begin;
                if (pieces < 2) continue;
                for (long c = begin; c < begin + pieces; c++) items[c].partial = partial_rows, partial_rows += count * group;
                tiles.push_back({begin, pieces});
            }
        }
    }
    std::vector<float> partial(partial_rows * (a.value_dim + 2));
    int threads = a.tokens * a.heads > 16 || (long)items.size() > a.kv_heads ? a.threads : 1;
    // The heads of a span lie side by side in the pools: where there is work enough, one thread takes several in a row.
    long n = (long)items.size(), claim = std::max<long>(1, std::min<long>(a.kv_heads, n / (threads * 8)));
    each(threads, (n + claim - 1) / claim, [&](long c) {
        thread_local Scratch scratch;
        for (long i = c * claim; i < std::min(n, (c + 1) * claim); i++) run<E>(a, items[i], scratch, partial.data());
    });
    each(threads, (long)tiles.size(), [&](long i) { combine(a, &items[tiles[i].first], tiles[i].second, partial.data()); });
}

extern "C" {
void wager_attention_f32(const Args* a) { attention<float>(*a); }
void wager_attention_bf16(const Args* a) { attention<bf16>(*a); }
}
