"""Layouts: the integer program against brute force, every allowed choice computes the same, and what is chosen where it matters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch

from tests.graph.test_lower import batched
from tests.graph.test_verify import attention_kernel, norm_kernel
from wager.graph.execute import Executable, known_values
from wager.graph.interpret import random_inputs, run
from wager.graph.lower import layout
from wager.graph.lower.library import generate, prepare
from wager.graph.program import BlockBuilder, Builder, Program
from wager.graph.verify.floating import compare


def everything(problem: layout.Problem) -> Iterator[dict[layout.Site, int]]:
    """Every combination of choices (for small problems)."""
    sites = list(problem.choices)
    for combination in product(*(range(len(problem.choices[s])) for s in sites)):
        yield dict(zip(sites, combination, strict=True))


def product_kernel(order: tuple[int, int] | None, op: str = "exp") -> Program:
    """op(x w) in four steps; with `order`, w is given transposed and permuted in front of the kernel."""
    build = Builder()
    x = build.input((24, 64), "x")
    w = build.input((64, 48), "w") if order is None else build.permute(build.input((48, 64), "w"), order=order)
    block = BlockBuilder([(24, 64), (64, 48)], (2, 1, 1), 4)
    product = block.accum(block.matmul(block.input(0, (0, -1, -1), 1), block.input(1, (-1, -1, -1), 0)))
    block.output(block.add(op, [product]), (0, -1, -1))
    return build.build(*build.kernel([x, w], block.build()))


def two_kernels() -> Program:
    """(x y) z: the first kernel's result is read by the second alone."""
    build = Builder()
    x, y, z = (
        build.input((16, 8), "x"),
        build.input((8, 32), "y"),
        build.permute(build.input((24, 32), "z"), order=(1, 0)),
    )
    first = BlockBuilder([(16, 8), (8, 32)], (2, 1, 1))
    first.output(first.accum(first.matmul(first.input(0, (0, -1, -1)), first.input(1, (-1, -1, -1)))), (0, -1, -1))
    (between,) = build.kernel([x, y], first.build())
    second = BlockBuilder([(16, 32), (32, 24)], (2, 1, 1), 2)
    total = second.accum(second.matmul(second.input(0, (-1, -1, -1), 1), second.input(1, (1, -1, -1), 0)))
    second.output(second.mul(total, total), (1, -1, -1))
    return build.build(*build.kernel([between, z], second.build()))


def reductions() -> Program:
    """Sums along and across, a norm and a width, of permuted and plain inputs."""
    build = Builder()
    x, y = build.permute(build.input((16, 12), "x"), order=(1, 0)), build.input((12, 16), "y")
    block = BlockBuilder([(12, 16), (12, 16)], (2, 1, 1), 2)
    a, b = block.input(0, (0, -1, -1), 1), block.input(1, (0, -1, -1), 1)
    mixed = block.add("mul", [a, b])
    rows = block.add("accum_width", [mixed], width=2)
    norm, total = block.add("accum_rms", [a]), block.add("accum", [block.add("sum", [mixed], dim=0)])
    block.output(block.add("div", [rows, norm]), (0, -1, -1))
    block.output(block.add("tanh", [total]), (1, -1, -1))
    return build.build(*build.kernel([x, y], block.build()))


PROGRAMS = {
    "norm": norm_kernel,
    "attention": attention_kernel,
    "a batch in a block": lambda: batched(3, 0),
    "product": lambda: product_kernel(None),
    "permuted product": lambda: product_kernel((1, 0)),
    "two kernels": two_kernels,
    "reductions": reductions,
}


def constants_of(program: Program, held: int) -> tuple[dict[str, torch.Tensor], list[np.ndarray]]:
    inputs = [x.astype(np.float32) for x in random_inputs(program, np.random.default_rng(3), 0.4)]
    names = program.input_names
    return {n: torch.from_numpy(x) for n, x in list(zip(names, inputs, strict=True))[len(names) - held :]}, inputs


@pytest.mark.parametrize("name", ["norm", "product", "permuted product"])
@pytest.mark.parametrize("held", [0, 1])
def test_the_integer_program_is_as_good_as_brute_force(name, held):
    program = PROGRAMS[name]().pruned()
    constants, _ = constants_of(program, held)
    for arena in (layout.ARENA_BYTES, 7000, 0):  # with room for every copy, for some, for none
        problem = layout.state(program, known_values(program, constants), arena)
        assert math.prod(len(c) for c in problem.choices.values()) < 200_000
        best = min(problem.cost(c) for c in everything(problem))
        assert problem.cost(layout.minimise(problem)) == pytest.approx(best) and best < math.inf


def test_the_room_in_the_arena_forbids_copies():
    program = product_kernel((1, 0)).pruned()
    costs = [
        problem.cost(layout.minimise(problem))
        for arena in (0, 7000, 1 << 20)
        for problem in [layout.state(program, (), arena)]
    ]
    assert costs[0] >= costs[1] >= costs[2] and costs[0] > costs[2]


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("held", [0, 1])
def test_every_allowed_layout_computes_the_same(name, held, rng):
    program = PROGRAMS[name]().pruned()
    constants, inputs = constants_of(program, held)
    known = known_values(program, constants)
    problem = layout.state(program, known)
    sites = list(problem.choices)
    found = [layout.minimise(problem)]
    for _ in range(4000):
        chosen = {s: int(rng.integers(len(problem.choices[s]))) for s in sites}
        if problem.cost(chosen) < math.inf and chosen not in found:
            found.append(chosen)
        if len(found) == 14:
            break
    assert len(found) > 3
    plans = [layout.read(program, problem, c) for c in found]
    texts = []
    for plan in plans:
        for position, choice in plan.items():
            node = program.nodes[position]
            held_arguments = [a for a, j in enumerate(node.inputs) if j in known]
            shapes = [program.nodes[j].shape for j in node.inputs]
            texts.append(generate(node, shapes, held_arguments, choice).text)
    prepare(texts)
    free = [torch.from_numpy(x) for n, x in zip(program.input_names, inputs, strict=True) if n not in constants]
    for plan in plans:
        got = [o.numpy() for o in Executable(program, constants, plan)(*free)]
        assert compare(program, inputs, got), plan
    assert len(set(texts)) > 3


def test_row_major_is_kept_without_asking_the_solver_where_it_is_best(monkeypatch):
    monkeypatch.setattr(layout, "minimise", lambda _: pytest.fail("the solver was asked"))
    (plan,) = layout.choose(product_kernel(None).pruned()).values()
    assert not plan.copied and not plan.converted and plan.arguments == ((0, 1), (0, 1))


def test_a_transposed_weight_is_not_rearranged_at_every_call():
    """The kernel reads it as it lies: it sums along the contraction, or computes the transpose."""
    (plan,) = layout.choose(product_kernel((1, 0)).pruned()).values()
    assert plan.arguments[1] == (1, 0) and not plan.converted


def test_a_result_between_two_kernels_lies_as_its_reader_likes_it(rng):
    program = two_kernels().pruned()
    first, second = layout.choose(program).values()
    assert first.results[0] == second.arguments[0]
    problem = layout.state(program, ())
    between = next(s for s in problem.choices if s[0] == "tensor" and program.nodes[s[1]].op == "result")
    assert len(problem.choices[between]) == 2
    inputs = [x.astype(np.float32) for x in random_inputs(program, rng)]
    assert compare(program, inputs, [Executable(program)(*map(torch.from_numpy, inputs))[0].numpy()])


def test_views_in_the_wrong_order_are_rearranged(rng):
    """Layouts say how arguments are expected; a caller's tensor that lies otherwise still gives the right result."""
    program = product_kernel((1, 0)).pruned()
    x, w = (torch.from_numpy(a.astype(np.float32)) for a in random_inputs(program, rng, 0.3))
    want = run(program, [x.numpy(), w.numpy()])[0]
    for given in (x, x.T.contiguous().T):
        for weight in (w, w.T.contiguous().T):
            np.testing.assert_allclose(Executable(program)(given, weight)[0].numpy(), want, rtol=1e-4)
