"""Pruning by e-graph look-up, as Mirage publishes it (arXiv 2405.05751, section 4): saturate the target, then ask whether a prefix is in it.

One e-graph per search holds the target and all its forms under Mirage's equalities; a prefix can become the target only if its own expression
is somewhere among them. `abstract.Subexpressions` decides the same question by normal forms, exactly and without saturation; this is the
published method beside it. A saturation that hits a bound prunes too much, and says so once. Cancellation is deliberately absent.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from wager.compile.mirage.abstract import ONE, Algebra, Subexpressions, entries, factors
from wager.compile.mirage.abstract import Term as Monomial
from wager.compile.mirage.generate import Limits
from wager.errors import UsageError
from wager.graph.egraph.core import EGraph, Term
from wager.graph.egraph.rules import USUAL, Bounds, Rule, both, rule, saturate
from wager.graph.program import Program

log = logging.getLogger(__name__)


def equalities(totals: Sequence[int], sizes: Sequence[int]) -> list[Rule]:
    """Mirage's table. `totals`: how much the target's sums add up; `sizes`: what one operator may add up, so that a total can split."""

    def product(binding: dict, _: object) -> bool | dict:
        return {"?nm": binding["?n"] * binding["?m"]}

    table = [
        rule("add commutes", "(add ?a ?b) = (add ?b ?a)"),
        rule("mul commutes", "(mul ?a ?b) = (mul ?b ?a)"),
        *both("add associates", "(add ?a (add ?b ?c)) = (add (add ?a ?b) ?c)"),
        *both("mul associates", "(mul ?a (mul ?b ?c)) = (mul (mul ?a ?b) ?c)"),
        *both("mul distributes", "(mul ?a (add ?b ?c)) = (add (mul ?a ?b) (mul ?a ?c))"),
        *both("div distributes", "(div (add ?a ?b) ?c) = (add (div ?a ?c) (div ?b ?c))"),
        *both("mul meets div", "(mul ?a (div ?b ?c)) = (div (mul ?a ?b) ?c)"),
        *both("div of div", "(div (div ?a ?b) ?c) = (div ?a (mul ?b ?c))"),
        *both("sum of add", "(sum[?n] (add ?a ?b)) = (add (sum[?n] ?a) (sum[?n] ?b))"),
        *both("sum of mul", "(sum[?n] (mul ?a ?b)) = (mul (sum[?n] ?a) ?b)"),
        *both("sum of div", "(sum[?n] (div ?a ?b)) = (div (sum[?n] ?a) ?b)"),
        rule("sum of sum", "(sum[?n] (sum[?m] ?a)) = (sum[?nm] ?a)", product),
    ]
    for total in splittable(totals, sizes):
        for n in sorted(set(sizes)):
            if 1 < n < total and total % n == 0:
                left = f"(sum[{total}] ?a)"
                table.append(rule(f"sum {total} splits", f"{left} = (sum[{n}] (sum[{total // n}] ?a))"))
                table.append(rule(f"sum {total} splits", f"{left} = (sum[{total // n}] (sum[{n}] ?a))"))
    return table


def splittable(totals: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The totals and what is left of them when sizes are split off."""
    found, pending = set(), [t for t in totals if t > 1]
    while pending:
        total = pending.pop()
        if total not in found:
            found.add(total)
            pending += [total // n for n in sizes if 1 < n < total and total % n == 0]
    return sorted(found)


class Written:
    """Normal forms as terms: one fixed way of writing each."""

    def __init__(self, algebra: Algebra):
        self.algebra, self._memo = algebra, {}

    def __call__(self, expression: int) -> Term:
        if expression not in self._memo:
            terms = [self._monomial(m) for m in self.algebra.expressions[expression]]
            whole = terms[0]
            for t in terms[1:]:
                whole = Term("add", (), (whole, t))
            self._memo[expression] = whole
        return self._memo[expression]

    def _monomial(self, m: Monomial) -> Term:
        count, coefficient, atoms, divisor = m
        factors = [self._atom(a) for a in atoms]
        if coefficient != 1 or not factors:
            factors.append(Term("const", (str(Fraction(coefficient)),)))
        whole = factors[0]
        for f in factors[1:]:
            whole = Term("mul", (), (whole, f))
        if count > 1:
            whole = Term("sum", (count,), (whole,))
        return whole if divisor == ONE else Term("div", (), (whole, self(divisor)))

    def _atom(self, a: int) -> Term:
        name, argument = self.algebra.atoms[a]
        return Term(name) if argument < 0 else Term("apply", (name,), (self(argument),))


class Looked:
    """`expression in looked`: whether it occurs in a form of one of the targets. Answers are remembered."""

    def __init__(self, algebra: Algebra, targets: Sequence[int], sizes: Sequence[int], bounds: Bounds = USUAL):
        """`sizes`: how many entries one operator of the search may add up (whole dimensions; in a concrete search also tiles and loops)."""
        self.written, self.graph = Written(algebra), EGraph()
        for t in targets:
            self.graph.add(self.written(t))
        table = equalities([n for t in targets for n in totals(algebra, t)], sizes)
        self.saturation = saturate(self.graph, table, bounds)
        if self.saturation.limit:
            log.warning(
                "the e-graph of the target was cut off at %s: the search prunes too much; use pruning by normal form",
                self.saturation.limit,
            )
        self._memo: dict[int, bool] = {}

    def __contains__(self, expression: int) -> bool:
        if expression not in self._memo:
            self._memo[expression] = self.graph.lookup(self.written(expression)) is not None
        return self._memo[expression]


def totals(algebra: Algebra, expression: int) -> list[int]:
    """How much the sums of an expression add up."""
    seen: set[int] = set()
    found: set[int] = set()
    pending = [expression]
    while pending:
        e = pending.pop()
        if e in seen:
            continue
        seen.add(e)
        for count, _, atoms, divisor in algebra.expressions[e]:
            found.add(count)
            pending += [algebra.atoms[a][1] for a in atoms if algebra.atoms[a][1] >= 0] + ([divisor] if divisor else [])
    return sorted(found)


def pruner(algebra: Algebra, program: Program, targets: Sequence[int], limits: Limits, tiled: bool = False) -> Any:
    """What `limits.pruning` asks for: an exact decision by normal form, or a look-up in the target's e-graph.

    `tiled`: the search sums parts of dimensions too. Raises UsageError for another word.
    """
    if limits.pruning == "normal form":
        return Subexpressions(algebra, targets, factors(program))
    if limits.pruning != "e-graph":
        raise UsageError(f"pruning {limits.pruning!r} is unknown; use 'normal form' or 'e-graph'")
    sizes = {entries(n, [program.nodes[i].shape for i in n.inputs]) for n in program.nodes if n.inputs and not n.block}
    if tiled:
        sizes |= {part for n in sizes for part in range(2, n) if n % part == 0}
    return Looked(algebra, targets, sorted(sizes))
