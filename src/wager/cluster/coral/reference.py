"""Templates the slow way: what the compiled search must agree with.

`best_rates` bisects on the rate of given stages, for many multisets at once; `best_of_partitions` tries every partition of the machines and every
split of the budget with it; `solve_template_ilp` is the paper's placement program.

Shape legend: U multisets, N machines of a multiset at most, C configurations, L layers, S stages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from wager.solve import LinearModel, solve

BISECTIONS = 60


def set_partitions(size: int) -> Iterator[tuple[int, ...]]:
    """Every way to part `size` machines into stages: the stage number of each, stages numbered in order of appearance."""

    def extend(prefix: tuple[int, ...], used: int) -> Iterator[tuple[int, ...]]:
        if len(prefix) == size:
            yield prefix
            return
        for stage in range(used + 1):
            yield from extend((*prefix, stage), max(used, stage + 1))

    yield from extend((), 0)


def splits(units: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Every way to give each of `stages` one or more units, all together."""
    for cuts in itertools.combinations(range(1, units), stages - 1):
        edges = (0, *cuts, units)
        yield tuple(b - a for a, b in itertools.pairwise(edges))


def best_rates(rates_SUL: np.ndarray, layers: int) -> np.ndarray:
    """[U] the highest rate at which the stages hold all layers together; `rates_SUL` [S, U, L + 1] must not rise along L."""
    high_U = rates_SUL[:, :, 1].max(0)
    low_U = np.zeros_like(high_U)
    enough_U = _held(rates_SUL, high_U).sum(0) >= layers
    low_U = np.where(enough_U, high_U, low_U)
    for _ in range(BISECTIONS):
        if np.all(high_U - low_U <= 1e-9 * high_U):
            break
        middle_U = (low_U + high_U) / 2
        enough_U = _held(rates_SUL, middle_U).sum(0) >= layers
        low_U, high_U = np.where(enough_U, middle_U, low_U), np.where(enough_U, high_U, middle_U)
    held_SU = _held(rates_SUL, low_U)
    reachable_U = (held_SU.sum(0) >= layers) & (low_U > 0)
    at_SU = np.take_along_axis(rates_SUL, held_SU[:, :, None], 2)[:, :, 0]
    # the rate itself is that of the slowest stage with layers, which is at least the bisected one
    exact_U = np.where(held_SU > 0, at_SU, np.inf).min(0)
    return np.where(reachable_U, exact_U, 0.0)


def best_of_partitions(
    machines: Sequence[int], tables: Callable[[float], np.ndarray], layers: int, units: int | None = None
) -> float:
    """The best rate of a multiset over all partitions and splits of the budget: into equal parts and, with `units`, into any multiples of 1 / units."""
    best = 0.0
    for partition in set_partitions(len(machines)):
        stages = max(partition) + 1
        groups = [[m for m, s in zip(machines, partition, strict=True) if s == stage] for stage in range(stages)]
        shares = {(1 / stages,) * stages}
        if units is not None:
            shares |= {tuple(k / units for k in one) for one in splits(units, stages)}
        for one in shares:
            rates_SUL = np.stack([tables(x)[g].sum(0) for g, x in zip(groups, one, strict=True)])[:, None, :]
            best = max(best, float(best_rates(rates_SUL, layers)[0]))
    return best


def _held(rates_SUL: np.ndarray, rate_U: np.ndarray) -> np.ndarray:
    """[S, U] the most layers a stage can hold at a rate: a binary search along L, where rates do not rise."""
    wanted_U = np.maximum(rate_U, 1e-30)
    low_SU = np.zeros(rates_SUL.shape[:2], np.int64)  # index 0 always will do: no layers
    high_SU = np.full_like(low_SU, rates_SUL.shape[2] - 1)
    while (low_SU < high_SU).any():
        middle_SU = (low_SU + high_SU + 1) // 2
        fast = np.take_along_axis(rates_SUL, middle_SU[:, :, None], 2)[:, :, 0] >= wanted_U
        low_SU, high_SU = np.where(fast, middle_SU, low_SU), np.where(fast, high_SU, middle_SU - 1)
    return low_SU


def solve_template_ilp(table_CL: np.ndarray, machines: Sequence[int], stages: int) -> float:
    """The paper's placement program for one multiset and number of stages: the reference that `best_rates` must agree with."""
    layers, program = table_CL.shape[1] - 1, LinearModel(maximize=True)
    most = float(sum(table_CL[c, 1] for c in machines))
    rate = program.add("rate", 0, most, 1.0)
    x = [[program.binary("") for _ in range(layers)] for _ in range(stages)]
    y = [[program.binary("") for _ in machines] for _ in range(stages)]
    for s in range(stages):
        program.row([(c, 1) for c in x[s]], 1, 1)
    for k in range(len(machines)):
        program.row([(y[s][k], 1) for s in range(stages)], 1, 1)
    program.row([(x[s][j], j + 1) for s in range(stages) for j in range(layers)], layers, layers)
    for s in range(stages):
        terms = [(rate, -1.0)]
        for j in range(layers):
            for k, c in enumerate(machines):
                z = program.add("", 0, 1)
                program.row([(z, 1), (x[s][j], -1)], upper=0)
                program.row([(z, 1), (y[s][k], -1)], upper=0)
                terms.append((z, float(table_CL[c, j + 1])))
        program.row(terms, lower=0)
    answer = solve(program)
    return answer.value or 0.0
