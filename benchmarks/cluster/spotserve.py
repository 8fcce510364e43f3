"""SpotServe against restarting and rerouting on the published spot traces, in simulation, with the cost of the machines.

Three published models at their published rates, every segment of the traces, and the published request files. Those are called cv6 but their gaps
vary by a few per cent only, so that the real segments are also played with Gamma arrivals whose coefficient of variation is 6, as the paper
says (pooled over seeds).

Baselines as published serve whole batches: `restart` has the published controller, `reroute` the fixed shape that it chooses for the first
machines; beside it the shape that does best in hindsight, of that and the smallest published one, with batches of either size. We serve continuously, so two comparisons stand side by side: with the baselines as published, and with
the policy alone (`restart, continuous` and `reroute, continuous` beside ours; ours in whole batches beside the published ones). Rerouting that serves
continuously keeps the best shape in hindsight too. The floor is a fleet
as large as the trace's largest that nobody disturbs, under our policy: a baseline over the floor bounds the ratio that can be hoped for. Closer is
the trace itself with moves that take no time (`free moves`): what is left over it is what moving costs. On-demand
machines are billed as such: in `_ondemand` segments those that join later and are never taken away. Deterministic: every number is exact for its
trace.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.harness import Report, arguments, format_table, picture_path, say
from wager.cluster.spotserve.latency import Layout, read_model
from wager.cluster.spotserve.simulate import Cloud, Outcome, Skills, SpotSimulation
from wager.hardware.availability import Availability, Membership, read_membership
from wager.simulate.trace import Arrival, read_trace

MODELS = {"OPT-6.7B": ("6.7B", 1.5), "GPT-20B": ("h6144", 0.35), "LLaMA-30B": ("h7168", 0.2)}
SMALLEST = {
    "OPT-6.7B": (1, 4),
    "GPT-20B": (3, 4),
    "LLaMA-30B": (2, 8),
}  # stages and shards on the fewest devices, as published
SEGMENTS = tuple(f"trace_{day}{kind}" for day in ("0203", "0304") for kind in ("_real", "", "_tight", "_ondemand"))
BURSTY = ("trace_0203_real", "trace_0304_real")
ABLATIONS = {
    "nothing ahead": ({"background_share": 0.0}, Skills()),
    "layouts not played": ({}, Skills(look_ahead=False)),
    "no notice": ({"notice_s": 0.0}, Skills()),
    "layout never follows the load": ({"overload_factor": 0.0}, Skills()),
}
OUTPUT_TOKENS, LARGEST_BATCH = 128, 8
OURS, RESTART, REROUTE, FLOOR, FREE = "spotserve", "restart", "reroute", "floor", "free moves"
NO_TIME = {"network_bytes_per_s": 1e18, "local_bytes_per_s": 1e18, "storage_bytes_per_s": 1e18, "regroup_s": 0.0}
OURS_BATCHES, RESTART_JOINED, REROUTE_JOINED, REROUTE_BEST = (
    "spotserve, batches",
    "restart, continuous",
    "reroute, continuous",
    "reroute, best shape",
)


def undisturbed(trace: Availability) -> Availability:
    most = max(len(trace.alive(e.time_s)) for e in trace.events)
    return Availability(tuple(Membership(0.0, f"n{i}", True) for i in range(most)), trace.end_s)


def published_arrivals(data: Path, rate: float, end_s: float) -> list[Arrival]:
    path = data / "spot-traces" / f"requests-gamma-rate{rate}_cv6.csv"
    return [a for a in read_trace(path, OUTPUT_TOKENS) if a.arrival_s < end_s]


def bursty_arrivals(rate: float, end_s: float, seed: int, variation: float = 6.0) -> list[Arrival]:
    """Gamma gaps."""
    shape = 1 / variation**2
    times = np.cumsum(np.random.default_rng(seed).gamma(shape, 1 / (rate * shape), int(4 * rate * end_s) + 1000))
    return [Arrival(float(t), 512, OUTPUT_TOKENS) for t in times if t < end_s]


def case(data: Path, name: str, segment: str, seed: int | None, ablate: bool) -> dict:
    """All policies on one trace. seed: of bursty arrivals; None takes the published ones."""
    short, rate = MODELS[name]
    model = read_model(data / "gpu-serving-profiles", f"T4-4x/megatron_{short}_profile")
    trace = read_membership(data / "spot-traces" / "spotserve-segments.csv", segment)
    arrivals = published_arrivals(data, rate, trace.end_s) if seed is None else bursty_arrivals(rate, trace.end_s, seed)
    cloud = Cloud(expected_rate=rate)

    def run(policy: str, machines: Availability = trace, **how) -> Outcome:
        return SpotSimulation(model, machines, arrivals, policy, how.pop("cloud", cloud), **how).run()

    outcomes = {OURS: run("spotserve"), OURS_BATCHES: run("spotserve", continuous=False)}
    outcomes |= {RESTART: run("reparallelize", continuous=False), REROUTE: run("reroute", continuous=False)}
    outcomes[FLOOR] = run("spotserve", undisturbed(trace))
    outcomes[FREE] = run("spotserve", cloud=dataclasses.replace(cloud, **NO_TIME))
    first = outcomes[REROUTE].layouts[0][1]
    assert first is not None
    outcomes[RESTART_JOINED] = run("reparallelize")
    shapes = dict.fromkeys(
        (*(dataclasses.replace(first, batch=b) for b in (first.batch, LARGEST_BATCH)),
         *(Layout(1, *SMALLEST[name], b) for b in (4, LARGEST_BATCH)))
    )  # fmt: skip

    def hindsight(continuous: bool) -> Outcome:
        runs = [run("reroute", continuous=continuous, shape=shape) for shape in shapes]
        return min([*runs, run("reroute", continuous=continuous)], key=lambda o: o.quantile(0.99))

    outcomes |= {REROUTE_JOINED: hindsight(True), REROUTE_BEST: hindsight(False)}
    without = {
        label: run("spotserve", cloud=dataclasses.replace(cloud, **change), skills=skills)
        for label, (change, skills) in (ABLATIONS.items() if ablate else ())
    }
    saved, on_demand_share = bill(trace, segment, cloud)
    return {
        "model": name, "segment": segment, "seed": seed, "requests": len(arrivals),
        "latencies_s": {k: o.latencies_s.tolist() for k, o in outcomes.items()},
        "p99_s_without": {k: o.quantile(0.99) for k, o in without.items()},
        "unfinished": sum(r.finished_s is None for r in outcomes[OURS].requests),
        "recomputed_tokens": {k: o.recomputed_tokens for k, o in outcomes.items()},
        "stalls_s": {k: o.stalls_s for k, o in outcomes.items()},
        "saved": saved, "on_demand_share": on_demand_share,
        "layouts": [(round(at, 1), str(layout)) for at, layout in outcomes[OURS].layouts],
    }  # fmt: skip


def bill(trace: Availability, segment: str, cloud: Cloud) -> tuple[float, float]:
    """(share saved against on-demand machines all along, share of the time that machines were on demand)."""
    taken = {e.node for e in trace.events if e.node and not e.joins}
    late = {e.node for e in trace.events if e.node and e.joins and e.time_s > 0}
    bought = late - taken if segment.endswith("_ondemand") else set()
    on_demand = Availability(tuple(e for e in trace.events if e.node in bought), trace.end_s).node_seconds()
    total = trace.node_seconds()
    cost = (total - on_demand) * cloud.spot_usd_per_h + on_demand * cloud.on_demand_usd_per_h
    return 1 - cost / (total * cloud.on_demand_usd_per_h), on_demand / total


def pooled(cases: list[dict]) -> dict:
    """A row: the cases of one model and trace, latencies of all seeds together."""
    first, ours = cases[0], [c["latencies_s"] for c in cases]
    values = {k: np.concatenate([one[k] for one in ours]) for k in ours[0]}
    p99 = {k: float(np.quantile(v, 0.99)) for k, v in values.items()}
    kept = ("model", "segment", "saved", "on_demand_share", "p99_s_without", "stalls_s", "layouts")
    return {k: first[k] for k in kept} | {
        "arrivals": "published" if first["seed"] is None else f"Gamma, CV 6, {len(cases)} seeds",
        "requests": sum(c["requests"] for c in cases),
        "unfinished": sum(c["unfinished"] for c in cases),
        "p99_s": p99,
        "mean_s": {k: float(np.mean(v)) for k, v in values.items()},
        "over_restart": p99[RESTART] / p99[OURS],
        "over_reroute": p99[REROUTE] / p99[OURS],
        "over_best_reroute": p99[REROUTE_BEST] / p99[OURS],
        "best_possible_over_best_reroute": p99[REROUTE_BEST] / p99[FLOOR],
        "policy_over_restart": p99[RESTART_JOINED] / p99[OURS],
        "policy_over_reroute": p99[REROUTE_JOINED] / p99[OURS],
        "best_possible_over_reroute": p99[REROUTE] / p99[FLOOR],
        "free_moves_over_reroute": p99[REROUTE] / p99[FREE],
        "recomputed_tokens": {k: sum(c["recomputed_tokens"][k] for c in cases) for k in values},
    }


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.32 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    for policy, marker in {FLOOR: "|", OURS: "o", REROUTE: "s", RESTART: "^"}.items():
        axes.plot([r["p99_s"][policy] for r in rows], range(len(rows)), marker, label=policy)
    axes.set_yticks(range(len(rows)), [label(r) for r in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [5, 10, 20, 50, 100, 200, 400]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("P99 latency of a request, seconds (floor: the largest fleet of the trace, undisturbed)")
    axes.legend()
    figure.savefig(path)


def label(row: dict) -> str:
    return f"{row['model']} {row['segment']}{'' if row['arrivals'] == 'published' else ', CV 6'}"


def table(rows: list[dict]) -> str:
    head = [
        "model, trace", "P99 ours", "batches", "restart", "continuous", "reroute", "continuous", "best shape", "floor", "free moves", "over restart",
        "over reroute", "possible", "free moves", "over best shape", "possible", "policy: restart", "reroute", "saved",
    ]  # fmt: skip
    policies = (OURS, OURS_BATCHES, RESTART, RESTART_JOINED, REROUTE, REROUTE_JOINED, REROUTE_BEST, FLOOR, FREE)
    ratios = (
        "over_restart",
        "over_reroute",
        "best_possible_over_reroute",
        "free_moves_over_reroute",
        "over_best_reroute",
        "best_possible_over_best_reroute",
        "policy_over_restart",
        "policy_over_reroute",
    )
    return format_table([head, *(
        [label(r), *(f"{r['p99_s'][p]:.1f} s" for p in policies), *(f"{r[x]:.2f}x" for x in ratios), f"{r['saved']:.0%}"]
        for r in rows
    )])  # fmt: skip


def main() -> None:
    parser = arguments(__doc__ or "", repeats=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of the shared data sets")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args()
    segments, bursty, seeds = (SEGMENTS[:1], (), 0) if args.quick else (SEGMENTS, BURSTY, 2)
    asked = [(name, segment, None, segment in BURSTY) for name in MODELS for segment in segments]
    asked += [(name, segment, seed, False) for name in MODELS for segment in bursty for seed in range(seeds)]
    with ProcessPoolExecutor(args.workers) as pool:
        submitted = {one: pool.submit(case, args.data, *one) for one in reversed(asked)}
        running = [submitted[one] for one in asked]
        groups: dict[tuple, list[dict]] = {}
        for one, future in zip(asked, running, strict=True):
            groups.setdefault((one[0], one[1], one[2] is None), []).append(future.result())
            say(f"{one[0]} {one[1]} {'published arrivals' if one[2] is None else f'seed {one[2]}'} done")
    rows = [pooled(cases) for cases in groups.values()]
    print(table(rows))
    for r in rows:
        if r["p99_s_without"]:
            without = ", ".join(f"{k} {v:.1f} s" for k, v in r["p99_s_without"].items())
            print(f"{label(r)}: P99 {r['p99_s'][OURS]:.1f} s; {without}")
    if args.quick:
        return
    draw(rows, picture_path("cluster", "spotserve"))
    print(f"written: {Report('cluster', 'spotserve', [], facts={'rows': rows}).save()}")


if __name__ == "__main__":
    main()
