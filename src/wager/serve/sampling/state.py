"""What the sampler remembers about one request, and the edits its parameters make to a row of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wager.serve.request import Request

if TYPE_CHECKING:
    from wager.serve.sampling.grammar import Grammar


@dataclass
class SamplerState:
    """seed: of the request's own number sequence. counts_W, prompt_W: occurrences in the output and presence in the prompt, kept only
    when a penalty needs them. edits: whether any of masks, bans or biases may touch this request's rows."""

    request: Request
    seed: int
    grammar: Grammar | None
    bad_words: list[list[int]]
    edits: bool
    counts_W: Tensor | None = None
    prompt_W: Tensor | None = None


def make_state(
    request: Request, seed: int, grammar: Grammar | None, bad_words: list[list[int]], vocab: int, device: torch.device
) -> SamplerState:
    params = request.params
    edits = bool(params.allowed_token_ids or params.logit_bias or bad_words or params.min_tokens or request.thinking)
    state = SamplerState(request, seed, grammar, bad_words, edits)
    if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
        state.counts_W = occurrences(request.output_token_ids, vocab, device)
        state.prompt_W = occurrences(request.prompt_token_ids, vocab, device) > 0
    return state


def occurrences(token_ids: list[int], vocab: int, device: torch.device) -> Tensor:
    """float32 [W] counts."""
    return torch.bincount(torch.tensor(token_ids, dtype=torch.int64), minlength=vocab).float().to(device)


def edit_row(logits_W: Tensor, state: SamplerState, guesses: tuple[int, ...]) -> None:
    """Allowed tokens, bad words, minimum length and biases, in place; the end of overlong thoughts before all of them."""
    request, params = state.request, state.request.params
    if params.allowed_token_ids:
        allowed = torch.tensor(params.allowed_token_ids, device=logits_W.device)
        kept = logits_W[allowed].clone()
        logits_W.fill_(-torch.inf)
        logits_W[allowed] = kept
    banned = _completing(state.bad_words, request, guesses)
    if request.num_output_tokens + len(guesses) < params.min_tokens:
        banned |= request.eos_token_ids | set(params.stop_token_ids)
    if banned:
        logits_W[torch.tensor(sorted(banned), device=logits_W.device)] = -torch.inf
    if params.logit_bias:
        tokens = torch.tensor(list(params.logit_bias), device=logits_W.device)
        logits_W[tokens] += torch.tensor(list(params.logit_bias.values()), device=logits_W.device)
    forced = request.thinking.forced(request.output_token_ids, guesses) if request.thinking else None
    if forced is not None:
        logits_W.fill_(-torch.inf)
        logits_W[forced] = 0.0


def _completing(bad_words: list[list[int]], request: Request, guesses: tuple[int, ...]) -> set[int]:
    """Tokens that would finish a bad word, given the output so far."""
    if not bad_words:
        return set()
    longest = max(map(len, bad_words)) - 1
    tail = [*request.output_token_ids[-longest:], *guesses][-longest:] if longest else []
    return {word[-1] for word in bad_words if len(word) == 1 or tail[-len(word) + 1 :] == word[:-1]}


def penalise(logits_RW: Tensor, states: list[SamplerState], guesses: list[tuple[int, ...]]) -> Tensor:
    """Repetition penalty over prompt and output, then frequency and presence penalties over the output.

    Rows of `logits_RW` belong to `states`, all of which keep counts; guessed tokens count as output.
    """
    counts_RW = torch.stack([s.counts_W for s in states])  # type: ignore[arg-type]
    for row, tokens in enumerate(guesses):
        for token in tokens:
            counts_RW[row, token] += 1
    in_output = counts_RW > 0
    seen = in_output | torch.stack([s.prompt_W for s in states])  # type: ignore[arg-type]

    def column(name: str) -> Tensor:
        return logits_RW.new_tensor([getattr(s.request.params, name) for s in states])[:, None]

    repetition = column("repetition_penalty")
    scaled = torch.where(logits_RW > 0, logits_RW / repetition, logits_RW * repetition)
    penalised = torch.where(seen, scaled, logits_RW)
    return penalised - column("frequency_penalty") * counts_RW - column("presence_penalty") * in_output
