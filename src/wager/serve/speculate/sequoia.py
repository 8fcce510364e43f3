"""Sequoia: static token trees chosen for this machine, filled by sampling without replacement (arXiv 2402.12374).

For a user: set `{"method": "sequoia", "draft": ...}` and get the tree that decodes fastest here; no shape to tune. The tree comes from
a file (`wager speculate plan`), or, with "tree": "auto", from times measured when the engine starts and acceptance counted while it
serves (`tree_choice.py`), planned anew as counts grow and for each batch size.

Exact: greedy output is identical; sampled output has the target's distribution, because children are verified by a rule that knows the
law they were drawn from (`ratio.without_replacement`). Seeds give the same text only under the same trees.

Shape legend: L rows, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wager.serve.request import Request
from wager.serve.sampling.sampler import Row, Sampler
from wager.serve.speculate.draft_engine import DraftModel, NewNodes
from wager.serve.speculate.drafter import guess_law, noise, top_tokens
from wager.serve.speculate.ratio import draw_without_replacement, without_replacement
from wager.serve.speculate.tree_choice import TreeChoice
from wager.serve.speculate.tree_plan import GrowMap
from wager.serve.token_tree import TokenTree


@dataclass
class WithoutReplacement:
    """Draft distributions of a tree's expanded rows: rows[r] is the index in probs_LW of span row r, -1 for rows without children."""

    probs_LW: np.ndarray
    rows: np.ndarray

    def numbers(self, row: int, children: int) -> int:
        return children + 1

    def choose(
        self, tree: TokenTree, row: int, children: Sequence[int], target_W: np.ndarray, uniforms: np.ndarray
    ) -> tuple[int | None, int]:
        tokens = [int(tree.tokens[c]) for c in children]
        draft_W = self.probs_LW[self.rows[row]]
        index, token = without_replacement(target_W, draft_W, tokens, uniforms)
        return None if index is None else children[index], token


class SequoiaDrafter:
    """Grows the chosen tree level by level, all requests together."""

    def __init__(self, draft: DraftModel, choice: TreeChoice, sampler: Sampler):
        self.draft, self.choice, self.sampler = draft, choice, sampler
        self._proposed: dict[str, _Growing] = {}

    @property
    def num_tokens(self) -> int:
        return self.choice.max_nodes

    @property
    def max_depth(self) -> int:
        return self.choice.deepest

    def room(self, batch: int) -> int:
        return self.choice.room(batch)

    def propose(
        self, requests: Sequence[Request], nodes: Sequence[int], depths: Sequence[int]
    ) -> list[TokenTree | None]:
        maps = [
            self.choice.tree(len(requests), r.params.greedy, r.id).shrunk(n, d)
            for r, n, d in zip(requests, nodes, depths, strict=True)
        ]
        computing = [sum(len(level.nodes) for level in m.levels) for m in maps]
        ready, logits = self.draft.begin(requests, computing, [m.depth for m in maps])
        growing = [_Growing(requests[i], maps[i], self.sampler.seed_of(requests[i])) for i in ready if len(maps[i])]
        if logits is None or not growing:
            return [None] * len(requests)
        if len(growing) < len(ready):
            logits = logits[torch.tensor([k for k, i in enumerate(ready) if len(maps[i])], device=logits.device)]
        self._sample([(g, -1) for g in growing], logits)
        level, active = 0, growing
        while active := [g for g in active if level < len(g.map.levels)]:
            logits = self.draft.grow([g.new_nodes(level) for g in active])
            self._sample([(g, int(n)) for g in active for n in g.map.levels[level].nodes], logits)
            level += 1
        trees: list[TokenTree | None] = [None] * len(requests)
        chosen = iter(growing)
        for i in ready:
            if len(maps[i]):
                g = next(chosen)
                trees[i] = g.tree()
                self._proposed[requests[i].id] = g
        return trees

    def _sample(self, parents: Sequence[tuple[_Growing, int]], logits_LW: Tensor) -> None:
        """Fill the children of (request, node) pairs from their logits rows."""
        if any(self.sampler.shapes(g.request) for g, _ in parents):
            logits_LW = self.sampler.shaped(logits_LW, [Row(g.request, g.path(node)) for g, node in parents])
        rows_LW = logits_LW.cpu().numpy()
        width = max((len(g.map.children[n + 1]) for g, n in parents if g.request.params.greedy), default=0)
        best = top_tokens(rows_LW, width) if width else None
        for i, (g, node) in enumerate(parents):
            if best is not None and g.request.params.greedy:
                g.fill(node, best[i], None)
                continue
            children = g.map.children[node + 1]
            probs_W = guess_law(rows_LW[i], g.request.params.temperature)
            g.fill(node, draw_without_replacement(probs_W, len(children), g.numbers(children)), probs_W)

    def committed(self, request: Request, path: Sequence[int]) -> None:
        g = self._proposed.pop(request.id)
        self.choice.decided(g.map, request.params.greedy, path, request.id)
        self.draft.keep(request, [g.row_of[n] for n in path if n in g.row_of])

    def timed(self, batch: int, step_ms: float) -> None:
        self.choice.timed(batch, step_ms)

    def remove(self, request: Request) -> None:
        self._proposed.pop(request.id, None)
        self.choice.forget(request.id)
        self.draft.remove(request)


class _Growing:
    """One request's tree while it is filled."""

    def __init__(self, request: Request, map_: GrowMap, seed: int):
        self.request, self.map = request, map_
        self.tokens = np.zeros(len(map_), np.int64)
        self.rows = np.full(len(map_) + 1, -1)
        self.probs: list[np.ndarray] = []
        self.row_of: dict[int, int] = {}
        self._noise = None if request.params.greedy else noise(seed, request.num_tokens, len(map_))

    def numbers(self, children: Sequence[int]) -> np.ndarray:
        assert self._noise is not None
        return self._noise[children]

    def path(self, node: int) -> tuple[int, ...]:
        """Guessed tokens from below the root down to `node`."""
        steps: list[int] = []
        while node >= 0:
            steps.append(int(self.tokens[node]))
            node = self.map.parents[node]
        return tuple(steps[::-1])

    def fill(self, node: int, tokens: Sequence[int], probs_W: np.ndarray | None) -> None:
        children = self.map.children[node + 1]
        self.tokens[children] = tokens[: len(children)]
        if probs_W is not None:
            self.rows[node + 1] = len(self.probs)
            self.probs.append(probs_W)

    def new_nodes(self, level: int) -> NewNodes:
        step = self.map.levels[level]
        for node in step.nodes.tolist():
            self.row_of[node] = len(self.row_of)
        depths = np.full(len(step.nodes), level + 1)
        return NewNodes(self.request, self.tokens[step.nodes].tolist(), depths, step.visible)

    def tree(self) -> TokenTree:
        parents = np.asarray(self.map.parents, dtype=np.int32)
        if self._noise is None:
            return TokenTree(self.tokens, parents)
        return TokenTree(self.tokens, parents, WithoutReplacement(np.stack(self.probs), self.rows))
