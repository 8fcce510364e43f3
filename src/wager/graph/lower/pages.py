"""Memory for weights that are packed once and read at every call: large pages, so that streaming them costs few address translations."""

from __future__ import annotations

import numpy as np

from wager.native.memory import HUGE_PAGE, huge_region

LINE = 64


def resident(x: np.ndarray) -> np.ndarray:
    """A contiguous copy that starts on a cache line, and on large pages where it fills half of one and the system has them."""
    large = x.nbytes >= HUGE_PAGE // 2
    step = HUGE_PAGE if large else LINE
    if large:
        raw = np.frombuffer(huge_region(-(-x.nbytes // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE), np.uint8)
    else:
        raw = np.empty(x.nbytes + LINE, np.uint8)
    start = -raw.ctypes.data % step
    out = raw[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out
