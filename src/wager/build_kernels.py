"""`wager build-kernels`: compile every C++ unit of the package ahead of time.

Without --out the libraries go to the cache, where first use would have put them. With --out they go to a directory that WAGER_PREBUILT can
name later, on this machine or on others of the same sources, also where there is no compiler. avx512 means the instructions that all such
processors have: a build for `native` also uses the integer and bfloat16 dot products that some of them add. amx means those of the first
processors with AMX, dot products included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from wager.errors import UsageError
from wager.native import build

ROOT = Path(__file__).parent
KERNELS = ("linear", "attention", "elementwise", "block", "pool", "segments", "experts", "sampling")
UNITS = {
    "wager_kernels": [f"kernels/cpp/{name}.cpp" for name in KERNELS],
    "wager_stream": ["kernels/cpp/elementwise.cpp", "kernels/cpp/pool.cpp"],
    "wager_suffix": ["serve/speculate/cpp/suffix_tree.cpp"],
    "wager_motifs": ["detect/bond/cpp/motifs.cpp"],
    "wager_pairs": ["detect/bond/cpp/pairs.cpp"],
    "wager_masks": ["detect/bond/cpp/masks.cpp"],
    "wager_adam": ["detect/bond/cpp/adam.cpp"],
    "wager_enumerate": ["compile/mirage/enumerate.cpp"],
    "wager_pipeline": ["simulate/cpp/pipeline.cpp"],
    "wager_coral": ["cluster/coral/cpp/templates.cpp", "cluster/coral/cpp/cover.cpp"],
    "wager_detect": sorted(str(p.relative_to(ROOT)) for p in (ROOT / "detect/tod/cpp").glob("*.cpp")),
}  # fmt: skip
WITH_GENERATED = ("graph/lower/parts.cpp",)  # compiled with generated kernels, which need a compiler anyway

app = typer.Typer(add_completion=False)


@app.callback()
def _group() -> None: ...


@app.command("build-kernels")
def build_kernels(
    isa: Annotated[str, typer.Option(help="native, amx, avx512, avx2 or baseline")] = "native",
    out: Annotated[Path | None, typer.Option(help="a directory for WAGER_PREBUILT; default: the cache")] = None,
) -> None:
    """Compile every C++ unit now, for this machine or a named instruction set."""
    from wager.doctor import print_table

    if isa not in build.LEVELS:
        raise UsageError(f"--isa {isa!r} is unknown; use one of {', '.join(build.LEVELS)}")
    rows = []
    for name, start, library in compile_units(isa, out):
        rows.append([name, f"{time.perf_counter() - start:.1f} s", str(library)])
    print_table(["unit", "time", "library"], rows)


def compile_units(isa: str, out: Path | None) -> Iterator[tuple[str, float, Path]]:
    """Yield (unit, when it was begun, its library)."""
    for name, files in UNITS.items():
        sources, start = [ROOT / file for file in files], time.perf_counter()
        made = (
            build.build(name, sources, march=build.LEVELS[isa])
            if out is None
            else build.prebuild(name, sources, isa, out)
        )
        yield name, start, made
