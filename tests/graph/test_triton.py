"""Block graphs as Triton: what the search finds for the workloads of the Mirage sheet, under Triton's interpreter or on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.interpreter import DEVICE, inside, outside, run_inside
from wager.compile.mirage.generate import Limits
from wager.compile.prism import search as symbolic
from wager.compile.prism.family import member_sizes
from wager.errors import UsageError
from wager.graph import published
from wager.graph.interpret import run
from wager.graph.lower import triton, triton_source
from wager.graph.program import BlockBuilder, Builder
from wager.graph.verify.twin import shrink

WORKLOADS = {
    "RMSNorm+matmul": (published.rmsnorm_matmul(8, 32, 48), 7),
    "gated MLP": (published.gated_mlp(4, 32, 48), 10),
    "LoRA": (published.lora(8, 32, 4, 48), 10),
    "attention": (published.attention(2, 8, 32, 12), 10),
    "QK-norm attention": (published.qk_norm_attention(2, 8, 32, 12), 11),
}


@outside
def test_under_the_interpreter():
    run_inside(__file__)


def agrees(program, member, rng):
    inputs = [rng.standard_normal(s) for s in program.input_shapes]
    (got,) = triton.TritonProgram(member)(*(torch.tensor(x, dtype=torch.float32, device=DEVICE) for x in inputs))
    np.testing.assert_allclose(got.cpu().numpy(), run(program, inputs)[0], rtol=2e-4, atol=2e-4)


@inside
@pytest.mark.parametrize("name", list(WORKLOADS))
def test_found_kernels(name):
    program, ops = WORKLOADS[name]
    rng = np.random.default_rng(0)
    families = symbolic.search(program, Limits(max_block_ops=ops, budget_s=3600)).families
    assert families
    for family in families[:: max(1, len(families) // 4)]:
        sizes = member_sizes(family, program.input_shapes)
        for chosen in {sizes[0], sizes[len(sizes) // 2]}:
            agrees(program, family.instantiate(program.input_shapes, chosen), rng)


@inside
def test_two_kernels_that_split_the_keys():
    """The flash-decoding form: partial sums over key splits, merged by a second kernel with a partial sum to width."""
    program = published.attention(2, 8, 64, 16)
    build = Builder()
    q, k, v = (build.input(s) for s in program.input_shapes)
    first = BlockBuilder(program.input_shapes, (2, 4, 1), 1)
    tq, tk, tv = (
        first.input(0, (0, -1, -1)), first.input(1, (0, 2, -1)), first.input(2, (0, 1, -1)),
    )  # fmt: skip
    raised = first.exp(first.matmul(tq, tk))
    first.output(first.accum(first.matmul(raised, tv)), (0, 2, -1))
    first.output(first.accum_sum(raised), (0, 2, -1))
    weighted, total = build.kernel([q, k, v], first.build())
    second = BlockBuilder([(2, 8, 64), (2, 8, 4)], (2, 1, 1), 1)
    a, b = second.input(0, (0, -1, -1)), second.input(1, (0, -1, -1))  # widths 16 and 4: reshaped, picked
    second.output(second.div(second.accum_width(a, width=16), second.accum_sum(b)), (0, -1, -1))
    (out,) = build.kernel([weighted, total], second.build())
    agrees(program, build.build(out), np.random.default_rng(1))


@inside
def test_published_graphs_on_their_twins(compilers_data):
    """Every published graph (the six workloads of the sheet, group-query attention and nTrans among them), shrunk in all sizes."""
    rng, done = np.random.default_rng(3), 0
    for path in sorted((compilers_data / "mugraphs").glob("*.json")):
        for graph in published.load(path)[:2]:
            if graph.kernels:
                (small,) = shrink(graph)
                inputs = [rng.uniform(0.5, 1.5, s) for s in small.input_shapes]
                got = triton.TritonProgram(small)(
                    *(torch.tensor(x, dtype=torch.float32, device=DEVICE) for x in inputs)
                )
                for g, w in zip(got, run(small, inputs), strict=True):
                    np.testing.assert_allclose(g.cpu().numpy(), w, rtol=2e-4, err_msg=str(path))
                done += 1
    assert done > 5


@inside
def test_every_elementwise_form():
    plain = ["exp", "square", "silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh", "neg", "abs", "sin", "cos"]
    steps = [(op, {}) for op in plain] + [
        ("scale", {"value": 0.5}), ("shift", {"value": 2.0}), ("clamp", {"low": -1.0, "high": 0.5}),
        ("leaky_relu", {"slope": 0.1}),
    ]  # fmt: skip
    for op, attrs in steps:
        build = Builder()
        x = build.input((5, 6))
        block = BlockBuilder([(5, 6)], (5, 1, 1), 2)
        value = block.accum(block.add(op, [block.input(0, (0, -1, -1), 1)], **attrs))
        block.output(value, (0, -1, -1))
        member = build.build(*build.kernel([x], block.build()))
        whole = np.random.default_rng(2).standard_normal((5, 6))
        (got,) = triton.TritonProgram(member)(torch.tensor(whole, dtype=torch.float32, device=DEVICE))
        np.testing.assert_allclose(got.cpu().numpy(), run(member, [whole])[0], rtol=1e-5, atol=1e-5, err_msg=op)


def test_source_can_be_read_and_what_has_no_form_is_refused():
    block = BlockBuilder([(4, 8)], (1, 1, 1), 1)
    block.output(block.accum(block.sum(block.input(0, (-1, -1, -1)), dim=0, width=2)), (-1, -1, -1))
    with pytest.raises(UsageError, match="dimension 0 down to 2"):
        triton_source.block_source(block.build(), [(4, 8)])
    program, ops = WORKLOADS["gated MLP"]
    family = symbolic.search(program, Limits(max_block_ops=ops, budget_s=3600)).families[0]
    member = family.instantiate(program.input_shapes, member_sizes(family, program.input_shapes)[0])
    text = triton_source.block_source(member.kernels[0].block, program.input_shapes)
    assert "tl.dot" in text and "tl.sigmoid" in text
    compile(text, "kernel", "exec")
