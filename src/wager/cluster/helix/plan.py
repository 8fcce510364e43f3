"""From a cluster and a load to a placement that serves best: candidates from the cover program under several hop limits and from the
baselines, profiles made consistent with each placement, the winner picked by simulation on requests set aside for it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from wager.cluster.helix import baselines
from wager.cluster.helix.cover import Cover, solve_cover, window_counts
from wager.cluster.helix.flow import Flow, Placement, layer_cover, solve_flow, stripped, upper_bound, verify
from wager.cluster.helix.profile import Load, Throughput, placed_throughput, typical_throughput
from wager.cluster.helix.refine import Tried, refine
from wager.cluster.helix.route import FlowRouter
from wager.errors import WagerError
from wager.hardware.cluster import Cluster
from wager.hardware.layer_cost import MachineProfile, ModelCard
from wager.simulate.native import simulate
from wager.simulate.nodes import NodeModel, copy_overhead_s
from wager.simulate.timeline import Timeline
from wager.simulate.trace import Arrival

MAX_PROMPT = 2048
LEAST_HELD = (0.5, 0.7, 0.9)
REFINED = 4  # candidates that refinement starts from
MARGIN = 1.02  # a refined placement must serve so much more: less is the luck of one run of requests


@dataclass(frozen=True)
class Candidate:
    """A placement with its flow under T(k) of a typical load, and what it served in simulation; `busy`: share of the time a machine worked."""

    name: str
    placement: Placement
    flow: Flow
    decode_tokens_per_s: float = 0.0
    summary: Mapping[str, float] = field(default_factory=dict)
    busy: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HelixPlan:
    """The winner first. `bound`: proven upper bound of the placement model; `gap`: of the best flow found, which need not be the winner's."""

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
) -> Timeline:
    """Serve `arrivals` on the placement. Arrivals at time 0 make the offline case: the router holds them back until KV is free."""
    placement = stripped(placement, flow)
    router = FlowRouter(flow, placement, load.output_tokens, selector, rng=rng)
    nodes = node_models(cluster, model, profiles, placement)
    return simulate(nodes, cluster.link, model.layers, model.activation_bytes, router, arrivals, until_s, keep_busy)


def candidates(
    cluster: Cluster,
    model: ModelCard,
    profiles: Mapping[str, MachineProfile],
    throughput: Throughput,
    load: Load,
    hop_limits: Sequence[int],
    time_limit_s: float,
    rng: np.random.Generator,
) -> tuple[list[Candidate], float]:
    """Placements worth simulating, and the proven bound of the placement model."""
    found: list[Candidate] = []
    bound = upper_bound(cluster, throughput, model.layers)

    def consider(name: str, placement: Placement, judged_by: Throughput = throughput) -> None:
        flow = solve_flow(cluster, model, judged_by, placement)
        if flow.value > 0 and all(placement != c.placement for c in found):
            verify(cluster, model, judged_by, placement, flow, partial=True)
            found.append(Candidate(name, placement, flow))

    def cover(limit: int | None, judged_by: Throughput) -> Cover | None:
        try:
            return solve_cover(cluster, judged_by, model.layers, limit, time_limit_s)
        except WagerError:
            return None  # too few hops for this cluster

    for limit in (None, *(h for h in hop_limits if h < len(cluster.nodes))):
        best = cover(limit, throughput)
        if best is None:
            continue
        name = "cover" if limit is None else f"cover, {limit} hops"
        bound = min(bound, best.bound) if limit is None else bound
        consider(name, best.placement)
        consistent = placed_throughput(model, profiles, window_counts(cluster, best.placement), load)
        again = cover(limit, consistent)
        if again is not None:
            consider(f"{name}, consistent profile", again.placement, consistent)
    for share in LEAST_HELD:  # T(k) is of a typical load: of few layers a node it promises more than it keeps
        large = {m: {k: t for k, t in by_k.items() if k >= share * max(by_k)} for m, by_k in throughput.items()}
        best = cover(None, large)
        if best is not None:
            consider(f"cover, {share:.0%} of the layers a node can hold or more", best.placement)
    others = {
        "swarm": lambda: baselines.swarm(cluster, throughput, model.layers),
        "petals": lambda: baselines.petals(cluster, throughput, model.layers, rng),
        "separate": lambda: baselines.separate(cluster, throughput, model.layers),
        "separate plus": lambda: baselines.separate(cluster, throughput, model.layers, mix_leftovers=True),
    }
    for name, make in others.items():
        try:
            consider(name, make())
        except WagerError:
            continue  # this baseline has no placement here
    return found, bound


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
) -> HelixPlan:
    """Propose, price by simulation, keep the best, and improve the best few by about `refine_tries` further simulations, `workers` at once.

    Simulate long enough: with all requests waiting, a long chain looks good while it fills. Raises WagerError when nothing can serve the
    model."""
    load = load or Load()
    throughput = typical_throughput(model, profiles, cluster.counts, load)
    found, bound = candidates(cluster, model, profiles, throughput, load, hop_limits, time_limit_s, rng)
    if not found:
        raise WagerError(
            f"no placement of {model.name} on these machines and links carries any tokens; add machines or links"
        )
    trial = partial(
        _serve, cluster, model, profiles, arrivals=arrivals, until_s=simulate_s, warm_up_s=warm_up_s, load=load
    )
    with _Pool(workers) as pool:
        priced = sorted(pool.map(trial, found), key=lambda c: -c.decode_tokens_per_s)
        if refine_tries:
            better = _refined(cluster, model, throughput, priced, trial, pool, refine_tries, rng)
            priced = sorted([*better, *priced], key=lambda c: -c.decode_tokens_per_s)
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


def _refined(
    cluster: Cluster,
    model: ModelCard,
    throughput: Throughput,
    priced: Sequence[Candidate],
    trial: Callable[[Candidate], Candidate],
    pool: _Pool,
    tries: int,
    rng: np.random.Generator,
) -> list[Candidate]:
    """The best candidates improved by simulation; nothing where that found nothing clearly better."""
    machine = {n.name: n.machine for n in cluster.nodes}

    def candidate(placement: Placement) -> Candidate:
        return Candidate(f"{priced[0].name}, refined", placement, solve_flow(cluster, model, throughput, placement))

    def simulated(placements: Sequence[Placement]) -> list[Tried]:
        return [_tried(c) for c in pool.map(trial, [candidate(p) for p in placements])]

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

    def map(self, function: Callable[[Candidate], Candidate], items: Sequence[Candidate]) -> list[Candidate]:
        return list((self._executor.map if self._executor else map)(function, items))

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._executor:
            self._executor.shutdown()
