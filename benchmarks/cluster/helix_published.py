"""The figures of Helix's own simulator (arXiv 2406.01566, artifact), asked of ours under its protocol.

Offline there, nothing waits: 20 requests begin, one every 0.1 s, and each prompt or request that ends brings one more while the expected use of the
scarcest layer's KV is at most 80 %. Lengths are drawn from the conversation trace. Online: that trace's arrivals at a given mean rate of tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.cluster.helix_cases import Case, published
from wager.cluster.helix.flow import solve_flow, stripped
from wager.cluster.helix.plan import node_models
from wager.cluster.helix.profile import Load, typical_throughput
from wager.cluster.helix.route import FlowRouter
from wager.simulate.native import simulate
from wager.simulate.nodes import BLOCK_TOKENS
from wager.simulate.pipeline import Flight, Simulator
from wager.simulate.timeline import Record, Timeline
from wager.simulate.trace import Arrival

FIRST, EVERY_S, FED_UP_TO = 20, 0.1, 0.8
WARM_UP_S, MEASURED_S, ONLINE_S = 60.0, 600.0, 1800.0
# decode tokens/s: offline, online, and the mean tokens/s that arrive online; several instances: pipelines of their own, rates added up
FIGURES = {
    "70B, 24 nodes, published placement": (("llama70b-single24",), 252.1, 141.6, (700.0,)),
    "30B, 24 nodes, published placements": (("llama30b-4xA100", "llama30b-8xL4", "llama30b-12xT4"), 339.6, 216.7, (600.0, 200.0, 170.0)),
}  # fmt: skip


class Fed(Simulator):
    """Brings a new request for each prompt or request that ends, while expected KV leaves room."""

    def __init__(self, router: FlowRouter, lengths: list[Arrival], rng: np.random.Generator, *args, **fields):
        self._lengths, self._rng, self._expected = lengths, rng, router
        super().__init__(*args, router=router, arrivals=[self._drawn(i * EVERY_S) for i in range(FIRST)], **fields)

    def _drawn(self, time_s: float) -> Arrival:
        one = self._lengths[int(self._rng.integers(len(self._lengths)))]
        return Arrival(time_s, one.prompt_tokens, one.output_tokens)

    def _returned(self, flights: list[Flight]) -> None:
        living = [f for f in flights if not f.dead]
        first = [not f.record.token_s for f in living]
        super()._returned(flights)
        for flight, was_first in zip(living, first, strict=True):
            if (was_first or flight.record.finished) and self._fullest_layer() <= FED_UP_TO:
                arrival = self._drawn(self.now_s + EVERY_S)
                record = Record(len(self.records), arrival.arrival_s, arrival.prompt_tokens, arrival.output_tokens)
                self.records.append(record)
                self._cached.append(0)
                self._at(record.arrival_s, self._arrive, record)

    def _fullest_layer(self) -> float:
        used_L, room_L = np.zeros(self.layers), np.zeros(self.layers)
        for name, live in self.nodes.items():
            m = live.model
            used_L[m.first : m.last] += self._expected.expected[name] / m.layers
            room_L[m.first : m.last] += m.kv_blocks * BLOCK_TOKENS
        return float((used_L / room_L).max())


def offline(case: Case, trace: list[Arrival]) -> Timeline:
    flow, placement = _flow(case)
    router = FlowRouter(flow, placement, Load().output_tokens, kv_high_water=0.85, output_ratio=1.0)
    nodes = node_models(case.cluster, case.card, case.profiles, placement)
    fed = Fed(
        router, trace, np.random.default_rng(0), nodes, case.cluster.link, case.card.layers, case.card.activation_bytes
    )
    return fed.run(WARM_UP_S + MEASURED_S)


def online(case: Case, trace: list[Arrival], tokens_per_s: float) -> Timeline:
    flow, placement = _flow(case)
    router = FlowRouter(flow, placement, Load().output_tokens, kv_high_water=0.9, output_ratio=0.6)
    nodes = node_models(case.cluster, case.card, case.profiles, placement)
    mean = float(np.mean([a.prompt_tokens + a.output_tokens for a in trace]))
    arrivals = Case.online(trace, tokens_per_s / mean, ONLINE_S)
    return simulate(nodes, case.cluster.link, case.card.layers, case.card.activation_bytes, router, arrivals, ONLINE_S)


def _flow(case: Case):
    throughput = typical_throughput(case.card, case.profiles, case.cluster.counts)
    flow = solve_flow(case.cluster, case.card, throughput, case.placement, case.partial)
    return flow, stripped(case.placement, flow)


def compared(data: Path, trace: list[Arrival]) -> list[dict]:
    rows = []
    for name, (instances, offline_rate, online_rate, arriving) in FIGURES.items():
        cases = [published(data, i) for i in instances]
        ours = sum(offline(c, trace).decode_tokens_per_s(WARM_UP_S) for c in cases)
        live = sum(online(c, trace, r).decode_tokens_per_s() for c, r in zip(cases, arriving, strict=True))
        for mode, theirs, mine in (("offline", offline_rate, ours), ("online", online_rate, live)):
            rows.append({"what": f"{name}, {mode}", "published": theirs, "ours": mine, "error": mine / theirs - 1})
    return rows
