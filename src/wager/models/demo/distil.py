"""The drafts of a clocked run: the target's own texts, drafts drawn to its whole distribution over them, and the judgement of both.

Distillation on the target's own texts: DistillSpec (arXiv 2310.08461).
Shape legend: T tokens of a batch, W vocabulary.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

from wager.models.demo.batched import Continuer, hidden_of, logits_of
from wager.models.demo.export import save_weights
from wager.models.demo.packages import DOMAINS
from wager.models.demo.timed import (
    LOG_EVERY,
    SAVE_EVERY_S,
    Clock,
    Place,
    Plan,
    apply,
    check_loss,
    device_name,
    fresh,
    load,
    read_stream,
    set_rate,
    windows,
)
from wager.models.demo.train import Recipe, make_optimizers, schedule
from wager.models.llama import Llama

HELD_ROWS = 256  # held-out texts of a temperature


class Prompts:
    """Beginnings of texts: half are functions up to the end of their docstring, where there are enough of that length, half are cut at
    random places, of all domains in equal parts: prompts of users are prose as often as code, whatever the corpus is."""

    def __init__(self, place: Place, which: str):
        names = [f"{which}-{domain}.npy" for domain in DOMAINS]
        self.repeats = which == "train"
        self.streams = [read_stream(place, name) for name in names if place.streams(name).exists()]
        archive = np.load(place.streams(f"prompts-{which}.npz"))
        self.heads = torch.from_numpy(archive["prompts"].astype(np.int64)).to(place.device)
        self.lengths = torch.from_numpy(archive["lengths"]).to(place.device)

    def __call__(self, context: int, rows: int, generator: torch.Generator) -> Tensor:
        """[rows, context] tokens, mixed."""
        device = self.heads.device
        heads = self.heads[self.lengths >= context][:, -context:]
        wanted = rows // 2 if self.repeats and len(heads) else min(rows // 2, len(heads))
        parts = [heads[torch.randint(max(1, len(heads)), (wanted,), generator=generator, device=device)]]
        left = rows - wanted
        for number, stream in enumerate(self.streams):
            count = left // len(self.streams) + (number < left % len(self.streams))
            starts = torch.randint(len(stream) - context, (count, 1), generator=generator, device=device)
            parts.append(stream[starts + torch.arange(context, device=device)].long())
        return torch.cat(parts)[torch.randperm(rows, generator=generator, device=device)]


def make_texts(plan: Plan, place: Place, target: Llama, seconds: float) -> None:
    """texts.npy: the target's continuations of held-in prompts, as many as fit into the time; texts-heldout-<T>.npy to judge by."""
    begun, generator = time.monotonic(), place.generator(2)
    held_out, held_in = Prompts(place, "heldout"), Prompts(place, "train")
    for temperature in (0.0, 0.6, 1.0):
        held = held_out(plan.contexts[1], min(HELD_ROWS, plan.text_rows), generator)
        many = torch.full((len(held),), temperature, device=place.device)
        text = Continuer(target, many, plan.text_tokens, place.dtype, generator)(held)
        np.save(place.streams(f"texts-heldout-{temperature:g}.npy"), text.cpu().numpy().astype(np.uint16))
    turns = torch.tensor(plan.temperatures, device=place.device)
    continuer = Continuer(
        target,
        turns.repeat(plan.text_rows // len(turns) + 1)[: plan.text_rows],
        plan.text_tokens,
        place.dtype,
        generator,
    )
    texts, round_ = [], 0
    while not texts or (time.monotonic() - begun < seconds and round_ < plan.steps):
        context = plan.contexts[round_ % len(plan.contexts)]
        prompts = held_in(context, plan.text_rows, generator)
        texts.append(continuer(prompts).cpu().numpy().astype(np.uint16))
        round_ += 1
    np.save(place.streams("texts.npy"), np.concatenate(texts))
    count = len(texts) * plan.text_rows
    place.say(f"{count:,} texts, {count * plan.text_tokens / 1e6:.2f} M tokens in {time.monotonic() - begun:.1f} s")
    tokenizer = tokenizers.Tokenizer.from_file(str(place.out / plan.target[0] / "tokenizer.json"))
    for row in texts[0][:4]:
        place.say("says: " + json.dumps(tokenizer.decode(row.tolist(), skip_special_tokens=False)))


def soft_loss(draft_logits_TW: Tensor, wanted_TW: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the draft at a temperature under the target's distribution, nats per position."""
    return -(wanted_TW * F.log_softmax(draft_logits_TW / temperature, -1)).sum(-1).mean()


def train_drafts(plan: Plan, place: Place, target: Llama, seconds: float) -> None:
    """All drafts at once: the pass of the target is the dearest part of a step, and they share it."""
    teacher = target.requires_grad_(False)
    models = {name: fresh(config, place, 10 + i) for i, (name, config) in enumerate(plan.drafts.items())}
    recipe = Recipe(1, learning_rate=plan.draft_learning_rate)
    optimizers = {name: make_optimizers(model, recipe) for name, model in models.items()}
    texts = read_stream(place, "texts.npy")
    generator = place.generator(3)
    own = min(round(plan.draft_batch_rows * plan.own_share), len(texts))
    corpus = windows(read_stream(place), plan.text_tokens - 1, plan.draft_batch_rows - own, generator)

    def save_all() -> None:
        for name, model in models.items():
            save_weights(model, place.out / name)

    save_all()
    clock, saved_s = Clock(seconds, plan.steps), time.monotonic()
    order, at, losses = torch.randperm(len(texts), generator=generator, device=place.device), 0, {}
    while (progress := clock.progress) < 1:
        if at + own > len(texts):
            order, at = torch.randperm(len(texts), generator=generator, device=place.device), 0
        tokens = torch.cat([texts[order[at : at + own]].long(), next(corpus)])
        at += own
        with torch.no_grad():
            wanted = (logits_of(teacher, hidden_of(teacher, tokens, place.dtype)) / plan.distil_temperature).softmax(-1)
        for name, model in models.items():
            set_rate(optimizers[name], plan.draft_learning_rate * schedule(progress, recipe.warmup, recipe.cooldown))
            loss = soft_loss(logits_of(model, hidden_of(model, tokens, place.dtype)), wanted, plan.distil_temperature)
            loss.backward()
            apply(model, optimizers[name])
            losses[name] = loss.detach()
        clock.step(place.device)
        if clock.steps % LOG_EVERY == 0:
            entropy = -(wanted * wanted.clamp_min(1e-9).log()).sum(-1).mean().item()
            gaps = ", ".join(f"{name} {loss.item() - entropy:.4f}" for name, loss in losses.items())
            place.say(f"drafts step {clock.steps} {progress:6.1%} nats from the target: {gaps}; its own {entropy:.3f}")
        if time.monotonic() - saved_s > SAVE_EVERY_S:
            for name, loss in losses.items():
                check_loss(loss.item(), name)
            save_all()
            saved_s = time.monotonic()
    for name, loss in losses.items():
        check_loss(loss.item(), name)
    save_all()
    place.say(
        f"drafts: {clock.steps} steps, {clock.steps * plan.draft_batch_rows * plan.text_tokens / 1e6:.1f} M tokens"
    )


@torch.no_grad()
def evaluate(plan: Plan, place: Place, target: Llama) -> dict[str, Any]:
    """Held-out nats of the target per domain; of every draft on the target's held-out continuations the share of equal favourites (T = 0) and
    the sum of min(p, q) at the temperature of the texts, prompts left out."""
    dtype, window = place.dtype, min(512, plan.window)
    report: dict[str, Any] = {"device": device_name(place), "parameters": {}, "heldout_nats": {}, "agreement": {}}
    report["parameters"][plan.target[0]] = sum(p.numel() for p in target.parameters())
    for domain in DOMAINS:
        file = place.streams(f"heldout-{domain}.npy")
        stream = np.load(file)[: 64 * window + 1].astype(np.int64) if file.exists() else np.zeros(0, np.int64)
        if (rows := (len(stream) - 1) // window) > 0:
            tokens = torch.from_numpy(stream[: rows * window + 1]).to(place.device)
            logits = logits_of(target, hidden_of(target, tokens[:-1].view(rows, window), dtype)).flatten(0, 1)
            report["heldout_nats"][domain] = round(F.cross_entropy(logits, tokens[1:]).item(), 4)
    for name in plan.drafts:
        draft = load(place, name)
        report["parameters"][name] = sum(p.numel() for p in draft.parameters())
        report["agreement"][name] = {
            f"T={temperature:g}": round(agreement(plan, place, target, draft, temperature), 4)
            for temperature in (0.0, 0.6, 1.0)
            if place.streams(f"texts-heldout-{temperature:g}.npy").exists()
        }
    return report


@torch.no_grad()
def agreement(plan: Plan, place: Place, target: Llama, draft: Llama, temperature: float) -> float:
    """Chance that a guess of the draft is kept in the target's held-out texts of this temperature."""
    texts = torch.from_numpy(np.load(place.streams(f"texts-heldout-{temperature:g}.npy")).astype(np.int64))
    kept = count = 0.0
    for rows in texts.split(32):
        tokens, given = rows.to(place.device), plan.contexts[1]
        both = [logits_of(m, hidden_of(m, tokens[:, :-1], place.dtype)[:, given - 1 :]) for m in (target, draft)]
        if temperature == 0:
            equal = both[0].argmax(-1) == both[1].argmax(-1)
            kept += equal.sum().item()
        else:
            p, q = ((logits / temperature).softmax(-1) for logits in both)
            kept += torch.minimum(p, q).sum().item()
        count += both[0].shape[0] * both[0].shape[1]
    return kept / count
