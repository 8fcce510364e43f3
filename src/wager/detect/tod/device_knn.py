"""The neighbour search of a GPU: matrix products propose, float64 decides.

Equal rows become one (`Distinct`). One matrix product gives, for a tile of rows, a lower bound L of every squared distance: the points stand
in it beside their squared lengths, from which the proved error is already taken. Columns fall into groups by their number modulo the groups;
each group's smallest L names a pair, and the k-th smallest upper bound of these pairs limits the k-th distance: with many more groups than
neighbours hardly anything else lies below it. What does is computed in float64 (`squared`), sorted by (distance, index) and cut. Rows that
float32 leaves with too many pairs are proposed again by float64 products. Every list has the length it needs, so none overflows.
Exact, see `bounds`; tiles follow the memory budget. Source: TOD (arXiv 2110.14007) for quantization with verification; the form is ours.

Legend: N base rows, G distinct ones, R rows asked about, K neighbours, P pairs, C columns of a tile, W width of the product's operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wager.detect.tod import bounds, device, native
from wager.detect.tod.batching import Execution, row_blocks
from wager.detect.tod.scan import SAFE_NORM2
from wager.errors import CapacityError, UsageError

REPEATED = 0.1  # share of copies from which equal rows are searched once
GROUPS, GROUPS_PER_NEIGHBOR = 256, 8
TILE_PAIRS = 2**28
PAIR_BYTES = {torch.float32: 8, torch.float64: 12}  # the bound, whether it is a hit, and what reductions take
HIT_BYTES = 160  # numbers, distances, sorts and their scratch
ROW_GROUP_BYTES = 64  # a group's smallest, its column, upper bounds


def suits(execution: Execution) -> bool:
    """Whether this search is the one asked for: on a torch device, in float32 or float64."""
    return execution.device != "cpu" and execution.search != "fp64" and execution.precision in ("auto", "fp32", "fp64")


class Distinct:
    """The distinct rows of a base, and for each the rows that equal it, ascending. Without enough copies every row stands for itself.

    Equal rows have equal hashes, so they lie together once sorted; rows that differ but share a hash (1 in 2^64) would only split a set of
    copies, which changes no answer.
    """

    def __init__(self, base_ND: Tensor):
        n = len(base_ND)
        key_N = hashes(base_ND)
        ordered, member = key_N.sort(stable=True)
        new = torch.ones(n, dtype=torch.bool, device=base_ND.device)
        new[1:] = ordered[1:] != ordered[:-1]
        same = (~new).nonzero().squeeze(1)
        if len(same):
            new[same] = (base_ND[member[same]] != base_ND[member[same - 1]]).any(1)
        self.folded = len(same) > REPEATED * n
        self.rows_GD, self.member = base_ND, member
        if self.folded:
            self.start_G = new.nonzero().squeeze(1)
            self.count_G = torch.diff(self.start_G, append=torch.tensor([n], device=base_ND.device))
            self.rows_GD = base_ND[member[self.start_G]].contiguous()
            self.group_N = torch.empty_like(member)
            self.group_N[member] = new.long().cumsum(0) - 1


def hashes(x_ND: Tensor) -> Tensor:
    """A number for each row, equal for equal rows: sums of mixed bit patterns modulo 2^64, in which order does not matter."""
    generator = torch.Generator().manual_seed(1)
    odd_D = (torch.randint(-(2**62), 2**62, (x_ND.shape[1],), generator=generator) * 2 + 1).to(x_ND.device)
    bits_ND = (x_ND + 0.0).view(torch.int64)  # -0.0 becomes 0.0
    mixed_ND = (bits_ND ^ (bits_ND >> 29)) * odd_D
    return (mixed_ND ^ (mixed_ND >> 31)).mul_(-7046029254386353131).sum(1)


@dataclass(frozen=True)
class Level:
    """Base and products in one precision. Rows of base_CW: b, 1, (1 - 2 slack) |b|^2; padding columns are out of reach."""

    base_CW: Tensor
    square_C: Tensor
    slack: float
    tiny: float

    @staticmethod
    def of(scaled_GD: Tensor, dtype: torch.dtype, groups: int) -> Level:
        (n, d), single = scaled_GD.shape, dtype == torch.float32
        slack = bounds.slack(d) * (1 + 2.0**-20) if single else (2 * d + 40) * 2.0**-53
        rounded = scaled_GD.to(dtype)
        square = rounded.double().square().sum(1)
        columns, width = -(-n // groups) * groups, -(-(d + 2) // 4) * 4
        base = torch.zeros(columns, width, dtype=dtype, device=scaled_GD.device)
        base[:n, :d], base[:, d], base[n:, d + 1] = rounded, 1, torch.inf
        base[:n, d + 1] = ((1 - 2 * slack) * square).to(dtype)
        return Level(base, square, slack, (d + 8) * (2.0**-120 if single else 2.0**-1000))

    def asked(self, scaled_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows as the product takes them, their squared lengths, and which of them this precision can hold."""
        r, d = scaled_RD.shape
        rounded = scaled_RD.to(self.base_CW.dtype)
        square = rounded.double().square().sum(1)
        safe = square <= (SAFE_NORM2 if rounded.dtype == torch.float32 else 1e300)
        out = torch.zeros(r, self.base_CW.shape[1], dtype=rounded.dtype, device=rounded.device)
        out[:, :d], out[:, d], out[:, d + 1] = -2 * rounded, ((1 - 2 * self.slack) * square).to(rounded.dtype), 1
        return out, square, safe

    def lower(self, asked_RW: Tensor, c0: int, c1: int) -> Tensor:
        """Lower bounds of the squared distances to columns c0..c1."""
        return exactly_rounded(asked_RW, self.base_CW[c0:c1])


def exactly_rounded(a_RW: Tensor, b_CW: Tensor) -> Tensor:
    """a b^T with TF32 off: its error is then that of rounding, which the bounds are about."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return a_RW @ b_CW.T
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


class DeviceSearch:
    """Neighbours in a base on `execution.device`. `block` is what `workers` asks for, `own` what a plan on the device takes."""

    def __init__(self, base_ND: np.ndarray | Tensor, k: int, execution: Execution):
        self.device = device.check(execution)
        if execution.precision not in ("auto", "fp32", "fp64"):
            raise UsageError(
                f"precision {execution.precision!r} is not one of a GPU search; choose fp32, fp64, fp16 or bf16"
            )
        self.base_ND, self.k, self.execution, self.facts = base_ND, k, execution, {}
        self.first = torch.float64 if execution.precision == "fp64" else torch.float32
        self.name = f"products {'fp64' if self.first == torch.float64 else 'fp32'} on {execution.device}"
        cut = execution.workers > 1 or execution.checkpoint or execution.ray_address
        self.block_rows = execution.batch_rows or (16384 if cut else max(1, len(base_ND)))
        self._made: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": {}, "base_ND": device.fetched(self.base_ND)}

    # -- what is made of the base once ---------------------------------------------------------------------------------------------------

    def distinct(self) -> Distinct:
        if "distinct" not in self._made:
            base = torch.as_tensor(self.base_ND, device=self.device)
            self._made["distinct"] = Distinct(base)
            self._made["centre"] = base.mean(0)
            largest = float((base - self._made["centre"]).abs().max())
            self._made["scale"] = 2.0 ** -np.ceil(np.log2(largest)) if largest > 0 else 1.0
            self.facts["distinct"] = len(self._made["distinct"].rows_GD)
        return self._made["distinct"]

    def scaled(self, rows_RD: Tensor) -> Tensor:
        return (rows_RD - self._made["centre"]) * self._made["scale"]

    def level(self, dtype: torch.dtype) -> Level:
        if dtype not in self._made:
            self._made[dtype] = Level.of(self.scaled(self.distinct().rows_GD), dtype, self.groups())
        return self._made[dtype]

    def wanted(self, rows: int) -> int:
        """Distinct rows that hold the nearest `rows` rows."""
        return min(rows, len(self.distinct().rows_GD))

    def groups(self) -> int:
        return max(GROUPS, -(-GROUPS_PER_NEIGHBOR * (self.k + 1) // 32) * 32)

    # -- questions -----------------------------------------------------------------------------------------------------------------------

    def block(self, query_RD: np.ndarray | None, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, dict]:
        """Neighbours of rows start..stop, for `workers`."""
        if query_RD is None:
            distance, index, facts = self.own(start, stop)
        else:
            distance, index, facts = self.search(torch.as_tensor(query_RD[start:stop], device=self.device), self.k)
        return device.fetched(distance), device.fetched(index), facts

    def own(self, start: int, stop: int) -> tuple[Tensor, Tensor, dict]:
        """Neighbours of base rows start..stop, themselves left out: of one more, the row itself or else the last goes."""
        distinct = self.distinct()
        row_R = torch.arange(start, stop, device=self.device)
        if distinct.folded:
            asked, place = distinct.group_N[row_R].unique(return_inverse=True)
            distance, index, facts = self.search(distinct.rows_GD[asked], self.k + 1)
            distance, index = distance[place], index[place]
        else:
            distance, index, facts = self.search(distinct.rows_GD[start:stop], self.k + 1)
        itself = index == row_R[:, None]
        cut_R = torch.where(itself.any(1), itself.long().argmax(1), self.k)
        kept = torch.arange(self.k, device=self.device).expand(stop - start, -1)
        kept = kept + (kept >= cut_R[:, None])
        return distance.gather(1, kept), index.gather(1, kept), facts

    def search(self, query_RD: Tensor, k: int) -> tuple[Tensor, Tensor, dict]:
        """The k nearest base rows of any rows, by (distance, index)."""
        query_RD, distinct = query_RD.contiguous(), self.distinct()
        distance = torch.empty(len(query_RD), k, dtype=torch.float64, device=self.device)
        index = torch.empty(len(query_RD), k, dtype=torch.long, device=self.device)
        facts = {"verified_pairs": 0.0, "fp64_rows": 0.0}
        every = torch.arange(len(query_RD), device=self.device)
        self.ask(self.first, query_RD, every, k, distance, index, facts)
        return distance, index, facts | ({"distinct_rows_asked": float(len(query_RD))} if distinct.folded else {})

    def ask(
        self, dtype: torch.dtype, query_RD: Tensor, row_R: Tensor, k: int, distance: Tensor, index: Tensor, facts: dict
    ) -> None:
        """Fill the rows' answers; what float32 cannot settle is asked again in float64."""
        rows, columns, budget = self.tile(dtype, query_RD.shape[1])
        again: list[Tensor] = []
        for r0, r1 in row_blocks(len(row_R), rows):
            mine = row_R[r0:r1]
            points = query_RD if len(mine) == len(query_RD) else query_RD[mine]
            hit, wide = self.hits(dtype, points, columns, k, again, mine)
            for s0, s1 in pieces(wide, max(1, budget // HIT_BYTES)):
                at = hit[s0:s1].nonzero()
                self.decide(points, at[:, 0] + s0, at[:, 1], mine, k, distance, index)
                facts["verified_pairs"] += len(at)
            del hit
        if again:
            left = torch.cat(again)
            facts["fp64_rows"] += len(left)
            self.ask(torch.float64, query_RD, left, k, distance, index, facts)

    def hits(
        self, dtype: torch.dtype, points_RD: Tensor, columns: int, k: int, again: list[Tensor], row_R: Tensor
    ) -> tuple[Tensor, np.ndarray]:
        """For the rows of a tile: which distinct base rows may be among the wanted ones (bool, R x G), and how many each row has. Rows that
        float32 cannot settle have none and go to `again`."""
        level, n = self.level(dtype), len(self.distinct().rows_GD)
        asked, square, safe = level.asked(self.scaled(points_RD))
        tiles = list(row_blocks(len(level.base_CW), columns))
        kept = level.lower(asked, *tiles[0]) if len(tiles) == 1 else None
        limit = self.limit(level, asked, square, tiles, kept, self.wanted(k))
        if kept is not None:
            hit = kept[:, :n] <= limit[:, None]
        else:
            hit = torch.cat([level.lower(asked, c0, c1) <= limit[:, None] for c0, c1 in tiles], 1)[:, :n]
        whole = ~(safe & limit.isfinite())
        wide = hit.sum(1)
        if dtype == torch.float32:
            undecided = whole | (wide > GROUPS_PER_NEIGHBOR * k + 64 + n // 64)
            if bool(undecided.any()):
                again.append(row_R[undecided])
                hit[undecided] = False
                wide = wide.masked_fill(undecided, 0)
        elif bool(whole.any()):  # no bound holds: all of them
            hit[whole] = True
            wide = wide.masked_fill(whole, n)
        return hit, wide.cpu().numpy()

    def limit(
        self, level: Level, asked_RW: Tensor, square_R: Tensor, tiles: list, kept: Tensor | None, count: int
    ) -> Tensor:
        """A bound on each row's count-th smallest squared distance: the count-th smallest upper bound among the groups' best pairs."""
        rows, groups = len(asked_RW), self.groups()
        best = torch.full((rows, groups), torch.inf, dtype=asked_RW.dtype, device=self.device)
        column = torch.zeros((rows, groups), dtype=torch.long, device=self.device)
        for c0, c1 in tiles:
            lower = level.lower(asked_RW, c0, c1) if kept is None else kept
            low, at = lower.view(rows, -1, groups).min(1)
            nearer = low < best
            best = torch.where(nearer, low, best)
            column = torch.where(nearer, c0 + at * groups + torch.arange(groups, device=self.device), column)
        column = column.clamp_(max=len(level.square_C) - 1)
        reach = level.square_C[column].add_(square_R[:, None])
        upper = best.double() + (4 * level.slack * (1 + 2.0**-20)) * reach + level.tiny
        kth = upper.kthvalue(count, dim=1).values.to(best.dtype)
        return torch.nextafter(kth, torch.full_like(kth, torch.inf))

    def decide(
        self, points_RD: Tensor, row_P: Tensor, group_P: Tensor, row_R: Tensor, k: int, distance: Tensor, index: Tensor
    ) -> None:
        """The k nearest rows among the pairs (ascending by row, then group), written where row_R says."""
        distinct = self.distinct()
        asked, row_P = row_P.unique_consecutive(return_inverse=True)
        if not len(asked):
            return
        square_P = squared(points_RD[asked], distinct.rows_GD, row_P.contiguous(), group_P.contiguous())
        order = by_row(square_P.sort(stable=True).indices, row_P)
        row_P, group_P, square_P = row_P[order], group_P[order], square_P[order]
        if distinct.folded:
            row_P, group_P, square_P = expand(row_P, group_P, square_P, distinct, k, len(asked))
        start_R = first_of(row_P, len(asked))
        pick = start_R[:, None] + torch.arange(k, device=self.device)
        target = row_R[asked]
        distance[target], index[target] = root(square_P[pick]), group_P[pick]

    # -- memory --------------------------------------------------------------------------------------------------------------------------

    def tile(self, dtype: torch.dtype, d: int) -> tuple[int, int, int]:
        """Rows and columns of a tile, and bytes for the pairs that it leaves. Raises CapacityError."""
        groups = self.groups()
        columns = -(-len(self.distinct().rows_GD) // groups) * groups
        resident = columns * (d + 6) * (4 if dtype == torch.float32 else 8) + 8 * len(self.base_ND) * (d + 4)
        budget = device.budget_bytes(self.execution) - resident
        per_pair, per_row = PAIR_BYTES[dtype], groups * ROW_GROUP_BYTES + 40 * d
        rows = min(max(64, TILE_PAIRS // columns), budget // 2 // (columns * per_pair + per_row))
        if rows >= 64 or rows >= len(self.base_ND):
            return rows, columns, budget // 2
        for rows in (64, 16, 4, 1):
            narrow = (budget // 2 - rows * (per_row + 2 * columns)) // (rows * per_pair) // groups * groups
            if narrow >= groups:
                return rows, min(narrow, columns), budget // 2
        raise CapacityError(
            f"a memory budget of {budget + resident} bytes on {self.execution.device} cannot hold {len(self.base_ND)} rows of {d} features and a "
            f"tile of {groups} columns; give at least {resident + 2 * (per_row + 2 * columns + groups * per_pair)} bytes"
        )


def squared(query_RD: Tensor, base_ND: Tensor, row_P: Tensor, column_P: Tensor) -> Tensor:
    """|query[row] - base[column]|^2 of every pair in float64, with the bits of `cpp/distance.h`."""
    out_P = torch.empty(len(row_P), dtype=torch.float64, device=row_P.device)
    if row_P.device.type != "cpu":
        from wager.detect.tod import triton_pairs

        triton_pairs.squared(query_RD, base_ND, row_P, column_P, out_P)
        return out_P
    asked_PD = np.ascontiguousarray(query_RD.numpy()[row_P.numpy()])
    native.call(
        "wager_squared_distances", asked_PD, base_ND.numpy(), column_P.numpy(), len(row_P), 1, base_ND.shape[1], out_P.numpy()
    )  # fmt: skip
    return out_P


def root(square: Tensor) -> Tensor:
    """Correctly rounded square roots; torch's own on a processor may come from a library that is content with less."""
    return torch.as_tensor(np.sqrt(square.numpy())) if square.device.type == "cpu" else square.sqrt()


def by_row(order_P: Tensor, row_P: Tensor) -> Tensor:
    """The order refined: row after row, inside a row as it was."""
    return order_P[row_P[order_P].sort(stable=True).indices]


def first_of(row_P: Tensor, rows: int) -> Tensor:
    """Where each row's pairs begin; row_P ascends."""
    return torch.searchsorted(row_P, torch.arange(rows, device=row_P.device))


def pieces(wide_R: np.ndarray, pairs: int) -> Iterator[tuple[int, int]]:
    """Runs of rows whose pairs together stay below `pairs`, one row at least."""
    total, start = np.cumsum(wide_R), 0
    while start < len(wide_R):
        before = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + pairs, "right")))
        yield start, stop
        start = stop


def expand(
    row_P: Tensor, group_P: Tensor, square_P: Tensor, distinct: Distinct, k: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs with distinct rows, ascending by (row, distance), as pairs with the rows these stand for, by (row, distance, index): of each
    set of copies the first k, and nothing beyond the distance at which a row has k."""
    count_P = distinct.count_G[group_P].clamp(max=k)
    total_P, start_R = count_P.cumsum(0), first_of(row_P, rows)
    before_R = torch.where(start_R > 0, total_P[(start_R - 1).clamp(min=0)], 0)
    short_P = total_P - before_R[row_P] < k
    enough_R = start_R + torch.zeros_like(start_R).scatter_add_(0, row_P, short_P.long())
    kept = square_P <= square_P[enough_R][row_P]
    row_P, group_P, square_P, count_P = row_P[kept], group_P[kept], square_P[kept], count_P[kept]
    new = torch.ones_like(row_P, dtype=torch.bool)
    new[1:] = (row_P[1:] != row_P[:-1]) | (square_P[1:] != square_P[:-1])
    rank_P = new.long().cumsum(0)
    source = torch.repeat_interleave(count_P)
    step = torch.arange(len(source), device=row_P.device) - (count_P.cumsum(0) - count_P)[source]
    member = distinct.member[distinct.start_G[group_P[source]] + step]
    order = (rank_P[source] * len(distinct.member) + member).sort().indices
    source = source[order]
    return row_P[source], member[order], square_P[source]
