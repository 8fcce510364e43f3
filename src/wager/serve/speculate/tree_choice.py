"""Which token tree to grow at which batch size: planned from measured times and counted acceptance, corrected by the steps themselves.

The profile that an engine measures when it starts says which tree should be fastest; the steps of real requests say which is. For each
batch size and number of guesses a running average of real steps is kept. The choice begins at the planned tree, tries its neighbours in
size for some steps, moves to the better one, and so on until both neighbours are worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from wager.serve.speculate.acceptance import AcceptanceCounter
from wager.serve.speculate.gate import Average
from wager.serve.speculate.hardware_profile import HardwareProfile
from wager.serve.speculate.tree_plan import GrowMap, plan_trees

FIRST_REPLAN, MAX_REPLAN = 64, 4096  # decisions between two plans
TRIES = 8  # measured steps that say what a tree takes
MOST_GIVEN = 4 * TRIES  # steps given to a neighbour at most, where they are not measured
SWITCH = 1.05  # how much faster a neighbour must be: less may be the machine's mood while it was tried
FORGET = 512  # steps over one tree after which the others are tried anew: their times may have been bad luck


@dataclass
class StepTimes:
    """Real steps of one batch size, by number of guesses. given: how often a tree of that size was grown."""

    of: dict[int, Average] = field(default_factory=dict)
    given: dict[int, int] = field(default_factory=dict)

    def known(self, tree: GrowMap) -> bool:
        seen = self.of.get(len(tree))
        return seen is not None and seen.count >= TRIES

    def wanted(self, tree: GrowMap) -> bool:
        """Whether this tree should be tried to learn what it takes."""
        return not self.known(tree) and self.given.get(len(tree), 0) < MOST_GIVEN

    def grown(self, tree: GrowMap) -> None:
        self.given[len(tree)] = count = self.given.get(len(tree), 0) + 1
        if count % FORGET == 0:
            self.of = {size: times for size, times in self.of.items() if size == len(tree)}
            self.given = {len(tree): count}

    def rate(self, tree: GrowMap) -> float:
        """Tokens per millisecond."""
        return tree.expected_tokens / self.of[len(tree)].value


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
        self._chosen: dict[tuple[bool, int], int] = {}  # guesses
        self._next_plan = FIRST_REPLAN
        self._last: tuple[int, GrowMap] | None = None

    def timed(self, batch: int, step_ms: float) -> None:
        """A step over the tree given out last, without prompt tokens, took so long."""
        if self._last is None or self._last[0] != batch:
            return
        self._times(bucket(batch)).of.setdefault(len(self._last[1]), Average()).add_time(step_ms)

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
        tree, times = self._choose(batch, greedy), self._times(bucket(batch))
        times.grown(tree)
        self._last = (batch, tree)
        return tree

    def _times(self, size: int) -> StepTimes:
        return self.times.setdefault(size, StepTimes())

    def room(self, batch: int) -> int:
        """Nodes of the largest tree given out at this batch size; of the kinds of requests that there were, greedy or sampled."""
        if self.fixed is not None:
            return len(self.fixed)
        kinds = [greedy for greedy, counter in self.counters.items() if counter.decisions] or list(self.counters)
        return max(len(self._choose(batch, greedy)) for greedy in kinds)

    def _choose(self, batch: int, greedy: bool) -> GrowMap:
        """The tree of most tokens per millisecond, or one to learn from. Whether to draft at all is the gate's to say."""
        size = bucket(batch)
        trees, times = self._planned(size, greedy), self._times(size)
        guesses = self._chosen.get((greedy, size))
        place = next((i for i, tree in enumerate(trees) if len(tree) == guesses), None)
        if place is None:
            place = max(range(len(trees)), key=lambda i: trees[i].expected_speedup)
        if times.known(trees[place]):
            around = trees[max(0, place - 1) : place + 2]
            for tree in around:
                if times.wanted(tree):
                    return tree
            now = trees[place]
            best = max((tree for tree in around if times.known(tree)), key=times.rate)
            if times.rate(best) > SWITCH * times.rate(now):
                place = trees.index(best)
        self._chosen[greedy, size] = len(trees[place])
        return trees[place]

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
