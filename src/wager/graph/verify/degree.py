"""Degree and number of exponential terms of what a program computes, for the error bound of a finite-field trial.

A value is a fraction n/d of sums of f*exp(g). Tracked per node: the degree of n and of d, and their numbers of exponential terms (0: none).
Sums of fractions with one common denominator keep it; otherwise denominators multiply. All figures are upper bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from wager.graph.operators import BINARY, UNARY
from wager.graph.program import BlockGraph, Node, Program


@dataclass(frozen=True)
class Fraction:
    """Degrees and exponential terms of numerator and denominator. `below` names the denominator (-1: none); `shared`: it does not vary
    along the last dimension, so that a sum along it keeps it."""

    degree: int = 1
    terms: int = 0
    below_degree: int = 0
    below_terms: int = 0
    below: int = -1
    shared: bool = True


def compared(left: Program, right: Program) -> tuple[int, int]:
    """(degree, exponential terms) of n1*d2 - n2*d1, which is zero where the programs agree; the largest over the outputs."""
    degree = terms = 0
    for a in fractions(left):
        for b in fractions(right):
            degree = max(degree, a.degree + b.below_degree, b.degree + a.below_degree)
            if a.terms or b.terms or a.below_terms or b.below_terms:
                terms = max(terms, _times(a.terms, b.below_terms) + _times(b.terms, a.below_terms))
    return degree, terms


def fractions(program: Program) -> list[Fraction]:
    """The figures of every output."""
    values: list = []
    for _ in _figures(program, values):
        pass
    return [values[i] for i in program.outputs]


POLYNOMIAL = frozenset(("neg", "scale", "shift", "square", "reciprocal"))
"""Unary operators that are field arithmetic; all others apply a function."""


def applications(*programs: Program) -> tuple[int, int]:
    """(how many values functions are applied to, the largest degree of the difference of two arguments), over all programs."""
    count, largest = 0, 0
    for program in programs:
        for node, figure, times in _figures(program, []):
            applied = node.op in ("rms_norm", "accum_rms", "maximum") or node.op in UNARY and node.op not in POLYNOMIAL
            if applied:
                count += times * math.prod(node.shape)
                largest = max(largest, figure.degree + figure.below_degree)
    return count, 2 * largest


def _figures(program: Program, values: list) -> Iterator[tuple[Node, Fraction, int]]:
    """Every operator of both levels with the figures of what it reads (squared for norms) and how many blocks and turns compute it.

    `values` receives the figures of every node.
    """
    for node in program.nodes:
        args = [values[i] for i in node.inputs]
        if node.op == "input":
            values.append(Fraction())
        elif node.op == "kernel":
            assert node.block is not None
            inner: list[Fraction] = []
            block = node.block
            values.append(_block(block, args, inner))
            for i, n in enumerate(block.nodes):
                if n.inputs:
                    turns = 1 if block.after[i] else block.loop
                    added = block.loop * block.nodes[n.inputs[0]].shape[-1]
                    yield n, _argument(n, [inner[j] for j in n.inputs], i, added), block.blocks * turns
        elif node.op == "result":
            values.append(args[0][node["index"]])
        else:
            values.append(_apply(node, args, [program.nodes[i] for i in node.inputs], len(values)))
            if args:
                yield node, _argument(node, args, len(values), program.nodes[node.inputs[0]].shape[-1]), 1


def _argument(node: Node, args: list[Fraction], mark: int, added: int) -> Fraction:
    if node.op in ("rms_norm", "accum_rms"):  # a sum of squares: denominators that differ along it multiply
        return _sum(_product(args[0], args[0], mark), added, mark, shared=args[0].shared)
    return max(args, key=lambda a: a.degree + a.below_degree)


def _block(block: BlockGraph, arguments: list[Fraction], values: list[Fraction] | None = None) -> list[Fraction]:
    """The figures of what is saved; `values` is filled with those of every node."""
    values = [] if values is None else values
    for i, node in enumerate(block.nodes):
        args = [values[j] for j in node.inputs]
        sources = [block.nodes[j] for j in node.inputs]
        if node.op == "input":
            values.append(arguments[node["arg"]])
        elif node.op == "output":
            values.append(args[0])
        elif node.op.startswith("accum"):
            last = sources[0].shape[-1] // node.shape[-1]
            count = block.loop * last
            values.append(_rms(i) if node.op == "accum_rms" else _sum(args[0], count, i))
        else:
            values.append(_apply(node, args, sources, i))
    return [v for v, n in zip(values, block.nodes, strict=True) if n.op == "output"]


def _apply(node: Node, args: list[Fraction], sources: list[Node], mark: int) -> Fraction:
    if node.op == "matmul":
        free = args[1].below < 0
        return _sum(_product(*args, mark=mark), sources[0].shape[-1], mark, shared=args[0].shared and free)
    if node.op == "sum":
        dim = node.get("dim", -1)
        last = dim % len(node.shape) == len(node.shape) - 1
        return _sum(args[0], sources[0].shape[dim] // node.shape[dim], mark, shared=last and args[0].shared)
    if node.op == "mul" or node.op == "square":
        return _product(args[0], args[-1], mark=mark)
    if node.op == "div":
        return _product(args[0], _inverse(args[1], mark, sources[1].shape[-1:] in ((1,), ())), mark=mark)
    if node.op == "rms_norm":
        return _product(args[0], Fraction(0, 0, 1, 0, mark), mark=mark)  # the norm is a fresh variable per row
    if node.op in BINARY:
        return _add(args[0], args[1], mark)
    if node.op == "exp":
        return Fraction(args[0].degree + args[0].below_degree, 1)
    if node.op in ("silu", "sigmoid"):
        return Fraction(1 + args[0].degree, 1, 1, 2, mark)
    if node.op in UNARY and node.op not in ("neg", "scale", "shift"):
        return Fraction()  # uninterpreted: a fresh variable
    return args[0] if args else Fraction(0)


def _rms(mark: int) -> Fraction:
    return Fraction()


def _times(a: int, b: int) -> int:
    """Terms of a product: a sum without exponentials counts as one term that stays free of them."""
    return max(a, b, a * b)


def _product(a: Fraction, b: Fraction, mark: int) -> Fraction:
    below = a.below if b.below < 0 else b.below if a.below < 0 else mark
    return Fraction(
        a.degree + b.degree,
        _times(a.terms, b.terms),
        a.below_degree + b.below_degree,
        _times(a.below_terms, b.below_terms),
        below,
        a.shared and b.shared,
    )


def _inverse(a: Fraction, mark: int, shared: bool) -> Fraction:
    return Fraction(a.below_degree, a.below_terms, a.degree, a.terms, mark, shared)


def _add(a: Fraction, b: Fraction, mark: int) -> Fraction:
    if a.below == b.below or b.below < 0 and a.below < 0:
        return Fraction(max(a.degree, b.degree), a.terms + b.terms, a.below_degree, a.below_terms, a.below)
    return Fraction(
        max(a.degree + b.below_degree, b.degree + a.below_degree),
        _times(a.terms, b.below_terms) + _times(b.terms, a.below_terms),
        a.below_degree + b.below_degree,
        _times(a.below_terms, b.below_terms),
        mark,
    )


def _sum(x: Fraction, count: int, mark: int, shared: bool = False) -> Fraction:
    """`count` terms. Denominators that vary along the sum multiply."""
    if x.below < 0 or shared or count == 1:
        return Fraction(x.degree, x.terms * count, x.below_degree, x.below_terms, x.below, x.shared)
    others = x.below_terms ** (count - 1)
    return Fraction(
        x.degree + (count - 1) * x.below_degree,
        count * _times(x.terms, others),
        x.below_degree * count,
        x.below_terms**count,
        mark,
        False,
    )
