"""Does the server keep its head under load? Many streams, many disconnects, a long soak; no answer mixed up, no block lost, RSS flat.

    python -m benchmarks.serve.soak [--minutes 10] [--streams 200] [--disconnects 500] [--quick]

Every prompt's greedy answer is first taken alone. Then `streams` clients stream at once, `disconnects` clients leave in the middle, and for
`minutes` a fixed number of clients keeps asking while some leave. Each answer that was read to its end must be the one the same prompt
got alone. Afterwards the server must be idle with every KV block free, and its memory must not have grown over the second half.
Fails (exit 1) when one of these does not hold. Use `--dtype float32`: in bfloat16 the batch's shape may flip a near-tie in any engine.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.harness import RESULTS, Report, arguments, picture_path, say
from benchmarks.serve.server import Server

MAX_RSS_GROWTH = 0.03  # over the second half of the soak
DRAIN_LIMIT_S = 60.0
SAMPLE_S = 2.0


@dataclass
class Tally:
    """What the clients saw."""

    finished: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """A prompt (token ids), how many tokens to answer, and the answer it got alone."""

    prompt: tuple[int, ...]
    max_tokens: int
    answer: str = ""


def main() -> None:
    parser = arguments("Load, disconnects and a soak against `wager serve`.", repeats=False)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--disconnects", type=int, default=500)
    parser.add_argument("--clients", type=int, default=32, help="clients of the soak")
    parser.add_argument("--vocab-size", type=int, default=4000)
    args = parser.parse_args()
    if args.quick:
        args.minutes, args.streams, args.disconnects, args.clients = 0.2, 16, 20, 8
    log = RESULTS / "serve" / "soak.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with Server(args.model, ["--dtype", args.dtype], log=log) as server:
        facts = asyncio.run(soak(server, args))
    log.unlink()
    print(json.dumps({k: v for k, v in facts.items() if k != "rss_series"}, indent=1))
    if not args.quick:
        report = Report("serve", "soak", [], facts=facts)
        print(f"written: {report.save()}")
        plot(facts["rss_series"], picture_path("serve", "soak"))
    problems = verdict(facts)
    for problem in problems:
        say(f"FAILED: {problem}")
    sys.exit(1 if problems else 0)


async def soak(server: Server, args: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=600) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        say("answers alone")
        questions = [
            await alone(client, model, q) for q in make_questions(rng, 24 if args.quick else 64, args.vocab_size)
        ]
        total, load, leavers = Tally(), Tally(), Tally()
        say(f"{args.streams} concurrent streams")
        await asyncio.gather(*(ask(client, model, pick(rng, questions), load) for _ in range(args.streams)))
        say(f"{args.disconnects} disconnects")
        leave_after = rng.integers(0, 12, args.disconnects)
        await gather_limited(
            [ask(client, model, pick(rng, questions), leavers, int(n)) for n in leave_after], args.streams
        )
        say(f"soak of {args.minutes} minutes")
        series = await sustained(server, client, model, questions, total, args, rng)
        drained_s = await drain(server)
        after = await asyncio.to_thread(server.metrics)
        questions_again = Tally()
        for question in questions[:8]:
            await ask(client, model, question, questions_again)
    rss = [rss for _, rss in series]
    half = rss[len(rss) // 2 :]
    tenth = max(1, len(half) // 5)
    return {
        "model": args.model,
        "dtype": args.dtype,
        "streams": vars(load),
        "disconnects": vars(leavers),
        "soak": vars(total) | {"minutes": args.minutes, "clients": args.clients},
        "afterwards": vars(questions_again),
        "drained_s": drained_s,
        "running_after": after.get("num_requests_running"),
        "waiting_after": after.get("num_requests_waiting"),
        "kv_usage_after": after.get("kv_cache_usage_perc"),
        "rss_growth_second_half": float(np.median(half[-tenth:]) / np.median(half[:tenth]) - 1),
        "rss_first_bytes": rss[0],
        "rss_last_bytes": rss[-1],
        "rss_series": series,
    }


def make_questions(rng: np.random.Generator, count: int, vocab_size: int) -> list[Question]:
    """Distinct random prompts of 4 to 60 tokens, answers of 8 to 48; a third share a prefix, so that blocks are shared too."""
    prefix = tuple(int(t) for t in rng.integers(100, vocab_size, 40))
    questions = []
    for i in range(count):
        own = tuple(int(t) for t in rng.integers(100, vocab_size, int(rng.integers(4, 60))))
        questions.append(Question((prefix if i % 3 == 0 else ()) + own, int(rng.integers(8, 48))))
    return questions


def pick(rng: np.random.Generator, questions: Sequence[Question]) -> Question:
    return questions[int(rng.integers(len(questions)))]


def body(model: str, question: Question, stream: bool) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(question.prompt),
        "max_tokens": question.max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": stream,
    }


async def alone(client: httpx.AsyncClient, model: str, question: Question) -> Question:
    response = await client.post("/v1/completions", json=body(model, question, stream=False))
    response.raise_for_status()
    return Question(question.prompt, question.max_tokens, response.json()["choices"][0]["text"])


async def ask(
    client: httpx.AsyncClient, model: str, question: Question, tally: Tally, leave_after: int | None = None
) -> None:
    """Stream one answer and compare it; with `leave_after`, close the connection after so many chunks."""
    text, chunks = "", 0
    try:
        async with client.stream("POST", "/v1/completions", json=body(model, question, stream=True)) as response:
            if response.status_code != 200:
                tally.errors.append(f"HTTP {response.status_code}")
                return
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                if leave_after is not None and chunks >= leave_after:
                    tally.left += 1
                    return
                chunks += 1
                chunk = json.loads(line[5:])
                if "error" in chunk:
                    tally.errors.append(str(chunk["error"]))
                    return
                text += "".join(choice.get("text") or "" for choice in chunk["choices"])
    except httpx.HTTPError as error:
        tally.errors.append(f"{type(error).__name__}: {error}")
        return
    tally.finished += 1
    if text != question.answer:
        tally.wrong.append(f"prompt {question.prompt[:4]}...: got {text!r}, alone {question.answer!r}")


async def gather_limited(coroutines: Sequence[Any], limit: int) -> None:
    gate = asyncio.Semaphore(limit)

    async def one(coroutine: Any) -> None:
        async with gate:
            await coroutine

    await asyncio.gather(*(one(c) for c in coroutines))


async def sustained(
    server: Server, client: httpx.AsyncClient, model: str, questions: list[Question], tally: Tally, args: Any, rng: np.random.Generator
) -> list[tuple[float, int]]:  # fmt: skip
    """Keep `clients` busy, one in five leaving early; (seconds, RSS in bytes) every SAMPLE_S."""
    begin = time.monotonic()
    end = begin + 60 * args.minutes
    series: list[tuple[float, int]] = []

    async def loop() -> None:
        while time.monotonic() < end:
            leave = int(rng.integers(0, 12)) if rng.random() < 0.2 else None
            await ask(client, model, pick(rng, questions), tally, leave)
            if tally.errors:
                await asyncio.sleep(0.05)  # a failing server must not turn the clients into a busy loop

    async def watch() -> None:
        while time.monotonic() < end:
            series.append((round(time.monotonic() - begin, 1), await asyncio.to_thread(server.rss_bytes)))
            await asyncio.sleep(SAMPLE_S)

    await asyncio.gather(watch(), *(loop() for _ in range(args.clients)))
    return series


async def drain(server: Server) -> float:
    """Seconds until the server reports nothing running, nothing waiting and no block held."""
    begin = time.monotonic()
    while time.monotonic() - begin < DRAIN_LIMIT_S:
        now = await asyncio.to_thread(server.metrics)
        if not any(now[name] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")):
            break
        await asyncio.sleep(0.2)
    return round(time.monotonic() - begin, 2)


def verdict(facts: dict[str, Any]) -> list[str]:
    """What did not hold, in words."""
    problems = []
    for phase in ("streams", "disconnects", "soak", "afterwards"):
        if facts[phase]["wrong"]:
            problems.append(f"{phase}: {len(facts[phase]['wrong'])} answers differ; {facts[phase]['wrong'][0]}")
        if facts[phase]["errors"]:
            problems.append(f"{phase}: {len(facts[phase]['errors'])} errors; {facts[phase]['errors'][0]}")
    for name in ("running_after", "waiting_after", "kv_usage_after"):
        if facts[name] != 0:
            problems.append(f"{name} is {facts[name]}, not 0")
    if facts["rss_growth_second_half"] > MAX_RSS_GROWTH:
        problems.append(f"memory grew by {facts['rss_growth_second_half']:.1%} in the second half")
    return problems


def plot(series: Sequence[tuple[float, int]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([t / 60 for t, _ in series], [rss / 2**20 for _, rss in series], color="#2563eb")
    axes.set(
        xlabel="minutes", ylabel="resident memory (MiB)", ylim=(0, None), title="Memory of the server during the soak"
    )
    axes.grid(alpha=0.25)
    figure.savefig(path)


if __name__ == "__main__":
    main()
