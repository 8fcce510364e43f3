"""The symbolic search: structures first, mappings second, one proof per family, sizes last.

What is enumerated is the sum, not the product, of structures, mappings and sizes. Structures are found with all parallel sizes 1 (this
under-prunes and never over-prunes), mappings by the ties between dimensions, each family is proved once for all sizes, and only members of
proved families are compiled and timed. Source: "Prism: Symbolic Superoptimization of Tensor Programs", arXiv 2604.15272.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from wager.compile.mirage.abstract import Algebra, Subexpressions, factors, of_program
from wager.compile.mirage.generate import BlockSearch, Limits, Progress, Structure, menu
from wager.compile.prism.family import Family, Kernel, member_sizes, verify_family
from wager.compile.prism.mapping import mappings
from wager.graph.operators import Shape
from wager.graph.program import Program


@dataclass
class Found:
    """Proved families, the counters, and where the time went (seconds)."""

    families: list[Family]
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)


def search(
    program: Program,
    limits: Limits,
    progress: Progress | None = None,
    *,
    symmetric: bool = True,
    max_families: int = 400,
) -> Found:
    """Every proved family within the limits. The program has one output and only operators that the menu knows."""
    progress = progress or Progress()
    seconds = {"structures": 0.0, "mappings": 0.0, "proofs": 0.0}
    families: list[Family] = []
    start = time.perf_counter()
    for chain in chains(program, limits, progress):
        seconds["structures"] += time.perf_counter() - start
        begin, proofs = time.perf_counter(), 0.0
        for family in _families(chain, program, symmetric):
            progress.mappings += 1
            tick = time.perf_counter()
            if not verify_family(program, family):
                progress.verified += 1
                families.append(family)
            proofs += time.perf_counter() - tick
            if time.perf_counter() - progress.started > limits.budget_s:
                progress.limit = f"time budget of {limits.budget_s} s"
                break
        seconds["proofs"] += proofs
        seconds["mappings"] += time.perf_counter() - begin - proofs
        start = time.perf_counter()
        if progress.limit or len(families) >= max_families:
            break
    seconds["structures"] += time.perf_counter() - start
    return Found(families, progress, seconds)


def chains(program: Program, limits: Limits, progress: Progress) -> Iterator[tuple[Structure, ...]]:
    """Structures of one kernel, and with `max_kernels` 2 also of two in a row (the second reads what the first saved)."""
    algebra = Algebra()
    values = of_program(algebra, program)
    target, shape = values[program.outputs[0]], program.output_shapes[0]
    inputs = [values[i] for i in program.input_positions]
    targets = Subexpressions(algebra, [target], factors(program))

    def finished(expressions: list[int], shapes: list[Shape]) -> bool:
        return expressions == [target] and shapes == [shape]

    first = BlockSearch(algebra, targets, menu(program), limits, progress)
    for structure in first.run(inputs, program.input_shapes, 1, finished):
        yield (structure,)
    if limits.max_kernels < 2:
        return
    operators = menu(program, width=shape[-1])
    opening = BlockSearch(algebra, targets, menu(program), limits, progress)
    for structure in opening.run(inputs, program.input_shapes, limits.max_outputs, lambda e, s: e != [target]):
        second = BlockSearch(algebra, targets, operators, limits, progress)
        expressions = _saved_expressions(algebra, structure, inputs)
        shapes = [structure.nodes[s].shape for s in structure.saved]
        if len(structure.saved) < 2:
            continue  # a single value passed on is what one kernel does better
        for after in second.run(expressions, shapes, 1, finished):
            yield (structure, after)


def _saved_expressions(algebra: Algebra, structure: Structure, inputs: Sequence[int]) -> list[int]:
    from wager.compile.mirage.abstract import entries

    values: list[int] = []
    for i, node in enumerate(structure.nodes):
        if node.op == "input":
            values.append(inputs[i])
            continue
        attrs = dict(node.attrs) if node.op in ("scale", "shift", "clamp", "leaky_relu") else {}
        shapes = [structure.nodes[j].shape for j in node.inputs]
        values.append(algebra.apply(node.op, [values[j] for j in node.inputs], entries(node, shapes), attrs))
    return [values[s] for s in structure.saved]


def _families(chain: tuple[Structure, ...], program: Program, symmetric: bool) -> Iterator[Family]:
    grids = 3 if len(program.output_shapes[0]) > 2 else 2
    if len(chain) == 1:
        for mapping in mappings(chain[0], grids, True, symmetric):
            yield Family((Kernel(chain[0], mapping),))
        return
    for first in mappings(chain[0], grids, False, symmetric):
        for second in mappings(chain[1], grids, True, symmetric):
            yield Family((Kernel(chain[0], first), Kernel(chain[1], second)))


def members(families: Sequence[Family], program: Program, threads: int, most: int = 4000) -> list[Program]:
    """Concrete programs of the families, all candidate sizes; families take turns when there are more than `most`."""
    pools = [
        (family, sizes)
        for family in families
        for sizes in [member_sizes(family, program.input_shapes, threads)]
        if sizes
    ]
    out: list[Program] = []
    for rank in range(max((len(s) for _, s in pools), default=0)):
        for family, sizes in pools:
            if rank < len(sizes):
                out.append(family.instantiate(program.input_shapes, sizes[rank], program.input_names))
        if len(out) >= most:
            break
    return out
