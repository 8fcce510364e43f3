"""Per-request pipelines: every request walks the flow graph and gets its own path; its decode steps keep to it, for its KV lives there.

Each vertex spreads requests over its next machines in proportion to the flow (interleaved weighted round robin over tokens). A machine whose
expected KV is full is passed over; when no next machine is left the request waits. The other selectors are what Helix is compared with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from wager.cluster.helix.flow import Edge, Flow, Placement
from wager.errors import UsageError
from wager.hardware.cluster import SINK, SOURCE
from wager.simulate.nodes import BLOCK_TOKENS, NodeModel, Path, Stage

SELECTORS = ("maxflow", "swarm", "random", "queue")
NEGLIGIBLE = 0.05  # of a vertex's flow


class FlowRouter:
    """A simulator's Router, and the front of a deployed plan.

    kv_high_water: share of a machine's KV that expected use may fill. output_ratio: share of the average output that a request is expected
    to occupy over its life. max_prompt: tokens one batch of a machine takes at most.
    """

    def __init__(
        self,
        flow: Flow,
        placement: Placement,
        average_output: float,
        selector: str = "maxflow",
        kv_high_water: float = 0.85,
        output_ratio: float = 1.0,
        rng: np.random.Generator | None = None,
    ):
        if selector not in SELECTORS:
            raise UsageError(f"scheduler {selector!r} is unknown; use one of {', '.join(SELECTORS)}")
        if selector == "random" and rng is None:
            raise UsageError("the random scheduler needs a generator")
        self.placement, self.average_output, self.selector = placement, average_output, selector
        self.kv_high_water, self.output_ratio, self.rng = kv_high_water, output_ratio, rng
        self.edges = worthwhile(flow)
        self.load: dict[Edge, float] = defaultdict(float)
        self.expected: dict[str, float] = defaultdict(float)
        self._held: dict[int, list[tuple[str, float]]] = {}
        self._walks: dict[
            int, list[tuple[Edge, float]]
        ] = {}  # a request's edges, and the load that one token is on each
        self.nodes: Mapping[str, NodeModel] = {}

    def changed(self, nodes: Mapping[str, NodeModel]) -> None:
        self.nodes = nodes

    def route(self, request: Any, now_s: float, state: Any) -> Path | None:
        """A path from the source to the sink, or None when expected KV is full somewhere on every way."""
        tokens = request.prompt_tokens + len(request.token_s)
        expected_tokens = int(request.prompt_tokens + self.average_output * self.output_ratio)
        at, done = SOURCE, 0
        stages: list[Stage] = []
        walked: list[Edge] = []
        while at != SINK:
            choice = self._choose(at, tokens, expected_tokens, done, state)
            if choice is None:
                return None
            walked.append((at, choice))
            if choice != SINK:
                end = self.placement[choice][1]
                stages.append(Stage(choice, done, end))
                done = end
            at = choice
        walk = [(edge, 1 / self.edges[edge[0]][edge[1]]) for edge in walked]
        for edge, one in walk:
            self.load[edge] += tokens * one
        self._walks[request.index] = walk[:-1]  # nothing chooses between ways to the sink
        held = [(s.node, float(expected_tokens * (s.last - s.first))) for s in stages]
        for node, entries in held:
            self.expected[node] += entries
        self._held[request.index] = held
        return tuple(stages)

    def iterated(self, request: Any, path: Path, tokens: int) -> None:
        load = self.load
        for edge, one in self._walks[request.index]:
            load[edge] += tokens * one

    def ended(self, request: Any, path: Path) -> None:
        self._walks.pop(request.index, None)
        for node, entries in self._held.pop(request.index, ()):
            self.expected[node] -= entries

    def _choose(self, at: str, tokens: int, expected_tokens: int, done: int, state: Any) -> str | None:
        ways = {
            b: f for b, f in self.edges.get(at, {}).items() if b == SINK or self._has_room(b, expected_tokens, done)
        }
        if not ways:
            return None
        if self.selector == "random":
            assert self.rng is not None
            return list(ways)[int(self.rng.integers(len(ways)))]
        if self.selector == "queue":
            return min(ways, key=lambda b: (0 if b == SINK else waiting(state.nodes[b]), b))
        if self.selector == "swarm":
            return min(
                ways,
                key=lambda b: (
                    0.0 if b == SINK else mean_batch_s(state.nodes[b]) * (1 + waiting(state.nodes[b])),
                    self.load[at, b],
                ),
            )
        return min(ways, key=lambda b: (self.load[at, b] + tokens / ways[b], b))

    def _has_room(self, node: str, expected_tokens: int, done: int) -> bool:
        model = self.nodes.get(node)
        if model is None:
            return False
        layers = model.last - max(done, model.first)
        if layers <= 0:
            return False
        capacity = model.kv_blocks * BLOCK_TOKENS * model.layers
        return self.expected[node] + expected_tokens * layers <= self.kv_high_water * capacity


def worthwhile(flow: Flow) -> dict[str, dict[str, float]]:
    """vertex -> next vertex -> flow, without ways that carry a negligible share."""
    out: dict[str, dict[str, float]] = defaultdict(dict)
    for (a, b), f in flow.edges.items():
        out[a][b] = f
    kept = {a: {b: f for b, f in ways.items() if f >= NEGLIGIBLE * sum(ways.values())} for a, ways in out.items()}
    return kept


def waiting(live: Any) -> int:
    return len(live.queue) + (0 if live.batch is None else len(live.batch))


def mean_batch_s(live: Any) -> float:
    return live.busy_s / live.batches if live.batches else 0.0
