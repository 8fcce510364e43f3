"""What a block keeps in its arena: which tiles are stored, which are computed where they are used, and where the stored ones lie.

Thread graphs are built by rule (Mirage, arXiv 2405.05751, section 5): an elementwise operator with one elementwise consumer of its shape is
computed inside that consumer's loop; a matmul whose only consumer is its accumulator adds into the accumulator; a matmul whose only consumer is
a chain of unary operators has the chain applied to every finished entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from wager.graph.lower.code import inner_last, panel_width
from wager.graph.lower.memory import Lifetime, plan
from wager.graph.operators import BINARY, UNARY, Shape
from wager.graph.program import BlockGraph

Order = tuple[int, ...]
"""Dimensions from the outermost in memory to the innermost."""


@dataclass(frozen=True)
class Layout:
    """How a kernel's tensors lie in memory.

    `arguments` and `results` are whole tensors. `inner` gives the dimension of stride 1 of every block node's tile; it counts for stored and
    packed tiles and for inputs in `copied`, which are brought into the arena. `converted` arguments are rearranged before the call.
    """

    arguments: tuple[Order, ...]
    results: tuple[Order, ...]
    inner: tuple[int, ...]
    copied: frozenset[int] = frozenset()
    converted: frozenset[int] = frozenset()


def row_major(block: BlockGraph, arguments: Sequence[Shape]) -> Layout:
    """Every tensor with its last dimension innermost; nothing is copied."""
    return Layout(
        tuple(tuple(range(len(s))) for s in arguments),
        tuple(tuple(range(len(n.shape))) for n in block.outputs),
        tuple(len(n.shape) - 1 for n in block.nodes),
    )


SLOW_FUNCTIONS = frozenset(("exp", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "log", "sin", "cos"))


def vector_operations(block: BlockGraph) -> int:
    """About how many vector operations all blocks together take."""
    lanes, total = panel_width() // 2, 0
    for i, node in enumerate(block.nodes):
        turns = block.loop if not block.after[i] or node.op.startswith("accum") else 1
        size = math.prod(node.shape)
        if node.op == "matmul":
            size *= block.nodes[node.inputs[0]].shape[-1]
        elif node.inputs:
            size = max(size, math.prod(block.nodes[node.inputs[0]].shape))
        total += turns * size * (16 if node.op in SLOW_FUNCTIONS else 1)
    return block.blocks * total // lanes


class Tiles:
    """The storage of one block under a layout. `packed` arguments arrive as contiguous tiles."""

    def __init__(self, block: BlockGraph, packed: frozenset[int], layout: Layout):
        self.block, self.packed, self.layout = block, packed, layout
        nodes = block.nodes
        self.consumers: list[list[int]] = [[] for _ in nodes]
        for i, node in enumerate(nodes):
            for j in node.inputs:
                self.consumers[j].append(i)
        self.inline = [self._is_inline(i) for i in range(len(nodes))]
        self.epilogues = {m: i for i in range(len(nodes)) if (m := self._product_below(i)) is not None}

    def _is_inline(self, i: int) -> bool:
        """Elementwise, and its one consumer loops over the same shape: it never needs storage."""
        node, users = self.block.nodes[i], self.consumers[i]
        if node.op not in UNARY and node.op not in BINARY:
            return False
        if len(users) != 1:
            return False
        user = self.block.nodes[users[0]]
        if user.op in UNARY or user.op in BINARY:
            return user.shape == node.shape
        return user.op in ("accum", "accum_sum", "accum_rms", "output")

    def _product_below(self, i: int) -> int | None:
        """The matmul to whose entries stored node `i` applies unary operators, if nothing else reads them."""
        nodes = self.block.nodes
        if nodes[i].op not in UNARY or self.inline[i]:
            return None
        below = nodes[i].inputs[0]
        while self.inline[below] and nodes[below].op in UNARY:
            below = nodes[below].inputs[0]
        return below if nodes[below].op == "matmul" and len(self.consumers[below]) == 1 else None

    def direct(self, i: int) -> int | None:
        """The accumulator that matmul `i` may add into."""
        users = self.consumers[i]
        if self.block.nodes[i].op == "matmul" and len(users) == 1 and self.block.nodes[users[0]].op == "accum":
            return users[0]
        return None

    def home(self, i: int) -> int:
        """The node in whose storage matmul `i` computes."""
        accumulator = self.direct(i)
        return self.epilogues.get(i, i) if accumulator is None else accumulator

    def panel(self, i: int) -> bool:
        """A packed tile that only a matmul reads, as its right side: it arrives as panels of two vectors of columns."""
        node, users = self.block.nodes[i], self.consumers[i]
        if node.op != "input" or node["arg"] not in self.packed or len(users) != 1 or len(node.shape) != 2:
            return False
        user = self.block.nodes[users[0]]
        right = user.op == "matmul" and user.inputs[1] == i != user.inputs[0]
        rows = self.layout.inner[i] == self.layout.inner[self.home(users[0])] == 1
        return right and rows and node.shape[-1] % panel_width() == 0

    def leaves(self, i: int) -> list[int]:
        """What the loop of node `i` reads from memory: its operands, those of what is computed in place included."""
        found: list[int] = []
        for j in self.block.nodes[i].inputs:
            found += self.leaves(j) if self.inline[j] else [j]
        return found

    def reading_order(self, i: int) -> int:
        """The dimension along which what node `i` reads lies side by side: that of its largest operand."""
        nodes, rank = self.block.nodes, len(self.block.nodes[i].shape)
        largest = max(self.leaves(i), key=lambda j: math.prod(nodes[j].shape))
        near = self.inner_dim(largest) + rank - len(nodes[largest].shape)
        return near if nodes[nodes[i].inputs[0]].shape[near] > 1 else rank - 1

    def inner_dim(self, i: int) -> int:
        """The dimension of stride 1 of a tile: its own where it is stored or packed, its argument's where it is read in place."""
        node = self.block.nodes[i]
        if node.op == "input" and i not in self.layout.copied and node["arg"] not in self.packed:
            return self.layout.arguments[node["arg"]][-1]
        return self.layout.inner[i]

    @cached_property
    def stored(self) -> list[int]:
        """Nodes with a place in the arena."""
        return [
            i
            for i, n in enumerate(self.block.nodes)
            if i in self.layout.copied or (n.op not in ("input", "output") and not self.inline[i] and self.home(i) == i)
        ]

    def once(self, i: int) -> bool:
        """A copied input that is the same in every turn of the loop: it is copied before."""
        return i in self.layout.copied and (self.block.nodes[i]["fmap"] < 0 or self.block.loop == 1)

    def order(self, i: int) -> Order:
        return inner_last(len(self.block.nodes[i].shape), self.layout.inner[i])

    def places(self) -> tuple[dict[int, int], int]:
        """Offset of every stored tile in floats, and the arena's size in floats."""
        nodes, stored = self.block.nodes, self.stored
        loop_end = max((i for i in range(len(nodes)) if not self.block.after[i]), default=0)
        loop_end = max([loop_end, *(i for i, n in enumerate(nodes) if n.op.startswith("accum"))])
        homes: dict[int, int] = {}  # where an elementwise result replaces an operand that nothing reads any more
        lifetimes: dict[int, Lifetime] = {}
        for i in stored:
            end = max([i, *(self._real_uses(i))])
            kept = nodes[i].op.startswith("accum") or self.once(i)
            size, start = 4 * math.prod(nodes[i].shape), 0 if kept else i
            end = max(end, loop_end) if kept else end
            old = self._replaceable(i)
            homes[i] = homes[old] if old is not None else i
            if old is not None:
                lifetimes[homes[i]] = Lifetime(size, lifetimes[homes[i]].start, end)
            else:
                lifetimes[i] = Lifetime(size, start, end)
        offsets, peak = plan(list(lifetimes.values())) if lifetimes else ([], 0)
        place = dict(zip(lifetimes, offsets, strict=True))
        return {i: place[homes[i]] // 4 for i in stored}, peak // 4

    def _replaceable(self, i: int) -> int | None:
        """A stored operand of the same shape and layout that elementwise node `i` reads last: each element is read, then written."""
        node, inner = self.block.nodes[i], self.layout.inner
        if node.op not in UNARY and node.op not in BINARY:
            return None
        alike = [
            j
            for j in node.inputs
            if j in self.stored and self.block.nodes[j].shape == node.shape and inner[i] == inner[j]
        ]
        for j in alike:
            kept = self.block.nodes[j].op.startswith("accum") or self.block.after[i] != self.block.after[j]
            if not kept and not self.once(j) and max(self._real_uses(j)) == i:
                return j
        return None

    def _real_uses(self, i: int) -> list[int]:
        uses = []
        for user in self.consumers[i]:
            uses.append(user)
            if self.inline[user] or self.home(user) != user:
                uses += self._real_uses(user)
        return uses


def panels(block: BlockGraph, packed: Sequence[int], layout: Layout) -> frozenset[int]:
    """The packed arguments whose tiles are wanted as panels [columns / width, rows, width]."""
    tiles = Tiles(block, frozenset(packed), layout)
    return frozenset(n["arg"] for i, n in enumerate(block.nodes) if tiles.panel(i))


def arena_bytes(block: BlockGraph, arguments: Sequence[Shape]) -> int:
    """The working set of one block: what it stores plus one tile of every input."""
    _, arena = Tiles(block, frozenset(), row_major(block, arguments)).places()
    return 4 * (arena + sum(math.prod(n.shape) for n in block.inputs))


def product_form(m: int, n: int, k: int, near: Sequence[bool], vector: int) -> str:
    """Which product computes C[m, n] = A[m, k] B[k, n]. `near`: unit stride of A's rows and columns, B's, C's.

    "plain" reads rows of B; "swapped" computes the transpose; "dots" sums along k; "slow" takes any strides.
    """
    a_rows, a_columns, b_rows, b_columns, c_rows, c_columns = near
    dots = a_columns and b_rows
    if b_columns and c_columns and not (dots and n < vector <= k):
        return "plain"
    if a_rows and c_rows and not (dots and m < vector <= k):
        return "swapped"
    return "dots" if dots else "slow"
