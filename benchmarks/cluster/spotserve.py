"""SpotServe against restarting and rerouting on the published spot traces, in simulation, with the cost of the machines.

Three published models at their published rates (Gamma arrivals, coefficient of variation 6), every segment of the traces. Beside the three
policies stands the floor: a fleet as large as the trace's largest that nobody disturbs. No policy can have a lower P99 for long, so floor over
baseline bounds the ratio that any policy can reach. Deterministic: every number is exact for its trace, there is no noise to report.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.harness import Report, arguments, format_table, picture_path, say
from wager.cluster.spotserve.latency import read_model
from wager.cluster.spotserve.simulate import POLICIES, Cloud, Outcome, SpotSimulation
from wager.hardware.availability import Availability, Membership, read_membership
from wager.simulate.trace import Arrival, read_trace

MODELS = {"OPT-6.7B": ("6.7B", 1.5), "GPT-20B": ("h6144", 0.35), "LLaMA-30B": ("h7168", 0.2)}
SEGMENTS = tuple(f"trace_{day}{kind}" for day in ("0203", "0304") for kind in ("_real", "", "_tight", "_ondemand"))
ABLATIONS = {"layout never follows the load": {"overload_factor": 0.0}, "no notice": {"notice_s": 0.0}}
OUTPUT_TOKENS = 128


def undisturbed(trace: Availability) -> Availability:
    most = max(len(trace.alive(e.time_s)) for e in trace.events)
    return Availability(tuple(Membership(0.0, f"n{i}", True) for i in range(most)), trace.end_s)


def case(data: Path, name: str, segment: str) -> tuple[dict[str, Outcome], dict[str, float]]:
    short, rate = MODELS[name]
    model = read_model(data / "gpu-serving-profiles", f"T4-4x/megatron_{short}_profile")
    trace = read_membership(data / "spot-traces" / "spotserve-segments.csv", segment)
    everyone = read_trace(data / "spot-traces" / f"requests-gamma-rate{rate}_cv6.csv", OUTPUT_TOKENS)
    arrivals: list[Arrival] = [a for a in everyone if a.arrival_s < trace.end_s]
    cloud = Cloud(expected_rate=rate)
    outcomes = {policy: SpotSimulation(model, trace, arrivals, policy, cloud).run() for policy in POLICIES}
    outcomes["floor"] = SpotSimulation(model, undisturbed(trace), arrivals, "spotserve", cloud).run()
    without = {
        label: SpotSimulation(model, trace, arrivals, "spotserve", dataclasses.replace(cloud, **change))
        .run()
        .quantile(0.99)
        for label, change in ABLATIONS.items()
    }
    return outcomes, without


def row(name: str, segment: str, outcomes: dict[str, Outcome], without: dict[str, float]) -> dict:
    ours = outcomes["spotserve"]
    p99 = {policy: out.quantile(0.99) for policy, out in outcomes.items()}
    return {
        "model": name,
        "segment": segment,
        "requests": len(ours.requests),
        "unfinished": sum(r.finished_s is None for r in ours.requests),
        "p50_s": {policy: out.quantile(0.5) for policy, out in outcomes.items()},
        "p99_s": p99,
        "over_restart": p99["reparallelize"] / p99["spotserve"],
        "over_reroute": p99["reroute"] / p99["spotserve"],
        "best_possible_over_reroute": p99["reroute"] / p99["floor"],
        "recomputed_tokens": {policy: out.recomputed_tokens for policy, out in outcomes.items()},
        "cost_usd": ours.cost_usd,
        "on_demand_usd": ours.on_demand_usd,
        "saved": 1 - ours.cost_usd / ours.on_demand_usd,
        "p99_s_without": without,
    }


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.32 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    styles = {"floor": "|", "spotserve": "o", "reroute": "s", "reparallelize": "^"}
    for policy, marker in styles.items():
        axes.plot([r["p99_s"][policy] for r in rows], range(len(rows)), marker, label=policy)
    axes.set_yticks(range(len(rows)), [f"{r['model']} {r['segment']}" for r in rows])
    axes.set_xscale("log")
    axes.set_xlabel("P99 latency of a request, seconds (floor: the largest fleet of the trace, undisturbed)")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help="folder of the shared data sets")
    args = parser.parse_args()
    segments = SEGMENTS[:1] if args.quick else SEGMENTS
    rows = []
    for name in MODELS:
        for segment in segments:
            rows.append(row(name, segment, *case(args.data, name, segment)))
            say(f"{name} {segment} done")
    head = [
        "model, trace",
        "P99 ours",
        "restart",
        "reroute",
        "floor",
        "over restart",
        "over reroute",
        "possible",
        "saved",
    ]
    print(format_table([head, *(
        [
            f"{r['model']} {r['segment']}", *(f"{r['p99_s'][p]:.1f} s" for p in ("spotserve", "reparallelize", "reroute", "floor")),
            f"{r['over_restart']:.2f}x", f"{r['over_reroute']:.2f}x", f"{r['best_possible_over_reroute']:.2f}x", f"{r['saved']:.0%}",
        ]
        for r in rows
    )]))  # fmt: skip
    draw(rows, picture_path("cluster", "spotserve"))
    print(f"written: {Report('cluster', 'spotserve', [], facts={'rows': rows}).save()}")


if __name__ == "__main__":
    main()
