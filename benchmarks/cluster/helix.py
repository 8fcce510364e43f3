"""Helix: our placements against the published ones, in the placement model and as servers.

For each published instance: the optimum of the placement model with bound, gap and time; then the planner's choice and the published placement serve
the same requests in the same simulator, with the same profiles and scheduler. The planner chooses on the first minutes of the trace; what is reported
is from later minutes that it has not seen. Offline: all requests wait from the start. Online: the trace's arrivals at 60 % of the rate that the
published placement reaches offline. Only solve times depend on this machine.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from benchmarks.cluster.helix_cases import INSTANCES, Case, published
from benchmarks.harness import Report, arguments, format_table, picture_path, say
from wager.cluster.helix.cover import solve_cover
from wager.cluster.helix.flow import Placement, solve_flow, verify
from wager.cluster.helix.plan import MAX_PROMPT, Candidate, plan, simulate_placement
from wager.cluster.helix.profile import Load, typical_throughput
from wager.simulate.trace import Arrival, all_at_once, read_trace

CHOSEN_ON = 4000  # requests of the trace's beginning; the rest is for the report
ONLINE_SHARE = 0.6
WARM_UP_S = 60.0


def serve(case: Case, placement: Placement, arrivals: list[Arrival], seconds: float, partial: bool = True) -> dict:
    throughput = typical_throughput(case.card, case.profiles, case.cluster.counts)
    flow = solve_flow(case.cluster, case.card, throughput, placement, partial)
    verify(case.cluster, case.card, throughput, placement, flow, partial)
    timeline = simulate_placement(case.cluster, case.card, case.profiles, placement, flow, arrivals, seconds, Load())
    return timeline.summary(WARM_UP_S) | {"flow": flow.value, "hops": flow.mean_hops}


def compare(case: Case, trace: list[Arrival], seconds: float, choose_s: float, refine: int) -> dict:
    throughput = typical_throughput(case.card, case.profiles, case.cluster.counts)
    begun = time.perf_counter()
    cover = solve_cover(case.cluster, throughput, case.card.layers, time_limit_s=60)
    solve_s = time.perf_counter() - begun
    begun = time.perf_counter()
    found = plan(
        case.cluster, case.card, case.profiles, all_at_once(trace[:CHOSEN_ON]), np.random.default_rng(0),
        simulate_s=choose_s, warm_up_s=WARM_UP_S, time_limit_s=10.0, refine_tries=refine,
    )  # fmt: skip
    plan_s = time.perf_counter() - begun
    unseen = trace[CHOSEN_ON:]
    offline = all_at_once(unseen)
    theirs = serve(case, case.placement, offline, seconds, case.partial)
    mean_output = float(np.mean([a.output_tokens for a in unseen]))
    online = Case.online(unseen, ONLINE_SHARE * theirs["decode_tokens_per_s"] / mean_output, seconds)
    best: Candidate = found.best
    swarm = next((c for c in found.candidates if c.name == "swarm"), None)
    row = {
        "instance": case.name, "published_flow": case.incumbent, "flow": cover.value, "bound": cover.bound, "gap": cover.gap,
        "solve_s": solve_s, "solver": cover.solver, "plan_s": plan_s, "chosen": best.name, "chosen_flow": best.flow.value,
        "offline": {"published": theirs, "ours": serve(case, best.placement, offline, seconds)},
        "online": {"published": serve(case, case.placement, online, seconds, case.partial), "ours": serve(case, best.placement, online, seconds)},
        "flow_optimum_offline": serve(case, cover.placement, offline, seconds),
        "layers": {n: best.placement[n] for n in sorted(best.placement)},
    }  # fmt: skip
    if swarm is not None:
        row["offline"]["swarm"] = serve(case, swarm.placement, offline, seconds)
    row["throughput_ratio"] = row["offline"]["ours"]["decode_tokens_per_s"] / theirs["decode_tokens_per_s"]
    for name in ("first_token_s_p50", "inter_token_s_p50", "inter_token_s_p99"):
        row[f"{name}_ratio"] = row["online"]["published"][name] / row["online"]["ours"][name]
    return row


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = np.arange(len(rows))
    left.bar(
        places - 0.2,
        [r["flow"] / r["published_flow"] for r in rows],
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
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help="folder of the shared data sets")
    args = parser.parse_args()
    trace = read_trace(args.data / "serving-traces" / "azure_llm_2023_conv.csv", max_prompt=MAX_PROMPT)
    rows = []
    for name in INSTANCES[1:3] if args.quick else INSTANCES:
        settings = (120.0, 90.0, 0) if args.quick else (660.0, 240.0, 24)
        rows.append(compare(published(args.data, name), trace, *settings))
        say(f"{name} done")
    head = [
        "instance",
        "published",
        "ours",
        "gap",
        "solve",
        "offline tok/s published",
        "ours",
        "ratio",
        "online gap p50",
        "p99",
        "first token p50",
    ]
    print(format_table([head, *(
        [
            r["instance"], f"{r['published_flow']:.1f}", f"{r['flow']:.1f}", f"{r['gap']:.2%}", f"{r['solve_s']:.1f} s",
            f"{r['offline']['published']['decode_tokens_per_s']:.1f}", f"{r['offline']['ours']['decode_tokens_per_s']:.1f}",
            f"{r['throughput_ratio']:.2f}x", f"{r['inter_token_s_p50_ratio']:.2f}x", f"{r['inter_token_s_p99_ratio']:.2f}x",
            f"{r['first_token_s_p50_ratio']:.2f}x",
        ]
        for r in rows
    )]))  # fmt: skip
    draw(rows, picture_path("cluster", "helix"))
    print(f"written: {Report('cluster', 'helix', [], facts={'rows': rows}).save()}")


if __name__ == "__main__":
    main()
