"""Replay 60 seconds of the Azure conversation trace against `wager serve` and draw TTFT, ITL and goodput.

    python -m benchmarks.serve.trace_replay [--model demo] [--speed 1] [--length-scale 0.1] [--quick]

Arrivals are those of the trace (divided by --speed); lengths are multiplied by --length-scale to suit a small machine and model. Output:
benchmarks/results/serve/trace_replay.json, and a picture for the results page. Goodput counts the requests that met both limits, per second.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.harness import Report, arguments, picture_path, say
from benchmarks.serve.server import Server
from wager.serve.bench import client, summary, workload
from wager.serve.bench.plot import plot_run

TRACE = Path(__file__).parents[1] / "data" / "azure_llm_2023_conv_120s.csv"
PERCENTILES = (50, 90, 99)


def main() -> None:
    parser = arguments("Replay of the Azure conversation trace.", repeats=False)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of the trace")
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--length-scale", type=float, default=0.1)
    parser.add_argument("--max-total-tokens", type=int, default=480)
    parser.add_argument("--vocab-size", type=int, default=4000)
    parser.add_argument("--ttft-ms", type=float, default=500.0)
    parser.add_argument("--tpot-ms", type=float, default=50.0)
    args = parser.parse_args()
    if args.quick:
        args.duration = 6.0
    jobs = workload.trace_jobs(
        workload.read_trace(args.trace),
        vocab_size=args.vocab_size,
        seed=0,
        duration_s=args.duration,
        speed=args.speed,
        length_scale=args.length_scale,
        max_total_tokens=args.max_total_tokens,
    )
    limits = {"ttft": args.ttft_ms, "tpot": args.tpot_ms}
    with Server(args.model) as server:
        target = client.Target(server.url, asyncio.run(client.first_model(server.url)))
        warm = [workload.Job(jobs[0].prompt, 4, 0.0)]
        asyncio.run(client.run(target, warm))
        say(f"{len(jobs)} requests over {jobs[-1].arrival_s:.0f} s")
        results, duration_s = asyncio.run(client.run(target, jobs))
    numbers = summary.summarize(results, duration_s, goodput_ms=limits, percentiles=PERCENTILES)
    print(summary.report(numbers, limits, PERCENTILES))
    failed = [r.error for r in results if not r.ok]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed; the first said: {failed[0]}")
    if not args.quick:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()} | {"trace": args.trace.name}
        print(f"written: {Report('serve', 'trace_replay', [], facts=settings | numbers).save()}")
        title = f"Azure conversation trace, {len(jobs)} requests in {duration_s:.0f} s, lengths x {args.length_scale:g}, model {args.model}"
        plot_run(results, duration_s, picture_path("serve", "trace_replay"), title, limits)


if __name__ == "__main__":
    main()
