"""Large memory: on huge pages where the system grants them, and kept by the process when it is freed."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEEP_BYTES = 1 << 30
HUGE_PAGE = 1 << 21
LARGEST_FROM_HEAP_BYTES = 32 << 20  # the most that glibc allows


def keep_freed_memory() -> bool:
    """Let malloc keep up to 1 GiB that was freed, instead of unmapping it at once.

    A step's activations are freed and allocated anew 100 times a second; without this the system clears their pages every time. Only
    glibc has the knob: False where it was not turned.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST_FROM_HEAP_BYTES) and mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES))


def give_back_freed_memory() -> None:
    """Return the pages of freed blocks to the system, also between blocks in use; for once after much was freed. Only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def huge_zeros(size: int) -> Tensor:
    """Zero bytes, committed when first touched, on huge pages where the system grants them: fewer address translations in a stream."""
    if size < 2 * HUGE_PAGE:
        return torch.zeros(size, dtype=torch.uint8)
    return torch.frombuffer(huge_region(size), dtype=torch.uint8)


def huge_region(size: int) -> mmap.mmap:
    """`size` fresh bytes for which the system is asked to use huge pages; where it has none they are read a little slower."""
    # private: Python's default is shared memory, whose huge pages have a switch of their own that is usually off
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(memory, "madvise") and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
