"""Products with a band of a matrix as native code: row m meets the rows m + offset + d of the other side, d in [0, diagonals).

`products`: out[n, m, d] = sum over f of left[n, m, f] * right[n, m + offset + d, f]. `sums`: out[n, m, f] = sum over d of
left[n, m, d] * right[n, m + offset + d, f]. Where rows start is given by tables, so that a dilated band (rows of one residue class are
neighbours), a permuted result and rows outside the tensor cost no copy: a row at -1 is zero. fp32; the C++ side is banded.h.

`products` has two forms: lanes over the features (narrow bands), and lanes over the right rows, which are transposed in panels (wide ones).
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.errors import UsageError
from wager.graph.lower.library import POINTER, compile_source

MAX_DIAGONALS = 4096
KINDS = {"products": ("panels", "products"), "sums": ("sums",)}
"""The native forms of each product, by the name of the C++ function."""


@dataclass(frozen=True)
class Rows:
    """Where each row [batch, rows] starts in a tensor, in elements; -1 for a row of zeros."""

    starts: np.ndarray

    @staticmethod
    def contiguous(batch: int, rows: int, width: int) -> Rows:
        return Rows((np.arange(batch * rows) * width).reshape(batch, rows))


class _Banded(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("batch", "length", "others", "features", "diagonals", "offset")),
        *((n, POINTER) for n in ("left", "right", "out")),
    ]


@cache
def library(march: str = "native") -> Any:
    """The compiled kernels, for the compiler's -march."""
    text = f"#include <omp.h>\nconstexpr long MAX_BAND = {MAX_DIAGONALS + 8};\n"
    loaded = compile_source(
        [text, (Path(__file__).parent / "banded.h").read_text()], "wager_banded", products=False, march=march
    )
    for name in sum(KINDS.values(), ()):
        function = getattr(loaded, f"wager_band_{name}")
        function.argtypes, function.restype = (*[POINTER] * 6, ctypes.c_long), None
        size = getattr(loaded, f"wager_band_{name}_scratch")
        size.argtypes, size.restype = (POINTER,), ctypes.c_long
    return loaded


NARROW_DIAGONALS = 7
"""Bands of fewer diagonals leave most of a panel's lanes unused; at 7 both forms take as long (512 features) or panels less (64)."""


def best_form(kind: str, diagonals: int) -> str:
    """Which native form suits a band."""
    return KINDS[kind][-1] if diagonals < NARROW_DIAGONALS else KINDS[kind][0]


class BandedProduct:
    """One of the two products over fixed tables. Call with the tensors that `left` and `right` point into (contiguous float32)."""

    def __init__(
        self,
        kind: str,
        left: Rows,
        right: Rows,
        out: Rows,
        features: int,
        diagonals: int,
        offset: int,
        shape: tuple[int, ...],
        form: str | None = None,
        march: str = "native",
    ):
        """`shape` of the result, which `out` points into; `form` is one of KINDS, else what suits the sizes; `march` is the compiler's.

        Raises UsageError for a band wider than the kernel's tables.
        """
        if kind not in KINDS:
            raise UsageError(f"banded product {kind!r} is unknown; known: {', '.join(KINDS)}")
        if diagonals > MAX_DIAGONALS:
            raise UsageError(f"a band of {diagonals} diagonals; at most {MAX_DIAGONALS} are supported")
        self.form = form or best_form(kind, diagonals)
        self.kind, self.shape, self.threads = kind, shape, torch.get_num_threads()
        self.tables = [np.ascontiguousarray(r.starts, np.int64) for r in (left, right, out)]
        batch, length = left.starts.shape
        sizes = (batch, length, right.starts.shape[1], features, diagonals, offset)
        self.structure = _Banded(*sizes, *(t.ctypes.data for t in self.tables))
        native = library(march)
        self.function = getattr(native, f"wager_band_{self.form}")
        self.zeros = torch.zeros(max(features, diagonals) + 32)
        per_thread = getattr(native, f"wager_band_{self.form}_scratch")(ctypes.addressof(self.structure))
        self.scratch, self.lock = torch.empty(self.threads * per_thread), threading.Lock()

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = left.contiguous(), right.contiguous()
        out = torch.empty(self.shape)
        with self.lock:  # one scratch
            self.function(
                ctypes.addressof(self.structure), left.data_ptr(), right.data_ptr(), out.data_ptr(), self.zeros.data_ptr(),
                self.scratch.data_ptr(), self.threads,
            )  # fmt: skip
        return out
