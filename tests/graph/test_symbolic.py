"""Symbolic sizes: arithmetic against integers, refusal where the answer depends on the value, programs, JSON, tracing."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from wager.errors import UsageError
from wager.graph import published
from wager.graph.execute import Executable
from wager.graph.interpret import random_inputs, run
from wager.graph.operators import ShapeError
from wager.graph.program import Builder, check, from_json, to_json
from wager.graph.symbolic import Symbol, instantiate, parse, symbols_of
from wager.graph.trace import trace

T = Symbol("tokens", 2, 64, 2)
H = Symbol("hidden", 4, 256, 4)


def test_arithmetic_is_that_of_every_value():
    sizes = [T.size, H.size, 4 * T.size, T.size * H.size, T.size * T.size, 8, 2]
    for a, b in itertools.product(sizes, repeat=2):
        for t, h in ((2, 4), (6, 8), (64, 256)):
            at = lambda x, values={"tokens": t, "hidden": h}: x if isinstance(x, int) else x.at(values)
            assert at(a * b) == at(a) * at(b)
            try:
                assert a % b == at(a) % at(b)
                assert at(a // b) == at(a) // at(b)
            except ShapeError:
                pass
            if a == b:
                assert at(a) == at(b)
            with contextlib.suppress(ShapeError):
                assert (a < b) == (at(a) < at(b))


def test_what_depends_on_the_value_is_refused():
    for question in (
        lambda: T.size % 4,
        lambda: 8 % T.size,
        lambda: T.size // H.size,
        lambda: T.size + 1,
        lambda: T.size < 8,
    ):
        with pytest.raises(ShapeError, match="depends|no form"):
            question()
    assert T.size % 2 == 0 and (6 * T.size) % 4 == 0 and T.size != 1 and T.size < 65 and T.size + T.size == 2 * T.size


def gated() -> object:
    b = Builder()
    x, w1, w2 = b.input((T.size, H.size), "x"), b.input((H.size, 8), "w1"), b.input((H.size, 8), "w2")
    return b.build(b.mul(b.silu(b.matmul(x, w1)), b.matmul(x, w2)))


def test_programs_check_save_and_become_concrete(rng):
    program = gated()
    check(program)
    assert program.output_shapes == [(T.size, 8)] and symbols_of(program) == {"hidden": H, "tokens": T}
    again = from_json(to_json(program))
    assert again == program and symbols_of(again) == symbols_of(program)
    concrete = instantiate(again, {"tokens": 6, "hidden": 16})
    plain = published.gated_mlp(6, 16, 8)
    inputs = random_inputs(plain, rng)
    np.testing.assert_array_equal(run(concrete, inputs)[0], run(plain, inputs)[0])
    assert not symbols_of(concrete) and from_json(to_json(concrete)) == concrete


@pytest.mark.parametrize(
    "values, message",
    [
        ({"tokens": 6}, "sizes are needed for hidden, tokens"),
        ({"tokens": 7, "hidden": 16}, "tokens=7 is not allowed: 2 to 64, multiples of 2"),
        ({"tokens": 66, "hidden": 16}, "not allowed"),
    ],
)
def test_values_that_do_not_fit_are_named(values, message):
    with pytest.raises(UsageError, match=message):
        instantiate(gated(), values)


def test_shapes_that_fit_for_some_values_only_do_not_fit():
    b = Builder()
    x, y = b.input((T.size, 4)), b.input((H.size, 4))
    with pytest.raises(ShapeError, match="do not broadcast"):
        b.add("add", [x, y])
    with pytest.raises(ShapeError, match="multiple"):
        b.sum(x, dim=0, width=4)
    with pytest.raises(UsageError, match="no value"):
        Symbol("n", 3, 5, 6)
    with pytest.raises(UsageError, match="letters"):
        Symbol("2n")
    with pytest.raises(UsageError, match="no symbol"):
        parse("3*rows", {"tokens": T})
    other = Builder()
    other.matmul(other.input((T.size, 4)), other.input((4, Symbol("tokens", 2, 8).size)))
    with pytest.raises(UsageError, match="two sets"):
        symbols_of(other.build(2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        heads = self.up(x).view(x.shape[0], 4, 8).transpose(0, 1)
        return self.down(torch.nn.functional.silu(heads).transpose(0, 1).reshape(-1, 32)) + x


def test_dynamic_dimensions_are_traced_as_symbols():
    net = Net().eval()
    traced = trace(net, [torch.randn(6, 16)], dynamic=[{0: T}])
    assert symbols_of(traced.program) == {"tokens": T} and traced.program.output_shapes == [(T.size, 16)]
    again = from_json(to_json(traced.program))
    for tokens in (2, 10, 64):
        x = torch.randn(tokens, 16)
        (got,) = Executable(instantiate(again, {"tokens": tokens}), traced.constants)(x)
        torch.testing.assert_close(got, net(x), atol=1e-5, rtol=1e-4)


def test_dynamic_shapes_without_a_form_are_said():
    with pytest.raises(UsageError, match="2 entries for 1 inputs"):
        trace(torch.relu, [torch.randn(4, 4)], dynamic=[{}, {}])
    with pytest.raises(UsageError, match="does not allow"):
        trace(torch.relu, [torch.randn(5, 4)], dynamic=[{0: T}])
    with pytest.raises(UsageError, match="leave the dimension out"):
        trace(lambda x: x @ torch.ones(4, 4), [torch.randn(4, 4)], dynamic=[{1: T}])
    with pytest.raises(UsageError, match="no form|dynamic"):
        trace(lambda x: torch.cat([x, torch.ones(1, 4)]), [torch.randn(4, 4)], dynamic=[{0: T}])
