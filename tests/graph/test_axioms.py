"""Every axiom alone on random tensors, its side conditions, and the second verifier on kernels, mutants and published graphs."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest

from tests.graph.mutants import mutants
from tests.graph.test_verify import attention_kernel, norm_kernel, twins
from wager.graph import published
from wager.graph.egraph.rules import Bounds, Pattern, Rule
from wager.graph.interpret import random_inputs, run
from wager.graph.program import BlockBuilder, Builder
from wager.graph.verify.axioms import AXIOMS, Fact, fact, prove

AXES = [("p", 2), ("q", 2), ("q", 4), ("r", 2)]
KINDS = {
    "partition": "dp",
    "combine": "dp",
    "replicate": "p",
    "reduce": "p",
    "sum": "d",
    "scale": "c",
    "unary": "f",
    "ew": "w",
}
POOL = {
    "d": [0, 1, 2],
    "p": AXES,
    "c": [Fraction(1, 2), Fraction(3), Fraction(1)],
    "f": ["tanh"],
    "w": ["add", "mul", "div"],
}


def kinds(pattern: Pattern) -> dict[str, str]:
    """What every payload variable stands for."""
    found = {v: k for v, k in zip(pattern.payload, KINDS.get(pattern.op, ""), strict=False) if str(v)[0] == "?"}
    for a in pattern.args:
        found |= kinds(a)
    return found


def shape_of(pattern: Pattern, binding: dict) -> Fact:
    if pattern.op[0] == "?":
        return binding[pattern.op]
    payload = tuple(binding.get(p, p) for p in pattern.payload)
    return fact(pattern.op, payload, [shape_of(a, binding) for a in pattern.args])


def value_of(pattern: Pattern, binding: dict, values: dict) -> tuple[np.ndarray, list]:
    """The tensor, one leading axis for each parallel dimension (in sorted order), and those dimensions."""
    if pattern.op[0] == "?":
        return values[pattern.op], sorted(binding[pattern.op].axes)
    payload = tuple(binding.get(p, p) for p in pattern.payload)
    args = [value_of(a, binding, values) for a in pattern.args]
    x, axes = args[0]
    op = pattern.op
    if op == "unary":
        return np.tanh(x), axes
    if op == "scale":
        return x * float(payload[0]), axes
    if op in ("ew", "matmul"):
        y, lead = args[1][0], len(axes)
        rank = max(x.ndim, y.ndim) - lead
        widen = lambda t: t.reshape(*t.shape[:lead], *(1,) * (rank - (t.ndim - lead)), *t.shape[lead:])
        x, y = widen(x), widen(y)
        return {"add": np.add, "mul": np.multiply, "div": np.divide, "matmul": np.matmul}[
            payload[0] if op == "ew" else op
        ](x, y), axes
    if op == "sum":
        return x.sum(axis=-1 - payload[0], keepdims=True), axes
    if op == "reduce":
        at = axes.index(payload[0])
        return x.sum(axis=at), axes[:at] + axes[at + 1 :]
    if op == "combine":
        d, axis = payload
        at = axes.index(axis)
        x = np.moveaxis(x, at, x.ndim - 2 - d)  # the part stands just before its dimension
        shape = list(x.shape)
        shape[x.ndim - 2 - d : x.ndim - d] = [shape[x.ndim - 2 - d] * shape[x.ndim - 1 - d]]
        return x.reshape(shape), axes[:at] + axes[at + 1 :]
    axis = payload[-1]
    now = sorted([*axes, axis])
    if op == "replicate":
        parts = np.broadcast_to(x, (axis[1], *x.shape))
    else:
        parts = np.stack(np.split(x, axis[1], axis=-1 - payload[0]))
    return np.moveaxis(parts, 0, now.index(axis)), now


def instances(r: Rule, allowed: bool, wanted: int, tries: int, rng: random.Random):
    """Bindings whose left side makes sense and for which the condition holds (or not), with the values the condition adds."""
    kind = kinds(r.left)
    for _ in range(tries):
        binding = {v: rng.choice(POOL[k]) for v, k in kind.items()}
        used = [b for v, b in binding.items() if kind[v] == "p"]
        base = [rng.choice((1, 2, 4)) for _ in range(3)]
        for v in r.classes:
            dims = tuple(rng.choice((b, b, b, 1, 2)) for b in base)[rng.choice((0, 0, 1)) :]
            axes = dict(a for a in used if rng.random() < 0.4)  # a name stands for one parallel dimension
            binding[v] = Fact(dims, frozenset(axes.items()))
        try:
            left = shape_of(r.left, binding)
        except ValueError:
            continue
        says = True if r.when is None else r.when(binding, lambda name, b=binding: b[name])
        if (says is not False) != allowed:
            continue
        yield binding | (says if isinstance(says, dict) else {}), left
        wanted -= 1
        if wanted == 0:
            return


def holds(r: Rule, binding: dict, left: Fact, rng: np.random.Generator) -> bool:
    if shape_of(r.right, binding) != left:
        return False
    values = {
        v: rng.uniform(0.5, 2, (*(s for _, s in sorted(binding[v].axes)), *binding[v].shape)) * rng.choice((-1, 1))
        for v in r.classes
    }
    a, b = value_of(r.left, binding, values)[0], value_of(r.right, binding, values)[0]
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize("r", AXIOMS, ids=lambda r: r.name)
def test_axiom_is_an_equation(r):
    checked, numbers = 0, np.random.default_rng(5)
    for binding, left in instances(r, True, 12, 30_000, random.Random(7)):
        try:
            assert holds(r, binding, left, numbers), binding
            checked += 1
        except ValueError:
            continue  # the right side makes no sense for these shapes: the e-graph refuses it too
    assert checked >= 3


@pytest.mark.parametrize("r", [r for r in AXIOMS if r.when is not None], ids=lambda r: r.name)
def test_without_its_condition_an_axiom_fails(r):
    numbers = np.random.default_rng(5)
    extra = {"?nm": 1, "?cd": Fraction(1), "?r": ("sum", 2), "?n": Fraction(1)}
    refused = 0
    for binding, left in instances(r, False, 60, 15_000, random.Random(11)):
        refused += 1
        try:
            if not holds(r, extra | binding, left, numbers):
                return
        except ValueError:
            return
    # conditions that only compute, or that shapes enforce already, refuse nothing that makes sense
    assert refused == 0


@pytest.mark.parametrize("reference, fused", twins())
def test_kernels_are_proved_and_their_mutants_are_not(reference, fused, rng):
    proof = prove(reference, fused)
    assert proof and proof.axioms
    inputs = random_inputs(reference, rng)
    want, seen = run(reference, inputs)[0], 0
    for name, mutant in mutants(fused):
        if mutant.output_shapes != reference.output_shapes or np.allclose(run(mutant, inputs)[0], want, rtol=1e-9):
            continue
        seen += 1
        assert not prove(reference, mutant, Bounds(nodes=4000, seconds=2.0)), name
    assert seen >= 4


def test_two_kernels_that_split_the_keys_are_proved():
    program = published.attention(2, 8, 64, 16)
    build = Builder()
    q, k, v = (build.input(s) for s in program.input_shapes)
    first = BlockBuilder(program.input_shapes, (2, 4, 1), 2)
    tq, tk, tv = first.input(0, (0, -1, -1)), first.input(1, (0, 2, -1), 2), first.input(2, (0, 1, -1), 1)
    raised = first.exp(first.matmul(tq, tk))
    first.output(first.accum(first.matmul(raised, tv)), (0, 2, -1))
    first.output(first.accum_sum(raised), (0, 2, -1))
    weighted, total = build.kernel([q, k, v], first.build())
    second = BlockBuilder([(2, 8, 64), (2, 8, 4)], (2, 1, 1), 1)
    a, b = second.input(0, (0, -1, -1)), second.input(1, (0, -1, -1))
    second.output(second.div(second.accum_width(a, width=16), second.accum_sum(b)), (0, -1, -1))
    assert prove(program, build.build(*build.kernel([weighted, total], second.build())))


def test_what_has_no_terms_and_what_differs_is_said():
    b = Builder()
    x = b.input((4, 4))
    soft = b.build(b.softmax(x, dim=-1))
    assert "softmax" in prove(soft, soft).reason
    assert "other shapes" in prove(norm_kernel(), attention_kernel()).reason
    assert prove(published.gated_mlp(4, 8, 8), published.gated_mlp(4, 8, 8))
    twice = Builder()
    t = twice.input((4,))
    assert "do not join" in prove(twice.build(twice.add("add", [t, t])), twice.build(twice.scale(t, value=2.0))).reason


def test_published_graphs_are_proved_by_axioms(compilers_data):
    for name, make in published.PROGRAMS.items():
        for graph in itertools.islice(published.load(compilers_data / "mugraphs" / f"{name}.json"), 0, None, 8):
            assert prove(make(), graph), name
