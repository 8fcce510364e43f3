"""Mirage's concrete search over two kernels: it finds the split of attention, and every program computes it."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from wager.compile.mirage import search as concrete
from wager.compile.mirage.generate import Limits
from wager.compile.mirage.pairs import second_plans, splitting
from wager.graph import published
from wager.graph.interpret import random_inputs, run
from wager.graph.program import Program, check, from_json, to_json
from wager.graph.verify.family import prove

PROGRAM = published.attention(1, 2, 8, 2)
SIZES = {"grids": (1, 2), "loops": (1,)}
KEYS_CUT = ((2, 1, 1), 1, ((-1, -1, -1), (2, -1, -1), (1, -1, -1)), (-1, -1, -1))
LIMITS = Limits(max_block_ops=9, max_kernels=2, budget_s=3600)


@pytest.fixture(scope="module")
def found() -> list[Program]:
    """What the search makes of the plan that cuts the keys in two."""
    explorer = concrete.Explorer(to_json(PROGRAM), LIMITS, 2, 0, time.time() + 3600, SIZES["grids"], SIZES["loops"], 1)
    result = explorer(("pair", [KEYS_CUT]))
    assert result is not None and result["verified"] == len(result["programs"])
    return [from_json(text) for text in result["programs"]]


def test_the_split_over_keys_is_found(found, rng):
    """The first kernel leaves partial sums of weights and of weighted values side by side, the second adds them up and divides."""
    assert found
    inputs = random_inputs(PROGRAM, rng)
    want = run(PROGRAM, inputs)[0]
    for program in found:
        check(program)
        np.testing.assert_allclose(run(program, inputs)[0], want, rtol=1e-9)
        first, second = program.kernels
        assert len(first.block.outputs) == 2 and "exp" in {n.op for n in first.block.nodes}
        assert {"accum_width", "div"} <= {n.op for n in second.block.nodes}
    assert any(prove(PROGRAM, p) == "" for p in found)


def test_one_kernel_finds_no_split():
    limits = replace(LIMITS, max_kernels=1, max_block_ops=7)
    assert all(len(p.kernels) == 1 for p in concrete.search(PROGRAM, limits, **SIZES).programs)


def test_first_plans_are_those_that_no_single_kernel_has():
    every = list(concrete.plans(PROGRAM, (1, 2), (1,), 1, regions=False))
    split, whole = list(splitting(iter(every), PROGRAM)), list(concrete.plans(PROGRAM, (1, 2), (1,), 1))
    assert KEYS_CUT in split and not set(split) & set(whole)


def test_second_plans_cut_only_what_has_the_outputs_dimension():
    plans = list(second_plans([(1, 4, 6), (1, 4, 2)], (1, 4, 2), (1, 2, 4), 2))
    assert ((4, 1, 1), 1, ((1, -1, -1), (1, -1, -1)), (-1, -1)) in plans
    assert ((2, 1, 1), 1, ((-1, -1, -1), (2, -1, -1)), (-1, -1)) in plans
    assert all(grid[0] * grid[1] * grid[2] >= 2 for grid, *_ in plans)
