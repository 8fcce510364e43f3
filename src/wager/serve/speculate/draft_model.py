"""Greedy chain guesses from a small draft model: the classical form of speculation.

Verified by sample-and-match, so even seeded samples are token for token those of plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wager.serve.request import Request
from wager.serve.sampling.filters import most_likely
from wager.serve.sampling.sampler import Row, Sampler
from wager.serve.speculate.draft_engine import DraftModel, NewNodes
from wager.serve.token_tree import TokenTree


class ModelChainDrafter:
    """Proposes up to `num_tokens` tokens per request by greedy decoding with the draft model."""

    def __init__(self, draft: DraftModel, num_tokens: int, sampler: Sampler):
        self.draft, self.num_tokens, self.sampler = draft, num_tokens, sampler
        self.max_depth = num_tokens

    def propose(
        self, requests: Sequence[Request], nodes: Sequence[int], depths: Sequence[int]
    ) -> list[TokenTree | None]:
        room = [min(self.num_tokens, n, d) for n, d in zip(nodes, depths, strict=True)]
        chains: list[list[int]] = [[] for _ in requests]
        active, logits = self.draft.begin(requests, [r - 1 for r in room], room)
        depth = 0
        while active and logits is not None:
            if any(self.sampler.shapes(requests[i]) for i in active):
                logits = self.sampler.shaped(logits, [Row(requests[i], tuple(chains[i])) for i in active])
            for i, token in zip(active, most_likely(logits).tolist(), strict=True):
                chains[i].append(token)
            depth += 1
            active = [i for i in active if depth < room[i]]
            if active:
                logits = self.draft.grow([_link(requests[i], chains[i][-1], depth) for i in active])
        return [TokenTree.chain(chain) if chain else None for chain in chains]

    def committed(self, request: Request, path: Sequence[int]) -> None:
        state = self.draft.states.get(request.id)
        self.draft.keep(request, range(min(len(path), state.grown if state else 0)))

    def remove(self, request: Request) -> None:
        self.draft.remove(request)


def _link(request: Request, token: int, depth: int) -> NewNodes:
    return NewNodes(request, [token], np.array([depth]), np.ones((1, depth), bool))
