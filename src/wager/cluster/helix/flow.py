"""The worth of a placement: the max flow of tokens from the coordinator through machines that cover every layer, and back.

`solve_flow` returns the value and the flow on every edge; among flows of the same value it takes the one with fewest hops. `verify` checks a
placement and a flow in plain arithmetic, independent of any solver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wager.cluster.helix.profile import Throughput
from wager.errors import UsageError, WagerError
from wager.hardware.cluster import SINK, SOURCE, Cluster
from wager.hardware.layer_cost import ModelCard
from wager.solve import LinearModel, solve

Edge = tuple[str, str]
Placement = Mapping[str, tuple[int, int]]  # node -> layers [start, end); an absent node holds nothing
TOKEN_BYTES = 2


@dataclass(frozen=True)
class Flow:
    """`value` tokens/s; `edges` carry the flow, zero edges left out."""

    value: float
    edges: Mapping[Edge, float]

    @property
    def mean_hops(self) -> float:
        """Machines that a token meets on average."""
        inner = sum(f for (_, end), f in self.edges.items() if end != SINK)
        return inner / self.value if self.value else 0.0


def most_hops(flow: Flow) -> int:
    """Machines that a request meets at most, over the ways that carry flow."""
    ways: dict[str, list[str]] = {}
    for a, b in flow.edges:
        ways.setdefault(a, []).append(b)
    known: dict[str, int] = {SINK: -1}

    def hops(at: str) -> int:
        if at not in known:
            known[at] = 1 + max((hops(b) for b in ways.get(at, ())), default=-1)
        return known[at]

    return hops(SOURCE)


def next_hop(held: tuple[int, int], following: tuple[int, int], partial: bool) -> bool:
    """Whether a request may go from a machine that holds `held` to one that holds `following`. With partial inference the second
    runs only the layers after the first one's last."""
    if not partial:
        return following[0] == held[1]
    return following[0] <= held[1] < following[1]


def usable_edges(placement: Placement, layers: int, partial: bool) -> list[Edge]:
    edges = [(SOURCE, n) for n, (start, _) in placement.items() if start == 0]
    edges += [(n, SINK) for n, (_, end) in placement.items() if end == layers]
    return edges + [
        (a, b)
        for a, held in placement.items()
        for b, following in placement.items()
        if a != b and next_hop(held, following, partial)
    ]


def edge_capacity(cluster: Cluster, model: ModelCard, edge: Edge) -> float:
    """Tokens/s over a link; 0 where there is none."""
    link = cluster.link(*edge)
    if link is None:
        return 0.0
    return link.bytes_per_s / (TOKEN_BYTES if SOURCE in edge or SINK in edge else model.activation_bytes)


def node_capacity(cluster: Cluster, model: ModelCard, throughput: Throughput, node: str, layers: int) -> float:
    n = cluster.node(node)
    by_layers = throughput.get(n.machine, {})
    if layers not in by_layers:
        raise UsageError(
            f"node {node} ({n.machine}) cannot hold {layers} layers; it holds {min(by_layers, default=0)} to {max(by_layers, default=0)}"
        )
    return min(by_layers[layers], n.nic_bytes_per_s / model.activation_bytes)


def solve_flow(
    cluster: Cluster, model: ModelCard, throughput: Throughput, placement: Placement, partial: bool = True
) -> Flow:
    """Max flow by linear programming, then fewest hops at that value. Raises UsageError for layers a node cannot hold."""
    check_ranges(placement, model.layers)
    capacities = {n: node_capacity(cluster, model, throughput, n, e - s) for n, (s, e) in placement.items()}
    edges = [(e, edge_capacity(cluster, model, e)) for e in usable_edges(placement, model.layers, partial)]
    program = LinearModel(maximize=True)
    columns = {e: program.add("", 0, capacity, 1.0 if e[0] == SOURCE else 0.0) for e, capacity in edges if capacity > 0}
    into: dict[str, list[int]] = {n: [] for n in placement}
    out: dict[str, list[int]] = {n: [] for n in placement}
    for (a, b), column in columns.items():
        if a != SOURCE:
            out[a].append(column)
        if b != SINK:
            into[b].append(column)
    for n in placement:
        program.row([(c, 1.0) for c in into[n]] + [(c, -1.0) for c in out[n]], 0, 0)
        program.row([(c, 1.0) for c in into[n]], upper=capacities[n])
    best = solve(program)
    if not best.found or not best.value:
        return Flow(0.0, {})
    program.row([(c, 1.0) for e, c in columns.items() if e[0] == SOURCE], lower=best.value * (1 - 1e-9))
    program.maximize, program.objective = False, [1.0] * len(program.names)
    short = solve(program)
    x = short.x if short.x is not None else best.x
    assert x is not None
    flows = {e: float(x[c]) for e, c in columns.items() if x[c] > best.value * 1e-9}
    return Flow(sum(f for (a, _), f in flows.items() if a == SOURCE), flows)


def check_ranges(placement: Placement, layers: int) -> None:
    for node, (start, end) in placement.items():
        if not 0 <= start < end <= layers:
            raise UsageError(f"node {node} holds layers [{start}, {end}), but the model has layers [0, {layers})")


def verify(
    cluster: Cluster,
    model: ModelCard,
    throughput: Throughput,
    placement: Placement,
    flow: Flow,
    partial: bool,
    tolerance: float = 1e-6,
) -> None:
    """Raise WagerError naming the first constraint that the flow breaks."""
    check_ranges(placement, model.layers)
    slack = tolerance * max(1.0, flow.value)
    allowed = set(usable_edges(placement, model.layers, partial))
    balance: dict[str, float] = dict.fromkeys(placement, 0.0)
    inflow: dict[str, float] = dict.fromkeys(placement, 0.0)
    for (a, b), f in flow.edges.items():
        if (a, b) not in allowed:
            raise WagerError(f"the plan sends tokens from {a} to {b}, whose layers do not follow one another")
        if f < -slack or f > edge_capacity(cluster, model, (a, b)) + slack:
            raise WagerError(f"the plan sends {f:.1f} tokens/s from {a} to {b}, more than the link carries")
        if a != SOURCE:
            balance[a] -= f
        if b != SINK:
            balance[b] += f
            inflow[b] += f
    for n, (start, end) in placement.items():
        if abs(balance[n]) > slack:
            raise WagerError(f"node {n} gets and gives different flows (difference {balance[n]:.3f} tokens/s)")
        if inflow[n] > node_capacity(cluster, model, throughput, n, end - start) + slack:
            raise WagerError(
                f"node {n} gets {inflow[n]:.1f} tokens/s, more than it can compute with {end - start} layers"
            )
    arrives = sum(f for (a, _), f in flow.edges.items() if a == SOURCE)
    if abs(arrives - flow.value) > slack:
        raise WagerError(f"the plan claims {flow.value:.1f} tokens/s but {arrives:.1f} leave the coordinator")


def layer_cover(placement: Placement, capacity: Mapping[str, float], layers: int) -> float:
    """The least total capacity that any layer has: equal to the max flow when links do not bind and partial inference is on."""
    held = [0.0] * layers
    for node, (start, end) in placement.items():
        for l in range(start, end):
            held[l] += capacity[node]
    return min(held)


def upper_bound(cluster: Cluster, throughput: Throughput, layers: int) -> float:
    """No placement is better: all machines at their best layer-tokens/s, spread evenly over the layers."""
    return sum(max(k * t for k, t in throughput[n.machine].items()) for n in cluster.nodes) / layers


def stripped(placement: Placement, flow: Flow) -> dict[str, tuple[int, int]]:
    """The placement without machines that carry no flow."""
    alive = {n for edge in flow.edges for n in edge}
    return {n: held for n, held in placement.items() if n in alive}
