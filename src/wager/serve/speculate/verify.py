"""Verification: which guesses of a token tree become output, and what the target says after them.

Two kinds of rule, chosen by what the tree carries.

*Sample and match* (any tree): at each node of the walk the target samples with the random number that belongs to that output position,
exactly as it would without guesses; a guess is accepted when it is what the target sampled. So the committed tokens are those of plain
decoding, seed for seed, whatever the guesses and the sampling parameters are. (Naive sampling in SpecInfer, arXiv 2305.09781; the cache
look-up of SpecExec, arXiv 2406.02532.)

*Ratio rules* (`ratio.py`; trees whose tokens were drawn from known draft distributions): accept with a probability that depends on both
distributions. The output has the target's distribution; more guesses survive than by matching.

The walk is lazy: distributions are made only for nodes it visits, for all requests of the batch level by level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from wager.serve.outputs import TokenLogprobs
from wager.serve.request import Request
from wager.serve.sampling.filters import most_likely
from wager.serve.sampling.sampler import Row, Sampler
from wager.serve.speculate.drafter import softmax
from wager.serve.token_tree import TokenTree


class RatioDraft(Protocol):
    """What a tree carries (`TokenTree.draft`) when its tokens were drawn from known distributions."""

    def numbers(self, row: int, children: int) -> int:
        """How many random numbers a decision at this span row with so many children takes."""
        ...

    def choose(
        self, tree: TokenTree, row: int, children: Sequence[int], target_W: np.ndarray, uniforms: np.ndarray
    ) -> tuple[int | None, int]:
        """Decide at one visited node (span row `row`, its children in proposal order): (accepted child or None, token to commit)."""
        ...


@dataclass(frozen=True)
class Verifying:
    """One request's rows of the logits: `first` is the row after its last committed token, node i is row first + 1 + i."""

    request: Request
    tree: TokenTree | None
    first: int


@dataclass
class Verdict:
    """path: accepted nodes along one root path. tokens: what to commit, those of the path and one more from the target; the last may be
    missing where the request's constraints leave no token. logprobs: one entry per token when the request wants them."""

    path: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)


def sample_and_match(tree: TokenTree | None, sampled: np.ndarray) -> tuple[list[int], list[int]]:
    """Walk down from the root along guesses that equal the target's own samples.

    sampled: int64 [n + 1], the target's token after the root (row 0) and after each node (row i + 1).
    Returns the accepted nodes along one root path and the tokens to commit: those of the path and one more from the target.
    """
    token = int(sampled[0])
    if tree is None or not len(tree):
        return [], [token]
    children = tree.children()
    path: list[int] = []
    committed = [token]
    row = 0
    while True:
        match = next((node for node in children[row] if int(tree.tokens[node]) == token), None)
        if match is None:
            return path, committed
        path.append(match)
        row = match + 1
        token = int(sampled[row])
        committed.append(token)


@dataclass
class _Walk:
    """Where one request's walk stands: `row` is the span row whose successor is to be chosen, -1 when it has ended."""

    item: Verifying
    children: list[list[int]]
    verdict: Verdict
    row: int = 0

    @property
    def guesses(self) -> tuple[int, ...]:
        return tuple(self.verdict.tokens)

    @property
    def ratio(self) -> RatioDraft | None:
        return None if self.item.tree is None else self.item.tree.draft

    def move(self, child: int | None, token: int) -> None:
        if token >= 0:  # below 0: nothing may follow the node above
            self.verdict.tokens.append(token)
        if child is None:
            self.row = -1
        else:
            self.verdict.path.append(child)
            self.row = child + 1


def verify(items: Sequence[Verifying], logits_LW: Tensor, sampler: Sampler) -> list[Verdict]:
    """Walk every request's tree. Tokens beyond one that ends the request may be among the verdict's; the caller cuts them."""
    if all(_plainly_greedy(item, sampler) for item in items):
        return _greedy(items, logits_LW)
    if all(_plainly_by_ratio(item, sampler) for item in items):
        rows_LW = logits_LW.cpu().numpy()
        return [_alone(item, rows_LW, sampler) for item in items]
    walks = [_Walk(item, [[]] if item.tree is None else item.tree.children(), Verdict()) for item in items]
    active = list(walks)
    while active:
        rows = torch.tensor([w.item.first + w.row for w in active], device=logits_LW.device)
        whole = len(active) == len(logits_LW) and bool((rows == torch.arange(len(rows), device=rows.device)).all())
        logits = logits_LW if whole else logits_LW.index_select(0, rows)
        matching = [i for i, w in enumerate(active) if w.ratio is None]
        by_ratio = [i for i, w in enumerate(active) if w.ratio is not None]
        if not by_ratio:
            _match(active, logits, sampler)
        else:
            if matching:
                _match([active[i] for i in matching], logits[matching], sampler)
            _by_ratio([active[i] for i in by_ratio], logits[by_ratio], sampler)
        active = [w for w in active if w.row >= 0]
    return [w.verdict for w in walks]


def _plainly_greedy(item: Verifying, sampler: Sampler) -> bool:
    """Whether the target's choice at every node is its most likely token and nothing but the token is wanted."""
    params = item.request.params
    return params.greedy and params.logprobs is None and not sampler.shapes(item.request)


def _plainly_sampled(item: Verifying, sampler: Sampler) -> bool:
    """Whether the target's distribution is a softmax at a temperature and nothing more."""
    p = item.request.params
    filtered = p.min_p > 0 or p.top_k > 0 or p.top_p < 1
    return not (p.greedy or filtered or sampler.shapes(item.request))


def _plainly_by_ratio(item: Verifying, sampler: Sampler) -> bool:
    """Whether a ratio rule decides over plain softmaxes and nothing but the token is wanted."""
    ratio = item.tree is not None and item.tree.draft is not None
    return ratio and item.request.params.logprobs is None and _plainly_sampled(item, sampler)


def _alone(item: Verifying, rows_LW: np.ndarray, sampler: Sampler) -> Verdict:
    """One request's walk by a ratio rule, without what walks together and other requests' wishes take."""
    tree, verdict, row = item.tree, Verdict(), 0
    assert tree is not None and tree.draft is not None
    children = tree.children()
    while row >= 0:
        target_W = softmax(rows_LW[item.first + row], item.request.params.temperature)
        if not np.isfinite(target_W).all():
            break
        count = tree.draft.numbers(row, len(children[row]))
        uniforms = sampler.decisions(item.request, len(verdict.tokens), count)
        child, token = tree.draft.choose(tree, row, children[row], target_W, uniforms)
        verdict.tokens.append(token)
        verdict.logprobs.append(None)
        row = -1
        if child is not None:
            verdict.path.append(child)
            row = child + 1
    return verdict


def _greedy(items: Sequence[Verifying], logits_LW: Tensor) -> list[Verdict]:
    """All choices at once: one search beats a walk that asks at every node."""
    chosen_L = most_likely(logits_LW).cpu().numpy()
    verdicts = []
    for item in items:
        nodes = 0 if item.tree is None else len(item.tree)
        path, tokens = sample_and_match(item.tree, chosen_L[item.first : item.first + nodes + 1])
        verdicts.append(Verdict(path, tokens, [None] * len(tokens)))
    return verdicts


def _match(walks: Sequence[_Walk], logits_LW: Tensor, sampler: Sampler) -> None:
    sampled = sampler.sample(logits_LW, [Row(w.item.request, w.guesses) for w in walks])
    for walk, token, logprobs in zip(walks, sampled.tokens_L.tolist(), sampled.logprobs, strict=True):
        tree = walk.item.tree
        child = None
        if tree is not None:
            child = next((c for c in walk.children[walk.row] if int(tree.tokens[c]) == token), None)
        walk.verdict.logprobs.append(logprobs)
        walk.move(child, token)


def _by_ratio(walks: Sequence[_Walk], logits_LW: Tensor, sampler: Sampler) -> None:
    rows = [Row(w.item.request, w.guesses) for w in walks]
    if all(_plainly_sampled(walk.item, sampler) for walk in walks):
        logits = logits_LW.cpu().numpy()
        probs_LW = [softmax(row, w.item.request.params.temperature) for row, w in zip(logits, walks, strict=True)]
    else:
        probs_LW = sampler.probabilities(logits_LW, rows).double().cpu().numpy()
    tokens = []
    for walk, target_W in zip(walks, probs_LW, strict=True):
        tree, draft, row = walk.item.tree, walk.ratio, walk.row
        assert tree is not None and draft is not None
        children = walk.children[row]
        uniforms = sampler.decisions(walk.item.request, len(walk.guesses), draft.numbers(row, len(children)))
        child, token = None, -1
        if np.isfinite(target_W).all():
            child, token = draft.choose(tree, row, children, target_W, uniforms)
        walk.move(child, token)
        tokens.append(token)
    for walk, logprobs in zip(walks, sampler.logprobs(logits_LW, tokens, rows), strict=True):
        walk.verdict.logprobs.append(logprobs)


def accepted_by_depth(num_tokens: int, accepted: Sequence[int]) -> np.ndarray:
    """int64 [num_tokens]: how many proposals had their guess at each depth accepted."""
    counts = np.zeros(num_tokens, np.int64)
    for length in accepted:
        counts[:length] += 1
    return counts
