"""Mapping variables: which data dimension of which tensor each parallel dimension cuts (Prism, arXiv 2604.15272).

A mapping gives every tensor, for grid dimensions x, y, z and the loop, a data dimension or none. Well formed: a parallel dimension cuts at most
one dimension of a tensor, and at most one grid dimension cuts a given dimension (the loop may cut it once more). Operators tie dimensions:
sizes must be equal as functions of all tile sizes, so tied dimensions are cut by the same parallel dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product

from wager.compile.mirage.generate import Structure
from wager.graph.operators import BINARY, ShapeError

Choice = tuple[int, ...]
"""For one tensor: the data dimension cut by each parallel dimension (grid dimensions first, then the loop if it has one), or -1."""


def choices(rank: int, grids: int, loop: bool) -> Iterator[Choice]:
    """Every well-formed choice for one tensor."""
    for choice in product(range(-1, rank), repeat=grids + loop):
        used = [d for d in choice[:grids] if d >= 0]
        if len(used) == len(set(used)):
            yield choice


def count(
    ranks: Sequence[int], has_loop: Sequence[bool], grids: int, ties: Sequence[tuple[int, int, int, int]]
) -> dict[str, int]:
    """How many mappings there are: raw Boolean assignments, well formed, after ties, and up to renaming the grid dimensions.

    A tie (t, d, u, e) says that dimension d of tensor t and e of tensor u have the same size.
    """
    booleans = sum(r * (grids + h) for r, h in zip(ranks, has_loop, strict=True))
    options = [list(choices(r, grids, h)) for r, h in zip(ranks, has_loop, strict=True)]
    formed = tied = 0
    orbits = set()
    for mapping in product(*options):
        formed += 1
        if all(_cut_by(mapping[t], d, mapping[u], e) for t, d, u, e in ties):
            tied += 1
            orbits.add(min(_renamed(mapping, order, grids) for order in permutations(range(grids))))
    return {"raw": 2**booleans, "well_formed": formed, "tied": tied, "distinct": len(orbits)}


def _cut_by(a: Choice, d: int, b: Choice, e: int) -> bool:
    """The same parallel dimensions cut both (over those that both tensors have)."""
    shared = min(len(a), len(b))
    return all((a[p] == d) == (b[p] == e) for p in range(shared))


def _renamed(mapping: Sequence[Choice], order: Sequence[int], grids: int) -> tuple[Choice, ...]:
    return tuple((*(c[order[p]] for p in range(grids)), *c[grids:]) for c in mapping)


@dataclass(frozen=True)
class Mapping:
    """Cuts as classes of tied dimensions: `cuts[p]` are the classes that parallel dimension p cuts (grid first, loop last)."""

    imaps: tuple[tuple[int, int, int], ...]
    fmaps: tuple[int, ...]
    omaps: tuple[tuple[int, int, int], ...]
    grids: int


class Ties:
    """Union-find over (node, dimension) of a structure."""

    def __init__(self, structure: Structure):
        self.parent: dict[tuple[int, int], tuple[int, int]] = {}
        self.structure = structure
        self.whole: set[tuple[int, int]] = set()
        for i, node in enumerate(structure.nodes):
            self._node(i, node)

    def find(self, key: tuple[int, int]) -> tuple[int, int]:
        while key in self.parent:
            key = self.parent[key]
        return key

    def tie(self, a: tuple[int, int], b: tuple[int, int]) -> None:
        ra, rb = self.find(a), self.find(b)
        if ra != rb:
            self.parent[max(ra, rb)] = min(ra, rb)

    def _node(self, i: int, node) -> None:
        nodes = self.structure.nodes
        rank = len(node.shape)
        if node.op == "matmul":
            a, b = node.inputs
            ra, rb = len(nodes[a].shape), len(nodes[b].shape)
            self.tie((a, ra - 1), (b, rb - 2))
            self.tie((i, rank - 2), (a, ra - 2))
            self.tie((i, rank - 1), (b, rb - 1))
            for source, r in ((a, ra), (b, rb)):
                for d in range(r - 2):
                    if nodes[source].shape[d] > 1:
                        self.tie((i, d + rank - r), (source, d))
            return
        for source in node.inputs:
            shape = nodes[source].shape
            for d in range(len(shape)):
                at = d + rank - len(shape)
                if node.op in BINARY and shape[d] == 1 and node.shape[at] != 1:
                    continue
                if node.op in ("sum", "accum_sum", "accum_rms", "accum_width") and d == len(shape) - 1:
                    continue
                self.tie((i, at), (source, d))
            if node.op in ("rms_norm", "sum"):
                self.whole.add((source, len(shape) - 1))


def mappings(structure: Structure, grids: int, final: bool, symmetric: bool = True) -> Iterator[Mapping]:
    """Every assignment that satisfies well-formedness and the structure's ties; interchangeable grid dimensions are taken once.

    `final`: the saved value is the program's output, so every grid dimension must come back in it and the loop must not.
    """
    ties = Ties(structure)
    inputs = [[ties.find((i, d)) for d in range(len(structure.nodes[i].shape))] for i in range(structure.arguments)]
    sizes = {c: structure.nodes[i].shape[d] for i, dims in enumerate(inputs) for d, c in enumerate(dims)}
    saved = [[ties.find((s, d)) for d in range(len(structure.nodes[s].shape))] for s in structure.saved]
    whole = {ties.find(k) for k in ties.whole}
    classes = [c for c in sizes if sizes[c] > 1]
    parallel = [s for s in _subsets(classes) if all(sum(c in s for c in set(dims)) <= 1 for dims in inputs)]
    grid_sets = [s for s in parallel if not (s & whole) and _returns(s, saved, final)]
    loop_sets = [s for s in parallel if not (s & whole) and not (final and any(s & set(dims) for dims in saved))]
    picks = combinations_with_empty(grid_sets, grids) if symmetric else product(grid_sets, repeat=grids)
    for chosen in picks:
        if any(a & b for a, b in combinations(chosen, 2)):
            continue
        for loop in loop_sets:
            try:
                yield _mapping(inputs, saved, chosen, loop, grids)
            except ShapeError:
                continue


def _returns(cut: frozenset, saved: Sequence[Sequence[tuple[int, int]]], final: bool) -> bool:
    """Whether a grid dimension with this cut can be mapped onto every saved value."""
    if not cut:
        return True
    return all(sum(c in cut for c in set(dims)) == 1 for dims in saved) if final else True


def _subsets(classes: Sequence) -> Iterator[frozenset]:
    for size in range(min(len(classes), 3) + 1):
        for chosen in combinations(classes, size):
            yield frozenset(chosen)


def combinations_with_empty(sets: Sequence[frozenset], grids: int) -> Iterator[tuple[frozenset, ...]]:
    """Multisets of `grids` sets in which only the empty one may repeat."""
    some = [s for s in sets if s]
    for size in range(grids + 1):
        for chosen in combinations(some, size):
            yield (*chosen, *(frozenset() for _ in range(grids - size)))


def _mapping(inputs, saved, chosen: Sequence[frozenset], loop: frozenset, grids: int) -> Mapping:
    cuts = [*chosen, *(frozenset() for _ in range(3 - grids))]

    def place(dims, cut) -> int:
        return next((d for d, c in enumerate(dims) if c in cut), -1)

    omaps = []
    for dims in saved:
        omap = []
        for cut in cuts:
            at = place(dims, cut)
            omap.append(len(dims) - 1 if at < 0 and cut else at)
        if len([d for d in omap if d >= 0]) != len({d for d in omap if d >= 0}):
            raise ShapeError("two grid dimensions would concatenate along one")
        omaps.append(tuple(omap))
    imaps = tuple(tuple(place(dims, cut) for cut in cuts) for dims in inputs)
    return Mapping(imaps, tuple(place(dims, loop) for dims in inputs), tuple(omaps), grids)  # type: ignore[arg-type]
