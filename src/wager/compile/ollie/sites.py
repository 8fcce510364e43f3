"""One operator of a network: its contenders, how they are made, timed and chosen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.compile.ollie import forms as native
from wager.compile.ollie.convolutions import Fused, expression, library, with_epilogue
from wager.compile.ollie.cut import Piece
from wager.compile.ollie.realize import Plan
from wager.compile.ollie.search import agrees, derive
from wager.compile.ollie.windows import Windows
from wager.graph.execute import Executable
from wager.graph.expression import Scope
from wager.graph.lower.windows import Chain, Operator
from wager.graph.program import Builder, Program
from wager.graph.timer import time_together

Run = Callable[[Tensor], Tensor]
DERIVED_SHARE = 0.5  # of an operator's share of the budget; the rest is for building and timing


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
class PieceSite:
    """A lifted expression and what computes it; None: the operators as they stand."""

    piece: Piece
    run: Callable[..., Tensor] | None
    choice: Choice


def site_of(
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
            chain = Chain(native_operators(c, fused), c.windows.scope.shape)  # type: ignore[union-attr]
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


def native_operators(c: Contender, fused: Fused, channels_first: bool = False) -> list[Operator]:
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


def piece_site(program: Program, piece: Piece, budget_s: float, keep: int) -> PieceSite:
    """A lifted expression of a subprogram: the operators as they stand against the derived forms that hold a library operator."""
    nodes = between(program, piece)
    plain = Executable(nodes)
    inputs = [torch.randn(s) for s in nodes.input_shapes]
    choice = Choice(f"product over windows {program.nodes[piece.last].shape}", "library", 0.0, 0.0)
    found = derive(piece.scope, max_depth=2, targets=("banded", "matmul"), budget_s=budget_s * DERIVED_SHARE, keep=keep)
    choice.states, choice.limit, choice.candidates = found.states, found.limit, len(found.candidates)
    calls: dict[str, Callable[[], Any]] = {"library": lambda: plain(*inputs)}
    runs: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {}
    rng = np.random.default_rng(0)
    for c in found.candidates:
        if not agrees(piece.scope, c.scope, rng, 16):
            continue
        plan = Plan(c.scope, {})
        name = " | ".join(c.path)
        runs[name] = ((lambda *xs, plan=plan: plan({f"x{i}": x for i, x in enumerate(xs)})), c.path)
        calls[name] = lambda run=runs[name][0]: run(*inputs)
    medians = time_together(calls, rounds=5, warmup=1, budget_s=2.0).medians_s
    best = min(medians, key=lambda n: medians[n])
    choice.baseline_ms, choice.chosen_ms = medians["library"] * 1e3, medians[best] * 1e3
    if best == "library":
        return PieceSite(piece, None, choice)
    choice.chosen, choice.path = f"derived: {best}", runs[best][1]
    return PieceSite(piece, runs[best][0], choice)


def between(program: Program, piece: Piece) -> Program:
    """The operators that a piece replaces, as a program over its inputs."""
    needed, pending = set(), [piece.last]
    while pending:
        i = pending.pop()
        if i not in needed and i not in piece.inputs:
            needed.add(i)
            pending += program.nodes[i].inputs
    build, place = Builder(), {}
    for i in piece.inputs:
        place[i] = build.input(program.nodes[i].shape)
    for i in sorted(needed):
        node = program.nodes[i]
        place[i] = build.add(node.op, [place[j] for j in node.inputs], **dict(node.attrs))
    return build.build(place[piece.last])
