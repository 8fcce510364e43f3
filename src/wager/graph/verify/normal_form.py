"""Normal forms of sums of products over symbolic digits: what family proofs compare.

An expression is a sum of terms; a term sums a product of atoms over bound digits and may have a divisor. Two expressions that differ in the
names of bound digits, in the order of terms or factors, or in whether one dimension is written in one digit or several that always stand
side by side, have the same canonical text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations
from typing import Any

Digit = str
Index = tuple[tuple[Digit, ...], ...]


class Unproved(Exception):
    """The normal form does not cover this program."""


@dataclass(frozen=True)
class Atom:
    """An input element (`argument` empty) or a function of an expression."""

    name: str
    index: Index = ()
    argument: Expr | None = None


@dataclass(frozen=True)
class Term:
    """coefficient * sum over bound digits of atoms / divisor. `counts`: symbolic sizes in the coefficient's denominator."""

    coefficient: Fraction
    bound: frozenset[Digit]
    atoms: tuple[Atom, ...]
    divisor: Expr | None = None
    counts: tuple[Digit, ...] = ()


@dataclass(frozen=True)
class Expr:
    terms: tuple[Term, ...]


def substitute(expr: Expr, by: Mapping[Digit, tuple[Digit, ...]]) -> Expr:
    """Replaces free digits by digit sequences."""

    def index(i: Index) -> Index:
        return tuple(tuple(e for d in dim for e in by.get(d, (d,))) for dim in i)

    def atom(a: Atom) -> Atom:
        return Atom(a.name, index(a.index), a.argument and substitute(a.argument, by))

    return Expr(
        tuple(
            Term(
                t.coefficient,
                frozenset(e for d in t.bound for e in by.get(d, (d,))),
                tuple(atom(a) for a in t.atoms),
                t.divisor and substitute(t.divisor, by),
                tuple(e for d in t.counts for e in by.get(d, (d,))),
            )
            for t in expr.terms
        )
    )


def _occurrences(expr: Expr, found: list[tuple[Digit, ...]]) -> None:
    for t in expr.terms:
        for a in t.atoms:
            found += list(a.index)
            if a.argument:
                _occurrences(a.argument, found)
        if t.divisor:
            _occurrences(t.divisor, found)


def merge(expr: Expr, context: Any) -> Expr:
    """Inside out: bound digits that always stand side by side become one; counts of full dimensions become numbers."""
    terms = []
    for t in expr.terms:
        atoms = tuple(Atom(a.name, a.index, a.argument and merge(a.argument, context)) for a in t.atoms)
        t = Term(t.coefficient, t.bound, atoms, t.divisor and merge(t.divisor, context), t.counts)
        terms.append(_merge_term(t, context))
    return Expr(tuple(terms))


def _merge_term(t: Term, context: Any) -> Term:
    while True:
        found: list[tuple[Digit, ...]] = []
        _occurrences(Expr((t,)), found)
        pair = next((p for p in _pairs(found) if p[0] in t.bound and p[1] in t.bound and _together(*p, found)), None)
        if pair is None:
            break
        size_a, size_b = context.sizes.get(pair[0]), context.sizes.get(pair[1])
        new = context.digit("m", size_a * size_b if size_a and size_b else None)
        t = _fuse(t, pair, new)
    number = t.coefficient
    for d in t.counts:
        size = context.sizes.get(d)
        if size is None:
            return t
        number /= size
    return Term(number, t.bound, t.atoms, t.divisor, ())


def _pairs(found: Sequence[tuple[Digit, ...]]) -> set[tuple[Digit, Digit]]:
    return {(a, b) for digits in found for a, b in zip(digits, digits[1:], strict=False)}


def _together(a: Digit, b: Digit, found: Sequence[tuple[Digit, ...]]) -> bool:
    for digits in found:
        for i, d in enumerate(digits):
            if d == a and (i + 1 >= len(digits) or digits[i + 1] != b):
                return False
            if d == b and (i == 0 or digits[i - 1] != a):
                return False
    return True


def _fuse(t: Term, pair: tuple[Digit, Digit], new: Digit) -> Term:
    def index(i: Index) -> Index:
        return tuple(tuple(new if d == pair[0] else d for d in dim if d != pair[1]) for dim in i)

    def expr(e: Expr) -> Expr:
        return Expr(tuple(term(s) for s in e.terms))

    def term(s: Term) -> Term:
        atoms = tuple(Atom(a.name, index(a.index), a.argument and expr(a.argument)) for a in s.atoms)
        bound = (s.bound - set(pair)) | ({new} if pair[0] in s.bound else set())
        counts = s.counts
        if pair[0] in counts and pair[1] in counts:
            rest = list(counts)
            rest.remove(pair[0])
            rest.remove(pair[1])
            counts = (*rest, new)
        return Term(s.coefficient, bound, atoms, s.divisor and expr(s.divisor), counts)

    return term(t)


def signature(expr: Expr, names: Mapping[Digit, str]) -> str:
    """A text that is equal where `canonical` is, found without trying orders of bound digits: it tells most different forms apart."""
    return "+".join(sorted(_term_signature(t, names) for t in expr.terms))


def _term_signature(t: Term, names: Mapping[Digit, str]) -> str:
    atoms = sorted(
        f"{a.name}({signature(a.argument, names)})"
        if a.argument is not None
        else a.name + ",".join(".".join(names.get(d, "?") for d in dim) for dim in a.index)
        for a in t.atoms
    )
    return f"{t.coefficient}[{len(t.bound)},{len(t.counts)}]{'*'.join(atoms)}" + (
        f"/({signature(t.divisor, names)})" if t.divisor else ""
    )


def canonical(expr: Expr, names: Mapping[Digit, str]) -> str:
    """A text that is equal for expressions which differ in the names of bound digits and the order of terms and factors."""
    return "+".join(sorted(_canonical_term(t, names) for t in expr.terms))


def _canonical_term(t: Term, names: Mapping[Digit, str]) -> str:
    bound = sorted(t.bound)
    if len(bound) > 6:
        raise Unproved("too many summations in one term")
    best = None
    depth = len(names)
    for order in permutations(range(len(bound))):
        inner = {**names, **{d: f"b{depth}.{o}" for d, o in zip(bound, order, strict=True)}}
        atoms = sorted(_canonical_atom(a, inner) for a in t.atoms)
        text = "*".join(atoms) + (f"/({canonical(t.divisor, inner)})" if t.divisor else "")
        text += "".join(sorted(f"/#{inner.get(d, d)}" for d in t.counts))
        best = text if best is None or text < best else best
    return f"{t.coefficient}[{len(bound)}]{best}"


def _canonical_atom(a: Atom, names: Mapping[Digit, str]) -> str:
    if a.argument is not None:
        return f"{a.name}({canonical(a.argument, names)})"
    return a.name + "[" + ",".join(".".join(names.get(d, d) for d in dim) for dim in a.index) + "]"
