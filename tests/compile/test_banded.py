"""Products with a band: the matcher and its near misses, residue classes with their own borders, the native kernels, and whole graphs cut apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wager.compile.ollie import banded, cut, definitions, dilation, search
from wager.compile.ollie.network import optimize
from wager.compile.ollie.realize import Plan
from wager.errors import UsageError
from wager.graph.execute import Executable
from wager.graph.expression import Call, Scope, evaluate, inputs_of, map_reads
from wager.graph.index import it
from wager.graph.interpret import run
from wager.graph.lower.banded import BandedProduct, Rows
from wager.graph.trace import trace

MAKERS = (definitions.banded_matmul, definitions.banded_sum)
SIZES = st.tuples(*(st.integers(1, n) for n in (2, 17, 20, 3, 4)))


def integers(scope: Scope, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {n: rng.integers(-3, 4, t.shape).astype(float) for n, t in inputs_of(scope).items()}


@given(st.sampled_from(MAKERS), SIZES)
@settings(max_examples=30, deadline=None)
def test_bands_are_recognised_and_run_exactly_whatever_the_dilation(make, sizes):
    """Every row is compared, so those at the borders of each residue class are too."""
    scope = make(*sizes)
    found = search.derive(scope, max_depth=2, targets=("banded",), budget_s=3600, keep=4)
    tensors = integers(scope, np.random.default_rng(0))
    want = evaluate(scope, tensors)
    assert found.candidates
    for c in found.candidates:
        assert np.array_equal(evaluate(c.scope, tensors), want), c.path
        got = Plan(c.scope, {})({n: torch.from_numpy(x).float() for n, x in tensors.items()})
        assert np.array_equal(got.numpy(), want), c.path


@pytest.mark.parametrize("make", MAKERS)
def test_names_and_the_order_of_loops_do_not_matter(make, rng):
    scope = make(2, 9, 5, 2)
    loops = (*scope.loops[2:], *scope.loops[:2])
    assert list(banded.match_banded(scope, "t"))
    turned = replace(scope, loops=loops, body=Call("mul", scope.body.args[::-1]))
    done = list(banded.match_banded(turned, "t"))
    tensors = integers(scope, rng)
    assert done and all(np.array_equal(evaluate(d, tensors), evaluate(turned, tensors)) for _, d in done)


def test_near_misses_are_no_bands():
    assert not list(banded.match_banded(definitions.banded_matmul(2, 13, 4, 2, 3), "t"))  # dilated: rule 7 comes first
    scope = definitions.banded_matmul(2, 13, 4, 2)
    backwards = map_reads(
        scope.body,
        lambda r: replace(r, index=tuple(i.substitute({"w": it("w") * -1 + 4}) for i in r.index)),
    )
    assert not list(banded.match_banded(replace(scope, body=backwards), "t"))
    conv = definitions.conv((1, 6, 6, 2), (2, 2, 3, 3), (1, 1), (1, 1), (1, 1))
    assert not list(banded.match_banded(conv, "t"))


@given(SIZES)
@settings(max_examples=20, deadline=None)
def test_residue_classes_keep_every_value(sizes):
    scope = definitions.banded_matmul(*sizes)
    steps = [s for _, s in dilation.residues(scope)]
    tensors = integers(scope, np.random.default_rng(1))
    assert bool(steps) == (sizes[4] > 1)
    assert all(np.array_equal(evaluate(s, tensors), evaluate(scope, tensors)) for s in steps)


def test_dilated_rows_are_read_where_they_lie():
    scope = definitions.banded_matmul(2, 12, 16, 2, 4)
    found = search.derive(scope, max_depth=2, targets=("banded",), budget_s=3600, keep=4)
    assert any(Plan(c.scope, {}).description == ["banded out"] for c in found.candidates)


@pytest.mark.parametrize("offset, others", [(-12, 20), (3, 9), (0, 1)])
def test_rows_outside_are_zero_and_unwanted_rows_are_not_written(offset, others):
    a, b = torch.randint(-3, 4, (1, 9, 33)).float(), torch.randint(-3, 4, (1, others, 33)).float()
    out = Rows.contiguous(1, 9, 6)
    out.starts[0, 4] = -1
    product = BandedProduct(
        "products", Rows.contiguous(1, 9, 33), Rows.contiguous(1, others, 33), out, 33, 6, offset, (9, 6)
    )
    want = torch.zeros(9, 6)
    for m in range(9):
        for d in range(6):
            if 0 <= m + offset + d < others and m != 4:
                want[m, d] = a[0, m] @ b[0, m + offset + d]
    got = product(a, b)
    got[4] = 0.0
    assert torch.equal(got, want)
    with pytest.raises(UsageError, match="at most"):
        BandedProduct("sums", out, out, out, 4, 5000, 0, (1,))


def longformer(q, k, v, width=2, step=3):
    def windows(x):
        return F.pad(x, (0, 0, width * step, width * step)).unfold(1, 2 * width * step + 1, 1)[..., ::step]

    weights = torch.softmax(torch.einsum("bmk,bmkw->bmw", q, windows(k)), -1)
    return torch.einsum("bmw,bmkw->bmk", weights, windows(v))


def test_a_graph_is_cut_at_its_softmax_and_both_bands_are_found():
    inputs = [torch.randn(2, 23, 24) for _ in range(3)]
    traced = trace(longformer, inputs)
    softmax = next(i for i, n in enumerate(traced.program.nodes) if n.op == "softmax")
    first, second = cut.subprograms(traced.program)
    assert softmax in first and min(second) > softmax
    bands = [c.path[-1] for p in cut.pieces(traced.program) for c in search.derive(p.scope, max_depth=2).candidates[:1]]
    assert [b.split()[1] for b in bands] == ["G2BMM", "GBMM"]
    done = optimize(traced.program, traced.constants, budget_s=3)
    torch.testing.assert_close(done.executable(*inputs)[0], longformer(*inputs), atol=1e-5, rtol=1e-4)
    assert len(done.choices) == 2


def test_what_crosses_a_cut_is_not_part_of_an_expression():
    def shared(x, y):
        s = x + y
        return torch.relu(s) @ y.transpose(0, 1), s

    program = trace(shared, [torch.randn(4, 6), torch.randn(4, 6)]).program
    groups = [[program.nodes[i].op for i in g] for g in cut.subprograms(program)]
    assert sorted(groups) == [["add"], ["permute", "matmul"], ["relu"]]
    assert not cut.pieces(program)  # a plain product is the library's


@given(st.permutations([2, 3, 4]), st.sampled_from([(24,), (4, 6), (2, 12), (1, 8, 3), (6, 2, 2), (2, 3, 4)]))
@settings(max_examples=30, deadline=None)
def test_reshapes_as_indices(old, new):
    x = np.arange(24).reshape(old)
    points = np.indices(new).reshape(len(new), -1)
    names = [f"l{d}" for d in range(len(new))]
    ranges = {n: (0, s) for n, s in zip(names, new, strict=True)}
    index = cut._reshaped(new, tuple(old), [it(n) for n in names], ranges)
    at = tuple(np.broadcast_to(i.evaluate(dict(zip(names, points, strict=True))), (24,)) for i in index)
    assert np.array_equal(x[at], np.arange(24))


def test_padding_slices_and_windows_mean_the_same_everywhere(rng):
    function = lambda x: F.pad(x, (1, 2, 0, 1)).unfold(1, 3, 2)[:, :, 1:, ::2] * 2.0
    x = torch.from_numpy(rng.standard_normal((2, 9, 5))).float()
    traced = trace(function, [x])
    torch.testing.assert_close(Executable(traced.program, traced.constants)(x)[0], function(x))
    np.testing.assert_allclose(run(traced.program, [x.double().numpy()])[0], function(x).numpy(), rtol=1e-6)
    with pytest.raises(UsageError, match="padding"):
        trace(lambda t: F.pad(t, (1, 1), value=3.0), [x])
