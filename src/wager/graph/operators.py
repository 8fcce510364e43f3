"""The operators of tensor programs: names, and the shape each one gives.

The same table serves every level: whole tensors at kernel level, tiles at block level. Elementwise operators broadcast like numpy.
Reductions keep the dimension: `sum` along `dim` leaves `width` entries (1 unless said), out[j] = sum over g of x[g*width + j].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wager.errors import UsageError

Shape = tuple[int, ...]

UNARY = frozenset(
    [
        "exp",
        "sqrt",
        "square",
        "silu",
        "gelu",
        "gelu_tanh",
        "relu",
        "sigmoid",
        "tanh",
        "neg",
        "scale",
        "shift",
        "clamp",
        "leaky_relu",
        "rsqrt",
        "reciprocal",
        "log",
        "abs",
        "sin",
        "cos",
    ]
)
BINARY = frozenset(["add", "sub", "mul", "div", "maximum"])
COMMUTATIVE = frozenset(("add", "mul", "maximum"))
ACCUMULATORS = frozenset(("accum", "accum_sum", "accum_rms", "accum_width"))


class ShapeError(UsageError):
    """The operands of an operator do not fit together."""


def broadcast(a: Shape, b: Shape) -> Shape:
    """The common shape of two operands. Raises ShapeError."""
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    for x, y in zip(a, b, strict=True):
        if x != y and 1 not in (x, y):
            raise ShapeError(f"shapes {a} and {b} do not broadcast")
    return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))


def matmul_shape(a: Shape, b: Shape) -> Shape:
    """[..., m, k] x [..., k, n]; leading dimensions broadcast."""
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
        raise ShapeError(f"matmul of {a} and {b}: the contracted dimensions differ")
    return (*broadcast(a[:-2], b[:-2]), a[-2], b[-1])


def reduced(shape: Shape, dim: int, width: int = 1) -> Shape:
    if not -len(shape) <= dim < len(shape):
        raise ShapeError(f"dimension {dim} of a tensor of shape {shape}")
    dim %= len(shape)
    if width < 1 or shape[dim] % width:
        raise ShapeError(f"a dimension of {shape[dim]} does not sum down to width {width}")
    return (*shape[:dim], width, *shape[dim + 1 :])


def conv_shape(x: Shape, w: Shape, attrs: Mapping[str, Any]) -> Shape:
    """NCHW input, OIHW weight (IOHW when transposed)."""
    stride, padding, dilation = attrs["stride"], attrs["padding"], attrs["dilation"]
    groups = attrs.get("groups", 1)
    if attrs.get("transposed"):
        extra = attrs.get("output_padding", (0,) * len(stride))
        size = tuple(
            (x[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (w[2 + i] - 1) + extra[i] + 1
            for i in range(len(stride))
        )
        if x[1] != w[0]:
            raise ShapeError(f"transposed convolution of {x[1]} channels with a weight of {w[0]}")
        return (x[0], w[1] * groups, *size)
    if x[1] != w[1] * groups:
        raise ShapeError(f"convolution of {x[1]} channels with a weight of {w[1]} in {groups} groups")
    size = tuple(
        (x[2 + i] + 2 * padding[i] - dilation[i] * (w[2 + i] - 1) - 1) // stride[i] + 1 for i in range(len(stride))
    )
    return (x[0], w[0], *size)


def _reshape(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    target = tuple(attrs["shape"])
    if math.prod(target) != math.prod(shapes[0]):
        raise ShapeError(f"{shapes[0]} does not reshape to {target}")
    return target


def _permute(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    order = attrs["order"]
    if sorted(order) != list(range(len(shapes[0]))):
        raise ShapeError(f"{order} is not a permutation of the dimensions of {shapes[0]}")
    return tuple(shapes[0][d] for d in order)


def _expand(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    return broadcast(shapes[0], tuple(attrs["shape"]))


def _pool(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    (n, c, h, w), k, s, p = shapes[0], attrs["kernel"], attrs["stride"], attrs["padding"]
    return (n, c, (h + 2 * p[0] - k[0]) // s[0] + 1, (w + 2 * p[1] - k[1]) // s[1] + 1)


def _concat(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    dim = attrs["dim"] % len(shapes[0])
    rest = {s[:dim] + s[dim + 1 :] for s in shapes}
    if len(rest) != 1:
        raise ShapeError(f"concat along {dim} of {list(shapes)}")
    return (*shapes[0][:dim], sum(s[dim] for s in shapes), *shapes[0][dim + 1 :])


def _pad(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    return tuple(s + low + high for s, (low, high) in zip(shapes[0], attrs["widths"], strict=True))


def _slice(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    d, size = attrs["dim"], max(0, -(-(attrs["end"] - attrs["start"]) // attrs["step"]))
    return (*shapes[0][:d], size, *shapes[0][d + 1 :])


def _unfold(shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    """Windows of `size` along `dim`, `step` apart; the place in the window is a new last dimension."""
    d, size = attrs["dim"], attrs["size"]
    if not 0 < size <= shapes[0][d]:
        raise ShapeError(f"windows of {size} along dimension {d} of {shapes[0]}")
    return (*shapes[0][:d], (shapes[0][d] - size) // attrs["step"] + 1, *shapes[0][d + 1 :], size)


SHAPES: dict[str, Callable[[Sequence[Shape], Mapping[str, Any]], Shape]] = {
    "matmul": lambda s, a: matmul_shape(s[0], s[1]),
    "sum": lambda s, a: reduced(s[0], a.get("dim", -1), a.get("width", 1)),
    "rms_norm": lambda s, a: s[0],
    "softmax": lambda s, a: s[0],
    "accum": lambda s, a: s[0],
    "accum_sum": lambda s, a: reduced(s[0], -1),
    "accum_rms": lambda s, a: reduced(s[0], -1),
    "accum_width": lambda s, a: reduced(s[0], -1, a["width"]),
    "conv": lambda s, a: conv_shape(s[0], s[1], a),
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "max_pool": _pool,
    "concat": _concat,
    "prelu": lambda s, a: s[0],
    "pad": _pad,
    "slice": _slice,
    "unfold": _unfold,
}


def infer(op: str, shapes: Sequence[Shape], attrs: Mapping[str, Any]) -> Shape:
    """The shape of `op`'s output. Raises ShapeError when the operands do not fit, UsageError for an unknown operator."""
    if op in UNARY:
        return shapes[0]
    if op in BINARY:
        return broadcast(shapes[0], shapes[1])
    if op in SHAPES:
        return SHAPES[op](shapes, attrs)
    raise UsageError(
        f"operator {op!r} is unknown to the graph; known: {', '.join(sorted(UNARY | BINARY | SHAPES.keys()))}"
    )
