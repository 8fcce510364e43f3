"""The simulator against what it simulates: the real engine on this machine, Helix's published simulator figures, and the clock.

Engine: minutes of the Azure conversation trace (lengths scaled, prompt ids random) are served in real time by the real engine in this process,
at three loads (every 6th, 3rd and 2nd request). A step cost is fitted on the step log of the first minutes; the same scheduler under a virtual clock
then predicts the others, from arrivals and lengths alone, each step scattered as steps of its kind were around the fit: a quantile of gaps is
wider than that of mean steps. Predicted beside measured: time to first token, gap between tokens (means and 90th percentiles), output tokens/s. Bar:
within 10 %. Near saturation a machine that is some per cent slower in one minute than in another moves latencies by much more than that.
Needs a quiet machine: other work shows up as error.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cluster.helix_cases import published
from benchmarks.harness import Report, arguments, format_table, picture_path, say
from benchmarks.serve.llama_100m import ensure
from wager.cluster.helix.flow import solve_flow
from wager.cluster.helix.plan import MAX_PROMPT, simulate_placement
from wager.cluster.helix.profile import Load, typical_throughput
from wager.serve.build import Engine, build_engine
from wager.serve.cache.block_manager import BlockManager
from wager.serve.config import EngineConfig
from wager.serve.observe import StepRecord
from wager.serve.params import SamplingParams
from wager.serve.request import Request
from wager.serve.schedule.continuous import ContinuousScheduler
from wager.serve.step_cost import StepCost, fit
from wager.simulate.engine import run_engine
from wager.simulate.timeline import Record, Timeline
from wager.simulate.trace import Arrival, all_at_once, read_trace

MEASURES = ("first token, mean", "first token, P90", "between tokens, mean", "between tokens, P90", "output tokens/s")
PUBLISHED = 252.1  # decode tokens/s offline, 70B on 24 nodes, the artifact's own simulator; its online rates are not in the sheet


class Steps:
    """An observer that keeps the step records."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)

    def on_tokens(self, request: Request, num_new_tokens: int, now_s: float) -> None: ...

    def on_finished(self, request: Request) -> None: ...


def jobs(arrivals: list[Arrival], begin_s: float, seconds: float, every: int, shrink: int) -> list[Arrival]:
    """Every n-th request of a part of the trace, from time 0, with shorter lengths."""
    part = [a for a in arrivals if begin_s <= a.arrival_s < begin_s + seconds][::every]
    return [
        Arrival(a.arrival_s - begin_s, max(4, a.prompt_tokens // shrink), max(2, a.output_tokens // shrink))
        for a in part
    ]


def requests(part: list[Arrival], vocab: int, start_s: float, rng: np.random.Generator) -> list[Request]:
    return [
        Request(
            f"{i}", rng.integers(3, vocab, a.prompt_tokens).tolist(),
            SamplingParams(max_tokens=a.output_tokens, ignore_eos=True, temperature=0.0), start_s + a.arrival_s,
            a.prompt_tokens + a.output_tokens,
        )
        for i, a in enumerate(part)
    ]  # fmt: skip


def measure(engine: Engine, part: list[Arrival], rng: np.random.Generator) -> Timeline:
    """Serve in real time."""
    begun = time.monotonic()
    live = requests(part, engine.vocab_size, begun, rng)
    records = {
        r.id: Record(i, a.arrival_s, a.prompt_tokens, a.output_tokens)
        for i, (r, a) in enumerate(zip(live, part, strict=True))
    }
    coming = live[::-1]
    while coming or engine.core.has_work:
        now = time.monotonic()
        while coming and coming[-1].arrival_s <= now:
            engine.core.add(coming.pop())
        if not engine.core.has_work:
            time.sleep(max(0.0, coming[-1].arrival_s - time.monotonic()))
            continue
        for progress in engine.core.step():
            done = time.monotonic() - begun
            records[progress.request.id].token_s += [done] * len(progress.new_tokens)
    end = time.monotonic() - begun
    return Timeline(list(records.values()), end, {}, {}, {}, {}, 0.0, 0, 0)


@dataclass(frozen=True)
class Scattered:
    """A step's price with the scatter of the fitted steps: measured over predicted of steps that only decode, and of those with prompts."""

    cost: StepCost
    decode: np.ndarray
    mixed: np.ndarray
    rng: np.random.Generator

    def __call__(self, tokens: int, context_tokens: int, num_spans: int) -> float:
        ratios = self.mixed if tokens > num_spans else self.decode
        return self.cost.predict(tokens, context_tokens, num_spans) * float(self.rng.choice(ratios))


def scattered(cost: StepCost, records: list[StepRecord], rng: np.random.Generator) -> Scattered:
    ratios = np.array([r.step_ms / predicted(cost, r) for r in records])
    prompts = np.array([r.prefill_tokens > 0 for r in records])
    return Scattered(cost, ratios[~prompts], ratios[prompts], rng)


def predicted(cost: StepCost, record: StepRecord) -> float:
    return cost.predict(record.prefill_tokens + record.decode_tokens, record.context_tokens, record.num_spans)


def predict(
    engine: Engine, part: list[Arrival], price: Scattered, between_s: float, rng: np.random.Generator
) -> Timeline:
    """The engine's scheduler over a block manager of the same size, without a model."""
    blocks = engine.core.runner.blocks
    twin = BlockManager(blocks.groups, blocks.num_blocks, blocks.block_size, blocks.caching)
    scheduler = ContinuousScheduler(engine.core.scheduler.config, twin)
    return run_engine(scheduler, requests(part, engine.vocab_size, 0.0, rng), price, between_s)


def numbers(timeline: Timeline) -> dict[str, float]:
    first, between = timeline.first_token_latencies(), timeline.inter_token_latencies()
    values = (first.mean(), np.quantile(first, 0.9), between.mean(), np.quantile(between, 0.9))
    served = sum(len(r.token_s) for r in timeline.records)
    return dict(zip(MEASURES, (*map(float, values), served / timeline.end_s), strict=True))


def calibrated(records: list[StepRecord]) -> tuple[StepCost, float]:
    """The fitted cost, scaled so that it adds up to the measured time (a fit of relative errors lies below the mean of skewed times), and the
    median time between two steps when requests are running."""
    cost = fit(records, 0.1)
    scale = sum(r.step_ms for r in records) / sum(predicted(cost, r) for r in records)
    scaled = StepCost(tuple(scale * c for c in cost.coefficients), cost.median_error, cost.p90_error)
    gaps = [b.time_s - a.time_s - b.step_ms / 1e3 for a, b in zip(records, records[1:], strict=False) if a.running > 1]
    return scaled, max(0.0, float(np.median(gaps))) if gaps else 0.0


def validate(model: Path, data: Path, minute_s: float, held_out: dict[int, int], shrink: int) -> tuple[dict, list]:
    """held_out[n]: how many minutes of every n-th request are predicted; one more of each load comes before, to fit on."""
    torch.set_num_threads(1)
    steps = Steps()
    engine = build_engine(EngineConfig(model=str(model), enable_prefix_caching=False, seed=0), [steps])
    trace, rng = read_trace(data / "serving-traces" / "azure_llm_2023_conv.csv"), np.random.default_rng(0)
    measure(engine, jobs(trace, 0.0, minute_s / 4, min(held_out), shrink), rng)  # caches and compilers warm up
    steps.records.clear()
    begin_s = 60.0
    for every in held_out:
        measure(engine, jobs(trace, begin_s, minute_s, every, shrink), rng)
        say(f"fitting on every request of {every}: {len(steps.records)} steps so far")
        begin_s += 60.0
    fitted = list(steps.records)
    cost, between_s = calibrated(fitted)
    price = scattered(cost, fitted, np.random.default_rng(1))
    minutes, pictures = [], []
    for every, count in held_out.items():
        for _ in range(count):
            part = jobs(trace, begin_s, minute_s, every, shrink)
            steps.records.clear()
            expected, real = predict(engine, part, price, between_s, rng), measure(engine, part, rng)
            minutes.append(compared(part, expected, real, cost, steps.records) | {"every": every})
            pictures.append((expected, real))
            errors = minutes[-1]["error"]
            say(
                f"held-out minute, 1 of {every}: " + ", ".join(f"{name} {error:+.1%}" for name, error in errors.items())
            )
            begin_s += 60.0
    facts = {
        "step_cost": {"median_error": cost.median_error, "p90_error": cost.p90_error, "steps": len(fitted)},
        "minutes": minutes,
    }
    return facts, pictures


def compared(
    part: list[Arrival], expected: Timeline, real: Timeline, cost: StepCost, records: list[StepRecord]
) -> dict[str, Any]:
    """Predicted beside measured. busy: share of the time in steps; step_time: all steps as the cost says over all as they were, which is
    how much faster or slower than in the fitted minutes this machine was."""
    said, seen = numbers(expected), numbers(real)
    spent_ms = sum(r.step_ms for r in records)
    priced_ms = sum(predicted(cost, r) for r in records)
    return {
        "requests": len(part), "predicted": said, "measured": seen, "error": {n: said[n] / seen[n] - 1 for n in MEASURES},
        "busy": spent_ms / 1e3 / real.end_s, "step_time": priced_ms / spent_ms,
    }  # fmt: skip


def against_published(data: Path, seconds: float) -> dict:
    """The published 24-node placement on the conversation trace, beside the artifact's simulator; and how fast this simulator is."""
    case = published(data, "llama70b-single24")
    arrivals = read_trace(data / "serving-traces" / "azure_llm_2023_conv.csv", max_prompt=MAX_PROMPT)
    throughput = typical_throughput(case.card, case.profiles, case.cluster.counts)
    flow = solve_flow(case.cluster, case.card, throughput, case.placement, partial=case.partial)
    offline = all_at_once(arrivals)
    begun = time.perf_counter()
    timeline = simulate_placement(
        case.cluster, case.card, case.profiles, case.placement, flow, offline, seconds, Load()
    )
    wall = time.perf_counter() - begun
    rate = timeline.decode_tokens_per_s(60.0)
    return {
        "decode_tokens_per_s": rate, "published": PUBLISHED, "error": rate / PUBLISHED - 1,
        "simulated_hours_per_minute": seconds / 3600 / (wall / 60), "events": timeline.events,
    }  # fmt: skip


def draw(pictures: list[tuple[Timeline, Timeline]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, get, label in (
        (left, Timeline.first_token_latencies, "time to first token, s"),
        (right, Timeline.inter_token_latencies, "gap between tokens, s"),
    ):
        for i, name in ((1, "measured, real engine"), (0, "predicted, simulator")):
            values = np.sort(np.concatenate([get(pair[i]) for pair in pictures]))
            axes.plot(values, np.linspace(0, 1, len(values)), label=name)
        axes.set_xlabel(label)
        axes.set_ylabel("share of requests" if axes is left else "share of gaps")
        axes.legend()
    figure.suptitle("held-out minutes")
    figure.savefig(path)


def main() -> None:
    parser = arguments(__doc__ or "", repeats=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of the shared data sets")
    parser.add_argument("--model", type=Path, default=Path("~/.cache/wager/llama-100m").expanduser())
    args = parser.parse_args()
    quick = args.quick
    model = ensure(args.model.with_name(args.model.name + "-tiny") if quick else args.model, tiny=quick)
    facts, pictures = validate(model, args.data, *((10.0, {3: 1}) if quick else (60.0, {6: 1, 3: 1, 2: 1})), shrink=8)
    if not quick:
        draw(pictures, picture_path("cluster", "simulator"))
        Report("cluster", "simulator", [], facts=facts).save()  # minutes of real time: kept whatever comes next
    facts["helix"] = against_published(args.data, 120.0 if quick else 660.0)
    print(format_table([
        ["held-out minute", *MEASURES],
        *([f"{i + 1} ({m['busy']:.0%} busy), {what}", *(f"{m[what][name]:.4g}" if what != "error" else f"{m[what][name]:+.1%}" for name in MEASURES)]
          for i, m in enumerate(facts["minutes"]) for what in ("measured", "predicted", "error")),
    ]))  # fmt: skip
    f = facts["helix"]
    print(
        f"published placement, 24 nodes, 70B, offline: {f['decode_tokens_per_s']:.1f} decode tokens/s, published {f['published']} "
        f"({f['error']:+.1%}); {f['simulated_hours_per_minute']:.1f} simulated hours a minute"
    )
    if not quick:
        print(f"written: {Report('cluster', 'simulator', [], facts=facts).save()}")


if __name__ == "__main__":
    main()
