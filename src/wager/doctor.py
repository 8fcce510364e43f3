"""`wager doctor`, `wager hardware`, `wager kernels`: what this installation and this machine can do, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer

from wager.errors import WagerError

app = typer.Typer(add_completion=False)


@app.callback()
def _group() -> None: ...


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table. `advice` is what to do about it; empty when all is well. `fatal`: nothing runs without it."""

    subject: str
    found: str
    advice: str = ""
    fatal: bool = False


def check_python() -> Finding:
    return Finding("Python", f"{platform.python_version()} at {sys.executable}")


def check_wager() -> Finding:
    from wager import __version__

    return Finding("wager", f"{__version__} at {Path(__file__).parent}")


def check_torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("torch", "absent", "pip install torch", fatal=True)
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding("torch", f"{torch.__version__} ({build}), {torch.get_num_threads()} threads")


def check_gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("GPU", ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))
    advice = (
        "an NVIDIA driver is here but torch has no CUDA: install a CUDA build" if shutil.which("nvidia-smi") else ""
    )
    return Finding("GPU", "none that torch can use; the engine computes on the CPU", advice)


def check_processor() -> Finding:
    flags, model = processor()
    wide = [
        f
        for f in ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd")
        if f in flags
    ]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("processor", f"{model}, {usable} cores usable, {' '.join(wide) or 'no vector extension known'}")


def processor() -> tuple[set[str], str]:
    """(instruction-set flags, model name) as the kernel reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set(), platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return set((fields.get("flags") or fields.get("Features") or "").split()), fields.get(
        "model name", platform.machine()
    )


def check_memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    return Finding("memory", f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f} GiB")


def check_compiler() -> Finding:
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++") if shutil.which(c)), None)
    if compiler is None or not shutil.which(compiler):
        return Finding(
            "C++ compiler",
            "absent",
            "install g++: the CPU kernels are compiled on first use; torch operators are used meanwhile",
        )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
    return Finding("C++ compiler", version[0] if version else compiler)


def check_cache() -> Finding:
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return Finding("hub cache", str(hub), "" if writable(hub) else f"{hub} cannot be written; set HF_HOME")


def writable(path: Path) -> bool:
    """Whether `path`, or the nearest parent that exists, can be written."""
    existing = next(p for p in (path, *path.parents) if p.exists())
    return os.access(existing, os.W_OK)


def check_grammars() -> Finding:
    return package("structured output", "llguidance", "pip install llguidance")


def check_plots() -> Finding:
    return package("plots", "matplotlib", "only for --plot: pip install 'wager[plot]'")


def package(subject: str, name: str, advice: str) -> Finding:
    try:
        return Finding(subject, f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        return Finding(subject, f"{name} is absent", advice)


def check_browser() -> Finding:
    found = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    return Finding("browser", found or "none", "" if found else "only for the chat page's tests: install chromium")


CPU_OPERATORS = {
    "linear": "float32, bfloat16, float16 weights; int8, int4, nf4 and the codes of GGUF, GPTQ, AWQ",
    "attention": "paged, float32 and bfloat16 pools: grouped and latent heads, token trees, windows, softcap, sinks, long contexts in pieces",
    "norm, rotation, gates, KV write": "float32 activations",
}


def check_gpu_kernels() -> Finding:
    """The form that serves CUDA tensors, and why."""
    import torch

    from wager.errors import UsageError
    from wager.kernels.registry import gpu_choice

    if not torch.cuda.is_available():
        return Finding("kernels on the GPU", "not needed: no GPU that torch can use")
    try:
        chosen = gpu_choice()
    except UsageError as error:
        return Finding("kernels on the GPU", "Triton is forced but absent", str(error))
    slow = chosen.form == "reference" and "forced" not in chosen.reason
    what = "; decode steps run as CUDA graphs" if chosen.form == "triton" else ""
    return Finding("kernels on the GPU", f"{chosen.form} ({chosen.reason}){what}", "pip install triton" if slow else "")


def check_kernels() -> list[Finding]:
    """For every group of operators the form that serves CPU tensors, and why; the way of its dot products for linears."""
    from wager.errors import BuildError
    from wager.kernels.registry import choice

    try:
        chosen = choice()
    except BuildError as error:
        return [Finding("kernels", "native is forced but cannot be built", str(error))]
    found = [
        Finding(f"kernel: {name}", f"{chosen.form} ({chosen.reason}): {what}") for name, what in CPU_OPERATORS.items()
    ]
    if chosen.form == "native":
        found.append(Finding("kernel: dot products", dot_products()))
    return found


def dot_products() -> str:
    """How linears multiply here."""
    from wager.kernels.native import MARCH, TILE_ROWS, TILED, march, no_tiles

    flags, level = processor()[0], march()
    wide = level in (*TILED, MARCH["avx512"]) and "avx512bw" in flags
    if wide and level in TILED:
        integer = "vpdpbusd" if "avx512_vnni" in flags else "vpmaddwd"
        pairs = "vdpbf16ps" if "avx512_bf16" in flags else "bfloat16 widened to float32"
    else:
        integer = (
            "vpmaddwd"
            if wide
            else "vpmaddubsw"
            if level in ("native", "x86-64-v3") and "avx2" in flags
            else "plain C++"
        )
        pairs = "bfloat16 widened to float32"
    reason = no_tiles()
    tiles = f"; AMX is not used: {reason}" if "amx_tile" in flags else ""
    return f"int8 by {integer}, {pairs}{tiles if reason else f'; from {TILE_ROWS} rows on by AMX: tdpbsud, tdpbf16ps'}"


CHECKS: tuple[Callable[[], Finding | list[Finding]], ...] = (
    check_wager, check_python, check_torch, check_gpu, check_processor, check_memory, check_compiler, check_kernels,
    check_gpu_kernels, check_cache,
    check_grammars, check_plots, check_browser,
)  # fmt: skip


def examine(checks: tuple[Callable[[], Finding | list[Finding]], ...] = CHECKS) -> list[Finding]:
    """Run every check; the examination stops at a fatal finding, since what follows needs it."""
    findings: list[Finding] = []
    for check in checks:
        found = check()
        findings += found if isinstance(found, list) else [found]
        if findings[-1].fatal:
            break
    return findings


@app.command()
def doctor(as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table.")) -> None:
    """Say what this installation has, lacks, and why it is as fast as it is."""
    findings = examine()
    if as_json:
        print(json.dumps([vars(f) for f in findings], indent=1))
    else:
        print_table(["subject", "found", "advice"], [[f.subject, f.found, f.advice] for f in findings])
    fatal = next((f for f in findings if f.fatal), None)
    if fatal:
        raise WagerError(f"{fatal.subject} is {fatal.found}: {fatal.advice}")


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
