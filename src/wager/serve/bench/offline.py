"""Measure the engine in this process, without HTTP: the latency of one batch, the throughput of many requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wager.serve.bench.workload import Job
from wager.serve.params import SamplingParams

if TYPE_CHECKING:
    from wager.serve.llm import LLM


def fixed_length(max_tokens: int) -> SamplingParams:
    """Greedy, exactly `max_tokens` tokens, no text."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def measure_latency(
    llm: LLM, jobs: Sequence[Job], *, iterations: int, warmup: int, on_iteration: Callable[[float], None] | None = None
) -> dict[str, Any]:
    """Time from submitting one batch to its last token, several times. Keys as in `vllm bench latency`: seconds."""
    latencies = []
    for i in range(warmup + iterations):
        start = time.perf_counter()
        generate(llm, jobs)
        elapsed = time.perf_counter() - start
        if i >= warmup:
            latencies.append(elapsed)
            if on_iteration:
                on_iteration(elapsed)
    return {
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": {str(p): float(np.percentile(latencies, p)) for p in (10, 25, 50, 75, 90, 99)},
    }


def measure_throughput(llm: LLM, jobs: Sequence[Job]) -> dict[str, Any]:
    """All jobs at once after one warm-up request. Keys as in `vllm bench throughput`, plus output_tokens_per_second."""
    generate(llm, [Job(jobs[0].prompt, min(8, jobs[0].max_tokens))])
    start = time.perf_counter()
    outputs = generate(llm, jobs)
    elapsed = time.perf_counter() - start
    generated = sum(len(o.outputs[0].token_ids) for o in outputs)
    total = generated + sum(len(o.prompt_token_ids) for o in outputs)
    return {
        "elapsed_time": elapsed,
        "num_requests": len(jobs),
        "total_num_tokens": total,
        "requests_per_second": len(jobs) / elapsed,
        "tokens_per_second": total / elapsed,
        "output_tokens_per_second": generated / elapsed,
    }


def generate(llm: LLM, jobs: Sequence[Job]):
    """One call for all jobs; prompts are text or token ids."""
    prompts = [job.prompt if isinstance(job.prompt, str) else list(job.prompt) for job in jobs]
    return llm.generate(prompts, [fixed_length(job.max_tokens) for job in jobs])  # type: ignore[arg-type]
