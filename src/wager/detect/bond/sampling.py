"""Parts of a graph for mini-batches: some nodes and, hop by hop, at most so many of the neighbours they hear from.

A part's nodes begin with the batch; only these are scored. With all neighbours and as many hops as the network has layers, the network's output
for the batch is that of the whole graph, because degrees are taken from there. Source: GraphSAGE (arXiv 1706.02216).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from wager.detect.bond.graph import Graph
from wager.errors import UsageError


class Sampler:
    """Edges by target, so that a node's senders lie together."""

    def __init__(self, graph: Graph, limits: Sequence[int], generator: torch.Generator):
        if any(k == 0 or k < -1 for k in limits):
            raise UsageError(f"num_neigh is {list(limits)}; each is a number of neighbours, or -1 for all")
        self.graph, self.limits, self.generator = graph, tuple(limits), generator
        order = torch.argsort(graph.edge_index[1], stable=True)
        self.source_E = graph.edge_index[0][order]
        count_N = torch.bincount(graph.edge_index[1], minlength=graph.nodes)
        self.start_N = torch.cat([torch.zeros(1, dtype=torch.long), count_N.cumsum(0)])

    def batches(self, size: int) -> Iterator[Graph]:
        """Every node in one batch, in order; a last node that would stand alone joins the batch before."""
        n, start = self.graph.nodes, 0
        while start < n:
            stop = n if n - start <= size + 1 else start + size
            yield self.part(torch.arange(start, stop))
            start = stop

    def part(self, batch_B: Tensor) -> Graph:
        """The graph around a batch."""
        position_N = torch.full((self.graph.nodes,), -1)
        position_N[batch_B] = torch.arange(len(batch_B))
        ids, frontier, edges, known = [batch_B], batch_B, [], len(batch_B)
        for limit in self.limits:
            source, target = self.heard(frontier, limit)
            edges.append(torch.stack([source, target]))
            frontier = torch.unique(source[position_N[source] < 0])
            position_N[frontier] = torch.arange(known, known + len(frontier))
            known += len(frontier)
            ids.append(frontier)
        ids_P = torch.cat(ids)
        complete = all(limit == -1 for limit in self.limits)
        return Graph(
            self.graph.x[ids_P], position_N[torch.cat(edges, 1)], None, self.graph, ids_P, len(batch_B), complete
        )

    def heard(self, frontier_F: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Edges into the frontier: all, or at most `limit` drawn for each node."""
        count_F = self.start_N[frontier_F + 1] - self.start_N[frontier_F]
        owner = torch.repeat_interleave(torch.arange(len(frontier_F)), count_F)
        rank = torch.arange(len(owner)) - (count_F.cumsum(0) - count_F)[owner]
        at = self.start_N[frontier_F][owner] + rank
        if limit >= 0:
            key = torch.rand(len(owner), generator=self.generator, dtype=torch.float64)
            at, kept = at[torch.argsort(owner + key)], rank < limit
            at, owner = at[kept], owner[kept]
        return self.source_E[at], frontier_F[owner]
