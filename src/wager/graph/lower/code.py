"""Pieces of C++ text that all generators share: numbers, elementwise operators, strides."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from wager.errors import UsageError
from wager.native import build

UNARY_CODE = {
    "exp": "wg_exp({x})",
    "sqrt": "__builtin_sqrtf({x})",
    "square": "({x}) * ({x})",
    "silu": "wg_silu({x})",
    "gelu": "wg_gelu({x})",
    "gelu_tanh": "wg_gelu_tanh({x})",
    "relu": "wg_relu({x})",
    "sigmoid": "wg_sigmoid({x})",
    "tanh": "wg_tanh({x})",
    "neg": "-({x})",
    "scale": "({x}) * {value}f",
    "shift": "({x}) + {value}f",
    "clamp": "__builtin_fminf(__builtin_fmaxf({x}, {low}f), {high}f)",
    "leaky_relu": "(({x}) >= 0 ? ({x}) : ({x}) * {slope}f)",
    "rsqrt": "1.0f / __builtin_sqrtf({x})",
    "reciprocal": "1.0f / ({x})",
    "log": "__builtin_logf({x})",
    "abs": "__builtin_fabsf({x})",
    "sin": "__builtin_sinf({x})",
    "cos": "__builtin_cosf({x})",
}
BINARY_CODE = {
    "add": "({a}) + ({b})",
    "sub": "({a}) - ({b})",
    "mul": "({a}) * ({b})",
    "div": "({a}) / ({b})",
    "maximum": "__builtin_fmaxf({a}, {b})",
}


VECTOR_FORMS = frozenset(("exp", "square", "silu", "relu", "sigmoid", "neg", "scale", "shift", "reciprocal"))
"""Functions whose C++ text also works on whole AVX-512 vectors."""


def number(value: float) -> str:
    """A C++ float literal body that reads back exactly (the `f` suffix is added by the caller)."""
    text = repr(float(value))
    return text if "e" in text or "." in text else text + ".0"


def unary_code(op: str, x: str, attrs: dict) -> str:
    if op not in UNARY_CODE:
        raise UsageError(f"operator {op!r} has no C++ form")
    return "(" + UNARY_CODE[op].format(x=x, **{k: number(v) for k, v in attrs.items()}) + ")"


def epilogue_type(name: str, chain: Sequence[tuple[str, dict]]) -> str:
    """The C++ type that tells a product (gemm.h) to apply these functions, first to last, to every finished entry."""
    value = "x"
    for op, attrs in chain:
        value = unary_code(op, value, attrs)
    scalar = f"static inline float on(float x) {{ return {value}; }}"
    if not all(op in VECTOR_FORMS for op, _ in chain):
        return f"struct {name} {{ static constexpr bool active = true, vectors = false; {scalar} }};\n"
    vector = f"static inline vec on(vec x) {{ return {value}; }}"
    return f"struct {name} {{ static constexpr bool active = true, vectors = VECTOR == 16; {scalar}\n#if defined(__AVX512F__)\n{vector}\n#endif\n}};\n"


def strides(shape: Sequence[int]) -> list[int]:
    """Row-major."""
    out = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        out[d] = out[d + 1] * shape[d + 1]
    return out


def ordered_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions lie in memory in this order, the last one innermost."""
    out, step = [1] * len(shape), 1
    for d in reversed(order):
        out[d] = step
        step *= shape[d]
    return tuple(out)


def inner_last(rank: int, inner: int) -> tuple[int, ...]:
    """Row-major but for one dimension, which becomes the innermost."""
    return (*(d for d in range(rank) if d != inner), inner) if rank else ()


@cache
def panel_width() -> int:
    """Columns of a panel: two vectors of the processor that the generated code is compiled for."""
    return 32 if build.isa() == "avx512" else 16
