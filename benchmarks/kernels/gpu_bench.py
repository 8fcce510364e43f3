"""What the sections of the GPU benchmark share: shapes, random tensors, paged attention's arguments, comparisons that are recorded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Report, compare

SHAPES = {  # outputs, inputs, whether it is a stacked gate and up projection
    "qkv": (6144, 4096, False),
    "output": (4096, 4096, False),
    "gate-up": (28672, 4096, True),
    "down": (4096, 14336, False),
    "head": (128256, 4096, False),
}
MODES: dict[str, str | None] = {"bf16": None, "int8": "int8", "int4": "int4"}
BITS = {"bf16": 16, "int8": 8, "int4": 4}


class Bench:
    def __init__(self, quick: bool, repeats: int, report: Report):
        self.quick, self.repeats, self.report = quick, repeats, report
        self.shapes = {k: v for k, v in SHAPES.items() if not quick or k in ("output", "gate-up")}
        self.generator = torch.Generator("cuda").manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda").normal_(0.0, std, generator=self.generator)

    def compare(self, workload: str, contenders: dict[str, Callable[[], float]], unit: str = "s", up: bool = False):
        rows = compare(
            workload, contenders, repeats=self.repeats, warmup=1, unit=unit, higher_is_better=up, progress=None
        )
        self.report.rows += rows
        each = "; ".join(f"{row.ours} {row.ours_value:.4g} {row.ratio:.3f}x" for row in rows)
        base = f"{rows[0].baseline} {rows[0].baseline_value:.4g} {unit}"
        print(f"{workload}: {base}; {each}; noise {rows[0].aa_noise:.1%}", flush=True)
        return rows


def paged(
    bench: Bench, dtype: torch.dtype, spans: list[tuple[int, int]], heads: int, kv_heads: int, width: int
) -> tuple[Tensor, ...]:
    """(q, k pool, v pool, tables, span starts, contexts, positions) of spans (context, length), blocks of 16 one after another."""
    blocks = [-(-(c + n) // 16) for c, n in spans]
    total, most = sum(blocks), max(blocks)
    tables = torch.full((len(spans), most), -1, dtype=torch.int32)
    first = 0
    for row, count in enumerate(blocks):
        tables[row, :count] = torch.arange(first, first + count)
        first += count
    lengths = torch.tensor([n for _, n in spans])
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
    positions = torch.cat([torch.arange(c, c + n) for c, n in spans])
    k, v = (bench.randn(total * 16, kv_heads, width, dtype=dtype) for _ in range(2))
    contexts = torch.tensor([c for c, _ in spans], dtype=torch.int32)
    return (
        bench.randn(int(lengths.sum()), heads, width, dtype=dtype), k, v,
        *(t.cuda() for t in (tables, starts, contexts, positions)),
    )  # fmt: skip
