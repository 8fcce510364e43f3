"""The build service: C++ sources in, a loaded shared library out.

Libraries are named by a hash over sources, flags, compiler and CPU, so a stale one can never be loaded. The sources of a library are compiled
side by side. Concurrent processes build under a lock and publish by renaming. Functions have a plain C interface and are called through ctypes, which releases the interpreter lock.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from wager.errors import BuildError
from wager.native import amx

LEVELS = {
    "native": "native",
    "amx": "sapphirerapids",
    "avx512": "x86-64-v4",
    "avx2": "x86-64-v3",
    "baseline": "x86-64",
}  # name to the compiler's -march
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
NEEDS = {
    "amx": {*amx.FEATURES, *_AVX512, "avx512_vnni", "avx512_bf16", "avx512_fp16"},
    "avx512": _AVX512,
    "avx2": {"avx2", "fma", "bmi2", "f16c"},
}
BASE_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-pthread", "-fopenmp")
COMPILE_LIMIT_S = 1800  # of one source; minutes even where other work leaves the compiler a tenth of a core


def load(name: str, sources: Sequence[Path], flags: Sequence[str] = (), march: str = "native") -> ctypes.CDLL:
    """Build (if no earlier build matches) and load. Headers beside the sources count as sources. `march` is the compiler's -march.

    Raises BuildError with the compiler's first complaint, or when there is no compiler.
    """
    library = build(name, sources, flags, march)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{library} cannot be loaded: {error}; delete it to build it again") from None


def build(name: str, sources: Sequence[Path], flags: Sequence[str] = (), march: str = "native") -> Path:
    """The library's path: one from `prebuild` where WAGER_PREBUILT names its directory, else the cache's, compiled when it is not there."""
    ready = _prebuilt(name, sources, flags, march)
    if ready is not None:
        return ready
    compiler = find_compiler()
    command = [*BASE_FLAGS, f"-march={march}", *flags]
    library = cache_dir() / f"{name}-{_fingerprint(compiler, sources, command)}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with _locked(library.with_suffix(".lock")):
        if not library.exists():
            _compile(compiler, command, sources, library)
    return library


def prebuild(name: str, sources: Sequence[Path], level: str, directory: Path) -> Path:
    """Compile for a level of LEVELS into a directory that WAGER_PREBUILT can name, also on machines without a compiler."""
    command = [*BASE_FLAGS, f"-march={LEVELS[level]}"]
    library = directory / f"{name}-{level}-{_ahead_key(sources, command, level)}.so"
    directory.mkdir(parents=True, exist_ok=True)
    if not library.exists():
        _compile(find_compiler(), command, sources, library)
    return library


def runs_here(level: str) -> bool:
    """Whether this processor has the instructions of a level, and the kernel lets this process use them."""
    return NEEDS.get(level, set()) <= set(cpu_flags().split()) and (level != "amx" or no_tiles() is None)


def no_tiles() -> str | None:
    """Why this process cannot use AMX tiles; None when it can."""
    if not set(amx.FEATURES) <= set(cpu_flags().split()):
        return f"this processor lacks {' '.join(amx.FEATURES)}"
    return amx.refusal()


def _prebuilt(name: str, sources: Sequence[Path], flags: Sequence[str], march: str) -> Path | None:
    """The widest library of WAGER_PREBUILT that is made of these very sources and runs here."""
    root = os.environ.get("WAGER_PREBUILT")
    if not root:
        return None
    for level, named in LEVELS.items():
        if march in (named, "native") and runs_here(level):
            key = _ahead_key(sources, [*BASE_FLAGS, f"-march={named}", *flags], level)
            if (library := Path(root) / f"{name}-{level}-{key}.so").exists():
                return library
    return None


def _ahead_key(sources: Sequence[Path], flags: Sequence[str], level: str) -> str:
    """Like the cache's key, but the compiler does not count, and the processor only where the code is for it alone."""
    digest = _digest_of(sources)
    digest.update("\0".join((cpu_flags() if level == "native" else "", *flags)).encode())
    return digest.hexdigest()


def find_compiler() -> str:
    """CXX if set, else the first of c++, g++, clang++ on the path."""
    for candidate in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if candidate and shutil.which(candidate):
            return candidate
    raise BuildError("no C++ compiler found (set CXX, or install g++ or clang++)")


def cache_dir() -> Path:
    """WAGER_CACHE, else the user's cache directory."""
    root = os.environ.get("WAGER_CACHE")
    if root:
        return Path(root) / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wager" / "native"


def _compile(compiler: str, flags: Sequence[str], sources: Sequence[Path], library: Path) -> None:
    """Objects side by side, then the library, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=f".{library.stem}-", dir=library.parent) as scratch:
        objects = [Path(scratch) / f"{number}-{source.stem}.o" for number, source in enumerate(sources)]

        def compile_one(source: Path, target: Path) -> None:
            _run([compiler, *flags, "-c", str(source), "-o", str(target)], library)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(compile_one, sources, objects))
        linked = Path(scratch) / library.name
        _run([compiler, *flags, "-shared", *map(str, objects), "-o", str(linked)], library)
        linked.replace(library)


def _run(command: Sequence[str], library: Path) -> None:
    """Raises BuildError with the compiler's first complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from None
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        complaints = [line for line in lines if "error:" in line] or lines or ["no message"]
        raise BuildError(f"{command[0]} failed on {library.stem}: {complaints[0]}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fingerprint(compiler: str, sources: Sequence[Path], flags: Sequence[str]) -> str:
    digest = _digest_of(sources)
    digest.update("\0".join((compiler_version(compiler), cpu_flags(), *flags)).encode())
    return digest.hexdigest()


def _digest_of(sources: Sequence[Path]) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=12)
    headers = {header for source in sources for header in Path(source).parent.glob("*.h")}
    for path in [*sources, *sorted(headers)]:
        digest.update(Path(path).read_bytes())
    return digest


@cache
def compiler_version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return done.stdout.splitlines()[0] if done.stdout else compiler


@cache
def cpu_flags() -> str:
    """What -march=native depends on: the processor's feature list."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith(("flags", "Features"))), os.uname().machine
    )


def isa() -> str:
    """The vector instructions that native code will use here, widest first: avx512, avx2, avx, neon or baseline."""
    flags = set(cpu_flags().split())
    for feature, name in (("avx512f", "avx512"), ("avx2", "avx2"), ("avx", "avx"), ("asimd", "neon")):
        if feature in flags:
            return name
    return "baseline"
