"""Equivalence of whole families: one proof for every tile size (Prism, arXiv 2604.15272).

Sizes stay symbols. Every index of a tensor dimension is a mixed-radix number whose digits are symbols: a dimension cut by grid dimension x and
by the loop is (x, i, t). A program then denotes, for symbolic output digits, a sum of products over bound digits; functions are atoms over
such sums, divisors are collected, and digits that always occur side by side are one digit. Two programs with equal normal forms are equal for
every choice of sizes that divides evenly: sound by construction, where a table of rewrite axioms is sound by review. It is incomplete:
nothing cancels, and t + t is not 2t; "not proved" does not mean "not equal".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count
from typing import Any

from wager.graph.operators import BINARY, UNARY
from wager.graph.program import BlockGraph, Node, Program
from wager.graph.verify.normal_form import Atom, Digit, Expr, Term, Unproved, canonical, merge, signature, substitute

MAX_TERMS = 24


@dataclass(frozen=True)
class Value:
    """A tensor: for each dimension its digits, and what an element is in terms of them."""

    dims: tuple[tuple[Digit, ...], ...]
    expr: Expr


class _Split(Exception):
    """Evaluation must start again with a parallel digit written as two."""

    def __init__(self, key: tuple[int, int], sizes: tuple[int, ...]):
        super().__init__()
        self.key, self.sizes = key, sizes


@dataclass
class _Context:
    """Sizes of digits, fresh names, and for (kernel, axis) the sizes of the digits that a grid or loop axis is written in."""

    splits: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    owner: dict[Digit, tuple[int, int]] = field(default_factory=dict)
    kernels: int = 0
    sizes: dict[Digit, Any] = field(default_factory=dict)
    names: Any = field(default_factory=lambda: count())

    def digit(self, stem: str, size: Any = None) -> Digit:
        name = f"{stem}{next(self.names)}"
        self.sizes[name] = size
        return name


def _freshen(term: Term, context: _Context) -> Term:
    """New names for bound digits, so that two sums can be multiplied."""
    by = {d: (context.digit("b", context.sizes.get(d)),) for d in sorted(term.bound)}
    return substitute(Expr((term,)), by).terms[0]


def _multiply(a: Expr, b: Expr, context: _Context) -> Expr:
    if len(a.terms) * len(b.terms) > MAX_TERMS:
        raise Unproved("too many terms")
    terms = []
    for s in a.terms:
        for t in b.terms:
            u = _freshen(t, context) if s.bound & t.bound else t
            if s.divisor and u.divisor:
                divisor = _multiply(s.divisor, u.divisor, context)
            else:
                divisor = s.divisor or u.divisor
            terms.append(
                Term(
                    s.coefficient * u.coefficient,
                    s.bound | u.bound,
                    (*s.atoms, *u.atoms),
                    divisor,
                    (*s.counts, *u.counts),
                )
            )
    return Expr(tuple(terms))


def _divide(a: Expr, b: Expr, context: _Context) -> Expr:
    return Expr(
        tuple(
            Term(t.coefficient, t.bound, t.atoms, _multiply(t.divisor, b, context) if t.divisor else b, t.counts)
            for t in a.terms
        )
    )


def _scale(a: Expr, value: Fraction, counts: tuple[Digit, ...] = ()) -> Expr:
    return Expr(tuple(Term(t.coefficient * value, t.bound, t.atoms, t.divisor, (*t.counts, *counts)) for t in a.terms))


def _bind(a: Expr, digits: Sequence[Digit], context: _Context) -> Expr:
    """Sum over digits. Each term gets bound names of its own."""
    terms = []
    for t in a.terms:
        by = {d: (context.digit("b", context.sizes.get(d)),) for d in digits}
        u = substitute(Expr((Term(t.coefficient, t.bound, t.atoms, t.divisor, ()),)), by).terms[0]
        terms.append(
            Term(
                u.coefficient,
                u.bound | {n for (n,) in by.values()},
                u.atoms,
                u.divisor,
                tuple(by.get(d, (d,))[0] for d in t.counts),
            )
        )
    return Expr(tuple(terms))


def evaluate(program: Program, context: _Context) -> list[Value]:
    """The outputs over fresh symbolic digits. Raises Unproved for an operator that the normal form does not cover."""
    values: list[Any] = []
    inputs = 0
    for node in program.nodes:
        args = [values[i] for i in node.inputs]
        if node.op == "input":
            dims = tuple((context.digit("d", size),) if size > 1 else () for size in node.shape)
            values.append(Value(dims, Expr((Term(Fraction(1), frozenset(), (Atom(f"input{inputs}", dims),)),))))
            inputs += 1
        elif node.op == "const":
            values.append(Value((), Expr((Term(Fraction(node["value"]), frozenset(), ()),))))
        elif node.op == "kernel":
            assert node.block is not None
            values.append(_block(node.block, args, context))
        elif node.op == "result":
            values.append(args[0][node["index"]])
        else:
            values.append(_apply(node, args, context))
    return [values[i] for i in program.outputs]


def _align(values: Sequence[Value], rank: int) -> tuple[tuple[tuple[Digit, ...], ...], list[Expr]]:
    """Renames digits so that broadcast operands share them. Raises Unproved where two dimensions are divided differently."""
    dims: list[tuple[Digit, ...]] = [()] * rank
    for v in values:
        for d, digits in enumerate(v.dims, rank - len(v.dims)):
            dims[d] = dims[d] or digits
    exprs = []
    for v in values:
        by: dict[Digit, tuple[Digit, ...]] = {}
        for d, digits in enumerate(v.dims, rank - len(v.dims)):
            if digits and digits != dims[d]:
                if len(digits) == len(dims[d]):
                    by |= {a: (b,) for a, b in zip(digits, dims[d], strict=True)}
                elif len(digits) == 1:
                    by[digits[0]] = dims[d]
                else:
                    raise Unproved("dimensions are divided differently")
        exprs.append(substitute(v.expr, by))
    return tuple(dims), exprs


def _apply(node: Node, args: Sequence[Value], context: _Context) -> Value:
    op, attrs = node.op, dict(node.attrs)
    if op == "matmul":
        a, b = args
        return _matmul(a, b, context)
    if op == "sum":
        return _sum(args[0], attrs.get("dim", -1), attrs.get("width", 1), context)
    if op == "rms_norm":
        squares = _multiply(args[0].expr, args[0].expr, context)
        return Value(args[0].dims, _divide(args[0].expr, _root(squares, args[0].dims[-1], context), context))
    if op == "permute":
        return Value(tuple(args[0].dims[d] for d in attrs["order"]), args[0].expr)
    if op in BINARY:
        dims, (a, b) = _align(args, len(node.shape))
        return Value(dims, _binary(op, a, b, context))
    if op in UNARY:
        return Value(args[0].dims, _unary(op, args[0].expr, attrs, context))
    raise Unproved(f"{op} has no index normal form")


def _binary(op: str, a: Expr, b: Expr, context: _Context) -> Expr:
    if op in ("add", "sub"):
        return Expr((*a.terms, *_scale(b, Fraction(1 if op == "add" else -1)).terms))
    if op == "mul":
        return _multiply(a, b, context)
    if op == "div":
        return _divide(a, b, context)
    raise Unproved(f"{op} has no index normal form")


def _unary(op: str, a: Expr, attrs: dict, context: _Context) -> Expr:
    if op == "square":
        return _multiply(a, a, context)
    if op == "neg":
        return _scale(a, Fraction(-1))
    if op == "scale":
        return _scale(a, Fraction(attrs["value"]).limit_denominator(1 << 24))
    one = Expr((Term(Fraction(1), frozenset(), ()),))
    if op == "shift":
        return Expr((*a.terms, *_scale(one, Fraction(attrs["value"]).limit_denominator(1 << 40)).terms))
    if op == "reciprocal":
        return _divide(one, a, context)
    if op == "rsqrt":
        return _divide(one, Expr((Term(Fraction(1), frozenset(), (Atom("sqrt", (), a),)),)), context)
    return Expr((Term(Fraction(1), frozenset(), (Atom(f"{op}{sorted(attrs.items()) or ''}", (), a),)),))


def _matmul(a: Value, b: Value, context: _Context) -> Value:
    contracted = b.dims[-2] if len(b.dims[-2]) > len(a.dims[-1]) else a.dims[-1]
    rank = max(len(a.dims), len(b.dims))
    lead_a = Value((*a.dims[:-2], a.dims[-2], (), a.dims[-1]), a.expr)
    lead_b = Value((*b.dims[:-2], (), b.dims[-1], b.dims[-2]), b.expr)
    dims, (x, y) = _align([lead_a, lead_b], rank + 1)
    contracted = dims[-1]
    return Value(dims[:-1], _bind(_multiply(x, y, context), contracted, context))


def _sum(value: Value, dim: int, width: int, context: _Context) -> Value:
    dim %= len(value.dims)
    digits, keep = value.dims[dim], ()
    if width > 1:
        value, digits, keep = _last_digits(value, dim, width, context)
    bound = digits[: len(digits) - len(keep)]
    dims = (*value.dims[:dim], keep, *value.dims[dim + 1 :])
    return Value(dims, _bind(value.expr, bound, context))


def _last_digits(
    value: Value, dim: int, width: int, context: _Context
) -> tuple[Value, tuple[Digit, ...], tuple[Digit, ...]]:
    """The innermost digits that together have `width` values; one digit is split where needed."""
    digits, keep, size = value.dims[dim], (), 1
    while size < width:
        if len(keep) == len(digits):
            raise Unproved("a partial sum is wider than its dimension")
        digit = digits[len(digits) - len(keep) - 1]
        have, need = context.sizes[digit], width // size
        if need % have == 0:
            keep, size = (digit, *keep), size * have
        elif have % need == 0:
            pair = (context.digit("t", have // need), context.digit("t", need))
            expr = substitute(value.expr, {digit: pair})
            at = len(digits) - len(keep) - 1
            digits = (*digits[:at], *pair, *digits[at + 1 :])
            value = Value((*value.dims[:dim], digits, *value.dims[dim + 1 :]), expr)
            keep, size = (pair[1], *keep), width
        else:
            raise Unproved("a partial sum does not end at a digit")
    return value, digits, keep


def _root(squares: Expr, digits: Sequence[Digit], context: _Context) -> Expr:
    """sqrt of the mean over digits: the count stays symbolic until the digits are known to fill a dimension."""
    mean = _bind(_scale(squares, Fraction(1), tuple(digits)), digits, context)
    return Expr((Term(Fraction(1), frozenset(), (Atom("sqrt", (), mean),)),))


def _block(block: BlockGraph, arguments: Sequence[Value], context: _Context) -> list[Value]:
    active = [_axis(a, size, context) for a, size in enumerate((*block.grid, block.loop))]
    context.kernels += 1
    grid = active[:3]
    values: list[Value] = []
    outputs = []
    for node in block.nodes:
        args = [values[i] for i in node.inputs]
        if node.op == "input":
            values.append(_cut(node, arguments[node["arg"]], active, context))
        elif node.op == "output":
            outputs.append(_join(node, args[0], grid, block))
            values.append(args[0])
        elif node.op.startswith("accum"):
            values.append(_accumulate(node, args[0], active[3], context))
        else:
            values.append(_apply(node, args, context))
    return outputs


def _axis(axis: int, size: int, context: _Context) -> tuple[Digit, ...]:
    """The digits of a parallel axis: none when its size is 1."""
    if size == 1:
        return ()
    key = (context.kernels, axis)
    digits = tuple(context.digit("g", part) for part in context.splits.get(key, (size,)))
    context.owner |= {d: key for d in digits}
    return digits


def _cut(node: Node, argument: Value, active: Sequence[tuple[Digit, ...]], context: _Context) -> Value:
    dims, by = [], {}
    for d, digits in enumerate(argument.dims):
        cuts = [
            a for axis, target in zip(active, (*node["imap"], node["fmap"]), strict=True) if target == d for a in axis
        ]
        tile = context.digit("t", node.shape[d]) if node.shape[d] > 1 else None
        if not cuts:
            fresh = tuple(context.digit("t", context.sizes.get(x)) for x in digits)
            by |= {old: (new,) for old, new in zip(digits, fresh, strict=True)}
            dims.append(fresh)
        elif len(digits) == 1:
            by[digits[0]] = (*cuts, *((tile,) if tile else ()))
            dims.append((tile,) if tile else ())
        else:
            dims.append(_cut_composite(digits, cuts, by, context))
    return Value(tuple(dims), substitute(argument.expr, by))


def _cut_composite(digits: tuple[Digit, ...], cuts: Sequence[Digit], by: dict, context: _Context) -> tuple[Digit, ...]:
    """Cuts and digits are both written outermost first; the finer of two digits splits the coarser one."""
    pending = list(cuts)
    left: list[Digit] = []
    for digit in digits:
        parts: list[Digit] = []
        size = context.sizes[digit]
        while pending and size > 1:
            cut = context.sizes[pending[0]]
            if size % cut == 0:
                parts.append(pending.pop(0))
                size //= cut
            elif cut % size == 0:
                key = context.owner[pending[0]]
                old = context.splits.get(key, (cut,))
                at = old.index(cut)
                raise _Split(key, (*old[:at], size, cut // size, *old[at + 1 :]))
            else:
                raise Unproved("a cut does not follow the digits of a dimension")
        if size > 1:
            rest = context.digit("t", size)
            parts.append(rest)
            left.append(rest)
        by[digit] = tuple(parts)
    return tuple(left)


def _join(node: Node, value: Value, grid: Sequence[tuple[Digit, ...]], block: BlockGraph) -> Value:
    dims = []
    for d, digits in enumerate(value.dims):
        outer = tuple(g for a in range(3) if node["omap"][a] == d and block.grid[a] > 1 for g in grid[a])
        dims.append((*outer, *digits))
    return Value(tuple(dims), value.expr)


def _accumulate(node: Node, value: Value, digits: tuple[Digit, ...], context: _Context) -> Value:
    if node.op == "accum_rms":
        squares = _multiply(value.expr, value.expr, context)
        return Value((*value.dims[:-1], ()), _root(squares, (*digits, *value.dims[-1]), context))
    total = Value(value.dims, _bind(value.expr, digits, context))
    return total if node.op == "accum" else _sum(total, -1, node.get("width", 1), context)


def prove(reference: Program, candidate: Program) -> str:
    """Empty when the candidate computes the reference for every tile size; otherwise why that was not proved."""
    splits: dict[tuple[int, int], tuple[int, ...]] = {}
    for _ in range(20):
        context = _Context(splits)
        try:
            left = evaluate(reference, context)
            context.kernels = 0
            right = evaluate(candidate, context)
            if len(left) != len(right):
                return "the number of outputs differs"
            return next((r for r in (_same(a, b, context) for a, b in zip(left, right, strict=True)) if r), "")
        except _Split as split:
            splits[split.key] = split.sizes
        except Unproved as error:
            return str(error)
    return "parallel axes would have to be split again and again"


def _same(reference: Value, candidate: Value, context: _Context) -> str:
    if len(reference.dims) != len(candidate.dims):
        return "the outputs' ranks differ"
    by: dict[Digit, tuple[Digit, ...]] = {}
    for a, b in zip(reference.dims, candidate.dims, strict=True):
        if len(a) == len(b):
            by |= {x: (y,) for x, y in zip(a, b, strict=True)}
        elif len(a) == 1:
            by[a[0]] = b
        else:
            return "an output dimension is made of other parts"
    left = merge(substitute(reference.expr, by), context)
    right = merge(candidate.expr, context)
    free = {d: f"o{n}" for n, d in enumerate(d for dim in candidate.dims for d in dim)}
    if signature(left, free) != signature(right, free) or canonical(left, free) != canonical(right, free):
        return "the index normal forms differ"
    return ""
