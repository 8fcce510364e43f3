"""Products with a band: the matcher and its near misses, residue classes with their own borders, the native kernels, and whole graphs cut apart."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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
from wager.graph.lower.banded import KINDS, BandedProduct, Rows
from wager.graph.trace import trace
from wager.native import build

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


@pytest.mark.parametrize("form", KINDS["products"])
@pytest.mark.parametrize("offset, others", [(-12, 20), (3, 9), (0, 1)])
def test_rows_outside_are_zero_and_unwanted_rows_are_not_written(offset, others, form):
    a, b = torch.randint(-3, 4, (1, 9, 33)).float(), torch.randint(-3, 4, (1, others, 33)).float()
    out = Rows.contiguous(1, 9, 6)
    out.starts[0, 4] = -1
    product = BandedProduct(
        "products", Rows.contiguous(1, 9, 33), Rows.contiguous(1, others, 33), out, 33, 6, offset, (9, 6), form
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


def residue_rows(heads: int, length: int, width: int, dilation: int) -> Rows:
    """Rows of every residue class as one batch entry; -1 where a class is shorter than the longest."""
    head, residue, row = np.indices((heads, dilation, -(-length // dilation)))
    at = row * dilation + residue
    starts = np.where(at < length, (head * length + at) * width, -1)
    return Rows(starts.reshape(heads * dilation, -1))


def band_in_float64(
    kind: str, left: torch.Tensor, right: torch.Tensor, diagonals: int, before: int, dilation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product diagonal by diagonal, and the sum of the absolute values of its terms."""
    length, a = left.shape[1], left.double()
    padded = F.pad(right.double(), (0, 0, before * dilation, (diagonals - 1 - before) * dilation))
    met = [padded[:, d * dilation : d * dilation + length] for d in range(diagonals)]
    if kind == "products":
        terms = [a * x for x in met]
        return torch.stack([t.sum(-1) for t in terms], -1), torch.stack([t.abs().sum(-1) for t in terms], -1)
    terms = torch.stack([a[..., d : d + 1] * x for d, x in enumerate(met)])
    return terms.sum(0), terms.abs().sum(0)


LEVELS = [level for level in ("avx2", "avx512") if build.runs_here(level)]
BANDS = st.tuples(
    st.integers(1, 2),  # heads
    st.integers(1, 75),  # rows
    st.integers(1, 70),  # features
    st.integers(1, 70),  # diagonals
    st.integers(1, 4),  # dilation
)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind, form", [(k, f) for k, forms in KINDS.items() for f in forms])
@given(sizes=BANDS, data=st.data())
@settings(deadline=None)
def test_every_native_form_is_exact_on_integers_and_within_its_bound(kind, form, level, sizes, data):
    """Every row and diagonal is compared, so both ends of every residue class are; also bands to one side of the diagonal only."""
    heads, length, features, diagonals, dilation = sizes
    before = data.draw(st.integers(0, diagonals - 1), "diagonals before the row")
    wide = (features, features, diagonals) if kind == "products" else (diagonals, features, features)
    tables = [residue_rows(heads, length, w, dilation) for w in wide]
    shape = (heads, length, wide[2])
    run = BandedProduct(kind, *tables, features, diagonals, -before, shape, form, build.LEVELS[level])
    random = torch.Generator().manual_seed(length)
    left, right = (torch.randn(heads, length, w, generator=random) for w in wide[:2])
    want, size = band_in_float64(kind, left, right, diagonals, before, dilation)
    terms = features if kind == "products" else diagonals
    assert ((run(left, right).double() - want).abs() <= (terms + 8) * 2**-24 * size).all()
    left, right = (x.mul(3).round() for x in (left, right))
    assert torch.equal(run(left, right).double(), band_in_float64(kind, left, right, diagonals, before, dilation)[0])


@pytest.mark.parametrize("kind, form", [(k, f) for k, forms in KINDS.items() for f in forms])
def test_a_row_that_is_no_number_spoils_only_the_rows_that_meet_it(kind, form):
    """Rows of a tile or panel that lie outside a row's band must not enter its sum, not even times zero."""
    left, right = torch.ones(1, 60, 48 if kind == "products" else 5), torch.ones(1, 60, 48)
    right[0, 30] = float("nan")
    tables = [Rows.contiguous(1, 60, w) for w in (left.shape[-1], 48, 5 if kind == "products" else 48)]
    width = 5 if kind == "products" else 48
    got = BandedProduct(kind, *tables, 48, 5, -2, (60, width), form)(left, right)
    met = torch.arange(60)[:, None] + torch.arange(5) - 2 == 30
    assert torch.equal(got.isnan(), met if kind == "products" else met.any(1, keepdim=True).expand(60, 48))


def test_callers_side_by_side_do_not_share_scratch():
    left, right = torch.randint(-3, 4, (2, 2, 400, 64)).float()
    rows, out = Rows.contiguous(2, 400, 64), Rows.contiguous(2, 400, 65)
    run = BandedProduct("products", rows, rows, out, 64, 65, -32, (2, 400, 65))
    want = [band_in_float64("products", left * n, right, 65, 32, 1)[0] for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            got = pool.map(lambda n: run(left * n, right), range(4))
            assert all(torch.equal(g.double(), w) for g, w in zip(got, want, strict=True))


def test_the_form_follows_the_band():
    def form(width: int) -> str:
        rows = Rows.contiguous(1, 20, 8)
        return BandedProduct("products", rows, rows, Rows.contiguous(1, 20, width), 8, width, 0, (1, 20, width)).form

    assert [form(w) for w in (1, 6, 7, 65)] == ["products", "products", "panels", "panels"]


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
