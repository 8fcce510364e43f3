"""Speculation over a target whose weights are streamed from disk, and the reverse regime: the same trees over the resident target.

    python -m benchmarks.serve.speculate.offload --model DIR --draft DIR --data DIR [--rate MB/s] [--quick]

Two layers are held in memory, the others are read with O_DIRECT (the page cache is bypassed) no faster than --rate, for the baseline as
well, which prefetches in the same way. The best draft here is the strongest one that fits, not the cheapest: a draft pass is small
against reading the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import Report, compare, format_table, say
from benchmarks.serve.speculate.common import HEAD, Engine, methods, read_prompts, speculation_arguments
from wager.serve.params import SamplingParams

LONGEST_PROMPT = 64  # tokens: what is compared is decoding
RESIDENT = ("specexec 256", "specexec 128", "sequoia")


def main() -> None:
    parser = speculation_arguments("Speculation over streamed weights.")
    parser.add_argument("--rate", type=float, default=400.0, help="MB per second at which layers are read, at most")
    parser.add_argument("--budgets", default="64,128", help="SpecExec's tree sizes")
    parser.set_defaults(prompts=2, tokens=32)
    args = parser.parse_args()
    if args.quick:
        args.tokens = 12
    known = methods(args.draft, 192, args.draft_quantization)
    for budget in args.budgets.split(","):
        known[f"specexec {budget}"] = {**known["specexec 128"], "budget": int(budget)}
    chosen = {
        n: known[n]
        for n in (*(f"specexec {b}" for b in args.budgets.split(",")), "sequoia", "specinfer 5x8", "chain 4")
    }
    streamed = {"offload_layers": 2, "offload_bytes_per_s": args.rate * 1e6}
    plain, resident_plain = Engine(args, None, **streamed), Engine(args, None)
    engines = {"plain": plain} | {name: Engine(args, config, **streamed) for name, config in chosen.items()}
    resident = {"plain": resident_plain} | {n: Engine(args, known[n]) for n in known if n in RESIDENT}
    prompts = read_prompts(plain.llm, args.data, args.prompts, LONGEST_PROMPT)
    ring = plain.ring
    facts: dict[str, object] = {
        "rate_mb_per_s": args.rate, "layers_bytes": ring.file_bytes, "resident_bytes": ring.resident_bytes,
        "page_cache_bypassed": ring._direct, "tokens": args.tokens, "prompts": args.prompts,
    }  # fmt: skip
    rows, table = [], [["regime", "temperature", "method", *HEAD, "overlap"]]
    report = Report("serve", "", [])
    for temperature in map(float, args.temperatures.split(",")):
        params = SamplingParams(temperature=temperature, max_tokens=args.tokens, ignore_eos=True, seed=1)
        for regime, group in (("streamed", engines), ("resident", resident)):
            runs: dict[str, Callable[[], float]] = {
                name: (lambda e=e, p=params: e.rate(prompts, p)) for name, e in group.items()
            }
            for name, engine in group.items():  # Sequoia learns what is accepted; plain decoding has nothing to learn
                engine.rate(prompts, replace(params, max_tokens=2) if name == "plain" else params)
            rows += compare(
                f"{regime}, T={temperature:g}", runs, repeats=args.repeats or (2 if args.quick else 5), warmup=0, unit="tok/s",
                higher_is_better=True, progress=say,
            )  # fmt: skip
            for name, engine in group.items():
                overlap = f"{engine.ring.stats.overlap:.0%}" if regime == "streamed" else ""
                table.append([*engine.row(regime, f"{temperature:g}", name), overlap])
        facts["overlap"] = {name: engine.ring.stats.overlap for name, engine in engines.items()}
        facts["table"] = table
        report = Report("serve", f"speculation_offload_{Path(args.model).name}", rows, facts)
        if not args.quick:  # after each temperature: what was measured is not lost when the rest is cut short
            say(f"written: {report.save()}")
    print(format_table(table))
    print(report.table())
    print(f"overlap: {facts['overlap']}")


if __name__ == "__main__":
    main()
