"""Sequoia: token trees that fit this machine, filled by sampling without replacement (arXiv 2402.12374).

For a user: set `{"method": "sequoia", "draft": ...}` and get the tree that decodes fastest here; no shape to tune. The tree comes from
a file (`wager speculate plan`), the paper's static tree; or, with "tree": "auto", every step grows trees of its own by how sure the draft is
(`tree_choice.py`), priced by times that were measured when the engine started and are corrected while it serves.

Exact: greedy output is identical; sampled output has the target's distribution, because children are verified by a rule that knows the
law they were drawn from (`ratio.without_replacement`). Seeds give the same text only under the same trees.

Shape legend: L rows, W vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wager.serve.request import Request
from wager.serve.sampling.sampler import Row, Sampler
from wager.serve.speculate.draft_engine import DraftModel, NewNodes
from wager.serve.speculate.drafter import confidence, guess_law, noise, top_tokens
from wager.serve.speculate.ratio import draw_without_replacement, without_replacement
from wager.serve.speculate.tree_choice import Shape, Step, TreeChoice
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
        shapes = [
            self.choice.shape(r.params.greedy, r.id, n, d) for r, n, d in zip(requests, nodes, depths, strict=True)
        ]
        ready, logits = self.draft.begin(requests, [s.room for s in shapes], [s.depth for s in shapes])
        growing = {
            i: _Growing(requests[i], shapes[i], self.sampler.seed_of(requests[i])) for i in ready if shapes[i].room
        }
        if logits is None or not growing:
            return [None] * len(requests)
        if len(growing) < len(ready):
            logits = logits[torch.tensor([k for k, i in enumerate(ready) if i in growing], device=logits.device)]
        step, level, begun = self.choice.step(len(requests)), [(g, -1) for g in growing.values()], time.perf_counter()
        while level:
            fresh = self._sample(step, level, logits)
            by_shape = {id(g.shape): g for g, _ in level}
            going = step.deepen([(g.shape, nodes) for (g, _), nodes in zip(level, fresh, strict=True)])
            level = [(by_shape[id(shape)], node) for shape, node in going]
            if level:
                logits = self.draft.grow(_by_request(level))
        if step.price is not None and step.passes > 1:
            step.price.drafted(step.passes - 1, 1e3 * (time.perf_counter() - begun))
        self.choice.grown(step, [g.shape for g in growing.values()])
        for g in growing.values():
            self._proposed[g.request.id] = g
        return [growing[i].tree() if i in growing else None for i in range(len(requests))]

    def _sample(self, step: Step, parents: Sequence[tuple[_Growing, int]], logits_LW: Tensor) -> list[list[int]]:
        """Settle how many children the (request, node) pairs get, then fill them from the logits rows. Returns them, pair by pair."""
        if any(self.sampler.shapes(g.request) for g, _ in parents):
            logits_LW = self.sampler.shaped(logits_LW, [Row(g.request, g.path(node)) for g, node in parents])
        rows_LW = logits_LW.cpu().numpy()
        laws: list[np.ndarray | None] = [None] * len(parents)
        sure, best_LK = [0.0] * len(parents), np.empty((0, 0), np.int64)
        for i, (g, _) in enumerate(parents):
            if not g.request.params.greedy:
                laws[i] = law_W = guess_law(rows_LW[i], g.request.params.temperature)
                sure[i] = float(law_W.max())
        if any(law is None for law in laws):
            best_LK = top_tokens(rows_LW, 1)
            if step.price is not None:
                for i, (row_W, law) in enumerate(zip(rows_LW, laws, strict=True)):
                    if law is None:
                        sure[i] = confidence(row_W, int(best_LK[i, 0]))
        added = step.widen([(g.shape, node) for g, node in parents], sure)
        width = max((len(nodes) for nodes, law in zip(added, laws, strict=True) if law is None), default=0)
        if width > 1:
            best_LK = top_tokens(rows_LW, width)
        for i, ((g, node), children, law_W) in enumerate(zip(parents, added, laws, strict=True)):
            if law_W is None:
                g.fill(node, best_LK[i, : len(children)].tolist(), None)
            else:
                g.fill(node, draw_without_replacement(law_W, len(children), g.numbers(children)), law_W)
        return added

    def committed(self, request: Request, path: Sequence[int]) -> None:
        g = self._proposed.pop(request.id)
        self.choice.decided(g.shape, path)
        self.draft.keep(request, [g.row_of[n] for n in path if n in g.row_of])

    def timed(self, batch: int, step_ms: float) -> None:
        self.choice.timed(batch, step_ms)

    def remove(self, request: Request) -> None:
        self._proposed.pop(request.id, None)
        self.choice.forget(request.id)
        self.draft.remove(request)


class _Growing:
    """One request's tree while it is filled."""

    def __init__(self, request: Request, shape: Shape, seed: int):
        self.request, self.shape, self.seed = request, shape, seed
        self.tokens: list[int] = []
        self.laws: dict[int, np.ndarray] = {}  # by node, -1 the root
        self.row_of: dict[int, int] = {}
        self._above: list[list[int]] = []  # by computed row, the rows that it sees
        self._noise = np.empty(0)

    def numbers(self, children: Sequence[int]) -> np.ndarray:
        """The random numbers of these nodes, the same however many others there are."""
        if children and children[-1] >= len(self._noise):
            count = len(self.shape.fixed) if self.shape.fixed is not None else max(16, 2 * (children[-1] + 1))
            self._noise = noise(self.seed, self.request.num_tokens, count)
        return self._noise[children[0] : children[-1] + 1] if children else self._noise[:0]

    def path(self, node: int) -> tuple[int, ...]:
        """Guessed tokens from below the root down to `node`."""
        steps: list[int] = []
        while node >= 0:
            steps.append(self.tokens[node])
            node = self.shape.parents[node]
        return tuple(steps[::-1])

    def fill(self, node: int, tokens: Sequence[int], law_W: np.ndarray | None) -> None:
        """The children that `node` was given last, which are the tree's latest nodes."""
        self.tokens += tokens
        if law_W is not None:
            self.laws[node] = law_W

    def new_nodes(self, nodes: Sequence[int]) -> NewNodes:
        """The draft's next pass over these nodes of one depth."""
        parents, cached = self.shape.parents, len(self.row_of)
        visible = np.zeros((len(nodes), cached + len(nodes)), bool)
        for i, node in enumerate(nodes):
            row = self.row_of[node] = cached + i
            above = [row] if parents[node] < 0 else [*self._above[self.row_of[parents[node]]], row]
            self._above.append(above)
            visible[i, above] = True
        depths = np.full(len(nodes), self.shape.depths[nodes[0]])
        return NewNodes(self.request, [self.tokens[n] for n in nodes], depths, visible)

    def tree(self) -> TokenTree | None:
        parents = np.asarray(self.shape.parents, dtype=np.int32)
        if not len(parents):
            return None
        tokens = np.asarray(self.tokens, dtype=np.int64)
        if self.request.params.greedy:
            return TokenTree(tokens, parents)
        rows = np.full(len(parents) + 1, -1)
        for index, node in enumerate(self.laws):
            rows[node + 1] = index
        return TokenTree(tokens, parents, WithoutReplacement(np.stack(list(self.laws.values())), rows))


def _by_request(level: Sequence[tuple[_Growing, int]]) -> list[NewNodes]:
    """Nodes of one request lie side by side."""
    nodes: dict[int, tuple[_Growing, list[int]]] = {}
    for g, node in level:
        nodes.setdefault(id(g), (g, []))[1].append(node)
    return [g.new_nodes(own) for g, own in nodes.values()]
