"""A block graph as Triton source: one program instance a block, tiles in registers, sums in float32.

Tiles have power-of-two sides on a GPU: other sizes are padded, loads fill with zeros, and a computed value is masked again before it is summed
or contracted over a padded side. Inputs keep their type (half or float32) up to the matrix units; everything else is float32. The source is a
file in the cache, so it can be read. TRITON_INTERPRET=1 runs it on a CPU.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wager.errors import UsageError
from wager.graph.execute import operator
from wager.graph.lower.code import number, strides
from wager.graph.operators import BINARY, UNARY, Shape
from wager.graph.program import BlockGraph, Node, Program
from wager.native import build

LEAST_SIDE = 16  # of a matrix unit's operand
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


def padded(size: int) -> int:
    """The side of a tile in registers; 1 stays 1, so that it broadcasts."""
    return 1 if size == 1 else max(LEAST_SIDE, 1 << (size - 1).bit_length())


@dataclass
class _Emitter:
    block: BlockGraph
    arguments: list[Shape]
    name: str
    lines: list[str] = field(default_factory=list)
    depth: int = 1

    def __post_init__(self) -> None:
        tiles = [self._aligned(n.shape, 8) for n in self.block.nodes]
        lead = max((d for t in tiles for d in [sum(1 for s in t[:-2] if s > 1)]), default=0)
        if lead > 1:
            raise UsageError("a tile with two batch dimensions inside has no Triton form; cut one by the grid")
        self.rank = 3 if any(s > 1 for t in tiles for s in t[:-2]) else 2

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
                self.emit(f"t{i} = tl.zeros({self._sides(self.tile(i))}, tl.float32)")
        inside = [i for i, n in enumerate(nodes) if not block.after[i] or n.op.startswith("accum")]
        self.emit(f"for it in range({block.loop}):")
        self.depth += 1
        for i in inside:
            self._node(i)
        self.depth -= 1
        for i in inside:
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
            self.emit(f"t{i} = {self._product(i)}")
        elif node.op in UNARY:
            attrs = {k: number(v) for k, v in node.attrs}
            self.emit(f"t{i} = {UNARY_CODE[node.op].format(x=self._wide(node.inputs[0]), **attrs)}")
        elif node.op in BINARY:
            a, b = (self._wide(j) for j in node.inputs)
            self.emit(f"t{i} = {BINARY_CODE[node.op].format(a=a, b=b)}")
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

    def _product(self, i: int) -> str:
        a, b = self.block.nodes[i].inputs
        ta, tb = self.tile(a), self.tile(b)
        left, right = self._masked(a, self.rank - 1), self._masked(b, self.rank - 2)
        if 1 in (ta[-2], ta[-1], tb[-1]):  # too thin for the matrix unit
            lead = ":, " if self.rank == 3 else ""
            axis = self.rank - 1
            return f"tl.sum(({left})[{lead}:, :, None] * ({right})[{lead}None, :, :], axis={axis})"
        if self.rank == 3 and ta[0] != tb[0]:
            whole = max(ta[0], tb[0])
            left, right = (
                x if t[0] == whole else f"tl.broadcast_to({x}, {self._sides((whole, *t[1:]))})"
                for x, t in ((left, ta), (right, tb))
            )
        raw = [self.block.nodes[j].op == "input" for j in (a, b)]
        if raw[0]:
            left = left.removesuffix(".to(tl.float32)")
        if raw[1]:
            right = right.removesuffix(".to(tl.float32)")
        if raw[0] != raw[1]:  # the computed side takes the type of the one from memory
            left, right = (left, f"({right}).to(t{a}.dtype)") if raw[0] else (f"({left}).to(t{b}.dtype)", right)
        return f'tl.dot({left}, {right}, input_precision="ieee")'

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
        if width == 1:
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
        self, whole: Shape, tile: Shape, maps: Sequence[int], parts: Sequence[int], names: Sequence[str]
    ) -> Any:
        """The offset of the tile's start, and for each of its dimensions (index, size, stride)."""
        steps, start = strides(whole), []
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
            ("g0", "g1", "g2", "it"),
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


def block_source(block: BlockGraph, arguments: Sequence[Shape], name: str = "wager_kernel") -> str:
    """The module text of one kernel. Raises UsageError for an operator or a tile without a Triton form."""
    return _Emitter(block, list(arguments), name).source()


def available() -> bool:
    return importlib.util.find_spec("triton") is not None


class TritonKernel:
    """One compiled kernel node on contiguous tensors of one device; results have the first argument's type."""

    def __init__(self, node: Node, arguments: Sequence[Shape]):
        """Raises UsageError when Triton is not installed."""
        assert node.block is not None
        self.block, self.arguments = node.block, list(arguments)
        self.text = block_source(self.block, self.arguments)
        self.function = load_source(self.text).wager_kernel
        self.output_shapes = [self.block.output_shape(n) for n in self.block.outputs]

    def __call__(self, *args: Tensor) -> list[Tensor]:
        kept = [a.contiguous() for a in args]
        out = [torch.empty(s, dtype=kept[0].dtype, device=kept[0].device) for s in self.output_shapes]
        self.function[self.block.grid](*kept, *out, num_warps=max(1, self.block.threads // 32))
        return out


def load_source(text: str) -> Any:
    """The generated module, from a file in the cache (Triton reads its source)."""
    if not available():
        raise UsageError("Triton is not installed; pip install triton, or use the C++ form")
    digest = hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
    folder = build.cache_dir() / "generated" / digest
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "wager_kernel.py"
    if not path.exists():
        temporary = folder / f"wager_kernel.{os.getpid()}.tmp"
        temporary.write_text(text)
        temporary.replace(path)
    spec = importlib.util.spec_from_file_location(f"wager_kernel_{digest}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TritonProgram:
    """A program whose kernel nodes run as Triton and whose other operators run as torch."""

    def __init__(self, program: Program):
        self.program = program
        self.kernels = {
            i: TritonKernel(n, [program.nodes[j].shape for j in n.inputs])
            for i, n in enumerate(program.nodes)
            if n.op == "kernel"
        }

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        values: list[Any] = []
        given = iter(inputs)
        for i, node in enumerate(self.program.nodes):
            args = [values[j] for j in node.inputs]
            if node.op == "input":
                values.append(next(given))
            elif node.op == "const":
                values.append(torch.tensor(node["value"], device=inputs[0].device))
            elif node.op == "kernel":
                values.append(self.kernels[i](*args))
            elif node.op == "result":
                values.append(args[0][node["index"]])
            else:
                values.append(operator(node)(*args))
        return [values[i] for i in self.program.outputs]
