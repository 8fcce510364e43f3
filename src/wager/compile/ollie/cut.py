"""Cuts a whole graph into subprograms and writes each as an index expression (OLLIE, arXiv 2208.02025).

A graph is cut behind every non-linear operator and behind every operator with three or more neighbours that is no contraction; what stays connected is one subprogram. Inside a subprogram every contraction (a product, or a sum of elementwise products) takes the re-indexing
and elementwise operators before it and the re-indexing behind it: that is one expression to derive. Padding is written as padding of the tensor
that is read, where nothing but permutations and unit dimensions lie between; elsewhere it ends the expression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from wager.compile.ollie.rules import pad_for
from wager.graph.expression import Body, Call, Loop, Read, Scope, Tensor, map_reads
from wager.graph.index import Affine, Div, Mod, floordiv, it, remainder
from wager.graph.program import Node, Program

REINDEXING = frozenset(("reshape", "permute", "expand", "pad", "slice", "unfold"))
LINEAR = REINDEXING | {"matmul", "conv", "add", "sub", "mul", "sum", "neg", "scale", "concat", "result"}
CROWDED = 3  # neighbours


class NotLifted(Exception):
    """An operator that ends the expression here."""


def neighbours(program: Program) -> tuple[list[list[int]], list[int]]:
    """(readers, in + out degree) of every node; constants do not count."""
    readers: list[list[int]] = [[] for _ in program.nodes]
    for i, node in enumerate(program.nodes):
        for j in set(node.inputs):
            readers[j].append(i)
    return readers, [len(set(n.inputs)) + len(readers[i]) for i, n in enumerate(program.nodes)]


def subprograms(program: Program, known: Mapping[int, object] | None = None) -> list[tuple[int, ...]]:
    """The nodes of every subprogram, in order. `known`: positions of constants, which neither count as neighbours nor join anything."""
    known = known or {}
    readers, _ = neighbours(program)
    parent = list(range(len(program.nodes)))

    def find(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    def real(i: int) -> bool:
        return i not in known and program.nodes[i].op not in ("input", "const")

    def ends(i: int) -> bool:
        node = program.nodes[i]
        if node.op == "mul" and [program.nodes[r].op for r in readers[i]] == ["sum"]:
            return False  # half a contraction
        degree = sum(j not in known for j in set(node.inputs)) + len(readers[i])
        return node.op not in LINEAR or (degree >= CROWDED and node.op not in ("matmul", "conv"))

    for i, node in enumerate(program.nodes):
        for j in node.inputs:
            if real(i) and real(j) and not ends(j):
                parent[find(i)] = find(j)
    groups: dict[int, list[int]] = {}
    for i in range(len(program.nodes)):
        if real(i):
            groups.setdefault(find(i), []).append(i)
    return sorted(tuple(g) for g in groups.values())


@dataclass(frozen=True)
class Piece:
    """One expression of a subprogram: `last` is the node it computes, `inputs` the nodes that it reads (called x0, x1, .. in `scope`)."""

    last: int
    inputs: tuple[int, ...]
    scope: Scope


def pieces(program: Program, known: Mapping[int, object] | None = None) -> list[Piece]:
    """The expressions of all subprograms that hold a contraction over windows, which no library operator computes as it stands."""
    readers, _ = neighbours(program)
    found = []
    for nodes in subprograms(program, known):
        for i in nodes:
            node = program.nodes[i]
            if node.op == "matmul" or (node.op == "sum" and node.get("width", 1) == 1):
                try:
                    piece = _lift(program, set(nodes), i, readers)
                except NotLifted:
                    continue
                if windowed(piece.scope):
                    found.append(piece)
    return found


def windowed(scope: Scope) -> bool:
    """Whether the computing stage reads a dimension at more than one iterator."""
    inner = scope.body.object if isinstance(scope.body, Read) and isinstance(scope.body.object, Scope) else scope
    if not isinstance(inner.body, Call) or inner.body.fn != "mul":
        return False
    return any(len(i.iterators) > 1 for a in inner.body.args if isinstance(a, Read) for i in a.index)


def _lift(program: Program, nodes: set[int], at: int, readers: Sequence[Sequence[int]]) -> Piece:
    """The contraction at node `at` with what surrounds it. Raises NotLifted."""
    last = at
    while len(readers[last]) == 1 and last not in program.outputs:
        (after,) = readers[last]
        if after not in nodes or program.nodes[after].op not in REINDEXING - {"pad"}:
            break
        last = after
    writer = _Writer(program, nodes, at)
    inner, place = tidy(writer.contraction(program.nodes[at]))
    loops = tuple((f"o{d}", 0, s) for d, s in enumerate(program.nodes[last].shape))
    ranges = {n: (a, b) for n, a, b in loops}
    index = tuple(it(n) for n, _, _ in loops)
    step = last
    while step != at:
        index = reindexed(program, step, index, ranges)
        step = program.nodes[step].inputs[0]
    whole = Scope(loops, (), Read(pad_for(inner), place(index, ranges)))
    return Piece(last, tuple(writer.inputs), whole)


@dataclass
class _Writer:
    """Writes values of nodes as bodies over indices; values from outside the subprogram are input tensors."""

    program: Program
    nodes: set[int]
    at: int
    inputs: list[int] = field(default_factory=list)

    def contraction(self, node: Node) -> Scope:
        shapes = [self.program.nodes[j].shape for j in node.inputs]
        loops: list[Loop] = [(f"l{d}", 0, s) for d, s in enumerate(node.shape)]
        index = [it(n) for n, _, _ in loops]
        if node.op == "matmul":
            total: Loop = ("c", 0, shapes[0][-1])
            ranges = {n: (a, b) for n, a, b in (*loops, total)}
            left = fitted((*index[:-2], index[-2], it("c")), shapes[0])
            right = fitted((*index[:-2], it("c"), index[-1]), shapes[1])
            a, b = (self.value(j, i, ranges) for j, i in zip(node.inputs, (left, right), strict=True))
            return Scope(tuple(loops), (total,), Call("mul", (a, b)))
        dim = node.get("dim", -1) % len(node.shape)
        total = ("c", 0, shapes[0][dim])
        index[dim] = it("c")
        ranges = {n: (a, b) for n, a, b in (*loops, total)}
        return Scope(tuple(loops), (total,), self.value(node.inputs[0], tuple(index), ranges))

    def value(self, i: int, index: tuple[Affine, ...], ranges: dict[str, tuple[int, int]]) -> Body:
        node = self.program.nodes[i]
        if i not in self.nodes or node.op in ("matmul", "conv", "sum", "concat", "result"):
            return self.read(i, index)
        if node.op == "pad":
            return self.padded(i, index, ranges)
        if node.op in REINDEXING:
            return self.value(node.inputs[0], reindexed(self.program, i, index, ranges), ranges)
        if node.op in ("add", "sub", "mul"):
            args = [self.value(j, fitted(index, self.program.nodes[j].shape), ranges) for j in node.inputs]
            return Call(node.op, tuple(args))
        if node.op in ("neg", "scale"):
            return Call(node.op, (self.value(node.inputs[0], index, ranges),), node.attrs)
        return self.read(i, index)

    def read(self, i: int, index: tuple[Affine, ...]) -> Read:
        if i not in self.inputs:
            self.inputs.append(i)
        return Read(Tensor(f"x{self.inputs.index(i)}", self.program.nodes[i].shape), index)

    def padded(self, i: int, index: tuple[Affine, ...], ranges: dict[str, tuple[int, int]]) -> Body:
        """Reads outside the padded tensor, whose zeros are those of the padding. Raises NotLifted where more lies between."""
        node = self.program.nodes[i]
        index = tuple(x - low for x, (low, _) in zip(index, node["widths"], strict=True))
        source, below = node.inputs[0], self.program.nodes[node.inputs[0]]
        while source in self.nodes and below.op == "permute":
            index = reindexed(self.program, source, index, ranges)
            source, below = below.inputs[0], self.program.nodes[below.inputs[0]]
        if source in self.nodes and below.op not in ("matmul", "conv", "sum", "concat"):
            raise NotLifted(f"{below.op} before padding")
        return self.read(source, index)


def fitted(index: Sequence[Affine], shape: Sequence[int]) -> tuple[Affine, ...]:
    """The index into a broadcast operand: its own dimensions, 0 where it has one entry."""
    own = index[len(index) - len(shape) :]
    return tuple(Affine() if s == 1 else i for i, s in zip(own, shape, strict=True))


def reindexed(
    program: Program, i: int, index: Sequence[Affine], ranges: Mapping[str, tuple[int, int]]
) -> tuple[Affine, ...]:
    """Where a re-indexing operator reads its operand. Raises NotLifted for one that does more."""
    node = program.nodes[i]
    shape = program.nodes[node.inputs[0]].shape
    if node.op == "permute":
        return tuple(index[node["order"].index(d)] for d in range(len(shape)))
    if node.op == "expand":
        return fitted(index, shape)
    if node.op == "slice":
        d = node["dim"]
        return (*index[:d], index[d] * node["step"] + node["start"], *index[d + 1 :])
    if node.op == "unfold":
        d = node["dim"]
        return (*index[:d], index[d] * node["step"] + index[-1], *index[d + 1 : -1])
    if node.op == "reshape":
        return _reshaped(node.shape, shape, index, ranges)
    raise NotLifted(node.op)


def _reshaped(
    new: Sequence[int], old: Sequence[int], index: Sequence[Affine], ranges: Mapping[str, tuple[int, int]]
) -> tuple[Affine, ...]:
    if [s for s in new if s != 1] == [s for s in old if s != 1]:
        some = iter([i for i, s in zip(index, new, strict=True) if s != 1])
        return tuple(Affine() if s == 1 else next(some) for s in old)
    out: list[Affine] = []
    i, j = len(new), len(old)
    while j > 0 or i > 0:  # dimensions that the reshape does not mix keep an index of their own
        low, high, first, second = i - 1, j - 1, new[i - 1] if i else 1, old[j - 1] if j else 1
        while first != second:
            if first < second:
                low, first = low - 1, first * new[low - 1]
            else:
                high, second = high - 1, second * old[high - 1]
        total, size = Affine(), 1
        for at in range(max(low, 0), i):
            total = total * new[at] + index[at]
        for d in range(j - 1, max(high, 0) - 1, -1):
            rest = floordiv(total, size, ranges)
            out.append(Affine() if old[d] == 1 else rest if d == high else remainder(rest, old[d], ranges))
            size *= old[d]
        i, j = max(low, 0), max(high, 0)
    return tuple(out[::-1])


def tidy(scope: Scope):
    """(the stage without loops of one entry and with fused loops taken apart, the map from old loop indices to new ones).

    A loop that occurs only as x // k and x % k is two loops: reshapes around a batched product fuse what the product does not care about.
    """
    loops: list[Loop] = []
    by: dict[str, Affine] = {}
    parts: list[int] = []
    for n, a, b in scope.loops:
        k = _digit(scope, n)
        if b - a == 1:
            by[n] = Affine((), a)
            parts.append(0)
        elif k and a == 0 and b % k == 0:
            by[n] = it(f"{n}q") * k + it(f"{n}r")
            loops += [(f"{n}q", 0, b // k), (f"{n}r", 0, k)]
            parts.append(k)
        else:
            loops.append((n, a, b))
            parts.append(1)
    ranges = {n: (a, b) for n, a, b in (*loops, *scope.sums)}
    body = map_reads(scope.body, lambda r: Read(r.object, tuple(i.substitute(by, ranges) for i in r.index)))

    def place(index: Sequence[Affine], outer: Mapping[str, tuple[int, int]]) -> tuple[Affine, ...]:
        made: list[Affine] = []
        for i, k in zip(index, parts, strict=True):
            made += [floordiv(i, k, outer), remainder(i, k, outer)] if k > 1 else [i] if k else []
        return tuple(made)

    return replace(scope, loops=tuple(loops), body=body), place


def _digit(scope: Scope, name: str) -> int:
    """k when the loop occurs as x // k and x % k alone, else 0."""
    found: set[int] = set()

    def visit(read: Read) -> Read:
        for index in read.index:
            for atom, _ in index.terms:
                if atom == name:
                    found.add(0)
                elif isinstance(atom, (Div, Mod)) and name in atom.of.iterators:
                    found.add(atom.by if atom.of == it(name) else 0)
        return read

    map_reads(scope.body, visit)
    return found.pop() if len(found) == 1 else 0
