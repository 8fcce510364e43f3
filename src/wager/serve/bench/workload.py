"""What a load test sends and when: prompts, output lengths and arrival times.

Prompts are token ids unless the data hold text: every engine accepts ids on /v1/completions, and their number is exact. Traces record
lengths only; their prompts are made of random ids, and blocks that a trace marks as shared get the same ids, so a prefix cache sees the
trace's real reuse.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from wager.errors import UsageError

FIRST_PLAIN_TOKEN = 100  # lower ids are special tokens in many vocabularies
BLOCK_TOKENS = 512  # tokens of one block of a Mooncake trace
CHARACTERS_PER_TOKEN = 4.0  # rough length of a token, only for answers whose text is never sent


@dataclass(frozen=True)
class Job:
    """One request to send. `prompt` is text, token ids or chat messages; `arrival_s` counts from the start, None leaves it to the rate."""

    prompt: str | tuple[int, ...] | tuple[dict, ...]
    max_tokens: int
    arrival_s: float | None = None

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, tuple) and bool(self.prompt) and isinstance(self.prompt[0], dict)


def random_jobs(
    count: int,
    *,
    input_tokens: int,
    output_tokens: int,
    vocab_size: int,
    rng: np.random.Generator,
    range_ratio: float = 0.0,
    prefix_tokens: int = 0,
) -> list[Job]:
    """Random token ids. Lengths are uniform within ±range_ratio; all prompts share `prefix_tokens` leading ids."""
    if not 0 <= range_ratio < 1:
        raise UsageError(f"--random-range-ratio must lie in [0, 1), got {range_ratio}")
    prefix = random_ids(prefix_tokens, vocab_size, rng)

    def length(mean: int) -> int:
        spread = int(mean * range_ratio)
        return max(1, int(rng.integers(mean - spread, mean + spread + 1)))

    return [
        Job(prefix + random_ids(length(input_tokens), vocab_size, rng), length(output_tokens)) for _ in range(count)
    ]


def random_ids(count: int, vocab_size: int, rng: np.random.Generator) -> tuple[int, ...]:
    if vocab_size <= FIRST_PLAIN_TOKEN:
        raise UsageError(f"--vocab-size must exceed {FIRST_PLAIN_TOKEN}, got {vocab_size}")
    return tuple(int(t) for t in rng.integers(FIRST_PLAIN_TOKEN, vocab_size, count))


def custom_jobs(path: Path, *, output_tokens: int) -> list[Job]:
    """JSON lines with `prompt` (text or token ids) or `messages`, and optionally `max_tokens` and `arrival_s`."""
    jobs = []
    for number, row in enumerate(read_json_rows(path), 1):
        prompt = row.get("messages") or row.get("prompt")
        if not prompt or not isinstance(prompt, str | list):
            raise UsageError(f"{path}, record {number}: needs `prompt` (text or token ids) or `messages`")
        arrival = row.get("arrival_s")
        jobs.append(
            Job(
                tuple(prompt) if isinstance(prompt, list) else prompt,
                int(row.get("max_tokens") or row.get("output_tokens") or output_tokens),
                None if arrival is None else float(arrival),
            )
        )
    return jobs


def sharegpt_jobs(path: Path, *, output_tokens: int | None) -> list[Job]:
    """ShareGPT conversations: the first human turn is the prompt; `output_tokens` None estimates the length of the recorded answer."""
    jobs = []
    for row in read_json_rows(path):
        turns = row.get("conversations") or row.get("conversation") or []
        if len(turns) < 2:
            continue
        question, answer = turns[0].get("value", ""), turns[1].get("value", "")
        if question and answer:
            jobs.append(Job(question, output_tokens or max(1, round(len(answer) / CHARACTERS_PER_TOKEN))))
    if not jobs:
        raise UsageError(f"{path} holds no conversation of two turns (`conversations`: [{{from, value}}, ...])")
    return jobs


@dataclass(frozen=True)
class TraceRow:
    """One request of a trace. `blocks`: ids of its leading prompt blocks; equal ids are equal content."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read_trace(path: Path) -> list[TraceRow]:
    """A CSV (Azure) or JSON-lines (Mooncake) trace, by arrival. Knows the published column names and plain ones.

    Raises UsageError naming the columns that were expected.
    """
    rows: Sequence[dict]
    if path.suffix == ".csv":
        with open_text(path) as file:
            rows = list(csv.DictReader(file))
    else:
        rows = read_json_rows(path)
    try:
        trace = [trace_row(row) for row in rows]
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path} is not a trace this reads ({error!r}): needs arrival_s | arrival_ms | timestamp (ms) | TIMESTAMP, input_tokens | "
            "context_tokens | ContextTokens | input_length and output_tokens | generated_tokens | GeneratedTokens | output_length"
        ) from None
    if not trace:
        raise UsageError(f"{path} is empty")
    first_s = min(row.arrival_s for row in trace)
    return sorted((replace(row, arrival_s=row.arrival_s - first_s) for row in trace), key=lambda row: row.arrival_s)


def trace_row(row: Mapping[str, Any]) -> TraceRow:
    if "arrival_s" in row:
        arrival_s = float(row["arrival_s"])
    elif "TIMESTAMP" in row:
        arrival_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
    else:
        arrival_s = float(first_of(row, "arrival_ms", "timestamp")) / 1e3
    return TraceRow(
        arrival_s,
        int(first_of(row, "input_tokens", "context_tokens", "ContextTokens", "input_length")),
        int(first_of(row, "output_tokens", "generated_tokens", "GeneratedTokens", "output_length")),
        tuple(row.get("block_ids") or row.get("hash_ids") or ()),
    )


def first_of(row: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of the names that is there. Raises KeyError with the first name."""
    for name in names:
        if name in row:
            return row[name]
    raise KeyError(names[0])


def trace_jobs(
    trace: Sequence[TraceRow],
    *,
    vocab_size: int,
    seed: int,
    duration_s: float | None = None,
    speed: float = 1.0,
    length_scale: float = 1.0,
    max_total_tokens: int | None = None,
) -> list[Job]:
    """Turn a trace into requests.

    The first `duration_s` seconds of the trace are used, arrivals are divided by `speed`, lengths multiplied by `length_scale` (at least 1
    token each) and cut, prompt first, so that prompt + output stay within `max_total_tokens`.
    """
    if speed <= 0 or length_scale <= 0:
        raise UsageError(f"--speed and --length-scale must be positive, got {speed} and {length_scale}")
    jobs = []
    for i, row in enumerate(trace):
        if duration_s is not None and row.arrival_s >= duration_s:
            break
        outputs = max(1, round(row.output_tokens * length_scale))
        inputs = max(1, round(row.input_tokens * length_scale))
        if max_total_tokens is not None:
            outputs = min(outputs, max_total_tokens - 1)
            inputs = min(inputs, max_total_tokens - outputs)
        prompt = trace_prompt(row.blocks, i, inputs, max(1, round(BLOCK_TOKENS * length_scale)), vocab_size, seed)
        jobs.append(Job(prompt, outputs, row.arrival_s / speed))
    return jobs


def trace_prompt(
    blocks: Sequence[int], index: int, length: int, block_tokens: int, vocab_size: int, seed: int
) -> tuple[int, ...]:
    """Ids of a prompt: block b has the ids drawn from generator (seed, b); what no block covers is unique to request `index`."""
    ids: tuple[int, ...] = ()
    for block in blocks:
        if len(ids) >= length:
            break
        ids += random_ids(block_tokens, vocab_size, np.random.default_rng((seed, 0, block)))
    if len(ids) < length:
        ids += random_ids(length - len(ids), vocab_size, np.random.default_rng((seed, 1, index)))
    return ids[:length]


def with_arrivals(jobs: Sequence[Job], rate: float, burstiness: float, rng: np.random.Generator) -> list[Job]:
    """Open-loop arrivals for jobs without a time of their own.

    Gaps are gamma distributed with mean 1 / rate and shape `burstiness`: 1 is a Poisson process, less is burstier, more is steadier. An
    infinite rate sends everything at once.
    """
    if rate <= 0 or burstiness <= 0:
        raise UsageError(f"--request-rate and --burstiness must be positive, got {rate} and {burstiness}")
    if all(job.arrival_s is not None for job in jobs):
        return sorted(jobs, key=lambda job: job.arrival_s or 0.0)
    gaps = np.zeros(len(jobs)) if np.isinf(rate) else rng.gamma(burstiness, 1 / (rate * burstiness), len(jobs))
    gaps[:1] = 0.0
    return [replace(job, arrival_s=float(t)) for job, t in zip(jobs, np.cumsum(gaps), strict=True)]


def read_json_rows(path: Path) -> list[dict]:
    """A JSON list or JSON lines of objects. Raises UsageError naming the line."""
    with open_text(path) as file:
        text = file.read()
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is neither JSON nor JSON lines: {error}") from None


def open_text(path: Path):
    try:
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
