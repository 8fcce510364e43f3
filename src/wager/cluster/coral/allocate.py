"""Which templates to run where, how many of each: least cost under stock and demand, over all templates.

min  sum price nu + penalty added,  nu = kept + added, kept <= what runs now,  machines <= stock,  rates >= demand,  nu whole.

The library has hundreds of thousands of columns and a solution uses tens. The linear program is solved over a working set; pricing all
columns against its duals (a matrix product) brings in those that would lower the cost until there are none. Then the integer program runs over
the columns whose reduced cost is below incumbent minus bound: no other column can be in a better solution, so nothing is lost.

When stock is too scarce every demand is scaled down by the same factor: the largest factor first, then the least cost at that factor.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

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
        begun = time.perf_counter()
        current = dict(current or {})
        full = self._generate(current, 1.0, scale=False)
        factor, scarce = 1.0, full
        if full is None:
            most = self._largest_factor(current, time_limit_s / 2)
            factor = most
            scarce = self._generate(current, factor, scale=False)
            if scarce is None:  # the factor was reached with whole machines, so this only fails by rounding
                factor *= 1 - 1e-9
                scarce = self._generate(current, factor, scale=False)
        if scarce is None:
            raise WagerError("no part of the demands can be served with this stock; add machines or loosen objectives")
        columns, lp = scarce
        return self._integer(columns, lp, current, factor, begun, time_limit_s, gap)

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
            fresh = self._price(lp, known, scale)
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
            serve[d].append((c, float(self.libraries[d].rates_U[u])))
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

    def _price(self, lp: Solution, known: set[Key], scale: bool) -> list[Key]:
        """New columns with a favourable reduced cost, the best few of each demand and region."""
        assert lp.duals is not None
        fresh: list[Key] = []
        for d, r, reduced_U in self._reduced_costs(lp, scale):
            candidates = np.flatnonzero(
                reduced_U < -1e-7 * max(1.0, float(np.abs(reduced_U[np.isfinite(reduced_U)]).max(initial=0)))
            )
            order = candidates[np.argsort(reduced_U[candidates], kind="stable")]
            mine = [(d, r, int(u)) for u in order[: PER_ROUND * 4]]
            fresh += [key for key in mine if key not in known][:PER_ROUND]
        return fresh

    def _reduced_costs(self, lp: Solution, scale: bool):
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
                worth_U = lib.counts_UC[useful] @ stock_dual_RC[r] + lib.rates_U[useful] * lp.duals[d]
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
        if not answer.value:
            raise WagerError("no part of the demands can be served with this stock; add machines or loosen objectives")
        return answer.value * (1 - 1e-9)

    def _integer(
        self,
        columns: list[Key],
        lp: Solution,
        current: Mapping[Key, int],
        factor: float,
        begun: float,
        time_limit_s: float,
        gap: float,
    ) -> Allocation:
        def left() -> float:
            return max(0.5, time_limit_s - (time.perf_counter() - begun))

        assert lp.value is not None
        answer = solve(self._program(columns, current, factor, False, True, False), time_limit_s=left() / 2, gap=gap)
        if not answer.found:  # rounding up may not fit the stock: take every column near the bound
            answer = Solution("unknown", INFINITE, lp.value, None, 0.0, "highs")
        margin = (answer.value if answer.value is not None else INFINITE) - lp.value
        wider, complete = self._near(lp, columns, margin)
        proven, bound = (
            answer.status == "optimal" and complete,
            max(lp.value, min(answer.bound, INFINITE) if complete else lp.value),
        )
        if len(wider) > len(columns):
            again = solve(self._program(wider, current, factor, False, True, False), time_limit_s=left(), gap=gap)
            if again.found and (not answer.found or again.value < answer.value):  # type: ignore[operator]
                answer, columns = again, wider
            if complete:
                bound, proven = max(lp.value, again.bound), again.status == "optimal"
        if not answer.found:
            raise WagerError(f"no whole-number allocation was found in {time_limit_s} s; allow more time")
        return self._read(answer, columns, lp, current, factor, min(bound, answer.value or bound), proven, begun)

    def _near(self, lp: Solution, columns: list[Key], margin: float) -> tuple[list[Key], bool]:
        """Columns that a solution better than the incumbent can contain, and whether these are all of them."""
        known, extra = set(columns), []
        for d, r, reduced_U in self._reduced_costs(lp, scale=False):
            near = np.flatnonzero(reduced_U <= margin + 1e-9)
            extra += [(float(reduced_U[u]), (d, r, int(u))) for u in near if (d, r, int(u)) not in known]
        extra.sort()
        return columns + [key for _, key in extra[: max(0, MOST_COLUMNS - len(columns))]], len(columns) + len(
            extra
        ) <= MOST_COLUMNS

    def _read(
        self,
        answer: Solution,
        columns: list[Key],
        lp: Solution,
        current: Mapping[Key, int],
        factor: float,
        bound: float,
        proven: bool,
        begun: float,
    ) -> Allocation:
        assert answer.x is not None and lp.duals is not None
        added = np.round(answer.x[len(self.libraries) : len(self.libraries) + len(columns)]).astype(int)
        kept = np.round(answer.x[len(self.libraries) + len(columns) :]).astype(int)
        running: dict[Key, int] = {}
        penalty = 0.0
        for (d, r, u), n in zip(columns, added, strict=True):
            if n:
                running[d, r, u] = int(n)
                penalty += float(n * self.costs[d][u, r] * self.start_up_share)
        for key, n in zip(current, kept, strict=True):
            if n:
                running[key] = running.get(key, 0) + int(n)
        duals = lp.duals[len(self.libraries) :].reshape(self.market.stock_RC.shape)
        scarcity = {
            (self.market.regions[r], self.market.configurations[c].name): float(-duals[r, c])
            for r, c in np.argwhere(duals < -1e-9)
        }  # fmt: skip
        price = sum(n * float(self.costs[d][u, r]) for (d, r, u), n in running.items())
        return Allocation(
            running, price, penalty, bound, factor, time.perf_counter() - begun, self.num_columns, proven, scarcity
        )


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
