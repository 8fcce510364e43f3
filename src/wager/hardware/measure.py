"""Measures this machine: what it is, how fast it reads memory, how fast it multiplies, and where the two meet.

`machine()` only looks and is instant; `measure()` runs a few seconds of work. The *ridge* is the arithmetic intensity (operations per byte
read) above which a kernel is limited by arithmetic and below which by memory; the roofline of `wager.hardware.cost` stands on these numbers.
Every figure is the best of several repetitions: contention can only slow a repetition down, so the best one is closest to the machine.

Shape legend: N rows and columns of a square matrix.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import typer

from wager.errors import UsageError
from wager.native import build

KERNELS = (
    Path(__file__).parents[1] / "kernels" / "cpp"
)  # read as a file: hardware lies below kernels and does not import it
STREAM_BYTES = 256 * 2**20
GEMM_N = {"cpu": 1024, "cuda": 8192}
REPETITIONS = 5
CPU_DTYPES = ("float32", "bfloat16", "int8")
CUDA_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Measured:
    """What one device does. Bandwidth in bytes/s, peaks in operations/s per dtype, ridge in operations per byte per dtype."""

    device: str
    threads: int
    read_bytes_per_s: float
    peak_flops: dict[str, float]

    @property
    def ridge(self) -> dict[str, float]:
        return {dtype: peak / self.read_bytes_per_s for dtype, peak in self.peak_flops.items()}


def machine() -> dict:
    """A description that is saved beside every recorded result. Nothing is run; fields that cannot be read are absent."""
    import psutil

    found = {
        "cpu": processor_name(),
        "cores": usable_cores(),
        "isa": build.isa(),
        "amx": (build.no_tiles() or "usable") if "amx_tile" in build.cpu_flags().split() else None,
        "l3_cache_bytes": last_cache_bytes(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found["gpu"] = ", ".join(g.name for g in gpus)
        found["gpu_memory_bytes"] = sum(g.total_memory for g in gpus)
        found["cuda"] = torch.version.cuda
    return {name: value for name, value in found.items() if value is not None}


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def usable_cores() -> int:
    """Cores that this process may run on, which a container may have made fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_cache_bytes() -> int | None:
    """Size of the outermost cache of the first core; None where the kernel does not say."""
    levels = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            size = (index / "size").read_text().strip()
            levels[int((index / "level").read_text())] = int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]]
        except (OSError, ValueError, KeyError):
            continue
    return levels[max(levels)] if levels else None


def measure(
    device: str = "cpu", threads: int | None = None, stream_bytes: int = STREAM_BYTES, gemm_n: int | None = None
) -> Measured:
    """Measure read bandwidth and matrix peaks of `device` ("cpu" or "cuda"). A few seconds.

    Raises UsageError for a device this torch does not have, BuildError when the bandwidth kernel cannot be compiled.
    """
    if device not in GEMM_N:
        raise UsageError(f"device {device!r} cannot be measured; use cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' cannot be measured: torch sees no GPU here; use cpu")
    before, threads = torch.get_num_threads(), threads or torch.get_num_threads()
    if threads < 1:
        raise UsageError(f"threads={threads}: at least 1 is needed")
    torch.set_num_threads(threads)
    try:
        read = read_cpu(stream_bytes, threads) if device == "cpu" else read_cuda(stream_bytes)
        dtypes = CPU_DTYPES if device == "cpu" else CUDA_DTYPES
        peaks = {dtype: gemm_peak(getattr(torch, dtype), device, gemm_n or GEMM_N[device]) for dtype in dtypes}
    finally:
        torch.set_num_threads(before)
    return Measured(device, threads, read, at_least_float32(peaks))


def at_least_float32(peaks: Mapping[str, float]) -> dict[str, float]:
    """Narrow numbers can always be widened and multiplied in float32, which is faster where torch has no product for them (bfloat16 on AVX2)."""
    return {dtype: max(peak, peaks["float32"]) for dtype, peak in peaks.items()}


@cache
def stream_library() -> ctypes.CDLL:
    """The bandwidth kernel of the native operators, compiled alone. Raises BuildError."""
    library = build.load("wager_stream", [KERNELS / "elementwise.cpp", KERNELS / "pool.cpp"])
    library.wager_stream_read.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_int)
    library.wager_stream_read.restype = ctypes.c_double
    return library


def read_cpu(stream_bytes: int = STREAM_BYTES, threads: int = 1) -> float:
    """Bytes/s of streaming through an array that no cache holds. The sum is checked: a kernel that skipped memory would be caught."""
    count = stream_bytes // 4 // 4096 * 4096
    if count == 0:
        raise UsageError(f"stream_bytes={stream_bytes} is less than one block of 16384 bytes")
    values = torch.ones(count)
    library = stream_library()

    def read() -> None:
        total = library.wager_stream_read(values.data_ptr(), count, threads)
        if total != count:
            raise RuntimeError(f"the stream kernel summed {count} ones to {total}")

    return count * 4 / best_seconds(read)


def read_cuda(stream_bytes: int = STREAM_BYTES) -> float:
    values = torch.ones(max(stream_bytes, 2**30) // 4, device="cuda")
    return values.nbytes / best_seconds(lambda: values.sum(), torch.cuda.synchronize)


def gemm_peak(dtype: torch.dtype, device: str, n: int) -> float:
    """Operations/s (a multiply and an add count two) of an n by n by n product in `dtype`; int8 accumulates in int32."""
    a_NN, b_NN = (torch.randint(-8, 8, (n, n), device=device).to(dtype) for _ in range(2))
    product = torch.ops.aten._int_mm if dtype == torch.int8 else torch.mm
    return 2.0 * n**3 / best_seconds(lambda: product(a_NN, b_NN), torch.cuda.synchronize if device == "cuda" else None)


def best_seconds(
    work: Callable[[], object], settle: Callable[[], None] | None = None, repetitions: int = REPETITIONS
) -> float:
    """The shortest of several runs after one that warms caches and compilers."""
    times = []
    for _ in range(repetitions + 1):
        if settle:
            settle()
        start = time.perf_counter()
        work()
        if settle:
            settle()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def report(measured: list[Measured]) -> str:
    """Machine and measurements in lines that a person reads."""
    lines = [f"{name.replace('_', ' ')}: {readable(name, value)}" for name, value in machine().items()]
    for m in measured:
        lines.append(f"{m.device}, {m.threads} threads: reads {m.read_bytes_per_s / 1e9:.1f} GB/s")
        for dtype, peak in m.peak_flops.items():
            lines.append(
                f"  {dtype:<9} peak {peak / 1e9:8.1f} G operations/s, ridge {m.ridge[dtype]:6.1f} operations/byte"
            )
    return "\n".join(lines)


def readable(name: str, value: object) -> str:
    return f"{value / 2**20:,.0f} MiB" if name.endswith("_bytes") and isinstance(value, int) else str(value)


app = typer.Typer(add_completion=False)


@app.callback()
def _group() -> None: ...


@app.command()
def hardware(
    device: str = typer.Option("auto", help="cpu, cuda, or auto: the CPU, and the GPU where there is one."),
    threads: int = typer.Option(0, help="CPU threads; 0 takes as many as torch would."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure this machine: memory bandwidth, matrix peaks, and the ridge between them."""
    if threads < 0:
        raise UsageError(f"--threads {threads} is negative; give a count, or 0 for torch's choice")
    devices = [device] if device != "auto" else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    measured = [measure(d, threads or None) for d in devices]
    if as_json:
        print(
            json.dumps({"machine": machine(), "measured": [asdict(m) | {"ridge": m.ridge} for m in measured]}, indent=1)
        )
    else:
        print(report(measured))
