"""`wager bench serve | latency | throughput | steps`. Option and output names follow `vllm bench`."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from wager.errors import UsageError, WagerError
from wager.serve.bench import client, summary, workload

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Measure a server (serve) or the engine in this process (latency, throughput).",
)


class Dataset(StrEnum):
    random = "random"
    sharegpt = "sharegpt"
    custom = "custom"
    trace = "trace"


Model = Annotated[str, typer.Option(help="demo, a checkpoint directory, or a hub id.")]
DType = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
InputLen = Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)]
OutputLen = Annotated[int, typer.Option(help="Tokens generated for each prompt.", min=1)]
VocabSize = Annotated[int, typer.Option(help="Random prompts draw ids below this.")]
Seed = Annotated[int, typer.Option(help="Seed of prompts and arrivals.")]
OutputJson = Annotated[Path | None, typer.Option("--output-json", help="Write the numbers here.")]


@app.command()
def serve(
    base_url: Annotated[str, typer.Option(help="The server, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Served model name; default: the first that the server lists.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar=["WAGER_API_KEY", "OPENAI_API_KEY"], help="Bearer key of the server.")] = None,
    dataset_name: Annotated[Dataset, typer.Option(help="Where requests come from.")] = Dataset.random,
    dataset_path: Annotated[Path | None, typer.Option(help="File of a sharegpt, custom (JSON lines) or trace (CSV, JSON lines) dataset.")] = None,
    num_prompts: Annotated[int, typer.Option(help="How many requests; of a file, the first ones. 0: the whole file.", min=0)] = 200,
    random_input_len: InputLen = 128,
    random_output_len: OutputLen = 128,
    random_range_ratio: Annotated[float, typer.Option(help="Lengths vary uniformly by ± this share.")] = 0.0,
    random_prefix_len: Annotated[int, typer.Option(help="Leading tokens that all random prompts share.", min=0)] = 0,
    output_len: Annotated[int | None, typer.Option(help="Output tokens where the dataset does not say.", min=1)] = None,
    vocab_size: VocabSize = 4000,
    request_rate: Annotated[float, typer.Option(help="Requests per second; inf sends all at once. Traces bring their own times.")] = float("inf"),
    burstiness: Annotated[float, typer.Option(help="Shape of the gamma arrivals: 1 is Poisson, less is burstier.")] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(help="Most requests in flight.", min=1)] = None,
    trace_duration: Annotated[float | None, typer.Option(help="Use this many seconds of the trace.")] = None,
    trace_speed: Annotated[float, typer.Option(help="Replay a trace this many times faster.")] = 1.0,
    trace_length_scale: Annotated[float, typer.Option(help="Multiply a trace's token counts by this.")] = 1.0,
    max_total_tokens: Annotated[int | None, typer.Option(help="Cut a trace's prompts so that prompt + output fit.", min=2)] = None,
    goodput: Annotated[list[str] | None, typer.Option(help="Limit in ms, e.g. ttft:500; repeat for tpot and e2el.")] = None,
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles to report, e.g. 50,90,99.")] = "50,90,95,99",
    extra_body: Annotated[str, typer.Option(help="JSON object merged into every request.")] = "{}",
    save_result: Annotated[bool, typer.Option("--save-result", help="Write the JSON result.")] = False,
    save_detailed: Annotated[bool, typer.Option("--save-detailed", help="Add the per-request lists to the result.")] = False,
    result_filename: Annotated[Path | None, typer.Option(help="Where the result goes; default: named by rate, model and time.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw distributions and rates into this png or svg.")] = None,
    seed: Seed = 0,
) -> None:  # fmt: skip
    """Load an OpenAI-compatible server open-loop and report TTFT, TPOT, ITL, end-to-end latency and goodput."""
    limits = summary.parse_goodput(goodput or [])
    percentiles = parse_percentiles(metric_percentiles)
    rng = np.random.default_rng(seed)
    jobs = make_jobs(
        dataset_name,
        dataset_path,
        num_prompts,
        random=dict(
            input_tokens=random_input_len,
            output_tokens=random_output_len,
            range_ratio=random_range_ratio,
            prefix_tokens=random_prefix_len,
            vocab_size=vocab_size,
            rng=rng,
        ),
        trace=dict(
            duration_s=trace_duration,
            speed=trace_speed,
            length_scale=trace_length_scale,
            max_total_tokens=max_total_tokens,
            vocab_size=vocab_size,
            seed=seed,
        ),
        output_tokens=output_len,
    )
    jobs = workload.with_arrivals(jobs, request_rate, burstiness, rng)
    base_url = base_url.rstrip("/").removesuffix("/v1")
    name = model or asyncio.run(client.first_model(base_url, api_key))
    target = client.Target(base_url, name, api_key, parse_object(extra_body))
    results, duration_s = run_with_progress(target, jobs, max_concurrency)
    numbers = summary.summarize(results, duration_s, goodput_ms=limits, percentiles=percentiles)
    print(summary.report(numbers, limits, percentiles))
    if plot:
        from wager.serve.bench.plot import plot_run

        plot_run(results, duration_s, plot, f"{name}: {len(jobs)} requests in {duration_s:.0f} s", limits)
    if save_result or save_detailed or result_filename:
        settings = {
            "backend": "openai-chat" if jobs[0].is_chat else "openai",
            "model_id": name,
            "num_prompts": len(jobs),
            "request_rate": request_rate if np.isfinite(request_rate) else "inf",
            "burstiness": burstiness,
            "max_concurrency": max_concurrency,
        }
        save(result_filename, settings, numbers | (summary.details(results) if save_detailed else {}))
    failed = [r.error for r in results if not r.ok]
    if failed:
        raise WagerError(f"{len(failed)} of {len(results)} requests failed; the first said: {failed[0]}")


def make_jobs(
    dataset: Dataset, path: Path | None, count: int, *, random: dict, trace: dict, output_tokens: int | None
) -> list[workload.Job]:
    """The first `count` requests of a dataset (0: all of a file); `random` and `trace` are the settings of those two."""
    if dataset is Dataset.random:
        return workload.random_jobs(count or 1, **random)
    if path is None:
        raise UsageError(f"--dataset-name {dataset.value} needs --dataset-path")
    if dataset is Dataset.trace:
        jobs = workload.trace_jobs(workload.read_trace(path), **trace)
    elif dataset is Dataset.sharegpt:
        jobs = workload.sharegpt_jobs(path, output_tokens=output_tokens)
    else:
        jobs = workload.custom_jobs(path, output_tokens=output_tokens or 128)
    return jobs[:count] if count else jobs


def save(path: Path | None, settings: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Write the result of a load test; without a path, its name tells rate, model and time."""
    date = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = path or Path(f"openai-{settings['request_rate']}qps-{Path(settings['model_id']).name}-{date}.json")
    write_json(path, {"date": date, **settings, **numbers})
    print(f"written: {path}")


@app.command()
def latency(
    model: Model = "demo",
    dtype: DType = "auto",
    input_len: InputLen = 32,
    output_len: OutputLen = 128,
    batch_size: Annotated[int, typer.Option(help="Requests of the batch.", min=1)] = 8,
    num_iters: Annotated[int, typer.Option(help="Measured iterations.", min=1)] = 10,
    num_iters_warmup: Annotated[int, typer.Option(help="Iterations before them.", min=0)] = 2,
    vocab_size: VocabSize = 4000,
    seed: Seed = 0,
    output_json: OutputJson = None,
) -> None:
    """Time one batch from prompt to last token in this process."""
    from wager.serve.bench.offline import measure_latency

    jobs = random_batch(batch_size, input_len, output_len, vocab_size, seed)
    llm = load(model, dtype, max_num_seqs=batch_size)
    found = measure_latency(llm, jobs, iterations=num_iters, warmup=num_iters_warmup)
    print(f"Avg latency: {found['avg_latency']:.4f} seconds")
    for p, value in found["percentiles"].items():
        print(f"{p}% percentile latency: {value:.4f} seconds")
    if output_json:
        write_json(output_json, found)


@app.command()
def throughput(
    model: Model = "demo",
    dtype: DType = "auto",
    input_len: InputLen = 128,
    output_len: OutputLen = 128,
    num_prompts: Annotated[int, typer.Option(help="How many requests.", min=1)] = 64,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Requests that run at once; default: the engine's.", min=1)
    ] = None,
    vocab_size: VocabSize = 4000,
    seed: Seed = 0,
    output_json: OutputJson = None,
) -> None:
    """Complete many requests at once in this process and report tokens per second."""
    from wager.serve.bench.offline import measure_throughput

    jobs = random_batch(num_prompts, input_len, output_len, vocab_size, seed)
    found = measure_throughput(load(model, dtype, max_num_seqs=max_num_seqs), jobs)
    print(
        f"Throughput: {found['requests_per_second']:.2f} requests/s, {found['tokens_per_second']:.2f} total tokens/s, "
        f"{found['output_tokens_per_second']:.2f} output tokens/s"
    )
    if output_json:
        write_json(output_json, found)


@app.command()
def steps(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="A step log: what `wager serve --step-log LOG` wrote.")],
    holdout: Annotated[
        float,
        typer.Option(help="Share of the steps, the latest ones, that the error is measured on.", min=0.05, max=0.9),
    ] = 0.2,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the fitted cost here, as JSON.")] = None,
) -> None:
    """Fit what a step costs to a server's step log, and say how well that predicts steps it has not seen."""
    from wager.serve.step_cost import HINGES, fit, read_step_log

    records = read_step_log(log)
    cost = fit(records, holdout)
    names = ["a step", "a token", *(f"a token beyond {hinge}" for hinge in HINGES), "a cached token", "a request"]
    for name, ms in zip(names, cost.coefficients, strict=True):
        print(f"{name + ':':<22} {ms:.4g} ms")
    print(
        f"error on the last {holdout:.0%} of {len(records)} steps: {cost.median_error:.1%} median, {cost.p90_error:.1%} P90"
    )
    if output is not None:
        cost.save(output)
        print(f"wrote {output}")


def run_with_progress(target: client.Target, jobs: list[workload.Job], max_concurrency: int | None):
    """Run the jobs behind a progress bar on stderr; the bar shows only on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("requests", total=len(jobs))
        return asyncio.run(
            client.run(target, jobs, max_concurrency=max_concurrency, on_done=lambda _: progress.advance(task))
        )


def random_batch(count: int, input_len: int, output_len: int, vocab_size: int, seed: int) -> list[workload.Job]:
    rng = np.random.default_rng(seed)
    return workload.random_jobs(count, input_tokens=input_len, output_tokens=output_len, vocab_size=vocab_size, rng=rng)


def load(model: str, dtype: str, **options: Any):
    """The engine, without its tokenizer: only token ids go in and out."""
    from wager.serve.llm import LLM

    return LLM(model, dtype=dtype, skip_tokenizer_init=True, **options)


def parse_percentiles(text: str) -> list[float]:
    try:
        values = [float(p) for p in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= p <= 100 for p in values):
        raise UsageError(f"--metric-percentiles {text!r} must be numbers from 0 to 100 separated by commas")
    return values


def parse_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"--extra-body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError("--extra-body must be a JSON object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Written beside its place and renamed, so that no half file remains."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
