"""A family: one structure with one mapping, every tile size left open; and its members."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from wager.compile.mirage.generate import Structure
from wager.compile.prism.mapping import Mapping
from wager.graph.lower.tiles import arena_bytes
from wager.graph.operators import Shape, ShapeError
from wager.graph.program import BlockBuilder, BlockGraph, Builder, Program, check
from wager.graph.verify.family import prove

GRID_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LOOP_SIZES = (1, 2, 4, 8, 16, 32, 64)
ARENA_LIMIT = 1 << 20
Sizes = tuple[int, int, int, int]
"""Grid x, y, z and the loop range of one kernel."""


@dataclass(frozen=True)
class Kernel:
    structure: Structure
    mapping: Mapping


@dataclass(frozen=True)
class Family:
    """Kernels in order: the first reads the program's inputs, each later one the results of the one before."""

    kernels: tuple[Kernel, ...]

    def instantiate(self, input_shapes: Sequence[Shape], sizes: Sequence[Sizes], names: Sequence[str] = ()) -> Program:
        """The member with these sizes. Raises ShapeError where a size does not divide."""
        build = Builder()
        values = [build.input(shape, names[i] if names else None) for i, shape in enumerate(input_shapes)]
        for kernel, size in zip(self.kernels, sizes, strict=True):
            shapes = [build.nodes[v].shape for v in values]
            values = build.kernel(values, block_of(kernel, shapes, size))
        program = build.build(*values)
        check(program)
        return program

    def explain(self) -> str:
        """Structure, mapping and open sizes in words."""
        lines = []
        for n, kernel in enumerate(self.kernels):
            m = kernel.mapping
            lines.append(f"kernel {n}: sizes open: {', '.join(self.open(n)) or 'none'}")
            for i, node in enumerate(kernel.structure.nodes):
                extra = f" cut by grid {m.imaps[i]}, loop {m.fmaps[i]}" if node.op == "input" else ""
                lines.append(f"  t{i} = {node.op}({', '.join(f't{j}' for j in node.inputs)}){extra}")
            lines += [f"  save t{s} along {o}" for s, o in zip(kernel.structure.saved, m.omaps, strict=True)]
        return "\n".join(lines)

    def open(self, kernel: int) -> list[str]:
        """Names of the parallel dimensions that cut something."""
        m = self.kernels[kernel].mapping
        names = [name for p, name in enumerate("xyz") if any(imap[p] >= 0 for imap in m.imaps)]
        return [*names, *(["loop"] if any(f >= 0 for f in m.fmaps) else [])]


def block_of(kernel: Kernel, shapes: Sequence[Shape], sizes: Sequence[int]) -> BlockGraph:
    build = BlockBuilder(shapes, sizes[:3], sizes[3])
    for node, imap, fmap in zip(kernel.structure.nodes, kernel.mapping.imaps, kernel.mapping.fmaps, strict=False):
        build.input(node["arg"], imap, fmap if sizes[3] > 1 else -1)
    for node in kernel.structure.nodes[kernel.structure.arguments :]:
        build.add(node.op, node.inputs, **dict(node.attrs))
    for saved, omap in zip(kernel.structure.saved, kernel.mapping.omaps, strict=True):
        build.output(saved, tuple(d if g > 1 else -1 for g, d in zip(sizes[:3], omap, strict=True)))
    return build.build()


Fits = Callable[[BlockGraph, Sequence[Shape]], bool]
"""Whether a block over arguments of these shapes suits the machine."""


def in_arena(block: BlockGraph, shapes: Sequence[Shape]) -> bool:
    """What suits a CPU: tiles that lie in the second-level cache together."""
    return arena_bytes(block, shapes) <= ARENA_LIMIT


def member_sizes(
    family: Family,
    input_shapes: Sequence[Shape],
    least_blocks: int = 1,
    *,
    grids: Sequence[int] = GRID_SIZES,
    loops: Sequence[int] = LOOP_SIZES,
    fits: Fits = in_arena,
) -> list[tuple[Sizes, ...]]:
    """Every choice of sizes in `grids` and `loops` that divides evenly, keeps `least_blocks` blocks per kernel and fits the machine."""
    partial: list[tuple[tuple[Sizes, ...], list[Shape]]] = [((), list(input_shapes))]
    for n, kernel in enumerate(family.kernels):
        names = family.open(n)
        grown = []
        for sizes, shapes in partial:
            for size in product(*(grids if a in names else (1,) for a in "xyz"), loops if "loop" in names else (1,)):
                if math.prod(size[:3]) < least_blocks or math.prod(size[:3]) > 4096:
                    continue
                try:
                    block = block_of(kernel, shapes, size)
                except ShapeError:
                    continue
                if fits(block, shapes):
                    grown.append(
                        ((*sizes, (size[0], size[1], size[2], size[3])), [block.output_shape(o) for o in block.outputs])
                    )
        partial = grown
    return [sizes for sizes, _ in partial]


def representative(family: Family, input_shapes: Sequence[Shape]) -> tuple[Sizes, ...] | None:
    """Sizes for the proof: every open dimension really cuts, and something is left of it where possible."""
    sizes: list[Sizes] = []
    shapes = list(input_shapes)
    for n, kernel in enumerate(family.kernels):
        names = family.open(n)
        chosen = None
        for g, loop in ((2, 2), (4, 2), (2, 4), (3, 2), (2, 3), (8, 4), (1, 2), (2, 1)):
            size = (*(g if a in names else 1 for a in "xyz"), loop if "loop" in names else 1)
            try:
                block = block_of(kernel, shapes, size)
            except ShapeError:
                continue
            chosen = (size[0], size[1], size[2], size[3])
            shapes = [block.output_shape(o) for o in block.outputs]
            break
        if chosen is None:
            return None
        sizes.append(chosen)
    return tuple(sizes)


def verify_family(reference: Program, family: Family) -> str:
    """Empty when every member computes the reference; otherwise why that was not proved."""
    sizes = representative(family, reference.input_shapes)
    if sizes is None:
        return "no sizes divide evenly"
    try:
        program = family.instantiate(reference.input_shapes, sizes)
    except ShapeError as error:
        return str(error)
    if program.output_shapes != reference.output_shapes:
        return "the output shapes differ"
    return prove(reference, program)
