#pragma once
// What a place in the tree drafts: the most frequent path, or the best tree.
#include <algorithm>
#include <cstdint>
#include <queue>
#include <vector>

#include "suffix_tree.h"

namespace {

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

}  // namespace
