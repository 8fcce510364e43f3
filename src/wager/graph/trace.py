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
            for kept in ("silu", "gelu", "_prelu_kernel", "leaky_relu", "_softmax"):
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
        return _Importer(exported, dynamic).run()
    except UsageError as error:
        code = getattr(function, "__code__", None)
        if code is None or " (at " in str(error):
            raise
        raise UsageError(f"{error} (at {code.co_filename}:{code.co_firstlineno})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Importer:
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


def _unary(op: str) -> Callable[..., int]:
    return lambda im, x: im.build.add(op, [im.value(x)])


def _binary(op: str) -> Callable[..., int]:
    def rule(im: _Importer, a: Any, b: Any, alpha: float = 1) -> int:
        build = im.build
        if isinstance(b, (int, float)):
            number = float(b) * alpha
            if op in ("mul", "div"):
                return build.add("scale", [im.value(a)], value=number if op == "mul" else 1 / number)
            if op in ("add", "sub"):
                return build.add("shift", [im.value(a)], value=number if op == "add" else -number)
        second = im.value(b)
        if alpha != 1:
            second = build.add("scale", [second], value=float(alpha))
        first = im.value(a)
        if op == "mul":
            for gate, other in ((first, second), (second, first)):
                if build.nodes[gate].op == "sigmoid" and build.nodes[gate].inputs == (other,):
                    return build.add("silu", [other])
        return build.add(op, [first, second])

    return rule


def _pow(im: _Importer, x: Any, exponent: Any) -> int:
    known = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
    if exponent not in known:
        raise UsageError(f"a power of {exponent} has no form in the graph; known: {sorted(known)}")
    return im.build.add(known[exponent], [im.value(x)])


def _matmul(im: _Importer, a: Any, b: Any) -> int:
    return im.build.add("matmul", [im.value(a), im.value(b)])


def _addmm(im: _Importer, bias: Any, a: Any, b: Any) -> int:
    return im.build.add("add", [_matmul(im, a, b), im.value(bias)])


def _permute(im: _Importer, x: Any, order: Sequence[int]) -> int:
    rank = len(im.shape(x))
    return im.build.add("permute", [im.value(x)], order=tuple(o % rank for o in order))


def _transpose(im: _Importer, x: Any, a: int, b: int) -> int:
    order = list(range(len(im.shape(x))))
    order[a], order[b] = order[b], order[a]
    return _permute(im, x, order)


def _reshape(im: _Importer, x: Any, shape: Sequence[int]) -> int:
    old, new = im.shape(x), list(shape)
    if -1 in new:
        total = 1
        for s in old:
            total *= s
        rest = 1
        for s in new:
            rest *= s if s != -1 else 1
        new[new.index(-1)] = total // rest
    return im.value(x) if tuple(new) == old else im.build.add("reshape", [im.value(x)], shape=tuple(new))


def _unsqueeze(im: _Importer, x: Any, dim: int) -> int:
    shape = list(im.shape(x))
    shape.insert(dim % (len(shape) + 1), 1)
    return _reshape(im, x, shape)


def _squeeze(im: _Importer, x: Any, dims: Any) -> int:
    shape = im.shape(x)
    gone = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)}
    return _reshape(im, x, [s for d, s in enumerate(shape) if d not in gone or s != 1])


def _expand(im: _Importer, x: Any, shape: Sequence[int], implicit: bool = False) -> int:
    old = im.shape(x)
    lead = len(shape) - len(old)
    target = tuple(old[d - lead] if s == -1 else s for d, s in enumerate(shape))
    return im.value(x) if target == old else im.build.add("expand", [im.value(x)], shape=target)


def _sum(im: _Importer, x: Any, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> int:
    shape = im.shape(x)
    chosen = [d % len(shape) for d in (dims if dims else range(len(shape)))]
    value = im.value(x)
    for d in chosen:
        value = im.build.add("sum", [value], dim=d, width=1)
    if not keepdim:
        kept = tuple(s for d, s in enumerate(shape) if d not in chosen)
        value = im.build.add("reshape", [value], shape=kept)
    return value


def _mean(im: _Importer, x: Any, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> int:
    shape = im.shape(x)
    count = 1
    for d in dims if dims else range(len(shape)):
        count *= shape[d]
    return im.build.add("scale", [_sum(im, x, dims, keepdim)], value=1 / count)


def _convolution(
    im: _Importer,
    x: Any,
    w: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    extra: Any,
    groups: int,
) -> int:
    if len(im.shape(x)) != 4:
        raise UsageError(
            f"a convolution over {len(im.shape(x)) - 2} spatial dimensions has no form in the graph; known: 2"
        )
    attrs = {
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "groups": groups,
        "transposed": bool(transposed),
        "output_padding": tuple(extra),
    }
    inputs = [im.value(x), im.value(w)] + ([im.value(bias)] if bias is not None else [])
    return im.build.add("conv", inputs, **attrs)


def _batch_norm(
    im: _Importer, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> list[int]:
    """Inference only: y = (x - mean) * weight / sqrt(var + eps) + bias, per channel."""
    build, rank = im.build, len(im.shape(x))

    def column(v: Any) -> int:
        return _reshape(im, v, [1, -1] + [1] * (rank - 2))

    shifted = build.add("rsqrt", [build.add("shift", [im.value(var)], value=float(eps))])
    factor = shifted if weight is None else build.add("mul", [shifted, im.value(weight)])
    channels = im.shape(mean)[0]
    factor = build.add("reshape", [factor], shape=(1, channels, *[1] * (rank - 2)))
    out = build.add("mul", [build.add("sub", [im.value(x), column(mean)]), factor])
    if bias is not None:
        out = build.add("add", [out, column(bias)])
    return [out, out, out]


def _softmax(im: _Importer, x: Any, dim: int, half: bool = False) -> int:
    return im.build.add("softmax", [im.value(x)], dim=dim % len(im.shape(x)))


def _clamp(im: _Importer, x: Any, low: Any = None, high: Any = None) -> int:
    if low == 0 and high is None:
        return im.build.add("relu", [im.value(x)])
    if low is None or high is None:
        raise UsageError("clamp needs both ends here")
    return im.build.add("clamp", [im.value(x)], low=float(low), high=float(high))


def _gelu(im: _Importer, x: Any, approximate: str = "none") -> int:
    return im.build.add("gelu" if approximate == "none" else "gelu_tanh", [im.value(x)])


def _concat(im: _Importer, tensors: Sequence[Any], dim: int = 0) -> int:
    return im.build.add("concat", [im.value(t) for t in tensors], dim=dim % len(im.shape(tensors[0])))


def _max_pool(
    im: _Importer, x: Any, kernel: Any, stride: Any = (), padding: Any = (0, 0), dilation: Any = 1, ceil: bool = False
) -> list[int]:
    kernel = tuple(kernel) if len(kernel) == 2 else (kernel[0], kernel[0])
    stride, padding = tuple(stride) or kernel, tuple(padding)
    stride, padding = stride if len(stride) == 2 else stride * 2, padding if len(padding) == 2 else padding * 2
    if ceil or dilation not in (1, [1, 1], (1, 1)):
        raise UsageError("max pooling with ceil_mode or dilation has no form in the graph")
    return [im.build.add("max_pool", [im.value(x)], kernel=kernel, stride=stride, padding=padding)]


def _same(im: _Importer, x: Any, *_: Any, **__: Any) -> int:
    return im.value(x)


RULES: dict[str, Callable[..., Any]] = {
    **{
        op: _unary(op)
        for op in [
            "exp",
            "sqrt",
            "silu",
            "relu",
            "sigmoid",
            "tanh",
            "neg",
            "rsqrt",
            "reciprocal",
            "log",
            "abs",
            "sin",
            "cos",
        ]
    },
    "add": _binary("add"),
    "sub": _binary("sub"),
    "mul": _binary("mul"),
    "div": _binary("div"),
    "maximum": _binary("maximum"),
    "pow": _pow,
    "mm": _matmul,
    "bmm": _matmul,
    "matmul": _matmul,
    "addmm": _addmm,
    "permute": _permute,
    "t": lambda im, x: _transpose(im, x, 0, 1),
    "transpose": _transpose,
    "view": _reshape,
    "reshape": _reshape,
    "_unsafe_view": _reshape,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "sum": _sum,
    "mean": _mean,
    "convolution": _convolution,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_softmax": _softmax,
    "clamp": _clamp,
    "hardtanh": lambda im, x, low=-1.0, high=1.0: _clamp(im, x, low, high),
    "gelu": _gelu,
    "leaky_relu": lambda im, x, slope=0.01: im.build.add("leaky_relu", [im.value(x)], slope=float(slope)),
    "_prelu_kernel": lambda im, x, w: im.build.add("prelu", [im.value(x), _reshape(im, w, [-1])]),
    "cat": _concat,
    "max_pool2d_with_indices": _max_pool,
    "getitem": lambda im, x, i: im.values[x.name][i],
    "<built-in function getitem>": lambda im, x, i: im.values[x.name][i],
    "clone": _same,
    "alias": _same,
    "detach": _same,
    "contiguous": _same,
}
"""Core ATen operator (or overload) -> how it enters the graph."""
