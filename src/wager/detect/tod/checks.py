"""What may be given to a detector: finite, dense, two-dimensional numbers. Errors say what was wrong and are also ValueErrors."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from wager.errors import UsageError


class DataError(UsageError, ValueError):
    """Data or a parameter that a detector cannot take; a ValueError for code written against scikit-learn."""


class NotFittedError(UsageError, ValueError, AttributeError):
    """A detector was asked before it was fitted."""


def check_rows(x: Any, *, at_least: int = 1, features: int | None = None) -> np.ndarray:
    """The rows as a C-contiguous float64 array. Raises DataError."""
    if sparse.issparse(x):
        raise DataError("X is a sparse matrix; these detectors need dense rows: pass X.toarray()")
    try:
        array = np.asarray(x)
        if array.dtype.kind not in "fiub":
            array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"X does not hold numbers ({error}); encode text and categories as numbers first") from None
    if array.ndim != 2:
        raise DataError(
            f"X has shape {array.shape}; expected rows and columns: one feature is X.reshape(-1, 1), one row X.reshape(1, -1)"
        )
    if array.shape[1] == 0:
        raise DataError(f"X has shape {array.shape}, no features; give at least one column")
    array = np.ascontiguousarray(array, dtype=np.float64)
    low, high = (array.min(), array.max()) if len(array) else (0.0, 0.0)
    if not (np.isfinite(low) and np.isfinite(high)):  # NaN passes through both
        row, column = np.argwhere(~np.isfinite(array))[0]
        kind = "NaN" if np.isnan(array[row, column]) else "infinity"
        raise DataError(
            f"X contains {kind} (first at row {row}, column {column}); impute or drop such rows before fitting"
        )
    if len(array) < at_least:
        raise DataError(f"X has {len(array)} row(s); at least {at_least} are needed")
    if features is not None and array.shape[1] != features:
        raise DataError(f"X has {array.shape[1]} features, but the detector was fitted with {features}")
    if max(high, -low) > 1e150:
        raise DataError("X holds values beyond 1e150, whose squared distances overflow float64; rescale the features")
    return array


def check_between(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> Any:
    """A parameter in [low, high]. Raises DataError."""
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "an integer" if whole else "a number"
        raise DataError(f"{name} is {value!r}; it must be {kind} from {low} to {high}")
    return value


def check_choice(name: str, value: Any, choices: tuple) -> Any:
    if value not in choices:
        raise DataError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}")
    return value
