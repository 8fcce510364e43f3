"""SpecExec: one large tree of the likeliest continuations, looked up like a cache (arXiv 2406.02532).

For a user: `{"method": "specexec", "draft": ..., "budget": 512}` for targets that are slow to step whatever the step holds, above all
models whose weights are streamed from disk (`offload.py`). The draft model searches best-first for the `budget` nodes with the highest
probability of being reached; one target pass computes what follows every node; the walk then samples from the target's own
distributions until it leaves the tree.

Exact for any tree: every committed token is the target's own sample (`verify.sample_and_match`), seed for seed.

The search is shortest paths in batches: a node's score is the sum over its path of log q + log decay, children score below parents, and
a pass expands the best `beams` unexpanded nodes. It ends when no unexpanded node can have a child among the best `budget`, after
`max_depth` passes, or when nothing is left. With the pass limit out of reach the tree is the exact top `budget`.

Shape legend: L rows, W vocabulary, C children considered per node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wager.serve.request import Request
from wager.serve.sampling.sampler import Row, Sampler
from wager.serve.speculate.draft_engine import DraftModel, NewNodes
from wager.serve.token_tree import TokenTree


class Search:
    """Best-first search of one request. Arrays over nodes in the order in which they were found; parents come first."""

    def __init__(self, budget: int, decay: float):
        self.budget, self.log_decay = budget, math.log(decay)
        self.tokens = np.zeros(0, np.int64)
        self.parents = np.zeros(0, np.int64)
        self.depths = np.zeros(0, np.int32)
        self.scores = np.zeros(0)
        self.row_of = np.zeros(0, np.int64)  # row in the draft's cache, -1: not expanded
        self.ancestors = np.zeros((0, 64), bool)  # [expanded node's row, row]: which computed rows it sees
        self.rows = 0

    def add(self, parents: np.ndarray, tokens_LC: np.ndarray, logprobs_LC: np.ndarray) -> None:
        """Children of `parents` (-1: the root): those among the best `budget` of all nodes, old and new, become candidates."""
        above = np.where(parents >= 0, self.scores[parents], 0.0) if len(self.scores) else np.zeros(len(parents))
        scores = above[:, None] + self.log_decay + logprobs_LC
        flat = scores.ravel()
        threshold = -np.inf
        if len(flat) + len(self.scores) > self.budget:
            pool = np.concatenate([self.scores, flat])
            threshold = np.partition(pool, len(pool) - self.budget)[len(pool) - self.budget]
        kept = np.flatnonzero((flat >= threshold) & np.isfinite(flat))
        if not len(kept):
            return
        from_row = kept // scores.shape[1]
        new_parents = parents[from_row]
        self.tokens = np.concatenate([self.tokens, tokens_LC.ravel()[kept]])
        depths = np.where(new_parents >= 0, self.depths[new_parents], 0) + 1 if len(self.depths) else np.ones(len(kept))
        self.depths = np.concatenate([self.depths, depths.astype(np.int32)])
        self.parents = np.concatenate([self.parents, new_parents])
        self.scores = np.concatenate([self.scores, flat[kept]])
        self.row_of = np.concatenate([self.row_of, np.full(len(kept), -1)])

    def beam(self, count: int, max_depth: int) -> np.ndarray:
        """The best unexpanded nodes whose children could still be among the best `budget`; empty when the search is over."""
        open_ = np.flatnonzero((self.row_of < 0) & (self.depths < max_depth))
        if len(self.scores) >= self.budget:
            lowest = np.partition(self.scores, len(self.scores) - self.budget)[len(self.scores) - self.budget]
            open_ = open_[self.scores[open_] + self.log_decay > lowest]
        if len(open_) > count:
            open_ = open_[np.argpartition(-self.scores[open_], count - 1)[:count]]
        return np.sort(open_)

    def expand(self, request: Request, nodes: np.ndarray) -> NewNodes:
        """These nodes are computed next."""
        rows = np.arange(self.rows, self.rows + len(nodes))
        self.row_of[nodes] = rows
        end = self.rows + len(nodes)
        if end > self.ancestors.shape[0]:
            grown = np.zeros((max(end, 2 * len(self.ancestors)),) * 2, bool)
            grown[: self.rows, : self.rows] = self.ancestors[: self.rows, : self.rows]
            self.ancestors = grown
        parents = self.parents[nodes]
        inner = parents >= 0
        self.ancestors[rows[inner], : self.rows] = self.ancestors[self.row_of[parents[inner]], : self.rows]
        self.ancestors[rows, rows] = True
        self.rows = end
        visible = self.ancestors[rows[0] : end, :end]
        return NewNodes(request, self.tokens[nodes].tolist(), self.depths[nodes], visible)

    def path(self, node: int) -> tuple[int, ...]:
        """Tokens from below the root down to `node`."""
        steps: list[int] = []
        while node >= 0:
            steps.append(int(self.tokens[node]))
            node = int(self.parents[node])
        return tuple(steps[::-1])

    def best(self, count: int) -> np.ndarray:
        """Numbers of the best `count` nodes, rising. Children score below parents, so these are a tree."""
        if len(self.scores) <= count:
            return np.arange(len(self.scores))
        order = np.argsort(-self.scores, kind="stable")[:count]  # ties: the older first, so parents stay
        return np.sort(order)


class SpecExecDrafter:
    """Searches for all requests together, `beams` nodes of each per draft pass."""

    def __init__(
        self,
        draft: DraftModel,
        sampler: Sampler,
        budget: int,
        beams: int,
        max_depth: int,
        branch_width: int,
        decay: float,
    ):
        self.draft, self.sampler, self.budget, self.beams = draft, sampler, budget, beams
        self.max_depth, self.decay = max_depth, decay
        self.branch_width = min(branch_width, draft.runner.model.vocab_size)
        self.num_tokens = budget
        self._rows: dict[str, np.ndarray] = {}

    def propose(
        self, requests: Sequence[Request], nodes: Sequence[int], depths: Sequence[int]
    ) -> list[TokenTree | None]:
        budgets = [min(self.budget, n) for n in nodes]
        most_computed = [min(self.beams * self.max_depth, 8 * b) for b in budgets]
        ready, logits = self.draft.begin(requests, most_computed, [min(self.max_depth, d) for d in depths])
        searches = {i: Search(budgets[i], self.decay) for i in ready}
        if logits is not None and ready:
            self._children([(requests[i], searches[i], np.array([-1])) for i in ready], logits)
        active = list(ready)
        for _ in range(1, self.max_depth):
            beams = {i: searches[i].beam(self.beams, min(self.max_depth, depths[i])) for i in active}
            active = [i for i in active if len(beams[i]) and searches[i].rows + len(beams[i]) <= most_computed[i]]
            if not active:
                break
            logits = self.draft.grow([searches[i].expand(requests[i], beams[i]) for i in active])
            self._children([(requests[i], searches[i], beams[i]) for i in active], logits)
        trees: list[TokenTree | None] = [None] * len(requests)
        for i, search in searches.items():
            kept = search.best(budgets[i])
            place = np.full(len(search.tokens) + 1, -1)
            place[kept] = np.arange(len(kept))
            trees[i] = TokenTree(search.tokens[kept], place[search.parents[kept]].astype(np.int32))
            self._rows[requests[i].id] = search.row_of[kept]
        return trees

    def _children(self, expanded: Sequence[tuple[Request, Search, np.ndarray]], logits_LW: Tensor) -> None:
        """Offer each search the likeliest children of the nodes it expanded."""
        if any(self.sampler.shapes(request) for request, _, _ in expanded):
            rows = [Row(request, search.path(int(n))) for request, search, nodes in expanded for n in nodes]
            logits_LW = self.sampler.shaped(logits_LW, rows)
        top = torch.log_softmax(logits_LW, -1).topk(self.branch_width, -1)
        logprobs, tokens = top.values.double().cpu().numpy(), top.indices.cpu().numpy()
        row = 0
        for _, search, nodes in expanded:
            rows = slice(row, row + len(nodes))
            search.add(nodes, tokens[rows], logprobs[rows])
            row += len(nodes)

    def committed(self, request: Request, path: Sequence[int]) -> None:
        rows = self._rows.pop(request.id)[list(path)]
        missing = np.flatnonzero(rows < 0)
        self.draft.keep(request, rows[: missing[0] if len(missing) else len(rows)].tolist())

    def remove(self, request: Request) -> None:
        self._rows.pop(request.id, None)
        self.draft.remove(request)
