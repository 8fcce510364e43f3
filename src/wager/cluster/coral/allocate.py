"""Which templates to run where, how many of each: least cost under stock and demand, over all templates.

min  sum price nu + penalty added,  nu = kept + added, kept <= what runs now,  machines <= stock,  rates >= demand,  nu whole.

The library has hundreds of thousands of columns and a solution uses tens. The linear program is solved over a working set; pricing all
columns against its duals (a matrix product) brings in those that would lower the cost until there are none. Then the integer program runs over
the columns whose reduced cost is below incumbent minus bound: no other column can be in a better solution, so nothing is lost.

A replica counts for no more than the whole demand it serves: true of whole replicas, and it brings the linear program close to them.
`lagrange` gives a second bound and plans of its own; what is returned is never worse than a plan of equal machines (`baselines`).

When stock is too scarce every demand is scaled down by the same factor: the largest factor first, then the least cost at that factor.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from wager.cluster.coral import baselines, lagrange
from wager.cluster.coral.market import Allocation, Key, Market, check
from wager.cluster.coral.pack import Packer
from wager.cluster.coral.templates import Library
from wager.errors import UsageError, WagerError
from wager.solve import LinearModel, Solution, solve
from wager.solve.model import INFINITE

ROUNDS = 200
PER_ROUND = 6  # best new columns per demand and region in one round
MOST_COLUMNS = 30_000
PROMISING = 25  # columns per demand and region in the integer program for the largest share, where all are too many
FEW_COLUMNS = 3_000  # that the integer program for the largest share takes all at once


class Scarce(WagerError):
    """No whole-number plan for the full demands was found."""


class Allocator:
    """Holds the libraries and a market; `allocate` may be called each epoch with new stock."""

    def __init__(self, libraries: Sequence[Library], market: Market, start_up_share: float = 0.0):
        """start_up_share: initialisation time over the time between two plans; a machine that is added pays this share of its price."""
        if start_up_share < 0:
            raise UsageError(f"start_up_share={start_up_share} is negative")
        self.libraries, self.market, self.start_up_share = list(libraries), market, start_up_share
        self.useful = [lib.useful for lib in self.libraries]
        self.costs = [lib.machines_UC @ market.price_RC.T for lib in self.libraries]  # [U, R]

    @cached_property
    def packer(self) -> Packer:
        """Needed only where stock is scarce."""
        return Packer(self.libraries, self.costs, self.market.stock_RC)

    @property
    def num_columns(self) -> int:
        return sum(len(lib) for lib in self.libraries) * len(self.market.regions)

    def allocate(
        self, current: Mapping[Key, int] | None = None, time_limit_s: float = 5.0, gap: float = 1e-3
    ) -> Allocation:
        """The cheapest plan for all demands, or for the largest common share of them that the stock allows. Raises WagerError when
        not even a small share can be served."""
        begun = time.perf_counter()
        current = dict(current or {})
        others = [baselines.greedy(self.libraries, self.market, policy) for policy in baselines.POLICIES]
        incumbents = [dict(o.running) for o in others if o.factor >= 1 - 1e-9]
        found = self._generate(current, 1.0, scale=False)
        if found is not None:
            if not incumbents:
                packed = self.packer.pack(1.0, self._worth(found[1]), begun + time_limit_s / 5)
                incumbents = [] if packed is None else [packed]
            try:
                limit_s = time_limit_s if incumbents else time_limit_s / 2
                return self._integer(*found, current, 1.0, begun, limit_s, gap, incumbents)
            except Scarce:
                pass  # fractions of replicas fit the stock, whole ones do not
        others = [baselines.scaled(self.libraries, self.market, policy) for policy in baselines.POLICIES]
        factor, most, plan = self._largest_factor(current, others, begun + time_limit_s * 0.8)
        if factor <= 0:
            raise WagerError("no part of the demands can be served with this stock; add machines or loosen objectives")
        factor *= 1 - 1e-9
        found = self._generate(current, factor, scale=False)
        if found is None:
            raise WagerError(
                f"the plan for {factor:.2%} of the demands does not fit the stock: this is a bug in the allocator"
            )
        found_plan = self._integer(*found, current, factor, begun, time_limit_s, gap, [plan])
        return dataclasses.replace(found_plan, most_factor=max(factor, most))

    # -- the linear program over all columns -------------------------------------------------------------------------------------

    def _generate(self, current: Mapping[Key, int], factor: float, scale: bool) -> tuple[list[Key], Solution] | None:
        """Column generation to optimality; None when the demands (times `factor`) cannot be met. With `scale` the objective is the
        largest factor instead of the cost."""
        columns = list(dict.fromkeys([*current, *self._seed()]))
        known = set(columns)
        for _ in range(ROUNDS):
            program = self._program(columns, current, factor, scale, whole=False, short=not scale)
            lp = solve(program)
            if not lp.found:
                raise WagerError(f"the allocation program could not be solved: {lp.status}")
            fresh = self._price(lp, known, scale, factor)
            if not fresh:
                shortage = 0.0 if scale else float(lp.x[: len(self.libraries)].sum())  # type: ignore[index]
                return None if shortage > 1e-6 * sum(l.demand.tokens_per_s for l in self.libraries) else (columns, lp)
            columns += fresh
            known.update(fresh)
        raise WagerError(f"column generation did not end in {ROUNDS} rounds")

    def _seed(self) -> list[Key]:
        """The most tokens per dollar of every demand in every region."""
        seeds = []
        for d, (lib, cost_UR) in enumerate(zip(self.libraries, self.costs, strict=True)):
            if not len(lib):
                raise WagerError(
                    f"no template serves {lib.demand.name} within its objective of {lib.demand.objective_s} s; allow larger templates or a looser objective"
                )
            for r in range(len(self.market.regions)):
                useful = self.useful[d]
                order = np.argsort(-lib.rates_U[useful] / cost_UR[useful, r], kind="stable")[:PER_ROUND]
                seeds += [(d, r, int(useful[i])) for i in order]
        return seeds

    def _program(
        self, columns: Sequence[Key], current: Mapping[Key, int], factor: float, scale: bool, whole: bool, short: bool
    ) -> LinearModel:
        """Columns: one shortage per demand (or the factor first), then `added` of every key, then `kept` of those that run now.
        Rows: one per demand, then one per region and configuration."""
        program = LinearModel(maximize=scale)
        rates = [self._rates(d, factor) for d in range(len(self.libraries))]
        market, demands = self.market, [lib.demand for lib in self.libraries]
        dear = 1e3 * max(
            float((c / lib.rates_U[:, None]).max())
            for c, lib in zip(self.costs, self.libraries, strict=True)
            if len(lib)
        )
        share = program.add("factor", 0, 1, 1.0) if scale else -1
        shortage = [program.add("", 0, INFINITE if short else 0.0, dear) for _ in demands] if not scale else []
        serve: list[list[tuple[int, float]]] = [[(s, 1.0)] for s in shortage] or [
            [(share, -d.tokens_per_s)] for d in demands
        ]
        use: dict[tuple[int, int], list[tuple[int, float]]] = {}

        def column(key: Key, most: float, extra: float) -> None:
            d, r, u = key
            price = 0.0 if scale else float(self.costs[d][u, r]) * (1 + extra)
            c = program.add("", 0, most, price, integer=whole)
            serve[d].append((c, float(rates[d][u])))
            for configuration in np.flatnonzero(self.libraries[d].counts_UC[u]):
                use.setdefault((r, int(configuration)), []).append(
                    (c, float(self.libraries[d].counts_UC[u, configuration]))
                )

        for key in columns:
            column(key, INFINITE, self.start_up_share)
        for key, count in current.items():
            column(key, count, 0.0)
        for d, terms in zip(demands, serve, strict=True):
            program.row(terms, lower=0.0 if scale else factor * d.tokens_per_s)
        for r in range(len(market.regions)):
            for c in range(len(market.configurations)):
                program.row(use.get((r, c), []), upper=float(market.stock_RC[r, c]))
        return program

    def _price(self, lp: Solution, known: set[Key], scale: bool, factor: float) -> list[Key]:
        """New columns with a favourable reduced cost, the best few of each demand and region."""
        assert lp.duals is not None
        fresh: list[Key] = []
        for d, r, reduced_U in self._reduced_costs(lp, scale, factor):
            candidates = np.flatnonzero(
                reduced_U < -1e-7 * max(1.0, float(np.abs(reduced_U[np.isfinite(reduced_U)]).max(initial=0)))
            )
            order = candidates[np.argsort(reduced_U[candidates], kind="stable")]
            mine = [(d, r, int(u)) for u in order[: PER_ROUND * 4]]
            fresh += [key for key in mine if key not in known][:PER_ROUND]
        return fresh

    def _rates(self, demand: int, factor: float) -> np.ndarray:
        """[U] tokens/s that count: a replica serves no more than is wanted."""
        library = self.libraries[demand]
        return np.minimum(library.rates_U, max(factor * library.demand.tokens_per_s, 1e-9))

    def _reduced_costs(self, lp: Solution, scale: bool, factor: float):
        """(demand, region, reduced costs [U]) of `added` columns under the duals: below zero means it would improve the objective.
        Dominated templates count as infinitely bad: they are never added."""
        assert lp.duals is not None
        demands, sign = len(self.libraries), -1.0 if scale else 1.0
        stock_dual_RC = lp.duals[demands:].reshape(len(self.market.regions), len(self.market.configurations))
        for d, lib in enumerate(self.libraries):
            useful = self.useful[d]
            worth_UR = lib.useful_machines @ stock_dual_RC.T + (self._rates(d, factor)[useful] * lp.duals[d])[:, None]
            price_UR = 0.0 if scale else self.costs[d][useful] * (1 + self.start_up_share)
            for r, reduced in enumerate((price_UR - sign * worth_UR).T):
                reduced_U = np.full(len(lib), INFINITE)
                reduced_U[useful] = reduced
                yield d, r, reduced_U

    # -- whole machines ----------------------------------------------------------------------------------------------------------

    def _largest_factor(
        self, current: Mapping[Key, int], others: Sequence[Allocation], end_s: float
    ) -> tuple[float, float, dict[Key, int]]:
        """(largest common share of the demands that a plan was found for, bound on that, the plan): the best of the baselines, of packing,
        and of the integer program over the columns that fit the stock: all where these are few, the most promising where not."""
        best = max(others, key=lambda o: o.factor)
        factor, plan = best.factor, dict(best.running)
        found = self._generate(current, 1.0, scale=True)
        assert found is not None
        columns, lp = found
        high = min(1.0, lp.value or 0.0)
        if high <= factor:
            return factor, high, plan
        begun, packer = time.perf_counter(), self.packer
        few = packer.num_columns <= FEW_COLUMNS
        share, packed = packer.largest(self._worth(lp), factor, high, begun + (end_s - begun) * (0.3 if few else 0.6))
        if packed is not None and packer.share(packed) > factor:
            factor, plan = packer.share(packed), packed
        more = packer.columns() if few else self._promising(lp)
        columns = list(dict.fromkeys([*columns, *plan, *more]))
        answer = solve(
            self._program(columns, current, 1.0, scale=True, whole=True, short=False),
            time_limit_s=max(0.2, end_s - time.perf_counter()), gap=1e-3,
        )  # fmt: skip
        if answer.x is not None:
            counted = self._read_counts(answer, columns, current, first=1)
            if packer.share(counted) > factor:
                factor, plan = packer.share(counted), counted
        return factor, high, plan

    def _promising(self, lp: Solution) -> list[Key]:
        """The columns of every demand and region that the relaxation for the largest share comes closest to using."""
        return [
            (d, r, int(u))
            for d, r, reduced_U in self._reduced_costs(lp, True, 1.0)
            for u in np.argsort(reduced_U, kind="stable")[:PROMISING]
            if np.isfinite(reduced_U[u])
        ]

    def _worth(self, lp: Solution) -> np.ndarray:
        """[R, C] what one machine more would be worth."""
        assert lp.duals is not None
        return np.abs(lp.duals[len(self.libraries) :].reshape(self.market.stock_RC.shape))

    def _integer(
        self,
        columns: list[Key],
        lp: Solution,
        current: Mapping[Key, int],
        factor: float,
        begun: float,
        time_limit_s: float,
        gap: float,
        incumbents: Sequence[Mapping[Key, int]],
    ) -> Allocation:
        def left() -> float:
            return max(0.2, time_limit_s - (time.perf_counter() - begun))

        assert lp.value is not None
        bound, alone = self._taken_apart(lp, current, factor)
        bound = max(bound, lp.value)
        plans = [*incumbents, *([] if alone is None else [alone])]
        best = self._cheapest(plans, current, factor)
        columns = list(dict.fromkeys([*columns, *(key for p in plans for key in p)]))
        proven = False
        for wider in (False, True):
            value = INFINITE if best is None else self._value(best, current)
            if value - bound <= gap * value or (wider and left() <= 0.2):
                break
            complete = False
            if wider:
                columns, complete = self._near(lp, columns, value - lp.value, factor)
            answer = solve(
                self._program(columns, current, factor, False, True, False), time_limit_s=left() / (2 - wider), gap=gap
            )
            if answer.x is not None:
                found = self._read_counts(answer, columns, current)
                best = self._cheapest([found] if best is None else [best, found], current, factor)
            if complete:
                bound, proven = max(bound, answer.bound), answer.status == "optimal"
        if best is None:
            raise Scarce("no whole-number plan for these demands was found in time")
        value = self._value(best, current)
        bound = min(bound, value)
        return self._allocation(best, lp, current, factor, bound, proven or value - bound <= gap * value, begun)

    def _taken_apart(
        self, lp: Solution, current: Mapping[Key, int], factor: float
    ) -> tuple[float, dict[Key, int] | None]:
        """(lower bound, plan or None when the demands' own solutions do not fit the stock together)."""
        assert lp.duals is not None
        dual_RC = np.minimum(lp.duals[len(self.libraries) :].reshape(self.market.stock_RC.shape), 0.0)
        bound, plan = float((dual_RC * self.market.stock_RC).sum()), {}
        for d, lib in enumerate(self.libraries):
            wanted = factor * lib.demand.tokens_per_s
            if wanted <= 0:
                continue
            mine = {(r, u): n for (k, r, u), n in current.items() if k == d}
            columns = lagrange.columns_of(
                self.costs[d], -(lib.machines_UC @ dual_RC.T), self._rates(d, factor), self.useful[d], mine, self.start_up_share
            )  # fmt: skip
            least, chosen = lagrange.cheapest(columns, wanted)
            bound += least
            plan = None if chosen is None or plan is None else plan | {(d, r, u): n for (r, u), n in chosen.items()}
        return bound, plan

    def _cheapest(
        self, plans: Sequence[Mapping[Key, int]], current: Mapping[Key, int], factor: float
    ) -> dict[Key, int] | None:
        """The cheapest of the plans that `check` accepts."""
        lawful = []
        for plan in plans:
            try:
                check(Allocation(plan, self._price_of(plan), 0, 0, factor, 0, 0, False), self.libraries, self.market)
            except WagerError:
                continue
            lawful.append(dict(plan))
        return min(lawful, key=lambda p: self._value(p, current), default=None)

    def _price_of(self, plan: Mapping[Key, int]) -> float:
        return sum(n * float(self.costs[d][u, r]) for (d, r, u), n in plan.items())

    def _penalty(self, plan: Mapping[Key, int], current: Mapping[Key, int]) -> float:
        added = {key: max(0, n - current.get(key, 0)) for key, n in plan.items()}
        return self.start_up_share * self._price_of(added)

    def _value(self, plan: Mapping[Key, int], current: Mapping[Key, int]) -> float:
        return self._price_of(plan) + self._penalty(plan, current)

    def _near(self, lp: Solution, columns: list[Key], margin: float, factor: float) -> tuple[list[Key], bool]:
        """Columns that a solution better than the incumbent can contain, and whether these are all of them."""
        known, extra = set(columns), []
        for d, r, reduced_U in self._reduced_costs(lp, False, factor):
            near = np.flatnonzero(reduced_U <= margin + 1e-9)
            extra += [(float(reduced_U[u]), (d, r, int(u))) for u in near if (d, r, int(u)) not in known]
        extra.sort()
        return columns + [key for _, key in extra[: max(0, MOST_COLUMNS - len(columns))]], len(columns) + len(
            extra
        ) <= MOST_COLUMNS

    def _read_counts(
        self, answer: Solution, columns: list[Key], current: Mapping[Key, int], first: int | None = None
    ) -> dict[Key, int]:
        """first: the number of the first `added` column, where it does not follow the shortages."""
        assert answer.x is not None
        first = len(self.libraries) if first is None else first
        added, kept = answer.x[first : first + len(columns)], answer.x[first + len(columns) :]
        running: dict[Key, int] = {}
        for key, n in [*zip(columns, added, strict=True), *zip(current, kept, strict=True)]:
            if round(float(n)):
                running[key] = running.get(key, 0) + round(float(n))
        return running

    def _allocation(
        self, running: dict[Key, int], lp: Solution, current: Mapping[Key, int], factor: float, bound: float, proven: bool,
        begun: float,
    ) -> Allocation:  # fmt: skip
        assert lp.duals is not None
        duals = lp.duals[len(self.libraries) :].reshape(self.market.stock_RC.shape)
        scarcity = {
            (self.market.regions[r], self.market.configurations[c].name): float(-duals[r, c])
            for r, c in np.argwhere(duals < -1e-9)
        }  # fmt: skip
        return Allocation(
            running, self._price_of(running), self._penalty(running, current), bound, factor,
            time.perf_counter() - begun, self.num_columns, proven, scarcity=scarcity,
        )  # fmt: skip
