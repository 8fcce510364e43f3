// The depth-first search over block graphs of generate.py, on flat arrays and with an explicit stack, so that it can stop after any number of
// states and go on. Shapes are inferred here; what an operator does to an abstract expression is asked of Python once and remembered.
#pragma GCC optimize("wrapv")  // sizes multiply until they are refused
#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace {

constexpr int RANK = 5;
enum Kind { UNARY, BINARY, MATMUL, SUM, NORM, ACCUM, REDUCE };  // in the order of KINDS in enumerate.py
constexpr int PRUNED = -2, TOO_LARGE = -3;

struct Operator { int32_t kind, commutative, dim, width; };

struct Shape {
    int rank = 0;
    std::array<int64_t, RANK> size{};
};

struct Key {
    int32_t op, a, b;
    int64_t count;
    bool operator==(const Key& o) const { return op == o.op && a == o.a && b == o.b && count == o.count; }
};
struct Hash {
    std::size_t operator()(const Key& k) const {
        uint64_t h = (uint64_t)(uint32_t)k.a * 0x9E3779B97F4A7C15ull ^ (uint64_t)(uint32_t)k.b * 0xC2B2AE3D27D4EB4Full;
        h ^= ((uint64_t)(uint32_t)k.op << 48) ^ ((uint64_t)k.count * 0x165667B19E3779F9ull);
        return h ^ (h >> 29);
    }
};

typedef int32_t (*Apply)(int32_t op, int32_t a, int32_t b, int64_t count);
typedef int32_t (*Accept)(int32_t count, const int32_t* expressions, const int64_t* shapes);

struct Table {
    Apply apply;
    std::unordered_map<Key, int32_t, Hash> known;
    int32_t value(const Key& k) {
        auto found = known.find(k);
        if (found != known.end()) return found->second;
        const int32_t v = apply(k.op, k.a, k.b, k.count);
        known.emplace(k, v);
        return v;
    }
};

struct Rank4 {
    int high, low, first, second, at;
    bool operator>(const Rank4& o) const {
        if (high != o.high) return high > o.high;
        if (low != o.low) return low > o.low;
        if (first != o.first) return first > o.first;
        if (second != o.second) return second > o.second;
        return at > o.at;
    }
};

struct Node { int op, a, b, expr, after, uses; Shape shape; };
struct Frame { Rank4 last; int high, pair, at; bool entered; };

bool infer(const Operator& o, const Shape& a, const Shape* b, int64_t loop, Shape& out, int64_t& count) {
    count = 1;
    out = a;
    const int last = a.rank - 1;
    switch (o.kind) {
        case UNARY: return true;
        case NORM: count = a.size[last]; return true;
        case ACCUM: count = loop; return true;
        case SUM: case REDUCE: {
            const int dim = o.dim < 0 ? o.dim + a.rank : o.dim;
            if (dim < 0 || dim > last || o.width < 1 || a.size[dim] % o.width) return false;
            out.size[dim] = o.width;
            count = a.size[dim] / o.width * (o.kind == REDUCE ? loop : 1);
            return true;
        }
        default: break;
    }
    const bool product = o.kind == MATMUL;
    if (product && (a.rank < 2 || b->rank < 2 || a.size[last] != b->size[b->rank - 2])) return false;
    out = Shape{};
    out.rank = a.rank > b->rank ? a.rank : b->rank;
    const int end = product ? 2 : 0;
    for (int d = out.rank - 1 - end; d >= 0; d--) {
        const int i = d - (out.rank - a.rank), j = d - (out.rank - b->rank);
        const int64_t x = i < 0 ? 1 : a.size[i], y = j < 0 ? 1 : b->size[j];
        if (x != y && x != 1 && y != 1) return false;
        out.size[d] = x == 1 ? y : x;
    }
    if (product) {
        out.size[out.rank - 2] = a.size[last - 1];
        out.size[out.rank - 1] = b->size[b->rank - 1];
        count = a.size[last];
    }
    return true;
}

struct Search {
    Table* table;
    std::vector<Operator> operators;
    int inputs, most, outputs;
    int64_t loop;
    Accept accept;
    std::vector<Node> nodes;
    std::vector<Frame> stack;
    std::vector<int> loose;
    int64_t states = 0, pruned = 0;

    void gather() {
        loose.clear();
        for (int i = 0; i < (int)nodes.size(); i++)
            if (!nodes[i].uses) loose.push_back(i);
    }
    bool all_after() const {
        for (int i : loose)
            if (!nodes[i].after) return false;
        return true;
    }
    bool accepted() {
        int32_t expressions[16];
        int64_t shapes[16 * (RANK + 1)];
        for (std::size_t n = 0; n < loose.size(); n++) {
            const Node& node = nodes[loose[n]];
            expressions[n] = node.expr;
            shapes[n * (RANK + 1)] = node.shape.rank;
            for (int d = 0; d < RANK; d++) shapes[n * (RANK + 1) + 1 + d] = node.shape.size[d];
        }
        return accept((int32_t)loose.size(), expressions, shapes) != 0;
    }
    bool push(int at, int a, int b) {
        const Operator& o = operators[at];
        if (o.commutative && a < b) return false;
        const bool accumulates = o.kind == ACCUM || o.kind == REDUCE;
        if ((b >= 0 && nodes[a].after != nodes[b].after) || (accumulates && nodes[a].after)) return false;
        Node node{at, a, b, 0, nodes[a].after || accumulates, 0, {}};
        int64_t count;
        if (!infer(o, nodes[a].shape, b >= 0 ? &nodes[b].shape : nullptr, loop, node.shape, count)) return false;
        states++;
        node.expr = table->value({at, nodes[a].expr, b >= 0 ? nodes[b].expr : -1, count});
        if (node.expr < 0) {
            pruned += node.expr == PRUNED;
            return false;
        }
        nodes.push_back(node);
        nodes[a].uses++;
        if (b >= 0) nodes[b].uses++;
        return true;
    }
    void pop() {
        const Node node = nodes.back();
        nodes.pop_back();
        nodes[node.a].uses--;
        if (node.b >= 0) nodes[node.b].uses--;
    }
    // 0: finished, 1: the nodes form an accepted graph, 2: `until` states were reached
    int step(int64_t until) {
        while (!stack.empty()) {
            Frame& f = stack.back();
            if (!f.entered) {
                f.entered = true;
                gather();
                const bool after = all_after();
                const int surplus = (int)loose.size() - outputs, room = most - (int)nodes.size() - 1;
                if (room <= 0 || surplus > room || room < (surplus > 0 ? surplus : 0) + !after) f.high = -1;
                if ((int)nodes.size() > inputs && surplus <= 0 && after && accepted()) return 1;
            }
            if (f.high < 0 || !advance(f)) {
                stack.pop_back();
                if (!stack.empty()) pop();
            }
            if (states >= until) return 2;
        }
        return 0;
    }
    // Pushes the next operator and its frame; false when this frame has no more.
    bool advance(Frame& f) {
        for (; f.high < (int)nodes.size(); f.high++, f.pair = 0)
            for (; f.pair < 2 * f.high + 2; f.pair++, f.at = 0) {
                const int low = (f.pair - 1) / 2;
                const int a = f.pair == 0 || f.pair % 2 ? f.high : low, b = f.pair == 0 ? -1 : (f.pair % 2 ? low : f.high);
                while (f.at < (int)operators.size()) {
                    const int at = f.at++;
                    const bool binary = operators[at].kind == BINARY || operators[at].kind == MATMUL;
                    const Rank4 rank{f.high, f.pair == 0 ? f.high : low, a, b, at};
                    if (binary != (b >= 0) || !(rank > f.last) || !push(at, a, b)) continue;
                    stack.push_back({rank, rank.high, 0, 0, false});
                    return true;
                }
            }
        return false;
    }
};

}  // namespace

extern "C" {

void* wager_table_new(Apply apply) { return new Table{apply, {}}; }
void wager_table_free(void* table) { delete (Table*)table; }

void* wager_search_new(void* table, int inputs, const int32_t* expressions, const int64_t* shapes, int count, const int32_t* operators,
                       int most, int outputs, int64_t loop, Accept accept) {
    Search* s = new Search{(Table*)table, {}, inputs, most, outputs, loop, accept, {}, {}, {}};
    for (int i = 0; i < count; i++) s->operators.push_back({operators[4 * i], operators[4 * i + 1], operators[4 * i + 2], operators[4 * i + 3]});
    for (int i = 0; i < inputs; i++) {
        Node node{-1, -1, -1, expressions[i], 0, 0, {}};
        node.shape.rank = (int)shapes[i * (RANK + 1)];
        for (int d = 0; d < RANK; d++) node.shape.size[d] = shapes[i * (RANK + 1) + 1 + d];
        s->nodes.push_back(node);
    }
    s->nodes.reserve(most + 2);
    s->stack.reserve(most + 2);
    s->stack.push_back({{-1, -1, -1, -1, -1}, 0, 0, 0, false});
    return s;
}
void wager_search_free(void* search) { delete (Search*)search; }
int wager_search_step(void* search, int64_t until) { return ((Search*)search)->step(until); }
void wager_search_counters(void* search, int64_t* out) {
    out[0] = ((Search*)search)->states;
    out[1] = ((Search*)search)->pruned;
}
// Per node op, a, b, and whether it is loose, then its shape; returns how many nodes there are.
int wager_search_read(void* search, int64_t* out) {
    const Search* s = (const Search*)search;
    for (const Node& n : s->nodes) {
        *out++ = n.op, *out++ = n.a, *out++ = n.b, *out++ = !n.uses, *out++ = n.shape.rank;
        for (int d = 0; d < RANK; d++) *out++ = n.shape.size[d];
    }
    return (int)s->nodes.size();
}
}
