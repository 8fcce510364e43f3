"""OLLIE: every rule is exact, refuses what it must, and the search rediscovers the published derivations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wager
from wager.compile.ollie import definitions, dilation, inter, match, network, rules, search, sites
from wager.compile.ollie.network import optimize
from wager.compile.ollie.realize import Plan
from wager.graph.derivation_log import load
from wager.graph.expression import Call, OutOfRange, Read, Scope, Tensor, evaluate, fingerprint, inputs_of
from wager.graph.index import Affine, floordiv, it, remainder
from wager.graph.trace import trace


@st.composite
def scopes(draw):
    """Random products of two reads over 2 loops and 1 to 2 sums with affine indices; paddings as needed."""
    sizes = {n: draw(st.integers(2, 5)) for n in "xyuv"}
    sums = tuple((n, 0, sizes[n]) for n in "uv"[: draw(st.integers(1, 2))])
    loops = tuple((n, 0, sizes[n]) for n in "xy")
    names = [n for n, _, _ in (*loops, *sums)]

    def index() -> Affine:
        total = Affine((), draw(st.integers(-2, 2)))
        for n in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
            total = total + it(n) * draw(st.sampled_from([1, 1, 2, -1, 3]))
        return total

    tensors = [Tensor(n, (draw(st.integers(2, 6)), draw(st.integers(2, 6)))) for n in "AB"]
    body = Call("mul", tuple(Read(t, (index(), index())) for t in tensors))
    return rules.pad_for(Scope(loops, sums, body))


def same(a: Scope, b: Scope, seed: int = 0) -> bool:
    rng = np.random.default_rng(seed)
    tensors = {n: rng.integers(-4, 5, t.shape).astype(float) for n, t in inputs_of(a).items()}
    return np.array_equal(evaluate(a, tensors), evaluate(b, tensors))


@given(scopes())
@settings(max_examples=60, deadline=None)
def test_every_rule_keeps_the_value(scope):
    steps = [s for _, s in rules.split_sum(scope)] + [s for _, s in rules.merge_variables(scope)]
    steps += [s for _, s in rules.split_stage(scope)] + [s for _, s in rules.magnify(scope)]
    tight = rules.tighten(scope)
    steps += [tight] if tight is not None else []
    for step in steps:
        assert same(scope, step)
        assert same(scope, rules.merge_stages(step))


@given(scopes(), st.randoms())
@settings(max_examples=40, deadline=None)
def test_fingerprints_forget_names_order_of_sums_and_operands(scope, random):
    old = [n for n, _, _ in (*scope.loops, *scope.sums)]
    names = dict(zip(old, random.sample([f"z{i}" for i in range(9)], len(old)), strict=True))

    def renamed(loops):
        return tuple((names[n], a, b) for n, a, b in loops)

    by = {n: it(m) for n, m in names.items()}
    reads = [Read(r.object, tuple(i.substitute(by) for i in r.index)) for r in scope.body.args]
    other = Scope(renamed(scope.loops), renamed(scope.sums)[::-1], Call("mul", tuple(reads[::-1])))
    assert fingerprint(other) == fingerprint(scope)


def test_equal_fingerprints_mean_equal_values(rng):
    """A collision audit over random expressions of a family so small that equal ones do occur."""

    def index() -> Affine:
        return it(str(rng.choice(list("xyuv")))) + int(rng.integers(0, 2))

    groups: dict[str, list[Scope]] = {}
    for _ in range(3000):
        reads = tuple(Read(Tensor(t, (3, 3), (2, 2)), (index(), index())) for t in "AB")
        scope = Scope((("x", 0, 2), ("y", 0, 2)), (("u", 0, 2), ("v", 0, 2)), Call("mul", reads))
        groups.setdefault(fingerprint(scope), []).append(scope)
    tensors = {t: rng.integers(-9, 10, (3, 3)).astype(float) for t in "AB"}
    values = {mark: {evaluate(s, tensors).tobytes() for s in group} for mark, group in groups.items()}
    assert all(len(v) == 1 for v in values.values()) and 500 < len(groups) < 3000


def test_alike_sums_in_different_places_are_told_apart():
    a, k = Tensor("A", (3, 3)), Tensor("K", (3, 3))
    body = lambda i, j: Call("mul", (Read(a, (it("r"), it("s"))), Read(k, (it(i), it(j)))))
    sums = (("r", 0, 3), ("s", 0, 3))
    assert fingerprint(Scope((), sums, body("r", "s"))) != fingerprint(Scope((), sums, body("s", "r")))


def test_a_merge_that_leaves_the_padding_is_refused():
    a, k = Tensor("A", (8,)), Tensor("K", (4, 3))
    scope = Scope(
        (("h", 0, 4), ("r", 0, 3)),
        (("c", 0, 2),),
        Call("mul", (Read(a, (it("h") + it("r"),)), Read(k, (it("h"), it("c"))))),
    )
    assert not any(step.startswith("2 merge h+1*r") for step, _ in rules.merge_variables(scope))


@pytest.mark.parametrize("size, channels", [(7, 3), (6, 2)])
def test_convolution_becomes_one_product_and_shifted_additions(size, channels):
    scope = definitions.conv((1, size, size, channels), (4, channels, 3, 3), (1, 1), (1, 1), (1, 1))
    found = search.derive(scope, max_depth=3, targets=("matmul",), budget_s=3600)
    product = [c for c in found.candidates if f"8 matmul [{size * size},{channels}]x[{channels},36]" in c.path]
    assert product and all(search.agrees(scope, c.scope, np.random.default_rng(0)) for c in found.candidates)


def test_a_5x5_window_becomes_3x3_windows():
    scope = definitions.conv((1, 9, 9, 2), (1, 2, 5, 5), (1, 1), (2, 2), (1, 1))
    found = search.derive(scope, max_depth=7, targets=("conv",), budget_s=3600, keep=500)
    wanted = [c for c in found.candidates if c.path[-1] == "8 conv 3x3 of 2 into 4 channels"]
    assert wanted and same(scope, wanted[0].scope)


def test_published_derivations_hold_step_by_step_and_are_rediscovered(compilers_data, rng):
    for name, target in (("conv3x3_to_gemm", 6), ("conv5x5_to_conv3x3", 9)):
        steps = load(compilers_data / "derivations" / f"{name}.jsonl")
        first = steps[0][1]
        tensors = {n: rng.integers(-3, 4, t.shape).astype(float) for n, t in inputs_of(first).items()}
        points = np.stack([rng.integers(0, s, 12) for s in first.shape], axis=1)
        want = evaluate(first, tensors, points)
        for message, step in steps:
            assert np.array_equal(want, evaluate(step, tensors, points)), message
        goal = fingerprint(rules.stages(steps[target][1])[-1])
        assert goal in reachable(first, depth=7 if target == 9 else 3), name


def reachable(scope: Scope, depth: int) -> set[str]:
    """Fingerprints of tightened innermost stages within `depth` rules."""
    level, seen, found = [(rules.merge_stages(scope), ())], set(), set()
    for _ in range(depth + 1):
        following = []
        for state, path in level:
            mark = fingerprint(state)
            if mark in seen:
                continue
            seen.add(mark)
            found.add(fingerprint(rules.stages(rules.tighten(state) or state)[-1]))
            following += [(rules.merge_stages(new), (*path, step)) for step, new in search.successors(state, path)]
        level = following
    return found


def test_deeper_searches_only_add_candidates():
    scope = definitions.conv((1, 5, 5, 2), (2, 2, 3, 3), (1, 1), (1, 1), (1, 1))
    found = [
        {fingerprint(c.scope) for c in search.derive(scope, max_depth=d, keep=1000, budget_s=3600).candidates}
        for d in (0, 1, 2, 3)
    ]
    assert all(a <= b for a, b in zip(found, found[1:], strict=False)) and len(found[3]) > len(found[0])


def test_matmul_is_recognised_in_any_layout_and_near_misses_are_not(rng):
    for left in (("m", "k"), ("k", "m")):
        for right in (("k", "n"), ("n", "k")):
            sizes = {"m": 3, "k": 4, "n": 5}
            reads = [
                Read(Tensor(t, tuple(sizes[i] for i in names)), tuple(it(i) for i in names))
                for t, names in (("A", left), ("B", right))
            ]
            scope = Scope((("m", 0, 3), ("n", 0, 5)), (("k", 0, 4),), Call("mul", tuple(reads)))
            done = list(match.match_matmul(scope, "t"))
            assert done and all(same(scope, d) for _, d in done)
    strided = replace(scope, body=Call("mul", (Read(Tensor("A", (3, 8)), (it("m"), it("k") + it("m"))), reads[1])))
    assert not list(match.match_matmul(strided, "t"))


@pytest.mark.parametrize("dilation", [1, 3])
def test_banded_products_are_right_at_class_borders(dilation, rng):
    scope = definitions.banded_matmul(2, 13, 4, 2, dilation)
    a, b = (rng.integers(-3, 4, (2, 13, 4)).astype(float) for _ in range(2))
    want = np.zeros((2, 13, 5))
    for m in range(13):
        for w in range(5):
            row = m + dilation * (w - 2)
            if 0 <= row < 13:
                want[:, m, w] = (a[:, m] * b[:, row]).sum(-1)
    assert np.array_equal(evaluate(scope, {"A": a, "B": b}), want)


@pytest.mark.parametrize(
    "shape, weight, stride, padding, extra",
    [
        ((2, 3, 3, 4), (4, 5, 4, 4), 2, 1, 0),
        ((1, 4, 5, 2), (2, 1, 9, 9), 3, 4, 1),
        ((1, 1, 1, 3), (3, 2, 4, 4), 1, 0, 0),
    ],
)
def test_transposed_convolutions_run_as_products(shape, weight, stride, padding, extra):
    scope = definitions.conv_transpose(shape, weight, (stride, stride), (padding, padding), (extra, extra))
    x, w = torch.randn(shape), torch.randn(weight)
    want = torch.nn.functional.conv_transpose2d(x.permute(0, 3, 1, 2), w, None, stride, padding, extra).permute(
        0, 2, 3, 1
    )
    np.testing.assert_allclose(
        evaluate(scope, {"A": x.double().numpy(), "K": w.double().numpy()}), want.numpy(), atol=1e-4
    )
    found = search.derive(scope, max_depth=3, targets=("matmul",), budget_s=3600, keep=1)
    got = Plan(
        definitions.with_epilogue(found.candidates[0].scope, True, "relu"),
        {"K": w, "bias": torch.arange(float(weight[1]))},
    )({"A": x})
    torch.testing.assert_close(got, torch.relu(want + torch.arange(float(weight[1]))), atol=1e-4, rtol=1e-4)


def test_a_network_is_optimised_as_a_whole():
    nn = torch.nn
    model = nn.Sequential(
        nn.ConvTranspose2d(6, 4, 4, 2, 1),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.Tanh(),
    ).eval()
    model[1].running_mean.normal_(), model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 6, 3, 3)
    traced = trace(model, [x])
    done = optimize(traced.program, traced.constants, max_depth=3, keep=2, budget_s=5)
    torch.testing.assert_close(done.executable(x)[0], model(x).detach(), atol=1e-5, rtol=1e-4)
    assert len(done.choices) == 2


@given(st.integers(-20, 20), st.integers(1, 6), st.integers(-5, 5), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_division_and_remainder_rules(c, by, const, x):
    index, env = it("x") * c + const, {"x": np.array(x)}
    assert floordiv(index, by, {"x": (0, 10)}).evaluate(env) == (c * x + const) // by
    assert remainder(index, by, {"x": (0, 10)}).evaluate(env) == (c * x + const) % by


def test_reads_beyond_the_padding_are_an_error():
    scope = Scope((("x", 0, 4),), (), Read(Tensor("A", (3,)), (it("x"),)))
    with pytest.raises(OutOfRange):
        evaluate(scope, {"A": np.ones(3)})


def test_expressions_are_split_merged_and_fused(rng):
    a, b = Tensor("A", (5, 4)), [Tensor(f"B{i}", (4, 3)) for i in range(2)]

    def product_of(right: Tensor) -> Scope:
        body = Call("mul", (Read(a, (it("m"), it("k"))), Read(right, (it("k"), it("n")))))
        return Scope((("m", 0, 5), ("n", 0, 3)), (("k", 0, 4),), body)

    tensors = {"A": rng.integers(-3, 4, (5, 4)), "B0": rng.integers(-3, 4, (4, 3)), "B1": rng.integers(-3, 4, (4, 3))}
    scopes = [product_of(t) for t in b]
    whole = inter.merge(scopes, "stacked")
    assert whole is not None
    stacked = {**tensors, "stacked": np.stack([tensors["B0"], tensors["B1"]])}
    assert np.array_equal(evaluate(whole, stacked), [evaluate(s, tensors) for s in scopes])
    assert inter.merge([scopes[0], replace(scopes[1], sums=(("k", 0, 3),))], "stacked") is None
    for name in ("m", "n"):
        axis = [n for n, _, _ in scopes[0].loops].index(name)
        parts = [evaluate(s, tensors) for s in inter.split(scopes[0], name)]
        assert np.array_equal(np.stack(parts, axis), evaluate(scopes[0], tensors))
    conv = definitions.conv((1, 5, 3, 2), (2, 2, 3, 3), (1, 1), (1, 1), (1, 1))
    made = Scope(
        tuple((f"y{d}", 0, s) for d, s in enumerate((1, 5, 3, 2))),
        (),
        Call("relu", (Read(Tensor("X", (5, 3, 2)), (it("y1"), it("y2"), it("y3"))),)),
    )
    x, k = rng.integers(-3, 4, (5, 3, 2)), rng.integers(-3, 4, (2, 2, 3, 3))
    fused = inter.fuse(conv, {"A": made})
    assert np.array_equal(evaluate(fused, {"X": x, "K": k}), evaluate(conv, {"A": np.maximum(x, 0)[None], "K": k}))


@given(scopes())
@settings(max_examples=25, deadline=None)
def test_splitting_a_loop_keeps_every_value(scope):
    rng = np.random.default_rng(0)
    tensors = {n: rng.integers(-4, 5, t.shape).astype(float) for n, t in inputs_of(scope).items()}
    parts = [evaluate(s, tensors) for s in inter.split(scope, "y")]
    assert np.array_equal(np.stack(parts, 1), evaluate(scope, tensors))


def test_operators_that_read_one_value_are_joined(monkeypatch):
    nn = torch.nn

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1, bias=False)
            self.p, self.q = nn.Linear(8, 16, bias=False), nn.Linear(8, 32, bias=False)

        def forward(self, x, y):
            return torch.relu(self.a(x)), torch.relu(self.b(x)), self.p(y), self.q(y)

    model, inputs = Branches().eval(), [torch.randn(2, 8, 5, 6), torch.randn(4, 8)]
    traced = trace(model, inputs)
    monkeypatch.setattr(network, "quick_time", lambda run, rounds: 1.0)  # two products cost twice as much as one
    rank = sites._rank

    def even(contenders, calls):
        rank(contenders, calls)
        for c in contenders:
            c.seconds = 1.0

    monkeypatch.setattr(sites, "_rank", even)
    found = optimize(traced.program, traced.constants, max_depth=0, keep=1, budget_s=1)
    assert sum("merge" in c.chosen or "merge" in c.path for c in found.choices) == 2
    for got, want in zip(found.executable(*inputs), model(*inputs), strict=True):
        torch.testing.assert_close(got, want.detach(), atol=1e-5, rtol=1e-4)


def test_a_dilated_convolution_becomes_an_ordinary_one():
    scope = definitions.conv((2, 6, 8, 3), (4, 3, 3, 3), (1, 1), (2, 2), (2, 2))
    found = search.derive(scope, max_depth=2, targets=("conv",), budget_s=3600, keep=500)
    wanted = [
        c for c in found.candidates if "7 A by 2 along 1" in c.path and sum(s.startswith("7") for s in c.path) == 2
    ]
    dilations = {c.path: dict(tensor.source.args)["dilation"] for c in wanted for tensor in routines(c.scope)}
    assert (1, 1) in dilations.values() and all(same(scope, c.scope) for c in wanted)
    x, w = torch.randn(2, 6, 8, 3), torch.randn(4, 3, 3, 3)
    want = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), w, None, 1, 2, 2).permute(0, 2, 3, 1)
    torch.testing.assert_close(Plan(wanted[0].scope, {"K": w})({"A": x}), want, atol=1e-4, rtol=1e-4)
    odd = definitions.conv((1, 7, 7, 2), (2, 2, 3, 3), (1, 1), (2, 2), (2, 2))
    assert not list(dilation.undilate(odd)) and not list(
        dilation.undilate(definitions.conv((1, 6, 6, 2), (2, 2, 3, 3), (1, 1), (1, 1), (1, 1)))
    )


def routines(scope: Scope) -> list[Tensor]:
    inner = rules.stages(scope)[-1]
    return [t for t in rules.tensors(inner.body) if t.source is not None]


def test_progress_says_what_is_fastest_and_how_fast_it_is():
    lines = []
    module = torch.nn.Conv2d(4, 8, 3, padding=1).eval()
    wager.compile(module, [torch.randn(1, 4, 8, 8)], search="ollie", time_budget_s=2, progress=lines.append)
    assert lines and all("fastest alone" in line and "-> 0.000 ms" not in line for line in lines)
