"""Whole networks: cut at convolutions and constant products, derive each, join what can run together, keep what measures fastest.

Bias, batch normalisation and the activation behind a convolution are folded into it first; parallel products and convolutions of one value
become one (see inter.py). For every distinct convolution the contenders are the library's own fused operator, the native forms of its product
over windows, and the finalists of the derivation search with the activation inside the generated kernel; equal shapes are searched once.
Afterwards neighbours that run natively are joined into chains: one call, channels last inside, no layout change between them. The choices
are then revised on the whole network, left to right, since an operator that is second alone may be first where it keeps a chain whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.compile.ollie import forms as native
from wager.compile.ollie.convolutions import Fused, expression, find_convolutions, library, with_epilogue
from wager.compile.ollie.inter import alike, parallel_products
from wager.compile.ollie.realize import Plan, best_product
from wager.compile.ollie.search import agrees, derive
from wager.compile.ollie.windows import Windows
from wager.graph.execute import Executable
from wager.graph.expression import Scope
from wager.graph.lower.windows import Chain, LayoutOperator, Operator
from wager.graph.program import Program
from wager.graph.timer import quick_time, time_together

Run = Callable[[Tensor], Tensor]
DERIVED_SHARE = 0.5  # of an operator's share of the budget; the rest is for building and timing
REVISED = 1.15  # an alternative this much slower alone may still win in the network


@dataclass
class Choice:
    """What was chosen for one operator and why."""

    operator: str
    chosen: str
    baseline_ms: float
    chosen_ms: float
    states: int = 0
    candidates: int = 0
    path: tuple[str, ...] = ()
    limit: str = ""
    refused: tuple[str, ...] = ()


@dataclass
class Contender:
    """One way to run an operator: natively (`form` and `windows`), or by any callable from (n, c, h, w) to (n, f, h, w)."""

    name: str
    run: Run | None = None
    form: native.Form | None = None
    windows: Windows | None = None
    scope: Scope | None = None
    path: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass
class Site:
    """An operator of the network and its contenders, fastest first; `at` says which is taken."""

    fused: Fused
    contenders: list[Contender]
    choice: Choice
    at: int = 0

    @property
    def taken(self) -> Contender:
        return self.contenders[self.at]


@dataclass
class Network:
    """The optimised program and the choices made."""

    executable: Executable
    choices: list[Choice] = field(default_factory=list)


def optimize(
    program: Program,
    constants: Mapping[str, Tensor],
    *,
    max_depth: int = 5,
    budget_s: float = 60.0,
    keep: int = 4,
    eoperators: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Network:
    """Derives every convolution and constant product of the program. With `eoperators` off only named library operators are used."""
    plain = Executable(program, constants)
    program, values = plain.program, plain.values
    known = {i: v for i, v in enumerate(values) if isinstance(v, Tensor)}
    deadline = time.perf_counter() + budget_s
    sites: list[Site] = []
    memory: dict[Any, Site] = {}
    found = find_convolutions(program, known)
    for left, fused in zip(range(len(found), 0, -1), found, strict=True):
        share = (deadline - time.perf_counter()) / left
        site = _site(program, fused, max_depth, share, keep, eoperators, memory)
        sites.append(site)
        if progress:
            choice = site.choice
            progress(f"{choice.operator}: {choice.chosen}, {choice.baseline_ms:.3f} -> {choice.chosen_ms:.3f} ms")
    sites, slices = _join_alike(program, found, sites, max(deadline - time.perf_counter(), 1.0), memory)
    overrides, chosen = _products(program, known, len(program.nodes) + len(found))
    overrides |= slices
    choices = [s.choice for s in sites] + chosen

    def build() -> Executable:
        return rewired(program, constants, overrides | chains(program, sites))

    executable = _revise(program, sites, build, max(deadline - time.perf_counter(), 2.0))
    for site in sites:
        _explain(site)
    return Network(executable, choices)


Overrides = dict[int, tuple[Callable[..., Any], tuple[int, ...]]]


def rewired(program: Program, constants: Mapping[str, Tensor], overrides: Overrides) -> Executable:
    """An executable in which some nodes are computed by other means; nodes that nothing reads any more are dropped.

    Positions beyond the program's nodes are values of their own: they are computed before their first reader.
    """
    executable = Executable(program, constants)
    steps = [(i, *overrides[i]) if i in overrides else (i, run, inputs) for i, run, inputs in executable.steps]
    extra = {i: (i, *how) for i, how in overrides.items() if i >= len(program.nodes)}
    executable.values += [None] * (max(extra, default=len(program.nodes) - 1) + 1 - len(program.nodes))
    ordered = []
    for step in steps:
        ordered += [extra.pop(j) for j in step[2] if j in extra]
        ordered.append(step)
    needed, kept = set(program.outputs), []
    for i, run, inputs in reversed(ordered):
        if i in needed:
            kept.append((i, run, inputs))
            needed.update(inputs)
    executable.steps = kept[::-1]
    executable.last_use = executable._last_uses()
    return executable


# ── joined operators ────────────────────────────────────────────────────────────────────────────────────────────────────


def _columns(low: int, high: int) -> Run:
    return lambda x: x[:, low:high]


def _join_alike(
    program: Program, found: list[Fused], sites: list[Site], budget_s: float, memory: dict[Any, Site]
) -> tuple[list[Site], Overrides]:
    """Convolutions of one value become one where that is priced below their sum."""
    slices: Overrides = {}
    for joint in alike(program, found, len(program.nodes)):
        lasts = {last for last, _, _ in joint.parts}
        apart = [s for s in sites if s.fused.last in lasts]
        site = _site(program, joint.fused, 0, budget_s, 1, True, memory)
        if site.taken.seconds < sum(s.taken.seconds for s in apart):
            sites = [s for s in sites if s.fused.last not in lasts] + [site]
            slices |= {last: (_columns(low, high), (joint.fused.last,)) for last, low, high in joint.parts}
            site.choice.path = ("merge", *site.choice.path)
    return sites, slices


def _products(program: Program, known: Mapping[int, Tensor], position: int) -> tuple[Overrides, list[Choice]]:
    """Every product with a constant right side in its fastest form; products of one value as one where that is faster."""
    overrides: Overrides = {}
    choices: list[Choice] = []
    seconds: dict[int, float] = {}
    for i, node in enumerate(program.nodes):
        if node.op == "matmul" and node.inputs[1] in known and node.inputs[0] not in known and len(node.shape) == 2:
            form, run = best_product(node.shape[0], known[node.inputs[1]].contiguous())
            x = torch.randn(program.nodes[node.inputs[0]].shape)
            seconds[i] = quick_time(lambda run=run, x=x: run(x), rounds=7)
            overrides[i] = (_contiguous(run), (node.inputs[0],))
            choices.append(Choice(f"matmul {node.shape}", f"matmul ({form})", 0.0, seconds[i] * 1e3))
    for n, group in enumerate(parallel_products(program, known)):
        source = program.nodes[group[0]].inputs[0]
        wide = torch.cat([known[program.nodes[i].inputs[1]] for i in group], 1).contiguous()
        rows = program.nodes[source].shape[0]
        form, run = best_product(rows, wide)
        x, low = torch.randn(program.nodes[source].shape), 0
        if quick_time(lambda run=run, x=x: run(x), rounds=7) < sum(seconds[i] for i in group):
            overrides[position + n] = (_contiguous(run), (source,))
            for i in group:
                width = program.nodes[i].shape[1]
                overrides[i] = (_columns(low, low + width), (position + n,))
                low += width
            choices.append(Choice(f"{len(group)} products of one value", f"merge | matmul ({form})", 0.0, 0.0))
    return overrides, choices


def _contiguous(run: Run) -> Run:
    return lambda x: run(x.contiguous())


# ── one operator ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _site(
    program: Program,
    fused: Fused,
    max_depth: int,
    budget_s: float,
    keep: int,
    eoperators: bool,
    memory: dict[Any, Site],
) -> Site:
    shape = program.nodes[fused.source].shape
    key = (shape, tuple(fused.weight.shape), fused.node.attrs, fused.activation, fused.attrs, fused.bias is None)
    if key in memory:
        old = memory[key]
        again = [_rebuilt(c, fused, shape) for c in old.contenders]
        return Site(fused, again, old.choice, old.at)
    start = time.perf_counter()
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    x_last = x.permute(0, 2, 3, 1).contiguous()
    kind = "transposed conv" if fused.node["transposed"] else "conv"
    choice = Choice(f"{kind} {fused.node['stride']} {tuple(fused.weight.shape)} on {shape}", "library", 0.0, 0.0)
    contenders = [Contender("library", run=library(fused, shape))]
    calls: dict[str, Callable[[], Any]] = {"library": lambda: contenders[0].run(x)}  # type: ignore[misc]
    scope = expression(program, fused)
    if eoperators:
        natives, choice.refused = _natives(scope, fused)
        contenders += natives
        for c in natives:
            chain = Chain(_operators(c, fused), c.windows.scope.shape)  # type: ignore[union-attr]
            calls[c.name] = lambda chain=chain: chain(x_last)
    left = budget_s - (time.perf_counter() - start)
    if left > 0:
        found = derive(scope, max_depth=max_depth, budget_s=min(left * DERIVED_SHARE, 5.0), keep=keep)
        choice.states, choice.limit = found.states, found.limit
        for c in _derived(scope, fused, found.candidates, eoperators, start + budget_s):
            contenders.append(c)
            calls[c.name] = lambda c=c: c.run(x)  # type: ignore[misc]
    else:
        choice.limit = "time budget"
    _rank(contenders, calls)
    choice.candidates = len(contenders) - 1
    choice.baseline_ms = next(c.seconds for c in contenders if c.name == "library") * 1e3
    memory[key] = Site(fused, contenders, choice)
    return memory[key]


def _rank(contenders: list[Contender], calls: Mapping[str, Callable[[], Any]]) -> None:
    """Times all, drops what is far behind, times the rest again; fastest first, with ties for the library and the native forms."""
    if len(contenders) == 1:
        return
    first = time_together(calls, rounds=5, warmup=1, budget_s=1.0).medians_s
    close = {n for n in calls if n == "library" or first[n] < 1.5 * min(first.values())}
    timing = time_together({n: calls[n] for n in calls if n in close}, rounds=15, budget_s=1.5)
    medians = first | timing.medians_s
    for c in contenders:
        c.seconds = medians[c.name]
    library_bonus, native_bonus = (
        1 - min(timing.noise, 0.05),
        0.95,
    )  # a native form spares its neighbours calls and layout changes
    bonus = {c.name: library_bonus if c.name == "library" else native_bonus if c.form else 1.0 for c in contenders}
    contenders.sort(key=lambda c: c.seconds * bonus[c.name])


def _natives(scope: Scope, fused: Fused) -> tuple[list[Contender], tuple[str, ...]]:
    """The checked native forms, and what was refused and why."""
    windows = native.windows_of(scope)
    if windows is None:
        return [], ()
    found, refused, rng = [], [], np.random.default_rng(0)
    kernel = fused.weight.detach().float().contiguous().numpy()
    for form in native.forms(windows, kernel):
        why = native.checks(form, windows, kernel, rng)
        if why:
            refused.append(why)
        else:
            found.append(Contender(form.name, form=form, windows=windows, path=("91 sums in place", f"8 {form.name}")))
    return found, tuple(refused)


def _derived(scope: Scope, fused: Fused, candidates: list, eoperators: bool, until: float) -> list[Contender]:
    rng, found = np.random.default_rng(0), []
    for c in candidates:
        if time.perf_counter() > until:
            break
        if not agrees(scope, c.scope, rng, 16):
            continue
        whole = with_epilogue(c.scope, fused)
        plan = planned(whole, fused)
        if eoperators or not any(d.startswith("eoperator") for d in plan.plan.description):
            found.append(Contender(" | ".join(c.path), run=plan, scope=whole, path=c.path))
    return found


def _rebuilt(old: Contender, fused: Fused, shape: tuple[int, ...]) -> Contender:
    """The same way of computing with this operator's weights."""
    new = Contender(old.name, None, old.form, old.windows, old.scope, old.path, old.seconds)
    if old.form is not None and old.windows is not None:
        kernel = fused.weight.detach().float().contiguous().numpy()
        new.form = next(f for f in native.forms(old.windows, kernel) if f.name == old.name)
    else:
        new.run = library(fused, shape) if old.scope is None else planned(old.scope, fused)
    return new


def _operators(c: Contender, fused: Fused, channels_first: bool = False) -> list[Operator]:
    assert c.form is not None and c.windows is not None
    return native.operators(c.form, c.windows, fused.epilogue(), channels_first)


@dataclass
class _Planned:
    """NCHW in and out over a plan that works channels last."""

    plan: Plan

    def __call__(self, x: Tensor) -> Tensor:
        return self.plan({"A": x.permute(0, 2, 3, 1).contiguous()}).permute(0, 3, 1, 2)


def planned(scope: Scope, fused: Fused) -> _Planned:
    constants = {"K": fused.weight}
    if fused.bias is not None:
        constants["bias"] = fused.bias
    if fused.slope is not None:
        constants["slope"] = fused.slope
    return _Planned(Plan(scope, constants))


# ── the whole network ───────────────────────────────────────────────────────────────────────────────────────────────────


def chains(program: Program, sites: list[Site]) -> Overrides:
    """What computes each operator's last node; neighbours that run natively become one call."""
    users: dict[int, int] = {}
    for node in program.nodes:
        for j in node.inputs:
            users[j] = users.get(j, 0) + 1
    by_source = {s.fused.source: s for s in sites if users.get(s.fused.source, 0) == 1 and s.taken.form}
    inner = {s.fused.source for s in sites if s.taken.form}
    overrides: Overrides = {}
    done: set[int] = set()
    ends = {s.fused.last: s for s in sites if s.taken.form}
    for site in sites:
        if site.taken.form is None:
            assert site.taken.run is not None
            overrides[site.fused.last] = (site.taken.run, (site.fused.source,))
            continue
        previous = ends.get(site.fused.source)
        joined = previous is not None and site.fused.source in inner and site.fused.source in by_source
        if site.fused.last in done or (joined and site.fused.source not in program.outputs):
            continue
        chain = [site]
        while (follower := by_source.get(chain[-1].fused.last)) and chain[-1].fused.last not in program.outputs:
            chain.append(follower)
        done |= {s.fused.last for s in chain}
        overrides[chain[-1].fused.last] = (_chain(program, chain), (site.fused.source,))
    return overrides


def _chain(program: Program, sites: list[Site]) -> Chain:
    n, c, h, w = program.nodes[sites[0].fused.source].shape
    steps: list[Operator] = [LayoutOperator(n, c, h * w)] if c > 1 and h * w > 1 else []
    for site in sites:
        steps += _operators(site.taken, site.fused, channels_first=site is sites[-1])
    return Chain(steps, sites[-1].fused.node.shape)


def _revise(program: Program, sites: list[Site], build: Callable[[], Executable], budget_s: float) -> Executable:
    """Left to right, each operator's near alternatives on the whole network; kept when faster beyond the noise."""
    best, until = build(), time.perf_counter() + budget_s
    if len(sites) < 2:
        return best
    inputs = [torch.randn(program.nodes[i].shape) for i in best.slots]
    for site in sites:
        near = [i for i, c in enumerate(site.contenders) if i and c.seconds < REVISED * site.contenders[0].seconds]
        library_at = next((i for i, c in enumerate(site.contenders) if c.name == "library"), 0)
        for i in near[:2] if library_at in near[:2] else [*near[:2], library_at]:
            if time.perf_counter() > until or i == site.at:
                continue
            old, site.at = site.at, i
            other = build()
            timing = time_together(
                {"best": lambda b=best: b(*inputs), "other": lambda o=other: o(*inputs)}, rounds=9, budget_s=0.6
            )
            if timing.medians_s["other"] < timing.medians_s["best"] * (1 - max(timing.noise, 0.01)):
                best = other
            else:
                site.at = old
    return best


def _explain(site: Site) -> None:
    taken, choice = site.taken, site.choice
    choice.chosen = "library" if taken.name == "library" else f"derived: {taken.name}"
    choice.chosen_ms = taken.seconds * 1e3
    choice.path = ("merge", *taken.path) if choice.path[:1] == ("merge",) else taken.path
