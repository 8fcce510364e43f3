"""Which nodes a request's token tree gets: those of a fixed tree, or those that pay, by the draft's own confidence.

Dynamic trees are grown level by level. What is learned is how often the k-th child of a node is accepted, by how sure the draft is there (the
probability of its most likely token); a node's score, its chance to be committed, is the product of these along its path. At each level

- a node gets its k-th child if the child's score is worth more than one more row of the target takes (`step_price.py`);
- the draft makes another pass if what its children are expected to bring, less their rows, is worth more than the pass.

So a sure draft grows a long chain, an unsure one gets a second and third child or stops, and every request of a batch, at every step,
gets what pays there. The requests of a batch share the price of a row and of a pass.

Why this stays exact with sampled children. At a node, the rule without replacement commits a token of the target's distribution given all that
was drawn before the node's own children, if the number of children was settled before they were drawn. Here it is a function of the draft's
distribution at the nodes of this level and of what was drawn at earlier levels, never of the children themselves, and no drawn child is taken
back. Which random numbers a node draws with is settled by how many nodes there are before it, and no number is used twice.

Texts differ in how easily they are guessed: requests fall into classes by how many of their latest guesses were kept (`EASE`), each with
counts of its own that lean on those of all.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from wager.serve.speculate.acceptance import AcceptanceCounter, ConfidenceCounter
from wager.serve.speculate.hardware_profile import HardwareProfile
from wager.serve.speculate.step_price import StepPrice
from wager.serve.speculate.tree_plan import GrowMap

EASE = (0.6, 0.8, 0.92)  # kept guesses of those decided, which part the classes
MEMORY = 0.93  # of what is known of a request, a step later
BELIEF = 6.0  # decisions that weigh as much as a request's own, of what is usual
LEAST_SCORE = 1e-3  # of a node, where rows cost nothing
SPARE = 4  # nodes beyond twice the usual that a request may get, so that trees can grow from step to step
SCARCER, LESS_SCARCE, SCARCEST = 1.2, 0.98, 0.5  # how a node's price follows, step by step, where max_size cuts trees


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
class Shape:
    """One request's tree while it grows. room: most nodes. depth: most levels. fixed: the tree to grow, if one was given.

    parents, scores, depths: of its nodes. confidence: of the draft at the nodes that were given children, -1 for the root.
    cut: there was no room for a node that would have paid.
    chances: of acceptance of a node's children, by confidence. usual: of the first one, whatever the confidence.
    """

    greedy: bool
    name: str
    room: int
    depth: int
    fixed: GrowMap | None = None
    parents: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    children: dict[int, list[int]] = field(default_factory=dict)
    confidence: dict[int, float] = field(default_factory=dict)
    cut: bool = False
    chances: Sequence[Sequence[float]] = ()
    usual: float = 0.0

    def score(self, node: int) -> float:
        return 1.0 if node < 0 else self.scores[node]

    def add(self, parent: int, values: Sequence[float]) -> list[int]:
        first, depth = len(self.parents), 1 if parent < 0 else self.depths[parent] + 1
        self.parents += [parent] * len(values)
        self.scores += values
        self.depths += [depth] * len(values)
        self.children[parent] = list(range(first, first + len(values)))
        return self.children[parent]


class TreeChoice:
    """Grows a fixed tree, or dynamic ones. counters: of all greedy (True) or sampled (False) requests together, by child."""

    def __init__(
        self, fixed: GrowMap | None, profile: HardwareProfile | None, max_size: int, max_depth: int, width: int
    ):
        assert fixed is not None or profile is not None
        self.fixed, self.profile = fixed, profile
        self.max_size, self.max_depth, self.width = max_size, max_depth, width
        self.counters = {greedy: AcceptanceCounter(width) for greedy in (False, True)}
        self.by_confidence = {greedy: ConfidenceCounter(width, len(EASE) + 1) for greedy in (False, True)}
        self.prices: dict[int, StepPrice] = {}
        self._ease: dict[str, Ease] = {}
        self._most: dict[int, float] = {}  # by batch size, nodes of the largest tree of a step: running average
        self._scarce = 0.0  # least score of a node, where max_size and not time is short
        self._step: Step | None = None  # put together last

    @property
    def max_nodes(self) -> int:
        return len(self.fixed) if self.fixed is not None else self.max_size - 1

    @property
    def deepest(self) -> int:
        return self.fixed.depth if self.fixed is not None else self.max_depth

    def room(self, batch: int) -> int:
        """Most nodes of a tree given out now at this batch size."""
        if self.fixed is not None:
            return len(self.fixed)
        return min(self.max_size - 1, round(2 * self._most.get(batch, SPARE)) + SPARE)

    def price(self, batch: int) -> StepPrice:
        assert self.profile is not None
        if batch not in self.prices:
            nearest = min(self.prices, key=lambda known: abs(known - batch), default=None)
            self.prices[batch] = StepPrice(self.profile, batch, None if nearest is None else self.prices[nearest])
        return self.prices[batch]

    def shape(self, greedy: bool, name: str, room: int, depth: int) -> Shape:
        """A tree to grow for a request."""
        if self.fixed is not None:
            fixed = self.fixed.shrunk(room, depth)
            return Shape(greedy, name, len(fixed), fixed.depth, fixed)
        shape = Shape(greedy, name, min(room, self.max_size - 1), min(depth, self.max_depth))
        number = self._class_of(greedy, name)
        shape.chances, shape.usual = self.by_confidence[greedy].chances(number)
        return shape

    def step(self, batch: int) -> Step:
        """The rows and passes of a step of so many requests, while their trees grow."""
        return Step(None if self.fixed is not None else self.price(batch), batch, self._scarce)

    def grown(self, step: Step, shapes: Sequence[Shape]) -> None:
        """The trees of a step are complete."""
        if step.price is None:
            return
        step.price.grown(step.rows, step.passes, step.batch + sum(sum(s.scores) for s in shapes))
        most, usual = max(len(s.parents) for s in shapes), self._most.get(step.batch, float(SPARE))
        self._most[step.batch] = most if most > usual else usual + 0.05 * (most - usual)
        self._scarce *= LESS_SCARCE
        if any(s.cut and s.room >= self.max_size - 1 for s in shapes):
            self._scarce = min(SCARCEST, max(SCARCER * self._scarce / LESS_SCARCE, 0.5 / self.max_size))
        self._step = step

    def timed(self, batch: int, step_ms: float) -> None:
        """The step put together last, without prompt tokens and with a tree for each of `batch` requests, took so long."""
        step, self._step = self._step, None
        if step is not None and step.price is not None and step.batch == batch:
            step.price.timed(step.rows, step.passes, step_ms)

    def decided(self, shape: Shape, path: Sequence[int]) -> None:
        """A tree was verified: count which child was accepted at each visited node, and that none was at the last."""
        number = self._class_of(shape.greedy, shape.name)
        node = -1
        decided = 0
        for accepted in [*path, None]:
            children = shape.children.get(node)
            if children:
                index = None if accepted is None else children.index(accepted)
                self.counters[shape.greedy].add(len(children), index)
                if shape.fixed is None:
                    self.by_confidence[shape.greedy].add(number, shape.confidence[node], len(children), index)
                decided += 1
            node = -1 if accepted is None else accepted
        if decided:
            self._ease.setdefault(shape.name, Ease()).add(len(path), decided)

    def forget(self, name: str) -> None:
        """The request has ended."""
        self._ease.pop(name, None)

    def _class_of(self, greedy: bool, name: str) -> int:
        usual, known = self.by_confidence[greedy].usual, self._ease.get(name)
        return bisect(EASE, usual if known is None else known.share(usual))


class Step:
    """What the trees of one step share: rows of the target and passes of the draft so far. Fixed trees have no price."""

    def __init__(self, price: StepPrice | None, batch: int, scarce: float):
        self.price, self.batch, self.scarce = price, batch, scarce
        self.rows, self.passes = batch, 1

    @property
    def row(self) -> float:
        """The score that pays for one more row."""
        assert self.price is not None
        rows = max(float(self.rows), self.price.rows)
        return max(self.price.rate * self.price.row_ms(rows), self.scarce, LEAST_SCORE)

    def widen(self, level: Sequence[tuple[Shape, int]], confidence: Sequence[float]) -> list[list[int]]:
        """Children for these nodes, whose distributions the draft has just computed; to be filled in this order."""
        if self.price is None:
            return [shape.add(node, [0.0] * len(_fixed(shape).children[node + 1])) for shape, node in level]
        least, added = self.row, []
        for (shape, node), sure in zip(level, confidence, strict=True):
            score, left = shape.score(node), shape.room - len(shape.parents)
            shape.confidence[node] = sure
            values = []
            for chance in shape.chances[_bin(sure)]:
                if score * chance < least and (node >= 0 or values):  # the root's first child is always tried
                    break
                values.append(score * chance)
            shape.cut |= len(values) > left
            added.append(shape.add(node, values[:left]))
            self.rows += len(added[-1])
        return added

    def deepen(self, fresh: Sequence[tuple[Shape, list[int]]]) -> list[tuple[Shape, int]]:
        """Which of the fresh nodes, children of the last level, the draft should go on from; none when a pass does not pay."""
        if self.price is None:
            return [(s, n) for s, nodes in fresh for n in nodes if _fixed(s).children[n + 1]]
        least, rate = self.row, self.price.rate
        worth = least + rate * self.price.per_drafted_row_ms
        found, gain = [], 0.0
        for shape, nodes in fresh:
            for node in nodes:
                if shape.depths[node] < shape.depth and (value := shape.scores[node] * shape.usual) > worth:
                    if len(shape.parents) >= shape.room:
                        shape.cut = True
                        break
                    found.append((shape, node))
                    gain += value - worth
        if gain <= rate * self.price.pass_ms:
            return []
        self.passes += 1
        return found


def _fixed(shape: Shape) -> GrowMap:
    assert shape.fixed is not None
    return shape.fixed


_bin = ConfidenceCounter.bin
