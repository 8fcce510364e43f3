"""What a part of the output needs of every input, and so which cuts a grid may make.

When a block writes one part of output dimension o, it must read whatever that part depends on. Walking the program backwards gives, for every
input, the one dimension that is needed in the same part, or none: then all of it is needed. A grid dimension may cut an input along that
dimension and along no other. This is a necessary condition on the maps of any single kernel for the program, whatever it computes inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations, product

from wager.graph.operators import BINARY, UNARY
from wager.graph.program import Node, Program

WHOLE = -1
Column = tuple[int, ...]
"""For one grid dimension: the dimension that it cuts of every input, or -1."""


def needed(program: Program, dim: int) -> Column:
    """Per input, the dimension of which only the same part is needed for a part of output dimension `dim`; -1: all of it."""
    part: dict[int, int] = {program.outputs[0]: dim}
    for i in range(len(program.nodes) - 1, -1, -1):
        node = program.nodes[i]
        if i not in part or node.op == "input":
            continue
        for at, source in enumerate(node.inputs):
            wanted = _back(node, at, part[i], program) if part[i] >= 0 else WHOLE
            part[source] = wanted if part.get(source, wanted) == wanted else WHOLE
    return tuple(part.get(i, WHOLE) for i in program.input_positions)


def _back(node: Node, at: int, dim: int, program: Program) -> int:
    """The dimension of operand `at` that is cut when dimension `dim` of the result is."""
    shape, rank = program.nodes[node.inputs[at]].shape, len(node.shape)
    if node.op in UNARY:
        return dim
    own = dim - (rank - len(shape))
    if node.op in BINARY:
        return own if own >= 0 and shape[own] == node.shape[dim] else WHOLE
    if node.op == "matmul":
        if dim >= rank - 2:
            return own if (dim == rank - 1) == (at == 1) else WHOLE
        return own if own >= 0 and shape[own] == node.shape[dim] else WHOLE
    if node.op in ("sum", "rms_norm"):
        return WHOLE if dim == node.get("dim", -1) % rank else dim
    return node["order"][dim] if node.op == "permute" else WHOLE


def columns(program: Program) -> list[list[Column]]:
    """For every output dimension, the ways in which a grid dimension that writes its parts may cut the inputs."""
    found = []
    for dim in range(len(program.output_shapes[0])):
        options = [(WHOLE, d) if d >= 0 else (WHOLE,) for d in needed(program, dim)]
        found.append([c for c in product(*options) if any(d >= 0 for d in c)])
    return found


def grid_maps(program: Program, grids: int) -> Iterator[tuple[Column, ...]]:
    """Every choice of columns for up to `grids` grid dimensions, each for an output dimension of its own; what is not used stands last."""
    some, seen = columns(program), set()
    nothing = tuple(WHOLE for _ in program.input_positions)
    for used in range(grids + 1):
        for dims in permutations(range(len(some)), used):
            for chosen in product(*(some[d] for d in dims)):
                maps = tuple(sorted((*chosen, *(nothing for _ in range(grids - used))), reverse=True))
                if maps not in seen:
                    seen.add(maps)
                    yield maps
