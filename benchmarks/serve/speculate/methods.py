"""Every speculation method against plain decoding, one request at a time: tokens per second and tokens per step.

    python -m benchmarks.serve.speculate.methods --model DIR --draft DIR [--data DIR] [--temperatures 0,0.6] [--offload MB/s] [--quick]

The baseline is this engine without speculation, with the same kernels; contenders run interleaved. --offload streams the target's layers
through two buffers at the given rate, for the baseline as well: the regime of large trees. --batch decodes several requests together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, arguments, compare, format_table, say
from wager.serve.llm import LLM
from wager.serve.params import SamplingParams


def main() -> None:
    parser = arguments("Speculation methods against plain decoding.")
    parser.add_argument("--model", default="demo", help="target")
    parser.add_argument("--draft", default="demo-draft", help="draft model")
    parser.add_argument("--data", type=Path, help="directory with humaneval.jsonl and spec_bench.jsonl")
    parser.add_argument("--temperatures", default="0,0.6")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1, help="requests decoded together")
    parser.add_argument("--auto", action="store_true", help="let measurement switch drafting off")
    parser.add_argument(
        "--methods", default="", help="only contenders whose name contains one of these, separated by commas"
    )
    parser.add_argument("--offload", type=float, help="stream the target's layers, MB per second")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.tokens = 2, 24
    engines = {name: Engine(args, config) for name, config in contenders(args).items()}
    prompts = read_prompts(engines["plain"], args)
    rows, table = [], [["temperature", "method", "tok/s", "tokens/step", "guesses/step"]]
    for temperature in map(float, args.temperatures.split(",")):
        params = SamplingParams(temperature=temperature, max_tokens=args.tokens, ignore_eos=True, seed=1)
        runs: dict[str, Callable[[], float]] = {
            n: (lambda e=e, p=params: e.rate(prompts, p, args.batch)) for n, e in engines.items()
        }
        rows += compare(
            f"T={temperature:g}, batch {args.batch}", runs, repeats=args.repeats or (2 if args.quick else 5), warmup=1, unit="tok/s",
            higher_is_better=True, progress=say,
        )  # fmt: skip
        for name, engine in engines.items():
            table.append(
                [
                    f"{temperature:g}",
                    name,
                    f"{engine.last_rate:.0f}",
                    f"{engine.tokens_per_step:.2f}",
                    f"{engine.guesses_per_step:.1f}",
                ]
            )
    facts: dict[str, Any] = {
        "tokens": args.tokens,
        "prompts": len(prompts),
        "offload_mb_per_s": args.offload,
        "table": table,
    }
    if args.offload:
        facts["overlap"] = {name: engine.overlap() for name, engine in engines.items()}
    report = Report(
        "serve", "speculation_offloaded" if args.offload else f"speculation_batch_{args.batch}", rows, facts
    )
    print(format_table(table))
    print(report.table())
    if not args.quick:
        print(f"written: {report.save()}")


def contenders(args: Any) -> dict[str, dict[str, Any] | None]:
    draft = {"draft": args.draft}
    methods: dict[str, dict[str, Any]] = {
        **{f"chain {k}": {**draft, "num_speculative_tokens": k} for k in (2, 4, 7)},
        "specinfer 5x8": {**draft, "method": "specinfer", "expansion": [5, 1, 1, 1, 1, 1, 1, 1]},
        "specinfer 1,1,3,1": {**draft, "method": "specinfer", "expansion": [1, 1, 3, 1]},
        "sequoia": {**draft, "method": "sequoia", "max_tree_size": 192 if args.offload else 64, "max_depth": 12},
        **{f"specexec {k}": {**draft, "method": "specexec", "budget": k, "max_depth": 16} for k in (32, 128, 256)},
        "suffix": {"method": "suffix", "suffix_max_spec_factor": 2.0},
        "suffix + draft": {**draft, "method": "suffix", "suffix_max_spec_factor": 2.0},
        "ngram": {"method": "ngram", "num_speculative_tokens": 5},
    }
    wanted = [part for part in args.methods.split(",") if part]
    chosen = {n: {**c, "auto": args.auto} for n, c in methods.items() if not wanted or any(w in n for w in wanted)}
    return {"plain": None, **chosen}


class Engine:
    """One contender with its own engine; counts steps as an observer."""

    def __init__(self, args: Any, config: dict[str, Any] | None):
        offload = {"offload_layers": 2, "offload_bytes_per_s": args.offload * 1e6} if args.offload else {}
        self.llm = LLM(
            args.model, dtype=args.dtype, device=args.device, max_num_seqs=max(args.batch, 2), max_model_len=1024,
            enable_prefix_caching=False, speculative_config=config, observers=[self], **offload,
        )  # fmt: skip
        self.steps = self.tokens = self.guesses = 0
        self.last_rate = 0.0

    def rate(self, prompts: list[list[int]], params: SamplingParams, batch: int) -> float:
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

    def overlap(self) -> float:
        return self.llm.engine.core.runner.model.layer_ring.stats.overlap  # type: ignore[union-attr]

    def on_step(self, record: Any) -> None:
        self.steps += record.decode_tokens
        self.guesses += record.draft_tokens

    def on_tokens(self, request: Any, num_new_tokens: int, now_s: float) -> None:
        self.tokens += num_new_tokens

    def on_finished(self, request: Any) -> None:
        """Steps and tokens are counted, not requests."""


def read_prompts(engine: Engine, args: Any) -> list[list[int]]:
    """Alternating code and chat prompts, cut to their last 256 tokens."""
    if args.data is None:
        texts = [
            "def main(argv):\n",
            "The history of the city begins with",
            "import os\n\n\nclass Node:\n",
            "To install the package, run",
        ]
    else:
        code = [json.loads(line)["prompt"] for line in (args.data / "humaneval.jsonl").read_text().splitlines()]
        chat = [json.loads(line)["turns"][0] for line in (args.data / "spec_bench.jsonl").read_text().splitlines()]
        texts = [text for pair in zip(code, chat[::3], strict=False) for text in pair]
    tokenizer = engine.llm.get_tokenizer()
    assert tokenizer is not None
    return [tokenizer.encode(text)[-256:] for text in (texts * args.prompts)[: args.prompts]]


if __name__ == "__main__":
    main()
