"""Helix: our placements against the published ones, in the placement model and as servers.

For each published instance: the optimum of the placement model with bound, gap and time; then the planner's choice, the published placement and
the baselines serve the same requests in the same simulator, with the same profiles. The planner chooses on the first requests of the trace; what is
reported is from later requests that it has not seen. Offline: all requests wait from the start. Online: the trace's arrivals at 60 % of the rate that
the published placement reaches offline. 600 s after 60 s of warm-up. Last, the published simulator's own figures beside ours under its protocol.

Only solve times depend on this machine: `--part solve` measures them alone, `--part serve` the rest, `--instance` one instance of it; all write into
one record.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from benchmarks.cluster.helix_cases import INSTANCES, Case, published
from benchmarks.cluster.helix_published import compared
from benchmarks.harness import RESULTS, Report, arguments, format_table, picture_path, say
from wager.cluster.helix.cover import solve_cover
from wager.cluster.helix.flow import Placement, solve_flow, stripped, verify
from wager.cluster.helix.plan import MAX_PROMPT, node_models, plan, simulate_placement
from wager.cluster.helix.profile import Load, typical_throughput
from wager.cluster.helix.route import FlowRouter
from wager.simulate.native import simulate
from wager.simulate.pipeline import Simulator
from wager.simulate.trace import Arrival, all_at_once, read_trace

CHOSEN_ON = 4000  # requests of the trace's beginning; the rest is for the report
ONLINE_SHARE = 0.6
WARM_UP_S, MEASURED_S = 60.0, 600.0
PROOF_LIMIT_S = 60.0
LATENCIES = ("first_token_s_p50", "first_token_s_p99", "inter_token_s_p50", "inter_token_s_p99")
TRIES = 120  # simulations spent on improving the best candidate
SCHEDULER = {"swarm": "swarm"}  # a baseline's own scheduler, where it has one


def proof(case: Case) -> dict:
    """The optimum of the placement model beside the published incumbent, on two cores."""
    throughput = typical_throughput(case.card, case.profiles, case.cluster.counts)
    cover = solve_cover(case.cluster, throughput, case.card.layers, time_limit_s=PROOF_LIMIT_S, workers=2)
    flow = solve_flow(case.cluster, case.card, throughput, cover.placement)
    verify(case.cluster, case.card, throughput, cover.placement, flow, partial=True)
    return {
        "instance": case.name, "published_flow": case.incumbent, "flow": flow.value, "bound": cover.bound, "gap": cover.gap,
        "status": cover.status, "solve_s": cover.seconds, "solver": cover.solver,
        "layers": {n: cover.placement[n] for n in sorted(cover.placement)},
    }  # fmt: skip


def speed(case: Case, trace: list[Arrival], seconds: float, reference_seconds: float) -> dict:
    """Simulated hours in a minute on one core, all requests waiting: the compiled simulator and the reference in Python, the planner's router on both."""
    throughput = typical_throughput(case.card, case.profiles, case.cluster.counts)
    flow = solve_flow(case.cluster, case.card, throughput, case.placement, case.partial)
    offline, hours, events = all_at_once(trace), {}, {}
    for name, until_s in (("compiled", seconds), ("reference", reference_seconds)):
        nodes = node_models(case.cluster, case.card, case.profiles, stripped(case.placement, flow))
        router = FlowRouter(flow, stripped(case.placement, flow), Load().output_tokens)
        about = nodes, case.cluster.link, case.card.layers, case.card.activation_bytes, router, offline
        begun = time.perf_counter()
        timeline = simulate(*about, until_s) if name == "compiled" else Simulator(*about).run(until_s)
        hours[name], events[name] = until_s / 60 / (time.perf_counter() - begun), timeline.events
    return {
        "hours_per_minute": hours,
        "events": events,
        "simulated_s": {"compiled": seconds, "reference": reference_seconds},
    }


def serve(
    case: Case, placement: Placement, arrivals: list[Arrival], seconds: float, partial: bool = True, selector: str = "maxflow"
) -> dict:  # fmt: skip
    throughput = typical_throughput(case.card, case.profiles, case.cluster.counts)
    flow = solve_flow(case.cluster, case.card, throughput, placement, partial)
    verify(case.cluster, case.card, throughput, placement, flow, partial)
    timeline = simulate_placement(
        case.cluster, case.card, case.profiles, placement, flow, arrivals, seconds, Load(), selector
    )
    return timeline.summary(WARM_UP_S) | {"flow": flow.value, "hops": flow.mean_hops}


def compare(case: Case, optimum: Placement, trace: list[Arrival], seconds: float, choose_s: float, tries: int) -> dict:
    begun = time.perf_counter()
    found = plan(
        case.cluster, case.card, case.profiles, all_at_once(trace[:CHOSEN_ON]), np.random.default_rng(0),
        simulate_s=choose_s, warm_up_s=WARM_UP_S, time_limit_s=3.0, refine_tries=tries, workers=2,
    )  # fmt: skip
    row: dict = {"instance": case.name, "plan_s": time.perf_counter() - begun, "chosen": found.best.name}
    unseen = trace[CHOSEN_ON:]
    offline = all_at_once(unseen)
    theirs = serve(case, case.placement, offline, seconds, case.partial)
    mean_output = float(np.mean([a.output_tokens for a in unseen]))
    online = Case.online(unseen, ONLINE_SHARE * theirs["decode_tokens_per_s"] / mean_output, seconds)
    others = {
        c.name: c.placement for c in found.candidates if c.name in ("swarm", "petals", "separate", "separate plus")
    }
    for mode, arrivals in (("offline", offline), ("online", online)):
        row[mode] = {
            "published": theirs if mode == "offline" else serve(case, case.placement, arrivals, seconds, case.partial),
            "ours": serve(case, found.best.placement, arrivals, seconds),
            "flow_optimum": serve(case, optimum, arrivals, seconds),
        } | {
            name: serve(case, placement, arrivals, seconds, selector=SCHEDULER.get(name, "maxflow"))
            for name, placement in others.items()
        }
    row["throughput_ratio"] = row["offline"]["ours"]["decode_tokens_per_s"] / theirs["decode_tokens_per_s"]
    for name in LATENCIES:
        row[f"{name}_ratio"] = row["online"]["published"][name] / row["online"]["ours"][name]
    row["layers"] = {n: found.best.placement[n] for n in sorted(found.best.placement)}
    row["candidates"] = [
        {"name": c.name, "flow": c.flow.value, "decode_tokens_per_s": c.decode_tokens_per_s} for c in found.candidates
    ]
    return row


def draw(facts: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    rows = facts["served"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = np.arange(len(rows))
    left.bar(
        places - 0.2,
        [p["flow"] / p["published_flow"] for p in facts["proofs"]],
        0.4,
        label="placement model: our optimum over published",
    )
    left.bar(
        places + 0.2, [r["throughput_ratio"] for r in rows], 0.4, label="simulated offline: our plan over published"
    )
    left.axhline(1.0, color="black", linewidth=0.8)
    left.legend()
    left.set_xticks(places, [r["instance"].replace("llama", "") for r in rows], rotation=20)
    right.bar(places - 0.2, [r["online"]["published"]["inter_token_s_p50"] for r in rows], 0.4, label="published")
    right.bar(places + 0.2, [r["online"]["ours"]["inter_token_s_p50"] for r in rows], 0.4, label="ours")
    right.set_ylabel("median gap between tokens online, s")
    right.set_xticks(places, [r["instance"].replace("llama", "") for r in rows], rotation=20)
    right.legend()
    figure.savefig(path)


def main() -> None:
    parser = arguments(__doc__ or "", repeats=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of the shared data sets")
    parser.add_argument(
        "--part", choices=("all", "solve", "serve", "published"), default="all", help="what to measure now"
    )
    parser.add_argument(
        "--instance", action="append", choices=INSTANCES, help="serve only this one; may be given again"
    )
    args = parser.parse_args()
    names = INSTANCES[1:3] if args.quick else INSTANCES
    facts: dict = {} if args.part == "all" else recorded()
    if args.part in ("all", "solve"):
        facts["proofs"] = []
        for name in names:
            facts["proofs"].append(proof(published(args.data, name)))
            say(f"{name} solved in {facts['proofs'][-1]['solve_s']:.1f} s")
    trace = read_trace(args.data / "serving-traces" / "azure_llm_2023_conv.csv", max_prompt=MAX_PROMPT)
    if args.part in ("all", "solve"):
        facts["speed"] = speed(
            published(args.data, INSTANCES[-1]), trace, *((300.0, 30.0) if args.quick else (3600.0, 300.0))
        )
    if args.part in ("all", "serve"):
        optima = {p["instance"]: {n: (s, e) for n, (s, e) in p["layers"].items()} for p in facts["proofs"]}
        settings = (120.0, 90.0, 0) if args.quick else (WARM_UP_S + MEASURED_S, WARM_UP_S + MEASURED_S, TRIES)
        rows = {r["instance"]: r for r in facts.get("served", [])}
        for name in args.instance or names:
            rows[name] = compare(published(args.data, name), optima[name], trace, *settings)
            facts["served"] = [rows[n] for n in names if n in rows]
            if not args.quick:
                Report("cluster", "helix", [], facts=facts).save()
            say(f"{name} served: {rows[name]['throughput_ratio']:.3f} times the published placement's rate")
    if args.part in ("all", "published") and not args.quick:
        facts["published_simulator"] = compared(args.data, trace)
    show(facts)
    if args.quick:
        return
    if len(facts.get("served", [])) == len(names):
        draw(facts, picture_path("cluster", "helix"))
    print(f"written: {Report('cluster', 'helix', [], facts=facts).save()}")


def recorded() -> dict:
    """What an earlier run of another part has written."""
    path = RESULTS / "cluster" / "helix.json"
    return json.loads(path.read_text())["facts"] if path.exists() else {}


def show(facts: dict) -> None:
    head = ["instance", "published flow", "ours", "proven gap", "solve", "by"]
    print(format_table([head, *(
        [p["instance"], f"{p['published_flow']:.1f}", f"{p['flow']:.1f}", f"{p['gap']:.2%}", f"{p['solve_s']:.1f} s", p["solver"]]
        for p in facts.get("proofs", [])
    )]))  # fmt: skip
    if "speed" in facts:
        print(
            "simulated hours a minute, 24 nodes: "
            + ", ".join(f"{n} {v:.2f}" for n, v in facts["speed"]["hours_per_minute"].items())
        )
    if "served" not in facts:
        return
    head = ["instance", "chosen", "offline tok/s published", "ours", "ratio", *(n.replace("_", " ") for n in LATENCIES)]
    print(format_table([head, *(
        [
            r["instance"], r["chosen"], *(f"{r['offline'][w]['decode_tokens_per_s']:.1f}" for w in ("published", "ours")),
            f"{r['throughput_ratio']:.3f}x", *(f"{r[f'{n}_ratio']:.2f}x" for n in LATENCIES),
        ]
        for r in facts["served"]
    )]))  # fmt: skip
    for r in facts["served"]:
        for mode in ("offline", "online"):
            rates = ", ".join(f"{name} {one['decode_tokens_per_s']:.1f}" for name, one in r[mode].items())
            print(f"{r['instance']} {mode}, decode tokens/s: {rates}")
    for p in facts.get("published_simulator", []):
        print(f"{p['what']}: published simulator {p['published']}, ours {p['ours']:.1f} ({p['error']:+.1%})")


if __name__ == "__main__":
    main()
