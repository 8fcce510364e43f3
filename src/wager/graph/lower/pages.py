"""Memory for weights that are packed once and read at every call: large pages, so that streaming them costs few address translations."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

LARGE = 2 << 20  # bytes of a large page on x86 and arm
LINE = 64


def resident(x: np.ndarray) -> np.ndarray:
    """A contiguous copy that starts on a cache line, and on large pages where it fills half of one and the system has them."""
    large = x.nbytes >= LARGE // 2 and hasattr(mmap, "MADV_HUGEPAGE")
    step = LARGE if large else LINE
    if large:
        region = mmap.mmap(-1, -(-x.nbytes // LARGE) * LARGE + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without large pages: the same memory, read a little slower
            region.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(region, np.uint8)
    else:
        raw = np.empty(x.nbytes + LINE, np.uint8)
    start = -raw.ctypes.data % step
    out = raw[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out
