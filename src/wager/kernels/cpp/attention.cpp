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
constexpr int DIRECT = 8;      // query rows up to which bfloat16 keys are used where they lie
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
    std::vector<float> q, k, v, acc, top, total, scores;
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

// Where the keys and values of a block lie: a row each, in the pools or in widened copies.
template <typename E>
struct Rows {
    const E *k[KEYS], *v[KEYS];
};

// Rows past `count` repeat the last one: they may be read, and their scores are thrown away.
template <typename E>
static inline void find_rows(const Args& a, const Item& item, long key0, int count, Rows<E>& rows) {
    const int32_t* table = a.tables + item.span * a.table_width;
    const E *k = (const E*)a.k_pool + item.kv_head * a.k_head, *v = (const E*)a.v_pool + item.kv_head * a.v_head;
    int32_t page = (int32_t)key0 / (int32_t)a.block_size, inside = (int32_t)key0 % (int32_t)a.block_size;
    for (int j = 0; j < count; j++) {
        long slot = (long)table[page] * a.block_size + inside;
        rows.k[j] = k + slot * a.k_slot, rows.v[j] = v + slot * a.v_slot;
        if (++inside == a.block_size) inside = 0, page++;
    }
    for (int j = count; j < KEYS; j++) rows.k[j] = rows.k[count - 1], rows.v[j] = rows.v[count - 1];
}

template <typename E>
static inline void fetch_ahead(const E* const* rows, int count, long width) {
    for (int j = 0; j < count; j++)
        for (long byte = 0; byte < width * (long)sizeof(E); byte += 64) __builtin_prefetch((const char*)rows[j] + byte);
}

template <typename E>
static void widen_rows(const E* const* rows, int count, long width, long padded, float* to) {
    for (int j = 0; j < count; j++) {
        long d = 0;
        for (; d + VL <= width; d += VL) store(to + j * padded + d, load(rows[j] + d));
        for (; d < width; d++) to[j * padded + d] = widen(rows[j][d]);
    }
}

// Scores of ROWS queries with TOGETHER keys, UNIT apart, as lanes of `partial`: what is left to add is between different UNITs.
template <int ROWS, int TOGETHER, typename E>
static inline void score_tile(const float* q, long padded, const E* const* keys, vf* partial) {
    constexpr int UNIT = VL / TOGETHER;
    vf products[ROWS][TOGETHER] = {};
    for (long d = 0; d < padded; d += VL)
        for (int i = 0; i < TOGETHER; i++) {
            vf x = load(keys[i * UNIT] + d);
            for (int r = 0; r < ROWS; r++) products[r][i] += x * load(q + r * padded + d);
        }
    for (int r = 0; r < ROWS; r++) partial[r * UNIT] = sums<UNIT, UNIT>(products[r]);
}

// Scores of ROWS queries with a block of keys. Every score is one chain over the width per lane, then one tree over the lanes.
template <int ROWS, typename E>
static inline void scores_of(const float* q, long padded, const E* const* keys, int count, float scale, float* out) {
    constexpr int TOGETHER = ROWS == 1 && VL > 4 ? 8 : ROWS > 3 && VL < 16 ? 2 : 4, UNIT = VL / TOGETHER;
    for (int j = 0; j < count; j += VL) {
        vf partial[ROWS * UNIT];
        for (int u = 0; u < UNIT; u++) score_tile<ROWS, TOGETHER>(q, padded, keys + j + u, partial + u);
        for (int r = 0; r < ROWS; r++) store(out + r * KEYS + j, join<UNIT>(partial + r * UNIT) * scale);
    }
}

// acc = acc * rescale + p * values over `count` keys for ROWS queries and WIDTH vectors of the value; the sums stay in registers.
template <int ROWS, int WIDTH, typename E>
static inline void add_slice(const float* p, const E* const* values, int count, long d, long padded, float* acc, const float* rescale) {
    vf sums[ROWS][WIDTH];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < WIDTH; i++) sums[r][i] = load(acc + r * padded + d + i * VL) * rescale[r];
    for (int j = 0; j < count; j++)
        for (int i = 0; i < WIDTH; i++) {
            vf value = load(values[j] + d + i * VL);
            for (int r = 0; r < ROWS; r++) sums[r][i] += value * p[r * KEYS + j];
        }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < WIDTH; i++) store(acc + r * padded + d + i * VL, sums[r][i]);
}

template <int ROWS, typename E>
static inline void add_values(const float* p, const E* const* values, int count, long padded, float* acc, const float* rescale) {
    constexpr int WIDTH = VL < 16 && ROWS > 3 ? 2 : 4;  // so that the sums fit into the registers
    long d = 0;
    for (; d + WIDTH * VL <= padded; d += WIDTH * VL) add_slice<ROWS, WIDTH>(p, values, count, d, padded, acc, rescale);
    for (; d < padded; d += VL) add_slice<ROWS, 1>(p, values, count, d, padded, acc, rescale);
}

// One over the softmax's denominator, for sums taken relative to `top`.
static float inverse_total(const Args& a, long head, float top, float total) {
    if (!(total > 0)) return 0.0f;
    return 1.0f / (a.sinks ? total + std::exp(a.sinks[head] - top) : total);
}

// The softmax of ROWS queries takes in a block: `scores` become its weights, `rescale` what earlier sums must be multiplied with.
static inline void weigh(float* scores, float& top, float& total, float& rescale) {
    vf most = load(scores);
    for (int j = VL; j < KEYS; j += VL) most = vmax(most, load(scores + j));
    float highest_yet = std::max(top, highest(most));
    rescale = top == highest_yet ? 1.0f : top == -INFINITY ? 0.0f : std::exp(top - highest_yet);
    vf added{};
    for (int j = 0; j < KEYS; j += VL) {
        vf e = exp_v(load(scores + j) - highest_yet);
        store(scores + j, e);
        added += e;
    }
    total = total * rescale + sum(added);
    top = highest_yet;
}

// ROWS query heads of one token, whose running softmax is in row r of the scratch, take in a block of `count` keys and values.
template <int ROWS, typename E>
static inline void take_in(const Args& a, Scratch& s, const Rows<E>& rows, int count, const bool* shown, long r, long kp, long vp) {
    float *scores = s.scores.data(), rescale[ROWS];
    scores_of<ROWS>(s.q.data() + r * kp, kp, rows.k, count, a.scale, scores);
    for (int i = 0; i < ROWS; i++) {
        float* p = scores + i * KEYS;
        if (a.softcap > 0)
            for (int j = 0; j < count; j++) p[j] = a.softcap * std::tanh(p[j] / a.softcap);
        for (int j = shown ? 0 : count; j < KEYS; j++)
            if (j >= count || !shown[j]) p[j] = -INFINITY;
        weigh(p, s.top[r + i], s.total[r + i], rescale[i]);
    }
    add_values<ROWS>(scores, rows.v, count, vp, s.acc.data() + r * vp, rescale);
}

// All queries of an item take in a block. A query that sees none of its keys is left as it is.
template <typename E>
static void take_in_block(const Args& a, const Item& item, Scratch& s, const Rows<E>& rows, long key, int count, long kp, long vp) {
    long group = a.heads / a.kv_heads, context = a.contexts[item.span], row0 = a.starts[item.span];
    for (long i = 0; i < item.count; i++) {
        long token = item.first + i, position = a.positions[row0 + token], r = i * group;
        bool shown[KEYS], all = key + count <= context && (!a.window || key > position - a.window), any = all;
        if (!all)
            for (int j = 0; j < count; j++) any |= shown[j] = visible(a, item.span, token, context, key + j, position);
        if (!any) continue;
        const bool* which = all ? nullptr : shown;
        long h = 0;
        for (; h + 4 <= group; h += 4) take_in<4>(a, s, rows, count, which, r + h, kp, vp);
        if (h + 3 == group) take_in<3>(a, s, rows, count, which, r + h, kp, vp);
        if (h + 2 == group) take_in<2>(a, s, rows, count, which, r + h, kp, vp);
        if (h + 1 == group) take_in<1>(a, s, rows, count, which, r + h, kp, vp);
    }
}

// `next`: the item after this one on the same thread, or null; its first keys are fetched while the last ones here are used.
template <typename E>
static void run(const Args& a, const Item& item, const Item* next, Scratch& s, float* partial) {
    long group = a.heads / a.kv_heads, n = item.count * group;
    long kp = rounded(a.key_dim), vp = rounded(a.value_dim);
    long row0 = a.starts[item.span];
    // Widened copies pay when many queries share them, or when a row has no whole number of vectors.
    bool copies = kp != a.key_dim || vp != a.value_dim || (sizeof(E) < 4 && n > DIRECT);
    s.q.assign(n * kp, 0.0f), s.acc.assign(n * vp, 0.0f), s.top.assign(n, -INFINITY), s.total.assign(n, 0.0f), s.scores.resize(4 * KEYS);
    if (copies) s.k.assign(KEYS * kp, 0.0f), s.v.assign(KEYS * vp, 0.0f);
    for (long i = 0; i < item.count; i++)
        for (long h = 0; h < group; h++)
            std::copy_n(a.q + (row0 + item.first + i) * a.q_token + (item.kv_head * group + h) * a.key_dim, a.key_dim, s.q.data() + (i * group + h) * kp);
    Rows<E> rows, ahead;
    Rows<float> copied;
    for (int j = 0; j < KEYS; j++) copied.k[j] = s.k.data() + j * kp, copied.v[j] = s.v.data() + j * vp;
    find_rows(a, item, item.key0, (int)std::min<long>(KEYS, item.key1 - item.key0), ahead);
    for (long key = item.key0; key < item.key1; key += KEYS) {
        int count = (int)std::min<long>(KEYS, item.key1 - key);
        rows = ahead;
        const Item* coming = key + KEYS < item.key1 ? &item : next;
        if (coming) {
            long from = coming == &item ? key + KEYS : next->key0;
            int some = (int)std::min<long>(KEYS, coming->key1 - from);
            find_rows(a, *coming, from, some, ahead);
            fetch_ahead(ahead.k, some, a.key_dim);
            fetch_ahead(ahead.v, some, a.value_dim);
        }
        if (copies) {
            widen_rows(rows.k, count, a.key_dim, kp, s.k.data());
            widen_rows(rows.v, count, a.value_dim, vp, s.v.data());
            take_in_block(a, item, s, copied, key, count, kp, vp);
        } else {
            take_in_block(a, item, s, rows, key, count, kp, vp);
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
        long end = std::min(n, (c + 1) * claim);
        for (long i = c * claim; i < end; i++) run<E>(a, items[i], i + 1 < end ? &items[i + 1] : nullptr, scratch, partial.data());
    });
    each(threads, (long)tiles.size(), [&](long i) { combine(a, &items[tiles[i].first], tiles[i].second, partial.data()); });
}

extern "C" {
void wager_attention_f32(const Args* a) { attention<float>(*a); }
void wager_attention_bf16(const Args* a) { attention<bf16>(*a); }
void wager_attention_fp8(const Args* a) { attention<fp8>(*a); }
}
