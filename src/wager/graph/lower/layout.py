"""Layouts of all tensors of a program's kernels, whole ones and tiles, chosen together by an integer program.

Mirage's layout step (arXiv 2405.05751, section 5) for a CPU. A tensor's layout is its innermost dimension; the others follow in row-major
order. An input tile is read in place, or copied into the arena in any layout; a whole tensor that is not an output may be rearranged before the
kernel; results that only kernels read lie as their readers like it; constants are laid out for nothing. Every operator has a cost for each
combination of its operands' layouts (how many vector operations its loops take), and combinations without meaning are forbidden: innermost
dimensions of a product are among its last two, a tile read in place lies as its tensor does, copies fit the arena. The sum of the costs over all
operators is minimised exactly; where row-major is already the best of every single operator, the solver is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from wager.errors import WagerError
from wager.graph.lower.code import inner_last, panel_width
from wager.graph.lower.peel import peel
from wager.graph.lower.tiles import Layout, Order, Tiles, product_form, row_major
from wager.graph.operators import BINARY, UNARY, Shape
from wager.graph.program import BlockGraph, Program
from wager.solve import LinearModel, solve

ARENA_BYTES = 1 << 20
STRIDED = 1.0  # an element that is not beside the one before, in vector operations
REARRANGED = 2.0  # an element of a whole tensor that is rearranged before the call
FORBIDDEN = math.inf

Site = tuple[Any, ...]
"""("tensor", node) for a whole tensor, ("tile", kernel, block node) for a tile."""


@dataclass(frozen=True)
class Choice:
    """One layout of a site: the order of a whole tensor, or the innermost dimension of a tile, which may be a copy."""

    inner: int
    order: Order = ()
    moved: bool = False


@dataclass
class Problem:
    """Sites with their choices, and cost tables over few sites each. `bytes_of` counts what a kernel's copies take of its arena."""

    choices: dict[Site, list[Choice]] = field(default_factory=dict)
    tables: list[tuple[tuple[Site, ...], dict[tuple[int, ...], float]]] = field(default_factory=list)
    bytes_of: dict[Site, int] = field(default_factory=dict)
    room: dict[int, int] = field(default_factory=dict)

    def table(self, sites: Sequence[Site], cost: Any) -> None:
        """Adds `cost(choice of each site)` to the objective."""
        distinct = tuple(dict.fromkeys(sites))
        rows = {}
        for combination in product(*(range(len(self.choices[s])) for s in distinct)):
            picked = {s: self.choices[s][c] for s, c in zip(distinct, combination, strict=True)}
            rows[combination] = cost(*(picked[s] for s in sites))
        self.tables.append((distinct, rows))

    def cost(self, chosen: dict[Site, int]) -> float:
        """The objective; infinite for what is forbidden."""
        total = sum(rows[tuple(chosen[s] for s in sites)] for sites, rows in self.tables)
        for kernel, room in self.room.items():
            copies = (s for s in self.bytes_of if s[1] == kernel and self.choices[s][chosen[s]].moved)
            if sum(self.bytes_of[s] for s in copies) > room:
                return FORBIDDEN
        return total


def choose(program: Program, constant: Collection[int] = (), arena: int = ARENA_BYTES) -> dict[int, Layout]:
    """A layout for every kernel node (by position). `constant`: nodes whose values are known when the program is compiled."""
    problem = state(program, constant, arena)
    first = {site: 0 for site in problem.choices}
    settled = all(rows[tuple(0 for _ in sites)] <= min(rows.values()) for sites, rows in problem.tables)
    return read(program, problem, first if settled else minimise(problem))


def minimise(problem: Problem) -> dict[Site, int]:
    """The cheapest choice for every site, by an integer program: one binary per choice, one variable per row of every table."""
    model = LinearModel()
    picks = {
        site: [model.binary(f"{site} {c.inner}{'*' * c.moved}") for c in options]
        for site, options in problem.choices.items()
    }
    for columns in picks.values():
        model.row([(c, 1.0) for c in columns], 1, 1)
    for sites, rows in problem.tables:
        allowed = {combination: value for combination, value in rows.items() if value < FORBIDDEN}
        if len(sites) == 1:
            for at, column in enumerate(picks[sites[0]]):
                if (at,) in allowed:
                    model.objective[column] += allowed[(at,)]
                else:
                    model.row([(column, 1.0)], 0, 0)
            continue
        used = {combination: model.add("", 0, 1, value) for combination, value in allowed.items()}
        for n, site in enumerate(sites):  # the rows in use agree with the choice of every site
            for at, column in enumerate(picks[site]):
                agreeing = [(u, 1.0) for combination, u in used.items() if combination[n] == at]
                model.row([*agreeing, (column, -1.0)], 0, 0)
    for kernel, room in problem.room.items():
        copies = [
            (column, float(problem.bytes_of[site]))
            for site, columns in picks.items()
            if site in problem.bytes_of and site[1] == kernel
            for column, c in zip(columns, problem.choices[site], strict=True)
            if c.moved
        ]
        if copies:
            model.row(copies, upper=room)
    solution = solve(model)
    values = solution.x
    if values is None:
        raise WagerError(f"no layout of the kernels' tensors is allowed ({solution.status})")
    return {site: max(range(len(c)), key=lambda i, c=c, x=values: x[c[i]]) for site, c in picks.items()}


# ── the problem of a program ────────────────────────────────────────────────────────────────────────────────────────────


def memory_order(program: Program, i: int) -> Order:
    """How a value lies that no kernel computes: permutations of a dense tensor are views, everything else is row-major."""
    node = program.nodes[i]
    if node.op != "permute":
        return tuple(range(len(node.shape)))
    below = memory_order(program, node.inputs[0])
    place = {source: d for d, source in enumerate(node["order"])}
    return tuple(place[source] for source in below)


def packed_arguments(block: BlockGraph, constant: Collection[int]) -> frozenset[int]:
    """The constant arguments that are stored as tiles: one input reads them, and it is cut."""
    found = set()
    for a in constant:
        readers = [n for n in block.inputs if n["arg"] == a]
        if len(readers) == 1 and any(t >= 0 for t in (*readers[0]["imap"], readers[0]["fmap"])):
            found.add(a)
    return frozenset(found)


def state(program: Program, constant: Collection[int], arena: int = ARENA_BYTES) -> Problem:
    """The layout problem of all kernels of a program. The first choice of every site is what row-major code would do."""
    problem = Problem()
    for position, node in enumerate(program.nodes):
        if node.block is None:
            continue
        block, shapes = peel(node.block), [program.nodes[j].shape for j in node.inputs]
        packed = packed_arguments(block, [a for a, j in enumerate(node.inputs) if j in constant])
        tiles = Tiles(block, packed, row_major(block, shapes))
        for j in node.inputs:
            _tensor(problem, program, j, constant)
        for result in _results(program, position):
            _tensor(problem, program, result, constant)
        problem.room[position] = max(0, arena - 4 * tiles.places()[1])
        _kernel(problem, program, position, tiles)
    return problem


def _results(program: Program, position: int) -> list[int]:
    return [i for i, n in enumerate(program.nodes) if n.op == "result" and n.inputs == (position,)]


def _long(shape: Shape) -> list[int]:
    """The dimensions that may be innermost: those above 1, the last one first."""
    return [d for d in range(len(shape) - 1, -1, -1) if shape[d] > 1] or [max(len(shape) - 1, 0)]


def _tensor(problem: Problem, program: Program, i: int, constant: Collection[int]) -> None:
    site, node = ("tensor", i), program.nodes[i]
    if site in problem.choices:
        return
    free = [Choice(d, inner_last(len(node.shape), d)) for d in _long(node.shape)]
    if not node.shape:
        problem.choices[site] = [Choice(0, ())]
    elif i in constant:
        problem.choices[site] = free
    elif node.op == "result":
        readers = {n.op for n in program.nodes if i in n.inputs}
        plain = Choice(len(node.shape) - 1, tuple(range(len(node.shape))))
        problem.choices[site] = free if i not in program.outputs and readers <= {"kernel"} else [plain]
    else:
        given = memory_order(program, i)
        plain = tuple(range(len(node.shape)))
        as_is = Choice(given[-1], given)
        moved = [Choice(c.inner, c.order, True) for c in free if c.order != given]
        problem.choices[site] = [as_is, *moved] if given == plain else sorted(
            [as_is, *moved], key=lambda c: c.order != plain
        )  # fmt: skip
        size = math.prod(node.shape)
        problem.table([site], lambda c: size * REARRANGED if c.moved else 0.0)


def _kernel(problem: Problem, program: Program, position: int, tiles: Tiles) -> None:
    """Sites of the tiles, and the cost tables of the block's operators."""
    block, node = tiles.block, program.nodes[position]
    for i, inner in enumerate(block.nodes):
        site = ("tile", position, i)
        options = [Choice(d) for d in _long(inner.shape)]
        if inner.op == "input" and inner["arg"] not in tiles.packed:
            tensor = ("tensor", node.inputs[inner["arg"]])
            in_place = dict.fromkeys(c.inner for c in problem.choices[tensor])
            problem.choices[site] = [Choice(d) for d in in_place] + [Choice(c.inner, (), True) for c in options]
            problem.bytes_of[site] = 4 * math.prod(inner.shape)
            problem.table([tensor, site], _follows)
            turns = _turns(block, i) if inner["fmap"] >= 0 else block.blocks
            elements = turns * math.prod(inner.shape)
            problem.table([tensor, site], lambda t, c, n=elements: _copy_cost(n, t.inner, c))
        elif inner.op == "input" or i in tiles.stored:
            problem.choices[site] = options
    for i, inner in enumerate(block.nodes):
        if inner.op == "matmul":
            _product_table(problem, position, tiles, i)
        elif inner.op == "output":
            tensor = ("tensor", _results(program, position)[block.outputs.index(inner)])
            _element_tables(problem, position, tiles, i, tensor)
        elif i in tiles.stored and i not in tiles.epilogues.values():
            if inner.op in UNARY or inner.op in BINARY or inner.op == "accum":
                if tiles.direct(inner.inputs[0]) != i:
                    _element_tables(problem, position, tiles, i, ("tile", position, i))
            elif inner.op == "rms_norm":
                _element_tables(problem, position, tiles, i, ("tile", position, i), along_last=True)
            else:
                _reduction_tables(problem, position, tiles, i)


def _turns(block: BlockGraph, i: int) -> int:
    """How often the node is computed, over all blocks."""
    inside = not block.after[i] or block.nodes[i].op.startswith("accum")
    return block.blocks * (block.loop if inside else 1)


def _follows(tensor: Choice, tile: Choice) -> float:
    return 0.0 if tile.moved or tile.inner == tensor.inner else FORBIDDEN


def _copy_cost(elements: int, inner: int, tile: Choice) -> float:
    lanes = panel_width() // 2
    if not tile.moved:
        return 0.0
    return elements * (2 / lanes if tile.inner == inner else 1 / lanes + STRIDED / 2)


def _per_element(shape: Shape, near: int, target: int, rank: int) -> float:
    """Vector operations to read one element of a loop along dimension `target` (of `rank`) from a tile whose innermost dimension is `near`."""
    lanes, at = panel_width() // 2, target - (rank - len(shape))
    beside = at < 0 or shape[at] == 1 or near == at
    return 1 / lanes if beside else STRIDED


def _element_tables(
    problem: Problem, position: int, tiles: Tiles, i: int, target: Site, along_last: bool = False
) -> None:
    """Loops over the target's elements, innermost along its own innermost dimension: each operand counts by itself."""
    node, times = tiles.block.nodes[i], _turns(tiles.block, i)
    size, rank = times * math.prod(node.shape), len(node.shape)
    for leaf in dict.fromkeys(tiles.leaves(i)):
        shape = tiles.block.nodes[leaf].shape
        site = ("tile", position, tiles.home(leaf))
        problem.table(
            [site, target],
            lambda a, t, s=shape: size * _per_element(s, a.inner, rank - 1 if along_last else t.inner, rank),
        )
    lanes = panel_width() // 2
    own = lambda c: size * (1 / lanes if not along_last or c.inner == rank - 1 else STRIDED)
    problem.table([target], own)


def _reduction_tables(problem: Problem, position: int, tiles: Tiles, i: int) -> None:
    """The loop runs along the innermost dimension of the largest operand; the result is written once per sum, or once per term across."""
    nodes, node = tiles.block.nodes, tiles.block.nodes[i]
    source = nodes[node.inputs[0]].shape
    dim, rank, size = node.get("dim", -1) % len(source), len(source), _turns(tiles.block, i) * math.prod(source)
    leaves = list(dict.fromkeys(tiles.leaves(i)))
    largest = max(leaves, key=lambda j: math.prod(nodes[j].shape))
    lead, own, lanes = ("tile", position, tiles.home(largest)), ("tile", position, i), panel_width() // 2

    def along(choice: Choice) -> int:
        near = choice.inner + rank - len(nodes[largest].shape)
        return near if source[near] > 1 else rank - 1

    problem.table(
        [lead, own],
        lambda a, t: size / lanes * (1.0 if along(a) == dim or t.inner == along(a) else lanes * STRIDED),
    )
    for leaf in leaves:
        shape = nodes[leaf].shape
        site = ("tile", position, tiles.home(leaf))
        problem.table([site, lead], lambda a, b, s=shape: size * _per_element(s, a.inner, along(b), rank))


def _product_table(problem: Problem, position: int, tiles: Tiles, i: int) -> None:
    """By the form that the lowering takes for these strides (see `product_form`)."""
    block, node = tiles.block, tiles.block.nodes[i]
    a, b = node.inputs
    shape_a, shape_b, rank = block.nodes[a].shape, block.nodes[b].shape, len(node.shape)
    m, k, n = shape_a[-2], shape_a[-1], shape_b[-1]
    times, panel = _turns(block, i) * math.prod(node.shape[:-2]), tiles.panel(b)

    def cost(left: Choice, right: Choice, out: Choice) -> float:
        inner = [
            left.inner - len(shape_a) + 2, right.inner - len(shape_b) + 2, out.inner - rank + 2,
        ]  # fmt: skip
        if any(d < 0 for d in inner):
            return FORBIDDEN
        near = [d == inner[which] for which in range(3) for d in (0, 1)]
        return times * product_cost(m, n, k, near, panel)

    problem.table([("tile", position, a), ("tile", position, b), ("tile", position, tiles.home(i))], cost)


def product_cost(m: int, n: int, k: int, near: Sequence[bool], panel: bool) -> float:
    """Vector operations of a product; `near` as for `product_form`."""
    lanes = panel_width() // 2
    form = product_form(m, n, k, near, lanes)
    if form in ("plain", "swapped"):
        rows, columns, smooth = (m, n, near[1]) if form == "plain" else (n, m, near[2])
        rest = columns % lanes
        value = rows * k * ((columns - rest) / lanes + rest * STRIDED) * (1.0 if smooth else 1.15)
        return value * (0.95 if panel and form == "plain" else 1.0)
    if form == "dots":
        return m * n * (1.5 * math.ceil(k / lanes) + 4)
    return 4 * STRIDED * m * n * k


# ── from choices to layouts ─────────────────────────────────────────────────────────────────────────────────────────────


def read(program: Program, problem: Problem, chosen: dict[Site, int]) -> dict[int, Layout]:
    """The layouts that the choices mean."""
    picked = {site: problem.choices[site][at] for site, at in chosen.items()}
    found = {}
    for position, node in enumerate(program.nodes):
        if node.block is None:
            continue
        block = peel(node.block)
        tensors = [picked[("tensor", j)] for j in node.inputs]
        inner, copied = [], set()
        for i, n in enumerate(block.nodes):
            own = picked.get(("tile", position, i))
            inner.append(own.inner if own else len(n.shape) - 1)
            if own and own.moved:
                copied.add(i)
        tiles = Tiles(block, frozenset(), row_major(block, [program.nodes[j].shape for j in node.inputs]))
        inner = [inner[tiles.home(i)] for i in range(len(block.nodes))]
        results = tuple(picked[("tensor", r)].order for r in _results(program, position))
        moved = frozenset(a for a, c in enumerate(tensors) if c.moved)
        found[position] = Layout(tuple(c.order for c in tensors), results, tuple(inner), frozenset(copied), moved)
    return found
