"""Acceptance vectors of a pair of models on real text, dynamic (while generating) or static (teacher-forced).

Shape legend: T tokens, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from wager.errors import UsageError
from wager.serve.params import SamplingParams
from wager.serve.runner import ModelRunner, SpanInput
from wager.serve.sampling.filters import keep_likely
from wager.serve.speculate.acceptance import AcceptanceVector, measure_static


def dynamic_acceptance(
    llm: Any, texts: Sequence[str], width: int, tokens: int, temperature: float, top_p: float, seed: int
) -> AcceptanceVector:
    """Generate with one level of `width` children and count which is accepted. `llm` was started with that tree."""
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=tokens, seed=seed)
    room = llm.engine.max_model_len - tokens
    prompts = [ids[-room:] for text in texts if (ids := llm.get_tokenizer().encode(text))]
    llm.generate(prompts, params)
    choice = llm.engine.core.speculator.drafters["sequoia"].choice
    counter = choice.counters[params.greedy]
    if not counter.decisions:
        raise UsageError("no position was speculated: give longer prompts or more tokens", param="tokens")
    return AcceptanceVector(tuple(counter.counts.tolist()), counter.rejected, temperature, top_p, "dynamic")


def static_acceptance(
    llm: Any, texts: Sequence[str], width: int, tokens: int, temperature: float, top_p: float, seed: int
) -> AcceptanceVector:
    """Run both models once over the texts and apply the rule at every position; much cheaper when the target is slow to step."""
    target = llm.engine.core.runner
    draft = llm.engine.core.speculator.drafters["sequoia"].draft.runner

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for text in texts:
            ids = llm.get_tokenizer().encode(text)[:tokens]
            if len(ids) < 2:
                continue
            p_TW = distributions(target, ids, temperature, top_p)
            q_TW = distributions(draft, ids, temperature, 1.0)
            yield from zip(p_TW, q_TW, strict=True)

    return measure_static(pairs(), width, temperature, top_p, np.random.default_rng(seed))


def distributions(runner: ModelRunner, ids: Sequence[int], temperature: float, top_p: float) -> np.ndarray:
    """float64 [T, W]: the distribution after each token of a text; greedy leaves the logits' order as a softmax."""
    runner.blocks.start("measure", list(ids), ("measure", None))
    try:
        if not runner.blocks.reserve("measure", len(ids)):
            raise UsageError("the KV cache has no room for the reference text; raise kv_cache_memory")
        batch = runner.build([SpanInput("measure", ids, 0, logit_rows=len(ids))])
        logits = runner.logits(runner.forward(batch), batch.logit_rows_L).double()
        probs = torch.softmax(logits / max(temperature, 1e-5 if temperature else 1.0), -1)
        if top_p < 1 and temperature:
            ones = torch.ones(len(probs), dtype=torch.float64, device=probs.device)
            probs = keep_likely(probs, 0 * ones, 0 * ones.long(), top_p * ones)
        return (probs / probs.sum(-1, keepdim=True)).cpu().numpy()
    finally:
        runner.blocks.free("measure")
