"""What symbolic maps save: the same search with one kind of map made concrete, so that structures are enumerated anew for each of its values.

The result is the same set of proved families (tested); only the work differs. Source: arXiv 2604.15272, the ablation of imap, fmap and omap.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product

from wager.compile.mirage.abstract import Algebra, of_program
from wager.compile.mirage.enumerate import Enumerator
from wager.compile.mirage.generate import Limits, Progress, Structure, menu
from wager.compile.mirage.lookup import pruner
from wager.compile.prism.family import Family, Kernel, verify_family
from wager.compile.prism.mapping import Mapping, choices, mappings
from wager.compile.prism.search import Found
from wager.errors import UsageError
from wager.graph.operators import Shape, ShapeError, infer
from wager.graph.program import Node, Program, cut

KINDS = ("imap", "fmap", "omap")
Maps = tuple[tuple[int, ...], ...]
"""For every tensor, the dimension that each parallel dimension cuts, or -1."""


def search_with_concrete(which: str, program: Program, limits: Limits, progress: Progress | None = None) -> Found:
    """The single-kernel search with `which` of KINDS concrete. Raises UsageError for another kind."""
    if which not in KINDS:
        raise UsageError(f"map {which!r} is unknown; use one of {', '.join(KINDS)}")
    progress = progress or Progress()
    start, families = time.perf_counter(), {}
    grids = 3 if len(program.output_shapes[0]) > 2 else 2
    algebra = Algebra()
    values = of_program(algebra, program)
    target = values[program.outputs[0]]
    inputs = [values[i] for i in program.input_positions]
    targets = pruner(algebra, program, [target], limits, tiled=True)
    enumerator = Enumerator(algebra, targets, menu(program), limits)
    for chosen in _values(which, program, grids):
        tiles, loop = _tiles(which, program, chosen)
        if tiles is None:
            continue
        for found in enumerator.run(inputs, tiles, 1, lambda e, _: e == [target], progress, loop):
            structure = _whole(found, program.input_shapes)
            if structure is None or structure.nodes[structure.saved[0]].shape != program.output_shapes[0]:
                continue
            for mapping in mappings(structure, grids, True):
                if _of(which, mapping, grids) != chosen:
                    continue
                progress.mappings += 1
                family = Family((Kernel(structure, mapping),))
                if str(family) not in families and not verify_family(program, family):
                    families[str(family)] = family
        if progress.look(limits):
            break
    progress.verified = len(families)
    return Found(list(families.values()), progress, {"all": time.perf_counter() - start})


def _values(which: str, program: Program, grids: int) -> Iterator[Maps]:
    """Every value of the map; grid dimensions are interchangeable, so one order of them."""
    if which == "fmap":
        yield from (tuple((d,) for d in c) for c in product(*(range(-1, len(s)) for s in program.input_shapes)))
        return
    shapes = program.input_shapes if which == "imap" else program.output_shapes
    seen = set()
    for maps in product(*(choices(len(s), grids, False) for s in shapes)):
        seen.add(_ordered(maps, grids))
    yield from sorted(seen)


def _ordered(maps: Maps, grids: int) -> Maps:
    """The grid's dimensions in falling order of what they cut."""
    columns = sorted((tuple(m[p] for m in maps) for p in range(grids)), reverse=True)
    return tuple(tuple(c[t] for c in columns) for t in range(len(maps)))


def _of(which: str, mapping: Mapping, grids: int) -> Maps:
    if which == "fmap":
        return tuple((d,) for d in mapping.fmaps)
    return _ordered(mapping.imaps if which == "imap" else mapping.omaps, grids)


def _tiles(which: str, program: Program, chosen: Maps) -> tuple[list[Shape] | None, int]:
    """The inputs cut in two along what the map says, and the loop range; None where a cut is not exact."""
    if which == "omap":
        return list(program.input_shapes), 1
    loop = 2 if which == "fmap" and any(m[0] >= 0 for m in chosen) else 1
    try:
        return [cut(s, m, [2] * len(m)) for s, m in zip(program.input_shapes, chosen, strict=True)], loop
    except ShapeError:
        return None, loop


def _whole(found: Structure, shapes: tuple[Shape, ...] | list[Shape]) -> Structure | None:
    """The same graph over whole inputs; None where its operators do not fit those."""
    nodes: list[Node] = []
    for i, node in enumerate(found.nodes):
        try:
            shape = shapes[i] if node.op == "input" else infer(
                node.op, [nodes[j].shape for j in node.inputs], dict(node.attrs)
            )  # fmt: skip
        except ShapeError:
            return None
        nodes.append(Node(node.op, node.inputs, shape, node.attrs))
    return Structure(found.arguments, tuple(nodes), found.saved)
