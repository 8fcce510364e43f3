"""Abstract expressions and the subexpression test that prunes the search (Mirage, arXiv 2405.05751, section 4).

An abstract expression forgets indices: inputs are symbols, sums are known by how many entries they add. Under Mirage's equalities (sums
commute with products and additions, products distribute, divisors collect, nothing cancels) every expression has a normal form:

    a multiset of terms  s * c * a1 * a2 * ... / d

with s the product of the sums' sizes, c a constant, atoms a (inputs, functions of normal forms) and a divisor d, itself a normal form. So
equality and "is a subexpression of some equal form of the target" are decided exactly, without saturating a graph: no limit can cut it off.
A prefix that is no subexpression can never become the target. Cancellation is deliberately absent (with it everything would be a
subexpression of everything), so programs that need it are not found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from wager.graph.operators import ACCUMULATORS
from wager.graph.program import Node, Program

Term = tuple[int, Fraction, tuple[int, ...], int]
ONE = 0
MAX_TERMS = 64


class TooLarge(Exception):
    """The normal form has more terms than any program of interest."""


class Algebra:
    """Interns normal forms: an expression is an integer."""

    def __init__(self) -> None:
        self.expressions: list[tuple[Term, ...]] = []
        self._known: dict[tuple[Term, ...], int] = {}
        self.atoms: list[tuple[str, int]] = []
        self._atom_known: dict[tuple[str, int], int] = {}
        self._memo: dict[tuple, int] = {}
        assert self._intern([(1, Fraction(1), (), ONE)]) == ONE

    def _intern(self, terms: Sequence[Term]) -> int:
        if len(terms) > MAX_TERMS:
            raise TooLarge
        key: tuple[Term, ...] = tuple(sorted(terms))
        if key not in self._known:
            self._known[key] = len(self.expressions)
            self.expressions.append(key)
        return self._known[key]

    def atom(self, name: str, argument: int = -1) -> int:
        """The expression that is one atom: an input (argument -1) or a function of an expression."""
        key = (name, argument)
        if key not in self._atom_known:
            self._atom_known[key] = len(self.atoms)
            self.atoms.append(key)
        return self._intern([(1, Fraction(1), (self._atom_known[key],), ONE)])

    def add(self, a: int, b: int) -> int:
        return self._intern([*self.expressions[a], *self.expressions[b]])

    def multiply(self, a: int, b: int) -> int:
        key = ("*", min(a, b), max(a, b))
        if key not in self._memo:
            if len(self.expressions[a]) * len(self.expressions[b]) > MAX_TERMS:
                raise TooLarge
            terms = [
                (s * t, c * d, tuple(sorted(x + y)), self.multiply(u, v) if u and v else u or v)
                for s, c, x, u in self.expressions[a]
                for t, d, y, v in self.expressions[b]
            ]
            self._memo[key] = self._intern(terms)
        return self._memo[key]

    def divide(self, a: int, b: int) -> int:
        return self._intern([(s, c, x, self.multiply(d, b) if d else b) for s, c, x, d in self.expressions[a]])

    def sum(self, count: int, a: int) -> int:
        return a if count == 1 else self._intern([(s * count, c, x, d) for s, c, x, d in self.expressions[a]])

    def scale(self, value: float, a: int) -> int:
        return self._intern(
            [(s, c * Fraction(value).limit_denominator(1 << 24), x, d) for s, c, x, d in self.expressions[a]]
        )

    def constant(self, value: float) -> int:
        return self.scale(value, ONE)

    def root_mean_square(self, count: int, a: int) -> int:
        return self.atom("sqrt", self.sum(count, self.scale(1 / count, self.multiply(a, a))))

    def apply(self, op: str, args: Sequence[int], count: int = 1, attrs: dict | None = None) -> int:
        """The expression of an operator; `count`: how many entries a contraction, a sum or an accumulator adds. Raises TooLarge."""
        key = (op, *args, count, tuple(sorted(attrs.items())) if attrs else ())
        if key in self._memo:
            return self._memo[key]
        value = self._apply(op, args, count, attrs or {})
        self._memo[key] = value
        return value

    def _apply(self, op: str, args: Sequence[int], count: int, attrs: dict) -> int:
        a = args[0]
        if op == "matmul":
            return self.sum(count, self.multiply(a, args[1]))
        if op in ("sum", "accum", "accum_sum", "accum_width"):
            return self.sum(count, a)
        if op == "accum_rms":
            return self.root_mean_square(count, a)
        if op == "rms_norm":
            return self.divide(a, self.root_mean_square(count, a))
        if op == "add":
            return self.add(a, args[1])
        if op == "sub":
            return self.add(a, self.scale(-1, args[1]))
        if op == "mul":
            return self.multiply(a, args[1])
        if op == "div":
            return self.divide(a, args[1])
        if op == "square":
            return self.multiply(a, a)
        if op == "neg":
            return self.scale(-1, a)
        if op == "scale":
            return self.scale(attrs["value"], a)
        if op == "shift":
            return self.add(a, self.constant(attrs["value"]))
        if op == "rsqrt":
            return self.divide(ONE, self.atom("sqrt", a))
        if op == "reciprocal":
            return self.divide(ONE, a)
        return self.atom(f"{op}{sorted(attrs.items()) or ''}", a)


def entries(node: Node, shapes: Sequence[tuple[int, ...]], loop: int = 1) -> int:
    """How many entries of its input go into one of the output's."""
    if node.op == "matmul":
        return shapes[0][-1]
    if node.op == "sum":
        dim = node.get("dim", -1)
        return shapes[0][dim] // node.shape[dim]
    if node.op in ACCUMULATORS:
        return loop * shapes[0][-1] // node.shape[-1]
    return shapes[0][-1] if node.op == "rms_norm" else 1


PARAMETERS = ("scale", "shift", "clamp", "leaky_relu")
"""Operators whose attributes say what is computed."""


def of_operator(
    algebra: Algebra, node: Node, args: Sequence[int], shapes: Sequence[tuple[int, ...]], loop: int = 1
) -> int:
    """The expression of one operator on operands with these expressions and shapes. Raises TooLarge."""
    attrs = dict(node.attrs) if node.op in PARAMETERS else {}
    return algebra.apply(node.op, args, entries(node, shapes, loop), attrs)


def of_program(algebra: Algebra, program: Program) -> list[int]:
    """The expression of every node; kernel nodes are inlined."""
    values: list = []
    inputs = 0
    for node in program.nodes:
        args = [values[i] for i in node.inputs]
        shapes = [program.nodes[i].shape for i in node.inputs]
        if node.op == "input":
            values.append(algebra.atom(f"input{inputs}"))
            inputs += 1
        elif node.op == "const":
            values.append(algebra.constant(node["value"]))
        elif node.op == "kernel":
            values.append(of_block(algebra, node, args))
        elif node.op == "result":
            values.append(args[0][node["index"]])
        elif node.op in ("reshape", "permute", "expand"):
            values.append(args[0])
        else:
            values.append(of_operator(algebra, node, args, shapes))
    return values


def of_block(algebra: Algebra, kernel: Node, arguments: Sequence[int]) -> list[int]:
    """The expressions of a kernel node's outputs."""
    block = kernel.block
    assert block is not None
    values: list[int] = []
    for node in block.nodes:
        args = [values[i] for i in node.inputs]
        shapes = [block.nodes[i].shape for i in node.inputs]
        if node.op == "input":
            values.append(arguments[node["arg"]])
        elif node.op == "output":
            values.append(args[0])
        else:
            values.append(of_operator(algebra, node, args, shapes, block.loop))
    return [v for v, n in zip(values, block.nodes, strict=True) if n.op == "output"]


def factors(program: Program) -> list[float]:
    """The constants that the program multiplies by (those of norms included)."""
    found = [n["value"] for n in program.nodes if n.op == "scale"]
    return found + [1 / program.nodes[n.inputs[0]].shape[-1] for n in program.nodes if n.op == "rms_norm"]


class Subexpressions:
    """Which expressions occur in some equal form of one of the targets. Answers are remembered."""

    def __init__(self, algebra: Algebra, targets: Sequence[int], factors: Sequence[float] = ()):
        """`factors`: the constants that the program multiplies by; what is left over must be a product of some of them."""
        self.algebra = algebra
        self.factors = {Fraction(1), Fraction(-1)}
        for value in list(factors)[:8]:
            self.factors |= {f * Fraction(value).limit_denominator(1 << 24) for f in self.factors}
        self.regions: list[int] = []
        self._memo: dict[int, bool] = {}
        pending = list(targets)
        while pending:
            region = pending.pop()
            if region in self.regions:
                continue
            self.regions.append(region)
            for _, _, atoms, divisor in algebra.expressions[region]:
                pending += [algebra.atoms[a][1] for a in atoms if algebra.atoms[a][1] >= 0]
                if divisor:
                    pending.append(divisor)

    def __contains__(self, expression: int) -> bool:
        if expression not in self._memo:
            self._memo[expression] = any(self._within(expression, region) for region in self.regions)
        return self._memo[expression]

    def _within(self, expression: int, region: int) -> bool:
        """Whether region = expression * monomial + rest."""
        terms, whole = self.algebra.expressions[expression], Counter(self.algebra.expressions[region])
        for candidate in whole:
            quotient = self._quotient(candidate, terms[0])
            if quotient is None:
                continue
            if isinstance(quotient, str):
                return True
            s, c, atoms, divisor = quotient
            needed = Counter(
                (
                    t * s,
                    d * c,
                    tuple(sorted(x + atoms)),
                    self.algebra.multiply(u, divisor) if u and divisor else u or divisor,
                )
                for t, d, x, u in terms
            )
            if all(whole[t] >= n for t, n in needed.items()):
                return True
        return False

    def _quotient(self, whole: Term, part: Term) -> Term | str | None:
        if whole[0] % part[0] or whole[1] / part[1] not in self.factors:
            return None
        rest = Counter(whole[2])
        rest.subtract(part[2])
        if min(rest.values(), default=0) < 0:
            return None
        divisor = self._divisor(whole[3], part[3])
        if divisor is None or divisor == -1:
            return None if divisor is None else "unknown"
        return (whole[0] // part[0], whole[1] / part[1], tuple(sorted(rest.elements())), divisor)

    def _divisor(self, whole: int, part: int) -> int | None:
        """d with part * d = whole; None if there is none, -1 if that was not decided (then nothing is pruned)."""
        if part == ONE:
            return whole
        if whole == ONE:
            return None
        if whole == part:
            return ONE
        a, b = self.algebra.expressions[whole], self.algebra.expressions[part]
        if len(a) > 1 or len(b) > 1:
            return -1 if len(a) > 1 and len(a) % len(b) == 0 else None
        quotient = self._quotient(next(iter(a)), next(iter(b)))
        if quotient is None or isinstance(quotient, str):
            return None if quotient is None else -1
        return self.algebra._intern([quotient])
