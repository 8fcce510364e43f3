"""AMX: the features a processor needs for tiles of bfloat16 and int8, and the kernel's leave to use them."""

from __future__ import annotations

import ctypes
import os
from functools import cache

FEATURES = ("amx_tile", "amx_bf16", "amx_int8")  # as /proc/cpuinfo names them
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = (
    158,
    0x1023,
    18,
)  # the system call of x86-64, the request, the state component


@cache
def refusal() -> str | None:
    """Why the kernel does not let this process use tiles; None when it does. Asked once per process; threads and forked children inherit leave."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0:
        return None
    return f"the kernel refuses tile registers (arch_prctl ARCH_REQ_XCOMP_PERM: {os.strerror(ctypes.get_errno())})"
