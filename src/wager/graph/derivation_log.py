"""Reads the derivation logs of InfiniTensor's `nnet` (one JSON object per step) as expressions. Source: arXiv 2208.02025."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wager.errors import UsageError
from wager.graph.expression import Body, Call, Number, Read, Routine, Scope, Tensor
from wager.graph.index import Affine, floordiv, it, number, remainder

ROUTINES = {"101": "matmul", "102": "conv", "105": "eoperator"}
OPERATORS = {1: "add", 2: "mul", 3: "div", 4: "mod", 5: "sub"}


def load(path: Path) -> list[tuple[str, Scope]]:
    """(message, expression) of every step."""
    return [read(json.loads(line)) for line in Path(path).read_text().splitlines() if line.strip()]


def read(step: Mapping[str, Any]) -> tuple[str, Scope]:
    """One step. Raises UsageError for a node type that has no meaning here."""
    root = _Reader(step).value("0")
    if isinstance(root, Tensor):
        if root.source is None:
            raise UsageError("a derivation step that is a bare input tensor")
        return str(step.get("Msg", "")), root.source.expr
    assert isinstance(root, Scope)
    return str(step.get("Msg", "")), root


class _Reader:
    def __init__(self, nodes: Mapping[str, Any]):
        self.nodes = nodes

    def value(self, key: str) -> Any:
        node = self.nodes[str(key)]
        kind = int(node["type"])
        if kind == 0:
            return Number(node["val"])
        if kind == 1:
            return self.binary(node)
        if kind == 2:
            return self.scope(node)
        if kind == 3:
            return Read(self.value(node["object"]), tuple(self.index(i) for i in node["indexes"]))
        if kind == 4:
            return self.tensor(node)
        raise UsageError(f"derivation node type {kind} is not known here")

    def binary(self, node: Mapping[str, Any]) -> Body:
        return Call(OPERATORS[int(node["opType"])], (self.value(node["lhs"]), self.value(node["rhs"])))

    def scope(self, node: Mapping[str, Any]) -> Scope:
        loops = tuple((n, a, b) for n, (a, b) in node["loopVarRanges"].items())
        sums = tuple((n, a, b) for n, (a, b) in (node.get("sumVarRanges") or {}).items())
        return Scope(loops, sums, self.value(node["summand"]), tuple(node["paddings"]))

    def tensor(self, node: Mapping[str, Any]) -> Tensor:
        source = None
        if str(node["source"]) != "-1":
            routine = self.nodes[str(node["source"])]
            source = Routine(ROUTINES[str(routine["type"])], self.value(routine["expr"]))
        return Tensor(node["name"], tuple(node["shape"]), tuple(node["paddings"]), source)

    def index(self, key: str) -> Affine:
        node = self.nodes[str(key)]
        kind = int(node["type"])
        if kind == 0:
            return number(node["val"])
        if kind == 5:
            return it(node["name"])
        a, b = self.index(node["lhs"]), self.index(node["rhs"])
        name = OPERATORS[int(node["opType"])]
        if name in ("add", "sub"):
            return a + b if name == "add" else a - b
        if name == "mul":
            return b * a.const if not a.terms else a * b.const
        if b.terms:
            raise UsageError("an index divides by an iterator")
        return floordiv(a, b.const) if name == "div" else remainder(a, b.const)
