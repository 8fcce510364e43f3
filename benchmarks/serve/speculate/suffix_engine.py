"""Suffix decoding inside the engine, from a cold cache: requests that come again, and requests that do not.

    python -m benchmarks.serve.speculate.suffix_engine --data DIR [--model DIR] [--quick]

"asked again": every prompt is asked --times times, one request after another, greedily, as agents that retry and sibling runs do; the
first answers are made without help of the cache. "asked once": each prompt once. The cache is emptied before every run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, compare, format_table, say
from benchmarks.serve.speculate.common import HEAD, Engine, read_prompts, speculation_arguments
from wager.serve.params import SamplingParams
from wager.serve.speculate.suffix import SuffixCache

DEPTH = 64
CONFIGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "suffix": {"method": "suffix", "suffix_max_spec_factor": 2.0, "num_speculative_tokens": 16, "suffix_max_depth": DEPTH},
    "ngram": {"method": "ngram", "num_speculative_tokens": 5},
}  # fmt: skip


def main() -> None:
    parser = speculation_arguments("Suffix decoding in the engine.")
    parser.add_argument("--times", type=int, default=3, help="how often a prompt is asked")
    parser.set_defaults(prompts=4, tokens=64)
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.tokens = 2, 24
    engines = {name: Engine(args, config) for name, config in CONFIGS.items()}
    prompts = read_prompts(engines["plain"].llm, args.data, args.prompts, longest=128)
    params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
    rows, table = [], [["workload", "method", *HEAD]]
    for workload, asked in (("asked again", prompts * args.times), ("asked once", prompts)):
        runs: dict[str, Callable[[], float]] = {
            name: (lambda e=e, own=asked: cold(e).rate(own, params)) for name, e in engines.items()
        }
        rows += compare(
            f"{workload}, T=0, {args.dtype}", runs, repeats=args.repeats or (2 if args.quick else 5), warmup=1, unit="tok/s",
            higher_is_better=True, progress=say,
        )  # fmt: skip
        table += [engine.row(workload, name) for name, engine in engines.items()]
    facts = {"table": table, "tokens": args.tokens, "prompts": args.prompts, "times": args.times}
    report = Report("serve", f"speculation_suffix_engine_{Path(args.model).name}", rows, facts)
    print(format_table(table))
    print(report.table())
    if not args.quick:
        print(f"written: {report.save()}")


def cold(engine: Engine) -> Engine:
    """The engine with nothing remembered of earlier outputs."""
    speculator = engine.llm.engine.core.speculator
    suffix: Any = speculator.drafters.get("suffix") if speculator else None
    if suffix is not None:
        suffix.cache = SuffixCache(DEPTH)
    return engine


if __name__ == "__main__":
    main()
