"""Imports an ONNX model (core operators of the default domain, static shapes) as a program.

Initialisers and constants become inputs whose values are kept beside the program, like the parameters of a traced module; what only steers
an operator (shapes, axes, bounds) is read at import. Needs the `onnx` package (`pip install 'wager[onnx]'`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wager.errors import UsageError
from wager.graph.onnx_rules import RULES
from wager.graph.program import Builder
from wager.graph.trace import Traced

LEAST_OPSET = 13


def load(model: Any) -> Traced:
    """`model`: a path or a loaded ModelProto. Raises UsageError that names the operator and node that has no form here."""
    try:
        import onnx
    except ImportError as error:
        raise UsageError(f"reading ONNX needs the onnx package ({error}); pip install 'wager[onnx]'") from None
    if isinstance(model, (str, Path)):
        try:
            model = onnx.load(str(model))
        except Exception as error:
            raise UsageError(f"{model} cannot be read as ONNX: {error}") from None
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset < LEAST_OPSET:
        raise UsageError(f"the model uses operator set {opset}; convert it to {LEAST_OPSET} or later")
    return Importer(onnx, model.graph).run()


class Importer:
    def __init__(self, onnx: Any, graph: Any):
        self.onnx, self.graph, self.build = onnx, graph, Builder()
        self.values: dict[str, int] = {}
        self.known: dict[str, np.ndarray] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.node: Any = None

    def run(self) -> Traced:
        for tensor in self.graph.initializer:
            self.known[tensor.name] = self.onnx.numpy_helper.to_array(tensor)
        user = [i for i in self.graph.input if i.name not in self.known]
        for item in user:
            self.values[item.name] = self.build.input(self._shape_of(item), item.name)
        for node in self.graph.node:
            self._import(node)
        outputs = [self.value(o.name) for o in self.graph.output]
        return Traced(self.build.build(*outputs), self.constants, [i.name for i in user], len(outputs) == 1)

    def _shape_of(self, item: Any) -> tuple[int, ...]:
        kind = item.type.tensor_type
        if kind.elem_type != self.onnx.TensorProto.FLOAT:
            name = self.onnx.TensorProto.DataType.Name(kind.elem_type)
            raise UsageError(f"input {item.name!r} is of type {name}; programs take float32")
        for d, size in enumerate(kind.shape.dim):
            if not size.HasField("dim_value") or size.dim_value < 1:
                what = size.dim_param or "unknown"
                raise UsageError(f"dimension {d} of input {item.name!r} is {what}; export with static shapes")
        return tuple(d.dim_value for d in kind.shape.dim)

    def _import(self, node: Any) -> None:
        self.node = node
        where = f"node {node.name or node.output[0]!r}"
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None:
            full = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise UsageError(
                f"ONNX operator {full} ({where}) has no form in the graph; known: {', '.join(sorted(RULES))}"
            )
        try:
            result = rule(self, *node.input)
        except UsageError as error:
            raise UsageError(f"{error} (ONNX operator {node.op_type}, {where})") from None
        if isinstance(result, np.ndarray):
            self.known[node.output[0]] = result
        else:
            self.values[node.output[0]] = result

    def attr(self, name: str, default: Any = None) -> Any:
        for a in self.node.attribute:
            if a.name == name:
                value = self.onnx.helper.get_attribute_value(a)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def value(self, name: str) -> int:
        """The position of a tensor; a constant enters the program when first used."""
        if name not in self.values:
            if name not in self.known:
                raise UsageError(f"tensor {name!r} is used before it is computed")
            array = self.known[name]
            if not np.issubdtype(array.dtype, np.floating):
                raise UsageError(
                    f"constant {name!r} of type {array.dtype} takes part in arithmetic; programs take float32"
                )
            if array.ndim == 0:
                return self.build.add("const", value=float(array))
            self.constants[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32).copy())
            self.values[name] = self.build.input(array.shape, name)
        return self.values[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.build.nodes[self.value(name)].shape

    def steer(self, name: str, attribute: str = "") -> list[int] | None:
        """Whole numbers that steer an operator: from an input tensor that must be constant, or an attribute of older sets."""
        if name:
            if name not in self.known:
                raise UsageError(f"{name!r} is computed at run time; only constant shapes and axes can be imported")
            return [int(v) for v in self.known[name].reshape(-1)]
        given = self.attr(attribute) if attribute else None
        return list(given) if given is not None else None

    def reshape(self, value: int, shape: Sequence[int]) -> int:
        old = self.build.nodes[value].shape
        return value if tuple(shape) == old else self.build.add("reshape", [value], shape=tuple(shape))
