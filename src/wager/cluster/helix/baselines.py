"""Placements that others use, for comparison: Swarm, Petals, and a pipeline per kind of machine."""

from __future__ import annotations

import numpy as np

from wager.cluster.helix.profile import Throughput
from wager.errors import WagerError
from wager.hardware.cluster import Cluster, Node


def swarm(cluster: Cluster, throughput: Throughput, layers: int) -> dict[str, tuple[int, int]]:
    """Equal stages, as few as the smallest machine can hold; machines in order of speed go to the slowest stage so far."""
    smallest = min(max(throughput[n.machine]) for n in cluster.nodes)
    stages = -(-layers // smallest)
    if stages > len(cluster.nodes):
        raise WagerError(
            f"Swarm needs {stages} equal stages of {smallest} layers but there are {len(cluster.nodes)} machines"
        )
    cuts = [round(i * layers / stages) for i in range(stages + 1)]
    rates = [0.0] * stages
    placement = {}
    size = -(-layers // stages)
    for node in sorted(cluster.nodes, key=lambda n: -throughput[n.machine][size]):
        stage = int(np.argmin(rates))
        placement[node.name] = (cuts[stage], cuts[stage + 1])
        rates[stage] += throughput[node.machine][cuts[stage + 1] - cuts[stage]]
    return placement


def petals(
    cluster: Cluster, throughput: Throughput, layers: int, rng: np.random.Generator
) -> dict[str, tuple[int, int]]:
    """Machines in random order; each takes the window of its largest size whose sorted layer rates are the smallest."""
    rates = np.zeros(layers)
    placement = {}
    for i in rng.permutation(len(cluster.nodes)):
        node = cluster.nodes[int(i)]
        size = min(max(throughput[node.machine]), layers)
        start = min(range(layers - size + 1), key=lambda s: tuple(np.sort(rates[s : s + size])))
        placement[node.name] = (start, start + size)
        rates[start : start + size] += throughput[node.machine][size]
    return placement


def separate(
    cluster: Cluster, throughput: Throughput, layers: int, mix_leftovers: bool = False
) -> dict[str, tuple[int, int]]:
    """As many pipelines as each kind of machine can make alone; with mix_leftovers one more out of what is left over."""
    placement: dict[str, tuple[int, int]] = {}
    left: list[Node] = []
    for machine in sorted(cluster.counts):
        nodes = [n for n in cluster.nodes if n.machine == machine]
        length = -(-layers // max(throughput[machine]))
        pipelines = len(nodes) // length
        left += nodes[pipelines * length :]
        if pipelines:
            each = len(nodes) // pipelines
            left += (
                nodes[pipelines * each :]
                if each * pipelines < len(nodes) and pipelines * length != each * pipelines
                else []
            )
            for p in range(pipelines):
                group = nodes[p * each : (p + 1) * each]
                cuts = [round(i * layers / len(group)) for i in range(len(group) + 1)]
                placement |= {n.name: (cuts[i], cuts[i + 1]) for i, n in enumerate(group)}
    left = [n for n in left if n.name not in placement]
    if mix_leftovers and sum(max(throughput[n.machine]) for n in left) >= layers:
        placement |= mixed_pipeline(left, throughput, layers)
    if not placement:
        raise WagerError("no kind of machine can hold the model alone; separate pipelines do not exist here")
    return placement


def mixed_pipeline(nodes: list[Node], throughput: Throughput, layers: int) -> dict[str, tuple[int, int]]:
    """One pipeline with layers in proportion to what each machine holds at most."""
    room = [max(throughput[n.machine]) for n in nodes]
    share = [int(layers * r / sum(room)) for r in room]
    for i in sorted(range(len(nodes)), key=lambda i: -room[i]):
        share[i] += min(room[i] - share[i], layers - sum(share))
    placement, at = {}, 0
    for node, count in zip(nodes, share, strict=True):
        if count:
            placement[node.name] = (at, at + count)
            at += count
    return placement
