"""How a custom kernel is cut: its grid, its loop range, and which dimension of every argument each of them divides."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import combinations, product

from wager.compile.mirage.regions import Column, grid_maps
from wager.compile.prism.mapping import choices
from wager.graph.operators import Shape, ShapeError
from wager.graph.program import Program, cut

Plan = tuple[tuple[int, int, int], int, tuple[tuple[int, ...], ...], tuple[int, ...]]
"""Grid, loop range, input maps, loop maps."""
MOST_BLOCKS = 4096
Labels = tuple[Hashable, ...]
"""For every dimension of a tensor the index of the program that runs along it; None for one of size 1 and for one made of parts."""


def plans(
    program: Program, grid_sizes: Sequence[int], loop_sizes: Sequence[int], least_blocks: int, regions: bool = True
) -> Iterator[Plan]:
    """Every (grid, loop range, input maps, loop maps) whose cuts are exact; a parallel dimension that cuts nothing has size 1.

    `regions`: only grid maps that give every block what its part of the output depends on. Grid dimensions are interchangeable: one order.
    """
    count, shapes = (3 if len(program.output_shapes[0]) > 2 else 2), program.input_shapes
    loops = list(product(*(range(-1, len(s)) for s in shapes)))
    for columns in grid_maps(program, count) if regions else _any_maps(shapes, count):
        yield from sized(shapes, columns, loops, grid_sizes, loop_sizes, least_blocks)


def labelled_plans(
    shapes: Sequence[Shape],
    labels: Sequence[Labels],
    count: int,
    grid_sizes: Sequence[int],
    loop_sizes: Sequence[int],
    least_blocks: int,
    written: Iterable[Hashable] | None = None,
) -> Iterator[Plan]:
    """Plans of a kernel over any tensors: a parallel dimension cuts along one index of the program, every tensor that has it.

    What would read one tensor in parts and another whole along the same index is not among them. `count`: grid dimensions. `written`: the indices that the grid may cut; without it, all.
    """
    names = sorted({label for row in labels for label in row if label is not None}, key=str)
    allowed = set(names if written is None else written)
    by_label = {name: _along(labels, name) for name in names}
    nothing = tuple(-1 for _ in shapes)
    loops = [nothing, *(column for name in names for column in by_label[name])]
    for used in range(count + 1):
        for chosen in combinations([n for n in names if n in allowed], used):
            for some in product(*(by_label[n] for n in chosen)):
                columns = (*some, *(nothing for _ in range(count - used)))
                yield from sized(shapes, columns, loops, grid_sizes, loop_sizes, least_blocks)


def _along(labels: Sequence[Labels], name: Hashable) -> list[Column]:
    """Every way to cut along the index `name` (several where a tensor has it twice)."""
    options = [[d for d, label in enumerate(row) if label == name] or [-1] for row in labels]
    return list(product(*options))


def sized(
    shapes: Sequence[Shape],
    columns: Sequence[Column],
    loops: Sequence[Column],
    grid_sizes: Sequence[int],
    loop_sizes: Sequence[int],
    least_blocks: int,
) -> Iterator[Plan]:
    """The plans with these grid maps (a column for each grid dimension, at most 3) and any of these loop maps."""
    used = [any(d >= 0 for d in column) for column in columns]
    rest = [1] * (3 - len(columns))
    imaps = tuple((*(c[i] for c in columns), *(-1 for _ in rest)) for i in range(len(shapes)))
    for sizes in product(*([g for g in grid_sizes if g > 1] if u else (1,) for u in used)):
        grid = (*sizes, *rest)
        if not least_blocks <= math.prod(grid) <= MOST_BLOCKS:
            continue
        try:
            tiles = [cut(s, m, grid) for s, m in zip(shapes, imaps, strict=True)]
        except ShapeError:
            continue
        for fmaps in loops:
            for loop in [n for n in loop_sizes if n > 1] if any(f >= 0 for f in fmaps) else (1,):
                if all(f < 0 or not t[f] % loop for t, f in zip(tiles, fmaps, strict=True)):
                    yield grid, loop, imaps, fmaps  # type: ignore[misc]


def _any_maps(shapes: Sequence[Shape], count: int) -> Iterator[tuple[Column, ...]]:
    """Every well-formed choice of columns, in falling order."""
    for chosen in product(*(list(choices(len(s), count, False)) for s in shapes)):
        columns = tuple(tuple(c[p] for c in chosen) for p in range(count))
        if all(a >= b for a, b in zip(columns, columns[1:], strict=False)):
            yield columns
