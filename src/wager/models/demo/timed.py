"""What a training within minutes works with: its plan, the place and its files, the clock, batches of a token stream."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wager.errors import UsageError, WagerError
from wager.models.llama import Llama, LlamaConfig
from wager.models.loader import load_model

LOG_EVERY, SAVE_EVERY_S = 20, 30.0


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


def load(place: Place, name: str) -> Llama:
    model = load_model(place.out / name, torch.float32).model
    assert isinstance(model, Llama)
    return model.to(place.device)


def fresh(config: dict[str, Any], place: Place, number: int) -> Llama:
    generator = torch.Generator().manual_seed(place.seed + number)
    return Llama(LlamaConfig.from_checkpoint(config), torch.float32, generator).to(place.device).train()


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


def read_stream(place: Place, name: str = "train.npy") -> Tensor:
    """A token stream on the device; int16 holds any vocabulary of 32,768."""
    return torch.from_numpy(np.load(place.streams(name)).astype(np.int16)).to(place.device)


def check_loss(loss: float, name: str) -> None:
    if not math.isfinite(loss):
        raise WagerError(
            f"the loss of {name} is {loss}; its last written weights are good, train with a lower learning rate"
        )


def device_name(place: Place) -> str:
    return torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else f"cpu, {os.cpu_count()} cores"
