"""Imports a torch module or function through torch.export (core ATen).

Parameters, buffers and tensor constants become inputs of the program whose values are kept beside it; dropout and other training-only
operators must be off (the module is exported in eval mode). Shapes are static unless `dynamic` names dimensions: those become symbols, and
the program must be instantiated before it runs (graph.symbolic). A dimension that is dynamic in any other way is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wager.errors import UsageError
from wager.graph.dynamic import dimensions, factors
from wager.graph.program import Builder, Program
from wager.graph.symbolic import Symbol
from wager.graph.trace_rules import RULES


@dataclass
class Traced:
    """A program, the values of its constant inputs by name, and the names of the caller's inputs in order."""

    program: Program
    constants: dict[str, Tensor]
    user_inputs: list[str]
    single_output: bool = True
    notes: list[str] = field(default_factory=list)


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def trace(
    function: Callable[..., Any] | nn.Module,
    example_inputs: Sequence[Tensor],
    dynamic: Sequence[Mapping[int, Symbol]] | None = None,
) -> Traced:
    """Raises UsageError for an operator that has no form here (named with its source line), a dynamic shape, or an output that is no tensor.

    `dynamic`: for every input, which of its dimensions are which symbols: [{0: Symbol("tokens", high=4096)}, {}].
    """
    module = function if isinstance(function, nn.Module) else _Function(function)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            exported = torch.export.export(
                module,
                tuple(example_inputs),
                strict=False,
                dynamic_shapes=dimensions(function, example_inputs, dynamic),
            )
            table = torch.export.default_decompositions()
            for kept in ("silu", "gelu", "_prelu_kernel", "leaky_relu", "_softmax", "rms_norm", "_fused_rms_norm"):
                table.pop(getattr(torch.ops.aten, kept).default, None)
            exported = exported.run_decompositions(table)
    except UsageError:
        raise
    except Exception as error:
        remedy = "leave the dimension out of `dynamic`" if dynamic else "make it traceable with static shapes"
        raise UsageError(f"torch.export refuses the function: {_first_line(error)}; {remedy}") from None
    finally:
        module.train(was_training)
    try:
        return Importer(exported, dynamic).run()
    except UsageError as error:
        code = getattr(function, "__code__", None)
        if code is None or " (at " in str(error):
            raise
        raise UsageError(f"{error} (at {code.co_filename}:{code.co_firstlineno})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Importer:
    """One import: the program so far, and what every node of the exported graph became. The rules (trace_rules.py) work on it."""

    def __init__(self, exported: Any, dynamic: Sequence[Mapping[int, Symbol]] | None = None):
        self.exported, self.build = exported, Builder()
        self.dynamic = list(dynamic or ())
        self.symbols: dict[str, Symbol] = {}
        """torch.export's names of symbols."""
        self.values: dict[str, Any] = {}
        self.constants: dict[str, Tensor] = {}
        self.user_inputs: list[str] = []

    def run(self) -> Traced:
        signature = self.exported.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        lifted = getattr(signature, "inputs_to_lifted_tensor_constants", {})
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, stored, lifted)
            elif node.op == "call_function":
                self.values[node.name] = self._call(node)
            elif node.op == "output":
                return self._finish(node)
        raise UsageError("the exported graph has no output")

    def _placeholder(self, node: Any, stored: dict[str, str], lifted: dict[str, str]) -> None:
        example = node.meta.get("val")
        if not isinstance(example, Tensor):
            raise UsageError(f"input {node.name!r} is not a tensor; bind it with functools.partial")
        shape = self._shape(node)
        if node.name in stored:
            name = stored[node.name]
            value = (
                self.exported.state_dict[name] if name in self.exported.state_dict else self.exported.constants[name]
            )
            self.constants[node.name] = value.detach()
        elif node.name in lifted:
            self.constants[node.name] = self.exported.constants[lifted[node.name]].detach()
        else:
            self.user_inputs.append(node.name)
        self.values[node.name] = self.build.input(shape, node.name)

    def _shape(self, node: Any) -> tuple[Any, ...]:
        """The shape of a placeholder; dimensions that the caller named become symbols, others must be static."""
        shape = list(node.meta["val"].shape)
        at = len(self.user_inputs)
        named = self.dynamic[at] if at < len(self.dynamic) else {}
        for d, size in enumerate(shape):
            if not isinstance(size, int):
                if d in named:
                    self.symbols[str(size)] = named[d]
                shape[d] = self.size(size, f"dimension {d} of {node.name!r}")
        return tuple(shape)

    def size(self, size: Any, what: str) -> Any:
        """A SymInt as a size. Raises UsageError when it is no product of named symbols."""
        coefficient, *names = factors(size.node.expr)
        unknown = [n for n in names if n not in self.symbols]
        if coefficient is None or unknown:
            raise UsageError(f"{what} is dynamic ({size}); name it in `dynamic`, or export with static shapes")
        return math.prod((self.symbols[n].size for n in names), start=coefficient)

    def _call(self, node: Any) -> Any:
        if isinstance(node.meta.get("val"), torch.SymInt):
            return None  # arithmetic on sizes: whoever reads it takes the size itself
        name = str(node.target).removeprefix("aten.")
        overload = name.split(".")[0]
        rule = RULES.get(name) or RULES.get(overload)
        if rule is None:
            where = _source_line(node)
            raise UsageError(f"operator aten.{name} has no form in the graph{where}; known: {', '.join(sorted(RULES))}")
        try:
            return rule(self, *self._sized(node.args), **self._sized(node.kwargs))
        except UsageError as error:
            raise UsageError(f"{error}{_source_line(node)}") from None

    def _sized(self, value: Any) -> Any:
        """Arguments with sizes in the place of the nodes that compute them."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._sized(v) for v in value)
        if isinstance(value, dict):
            return {k: self._sized(v) for k, v in value.items()}
        val = value.meta.get("val") if isinstance(value, torch.fx.Node) else value
        return self.size(val, "a size") if isinstance(val, torch.SymInt) else value

    def value(self, x: Any) -> int:
        """The position of an argument; a number becomes a constant."""
        if isinstance(x, (int, float)):
            return self.build.add("const", value=float(x))
        return self.values[x.name]

    def shape(self, x: Any) -> tuple[int, ...]:
        return self.build.nodes[self.value(x)].shape

    def _finish(self, node: Any) -> Traced:
        results = node.args[0]
        outputs = [self.value(r) for r in results]
        single = len(outputs) == 1
        return Traced(self.build.build(*outputs), self.constants, self.user_inputs, single)


def _source_line(node: Any) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    files = [i for i, line in enumerate(lines) if line.startswith("File ") and __file__ not in line]
    if not files:
        return ""
    code = lines[files[-1] + 1] if files[-1] + 1 < len(lines) else ""
    return f" (at {lines[files[-1]].removeprefix('File ')}: {code})"
