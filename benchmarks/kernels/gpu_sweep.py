"""Tries how linears are cut into tiles and prints tables for `wager/kernels/triton_tiles.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_timing import copies_of, graphed
from benchmarks.harness import say
from benchmarks.kernels.gpu_bench import BITS, MODES, Bench


def sweep(bench: Bench) -> None:
    """Try tiles; keep the best of each class in the tables that the rest of the run uses, and print them."""
    from wager.kernels import triton_tiles
    from wager.kernels.triton_linear import SILU, TritonLinear

    found: dict[str, dict[str, Any]] = {}
    capability = torch.cuda.get_device_capability()
    for mode, quantization in MODES.items():
        bits, small = BITS[mode], bench.randn(256, 4096, std=0.02)
        tiles, matrix_tiles = vector_candidates(bits), matrix_candidates()
        probe, x1, x8 = TritonLinear(small, None, quantization), bench.randn(1, 4096), bench.randn(8, 4096)
        jobs = [partial(probe._one, x1, tile=t, gates=g) for t in tiles for g in (0, SILU)]
        compile_all(jobs + [partial(probe._many, x8, t) for t in matrix_tiles])
        for name, (outputs, inputs, gated) in bench.shapes.items():
            linears = linears_of(bench, outputs, inputs, bits, quantization)
            kind = triton_tiles.shape_class(outputs // 2 if gated else outputs, inputs, gated)
            x = bench.randn(1, inputs)
            vector = partial(best_of, tiles, lambda t, ls=linears, x=x, g=SILU if gated else 0: [
                partial(one._one, x, tile=t, gates=g) for one in ls])  # fmt: skip
            keep(found, f"vector {mode} {name} {kind}", vector(), linears[0].nbytes)
            x = bench.randn(8, inputs)
            made = best_of(matrix_tiles, lambda t, ls=linears, x=x: [partial(one._many, x, t) for one in ls])
            if bits == 16:
                made.append((best_seconds([partial(F.linear, x, one.weight) for one in linears]), None))
            made.sort(key=lambda pair: pair[0])
            keep(found, f"matrix {mode} {name} {kind}", made, linears[0].nbytes)
            del linears
    for table, which in ((triton_tiles.VECTOR, "vector"), (triton_tiles.MATRIX, "matrix")):
        known: dict = table.setdefault(capability, {})
        for label, entry in found.items():
            form, mode, _, kind = label.split()
            if form == which:
                known.setdefault((BITS[mode], kind), entry["tile"])
        print(f"{which.upper()}[{capability}] = {known}", flush=True)
    bench.report.facts["sweep"] = {k: {**v, "tile": str(v["tile"])} for k, v in found.items()}


def linears_of(bench: Bench, outputs: int, inputs: int, bits: int, quantization: str | None) -> list[Any]:
    from wager.kernels.triton_linear import TritonLinear

    weight = bench.randn(outputs, inputs, std=0.02)
    return [TritonLinear(weight.clone(), None, quantization) for _ in range(copies_of(outputs * inputs * bits // 8))]


def keep(found: dict, label: str, timed: list[tuple[float, Any]], nbytes: int) -> None:
    seconds, tile = timed[0]
    found[label] = {"tile": tile, "GB_s": nbytes / seconds / 1e9}
    short = "; ".join(f"{nbytes / s / 1e9:.0f} {brief(t)}" for s, t in timed[:4])
    print(f"{label}: {short}; worst {nbytes / timed[-1][0] / 1e9:.0f} GB/s", flush=True)


def vector_candidates(bits: int) -> list[Any]:
    from wager.kernels.triton_tiles import Tile

    low, high = {16: (16, 64), 8: (32, 128), 4: (64, 256)}[bits]
    stages = (1, 3) if bits == 16 else (1,)
    return [
        Tile(o, i, w, s)
        for o in (1, 2, 4, 8, 16)
        for i in (512, 1024, 2048)
        for w in (2, 4, 8)
        for s in stages
        if low <= o * i // (32 * w) <= high and (s == 1 or (w == 4 and o in (2, 4, 8)))
    ]


def matrix_candidates() -> list[Any]:
    from wager.kernels.triton_tiles import Tile

    return [
        Tile(o, i, w, s) for o, w in ((16, 2), (16, 4), (32, 2), (32, 4), (64, 4)) for i in (128, 256) for s in (3, 5)
        if not (o == 64 and i == 256 and s == 5)
    ]  # fmt: skip


def compile_all(jobs: Sequence[Callable[[], object]]) -> None:
    """Run each once, in threads: compiling is most of it, and lets go of the interpreter. What fails here fails again where it is timed."""

    def attempt(job: Callable[[], object]) -> None:
        try:
            job()
        except Exception as problem:
            say(f"not compiled: {type(problem).__name__}: {str(problem)[:200]}")

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(attempt, jobs))
    torch.cuda.synchronize()


def best_seconds(calls: list[Callable[[], object]]) -> float:
    run = graphed(calls)
    return min(run() for _ in range(4))


def best_of(tiles: list[Any], calls: Callable[[Any], list[Callable[[], object]]]) -> list[tuple[float, Any]]:
    """(seconds, tile) of those that run, the fastest first."""
    timed = []
    for tile in tiles:
        try:
            timed.append((best_seconds(calls(tile)), tile))
        except Exception as problem:
            say(f"{tile}: {type(problem).__name__}: {str(problem)[:120]}")
    return sorted(timed, key=lambda pair: pair[0])


def brief(tile: Any) -> str:
    return "cuBLAS" if tile is None else f"{tile.outputs}x{tile.inputs}w{tile.warps}s{tile.stages}"
