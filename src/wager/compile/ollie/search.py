"""Hybrid derivation search (OLLIE, arXiv 2208.02025): explore by rules, and at every expression try to reach a library operator at once.

States are visited in order of depth and recognised by fingerprint, so a larger depth only adds candidates. Every candidate is exact; on
request it is also evaluated against the original at sampled points with integer inputs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from wager.compile.ollie import dilation, match, rules
from wager.compile.ollie.banded import match_banded
from wager.graph.expression import OutOfRange, Read, Scope, Tensor, evaluate, fingerprint, inputs_of, reads

MATCHERS: dict[str, Callable[[Scope, str], Iterator[tuple[str, Scope]]]] = {
    "matmul": match.match_matmul,
    "conv": match.match_conv,
    "banded": match_banded,
}
"""Library operators that guided derivation aims at; add (expression, tag) -> matches to teach it another."""

LIMITS = {"1": 3, "3": 1, "9": 2}


@dataclass(frozen=True)
class Candidate:
    """An expression whose heavy part is a library operator; `path`: the rules that led to it."""

    scope: Scope
    path: tuple[str, ...]

    @property
    def estimate_s(self) -> float:
        """Flops at 150 GFLOP/s plus bytes at 10 GB/s: only ranks candidates before they are timed."""
        return work(self.scope)


@dataclass
class Derivation:
    """What a search found."""

    candidates: list[Candidate]
    states: int = 0
    pruned: int = 0
    depth: int = 0
    seconds: float = 0.0
    limit: str = ""
    by_depth: list[int] = field(default_factory=list)


def work(scope: Scope) -> float:
    total = 0.0
    chain = rules.stages(scope)
    points = np.prod(scope.shape) * np.prod([b - a for s in chain for _, a, b in s.sums] or [1])
    total += 4 * points / 10e9 + 4 * float(np.prod(scope.shape)) / 10e9
    for read in reads(chain[-1].body):
        thing = read.object
        if isinstance(thing, Tensor) and thing.source is not None and thing.source.kind != "eoperator":
            total += thing.source.expr.flops / 150e9 + 4 * np.prod(thing.shape) / 10e9
    return float(total)


def successors(scope: Scope, path: tuple[str, ...]) -> Iterator[tuple[str, Scope]]:
    """Explorative rules, within how often each may be used."""

    def used(number: str) -> int:
        return sum(step.startswith(f"{number} ") for step in path)

    if used("1") < LIMITS["1"]:
        yield from rules.split_sum(scope)
    yield from dilation.undilate(scope)
    yield from dilation.residues(scope)
    yield from rules.merge_variables(scope)
    if used("3") < LIMITS["3"]:
        yield from rules.split_stage(scope)
    if used("9") < LIMITS["9"]:
        yield from rules.magnify(scope)


def derive(
    scope: Scope,
    *,
    max_depth: int = 6,
    targets: tuple[str, ...] = ("matmul", "conv", "banded"),
    budget_s: float = 20.0,
    max_states: int = 20_000,
    keep: int = 16,
    by_fingerprint: bool = True,
    guided: bool = True,
) -> Derivation:
    """Every way found to express `scope` through one of `targets`, the most promising `keep` by estimate.

    With `guided` off an operator is matched only where no repair (fusing, re-layout) is needed. `limit` says which bound stopped the search.
    """
    start = time.perf_counter()
    found: dict[str, Candidate] = {}
    seen: set[str] = set()
    result = Derivation([])
    queue: deque[tuple[Scope, int, tuple[str, ...]]] = deque([(rules.merge_stages(scope), 0, ())])
    while queue:
        state, depth, path = queue.popleft()
        if time.perf_counter() - start > budget_s:
            result.limit = f"time budget of {budget_s} s"
            break
        if result.states >= max_states:
            result.limit = f"{max_states} states"
            break
        if by_fingerprint:
            mark = fingerprint(state)
            if mark in seen:
                result.pruned += 1
                continue
            seen.add(mark)
        result.states += 1
        if depth >= len(result.by_depth):
            result.by_depth.append(0)
        result.by_depth[depth] += 1
        result.depth = max(result.depth, depth)
        for step, done in matches(state, targets, f"t{result.states}", guided):
            final = rules.merge_stages(done)
            found.setdefault(fingerprint(final), Candidate(final, (*path, *step)))
        if depth < max_depth:
            for step, new in successors(state, path):
                queue.append((rules.merge_stages(new), depth + 1, (*path, step)))
    result.candidates = sorted(found.values(), key=lambda c: c.estimate_s)[:keep]
    result.seconds = time.perf_counter() - start
    if not result.limit and not result.candidates:
        result.limit = f"depth {max_depth}"
    return result


def matches(scope: Scope, targets: tuple[str, ...], tag: str, guided: bool) -> Iterator[tuple[tuple[str, ...], Scope]]:
    """Matched forms of a state, as it is and with its ranges tightened (rule 5)."""
    forms: list[tuple[tuple[str, ...], Scope]] = [((), scope)]
    tight = rules.tighten(scope)
    if tight is not None:
        forms.insert(0, (("5 tighten",), tight))
    for taken, form in forms:
        for target in targets:
            for step, done in MATCHERS[target](form, f"{tag}{target[0]}"):
                if guided or _needs_no_repair(done):
                    yield (*taken, step), rules.merge_stages(done)


def _needs_no_repair(scope: Scope) -> bool:
    """Whether the matched operator reads its inputs as they are."""
    from wager.graph.lower.eoperator import is_identity

    inner = rules.stages(scope)[-1]
    read = next(iter(reads(inner.body)))
    assert isinstance(read, Read) and isinstance(read.object, Tensor) and read.object.source is not None
    return all(t.source is None or is_identity(t.source.expr) for t in read.object.source.inputs)


def agrees(original: Scope, derived: Scope, rng: np.random.Generator, points: int = 64) -> bool:
    """Exact comparison at sampled outputs (corners included) with small integer inputs."""
    tensors = {n: rng.integers(-3, 4, t.shape).astype(np.float64) for n, t in inputs_of(original).items()}
    low = np.array([a for _, a, _ in original.loops])
    high = np.array([b - 1 for _, _, b in original.loops])
    at = np.concatenate([rng.integers(low, high + 1, (points, len(low))), low[None], high[None]])
    try:
        return np.array_equal(evaluate(original, tensors, at), evaluate(derived, tensors, at))
    except OutOfRange:
        return False
