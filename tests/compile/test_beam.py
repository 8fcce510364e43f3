"""Sixteen graphs at a time: what pays only together is found, nothing is lost against trying all, and the network stays right."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from wager.compile.ollie import beam as beams
from wager.compile.ollie import network
from wager.compile.ollie.assemble import alternatives, segments
from wager.compile.ollie.beam import Price, beam, choose
from wager.compile.ollie.convolutions import find_convolutions
from wager.compile.ollie.sites import Choice, Contender, Site
from wager.graph.execute import Executable
from wager.graph.trace import trace

CALL, LAYOUT, NATIVE, LIBRARY = 0.1, 0.3, 0.7, 1.0


def row_of_convolutions(count: int):
    """A program of convolutions one behind another, and a site for each: the library's operator, and one that runs natively."""
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(count))).eval()
    traced = trace(model, [torch.randn(1, 4, 5, 5)])
    plain = Executable(traced.program, traced.constants)
    known = {i: v for i, v in enumerate(plain.values) if isinstance(v, torch.Tensor)}
    native = SimpleNamespace(name="native")
    sites = []
    for fused in find_convolutions(plain.program, known):
        contenders = [Contender("library", seconds=LIBRARY), Contender("native", form=native, seconds=1.1)]
        sites.append(Site(fused, contenders, Choice(str(fused.last), "library", 0.0, 0.0)))
    return plain.program, sites


def clock(segment, channels_last) -> float:
    """A native call changes the layout once, however many operators it holds."""
    return LIBRARY if segment[0].taken.form is None else CALL + LAYOUT + NATIVE * len(segment)


def test_operators_that_pay_only_together_are_found_and_one_graph_alone_does_not_get_there():
    program, sites = row_of_convolutions(3)
    assert len(sites) == 3
    price, start = Price(program, sites, clock), (0, 0, 0)
    options = [alternatives(s) for s in sites]
    greedy, kept = beam(options, start, price, kept=1), beam(options, start, price)
    assert greedy == [(0, 0, 0)] and price(greedy[0]) == pytest.approx(3.0)
    assert kept[0] == (1, 1, 1) and price(kept[0]) == pytest.approx(2.5)
    assert len(kept) == 8


def test_neighbours_become_one_call_and_library_operators_cut_it():
    program, sites = row_of_convolutions(4)
    for picks, lengths in {(1, 1, 0, 1): [2, 1, 1], (0, 1, 1, 1): [1, 3], (0, 0, 0, 0): [1] * 4}.items():
        beams.take(sites, picks)
        assert [len(s) for s in segments(program, sites)] == lengths


def test_alike_calls_are_timed_once():
    program, sites = row_of_convolutions(3)
    for site in sites[1:]:
        site.choice = sites[0].choice
    timed = []
    price = Price(program, sites, lambda s, c: timed.append((s[0].taken.name, len(s), c)) or clock(s, c))
    beam([[0, 1]] * 3, (0, 0, 0), price)
    assert len(timed) == len(set(timed))
    assert ("native", 1, True) in timed and ("native", 2, False) in timed  # behind the library values lie channels last


@pytest.mark.parametrize("seed", range(20))
def test_few_graphs_are_all_kept_and_many_are_never_worse_than_greedy(seed):
    rng = np.random.default_rng(seed)
    cost = rng.random((6, 3, 3))

    def price(picks):
        return float(sum(cost[n, a, b] for n, (a, b) in enumerate(zip(picks, picks[1:], strict=False))))

    few = beam([[0, 1]] * 4, (0,) * 4, price)
    assert few == sorted(product((0, 1), repeat=4), key=price)
    many = beam([[0, 1, 2]] * 6, (0,) * 6, price)
    greedy = beam([[0, 1, 2]] * 6, (0,) * 6, price, kept=1)
    assert len(many) == beams.KEPT and price(many[0]) <= price(greedy[0])
    assert [price(g) for g in many] == sorted(price(g) for g in many)


def test_a_beam_out_of_time_returns_whole_graphs():
    calls = iter(range(100))
    found = beam([[0, 1]] * 5, (0,) * 5, sum, over=lambda: next(calls) >= 3)
    assert found and all(len(g) == 5 and g[2:] == (0, 0, 0) for g in found)
    assert beam([[0, 1]] * 5, (0,) * 5, sum, over=lambda: True) == [(0,) * 5]


@pytest.mark.parametrize("faster", [True, False])
def test_the_first_graph_stays_unless_another_is_faster_as_a_network(faster, monkeypatch):
    program, sites = row_of_convolutions(3)
    monkeypatch.setattr(beams, "Clock", lambda program: clock)
    built = []

    def together(calls, **_):
        medians = {name: 1.0 for name in calls} | {str((1, 1, 1)): 0.9 if faster else 0.995}
        return SimpleNamespace(medians_s=medians, noise=0.0)

    def build():
        built.append(tuple(s.at for s in sites))
        return SimpleNamespace(slots=[])

    monkeypatch.setattr(beams, "time_together", together)
    choose(program, sites, build, 10.0)
    assert tuple(s.at for s in sites) == ((1, 1, 1) if faster else (0, 0, 0))
    assert built[0] == (0, 0, 0) and (1, 1, 1) in built and len(built) <= 1 + beams.FINALISTS


def test_a_network_chosen_by_beam_computes_the_same(monkeypatch):
    """Every contender is near, so that all kinds of calls are built and run."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, 2, 1),
    ).eval()
    monkeypatch.setattr("wager.compile.ollie.assemble.REVISED", 1e9)
    x = torch.randn(1, 3, 6, 6)
    traced = trace(model, [x])
    done = network.optimize(traced.program, traced.constants, max_depth=1, keep=1, budget_s=4)
    torch.testing.assert_close(done.executable(x)[0], model(x).detach(), atol=1e-5, rtol=1e-4)
