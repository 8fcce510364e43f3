"""Mirage's kernel level: pre-defined operators (library calls) beside custom kernels in one graph (arXiv 2405.05751, section 4).

A kernel graph grows operator by operator, depth first. An operator is a library call on whole tensors, or a custom kernel: a set of tensors, a
plan that cuts them, and a block graph on the tiles. Every value must be a subexpression of the target, as inside blocks. Canonical order: an
operator's rank is (its inputs, latest first; its place in the menu, custom kernels last; what tells apart two with these), and ranks grow along
a graph. What reads the newest value outranks all that does not, so every graph has exactly one such order. Graphs come out that mix both kinds;
those of custom kernels alone are `search` and `pairs`. A kernel's results lie as `pairs.closed` says. They are not yet verified.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from wager.compile.mirage.abstract import Algebra, Subexpressions, TooLarge, of_operator, of_program
from wager.compile.mirage.enumerate import Enumerator
from wager.compile.mirage.generate import Limits, Operator, Progress, Structure, menu
from wager.compile.mirage.pairs import closed
from wager.compile.mirage.plans import Labels, Plan, labelled_plans
from wager.compile.prism.mapping import Ties
from wager.compile.prism.search import saved_expressions
from wager.graph.operators import COMMUTATIVE, Shape, ShapeError, infer
from wager.graph.program import Attrs, BlockGraph, Builder, Node, Program, cut, pack

ARGUMENTS = 4  # most tensors that a custom kernel reads
MEMORY_BYTES = 1 << 32  # of all values of a kernel graph


@dataclass(frozen=True)
class Step:
    """A library operator, or a custom kernel (`block`), on earlier values by number."""

    op: str
    inputs: tuple[int, ...]
    attrs: Attrs = ()
    block: BlockGraph | None = None


@dataclass(frozen=True)
class Value:
    """A whole tensor: its abstract expression, its shape, and which index runs along each dimension."""

    expression: int
    shape: Shape
    labels: Labels


@dataclass(frozen=True)
class Prefix:
    """A kernel graph that may still grow. Values are the program's inputs, then what the steps compute."""

    steps: tuple[Step, ...]
    values: tuple[Value, ...]
    rank: tuple[Any, ...]
    loose: frozenset[int]

    @property
    def customs(self) -> int:
        return sum(s.block is not None for s in self.steps)

    def grown(self, step: Step, made: Sequence[Value], rank: tuple[Any, ...]) -> Prefix:
        new = range(len(self.values), len(self.values) + len(made))
        return Prefix((*self.steps, step), (*self.values, *made), rank, self.loose - set(step.inputs) | set(new))


def followed(node: Node, operands: Sequence[Labels]) -> Labels:
    """The labels of an operator's result."""
    rows = list(operands)
    if node.op == "matmul":
        rows = [(*rows[0][:-1], None), (*rows[1][:-2], None, rows[1][-1])]
    elif node.op in ("sum", "accum_sum", "accum_rms", "accum_width"):
        dim = node.get("dim", -1) % len(node.shape)
        rows = [(*rows[0][:dim], None, *rows[0][dim + 1 :])]
    found: list[Any] = [None] * len(node.shape)
    for row in rows:
        for d, label in enumerate(row, len(found) - len(row)):
            found[d] = found[d] or label
    return tuple(found)


class KernelLevel:
    """Mixed kernel graphs of one program. Searches share what the enumerator knows about expressions."""

    def __init__(
        self,
        program: Program,
        algebra: Algebra,
        targets: Subexpressions,
        limits: Limits,
        grids: Sequence[int],
        loops: Sequence[int],
        least_blocks: int,
    ):
        self.program, self.algebra, self.targets, self.limits = program, algebra, targets, limits
        self.sizes = (grids, loops, least_blocks)
        self.grid_dims = 3 if len(program.output_shapes[0]) > 2 else 2
        ties = Ties(Structure(len(program.input_positions), program.nodes, program.outputs))
        self.length: dict[Any, int] = {}
        expressions = of_program(algebra, program)
        rows = [tuple(ties.find((i, d)) for d in range(len(n.shape))) for i, n in enumerate(program.nodes)]
        for row, node in zip(rows, program.nodes, strict=True):
            self.length |= dict(zip(row, node.shape, strict=True))
        (out,) = program.outputs
        self.target, self.shape, self.written = expressions[out], program.nodes[out].shape, rows[out]
        values = tuple(
            Value(expressions[i], program.nodes[i].shape, self._whole(program.nodes[i].shape, rows[i]))
            for i in program.input_positions
        )
        self._opened: dict[tuple[Step, ...], Prefix] = {}
        self.start = Prefix((), values, ((), -1, ()), frozenset())
        some = [o for o in menu(program) if not o.accumulates]
        if any(o.op in ("sum", "matmul") for o in some) and self.shape[-1] > 1:  # adds up parts that lie side by side
            some.append(Operator("sum", pack({"dim": -1, "width": self.shape[-1]})))
        self.operators = list(dict.fromkeys(some))
        self.enumerator = Enumerator(algebra, targets, menu(program), limits)

    def _whole(self, shape: Shape, labels: Labels) -> Labels:
        """Without the labels of dimensions that are not as long as their index."""
        return tuple(
            label if size > 1 and self.length.get(label) == size else None
            for size, label in zip(shape, labels, strict=True)
        )

    # ── library operators ───────────────────────────────────────────────────────────────────────────────────────────────

    def left(self, prefix: Prefix) -> int:
        """How many library operators may be added."""
        return self.limits.max_library_ops - (len(prefix.steps) - prefix.customs)

    def openings(self, prefix: Prefix | None = None) -> Iterator[Prefix]:
        """Every prefix of library operators alone, the empty one first: what stands before the first custom kernel."""
        prefix = prefix or self.start
        yield prefix
        for longer in self.library(prefix, Progress()):
            yield from self.openings(longer)

    def library(self, prefix: Prefix, progress: Progress) -> Iterator[Prefix]:
        """The prefix with one more library operator."""
        if self.left(prefix) <= 0:
            return
        first = prefix.rank[0][0] if prefix.rank[0] else 0
        for high in range(first, len(prefix.values)):
            for inputs in [(high,), *((high, low) for low in range(high + 1)), *((low, high) for low in range(high))]:
                for at, operator in enumerate(self.operators):
                    fits = operator.binary == (len(inputs) == 2)
                    if not fits or (operator.op in COMMUTATIVE and inputs[0] < inputs[-1]):
                        continue
                    rank = (tuple(sorted(set(inputs), reverse=True)), at, inputs)
                    if rank > prefix.rank and (made := self._applied(operator, inputs, prefix, progress)) is not None:
                        yield prefix.grown(Step(operator.op, inputs, operator.attrs), [made], rank)

    def _applied(self, operator: Operator, inputs: tuple[int, ...], prefix: Prefix, progress: Progress) -> Value | None:
        """The result of a library operator; None when shapes do not fit, memory is short, or the target has no such part."""
        operands = [prefix.values[i] for i in inputs]
        shapes = [v.shape for v in operands]
        try:
            node = Node(operator.op, inputs, infer(operator.op, shapes, dict(operator.attrs)), operator.attrs)
            progress.states += 1
            value = of_operator(self.algebra, node, [v.expression for v in operands], shapes)
        except (ShapeError, TooLarge):
            return None
        if operator.op == "sum" and node.shape == shapes[0]:
            return None  # adds nothing up
        if self.limits.prune and value not in self.targets:
            progress.pruned += 1
            return None
        made = Value(value, node.shape, self._whole(node.shape, followed(node, [v.labels for v in operands])))
        return made if self._fits(prefix, [made]) else None

    @staticmethod
    def _fits(prefix: Prefix, made: Sequence[Value]) -> bool:
        return 4 * sum(math.prod(v.shape) for v in (*prefix.values, *made)) <= MEMORY_BYTES

    # ── custom kernels ──────────────────────────────────────────────────────────────────────────────────────────────────

    def arguments(self, prefix: Prefix) -> Iterator[tuple[int, ...]]:
        """The sets of values that one more custom kernel may read."""
        for size in range(1, ARGUMENTS + 1):
            for inputs in combinations(range(len(prefix.values)), size):
                if (inputs[::-1], len(self.operators)) >= prefix.rank[:2] and not self._stuck(prefix, inputs):
                    yield inputs

    def _stuck(self, prefix: Prefix, inputs: Sequence[int] = ()) -> bool:
        """Whether library operators alone must follow (after a kernel on `inputs`, if given) and cannot bring all loose values together."""
        unread = len(prefix.loose - set(inputs)) - (not inputs)
        return prefix.customs + bool(inputs) >= self.limits.max_kernels and unread > self.left(prefix)

    def last(self, prefix: Prefix) -> bool:
        """Whether a kernel added now ends the graph."""
        return self.left(prefix) <= 0 and prefix.customs + 1 >= self.limits.max_kernels

    def plans(self, prefix: Prefix, inputs: Sequence[int]) -> Iterator[Plan]:
        """How a kernel on these values may be cut; one that ends the graph writes parts of the program's output."""
        some = [prefix.values[i] for i in inputs]
        written = self.written if self.last(prefix) else None
        yield from labelled_plans(
            [v.shape for v in some], [v.labels for v in some], self.grid_dims, *self.sizes, written
        )

    def custom(self, prefix: Prefix, inputs: tuple[int, ...], plan: Plan, progress: Progress) -> Iterator[Prefix]:
        """The prefix with one more custom kernel on `inputs`, cut by `plan`."""
        grid, loop, imaps, fmaps = plan
        some = [prefix.values[i] for i in inputs]
        tiles = [cut(v.shape, (*m, f), (*grid, loop)) for v, m, f in zip(some, imaps, fmaps, strict=True)]
        whole, blocks, last = math.prod(self.shape), math.prod(grid), self.last(prefix)
        mixed = len(prefix.steps) > prefix.customs

        def accept(expressions: list[int], shapes: list[Shape]) -> bool:
            if expressions == [self.target]:
                return mixed and math.prod(shapes[0]) * blocks == whole
            return not last and self.target not in expressions

        self.enumerator.limits = self.limits
        outputs = 1 if last else self.limits.max_outputs
        given = [v.expression for v in some]
        for structure in self.enumerator.run(given, tiles, outputs, accept, progress, loop):
            block = closed(structure, [v.shape for v in some], plan)
            body = structure.nodes[structure.arguments :]
            if block is None or all(n.op == "accum" for n in body):  # a copy
                continue
            mark = (plan, tuple((n.op, n.inputs, str(n.attrs)) for n in body))
            rank = (inputs[::-1], len(self.operators), mark)
            made = self._results(structure, block, given, [v.labels for v in some], loop)
            if rank > prefix.rank and self._fits(prefix, made):
                yield prefix.grown(Step("kernel", inputs, (), block), made, rank)

    def _results(
        self, structure: Structure, block: BlockGraph, given: list[int], labels: list[Labels], loop: int
    ) -> list[Value]:
        rows = list(labels)
        for node in structure.nodes[structure.arguments :]:
            rows.append(followed(node, [rows[i] for i in node.inputs]))
        shapes = [block.output_shape(o) for o in block.outputs]
        values = zip(structure.saved, shapes, saved_expressions(self.algebra, structure, given, loop), strict=True)
        return [Value(e, shape, self._whole(shape, rows[s])) for s, shape, e in values]

    # ── whole graphs ────────────────────────────────────────────────────────────────────────────────────────────────────

    def opened(self, steps: Sequence[Step]) -> Prefix:
        """The prefix that consists of these library operators (one of `openings`)."""
        steps = tuple(steps)
        if not steps:
            return self.start
        if steps not in self._opened:
            longer = self.library(self.opened(steps[:-1]), Progress())
            self._opened[steps] = next(p for p in longer if p.steps == steps)
        return self._opened[steps]

    def graphs(self, prefix: Prefix, progress: Progress) -> Iterator[Program]:
        """Every mixed graph with the target's expression that begins with `prefix`, which holds a custom kernel."""
        if progress.look(self.limits):
            return
        if prefix.customs < len(prefix.steps) and len(prefix.loose) == 1:
            (only,) = prefix.loose
            value = prefix.values[only]
            if value.expression == self.target:
                if value.shape == self.shape:
                    yield self.program_of(prefix, only)
                return
        if self._stuck(prefix):
            return
        for longer in self.library(prefix, progress):
            yield from self.graphs(longer, progress)
        if prefix.customs < self.limits.max_kernels:
            for inputs in self.arguments(prefix):
                for plan in self.plans(prefix, inputs):
                    progress.mappings += 1
                    for longer in self.custom(prefix, inputs, plan, progress):
                        yield from self.graphs(longer, progress)

    def program_of(self, prefix: Prefix, out: int) -> Program:
        build = Builder()
        given = zip(self.program.input_shapes, self.program.input_names, strict=True)
        values = [build.input(shape, name) for shape, name in given]
        for step in prefix.steps:
            args = [values[i] for i in step.inputs]
            if step.block is not None:
                values += build.kernel(args, step.block)
            else:
                values.append(build.add(step.op, args, **dict(step.attrs)))
        return build.build(values[out])
