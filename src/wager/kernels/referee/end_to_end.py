"""Does a candidate win where it will live? The engine runs in processes of its own, without and with the candidate's operators.

Greedy text must be equal for every prompt, and the time that counts is the engine's. `wager generate` and `wager bench latency` are used as a
user would use them, so this room needs nothing from above it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wager.errors import WagerError
from wager.kernels.referee.injection import VARIABLE, load_classes

PROMPTS = ("The quick brown fox", "def main(argv):", "In the year 2000,", "1 2 3 4 5 6")


@dataclass(frozen=True)
class EndToEnd:
    """`matches` of `prompts` greedy texts were equal; latencies are the engine's medians in seconds."""

    operators: list[str]
    prompts: int
    matches: int
    baseline_s: float
    candidate_s: float

    @property
    def speedup(self) -> float:
        return self.baseline_s / self.candidate_s


def compare(
    model: str, source: Path, prompts: Sequence[str] = PROMPTS, output_tokens: int = 32, rounds: int = 2
) -> EndToEnd:
    """Run the engine with and without the candidate, alternating. Raises WagerError with the engine's last line when a run fails."""
    operators = sorted(load_classes(source))
    texts = [[_generate(model, p, output_tokens, path) for p in prompts] for path in (None, source)]
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for kept, path in zip(times, (None, source), strict=True):
            kept.append(_latency(model, output_tokens, path))
    matches = sum(a == b for a, b in zip(*texts, strict=True))
    return EndToEnd(operators, len(prompts), matches, min(times[0]), min(times[1]))


def _generate(model: str, prompt: str, tokens: int, source: Path | None) -> str:
    return _wager(["generate", prompt, "--model", model, "--temperature", "0", "--max-tokens", str(tokens)], source)


def _latency(model: str, tokens: int, source: Path | None) -> float:
    with tempfile.TemporaryDirectory(prefix="wager-e2e-") as folder:
        path = Path(folder) / "latency.json"
        _wager(
            [
                "bench",
                "latency",
                "--model",
                model,
                "--input-len",
                "16",
                "--vocab-size",
                "200",
                "--batch-size",
                "1",
                "--num-iters",
                "3",
                "--output-len",
                str(tokens),
                "--output-json",
                str(path),
            ],
            source,
        )
        record = json.loads(path.read_text())
    return float(record["percentiles"]["50"])


def _wager(arguments: Sequence[str], source: Path | None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    if source is not None:
        environment[VARIABLE] = str(source.resolve())
    done = subprocess.run(
        [sys.executable, "-m", "wager", *arguments], env=environment, capture_output=True, text=True, timeout=900
    )
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise WagerError(f"`wager {arguments[0]}` failed {'with' if source else 'without'} the candidate: {lines[-1]}")
    return done.stdout
