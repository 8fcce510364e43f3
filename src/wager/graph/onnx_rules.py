"""How ONNX operators enter the graph: one rule each, in one table. Meaning: ONNX operator reference, operator sets 13 and later."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from wager.errors import UsageError

if TYPE_CHECKING:
    from wager.graph.onnx import Importer


def _unary(op: str) -> Callable[..., int]:
    return lambda im, x: im.build.add(op, [im.value(x)])


def _binary(op: str, numbers: str) -> Callable[..., Any]:
    """`numbers`: the operator for a constant second operand, with its sign or inverse taken by the caller."""

    def rule(im: Importer, a: str, b: str) -> Any:
        if a in im.known and b in im.known:
            return getattr(np, {"add": "add", "sub": "subtract", "mul": "multiply", "div": "divide"}[op])(
                im.known[a], im.known[b]
            )
        number = (
            im.known[b] if b in im.known and im.known[b].size == 1 and im.known[b].ndim <= len(im.shape(a)) else None
        )
        if number is not None:
            x = float(number.reshape(-1)[0])
            x = {"add": x, "sub": -x, "mul": x, "div": 1 / x if x else math.inf}[op]
            if math.isfinite(x):
                return im.build.add(numbers, [im.value(a)], value=x)
        return im.build.add(op, [im.value(a), im.value(b)])

    return rule


def _many(op: str) -> Callable[..., int]:
    def rule(im: Importer, *names: str) -> int:
        value = im.value(names[0])
        for name in names[1:]:
            value = im.build.add(op, [value, im.value(name)])
        return value

    return rule


def _pow(im: Importer, x: str, exponent: str) -> int:
    known = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}
    power = float(im.known[exponent].reshape(-1)[0]) if exponent in im.known and im.known[exponent].size == 1 else None
    if power not in known:
        raise UsageError(f"a power of {power if power is not None else exponent} has no form; known: {sorted(known)}")
    return im.build.add(known[power], [im.value(x)])


def _gemm(im: Importer, a: str, b: str, c: str = "") -> int:
    def side(name: str, flipped: bool) -> int:
        return im.build.add("permute", [im.value(name)], order=(1, 0)) if flipped else im.value(name)

    def scaled(value: int, by: float) -> int:
        return value if by == 1.0 else im.build.add("scale", [value], value=float(by))

    out = im.build.add("matmul", [side(a, im.attr("transA", 0)), side(b, im.attr("transB", 0))])
    out = scaled(out, im.attr("alpha", 1.0))
    return im.build.add("add", [out, scaled(im.value(c), im.attr("beta", 1.0))]) if c else out


def _matmul(im: Importer, a: str, b: str) -> int:
    if len(im.shape(a)) < 2 or len(im.shape(b)) < 2:
        raise UsageError(f"a product of shapes {im.shape(a)} and {im.shape(b)}; both need two dimensions")
    return im.build.add("matmul", [im.value(a), im.value(b)])


def _pads(im: Importer, spatial: int) -> tuple[int, ...]:
    pads = im.attr("pads", [0] * 2 * spatial)
    if im.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UsageError(f"auto_pad {im.attr('auto_pad')} has no form; export with explicit pads")
    if list(pads[:spatial]) != list(pads[spatial:]):
        raise UsageError(f"pads {list(pads)} differ at the two ends")
    return tuple(pads[:spatial])


def _conv(transposed: bool) -> Callable[..., int]:
    def rule(im: Importer, x: str, w: str, bias: str = "") -> int:
        if len(im.shape(x)) != 4:
            raise UsageError(f"a convolution over {len(im.shape(x)) - 2} spatial dimensions has no form; known: 2")
        if im.attr("output_shape") is not None:
            raise UsageError("output_shape has no form; export with output_padding")
        attrs = {
            "stride": tuple(im.attr("strides", (1, 1))),
            "padding": _pads(im, 2),
            "dilation": tuple(im.attr("dilations", (1, 1))),
            "groups": im.attr("group", 1),
            "transposed": transposed,
            "output_padding": tuple(im.attr("output_padding", (0, 0))),
        }
        return im.build.add("conv", [im.value(n) for n in (x, w, bias) if n], **attrs)

    return rule


def _batch_norm(im: Importer, x: str, scale: str, bias: str, mean: str, var: str) -> int:
    if im.attr("training_mode", 0):
        raise UsageError("training_mode has no form; export in eval mode")
    build, rank = im.build, len(im.shape(x))
    column = lambda value: im.reshape(value, (1, build.nodes[value].shape[0], *[1] * (rank - 2)))
    root = build.add("rsqrt", [build.add("shift", [im.value(var)], value=float(im.attr("epsilon", 1e-5)))])
    factor = build.add("mul", [root, im.value(scale)])
    centred = build.add("sub", [im.value(x), column(im.value(mean))])
    return build.add("add", [build.add("mul", [centred, column(factor)]), column(im.value(bias))])


def _softmax(im: Importer, x: str) -> int:
    return im.build.add("softmax", [im.value(x)], dim=im.attr("axis", -1) % len(im.shape(x)))


def _reduce(mean: bool) -> Callable[..., int]:
    def rule(im: Importer, x: str, axes: str = "") -> int:
        shape = im.shape(x)
        given = im.steer(axes, "axes")
        if not given and im.attr("noop_with_empty_axes", 0):
            return im.value(x)
        chosen = sorted({a % len(shape) for a in (given or range(len(shape)))})
        value = im.value(x)
        for d in chosen:
            value = im.build.add("sum", [value], dim=d, width=1)
        if mean:
            value = im.build.add("scale", [value], value=1 / math.prod(shape[d] for d in chosen))
        if im.attr("keepdims", 1):
            return value
        return im.reshape(value, [s for d, s in enumerate(shape) if d not in chosen])

    return rule


def _global_average(im: Importer, x: str) -> int:
    shape, value = im.shape(x), im.value(x)
    for d in range(2, len(shape)):
        value = im.build.add("sum", [value], dim=d, width=1)
    return im.build.add("scale", [value], value=1 / math.prod(shape[2:]))


def _reshape(im: Importer, x: str, target: str) -> Any:
    new = im.steer(target) or []
    if x in im.known:
        return im.known[x].reshape(new)
    old = im.shape(x)
    if not im.attr("allowzero", 0):
        new = [old[d] if s == 0 else s for d, s in enumerate(new)]
    if -1 in new:
        new[new.index(-1)] = math.prod(old) // max(1, math.prod(s for s in new if s != -1))
    return im.reshape(im.value(x), new)


def _flatten(im: Importer, x: str) -> int:
    shape, axis = im.shape(x), im.attr("axis", 1)
    axis = axis % (len(shape) + 1) if axis < 0 else axis
    return im.reshape(im.value(x), (math.prod(shape[:axis]), math.prod(shape[axis:])))


def _transpose(im: Importer, x: str) -> Any:
    if x in im.known:
        return np.ascontiguousarray(im.known[x].transpose(im.attr("perm")))
    order = im.attr("perm", list(range(len(im.shape(x))))[::-1])
    return im.build.add("permute", [im.value(x)], order=tuple(order))


def _unsqueeze(im: Importer, x: str, axes: str = "") -> Any:
    chosen = im.steer(axes, "axes") or []
    if x in im.known:
        return np.expand_dims(im.known[x], tuple(chosen))
    shape = list(im.shape(x))
    rank = len(shape) + len(chosen)
    for d in sorted(c % rank for c in chosen):
        shape.insert(d, 1)
    return im.reshape(im.value(x), shape)


def _squeeze(im: Importer, x: str, axes: str = "") -> int:
    shape = im.shape(x)
    chosen = im.steer(axes, "axes")
    gone = {c % len(shape) for c in chosen} if chosen is not None else {d for d, s in enumerate(shape) if s == 1}
    return im.reshape(im.value(x), [s for d, s in enumerate(shape) if d not in gone])


def _expand(im: Importer, x: str, target: str) -> int:
    shape = tuple(im.steer(target) or ())
    old = im.shape(x)
    whole = np.broadcast_shapes(old, shape)
    return im.value(x) if whole == old else im.build.add("expand", [im.value(x)], shape=tuple(int(s) for s in whole))


def _clip(im: Importer, x: str, low: str = "", high: str = "") -> int:
    ends = [float(im.known[n].reshape(-1)[0]) if n in im.known else None for n in (low, high)]
    if (low and ends[0] is None) or (high and ends[1] is None):
        raise UsageError("bounds that are computed at run time have no form")
    if ends == [0.0, None]:
        return im.build.add("relu", [im.value(x)])
    if None in ends:
        raise UsageError("clip needs both ends here")
    return im.build.add("clamp", [im.value(x)], low=ends[0], high=ends[1])


def _prelu(im: Importer, x: str, slope: str) -> int:
    value = im.value(slope)
    count, channels = math.prod(im.build.nodes[value].shape), im.shape(x)[1]
    if count not in (1, channels):
        raise UsageError(f"a slope of shape {im.build.nodes[value].shape}; known: one number or one for each channel")
    return im.build.add("prelu", [im.value(x), im.reshape(value, (count,))])


def _max_pool(im: Importer, x: str) -> int:
    kernel = tuple(im.attr("kernel_shape"))
    if len(kernel) != 2 or im.attr("ceil_mode", 0) or set(im.attr("dilations", (1, 1))) != {1}:
        raise UsageError("max pooling with ceil_mode, dilations or other than two dimensions has no form")
    return im.build.add(
        "max_pool", [im.value(x)], kernel=kernel, stride=tuple(im.attr("strides", (1, 1))), padding=_pads(im, 2)
    )


def _cast(im: Importer, x: str) -> Any:
    if x in im.known:
        return im.known[x].astype(im.onnx.helper.tensor_dtype_to_np_dtype(im.attr("to")))
    if im.attr("to") != im.onnx.TensorProto.FLOAT:
        raise UsageError(f"a cast to {im.onnx.TensorProto.DataType.Name(im.attr('to'))}; programs are float32")
    return im.value(x)


def _constant(im: Importer) -> np.ndarray:
    for name, make in (
        ("value", im.onnx.numpy_helper.to_array),
        ("value_float", np.float32),
        ("value_int", np.int64),
        ("value_floats", lambda v: np.array(v, np.float32)),
        ("value_ints", lambda v: np.array(v, np.int64)),
    ):
        if (found := im.attr(name)) is not None:
            return np.asarray(make(found))
    raise UsageError("a constant without a numeric value")


def _rms_norm(im: Importer, x: str, scale: str) -> int:
    """Over the trailing dimensions from `axis`; epsilon is kept as in the model."""
    build, shape = im.build, im.shape(x)
    value, axis = im.value(x), im.attr("axis", -1) % len(im.shape(x))
    if axis != len(shape) - 1:
        raise UsageError(f"a norm from axis {axis}; known: the last dimension")
    mean = build.add("scale", [build.add("sum", [build.add("square", [value])], dim=-1, width=1)], value=1 / shape[-1])
    root = build.add("rsqrt", [build.add("shift", [mean], value=float(im.attr("epsilon", 1e-5)))])
    return build.add("mul", [build.add("mul", [value, root]), im.value(scale)])


def _same(im: Importer, x: str, *_: str) -> Any:
    return im.known[x] if x in im.known else im.value(x)


RULES: dict[str, Callable[..., Any]] = {
    **{
        name: _unary(op)
        for name, op in {
            "Exp": "exp",
            "Sqrt": "sqrt",
            "Relu": "relu",
            "Sigmoid": "sigmoid",
            "Tanh": "tanh",
            "Neg": "neg",
            "Reciprocal": "reciprocal",
            "Log": "log",
            "Abs": "abs",
            "Sin": "sin",
            "Cos": "cos",
            "Swish": "silu",
        }.items()
    },  # fmt: skip
    "Add": _binary("add", "shift"),
    "Sub": _binary("sub", "shift"),
    "Mul": _binary("mul", "scale"),
    "Div": _binary("div", "scale"),
    "Max": _many("maximum"),
    "Sum": _many("add"),
    "Pow": _pow,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv(False),
    "ConvTranspose": _conv(True),
    "BatchNormalization": _batch_norm,
    "RMSNormalization": _rms_norm,
    "Softmax": _softmax,
    "Gelu": lambda im, x: im.build.add("gelu_tanh" if im.attr("approximate") == "tanh" else "gelu", [im.value(x)]),
    "LeakyRelu": lambda im, x: im.build.add("leaky_relu", [im.value(x)], slope=float(im.attr("alpha", 0.01))),
    "PRelu": _prelu,
    "Clip": _clip,
    "ReduceSum": _reduce(False),
    "ReduceMean": _reduce(True),
    "GlobalAveragePool": _global_average,
    "MaxPool": _max_pool,
    "Concat": lambda im, *xs: im.build.add(
        "concat", [im.value(x) for x in xs], dim=im.attr("axis") % len(im.shape(xs[0]))
    ),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "Cast": _cast,
    "Constant": _constant,
    "Identity": _same,
    "Dropout": _same,
}
"""ONNX operator -> how it enters the graph."""
