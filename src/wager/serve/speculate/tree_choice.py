"""Which token tree to grow at which batch size: planned from measured times and counted acceptance, corrected by the steps themselves.

The profile that an engine measures when it starts says how times grow with the tree; the steps of real requests say what they are. For
each batch size and number of nodes a running average of real steps is kept. A tree never tried is priced by the profile times what real
steps of this batch size took beyond it, so a tree that turns out dearer than it was priced gives way to one that may be cheaper, until
the best of those that were tried is better than the rest could be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from wager.serve.speculate.acceptance import AcceptanceCounter
from wager.serve.speculate.gate import Average
from wager.serve.speculate.hardware_profile import HardwareProfile
from wager.serve.speculate.tree_plan import GrowMap, plan_trees

FIRST_REPLAN, MAX_REPLAN = 64, 4096  # decisions between two plans
BELIEF, MOST_BELIEF = 4, 64  # measured steps that weigh as much as the price; beyond the most they weigh no more
SWITCH = 1.03  # how much faster another tree must promise to be


@dataclass
class StepTimes:
    """Real steps of one batch size. over: their time over the price. of: by number of guesses."""

    over: Average = field(default_factory=Average)
    of: dict[int, Average] = field(default_factory=dict)

    def add(self, tree: GrowMap, step_ms: float) -> None:
        self.over.add_time(step_ms / tree.facts["cost_ms"])
        self.of.setdefault(len(tree), Average()).add_time(step_ms)

    def ms(self, tree: GrowMap) -> float:
        """What a step over this tree takes, as far as is known."""
        priced = tree.facts["cost_ms"] * (self.over.value if self.over.count else 1.0)
        seen = self.of.get(len(tree))
        if seen is None:
            return priced
        weight = min(seen.count, MOST_BELIEF)
        return (BELIEF * priced + weight * seen.value) / (BELIEF + weight)


class TreeChoice:
    """A fixed tree, or one chosen for each batch size; greedy and sampled requests have acceptance and trees of their own."""

    def __init__(
        self, fixed: GrowMap | None, profile: HardwareProfile | None, max_size: int, max_depth: int, width: int
    ):
        assert fixed is not None or profile is not None
        self.fixed, self.profile = fixed, profile
        self.max_size, self.max_depth, self.width = max_size, max_depth, width
        self.counters = {greedy: AcceptanceCounter(width) for greedy in (False, True)}
        self.times: dict[int, StepTimes] = {}
        self._plans: dict[tuple[bool, int], list[GrowMap]] = {}
        self._chosen: dict[tuple[bool, int], GrowMap] = {}
        self._next_plan = FIRST_REPLAN
        self._last: tuple[int, GrowMap] | None = None

    def timed(self, batch: int, step_ms: float) -> None:
        """A step over the tree given out last, without prompt tokens, took so long."""
        if self._last is None or self._last[0] != batch:
            return
        self.times.setdefault(bucket(batch), StepTimes()).add(self._last[1], step_ms)

    @property
    def max_nodes(self) -> int:
        return len(self.fixed) if self.fixed is not None else self.max_size - 1

    @property
    def deepest(self) -> int:
        return self.fixed.depth if self.fixed is not None else self.max_depth

    def decided(self, tree: GrowMap, greedy: bool, path: Sequence[int]) -> None:
        """A tree was verified: count which child was accepted at each visited node, and that none was at the last."""
        row = 0
        for node in [*path, None]:
            children = tree.children[row]
            if children:
                self.counters[greedy].add(len(children), None if node is None else children.index(node))
            row = 0 if node is None else node + 1

    def tree(self, batch: int, greedy: bool) -> GrowMap:
        """What to grow for a request in a batch of this size."""
        if self.fixed is not None:
            return self.fixed
        tree = self._choose(batch, greedy)
        self._last = (batch, tree)
        return tree

    def room(self, batch: int) -> int:
        """Nodes of the largest tree given out at this batch size; of the kinds of requests that there were, greedy or sampled."""
        if self.fixed is not None:
            return len(self.fixed)
        kinds = [greedy for greedy, counter in self.counters.items() if counter.decisions] or list(self.counters)
        return max(len(self._choose(batch, greedy)) for greedy in kinds)

    def _choose(self, batch: int, greedy: bool) -> GrowMap:
        """The tree of most tokens per millisecond. Whether to draft at all is the gate's to say."""
        size = bucket(batch)
        trees, times = self._planned(size, greedy), self.times.get(size, StepTimes())
        best = max(trees, key=lambda tree: tree.expected_tokens / times.ms(tree))
        now = self._chosen.get((greedy, size))
        now = next((tree for tree in trees if now is not None and len(tree) == len(now)), best)
        if best.expected_tokens / times.ms(best) > SWITCH * now.expected_tokens / times.ms(now):
            now = best
        self._chosen[greedy, size] = now
        return now

    def _planned(self, size: int, greedy: bool) -> list[GrowMap]:
        """The best tree of each number of nodes, planned anew as counts grow."""
        assert self.profile is not None
        decisions = sum(counter.decisions for counter in self.counters.values())
        if decisions >= self._next_plan:
            self._next_plan = decisions + min(self._next_plan, MAX_REPLAN)
            self._plans.clear()
        if (greedy, size) not in self._plans:
            self._plans[greedy, size] = plan_trees(
                self.counters[greedy].p.tolist(), self.profile, batch=size, max_size=self.max_size, max_depth=self.max_depth,
                max_branch=self.width,
            )  # fmt: skip
        return self._plans[greedy, size]


def bucket(batch: int) -> int:
    """Batch sizes share a plan up to the next power of two."""
    return 1 << max(batch - 1, 0).bit_length()
