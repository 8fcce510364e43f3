"""The e-graph against brute force: congruence closure, saturation, look-up, limits."""

from __future__ import annotations

import itertools
import random

import pytest

from wager.graph.egraph.core import EGraph, Term, Unsound
from wager.graph.egraph.rules import Bounds, both, parse, rule, saturate


def leaf(name: str) -> Term:
    return Term(name)


def subterms(t: Term) -> set[Term]:
    return {t}.union(*(subterms(a) for a in t.args))


def closure(terms: set[Term], equations: list[tuple[Term, Term]]) -> dict[Term, int]:
    """Congruence by brute force: join and look again until nothing changes."""
    mark = {t: i for i, t in enumerate(terms)}

    def join(a: Term, b: Term) -> bool:
        old, new = mark[a], mark[b]
        if old == new:
            return False
        for t in mark:
            if mark[t] == old:
                mark[t] = new
        return True

    changed = True
    while changed:
        changed = any([join(a, b) for a, b in equations])
        for s, t in itertools.combinations(terms, 2):
            same = (s.op, s.payload, len(s.args)) == (t.op, t.payload, len(t.args)) and s.args
            if same and all(mark[a] == mark[b] for a, b in zip(s.args, t.args, strict=True)):
                changed |= join(s, t)
    return mark


def random_term(rng: random.Random, depth: int) -> Term:
    if depth == 0 or rng.random() < 0.3:
        return leaf(rng.choice("abc"))
    if rng.random() < 0.4:
        return Term("f", (rng.randrange(2),), (random_term(rng, depth - 1),))
    return Term("g", (), (random_term(rng, depth - 1), random_term(rng, depth - 1)))


@pytest.mark.parametrize("seed", range(25))
def test_congruence_closure_is_the_brute_force_one(seed):
    rng = random.Random(seed)
    terms = set().union(*(subterms(random_term(rng, 3)) for _ in range(6)))
    pool = sorted(terms, key=str)
    equations = [(rng.choice(pool), rng.choice(pool)) for _ in range(4)]
    graph = EGraph()
    place = {t: graph.add(t) for t in pool}
    for a, b in equations:
        graph.union(place[a], place[b])
        if rng.random() < 0.5:
            graph.rebuild()
    graph.rebuild()
    want = closure(terms, equations)
    for s, t in itertools.combinations(pool, 2):
        assert graph.equal(place[s], place[t]) == (want[s] == want[t]), (str(s), str(t))
    assert all(graph.lookup(t) == graph.find(place[t]) for t in pool)


MONOID = [rule("commutes", "(g ?a ?b) = (g ?b ?a)"), *both("associates", "(g ?a (g ?b ?c)) = (g (g ?a ?b) ?c)")]


def leaves(t: Term) -> list[str]:
    return [t.op] if not t.args else sorted(x for a in t.args for x in leaves(a))


@pytest.mark.parametrize("seed", range(8))
def test_saturation_decides_a_commutative_monoid(seed):
    """Two products are equal exactly when they have the same factors; every bracketing of the first is then in the graph."""
    rng = random.Random(seed)

    def product(names: list[str]) -> Term:
        if len(names) == 1:
            return leaf(names[0])
        cut = rng.randrange(1, len(names))
        return Term("g", (), (product(names[:cut]), product(names[cut:])))

    names = [rng.choice("abc") for _ in range(5)]
    graph, terms = EGraph(), [product(rng.sample(names, 5)) for _ in range(3)]
    terms += [product([rng.choice("abc") for _ in range(5)]) for _ in range(3)]
    place = [graph.add(t) for t in terms]
    assert not saturate(graph, MONOID).limit
    for i, j in itertools.combinations(range(6), 2):
        assert graph.equal(place[i], place[j]) == (leaves(terms[i]) == leaves(terms[j]))
    for _ in range(20):
        assert graph.lookup(product(rng.sample(names, 5))) == graph.find(place[0])
    assert graph.lookup(Term("g", (), (leaf("d"), leaf("a")))) is None


def test_payloads_bind_and_conditions_compute():
    merge = rule("merge", "(s[?n] (s[?m] ?a)) = (s[?nm] ?a)", lambda b, _: {"?nm": b["?n"] * b["?m"]})
    graph = EGraph()
    top = graph.add(Term("s", (2,), (Term("s", (3,), (Term("s", (5,), (leaf("a"),)),)),)))
    saturate(graph, [merge])
    assert graph.lookup(Term("s", (30,), (leaf("a"),))) == graph.find(top)
    never = rule("never", "(s[?n] ?a) = ?a", lambda *_: False)
    assert saturate(graph, [never]).applied == {}
    with pytest.raises(ValueError, match="not bound"):
        rule("loose", "(f ?a) = (g ?a ?b)")
    assert str(parse("(s[?n,4] ?a)").payload) == "('?n', 4)"


def test_limits_are_named_and_a_resting_rule_comes_back():
    grow = rule("grow", "(f ?a) = (f (h ?a))")
    graph = EGraph()
    graph.add(Term("f", (), (leaf("a"),)))
    assert saturate(graph, [grow], Bounds(nodes=50)).limit == "50 nodes"
    assert saturate(graph, [grow], Bounds(rounds=3)).limit == "3 rounds"
    wide = EGraph()
    names = list("abcdef")
    whole = leaf(names[0])
    for n in names[1:]:
        whole = Term("g", (), (whole, leaf(n)))
    wide.add(whole)
    free, throttled = saturate(wide, MONOID), EGraph()
    throttled.add(whole)
    slow = saturate(throttled, MONOID, Bounds(burst=5))
    assert not free.limit and not slow.limit and slow.rounds > free.rounds and throttled.nodes == wide.nodes


def test_a_rule_that_joins_different_facts_is_named():
    graph = EGraph(lambda op, payload, args: payload)
    graph.add(Term("s", (1,), ()))
    with pytest.raises(Unsound, match="wrong"):
        saturate(graph, [rule("wrong", "(s[?n]) = (t[7])")])
