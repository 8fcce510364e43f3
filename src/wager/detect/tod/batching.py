"""How work is cut to fit: the execution settings, the bytes an operator needs, and the tiles that a memory budget allows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from wager.errors import CapacityError, UsageError

PRECISIONS = ("auto", "fp64", "fp32", "fp16", "bf16", "int8")
SEARCHES = ("auto", "scan", "tree", "fp64")
SHARE_OF_FREE_MEMORY = 0.8
PLACES = 16  # directions along which the scan places a row
BLOCK_ROWS = 65536


@dataclass(frozen=True)
class Execution:
    """Where and how operators run. None of it changes a result, but that a torch device sums in another order: scores there agree to rounding.

    device: cpu (the loops of this library), or a device of torch: cuda, cuda:1, cpu:0; precision: of the proposing arithmetic; search: scan, tree, fp64 or auto; batch_rows: rows of a block (None: from
    the budget); memory_bytes: what an operator may allocate beside its input and output (None: 0.8 of what is free); workers: processes;
    checkpoint: a folder where finished row blocks are kept, so that a killed run goes on where it was; ray_address: do the blocks on a Ray cluster
    ("auto": the one this machine belongs to, "local": one of this machine alone, or host:port).
    """

    device: str = "cpu"
    precision: str = "auto"
    search: str = "auto"
    batch_rows: int | None = None
    memory_bytes: int | None = None
    workers: int = 1
    checkpoint: str | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"unknown precision {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        if self.search not in SEARCHES:
            raise UsageError(f"unknown search {self.search!r}; choose one of {', '.join(SEARCHES)}")
        if self.batch_rows is not None and self.batch_rows < 1:
            raise UsageError(
                f"batch_rows is {self.batch_rows}; it must be at least 1, or None to follow the memory budget"
            )
        if self.workers < 1:
            raise UsageError(f"workers is {self.workers}; it must be at least 1")

    @property
    def budget_bytes(self) -> int:
        if self.memory_bytes is not None:
            return self.memory_bytes
        return int(SHARE_OF_FREE_MEMORY * psutil.virtual_memory().available)

    def scan_tiles(self, n: int, d: int, k: int, capacity: int, width: int) -> tuple[int, int]:
        """Rows of a block and columns of a chunk for the float32 scan. A row costs its candidates, a column its packed copy."""
        per_row, per_column = scan_row_bytes(d, k, capacity), scan_column_bytes(d)
        budget = self.budget_bytes
        rows = self.batch_rows or max(1, min(BLOCK_ROWS, n, budget // 4 // per_row))
        left = budget - rows * per_row
        columns = n if left >= (n + width) * per_column else left // per_column // width * width
        if columns < min(width, n):
            raise CapacityError(
                f"a memory budget of {budget} bytes cannot hold {rows} rows and {width} columns of {d} features; "
                f"give at least {rows * per_row + 2 * width * per_column} bytes or a smaller batch_rows"
            )
        return rows, columns

    def tree_rows(self, k: int) -> int:
        """Rows of a block for the tree: distances and indices come back, are expanded, and may be asked for again twice as long."""
        return max(64, min(BLOCK_ROWS, self.budget_bytes // 4 // (16 * 6 * (k + 4))))


def scan_row_bytes(d: int, k: int, capacity: int) -> int:
    """float32 and int8 copies, place, candidates (index, low, high), own number, results."""
    return 5 * d + 4 * PLACES + 12 * capacity + 16 * k + 56


def scan_column_bytes(d: int) -> int:
    """Packed float32 and int8 copies, norms, levels' lengths, order, boxes; while it is packed, its place."""
    return 5 * d + 32 + 4 * PLACES + 4 * PLACES // 8


def row_blocks(rows: int, block: int) -> Iterator[tuple[int, int]]:
    """(start, stop) pairs that cover the rows."""
    for start in range(0, rows, block):
        yield start, min(rows, start + block)


def parse_bytes(text: str) -> int:
    """Bytes of "2GB", "512 MiB", "1000000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not match:
        raise UsageError(f"{text!r} is not a size; write for example 2GB or 512MiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("kmgt".index(unit) + 1 if unit else 0))
