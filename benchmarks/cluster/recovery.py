"""Kills on the real engine: `python -m benchmarks.cluster.recovery [--quick] [--plot out.png]`.

Three stages of the demo model, each in a process with a context daemon beside it, serve a stream of requests while random ones of them are
killed (kill -9), told to leave (SIGTERM with a notice), or lose their machine (daemon and all). Every request must end with the tokens of
an undisturbed run, and each token must be streamed once; the run fails otherwise. The same kills hit the same engine without a context
daemon: weights from disk, every running request computed again, in a process forked from a warm template (what the daemon alone is worth)
and in a fresh one (what a supervisor that restarts an engine does). Reported: seconds from the kill until every request that was running
has its next token or has ended, and tokens computed again.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Report, Row, arguments
from wager.cluster.deploy.engine import deploy_engine, run_all, stage_layers
from wager.cluster.deploy.process import LocalLauncher
from wager.errors import WagerError
from wager.serve.config import EngineConfig
from wager.serve.llm import LLM
from wager.serve.params import OutputKind, SamplingParams

LAYERS, STAGES = 5, 3
KINDS = ("kill",) * 14 + ("notice",) * 4 + ("machine",) * 2


@dataclass
class Run:
    """What one run under fire showed. token_s: when each token reached the client."""

    streamed: list[list[int]]
    token_s: list[float]
    shots: list[tuple[float, str, int]]
    gaps_s: list[float]
    events: list[dict[str, Any]]
    computed_again: int
    generated: int
    seconds: float


def workload(requests: int, tokens: int, rng: np.random.Generator) -> tuple[list[list[int]], list[SamplingParams]]:
    """Half of the requests are greedy, half sampled with a seed of their own."""
    prompts = [rng.integers(4, 4000, int(rng.integers(20, 200))).tolist() for _ in range(requests)]
    params = [
        SamplingParams(
            temperature=0.0 if i % 2 else 0.9, seed=i, max_tokens=tokens, ignore_eos=True, output_kind=OutputKind.DELTA
        )
        for i in range(requests)
    ]
    return prompts, params


def under_fire(
    options: dict, prompts: list, params: list, kinds: list[str], seed: int, forget: bool = False, warm: bool = True
) -> Run:
    """Serve everything; shoot at random tokens of the stream."""
    rng = np.random.default_rng(seed)
    launcher = LocalLauncher(warm)
    engine, replica = deploy_engine(
        EngineConfig(model="demo", **options), stage_layers(LAYERS, STAGES), launcher, forget=forget
    )
    replica.notice_s = 1.0
    total = sum(p.max_tokens or 0 for p in params)
    run_all(engine, prompts[:2], [replace(p, max_tokens=8) for p in params[:2]])
    generated = engine.core.generation_tokens_total
    due = sorted(rng.choice(np.arange(20, int(total * 0.9)), len(kinds), replace=False).tolist())
    out = Run([[] for _ in prompts], [], [], [], [], 0, 0, 0.0)
    stopped: dict[str, Any] = {}
    runner: Any = engine.core.runner  # counts its steps

    def client(output: Any) -> None:
        now = time.perf_counter()
        out.streamed[int(output.request_id.removeprefix("run-"))] += output.outputs[0].token_ids
        out.token_s += [now - begun] * len(output.outputs[0].token_ids)
        if stopped and runner.step > stopped["step"]:
            stopped["waiting"] = {i for i in stopped["waiting"] if i in engine.core.requests} - {output.request_id}
            if not stopped["waiting"]:
                out.gaps_s.append(now - stopped["at"])
                stopped.clear()
        if due and len(out.token_s) >= due[0] and not stopped:
            due.pop(0)
            kind, stage = kinds[len(out.shots)], int(rng.integers(STAGES))
            shoot(kind, replica.places[stage])
            out.shots.append((now - begun, kind, stage))
            if kind == "kill":
                running = {r.id for r in engine.core.scheduler.running}
                stopped.update(at=now, step=runner.step, waiting=running)

    begun = time.perf_counter()
    run_all(engine, prompts, params, client)
    out.seconds = time.perf_counter() - begun
    out.events = [asdict(e) for e in replica.events]
    out.computed_again = engine.core.tokens_computed_again  # type: ignore[attr-defined]
    out.generated = engine.core.generation_tokens_total - generated
    engine.core.runner.blocks.check_invariants()
    replica.close()
    launcher.close()
    return out


def shoot(kind: str, place: Any) -> None:
    if kind == "notice":
        os.kill(place.worker.pid, signal.SIGTERM)
        return
    hosts = (place.worker,) if kind == "kill" else (place.daemon, place.worker)
    for host in hosts:
        os.kill(host.pid, signal.SIGKILL)
        host.call("pid").exception()  # returns when it is gone


def check(name: str, run: Run, expected: list[list[int]], shots: int) -> None:
    """The claim; raises WagerError when it does not hold."""
    wrong = [i for i, (a, b) in enumerate(zip(run.streamed, expected, strict=True)) if a != b]
    if wrong:
        raise WagerError(f"{name}: requests {wrong} did not stream the tokens of the undisturbed run")
    if run.generated != sum(map(len, expected)):
        raise WagerError(
            f"{name}: {run.generated} tokens were generated for {sum(map(len, expected))} that were wanted"
        )
    if len(run.shots) != shots:
        raise WagerError(f"{name}: only {len(run.shots)} of {shots} shots were fired")


def plot(run: Run, cold: Run, path: Path) -> None:
    """Tokens at the client over time, with every shot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(9, 5.4), sharex=False)
    for axis, one, title in zip(
        axes,
        (run, cold),
        (
            "context daemon: state outlives the process",
            "restart in a fresh process: weights from disk, requests computed again",
        ),
        strict=True,
    ):
        axis.plot(one.token_s, np.arange(1, len(one.token_s) + 1), lw=1.6, color="#1f5fa8")
        seen = set()
        for at, kind, _ in one.shots:
            colour = {"kill": "#c0392b", "notice": "#e69f00", "machine": "#6c3483"}[kind]
            label = {"kill": "kill -9", "notice": "SIGTERM with notice", "machine": "machine lost"}[kind]
            axis.axvline(at, color=colour, lw=0.9, ls="--", label=None if label in seen else label)
            seen.add(label)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_ylabel("tokens at the client")
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    axes[1].set_xlabel("seconds")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = arguments(__doc__ or "", repeats=False)
    parser.add_argument("--plot", type=Path, default=None, help="timeline of tokens and kills")
    args = parser.parse_args()
    quick = args.quick
    requests, tokens = (12, 60) if quick else (32, 120)
    kinds = list(("kill", "notice", "machine", "kill") if quick else KINDS)
    rng = np.random.default_rng(7)
    rng.shuffle(kinds)
    prompts, params = workload(requests, tokens, rng)
    options: dict[str, Any] = dict(
        max_num_seqs=16, max_model_len=512, skip_tokenizer_init=True, kv_cache_memory=64_000_000
    )
    finals = [replace(p, output_kind=OutputKind.FINAL_ONLY) for p in params]
    expected = [o.outputs[0].token_ids for o in LLM("demo", **options).generate(prompts, finals)]
    ours = under_fire(options, prompts, params, kinds, 1)
    check("context daemon", ours, expected, len(kinds))
    plain = ["kill"] * (2 if quick else 14)
    warm = under_fire(options, prompts, params, plain, 1, forget=True)
    check("restart in a warm process", warm, expected, len(plain))
    few = plain[: 2 if quick else 5]
    cold = under_fire(options, prompts, params, few, 1, forget=True, warm=False)
    check("restart in a fresh process", cold, expected, len(few))
    recovery = lambda run, kind: [e["seconds"] for e in run.events if e["kind"] == kind]
    what = "kill -9 until every request goes on"
    rows = [
        row(what, "restart, fresh process", cold.gaps_s, ours.gaps_s),
        row(what, "restart, warm process", warm.gaps_s, ours.gaps_s),
    ]
    facts = {
        "requests": requests, "tokens_each": tokens, "stages": STAGES, "shots": {k: kinds.count(k) for k in sorted(set(kinds))},
        "identical": True, "generated_twice": 0, "events": sorted((e["kind"], round(e["seconds"], 3)) for e in ours.events),
        "tokens_computed_again": ours.computed_again, "restart_tokens_computed_again": warm.computed_again,
        "pipeline_back_s": recovery(ours, "kill"), "migrations_s": recovery(ours, "migrate"),
        "migrated_bytes": [e["moved_bytes"] for e in ours.events if e["kind"] == "migrate"], "lost_machines_s": recovery(ours, "lost"),
        "seconds": ours.seconds, "restart_seconds": warm.seconds,
    }  # fmt: skip
    report = Report("cluster", "recovery", rows, facts)
    print(report.table())
    for key, value in facts.items():
        print(f"{key}: {value}")
    if args.plot:
        plot(ours, cold, args.plot)
    if not quick:
        print(report.save())


def row(workload: str, name: str, baseline: list[float], ours: list[float]) -> Row:
    """Failures are drawn at random, not in rounds: the interval resamples both sides, the noise compares halves of the baseline."""
    rng = np.random.default_rng(0)
    draw = lambda values: np.median(rng.choice(values, (2000, len(values))), axis=1)
    low, high = np.quantile(draw(baseline) / draw(ours), [0.025, 0.975])
    halves = statistics.median(baseline[::2]) / statistics.median(baseline[1::2] or baseline)
    a, b = statistics.median(baseline), statistics.median(ours)
    return Row(
        workload, name, "context daemon", "s", a, b, a / b, float(low), float(high), abs(halves - 1), len(ours),
        {name: baseline, "context daemon": ours},
    )  # fmt: skip


if __name__ == "__main__":
    main()
