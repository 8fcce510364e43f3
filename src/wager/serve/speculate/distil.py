"""A draft learns from what its target says, so that its guesses are right more often (DistillSpec, arXiv 2310.08461).

For a user: `wager speculate distil TARGET --start demo-draft --data prompts.jsonl --out draft`, then `{"draft": "draft"}` in any method.
`--layers 1,3,5` starts from some layers of the start only: a strong draft for streamed targets from a model that is too large for one.

The target continues prompts, some greedily and some sampled. At every position of these texts the target's distribution is kept as its
likeliest tokens, and the draft is drawn to it by cross-entropy, both at the same temperature: what a verifier compares. The draft decides
speed only; the verifiers are exact for any.

Shape legend: T tokens of a batch, K kept tokens, W vocabulary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wager.errors import UsageError
from wager.models.attend import causal_attention
from wager.models.demo.grow import thin
from wager.models.demo.train import multiplies_bfloat16
from wager.models.llama import Llama
from wager.serve.params import SamplingParams
from wager.serve.runner import SpanInput
from wager.serve.speculate.boost import trainable, write

BATCH_TOKENS = 4096
HELD = 20  # every so many-th text only judges


@dataclass(frozen=True)
class DistilRecipe:
    """temperature: at which both distributions are compared. kept: tokens of a target distribution that are learned from.
    rounds: over the texts. minutes: limit of the tuning; the learning rate comes down in time for it."""

    temperature: float = 0.6
    kept: int = 32
    rounds: int = 6
    learning_rate: float = 1e-3
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self):
        if self.temperature <= 0 or self.kept < 1 or self.rounds < 1:
            raise UsageError(f"distilling needs a temperature above 0, a kept token and a round, got {self}")


@dataclass(frozen=True)
class Lesson:
    """A text and the target's view of it: after token t the likeliest next tokens and their log-probabilities, [S, K] each."""

    tokens: np.ndarray
    likely: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class Distilled:
    """hits: how often the draft's likeliest token was the target's on texts it did not learn from. overlap: sum of min(p, q) there, which
    is how often a sampled guess is kept. Both before and after."""

    hits: tuple[float, float]
    overlap: tuple[float, float]
    texts: int


def texts_of(
    llm: Any, prompts: Sequence[Sequence[int]], tokens: int, temperatures: Sequence[float], seed: int = 0
) -> list[list[int]]:
    """The prompts as the target continues them; the temperatures take turns."""
    params = [
        SamplingParams(temperature=temperatures[i % len(temperatures)], max_tokens=tokens, ignore_eos=True, seed=seed + i)
        for i in range(len(prompts))
    ]  # fmt: skip
    outputs = llm.generate([list(p) for p in prompts], params)
    return [[*prompt, *output.outputs[0].token_ids] for prompt, output in zip(prompts, outputs, strict=True)]


def lessons_of(llm: Any, texts: Sequence[Sequence[int]], recipe: DistilRecipe) -> list[Lesson]:
    """What the target thinks of every position, by one pass of the engine's own model over each text."""
    return [_lesson(llm.engine.core.runner, f"lesson-{i}", list(text), recipe) for i, text in enumerate(texts)]


def _lesson(runner: Any, name: str, tokens: list[int], recipe: DistilRecipe) -> Lesson:
    runner.blocks.start(name, tokens, ("lesson", name))
    try:
        if not runner.blocks.reserve(name, len(tokens)):
            raise UsageError("the KV cache has no room for a text to learn from; raise kv_cache_memory")
        batch = runner.build([SpanInput(name, tokens, 0, logit_rows=len(tokens))])
        logits_TW = runner.logits(runner.forward(batch), batch.logit_rows_L)
        top = torch.log_softmax(logits_TW / recipe.temperature, -1).topk(min(recipe.kept, logits_TW.shape[1]), -1)
        return Lesson(
            np.asarray(tokens), top.indices.cpu().numpy().astype(np.int32), top.values.cpu().numpy().astype(np.float16)
        )
    finally:
        runner.blocks.free(name)


def distil(
    lessons: Sequence[Lesson],
    start: str,
    out: Path,
    recipe: DistilRecipe,
    layers: Sequence[int] | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> Distilled:
    """Tune the start model, or those of its layers, on the lessons, on `device`, and write the draft to `out`; weights are written after every round.

    Raises UsageError when there is too little to learn from or a layer is not there.
    """
    if len(lessons) < 2 * HELD:
        raise UsageError(f"{len(lessons)} texts are too few to distil a draft: give at least {2 * HELD} prompts")
    model = trainable(start)
    if layers is not None:
        model = thin(model, layers).train()
    model.to(device)
    judge, learn = lessons[::HELD], [lesson for i, lesson in enumerate(lessons) if i % HELD]
    before = judged(model, judge, recipe)
    for round_ in _rounds(model, learn, recipe):
        after = judged(model, judge, recipe)
        say(f"round {round_}: foretells {after[0]:.1%}, sampled guesses kept {after[1]:.1%}")
        save(model, start, out)
    after = judged(model, judge, recipe)
    save(model, start, out)
    return Distilled((before[0], after[0]), (before[1], after[1]), len(learn))


def _rounds(model: Llama, learn: Sequence[Lesson], recipe: DistilRecipe):
    """Trains; yields the number of every round that is over."""
    rng = np.random.default_rng(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    per_round, step, begun = len(batches(learn)), 0, time.monotonic()
    for round_ in range(1, recipe.rounds + 1):
        for batch in batches(learn, rng):
            done = step / (per_round * recipe.rounds)
            if recipe.minutes is not None:
                done = max(done, (time.monotonic() - begun) / (60 * recipe.minutes))
            if done >= 1:
                return
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / 20, (1 - done) / 0.8)
            loss = lesson_loss(model, batch, recipe.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
        yield round_


def batches(lessons: Sequence[Lesson], rng: np.random.Generator | None = None) -> list[list[Lesson]]:
    """Groups of about BATCH_TOKENS tokens, each of texts of one length: their attention is one call."""
    order = np.arange(len(lessons)) if rng is None else rng.permutation(len(lessons))
    by_length: dict[int, list[Lesson]] = {}
    for i in order.tolist():
        by_length.setdefault(len(lessons[i].tokens), []).append(lessons[i])
    groups = []
    for length, members in by_length.items():
        count = max(1, BATCH_TOKENS // length)
        groups += [members[at : at + count] for at in range(0, len(members), count)]
    return groups if rng is None else [groups[i] for i in rng.permutation(len(groups))]


def _log_q(model: Llama, lessons: Sequence[Lesson], temperature: float) -> Tensor:
    lengths = [len(lesson.tokens) for lesson in lessons]
    device = model.embed.weight.device
    tokens_T = torch.from_numpy(np.concatenate([lesson.tokens for lesson in lessons])).to(device)
    positions_T = torch.cat([torch.arange(n, device=device) for n in lengths])
    with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device)):
        hidden_TD = model(tokens_T, positions_T, causal_attention(model, lengths))
        logits_TW = model.logits(hidden_TD).float()
    return F.log_softmax(logits_TW / temperature, -1)


def _views(lessons: Sequence[Lesson], device: torch.device) -> tuple[Tensor, Tensor]:
    likely_TK = torch.from_numpy(np.concatenate([lesson.likely for lesson in lessons]).astype(np.int64))
    logprobs_TK = torch.from_numpy(np.concatenate([lesson.logprobs for lesson in lessons]).astype(np.float32))
    return likely_TK.to(device), logprobs_TK.to(device).exp()


def lesson_loss(model: Llama, lessons: Sequence[Lesson], temperature: float) -> Tensor:
    """Cross-entropy of the draft under the target's kept tokens, in nats per position."""
    likely_TK, p_TK = _views(lessons, model.embed.weight.device)
    return -(p_TK * _log_q(model, lessons, temperature).gather(1, likely_TK)).sum(-1).mean()


@torch.no_grad()
def judged(model: Llama, lessons: Sequence[Lesson], recipe: DistilRecipe) -> tuple[float, float]:
    """(share of positions where both like the same token best, sum of min(p, q) over the kept tokens), over whole texts."""
    hits = overlap = count = 0.0
    for batch in batches(lessons):
        log_q_TW = _log_q(model, batch, recipe.temperature)
        likely_TK, p_TK = _views(batch, log_q_TW.device)
        hits += float((log_q_TW.argmax(-1) == likely_TK[:, 0]).sum())
        overlap += float(torch.minimum(p_TK, log_q_TW.gather(1, likely_TK).exp()).sum())
        count += len(log_q_TW)
    return hits / count, overlap / count


def save(model: Llama, start: str, out: Path) -> None:
    """The weights beside the start's configuration and tokenizer; config.json says how many layers are left."""
    write(model, start, out)
    path = out / "config.json"
    config = {**json.loads(path.read_text()), "num_hidden_layers": len(model.layers)}
    temporary = path.with_name(".config.json.tmp")
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    temporary.replace(path)
