"""From results to numbers: the JSON schema of `vllm bench serve`, so that existing scripts and dashboards read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wager.errors import UsageError
from wager.serve.bench.client import Result

METRICS = ("ttft", "tpot", "itl", "e2el")
TITLES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token (excl. first)",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


def parse_goodput(terms: Sequence[str]) -> dict[str, float]:
    """["ttft:500", "tpot:50"] → limits in ms. Raises UsageError naming the term."""
    limits = {}
    for term in terms:
        name, _, value = term.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1.0
        if name not in GOODPUT_METRICS or limits[name] <= 0:
            raise UsageError(
                f"--goodput {term!r} must be METRIC:MILLISECONDS with METRIC one of {', '.join(GOODPUT_METRICS)}"
            )
    return limits


def values_ms(results: Sequence[Result], metric: str) -> list[float]:
    """All measurements of one metric over the successful requests, in ms."""
    if metric == "itl":
        return [1e3 * gap for r in results if r.ok for gap in r.itl_s]
    pick = {"ttft": lambda r: r.ttft_s, "tpot": lambda r: r.tpot_s, "e2el": lambda r: r.e2e_s}[metric]
    return [1e3 * v for r in results if r.ok and (v := pick(r)) is not None]


def meets(result: Result, limits_ms: Mapping[str, float]) -> bool:
    """Whether a request succeeded within every limit."""
    if not result.ok:
        return False
    measured = {"ttft": result.ttft_s, "tpot": result.tpot_s or 0.0, "e2el": result.e2e_s}
    return all(1e3 * measured[name] <= limit for name, limit in limits_ms.items())


def summarize(
    results: Sequence[Result],
    duration_s: float,
    *,
    goodput_ms: Mapping[str, float] | None = None,
    percentiles: Sequence[float] = (50, 90, 95, 99),
) -> dict[str, Any]:
    """Counts, rates, and mean, median, std and percentiles of every metric in ms. A metric without a measurement is reported as 0."""
    done = [r for r in results if r.ok]
    outputs = sum(r.output_tokens for r in done)
    inputs = sum(r.input_tokens for r in done)
    summary: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(results) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration_s,
        "request_goodput": sum(meets(r, goodput_ms) for r in results) / duration_s if goodput_ms else None,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
        "max_concurrent_requests": peak_concurrency(done),
    }
    for metric in METRICS:
        values = np.array(values_ms(results, metric) or [0.0])
        summary[f"mean_{metric}_ms"] = float(values.mean())
        summary[f"median_{metric}_ms"] = float(np.median(values))
        summary[f"std_{metric}_ms"] = float(values.std())
        for p in percentiles:
            summary[f"p{p:g}_{metric}_ms"] = float(np.percentile(values, p))
    return summary


def details(results: Sequence[Result]) -> dict[str, Any]:
    """The per-request lists that --save-detailed adds; seconds, in the order of the requests."""
    return {
        "input_lens": [r.input_tokens for r in results],
        "output_lens": [r.output_tokens for r in results],
        "start_times": [r.start_s for r in results],
        "ttfts": [r.ttft_s for r in results],
        "itls": [r.itl_s for r in results],
        "generated_texts": [r.text for r in results],
        "errors": [r.error for r in results],
    }


def peak_concurrency(results: Sequence[Result]) -> int:
    """Most requests in flight at one moment; a request that ends when another starts does not overlap it."""
    events = sorted([(r.start_s + r.e2e_s, -1) for r in results] + [(r.start_s, 1) for r in results])
    return int(max(np.cumsum([step for _, step in events]), default=0))


def report(summary: Mapping[str, Any], goodput_ms: Mapping[str, float] | None, percentiles: Sequence[float]) -> str:
    """The table a person reads."""
    lines = [
        row("Successful requests", summary["completed"]),
        row("Failed requests", summary["failed"]),
        row("Duration (s)", summary["duration"]),
        row("Input tokens", summary["total_input_tokens"]),
        row("Generated tokens", summary["total_output_tokens"]),
        row("Peak concurrent requests", summary["max_concurrent_requests"]),
        row("Request throughput (req/s)", summary["request_throughput"]),
    ]
    if goodput_ms:
        limits = ", ".join(f"{k} ≤ {v:g} ms" for k, v in goodput_ms.items())
        lines.append(row(f"Goodput (req/s; {limits})", summary["request_goodput"]))
    lines += [
        row("Output token throughput (tok/s)", summary["output_throughput"]),
        row("Total token throughput (tok/s)", summary["total_token_throughput"]),
    ]
    for metric in METRICS:
        lines.append(f"-- {TITLES[metric]} (ms) ".ljust(58, "-"))
        lines.append(row("Mean", summary[f"mean_{metric}_ms"]))
        lines.append(row("Median", summary[f"median_{metric}_ms"]))
        lines += [row(f"P{p:g}", summary[f"p{p:g}_{metric}_ms"]) for p in percentiles if p != 50]
    return "\n".join(lines)


def row(name: str, value: float) -> str:
    return f"{name:<44}{value:>14,d}" if isinstance(value, int) else f"{name:<44}{value:>14,.2f}"
