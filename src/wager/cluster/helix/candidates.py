"""Placements worth simulating: the cover program under several hop limits and profiles, the program with links where these bind, the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from wager.cluster.helix import baselines, finals
from wager.cluster.helix.cover import Cover, solve_cover, window_counts
from wager.cluster.helix.flow import Flow, Placement, solve_flow, upper_bound, verify
from wager.cluster.helix.milp import solve_milp
from wager.cluster.helix.profile import Load, Throughput, placed_throughput
from wager.errors import UsageError, WagerError
from wager.hardware.cluster import Cluster
from wager.hardware.layer_cost import MachineProfile, ModelCard

AUTO = "auto"
METHODS = (AUTO, "cover", "milp", "swarm", "petals", "separate", "separate plus")
LEAST_HELD = (0.5, 0.7, 0.9)
ROUNDS = 4  # of making the profile consistent with the placement, and the placement the best under that profile
BINDING = 0.999  # links bind where the flow of the best cover is a smaller share of the cover
KEPT_LINKS = 6  # of a machine in the program with links, on clusters of more than twice as many machines


@dataclass(frozen=True)
class Candidate:
    """A placement with its flow under T(k) of a typical load, and what it served in simulation; `busy`: share of the time a machine worked.
    judged: what it served in the finals, None where it was not in them."""

    name: str
    placement: Placement
    flow: Flow
    decode_tokens_per_s: float = 0.0
    summary: Mapping[str, float] = field(default_factory=dict)
    busy: Mapping[str, float] = field(default_factory=dict)
    judged: finals.Judged | None = None


class Search:
    """Candidates so far, each verified and none twice; `bound` of the placement model, without links, is proven."""

    def __init__(self, cluster: Cluster, model: ModelCard, throughput: Throughput, time_limit_s: float):
        self.cluster, self.model, self.throughput, self.time_limit_s = cluster, model, throughput, time_limit_s
        self.found: list[Candidate] = []
        self.bound = upper_bound(cluster, throughput, model.layers)

    def consider(self, name: str, placement: Placement, judged_by: Throughput | None = None) -> None:
        judged_by = judged_by or self.throughput
        flow = solve_flow(self.cluster, self.model, judged_by, placement)
        if flow.value > 0 and all(placement != c.placement for c in self.found):
            verify(self.cluster, self.model, judged_by, placement, flow, partial=True)
            self.found.append(Candidate(name, placement, flow))

    def cover(self, limit: int | None, judged_by: Throughput) -> Cover | None:
        try:
            return solve_cover(self.cluster, judged_by, self.model.layers, limit, self.time_limit_s)
        except WagerError:
            return None  # too few hops for this cluster

    def covers(self, limit: int | None, profiles: Mapping[str, MachineProfile], load: Load) -> Cover | None:
        """The best cover under a typical load; then again under the profile of that placement, until placement and profile agree."""
        best = self.cover(limit, self.throughput)
        if best is None:
            return None
        name = "cover" if limit is None else f"cover, {limit} hops"
        self.consider(name, best.placement)
        windows = [window_counts(self.cluster, best.placement)]
        for _ in range(ROUNDS):
            consistent = placed_throughput(self.model, profiles, windows[-1], load)
            again = self.cover(limit, consistent)
            if again is None:
                break
            self.consider(f"{name}, consistent profile", again.placement, consistent)
            windows.append(window_counts(self.cluster, again.placement))
            if windows[-1] in windows[:-1]:  # agreed, or going round in a circle
                break
        return best

    def with_links(self, at_least: float, prune: int | None) -> None:
        """The paper's program. It starts from what is known: it must be better than that."""
        if prune is None and len(self.cluster.nodes) > 2 * KEPT_LINKS:
            prune = KEPT_LINKS
        try:
            found = solve_milp(
                self.cluster, self.model, self.throughput, True, prune, self.time_limit_s, at_least * (1 + 1e-6)
            )
        except WagerError:
            return  # nothing better in time
        self.consider("milp", found.placement)


def candidates(
    cluster: Cluster,
    model: ModelCard,
    profiles: Mapping[str, MachineProfile],
    throughput: Throughput,
    load: Load,
    hop_limits: Sequence[int],
    time_limit_s: float,
    rng: np.random.Generator,
    method: str = AUTO,
    prune: int | None = None,
) -> tuple[list[Candidate], float]:
    """Placements, and the proven bound of the placement model. method: those of one method only. prune: links a machine keeps in the program
    with links. Raises UsageError for an unknown method."""
    if method not in METHODS:
        raise UsageError(f"method {method!r} is unknown; use one of {', '.join(METHODS)}")
    search = Search(cluster, model, throughput, time_limit_s)
    best = None
    if method in (AUTO, "cover"):
        best = search.covers(None, profiles, load)
        if best is not None:
            search.bound = min(search.bound, best.bound)
        for limit in hop_limits:
            if limit < len(cluster.nodes):
                search.covers(limit, profiles, load)
        for share in LEAST_HELD:  # T(k) is of a typical load: of few layers a node it promises more than it keeps
            large = {m: {k: t for k, t in by_k.items() if k >= share * max(by_k)} for m, by_k in throughput.items()}
            held = search.cover(None, large)
            if held is not None:
                search.consider(f"cover, {share:.0%} of the layers a node can hold or more", held.placement)
    layers = model.layers
    others = {
        "swarm": lambda: baselines.swarm(cluster, throughput, layers),
        "petals": lambda: baselines.petals(cluster, throughput, layers, rng),
        "separate": lambda: baselines.separate(cluster, throughput, layers),
        "separate plus": lambda: baselines.separate(cluster, throughput, layers, mix_leftovers=True),
    }
    for name, make in others.items():
        if method not in (AUTO, name):
            continue
        try:
            search.consider(name, make())
        except WagerError:
            if method == name:
                raise
            continue  # this baseline has no placement here
    most = max((c.flow.value for c in search.found if "consistent" not in c.name), default=0.0)
    if method == "milp" or (method == AUTO and best is not None and most < BINDING * best.value):
        search.with_links(most, prune)
    return search.found, search.bound
