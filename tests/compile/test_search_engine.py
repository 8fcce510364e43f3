"""The compiled enumeration against its reference, and searches that are stopped, resumed, shared out and remembered."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import wager
from wager.compile import units
from wager.compile.mirage import enumerate as compiled
from wager.compile.mirage import search as concrete
from wager.compile.mirage.abstract import Algebra, Subexpressions, factors, of_program
from wager.compile.mirage.generate import BlockSearch, Limits, Progress, menu
from wager.compile.mirage.regions import grid_maps
from wager.compile.prism import search as symbolic
from wager.errors import BuildError, UsageError
from wager.graph import published
from wager.graph.program import to_json

RMS = published.rmsnorm_matmul(4, 16, 8)
SMALL = {"grids": (1, 2), "loops": (1, 2)}
EVERY = {**SMALL, "regions": False}


def everything(program, ops, outputs, loop, fast, prune=True):
    algebra = Algebra()
    values = of_program(algebra, program)
    targets = Subexpressions(algebra, [values[program.outputs[0]]], factors(program))
    inputs = [values[i] for i in program.input_positions]
    limits, progress = Limits(max_block_ops=ops, prune=prune), Progress()
    accept = lambda e, s: len(e) <= outputs
    if fast:
        engine = compiled.Enumerator(algebra, targets, menu(program, width=8), limits)
        assert engine.lib is not None
        found = list(engine.run(inputs, program.input_shapes, outputs, accept, progress, loop))
    else:
        engine = BlockSearch(algebra, targets, menu(program, width=8), limits, progress, loop)
        found = list(engine.run(inputs, program.input_shapes, outputs, accept))
    return found, progress.states, progress.pruned, progress.structures


@pytest.mark.parametrize(
    "program, ops, outputs, loop, prune",
    [
        (RMS, 7, 1, 1, True),
        (RMS, 6, 2, 2, False),
        (published.gated_mlp(4, 16, 8), 8, 2, 1, True),
        (published.attention(2, 8, 16, 8), 9, 2, 2, True),
        (published.qk_norm_attention(2, 8, 16, 8), 9, 1, 1, True),
        (published.lora(4, 16, 4, 8), 9, 1, 2, True),
    ],
)
def test_compiled_enumeration_is_the_reference_graph_by_graph(program, ops, outputs, loop, prune):
    fast = everything(program, ops, outputs, loop, True, prune)
    assert fast == everything(program, ops, outputs, loop, False, prune) and fast[1] > 50


def test_without_a_compiler_the_search_says_so_and_finds_the_same(monkeypatch, caplog):
    want = concrete.search(RMS, Limits(max_block_ops=6), **SMALL).programs

    def refuse(*_, **__):
        raise BuildError("no compiler here")

    compiled.library.cache_clear()
    monkeypatch.setattr(compiled.build, "load", refuse)
    try:
        assert concrete.search(RMS, Limits(max_block_ops=6), **SMALL).programs == want != []
    finally:
        compiled.library.cache_clear()
    assert "no compiler here" in caplog.text


def test_a_fault_in_python_crosses_the_compiled_loop(monkeypatch):
    monkeypatch.setattr(Algebra, "apply", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        everything(RMS, 6, 1, 1, True)


def test_state_limit_stops_the_search_and_is_named():
    progress = concrete.search(RMS, Limits(max_block_ops=7, max_states=500), **SMALL).progress
    assert progress.limit == "500 states"


def key(found):
    return [to_json(p) for p in found.programs]


def test_maps_that_no_block_can_use_are_skipped_and_nothing_is_lost():
    sizes = ((1, 2), (1, 2), 1)
    kept, every = list(concrete.plans(RMS, *sizes)), list(concrete.plans(RMS, *sizes, regions=False))
    assert set(kept) < set(every) and len(set(kept)) == len(kept) and len(set(every)) == len(every)
    found = [concrete.search(RMS, Limits(max_block_ops=6, budget_s=3600), regions=r, **SMALL) for r in (True, False)]
    assert sorted(key(found[0])) == sorted(key(found[1])) != []


@pytest.mark.parametrize(
    "program, ops",
    [(published.gated_mlp(4, 16, 8), 9), (published.lora(4, 16, 4, 8), 10), (published.attention(2, 8, 16, 4), 10),
     (published.qk_norm_attention(2, 8, 16, 4), 11), (published.ntrans(4, 8), 10)],
)  # fmt: skip
def test_what_the_symbolic_search_proves_uses_only_allowed_maps(program, ops):
    """The maps of proved families are found from ties between dimensions; those of the concrete search from what a block depends on."""
    grids = 3 if len(program.output_shapes[0]) > 2 else 2
    allowed = {frozenset(m) for m in grid_maps(program, grids)}
    families = symbolic.search(program, Limits(max_block_ops=ops, budget_s=3600)).families
    assert families
    for family in families:
        imaps = family.kernels[0].mapping.imaps
        assert frozenset(tuple(m[p] for m in imaps) for p in range(grids)) in allowed, family.explain()


def test_two_workers_find_what_one_finds():
    limits = Limits(max_block_ops=6, budget_s=300)
    alone, pair = (concrete.search(RMS, limits, workers=n, **SMALL) for n in (1, 2))
    assert key(alone) == key(pair) != [] and alone.progress.states == pair.progress.states
    family = lambda n: [f.explain() for f in symbolic.search(RMS, limits, workers=n).families]
    assert family(1) == family(2) != []


KILLED = """
import os, sys
from wager.compile.mirage import search as concrete
from wager.compile.mirage.generate import Limits, Progress
from wager.graph import published
concrete.UNIT_PLANS = 4
looks = []
def listener(progress):
    looks.append(progress)
    if len(looks) == 40: os._exit(9)
concrete.search(published.rmsnorm_matmul(4, 16, 8), Limits(max_block_ops=6, budget_s=300), Progress(listener=listener),
                grids=(1, 2), loops=(1, 2), regions=False, state=sys.argv[1])
"""


def test_a_killed_search_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(concrete, "UNIT_PLANS", 4)
    state = tmp_path / "search.jsonl"
    assert subprocess.run([sys.executable, "-c", KILLED, str(state)], check=False).returncode == 9
    kept = len(state.read_text().splitlines()) - 1
    with state.open("a") as file:
        file.write('[999, {"programs": [')  # a line that the kill tore
    limits, worked = Limits(max_block_ops=6, budget_s=300), []
    whole = concrete.search(RMS, limits, **EVERY)
    original = concrete.Explorer.__call__
    monkeypatch.setattr(concrete.Explorer, "__call__", lambda self, b: worked.append(1) or original(self, b))
    resumed = concrete.search(RMS, limits, state=state, **EVERY)
    assert key(resumed) == key(whole) and resumed.progress.states == whole.progress.states
    assert kept > 0 and len(worked) == len(state.read_text().splitlines()) - 1 - kept
    worked.clear()
    assert key(concrete.search(RMS, limits, state=state, **EVERY)) == key(whole) and not worked


def test_the_symbolic_search_resumes_too(tmp_path):
    state, limits = tmp_path / "prism.jsonl", Limits(max_block_ops=7)
    first = symbolic.search(RMS, limits, state=state)
    again = symbolic.search(RMS, limits, state=state)
    assert [f.explain() for f in again.families] == [f.explain() for f in first.families] != []


def test_a_state_file_of_another_search_is_refused(tmp_path):
    state = tmp_path / "s.jsonl"
    concrete.search(RMS, Limits(max_block_ops=4), state=state, **SMALL)
    with pytest.raises(UsageError, match="another search"):
        concrete.search(RMS, Limits(max_block_ops=5), state=state, **SMALL)
    state.write_text("nonsense\n")
    with pytest.raises(UsageError, match="not the state"):
        concrete.search(RMS, Limits(max_block_ops=5), state=state, **SMALL)
    with pytest.raises(UsageError, match="workers is 0"):
        list(units.run([1], str, units.Journal(None, ""), lambda: False, workers=0))


def test_an_answer_found_before_is_checked_and_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("WAGER_CACHE", str(tmp_path))
    function, inputs = (lambda x, w: torch.exp(x @ w)), [torch.randn(4, 16), torch.randn(16, 16)]
    settings = dict(search="prism", time_budget_s=300, max_block_ops=6, samples=2)
    first = wager.compile(function, inputs, **settings)
    assert "remembered" not in first.report().counters
    second = wager.compile(function, inputs, **settings)
    assert "remembered" in second.report().counters
    (place,) = (tmp_path / "compiled").glob("*.json")
    wrong = json.loads(place.read_text())
    for node in wrong["program"]["nodes"]:
        for inner in node.get("block", {}).get("nodes", []):
            inner["op"] = "silu" if inner["op"] == "exp" else inner["op"]
    place.write_text(json.dumps(wrong))
    third = wager.compile(function, inputs, **settings)  # a wrong answer on disk is found out and searched anew
    assert "remembered" not in third.report().counters
    torch.testing.assert_close(third(*inputs), function(*inputs), atol=1e-4, rtol=1e-4)
    place.write_text("torn")
    assert "remembered" not in wager.compile(function, inputs, **settings).report().counters
