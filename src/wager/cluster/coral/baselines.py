"""What Coral is compared with: plans of equal machines, chosen greedily for one model after another.

As published, both go by capacity per dollar alone. `homo` serves both phases of a model on one kind of machine, the one with the most requests per
dollar; `cauchy` on a combo of two kinds, one for each phase. Where the stock of these ends, the next best kind or combo serves the rest; a phase has as many
replicas as it needs, whatever the other has. Tuned: `homo in hindsight` takes the kind that makes the whole plan of a model cheapest, which depends on how
well whole replicas fit the demand; `cauchy of any kinds` takes for each phase the replicas with the most tokens per dollar, of one kind or of several.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from wager.cluster.coral.market import Allocation, Key, Market
from wager.cluster.coral.templates import Library

PUBLISHED = ("homo", "cauchy")
TUNED = ("homo in hindsight", "cauchy of any kinds")
POLICIES = (*PUBLISHED, *TUNED)
SHARE_TRIES = 8


@dataclass(frozen=True)
class Choice:
    """A template of equal machines in a region."""

    region: int
    template: int
    kind: int
    machines: int
    tokens_per_s: float
    usd_per_h: float


@dataclass(frozen=True)
class Part:
    """What one demand gets: replicas by choice, tokens/s, price."""

    replicas: Mapping[Choice, int]
    tokens_per_s: float
    usd_per_h: float


Menus = Sequence[Mapping[int, Sequence[Choice]]]  # of each demand: kind -> choices


def scaled(libraries: Sequence[Library], market: Market, policy: str, tries: int = 10) -> Allocation:
    """A baseline where stock is too scarce for the full demands: all are scaled down alike until it serves them (bisection), as Coral does.
    Better than letting the first models take everything. `factor` 0 and no machines where it serves nothing."""
    best, low, high, share = Allocation({}, 0.0, 0.0, 0.0, 0.0, 0.0, 0, False), 0.0, 1.0, 1.0
    menus = [menu_of(lib, market) for lib in libraries]
    for _ in range(tries):
        found = greedy(libraries, market, policy, share, menus)
        if found.factor >= 1 - 1e-9:
            best, low = dataclasses.replace(found, factor=share), share
            if share == 1.0:
                break
        else:
            high = share
        share = (low + high) / 2
    return best


def greedy(
    libraries: Sequence[Library], market: Market, policy: str, share: float = 1.0, menus: Menus | None = None
) -> Allocation:
    """The plan of a baseline for `share` of the demands, first come, first served; `factor` says how much of that the worst-served one gets."""
    menus = menus or [menu_of(lib, market) for lib in libraries]
    wanted = [share * lib.demand.tokens_per_s for lib in libraries]
    free_RC = market.stock_RC.astype(float).copy()
    running: dict[Key, int] = {}
    price, worst = 0.0, 1.0
    for group in _groups(libraries, policy):
        parts = _by_policy(policy, [menus[d] for d in group], [wanted[d] for d in group], free_RC)
        for d, part in zip(group, parts, strict=True):
            _take(part.replicas, free_RC)
            running |= {(d, c.region, c.template): n for c, n in part.replicas.items()}
            price += part.usd_per_h
            worst = min(worst, _share([part], [wanted[d]]))
    return Allocation(running, price, 0.0, 0.0, worst, 0.0, 0, False)


def menu_of(library: Library, market: Market) -> dict[int, list[Choice]]:
    """kind -> templates of equal machines of it in every region, the most tokens per dollar first."""
    menu: dict[int, list[Choice]] = {}
    for u in library.equal:
        kind = int(library.counts_UC[u].argmax())
        machines, rate = int(library.counts_UC[u, kind]), float(library.rates_U[u])
        menu.setdefault(kind, []).extend(
            Choice(r, int(u), kind, machines, rate, machines * float(market.price_RC[r, kind]))
            for r in range(len(market.regions))
        )
    return {kind: sorted(choices, key=_by_dollar) for kind, choices in menu.items()}


def fill(choices: Sequence[Choice], wanted: float, free_RC: np.ndarray) -> Part:
    """Serve `wanted` tokens/s in the order of the choices, each as often as is wanted and fits."""
    replicas: dict[Choice, int] = {}
    used: dict[tuple[int, int], float] = {}
    served, price = 0.0, 0.0
    for c in choices:
        if served >= wanted * (1 - 1e-12):
            break
        at = c.region, c.kind
        fit = int((free_RC[at] - used.get(at, 0.0)) // c.machines)
        n = min(fit, int(np.ceil((wanted - served) / c.tokens_per_s - 1e-9)))
        if n > 0:
            replicas[c] = n
            used[at] = used.get(at, 0.0) + n * c.machines
            served += n * c.tokens_per_s
            price += n * c.usd_per_h
    return Part(replicas, served, price)


def _usd_per_token(choice: Choice) -> float:
    return choice.usd_per_h / choice.tokens_per_s


def _by_dollar(choice: Choice) -> tuple[float, int]:
    """Most tokens per dollar first; of those with the same, the smaller ones, which fit a demand better."""
    return float(f"{_usd_per_token(choice):.9e}"), choice.machines


def _groups(libraries: Sequence[Library], policy: str) -> list[list[int]]:
    """Demands that are planned together."""
    if policy == "cauchy of any kinds":
        return [[d] for d in range(len(libraries))]
    by_model: dict[str, list[int]] = {}
    for d, lib in enumerate(libraries):
        by_model.setdefault(lib.demand.model.name, []).append(d)
    return list(by_model.values())


def _by_policy(policy: str, menus: Menus, wanted: Sequence[float], free_RC: np.ndarray) -> list[Part]:
    kinds = sorted(set(itertools.chain(*menus)))
    if policy == "cauchy of any kinds":
        return [fill(sorted(itertools.chain(*menus[0].values()), key=_by_dollar), wanted[0], free_RC)]
    if policy == "homo in hindsight":
        plans = [_together([m.get(k, ()) for m in menus], wanted, free_RC) for k in kinds]
        return max(plans, key=lambda parts: (_share(parts, wanted), -sum(p.usd_per_h for p in parts)))
    combos = [(k,) * len(menus) for k in kinds] if policy == "homo" else itertools.product(*menus)
    return _one_after_another(
        menus, wanted, free_RC, [c for c in combos if all(k in m for k, m in zip(c, menus, strict=True))]
    )


def _one_after_another(
    menus: Menus, wanted: Sequence[float], free_RC: np.ndarray, combos: Sequence[tuple[int, ...]]
) -> list[Part]:
    """Combos of one kind for each demand, those with the most requests per dollar first, until all is served; each serves its demands alike."""

    def usd_per_h(combo: tuple[int, ...]) -> float:
        """For everything, were fractions of replicas for rent."""
        return sum(w * _usd_per_token(m[k][0]) for m, w, k in zip(menus, wanted, combo, strict=True))

    parts = [Part({}, 0.0, 0.0) for _ in menus]
    free_RC = free_RC.copy()
    for combo in sorted(combos, key=usd_per_h):
        if _share(parts, wanted) >= 1 - 1e-12:
            break
        if all(free_RC[:, kind].any() for kind in combo):
            more = _alike([m[k] for m, k in zip(menus, combo, strict=True)], parts, wanted, free_RC)
            parts = [_add(p, q) for p, q in zip(parts, more, strict=True)]
            for part in more:
                _take(part.replicas, free_RC)
    return parts


def _alike(
    choices: Sequence[Sequence[Choice]], parts: Sequence[Part], wanted: Sequence[float], free_RC: np.ndarray
) -> list[Part]:
    """What brings all demands beyond `parts` to the largest common share: what one has no room for, the others need not serve."""

    def upto(share: float) -> tuple[list[Part], float]:
        missing = [max(0.0, share * w - p.tokens_per_s) for w, p in zip(wanted, parts, strict=True)]
        more = _together(choices, missing, free_RC)
        return more, _share([_add(p, q) for p, q in zip(parts, more, strict=True)], wanted)

    low, high = _share(parts, wanted), 1.0
    best, trial = [Part({}, 0.0, 0.0) for _ in parts], 1.0
    for _ in range(SHARE_TRIES):
        more, reached = upto(trial)
        if reached >= trial * (1 - 1e-12):
            best, low = more, trial
        else:
            high = trial
        if low >= high * (1 - 1e-3):
            break
        # demands on machines of their own reach together what the worst of them reached
        trial = reached if low < reached < high else (low + high) / 2
    return best


def _together(choices: Sequence[Sequence[Choice]], wanted: Sequence[float], free_RC: np.ndarray) -> list[Part]:
    """Demands filled from the same stock, in order."""
    free_RC, parts = free_RC.copy(), []
    for mine, w in zip(choices, wanted, strict=True):
        parts.append(fill(mine, w, free_RC))
        _take(parts[-1].replicas, free_RC)
    return parts


def _take(replicas: Mapping[Choice, int], free_RC: np.ndarray) -> None:
    for c, n in replicas.items():
        free_RC[c.region, c.kind] -= n * c.machines


def _add(a: Part, b: Part) -> Part:
    replicas = {c: a.replicas.get(c, 0) + b.replicas.get(c, 0) for c in {**a.replicas, **b.replicas}}
    return Part(replicas, a.tokens_per_s + b.tokens_per_s, a.usd_per_h + b.usd_per_h)


def _share(parts: Sequence[Part], wanted: Sequence[float]) -> float:
    """Of the worst-served demand, at most 1."""
    return min((min(1.0, p.tokens_per_s / w) for p, w in zip(parts, wanted, strict=True) if w > 0), default=1.0)
