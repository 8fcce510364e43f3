// A counted suffix tree over several growing token sequences, bounded in depth and compressed: runs of tokens with equal counts are one node.
//
// A node's count is the number of suffixes (cut at the depth) that pass through it or end in it. Its label is a reference into a stored
// sequence, at a place where the whole path from the root occurs, so labels can be joined by moving the reference back. Every suffix that
// is still growing ends exactly at the end of a node; appending a token moves each of them one step. Suffix ends hang in a list at their
// node: with them a sequence can be removed from the bottom up, and a reference to it replaced by one to another sequence.
// (Structure and rules: SuffixDecoding, arXiv 2411.04975.)
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <queue>
#include <vector>

namespace {

constexpr int SCAN = 16;  // children found by scanning; more are found in the hash index

struct Child {
    int32_t token, node, count;
};

struct Node {
    int32_t count = 0, seq = -1, start = 0, length = 0;
    int32_t parent = -1, pos = 0;  // pos: own entry among the parent's children
    int32_t ends = -1;             // first suffix that ends here
    uint32_t version = 0;          // changes whenever the node's place in the tree does
    std::vector<Child> kids;       // by falling count; of equal counts, the one seen last comes first
    bool indexed = false;
};

struct Suffix {
    int32_t seq, start, node, previous, next;
};

struct Sequence {
    std::vector<int32_t> tokens, suffixes;  // suffixes[i] starts at token i
    bool live = false;
};

// (node, token) -> child, open addressing with deletion by shifting back.
struct Index {
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

struct Tree {
    int32_t depth;
    uint32_t epoch = 0;
    int64_t num_nodes = 0, num_tokens = 0, kid_bytes = 0;
    std::vector<Node> nodes;
    std::vector<Suffix> suffixes;
    std::vector<Sequence> sequences;
    std::vector<int32_t> free_nodes, free_suffixes, free_sequences;
    Index index;

    explicit Tree(int32_t d) : depth(d) { new_node(); }

    int32_t new_node() {
        int32_t n;
        if (free_nodes.empty()) {
            n = (int32_t)nodes.size();
            nodes.emplace_back();
        } else {
            n = free_nodes.back(), free_nodes.pop_back();
            nodes[n] = Node();
        }
        nodes[n].version = ++epoch;
        num_nodes++;
        return n;
    }
    void free_node(int32_t n) {
        Node& node = nodes[n];
        if (node.indexed)
            for (const Child& kid : node.kids) index.erase(n, kid.token);
        kid_bytes -= (int64_t)(node.kids.capacity() * sizeof(Child));
        std::vector<Child>().swap(node.kids);
        node.version = ++epoch, node.count = 0, node.seq = -1, node.indexed = false;
        free_nodes.push_back(n);
        num_nodes--;
    }

    // -- children ---------------------------------------------------------------------------------------------------------------

    int32_t child(int32_t n, int32_t token) const {
        const Node& node = nodes[n];
        if (node.indexed) return index.get(n, token);
        for (const Child& kid : node.kids)
            if (kid.token == token) return kid.node;
        return -1;
    }
    void add_child(int32_t n, int32_t token, int32_t c) {  // c has the lowest count of all
        Node& node = nodes[n];
        size_t before = node.kids.capacity();
        node.kids.push_back({token, c, nodes[c].count});
        kid_bytes += (int64_t)((node.kids.capacity() - before) * sizeof(Child));
        nodes[c].parent = n, nodes[c].pos = (int32_t)node.kids.size() - 1;
        if (node.indexed) {
            index.put(n, token, c);
        } else if (node.kids.size() > SCAN) {
            node.indexed = true;
            for (const Child& kid : node.kids) index.put(n, kid.token, kid.node);
        }
        lead(node.kids, nodes[c].pos);
    }
    void replace_child(int32_t n, int32_t by, int32_t token) {  // `by` takes the place of n among n's siblings
        int32_t parent = nodes[n].parent, pos = nodes[n].pos;
        Child& entry = nodes[parent].kids[pos];
        if (nodes[parent].indexed) {
            index.erase(parent, entry.token);
            index.put(parent, token, by);
        }
        entry.token = token, entry.node = by;
        nodes[by].parent = parent, nodes[by].pos = pos;
    }
    void swap_kids(std::vector<Child>& kids, int32_t a, int32_t b) {
        std::swap(kids[a], kids[b]);
        nodes[kids[a].node].pos = a, nodes[kids[b].node].pos = b;
    }
    void increment(int32_t n) {
        std::vector<Child>& kids = nodes[nodes[n].parent].kids;
        int32_t pos = nodes[n].pos, count = nodes[n].count;
        auto first = std::lower_bound(kids.begin(), kids.begin() + pos, count, [](const Child& k, int32_t v) { return k.count > v; });
        swap_kids(kids, (int32_t)(first - kids.begin()), pos);
        first->count = ++nodes[n].count;
        lead(kids, nodes[n].pos);
    }
    // First among the siblings of the same count: of two continuations seen equally often, the one seen last is drafted.
    void lead(std::vector<Child>& kids, int32_t pos) {
        auto first = std::lower_bound(kids.begin(), kids.begin() + pos, kids[pos].count, [](const Child& k, int32_t v) { return k.count > v; });
        swap_kids(kids, (int32_t)(first - kids.begin()), pos);
    }
    void decrement(int32_t n) {
        std::vector<Child>& kids = nodes[nodes[n].parent].kids;
        int32_t pos = nodes[n].pos, count = nodes[n].count;
        auto after = std::upper_bound(kids.begin() + pos, kids.end(), count, [](int32_t v, const Child& k) { return v > k.count; });
        swap_kids(kids, (int32_t)(after - kids.begin()) - 1, pos);
        (after - 1)->count = --nodes[n].count;
    }
    void drop_child(int32_t n) {  // n has count 0, so it is the last of its siblings
        Node& parent = nodes[nodes[n].parent];
        if (parent.indexed) index.erase(nodes[n].parent, parent.kids.back().token);
        parent.kids.pop_back();
    }

    // -- suffix ends ------------------------------------------------------------------------------------------------------------

    void attach(int32_t s, int32_t n) {
        Suffix& suffix = suffixes[s];
        suffix.node = n, suffix.previous = -1, suffix.next = -1;
        if (n == 0) return;
        suffix.next = nodes[n].ends;
        if (suffix.next >= 0) suffixes[suffix.next].previous = s;
        nodes[n].ends = s;
    }
    void detach(int32_t s) {
        Suffix& suffix = suffixes[s];
        if (suffix.node == 0) return;
        if (suffix.previous >= 0) suffixes[suffix.previous].next = suffix.next;
        else nodes[suffix.node].ends = suffix.next;
        if (suffix.next >= 0) suffixes[suffix.next].previous = suffix.previous;
    }
    void move_end(int32_t s, int32_t n) { detach(s), attach(s, n); }
    int32_t token_at(int32_t seq, int32_t i) const { return sequences[seq].tokens[i]; }

    // -- growing ----------------------------------------------------------------------------------------------------------------

    int32_t open() {
        int32_t seq;
        if (free_sequences.empty()) {
            seq = (int32_t)sequences.size();
            sequences.emplace_back();
        } else {
            seq = free_sequences.back(), free_sequences.pop_back();
        }
        sequences[seq].live = true;
        return seq;
    }
    void append(int32_t seq, int32_t token) {
        Sequence& sequence = sequences[seq];
        int32_t at = (int32_t)sequence.tokens.size(), s;
        sequence.tokens.push_back(token);
        num_tokens++;
        if (free_suffixes.empty()) {
            s = (int32_t)suffixes.size();
            suffixes.emplace_back();
        } else {
            s = free_suffixes.back(), free_suffixes.pop_back();
        }
        suffixes[s] = {seq, at, 0, -1, -1};
        sequence.suffixes.push_back(s);
        nodes[0].count++;
        for (int32_t i = std::max(0, at - depth + 1); i <= at; i++) advance(sequence.suffixes[i], seq, at, token);  // longest first
    }
    void advance(int32_t s, int32_t seq, int32_t at, int32_t token) {
        int32_t n = suffixes[s].node, c = child(n, token);
        if (c < 0) {
            if (n != 0 && nodes[n].count == 1 && nodes[n].kids.empty()) {
                nodes[n].length++;
                return;
            }
            int32_t leaf = new_node();
            nodes[leaf].count = 1, nodes[leaf].seq = seq, nodes[leaf].start = at, nodes[leaf].length = 1;
            add_child(n, token, leaf);
            move_end(s, leaf);
        } else if (n != 0 && nodes[n].count == nodes[c].count + 1) {
            follow_all(s, n, c);
        } else if (nodes[c].length == 1) {
            increment(c);
            move_end(s, c);
        } else {
            int32_t head = split(n, c);
            increment(head);
            move_end(s, head);
        }
    }
    // The last suffix that ended in n goes where all others went: the border between n and its only child c moves down by one token.
    void follow_all(int32_t s, int32_t n, int32_t c) {
        Node &above = nodes[n], &below = nodes[c];
        if (below.length == 1) {
            detach(s);
            join(n, c);
            attach(s, c);
            return;
        }
        above.seq = below.seq, above.start = below.start - above.length, above.length++;
        below.start++, below.length--;
        int32_t token = token_at(below.seq, below.start);
        if (above.indexed) index.erase(n, above.kids[0].token), index.put(n, token, c);
        above.kids[0].token = token;
        above.version = ++epoch, below.version = ++epoch;
    }
    // n and its only child c, of one count by now, become c.
    void join(int32_t n, int32_t c) {
        Node &above = nodes[n], &below = nodes[c];
        below.start -= above.length, below.length += above.length, below.count = above.count;
        replace_child(n, c, nodes[above.parent].kids[above.pos].token);
        below.version = ++epoch;
        free_node(n);
    }
    int32_t split(int32_t n, int32_t c) {
        int32_t head = new_node();  // may move `nodes`
        Node &top = nodes[head], &rest = nodes[c];
        top.count = rest.count, top.seq = rest.seq, top.start = rest.start, top.length = 1;
        replace_child(c, head, nodes[n].kids[rest.pos].token);
        rest.start++, rest.length--, rest.version = ++epoch;
        add_child(head, token_at(rest.seq, rest.start), c);
        return head;
    }

    // -- removing ---------------------------------------------------------------------------------------------------------------

    void remove(int32_t seq) {
        Sequence& sequence = sequences[seq];
        std::vector<int32_t> stale;
        for (int32_t s : sequence.suffixes) {
            int32_t n = suffixes[s].node;
            detach(s);
            free_suffixes.push_back(s);
            for (int32_t up = n; up != 0; up = nodes[up].parent) {
                decrement(up);
                if (nodes[up].seq == seq) stale.push_back(up);
            }
            nodes[0].count--;
            if (n == 0) continue;
            int32_t shrunk = n;
            if (nodes[n].count == 0) {
                shrunk = nodes[n].parent;
                drop_child(n);
                free_node(n);
            }
            Node& node = nodes[shrunk];
            if (shrunk != 0 && node.kids.size() == 1 && node.kids[0].count == node.count) join(shrunk, node.kids[0].node);
        }
        for (int32_t n : stale)
            if (nodes[n].count && nodes[n].seq == seq) refer_elsewhere(n);
        num_tokens -= (int64_t)sequence.tokens.size();
        sequence = Sequence();
        free_sequences.push_back(seq);
    }
    void refer_elsewhere(int32_t n) {
        int32_t below = n, skipped = 0;  // tokens from the end of n to the end of `below`
        while (nodes[below].ends < 0) below = nodes[below].kids[0].node, skipped += nodes[below].length;
        const Suffix& end = suffixes[nodes[below].ends];
        int32_t stop = std::min<int32_t>(end.start + depth, (int32_t)sequences[end.seq].tokens.size());
        nodes[n].seq = end.seq, nodes[n].start = stop - skipped - nodes[n].length;
    }

    // -- looking ----------------------------------------------------------------------------------------------------------------

    // Where the string ends in the tree: false when it does not occur.
    bool locate(const int32_t* tokens, int32_t n, int32_t& node, int32_t& offset) const {
        node = 0, offset = 0;
        for (int32_t i = 0; i < n; i++)
            if (!step(node, offset, tokens[i])) return false;
        return true;
    }
    bool step(int32_t& node, int32_t& offset, int32_t token) const {
        if (offset < nodes[node].length) {
            if (token_at(nodes[node].seq, nodes[node].start + offset) != token) return false;
            offset++;
            return true;
        }
        int32_t c = child(node, token);
        if (c < 0) return false;
        node = c, offset = 1;
        return true;
    }
    int64_t bytes() const {
        return (int64_t)(nodes.capacity() * sizeof(Node) + suffixes.capacity() * sizeof(Suffix) + index.keys.capacity() * 12) + kid_bytes +
               num_tokens * 8;
    }
    int check() const;
};

// 0, or the number of the first rule that is broken.
int Tree::check() const {
    int64_t seen = 0, ended = 0, alive = 0;
    std::vector<int32_t> stack{0}, depths{0};
    while (!stack.empty()) {
        int32_t n = stack.back(), above = depths.back();
        stack.pop_back(), depths.pop_back(), seen++;
        const Node& node = nodes[n];
        int32_t end = above + node.length, through = 0;
        if (n && (node.seq < 0 || !sequences[node.seq].live)) return 1;
        if (n && (node.length < 1 || node.start < above || node.start + node.length > (int32_t)sequences[node.seq].tokens.size())) return 2;
        if (end > depth) return 3;
        if (node.indexed != (node.kids.size() > SCAN) && !node.indexed) return 4;
        for (size_t i = 0; i < node.kids.size(); i++) {
            const Child& kid = node.kids[i];
            const Node& below = nodes[kid.node];
            if (below.parent != n || below.pos != (int32_t)i || below.count != kid.count || kid.count < 1) return 5;
            if (i && node.kids[i - 1].count < kid.count) return 6;
            if (n && kid.count >= node.count) return 7;
            if (token_at(below.seq, below.start) != kid.token || child(n, kid.token) != kid.node) return 8;
            for (int32_t j = 0; n && j < end; j++)  // the reference is an occurrence of the whole path
                if (token_at(below.seq, below.start - end + j) != token_at(node.seq, node.start + node.length - end + j)) return 9;
            through += kid.count;
            stack.push_back(kid.node), depths.push_back(end);
        }
        int32_t here = 0;
        for (int32_t s = node.ends; s >= 0; s = suffixes[s].next, here++) {
            const Suffix& suffix = suffixes[s];
            if (suffix.node != n) return 10;
            const auto& tokens = sequences[suffix.seq].tokens;
            if (std::min<int32_t>(suffix.start + depth, (int32_t)tokens.size()) - suffix.start != end) return 11;
            for (int32_t j = 0; j < end; j++)
                if (tokens[suffix.start + j] != token_at(node.seq, node.start + node.length - end + j)) return 12;
        }
        ended += here;
        if (node.count != through + here) return 13;
    }
    for (const Sequence& sequence : sequences) alive += (int64_t)sequence.tokens.size();
    if (seen != num_nodes || alive != num_tokens || ended != num_tokens || nodes[0].count != num_tokens) return 14;
    return 0;
}

// The places where the last 1, 2, ... tokens of a context occur in a tree that others change too.
struct Cursor {
    int32_t node, offset;
    uint32_t version;
};

struct Matcher {
    Tree* tree;
    std::vector<int32_t> context;
    std::vector<Cursor> cursors;  // cursors[m] is the place of the last m tokens; cursors[0] is the root

    explicit Matcher(Tree* t) : tree(t) { cursors.push_back({0, 0, 0}); }
    void advance(int32_t token, int32_t own) {  // `own`: matches up to this length are the active suffixes of the sequence itself
        context.push_back(token);
        if ((int32_t)context.size() > 2 * tree->depth) context.erase(context.begin(), context.end() - tree->depth);
        std::vector<Cursor> next{cursors[0]};
        for (int32_t m = 1; m <= tree->depth; m++) {
            if (m <= own) {  // never read
                next.push_back({0, 0, 0});
                continue;
            }
            if (m > (int32_t)cursors.size()) break;
            Cursor c = cursors[m - 1];
            bool known = m == 1 || (m - 1 >= own && c.node != 0 && tree->nodes[c.node].version == c.version);
            if (!(known ? tree->step(c.node, c.offset, token) : tree->locate(&*context.end() - m, m, c.node, c.offset))) break;
            next.push_back({c.node, c.offset, tree->nodes[c.node].version});
        }
        cursors.swap(next);
    }
    // Longer matches that other sequences brought since: a string matches only if its end does, so the first failure ends the search.
    void lengthen(int32_t own) {
        for (int32_t m = (int32_t)cursors.size(); m <= std::min<int32_t>(tree->depth, (int32_t)context.size()); m++) {
            Cursor c{0, 0, 0};
            if (m > own) {
                if (!tree->locate(&*context.end() - m, m, c.node, c.offset)) return;
                c.version = tree->nodes[c.node].version;
            }
            cursors.push_back(c);
        }
    }
    bool place(int32_t m, int32_t& node, int32_t& offset) const {
        if (m >= (int32_t)cursors.size()) return false;
        const Cursor& c = cursors[m];
        if (tree->nodes[c.node].version != c.version) return tree->locate(&*context.end() - m, m, node, offset);
        node = c.node, offset = c.offset;
        return true;
    }
};

struct Limits {
    int32_t tokens;  // of a draft, at most
    float factor, offset, min_probability;
    int32_t branch;  // 0: one path, 1: a tree
};

struct Draft {
    std::vector<int32_t> tokens, parents;
    std::vector<float> probabilities;
    float score = 0;
    int32_t match = 0;

    void clear() { tokens.clear(), parents.clear(), probabilities.clear(), score = 0, match = 0; }
};

void follow_path(const Tree& tree, int32_t node, int32_t offset, int32_t budget, float least, Draft& draft) {
    float p = 1;
    while ((int32_t)draft.tokens.size() < budget) {
        const Node& here = tree.nodes[node];
        if (offset < here.length) {
            draft.parents.push_back((int32_t)draft.tokens.size() - 1);
            draft.tokens.push_back(tree.token_at(here.seq, here.start + offset++));
            draft.probabilities.push_back(p), draft.score += p;
            continue;
        }
        if (here.kids.empty()) break;
        p *= (float)here.kids[0].count / (float)here.count;
        if (p < least) break;
        node = here.kids[0].node, offset = 0;
    }
}

struct Candidate {
    float p;
    int32_t node, offset, parent, order;
    bool operator<(const Candidate& o) const { return p != o.p ? p < o.p : order > o.order; }
};

void grow_tree(const Tree& tree, int32_t node, int32_t offset, int32_t budget, float least, Draft& draft) {
    std::priority_queue<Candidate> heap;
    int32_t order = 0;
    auto push = [&](float p, int32_t n, int32_t at, int32_t parent) {
        const Node& here = tree.nodes[n];
        if (at < here.length) {
            heap.push({p, n, at, parent, order++});
            return;
        }
        for (const Child& kid : here.kids) {
            float q = p * (float)kid.count / (float)here.count;
            if (q < least) break;
            heap.push({q, kid.node, 0, parent, order++});
        }
    };
    push(1, node, offset, -1);
    while (!heap.empty() && (int32_t)draft.tokens.size() < budget) {
        Candidate best = heap.top();
        heap.pop();
        const Node& here = tree.nodes[best.node];
        int32_t mine = (int32_t)draft.tokens.size();
        draft.tokens.push_back(tree.token_at(here.seq, here.start + best.offset));
        draft.parents.push_back(best.parent), draft.probabilities.push_back(best.p), draft.score += best.p;
        push(best.p, best.node, best.offset + 1, mine);
    }
}

// Longest match first; shorter ones only while their budget could still beat the best score. A shorter match with the same count has the
// same occurrences, hence the same continuation: it is left out unless the depth cut the longer one's draft.
template <class Place>
void best_draft(const Tree& tree, int32_t longest, const Place& place, const Limits& limits, Draft& best) {
    static thread_local Draft draft;
    int32_t known_count = -1;
    for (int32_t m = longest; m >= 1; m--) {
        int32_t budget = std::min<int32_t>(limits.tokens, (int32_t)(limits.factor * (float)m + limits.offset));
        if ((float)budget <= best.score) break;
        if ((float)(tree.depth - m) <= best.score) continue;  // no string is longer than the depth
        int32_t node, offset;
        if (!place(m, node, offset) || tree.nodes[node].count == known_count) continue;
        draft.clear();
        (limits.branch ? grow_tree : follow_path)(tree, node, offset, budget, limits.min_probability, draft);
        draft.match = m;
        known_count = m + (int32_t)draft.tokens.size() < tree.depth ? tree.nodes[node].count : -1;
        if (draft.score > best.score) std::swap(best, draft);
    }
}

int32_t active(const Tree& tree, int32_t seq) { return std::min<int32_t>(tree.depth, (int32_t)tree.sequences[seq].tokens.size()); }

void own_place(const Tree& tree, int32_t seq, int32_t m, int32_t& node, int32_t& offset) {
    const auto& ends = tree.sequences[seq].suffixes;
    node = tree.suffixes[ends[ends.size() - m]].node, offset = tree.nodes[node].length;
}

}  // namespace

extern "C" {
Tree* wager_suffix_new(int32_t depth) { return new Tree(depth); }
void wager_suffix_free(Tree* tree) { delete tree; }
int32_t wager_suffix_open(Tree* tree) { return tree->open(); }
void wager_suffix_remove(Tree* tree, int32_t seq) { tree->remove(seq); }
int wager_suffix_check(const Tree* tree) { return tree->check(); }
void wager_suffix_append(Tree* tree, int32_t seq, const int32_t* tokens, int32_t n) {
    for (int32_t i = 0; i < n; i++) tree->append(seq, tokens[i]);
}
int32_t wager_suffix_count(const Tree* tree, const int32_t* tokens, int32_t n) {
    int32_t node, offset;
    return tree->locate(tokens, n, node, offset) ? tree->nodes[node].count : 0;
}
void wager_suffix_stats(const Tree* tree, int64_t* out) { out[0] = tree->num_nodes, out[1] = tree->num_tokens, out[2] = tree->bytes(); }

Matcher* wager_matcher_new(Tree* tree) { return new Matcher(tree); }
void wager_matcher_free(Matcher* matcher) { delete matcher; }

// Tokens of a running request: part of its own tree, (unless seq < 0) of the shared one, and of the context matched against that.
void wager_suffix_extend(Tree* own, int32_t own_seq, Matcher* matcher, int32_t seq, const int32_t* tokens, int32_t n) {
    for (int32_t i = 0; i < n; i++) {
        own->append(own_seq, tokens[i]);
        if (!matcher) continue;
        if (seq >= 0) matcher->tree->append(seq, tokens[i]);
        matcher->advance(tokens[i], seq < 0 ? 0 : active(*matcher->tree, seq));
    }
}

// A running request's question. `tokens`, `parents` and `probabilities` have room for limits.tokens; the other fields below it are answers.
struct Query {
    const Tree* own;
    Matcher* matcher;  // null: no shared tree
    int32_t own_seq, seq, local;  // seq < 0: not part of the shared tree. local: look into the request's own tree too
    Limits limits;
    int64_t* tokens;
    int32_t* parents;
    float* probabilities;
    float score;
    int32_t match, from_shared;
};

// The better of the two trees' drafts; ties go to the request's own. Returns the number of tokens.
int32_t wager_suffix_speculate(Query* q) {
    static thread_local Draft mine, shared;
    mine.clear(), shared.clear();
    if (q->local) {
        auto place = [&](int32_t m, int32_t& node, int32_t& offset) { return own_place(*q->own, q->own_seq, m, node, offset), true; };
        best_draft(*q->own, active(*q->own, q->own_seq), place, q->limits, mine);
    }
    if (Matcher* matcher = q->matcher) {
        int32_t covered = q->seq < 0 ? 0 : active(*matcher->tree, q->seq);
        matcher->lengthen(covered);
        int32_t longest = std::max(covered, (int32_t)matcher->cursors.size() - 1);
        auto place = [&](int32_t m, int32_t& node, int32_t& offset) {
            if (m > covered) return matcher->place(m, node, offset);
            own_place(*matcher->tree, q->seq, m, node, offset);
            return true;
        };
        best_draft(*matcher->tree, longest, place, q->limits, shared);
    }
    q->from_shared = shared.score > mine.score;
    const Draft& draft = q->from_shared ? shared : mine;
    std::copy(draft.tokens.begin(), draft.tokens.end(), q->tokens);
    std::copy(draft.parents.begin(), draft.parents.end(), q->parents);
    std::copy(draft.probabilities.begin(), draft.probabilities.end(), q->probabilities);
    q->score = draft.score, q->match = draft.match;
    return (int32_t)draft.tokens.size();
}
}
