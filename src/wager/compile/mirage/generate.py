"""Enumerates block graphs: depth first, in canonical order, each prefix kept only if it can still become the target.

Shared by Mirage and Prism. In concrete mode a prefix has the tile shapes of one grid, loop range and set of maps. In symbolic mode all parallel
sizes are 1: tiles are whole tensors, and mappings and sizes are decided afterwards. Canonical order: an operator's rank is (its inputs'
positions, latest first, its place in the menu), and ranks grow along a graph. An operator that reads the newest tensor outranks all that do
not, so every graph has exactly one such order: it is produced, and produced once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from wager.compile.mirage.abstract import Algebra, Subexpressions, TooLarge, of_operator
from wager.graph.operators import BINARY, COMMUTATIVE, Shape, ShapeError, infer
from wager.graph.program import Attrs, Node, Program, pack

Rank = tuple[int, int, tuple[int, ...], int]


@dataclass(frozen=True)
class Operator:
    """An entry of the menu."""

    op: str
    attrs: Attrs = ()

    @property
    def binary(self) -> bool:
        return self.op in BINARY or self.op == "matmul"

    @property
    def accumulates(self) -> bool:
        return self.op.startswith("accum")


@dataclass(frozen=True)
class Limits:
    """`max_block_ops` counts input iterators, operators and output savers of one block graph.

    `max_library_ops`: pre-defined operators that a kernel graph may hold beside `max_kernels` custom kernels (concrete search).
    `prune` keeps a prefix only where it can become the target; `pruning` says how that is decided: "normal form" or "e-graph".
    """

    max_block_ops: int = 9
    max_outputs: int = 2
    max_kernels: int = 1
    max_library_ops: int = 0
    budget_s: float = 60.0
    prune: bool = True
    pruning: str = "normal form"
    max_states: int = 1_000_000_000


@dataclass
class Progress:
    """Counters of a search; `limit` names the bound that stopped it."""

    states: int = 0
    pruned: int = 0
    structures: int = 0
    mappings: int = 0
    verified: int = 0
    timed: int = 0
    limit: str = ""
    started: float = field(default_factory=time.perf_counter)
    listener: Callable[[Progress], None] | None = None

    def over(self, limits: Limits) -> bool:
        """`look`, but only now and then."""
        return self.look(limits) if self.states % 1024 == 0 or self.limit else False

    def look(self, limits: Limits) -> bool:
        """Tells the listener, and says whether a limit was hit."""
        if self.listener:
            self.listener(self)
        if time.perf_counter() - self.started > limits.budget_s:
            self.limit = f"time budget of {limits.budget_s} s"
        elif self.states >= limits.max_states:
            self.limit = f"{limits.max_states} states"
        return bool(self.limit)


@dataclass(frozen=True)
class Structure:
    """A block graph without maps: nodes over `arguments` inputs; `saved` are the positions whose values leave the block."""

    arguments: int
    nodes: tuple[Node, ...]
    saved: tuple[int, ...]


def menu(program: Program, width: int = 0) -> list[Operator]:
    """The operators that a rewriting of `program` may use: its own, and the accumulators that its sums and norms allow."""
    found: dict[Operator, None] = {}
    ops = {n.op for n in program.nodes}
    found[Operator("accum")] = None
    if "sum" in ops or "softmax" in ops:
        found[Operator("accum_sum")] = None
        if width:
            found[Operator("accum_width", pack({"width": width}))] = None
    if "rms_norm" in ops:
        found[Operator("accum_rms")] = None
        found[Operator("div")] = None
    for node in program.nodes:
        if node.op in ("input", "const", "permute", "reshape", "kernel", "result"):
            continue
        attrs = pack({"dim": -1, "width": 1}) if node.op == "sum" else node.attrs
        found[Operator(node.op, attrs)] = None
    return list(found)


class BlockSearch:
    """The depth-first search over one block graph. `complete(structure)` is called for every graph whose loose ends can leave the block."""

    def __init__(
        self,
        algebra: Algebra,
        targets: Subexpressions,
        operators: Sequence[Operator],
        limits: Limits,
        progress: Progress,
        loop: int = 1,
    ):
        self.algebra, self.targets, self.operators = algebra, targets, operators
        self.limits, self.progress, self.loop = limits, progress, loop
        self.reductions = sum(o.op in ("matmul",) for o in operators)

    def run(
        self,
        expressions: Sequence[int],
        tiles: Sequence[Shape],
        outputs: int,
        accept: Callable[[list[int], list[Shape]], bool],
    ) -> Iterator[Structure]:
        """Structures whose saved values are accepted by `accept(expressions, shapes)`."""
        self.nodes = [Node("input", (), tile, (("arg", i),)) for i, tile in enumerate(tiles)]
        self.expr, self.shape = list(expressions), list(tiles)
        self.after, self.uses = [False] * len(tiles), [0] * len(tiles)
        self.outputs, self.accept, self.count = outputs, accept, len(tiles)
        yield from self._extend((-1, -1, (), -1))

    def _extend(self, last: Rank) -> Iterator[Structure]:
        if self.progress.over(self.limits):
            return
        loose = [i for i, u in enumerate(self.uses) if u == 0]
        closed = len(self.nodes) > self.count and len(loose) <= self.outputs and all(self.after[i] for i in loose)
        if closed and self.accept([self.expr[i] for i in loose], [self.shape[i] for i in loose]):
            self.progress.structures += 1
            yield Structure(self.count, tuple(self.nodes), tuple(loose))
        room = self.limits.max_block_ops - len(self.nodes) - 1
        if room <= 0 or len(loose) - self.outputs > room:
            return
        if room < max(len(loose) - self.outputs, 0) + (0 if all(self.after[i] for i in loose) else 1):
            return
        for high in range(max(last[0], 0), len(self.nodes)):
            for inputs in self._input_sets(high):
                for at, operator in enumerate(self.operators):
                    rank = (high, inputs[-1] if inputs[0] == high else inputs[0], inputs, at)
                    if operator.binary == (len(inputs) == 2) and rank > last and self._push(operator, inputs):
                        yield from self._extend(rank)
                        self._pop()

    @staticmethod
    def _input_sets(high: int) -> Iterator[tuple[int, ...]]:
        """Input tuples whose latest position is `high`."""
        yield (high,)
        for low in range(high + 1):
            yield (high, low)
            if low != high:
                yield (low, high)

    def _push(self, operator: Operator, inputs: tuple[int, ...]) -> bool:
        op = operator.op
        if len(inputs) == 2 and op in COMMUTATIVE and inputs[0] < inputs[1]:
            return False
        flags = [self.after[i] for i in inputs]
        if flags[0] != flags[-1] or (operator.accumulates and flags[0]):
            return False
        shapes = [self.shape[i] for i in inputs]
        try:
            shape = infer(op, shapes, dict(operator.attrs))
        except ShapeError:
            return False
        self.progress.states += 1
        node = Node(op, inputs, shape, operator.attrs)
        try:
            value = of_operator(self.algebra, node, [self.expr[i] for i in inputs], shapes, self.loop)
        except TooLarge:
            return False
        if self.limits.prune and value not in self.targets:
            self.progress.pruned += 1
            return False
        self.nodes.append(node)
        self.expr.append(value)
        self.shape.append(shape)
        self.after.append(flags[0] or operator.accumulates)
        self.uses.append(0)
        for i in inputs:
            self.uses[i] += 1
        return True

    def _pop(self) -> None:
        node = self.nodes.pop()
        self.expr.pop()
        self.shape.pop()
        self.after.pop()
        self.uses.pop()
        for i in node.inputs:
            self.uses[i] -= 1
