"""Minimal filtering transforms (Winograd, Cook-Toom): exact matrices, and straight-line C++ for them.

y = A^T ((G g) * (B^T d)) computes m outputs of a window of r taps with m + r - 1 products. Derived by evaluating at rational points: the
product of two polynomials is interpolated from its values at the points and at infinity, and the transpose of that map is the filter. All
entries are fractions; B^T is scaled to integers, so that the input's transform is cheap and the weights' (done once) carries the divisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import numpy as np

Matrix = list[list[Fraction]]
POINTS = (Fraction(0), Fraction(1), Fraction(-1), Fraction(2), Fraction(-2))
SIZES = ((2, 2), (4, 2), (2, 3), (4, 3))
"""(outputs, taps) that are compiled in."""


@cache
def matrices(outputs: int, taps: int) -> tuple[Matrix, Matrix, Matrix]:
    """(A^T [m, a], G [a, r], B^T [a, a]) with a = m + r - 1."""
    finite = POINTS[: outputs + taps - 2]
    size = len(finite) + 1

    def evaluation(columns: int) -> Matrix:
        rows = [[p**j for j in range(columns)] for p in finite]
        return [*rows, [Fraction(int(j == columns - 1)) for j in range(columns)]]

    scale = []
    for i, p in enumerate(finite):
        value = Fraction(1)
        for j, q in enumerate(finite):
            value *= p - q if i != j else 1
        scale.append(value)
    scale.append(Fraction(1))
    inverse = _inverse(evaluation(size))
    data = [[inverse[j][i] * scale[i] for j in range(size)] for i in range(size)]
    weights = [[x / scale[i] for x in row] for i, row in enumerate(evaluation(taps))]
    result = evaluation(outputs)
    return [[result[j][i] for j in range(size)] for i in range(outputs)], weights, data


def _inverse(matrix: Matrix) -> Matrix:
    """Gauss-Jordan elimination over fractions."""
    size = len(matrix)
    rows = [[*row, *(Fraction(int(i == j)) for j in range(size))] for i, row in enumerate(matrix)]
    for c in range(size):
        pivot = next(r for r in range(c, size) if rows[r][c])
        rows[c], rows[pivot] = rows[pivot], rows[c]
        rows[c] = [x / rows[c][c] for x in rows[c]]
        for r in range(size):
            if r != c and rows[r][c]:
                rows[r] = [x - rows[r][c] * y for x, y in zip(rows[r], rows[c], strict=True)]
    return [row[size:] for row in rows]


def amplification(outputs: int, taps: int) -> float:
    """How much larger than (largest weight) x (largest input) a two-dimensional intermediate sum of one channel may become."""
    result, weights, data = matrices(outputs, taps)
    inner = [sum(map(abs, g)) * sum(map(abs, b)) for g, b in zip(weights, data, strict=True)]
    return float(max(sum(abs(a) * x for a, x in zip(row, inner, strict=True)) for row in result)) ** 2


def transform_weights(weight_rscf: np.ndarray, outputs: int) -> np.ndarray:
    """[a*a, c, f] in float64 from windows [r, r, c, f]."""
    g = np.array(matrices(outputs, weight_rscf.shape[0])[1], dtype=np.float64)
    done = np.einsum("ir,js,rscf->ijcf", g, g, weight_rscf.astype(np.float64), optimize=True)
    return done.reshape(-1, *done.shape[2:])


def source() -> str:
    """The Transform<M, R> templates of every size, and the dispatch over them."""
    parts = ["template <int M, int R> struct Transform;"]
    for outputs, taps in SIZES:
        result, _, data = matrices(outputs, taps)
        parts.append(
            f"template <> struct Transform<{outputs}, {taps}> {{\n"
            f"    static inline void input(const vec* d, vec* y) {{\n{_body(data)}    }}\n"
            f"    static inline void output(const vec* d, vec* y) {{\n{_body(result)}    }}\n}};"
        )
    return (
        "\n".join(parts)
        + "\nstruct Winograd;\nstatic void wg_dispatch(const Winograd& w, const float* in, float* out);\n"
    )


def dispatch() -> str:
    cases = "\n".join(
        f"    if (w.tile == {m} && w.window == {r}) return wg_filter<{m}, {r}>(w, in, out);" for m, r in SIZES
    )
    return f"static void wg_dispatch(const Winograd& w, const float* in, float* out) {{\n{cases}\n}}\n"


def _body(matrix: Matrix) -> str:
    return "".join(f"        y[{i}] = {_row(row)};\n" for i, row in enumerate(matrix))


def _row(row: Sequence[Fraction]) -> str:
    text = ""
    for j, x in enumerate(row):
        if not x:
            continue
        size = "" if abs(x) == 1 else f" * {float(abs(x))!r}f"
        text += f"{'-' if x < 0 else '+'} d[{j}]{size} "
    return text.strip().removeprefix("+ ") or "vec{}"
