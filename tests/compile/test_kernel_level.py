"""Kernel graphs that mix library operators with custom kernels: found, verified, in one order each, priced, run, drawn and kept."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import wager
from wager.compile.mirage import search as concrete
from wager.compile.mirage.generate import Limits, Progress
from wager.compile.mirage.kernel_level import Prefix
from wager.compile.mirage.plans import labelled_plans
from wager.compile.mirage.tune import bound_s, library_s, race
from wager.errors import UsageError
from wager.graph import draw, published
from wager.graph.interpret import random_inputs, run
from wager.graph.operators import COMMUTATIVE
from wager.graph.program import Builder, Node, Program, check, from_json, to_json
from wager.graph.verify.family import prove
from wager.graph.verify.finite_field import verify

SIZES = {"grids": (1, 2), "loops": (1, 2)}
RMS = published.rmsnorm_matmul(4, 16, 8)
GATED = published.gated_mlp(4, 16, 8)


def exp_of_product() -> Program:
    b = Builder()
    return b.build(b.exp(b.matmul(b.input((4, 16), "x"), b.input((16, 8), "w"))))


EXP = exp_of_product()


def library(program: Program) -> list[str]:
    return [n.op for n in program.nodes if n.op not in ("input", "kernel", "result")]


def mixed(program: Program, loops: tuple[int, ...] = (1, 2), **limits) -> list[Program]:
    settings = Limits(**{"max_block_ops": 5, "max_library_ops": 2, "budget_s": 3600} | limits)
    found = concrete.search(program, settings, grids=(1, 2), loops=loops)
    assert not found.progress.limit and found.progress.verified == len(found.programs)
    return [p for p in found.programs if library(p)]


@pytest.fixture(scope="module")
def graphs() -> dict[str, list[Program]]:
    return {"exp": mixed(EXP), "rms": mixed(RMS, max_library_ops=1), "gated": mixed(GATED, max_block_ops=6)}


PROGRAMS = {"exp": EXP, "rms": RMS, "gated": GATED}


def test_mixed_graphs_are_found_and_compute_the_program(graphs, rng):
    for name, program in PROGRAMS.items():
        inputs = random_inputs(program, rng)
        want = run(program, inputs)[0]
        assert graphs[name]
        for found in graphs[name]:
            check(found)
            assert found.kernels
            np.testing.assert_allclose(run(found, inputs)[0], want, rtol=1e-9)


def test_library_operators_stand_before_behind_and_between(graphs):
    kinds = {name: {tuple(library(p)) for p in found} for name, found in graphs.items()}
    assert ("matmul",) in kinds["exp"] and ("exp",) in kinds["exp"]
    assert kinds["rms"] == {("matmul",), ("rms_norm",)}
    assert ("matmul", "matmul") in kinds["gated"] and ("matmul", "mul") in kinds["gated"]


def test_a_library_sum_adds_what_blocks_of_a_split_product_leave_side_by_side(graphs):
    split = [p for p in graphs["exp"] if library(p) == ["sum", "exp"]]
    assert split and all(p.nodes[p.kernels[0].inputs[0]].op == "input" for p in split)
    assert any(prove(EXP, p) == "" for p in split)


def test_two_custom_kernels_with_a_library_operator_between():
    product = published.rmsnorm_matmul(2, 4, 2)
    found = mixed(product, (1,), max_library_ops=1, max_kernels=2)
    assert any([n.op for n in p.nodes if n.op not in ("input", "result")] == ["kernel", "div", "kernel"] for p in found)


def variants(program: Program) -> list[Program]:
    """One library operator replaced, or its operands swapped where that matters."""
    others = {"exp": "square", "mul": "add", "rms_norm": "square"}
    out = []
    for i, node in enumerate(program.nodes):
        if node.op in others:
            changed = Node(others[node.op], node.inputs, node.shape)
        elif node.op in ("div", "matmul"):
            changed = Node(node.op, node.inputs[::-1], node.shape)
        else:
            continue
        out.append(replace(program, nodes=(*program.nodes[:i], changed, *program.nodes[i + 1 :])))
    return out


def test_broken_variants_are_rejected(graphs, rng):
    broken = 0
    for name, program in PROGRAMS.items():
        for found in graphs[name][:8]:
            for variant in variants(found):
                assert not verify(program, variant, rng, max_trials=3)
                broken += 1
            assert verify(program, found, rng, max_trials=3)
    assert broken > 10


def form(program: Program) -> str:
    """The graph whatever the order of its nodes and of its kernels' arguments."""
    names: list[str] = []
    for node in program.nodes:
        inputs = [names[i] for i in node.inputs]
        if node.block is not None:
            names.append(block_form(node, inputs))
        else:
            names.append(named(node, inputs))
    return names[program.outputs[0]]


def named(node: Node, inputs: list[str]) -> str:
    said = [f"{k}={v}" for k, v in node.attrs if k != "arg"]
    return f"{node.op}[{','.join(said)}]({', '.join(sorted(inputs) if node.op in COMMUTATIVE else inputs)})"


def block_form(kernel: Node, arguments: list[str]) -> str:
    names: list[str] = []
    for node in kernel.block.nodes:
        names.append(named(node, [arguments[node["arg"]]] if node.op == "input" else [names[i] for i in node.inputs]))
    saved = [name for name, node in zip(names, kernel.block.nodes, strict=True) if node.op == "output"]
    return f"{kernel.block.grid}*{kernel.block.loop} {' & '.join(saved)}"


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_graph_is_found_twice(graphs, name):
    assert len({form(p) for p in graphs[name]}) == len(graphs[name])


@pytest.mark.parametrize(
    "program, limits", [(GATED, {"max_block_ops": 6}), (RMS, {"max_library_ops": 1, "max_kernels": 2, "loops": (1,)})]
)
def test_canonical_order_loses_nothing(program, limits, monkeypatch):
    """Against the same search in which operators may follow one another in any order."""
    ordered = {form(p) for p in mixed(program, **limits)}
    grown = Prefix.grown
    first = ((), -1, ())
    monkeypatch.setattr(Prefix, "grown", lambda self, step, made, rank: grown(self, step, made, first))
    every = [form(p) for p in mixed(program, **limits)]
    assert ordered == set(every) and len(every) > len(ordered) > 0


def test_pruning_loses_nothing():
    small = {"max_block_ops": 4, "max_library_ops": 1}
    assert {form(p) for p in mixed(EXP, **small)} == {form(p) for p in mixed(EXP, prune=False, **small)} != set()


def test_without_library_operators_every_graph_is_custom():
    found = concrete.search(EXP, Limits(max_block_ops=6, budget_s=3600), **SIZES).programs
    assert found and not any(library(p) for p in found)


def test_a_kernel_cuts_every_tensor_that_has_the_index():
    plans = list(labelled_plans([(4, 8), (8, 6)], [("r", "k"), ("k", "c")], 2, (1, 2), (1, 2), 1))
    assert ((2, 2, 1), 2, ((-1, 0, -1), (1, -1, -1)), (1, 0)) in plans
    assert all((f[0] == 1) == (f[1] == 0) for _, _, _, f in plans) and len(set(plans)) == len(plans)
    rows = list(labelled_plans([(4, 8), (8, 6)], [("r", "k"), ("k", "c")], 2, (1, 2), (1, 2), 1, ("r", "c")))
    assert all(m[0][0] != 1 and m[0][1] != 1 for _, _, m, _ in rows) and set(rows) < set(plans)


def test_library_operators_have_a_price(graphs):
    for found in graphs["gated"]:
        assert bound_s(found, 2) > library_s(found, 2) > 0
        assert library_s(found, 2) < library_s(found, 1)
    assert library_s(graphs["exp"][0], 1) < library_s(published.gated_mlp(64, 512, 512), 1)


def test_mixed_graphs_are_raced_and_run(graphs):
    x, w = torch.randn(4, 16), torch.randn(16, 8)
    timed = race(graphs["exp"], {}, [x, w], samples=4)
    assert timed
    torch.testing.assert_close(timed[0].run(x, w)[0], torch.exp(x @ w), rtol=1e-4, atol=1e-4)
    held = race(graphs["rms"], {"w": w}, [x], samples=4)
    want = x * torch.rsqrt(x.square().mean(-1, keepdim=True)) @ w
    torch.testing.assert_close(held[0].run(x)[0], want, rtol=1e-4, atol=1e-4)


def test_mixed_graphs_are_kept_and_drawn(graphs):
    found = graphs["gated"][0]
    assert from_json(to_json(found)) == found
    picture = draw.svg(found)
    assert "kernel grid" in picture and "matmul" in picture and "block of kernel" in picture


def test_units_travel_and_a_stopped_search_goes_on(tmp_path):
    limits, state = Limits(max_block_ops=5, max_library_ops=1, budget_s=3600), tmp_path / "search.jsonl"
    units = list(concrete._mixed(EXP, limits, (1, 2), (1, 2), 1))
    assert units and pickle.loads(pickle.dumps(units)) == units
    whole = concrete.search(EXP, limits, state=state, **SIZES)
    lines = state.read_text().splitlines()
    state.write_text("\n".join(lines[:-2]) + "\n")
    again = concrete.search(EXP, limits, state=state, **SIZES)
    assert again.programs == whole.programs and state.read_text().splitlines() == lines


def test_a_search_out_of_time_says_so():
    found = concrete.search(GATED, Limits(max_block_ops=6, max_library_ops=2, max_states=300), Progress(), **SIZES)
    assert found.progress.limit == "300 states"


def test_compile_takes_the_limit_and_refuses_it_elsewhere():
    x, w = torch.randn(4, 16), torch.randn(16, 8)
    function = lambda x, w: torch.exp(x @ w)
    done = wager.compile(
        function, [x, w], search="mirage", max_block_ops=5, max_library_ops=1, samples=2, time_budget_s=100, cache=False
    )
    torch.testing.assert_close(done(x, w), function(x, w), rtol=1e-4, atol=1e-4)
    for wrong in ({"max_library_ops": 1, "search": "prism"}, {"max_library_ops": -1, "search": "mirage"}):
        with pytest.raises(UsageError, match="max_library_ops"):
            wager.compile(function, [x, w], **wrong)
