"""How long this machine takes to verify n tokens for a batch of requests, and to draft: measured, kept as points.

Times are of whole passes as the engine makes them: building the batch, the model, the logits. Between measured points they are
interpolated linearly; beyond the last one extrapolated by its slope.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from wager.errors import UsageError
from wager.serve.runner import Growth, ModelRunner, SpanInput
from wager.serve.speculate.draft_engine import DraftModel
from wager.serve.token_tree import TokenTree

QUICK_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class HardwareProfile:
    """sizes: tokens per request of a pass. target[i][j], draft[i][j]: milliseconds of a pass over sizes[j] tokens for each of batches[i]
    requests. overhead: milliseconds that a drafted step costs besides its passes (sampling the tree, deciding). context_tokens: cached
    tokens per request while measuring."""

    sizes: tuple[int, ...]
    batches: tuple[int, ...]
    target: tuple[tuple[float, ...], ...]
    draft: tuple[tuple[float, ...], ...]
    overhead: float = 0.0
    context_tokens: int = 0

    def target_ms(self, batch: int, size: float) -> float:
        return self._at(self.target, batch, size)

    def draft_ms(self, batch: int, size: float) -> float:
        return self._at(self.draft, batch, size) if size else 0.0

    def step_ms(self, batch: int, size: int, frontier: Sequence[int]) -> float:
        """A step that verifies `size` tokens per request; the draft first computes the root, then `frontier` nodes level by level."""
        if size <= 1:
            return self.target_ms(batch, 1)
        drafting = self.draft_ms(batch, 1) + sum(self.draft_ms(batch, n) for n in frontier)
        return self.target_ms(batch, size) + drafting + self.overhead

    def _at(self, table: Sequence[Sequence[float]], batch: int, size: float) -> float:
        per_batch = [_line(self.sizes, row, size) for row in table]
        return _line(self.batches, per_batch, batch)

    def save(self, path: str | Path) -> None:
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1))
        temporary.replace(path)

    @staticmethod
    def load(path: str | Path) -> HardwareProfile:
        try:
            values = json.loads(Path(path).read_text())
            for name in ("target", "draft"):
                values[name] = tuple(tuple(row) for row in values[name])
            return HardwareProfile(**{**values, "sizes": tuple(values["sizes"]), "batches": tuple(values["batches"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"cannot read the hardware profile {path}: {error}; write one with `wager speculate profile`"
            ) from None


def _line(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    if len(xs) == 1 or x <= xs[-1]:
        return float(np.interp(x, xs, ys))
    slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    return float(ys[-1] + max(slope, 0.0) * (x - xs[-1]))


def measure_passes(
    runner: ModelRunner,
    sizes: Sequence[int],
    batches: Sequence[int],
    context_tokens: int,
    repeats: int = 5,
    draft: DraftModel | None = None,
    budget_s: float = math.inf,
) -> tuple[tuple[float, ...], ...]:
    """Milliseconds of passes over `sizes` tokens, ascending, for each of `batches` requests: the fastest of `repeats` interleaved rounds,
    since slower ones measure what else the machine was doing, made `rising`. draft: whose runner it is, to measure passes as it grows a tree.
    budget_s: begin no further round after so many seconds; the first round, a warm-up, counts only where it is the only one.

    Runs on sequences of its own, which are freed afterwards; the prefix cache is not touched.
    """
    rng = np.random.default_rng(0)
    vocab = runner.model.vocab_size
    names = [f"profile-{i}" for i in range(max(batches))]
    try:
        for i, name in enumerate(names):
            runner.blocks.start(name, [0], ("profile", str(i)))
            if not runner.blocks.reserve(name, context_tokens + 1 + max(sizes)):
                raise UsageError(
                    f"the KV cache has no room to measure {max(batches)} requests of {context_tokens} + {max(sizes)} tokens; "
                    "raise kv_cache_memory or measure smaller sizes"
                )
        samples: dict[tuple[int, int], list[float]] = {(b, n): [] for b in batches for n in sizes}
        started = time.perf_counter()
        for round_ in range(repeats + 1):
            if round_ and time.perf_counter() - started > budget_s:
                break
            for (b, n), taken in samples.items():
                inputs = [_span(name, n, context_tokens, draft is not None, rng, vocab) for name in names[:b]]
                begun = time.perf_counter()
                logits = draft.logits(inputs) if draft is not None else _pass(runner, inputs)
                assert logits is not None
                float(logits[-1, -1])  # waits for the device
                if round_ == 1:
                    taken.clear()
                taken.append(1e3 * (time.perf_counter() - begun))
        return tuple(rising([min(samples[b, n]) for n in sizes]) for b in batches)
    finally:
        for name in names:
            runner.blocks.free(name)


def rising(times: Sequence[float]) -> tuple[float, ...]:
    """The nearest times that never fall: a pass over more tokens that took less met a quieter machine."""
    from scipy.optimize import isotonic_regression

    return tuple(isotonic_regression(times).x.tolist())


def _pass(runner: ModelRunner, inputs: Sequence[SpanInput]) -> Tensor:
    batch = runner.build(inputs)
    return runner.logits(runner.forward(batch), batch.logit_rows_L)


def _span(name: str, n: int, context: int, growing: bool, rng: np.random.Generator, vocab: int) -> SpanInput:
    tokens = rng.integers(0, vocab, n)
    if growing:
        growth = Growth(0, np.ones(n, np.int32), np.eye(n, dtype=bool))
        return SpanInput(name, tokens.tolist(), context, None, n, growth)
    tree = TokenTree(tokens[1:], np.full(n - 1, -1, np.int32)) if n > 1 else None
    return SpanInput(name, tokens[:1].tolist(), context, tree, n)


def measure_profile(
    target: ModelRunner,
    draft: DraftModel | None,
    *,
    sizes: Sequence[int] = QUICK_SIZES,
    batches: Sequence[int] = (1,),
    context_tokens: int = 128,
    repeats: int = 5,
    overhead_ms: float = 0.0,
    budget_s: float = math.inf,
) -> HardwareProfile:
    """Measure both models on this machine as it is now."""
    of_target = measure_passes(target, sizes, batches, context_tokens, repeats, budget_s=budget_s)
    of_draft = of_target
    if draft is not None:
        of_draft = measure_passes(draft.runner, sizes, batches, context_tokens, repeats, draft, budget_s)
    return HardwareProfile(tuple(sizes), tuple(batches), of_target, of_draft, overhead_ms, context_tokens)
