"""Mirage and Prism: counts, pruning, canonical order, family soundness, rediscovery, and the public face."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import wager
from wager.compile.api import load
from wager.compile.cli import parse_shapes
from wager.compile.mirage import search as concrete
from wager.compile.mirage.abstract import Algebra, Subexpressions, factors, of_program
from wager.compile.mirage.generate import Limits, Progress
from wager.compile.mirage.lookup import Looked, pruner
from wager.compile.prism import search as symbolic
from wager.compile.prism.family import member_sizes
from wager.compile.prism.mapping import count
from wager.errors import UsageError
from wager.graph import draw, published
from wager.graph.egraph.rules import Bounds
from wager.graph.interpret import random_inputs, run
from wager.graph.operators import ShapeError
from wager.graph.verify.finite_field import verify

RMS = published.rmsnorm_matmul(4, 16, 8)
GATED = published.gated_mlp(4, 16, 8)
LORA = published.lora(4, 16, 4, 8)
ATTENTION = published.attention(2, 8, 16, 4)
QK = published.qk_norm_attention(2, 8, 16, 4)


def test_mapping_counts_of_the_sheet():
    counts = count([2, 2, 2], [True, True, False], 2, [(0, 1, 1, 0)])
    assert counts == {"raw": 65536, "well_formed": 3087, "tied": 595, "distinct": 300}


def ops_of(family) -> set[str]:
    return {n.op for k in family.kernels for n in k.structure.nodes}


@pytest.mark.parametrize(
    "program, ops, has",
    [
        (RMS, 7, {"accum_rms", "div"}),
        (GATED, 10, {"silu", "mul"}),
        (LORA, 10, {"add"}),
        (ATTENTION, 10, {"accum_sum", "exp"}),
        (QK, 11, {"rms_norm", "exp"}),
    ],
)
def test_search_rediscovers_the_fused_kernels(program, ops, has, rng):
    found = symbolic.search(program, Limits(max_block_ops=ops, budget_s=3600))
    fused = [f for f in found.families if has <= ops_of(f) and len(f.open(0)) >= (2 if program is not LORA else 1)]
    assert fused and not found.progress.limit
    for family in fused[:6]:
        for sizes in member_sizes(family, program.input_shapes)[:4]:
            member = family.instantiate(program.input_shapes, sizes)
            inputs = random_inputs(program, rng)
            np.testing.assert_allclose(run(member, inputs)[0], run(program, inputs)[0], rtol=1e-9)
            assert verify(program, member, rng, max_trials=2)


def test_flash_decoding_split_needs_two_kernels_and_is_found():
    limits = Limits(max_block_ops=9, max_kernels=2, budget_s=3600)
    progress = Progress()
    split = [
        c
        for c in symbolic.chains(ATTENTION, limits, progress)
        if len(c) == 2 and "accum_width" in {n.op for n in c[1].nodes}
    ]
    assert split


def test_pruning_loses_no_program_on_a_small_space():
    on = symbolic.search(RMS, Limits(max_block_ops=7, budget_s=3600))
    off = symbolic.search(RMS, Limits(max_block_ops=7, budget_s=3600, prune=False))
    assert not on.progress.limit and not off.progress.limit
    key = lambda found: {f.explain() for f in found.families}
    assert key(on) == key(off) and on.progress.states * 3 < off.progress.states


def test_no_structure_is_produced_twice():
    chains = list(symbolic.chains(GATED, Limits(max_block_ops=10), Progress()))
    assert len(chains) == len(set(chains)) > 0


def test_concrete_programs_are_members_of_symbolic_families(rng):
    """No over-pruning: what the concrete search verifies, the symbolic search reaches with the same sizes."""
    limits = Limits(max_block_ops=6, budget_s=3600)
    programs = concrete.search(RMS, limits, grids=(1, 2), loops=(1, 2)).programs
    families = symbolic.search(RMS, limits, symmetric=False).families
    members = set()
    for f in families:
        for sizes in member_sizes(f, RMS.input_shapes):
            block = f.instantiate(RMS.input_shapes, sizes).kernels[0].block
            members.add((tuple(sorted(block.grid)), block.loop, tuple(n.op for n in block.nodes)))
    assert programs
    for p in programs:
        block = p.kernels[0].block
        assert (tuple(sorted(block.grid)), block.loop, tuple(n.op for n in block.nodes)) in members


def test_every_prefix_of_a_program_is_a_subexpression_and_foreign_terms_are_not():
    for program in (RMS, GATED, LORA, ATTENTION, QK):
        algebra = Algebra()
        values = of_program(algebra, program)
        targets = Subexpressions(algebra, [values[program.outputs[0]]], factors(program))
        assert all(v in targets for v in values)
        assert algebra.atom("exp", algebra.atom("exp", values[0])) not in targets


@pytest.mark.parametrize("program, ops", [(RMS, 8), (GATED, 9), (LORA, 9), (ATTENTION, 9), (QK, 9)])
def test_pruning_by_look_up_and_by_normal_form_keep_the_same_graphs(program, ops):
    """Two decisions of one question: the e-graph never keeps what the normal form prunes, and both searches end with the same structures."""
    found = []
    for pruning in ("normal form", "e-graph"):
        progress = Progress()
        chains = list(symbolic.chains(program, Limits(max_block_ops=ops, pruning=pruning), progress))
        found.append((set(chains), progress.states))
    assert found[0][0] == found[1][0] and found[1][1] <= found[0][1]
    algebra = Algebra()
    values = of_program(algebra, program)
    target = [values[program.outputs[0]]]
    exact = pruner(algebra, program, target, Limits())
    looked = pruner(algebra, program, target, Limits(pruning="e-graph"))
    assert not looked.saturation.limit and all(v in looked for v in values)
    assert all(e in exact for e in range(len(algebra.expressions)) if e in looked)


def test_a_cut_off_saturation_is_said(caplog):
    algebra = Algebra()
    values = of_program(algebra, LORA)
    Looked(algebra, [values[LORA.outputs[0]]], [16, 4], Bounds(nodes=20))
    assert "20 nodes" in caplog.text
    with pytest.raises(UsageError, match="magic"):
        pruner(algebra, LORA, [values[-1]], Limits(pruning="magic"))


def test_the_concrete_search_finds_the_same_with_the_e_graph():
    small = {"grids": (1, 2), "loops": (1, 2)}
    by = [
        concrete.search(RMS, Limits(max_block_ops=6, pruning=p), **small).programs for p in ("normal form", "e-graph")
    ]
    assert by[0] == by[1] != []


def test_abstract_equalities():
    algebra = Algebra()
    a, b, c = (algebra.atom(n) for n in "abc")
    assert algebra.add(a, b) == algebra.add(b, a) and algebra.multiply(a, algebra.add(b, c)) == algebra.add(
        algebra.multiply(a, b), algebra.multiply(a, c)
    )
    assert algebra.divide(algebra.divide(a, b), c) == algebra.divide(a, algebra.multiply(c, b))
    assert algebra.sum(4, algebra.multiply(a, b)) == algebra.multiply(algebra.sum(4, a), b) and algebra.sum(
        2, algebra.sum(3, a)
    ) == algebra.sum(6, a)
    assert algebra.sum(1, a) == a and algebra.divide(algebra.multiply(a, b), b) != a  # no cancellation


def test_drawings_say_how_blocks_cut():
    family = next(f for f in symbolic.search(RMS, Limits(max_block_ops=7)).families if {"x", "loop"} <= set(f.open(0)))
    program = family.instantiate(RMS.input_shapes, [(2, 1, 1, 2)])
    for text in (draw.svg(program), draw.dot(program)):
        assert "argument 0 " in text and "argument 1 " in text and "loop" in text and "kernel grid 2x1x1 loop 2" in text


def test_sizes_that_do_not_divide_are_refused():
    family = next(f for f in symbolic.search(RMS, Limits(max_block_ops=7)).families if "x" in f.open(0))
    with pytest.raises(ShapeError):
        family.instantiate(RMS.input_shapes, [(3, 1, 1, 1)])


def gated(x, a, b):
    return torch.nn.functional.silu(x @ a) * (x @ b)


def test_compile_returns_something_right_and_says_what(tmp_path):
    inputs = [torch.randn(8, 64), torch.randn(64, 64), torch.randn(64, 64)]
    done = wager.compile(gated, inputs, search="prism", time_budget_s=3600, max_block_ops=9, samples=2)
    torch.testing.assert_close(done(*inputs), gated(*inputs), atol=1e-3, rtol=1e-3)
    report = done.report()
    assert report.reason and (report.used == "prism") == (done.run is not None)
    assert report.compiled_ms <= report.original_ms
    done.save(tmp_path / "p.json")
    program, saved = load(tmp_path / "p.json")
    assert program == done.program and saved["reason"] == report.reason
    done.draw(tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text().startswith("<svg")


def test_what_cannot_be_checked_in_memory_is_not_searched_and_says_so(monkeypatch):
    monkeypatch.setattr("wager.compile.api.psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    x, w = torch.randn(16, 64), torch.randn(64, 32)
    done = wager.compile(lambda x, w: torch.exp(x) @ w, [x, w], search="prism", time_budget_s=5)
    assert done.report().used == "original" and "0.0 GB are free" in done.report().reason
    torch.testing.assert_close(done(x, w), torch.exp(x) @ w)


def test_what_cannot_be_fused_is_explained():
    report = wager.compile(
        lambda x: torch.softmax(x, -1), [torch.randn(4, 4)], search="prism", time_budget_s=3600
    ).report()
    assert report.used == "original" and "softmax" in report.reason
    report = wager.compile(
        gated,
        [torch.randn(8, 64), torch.randn(64, 64), torch.randn(64, 64)],
        search="prism",
        max_block_ops=4,
        time_budget_s=3600,
    ).report()
    assert "0 graphs found (max_block_ops 4" in report.reason


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"search": "magic"}, "magic"),
        ({"time_budget_s": -1}, "time_budget_s"),
        ({"max_kernels": 3}, "max_kernels is 3"),
        ({"max_kernels": 2, "search": "ollie"}, "2 with prism or mirage"),
        ({"inputs": [torch.ones(2, dtype=torch.int64)]}, "float32"),
    ],
)
def test_bad_requests_are_one_clear_error(kwargs, message):
    inputs = kwargs.pop("inputs", [torch.ones(2)])
    with pytest.raises(UsageError, match=message):
        wager.compile(torch.relu, inputs, **kwargs)


def test_command_line(tmp_path, capsys):
    from wager.cli import main

    script = tmp_path / "f.py"
    script.write_text("import torch\ndef f(x, w):\n    return torch.exp(x @ w)\n")
    out = tmp_path / "p.json"
    main_args = [
        "compile",
        "run",
        f"{script}:f",
        "--shapes",
        "4x16,16x16",
        "--search",
        "prism",
        "--budget",
        "3600",
        "--max-block-ops",
        "6",
        "--out",
        str(out),
    ]
    with pytest.raises(SystemExit) as stop:
        main(main_args)
    assert stop.value.code == 0 and json.loads(out.read_text())["report"]["reason"]
    with pytest.raises(SystemExit) as stop:
        main(["compile", "verify", str(out), str(out)])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "equal" in said and "second verifier: joined" in said
    with pytest.raises(UsageError, match="8x512"):
        parse_shapes("8xx")


def test_as_a_torch_compile_backend(monkeypatch, caplog):
    from wager.compile import api

    quick = api.compile
    monkeypatch.setattr(
        api, "compile", lambda f, x: quick(f, x, search="prism", time_budget_s=3600, max_block_ops=7, samples=1)
    )
    torch._dynamo.reset()
    x, w = torch.randn(4, 16), torch.randn(16, 16)
    fast = torch.compile(lambda x, w: torch.exp(x @ w), backend=api.backend, dynamic=False)
    torch.testing.assert_close(fast(x, w), torch.exp(x @ w), atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
    odd = torch.compile(lambda x: torch.cumsum(x, 0) * 2, backend=api.backend, dynamic=False)
    torch.testing.assert_close(odd(x), torch.cumsum(x, 0) * 2)
    assert "cumsum" in caplog.text
