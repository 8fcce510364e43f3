"""The auto mode at batch 1, 4, 16 and 64: against plain decoding and against the best fixed choice.

    python -m benchmarks.serve.speculate.auto --model DIR --draft DIR --data DIR [--batches 1,4,16,64] [--quick]

Auto is Sequoia with its gate, which measures its own steps and stops drafting where it does not pay. The warm-up is long enough for the
gate to see both arms; what it costs to keep trying the losing arm is in the measured runs. Twice as many requests as the batch holds (at
least four) are given at once, so a request that ends makes room for the next and the batch keeps its size but for the end; with
--waves every batch ends before the next begins: then its slowest request says how long it takes, and drafting for the others is wasted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, compare, format_table, say
from benchmarks.serve.speculate.common import HEAD, Engine, methods, read_prompts, speculation_arguments
from wager.serve.params import SamplingParams

LONGEST_PROMPT = 64  # tokens: what is compared is decoding


def main() -> None:
    parser = speculation_arguments("Auto mode over batch sizes.")
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--method", default="sequoia", help="the method that auto gates")
    parser.add_argument("--waves", action="store_true", help="one batch after another, each to its end")
    parser.set_defaults(tokens=96, temperatures="0")
    args = parser.parse_args()
    batches = [1, 4] if args.quick else [int(b) for b in args.batches.split(",")]
    if args.quick:
        args.tokens = 32
    known = methods(args.draft, quantization=args.draft_quantization)
    rows, table = [], [["batch", "method", *HEAD]]
    facts: dict[str, Any] = {"tokens": args.tokens, "waves": args.waves, "dtype": args.dtype}
    most = max(batches)
    engines = {
        "plain": Engine(args, None, most),
        f"{args.method} always": Engine(args, known[args.method], most),
        "chain 2 always": Engine(args, known["chain 2"], most),
        "auto": Engine(args, known[args.method], most, auto=True),
    }
    report = Report("serve", "", [])
    for batch in batches:
        prompts = read_prompts(
            engines["plain"].llm, args.data, max((1 if args.waves else 2) * batch, 4), LONGEST_PROMPT
        )
        for engine in engines.values():
            engine.hold(batch)
        at_once = batch if args.waves else len(prompts)
        for temperature in map(float, args.temperatures.split(",")):
            params = SamplingParams(temperature=temperature, max_tokens=args.tokens, ignore_eos=True, seed=1)
            runs: dict[str, Callable[[], float]] = {
                name: (lambda e=e, p=params, n=at_once, own=prompts: e.rate(own, p, n)) for name, e in engines.items()
            }
            found = compare(
                f"batch {batch}, T={temperature:g}", runs, repeats=args.repeats or (2 if args.quick else 5), warmup=1,
                unit="tok/s", higher_is_better=True, progress=say,
            )  # fmt: skip
            rows += found
            values = {row.ours: row.ours_value for row in found} | {"plain": found[0].baseline_value}
            best = max(value for name, value in values.items() if name != "auto")
            facts[f"batch {batch}, T={temperature:g}"] = {
                "auto over plain": values["auto"] / values["plain"],
                "auto over the best fixed choice": values["auto"] / best,
            }
            table += [engine.row(str(batch), name) for name, engine in engines.items()]
        report = Report(
            "serve",
            f"speculation_auto_{'waves_' if args.waves else ''}{Path(args.model).name}",
            rows,
            {**facts, "table": table},
        )
        if not args.quick:
            say(
                f"written: {report.save()}"
            )  # after each batch size: what was measured is not lost when the rest is cut short
    print(format_table(table))
    print(report.table())
    for name, value in facts.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
