#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "suffix_tree.h"

namespace {

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

}  // namespace
