"""Large memory: on huge pages where the system grants them, and kept by the process when it is freed."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEEP_BYTES = 1 << 30
HUGE_PAGE = 1 << 21
CACHE_LINE = 64
REGION_BYTES = 64 << 20
SMALLEST_SHARED_BYTES = 64 << 10
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
    """Zero bytes, committed when first touched, on huge pages where the system grants them: fewer address translations in a stream.

    What is smaller than a few huge pages shares a region with its neighbours, which is given back when the last of them is gone.
    """
    if size < SMALLEST_SHARED_BYTES:
        return torch.zeros(size, dtype=torch.uint8)
    return _region(size) if size > REGION_BYTES // 4 else _shared.take(size)


class _Shared:
    """Hands out pieces of one region after another; no piece is used twice, so all are zero."""

    def __init__(self):
        self.lock, self.region, self.used = threading.Lock(), torch.empty(0, dtype=torch.uint8), 0

    def take(self, size: int) -> Tensor:
        with self.lock:
            if self.used + size > len(self.region):
                self.region, self.used = _region(REGION_BYTES), 0
            piece = self.region[self.used : self.used + size]
            self.used += -(-size // CACHE_LINE) * CACHE_LINE
            return piece


_shared = _Shared()


def _region(size: int) -> Tensor:
    """`size` fresh bytes that begin with a huge page."""
    # private: Python's default is shared memory, whose huge pages have a switch of their own that is usually off
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(memory, "madvise") and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE_PAGE
    return whole[first : first + size]
