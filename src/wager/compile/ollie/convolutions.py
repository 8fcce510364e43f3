"""Convolutions of a program with what follows them folded in, their index expressions, and the library's own operator for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.compile.ollie import definitions
from wager.graph.execute import UNARY
from wager.graph.expression import Scope
from wager.graph.lower.windows import Epilogue
from wager.graph.program import Node, Program

ACTIVATIONS = frozenset(("relu", "tanh", "sigmoid", "silu", "leaky_relu", "gelu", "gelu_tanh"))
LIBRARY_ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid"}


@dataclass
class Fused:
    """A convolution with what follows it; `last` is the node whose value it produces."""

    first: int
    last: int
    source: int
    node: Node
    weight: Tensor
    bias: Tensor | None
    activation: str = ""
    attrs: tuple[tuple[str, Any], ...] = ()
    slope: Tensor | None = None

    @property
    def features(self) -> int:
        return self.node.shape[1]

    def epilogue(self) -> Epilogue:
        """For the native kernels; a leaky ReLU is a prelu whose slopes are alike."""
        bias = self.bias.numpy() if self.bias is not None else None
        if self.activation == "leaky_relu":
            return Epilogue(bias, "prelu", np.full(self.features, dict(self.attrs)["slope"], np.float32))
        return Epilogue(bias, self.activation, self.slope.numpy() if self.slope is not None else None)


def find_convolutions(program: Program, known: Mapping[int, Tensor]) -> list[Fused]:
    """Convolutions with constant weights and one group, with the per-channel affine maps and the activation that follow."""
    users: dict[int, list[int]] = {}
    for i, node in enumerate(program.nodes):
        for j in node.inputs:
            users.setdefault(j, []).append(i)
    found = []
    for i, node in enumerate(program.nodes):
        if node.op != "conv" or node.inputs[1] not in known or node.get("groups", 1) != 1:
            continue
        if len(node.inputs) > 2 and node.inputs[2] not in known:
            continue
        if node["transposed"] and node["dilation"] != (1, 1):
            continue
        inputs = list(node.inputs)
        bias = known[inputs[2]] if len(inputs) > 2 else None
        found.append(_extend(program, known, users, Fused(i, i, inputs[0], node, known[inputs[1]], bias)))
    return found


def _extend(program: Program, known: Mapping[int, Tensor], users: Mapping[int, list[int]], fused: Fused) -> Fused:
    while not fused.activation and fused.last not in program.outputs and len(users.get(fused.last, [])) == 1:
        (at,) = users[fused.last]
        node = program.nodes[at]
        channels = fused.node.shape[1]
        others = [j for j in node.inputs if j != fused.last]
        if (
            node.op in ("add", "sub", "mul")
            and len(others) == 1
            and others[0] in known
            and node.shape == fused.node.shape
        ):
            value = known[others[0]]
            if value.numel() not in (1, channels) or (
                value.dim() > 1 and value.numel() > 1 and list(value.shape)[-3] != channels
            ):
                break
            if value.numel() > 1 and value.dim() < 3 or (node.op == "sub" and node.inputs[0] != fused.last):
                break
            _fold(fused, node.op, value.reshape(-1).expand(channels).double())
        elif node.op in ACTIVATIONS:
            fused.activation, fused.attrs = node.op, node.attrs
        elif node.op == "prelu" and node.inputs[1] in known:
            fused.activation, fused.slope = "prelu", known[node.inputs[1]].reshape(-1).expand(channels).contiguous()
        else:
            break
        fused.last = at
    return fused


def _fold(fused: Fused, op: str, value: Tensor) -> None:
    """The affine map moves into weight and bias (in float64, rounded once)."""
    bias = torch.zeros(fused.node.shape[1], dtype=torch.float64) if fused.bias is None else fused.bias.double()
    if op == "mul":
        shape = (1, -1, 1, 1) if fused.node["transposed"] else (-1, 1, 1, 1)
        fused.weight = (fused.weight.double() * value.reshape(shape)).float()
        bias = bias * value
    else:
        bias = bias + value if op == "add" else bias - value
    fused.bias = bias.float()


def expression(program: Program, fused: Fused) -> Scope:
    n, c, h, w = program.nodes[fused.source].shape
    node = fused.node
    if node["transposed"]:
        return definitions.conv_transpose(
            (n, h, w, c), tuple(fused.weight.shape), node["stride"], node["padding"], node["output_padding"]
        )
    return definitions.conv((n, h, w, c), tuple(fused.weight.shape), node["stride"], node["padding"], node["dilation"])


def library(fused: Fused, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """The library's operator with packed weights and, where it can, the activation fused."""
    node, weight, bias = fused.node, fused.weight.contiguous(memory_format=torch.channels_last), fused.bias
    stride, padding, dilation = list(node["stride"]), list(node["padding"]), list(node["dilation"])
    slope = fused.slope if fused.slope is not None else torch.zeros(1)
    extra, transposed = list(node["output_padding"]), bool(node["transposed"])
    inside = LIBRARY_ACTIVATIONS.get(fused.activation, "none")
    if fused.activation and inside == "none":
        after = (lambda x: torch.nn.functional.prelu(x, slope)) if fused.activation == "prelu" else (
            lambda x: UNARY[fused.activation](x, **dict(fused.attrs))
        )  # fmt: skip
    else:
        after = None
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():
        act = UNARY.get(fused.activation)
        base = lambda x: torch.convolution(x, weight, bias, stride, padding, dilation, transposed, extra, 1)
        return lambda x: after(base(x)) if after else act(base(x)) if act else base(x)
    if transposed:
        packed = ops._reorder_convolution_transpose_weight(weight, padding, extra, stride, dilation, 1, list(shape))
        run = lambda x: ops._convolution_transpose_pointwise(
            x, packed, bias, padding, extra, stride, dilation, 1, inside, [], ""
        )
    else:
        packed = ops._reorder_convolution_weight(weight, padding, stride, dilation, 1, list(shape))
        run = lambda x: ops._convolution_pointwise(x, packed, bias, padding, stride, dilation, 1, inside, [], "")
    return (lambda x: after(run(x))) if after else run


def with_epilogue(scope: Scope, fused: Fused) -> Scope:
    """The expression with bias and activation as one more stage."""
    if fused.bias is None and not fused.activation:
        return scope
    return definitions.with_epilogue(scope, fused.bias is not None, fused.activation, fused.attrs)
