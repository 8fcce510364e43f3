"""SpecExec: one large tree of the likeliest continuations, looked up like a cache (arXiv 2406.02532).

For a user: `{"method": "specexec", "draft": ..., "budget": 512}` for targets that are slow to step whatever the step holds, above all
models whose weights are streamed from disk (`offload.py`). The draft model searches best-first for the `budget` nodes with the highest
probability of being reached; one target pass computes what follows every node; the walk then samples from the target's own
distributions until it leaves the tree.

Exact for any tree: every committed token is the target's own sample (`verify.sample_and_match`), seed for seed.

The search is shortest paths in batches: a node's score is the sum over its path of log q + log decay, children score below parents, and
a pass expands the best `beams` unexpanded nodes. It ends when no unexpanded node can have a child among the best `budget`, after
`max_depth` passes, or when nothing is left. With the pass limit out of reach the tree is the exact top `budget`.

The paper reads q at temperature 1, whatever the request asks for. How sure a draft is of its favourites says little about how often a request
follows them, least of all a greedy one. So q is read here at the temperature at which it foretold the target's tokens best so far
(`Calibration`): with a good draft, greedy trees reach deeper.

Shape legend: L rows, W vocabulary, C children considered per node.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wager.serve.request import Request
from wager.serve.sampling.sampler import Row, Sampler
from wager.serve.speculate.draft_engine import DraftModel, NewNodes
from wager.serve.token_tree import TokenTree

TEMPERATURES = np.array([0.25, 0.35, 0.5, 0.7, 1.0])
HEAD_START = 2.0  # nats that the first temperature is ahead of the others
REMEMBERED = 0.998  # of what was counted, at every further token


class Calibration:
    """The temperature of TEMPERATURES under which the draft made the target's tokens likeliest, counted while serving."""

    def __init__(self, first: float):
        self.loss = HEAD_START * (TEMPERATURES[np.abs(TEMPERATURES - first).argmin()] != TEMPERATURES)

    @property
    def temperature(self) -> float:
        return float(TEMPERATURES[self.loss.argmin()])

    def add(self, logprobs_C: np.ndarray, chosen: int) -> None:
        """The target followed child `chosen` of those with these log-probabilities at temperature 1."""
        scaled = logprobs_C / TEMPERATURES[:, None]
        self.loss = REMEMBERED * self.loss + np.logaddexp.reduce(scaled, axis=1) - scaled[:, chosen]


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
        self.offered: list[
            tuple[np.ndarray, np.ndarray]
        ] = []  # tokens and log-probabilities [C] below the root, then below each row
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


@dataclass
class Proposed:
    """What is remembered of a tree until it is judged: every node's token and row in the draft, and what was offered below the rows."""

    tokens: np.ndarray
    rows: np.ndarray
    offered: list[tuple[np.ndarray, np.ndarray]]

    def decisions(self, path: Sequence[int], last: int | None) -> Iterator[tuple[np.ndarray, int]]:
        """(log-probabilities [C], which was chosen) along the accepted path; `last` is the token after it, if known."""
        followed = [int(self.tokens[n]) for n in path] + ([] if last is None else [last])
        for node, token in zip((-1, *path), followed, strict=False):
            row = -1 if node < 0 else int(self.rows[node])
            if node >= 0 and row < 0:  # not expanded, nor is anything below it
                return
            tokens_C, logprobs_C = self.offered[row + 1]
            if len(at := np.flatnonzero(tokens_C == token)):
                yield logprobs_C, int(at[0])


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
        temperature: float | None = None,
    ):
        self.draft, self.sampler, self.budget, self.beams, self.temperature = draft, sampler, budget, beams, temperature
        self.max_depth, self.decay = max_depth, decay
        self.branch_width = min(branch_width, draft.runner.model.vocab_size)
        self.num_tokens = budget
        self.calibrations: dict[int, Calibration] = {}
        self._proposed: dict[str, Proposed] = {}

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
            self._proposed[requests[i].id] = Proposed(search.tokens[kept], search.row_of[kept], search.offered)
        return trees

    def _children(self, expanded: Sequence[tuple[Request, Search, np.ndarray]], logits_LW: Tensor) -> None:
        """Offer each search the likeliest children of the nodes it expanded."""
        if any(self.sampler.shapes(request) for request, _, _ in expanded):
            rows = [Row(request, search.path(int(n))) for request, search, nodes in expanded for n in nodes]
            logits_LW = self.sampler.shaped(logits_LW, rows)
        top = torch.log_softmax(logits_LW, -1).topk(self.branch_width, -1)
        logprobs, tokens = top.values.double().cpu().numpy(), top.indices.cpu().numpy()
        row = 0
        for request, search, nodes in expanded:
            rows = slice(row, row + len(nodes))
            search.offered += zip(tokens[rows], logprobs[rows], strict=True)
            search.add(nodes, tokens[rows], at_temperature(logprobs[rows], self.temperature_of(request)))
            row += len(nodes)

    def temperature_of(self, request: Request) -> float:
        """At which the draft's probabilities are read."""
        return self.temperature or self._calibration(request).temperature

    def _calibration(self, request: Request) -> Calibration:
        asked = min(request.params.temperature, 1.0)
        return self.calibrations.setdefault(round(4 * asked), Calibration(max(asked, 0.5)))

    def committed(self, request: Request, path: Sequence[int]) -> None:
        proposed = self._proposed.pop(request.id)
        known = request.token_ids[-len(path) - 1 : -1] == proposed.tokens[list(path)].tolist()
        calibration = self._calibration(request)
        for logprobs_C, chosen in proposed.decisions(path, request.token_ids[-1] if known else None):
            calibration.add(logprobs_C, chosen)
        rows = proposed.rows[list(path)]
        missing = np.flatnonzero(rows < 0)
        self.draft.keep(request, rows[: missing[0] if len(missing) else len(rows)].tolist())

    def remove(self, request: Request) -> None:
        self._proposed.pop(request.id, None)
        self.draft.remove(request)


def at_temperature(logprobs_LC: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probabilities among the children that are considered, read at another temperature; what lies outside keeps its share."""
    if temperature == 1:
        return logprobs_LC
    scaled = logprobs_LC / temperature
    inside_L1 = np.logaddexp.reduce(logprobs_LC, axis=1, keepdims=True)
    return scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True) + inside_L1
