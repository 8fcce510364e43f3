"""Rewrite rules as text, matching, and saturation.

A rule reads `(div (div ?a ?b) ?c) = (div ?a (mul ?b ?c))`: every term of the left form in the graph is made equal to the right form. `?a`
stands for a class, and inside brackets for a part of the payload: `(sum[?n] ?a)`. `when` looks at the binding and the classes' facts; it
returns False to refuse, or a dictionary of further payload values that the right side may use. The right side may only use what is bound.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from wager.graph.egraph.core import EGraph, ENode, Term

Binding = dict[str, Any]
Condition = Callable[[Binding, Callable[[str], Any]], "bool | dict[str, Any]"]
TOKEN = re.compile(r"[()\[\],]|[^\s()\[\],]+")


@dataclass(frozen=True)
class Pattern:
    """A variable (`op` starts with ?) or an operator over patterns; payload parts that start with ? are variables too."""

    op: str
    payload: tuple[Any, ...] = ()
    args: tuple[Pattern, ...] = ()

    @property
    def depth(self) -> int:
        return 0 if self.op[0] == "?" else 1 + max((a.depth for a in self.args), default=0)

    def classes(self) -> set[str]:
        """The variables that stand for classes."""
        return {self.op} if self.op[0] == "?" else set().union(*(a.classes() for a in self.args))

    def variables(self) -> set[str]:
        if self.op[0] == "?":
            return {self.op}
        own = {p for p in self.payload if isinstance(p, str) and p[0] == "?"}
        return own.union(*(a.variables() for a in self.args))


def parse(text: str) -> Pattern:
    """`(sum[?n] (mul ?a ?b))`. Raises ValueError."""
    tokens = TOKEN.findall(text)
    pattern, at = _parse(tokens, 0)
    if at != len(tokens):
        raise ValueError(f"pattern {text!r} has something after its end")
    return pattern


def _parse(tokens: Sequence[str], at: int) -> tuple[Pattern, int]:
    grouped = tokens[at] == "("
    op, at = tokens[at + grouped], at + 1 + grouped
    payload: list[Any] = []
    if at < len(tokens) and tokens[at] == "[":
        at += 1
        while tokens[at] != "]":
            if tokens[at] != ",":
                payload.append(int(tokens[at]) if tokens[at].lstrip("-").isdigit() else tokens[at])
            at += 1
        at += 1
    args: list[Pattern] = []
    while grouped and tokens[at] != ")":
        arg, at = _parse(tokens, at)
        args.append(arg)
    return Pattern(op, tuple(payload), tuple(args)), at + grouped


@dataclass(frozen=True)
class Rule:
    """left = right where `when` holds."""

    name: str
    left: Pattern
    right: Pattern
    when: Condition | None = None

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted(self.left.classes()))

    @cached_property
    def values(self) -> tuple[str, ...]:
        """The payload variables of the left side."""
        return tuple(sorted(self.left.variables() - self.left.classes()))


def rule(name: str, text: str, when: Condition | None = None) -> Rule:
    """`left = right`. Raises ValueError when the right side uses a variable that nothing binds (unless `when` may bind it)."""
    left, right = (parse(side) for side in text.split(" = "))
    free = right.variables() - left.variables()
    if free and when is None:
        raise ValueError(f"rule {name}: {', '.join(sorted(free))} is not bound on the left")
    return Rule(name, left, right, when)


def both(name: str, text: str, when: Condition | None = None) -> list[Rule]:
    """The rule in both directions; each direction needs every variable of the other."""
    left, right = text.split(" = ")
    return [rule(name, text, when), rule(f"{name} (back)", f"{right} = {left}", when)]


def matches(graph: EGraph, pattern: Pattern, c: int, binding: Binding) -> Iterator[Binding]:
    """Every way in which class `c` has the form of `pattern`, as an extension of `binding`."""
    if pattern.op[0] == "?":
        known = binding.get(pattern.op)
        if known is None:
            yield {**binding, pattern.op: c}
        elif graph.find(known) == c:
            yield binding
        return
    for node in graph.enodes(c, pattern.op):
        bound = _payload(pattern.payload, node[1], binding)
        if bound is not None and len(node[2]) == len(pattern.args):
            yield from _arguments(graph, pattern.args, node, 0, bound)


def _arguments(
    graph: EGraph, patterns: tuple[Pattern, ...], node: ENode, at: int, binding: Binding
) -> Iterator[Binding]:
    if at == len(patterns):
        yield binding
        return
    for bound in matches(graph, patterns[at], node[2][at], binding):
        yield from _arguments(graph, patterns, node, at + 1, bound)


def _payload(wanted: tuple[Any, ...], found: tuple[Any, ...], binding: Binding) -> Binding | None:
    if len(wanted) != len(found):
        return None
    bound = binding
    for w, f in zip(wanted, found, strict=True):
        if isinstance(w, str) and w[0] == "?":
            if w not in bound:
                bound = {**bound, w: f}
            elif bound[w] != f:
                return None
        elif w != f:
            return None
    return bound


def build(graph: EGraph, pattern: Pattern, binding: Binding) -> int:
    """The class of the pattern under a binding. Raises ValueError for a node without a fact."""
    if pattern.op[0] == "?":
        return graph.find(binding[pattern.op])
    args = tuple(build(graph, a, binding) for a in pattern.args)
    payload = tuple(binding[p] if isinstance(p, str) and p[0] == "?" else p for p in pattern.payload)
    return graph.node(pattern.op, payload, args)


@dataclass(frozen=True)
class Bounds:
    """Where saturation is cut off. A rule with more than `burst` new matches in a round rests for some rounds, longer each time."""

    nodes: int = 100_000
    seconds: float = 10.0
    rounds: int = 100
    burst: int = 2000


USUAL = Bounds()


@dataclass
class Saturation:
    """`limit` is empty when no rule has anything left to add; otherwise it names what cut the work off."""

    rounds: int = 0
    nodes: int = 0
    seconds: float = 0.0
    limit: str = ""
    applied: Counter[str] = field(default_factory=Counter)


def saturate(
    graph: EGraph, rules: Sequence[Rule], bounds: Bounds = USUAL, done: Callable[[], bool] = lambda: False
) -> Saturation:
    """Applies the rules until nothing changes, `done()` holds, or a bound is hit."""
    report, start = Saturation(), time.perf_counter()
    seen: list[set[tuple]] = [set() for _ in rules]
    rest, strikes = [0] * len(rules), [0] * len(rules)
    waiting: list[set[int] | None] = [None for _ in rules]  # classes that a resting rule has yet to look at
    graph.touched.clear()
    fresh: set[int] | None = None
    graph.rebuild()
    while not done():
        if report.rounds >= bounds.rounds:
            report.limit = f"{bounds.rounds} rounds"
            break
        report.rounds += 1
        found: list[tuple[int, int, Binding]] = []
        for at, r in enumerate(rules):
            roots = _roots(graph, r, _joined(fresh, waiting[at], first=report.rounds == 1))
            if rest[at] >= report.rounds:
                waiting[at] = roots
                continue
            new = _search(graph, r, roots, seen[at], bounds.burst << strikes[at])
            if new is None:
                strikes[at] += 1
                rest[at], waiting[at] = report.rounds + (2 << strikes[at]), roots
                continue
            waiting[at] = set()
            found += [(at, c, b) for c, b in new]
            if time.perf_counter() - start > bounds.seconds:
                break
        graph.touched.clear()
        limit = _apply(graph, rules, found, seen, bounds, start, report)
        fresh = set(graph.touched)
        if limit:
            report.limit = limit
            break
        resting = [at for at in range(len(rules)) if rest[at] >= report.rounds and waiting[at]]
        if not fresh and not resting:
            break
        if not fresh:
            for at in resting:
                rest[at] = 0
    report.nodes, report.seconds = graph.nodes, time.perf_counter() - start
    return report


def _joined(fresh: set[int] | None, waiting: set[int] | None, first: bool) -> set[int] | None:
    """Classes to look at; None stands for all."""
    if first or fresh is None:
        return None
    return fresh | (waiting or set())


def _roots(graph: EGraph, r: Rule, changed: set[int] | None) -> set[int]:
    """Classes where a new match can have its root: changed ones and those above them, as deep as the pattern reaches."""
    own = graph.of(r.left.op)
    if changed is None:
        return own
    reach = {graph.find(c) for c in changed}
    layer = reach
    for _ in range(r.left.depth - 1):
        layer = {u for c in layer for u in graph.users_of(c)} - reach
        reach = reach | layer
    return own & reach


def _search(graph: EGraph, r: Rule, roots: set[int], seen: set[tuple], most: int) -> list[tuple[int, Binding]] | None:
    """New matches under `roots`; None when there are more than `most`."""
    new = []
    for c in roots:
        for binding in matches(graph, r.left, c, {}):
            if _key(graph, r, c, binding) not in seen:
                new.append((c, binding))
                if len(new) > most:
                    return None
    return new


def _key(graph: EGraph, r: Rule, c: int, binding: Binding) -> tuple:
    return (graph.find(c), *(graph.find(binding[v]) for v in r.classes), *(binding[v] for v in r.values))


def _apply(
    graph: EGraph,
    rules: Sequence[Rule],
    found: Sequence[tuple[int, int, Binding]],
    seen: list[set[tuple]],
    bounds: Bounds,
    start: float,
    report: Saturation,
) -> str:
    """Adds the right sides; what limit was hit, or nothing."""
    for count, (at, c, binding) in enumerate(found):
        r = rules[at]
        seen[at].add(_key(graph, r, c, binding))
        full = dict(binding)
        if r.when is not None:
            allowed = r.when(full, lambda name, b=full: graph.facts[graph.find(b[name])])
            if allowed is False:
                continue
            if isinstance(allowed, dict):
                full |= allowed
        try:
            made = build(graph, r.right, full)
        except ValueError:
            continue  # the right side makes no sense for these shapes
        if graph.union(c, made, r.name):
            report.applied[r.name] += 1
        if graph.nodes > bounds.nodes:
            graph.rebuild()
            return f"{bounds.nodes} nodes"
        if count % 256 == 0 and time.perf_counter() - start > bounds.seconds:
            graph.rebuild()
            return f"{bounds.seconds} s"
    graph.rebuild()
    return f"{bounds.seconds} s" if time.perf_counter() - start > bounds.seconds else ""


def to_term(pattern: Pattern) -> Term:
    """A pattern without variables as a term."""
    return Term(pattern.op, pattern.payload, tuple(to_term(a) for a in pattern.args))
