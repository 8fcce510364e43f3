"""The second verifier: both programs as terms in one e-graph, equal when a table of axioms joins them (Prism, arXiv 2604.15272, section 4).

Beside the compute operators a term has parallel ones: `partition[d,p]` cuts data dimension d (counted from the last) along the parallel
dimension p, `replicate[p]` gives every part the whole, `combine[d,p]` puts parts side by side, `reduce[p]` adds them up. A parallel dimension
is (name, size). Axioms move the parallel operators outward until they meet their inverse; conditions look at shapes, which every class carries.
The published system names the parts of a partial sum by an operator of their own, which two different splits of one sum would share; here a
sum over parts is only ever removed together with its cut, so every axiom is an equation between tensors (tested one by one). Incomplete: a
proof may be missed, and then "not proved" is the answer. The normal form (`family.prove`) is the first verifier; they share no code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from wager.graph.egraph.core import EGraph, Payload, Term
from wager.graph.egraph.rules import Bounds, Rule, Saturation, both, rule, saturate
from wager.graph.operators import ACCUMULATORS, BINARY, UNARY, Shape, ShapeError, broadcast, matmul_shape
from wager.graph.program import BlockGraph, Node, Program

Axis = tuple[str, int]


@dataclass(frozen=True)
class Fact:
    """A tensor's data shape and the parallel dimensions it is spread over."""

    shape: Shape
    axes: frozenset[Axis] = frozenset()

    def width(self, d: int) -> int:
        """The size of data dimension d from the last; 1 where there is none."""
        return self.shape[-1 - d] if d < len(self.shape) else 1


def fact(op: str, payload: Payload, args: list[Fact]) -> Fact:
    """The shape rule of every operator of the terms. Raises ValueError where the operands do not fit."""
    if op == "input":
        return Fact(payload[1])
    if op == "const":
        return Fact(())
    a = args[0]
    if op in ("unary", "scale"):
        return a
    if op in ("ew", "matmul"):
        if a.axes != args[1].axes:
            raise ValueError("operands are spread differently")
        try:
            return Fact((broadcast if op == "ew" else matmul_shape)(a.shape, args[1].shape), a.axes)
        except ShapeError as error:
            raise ValueError(str(error)) from None
    if op == "sum":
        return Fact(_sized(a, payload[0], 1), a.axes)
    if op == "reduce":
        return Fact(a.shape, _without(a, payload[0]))
    if op == "combine":
        d, p = payload
        return Fact(_sized(a, d, a.width(d) * p[1]), _without(a, p))
    axis: Axis = payload[-1]
    if any(name == axis[0] for name, _ in a.axes):
        raise ValueError(f"{axis} is in use")
    if op == "replicate":
        return Fact(a.shape, a.axes | {axis})
    if op == "partition":
        d = payload[0]
        if a.width(d) % axis[1]:
            raise ValueError(f"{a.shape} does not divide")
        return Fact(_sized(a, d, a.width(d) // axis[1]), a.axes | {axis})
    raise ValueError(f"operator {op!r} is unknown")


def _sized(a: Fact, d: int, size: int) -> Shape:
    if d >= len(a.shape):
        raise ValueError(f"no dimension {d} in {a.shape}")
    at = len(a.shape) - 1 - d
    return (*a.shape[:at], size, *a.shape[at + 1 :])


def _without(a: Fact, axis: Axis) -> frozenset[Axis]:
    if axis not in a.axes:
        raise ValueError(f"{axis} is not there")
    return a.axes - {axis}


def _one(name: str, d: int | str) -> Any:
    """Condition: the class has width 1 along a dimension (so that it is broadcast there)."""
    return lambda b, facts: facts(name).width(b[d] if isinstance(d, str) else d) == 1


def _equal(a: str, b: str, d: int | str) -> Any:
    """Condition: both classes are equally wide along a dimension."""
    return lambda m, facts: (
        facts(a).width(m[d] if isinstance(d, str) else d) == facts(b).width(m[d] if isinstance(d, str) else d)
    )


def _batch(*conditions: Any) -> Any:
    """Condition: a leading dimension of a matrix product, and all others."""
    return lambda b, facts: b["?d"] >= 2 and all(c(b, facts) for c in conditions)


def _other(a: str, b: str) -> Any:
    return lambda m, facts: m[a] != m[b]


def _reorder() -> list[Rule]:
    """Orders of sums and products: these make many forms of one term, and are tried last."""
    return [
        rule("add commutes", "(ew[add] ?a ?b) = (ew[add] ?b ?a)"),
        rule("mul commutes", "(ew[mul] ?a ?b) = (ew[mul] ?b ?a)"),
        *both("add associates", "(ew[add] ?a (ew[add] ?b ?c)) = (ew[add] (ew[add] ?a ?b) ?c)"),
        *both("mul associates", "(ew[mul] ?a (ew[mul] ?b ?c)) = (ew[mul] (ew[mul] ?a ?b) ?c)"),
        *both("mul distributes", "(ew[mul] ?a (ew[add] ?b ?c)) = (ew[add] (ew[mul] ?a ?b) (ew[mul] ?a ?c))"),
        *both("div distributes", "(ew[div] (ew[add] ?a ?b) ?c) = (ew[add] (ew[div] ?a ?c) (ew[div] ?b ?c))"),
        *both("mul meets div", "(ew[mul] ?a (ew[div] ?b ?c)) = (ew[div] (ew[mul] ?a ?b) ?c)"),
        *both("div of div", "(ew[div] (ew[div] ?a ?b) ?c) = (ew[div] ?a (ew[mul] ?b ?c))"),
        *both("matmul associates", "(matmul ?a (matmul ?b ?c)) = (matmul (matmul ?a ?b) ?c)"),
        *both("matmul of add", "(matmul (ew[add] ?a ?b) ?c) = (ew[add] (matmul ?a ?c) (matmul ?b ?c))", _equal("?a", "?b", 0)),
        *both("matmul by add", "(matmul ?a (ew[add] ?b ?c)) = (ew[add] (matmul ?a ?b) (matmul ?a ?c))", _equal("?b", "?c", 1)),
        *both("sum of add", "(sum[?d] (ew[add] ?a ?b)) = (ew[add] (sum[?d] ?a) (sum[?d] ?b))", _equal("?a", "?b", "?d")),
        *both("rows of a product sum", "(sum[1] (matmul ?a ?b)) = (matmul (sum[1] ?a) ?b)"),
        *both("columns of a product sum", "(sum[0] (matmul ?a ?b)) = (matmul ?a (sum[0] ?b))"),
        *both("scale of add", "(scale[?c] (ew[add] ?a ?b)) = (ew[add] (scale[?c] ?a) (scale[?c] ?b))"),
    ]  # fmt: skip


def _linear() -> list[Rule]:
    """Factors and divisors that do not vary along a sum leave it; sums and scales pass one another."""
    table = [
        rule("sums commute", "(sum[?d] (sum[?e] ?a)) = (sum[?e] (sum[?d] ?a))"),
        rule("sum of one", "(sum[?d] ?a) = ?a", _one("?a", "?d")),
        rule("scale of scale", "(scale[?c] (scale[?d] ?a)) = (scale[?cd] ?a)", lambda b, _: {"?cd": b["?c"] * b["?d"]}),
        rule("scale by one", "(scale[?c] ?a) = ?a", lambda b, _: b["?c"] == 1),
        *both("scale of matmul", "(scale[?c] (matmul ?a ?b)) = (matmul (scale[?c] ?a) ?b)"),
        *both("scale of sum", "(scale[?c] (sum[?d] ?a)) = (sum[?d] (scale[?c] ?a))"),
        *both("scale of mul", "(scale[?c] (ew[mul] ?a ?b)) = (ew[mul] (scale[?c] ?a) ?b)"),
        *both("scale of div", "(scale[?c] (ew[div] ?a ?b)) = (ew[div] (scale[?c] ?a) ?b)"),
    ]  # fmt: skip
    for f in ("mul", "div"):
        table += both(f"{f} of rows", f"(matmul (ew[{f}] ?a ?b) ?c) = (ew[{f}] (matmul ?a ?c) ?b)", _one("?b", 0))
        table += both(f"{f} of columns", f"(matmul ?a (ew[{f}] ?b ?c)) = (ew[{f}] (matmul ?a ?b) ?c)", _one("?c", 1))
        table += both(f"sum of {f}", f"(sum[?d] (ew[{f}] ?a ?b)) = (ew[{f}] (sum[?d] ?a) ?b)", _one("?b", "?d"))
    return table


def _outward() -> list[Rule]:
    """Cuts and replicas leave the compute operators."""
    table = []
    for f in ("unary", "scale"):
        table += [
            rule(f"{f} of a part", f"({f}[?f] (partition[?d,?p] ?a)) = (partition[?d,?p] ({f}[?f] ?a))"),
            rule(f"{f} of a replica", f"({f}[?f] (replicate[?p] ?a)) = (replicate[?p] ({f}[?f] ?a))"),
            rule(f"{f} of parts", f"(combine[?d,?p] ({f}[?f] ?a)) = ({f}[?f] (combine[?d,?p] ?a))"),
        ]
    part, copy = "(partition[?d,?p] {})", "(replicate[?p] {})"

    def move(name: str, op: str, left: str, right: str, out: str, when: Any = None) -> Rule:
        sides = f"({op} {left.format('?a')} {right.format('?b')})"
        return rule(name, f"{sides} = {out.format(f'({op} ?a ?b)')}", when)

    rows, columns = "(partition[1,?p] {})", "(partition[0,?p] {})"
    table += [
        move("elementwise of parts", "ew[?f]", part, part, part, _equal("?a", "?b", "?d")),
        move("elementwise of part and replica", "ew[?f]", part, copy, part, _one("?b", "?d")),
        move("elementwise of replica and part", "ew[?f]", copy, part, part, _one("?a", "?d")),
        move("elementwise of replicas", "ew[?f]", copy, copy, copy),
        move("product of rows", "matmul", rows, copy, rows),
        move("product of columns", "matmul", copy, columns, columns),
        move("product of batches", "matmul", part, part, part, _batch(_equal("?a", "?b", "?d"))),
        move("product of batch and replica", "matmul", part, copy, part, _batch(_one("?b", "?d"))),
        move("product of replica and batch", "matmul", copy, part, part, _batch(_one("?a", "?d"))),
        move("product of replicas", "matmul", copy, copy, copy),
        rule("sum of a part", "(sum[?d] (partition[?e,?p] ?a)) = (partition[?e,?p] (sum[?d] ?a))", _other("?d", "?e")),
        rule("sum of a replica", "(sum[?d] (replicate[?p] ?a)) = (replicate[?p] (sum[?d] ?a))"),
        rule("sum of other parts", "(sum[?d] (combine[?e,?p] ?a)) = (combine[?e,?p] (sum[?d] ?a))", _other("?d", "?e")),
        rule("sum of parts", "(sum[?d] (combine[?d,?p] ?a)) = (reduce[?p] (sum[?d] ?a))"),
    ]
    return table


def _commute() -> list[Rule]:
    """Parallel operators pass one another."""
    forms = {"partition": "(partition[?{d},?{p}] {})", "replicate": "(replicate[?{p}] {})",
             "combine": "(combine[?{d},?{p}] {})", "reduce": "(reduce[?{p}] {})"}  # fmt: skip

    def text(kind: str, d: str, p: str, inner: str) -> str:
        return forms[kind].replace("{d}", d).replace("{p}", p).replace("{}", inner)

    table = []
    kinds = list(forms)
    for i, outer in enumerate(kinds):
        for inner in kinds[i:]:
            same = {outer, inner} <= {"partition", "combine"}
            left = text(outer, "d", "p", text(inner, "e", "q", "?a"))
            right = text(inner, "e", "q", text(outer, "d", "p", "?a"))
            when = _passing(same)
            name = f"{outer} passes {inner}"
            table += (
                [rule(name, f"{left} = {right}", when)] if outer == inner else both(name, f"{left} = {right}", when)
            )
    return table


def _passing(same: bool) -> Any:
    """Different parallel dimensions; two operators that both move a data dimension need different ones."""
    return lambda b, _: b["?p"][0] != b["?q"][0] and not (same and b["?d"] == b["?e"])


def _inverse() -> list[Rule]:
    """A parallel operator meets its inverse; sums over parts."""

    def product(b: dict[str, Any], _: Any) -> bool | dict[str, Any]:
        return {"?r": ("sum", b["?p"][1] * b["?q"][1])}

    def finer(b: dict[str, Any], _: Any) -> bool | dict[str, Any]:
        times, rest = divmod(b["?q"][1], b["?p"][1])
        return {"?r": ("sum", times)} if not rest and times > 1 else False

    table = [
        rule("parts put together", "(combine[?d,?p] (partition[?d,?p] ?a)) = ?a"),
        rule("sum over a contraction's parts", "(reduce[?p] (matmul (partition[0,?p] ?a) (partition[1,?p] ?b))) = (matmul ?a ?b)"),
        rule("sum of sums of parts", "(reduce[?p] (sum[?d] (partition[?d,?p] ?a))) = (sum[?d] ?a)"),
        rule("sum of added parts", "(sum[?d] (reduce[?p] (partition[?d,?p] ?a))) = (sum[?d] ?a)"),
        rule("sum of replicas", "(reduce[?p] (replicate[?p] ?a)) = (scale[?n] ?a)", lambda b, _: {"?n": Fraction(b["?p"][1])}),
        rule("sums over nested parts", "(reduce[?p] (reduce[?q] (partition[?d,?q] (partition[?d,?p] ?a)))) = (reduce[?r] (partition[?d,?r] ?a))", product),
        rule("parts cut as they were put together", "(reduce[?q] (partition[?d,?q] (combine[?d,?p] ?a))) = (reduce[?p] ?a)",
             lambda b, _: b["?p"][1] == b["?q"][1]),
        rule("parts cut finer", "(reduce[?q] (partition[?d,?q] (combine[?d,?p] ?a))) = (reduce[?p] (reduce[?r] (partition[?d,?r] ?a)))", finer),
        rule("reduce of add", "(reduce[?p] (ew[add] ?a ?b)) = (ew[add] (reduce[?p] ?a) (reduce[?p] ?b))"),
        rule("reduce of mul", "(reduce[?p] (ew[mul] ?a (replicate[?p] ?b))) = (ew[mul] (reduce[?p] ?a) ?b)"),
        rule("reduce of div", "(reduce[?p] (ew[div] ?a (replicate[?p] ?b))) = (ew[div] (reduce[?p] ?a) ?b)"),
        rule("reduce of matmul", "(reduce[?p] (matmul ?a (replicate[?p] ?b))) = (matmul (reduce[?p] ?a) ?b)"),
        rule("reduce of matmul by", "(reduce[?p] (matmul (replicate[?p] ?a) ?b)) = (matmul ?a (reduce[?p] ?b))"),
        *both("reduce of scale", "(reduce[?p] (scale[?c] ?a)) = (scale[?c] (reduce[?p] ?a))"),
        *both("reduce of sum", "(reduce[?p] (sum[?d] ?a)) = (sum[?d] (reduce[?p] ?a))"),
    ]  # fmt: skip
    return table


PARALLEL: tuple[Rule, ...] = (*_outward(), *_commute(), *_inverse())
STAGES: tuple[tuple[Rule, ...], ...] = (PARALLEL, (*PARALLEL, *_linear()), (*PARALLEL, *_linear(), *_reorder()))
"""Tables of growing size, each tried on what the one before left."""
AXIOMS = STAGES[-1]
BOUNDS = Bounds(nodes=60_000, seconds=60.0, rounds=60, burst=4000)


@dataclass(frozen=True)
class Proof:
    """`proved`; otherwise `reason` says what was tried. `axioms`: those that made two terms equal on the way, with how often."""

    proved: bool
    reason: str
    nodes: int = 0
    rounds: int = 0
    seconds: float = 0.0
    axioms: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.proved


def prove(reference: Program, candidate: Program, bounds: Bounds = BOUNDS) -> Proof:
    """Whether the axioms join the two programs' terms, output by output."""
    if reference.input_shapes != candidate.input_shapes or reference.output_shapes != candidate.output_shapes:
        return Proof(False, "inputs or outputs have other shapes")
    graph = EGraph(fact)
    try:
        pairs = [(graph.add(a), graph.add(b)) for a, b in zip(encode(reference), encode(candidate), strict=True)]
    except ValueError as error:
        return Proof(False, f"no terms for this program: {error}")
    joined = lambda: all(graph.equal(a, b) for a, b in pairs)
    whole = Saturation()
    for table in STAGES:
        report = saturate(graph, table, replace(bounds, seconds=bounds.seconds - whole.seconds), joined)
        whole.seconds, whole.rounds = whole.seconds + report.seconds, whole.rounds + report.rounds
        whole.applied += report.applied
        whole.limit = report.limit
        if joined() or bounds.seconds <= whole.seconds:
            break
    reason = "" if joined() else f"not proved within {whole.limit}" if whole.limit else "the axioms do not join them"
    return Proof(joined(), reason, graph.nodes, whole.rounds, whole.seconds, dict(whole.applied))


def encode(program: Program) -> list[Term]:
    """The outputs as terms. Raises ValueError for an operator that terms do not have."""
    values: list[Any] = []
    kernels = inputs = 0
    for node in program.nodes:
        args = [values[i] for i in node.inputs]
        if node.op == "input":
            values.append(Term("input", (inputs, node.shape)))
            inputs += 1
        elif node.op == "const":
            values.append(Term("const", (node["value"],)))
        elif node.op == "kernel":
            assert node.block is not None
            values.append(_block(node.block, args, [len(program.nodes[i].shape) for i in node.inputs], kernels))
            kernels += 1
        elif node.op == "result":
            values.append(args[0][node["index"]])
        else:
            values.append(_operator(node, args, [program.nodes[i].shape for i in node.inputs]))
    return [values[i] for i in program.outputs]


def _operator(node: Node, args: list[Term], shapes: list[Shape]) -> Term:
    op, a = node.op, args[0]
    if op == "matmul":
        return Term("matmul", (), tuple(args))
    if op == "sum":
        dim = node.get("dim", -1) % len(shapes[0])
        return _down_to(a, len(shapes[0]) - 1 - dim, shapes[0][dim], node.get("width", 1))
    if op == "rms_norm":
        return _ew("div", a, _root(a, shapes[0][-1]))
    if op == "square":
        return _ew("mul", a, a)
    if op == "sub":
        return _ew("add", a, Term("scale", (Fraction(-1),), (args[1],)))
    if op == "neg":
        return Term("scale", (Fraction(-1),), (a,))
    if op == "scale":
        return Term("scale", (Fraction(node["value"]).limit_denominator(1 << 24),), (a,))
    if op in BINARY:
        return _ew(op, a, args[1])
    if op in UNARY:
        return Term("unary", (f"{op}{dict(node.attrs) or ''}",), (a,))
    raise ValueError(op)


def _ew(op: str, a: Term, b: Term) -> Term:
    return Term("ew", (op,), (a, b))


def _root(a: Term, count: int) -> Term:
    """sqrt of the mean of squares; `count` entries go into it."""
    squares = Term("sum", (0,), (_ew("mul", a, a),))
    return Term("unary", ("sqrt",), (Term("scale", (Fraction(1, count),), (squares,)),))


def _down_to(a: Term, d: int, size: int, width: int) -> Term:
    if width == 1:
        return Term("sum", (d,), (a,))
    if width == size:
        return a
    axis = ("sum", size // width)
    return Term("reduce", (axis,), (Term("partition", (d, axis), (a,)),))


def _block(block: BlockGraph, arguments: list[Term], ranks: list[int], number: int) -> list[Term]:
    grid = [(f"{name}{number}", size) for name, size in zip("xyz", block.grid, strict=True)]
    loop: Axis = (f"loop{number}", block.loop)
    values: list[Term] = []
    outputs = []
    for node in block.nodes:
        args = [values[i] for i in node.inputs]
        if node.op == "input":
            arg, value = node["arg"], arguments[node["arg"]]
            for axis, dim in zip((*grid, loop), (*node["imap"], node["fmap"]), strict=True):
                if axis[1] > 1:
                    cut = (ranks[arg] - 1 - dim, axis)
                    value = Term("partition", cut, (value,)) if dim >= 0 else Term("replicate", (axis,), (value,))
            values.append(value)
        elif node.op == "output":
            value = args[0]
            for axis, dim in zip(grid, node["omap"], strict=True):
                if axis[1] > 1:
                    value = Term("combine", (len(node.shape) - 1 - dim, axis), (value,))
            outputs.append(value)
            values.append(args[0])
        elif node.op in ACCUMULATORS:
            values.append(_accumulator(node, args[0], block.nodes[node.inputs[0]].shape, loop))
        else:
            values.append(_operator(node, args, [block.nodes[i].shape for i in node.inputs]))
    return outputs


def _accumulator(node: Node, value: Term, shape: Shape, loop: Axis) -> Term:
    if node.op == "accum_rms":
        squares = Term("sum", (0,), (_ew("mul", value, value),))
        mean = Term("scale", (Fraction(1, shape[-1] * loop[1]),), (_summed(squares, loop),))
        return Term("unary", ("sqrt",), (mean,))
    if node.op == "accum":
        return _summed(value, loop)
    return _summed(_down_to(value, 0, shape[-1], node.get("width", 1)), loop)


def _summed(value: Term, loop: Axis) -> Term:
    return Term("reduce", (loop,), (value,)) if loop[1] > 1 else value
