"""From choices to a running network: chains of native neighbours, and the choices revised on the whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from wager.compile.ollie.sites import Run, Site, native_operators
from wager.graph.execute import Executable
from wager.graph.lower.windows import Chain, LayoutOperator, Operator
from wager.graph.program import Program
from wager.graph.timer import time_together

REVISED = 1.15  # an alternative this much slower alone may still win in the network
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


def segments(program: Program, sites: list[Site]) -> list[list[Site]]:
    """The calls that the choices make: an operator of its own, or neighbours that run natively one after another."""
    users: dict[int, int] = {}
    for node in program.nodes:
        for j in node.inputs:
            users[j] = users.get(j, 0) + 1
    by_source = {s.fused.source: s for s in sites if users.get(s.fused.source, 0) == 1 and s.taken.form}
    ends = {s.fused.last: s for s in sites if s.taken.form}
    found: list[list[Site]] = []
    done: set[int] = set()
    for site in sites:
        if site.taken.form is None:
            found.append([site])
            continue
        source = site.fused.source
        joined = source in ends and source in by_source and source not in program.outputs
        if site.fused.last in done or joined:
            continue
        chain = [site]
        while (follower := by_source.get(chain[-1].fused.last)) and chain[-1].fused.last not in program.outputs:
            chain.append(follower)
        done |= {s.fused.last for s in chain}
        found.append(chain)
    return found


def chains(program: Program, sites: list[Site]) -> Overrides:
    """What computes each call's last node."""
    return {
        segment[-1].fused.last: (runner(program, segment), (segment[0].fused.source,))
        for segment in segments(program, sites)
    }


def operators_of(site: Site, channels_first: bool) -> list[Operator]:
    """The native steps of the contender that is taken; its weights are packed here."""
    return native_operators(site.taken, site.fused, channels_first)


def runner(
    program: Program, segment: list[Site], operators: Callable[[Site, bool], list[Operator]] = operators_of
) -> Run:
    """What one call runs."""
    first = segment[0]
    if first.taken.form is None:
        assert first.taken.run is not None
        return first.taken.run
    n, c, h, w = program.nodes[first.fused.source].shape
    steps: list[Operator] = [LayoutOperator(n, c, h * w)] if c > 1 and h * w > 1 else []
    for site in segment:
        steps += operators(site, site is segment[-1])
    return Chain(steps, segment[-1].fused.node.shape)


def alternatives(site: Site) -> list[int]:
    """The contenders that may be worth taking in the network: those that are near alone (two beside the first), and the library's."""
    near = [i for i, c in enumerate(site.contenders) if c.seconds < REVISED * site.contenders[0].seconds]
    library_at = next((i for i, c in enumerate(site.contenders) if c.name == "library"), 0)
    return list(dict.fromkeys((0, *near[:3], library_at)))


def revise(program: Program, sites: list[Site], build: Callable[[], Executable], budget_s: float) -> Executable:
    """Left to right, each operator's near alternatives on the whole network; kept when faster beyond the noise."""
    best, until = build(), time.perf_counter() + budget_s
    if len(sites) < 2:
        return best
    inputs = [torch.randn(program.nodes[i].shape) for i in best.slots]
    for site in sites:
        for i in alternatives(site):
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
