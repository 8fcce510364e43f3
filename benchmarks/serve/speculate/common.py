"""What the speculation benchmarks share: engines that count their steps, the methods by name, prompts held out from training."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import arguments
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams


def speculation_arguments(description: str, repeats: bool = True) -> Any:
    """--model, --draft, --data, --prompts, --tokens, --dtype beside the common options."""
    parser = arguments(description, device="cpu", repeats=repeats)
    parser.add_argument("--model", default="demo", help="target")
    parser.add_argument("--draft", default="demo-draft", help="draft model")
    parser.add_argument("--data", type=Path, help="directory with humaneval.jsonl and spec_bench.jsonl")
    parser.add_argument("--temperatures", default="0,0.6")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--draft-quantization", help="of the draft's weights in every method that has a draft, e.g. int8"
    )
    return parser


def methods(draft: str, tree_size: int = 64, quantization: str | None = None) -> dict[str, dict[str, Any]]:
    """Configurations by the names used in the tables."""
    d = {"draft": draft, **({"draft_quantization": quantization} if quantization else {})}
    return {
        **{f"chain {k}": {**d, "num_speculative_tokens": k} for k in (1, 2, 4, 6, 8, 12)},
        "specinfer 5x8": {**d, "method": "specinfer", "expansion": [5, 1, 1, 1, 1, 1, 1, 1]},
        "specinfer 1,1,3,1": {**d, "method": "specinfer", "expansion": [1, 1, 3, 1]},
        "sequoia": {**d, "method": "sequoia", "max_tree_size": tree_size},
        **{f"specexec {k}": {**d, "method": "specexec", "budget": k} for k in (32, 128, 256)},
        "suffix": {"method": "suffix", "suffix_max_spec_factor": 2.0},
        "suffix + draft": {**d, "method": "suffix", "suffix_max_spec_factor": 2.0},
        "ngram": {"method": "ngram", "num_speculative_tokens": 5},
    }


class Engine:
    """One contender with its own engine; counts steps as an observer."""

    def __init__(self, args: Any, config: Any, batch: int = 1, auto: bool = False, **options: Any):
        if isinstance(config, dict):
            config = {**config, "auto": auto}
        self.llm = LLM(
            args.model, dtype=args.dtype, device=args.device, max_num_seqs=max(batch, 2), max_model_len=1024,
            enable_prefix_caching=False, speculative_config=config, observers=[self], **options,
        )  # fmt: skip
        self.steps = self.tokens = self.guesses = 0
        self.last_rate = 0.0

    def hold(self, batch: int) -> None:
        """Run at most so many requests at once."""
        scheduler = self.llm.engine.core.scheduler
        scheduler.config = replace(scheduler.config, max_num_seqs=batch)

    def rate(self, prompts: list[list[int]], params: SamplingParams, batch: int = 1) -> float:
        """Tokens per second, prompts included in the time."""
        self.steps = self.tokens = self.guesses = 0
        begun = time.perf_counter()
        for at in range(0, len(prompts), batch):
            self.llm.generate(prompts[at : at + batch], [replace(params) for _ in prompts[at : at + batch]])
        self.last_rate = self.tokens / (time.perf_counter() - begun)
        return self.last_rate

    @property
    def tokens_per_step(self) -> float:
        """Per request and step."""
        return self.tokens / max(self.steps, 1)

    @property
    def guesses_per_step(self) -> float:
        return self.guesses / max(self.steps, 1)

    @property
    def ring(self) -> Any:
        return self.llm.engine.core.runner.model.layer_ring

    def row(self, *head: str) -> list[str]:
        return [*head, f"{self.last_rate:.1f}", f"{self.tokens_per_step:.2f}", f"{self.guesses_per_step:.1f}"]

    def on_step(self, record: Any) -> None:
        self.steps += record.decode_tokens
        self.guesses += record.draft_tokens

    def on_tokens(self, request: Any, num_new_tokens: int, now_s: float) -> None:
        self.tokens += num_new_tokens

    def on_finished(self, request: Any) -> None:
        """Steps and tokens are counted, not requests."""


HEAD = ["tok/s", "tokens/step", "guesses/step"]

OWN = (
    "def main(argv):\n",
    "The history of the city begins with",
    "import os\n\n\nclass Node:\n",
    "To install the package, run",
)


def texts_of(data: Path | None) -> list[str]:
    """Alternating code and chat prompts; four of our own without data."""
    if data is None:
        return list(OWN)
    code = [json.loads(line)["prompt"] for line in (data / "humaneval.jsonl").read_text().splitlines()]
    chat = [json.loads(line)["turns"][0] for line in (data / "spec_bench.jsonl").read_text().splitlines()]
    return [text for pair in zip(code, chat[::3], strict=False) for text in pair]


def read_prompts(llm: LLM, data: Path | None, count: int, longest: int = 256) -> list[list[int]]:
    """Token ids, cut to their last `longest`."""
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    texts = texts_of(data)
    return [tokenizer.encode(text)[-longest:] for text in (texts * (count // len(texts) + 1))[:count]]


def roofline(engine: Engine, greedy: bool, tokens_per_step: float) -> dict[str, Any]:
    """What a Sequoia engine with dynamic trees measured of this machine and pair, and the speed-up these figures allow.

    `model_speedup` is tokens per step over what a step of the usual tree costs, as priced, relative to plain decoding; `free_draft_bound` the
    same with a draft that costs nothing.
    """
    choice = engine.llm.engine.core.speculator.drafters["sequoia"].choice  # type: ignore[union-attr]
    profile, counter, price = choice.profile, choice.counters[greedy], choice.price(1)
    chances, usual = choice.by_confidence[greedy].chances(len(choice.by_confidence[greedy].visits) - 1)
    plain_ms, rows = profile.target_ms(1, 1), 1 + engine.guesses_per_step
    return {
        "acceptance": [round(float(p), 4) for p in counter.p[:8]],
        "decisions": counter.decisions,
        "acceptance by confidence": [[round(p, 4) for p in row[:3]] for row in chances],
        "a first guess": usual,
        "target_ms": {n: round(profile.target_ms(1, n), 3) for n in (1, 2, 4, 8, 16, 32, 64)},
        "draft_ms": {n: round(profile.draft_ms(1, n), 3) for n in (1, 2, 4, 8, 16)},
        "pass_ms": price.pass_ms,
        "row_ms": price.row_ms(rows),
        "overhead_ms": round(profile.overhead, 3),
        "rows": rows,
        "model_speedup": tokens_per_step * plain_ms / price.usual_ms,
        "free_draft_bound": tokens_per_step * plain_ms / profile.target_ms(1, rows),
    }
