"""The block search of `generate.BlockSearch` in C++: same graphs, same order, same counters, one to two orders of magnitude faster.

The compiled loop works on integers: an expression is its number in the algebra. It asks Python only for pairs (operator, expressions) that it
has not met, and for whether a closed graph is wanted. `BlockSearch` stays the reference that tests compare against.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from wager.compile.mirage.abstract import PARAMETERS, Algebra, Subexpressions, TooLarge
from wager.compile.mirage.generate import BlockSearch, Limits, Operator, Progress, Structure
from wager.errors import BuildError
from wager.graph.operators import BINARY, COMMUTATIVE, UNARY, Shape
from wager.graph.program import Node
from wager.native import build

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("enumerate.cpp")
RANK = 5  # most dimensions of a tensor
CODES_WIDTH = 5 + RANK
PRUNED, TOO_LARGE = -2, -3
SLICE_STATES = 65_536  # between two looks at the clock
KINDS = ("unary", "binary", "matmul", "sum", "rms_norm", "accum", "reduce")
APPLY = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64)
ACCEPT = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int64)
)
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loop, or None (with one warning) where native code cannot be built."""
    try:
        found = build.load("wager_enumerate", [SOURCE])
    except BuildError as error:
        log.warning("the search runs in Python, about 20 times slower: %s", error)
        return None
    found.wager_table_new.argtypes, found.wager_table_new.restype = (APPLY,), _P
    found.wager_table_free.argtypes, found.wager_table_free.restype = (_P,), None
    found.wager_search_new.argtypes = (_P, _I, _P, _P, _I, _P, _I, _I, _L, ACCEPT)
    found.wager_search_new.restype = _P
    found.wager_search_free.argtypes, found.wager_search_free.restype = (_P,), None
    found.wager_search_step.argtypes = (_P, _L)
    found.wager_search_counters.argtypes, found.wager_search_counters.restype = (_P, _P), None
    found.wager_search_read.argtypes = (_P, _P)
    return found


def kind(op: str) -> int:
    """The operator's row in the compiled shape rules; -1 when it has none."""
    if op in UNARY:
        return 0
    if op in BINARY:
        return 1
    known = {"accum_sum": "reduce", "accum_rms": "reduce", "accum_width": "reduce"}
    name = known.get(op, op)
    return KINDS.index(name) if name in KINDS else -1


class Enumerator:
    """Searches that share an algebra, a target and a menu, and so share what is known about expressions."""

    def __init__(self, algebra: Algebra, targets: Subexpressions, operators: Sequence[Operator], limits: Limits):
        self.algebra, self.targets, self.operators, self.limits = algebra, targets, list(operators), limits
        self.lib = library() if all(kind(o.op) >= 0 for o in operators) else None
        self.fault: BaseException | None = None
        self._table: Any = None
        if self.lib is not None:
            self._apply = APPLY(self._expression)
            self._table = self.lib.wager_table_new(self._apply)
            rows = [
                (kind(o.op), int(o.op in COMMUTATIVE), dict(o.attrs).get("dim", -1), dict(o.attrs).get("width", 1))
                for o in self.operators
            ]
            self._rows = (ctypes.c_int32 * (4 * len(rows)))(*(int(v) for row in rows for v in row))

    def __del__(self) -> None:
        if getattr(self, "_table", None) and self.lib is not None:
            self.lib.wager_table_free(self._table)
            self._table = None

    def _expression(self, at: int, a: int, b: int, count: int) -> int:
        operator = self.operators[at]
        attrs = dict(operator.attrs) if operator.op in PARAMETERS else {}
        try:
            value = self.algebra.apply(operator.op, [a] if b < 0 else [a, b], count, attrs)
        except TooLarge:
            return TOO_LARGE
        except Exception as error:  # must not cross the C frame; raised again by `run`
            self.fault = error
            return TOO_LARGE
        return PRUNED if self.limits.prune and value not in self.targets else value

    def run(
        self,
        expressions: Sequence[int],
        tiles: Sequence[Shape],
        outputs: int,
        accept: Callable[[list[int], list[Shape]], bool],
        progress: Progress,
        loop: int = 1,
    ) -> Iterator[Structure]:
        """What `BlockSearch.run` yields."""
        if self.lib is None or any(len(t) > RANK for t in tiles):
            search = BlockSearch(self.algebra, self.targets, self.operators, self.limits, progress, loop)
            yield from search.run(expressions, tiles, outputs, accept)
            return

        def wanted(count: int, values: Any, shapes: Any) -> int:
            try:
                return accept([values[i] for i in range(count)], [_shape(shapes, i * (RANK + 1)) for i in range(count)])
            except Exception as error:  # must not cross the C frame
                self.fault = error
                return 0

        callback = ACCEPT(wanted)
        values = (ctypes.c_int32 * len(expressions))(*expressions)
        flat = (ctypes.c_int64 * ((RANK + 1) * len(tiles)))(
            *(v for t in tiles for v in (len(t), *t, *(0 for _ in range(RANK - len(t)))))
        )
        handle = self.lib.wager_search_new(
            self._table, len(tiles), values, flat, len(self.operators), self._rows, self.limits.max_block_ops, outputs,
            loop, callback,
        )  # fmt: skip
        try:
            yield from self._drive(handle, len(tiles), progress)
        finally:
            self.lib.wager_search_free(handle)

    def _drive(self, handle: Any, inputs: int, progress: Progress) -> Iterator[Structure]:
        assert self.lib is not None
        counters = (ctypes.c_int64 * 2)()
        buffer = (ctypes.c_int64 * (CODES_WIDTH * (self.limits.max_block_ops + 2)))()
        before = progress.states, progress.pruned
        until = 0
        while True:
            if until <= counters[0]:
                if progress.look(self.limits):
                    return
                until = counters[0] + min(SLICE_STATES, max(1, self.limits.max_states - progress.states))
            code = self.lib.wager_search_step(handle, until)
            self.lib.wager_search_counters(handle, counters)
            progress.states, progress.pruned = before[0] + counters[0], before[1] + counters[1]
            if self.fault is not None:
                fault, self.fault = self.fault, None
                raise fault
            if code == 0:
                return
            if code == 1:
                progress.structures += 1
                count = self.lib.wager_search_read(handle, buffer)
                yield self._structure(list(buffer[: count * CODES_WIDTH]), inputs)

    def _structure(self, flat: list[int], inputs: int) -> Structure:
        nodes, saved = [], []
        for i in range(len(flat) // CODES_WIDTH):
            op, a, b, loose, *_ = flat[i * CODES_WIDTH : (i + 1) * CODES_WIDTH]
            shape = _shape(flat, i * CODES_WIDTH + 4)
            if op < 0:
                nodes.append(Node("input", (), shape, (("arg", i),)))
            else:
                operator = self.operators[op]
                nodes.append(Node(operator.op, (a,) if b < 0 else (a, b), shape, operator.attrs))
            if loose:
                saved.append(i)
        return Structure(inputs, tuple(nodes), tuple(saved))


def _shape(flat: Any, at: int) -> Shape:
    return tuple(flat[at + 1 : at + 1 + flat[at]])
