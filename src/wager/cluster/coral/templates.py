"""Serving templates: for every multiset of up to N machines the best pipeline it can make, computed once.

A pipeline is a partition of the machines into stages and a number of layers for each; the machines of a stage hold the same layers and share
its requests, so their rates add up; the slowest stage is the pipeline's rate. A rate is reachable exactly if the most layers that each stage
can hold at that rate add up to all layers. So for each partition the best rate is found by bisection, over all multisets at once.

Shape legend: U multisets, N machines of a multiset at most, C configurations, L layers, S stages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wager.cluster.coral.stage import Configuration, Demand
from wager.errors import UsageError
from wager.solve import LinearModel, solve

BISECTIONS = 60
Tables = Callable[[int], np.ndarray]  # stages -> [C, L + 1] tokens/s


@dataclass(frozen=True)
class Library:
    """Templates of one demand. `counts_UC`: machines of each configuration; `rates_U`: tokens/s; `stages_US`: which stage each of the
    machines (in order of configuration) belongs to, -1 beyond the last; layers come from `split`."""

    demand: Demand
    counts_UC: np.ndarray
    rates_U: np.ndarray
    stages_UN: np.ndarray

    def __len__(self) -> int:
        return len(self.rates_U)

    @cached_property
    def useful(self) -> np.ndarray:
        """Templates that are not dominated; found once, like the rates."""
        return undominated(self)

    @cached_property
    def equal(self) -> np.ndarray:
        """Templates whose machines are all of one configuration."""
        return np.flatnonzero((self.counts_UC > 0).sum(1) == 1)

    def machines(self, template: int) -> list[int]:
        """Configuration of each machine, in order."""
        return [c for c, n in enumerate(self.counts_UC[template]) for _ in range(int(n))]


def multisets(configurations: int, max_nodes: int) -> np.ndarray:
    """[U, N] configuration numbers in ascending order, `configurations` where there is no machine."""
    if configurations < 1 or max_nodes < 1:
        raise UsageError(f"{configurations} configurations and at most {max_nodes} machines make no template")
    rows = [
        [*chosen, *[configurations] * (max_nodes - size)]
        for size in range(1, max_nodes + 1)
        for chosen in itertools.combinations_with_replacement(range(configurations), size)
    ]
    return np.array(rows)


def set_partitions(size: int) -> Iterator[tuple[int, ...]]:
    """Every way to part `size` machines into stages: the stage number of each, stages numbered in order of appearance."""

    def extend(prefix: tuple[int, ...], used: int) -> Iterator[tuple[int, ...]]:
        if len(prefix) == size:
            yield prefix
            return
        for stage in range(used + 1):
            yield from extend((*prefix, stage), max(used, stage + 1))

    yield from extend((), 0)


def build(
    demand: Demand,
    configurations: Sequence[Configuration],
    tables: Tables,
    max_nodes: int = 4,
    memory_ratio: float = 12.0,
) -> Library:
    """All templates of a demand that serve anything, cut at `max_nodes` machines and `memory_ratio` times the model's size."""
    count, layers = len(configurations), demand.model.layers
    machines_UN = multisets(count, max_nodes)
    memory_C = np.array([c.memory_bytes for c in configurations] + [0.0])
    total_U = memory_C[machines_UN].sum(1)
    size = demand.model.total_bytes
    keep = (total_U >= size) & (total_U <= max(memory_ratio * size, memory_C[:-1].min()))
    machines_UN = machines_UN[keep]
    sizes_U = (machines_UN < count).sum(1)
    rates_U, stages_UN = np.zeros(len(machines_UN)), np.full(machines_UN.shape, -1)
    for nodes in range(1, max_nodes + 1):
        rows = np.flatnonzero(sizes_U == nodes)
        if not len(rows):
            continue
        for partition in set_partitions(nodes):
            stages = max(partition) + 1
            table_CL = tables(stages)
            rates_SUL = np.stack([
                sum(table_CL[machines_UN[rows, i]] for i in range(nodes) if partition[i] == s) for s in range(stages)
            ])  # fmt: skip
            # most partitions beat no earlier one, which a single look at the best rate so far tells
            better = _held(rates_SUL, rates_U[rows] * (1 + 1e-9)).sum(0) >= layers
            rates_U[rows[better]] = best_rates(rates_SUL[:, better], layers)
            stages_UN[rows[better], :nodes] = partition
    useful = rates_U > 0
    counts_UC = (machines_UN[useful][:, :, None] == np.arange(count)).sum(1)
    return Library(demand, counts_UC, rates_U[useful], stages_UN[useful])


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


def split(library: Library, template: int, tables: Tables) -> list[tuple[list[int], int]]:
    """(configurations of its machines, layers) of each stage of a template; layers add up to the model's."""
    machines, partition = library.machines(template), library.stages_UN[template]
    stages = int(partition.max()) + 1
    table_CL = tables(stages)
    groups = [[m for m, s in zip(machines, partition, strict=False) if s == stage] for stage in range(stages)]
    rate, layers = library.rates_U[template], library.demand.model.layers
    held = [int((table_CL[g].sum(0)[1:] >= rate * (1 - 1e-12)).sum()) for g in groups]
    for stage in sorted(range(stages), key=lambda s: -held[s]):  # give back what is too much, from the longest first
        held[stage] -= min(held[stage], max(0, sum(held) - layers))
    return [(g, k) for g, k in zip(groups, held, strict=True) if k]


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


def undominated(library: Library) -> np.ndarray:
    """Templates that no smaller one, and no two smaller ones side by side, replace: same machines or fewer, at least the rate.

    Dropping the others changes no optimum, since the number of replicas is free. Templates are looked up by their counts.
    """
    counts_UC, rates_U = library.counts_UC, library.rates_U
    kinds, most = counts_UC.shape[1], int(counts_UC.sum(1).max(initial=0))
    if (kinds + 1) ** most >= 2**63:
        raise UsageError(f"templates of {most} machines of {kinds} configurations are too many to tell apart")

    def keys_of(machines_RN: np.ndarray) -> np.ndarray:
        """The machines, in order of configuration, as the digits of a whole number: equal for equal multisets only."""
        return (machines_RN + 1) @ (kinds + 1) ** np.arange(machines_RN.shape[1], dtype=np.int64)

    sizes_U = counts_UC.sum(1)
    by_size = {}
    for size in range(1, most + 1):
        rows = np.flatnonzero(sizes_U == size)
        machines_RN = np.repeat(np.tile(np.arange(kinds), len(rows)), counts_UC[rows].ravel()).reshape(len(rows), size)
        keys_R = keys_of(machines_RN)
        order = np.argsort(keys_R)
        by_size[size] = rows, machines_RN, keys_R[order], rates_U[rows][order]

    def rate_of(machines_RN: np.ndarray) -> np.ndarray:
        _, _, sorted_keys, sorted_rates = by_size[machines_RN.shape[1]]
        if not len(sorted_keys):
            return np.zeros(len(machines_RN))
        keys = keys_of(machines_RN)
        at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
        return np.where(sorted_keys[at] == keys, sorted_rates[at], 0.0)

    keep_U = np.ones(len(rates_U), bool)
    for size in range(2, most + 1):
        rows, machines_RN, _, _ = by_size[size]
        for mask in range(
            1, 2 ** (size - 1)
        ):  # every way to part the machines in two; the last machine stays on the right
            left = np.array([mask >> i & 1 for i in range(size)], bool)
            together = rate_of(machines_RN[:, left]) + rate_of(machines_RN[:, ~left])
            keep_U[rows[together >= rates_U[rows] * (1 - 1e-12)]] = False
    return np.flatnonzero(keep_U)
