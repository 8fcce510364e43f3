"""A target and drafts that foretell it, trained on one device in minutes: every stage is bounded by the clock and leaves its files.

The corpus is read by the other cores while this process compiles. The target learns the next token. Then it continues prompts from texts it
was trained on (functions cut after their docstring, places in any document), greedily and at temperature 0.6, and the drafts are drawn to
its whole distribution at that temperature over these texts and over the corpus, all of them from the same pass of the target. Last, every
draft is judged on the target's continuations of held-out prompts.

Distillation on the target's own texts: DistillSpec (arXiv 2310.08461). Muon: arXiv 2502.16982.
Shape legend: B sequences, S tokens of each, T = B * S, W vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wager.errors import UsageError, WagerError
from wager.models import demo as shipped
from wager.models.demo.batched import BlockForward, Continuer, block, hidden_of, logits_of, shape_of, weights_of
from wager.models.demo.export import save_description, save_weights
from wager.models.demo.packages import DOMAINS, Reading
from wager.models.demo.train import Recipe, make_optimizers, schedule
from wager.models.llama import Llama, LlamaConfig
from wager.models.loader import load_model

STAGES = ("corpus", "target", "texts", "drafts", "evaluate")
LOG_EVERY, SAVE_EVERY_S = 20, 30.0
HELD_ROWS = 256  # held-out texts of a temperature


@dataclass(frozen=True)
class Plan:
    """What is trained and how the minutes are shared out.

    corpus_bytes: most text of packages. shares: of the minutes, for target, texts and drafts. steps: most steps of a training, for tests.
    text_tokens: of a text with its prompt; contexts: tokens of a prompt. own_share: of a distilling batch that are the target's texts.
    """

    target: tuple[str, dict[str, Any]]
    drafts: dict[str, dict[str, Any]]
    corpus_bytes: int = 110_000_000
    chats: int = 12_000
    window: int = 1024
    batch_tokens: int = 65_536
    most_rows: int = 32  # sequences of a pass; more are accumulated
    learning_rate: float = 2e-3
    draft_learning_rate: float = 3e-3
    draft_batch_rows: int = 128
    shares: tuple[float, float, float] = (0.52, 0.13, 0.35)
    text_rows: int = 2048
    text_tokens: int = 256
    contexts: tuple[int, ...] = (128, 64, 96, 32)
    temperatures: tuple[float, ...] = (0.0, 0.6, 0.6, 0.6)
    distil_temperature: float = 0.6
    own_share: float = 0.75
    steps: int = 10**9


@dataclass
class Place:
    """Where a run works: its folder, device, precision and clock."""

    out: Path
    device: torch.device
    compiled: bool
    seed: int = 0
    begun_s: float = field(default_factory=time.monotonic)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun_s:6.1f} s] {text}", flush=True)

    def streams(self, name: str) -> Path:
        return self.out / "streams" / name

    def generator(self, number: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed + number)


def run(
    plan: Plan, place: Place, packages: Path | None, data: Path | None, minutes: float, stages: tuple[str, ...] = STAGES
) -> None:
    """The stages one after another, each from the files of those before it. Raises UsageError for a stage that is not there."""
    if unknown := set(stages) - set(STAGES):
        raise UsageError(
            f"stage {', '.join(sorted(unknown))} is unknown; use some of {', '.join(STAGES)}", param="only"
        )
    (place.out / "streams").mkdir(parents=True, exist_ok=True)
    reading = _start_reading(plan, place, packages, data) if "corpus" in stages else None
    torch.set_float32_matmul_precision("high")
    layer_forward = _compiled_block(plan, place) if "target" in stages else block
    if reading is not None:
        sizes = reading.write(place.out / "streams", place.seed)
        place.say("tokens: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    seconds = [60 * minutes * share for share in plan.shares]
    if "target" in stages:
        train_target(plan, place, layer_forward, seconds[0])
        if place.device.type == "cuda":
            place.say(f"{_device_name(place)}: at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB in use")
    target = _load(place, plan.target[0]) if {"texts", "drafts", "evaluate"} & set(stages) else None
    if target is not None and "texts" in stages:
        make_texts(plan, place, target, seconds[1])
    if target is not None and "drafts" in stages:
        train_drafts(plan, place, target, seconds[2])
    if target is not None and "evaluate" in stages:
        report = evaluate(plan, place, target)
        (place.out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
        place.say(json.dumps(report))


def _start_reading(plan: Plan, place: Place, packages: Path | None, data: Path | None) -> Reading:
    file = shipped.path("demo") / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    for name, config in (plan.target, *plan.drafts.items()):
        save_description(config, tokenizer, place.out / name)
    return Reading(packages, data, file, plan.corpus_bytes, plan.chats)


def _load(place: Place, name: str) -> Llama:
    model = load_model(place.out / name, torch.float32).model
    assert isinstance(model, Llama)
    return model.to(place.device)


def _fresh(config: dict[str, Any], place: Place, number: int) -> Llama:
    generator = torch.Generator().manual_seed(place.seed + number)
    return Llama(LlamaConfig.from_checkpoint(config), torch.float32, generator).to(place.device).train()


def _compiled_block(plan: Plan, place: Place) -> BlockForward:
    """One layer, compiled forwards and backwards on the shapes of the training; a compiler that fails is reported and done without."""
    if not place.compiled:
        return block
    begun = time.monotonic()
    compiled = torch.compile(block, dynamic=False)
    model = _fresh({**plan.target[1], "num_hidden_layers": 2}, place, 0)
    config = model.config
    try:
        x = torch.randn(
            _rows(plan), plan.window, config.hidden_size, dtype=place.dtype, device=place.device, requires_grad=True
        )
        angles = model.rope(torch.arange(plan.window, device=place.device))
        for layer in model.layers:
            out = compiled(x, *angles, weights_of(layer), shape_of(config), config.rms_norm_eps)  # type: ignore[arg-type]
            out.float().square().mean().backward()
        if place.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        place.say(f"torch.compile failed, training goes on without it: {error!r:.500}")
        return block
    place.say(f"compiled a layer in {time.monotonic() - begun:.1f} s")
    return compiled


def _rows(plan: Plan) -> int:
    return min(plan.most_rows, max(1, plan.batch_tokens // plan.window))


class Clock:
    """Progress of a training by its seconds or its steps, whichever is further."""

    def __init__(self, seconds: float, steps: int):
        self.begun_s, self.seconds, self.most, self.steps, self.queued = time.monotonic(), seconds, steps, 0, []

    @property
    def progress(self) -> float:
        return max(self.passed_s / self.seconds if self.seconds > 0 else 1.0, self.steps / self.most)

    @property
    def passed_s(self) -> float:
        return time.monotonic() - self.begun_s

    def step(self, device: torch.device) -> None:
        """Called after every step; the host is at most two steps ahead of the device, so that the clock means something."""
        self.steps += 1
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self.queued.append(event)
            if len(self.queued) > 2:
                self.queued.pop(0).synchronize()


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def apply(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)


def windows(stream_N: Tensor, window: int, rows: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches [rows, window + 1] without end; every window once in an epoch, in a new order, from a new offset."""
    offsets = torch.arange(window + 1, device=stream_N.device)
    while True:
        shift = int(torch.randint(window, (1,), generator=generator, device=stream_N.device))
        count = (len(stream_N) - 1 - shift) // window
        if count < rows:
            if (len(stream_N) - 1) // window < rows:
                raise UsageError(
                    f"the corpus has {len(stream_N)} tokens, fewer than a batch of {rows} windows of {window}"
                )
            shift, count = 0, (len(stream_N) - 1) // window
        order = torch.randperm(count, generator=generator, device=stream_N.device)
        for at in range(0, count - rows + 1, rows):
            yield stream_N[(order[at : at + rows] * window + shift)[:, None] + offsets].long()


def _stream(place: Place, name: str = "train.npy") -> Tensor:
    """A token stream on the device; int16 holds any vocabulary of 32,768."""
    return torch.from_numpy(np.load(place.streams(name)).astype(np.int16)).to(place.device)


def train_target(plan: Plan, place: Place, layer_forward: BlockForward, seconds: float) -> None:
    """Next-token prediction; weights are written before, every half minute and after. Raises WagerError when the loss is lost."""
    name, config = plan.target
    model, rows = _fresh(config, place, 0), _rows(plan)
    passes = max(1, plan.batch_tokens // (rows * plan.window))
    recipe = Recipe(1, learning_rate=plan.learning_rate)
    optimizers = make_optimizers(model, recipe)
    batches = windows(_stream(place), plan.window, rows, place.generator(1))
    save_weights(model, place.out / name)
    parameters = sum(p.numel() for p in model.parameters())
    place.say(f"{name}: {parameters:,} parameters, {rows * passes * plan.window:,} tokens a step, {seconds:.0f} s")
    clock, saved_s = Clock(seconds, plan.steps), time.monotonic()
    while (progress := clock.progress) < 1:
        set_rate(optimizers, plan.learning_rate * schedule(progress, recipe.warmup, recipe.cooldown))
        total = torch.zeros((), device=place.device)
        for _ in range(passes):
            tokens = next(batches)
            hidden = hidden_of(model, tokens[:, :-1], place.dtype, layer_forward)
            loss = F.cross_entropy(logits_of(model, hidden).flatten(0, 1), tokens[:, 1:].flatten()) / passes
            loss.backward()
            total += loss.detach()
        apply(model, optimizers)
        clock.step(place.device)
        if clock.steps % LOG_EVERY == 0:
            speed = clock.steps * rows * passes * plan.window / clock.passed_s
            _check(total.item(), name)
            place.say(f"{name} step {clock.steps} {progress:6.1%} loss {total.item():.3f} {speed:,.0f} tokens/s")
        if time.monotonic() - saved_s > SAVE_EVERY_S:
            _check(total.item(), name)
            save_weights(model, place.out / name)
            saved_s = time.monotonic()
    if clock.steps:
        _check(total.item(), name)
        save_weights(model, place.out / name)
    place.say(f"{name}: {clock.steps} steps, {clock.steps * rows * passes * plan.window / 1e6:.1f} M tokens")


def _check(loss: float, name: str) -> None:
    if not math.isfinite(loss):
        raise WagerError(
            f"the loss of {name} is {loss}; its last written weights are good, train with a lower learning rate"
        )


class Prompts:
    """Beginnings of texts: half are functions up to the end of their docstring, where there are enough of that length, half are cut at
    random places, of all domains in equal parts: prompts of users are prose as often as code, whatever the corpus is."""

    def __init__(self, place: Place, which: str):
        names = [f"{which}-{domain}.npy" for domain in DOMAINS]
        self.repeats = which == "train"
        self.streams = [_stream(place, name) for name in names if place.streams(name).exists()]
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
    models = {name: _fresh(config, place, 10 + i) for i, (name, config) in enumerate(plan.drafts.items())}
    recipe = Recipe(1, learning_rate=plan.draft_learning_rate)
    optimizers = {name: make_optimizers(model, recipe) for name, model in models.items()}
    texts = torch.from_numpy(np.load(place.streams("texts.npy")).astype(np.int16)).to(place.device)
    generator = place.generator(3)
    own = min(round(plan.draft_batch_rows * plan.own_share), len(texts))
    corpus = windows(_stream(place), plan.text_tokens - 1, plan.draft_batch_rows - own, generator)

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
                _check(loss.item(), name)
            save_all()
            saved_s = time.monotonic()
    for name, loss in losses.items():
        _check(loss.item(), name)
    save_all()
    place.say(
        f"drafts: {clock.steps} steps, {clock.steps * plan.draft_batch_rows * plan.text_tokens / 1e6:.1f} M tokens"
    )


@torch.no_grad()
def evaluate(plan: Plan, place: Place, target: Llama) -> dict[str, Any]:
    """Held-out nats of the target per domain; of every draft on the target's held-out continuations the share of equal favourites (T = 0) and
    the sum of min(p, q) at the temperature of the texts, prompts left out."""
    dtype, window = place.dtype, min(512, plan.window)
    report: dict[str, Any] = {"device": _device_name(place), "parameters": {}, "heldout_nats": {}, "agreement": {}}
    report["parameters"][plan.target[0]] = sum(p.numel() for p in target.parameters())
    for domain in DOMAINS:
        file = place.streams(f"heldout-{domain}.npy")
        stream = np.load(file)[: 64 * window + 1].astype(np.int64) if file.exists() else np.zeros(0, np.int64)
        if (rows := (len(stream) - 1) // window) > 0:
            tokens = torch.from_numpy(stream[: rows * window + 1]).to(place.device)
            logits = logits_of(target, hidden_of(target, tokens[:-1].view(rows, window), dtype)).flatten(0, 1)
            report["heldout_nats"][domain] = round(F.cross_entropy(logits, tokens[1:]).item(), 4)
    for name in plan.drafts:
        draft = _load(place, name)
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


def _device_name(place: Place) -> str:
    return torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else f"cpu, {os.cpu_count()} cores"
