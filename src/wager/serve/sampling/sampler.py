"""From logits to tokens, for all rows of a batch at once.

Order of operations: raw log-probabilities are taken; allowed tokens, bad words, minimum length and biases; grammar mask; repetition,
frequency and presence penalties; temperature; min-p, top-k, top-p; draw. A feature costs nothing in rows that do not use it.

Shape legend: L rows, R rows that use a feature, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wager import kernels
from wager.serve.outputs import TokenLogprobs
from wager.serve.params import GREEDY_BELOW_TEMPERATURE
from wager.serve.request import Request
from wager.serve.sampling.filters import draw, keep_likely, most_likely
from wager.serve.sampling.grammar import Grammar, apply_bitmask
from wager.serve.sampling.logprobs import token_logprobs
from wager.serve.sampling.rng import derive_seed, few_uniforms, uniforms
from wager.serve.sampling.state import SamplerState, edit_row, make_state, penalise

DECISIONS = 0x2545F4914F6CDD1D


@dataclass(frozen=True)
class Row:
    """The distribution of the token after `request`'s committed tokens and the guessed path `guesses`."""

    request: Request
    guesses: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sampled:
    """tokens_L: int64, -1 where a request's own constraints leave no token. logprobs: per row, None unless the request asked."""

    tokens_L: np.ndarray
    logprobs: list[TokenLogprobs | None]


class Sampler:
    """Holds what outlives a step: seeds, penalty counts, grammar states. `generator` seeds requests that name no seed."""

    def __init__(self, vocab_size: int, device: torch.device | str, generator: np.random.Generator):
        self.vocab_size, self.device, self.generator = vocab_size, torch.device(device), generator
        self._states: dict[str, SamplerState] = {}

    def add(self, request: Request, grammar: Grammar | None = None, bad_words: Sequence[list[int]] = ()) -> None:
        seed = request.params.seed
        own = int(self.generator.integers(2**63)) if seed is None else derive_seed(seed, request.index)
        self._states[request.id] = make_state(request, own, grammar, list(bad_words), self.vocab_size, self.device)

    def remove(self, request_id: str) -> None:
        self._states.pop(request_id, None)

    def committed(self, request: Request, new_token_ids: list[int]) -> None:
        """Tokens became part of the output: count them and advance the grammar."""
        state = self._states[request.id]
        if state.counts_W is not None:
            for token in new_token_ids:
                state.counts_W[token] += 1
        if state.grammar is not None:
            state.grammar.accept(new_token_ids)

    @torch.inference_mode()
    def sample(self, logits_LW: Tensor, rows: Sequence[Row]) -> Sampled:
        """Choose one token per row. `logits_LW` is float32 and left as it is."""
        states = [self._states[row.request.id] for row in rows]
        processed = self._processed(logits_LW, rows, states)
        hot = [i for i, s in enumerate(states) if not s.request.params.greedy]
        if len(hot) == len(rows):
            tokens = self._draw(processed, rows, states)
        else:
            tokens = most_likely(processed)
            if hot:
                chosen = torch.tensor(hot, device=processed.device)
                tokens[chosen] = self._draw(processed[chosen], [rows[i] for i in hot], [states[i] for i in hot])
        tokens_L = tokens.cpu().numpy()
        logprobs = self._logprobs(logits_LW, tokens_L, states)
        masked = [i for i, s in enumerate(states) if s.edits or s.grammar is not None]
        if masked:
            best = processed[torch.tensor(masked, device=processed.device)].amax(-1).cpu().numpy()
            tokens_L[np.array(masked)[np.isneginf(best)]] = -1
        return Sampled(tokens_L, logprobs)

    @torch.inference_mode()
    def probabilities(self, logits_LW: Tensor, rows: Sequence[Row]) -> Tensor:
        """float32 [L, W]: the distribution each row is sampled from; one-hot for greedy rows."""
        states = [self._states[row.request.id] for row in rows]
        processed = self._processed(logits_LW, rows, states)
        weights = self._weights(processed, states)
        greedy = torch.tensor([s.request.params.greedy for s in states], device=processed.device)
        one_hot = torch.nn.functional.one_hot(processed.argmax(-1), processed.shape[1]).float()
        return torch.where(greedy[:, None], one_hot, weights / weights.sum(-1, keepdim=True))

    def seed_of(self, request: Request) -> int:
        """The seed of the request's own number sequence."""
        return self._states[request.id].seed

    def shapes(self, request: Request) -> bool:
        """Whether masks, biases, a grammar or penalties change this request's logits."""
        state = self._states[request.id]
        return state.edits or state.grammar is not None or state.counts_W is not None

    @torch.inference_mode()
    def shaped(self, logits_LW: Tensor, rows: Sequence[Row]) -> Tensor:
        """A draft model's logits with the masks, biases, grammars and penalties of the requests, so that it guesses what may be chosen.
        A row that nothing may follow is left as it is."""
        processed = self._processed(logits_LW, rows, [self._states[row.request.id] for row in rows])
        if processed is logits_LW:
            return logits_LW
        dead = torch.isneginf(processed.amax(-1, keepdim=True))
        return torch.where(dead, logits_LW, processed)

    def decisions(self, request: Request, num_guesses: int, count: int) -> np.ndarray:
        """Numbers in [0, 1) with which a verifier decides about the token `num_guesses` after the committed ones; a stream apart from
        the one tokens are sampled with."""
        position = request.num_tokens + num_guesses
        return few_uniforms(derive_seed(self._states[request.id].seed ^ DECISIONS, position + 1), count)

    def logprobs(self, logits_LW: Tensor, tokens: Sequence[int], rows: Sequence[Row]) -> list[TokenLogprobs | None]:
        """Entries for tokens that were chosen elsewhere; None where the request wants none or nothing was chosen (-1)."""
        chosen = np.maximum(np.asarray(tokens, dtype=np.int64), 0)
        return self._logprobs(logits_LW, chosen, [self._states[row.request.id] for row in rows])

    def prompt_logprobs(self, logits_LW: Tensor, next_token_ids: Sequence[int], count: int) -> list[TokenLogprobs]:
        """Log-probabilities of prompt tokens under the rows before them."""
        return token_logprobs(logits_LW, next_token_ids, [count] * len(next_token_ids))

    # -- stages ------------------------------------------------------------------------------------------------------------------

    def _processed(self, logits_LW: Tensor, rows: Sequence[Row], states: list[SamplerState]) -> Tensor:
        """Masks, biases, grammar and penalties; a copy is made only when one of them applies."""
        edited = [i for i, s in enumerate(states) if s.edits]
        constrained = [i for i, s in enumerate(states) if s.grammar is not None]
        penalised = [i for i, s in enumerate(states) if s.counts_W is not None]
        if not (edited or constrained or penalised):
            return logits_LW
        logits_LW = logits_LW.clone()
        for i in edited:
            edit_row(logits_LW[i], states[i], rows[i].guesses)
        if constrained:
            grammars = [states[i].grammar for i in constrained]
            apply_bitmask(logits_LW, constrained, grammars, [rows[i].guesses for i in constrained])  # type: ignore[arg-type]
        if penalised:
            chosen = torch.tensor(penalised, device=logits_LW.device)
            logits_LW[chosen] = penalise(
                logits_LW[chosen], [states[i] for i in penalised], [rows[i].guesses for i in penalised]
            )
        return logits_LW

    def _weights(self, logits_LW: Tensor, states: list[SamplerState]) -> Tensor:
        """Probabilities up to a factor per row, after temperature and the likelihood filters."""
        params = [s.request.params for s in states]

        def column(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=logits_LW.device)

        temperature = column([max(p.temperature, GREEDY_BELOW_TEMPERATURE) for p in params], torch.float32)
        probs_LW = torch.softmax(logits_LW / temperature[:, None], -1)
        filtered = [i for i, p in enumerate(params) if p.min_p > 0 or p.top_k > 0 or p.top_p < 1]
        if not filtered:
            return probs_LW
        chosen = column(filtered, torch.int64)
        kept = keep_likely(
            probs_LW[chosen],
            column([params[i].min_p for i in filtered], torch.float32),
            column([params[i].top_k for i in filtered], torch.int64),
            column([params[i].top_p for i in filtered], torch.float32),
        )
        probs_LW[chosen] = kept
        return probs_LW

    def _draw(self, logits_LW: Tensor, rows: Sequence[Row], states: list[SamplerState]) -> Tensor:
        seeds = np.array([s.seed for s in states], dtype=np.uint64)
        positions = np.array([r.request.num_tokens + len(r.guesses) for r in rows], dtype=np.uint64)
        numbers = uniforms(seeds, positions)
        if not kernels.has_fast_form("sample", logits_LW):
            return draw(self._weights(logits_LW, states), numbers)
        params = [s.request.params for s in states]
        columns = [[max(p.temperature, GREEDY_BELOW_TEMPERATURE), p.min_p, p.top_k, p.top_p] for p in params]
        temperature, min_p, top_k, top_p = torch.tensor(columns, dtype=torch.float64, device=logits_LW.device).unbind(1)
        return kernels.sample(
            logits_LW, temperature, min_p, top_k, top_p, torch.from_numpy(numbers).to(logits_LW.device)
        )

    def _logprobs(
        self, logits_LW: Tensor, tokens_L: np.ndarray, states: list[SamplerState]
    ) -> list[TokenLogprobs | None]:
        wanted = [i for i, s in enumerate(states) if s.request.params.logprobs is not None]
        entries: list[TokenLogprobs | None] = [None] * len(states)
        if wanted:
            counts = [states[i].request.params.logprobs or 0 for i in wanted]
            picked = logits_LW[torch.tensor(wanted, device=logits_LW.device)]
            for i, entry in zip(wanted, token_logprobs(picked, tokens_L[wanted].tolist(), counts), strict=True):
                entries[i] = entry
        return entries
