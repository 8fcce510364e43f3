// Attention of ragged spans over paged keys and values: prompt chunks, decode tokens and token trees in one kernel.
//
// Work is cut into (span, key/value heads, tile of query tokens, piece of the keys). Each piece runs an online softmax in float32 over
// blocks of keys at fixed cache indices; pieces are combined in order. So a query's result depends on its keys alone, not on how queries
// were grouped into chunks or batches. Keys and values are read once for all query heads of their group; few queries take all heads of a
// cache row in one go, as it lies in memory, many queries share a widened copy of one head's block.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention_plan.h"
#include "pool.h"

// What one thread keeps of an item: for each head, for each query row (token, head of the group).
struct Scratch {
    std::vector<float> q, k, v, acc, top, totals, scores, rescale, fresh, bias;
    std::vector<uint32_t> q_pairs, k_pairs, v_pairs, weight_pairs;
};

// Sizes of an item. `copies`: blocks are widened first, which pays when many queries share them, or when rows have no whole number of pairs.
struct Layout {
    long group, rows, kp, vp;
    bool copies, latent;  // latent: values are the first part of the keys
};

template <typename E>
static Layout layout_of(const Args& a, const Item& item) {
    Layout l;
    l.group = a.heads / a.kv_heads, l.rows = item.count * l.group;
    l.kp = padded_width(a.key_dim), l.vp = padded_width(a.value_dim);
    l.copies = !PAIRS<E> && (l.kp != a.key_dim || l.vp != a.value_dim || (sizeof(E) < 4 && l.rows > DIRECT));
    l.latent = a.v_pool == a.k_pool && a.v_slot == a.k_slot && a.v_head == a.k_head && l.vp == a.value_dim && a.value_dim <= a.key_dim;
    return l;
}

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

// One over the softmax's denominator, for sums taken relative to `top`.
static float inverse_total(const Args& a, long head, float top, float total) {
    if (!(total > 0)) return 0.0f;
    return 1.0f / (a.sinks ? total + std::exp(a.sinks[head] - top) : total);
}

// Where a block's keys and values of the item's first head lie. Rows past `count` repeat the last one: they may be read, and their scores are
// thrown away.
template <typename E>
struct Rows {
    const E *k[BLOCK<E>], *v[BLOCK<E>];
};

template <typename E>
static inline void find_rows(const Args& a, const Item& item, long key0, int count, Rows<E>& rows) {
    const int32_t* table = a.tables + item.span * a.table_width;
    const E *k = (const E*)a.k_pool + item.head * a.k_head, *v = (const E*)a.v_pool + item.head * a.v_head;
    int32_t page = (int32_t)key0 / (int32_t)a.block_size, inside = (int32_t)key0 % (int32_t)a.block_size;
    for (int j = 0; j < count; j++) {
        long slot = (long)table[page] * a.block_size + inside;
        rows.k[j] = k + slot * a.k_slot, rows.v[j] = v + slot * a.v_slot;
        if (++inside == a.block_size) inside = 0, page++;
    }
    for (int j = count; j < BLOCK<E>; j++) rows.k[j] = rows.k[count - 1], rows.v[j] = rows.v[count - 1];
}

// `ahead` will fetch these rows, of all heads of the item they belong to, in `calls` calls.
template <typename E>
static void aim(const Args& a, const Item& item, const Rows<E>& rows, int count, bool latent, long calls, Ahead& ahead) {
    ahead.start(count, ((item.heads - 1) * a.k_head + a.key_dim) * (long)sizeof(E), ((item.heads - 1) * a.v_head + a.value_dim) * (long)sizeof(E));
    for (int j = 0; j < count; j++) ahead.add(rows.k[j]);
    for (int j = 0; j < count && !latent; j++) ahead.add(rows.v[j]);
    ahead.share(calls);
}

// Scores of the keys that a token does not see become -inf, whatever they were: past the last key lie leftovers. `hidden` is the token's row,
// 0 or -inf for each key of the block.
static void hide(float* scores, long rows, long stride, int count, const float* hidden) {
    for (long r = 0; r < rows; r++)
        for (int j = 0; j < count; j += VL) {
            vf which = load(hidden + j);
            store(scores + r * stride + j, which == 0.0f ? load(scores + r * stride + j) : which);
        }
}

// 0 for the keys [key, key + count) that a token sees, else -inf, also for more up to `block`. False when it sees `block` keys, and then
// `hidden` is not written.
static bool hidden_keys(const Args& a, const Item& item, long token, long key, int count, int block, float* hidden) {
    long context = a.contexts[item.span], position = a.positions[a.starts[item.span] + token];
    bool windowed = a.window && key <= position - a.window;
    if (count == block && !windowed && key + block <= context + (a.mask ? 0 : token + 1) && (!a.window || key + block <= context)) return false;
    if (!a.window && !a.mask) {
        for (int j = 0; j < block; j++) hidden[j] = j < count && key + j <= context + token ? 0.0f : -INFINITY;
        return true;
    }
    for (int j = 0; j < block; j++) hidden[j] = j < count && visible(a, item.span, token, context, key + j, position) ? 0.0f : -INFINITY;
    return true;
}

// Scores of one head's queries with a block become softmax weights.
static void soften(const Args& a, const Layout& l, Scratch& s, long head, long stride, int count, const bool* partly) {
    float* scores = s.scores.data();
    if (a.softcap > 0)
        for (long r = 0; r < l.rows; r++)
            for (int j = 0; j < count; j += VL) store(scores + r * stride + j, softcap_v(load(scores + r * stride + j), a.softcap));
    for (long i = 0; i * l.group < l.rows; i++)
        if (partly[i]) hide(scores + i * l.group * stride, l.group, stride, count, s.bias.data() + i * stride);
    weigh(scores, l.rows, stride, count, s.top.data() + head * padded_width(l.rows), s.totals.data() + head * l.rows * VL, s.rescale.data(), s.fresh.data());
}

// All queries of one head take in a block of keys and values of type E at `k` and `v`.
template <typename E>
static void take_in(const Args& a, const Layout& l, Scratch& s, long head, const E* const* k, const E* const* v, int count, const bool* partly, Ahead& ahead) {
    float *scores = s.scores.data(), *rescale = s.rescale.data(), *q = s.q.data() + head * l.rows * l.kp, *acc = s.acc.data() + head * l.rows * l.vp;
    in_tiles(l.rows, [&](long r, auto rows) { scores_of<rows>(q + r * l.kp, l.kp, k, count, a.scale, scores + r * KEYS, ahead); });
    soften(a, l, s, head, KEYS, count, partly);
    for (long d = 0; d < l.vp;) {
        bool wide = d + 2 * PAIR <= l.vp;
        in_tiles(l.rows, [&](long r, auto rows) {
            constexpr bool four = (rows == 4 || sizeof(E) < 4) && VL < 16;  // one pair of vectors, so that sums and mask fit the registers
            if constexpr (!four)
                if (wide) return add_slice<rows, 2>(scores + r * KEYS, v, count, d, l.vp, acc + r * l.vp, rescale + r);
            add_slice<rows, 1>(scores + r * KEYS, v, count, d, l.vp, acc + r * l.vp, rescale + r);
            if (four && wide) add_slice<rows, 1>(scores + r * KEYS, v, count, d + PAIR, l.vp, acc + r * l.vp, rescale + r);
        });
        ahead.fetch();
        d += wide ? 2 * PAIR : PAIR;
    }
}

#if defined(__AVX512BF16__)
// The same in products of bfloat16 pairs; `k_at` and `v_at` are where the head begins in a row.
static void take_in_pairs(const Args& a, const Layout& l, Scratch& s, long head, const Rows<bf16>& from, int count, const bool* partly, Ahead& ahead) {
    float *scores = s.scores.data(), *acc = s.acc.data() + head * l.rows * l.vp, *rescale = s.rescale.data();
    int pairs = (count + 1) / 2;
    long k_at = head * a.k_head, v_at = head * a.v_head, stride = l.rows * 32;
    two *q = room(s.q_pairs, 0) + head * l.rows * l.kp, *k = room(s.k_pairs, PAIR_KEYS * l.kp / 2), *weights = room(s.weight_pairs, l.rows * PAIR_KEYS);
    turn_keys(from.k, k_at, a.key_dim, l.kp, count, k);
    in_pair_tiles(l.rows, [&](long r, auto rows) {
        auto some = [&](int j, auto vectors) { pair_scores<rows, vectors>(q + r * 32, stride, l.kp, k + j, a.scale, scores + r * PAIR_KEYS + j, ahead); };
        if (count > PAIR_KEYS - 16) return some(0, std::integral_constant<int, PAIR_KEYS / 16>{});
        int j = 0;
        if (count > 16) some(0, std::integral_constant<int, 2>{}), j = 32;
        if (j < count) some(j, std::integral_constant<int, 1>{});
    });
    soften(a, l, s, head, PAIR_KEYS, count, partly);
    for (long r = 0; r < l.rows; r++) split_row(scores + r * PAIR_KEYS, (pairs * 2 + 31) / 32 * 32, weights + r * PAIR_KEYS);
    two* v = room(s.v_pairs, PAIR_KEYS * l.vp / 2);
    pair_values(from.v, v_at, a.value_dim, l.vp, pairs, v);
    for (long d = 0; d < l.vp;) {
        bool wide = d + 64 <= l.vp;
        in_pair_tiles(l.rows, [&](long r, auto rows) {
            auto add = [&](auto vectors) { add_pairs<rows, vectors>(weights + r * PAIR_KEYS, v + d * (PAIR_KEYS / 2), pairs, acc + r * l.vp + d, l.vp, rescale + r, ahead); };
            if (wide) add(std::integral_constant<int, 4>{});
            else add(std::integral_constant<int, 2>{});
        });
        d += wide ? 64 : 32;
    }
}
#endif

// All heads of an item take in a block.
template <typename E>
static void take_in_block(const Args& a, const Item& item, const Layout& l, Scratch& s, Rows<E>& rows, long key, int count, Ahead& ahead) {
    bool partly[TILE];
    for (long i = 0; i < item.count; i++) partly[i] = hidden_keys(a, item, i + item.first, key, count, BLOCK<E>, s.bias.data() + i * BLOCK<E>);
    const float *k[KEYS], *v[KEYS];
    for (int j = 0; j < BLOCK<E> && l.copies; j++) k[j] = s.k.data() + j * l.kp, v[j] = l.latent ? k[j] : s.v.data() + j * l.vp;
    for (long head = 0; head < item.heads; head++) {
        if constexpr (PAIRS<E>) {
            take_in_pairs(a, l, s, head, rows, count, partly, ahead);
            continue;
        }
        if (l.copies) {
            for (int j = 0; j < count; j++) widen_row(rows.k[j], a.key_dim, s.k.data() + j * l.kp);
            for (int j = 0; j < count && !l.latent; j++) widen_row(rows.v[j], a.value_dim, s.v.data() + j * l.vp);
            take_in(a, l, s, head, k, v, count, partly, ahead);
        } else {
            take_in(a, l, s, head, rows.k, rows.v, count, partly, ahead);
        }
        for (int j = 0; j < BLOCK<E>; j++) rows.k[j] += a.k_head, rows.v[j] += a.v_head;
    }
}

template <typename E>
static void prepare(const Args& a, const Item& item, const Layout& l, Scratch& s) {
    long n = item.heads * l.rows, row0 = a.starts[item.span] + item.first;
    s.q.assign(n * l.kp, 0.0f), s.acc.assign(n * l.vp, 0.0f), s.totals.assign(n * VL, 0.0f);
    s.top.assign(item.heads * padded_width(l.rows), -INFINITY), s.rescale.resize(padded_width(l.rows)), s.fresh.assign(padded_width(l.rows), 0.0f);
    s.scores.resize(l.rows * BLOCK<E>), s.bias.resize(item.count * BLOCK<E>);
    if (l.copies) s.k.assign(KEYS * l.kp, 0.0f), s.v.assign(l.latent ? 0 : KEYS * l.vp, 0.0f);
    for (long head = 0; head < item.heads; head++)
        for (long r = 0; r < l.rows; r++) {
            const float* from = a.q + (row0 + r / l.group) * a.q_token + ((item.head + head) * l.group + r % l.group) * a.key_dim;
            if (PAIRS<E>) {  // [width / 32][rows][32]
                float* to = s.q.data() + head * l.rows * l.kp + r * 32;
                for (long d = 0; d < a.key_dim; d += 32, to += l.rows * 32) std::memcpy(to, from + d, std::min<long>(32, a.key_dim - d) * sizeof(float));
                continue;
            }
            float* to = s.q.data() + (head * l.rows + r) * l.kp;
            for (long d = 0; d < a.key_dim; d++) to[place<E>(d)] = from[d];
        }
#if defined(__AVX512BF16__)
    if constexpr (PAIRS<E>) split_row(s.q.data(), n * l.kp, room(s.q_pairs, n * l.kp));
#endif
}

// A query's sums times a factor, in the order of the output.
template <typename E>
static inline void write_sums(const float* sums, long width, float factor, float* to) {
#if defined(__AVX512BF16__)
    if constexpr (PAIRS<E>) return sums_in_order(sums, width, factor, to);
#endif
    for (long d = 0; d < width; d++) to[d] = sums[place<E>(d)] * factor;
}

// The results of an item: final rows of the output, or its row of the partial results (top, total, sums).
template <typename E>
static void finish(const Args& a, const Item& item, const Layout& l, const Scratch& s, float* partial) {
    long row0 = a.starts[item.span] + item.first;
    for (long head = 0; head < item.heads; head++)
        for (long r = 0; r < l.rows; r++) {
            long i = head * l.rows + r, query_head = (item.head + head) * l.group + r % l.group;
            float top = s.top[head * padded_width(l.rows) + r], total = sum(load(s.totals.data() + i * VL)), factor = 1.0f;
            float* to = a.out + ((row0 + r / l.group) * a.heads + query_head) * a.value_dim;
            if (item.partial < 0) factor = inverse_total(a, query_head, top, total);
            else to = partial + (item.partial + i) * (a.value_dim + 2), *to++ = top, *to++ = total;
            write_sums<E>(s.acc.data() + i * l.vp, a.value_dim, factor, to);
        }
}

// `next`: the item that is likely to come after this one on the same thread, or null; its first keys are fetched while the last ones here are
// used. `first`: no item before did that for this one.
template <typename E>
static void run(const Args& a, const Item& item, const Item* next, bool first, Scratch& s, float* partial) {
    Layout l = layout_of<E>(a, item);
    long calls = item.heads * (std::max<long>(1, l.rows / MANY) * (BLOCK<E> / VL) + l.vp / PAIR / 2);  // or a few more
    if (PAIRS<E>) calls = item.heads * ((l.rows + MOST - 1) / MOST) * (l.kp / 2 + (l.vp + 63) / 64 * (PAIR_KEYS / 2));
    Rows<E> rows, coming_rows;
    Ahead ahead;
    find_rows(a, item, item.key0, (int)std::min<long>(BLOCK<E>, item.key1 - item.key0), coming_rows);
    if (first) {
        aim(a, item, coming_rows, (int)std::min<long>(BLOCK<E>, item.key1 - item.key0), l.latent, 1, ahead);
        ahead.fetch();
    }
    prepare<E>(a, item, l, s);
    for (long key = item.key0; key < item.key1; key += BLOCK<E>) {
        int count = (int)std::min<long>(BLOCK<E>, item.key1 - key);
        rows = coming_rows;
        const Item* coming = key + BLOCK<E> < item.key1 ? &item : next;
        if (coming) {
            long from = coming == &item ? key + BLOCK<E> : next->key0;
            int some = (int)std::min<long>(BLOCK<E>, coming->key1 - from);
            find_rows(a, *coming, from, some, coming_rows);
            aim(a, *coming, coming_rows, some, l.latent, calls, ahead);
        }
        take_in_block(a, item, l, s, rows, key, count, ahead);
    }
    finish<E>(a, item, l, s, partial);
}

// Combine the pieces of one tile in order of their keys.
static void combine(const Args& a, const Item* pieces, long count, const float* partial) {
    const Item& item = pieces[0];
    long group = a.heads / a.kv_heads, width = a.value_dim + 2, rows = item.count * group;
    for (long i = 0; i < item.heads * rows; i++) {
        long head = (item.head + i / rows) * group + i % group, token = a.starts[item.span] + item.first + i % rows / group;
        float top = -INFINITY, total = 0;
        for (long c = 0; c < count; c++) top = std::max(top, partial[(pieces[c].partial + i) * width]);
        float* out = a.out + (token * a.heads + head) * a.value_dim;
        std::fill_n(out, a.value_dim, 0.0f);
        for (long c = 0; c < count; c++) {
            const float* from = partial + (pieces[c].partial + i) * width;
            if (from[0] == -INFINITY) continue;
            float factor = std::exp(from[0] - top);
            total += from[1] * factor;
            for (long d = 0; d < a.value_dim; d++) out[d] += from[2 + d] * factor;
        }
        float inverse = inverse_total(a, head, top, total);
        for (long d = 0; d < a.value_dim; d++) out[d] *= inverse;
    }
}

template <typename E>
static void store_rows(const float* from, long token_stride, long width, const Args& a, E* pool) {
    constexpr long AT_ONCE = 16;  // tokens
    each(a.tokens * width > 1 << 15 ? a.threads : 1, (a.tokens + AT_ONCE - 1) / AT_ONCE, [=](long c) {
        for (long t = c * AT_ONCE; t < std::min(a.tokens, (c + 1) * AT_ONCE); t++)
            if (a.slots[t] >= 0) narrow_n(from + t * token_stride, width, pool + a.slots[t] * width);
    });
}

template <typename E>
static void attention(const Args& a) {
    if (a.new_k) store_rows(a.new_k, a.new_k_token, a.kv_heads * a.key_dim, a, (E*)a.k_pool);
    if (a.new_v) store_rows(a.new_v, a.new_v_token, a.kv_heads * a.value_dim, a, (E*)a.v_pool);
    Plan plan = plan_of<E>(a);
    std::vector<float> partial(plan.partial_rows * (a.value_dim + 2));
    // Items in a row lie side by side in the pools: where there is work enough, one thread takes several. The last tiles of a prompt see the
    // most keys and come first.
    const Item* items = plan.items.data();
    long n = (long)plan.items.size(), claim = std::max<long>(1, std::min<long>(a.kv_heads, n / (plan.threads * 8))), claims = (n + claim - 1) / claim;
    each(plan.threads, claims, [&](long c) {
        thread_local Scratch scratch;
        long first = (claims - 1 - c) * claim, end = std::min(n, first + claim);
        long later = first - claim * plan.threads;  // where this thread's next claim begins if all are equally fast
        for (long i = first; i < end; i++) {
            const Item* next = i + 1 < end ? &items[i + 1] : later >= 0 ? &items[later] : nullptr;
            run<E>(a, items[i], next, c < plan.threads && i == first, scratch, partial.data());
        }
    });
    each(plan.threads, (long)plan.tiles.size(), [&](long i) { combine(a, items + plan.tiles[i].first, plan.tiles[i].second, partial.data()); });
}

extern "C" {
void wager_attention_f32(const Args* a) { attention<float>(*a); }
void wager_attention_bf16(const Args* a) { attention<bf16>(*a); }
void wager_attention_fp8(const Args* a) { attention<fp8>(*a); }
}
