"""`wager cluster`: plan where layers go, simulate a plan on a trace, replay a spot market."""

from __future__ import annotations

import csv
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from wager.errors import UsageError

app = typer.Typer(add_completion=False, help="Plan, price and simulate serving on many machines.")

Data = Annotated[Path, typer.Option(help="folder with the measured profiles (gpu-serving-profiles)")]
Trace = Annotated[Path, typer.Option(help="requests: arrival_s,context_tokens,generated_tokens")]


@app.command()
def plan(
    profiles: Annotated[Path, typer.Option(help="helix: folder with measured profiles")] = Path("."),
    planner: Annotated[
        str, typer.Option(help="helix (one model on machines you have) or coral (what to rent)")
    ] = "helix",
    model: Annotated[str, typer.Option(help="helix: profiled model, e.g. llama2_70b")] = "llama2_70b",
    machines: Annotated[
        str, typer.Option(help="helix: one machine per node, comma-separated, e.g. a100,l4,l4,t4")
    ] = "",
    links: Annotated[Path | None, typer.Option(help="helix: from,to,bandwidth_MB_per_s,latency_ms")] = None,
    trace: Annotated[Path | None, typer.Option(help="helix: requests that candidates are tried on")] = None,
    demand: Annotated[Path | None, typer.Option(help="coral: models.toml")] = None,
    offers: Annotated[Path | None, typer.Option(help="coral: region,device,count,usd_per_h,available")] = None,
    current: Annotated[
        Path | None, typer.Option(help="coral: the plan that runs now; says what to start and what to drain")
    ] = None,
    simulate_s: Annotated[float, typer.Option(help="helix: simulated seconds per candidate")] = 660.0,
    time_limit: Annotated[float, typer.Option(help="helix: seconds of solving per candidate")] = 10.0,
    refine: Annotated[int, typer.Option(help="helix: simulations spent on improving the best candidates")] = 48,
    method: Annotated[
        str, typer.Option(help="helix: auto, or one of cover, milp, swarm, petals, separate, 'separate plus' alone")
    ] = "auto",
    max_hops: Annotated[int | None, typer.Option(help="helix: machines that a request may meet at most")] = None,
    prune: Annotated[
        int | None, typer.Option(help="helix: links that each machine keeps in the program with links (milp)")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="where the plan goes")] = Path("plan.toml"),
) -> None:
    """Propose a plan, with its bound and gap, and write it as TOML."""
    if planner == "coral":
        if demand is None or offers is None:
            given = {"--demand models.toml": demand, "--offers offers.csv": offers}
            raise UsageError(
                f"the coral planner also needs {', '.join(name for name, value in given.items() if not value)}"
            )
        _plan_coral(demand, offers, current, output)
    elif planner == "helix":
        if not machines or links is None or trace is None:
            given = {"--machines": machines, "--links": links, "--trace": trace}
            raise UsageError(
                f"the helix planner also needs {', '.join(name for name, value in given.items() if not value)}"
            )
        how = {"simulate_s": simulate_s, "warm_up_s": min(60.0, simulate_s / 4), "time_limit_s": time_limit}
        how |= {"refine_tries": refine, "method": method, "max_hops": max_hops, "prune": prune}
        _plan_helix(profiles, model, machines.split(","), links, trace, how, output)
    else:
        raise UsageError(f"planner {planner!r} is unknown; use helix or coral")


def _card(model: str):
    from wager.hardware.layer_cost import MODELS

    if model not in MODELS:
        raise UsageError(f"model {model!r} has no card; use one of {', '.join(MODELS)}")
    return MODELS[model]


def _plan_helix(
    folder: Path,
    model: str,
    machines: list[str],
    links: Path,
    trace: Path,
    how: dict[str, Any],
    output: Path,
) -> None:
    import numpy as np

    from wager.cluster.helix.plan import MAX_PROMPT
    from wager.cluster.helix.plan import plan as plan_helix
    from wager.cluster.plan_file import PlanFile, write
    from wager.hardware.cluster import read_links
    from wager.hardware.layer_cost import read_profiles
    from wager.simulate.trace import all_at_once, read_trace

    card, cluster = _card(model), read_links(links, machines)
    arrivals = all_at_once(read_trace(trace, max_prompt=MAX_PROMPT))
    found = plan_helix(cluster, card, read_profiles(folder, model), arrivals, np.random.default_rng(0), **how)
    for c in found.candidates:
        judged = (
            ""
            if c.judged is None
            else f"; finals {c.judged.rate:.1f} output tokens/s, latency {c.judged.latency_s:.3f} s"
        )
        print(
            f"{c.name:<32} flow {c.flow.value:8.1f} tokens/s, simulated {c.decode_tokens_per_s:7.1f} output tokens/s, "
            f"{c.flow.mean_hops:.1f} hops{judged}"
        )
    print(f"no placement has a flow above {found.bound:.1f} tokens/s; the best one here is within {found.gap:.1%}")
    best = found.best
    nodes = {n: (cluster.node(n).machine, *best.placement[n]) for n in best.placement}
    notes = {
        "chosen": best.name, "flow_tokens_per_s": best.flow.value, "flow_bound_tokens_per_s": found.bound,
        "simulated_output_tokens_per_s": best.decode_tokens_per_s,
    }  # fmt: skip
    write(PlanFile(model, card.layers, str(links), nodes, notes), output)
    print(f"wrote {output}")


def _plan_coral(demand: Path, offers: Path, current: Path | None, output: Path) -> None:
    from wager.cluster.coral.rent import plan_rent
    from wager.cluster.plan_file import write_lines

    try:
        wanted = tomllib.loads(demand.read_text())
    except OSError as error:
        raise UsageError(f"{demand} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{demand} is not TOML: {error}") from None
    found, lines = plan_rent(wanted, _rows(offers), current)
    for line in lines:
        print(line)
    write_lines(found, output)
    print(f"wrote {output}")


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="") as handle:
            return list(csv.DictReader(handle))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None


@app.command()
def simulate(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan of the helix planner")],
    trace: Trace,
    profiles: Data,
    seconds: Annotated[float, typer.Option(help="simulated seconds")] = 600.0,
    warm_up: Annotated[float, typer.Option(help="seconds left out of the numbers")] = 60.0,
    offline: Annotated[bool, typer.Option(help="all requests wait from the start")] = False,
    scheduler: Annotated[str, typer.Option(help="maxflow, swarm, random or queue")] = "maxflow",
    plot: Annotated[Path | None, typer.Option(help="write a Gantt chart over time series, .png or .svg")] = None,
    timeline_path: Annotated[
        Path | None, typer.Option("--timeline", help="write what became of every request, .csv")
    ] = None,
    availability: Annotated[
        Path | None, typer.Option(help="time_ms,event,node: when the machines it names join and leave")
    ] = None,
    segment: Annotated[str | None, typer.Option(help="which segment of the availability file")] = None,
) -> None:
    """Serve a trace on a plan under a virtual clock."""
    import numpy as np

    from wager.cluster import plan_file
    from wager.cluster.helix.flow import solve_flow
    from wager.cluster.helix.plan import MAX_PROMPT, simulate_placement
    from wager.cluster.helix.profile import Load, typical_throughput
    from wager.hardware.availability import read_membership
    from wager.hardware.cluster import read_links
    from wager.hardware.layer_cost import read_profiles
    from wager.simulate.timeline import write_requests
    from wager.simulate.trace import all_at_once, read_trace

    loaded = plan_file.read(plan_path)
    card, measured = _card(loaded.model), read_profiles(profiles, loaded.model)
    indices = {name: int(name[1:]) for name in loaded.nodes if name[1:].isdigit() and name[0] == "n"}
    if len(indices) != len(loaded.nodes):
        raise UsageError(f"nodes of {plan_path} must be named n0, n1, ... as in {loaded.links}")
    absent = next(iter(measured))
    machines = [absent] * (1 + _highest_node(Path(loaded.links)))
    for name, i in indices.items():
        machines[i] = loaded.nodes[name][0]
    cluster = read_links(loaded.links, machines)
    arrivals = read_trace(trace, max_prompt=MAX_PROMPT)
    throughput = typical_throughput(card, measured, cluster.counts)
    flow = solve_flow(cluster, card, throughput, loaded.placement)
    if not flow.value:
        raise UsageError(f"the links of {loaded.links} let no tokens through this plan")
    members = None if availability is None else read_membership(availability, segment)
    timeline = simulate_placement(
        cluster, card, measured, loaded.placement, flow, all_at_once(arrivals) if offline else arrivals, seconds, Load(),
        scheduler, keep_busy=plot is not None, rng=np.random.default_rng(0), availability=members,
    )  # fmt: skip
    for name, value in {"max_flow_tokens_per_s": flow.value, **timeline.summary(warm_up)}.items():
        print(f"{name:<24} {value:.4g}")
    if timeline_path is not None:
        print(f"wrote {write_requests(timeline, timeline_path)}")
    if plot is not None:
        from wager.simulate.plot import plot as draw

        print(f"wrote {draw(timeline, plot)}")


def _highest_node(links: Path) -> int:
    ends = [row[key] for row in _rows(links) for key in ("from", "to")]
    return max((int(e) for e in ends if e.isdigit()), default=0)


@app.command()
def spot(
    profile: Annotated[str, typer.Option(help="e.g. T4-4x/megatron_6.7B_profile")],
    profiles: Data,
    availability: Annotated[Path, typer.Option(help="time_ms,event,node of the machines")],
    trace: Annotated[Path, typer.Option(help="arrival_s,input_tokens of the requests")],
    segment: Annotated[str | None, typer.Option(help="which segment of the availability file")] = None,
    output_tokens: Annotated[int, typer.Option(help="tokens that each request generates")] = 128,
    rate: Annotated[float, typer.Option(help="requests/s expected in the long run")] = 0.0,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="spotserve, reparallelize or reroute; may be repeated; all three without it"),
    ] = None,
    grace: Annotated[float, typer.Option(help="seconds from a machine's notice to its end", min=0)] = 30.0,
    min_gpus: Annotated[int, typer.Option(help="GPUs that a pipeline has at least", min=1)] = 1,
    reserve: Annotated[
        int | None,
        typer.Option(
            help="ask for the machines that the layout needs and so many to spare; without it all are taken", min=0
        ),
    ] = None,
    allow_on_demand: Annotated[
        bool,
        typer.Option("--allow-on-demand", help="ask for on-demand machines too when short (reserve: 2 if not given)"),
    ] = False,
    boot: Annotated[float, typer.Option(help="seconds until a machine that was asked for is ready", min=0)] = 120.0,
    most: Annotated[
        int | None,
        typer.Option("--max-machines", help="quota of machines of both kinds (default: the file's most)", min=1),
    ] = None,
    spot_price: Annotated[
        float | None, typer.Option(help="USD/h of a spot machine (default: the dated catalog)", min=0)
    ] = None,
    on_demand_price: Annotated[
        float | None, typer.Option(help="USD/h of an on-demand machine (default: the dated catalog)", min=0)
    ] = None,
    events: Annotated[Path | None, typer.Option(help="write what happened when, .csv; - prints lines")] = None,
) -> None:
    """Replay a spot market under SpotServe and under its baselines."""
    from wager.cluster.spotserve.latency import read_model
    from wager.cluster.spotserve.report import cloud_of, rental_of, summary, write_events
    from wager.cluster.spotserve.simulate import POLICIES, SpotSimulation
    from wager.hardware.availability import read_membership
    from wager.simulate.trace import read_trace

    rental = rental_of(reserve, allow_on_demand, boot, most)
    cloud, priced = cloud_of(profile, rate, grace, min_gpus, spot_price, on_demand_price)
    model, market = read_model(profiles, profile), read_membership(availability, segment)
    arrivals = [a for a in read_trace(trace, output_tokens) if a.arrival_s < market.end_s]
    if not arrivals:
        raise UsageError(f"no request of {trace} arrives within the {market.end_s:.0f} s of the availability trace")
    chosen = list(dict.fromkeys(policy or POLICIES))
    runs = {p: SpotSimulation(model, market, arrivals, p, cloud, rental=rental) for p in chosen}
    outcomes = {p: run.run() for p, run in runs.items()}
    for name, out in outcomes.items():
        print(summary(name, out, cloud))
    print(priced)
    if events is not None:
        for line in write_events(outcomes, events):
            print(line)


@app.command()
def migration(
    profile: Annotated[str, typer.Option(help="e.g. T4-4x/megatron_6.7B_profile")],
    profiles: Data,
    old: Annotated[str, typer.Option("--from", help="layout now: pipelines,stages,shards,batch, e.g. 2,2,8,4")],
    new: Annotated[str, typer.Option("--to", help="layout next")],
    lost: Annotated[list[str] | None, typer.Option(help="a machine that leaves, e.g. node-3; may be repeated")] = None,
    done: Annotated[int, typer.Option(help="tokens that every request has so far")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of a prompt")] = 512,
    output_tokens: Annotated[int, typer.Option(help="tokens that each request generates")] = 128,
) -> None:
    """Say what a change of layout moves, in which order, and how long serving stops."""
    from wager.cluster.spotserve.cloud import Cloud
    from wager.cluster.spotserve.inspect import describe_move, parse_layout
    from wager.cluster.spotserve.latency import read_model

    layouts = parse_layout(old), parse_layout(new)
    model = read_model(profiles, profile)
    for line in describe_move(model, Cloud(), *layouts, lost or [], done, prompt_tokens, output_tokens):
        print(line)
