"""A block graph as Triton source: one program instance a block, tiles in registers, sums in float32.

Tiles have power-of-two sides on a GPU: other sizes are padded, loads fill with zeros, and a computed value is masked again before it is summed
or contracted over a padded side. Inputs keep their type (half or float32) up to the matrix units, where a computed operand takes the narrowest
type among the arguments; everything else is float32, also what one kernel leaves for the next. Arguments are read where they lie: the text is
made for their strides. How many warps run a block and how many loop turns are loaded ahead is a `Launch`, chosen by measuring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from wager.errors import UsageError
from wager.graph.lower.code import number, strides
from wager.graph.operators import BINARY, UNARY, Shape
from wager.graph.program import BlockGraph

LEAST_SIDE = 16  # of a matrix unit's operand
MOST_SPREAD = (
    4096  # entries of a tile whose sum over loop turns is kept apart, entry by entry, and folded once after the loop
)
UNARY_CODE = {
    "exp": "tl.exp({x})",
    "sqrt": "tl.sqrt({x})",
    "square": "{x} * {x}",
    "silu": "{x} * tl.sigmoid({x})",
    "gelu": "0.5 * {x} * (1.0 + tl.erf({x} * 0.70710678118654752))",
    "gelu_tanh": "{x} * tl.sigmoid(1.5957691216057308 * ({x} + 0.044715 * {x} * {x} * {x}))",
    "relu": "tl.maximum({x}, 0.0)",
    "sigmoid": "tl.sigmoid({x})",
    "tanh": "2.0 * tl.sigmoid(2.0 * {x}) - 1.0",
    "neg": "-{x}",
    "scale": "{x} * {value}",
    "shift": "{x} + {value}",
    "clamp": "tl.minimum(tl.maximum({x}, {low}), {high})",
    "leaky_relu": "tl.where({x} >= 0, {x}, {x} * {slope})",
    "rsqrt": "1.0 / tl.sqrt({x})",
    "reciprocal": "1.0 / {x}",
    "log": "tl.log({x})",
    "abs": "tl.abs({x})",
    "sin": "tl.sin({x})",
    "cos": "tl.cos({x})",
}
BINARY_CODE = {
    "add": "{a} + {b}",
    "sub": "{a} - {b}",
    "mul": "{a} * {b}",
    "div": "{a} / {b}",
    "maximum": "tl.maximum({a}, {b})",
}


SHARED_BYTES = 227 * 1024  # of one multiprocessor (Hopper), all of which one block may take
NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Launch:
    """How a kernel is started: warps of 32 threads for each block, and loop turns whose loads are in flight (1: no pipeline)."""

    warps: int = 4
    stages: int = 3


def padded(size: int) -> int:
    """The side of a tile in registers; 1 stays 1, so that it broadcasts."""
    return 1 if size == 1 else max(LEAST_SIDE, 1 << (size - 1).bit_length())


@dataclass
class _Emitter:
    block: BlockGraph
    arguments: list[Shape]
    name: str
    layouts: list[tuple[int, ...]] | None = None
    kinds: list[torch.dtype] | None = None
    lines: list[str] = field(default_factory=list)
    depth: int = 1

    def __post_init__(self) -> None:
        tiles = [self._aligned(n.shape, 8) for n in self.block.nodes]
        lead = max((d for t in tiles for d in [sum(1 for s in t[:-2] if s > 1)]), default=0)
        if lead > 1:
            raise UsageError("a tile with two batch dimensions inside has no Triton form; cut one by the grid")
        self.rank = 3 if any(s > 1 for t in tiles for s in t[:-2]) else 2
        kinds = self.kinds or [torch.float32] * len(self.arguments)
        self.narrow = next((a for a, kind in enumerate(kinds) if kind in NARROW), 0)
        self.plain = {a for a, kind in enumerate(kinds) if kind == kinds[self.narrow]}
        self.into = self._accumulated()

    def _accumulated(self) -> dict[int, int]:
        """Products that nothing but an accumulator reads: they add into its registers."""
        readers: dict[int, list[int]] = {}
        for i, node in enumerate(self.block.nodes):
            for j in node.inputs:
                readers.setdefault(j, []).append(i)
        nodes = self.block.nodes
        return {
            j: users[0]
            for j, users in readers.items()
            if nodes[j].op == "matmul" and len(users) == 1 and nodes[users[0]].op == "accum" and not self._thin(j)
        }

    @staticmethod
    def _aligned(shape: Shape, rank: int) -> Shape:
        return (1,) * (rank - len(shape)) + tuple(shape)

    def tile(self, i: int) -> Shape:
        """The node's shape as `rank` dimensions; batch dimensions of size 1 are dropped."""
        shape = self.block.nodes[i].shape
        rest = self._aligned(shape[-2:], 2)
        return rest if self.rank == 2 else (math.prod(shape[:-2]), *rest)

    def emit(self, line: str) -> None:
        self.lines.append("    " * self.depth + line)

    def axis(self, d: int) -> str:
        return "[" + ", ".join(":" if e == d else "None" for e in range(self.rank)) + "]"

    def source(self) -> str:
        block, nodes = self.block, self.block.nodes
        for i, node in enumerate(nodes):
            if node.op.startswith("accum"):
                tile = self.tile(node.inputs[0]) if self._spread(i) else self.tile(i)
                self.emit(f"t{i} = tl.zeros({self._sides(tile)}, tl.float32)")
        inside = [i for i, n in enumerate(nodes) if not block.after[i] or n.op.startswith("accum")]
        self.emit(f"for it in range({block.loop}):")
        self.depth += 1
        for i in inside:
            self._node(i)
        self.depth -= 1
        for i in inside:
            if self._spread(i):
                self.emit(f"t{i} = tl.sum(t{i}, axis={self.rank - 1}, keep_dims=True)")
            if nodes[i].op == "accum_rms":
                count = block.loop * nodes[nodes[i].inputs[0]].shape[-1]
                self.emit(f"t{i} = tl.sqrt(t{i} * {number(1 / count)})")
        for i in range(len(nodes)):
            if i not in inside:
                self._node(i)
        pointers = [f"in{a}" for a in range(len(self.arguments))] + [f"out{o}" for o in range(len(block.outputs))]
        body = "\n".join(self.lines)
        return (
            "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
            f"def {self.name}({', '.join(pointers)}):\n"
            "    g0 = tl.program_id(0)\n    g1 = tl.program_id(1)\n    g2 = tl.program_id(2)\n"
            f"{body}\n"
        )

    @staticmethod
    def _sides(tile: Shape) -> str:
        return "(" + ", ".join(str(padded(s)) for s in tile) + ")"

    def _node(self, i: int) -> None:
        node = self.block.nodes[i]
        if node.op == "input":
            self._load(i)
        elif node.op == "output":
            self._store(i)
        elif node.op == "matmul":
            self.emit(f"t{self.into.get(i, i)} = {self._product(i)}")
        elif node.op in UNARY:
            attrs = {k: number(v) for k, v in node.attrs}
            self.emit(f"t{i} = {UNARY_CODE[node.op].format(x=self._wide(node.inputs[0]), **attrs)}")
        elif node.op in BINARY:
            a, b = (self._wide(j) for j in node.inputs)
            self.emit(f"t{i} = {BINARY_CODE[node.op].format(a=a, b=b)}")
        elif node.op == "accum" and node.inputs[0] in self.into:
            pass  # the product has added itself
        elif node.op == "accum":
            self.emit(f"t{i} += {self._wide(node.inputs[0])}")
        elif node.op in ("sum", "accum_sum", "accum_width", "accum_rms"):
            self._reduce(i)
        elif node.op == "rms_norm":
            source, tile = node.inputs[0], self.tile(i)
            x = self._masked(source, self.rank - 1)
            mean = f"tl.sum({x} * {x}, axis={self.rank - 1}, keep_dims=True) * {number(1 / tile[-1])}"
            self.emit(f"t{i} = {self._wide(source)} / tl.sqrt({mean})")
        else:
            raise UsageError(f"block operator {node.op!r} has no Triton form")

    def _wide(self, j: int) -> str:
        return f"t{j}.to(tl.float32)" if self.block.nodes[j].op == "input" else f"t{j}"

    def _masked(self, j: int, d: int) -> str:
        """The value with zeros beyond the true end of dimension d (loads have them already)."""
        size = self.tile(j)[d]
        if self.block.nodes[j].op == "input" or padded(size) == size:
            return self._wide(j)
        return f"tl.where((tl.arange(0, {padded(size)}) < {size}){self.axis(d)}, t{j}, 0.0)"

    def _thin(self, i: int) -> bool:
        """Whether a product has a side of 1, which the matrix unit does not take."""
        a, b = (self.tile(j) for j in self.block.nodes[i].inputs)
        return 1 in (a[-2], a[-1], b[-1])

    def _operand(self, j: int, text: str) -> str:
        """A value as the matrix unit reads it."""
        node = self.block.nodes[j]
        if node.op == "input" and node["arg"] in self.plain:
            return text.replace(f"t{j}.to(tl.float32)", f"t{j}")
        return f"({text}).to(in{self.narrow}.dtype.element_ty)"

    def _spread(self, i: int) -> bool:
        """Whether an accumulator keeps every entry's own sum: folding a row in each turn would make the warps wait for each other."""
        node = self.block.nodes[i]
        if node.op not in ("accum_sum", "accum_rms") or self.block.loop == 1 or self.tile(i)[-1] != 1:
            return False
        return math.prod(map(padded, self.tile(node.inputs[0]))) <= MOST_SPREAD

    def _product(self, i: int) -> str:
        a, b = self.block.nodes[i].inputs
        ta, tb = self.tile(a), self.tile(b)
        left, right = self._masked(a, self.rank - 1), self._masked(b, self.rank - 2)
        if self._thin(i):
            lead = ":, " if self.rank == 3 else ""
            axis = self.rank - 1
            return f"tl.sum(({left})[{lead}:, :, None] * ({right})[{lead}None, :, :], axis={axis})"
        if self.rank == 3 and ta[0] != tb[0]:
            whole = max(ta[0], tb[0])
            left, right = (
                x if t[0] == whole else f"tl.broadcast_to({x}, {self._sides((whole, *t[1:]))})"
                for x, t in ((left, ta), (right, tb))
            )
        left, right = self._operand(a, left), self._operand(b, right)
        into = f", acc=t{self.into[i]}" if i in self.into else ""
        return f'tl.dot({left}, {right}{into}, input_precision="ieee")'

    def _reduce(self, i: int) -> None:
        node = self.block.nodes[i]
        source = node.inputs[0]
        dim = node.get("dim", -1)
        d = self.rank - 1 if node.op != "sum" else (dim if dim < 0 else dim - len(node.shape)) + self.rank
        if d < 0:
            raise UsageError("a sum over a dropped batch dimension has no Triton form")
        size, width = self.tile(source)[d], self.tile(i)[d]
        x = self._masked(source, d)
        if node.op == "accum_rms":
            x = f"{x} * {x}"
        if self._spread(i):
            total = x
        elif width == 1:
            total = f"tl.sum({x}, axis={d}, keep_dims=True)"
        elif d != self.rank - 1:
            raise UsageError(
                f"a sum along dimension {dim} down to {width} entries has no Triton form; sum along the last"
            )
        elif padded(size) == size and padded(width) == width:
            sides = [padded(s) for s in self.tile(source)[:-1]]
            total = f"tl.sum(tl.reshape({x}, ({', '.join(map(str, [*sides, size // width, width]))})), axis={d})"
        else:  # padded entries lie between the groups: pick each by its place in the group
            lead, to = ":, " * (self.rank - 1), "None, " * (self.rank - 1)
            picks = f"(tl.arange(0, {padded(size)})[:, None] % {width} == tl.arange(0, {padded(width)})[None, :])"
            total = f"tl.sum(({x})[{lead}:, None] * {picks}.to(tl.float32)[{to}:, :], axis={d})"
        self.emit(f"t{i} {'=' if node.op == 'sum' else '+='} {total}")

    def _places(
        self,
        whole: Shape,
        tile: Shape,
        maps: Sequence[int],
        parts: Sequence[int],
        names: Sequence[str],
        layout: Sequence[int] | None = None,
    ) -> Any:
        """The offset of the tile's start, and for each of its dimensions (index, size, stride). Without a `layout`, row-major."""
        steps, start = layout or strides(whole), []
        for d, size in enumerate(whole):
            rest = size
            for target, count, name in zip(maps, parts, names, strict=True):
                if target == d and count > 1:
                    rest //= count
                    start.append(f"{name} * {rest * steps[d]}")
        rank = len(whole)
        inner = [(d + self.rank - rank, tile[d], steps[d]) for d in range(max(0, rank - 2), rank)]
        lead = [(0, tile[d], steps[d]) for d in range(rank - 2) if tile[d] > 1]
        return " + ".join(start) or "0", lead + inner

    def _pointer(self, base: str, start: str, places: Sequence[tuple[int, int, int]]) -> tuple[str, str]:
        at, masks = [f"{base} + {start}"], []
        sides = [1] * self.rank
        for d, size, step in places:
            sides[d] = padded(size)
            index = f"tl.arange(0, {padded(size)}){self.axis(d)}"
            at.append(f"{index} * {step}")
            if padded(size) != size:
                masks.append(f"({index} < {size})")
        for d in range(self.rank):
            if not any(p[0] == d for p in places):
                at.append(f"tl.arange(0, 1){self.axis(d)}")
        return " + ".join(at), " & ".join(masks)

    def _load(self, i: int) -> None:
        node, block = self.block.nodes[i], self.block
        start, places = self._places(
            self.arguments[node["arg"]], node.shape, (*node["imap"], node["fmap"]), (*block.grid, block.loop),
            ("g0", "g1", "g2", "it"), self.layouts[node["arg"]] if self.layouts else None,
        )  # fmt: skip
        at, mask = self._pointer(f"in{node['arg']}", start, places)
        self.emit(f"t{i} = tl.load({at}" + (f", mask={self._whole(mask, i)}, other=0.0)" if mask else ")"))

    def _whole(self, mask: str, i: int) -> str:
        return f"tl.broadcast_to({mask}, {self._sides(self.tile(i))})"

    def _store(self, i: int) -> None:
        node, block = self.block.nodes[i], self.block
        index = [n for n, o in enumerate(block.nodes) if o.op == "output"].index(i)
        start, places = self._places(block.output_shape(node), node.shape, node["omap"], block.grid, ("g0", "g1", "g2"))
        at, mask = self._pointer(f"out{index}", start, places)
        value = f"tl.broadcast_to({self._wide(node.inputs[0])}, {self._sides(self.tile(i))})"
        self.emit(
            f"tl.store({at}, {value}.to(out{index}.dtype.element_ty)"
            + (f", mask={self._whole(mask, i)})" if mask else ")")
        )


def block_source(
    block: BlockGraph,
    arguments: Sequence[Shape],
    name: str = "wager_kernel",
    layouts: Sequence[Sequence[int]] | None = None,
    kinds: Sequence[torch.dtype] | None = None,
) -> str:
    """The module text of one kernel, for arguments with these strides (row-major unless said) and types (float32 unless said).

    Raises UsageError for an operator or a tile without a Triton form.
    """
    strides_of = [tuple(row) for row in layouts] if layouts is not None else None
    return _Emitter(block, list(arguments), name, strides_of, list(kinds) if kinds is not None else None).source()


def loaded_bytes(block: BlockGraph, item: int) -> int:
    """Shared memory of one loop turn's tiles as they are padded, for entries of `item` bytes."""
    return item * sum(math.prod(padded(s) for s in n.shape) for n in block.inputs if block.loop == 1 or n["fmap"] >= 0)


def default_launch(block: BlockGraph, item: int = 4) -> Launch:
    """A start that fits: as many stages (2 to 4) as shared memory holds, more warps for large tiles."""
    largest = max(math.prod(padded(s) for s in n.shape) for n in block.nodes)
    stages = max(1, min(4, block.loop, SHARED_BYTES // max(1, loaded_bytes(block, item))))
    return Launch(4 if largest <= 8192 else 8, stages)
