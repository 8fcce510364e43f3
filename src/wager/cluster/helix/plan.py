"""From a cluster and a load to a placement that serves best: candidates from the cover program under several hop limits and from the
baselines, profiles made consistent with each placement, the winner picked by simulation on requests set aside for it (see `finals`)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from wager.cluster.helix import finals
from wager.cluster.helix.candidates import AUTO, Candidate, candidates
from wager.cluster.helix.flow import Flow, Placement, layer_cover, most_hops, solve_flow, stripped, verify
from wager.cluster.helix.profile import Load, Throughput, typical_throughput
from wager.cluster.helix.refine import Tried, refine
from wager.cluster.helix.route import FlowRouter
from wager.errors import UsageError, WagerError
from wager.hardware.availability import Availability
from wager.hardware.cluster import Cluster
from wager.hardware.layer_cost import MachineProfile, ModelCard
from wager.simulate.native import simulate
from wager.simulate.nodes import NodeModel, copy_overhead_s
from wager.simulate.pipeline import Change, Simulator
from wager.simulate.timeline import Timeline
from wager.simulate.trace import Arrival

MAX_PROMPT = 2048
REFINED = 4  # candidates that refinement starts from
MARGIN = 1.02  # a refined placement must serve so much more: less is the luck of one run of requests
FINALISTS, CLOSE = (
    4,
    0.97,
)  # so many candidates, with at least such a share of the best rate, and their other orders are judged at length


@dataclass(frozen=True)
class HelixPlan:
    """The winner first, the others by the rate of their first simulation. `bound`: proven upper bound of the placement model; `gap`: of the best flow found, which need not be the winner's."""

    candidates: tuple[Candidate, ...]
    bound: float
    throughput: Throughput

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def gap(self) -> float:
        return 1 - max(c.flow.value for c in self.candidates) / self.bound


def node_models(
    cluster: Cluster, model: ModelCard, profiles: Mapping[str, MachineProfile], placement: Placement
) -> list[NodeModel]:
    """The simulator's machines for a placement."""
    nodes = []
    for n in cluster.nodes:
        if n.name not in placement:
            continue
        (start, end), profile = placement[n.name], profiles[n.machine]
        k = end - start
        prompts, decodes = profile.prompt_requests[k], profile.decode_tokens[k]
        nodes.append(
            NodeModel(
                n.name, start, end,
                tuple(profile.prompt.upto(prompts * MAX_PROMPT)), tuple(profile.decode.upto(max(decodes, 2))),
                profile.kv_blocks[k], prompts, prompts * MAX_PROMPT, decodes,
                copy_overhead_s(model.activation_bytes), n.usd_per_h, n.machine,
            )
        )  # fmt: skip
    return nodes


def simulate_placement(
    cluster: Cluster,
    model: ModelCard,
    profiles: Mapping[str, MachineProfile],
    placement: Placement,
    flow: Flow,
    arrivals: Sequence[Arrival],
    until_s: float,
    load: Load,
    selector: str = "maxflow",
    keep_busy: bool = False,
    rng: np.random.Generator | None = None,
    availability: Availability | None = None,
) -> Timeline:
    """Serve `arrivals` on the placement. Arrivals at time 0 make the offline case: the router holds them back until KV is free. availability:
    when the machines that it names are there; the others always are. Raises UsageError where it names one that the placement lacks."""
    placement = stripped(placement, flow)
    router = FlowRouter(flow, placement, load.output_tokens, selector, rng=rng)
    nodes = node_models(cluster, model, profiles, placement)
    about = cluster.link, model.layers, model.activation_bytes, router, arrivals
    if availability is None:
        return simulate(nodes, *about, until_s, keep_busy)
    first, changes = comings_and_goings(nodes, availability)
    return Simulator(first, *about, changes, keep_busy).run(until_s)


def comings_and_goings(
    nodes: Sequence[NodeModel], availability: Availability
) -> tuple[list[NodeModel], tuple[Change, ...]]:
    """Who is there at the start, and the changes after it. A machine that the trace names is there only when the trace says so."""
    known = {n.name: n for n in nodes}
    events = [e for e in availability.events if e.node]
    stray = next((e.node for e in events if e.node not in known), None)
    if stray is not None:
        raise UsageError(f"the availability trace names {stray!r}; the machines that serve are {', '.join(known)}")
    late = {e.node for e in events} - availability.alive(0.0)
    changes = tuple(
        Change(e.time_s, join=(known[e.node],)) if e.joins else Change(e.time_s, leave=(e.node,))
        for e in events
        if e.time_s > 0
    )
    return [n for n in nodes if n.name not in late], changes


def plan(
    cluster: Cluster,
    model: ModelCard,
    profiles: Mapping[str, MachineProfile],
    arrivals: Sequence[Arrival],
    rng: np.random.Generator,
    load: Load | None = None,
    hop_limits: Sequence[int] = (8, 10, 12, 14, 16, 18),
    simulate_s: float = 660.0,
    warm_up_s: float = 60.0,
    time_limit_s: float = 10.0,
    refine_tries: int = 0,
    workers: int = 1,
    method: str = AUTO,
    max_hops: int | None = None,
    prune: int | None = None,
) -> HelixPlan:
    """Propose, price by simulation, improve the best few by about `refine_tries` further simulations, `workers` at once, and judge the best of all
    in finals: on several windows of the requests, the rate with all waiting and the latency as they arrive.

    Simulate long enough: with all requests waiting, a long chain looks good while it fills. method: the placements of one method alone (see
    `candidates`), neither refined nor reordered. max_hops: no request may meet more machines. prune: links a machine keeps in the program with
    links. Raises UsageError for an unknown method and WagerError when nothing can serve the model."""
    load = load or Load()
    throughput = typical_throughput(model, profiles, cluster.counts, load)
    limits = hop_limits if max_hops is None else (*(h for h in hop_limits if h < max_hops), max_hops)
    found, bound = candidates(cluster, model, profiles, throughput, load, limits, time_limit_s, rng, method, prune)
    if max_hops is not None:
        found = [c for c in found if most_hops(c.flow) <= max_hops]
    if not found:
        raise WagerError(
            f"no placement of {model.name} on these machines and links carries any tokens"
            f"{'' if max_hops is None else f' over {max_hops} machines or fewer'}; add machines or links"
        )
    trial = partial(
        _serve, cluster, model, profiles, arrivals=arrivals, until_s=simulate_s, warm_up_s=warm_up_s, load=load
    )
    with _Pool(workers) as pool:
        priced = sorted(pool.map(trial, found), key=lambda c: -c.decode_tokens_per_s)
        if refine_tries and method == AUTO:
            better = _refined(cluster, model, throughput, priced, trial, pool, refine_tries, rng, max_hops)
            priced = sorted([*better, *priced], key=lambda c: -c.decode_tokens_per_s)
        if method == AUTO and priced[0].decode_tokens_per_s > 0:
            windows = finals.windows(arrivals, priced[0].decode_tokens_per_s, simulate_s, rng)
            priced = _judged(cluster, model, throughput, priced, trial, pool, windows)
    return HelixPlan(tuple(priced), bound, throughput)


def _serve(
    cluster: Cluster,
    model: ModelCard,
    profiles: Mapping[str, MachineProfile],
    candidate: Candidate,
    arrivals: Sequence[Arrival],
    until_s: float,
    warm_up_s: float,
    load: Load,
) -> Candidate:
    """The candidate with what it serves."""
    if candidate.flow.value <= 0:
        return candidate
    timeline = simulate_placement(
        cluster, model, profiles, candidate.placement, candidate.flow, arrivals, until_s, load
    )
    return replace(
        candidate,
        decode_tokens_per_s=timeline.decode_tokens_per_s(warm_up_s),
        summary=timeline.summary(warm_up_s),
        busy={n: s / timeline.end_s for n, s in timeline.node_busy_s.items()},
    )


def _judged(
    cluster: Cluster,
    model: ModelCard,
    throughput: Throughput,
    priced: Sequence[Candidate],
    trial: Callable[..., Candidate],
    pool: _Pool,
    windows: Sequence[finals.Window],
) -> list[Candidate]:
    """The winner of the finals before the others."""
    best_rate = priced[0].decode_tokens_per_s
    chosen = [c for c in priced[:FINALISTS] if c.decode_tokens_per_s >= CLOSE * best_rate]
    fresh = pool.map(trial, _reordered(cluster, model, throughput, chosen, priced))
    finalists: list[Candidate] = []
    for c in (*chosen, *fresh):
        if all(c.summary != other.summary for other in finalists):  # to the last bit: machines of a kind change places
            finalists.append(c)
    if len(finalists) > 1:
        runs = [(c, w.waiting) for c in finalists for w in windows]
        runs += [(c, w.arriving) for c in finalists for w in windows]
        served = pool.map(partial(_serve_window, trial), runs)
        for i, c in enumerate(finalists):
            mine = slice(i * len(windows), (i + 1) * len(windows))
            rates = tuple(one.decode_tokens_per_s for one in served[mine])
            online = [one.summary for one in served[len(runs) // 2 :][mine]]
            finalists[i] = replace(c, judged=finals.Judged(rates, finals.latency_s(online)))
    first = finalists[finals.winner([c.judged for c in finalists if c.judged])] if finalists[0].judged else finalists[0]
    known = [f.placement for f in finalists]
    others = [c for c in (*finalists, *(p for p in priced if p.placement not in known)) if c is not first]
    return [first, *sorted(others, key=lambda c: -c.decode_tokens_per_s)]


def _reordered(
    cluster: Cluster, model: ModelCard, throughput: Throughput, chosen: Sequence[Candidate], known: Sequence[Candidate]
) -> list[Candidate]:
    """Other orders of the chosen chains, not simulated yet."""
    machine, found = {n.name: n.machine for n in cluster.nodes}, []
    for c in chosen:
        for placement in finals.reordered(stripped(c.placement, c.flow), machine):
            if any(end - start not in throughput[machine[n]] for n, (start, end) in placement.items()):
                continue
            flow = solve_flow(cluster, model, throughput, placement)
            if flow.value > 0 and all(placement != other.placement for other in (*known, *found)):
                verify(cluster, model, throughput, placement, flow, partial=True)
                found.append(Candidate(f"{c.name}, reordered", placement, flow))
    return found


def _serve_window(trial: Callable[..., Candidate], run: tuple[Candidate, Sequence[Arrival]]) -> Candidate:
    candidate, arrivals = run
    return trial(candidate, arrivals=arrivals)


def _refined(
    cluster: Cluster,
    model: ModelCard,
    throughput: Throughput,
    priced: Sequence[Candidate],
    trial: Callable[[Candidate], Candidate],
    pool: _Pool,
    tries: int,
    rng: np.random.Generator,
    max_hops: int | None,
) -> list[Candidate]:
    """The best candidates improved by simulation; nothing where that found nothing clearly better."""
    machine = {n.name: n.machine for n in cluster.nodes}

    def candidate(placement: Placement) -> Candidate:
        return Candidate(f"{priced[0].name}, refined", placement, solve_flow(cluster, model, throughput, placement))

    def simulated(placements: Sequence[Placement]) -> list[Tried]:
        tried = [candidate(p) for p in placements]
        if max_hops is not None:  # one that is too long serves nothing
            tried = [c if most_hops(c.flow) <= max_hops else replace(c, flow=Flow(0.0, {})) for c in tried]
        return [_tried(c) for c in pool.map(trial, tried)]

    def promise(placement: Placement) -> float:
        return layer_cover(
            placement, {n: throughput[machine[n]][end - start] for n, (start, end) in placement.items()}, model.layers
        )

    most = {n.name: max(throughput[n.machine]) for n in cluster.nodes}
    starts = [_tried(c) for c in priced[:REFINED]]
    best = refine(starts, most, model.layers, simulated, promise, tries, rng, pool.workers)
    return [trial(candidate(best.placement))] if best.rate > MARGIN * priced[0].decode_tokens_per_s else []


def _tried(candidate: Candidate) -> Tried:
    return Tried(candidate.placement, candidate.decode_tokens_per_s, candidate.busy)


class _Pool:
    """Simulations at once, each in a process of its own; with one worker in this one."""

    def __init__(self, workers: int):
        self.workers = workers
        self._executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers > 1 else None

    def map(self, function: Callable[[Any], Candidate], items: Sequence[Any]) -> list[Candidate]:
        return list((self._executor.map if self._executor else map)(function, items))

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._executor:
            self._executor.shutdown()
