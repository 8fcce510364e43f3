"""Generated C++ against the interpreter; memory plans; the executor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.graph.test_verify import attention_kernel, norm_kernel
from wager.errors import UsageError
from wager.graph.execute import Executable
from wager.graph.interpret import random_inputs, run
from wager.graph.lower.memory import Lifetime, plan
from wager.graph.lower.peel import peel
from wager.graph.program import BlockBuilder, Builder, Program
from wager.graph.trace import trace
from wager.graph.verify.floating import compare


@pytest.mark.parametrize("program", [norm_kernel(), attention_kernel()])
@pytest.mark.parametrize("constant", [False, True])
def test_compiled_blocks_agree_with_the_interpreter(program, constant, rng):
    inputs = [x.astype(np.float32) for x in random_inputs(program, rng)]
    names = program.input_names
    held = {n: torch.from_numpy(x) for n, x in zip(names[1:], inputs[1:], strict=True)} if constant else {}
    given_inputs = inputs[:1] if constant else inputs
    got = Executable(program, held)(*[torch.from_numpy(x) for x in given_inputs])[0].numpy()
    assert compare(program, inputs, [got])


def batched(depth: int, reduce_dim: int = -1) -> Program:
    """A small attention over `depth` heads in one block a half of the rows, 4 keys a step."""
    shapes = [(depth, 8, 16), (depth, 16, 16), (depth, 16, 16)]
    block = BlockBuilder(shapes, (2, 1, 1), 4)
    q, k, v = block.input(0, (1, -1, -1)), block.input(1, (-1, -1, -1), 2), block.input(2, (-1, -1, -1), 1)
    weights = block.add("exp", [block.add("matmul", [q, k])])
    total = (
        block.add("accum_sum", [weights]) if reduce_dim else block.add("accum", [block.add("sum", [weights], dim=0)])
    )
    out = block.add("accum", [block.add("matmul", [weights, v])])
    if reduce_dim:
        block.output(block.add("div", [out, total]), (1, -1, -1))
    else:
        block.output(total, (1, -1, -1))
    build = Builder()
    names = [build.input(s, n) for s, n in zip(shapes, "qkv", strict=True)]
    return build.build(build.kernel(names, block.build())[0])


def test_a_batch_inside_a_block_becomes_grid(rng):
    program = batched(3)
    (node,) = program.kernels
    peeled = peel(node.block)
    assert peeled.grid == (2, 3, 1) and all(n.shape[0] == 1 for n in peeled.nodes)
    inputs = [x.astype(np.float32) for x in random_inputs(program, rng, 0.3)]
    nodes = tuple(replace(n, block=peeled) if n is node else n for n in program.nodes)
    np.testing.assert_allclose(run(replace(program, nodes=nodes), inputs)[0], run(program, inputs)[0], rtol=1e-6)
    assert compare(program, inputs, [Executable(program)(*map(torch.from_numpy, inputs))[0].numpy()])


def test_a_batch_whose_slices_meet_stays_in_the_block():
    (node,) = batched(3, reduce_dim=0).kernels
    assert peel(node.block) is node.block


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 10), st.integers(0, 5)), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_tensors_alive_together_never_overlap(items):
    lifetimes = [Lifetime(size, start, start + length) for size, start, length in items]
    offsets, peak = plan(lifetimes)
    for i, a in enumerate(lifetimes):
        assert offsets[i] + a.size <= peak
        for j in range(i):
            b = lifetimes[j]
            if a.start <= b.end and b.start <= a.end:
                assert offsets[i] + a.size <= offsets[j] or offsets[j] + b.size <= offsets[i]


def test_a_network_imports_and_runs_like_torch(rng):
    nn = torch.nn
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 4, 2, 1, output_padding=1), nn.PReLU(6),
        nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, dilation=2, groups=2), nn.Flatten(), nn.Linear(100, 5), nn.SiLU(), nn.Softmax(-1),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 9, 9)
    traced = trace(model, [x])
    want = model(x).detach()
    torch.testing.assert_close(Executable(traced.program, traced.constants)(x)[0], want)
    values = [(traced.constants.get(n, x)).double().numpy() for n in traced.program.input_names]
    np.testing.assert_allclose(run(traced.program, values)[0], want.numpy(), atol=1e-6)


def test_an_unknown_operator_is_named_with_its_line():
    with pytest.raises(UsageError, match=r"aten\.cumsum.*at .*test_lower"):
        trace(lambda x: torch.cumsum(x, 0), [torch.ones(3)])


def test_wrong_shapes_at_run_time_are_refused():
    traced = trace(lambda x: torch.relu(x), [torch.ones(3)])
    with pytest.raises(UsageError, match="compiled for"):
        Executable(traced.program)(torch.ones(4))
