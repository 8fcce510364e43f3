"""The C++ loops behind the operators, compiled once with the system compiler. Arrays are C-contiguous; sizes ride along as int64."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from wager.native import build

_limit: ContextVar[int | None] = ContextVar("threads", default=None)

SMALL_BYTES = 400_000
CONVERT: dict[str, Any] = {
    "int32": lambda v: ctypes.c_int(int(v)),
    "float32": lambda v: ctypes.c_float(float(v)),
    "float": ctypes.c_double,
    "float64": ctypes.c_double,
    "int": ctypes.c_int64,
    "int64": ctypes.c_int64,
}

SOURCES = tuple(sorted((Path(__file__).parent / "cpp").glob("*.cpp")))


@cache
def library() -> ctypes.CDLL:
    """The compiled operators. Raises BuildError."""
    lib = build.load("wager_detect", SOURCES)
    lib.wager_knn_decide.restype = lib.wager_knn_scan.restype = ctypes.c_int64
    return lib


def threads() -> int:
    """The limit in force, else OMP_NUM_THREADS if set, else the processors this process may use."""
    if (limit := _limit.get()) is not None:
        return limit
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else len(os.sched_getaffinity(0))


@contextmanager
def limited(n_jobs: int | None) -> Iterator[None]:
    """Use n_jobs threads inside (None: no limit of one's own; negative: counted from all processors, -1 being all)."""
    if n_jobs is None:
        yield
        return
    every = len(os.sched_getaffinity(0))
    token = _limit.set(max(1, n_jobs if n_jobs > 0 else every + 1 + n_jobs))
    try:
        yield
    finally:
        _limit.reset(token)


def call(name: str, *arguments: Any, n_threads: int | None = None):
    """Call a function: arrays (or None) go as pointers, ints as int64 (or int when numpy.int32), floats as double (or float when numpy.float32)."""
    converted = [convert(a) for a in arguments]
    if n_threads is None:
        small = sum(a.nbytes for a in arguments if isinstance(a, np.ndarray)) < SMALL_BYTES
        n_threads = 1 if small else threads()  # waking threads costs more than such work
    return getattr(library(), name)(*converted, ctypes.c_int(n_threads))


def convert(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, np.ndarray):
        if not argument.flags.c_contiguous:
            raise ValueError("native operators take C-contiguous arrays")
        return ctypes.c_void_p(argument.ctypes.data)
    made = CONVERT.get(type(argument).__name__)
    if made is not None:
        return made(argument)
    raise TypeError(f"cannot pass {type(argument).__name__} to a native operator")
