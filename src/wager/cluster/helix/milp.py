"""The paper's own program: placement and flow together as one mixed-integer program, links included.

Exact where links bind (several sites), but its disabling constraints give weak bounds: start it after the layer cover, whose bound and value
it can be given. Search aids: `prune` keeps the fastest links of each machine only; `at_least` cuts off everything worse than a known placement.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from wager.cluster.helix.flow import Edge, edge_capacity, upper_bound
from wager.cluster.helix.profile import Throughput
from wager.errors import WagerError
from wager.hardware.cluster import SINK, SOURCE, Cluster
from wager.hardware.layer_cost import ModelCard
from wager.solve import LinearModel, solve


@dataclass(frozen=True)
class MilpPlacement:
    """`bound` is proven for the program as built (after pruning, for the pruned links)."""

    placement: dict[str, tuple[int, int]]
    value: float
    bound: float
    seconds: float
    status: str


def candidate_edges(cluster: Cluster, model: ModelCard, prune: int | None = None) -> dict[Edge, float]:
    """Edges with capacity in tokens/s. prune: per machine keep the links of the `prune` fastest neighbours; a link one side keeps stays."""
    names = [n.name for n in cluster.nodes]
    edges = {(SOURCE, n): edge_capacity(cluster, model, (SOURCE, n)) for n in names}
    edges |= {(n, SINK): edge_capacity(cluster, model, (n, SINK)) for n in names}
    inner = {(a, b): edge_capacity(cluster, model, (a, b)) for a in names for b in names if a != b}
    if prune is not None:
        kept: set[Edge] = set()
        for n in names:
            fastest = sorted((b for b in names if b != n), key=lambda b: (-inner[n, b], b))[:prune]
            kept |= {(n, b) for b in fastest} | {(b, n) for b in fastest}
        inner = {e: c for e, c in inner.items() if e in kept}
    return {e: c for e, c in (edges | inner).items() if c > 0}


def solve_milp(
    cluster: Cluster, model: ModelCard, throughput: Throughput, partial: bool = True, prune: int | None = None,
    time_limit_s: float = 60.0, at_least: float = 0.0,
) -> MilpPlacement:  # fmt: skip
    """Place layers and route flow in one program. Raises WagerError when nothing at least that good was found in time."""
    layers, program = model.layers, LinearModel(maximize=True)
    cap = upper_bound(cluster, throughput, layers)
    start, hold, end = {}, {}, {}
    for n in cluster.nodes:
        start[n.name] = program.add(f"start {n.name}", 0, layers - 1, integer=True)
        ks = [k for k in throughput[n.machine] if k <= layers]
        hold[n.name] = {k: program.binary(f"{n.name} holds {k}") for k in ks}
        program.row([(c, 1) for c in hold[n.name].values()], 1, 1)
        end[n.name] = [(start[n.name], 1.0), *((c, float(k)) for k, c in hold[n.name].items())]
        program.row(end[n.name], upper=layers)
    into, out = defaultdict(list), defaultdict(list)
    for edge, capacity in candidate_edges(cluster, model, prune).items():
        a, b = edge
        most = min(capacity, cap)
        flow = program.add(f"flow {a} {b}", 0, most, 1.0 if a == SOURCE else 0.0)
        usable = program.binary(f"use {a} {b}")
        program.row([(flow, 1), (usable, -most)], upper=0)
        into[b].append((flow, 1.0))
        out[a].append((flow, 1.0))
        _edge_rule(program, edge, usable, start, end, layers, partial)
    for n in cluster.nodes:
        program.row([*into[n.name], *((c, -1.0) for c, _ in out[n.name])], 0, 0)
        limits = [
            (c, -min(throughput[n.machine][k], n.nic_bytes_per_s / model.activation_bytes))
            for k, c in hold[n.name].items()
        ]
        program.row([*into[n.name], *limits], upper=0)
    program.row(out[SOURCE], lower=at_least, upper=cap)
    answer = solve(program, "highs", time_limit_s=time_limit_s)
    if answer.x is None or not answer.value:
        raise WagerError(
            f"the placement program found nothing of {at_least:.1f} tokens/s or more in {time_limit_s} s: {answer.status}"
        )
    x = answer.x
    placement = {
        n.name: (s := round(float(x[start[n.name]])), s + sum(k for k, c in hold[n.name].items() if x[c] > 0.5))
        for n in cluster.nodes
    }
    return MilpPlacement(placement, answer.value, min(answer.bound, cap), answer.seconds, answer.status)


def _edge_rule(
    program: LinearModel,
    edge: Edge,
    usable: int,
    start: dict[str, int],
    end: dict[str, list],
    layers: int,
    partial: bool,
) -> None:
    """Rows that forbid an edge whose machines' layers do not follow one another."""
    a, b = edge
    if a == SOURCE:
        program.row([(start[b], 1), (usable, layers)], upper=layers)
        return
    if b == SINK:
        program.row([(usable, layers), *((c, -v) for c, v in end[a])], upper=0)
        return
    minus_end = [(c, -v) for c, v in end[a]]
    if not partial:
        program.row([(usable, layers), (start[b], -1), *end[a]], upper=layers)
        program.row([(usable, layers), (start[b], 1), *minus_end], upper=layers)
        return
    # s_b <= e_a and e_a < e_b whenever the edge is usable
    program.row([(usable, layers), (start[b], 1), *minus_end], upper=layers)
    program.row([(usable, layers + 1), *end[a], *((c, -v) for c, v in end[b])], upper=layers)
