#pragma once
// A counted suffix tree over several growing token sequences, bounded in depth and compressed: runs of tokens with equal counts are one node.
//
// A node's count is the number of suffixes (cut at the depth) that pass through it or end in it. Its label is a reference into a stored
// sequence, at a place where the whole path from the root occurs, so labels can be joined by moving the reference back. Every suffix that
// is still growing ends exactly at the end of a node; appending a token moves each of them one step. Suffix ends hang in a list at their
// node: with them a sequence can be removed from the bottom up, and a reference to it replaced by one to another sequence.
// (Structure and rules: SuffixDecoding, arXiv 2411.04975.)
#include <algorithm>
#include <cstdint>
#include <vector>

#include "child_index.h"

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

// A place in `items`: one that was given back, else a new one at the end.
template <class T>
int32_t take(std::vector<T>& items, std::vector<int32_t>& free) {
    if (free.empty()) {
        items.emplace_back();
        return (int32_t)items.size() - 1;
    }
    int32_t i = free.back();
    free.pop_back();
    return i;
}

struct Tree {
    int32_t depth;
    uint32_t epoch = 0;
    int64_t num_nodes = 0, num_tokens = 0, kid_bytes = 0;
    std::vector<Node> nodes;
    std::vector<Suffix> suffixes;
    std::vector<Sequence> sequences;
    std::vector<int32_t> free_nodes, free_suffixes, free_sequences;
    ChildIndex index;

    explicit Tree(int32_t d) : depth(d) { new_node(); }

    int32_t new_node() {
        int32_t n = take(nodes, free_nodes);
        nodes[n] = Node();
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
        lead(kids, nodes[n].pos);
        kids[nodes[n].pos].count = ++nodes[n].count;
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
        int32_t seq = take(sequences, free_sequences);
        sequences[seq].live = true;
        return seq;
    }
    void append(int32_t seq, int32_t token) {
        Sequence& sequence = sequences[seq];
        int32_t at = (int32_t)sequence.tokens.size(), s = take(suffixes, free_suffixes);
        sequence.tokens.push_back(token);
        num_tokens++;
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

int32_t active(const Tree& tree, int32_t seq) { return std::min<int32_t>(tree.depth, (int32_t)tree.sequences[seq].tokens.size()); }

void own_place(const Tree& tree, int32_t seq, int32_t m, int32_t& node, int32_t& offset) {
    const auto& ends = tree.sequences[seq].suffixes;
    node = tree.suffixes[ends[ends.size() - m]].node, offset = tree.nodes[node].length;
}

}  // namespace
