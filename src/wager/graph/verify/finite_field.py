"""Probabilistic equivalence: evaluate both programs at random points of a pair of finite fields, many times.

Exact in one direction: programs that are equal by field algebra are never rejected. A trial accepts an unequal pair with probability at most
8*d*k^4/q + q^(-1/k^2), d the degree and k the number of exponential terms of the compared polynomials ("Mirage", arXiv 2405.05751). k counts
the terms that are summed, so this bound says little about attention. Programs with exponentials are therefore first compared with exp as an
unknown function (a random one per trial): equal programs that do not need exp(a+b) = exp(a)exp(b) agree always, and unequal ones are caught as
in any field without exponentials (Schwartz-Zippel, with the chance that two arguments collide). Only where that comparison fails is exp taken
as a power of a root of unity. Trials run on a shrunken twin and their bounds multiply. One trial at full size guards against a mistake in the
shrinking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np

from wager.graph.domains import (
    TWIN_PRIMES,
    FiniteField,
    FunctionField,
    NotInDomain,
    Pair,
    UnluckyDraw,
    field_primes,
)
from wager.graph.interpret import run
from wager.graph.operators import ShapeError
from wager.graph.program import Program, check
from wager.graph.verify.degree import applications, compared
from wager.graph.verify.twin import shrink


@dataclass(frozen=True)
class Verdict:
    """`equal`; the probability bound with which an unequal pair would have passed; how it was reached."""

    equal: bool
    reason: str
    error_bound: float = 1.0
    trials: int = 0
    degree: int = 0
    exponentials: int = 0
    on_twin: bool = False
    order: tuple[int, ...] = ()
    method: str = "exponentials as powers of a root of unity"

    def __bool__(self) -> bool:
        return self.equal


def trial_bound(degree: int, exponentials: int, q: int) -> float:
    """The chance that one trial accepts an unequal pair, at most 1 (exp as a power of a root of unity)."""
    k = max(exponentials, 1)
    if exponentials == 0:
        return min(1.0, degree / q)
    if k > 10_000:
        return 1.0
    return min(1.0, 8 * degree * k**4 / q + q ** (-1 / k**2))


def function_bound(degree: int, count: int, argument_degree: int, q: int) -> float:
    """The same with every function unknown: the outputs' difference vanishes, or two of `count` different arguments take one value."""
    return min(1.0, (degree + count * (count - 1) * argument_degree) / q)


def verify(
    reference: Program,
    candidate: Program,
    rng: np.random.Generator,
    *,
    target: float = 1e-9,
    max_trials: int = 200,
    full_size: bool = False,
    primes: tuple[int, int] | None = None,
) -> Verdict:
    """Whether `candidate` computes `reference`: trials until the error bound is below `target` or `max_trials` are done.

    `full_size` adds one trial at the original sizes. Raises NotInDomain for a program that fields cannot express.
    """
    try:
        check(candidate)
    except ShapeError as error:
        return Verdict(False, f"malformed: {error}")
    if reference.input_shapes != candidate.input_shapes:
        return Verdict(False, f"inputs differ: {reference.input_shapes} and {candidate.input_shapes}")
    if sorted(reference.output_shapes) != sorted(candidate.output_shapes):
        return Verdict(False, f"output shapes differ: {reference.output_shapes} and {candidate.output_shapes}")
    try:
        left, right = shrink(reference, candidate)
        on_twin = True
    except ShapeError:
        left, right, on_twin = reference, candidate, False
    orders = (
        list(permutations(range(len(left.outputs)))) if len(left.outputs) <= 4 else [tuple(range(len(left.outputs)))]
    )
    if primes is None:
        primes = TWIN_PRIMES if on_twin else field_primes()
    if not on_twin:
        max_trials = min(max_trials, 2)  # sizes that cannot shrink are slow to check
    d, k = compared(left, right)
    count, inner = applications(left, right)
    as_functions = function_bound(d, count, inner, primes[1])
    tests: list[tuple[type[FiniteField] | type[FunctionField], float, str]] = [
        (FunctionField, as_functions, "functions taken as unknown")
    ]
    if k:
        tests.append((FiniteField, trial_bound(d, k, primes[1]), Verdict.method))
    verdict = Verdict(False, "")
    for domain, one, method in tests:
        verdict = _trials(left, right, orders, rng, primes, domain, one, target, max_trials)
        verdict = replace(verdict, degree=d, exponentials=k, on_twin=on_twin, method=method)
        if verdict:
            break
    if not verdict:
        return verdict
    orders = [verdict.order]
    if full_size and on_twin and not _one_trial(reference, candidate, orders, rng, field_primes(), FiniteField):
        return Verdict(False, "outputs differ at full size", trials=verdict.trials)
    return verdict


def _trials(
    left: Program,
    right: Program,
    orders: Sequence[tuple[int, ...]],
    rng: np.random.Generator,
    primes: tuple[int, int],
    domain: type[FiniteField],
    one: float,
    target: float,
    most: int,
) -> Verdict:
    """Trials of one kind until the product of their bounds is below `target`, the outputs differ, or `most` are done."""
    bound, done = 1.0, 0
    while done < most and (bound > target or done < 2):
        orders = _one_trial(left, right, orders, rng, primes, domain)
        done += 1
        bound *= one
        if not orders:
            return Verdict(False, f"outputs differ in trial {done}", trials=done)
    return Verdict(True, f"equal in {done} trials", bound, done, order=tuple(orders[0]))


def _one_trial(
    left: Program,
    right: Program,
    orders: Sequence[tuple[int, ...]],
    rng: np.random.Generator,
    primes: tuple[int, int],
    domain: type[FiniteField],
) -> list[tuple[int, ...]]:
    """The orders of the right outputs that agree with the left ones."""
    for _ in range(50):
        field = domain(rng, primes)
        inputs: list[Any] = [field.random(shape) for shape in left.input_shapes]
        try:
            a, b = run(left, inputs, field), run(right, inputs, field)
        except UnluckyDraw:
            continue
        return [order for order in orders if all(same(a[i], b[j]) for i, j in enumerate(order))]
    raise NotInDomain("every draw divided by zero; the program divides by something that is always zero")


def same(a: Pair, b: Pair) -> bool:
    """Equal residues, in q only where both still have one."""
    if a.p.shape != b.p.shape or not np.array_equal(a.p, b.p):
        return False
    return a.q is None or b.q is None or np.array_equal(a.q, b.q)
