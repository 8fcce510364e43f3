"""Verifiers: published graphs are accepted, mutants rejected, the measured false-accept rate stays below its bound."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from tests.graph.mutants import mutants
from wager.graph import published
from wager.graph.domains import FiniteField, FunctionField, NotInDomain, field_primes, is_prime
from wager.graph.interpret import random_inputs, run
from wager.graph.operators import ACCUMULATORS, ShapeError
from wager.graph.program import BlockBuilder, Builder, Program, from_json, to_json
from wager.graph.verify.degree import applications
from wager.graph.verify.family import prove
from wager.graph.verify.finite_field import _one_trial, function_bound, trial_bound, verify
from wager.graph.verify.floating import compare, memory_needed
from wager.graph.verify.twin import shrink


def norm_kernel(tokens: int = 4, hidden: int = 16, out: int = 12, grid: int = 3, loop: int = 4) -> Program:
    """matmul(rms_norm(x), w) as one kernel that divides after the product."""
    b = Builder()
    x, w = b.input((tokens, hidden)), b.input((hidden, out))
    k = BlockBuilder([(tokens, hidden), (hidden, out)], (grid, 1, 1), loop)
    xt, wt = k.input(0, (-1, -1, -1), 1), k.input(1, (1, -1, -1), 0)
    root, product = k.accum_rms(xt), k.accum(k.matmul(xt, wt))
    k.output(k.div(product, root), (1, -1, -1))
    return b.build(*b.kernel([x, w], k.build()))


def attention_kernel(loop: int = 4) -> Program:
    shapes = [(2, 8, 4), (2, 4, 16), (2, 16, 4)]
    b = Builder()
    args = [b.input(s) for s in shapes]
    k = BlockBuilder(shapes, (2, 4, 1), loop)
    q, key, v = k.input(0, (0, 1, -1)), k.input(1, (0, -1, -1), 2), k.input(2, (0, -1, -1), 1)
    e = k.exp(k.matmul(q, key))
    k.output(k.div(k.accum(k.matmul(e, v)), k.accum_sum(e)), (0, 1, -1))
    return b.build(*b.kernel(args, k.build()))


def twins() -> list[tuple[Program, Program]]:
    """Generated stand-ins for the published graphs: (reference, fused)."""
    return [
        (published.rmsnorm_matmul(4, 16, 12), norm_kernel()),
        (published.attention(2, 8, 16, 4), attention_kernel()),
    ]


@pytest.mark.parametrize("reference, fused", twins())
def test_fused_kernels_verify_prove_and_agree_in_floats(reference, fused, rng):
    assert verify(reference, fused, rng, full_size=True)
    assert prove(reference, fused) == ""
    inputs = random_inputs(reference, rng)
    assert compare(reference, inputs, [o.astype(np.float32) for o in run(fused, inputs)])


@pytest.mark.parametrize("reference, fused", twins())
def test_every_single_edit_mutant_is_rejected(reference, fused, rng):
    inputs, seen = random_inputs(reference, rng), 0
    want = run(reference, inputs)[0]
    for name, mutant in mutants(fused):
        if mutant.output_shapes == reference.output_shapes and np.allclose(run(mutant, inputs)[0], want, rtol=1e-9):
            continue  # a true identity
        seen += 1
        assert not verify(reference, mutant, rng, max_trials=3), name
        assert prove(reference, mutant) != "", name
    assert seen >= 4


@pytest.mark.parametrize("reference, fused", twins())
def test_a_dropped_accumulator_is_malformed(reference, fused, rng):
    """The path rule refuses the graph before any verifier runs, and `verify` says so."""
    seen = 0
    for at, kernel in enumerate(fused.nodes):
        for i, node in enumerate(kernel.block.nodes if kernel.block else ()):
            if node.op in ACCUMULATORS:
                nodes = [
                    replace(n, inputs=tuple(node.inputs[0] if j == i else j for j in n.inputs))
                    for n in kernel.block.nodes
                ]
                block = replace(kernel.block, nodes=tuple(nodes))
                edited = replace(
                    fused, nodes=tuple(replace(n, block=block) if k == at else n for k, n in enumerate(fused.nodes))
                )
                verdict = verify(reference, edited, rng)
                assert not verdict and "malformed" in verdict.reason
                seen += 1
    assert seen >= 2


def test_all_published_graphs_verify_and_are_proved(compilers_data, rng):
    count = 0
    for name, make in published.PROGRAMS.items():
        reference = make()
        for graph in published.load(compilers_data / "mugraphs" / f"{name}.json"):
            assert verify(reference, graph, rng, max_trials=3), (name, count)
            assert prove(reference, graph) == "", (name, count)
            count += 1
    assert count == 105


def test_every_mutant_of_published_graphs_is_rejected(compilers_data, rng):
    rejected = 0
    for name, make in published.PROGRAMS.items():
        reference = make()
        for graph in published.load(compilers_data / "mugraphs" / f"{name}.json")[::6]:
            for edit, mutant in mutants(graph):
                if mutant.output_shapes != reference.output_shapes:
                    rejected += 1
                    continue
                try:
                    small, changed = shrink(reference, mutant)
                except ShapeError:
                    continue  # would be checked at full size: too slow for a test
                if not verify(reference, mutant, rng, max_trials=2):
                    rejected += 1
                    continue
                inputs = random_inputs(small, rng)
                same = np.allclose(run(small, inputs)[0], run(changed, inputs)[0], rtol=1e-8)
                assert same, f"{name}: {edit} was accepted but differs"
    assert rejected > 60


def test_false_accepts_stay_below_the_bound_and_fall_with_trials(rng):
    """Pairs that differ: x*y + x against x*y + y, in a tiny field, where accidents happen."""
    a, b = Builder(), Builder()
    x, y = a.input((1,)), a.input((1,))
    left = a.build(a.add("add", [a.mul(x, y), x]))
    x, y = b.input((1,)), b.input((1,))
    right = b.build(b.add("add", [b.mul(x, y), y]))
    primes, rounds = (23, 11), 1500
    accepted = sum(bool(verify(left, right, rng, max_trials=1, target=0.0, primes=primes)) for _ in range(rounds))
    bound = trial_bound(2, 0, primes[1])
    assert stats.binomtest(accepted, rounds, bound, alternative="greater").pvalue > 1e-3
    assert accepted > 0  # the field is small enough that accidents do happen
    twice = sum(bool(verify(left, right, rng, max_trials=2, target=0.0, primes=primes)) for _ in range(rounds))
    assert twice < accepted / 2


def test_exponentials_of_equal_sums_agree_and_different_ones_do_not(rng):
    def build(flip: bool) -> Program:
        b = Builder()
        x, y = b.input((3,)), b.input((3,))
        return b.build(b.mul(b.exp(x), b.exp(y)) if flip else b.exp(b.add("add", [x, y])))

    assert verify(build(True), build(False), rng)
    b = Builder()
    x, y = b.input((3,)), b.input((3,))
    assert not verify(build(False), b.build(b.exp(b.mul(x, y))), rng)


def test_a_second_exponential_on_a_path_is_an_unknown_function_or_undecided(rng):
    def twice(halve: bool) -> Program:
        b = Builder()
        x = b.input((2,))
        inner = b.exp(b.scale(x, value=0.5)) if halve else b.exp(x)
        return b.build(b.exp(b.mul(inner, inner) if halve else inner))

    verdict = verify(twice(False), twice(False), rng)
    assert verdict and verdict.error_bound < 1e-9
    with pytest.raises(NotInDomain, match="second exp"):  # equal, but only by exp(x/2)^2 = exp(x)
        verify(twice(False), twice(True), rng)


def test_the_bound_for_attention_means_something(rng):
    verdict = verify(published.attention(2, 8, 16, 4), attention_kernel(), rng, max_trials=10)
    assert verdict and verdict.error_bound < 1e-9 and verdict.trials <= 4
    assert trial_bound(verdict.degree, verdict.exponentials, 2**30 - 35) == 1.0  # what powers of a root would have said


def test_false_accepts_with_unknown_functions_stay_below_their_bound(rng):
    """exp(x) + exp(y) against 2 exp(x): equal where x = y, which is what colliding arguments look like."""
    a, b = Builder(), Builder()
    x, y = a.input((1,)), a.input((1,))
    left = a.build(a.add("add", [a.exp(x), a.exp(y)]))
    x, y = b.input((1,)), b.input((1,))
    right = b.build(b.scale(b.exp(x), value=2))
    primes, rounds = (23, 11), 2000
    count, degree = applications(left, right)
    assert (count, degree) == (3, 2)
    done = [_one_trial(left, right, [(0,)], rng, primes, FunctionField) for _ in range(rounds)]
    accepted = sum(bool(d) for d in done)
    assert accepted > 0
    assert stats.binomtest(accepted, rounds, function_bound(1, count, degree, 23), alternative="greater").pvalue > 1e-3


def test_the_counted_applications_cover_every_turn_of_every_block():
    count, degree = applications(attention_kernel(loop=4))
    # one exp per query and key of two heads; q*k has degree 2, the difference of two such 4
    assert count == 2 * 8 * 16 and degree == 4
    count, _ = applications(norm_kernel(tokens=4, grid=3))
    assert count == 3 * 4  # every block takes every row's root


def test_primes_and_exact_modular_products(rng):
    p, q = field_primes()
    assert is_prime(p) and is_prime(q) and (p - 1) % q == 0 and p > 10**6 and q > 10**5
    field = FiniteField(rng)
    a, b = field.random((3, 4096)), field.random((4096, 2))
    exact = (a.p.astype(object) @ b.p.astype(object)) % p
    assert np.array_equal(field.matmul(a, b).p, exact.astype(np.int64))


def test_float_check_passes_reordered_sums_and_rejects_an_epsilon_bug(rng):
    reference = published.rmsnorm_matmul(4, 1024, 8)
    inputs = [x.astype(np.float32) for x in random_inputs(reference, rng, 0.01)]
    x, w = inputs
    norm = np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True))
    chunks = sum((x[:, i : i + 64] @ w[i : i + 64]) for i in range(960, -1, -64))
    assert compare(reference, inputs, [(chunks / norm).astype(np.float32)])
    wrong = (x @ w) / np.sqrt(norm**2 + 1e-5)
    assert not compare(reference, inputs, [wrong.astype(np.float32)])


def test_the_memory_that_the_float_check_needs_is_foretold(rng):
    """A chain holds few values at a time, and what is expanded but never stored takes nothing."""
    build = Builder()
    x, y = build.input((400, 500)), build.input((1, 500))
    wide = build.add("expand", [y], shape=(400, 500))
    for _ in range(6):
        x = build.add("mul", [build.add("tanh", [x]), wide])
    program = build.build(build.add("sum", [x]))
    inputs = random_inputs(program, rng)
    outputs = [np.zeros(program.output_shapes[0])]
    compare(program, inputs, outputs)
    tracemalloc.start()
    compare(program, inputs, outputs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.5 * peak <= memory_needed(program) <= 2 * peak


def test_programs_survive_json():
    program = norm_kernel()
    assert from_json(to_json(program)) == program
