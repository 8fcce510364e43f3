"""The layer-cover formulation: choose how many machines of each kind hold which window of layers so that the worst-covered layer is best.

With partial inference and links that do not bind, a set of machines blocks all paths exactly if some layer is held by none of the others;
so the max flow of a placement is the least coverage of a layer. This program has no big constants and no symmetric machines, and CP-SAT
proves its optimum in seconds where the flow formulation has no useful bound in hours.

Tokens/s are scaled to whole numbers, rounded up: the bound stays a bound, and the value is recomputed from the unrounded numbers.
"""

from __future__ import annotations

import importlib.util
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from wager.cluster.helix.flow import Placement, layer_cover
from wager.cluster.helix.profile import Throughput
from wager.errors import UsageError, WagerError
from wager.hardware.cluster import Cluster
from wager.solve import LinearModel, Solution, solve

SCALE = 10


@dataclass(frozen=True)
class Cover:
    """A placement with its least layer coverage and the proven bound on that; `seconds` and `solver` that found it."""

    placement: dict[str, tuple[int, int]]
    value: float
    bound: float
    seconds: float
    solver: str
    status: str

    @property
    def gap(self) -> float:
        return max(0.0, self.bound - self.value) / self.bound if self.bound else 0.0


def solve_cover(
    cluster: Cluster,
    throughput: Throughput,
    layers: int,
    max_hops: int | None = None,
    time_limit_s: float = 60.0,
    workers: int = 1,
    method: str = "auto",
    tolerance: float = 1e-4,
) -> Cover:
    """The best cover: the best single chain, tested against a closed-form bound; where these differ, the program.

    max_hops: no path may meet more machines than this. method: cpsat, highs, or auto, which takes cpsat when OR-tools is installed; the
    answer says which. Raises WagerError when the cluster cannot hold the model (under max_hops) or nothing was found in time.
    """
    begun = time.perf_counter()
    if method == "auto":
        method = "cpsat" if importlib.util.find_spec("ortools") else "highs"
    counts = cluster.counts
    held = sum(counts[m] * max(throughput[m]) for m in counts)
    if held < layers:
        raise WagerError(f"the machines hold {held} layers together, the model has {layers}: add machines")
    chain, bound = best_chain(cluster, throughput, layers, max_hops), clipped_bound(counts, throughput, layers)
    value = _coverage(cluster, throughput, layers, chain) if chain else 0.0
    if chain and value >= bound * (1 - tolerance):
        return Cover(chain, value, bound, time.perf_counter() - begun, "chain and closed-form bound", "optimal")
    program, windows = build(counts, throughput, layers, max_hops)
    answer = solve(program, method, time_limit_s=time_limit_s, workers=workers)
    if answer.status == "infeasible" or (answer.status == "optimal" and not answer.value):
        raise WagerError(f"no placement of at most {max_hops} hops covers the model; allow more hops or add machines")
    found = _placement(answer, windows, cluster)
    ours = _coverage(cluster, throughput, layers, found) if found else 0.0
    placement, value = (found, ours) if ours > value else (chain, value)
    if not placement or value <= 0:
        raise WagerError("no placement was found in time; allow more time or hops")
    bound = max(value, min(bound, answer.bound / SCALE))
    proven = bound - value <= max(tolerance * bound, len(cluster.nodes) / SCALE)
    return Cover(placement, value, bound, time.perf_counter() - begun, method, "optimal" if proven else "feasible")


def best_chain(
    cluster: Cluster, throughput: Throughput, layers: int, max_hops: int | None = None
) -> dict[str, tuple[int, int]] | None:
    """The single pipeline with the highest bottleneck: try every rate, let each machine hold as many layers as it can at that rate."""
    for rate in sorted({t for n in cluster.nodes for t in throughput[n.machine].values()}, reverse=True):
        room = {m: max((k for k, t in throughput[m].items() if t >= rate), default=0) for m in cluster.counts}
        able = sorted((n for n in cluster.nodes if room[n.machine]), key=lambda n: -room[n.machine])[:max_hops]
        if sum(room[n.machine] for n in able) < layers:
            continue
        placement, at = {}, 0
        for node in able:
            # fewer layers than the most may be slower where T is not monotone: take the most that fits and is fast enough
            fits = [k for k, t in throughput[node.machine].items() if t >= rate and k <= layers - at]
            if fits:
                placement[node.name] = (at, at + max(fits))
                at += max(fits)
        if at == layers:
            return placement
    return None


def clipped_bound(counts: Mapping[str, int], throughput: Throughput, layers: int) -> float:
    """No cover exceeds this rate F: a machine adds at most max_k k min(T(k), F) layer-tokens/s towards the layers * F that are needed."""

    def enough(rate: float) -> bool:
        given = sum(n * max(k * min(t, rate) for k, t in throughput[m].items()) for m, n in counts.items())
        return given >= layers * rate * (1 - 1e-12)

    low, high = 0.0, sum(n * max(k * t for k, t in throughput[m].items()) for m, n in counts.items()) / layers
    if enough(high):
        return high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return high


def _coverage(cluster: Cluster, throughput: Throughput, layers: int, placement: Placement) -> float:
    machine = {n.name: n.machine for n in cluster.nodes}
    return layer_cover(placement, {n: throughput[machine[n]][e - s] for n, (s, e) in placement.items()}, layers)


Windows = dict[tuple[str, int, int], int]  # (machine, start, layers) -> column


def build(
    counts: Mapping[str, int], throughput: Throughput, layers: int, max_hops: int | None
) -> tuple[LinearModel, Windows]:
    program = LinearModel(maximize=True)
    # a loose upper bound on purpose: CP-SAT proves these programs much faster with it than with a tight one
    ceiling = 1 + sum(n * max(int(np.ceil(t * SCALE)) for t in throughput[m].values()) for m, n in counts.items())
    value = program.add("value", 0, ceiling, 1.0, integer=True)
    windows: Windows = {}
    covering: list[list[tuple[int, float]]] = [[] for _ in range(layers)]
    ending: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for machine, count in counts.items():
        own = []
        for k, tokens_per_s in throughput[machine].items():
            if k > layers:
                continue
            scaled = int(np.ceil(tokens_per_s * SCALE))
            for start in range(layers - k + 1):
                column = windows[machine, start, k] = program.add(f"{machine}[{start}+{k}]", 0, count, integer=True)
                own.append((column, 1.0))
                ending[start + k].append((column, 1.0))
                for l in range(start, start + k):
                    covering[l].append((column, scaled))
        program.row(own, upper=count, name=f"{machine} machines")
    for l, terms in enumerate(covering):
        program.row([(value, 1.0), *((c, -t) for c, t in terms)], upper=0, name=f"layer {l}")
    if max_hops is not None:
        _cap_hops(program, ending, sum(counts.values()), max_hops)
    return program, windows


def _cap_hops(
    program: LinearModel, ending: Mapping[int, list[tuple[int, float]]], machines: int, max_hops: int
) -> None:
    """Every hop ends at a later layer than the one before, so a path is no longer than there are different ends."""
    if max_hops < 1:
        raise UsageError(f"max_hops={max_hops}: a path meets at least one machine")
    used = []
    for end, terms in ending.items():
        flag = program.binary(f"end at {end}")
        program.row([*terms, (flag, -float(machines))], upper=0)
        used.append((flag, 1.0))
    program.row(used, upper=max_hops, name="hops")


def _placement(answer: Solution, windows: Windows, cluster: Cluster) -> dict[str, tuple[int, int]]:
    """Give the chosen windows to machines of their kind; empty when the solver found nothing."""
    placement: dict[str, tuple[int, int]] = {}
    if answer.x is None:
        return placement
    spare = defaultdict(list)
    for node in reversed(cluster.nodes):
        spare[node.machine].append(node.name)
    for (machine, start, k), column in windows.items():
        for _ in range(round(float(answer.x[column]))):
            placement[spare[machine].pop()] = (start, start + k)
    return placement


def window_counts(cluster: Cluster, placement: Placement) -> dict[str, Counter[int]]:
    """machine -> layers held -> how many machines; every kind of machine is there, also one that holds nothing."""
    held: dict[str, Counter[int]] = {machine: Counter() for machine in cluster.counts}
    machines = {n.name: n.machine for n in cluster.nodes}
    for node, (start, end) in placement.items():
        held[machines[node]][end - start] += 1
    return held
