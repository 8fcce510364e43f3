"""Outliers put into a graph: cliques (structural) and attributes copied from far away (contextual). New graphs; the given one is untouched."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from wager.detect.bond.graph import Graph
from wager.errors import UsageError

CONTEXTUAL, STRUCTURAL = 1, 2


def structural(
    graph: Graph, m: int, n: int, generator: torch.Generator, *, p: float = 0.0, directed: bool = False
) -> tuple[Graph, Tensor]:
    """n disjoint cliques of m random nodes each, a share p of the new edges left out. Returns the graph and the mask of the chosen nodes."""
    _check(graph, m, n)
    chosen = torch.randperm(graph.nodes, generator=generator)[: m * n]
    edges = (
        torch.cat([torch.combinations(group) for group in chosen.split(m)])
        if m * n
        else torch.zeros(0, 2, dtype=torch.long)
    )
    if p:
        edges = edges[torch.randperm(len(edges), generator=generator)[: int((1 - p) * len(edges))]]
    if not directed:
        edges = torch.cat([edges, edges.flip(1)])
    return _marked(replace(graph, edge_index=torch.cat([graph.edge_index, edges.T], 1)), chosen, STRUCTURAL)


def contextual(graph: Graph, n: int, k: int, generator: torch.Generator) -> tuple[Graph, Tensor]:
    """n random nodes take the attributes of the farthest of k random candidates, one after the other (a later one may copy a replaced row)."""
    if not 0 <= n <= graph.nodes or not 1 <= k <= graph.nodes:
        raise UsageError(f"cannot replace {n} nodes from {k} candidates in a graph of {graph.nodes} nodes")
    chosen = torch.randperm(graph.nodes, generator=generator)[:n]
    x = graph.x.clone()
    for node in chosen:
        candidates = torch.randperm(graph.nodes, generator=generator)[:k]
        x[node] = x[candidates[torch.cdist(x[node][None], x[candidates]).argmax()]]
    return _marked(replace(graph, x=x), chosen, CONTEXTUAL)


def inject(graph: Graph, m: int, n: int, k: int, seed: int) -> Graph:
    """Both kinds, drawn independently (they may overlap): m n contextual nodes from k candidates each, and n cliques of m."""
    generator = torch.Generator().manual_seed(seed)
    made, _ = contextual(replace(graph, y=None), m * n, k, generator)
    return structural(made, m, n, generator)[0]


def generated(
    nodes: int, seed: int, *, features: int = 64, degree: float = 5.0, m: int = 10, n: int = 1, k: int = 50
) -> Graph:
    """A graph of the scaling family: communities with attributes around their centres, mean degree `degree`, injected outliers."""
    generator = torch.Generator().manual_seed(seed)
    groups = max(2, nodes // 100)
    member = torch.randint(groups, (nodes,), generator=generator)
    centre = torch.randn(groups, features, generator=generator)
    x = centre[member] + torch.randn(nodes, features, generator=generator) * 0.5
    wanted = int(nodes * degree / 2)
    source = torch.randint(nodes, (wanted,), generator=generator)
    order = torch.argsort(member, stable=True)
    start = torch.searchsorted(member[order], torch.arange(groups + 1))
    size = (start[1:] - start[:-1])[member[source]]
    inside = order[start[member[source]] + (torch.rand(wanted, generator=generator) * size).long()]
    anywhere = torch.randint(nodes, (wanted,), generator=generator)
    target = torch.where(torch.rand(wanted, generator=generator) < 0.8, inside, anywhere)
    edges = torch.stack([source, target])[:, source != target]
    plain = Graph(x, edges).both_directions()
    return inject(plain, m, n, min(k, nodes), seed + 1)


def _check(graph: Graph, m: int, n: int) -> None:
    if m < 2 or n < 0 or m * n > graph.nodes:
        raise UsageError(
            f"cannot place {n} cliques of {m} in a graph of {graph.nodes} nodes; m must be at least 2 and m n at most the nodes"
        )


def _marked(graph: Graph, chosen: Tensor, bit: int) -> tuple[Graph, Tensor]:
    mask = torch.zeros(graph.nodes, dtype=torch.bool)
    mask[chosen] = True
    y = torch.zeros(graph.nodes, dtype=torch.long) if graph.y is None else graph.y.clone()
    y[mask] |= bit
    return replace(graph, y=y), mask
