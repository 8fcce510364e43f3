"""Native convolutions: exact transforms, every form against float64 torch, skipped taps, chains, and what must be refused."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wager.compile import api
from wager.compile.ollie import definitions, forms, windows
from wager.compile.ollie.network import optimize
from wager.graph.expression import Call, Read, Scope, Tensor, evaluate, inputs_of
from wager.graph.index import floordiv, it
from wager.graph.lower import filtering
from wager.graph.lower.windows import Chain, Epilogue, LayoutOperator, row_step, spaced
from wager.graph.trace import trace


@pytest.mark.parametrize("outputs, taps", [*filtering.SIZES, (3, 2), (3, 3)])
def test_filtering_is_an_identity_over_fractions(outputs, taps, rng):
    result, weights, data = filtering.matrices(outputs, taps)
    g = [Fraction(int(v)) for v in rng.integers(-9, 10, taps)]
    d = [Fraction(int(v)) for v in rng.integers(-9, 10, outputs + taps - 1)]

    def times(matrix, x):
        return [sum(a * b for a, b in zip(row, x, strict=True)) for row in matrix]

    made = times(result, [a * b for a, b in zip(times(weights, g), times(data, d), strict=True)])
    assert made == [sum(d[i + j] * g[j] for j in range(taps)) for i in range(outputs)]
    assert all(x.denominator == 1 for row in data for x in row)


CASES = {
    "3x3": ("conv", (2, 7, 9, 16), (16, 16, 3, 3), 1, (1, 1), 1, 0),
    "dilated": ("conv", (1, 13, 7, 16), (48, 16, 3, 3), 1, (2, 2), 2, 0),
    "dilated by 3, uneven": ("conv", (1, 11, 10, 16), (16, 16, 3, 3), 1, (3, 3), 3, 0),
    "1x7": ("conv", (3, 7, 7, 5), (12, 5, 1, 7), 1, (0, 3), 1, 0),
    "1x7, rows that share a set of the cache": ("conv", (2, 3, 7, 1024), (40, 1024, 1, 7), 1, (0, 3), 1, 0),
    "every pixel has its own taps": ("conv", (1, 5, 3, 8), (33, 8, 5, 3), 1, (2, 1), 1, 0),
    "strided 5x5 into one": ("conv", (2, 11, 13, 16), (1, 16, 5, 5), 2, (2, 2), 1, 0),
    "one channel": ("conv", (1, 33, 13, 1), (20, 1, 5, 5), 1, (2, 2), 1, 0),
    "transposed": ("transposed", (3, 5, 4, 16), (16, 32, 4, 4), 2, (1, 1), 1, 0),
    "transposed, one pixel": ("transposed", (2, 1, 1, 10), (10, 32, 4, 4), 1, (0, 0), 1, 0),
    "transposed 9x9 by 3": ("transposed", (1, 6, 7, 16), (16, 1, 9, 9), 3, (4, 4), 1, 1),
    "transposed 3x3, missing taps": ("transposed", (2, 6, 7, 16), (16, 5, 3, 3), 2, (1, 1), 1, 1),
}


def scope_of(kind, x, w, stride, padding, dilation, extra) -> Scope:
    if kind == "conv":
        return definitions.conv(x, w, (stride, stride), padding, (dilation, dilation))
    return definitions.conv_transpose(x, w, (stride, stride), padding, (extra, extra))


def reference(kind, x_nhwc, w, stride, padding, dilation, extra) -> torch.Tensor:
    x, w = x_nhwc.permute(0, 3, 1, 2).double(), w.double()
    if kind == "conv":
        return F.conv2d(x, w, None, stride, padding, dilation)
    return F.conv_transpose2d(x, w, None, stride, padding, extra)


@pytest.mark.parametrize("activation", ["", "prelu", "tanh"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_form_of_every_convolution_is_right(case, activation, rng):
    kind, x_shape, w_shape, *rest = case
    x, w = torch.randn(x_shape), torch.randn(w_shape)
    found = forms.windows_of(scope_of(kind, x_shape, w_shape, *rest))
    assert found is not None
    features = w_shape[0] if kind == "conv" else w_shape[1]
    bias, slope = torch.randn(features), torch.rand(features)
    want = reference(kind, x, w, *rest) + bias.double()[:, None, None]
    if activation:
        want = F.prelu(want, slope.double()) if activation == "prelu" else torch.tanh(want)
    how = Epilogue(bias.numpy(), activation, slope.numpy() if activation == "prelu" else None)
    ways = forms.forms(found, w.numpy())
    assert len(ways) >= (5 if w_shape[2] == 3 and rest[0] == 1 else 1)
    for form in ways:
        assert not forms.checks(form, found, w.numpy(), rng)
        last = Chain(forms.operators(form, found, how), want.permute(0, 2, 3, 1).shape)(x)
        torch.testing.assert_close(last.permute(0, 3, 1, 2).double(), want, atol=5e-4, rtol=1e-4)
        first = Chain(forms.operators(form, found, how, channels_first=True), want.shape)(x)
        assert torch.equal(first.permute(0, 2, 3, 1), last)


def test_rows_are_moved_apart_only_where_that_pays():
    def step(channels: int, features: int, pixels: int = 7) -> int:
        scope = definitions.conv((1, 7, pixels, channels), (features, channels, 1, 7), (1, 1), (0, 3), (1, 1))
        found = forms.windows_of(scope)
        assert found is not None
        return row_step(windows.tabulate(found, np.ones((features, channels, 1, 7), np.float32)))

    assert step(1024, 40) == 1040 and step(2048, 64) == 2064
    assert step(1024, 16) == step(1040, 40) == step(512, 64) == step(1024, 40, 100) == 0
    found = forms.windows_of(definitions.conv((2, 3, 7, 1024), (40, 1024, 1, 7), (1, 1), (0, 3), (1, 1)))
    assert found is not None
    table = windows.tabulate(found, np.ones((40, 1024, 1, 7), np.float32))
    apart = spaced(table, 1040)
    for old, new in zip(table.groups, apart.groups, strict=True):
        assert np.array_equal(new.base * 1024, old.base * 1040) and np.array_equal(new.delta * 1024, old.delta * 1040)


def test_a_wrong_table_is_found_by_the_check(rng, monkeypatch):
    found = forms.windows_of(scope_of(*CASES["3x3"]))
    assert found is not None
    w = np.ones((16, 16, 3, 3), np.float32)
    index = found.data.index
    broken = replace(found, data=replace(found.data, index=(index[0], index[1] + 1, *index[2:])))

    def wrong(form):
        return replace(form, build=lambda _, how: form.build(broken, how))

    for form in (f for f in forms.forms(found, w) if f.error == 0):
        monkeypatch.setattr(forms, "forms", lambda *_, form=form: [wrong(form)])
        assert "off at sampled outputs" in forms.checks(form, found, w, rng)


def test_taps_outside_the_tensor_are_not_multiplied():
    found = forms.windows_of(definitions.conv_transpose((1, 2, 2, 8), (8, 8, 4, 4), (2, 2), (1, 1)))
    assert found is not None
    table = windows.tabulate(found, np.ones((8, 8, 4, 4), np.float32))
    taps = sum(int(bin(int(m)).count("1")) for g in table.groups for m in g.mask)
    assert taps == 36 and len(table.groups) == 4  # 6 x 6 of the 8 x 8 pairs of input and tap land inside the output


def test_expressions_that_are_no_windows_are_refused():
    a, k = Tensor("A", (4, 9, 8)), Tensor("K", (8, 5, 3))
    loops, sums = (("n", 0, 4), ("h", 0, 3), ("f", 0, 5)), (("c", 0, 8), ("r", 0, 3))
    kernel = Read(k, (it("c"), it("f"), it("r")))
    right = Scope(loops, sums, Call("mul", (Read(a, (it("n"), it("h") * 3 + it("r"), it("c"))), kernel)))
    assert list(windows.match_windows(right, "t"))
    mixed = Read(a, (it("n"), floordiv(it("h") + it("r"), 2), it("c")))
    assert not list(windows.match_windows(replace(right, body=Call("mul", (mixed, kernel))), "t"))
    middle = Read(replace(a, shape=(4, 8, 9)), (it("n"), it("c"), it("h") * 3 + it("r")))
    assert not list(windows.match_windows(replace(right, body=Call("mul", (middle, kernel))), "t"))


def test_a_matched_product_over_windows_means_the_same(rng):
    for kind in ("dilated", "transposed 9x9 by 3"):
        scope = scope_of(*CASES[kind])
        ((_, done),) = windows.match_windows(scope, "t")
        tensors = {n: rng.integers(-3, 4, t.shape).astype(float) for n, t in inputs_of(scope).items()}
        at = np.stack([rng.integers(a, b, 40) for _, a, b in scope.loops], axis=1)
        assert np.array_equal(evaluate(scope, tensors, at), evaluate(done, tensors, at))


def test_layout_changes_blocks_of_any_size():
    x = torch.randn(3, 37, 65)
    assert torch.equal(Chain([LayoutOperator(3, 37, 65)], (3, 65, 37))(x), x.transpose(1, 2))


def test_a_chain_leaves_and_enters_where_it_must():
    """A value with two readers, a pooling between, and an output in the middle."""
    nn = torch.nn

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=2, dilation=2)
            self.c, self.d = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 3, 4, 2, 1)

        def forward(self, x):
            first = F.gelu(self.a(x))
            second = F.leaky_relu(self.b(first), 0.3)
            third = self.c(F.max_pool2d(second, 2) * 2)
            return torch.sigmoid(self.d(third)), third, first + 1

    model, x = Branches().eval(), torch.randn(2, 8, 10, 12)
    traced = trace(model, [x])
    network = optimize(traced.program, traced.constants, max_depth=1, keep=1, budget_s=1)
    for got, want in zip(network.executable(x), model(x), strict=True):
        torch.testing.assert_close(got, want.detach(), atol=1e-5, rtol=1e-4)
    assert len(network.choices) == 4


def test_not_a_number_stays_one():
    found = forms.windows_of(definitions.conv((1, 4, 4, 16), (16, 16, 3, 3), (1, 1), (1, 1), (1, 1)))
    assert found is not None
    w, x = np.ones((16, 16, 3, 3), np.float32), torch.full((1, 4, 4, 16), float("nan"))
    for form in forms.forms(found, w):
        assert Chain(forms.operators(form, found, Epilogue(None, "relu")), (1, 4, 4, 16))(x).isnan().all(), form.name


def test_a_backend_freezes_the_parameters_until_they_change(monkeypatch, caplog):
    quick = api.compile
    made = []

    def compiled(module, inputs):
        made.append(quick(module, inputs, time_budget_s=1e-3))
        made[-1].run = made[-1].run or fail  # whichever is faster: what was found is what is asked here
        return made[-1]

    monkeypatch.setattr(api, "compile", compiled)
    monkeypatch.setattr(api, "_judge", lambda *_: None)
    torch._dynamo.reset()
    model = torch.nn.Sequential(
        torch.nn.ConvTranspose2d(16, 8, 4, 2, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    ).eval()
    fast, x = torch.compile(model, backend=api.backend, dynamic=False), torch.randn(1, 16, 3, 3)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)
        assert len(made) == 1 and made[0].report().counters["operators"] == 1
        model[0].weight.mul_(2.0)
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)
    assert len(made) == 2
    assert fast(x).requires_grad and "torch.no_grad()" in caplog.text


def fail(*_):
    raise AssertionError("nothing native was found")
