"""Trains a Llama-layout model on a token stream: Muon for the matrices, AdamW for the rest, bfloat16 products, data parallel over processes.

A process holds one thread, because two single-threaded processes share a busy machine better than one with two threads; gradients are
averaged with gloo once a step. The loss is next-token prediction, or distillation from a teacher (`Objective`).

Muon: "Muon is Scalable for LLM Training" (arXiv 2502.16982), torch.optim.Muon with AdamW-matched step sizes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from wager.models.attend import causal_attention
from wager.models.demo.dataset import Batches
from wager.models.demo.export import save_weights
from wager.models.demo.grow import grow
from wager.models.llama import Llama, LlamaConfig
from wager.models.loader import load_model


@dataclass(frozen=True)
class Recipe:
    """How long and how fast.

    Attributes:
        tokens: training tokens in all.
        batch_tokens: tokens of a step, over all processes; a multiple of processes x window.
        window: longest context; the first `short_share` of the run cuts windows into pieces of `short_window`.
        minutes: wall-clock limit; the learning rate comes down in time for it. None: no limit; 0: no step, the start is the result.
        teacher: checkpoint directory to distil from; None: next-token prediction.
        teacher_weight: share of the divergence from the teacher in the loss, the rest is next-token prediction.
        start: checkpoint directory to start from instead of random weights; it may be shallower (`grow.py`).
        save_every_s: seconds between two checkpoints.
    """

    tokens: int
    batch_tokens: int = 16_384
    window: int = 2048
    short_window: int = 1024
    short_share: float = 0.85
    learning_rate: float = 3e-3
    warmup: float = 0.02
    cooldown: float = 0.5
    weight_decay: float = 0.05
    minutes: float | None = None
    processes: int = 1
    device: str = "cpu"
    seed: int = 0
    teacher: str | None = None
    teacher_weight: float = 0.9
    start: str | None = None
    save_every_s: float = 120.0

    @property
    def windows_per_process(self) -> int:
        return max(1, self.batch_tokens // (self.window * self.processes))

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.windows_per_process * self.window * self.processes))


def train(config: dict[str, Any], stream: Path, out: Path, recipe: Recipe) -> None:
    """Train a model of the given config.json; writes weights into `out` before the first step, as it goes and at the end."""
    if recipe.processes == 1:
        return _worker(0, config, stream, out, recipe, None)
    store = out.absolute() / "rendezvous"
    store.unlink(missing_ok=True)
    spawn(_worker, (config, stream, out, recipe, store), nprocs=recipe.processes)
    store.unlink(missing_ok=True)


def _worker(rank: int, config: dict[str, Any], stream: Path, out: Path, recipe: Recipe, store: Path | None) -> None:
    if store is not None:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // recipe.processes))
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=recipe.processes)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = Llama(LlamaConfig.from_checkpoint(config), torch.float32, generator)
    if recipe.start is not None:
        start = load_model(recipe.start, torch.float32).model
        assert isinstance(start, Llama)
        grow(model, start)
    model.to(recipe.device)
    objective = Objective(recipe)
    batches = Batches(stream, recipe.window, rank, recipe.processes, recipe.seed)
    run = Run(model, objective, batches, recipe)
    try:
        run.train(lambda: save_weights(model, out) if rank == 0 else None, log=print if rank == 0 else lambda _: None)
    finally:
        if store is not None:
            dist.destroy_process_group()


class Objective:
    """The loss of one batch: cross-entropy with the next token, or KL(teacher || student) mixed with it."""

    def __init__(self, recipe: Recipe):
        self._weight = recipe.teacher_weight
        self._teacher = None
        if recipe.teacher is not None:
            self._teacher = load_model(recipe.teacher, torch.float32, recipe.device).model.requires_grad_(False)

    def __call__(self, model: Llama, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """(loss to descend, next-token cross-entropy in nats, detached). `tokens_BS` holds S - 1 inputs and their successors."""
        logits_TW, targets_T = forward(model, tokens_BS), tokens_BS[:, 1:].flatten()
        entropy = F.cross_entropy(logits_TW, targets_T)
        if self._teacher is None:
            return entropy, entropy.detach()
        with torch.no_grad():
            wanted_TW = F.log_softmax(forward(self._teacher, tokens_BS), -1)
        divergence = F.kl_div(F.log_softmax(logits_TW, -1), wanted_TW, log_target=True, reduction="batchmean")
        return self._weight * divergence + (1 - self._weight) * entropy, entropy.detach()


def forward(model: Any, tokens_BS: Tensor) -> Tensor:
    """float32 logits [B * (S - 1), W] of every position but the last, over B independent sequences."""
    inputs = tokens_BS[:, :-1]
    sequences, length = inputs.shape
    positions_T = torch.arange(length, device=inputs.device).repeat(sequences)
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=multiplies_bfloat16(inputs.device)):
        hidden_TD = model(inputs.flatten(), positions_T, causal_attention(model, [length] * sequences))
        return model.logits(hidden_TD).float()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 there; on a CPU without such instructions they are many times slower."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Run:
    """One training run: its optimizers, its clock and its schedule."""

    def __init__(self, model: Llama, objective: Objective, batches: Batches, recipe: Recipe):
        self.model, self.objective, self.batches, self.recipe = model, objective, batches, recipe
        self.optimizers = make_optimizers(model, recipe)
        self.started = time.monotonic()

    def progress(self, step: int) -> float:
        """Share of the run that is over, by steps or by the clock, whichever is further; the same on every process."""
        done = step / self.recipe.steps
        if self.recipe.minutes is not None:
            limit_s = 60 * self.recipe.minutes
            done = max(done, (time.monotonic() - self.started) / limit_s if limit_s else 1.0)
        if dist.is_initialized():
            shared = torch.tensor(done)
            dist.broadcast(shared, 0)
            done = shared.item()
        return done

    def train(self, save: Callable[[], None], log: Callable[[str], None]) -> None:
        losses: list[Tensor] = []  # on the device: reading each would make it wait for the host
        seen = step = 0
        save()
        saved_s = time.monotonic()
        while (progress := self.progress(step)) < 1:
            rate = self.recipe.learning_rate * schedule(progress, self.recipe.warmup, self.recipe.cooldown)
            tokens_BS = self._batch(step, progress)
            losses.append(self._step(tokens_BS, rate))
            step, seen = step + 1, seen + self.recipe.windows_per_process * self.recipe.window * self.recipe.processes
            if step % 10 == 0:
                speed = seen / (time.monotonic() - self.started)
                log(
                    f"step {step}  {progress:6.1%}  loss {torch.stack(losses).mean():.3f}  lr {rate:.2e}  {seen / 1e6:.2f}M tokens  {speed:.0f}/s"
                )
                losses.clear()
            if time.monotonic() - saved_s >= self.recipe.save_every_s:
                save()
                saved_s = time.monotonic()
        save()

    def _batch(self, step: int, progress: float) -> Tensor:
        count, recipe = self.recipe.windows_per_process, self.recipe
        windows = torch.from_numpy(np.stack([self.batches.window(step * count + i) for i in range(count)]))
        if progress < recipe.short_share and recipe.short_window < recipe.window:
            short = recipe.short_window
            windows = torch.cat([windows[:, i : i + short + 1] for i in range(0, recipe.window, short)])
        return windows.to(recipe.device)

    def _step(self, tokens_BS: Tensor, rate: float) -> Tensor:
        loss, entropy = self.objective(self.model, tokens_BS)
        loss.backward()
        average_gradients(self.model)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return entropy


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks; AdamW for the embedding (tied with the head) and the norms."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and name.startswith("layers.") else rest).append(parameter)
    muon = torch.optim.Muon(
        matrices,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def average_gradients(model: nn.Module) -> None:
    """Mean over processes, in one message."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def schedule(progress: float, warmup: float, cooldown: float) -> float:
    """Warm up, hold, then down to zero in a straight line over the last `cooldown` of the run."""
    return min(1.0, (progress + 1e-3) / warmup, (1 - progress) / cooldown)
