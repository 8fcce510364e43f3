"""Serving templates: for every multiset of up to N machines the best pipeline it can make, computed once.

A pipeline is a partition of the machines into stages and a number of layers for each; the machines of a stage hold the same layers and share
its requests, so their rates add up; the slowest stage is the pipeline's rate. Every stage has its share of the latency objective: equal ones, as
published, or multiples of 1 / `units` that suit it best. The search is compiled (`native`) and exact; `reference` holds slow ones to compare with.

Shape legend: U multisets, N machines of a multiset at most, C configurations, L layers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wager.cluster.coral import native
from wager.cluster.coral.stage import Configuration, Demand
from wager.errors import UsageError

CACHED = ("useful", "equal", "machines_UC", "useful_machines")
Tables = Callable[[float], np.ndarray]  # share of the objective -> [C, L + 1] tokens/s


@dataclass(frozen=True)
class Library:
    """Templates of one demand. `counts_UC`: machines of each configuration; `rates_U`: tokens/s; `stages_UN`: which stage each of the
    machines (in order of configuration) belongs to, -1 beyond the last; `shares_UN`: what part of the objective each stage may take, 0 beyond
    the last; layers come from `split`."""

    demand: Demand
    counts_UC: np.ndarray
    rates_U: np.ndarray
    stages_UN: np.ndarray
    shares_UN: np.ndarray

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

    @cached_property
    def machines_UC(self) -> np.ndarray:
        """`counts_UC` as floating-point numbers, for products with prices."""
        return self.counts_UC.astype(float)

    @cached_property
    def useful_machines(self) -> np.ndarray:
        """Rows of `machines_UC` that are not dominated."""
        return self.machines_UC if len(self.useful) == len(self) else self.machines_UC[self.useful]

    def for_demand(self, demand: Demand) -> Library:
        """The same templates for another rate of tokens: what a template serves does not depend on how much is wanted."""
        if dataclasses.replace(demand, tokens_per_s=0) != dataclasses.replace(self.demand, tokens_per_s=0):
            raise UsageError(
                f"templates of {self.demand.name} do not serve {demand.name}: the demands differ in more than their rates"
            )
        same = dataclasses.replace(self, demand=demand)
        vars(same).update({name: vars(self)[name] for name in CACHED if name in vars(self)})
        return same

    def machines(self, template: int) -> list[int]:
        """Configuration of each machine, in order."""
        return [c for c, n in enumerate(self.counts_UC[template]) for _ in range(int(n))]

    def only(self, rows: np.ndarray) -> Library:
        """Some of the templates."""
        return Library(
            self.demand, self.counts_UC[rows], self.rates_U[rows], self.stages_UN[rows], self.shares_UN[rows]
        )


def multisets(configurations: int, max_nodes: int) -> np.ndarray:
    """[U, N] configuration numbers in ascending order, `configurations` where there is no machine; by size, then by the last, ... first machine."""
    if configurations < 1 or not 1 <= max_nodes <= native.MOST_MACHINES:
        raise UsageError(
            f"templates have 1 to {native.MOST_MACHINES} machines of some configuration: not {max_nodes} of {configurations}"
        )
    found = []
    for size in range(1, max_nodes + 1):
        rows = np.array(list(itertools.combinations_with_replacement(range(configurations), size)))
        rows = rows[np.lexsort(rows.T)]
        found.append(np.pad(rows, ((0, 0), (0, max_nodes - size)), constant_values=configurations))
    return np.concatenate(found)


def build(
    demand: Demand,
    configurations: Sequence[Configuration],
    tables: Tables,
    max_nodes: int = 4,
    memory_ratio: float = 12.0,
    units: int | None = None,
    dominated: bool = True,
) -> Library:
    """All templates of a demand that serve anything, cut at `max_nodes` machines and `memory_ratio` times the model's size.

    units: stages may take any multiples of 1 / units of the objective (equal ones too); None: all the same. dominated: False leaves out
    templates of unequal machines that two smaller ones replace, which no plan needs."""
    machines_UN = multisets(len(configurations), max_nodes)
    memory_C = np.array([c.memory_bytes for c in configurations] + [0.0])
    total_U = memory_C[machines_UN].sum(1)
    size = demand.model.total_bytes
    fits_U = (total_U >= size) & (total_U <= max(memory_ratio * size, memory_C[:-1].min()))
    grids = budgets(tables, max_nodes, units)
    found = native.search(machines_UN, len(configurations), fits_U, grids, dominated)
    rows = np.flatnonzero(found.rates_U > 0)
    of_one = np.array([g.units for g in grids])[found.grids_U[rows]]
    counts_UC = (machines_UN[rows][:, :, None] == np.arange(len(configurations))).sum(1)
    library = Library(
        demand, counts_UC, found.rates_U[rows], found.stages_UN[rows], found.units_UN[rows] / of_one[:, None]
    )
    vars(library)["useful"] = np.flatnonzero(found.useful_U[rows])
    return library


def budgets(tables: Tables, max_nodes: int, units: int | None) -> list[native.Grid]:
    """How the latency objective may be split: into equal parts, and into any parts of so many units."""
    if units is not None and not 1 <= units <= native.MOST_UNITS:
        raise UsageError(f"the latency budget has 1 to {native.MOST_UNITS} units, not {units}")
    free = [] if units is None else [native.Grid(units, np.stack([tables(k / units) for k in range(1, units + 1)]))]
    contained = [s for s in range(1, max_nodes + 1) if units is not None and units % s == 0]
    equal = [s for s in range(1, max_nodes + 1) if s not in contained]
    return free + [native.Grid(s, tables(1 / s)[None]) for s in equal]


def split(library: Library, template: int, tables: Tables) -> list[tuple[list[int], int, float]]:
    """(configurations of its machines, layers, share of the objective) of each stage of a template; layers add up to the model's."""
    machines, partition = library.machines(template), library.stages_UN[template]
    shares = [float(x) for x in library.shares_UN[template] if x > 0]
    groups = [[m for m, s in zip(machines, partition, strict=False) if s == stage] for stage in range(len(shares))]
    rate, layers = library.rates_U[template], library.demand.model.layers
    held = [
        int((tables(share)[g].sum(0)[1:] >= rate * (1 - 1e-12)).sum()) for g, share in zip(groups, shares, strict=True)
    ]
    for stage in sorted(
        range(len(shares)), key=lambda s: -held[s]
    ):  # give back what is too much, from the longest first
        held[stage] -= min(held[stage], max(0, sum(held) - layers))
    return [(g, k, x) for g, k, x in zip(groups, held, shares, strict=True) if k]


def undominated(library: Library) -> np.ndarray:
    """Templates that no smaller one, and no two smaller ones side by side, replace: same machines or fewer, at least the rate. `build` knows
    them already; this finds them in any other library.

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
