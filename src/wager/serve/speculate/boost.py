"""Collective boost-tuning of several draft models for SpecInfer (arXiv 2305.09781, section 3).

For a user: `wager speculate boost TARGET --start demo-draft --out drafts --count 2` writes drafts/0, drafts/1, ... for
`{"method": "specinfer", "drafts": ["drafts/0", "drafts/1"], "expansion": [1, 1, 1, 1]}`.

The target continues a corpus of prompts. Draft 1 is tuned on all of its text until the loss on a held-back part stops falling; pieces it
then reproduces are marked; draft 2 is tuned on the unmarked pieces only, and so on. So later drafts know what earlier ones do not, and
the merged trees cover more of what the target says. The drafts decide speed only: the verifier is exact for any of them.

Shape legend: T tokens, W vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wager.errors import UsageError
from wager.models import demo
from wager.models.attend import causal_attention
from wager.models.demo.export import save_weights
from wager.models.llama import Llama
from wager.models.loader import load_model, resolve
from wager.serve.params import SamplingParams

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Piece:
    """Some tokens that the target said, and what stood before them."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class BoostRecipe:
    """count: drafts. piece_tokens: of one piece. share: of a piece's tokens that must be foretold for it to be marked. held: part of the
    pieces that only judges when to stop. patience: rounds without a better loss on it before a draft counts as tuned."""

    count: int = 2
    piece_tokens: int = 8
    share: float = 0.75
    held: float = 0.1
    rounds: int = 20
    patience: int = 2
    learning_rate: float = 3e-4
    seed: int = 0

    def __post_init__(self):
        if self.count < 1 or self.piece_tokens < 1 or self.rounds < 1 or not 0 < self.share <= 1:
            raise UsageError(f"boosting needs at least one draft, round and token and a share in (0, 1], got {self}")


@dataclass(frozen=True)
class Tuned:
    """What one draft learned from and how often its likeliest token is the target's, over all pieces and over those it was tuned on."""

    path: Path
    pieces: int
    marked: int
    hits: float
    hits_on_own: float


def pieces_of(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    piece_tokens: int,
    temperature: float = 0.0,
    context: int = 128,
) -> list[Piece]:
    """The target's continuations of the prompts, cut into pieces, each with at most `context` tokens before it."""
    params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, seed=0)
    pieces = []
    for prompt, output in zip(prompts, llm.generate([list(p) for p in prompts], params), strict=True):
        text = [*prompt, *output.outputs[0].token_ids]
        for at in range(len(prompt), len(text) - piece_tokens + 1, piece_tokens):
            pieces.append(Piece(tuple(text[max(0, at - context) : at]), tuple(text[at : at + piece_tokens])))
    return pieces


def boost(
    pieces: Sequence[Piece], start: str, out: Path, recipe: BoostRecipe, say: Callable[[str], None] = lambda _: None
) -> tuple[list[Tuned], float]:
    """Tune the drafts one after another and write them to out/0, out/1, ... Returns them and how often any of them foretells the target.

    Raises UsageError when there is nothing to learn from.
    """
    if len(pieces) < 10:
        raise UsageError(f"{len(pieces)} pieces are too few to tune a draft: give more prompts or more tokens of each")
    rng = np.random.default_rng(recipe.seed)
    left, tuned = np.arange(len(pieces)), []
    any_hit = np.zeros((len(pieces), recipe.piece_tokens), bool)
    for number in range(recipe.count):
        if len(left) < 10:
            say(f"draft {number}: only {len(left)} pieces are left, nothing to tune on")
            break
        model = trainable(start)
        tune(model, [pieces[int(i)] for i in left], recipe, rng, say)
        hits = foretold(model, pieces)
        any_hit |= hits
        marked = hits.mean(1) >= recipe.share
        path = out / str(number)
        write(model, start, path)
        tuned.append(Tuned(path, len(left), int(marked[left].sum()), float(hits.mean()), float(hits[left].mean())))
        say(f"draft {number}: {len(left)} pieces, {int(marked[left].sum())} marked, foretells {hits.mean():.1%}")
        left = left[~marked[left]]
    return tuned, float(any_hit.mean())


def trainable(start: str) -> Llama:
    model = load_model(demo.path(start) if demo.is_demo(start) else start, torch.float32).model
    if not isinstance(model, Llama):
        raise UsageError(f"boosting tunes drafts of the Llama layout, not {type(model).__name__}", param="start")
    return model.train()


def tune(
    model: Llama, pieces: Sequence[Piece], recipe: BoostRecipe, rng: np.random.Generator, say: Callable[[str], None]
) -> None:
    """AdamW on the pieces' tokens until the held-back loss stops falling; the best weights stay."""
    order = rng.permutation(len(pieces))
    held = max(1, int(recipe.held * len(pieces)))
    judge, learn = [pieces[i] for i in order[:held]], [pieces[i] for i in order[held:]]
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    best, kept, worse = loss_over(model, judge), _copy(model), 0
    for round_ in range(recipe.rounds):
        for batch in batches(learn, rng):
            loss = piece_loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        now = loss_over(model, judge)
        say(f"round {round_ + 1}: {now:.3f} nats on held-back pieces")
        if now < best - 1e-3:
            best, kept, worse = now, _copy(model), 0
        elif (worse := worse + 1) >= recipe.patience:
            break
    model.load_state_dict(kept)


def _copy(model: Llama) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def batches(pieces: Sequence[Piece], rng: np.random.Generator | None = None) -> list[list[Piece]]:
    """Groups of about BATCH_TOKENS tokens, shuffled when a generator is given."""
    order = np.arange(len(pieces)) if rng is None else rng.permutation(len(pieces))
    groups: list[list[Piece]] = [[]]
    size = 0
    for i in order.tolist():
        length = len(pieces[i].context) + len(pieces[i].tokens)
        if groups[-1] and size + length > BATCH_TOKENS:
            groups.append([])
            size = 0
        groups[-1].append(pieces[i])
        size += length
    return groups


def predictions(model: Llama, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """(logits [T, W], targets [T]) of all the pieces' tokens, piece after piece."""
    texts = [[*p.context, *p.tokens] for p in pieces]
    lengths = [len(t) - 1 for t in texts]
    tokens_T = torch.tensor([token for text in texts for token in text[:-1]])
    positions_T = torch.cat([torch.arange(n) for n in lengths])
    hidden_TD = model(tokens_T, positions_T, causal_attention(model, lengths))
    ends = np.cumsum(lengths)
    rows = np.concatenate([np.arange(end - len(p.tokens), end) for end, p in zip(ends, pieces, strict=True)])
    targets_T = torch.tensor([token for p in pieces for token in p.tokens])
    return model.logits(hidden_TD[torch.from_numpy(rows)]), targets_T


def piece_loss(model: Llama, pieces: Sequence[Piece]) -> Tensor:
    return F.cross_entropy(*predictions(model, pieces))


@torch.no_grad()
def loss_over(model: Llama, pieces: Sequence[Piece]) -> float:
    losses = [(float(piece_loss(model, group)), len(group)) for group in batches(pieces)]
    return sum(loss * count for loss, count in losses) / len(pieces)


@torch.no_grad()
def foretold(model: Llama, pieces: Sequence[Piece]) -> np.ndarray:
    """bool [pieces, tokens of a piece]: whether the draft's likeliest token is the target's, given the target's text before it."""
    found = []
    for group in batches(pieces):
        logits_TW, targets_T = predictions(model, group)
        found.append((logits_TW.argmax(-1) == targets_T).view(len(group), -1).numpy())
    return np.concatenate(found)


def write(model: Llama, start: str, out: Path) -> None:
    """The tuned weights beside the start's configuration and tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    source = demo.path(start) if demo.is_demo(start) else resolve(start)
    for file in Path(source).glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    save_weights(model, out)
