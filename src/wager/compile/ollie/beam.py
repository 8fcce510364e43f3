"""Whole graphs, the best sixteen at a time: subprograms are combined left to right and the graphs that measure fastest go on (OLLIE, arXiv 2208.02025).

A graph is one contender for every operator. What an operator costs depends on its neighbours: those that run natively become one call and spare
each other layout changes. So two operators may be faster changed together though each alone is slower; a single graph that is improved step by
step never gets there. A graph is priced by its calls, each timed once on this machine. The fastest few are then timed as whole networks, beside
the graph that the search began with, which stays unless one of them is faster beyond the noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from wager.compile.ollie.assemble import alternatives, operators_of, runner, segments
from wager.compile.ollie.sites import Site
from wager.graph.execute import Executable
from wager.graph.lower.windows import Operator
from wager.graph.program import Program
from wager.graph.timer import quick_time, time_together

KEPT = 16
FINALISTS = 4
Picks = tuple[int, ...]
"""Which contender every operator takes."""


class Clock:
    """Seconds of one call on an input that lies channels last or first. Weights are packed once for every contender."""

    def __init__(self, program: Program):
        self.program = program
        self.made: dict[Any, list[Operator]] = {}

    def __call__(self, segment: list[Site], channels_last: bool) -> float:
        x = torch.randn(self.program.nodes[segment[0].fused.source].shape)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        run = runner(self.program, segment, self._operators)
        return quick_time(lambda: run(x), rounds=3)

    def _operators(self, site: Site, channels_first: bool) -> list[Operator]:
        key = (id(site.choice), site.at, channels_first)
        if key not in self.made:
            self.made[key] = operators_of(site, channels_first)
        return self.made[key]


class Price:
    """Seconds of a graph: the sum over its calls. Calls that are alike are timed once."""

    def __init__(self, program: Program, sites: Sequence[Site], clock: Callable[[list[Site], bool], float]):
        self.program, self.sites, self.clock = program, list(sites), clock
        self.calls: dict[Any, float] = {}
        self.graphs: dict[Picks, float] = {}

    def __call__(self, picks: Picks) -> float:
        if picks not in self.graphs:
            take(self.sites, picks)
            native = {s.fused.last: s.taken.form is not None for s in self.sites}
            parts = segments(self.program, self.sites)
            self.graphs[picks] = sum(self._call(p, not native.get(p[0].fused.source, True)) for p in parts)
        return self.graphs[picks]

    def _call(self, segment: list[Site], channels_last: bool) -> float:
        """`channels_last`: how the library, or a derived plan, leaves what it makes."""
        key = (channels_last, *((id(s.choice), s.at) for s in segment))  # equal operators share their choice
        if key not in self.calls:
            self.calls[key] = self.clock(segment, channels_last)
        return self.calls[key]


def take(sites: Sequence[Site], picks: Picks) -> None:
    for site, at in zip(sites, picks, strict=True):
        site.at = at


def beam(
    options: Sequence[Sequence[int]],
    start: Picks,
    price: Callable[[Picks], float],
    kept: int = KEPT,
    over: Callable[[], bool] = lambda: False,
) -> list[Picks]:
    """The `kept` graphs of least price, cheapest first; operators not yet reached are as in `start`. Ends early when `over()`.

    `options`: the contenders that each operator may take.
    """
    graphs = [start]
    for n, choices in enumerate(options):
        grown = dict.fromkeys((*g[:n], at, *g[n + 1 :]) for g in graphs for at in dict.fromkeys((g[n], *choices)))
        prices: dict[Picks, float] = {}
        for g in grown:
            if over():
                return graphs
            prices[g] = price(g)
        graphs = sorted(prices, key=lambda g: prices[g])[:kept]
    return graphs


def choose(program: Program, sites: list[Site], build: Callable[[], Executable], budget_s: float) -> None:
    """Sets every operator's choice to the fastest whole graph found; as they are when none is faster beyond the noise."""
    if len(sites) < 2:
        return
    start, until = tuple(s.at for s in sites), time.perf_counter() + budget_s
    options = [alternatives(s) for s in sites]
    found = beam(options, start, Price(program, sites, Clock(program)), over=lambda: time.perf_counter() > until)
    runs: dict[str, Executable] = {}
    picked = {str(p): p for p in dict.fromkeys([start, *found[:FINALISTS]])}
    for name, picks in picked.items():
        take(sites, picks)
        runs[name] = build()
    take(sites, start)
    if len(runs) < 2:
        return
    inputs = [torch.randn(program.nodes[i].shape) for i in runs[str(start)].slots]
    calls = {name: lambda run=run: run(*inputs) for name, run in runs.items()}
    timing = time_together(calls, rounds=9, budget_s=2.0)
    best = min(calls, key=lambda name: timing.medians_s[name])
    if timing.medians_s[best] < timing.medians_s[str(start)] * (1 - max(timing.noise, 0.01)):
        take(sites, picked[best])
