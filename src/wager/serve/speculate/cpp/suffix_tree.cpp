// The C interface of suffix trees, matchers and drafts; see suffix_tree.h for the structure.
#include <algorithm>
#include <cstdint>

#include "draft.h"
#include "matcher.h"
#include "suffix_tree.h"

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
