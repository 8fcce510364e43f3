"""Serves requests on an allocation in simulation: real arrivals that queue, one event per batch of a stage.

A request goes to a prefill replica and, with its KV, to a decode replica; both are chosen by weighted round robin over tokens/s. Batches are at most as
large as the objective allowed when the plan was made; what does not fit waits. Replicas belong to one model and phase, so the phases are simulated
one after the other, exactly: decoding begins when the KV has arrived.

Shared with the planner is the time of a batch (roofline, decoding at the mean context). Queues, bursts, lengths, unequal machines and KV that runs out
are the simulation's own. A transfer of KV has the link for itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wager.cluster.coral.decode import Decode, DecodeReplica, DecodeSimulation, DecodeStage, shared_seconds
from wager.cluster.coral.market import Allocation, Market
from wager.cluster.coral.rent import tables_of
from wager.cluster.coral.stage import Configuration, Demand, kv_tokens, stage_batch
from wager.cluster.coral.templates import Library, split
from wager.errors import UsageError
from wager.hardware.cluster import Link
from wager.hardware.layer_cost import Roofline
from wager.simulate.native import simulate
from wager.simulate.nodes import BLOCK_TOKENS, NodeModel, Path, Stage
from wager.simulate.timeline import Record, Timeline
from wager.simulate.trace import Arrival

LONGEST_TABLE = 4096  # tokens of a prefill batch; beyond it time grows as at the end
PLENTY = 1 << 30


@dataclass(frozen=True)
class Machine:
    """`tokens_per_s` is its weight in the round robin; `batch`: requests of a batch that is in time."""

    node: NodeModel
    tokens_per_s: float
    batch: int


@dataclass(frozen=True)
class Replica:
    """Machines of each stage, in order of layers."""

    tokens_per_s: float
    stages: tuple[tuple[Machine, ...], ...]


def replicas_of(
    plan: Allocation, libraries: Sequence[Library], market: Market, roofline: Roofline, link: Link
) -> dict[str, list[Replica]]:
    """demand name -> its replicas. Raises UsageError when a machine has no batch in time, which no plan of these libraries has."""
    found: dict[str, list[Replica]] = {lib.demand.name: [] for lib in libraries}
    tables = [tables_of(lib.demand, market.configurations, roofline, link) for lib in libraries]
    for (d, r, u), count in sorted(plan.running.items()):
        library = libraries[d]
        groups = split(library, u, tables[d])
        for n in range(count):
            name, at, built = f"{library.demand.name} {market.regions[r]} {u}.{n}", 0, []
            for s, (machines, layers, share) in enumerate(groups):
                built.append(tuple(
                    _machine(
                        f"{name} stage {s}.{i}", library.demand, market.configurations[c], at, at + layers, share, roofline, link,
                        float(market.price_RC[r, c]), float(tables[d](share)[c, layers]),
                    )
                    for i, c in enumerate(machines)
                ))  # fmt: skip
                at += layers
            found[library.demand.name].append(Replica(float(library.rates_U[u]), tuple(built)))
    return found


def _machine(
    name: str,
    demand: Demand,
    configuration: Configuration,
    first: int,
    last: int,
    share: float,
    roofline: Roofline,
    link: Link,
    usd_per_h: float,
    tokens_per_s: float,
) -> Machine:
    layers = last - first
    batch = stage_batch(demand, configuration, layers, share, roofline, link)
    if not batch:
        raise UsageError(f"{name}: {configuration.name} cannot serve {layers} layers of {demand.name} in time")
    prefill = demand.phase == "prefill"
    prompt_s, decode_s = _layer_tables(demand, configuration, roofline, batch)
    node = NodeModel(
        name, first, last, prompt_s, decode_s, kv_tokens(demand.model, configuration, layers) // BLOCK_TOKENS,
        PLENTY if prefill else 1, batch * demand.prompt_tokens if prefill else PLENTY, batch, 0.0, usd_per_h,
        configuration.name,
    )  # fmt: skip
    return Machine(node, tokens_per_s, batch)


def _layer_tables(
    demand: Demand, configuration: Configuration, roofline: Roofline, batch: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of one layer by prompt tokens and by decoding sequences; nothing takes no time."""
    args = demand.model, configuration.device, configuration.count
    longest = min(LONGEST_TABLE, max(2, batch * demand.prompt_tokens))
    decodes = batch if demand.phase == "decode" else 2
    return (
        (0.0, *(roofline.prompt_s(n, *args) for n in range(1, longest + 1))),
        (0.0, *(roofline.decode_s(n, demand.context_tokens, *args) for n in range(1, max(2, decodes) + 1))),
    )


class ReplicaRouter:
    """Weighted round robin over replicas, then over the machines of each stage."""

    def __init__(self, replicas: Sequence[Replica]):
        self.replicas = replicas
        self._load = [0.0] * len(replicas)
        self._machine_load: dict[str, float] = defaultdict(float)

    def changed(self, nodes: Mapping[str, NodeModel]) -> None:
        """Machines neither join nor leave here."""

    def iterated(self, request: Any, path: Path, tokens: int) -> None:
        """A request's share was counted when it came."""

    def ended(self, request: Any, path: Path) -> None:
        """Nothing is held."""

    def route(self, request: Any, now_s: float, state: Any) -> Path | None:
        size = float(request.prompt_tokens)
        i = min(range(len(self.replicas)), key=lambda i: self._load[i] + size / self.replicas[i].tokens_per_s)
        self._load[i] += size / self.replicas[i].tokens_per_s
        path = []
        for stage in self.replicas[i].stages:
            machine = min(stage, key=lambda m: self._machine_load[m.node.name] + size / m.tokens_per_s)
            self._machine_load[machine.node.name] += size / machine.tokens_per_s
            path.append(Stage(machine.node.name, machine.node.first, machine.node.last))
        return tuple(path)


def serve_model(
    prefill: Demand,
    prefilling: Sequence[Replica],
    decode: Demand,
    decoding: Sequence[Replica],
    link: Link,
    arrivals: Sequence[Arrival],
    until_s: float,
) -> Timeline:
    """One model's requests through both phases: a record's first token comes from prefill, the others from decoding."""
    model = prefill.model
    first = _prefilled(prefilling, link, prefill, arrivals, until_s)
    layers_kv = (
        max((m.node.layers for r in prefilling for s in r.stages for m in s), default=model.layers) * model.kv_bytes
    )
    decodes = [
        Decode(
            record.token_s[0] + link.latency_s + a.prompt_tokens * layers_kv / link.bytes_per_s,
            a.prompt_tokens,
            Record(i, record.token_s[0], 0, a.output_tokens - 1),
        )
        for i, (record, a) in enumerate(zip(first.records, arrivals, strict=True))
        if record.token_s and a.output_tokens > 1
    ]
    simulation = DecodeSimulation([decode_replica(r) for r in decoding], link, model.activation_bytes)
    simulation.run(decodes, until_s)
    later = simulation.timeline([d.record for d in decodes])
    records = [Record(i, a.arrival_s, a.prompt_tokens, a.output_tokens) for i, a in enumerate(arrivals)]
    for record, done in zip(records, first.records, strict=True):
        record.admitted_s, record.token_s = done.admitted_s, list(done.token_s)
    for done in later.records:
        records[done.index].token_s += done.token_s
    both = (first, later)
    return Timeline(
        records, until_s, first.busy | later.busy, first.node_busy_s | later.node_busy_s, first.node_up_s | later.node_up_s,
        first.kv_peak | later.kv_peak, sum(t.cost_usd for t in both), sum(t.events for t in both), sum(t.batches for t in both),
    )  # fmt: skip


def decode_replica(replica: Replica) -> DecodeReplica:
    """What the decode simulation needs to know of a replica."""
    return DecodeReplica(
        replica.tokens_per_s,
        tuple(
            DecodeStage(
                tuple(m.node.name for m in stage),
                shared_seconds([m.node.layers * np.array(m.node.decode_s[: m.batch + 1]) for m in stage]),
                sum(m.node.kv_blocks * BLOCK_TOKENS for m in stage),
            )
            for stage in replica.stages
        ),
        sum(m.node.usd_per_h for stage in replica.stages for m in stage),
    )


def _prefilled(
    replicas: Sequence[Replica], link: Link, demand: Demand, arrivals: Sequence[Arrival], until_s: float
) -> Timeline:
    """Every request's first token."""
    prompts = [Arrival(a.arrival_s, a.prompt_tokens, 1) for a in arrivals]
    nodes = [m.node for r in replicas for stage in r.stages for m in stage]
    if not nodes:
        records = [Record(i, a.arrival_s, a.prompt_tokens, 1) for i, a in enumerate(prompts)]
        return Timeline(records, until_s, {}, {}, {}, {}, 0.0, 0, 0)
    model = demand.model
    return simulate(
        nodes, lambda a, b: link, model.layers, model.activation_bytes, ReplicaRouter(replicas), prompts, until_s
    )


def serve_plan(
    plan: Allocation, libraries: Sequence[Library], market: Market, roofline: Roofline, link: Link,
    arrivals: Mapping[str, Sequence[Arrival]], until_s: float,
) -> dict[str, Timeline]:  # fmt: skip
    """model name -> its timeline. Every model needs a prefill and a decode demand. Raises UsageError naming one that lacks a phase."""
    replicas = replicas_of(plan, libraries, market, roofline, link)
    demands = {lib.demand.name: lib.demand for lib in libraries}
    served = {}
    for name, coming in arrivals.items():
        phases = [f"{name}/prefill", f"{name}/decode"]
        missing = [p for p in phases if p not in demands]
        if missing:
            raise UsageError(f"the plan has no demand {missing[0]}: requests of {name} cannot be served")
        one, two = phases
        served[name] = serve_model(demands[one], replicas[one], demands[two], replicas[two], link, coming, until_s)
    return served
