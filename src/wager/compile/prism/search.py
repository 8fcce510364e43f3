"""The symbolic search: structures first, mappings second, one proof per family, sizes last.

What is enumerated is the sum, not the product, of structures, mappings and sizes. Structures are found with all parallel sizes 1 (this
under-prunes and never over-prunes), mappings by the ties between dimensions, each family is proved once for all sizes, and only members of
proved families are compiled and timed. Source: "Prism: Symbolic Superoptimization of Tensor Programs", arXiv 2604.15272.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wager.compile.mirage.abstract import Algebra, of_operator, of_program
from wager.compile.mirage.enumerate import Enumerator
from wager.compile.mirage.generate import Limits, Progress, Structure, menu
from wager.compile.mirage.lookup import pruner
from wager.compile.prism.family import Family, Kernel, block_of, member_sizes, verify_family
from wager.compile.prism.mapping import Mapping, mappings
from wager.compile.units import Journal, fingerprint, run
from wager.graph.operators import Shape, ShapeError
from wager.graph.program import Program, from_json, to_json


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
    workers: int = 1,
    state: str | Path | None = None,
) -> Found:
    """Every proved family within the limits. The program has one output and only operators that the menu knows.

    `state`: a file that keeps the proofs that are done; a search that was stopped goes on from it. The result does not depend on `workers`.
    """
    progress = progress or Progress()
    families: list[Family] = []
    seconds = {"structures": 0.0, "mappings": 0.0, "proofs": 0.0}
    start = time.perf_counter()
    key = fingerprint("prism", to_json(program), vars(limits) | {"budget_s": 0}, symmetric)
    work = Prover(to_json(program), symmetric, time.time() + limits.budget_s)
    for _, chain, result in run(
        chains(program, limits, progress), work, Journal(state, key), lambda: progress.look(limits), workers
    ):
        progress.mappings += result["mappings"]
        progress.verified += len(result["proved"])
        seconds["mappings"] += result["mapping_s"]
        seconds["proofs"] += result["proof_s"]
        proved = set(result["proved"])
        families += [f for i, f in enumerate(_families(chain, program, symmetric)) if i in proved] if proved else []
        if len(families) >= max_families:
            progress.limit = f"{max_families} families"
            break
    if not progress.limit and time.perf_counter() - progress.started > limits.budget_s:
        progress.limit = f"time budget of {limits.budget_s} s"
    whole = (time.perf_counter() - start) * workers
    seconds["structures"] = max(0.0, whole - seconds["mappings"] - seconds["proofs"])
    return Found(families, progress, seconds)


class Prover:
    """Proves every mapping of a chain of structures; travels to worker processes."""

    def __init__(self, program: str, symmetric: bool, deadline: float):
        self.settings = (program, symmetric, deadline)
        self.program: Program | None = None

    def __reduce__(self) -> Any:
        return Prover, self.settings

    def __call__(self, chain: tuple[Structure, ...]) -> dict[str, Any] | None:
        """Numbers of the proved mappings; None when the deadline came first."""
        text, symmetric, deadline = self.settings
        if self.program is None:
            self.program = from_json(text)
        start, proof_s = time.perf_counter(), 0.0
        proved, count = [], 0
        for count, family in enumerate(_families(chain, self.program, symmetric), 1):
            tick = time.perf_counter()
            if not verify_family(self.program, family):
                proved.append(count - 1)
            proof_s += time.perf_counter() - tick
            if time.time() > deadline:
                return None
        mapping_s = time.perf_counter() - start - proof_s
        return {"proved": proved, "mappings": count, "proof_s": proof_s, "mapping_s": mapping_s}


def chains(program: Program, limits: Limits, progress: Progress) -> Iterator[tuple[Structure, ...]]:
    """Structures of one kernel, and with `max_kernels` 2 also of two in a row (the second reads what the first saved)."""
    algebra = Algebra()
    values = of_program(algebra, program)
    target, shape = values[program.outputs[0]], program.output_shapes[0]
    inputs = [values[i] for i in program.input_positions]
    targets = pruner(algebra, program, [target], limits)

    def finished(expressions: list[int], shapes: list[Shape]) -> bool:
        return expressions == [target] and shapes == [shape]

    first = Enumerator(algebra, targets, menu(program), limits)
    for structure in first.run(inputs, program.input_shapes, 1, finished, progress):
        yield (structure,)
    if limits.max_kernels < 2:
        return
    second = Enumerator(algebra, targets, menu(program, width=shape[-1]), limits)
    openings = first.run(inputs, program.input_shapes, limits.max_outputs, lambda e, s: e != [target], progress)
    for structure in openings:
        expressions = saved_expressions(algebra, structure, inputs)
        shapes = [structure.nodes[s].shape for s in structure.saved]
        if len(structure.saved) < 2:
            continue  # a single value passed on is what one kernel does better
        for after in second.run(expressions, shapes, 1, finished, progress):
            yield (structure, after)


def saved_expressions(algebra: Algebra, structure: Structure, inputs: Sequence[int], loop: int = 1) -> list[int]:
    """What the saved tiles hold, as abstract expressions; `loop`: turns that an accumulator sums over."""
    values: list[int] = []
    for i, node in enumerate(structure.nodes):
        if node.op == "input":
            values.append(inputs[i])
            continue
        shapes = [structure.nodes[j].shape for j in node.inputs]
        values.append(of_operator(algebra, node, [values[j] for j in node.inputs], shapes, loop))
    return [values[s] for s in structure.saved]


def _families(chain: tuple[Structure, ...], program: Program, symmetric: bool) -> Iterator[Family]:
    grids = 3 if len(program.output_shapes[0]) > 2 else 2
    if len(chain) == 1:
        for mapping in mappings(chain[0], grids, True, symmetric):
            yield Family((Kernel(chain[0], mapping),))
        return
    if not merges(chain[1]):
        return
    seconds = [m for m in mappings(chain[1], grids, True, symmetric) if all(f < 0 for f in m.fmaps)]
    for first in mappings(chain[0], grids, False, symmetric):
        if splits(chain[0], first, program.input_shapes):
            for second in seconds:
                yield Family((Kernel(chain[0], first), Kernel(chain[1], second)))


def merges(structure: Structure) -> bool:
    """Whether a second kernel sums everything it reads at once: it then adds up what blocks of the first left side by side."""
    readers = [n.op for n in structure.nodes if any(i < structure.arguments for i in n.inputs)]
    return "accum_width" in readers and set(readers) <= {"accum_width", "accum_sum"}


def splits(structure: Structure, mapping: Mapping, shapes: Sequence[Shape]) -> bool:
    """Whether blocks save partial results side by side (a grid dimension cuts what the saved values sum over).

    Two kernels are searched in this form alone: without a split, one kernel does the same and saves the trip through memory. The second
    kernel, which merges the parts, has no loop.
    """
    names = Family((Kernel(structure, mapping),)).open(0)
    try:
        block = block_of(Kernel(structure, mapping), shapes, [2 if n in names else 1 for n in ("x", "y", "z", "loop")])
    except ShapeError:
        return False
    return any(
        block.output_shape(o) != structure.nodes[s].shape for o, s in zip(block.outputs, structure.saved, strict=True)
    )


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
