"""How core ATen operators enter the graph: one rule each, in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from wager.errors import UsageError

if TYPE_CHECKING:
    from wager.graph.trace import Importer


def _unary(op: str) -> Callable[..., int]:
    return lambda im, x: im.build.add(op, [im.value(x)])


def _binary(op: str) -> Callable[..., int]:
    def rule(im: Importer, a: Any, b: Any, alpha: float = 1) -> int:
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


def _pow(im: Importer, x: Any, exponent: Any) -> int:
    known = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
    if exponent not in known:
        raise UsageError(f"a power of {exponent} has no form in the graph; known: {sorted(known)}")
    return im.build.add(known[exponent], [im.value(x)])


def _matmul(im: Importer, a: Any, b: Any) -> int:
    return im.build.add("matmul", [im.value(a), im.value(b)])


def _addmm(im: Importer, bias: Any, a: Any, b: Any) -> int:
    return im.build.add("add", [_matmul(im, a, b), im.value(bias)])


def _permute(im: Importer, x: Any, order: Sequence[int]) -> int:
    rank = len(im.shape(x))
    return im.build.add("permute", [im.value(x)], order=tuple(o % rank for o in order))


def _transpose(im: Importer, x: Any, a: int, b: int) -> int:
    order = list(range(len(im.shape(x))))
    order[a], order[b] = order[b], order[a]
    return _permute(im, x, order)


def _reshape(im: Importer, x: Any, shape: Sequence[int]) -> int:
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


def _unsqueeze(im: Importer, x: Any, dim: int) -> int:
    shape = list(im.shape(x))
    shape.insert(dim % (len(shape) + 1), 1)
    return _reshape(im, x, shape)


def _squeeze(im: Importer, x: Any, dims: Any) -> int:
    shape = im.shape(x)
    gone = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)}
    return _reshape(im, x, [s for d, s in enumerate(shape) if d not in gone or s != 1])


def _expand(im: Importer, x: Any, shape: Sequence[int], implicit: bool = False) -> int:
    old = im.shape(x)
    lead = len(shape) - len(old)
    target = tuple(old[d - lead] if s == -1 else s for d, s in enumerate(shape))
    return im.value(x) if target == old else im.build.add("expand", [im.value(x)], shape=target)


def _sum(im: Importer, x: Any, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> int:
    shape = im.shape(x)
    chosen = [d % len(shape) for d in (dims if dims else range(len(shape)))]
    value = im.value(x)
    for d in chosen:
        value = im.build.add("sum", [value], dim=d, width=1)
    if not keepdim:
        kept = tuple(s for d, s in enumerate(shape) if d not in chosen)
        value = im.build.add("reshape", [value], shape=kept)
    return value


def _mean(im: Importer, x: Any, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> int:
    shape = im.shape(x)
    count = 1
    for d in dims if dims else range(len(shape)):
        count *= shape[d]
    return im.build.add("scale", [_sum(im, x, dims, keepdim)], value=1 / count)


def _rms_norm(im: Importer, x: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> int:
    """Over the last dimension. With `eps` 0 it stays one operator, which searches know."""
    if len(shape) != 1:
        raise UsageError(f"rms_norm over {len(shape)} dimensions has no form in the graph; normalise the last alone")
    build, source = im.build, im.value(x)
    if eps == 0:
        out = build.add("rms_norm", [source])
    else:
        square = build.add("square", [source])
        mean = build.add("scale", [build.add("sum", [square], dim=-1, width=1)], value=1 / im.shape(x)[-1])
        at = build.add("shift", [mean], value=2.0**-23 if eps is None else float(eps))
        out = build.add("mul", [source, build.add("rsqrt", [at])])
    return out if weight is None else build.add("mul", [out, im.value(weight)])


def _convolution(
    im: Importer,
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
    im: Importer, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
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


def _softmax(im: Importer, x: Any, dim: int, half: bool = False) -> int:
    return im.build.add("softmax", [im.value(x)], dim=dim % len(im.shape(x)))


def _clamp(im: Importer, x: Any, low: Any = None, high: Any = None) -> int:
    if low == 0 and high is None:
        return im.build.add("relu", [im.value(x)])
    if low is None or high is None:
        raise UsageError("clamp needs both ends here")
    return im.build.add("clamp", [im.value(x)], low=float(low), high=float(high))


def _gelu(im: Importer, x: Any, approximate: str = "none") -> int:
    return im.build.add("gelu" if approximate == "none" else "gelu_tanh", [im.value(x)])


def _concat(im: Importer, tensors: Sequence[Any], dim: int = 0) -> int:
    return im.build.add("concat", [im.value(t) for t in tensors], dim=dim % len(im.shape(tensors[0])))


def _max_pool(
    im: Importer, x: Any, kernel: Any, stride: Any = (), padding: Any = (0, 0), dilation: Any = 1, ceil: bool = False
) -> list[int]:
    kernel = tuple(kernel) if len(kernel) == 2 else (kernel[0], kernel[0])
    stride, padding = tuple(stride) or kernel, tuple(padding)
    stride, padding = stride if len(stride) == 2 else stride * 2, padding if len(padding) == 2 else padding * 2
    if ceil or dilation not in (1, [1, 1], (1, 1)):
        raise UsageError("max pooling with ceil_mode or dilation has no form in the graph")
    return [im.build.add("max_pool", [im.value(x)], kernel=kernel, stride=stride, padding=padding)]


def _pad(im: Importer, x: Any, widths: Sequence[int], value: float = 0.0) -> int:
    if value or any(w < 0 for w in widths):
        raise UsageError(
            f"padding with {value} by {list(widths)} has no form in the graph; known: zeros around the tensor"
        )
    rank = len(im.shape(x))
    both = [(0, 0)] * (rank - len(widths) // 2) + [(widths[i], widths[i + 1]) for i in range(len(widths) - 2, -1, -2)]
    return im.build.add("pad", [im.value(x)], widths=tuple(both))


def _slice(im: Importer, x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> int:
    shape = im.shape(x)
    low, high, _ = slice(start, end).indices(shape[dim])
    if (low, high, step) == (0, shape[dim], 1):
        return im.value(x)
    return im.build.add("slice", [im.value(x)], dim=dim % len(shape), start=low, end=max(low, high), step=step)


def _unfold(im: Importer, x: Any, dim: int, size: int, step: int) -> int:
    return im.build.add("unfold", [im.value(x)], dim=dim % len(im.shape(x)), size=size, step=step)


def _same(im: Importer, x: Any, *_: Any, **__: Any) -> int:
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
    "rms_norm": _rms_norm,
    "_fused_rms_norm": _rms_norm,
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
    "constant_pad_nd": _pad,
    "slice": _slice,
    "unfold": _unfold,
    "clone": _same,
    "alias": _same,
    "detach": _same,
    "contiguous": _same,
}
"""Core ATen operator (or overload) -> how it enters the graph."""
