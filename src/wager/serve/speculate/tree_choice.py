"""Which token tree to grow at which batch size: planned from measured times and counted acceptance, corrected by the steps themselves.

The profile that an engine measures when it starts says which tree should be fastest; the steps of real requests say which is. For each
batch size and number of guesses the median of the latest real steps is kept. The choice begins at the planned tree, tries its neighbours in
size for some steps, moves to the better one, and so on until both neighbours are worse.

Texts differ in how easily they are guessed more than anything else does. So requests fall into classes by how many of their latest guesses
were kept (`EASE`), and each class counts acceptance, by depth, and has trees of its own: deep ones for code that repeats itself, two or three
guesses for prose.
"""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from wager.serve.speculate.acceptance import AcceptanceCounter, DepthCounter
from wager.serve.speculate.hardware_profile import HardwareProfile
from wager.serve.speculate.tree_plan import GrowMap, plan_trees

FIRST_REPLAN, MAX_REPLAN = 64, 4096  # decisions between two plans
TRIES = 8  # measured steps that say what a tree takes
REMEMBERED = 25  # latest steps over a tree whose median counts
MOST_GIVEN = 4 * TRIES  # steps given to a neighbour at most, where they are not measured
SWITCH = 1.02  # how much faster a neighbour must be: less is what scatter makes of equal trees
EASE = (0.6, 0.8, 0.92)  # kept guesses of those decided, which part the classes
CENTRES = (0.45, 0.7, 0.86, 0.95)  # what is believed of a class at first
MEMORY = 0.93  # of what is known of a request, a step later
BELIEF = 6.0  # decisions that weigh as much as a request's own, of what is usual
FORGET = 512  # steps over one tree after which the others are tried anew: their times may have been bad luck


class Latest:
    """The median of the latest values: a hiccup of the machine says nothing about a tree."""

    def __init__(self):
        self.values: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def value(self) -> float:
        return sorted(self.values)[len(self.values) // 2]


@dataclass
class StepTimes:
    """Real steps of one batch size, by number of guesses. given: how often a tree of that size was grown."""

    of: dict[int, Latest] = field(default_factory=dict)
    given: dict[int, int] = field(default_factory=dict)

    def add(self, guesses: int, step_ms: float) -> None:
        self.of.setdefault(guesses, Latest()).values.append(step_ms)

    def known(self, tree: GrowMap) -> bool:
        seen = self.of.get(len(tree))
        return seen is not None and len(seen.values) >= TRIES

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


@dataclass
class Ease:
    """A request's decisions, the latest weighing most."""

    kept: float = 0.0
    decided: float = 0.0

    def add(self, kept: int, decided: int) -> None:
        self.kept, self.decided = MEMORY * self.kept + kept, MEMORY * self.decided + decided

    def share(self, usual: float) -> float:
        return (self.kept + BELIEF * usual) / (self.decided + BELIEF)


@dataclass
class Plans:
    """The best tree of each number of nodes, and after how many decisions they are planned anew."""

    trees: list[GrowMap]
    until: int
    chosen: int | None = None  # guesses


class TreeChoice:
    """A fixed tree, or one chosen for each batch size and class of requests; greedy and sampled requests have classes of their own.

    counters: of all greedy (True) or sampled (False) requests together.
    """

    def __init__(
        self, fixed: GrowMap | None, profile: HardwareProfile | None, max_size: int, max_depth: int, width: int
    ):
        assert fixed is not None or profile is not None
        self.fixed, self.profile = fixed, profile
        self.max_size, self.max_depth, self.width = max_size, max_depth, width
        self.counters = {greedy: AcceptanceCounter(width) for greedy in (False, True)}
        self.classes: dict[tuple[bool, int], DepthCounter] = {}
        self.times: dict[int, StepTimes] = {}
        self._ease: dict[str, tuple[bool, Ease]] = {}
        self._plans: dict[tuple[bool, int, int], Plans] = {}
        self._given: dict[int, list[int]] = {}  # by batch size, guesses of the trees of this step

    def timed(self, batch: int, step_ms: float) -> None:
        """A step over the trees given out last, without prompt tokens, took so long: as long as with trees of their mean size."""
        given = self._given.pop(batch, [])
        self._given.clear()
        if len(given) == batch:
            self._times(bucket(batch)).add(round(sum(given) / batch), step_ms)

    @property
    def max_nodes(self) -> int:
        return len(self.fixed) if self.fixed is not None else self.max_size - 1

    @property
    def deepest(self) -> int:
        return self.fixed.depth if self.fixed is not None else self.max_depth

    def decided(self, tree: GrowMap, greedy: bool, path: Sequence[int], request: str | None = None) -> None:
        """A tree was verified: count which child was accepted at each visited node, and that none was at the last."""
        counters = self.counters[greedy], self._class(greedy, self._class_of(greedy, request))
        row = decided = 0
        for depth, node in enumerate([*path, None]):
            children = tree.children[row]
            if children:
                accepted = None if node is None else children.index(node)
                counters[0].add(len(children), accepted)
                counters[1].add(depth, len(children), accepted)
                decided += 1
            row = 0 if node is None else node + 1
        if request is not None and decided:
            self._ease.setdefault(request, (greedy, Ease()))[1].add(len(path), decided)

    def forget(self, request: str) -> None:
        """The request has ended."""
        self._ease.pop(request, None)

    def tree(self, batch: int, greedy: bool, request: str | None = None) -> GrowMap:
        """What to grow for a request in a batch of this size."""
        if self.fixed is not None:
            return self.fixed
        tree, times = self._choose(batch, greedy, self._class_of(greedy, request)), self._times(bucket(batch))
        given = self._given.setdefault(batch, [])
        if not given:  # once a step
            times.grown(tree)
        given.append(len(tree))
        return tree

    def _class_of(self, greedy: bool, request: str | None) -> int:
        counter = self.counters[greedy]
        usual = float(counter.p.sum())
        known = None if request is None else self._ease.get(request)
        return bisect(EASE, usual if known is None else known[1].share(usual))

    def _class(self, greedy: bool, number: int) -> DepthCounter:
        key = greedy, number
        if key not in self.classes:
            rest = 1 - CENTRES[number]
            prior = (0.9 * CENTRES[number], *(rest * share for share in (0.3, 0.15, 0.08, 0.05, 0.03)))
            self.classes[key] = DepthCounter(self.width, self.max_depth, prior)
        return self.classes[key]

    def _times(self, size: int) -> StepTimes:
        return self.times.setdefault(size, StepTimes())

    def room(self, batch: int) -> int:
        """Nodes of the largest tree given out at this batch size, by the classes of the requests that there are. Asked as a step begins."""
        if self.fixed is not None:
            return len(self.fixed)
        self._given.clear()
        kinds = {(greedy, self._class_of(greedy, name)) for name, (greedy, _) in self._ease.items()}
        some = [greedy for greedy, counter in self.counters.items() if counter.decisions] or list(self.counters)
        kinds |= {(greedy, self._class_of(greedy, None)) for greedy in some}
        return max(len(self._choose(batch, greedy, number)) for greedy, number in kinds)

    def _choose(self, batch: int, greedy: bool, number: int) -> GrowMap:
        """The tree of most tokens per millisecond, or one to learn from. Whether to draft at all is the gate's to say."""
        size = bucket(batch)
        plans, times = self._planned(size, greedy, number), self._times(size)
        trees = plans.trees
        place = next((i for i, tree in enumerate(trees) if len(tree) == plans.chosen), None)
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
        plans.chosen = len(trees[place])
        return trees[place]

    def _planned(self, size: int, greedy: bool, number: int) -> Plans:
        """Planned anew when the class has made twice as many decisions, or MAX_REPLAN more."""
        assert self.profile is not None
        counter, known = self._class(greedy, number), self._plans.get((greedy, number, size))
        if known is not None and counter.decisions < known.until:
            return known
        trees = plan_trees(
            counter.p, self.profile, batch=size, max_size=self.max_size, max_depth=self.max_depth,
            max_branch=self.width,
        )  # fmt: skip
        until = counter.decisions + min(max(counter.decisions, FIRST_REPLAN), MAX_REPLAN)
        made = self._plans[greedy, number, size] = Plans(trees, until, None if known is None else known.chosen)
        return made


def bucket(batch: int) -> int:
    """Batch sizes share a plan up to the next power of two."""
    return 1 << max(batch - 1, 0).bit_length()
