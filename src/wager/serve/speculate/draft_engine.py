"""A draft model in the same engine: batched over requests, with KV blocks and a prefix cache of its own.

It may lag behind the target (a long prompt, a while switched off) and catches up in chunks; a request it has not caught up with is not
guessed for in that step. Trees are grown bit by bit: the KV of computed nodes stays in the cache, and after verification the accepted
path is moved to where a chain would have put it.

Shape legend: L rows, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wager.serve.request import Request
from wager.serve.runner import Growth, ModelRunner, SpanInput
from wager.serve.speculate.planned_pass import plan_pass


@dataclass
class DraftState:
    """computed: leading tokens of the request whose KV the draft holds and that are known to be right. grown: tree rows after them."""

    computed: int
    grown: int = 0


@dataclass(frozen=True)
class NewNodes:
    """Nodes to compute for one request. visible: bool [n, cached + n] over the tree rows computed before and these."""

    request: Request
    tokens: Sequence[int]
    depths: np.ndarray
    visible: np.ndarray


class DraftModel:
    """One draft model. catch_up_tokens bounds what it computes of prompts in one step."""

    def __init__(self, runner: ModelRunner, catch_up_tokens: int, max_positions: int):
        self.runner, self.catch_up_tokens, self.max_positions = runner, catch_up_tokens, max_positions
        self.states: dict[str, DraftState] = {}
        self.planned = plan_pass(runner)

    def begin(
        self, requests: Sequence[Request], nodes: Sequence[int], depths: Sequence[int]
    ) -> tuple[list[int], Tensor | None]:
        """Catch up with the requests. Returns those (as indices) that may be guessed for, and the logits [L, W] after their last token.

        nodes: rows of the tree each will compute here at most; depths: of its tree.
        """
        inputs, ready = [], []
        budget = self.catch_up_tokens
        for i, request in enumerate(requests):
            state = self._state(request)
            missing = request.num_tokens - state.computed
            count = min(missing, budget)
            guesses = count == missing and request.num_tokens + depths[i] <= self.max_positions
            if count <= 0 or not self._reserve(request, state.computed + count, nodes[i] if guesses else 0):
                continue
            budget -= count
            tokens = request.token_ids[state.computed : state.computed + count]
            inputs.append(SpanInput(request.id, tokens, state.computed, logit_rows=1 if guesses else 0))
            state.computed += count
            state.grown = 0
            if guesses:
                ready.append(i)
        return ready, self.logits(inputs) if inputs else None

    def grow(self, nodes: Sequence[NewNodes]) -> Tensor:
        """Compute tree nodes; logits [L, W] of all of them, request by request. Room was reserved by `begin`."""
        inputs = []
        for new in nodes:
            state = self.states[new.request.id]
            growth = Growth(state.grown, new.depths, new.visible)
            count = len(new.tokens)
            inputs.append(SpanInput(new.request.id, new.tokens, new.request.num_tokens, None, count, growth))
            state.grown += count
        logits = self.logits(inputs)
        assert logits is not None
        return logits

    def keep(self, request: Request, rows: Sequence[int]) -> None:
        """Of the grown rows these, one root path downwards, turned out right; request.token_ids already holds their tokens."""
        state = self.states.get(request.id)
        if state is None:
            return
        if state.grown:
            self.runner.keep_rows(request.id, state.computed, rows)
            state.computed += len(rows)
            state.grown = 0
        self.runner.blocks.truncate(request.id, state.computed)
        self.runner.blocks.commit(request.id, request.token_ids, state.computed)

    def remove(self, request: Request) -> None:
        if self.states.pop(request.id, None) is not None:
            self.runner.blocks.free(request.id)

    def _reserve(self, request: Request, tokens: int, nodes: int) -> bool:
        return self.runner.blocks.reserve(request.id, tokens + nodes)

    def _state(self, request: Request) -> DraftState:
        state = self.states.get(request.id)
        if state is None:
            computed = self.runner.blocks.start(request.id, request.token_ids, request.cache_key)
            state = self.states[request.id] = DraftState(computed)
        return state

    def logits(self, inputs: Sequence[SpanInput]) -> Tensor | None:
        """Logits [L, W] of the wanted rows, None where none are; they may lie in a buffer that the next pass uses again."""
        if self.planned is not None and self.planned.fits(inputs):
            found = self.planned.logits(inputs)
            return torch.from_numpy(found) if len(found) else None
        batch = self.runner.build(inputs)
        hidden_TD = self.runner.forward(batch)
        if not len(batch.logit_rows_L):
            return None
        with torch.inference_mode():
            return self.runner.logits(hidden_TD, batch.logit_rows_L)
