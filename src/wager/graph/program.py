"""Tensor programs on two levels.

A `Program` is a list of nodes in evaluation order over whole tensors. A node is a named operator, or a `kernel` that owns a `BlockGraph`:
what one thread block does, on tiles, for every point of a grid, in a loop. Both levels use one node type and one operator table.

- kernel level: `input` (attrs name), `const` (attrs value), operators, `kernel` (block) whose outputs are picked by `result` (attrs index).
- block level: `input` (attrs arg, imap, fmap), operators, accumulators over the loop, `output` (attrs omap).
  imap/omap give for each grid dimension the data dimension that it cuts, or -1 for none; fmap the same for the loop. A data dimension is
  cut by the grid first and by the loop second. Every path from an input to an output passes exactly one accumulator.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from wager.errors import UsageError
from wager.graph.operators import ACCUMULATORS, COMMUTATIVE, Shape, ShapeError, infer
from wager.graph.symbolic import Symbol, parse, symbols_of

Attrs = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Node:
    """One operator. `inputs` are positions of earlier nodes of the same graph."""

    op: str
    inputs: tuple[int, ...] = ()
    shape: Shape = ()
    attrs: Attrs = ()
    block: BlockGraph | None = None

    def __getitem__(self, name: str) -> Any:
        for key, value in self.attrs:
            if key == name:
                return value
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        return next((value for key, value in self.attrs if key == name), default)


def pack(attrs: Mapping[str, Any]) -> Attrs:
    """Attributes as a hashable value."""
    return tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in attrs.items()))


def cut(shape: Shape, maps: Iterable[int], sizes: Iterable[int]) -> Shape:
    """The tile of a tensor whose dimension maps[i] is cut into sizes[i] equal parts. Raises ShapeError."""
    tile = list(shape)
    for dim, size in zip(maps, sizes, strict=True):
        if dim < 0:
            continue
        if dim >= len(tile) or tile[dim] % size:
            raise ShapeError(f"dimension {dim} of {shape} does not divide into {size} equal parts")
        tile[dim] //= size
    return tuple(tile)


@dataclass(frozen=True)
class BlockGraph:
    """What one block does. `threads` is the block's width on a GPU; a CPU runs a block on one core."""

    grid: tuple[int, int, int]
    loop: int
    nodes: tuple[Node, ...]
    threads: int = 128

    @cached_property
    def after(self) -> tuple[bool, ...]:
        """For each node whether it lives after the loop. Raises ShapeError where the path rule is broken."""
        flags: list[bool] = []
        for node in self.nodes:
            flags.append(_after(node, [flags[i] for i in node.inputs]))
        return tuple(flags)

    @property
    def inputs(self) -> list[Node]:
        return [n for n in self.nodes if n.op == "input"]

    @property
    def outputs(self) -> list[Node]:
        return [n for n in self.nodes if n.op == "output"]

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)

    def output_shape(self, node: Node) -> Shape:
        return tuple(
            size * math.prod(g for g, d in zip(self.grid, node["omap"], strict=True) if d == dim)
            for dim, size in enumerate(node.shape)
        )


def _after(node: Node, flags: Sequence[bool]) -> bool:
    if node.op == "input":
        return False
    if node.op in ACCUMULATORS:
        if flags[0]:
            raise ShapeError("an accumulator reads a tensor that is already accumulated")
        return True
    if node.op == "output":
        if not flags[0]:
            raise ShapeError("an output is saved inside the loop; accumulate it first")
        return True
    if len(set(flags)) > 1:
        raise ShapeError(f"{node.op} mixes a tensor inside the loop with one after it")
    return flags[0] if flags else False


@dataclass(frozen=True)
class Program:
    """A whole computation. `outputs` are positions of nodes."""

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]

    @property
    def input_positions(self) -> list[int]:
        return [i for i, n in enumerate(self.nodes) if n.op == "input"]

    @property
    def input_shapes(self) -> list[Shape]:
        return [self.nodes[i].shape for i in self.input_positions]

    @property
    def input_names(self) -> list[str]:
        return [self.nodes[i].get("name", f"input{i}") for i in self.input_positions]

    @property
    def output_shapes(self) -> list[Shape]:
        return [self.nodes[i].shape for i in self.outputs]

    @property
    def kernels(self) -> list[Node]:
        return [n for n in self.nodes if n.op == "kernel"]

    def pruned(self) -> Program:
        """Without nodes that no output needs; inputs stay."""
        needed = set(self.outputs) | set(self.input_positions)
        for i in range(len(self.nodes) - 1, -1, -1):
            if i in needed:
                needed.update(self.nodes[i].inputs)
        kept = sorted(needed)
        place = {old: new for new, old in enumerate(kept)}
        nodes = [replace(self.nodes[i], inputs=tuple(place[j] for j in self.nodes[i].inputs)) for i in kept]
        return Program(tuple(nodes), tuple(place[i] for i in self.outputs))


class Builder:
    """Builds a Program; equal nodes are one node (commutative operands in either order)."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._known: dict[Any, int] = {}

    def add(self, op: str, inputs: Sequence[int] = (), block: BlockGraph | None = None, **attrs: Any) -> int:
        """The position of the node. Raises ShapeError or UsageError."""
        packed = pack(attrs)
        key_inputs = tuple(sorted(inputs)) if op in COMMUTATIVE else tuple(inputs)
        key = (op, key_inputs, packed, block)
        if key in self._known and op != "input":
            return self._known[key]
        if op == "input":
            shape = tuple(attrs["shape"])
        elif op == "const":
            shape = ()
        elif op == "kernel":
            assert block is not None
            shape = ()
        elif op == "result":
            owner = self.nodes[inputs[0]].block
            assert owner is not None
            shape = owner.output_shape(owner.outputs[attrs["index"]])
        else:
            shape = infer(op, [self.nodes[i].shape for i in inputs], dict(packed))
        self.nodes.append(Node(op, tuple(inputs), shape, packed, block))
        self._known[key] = len(self.nodes) - 1
        return len(self.nodes) - 1

    def input(self, shape: Sequence[int], name: str | None = None) -> int:
        count = sum(n.op == "input" for n in self.nodes)
        return self.add("input", shape=tuple(shape), name=name or f"x{count}")

    def kernel(self, inputs: Sequence[int], block: BlockGraph) -> list[int]:
        """Adds a graph-defined node; returns its results."""
        node = self.add("kernel", inputs, block)
        return [self.add("result", [node], index=i) for i in range(len(block.outputs))]

    def __getattr__(self, op: str) -> Any:
        if op.startswith("_"):
            raise AttributeError(op)
        return lambda *inputs, **attrs: self.add(op, inputs, **attrs)

    def build(self, *outputs: int) -> Program:
        return Program(tuple(self.nodes), tuple(outputs))


class BlockBuilder:
    """Builds the BlockGraph of one kernel node over argument shapes."""

    def __init__(self, arguments: Sequence[Shape], grid: Sequence[int], loop: int = 1):
        self.arguments, self.grid, self.loop = list(arguments), (int(grid[0]), int(grid[1]), int(grid[2])), loop
        self.nodes: list[Node] = []

    def _append(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def input(self, arg: int, imap: Sequence[int], fmap: int = -1) -> int:
        """Raises ShapeError when a cut is not exact."""
        tile = cut(self.arguments[arg], (*imap, fmap), (*self.grid, self.loop))
        return self._append(Node("input", (), tile, pack({"arg": arg, "imap": tuple(imap), "fmap": fmap})))

    def add(self, op: str, inputs: Sequence[int], **attrs: Any) -> int:
        shape = infer(op, [self.nodes[i].shape for i in inputs], attrs)
        return self._append(Node(op, tuple(inputs), shape, pack(attrs)))

    def output(self, value: int, omap: Sequence[int]) -> int:
        for g, d in zip(self.grid, omap, strict=True):
            if (g > 1 and d < 0) or d >= len(self.nodes[value].shape):
                raise ShapeError(f"grid {self.grid} with output map {tuple(omap)}: blocks must write disjoint parts")
        return self._append(Node("output", (value,), self.nodes[value].shape, pack({"omap": tuple(omap)})))

    def __getattr__(self, op: str) -> Any:
        if op.startswith("_"):
            raise AttributeError(op)
        return lambda *inputs, **attrs: self.add(op, inputs, **attrs)

    def build(self) -> BlockGraph:
        """Raises ShapeError where the path rule is broken."""
        block = BlockGraph(self.grid, self.loop, tuple(self.nodes))
        _ = block.after
        return block


def check(program: Program) -> None:
    """Recomputes every shape on both levels. Raises ShapeError at the first node that does not follow from its inputs."""
    for node in program.nodes:
        shapes = [program.nodes[i].shape for i in node.inputs]
        if node.op == "kernel":
            assert node.block is not None
            check_block(node.block, shapes)
        elif node.op == "result":
            owner = program.nodes[node.inputs[0]].block
            if owner is None or node.shape != owner.output_shape(owner.outputs[node["index"]]):
                raise ShapeError(f"a result of shape {node.shape} does not match its kernel")
        elif node.op not in ("input", "const") and infer(node.op, shapes, dict(node.attrs)) != node.shape:
            raise ShapeError(f"{node.op} of {shapes} does not give {node.shape}")


def check_block(block: BlockGraph, arguments: Sequence[Shape]) -> None:
    """Raises ShapeError when cuts, shapes, output maps or the path rule are broken."""
    _ = block.after
    for node in block.nodes:
        shapes = [block.nodes[i].shape for i in node.inputs]
        if node.op == "input":
            used = [d for d in node["imap"] if d >= 0]
            if len(used) != len(set(used)):
                raise ShapeError(f"input map {node['imap']} cuts one dimension twice")
            expected = cut(arguments[node["arg"]], (*node["imap"], node["fmap"]), (*block.grid, block.loop))
        elif node.op == "output":
            expected = shapes[0]
            mapped = [d for g, d in zip(block.grid, node["omap"], strict=True) if g > 1]
            if any(not 0 <= d < len(expected) for d in mapped) or len(mapped) != len(set(mapped)):
                raise ShapeError(f"output map {node['omap']} of grid {block.grid}: blocks must write disjoint parts")
        else:
            expected = infer(node.op, shapes, dict(node.attrs))
        if expected != node.shape:
            raise ShapeError(f"block operator {node.op} of {shapes} does not give {node.shape}")


def to_json(program: Program) -> str:
    """One JSON text; `from_json` reads it back. Symbolic sizes are written as text beside their symbols' constraints."""
    plain: dict[str, Any] = {"format": "wager-program-1", "nodes": [_plain(n) for n in program.nodes]}
    plain["outputs"] = list(program.outputs)
    if symbols := symbols_of(program):
        plain["symbols"] = [[s.name, s.low, s.high, s.multiple] for s in symbols.values()]
    return json.dumps(plain, default=lambda size: {"size": str(size)})


def _plain(node: Node) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "op": node.op,
        "inputs": list(node.inputs),
        "shape": list(node.shape),
        "attrs": dict(node.attrs),
    }
    if node.block:
        b = node.block
        plain["block"] = {
            "grid": list(b.grid),
            "loop": b.loop,
            "threads": b.threads,
            "nodes": [_plain(n) for n in b.nodes],
        }
    return plain


def from_json(text: str) -> Program:
    """Raises UsageError for text that is not a saved program, ShapeError for one whose shapes do not fit."""
    try:
        data = json.loads(text)
        if data["format"] != "wager-program-1":
            raise KeyError(data["format"])
        symbols = {row[0]: Symbol(*row) for row in data.get("symbols", ())}
        nodes = _sizes(data["nodes"], symbols) if symbols else data["nodes"]
        program = Program(tuple(_node(n) for n in nodes), tuple(data["outputs"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"not a saved program: {error}; save one with to_json") from None
    check(program)
    return program


def _sizes(plain: Any, symbols: Mapping[str, Symbol]) -> Any:
    if isinstance(plain, list):
        return [_sizes(v, symbols) for v in plain]
    if isinstance(plain, dict):
        return (
            parse(plain["size"], symbols)
            if set(plain) == {"size"}
            else {k: _sizes(v, symbols) for k, v in plain.items()}
        )
    return plain


def _node(plain: Mapping[str, Any]) -> Node:
    block = None
    if "block" in plain:
        b = plain["block"]
        block = BlockGraph(tuple(b["grid"]), b["loop"], tuple(_node(n) for n in b["nodes"]), b["threads"])
    return Node(plain["op"], tuple(plain["inputs"]), tuple(plain["shape"]), pack(plain["attrs"]), block)
