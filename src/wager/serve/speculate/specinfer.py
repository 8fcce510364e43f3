"""SpecInfer: token trees from one or several small models, merged and verified in one pass (arXiv 2305.09781).

For a user: `{"method": "specinfer", "drafts": [...], "expansion": [1, 1, 3, 1, 1]}`. Each draft model grows a tree in which every node of
step i gets expansion[i] children; the trees are merged by path, so that what two models agree on is verified once.

Greedy: children are the most likely tokens. Sampled: children are independent draws, and equal draws of one parent share a node but are
tried as often as they were drawn; `verify="mss"` is multi-step speculative sampling, `verify="naive"` matches the target's own sample.
Exact: greedy output is identical, sampled output has the target's distribution.

Shape legend: L rows, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from wager.serve.request import Request
from wager.serve.sampling.sampler import Row, Sampler
from wager.serve.speculate.draft_engine import DraftModel, NewNodes
from wager.serve.speculate.drafter import guess_law, noise, top_tokens
from wager.serve.speculate.ratio import draw, independent
from wager.serve.token_tree import TokenTree, visible_of


@dataclass
class Candidates:
    """What was drawn after each span row: (child node, draft distribution), in the order of drawing, equal draws repeated."""

    of_row: dict[int, list[tuple[int, np.ndarray]]]

    def numbers(self, row: int, children: int) -> int:
        return 2 * len(self.of_row.get(row, ())) + 1

    def choose(
        self, tree: TokenTree, row: int, children: Sequence[int], target_W: np.ndarray, uniforms: np.ndarray
    ) -> tuple[int | None, int]:
        drawn = self.of_row.get(row, [])
        tokens = [int(tree.tokens[node]) for node, _ in drawn]
        index, token = independent(target_W, [q for _, q in drawn], tokens, uniforms)
        return None if index is None else drawn[index][0], token


@dataclass
class GrownTree:
    """One draft model's tree. Nodes in the order they were made; draws: per parent (-1: root) the child drawn and its distribution, equal
    draws repeated; row_of: where computed nodes lie in the draft's cache."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    draws: dict[int, list[tuple[int, np.ndarray]]] = field(default_factory=dict)
    row_of: dict[int, int] = field(default_factory=dict)
    frontier: list[int] = field(default_factory=list)
    index: dict[tuple[int, int], int] = field(default_factory=dict)  # (parent, token) to node

    def path(self, node: int) -> tuple[int, ...]:
        """Tokens from below the root down to `node`."""
        steps: list[int] = []
        while node >= 0:
            steps.append(self.tokens[node])
            node = self.parents[node]
        return tuple(steps[::-1])

    def child(self, parent: int, token: int) -> int:
        """The child of `parent` with this token, made if it is new."""
        node = self.index.setdefault((parent, token), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
        return node


def merge(trees: Sequence[GrownTree], max_draws: int) -> tuple[TokenTree, Candidates, list[dict[int, int]]]:
    """The tree whose root paths are those of all trees. A node is its whole path: the same token below different parents stays two nodes.

    Returns the tree, what was drawn where, and for each input tree the merged number of its nodes. Draws beyond the first `max_draws` in
    breadth-first order are left out. They are counted with repetitions: a limit on distinct nodes would keep or drop a draw depending on
    its own value, and what is left would no longer be independent draws.
    """
    tokens: list[int] = []
    parents: list[int] = []
    index: dict[tuple[int, int], int] = {}
    of_row: dict[int, list[tuple[int, np.ndarray]]] = {}
    places: list[dict[int, int]] = [{-1: -1} for _ in trees]
    queue = [(number, -1) for number in range(len(trees))]
    draws = 0
    for number, parent in queue:
        grown, place = trees[number], places[number]
        if parent not in place:
            continue
        above = place[parent]
        for child, probs_W in grown.draws.get(parent, []):
            if draws >= max_draws:
                break
            draws += 1
            key = (above, grown.tokens[child])
            if key not in index:
                index[key] = len(tokens)
                tokens.append(key[1])
                parents.append(above)
            if child not in place:
                place[child] = index[key]
                queue.append((number, child))
            of_row.setdefault(above + 1, []).append((index[key], probs_W))
    tree = TokenTree(np.array(tokens, np.int64), np.array(parents, np.int32))
    return tree, Candidates(of_row), places


class SpecInferDrafter:
    """Grows one tree per draft model by `expansion` and merges them. naive: verify by matching the target's sample."""

    def __init__(
        self,
        drafts: Sequence[DraftModel],
        expansion: Sequence[int],
        sampler: Sampler,
        naive: bool = False,
    ):
        self.drafts, self.expansion, self.sampler, self.naive = list(drafts), list(expansion), sampler, naive
        self.max_depth = len(self.expansion)
        level, total = 1, 0
        for width in self.expansion:
            level *= width
            total += level
        self.num_tokens = total * len(self.drafts)
        self._proposed: dict[str, tuple[list[GrownTree | None], list[dict[int, int]]]] = {}

    def propose(
        self, requests: Sequence[Request], nodes: Sequence[int], depths: Sequence[int]
    ) -> list[TokenTree | None]:
        grown = [self._grow(number, draft, requests, depths) for number, draft in enumerate(self.drafts)]
        trees: list[TokenTree | None] = []
        for i, request in enumerate(requests):
            mine = [g[i] for g in grown]
            present = [t for t in mine if t is not None]
            if not present:
                trees.append(None)
                continue
            tree, candidates, merged = merge(present, nodes[i])
            places = iter(merged)
            self._proposed[request.id] = (mine, [next(places) if t is not None else {} for t in mine])
            ratio = None if request.params.greedy or self.naive else candidates
            trees.append(TokenTree(tree.tokens, tree.parents, ratio))
        return trees

    def _grow(
        self, number: int, draft: DraftModel, requests: Sequence[Request], depths: Sequence[int]
    ) -> list[GrownTree | None]:
        """One draft model's trees, all requests level by level."""
        room = self.num_tokens // len(self.drafts)
        steps = [min(d, self.max_depth) for d in depths]
        ready, logits = draft.begin(requests, [room] * len(requests), steps)
        trees: list[GrownTree | None] = [None] * len(requests)
        for i in ready:
            trees[i] = GrownTree(frontier=[-1])
        for step, width in enumerate(self.expansion):
            active = [(i, tree) for i in ready if steps[i] > step and (tree := trees[i]) is not None]
            if not active or logits is None:
                break
            if step:
                logits = draft.grow([_frontier(requests[i], tree, step) for i, tree in active])
            elif len(active) < len(ready):
                logits = logits[[k for k, i in enumerate(ready) if steps[i] > 0]]
            self._expand(number, step, width, [(requests[i], tree) for i, tree in active], logits)
        return trees

    def _expand(
        self, number: int, step: int, width: int, active: Sequence[tuple[Request, GrownTree]], logits_LW: Tensor
    ) -> None:
        """Give every frontier node its children; they become the next frontier."""
        if any(self.sampler.shapes(request) for request, _ in active):
            rows = [Row(request, tree.path(node)) for request, tree in active for node in tree.frontier]
            logits_LW = self.sampler.shaped(logits_LW, rows)
        rows_LW, row = logits_LW.cpu().numpy(), 0
        for request, tree in active:
            parents = tree.frontier
            mine = rows_LW[row : row + len(parents)]
            row += len(parents)
            if request.params.greedy:
                picks = top_tokens(mine, width).tolist()
                probs: list[np.ndarray | None] = [None] * len(parents)
            else:
                probs_LW = [guess_law(logits_W, request.params.temperature) for logits_W in mine]
                seed = self.sampler.seed_of(request) ^ (number + 1) * 0x9E37 ^ (step + 1) * 0x79B97F
                numbers = noise(seed, request.num_tokens, len(parents) * width).reshape(len(parents), width)
                picks = [[draw(p, u) for u in us] for p, us in zip(probs_LW, numbers, strict=True)]
                probs = [*probs_LW]
            following: list[int] = []
            for parent, tokens, probs_W in zip(parents, picks, probs, strict=True):
                for token in tokens:
                    child = tree.child(parent, token)
                    tree.draws.setdefault(parent, []).append((child, probs_W))  # type: ignore[arg-type]
                    if child not in following:
                        following.append(child)
            tree.frontier = following

    def committed(self, request: Request, path: Sequence[int]) -> None:
        grown, places = self._proposed.pop(request.id)
        for draft, tree, place in zip(self.drafts, grown, places, strict=True):
            if tree is None:
                draft.keep(request, []) if request.id in draft.states else None
                continue
            mine = {merged: node for node, merged in place.items()}
            rows = []
            for node in path:
                if node not in mine or mine[node] not in tree.row_of:
                    break
                rows.append(tree.row_of[mine[node]])
            draft.keep(request, rows)

    def remove(self, request: Request) -> None:
        self._proposed.pop(request.id, None)
        for draft in self.drafts:
            draft.remove(request)


def _frontier(request: Request, tree: GrownTree, step: int) -> NewNodes:
    """The frontier's nodes as the draft computes them, and note where they will lie."""
    for node in tree.frontier:
        tree.row_of[node] = len(tree.row_of)
    seen = visible_of(np.array(tree.parents))
    computed = list(tree.row_of)
    visible = seen[np.ix_(tree.frontier, computed)]
    return NewNodes(request, [tree.tokens[n] for n in tree.frontier], np.full(len(tree.frontier), step), visible)
