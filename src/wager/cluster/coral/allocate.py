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

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from wager.cluster.coral import lagrange
from wager.cluster.coral.stage import Configuration
from wager.cluster.coral.templates import Library, undominated
from wager.errors import UsageError, WagerError
from wager.solve import LinearModel, Solution, solve
from wager.solve.model import INFINITE

ROUNDS = 200
PER_ROUND = 6  # best new columns per demand and region in one round
MOST_COLUMNS = 30_000
Key = tuple[int, int, int]  # demand, region, template


@dataclass(frozen=True)
class Market:
    """What can be rented: stock and USD per hour per region and configuration, [R, C]."""

    regions: tuple[str, ...]
    configurations: tuple[Configuration, ...]
    stock_RC: np.ndarray
    price_RC: np.ndarray

    def __post_init__(self):
        shape = (len(self.regions), len(self.configurations))
        if (
            self.stock_RC.shape != shape
            or self.price_RC.shape != shape
            or (self.stock_RC < 0).any()
            or (self.price_RC <= 0).any()
        ):
            raise UsageError(
                f"stock and prices must be {shape[0]} regions by {shape[1]} configurations, stock not negative, prices positive"
            )


@dataclass(frozen=True)
class Allocation:
    """`running[demand, region, template] = replicas`; `usd_per_h` their price, `penalty_usd` what starting the added ones counts.

    bound: no allocation at this `factor` of the demands costs less (price and penalty together). scarcity: USD per hour that one more
    machine of a configuration in a region would save (from the linear program), where that is not zero.
    """

    running: Mapping[Key, int]
    usd_per_h: float
    penalty_usd: float
    bound: float
    factor: float
    seconds: float
    columns: int
    proven: bool
    scarcity: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def objective(self) -> float:
        return self.usd_per_h + self.penalty_usd

    @property
    def gap(self) -> float:
        return max(0.0, self.objective - self.bound) / max(self.objective, 1e-12)


class Scarce(WagerError):
    """No whole-number plan for the full demands was found."""


class Allocator:
    """Holds the libraries and a market; `allocate` may be called each epoch with new stock."""

    def __init__(self, libraries: Sequence[Library], market: Market, start_up_share: float = 0.0):
        """start_up_share: initialisation time over the time between two plans; a machine that is added pays this share of its price."""
        if start_up_share < 0:
            raise UsageError(f"start_up_share={start_up_share} is negative")
        self.libraries, self.market, self.start_up_share = list(libraries), market, start_up_share
        self.useful = [undominated(lib) for lib in self.libraries]
        self.costs = [lib.counts_UC @ market.price_RC.T for lib in self.libraries]  # [U, R]

    @property
    def num_columns(self) -> int:
        return sum(len(lib) for lib in self.libraries) * len(self.market.regions)

    def allocate(
        self, current: Mapping[Key, int] | None = None, time_limit_s: float = 5.0, gap: float = 1e-3
    ) -> Allocation:
        """The cheapest plan for all demands, or for the largest common share of them that the stock allows. Raises WagerError when
        not even a small share can be served."""
        from wager.cluster.coral import baselines  # they speak of Allocation, which is defined here

        begun = time.perf_counter()
        current = dict(current or {})
        others = [baselines.greedy(self.libraries, self.market, policy) for policy in baselines.POLICIES]
        found, factor = self._generate(current, 1.0, scale=False), 1.0
        if found is not None:
            try:
                return self._integer(*found, current, 1.0, begun, time_limit_s, gap, others)
            except Scarce:
                pass  # fractions of replicas fit the stock, whole ones do not
        factor = max([self._largest_factor(current, time_limit_s / 2), *(o.factor for o in others)])
        if factor <= 0:
            raise WagerError("no part of the demands can be served with this stock; add machines or loosen objectives")
        found = self._generate(current, factor, scale=False)
        if found is None:  # the factor was reached with whole machines, so this only fails by rounding
            factor *= 1 - 1e-6
            found = self._generate(current, factor, scale=False)
        if found is None:
            raise WagerError("no part of the demands can be served with this stock; add machines or loosen objectives")
        return self._integer(*found, current, factor, begun, time_limit_s, gap, others)

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
            serve[d].append((c, float(self._rates(d, factor)[u])))
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
            for r in range(len(self.market.regions)):
                price_U = 0.0 if scale else self.costs[d][:, r] * (1 + self.start_up_share)
                reduced_U = np.full(len(lib), INFINITE)
                useful = self.useful[d]
                worth_U = lib.counts_UC[useful] @ stock_dual_RC[r] + self._rates(d, factor)[useful] * lp.duals[d]
                reduced_U[useful] = (0.0 if scale else price_U[useful]) - sign * worth_U  # type: ignore[index]
                yield d, r, reduced_U

    # -- whole machines ----------------------------------------------------------------------------------------------------------

    def _largest_factor(self, current: Mapping[Key, int], time_limit_s: float) -> float:
        found = self._generate(current, 1.0, scale=True)
        assert found is not None
        columns, _ = found
        answer = solve(
            self._program(columns, current, 1.0, scale=True, whole=True, short=False),
            time_limit_s=time_limit_s,
            gap=1e-3,
        )
        return (answer.value or 0.0) * (1 - 1e-9)  # none found in time: the baselines' shares stand

    def _integer(
        self,
        columns: list[Key],
        lp: Solution,
        current: Mapping[Key, int],
        factor: float,
        begun: float,
        time_limit_s: float,
        gap: float,
        others: Sequence[Allocation],
    ) -> Allocation:
        def left() -> float:
            return max(0.2, time_limit_s - (time.perf_counter() - begun))

        assert lp.value is not None
        bound, alone = self._taken_apart(lp, current, factor, left() / 3)
        bound = max(bound, lp.value)
        plans = [alone, *(dict(o.running) for o in others if o.factor >= factor * (1 - 1e-9))]
        best = self._cheapest([p for p in plans if p is not None], current, factor)
        columns = list(dict.fromkeys([*columns, *(key for p in plans if p is not None for key in p)]))
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
            if factor == 1.0:
                raise Scarce("no whole-number plan for the full demands")
            if not others:
                raise WagerError(f"no whole-number allocation was found in {time_limit_s} s; allow more time")
            return max(others, key=lambda o: (o.factor, -o.usd_per_h))
        value = self._value(best, current)
        bound = min(bound, value)
        return self._allocation(best, lp, current, factor, bound, proven or value - bound <= gap * value, begun)

    def _taken_apart(
        self, lp: Solution, current: Mapping[Key, int], factor: float, time_limit_s: float
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
                self.costs[d], -(lib.counts_UC @ dual_RC.T), self._rates(d, factor), self.useful[d], mine, self.start_up_share
            )  # fmt: skip
            least, chosen = lagrange.cheapest(columns, wanted, max(0.05, time_limit_s / len(self.libraries)))
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

    def _read_counts(self, answer: Solution, columns: list[Key], current: Mapping[Key, int]) -> dict[Key, int]:
        assert answer.x is not None
        added = answer.x[len(self.libraries) : len(self.libraries) + len(columns)]
        kept = answer.x[len(self.libraries) + len(columns) :]
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
            time.perf_counter() - begun, self.num_columns, proven, scarcity,
        )  # fmt: skip


def check(allocation: Allocation, libraries: Sequence[Library], market: Market, tolerance: float = 1e-6) -> None:
    """Stock, demands and price recomputed in plain arithmetic. Raises WagerError naming what is broken."""
    used_RC = np.zeros(market.stock_RC.shape)
    served = [0.0] * len(libraries)
    price = 0.0
    for (d, r, u), n in allocation.running.items():
        used_RC[r] += n * libraries[d].counts_UC[u]
        served[d] += n * float(libraries[d].rates_U[u])
        price += n * float(libraries[d].counts_UC[u] @ market.price_RC[r])
    if (used_RC > market.stock_RC + tolerance).any():
        r, c = np.argwhere(used_RC > market.stock_RC + tolerance)[0]
        raise WagerError(
            f"the plan rents {used_RC[r, c]:.0f} {market.configurations[c].name} in {market.regions[r]}, there are {market.stock_RC[r, c]:.0f}"
        )
    for lib, rate in zip(libraries, served, strict=True):
        if rate < allocation.factor * lib.demand.tokens_per_s * (1 - tolerance):
            raise WagerError(
                f"the plan serves {rate:.1f} tokens/s of {lib.demand.name}, promised are {allocation.factor * lib.demand.tokens_per_s:.1f}"
            )
    if abs(price - allocation.usd_per_h) > tolerance * max(1.0, price):
        raise WagerError(f"the plan says {allocation.usd_per_h:.4f} USD/h but its machines cost {price:.4f}")


@dataclass(frozen=True)
class Change:
    """What to do to get from one allocation to the next: replicas to start and to drain."""

    start: Mapping[Key, int]
    drain: Mapping[Key, int]


def reconcile(current: Mapping[Key, int], target: Mapping[Key, int]) -> Change:
    keys = {*current, *target}
    steps = {k: target.get(k, 0) - current.get(k, 0) for k in keys}
    return Change({k: n for k, n in steps.items() if n > 0}, {k: -n for k, n in steps.items() if n < 0})
