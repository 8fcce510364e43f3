"""The loop that an agent drives: propose a source, have it judged, read the report, propose again.

Anything with a `propose(history)` can drive it; a language model behind an endpoint gets `report` as text. The built-in driver mutates the
constants of our C++ linear (slice of the input, prefetch distance, weights claimed at once, unrolling), starting from the shipped ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from wager.kernels.referee.capture import Case
from wager.kernels.referee.judge import DEFAULTS, Options, Verdict, judge
from wager.native.build import isa

CHOICES = {
    "KC": (128, 256, 512, 1024, 2048),
    "PREFETCH": (0, 256, 512, 1024, 2048, 4096),
    "CLAIM_BYTES": (4096, 16384, 32768, 131072),
    "UNROLL": (0, 1),
}
# What cpp/linear_tiles.h and cpp/linear.cpp set where no flag does; the slice depends on the width of a vector.
SHIPPED = {"KC": 512 if isa() == "avx512" else 256, "PREFETCH": 1024, "CLAIM_BYTES": 32768, "UNROLL": 0}
SOURCE = '''"""Our C++ linear with other constants."""

import math

import torch
from torch import nn

from wager.kernels.native_linear import NativeLinear

FLAGS = {flags!r}


class Linear(nn.Module):
    def __init__(self, in_features, out_features, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.packed, self.version = None, -1

    def forward(self, x):
        version = self.weight._version + (0 if self.bias is None else self.bias._version)
        if self.packed is None or version != self.version:
            bias = None if self.bias is None else self.bias.detach()
            self.packed, self.version = NativeLinear(self.weight.detach(), bias, flags=FLAGS), version
        return self.packed(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
'''


@dataclass(frozen=True)
class Attempt:
    source: str
    verdict: Verdict


class Proposer(Protocol):
    """Gives the next source after reading what became of the earlier ones; None ends the search."""

    def propose(self, history: Sequence[Attempt]) -> str | None: ...


def report(attempt: Attempt) -> str:
    """One attempt in words, for a person or a model."""
    v = attempt.verdict
    lines = [
        f"{v.operator}: {v.status}"
        + (f", {v.reason}" if v.reason else "")
        + (f", {v.speedup:.2f}x the baseline" if v.speedup else "")
    ]
    lines += [
        f"  {c.label}: {c.status}"
        + (
            f", {c.candidate_s * 1e6:.0f} us against {c.baseline_s * 1e6:.0f} us"
            if c.candidate_s and c.baseline_s
            else ""
        )
        for c in v.cases
    ]
    return "\n".join(lines)


class Mutation:
    """Random changes of one constant of the best attempt so far; never the same constants twice."""

    def __init__(self, rng: random.Random, attempts: int):
        self.rng, self.left, self.tried = rng, attempts, {}

    def propose(self, history: Sequence[Attempt]) -> str | None:
        if self.left == 0 or len(self.tried) == math.prod(map(len, CHOICES.values())):
            return None
        self.left -= 1
        best = max(history, key=lambda a: a.verdict.speedup or 0.0, default=None)
        constants = dict(SHIPPED) if best is None else dict(self.tried[best.source])
        while constants in self.tried.values():
            name = self.rng.choice(list(CHOICES))
            constants[name] = self.rng.choice(CHOICES[name])
        source = SOURCE.format(flags=flags_of(constants))
        self.tried[source] = constants
        return source


def flags_of(constants: dict[str, int]) -> tuple[str, ...]:
    """What the compiler is told. UNROLL is its own unrolling of loops; the rest are constants of the source."""
    named = tuple(f"-DWAGER_{name}={value}" for name, value in constants.items() if name != "UNROLL")
    return named + ("-funroll-loops",) * constants["UNROLL"]


def search(
    operator: str, proposer: Proposer, timed: Sequence[Case], held: Sequence[Case], folder: Path, options: Options = DEFAULTS,
    progress: Callable[[str], None] | None = None,
) -> list[Attempt]:  # fmt: skip
    """Judge proposals until there are no more; every source is kept in `folder`. Returns all attempts in order."""
    history: list[Attempt] = []
    while (source := proposer.propose(history)) is not None:
        path = folder / f"{operator}-{len(history)}.py"
        path.write_text(source)
        history.append(Attempt(source, judge(operator, path, timed, held, options)))
        if progress:
            progress(f"{path.name}: {report(history[-1])}")
    return history
