"""Speculation against plain decoding with the same kernels and against transformers' assisted generation, one request at a time.

    python -m benchmarks.serve.speculate.wallclock --model DIR --draft DIR --data DIR [--dtype float32|bfloat16] [--quick]

Prompts (HumanEval, Spec-Bench) were never trained on. Contenders run interleaved; the first run of each is a warm-up in which Sequoia
counts acceptance and plans its tree. The facts hold the measured times and acceptance, and the speed-up that they allow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Report, compare, format_table, say
from benchmarks.serve.speculate.common import HEAD, Engine, methods, read_prompts, roofline, speculation_arguments
from wager.models import demo
from wager.serve.params import SamplingParams

DEFAULT = "chain 2,chain 4,specinfer 5x8,specinfer 1,sequoia,suffix + draft"
LONGEST_PROMPT = 128  # tokens, as in the papers' protocols: what is compared is decoding


def main() -> None:
    parser = speculation_arguments("Speculation against plain decoding, one request at a time.")
    parser.add_argument("--methods", default=DEFAULT, help="contenders whose name begins so, separated by commas")
    parser.add_argument("--no-transformers", action="store_true", help="leave the peer out")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.tokens = 2, 24
    wanted = args.methods.split(",")
    chosen = {
        n: c
        for n, c in methods(args.draft, quantization=args.draft_quantization).items()
        if any(n.startswith(w) for w in wanted)
    }
    engines = {"plain": Engine(args, None)} | {name: Engine(args, config) for name, config in chosen.items()}
    prompts = read_prompts(engines["plain"].llm, args.data, args.prompts, LONGEST_PROMPT)
    peer = None if args.no_transformers else Peer(args)
    rows, table = [], [["temperature", "method", *HEAD]]
    facts: dict[str, Any] = {
        "tokens": args.tokens,
        "prompts": args.prompts,
        "draft quantization": args.draft_quantization,
    }
    report = Report("serve", "", [])
    for temperature in map(float, args.temperatures.split(",")):
        params = SamplingParams(temperature=temperature, max_tokens=args.tokens, ignore_eos=True, seed=1)
        runs: dict[str, Callable[[], float]] = {
            name: (lambda e=e, p=params: e.rate(prompts, p)) for name, e in engines.items()
        }
        if peer is not None:
            runs["transformers assisted"] = lambda t=temperature: peer.rate(prompts, t, args.tokens)
        rows += compare(
            f"T={temperature:g}, {args.dtype}", runs, repeats=args.repeats or (2 if args.quick else 5), warmup=1, unit="tok/s",
            higher_is_better=True, progress=say,
        )  # fmt: skip
        table += [engine.row(f"{temperature:g}", name) for name, engine in engines.items()]
        if "sequoia" in engines:
            sequoia = engines["sequoia"]
            facts[f"roofline_T{temperature:g}"] = roofline(sequoia, temperature == 0, sequoia.tokens_per_step)
        facts |= between(rows, f"T={temperature:g}, {args.dtype}")
        facts["table"] = table
        report = Report("serve", f"speculation_wallclock_{Path(args.model).name}_{args.dtype}", rows, facts)
        if not args.quick:  # after each temperature: what was measured is not lost when the rest is cut short
            say(f"written: {report.save()}")
    print(format_table(table))
    print(report.table())
    for name, value in facts.items():
        if name != "table":
            print(f"{name}: {value}")


def between(rows: list[Any], workload: str) -> dict[str, float]:
    """Sequoia against the best chain, SpecInfer's 5x8 and the peer: ratios of medians of the same rounds."""
    of = {row.ours: row.ours_value for row in rows if row.workload == workload}
    if "sequoia" not in of:
        return {}
    chains = [value for name, value in of.items() if name.startswith("chain")]
    others = {"the best chain": max(chains, default=0.0)}
    others |= {name: of[name] for name in ("specinfer 5x8", "transformers assisted") if name in of}
    return {f"{workload}: sequoia over {name}": of["sequoia"] / value for name, value in others.items() if value}


class Peer:
    """transformers' assisted generation over the same checkpoints and dtype."""

    def __init__(self, args: Any):
        from transformers import AutoModelForCausalLM

        def load(name: str) -> Any:
            path = demo.path(name) if demo.is_demo(name) else Path(name)
            return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype)).eval()

        self.target, self.draft = load(args.model), load(args.draft)

    @torch.inference_mode()
    def rate(self, prompts: list[list[int]], temperature: float, tokens: int) -> float:
        options: dict[str, Any] = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}  # fmt: skip
        options["assistant_model"] = self.draft
        begun, made = time.perf_counter(), 0
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = self.target.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0,
                **options,
            )  # fmt: skip
            made += out.shape[1] - ids.shape[1]
        return made / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
