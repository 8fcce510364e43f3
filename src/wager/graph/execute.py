"""Runs a program on torch tensors: library operators through torch, kernel nodes and index expressions as compiled C++.

What depends on constants alone is evaluated once, when the executable is made. Matrix products with a constant right side and convolutions
with constant weights go to the same library calls that torch itself uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wager.errors import UsageError
from wager.graph.lower import layout
from wager.graph.lower.library import NativeKernel
from wager.graph.lower.tiles import Layout
from wager.graph.program import Node, Program

UNARY: dict[str, Callable[..., Tensor]] = {
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "neg": torch.neg,
    "scale": lambda x, value: x * value,
    "shift": lambda x, value: x + value,
    "clamp": lambda x, low, high: torch.clamp(x, low, high),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "log": torch.log,
    "abs": torch.abs,
    "sin": torch.sin,
    "cos": torch.cos,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
}


def operator(node: Node) -> Callable[..., Tensor]:
    """The torch form of one operator. Raises UsageError when it has none."""
    op, attrs = node.op, dict(node.attrs)
    if op in UNARY:
        return lambda x: UNARY[op](x, **attrs)
    if op in BINARY:
        return BINARY[op]
    if op == "conv":
        return _convolution(attrs)
    table: dict[str, Callable[..., Tensor]] = {
        "matmul": torch.matmul,
        "sum": lambda x: _sum(x, attrs.get("dim", -1), attrs.get("width", 1)),
        "rms_norm": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True)),
        "softmax": lambda x: torch.softmax(x, attrs["dim"]),
        "reshape": lambda x: x.reshape(attrs["shape"]),
        "permute": lambda x: x.permute(attrs["order"]),
        "expand": lambda x: x.expand(attrs["shape"]),
        "concat": lambda *xs: torch.cat(xs, attrs["dim"]),
        "prelu": F.prelu,
        "pad": lambda x: F.pad(x, [w for low_high in reversed(attrs["widths"]) for w in low_high]),
        "slice": lambda x: x[(slice(None),) * attrs["dim"] + (slice(attrs["start"], attrs["end"], attrs["step"]),)],
        "unfold": lambda x: x.unfold(attrs["dim"], attrs["size"], attrs["step"]),
        "max_pool": lambda x: F.max_pool2d(x, attrs["kernel"], attrs["stride"], attrs["padding"]),
    }
    if op not in table:
        raise UsageError(f"operator {op!r} has no torch form")
    return table[op]


def _sum(x: Tensor, dim: int, width: int) -> Tensor:
    dim %= x.dim()
    if width == 1:
        return x.sum(dim, keepdim=True)
    return x.unflatten(dim, (-1, width)).sum(dim)


def _convolution(attrs: Mapping[str, Any]) -> Callable[..., Tensor]:
    stride, padding, dilation = attrs["stride"], attrs["padding"], attrs["dilation"]
    groups, extra = attrs.get("groups", 1), attrs.get("output_padding", (0, 0))
    transposed = bool(attrs.get("transposed"))
    return lambda x, w, b=None: torch.convolution(x, w, b, stride, padding, dilation, transposed, extra, groups)


class Executable:
    """`program` over float32 CPU tensors; call with the non-constant inputs in order. Registered steps (`kinds`) replace torch operators."""

    def __init__(
        self,
        program: Program,
        constants: Mapping[str, Tensor] | None = None,
        layouts: Mapping[int, Layout] | None = None,
    ):
        """`layouts` of the pruned program's kernels (by position); without them they are chosen here."""
        self.program, constants = program.pruned(), dict(constants or {})
        self.layouts = choose_layouts(self.program, constants) if layouts is None else dict(layouts)
        nodes = self.program.nodes
        known: dict[int, Tensor] = {}
        self.steps: list[tuple[int, Callable[..., Any], tuple[int, ...]]] = []
        self.slots: list[int] = []
        for i, node in enumerate(nodes):
            if node.op == "input":
                if node["name"] in constants:
                    known[i] = constants[node["name"]]
                else:
                    self.slots.append(i)
            elif node.op == "const":
                known[i] = torch.tensor(node["value"], dtype=torch.float32)
            elif node.op == "kernel":
                self._kernel(i, node, known)
            elif node.op == "result":
                self.steps.append((i, _picker(node["index"]), node.inputs))
            else:
                run = make_step(node)
                if all(j in known for j in node.inputs):
                    known[i] = run(*(known[j] for j in node.inputs))
                else:
                    self.steps.append((i, run, node.inputs))
        self.values: list[Any] = [None] * len(nodes)
        for i, value in known.items():
            self.values[i] = value
        self.last_use = self._last_uses()
        self.shapes = [self.program.nodes[i].shape for i in self.slots]
        self.alone = self._alone()

    def _kernel(self, i: int, node: Node, known: Mapping[int, Tensor]) -> None:
        shapes = [self.program.nodes[j].shape for j in node.inputs]
        constant = [a for a, j in enumerate(node.inputs) if j in known]
        kernel = NativeKernel(node, shapes, constant, self.layouts.get(i))
        for a in constant:
            kernel.bind(a, known[node.inputs[a]].float())
        self.steps.append((i, kernel, tuple(j for j in node.inputs if j not in known)))

    def _alone(self) -> NativeKernel | None:
        """The kernel, when the program is nothing else: its inputs and results are the program's."""
        nodes = self.program.nodes
        kernels = [(i, run, inputs) for i, run, inputs in self.steps if isinstance(run, NativeKernel)]
        if len(kernels) != 1 or any(nodes[i].op not in ("kernel", "result") for i, _, _ in self.steps):
            return None
        position, kernel, inputs = kernels[0]
        outputs = [nodes[o]["index"] for o in self.program.outputs if nodes[o].inputs == (position,)]
        whole = outputs == list(range(len(kernel.output_shapes))) and len(outputs) == len(self.program.outputs)
        return kernel if whole and list(inputs) == self.slots else None

    def _last_uses(self) -> list[list[int]]:
        """Per step, the values that no later step reads: their memory is returned at once."""
        made = {i for i, _, _ in self.steps}
        last: dict[int, int] = {}
        for at, (i, _, inputs) in enumerate(self.steps):
            for j in (i, *inputs):
                last[j] = at
        free: list[list[int]] = [[] for _ in self.steps]
        for j, at in last.items():
            if j in made and j not in self.program.outputs:
                free[at].append(j)
        return free

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        if len(inputs) != len(self.slots):
            raise UsageError(f"the program takes {len(self.slots)} inputs, got {len(inputs)}")
        for slot, x, expected in zip(self.slots, inputs, self.shapes, strict=True):
            if x.shape != expected:
                name = self.program.nodes[slot]["name"]
                raise UsageError(f"input {name!r} has shape {tuple(x.shape)}, compiled for {expected}")
        if self.alone is not None:
            return self.alone(*inputs)
        values = self.values.copy()
        for slot, x in zip(self.slots, inputs, strict=True):
            values[slot] = x
        for (i, run, args), dead in zip(self.steps, self.last_use, strict=True):
            values[i] = run(*[values[j] for j in args])
            for j in dead:
                values[j] = None
        return [values[i] for i in self.program.outputs]


def choose_layouts(program: Program, constants: Mapping[str, Tensor]) -> dict[int, Layout]:
    """The layouts of a pruned program's kernels (empty for a program without kernels)."""
    return layout.choose(program, known_values(program, constants)) if program.kernels else {}


def known_values(program: Program, constants: Mapping[str, Tensor]) -> set[int]:
    """Positions of values that depend on constants alone (results of kernels are computed at every call)."""
    known: set[int] = set()
    for i, node in enumerate(program.nodes):
        given = node["name"] in constants if node.op == "input" else node.op not in ("kernel", "result")
        if given and all(j in known for j in node.inputs):
            known.add(i)
    return known


def _picker(index: int) -> Callable[[list[Tensor]], Tensor]:
    return lambda results: results[index]


KINDS: dict[str, Callable[[Node], Callable[..., Tensor]]] = {}
"""Operators with a maker of their own (e.g. generated memory-bound kernels), by name."""


def make_step(node: Node) -> Callable[..., Tensor]:
    return KINDS[node.op](node) if node.op in KINDS else operator(node)
