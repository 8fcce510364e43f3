"""Sizes that are not known yet: symbols with constraints, and products of them, in the place of integers in a program's shapes.

A `Size` is coefficient * symbols. The operator table computes with sizes as it does with integers; what it must decide ("are these two equal",
"does this divide") it decides for every value that the constraints allow, and raises ShapeError where that depends on the value. A symbol is
never 1: a dimension of 1 broadcasts, which is another program. `instantiate` gives the concrete program for chosen values.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wager.errors import UsageError
from wager.graph.operators import ShapeError


@dataclass(frozen=True, order=True)
class Symbol:
    """A size by name: `low` <= value <= `high`, and `multiple` divides it. Raises UsageError for constraints that no value meets."""

    name: str
    low: int = 2
    high: int = 1 << 30
    multiple: int = 1

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_]\w*", self.name):
            raise UsageError(f"symbol {self.name!r}: use letters, digits and underscores")
        if self.low < 2 or self.multiple < 1 or self.high // self.multiple * self.multiple < self.low:
            raise UsageError(
                f"symbol {self.name}: no value of at least 2 lies in [{self.low}, {self.high}] and is a multiple of {self.multiple}"
            )

    def allows(self, value: int) -> bool:
        return self.low <= value <= self.high and value % self.multiple == 0

    @property
    def size(self) -> Size:
        return Size(1, (self,))


class Size:
    """coefficient * a product of symbols (each named as often as its power). Not below 2; equal only to the same product."""

    __slots__ = ("coefficient", "symbols")

    def __init__(self, coefficient: int, symbols: Sequence[Symbol]):
        self.coefficient, self.symbols = coefficient, tuple(sorted(symbols))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size) and (self.coefficient, self.symbols) == (other.coefficient, other.symbols)

    def __hash__(self) -> int:
        return hash((self.coefficient, self.symbols))

    def __lt__(self, other: Any) -> bool:
        (low, high), (least, most) = self.bounds, _bounds(other)
        return self._decided(high < least, low >= most, other)

    def __gt__(self, other: Any) -> bool:
        (low, high), (least, most) = self.bounds, _bounds(other)
        return self._decided(low > most, high <= least, other)

    def __ge__(self, other: Any) -> bool:
        return not self < other

    def __le__(self, other: Any) -> bool:
        return not self > other

    def _decided(self, yes: bool, no: bool, other: Any) -> bool:
        if not yes and not no:
            raise ShapeError(f"how {self} compares to {other} depends on the size")
        return yes

    @property
    def bounds(self) -> tuple[int, int]:
        return (
            self.coefficient * math.prod(s.low for s in self.symbols),
            self.coefficient * math.prod(s.high for s in self.symbols),
        )

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Size):
            return Size(self.coefficient * other.coefficient, (*self.symbols, *other.symbols))
        return Size(self.coefficient * other, self.symbols) if isinstance(other, int) else NotImplemented

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        if isinstance(other, int) and other == 0:
            return self
        if isinstance(other, Size) and other.symbols == self.symbols:
            return Size(self.coefficient + other.coefficient, self.symbols)
        raise ShapeError(f"the size {self} + {other} has no form: sizes are products of symbols")

    __radd__ = __add__

    def _quotient(self, other: Any) -> Any:
        """self / other where that is whole for every value, else None."""
        if isinstance(other, Size):
            left = Counter(self.symbols)
            left.subtract(other.symbols)
            if min(left.values(), default=0) < 0 or self.coefficient % other.coefficient:
                return None
            return _size(self.coefficient // other.coefficient, tuple(left.elements()))
        if self.coefficient % other == 0:
            return _size(self.coefficient // other, self.symbols)
        return None

    def __mod__(self, other: Any) -> int:
        """0 when `other` divides for every allowed value. Raises ShapeError when that depends on the value."""
        if self._quotient(other) is not None:
            return 0
        if isinstance(other, int) and self.coefficient * math.prod(s.multiple for s in self.symbols) % other == 0:
            return 0
        raise ShapeError(f"whether {other} divides {self} depends on the size; give the symbol a multiple")

    def __rmod__(self, other: Any) -> int:
        raise ShapeError(f"whether {self} divides {other} depends on the size")

    def __floordiv__(self, other: Any) -> Any:
        quotient = self._quotient(other)
        if quotient is None:
            raise ShapeError(f"{self} / {other} has no form: sizes are products of symbols")
        return quotient

    def __rfloordiv__(self, other: Any) -> Any:
        raise ShapeError(f"{other} / {self} has no form: sizes are products of symbols")

    def __str__(self) -> str:
        factors = [str(self.coefficient)] if self.coefficient != 1 else []
        return "*".join([*factors, *(s.name for s in self.symbols)])

    __repr__ = __str__

    def at(self, values: Mapping[str, int]) -> int:
        return self.coefficient * math.prod(values[s.name] for s in self.symbols)


def _bounds(size: Any) -> tuple[int, int]:
    return size.bounds if isinstance(size, Size) else (size, size)


def _size(coefficient: int, symbols: tuple[Symbol, ...]) -> Any:
    return Size(coefficient, symbols) if symbols else coefficient


def parse(text: str, symbols: Mapping[str, Symbol]) -> Any:
    """ "4*tokens" -> Size. Raises UsageError for a symbol that is not declared."""
    coefficient, found = 1, []
    for part in text.split("*"):
        if part.isdigit():
            coefficient *= int(part)
        elif part in symbols:
            found.append(symbols[part])
        else:
            raise UsageError(f"size {text!r} names {part!r}, which is no symbol; known: {', '.join(symbols) or 'none'}")
    return _size(coefficient, tuple(found))


def sizes_in(value: Any) -> Iterator[Size]:
    """Every symbolic size in nested tuples, nodes and block graphs."""
    from wager.graph.program import BlockGraph, Node

    if isinstance(value, Size):
        yield value
    elif isinstance(value, tuple):
        for v in value:
            yield from sizes_in(v)
    elif isinstance(value, Node):
        yield from sizes_in(value.shape)
        yield from sizes_in(tuple(v for _, v in value.attrs))
        yield from sizes_in(value.block)
    elif isinstance(value, BlockGraph):
        yield from sizes_in(value.nodes)


def symbols_of(program: Any) -> dict[str, Symbol]:
    """The program's symbols by name. Raises UsageError when one name stands for two symbols."""
    found: dict[str, Symbol] = {}
    for size in sizes_in(program.nodes):
        for s in size.symbols:
            if found.setdefault(s.name, s) != s:
                raise UsageError(f"symbol {s.name} has two sets of constraints: {found[s.name]} and {s}")
    return dict(sorted(found.items()))


def instantiate(program: Any, values: Mapping[str, int]) -> Any:
    """The program at these sizes. Raises UsageError for a missing, unknown or refused value."""
    from wager.graph.program import check

    known = symbols_of(program)
    if set(values) != set(known):
        raise UsageError(f"sizes are needed for {', '.join(known) or 'nothing'}; got {', '.join(values) or 'none'}")
    for name, value in values.items():
        s = known[name]
        if not s.allows(value):
            raise UsageError(f"{name}={value} is not allowed: {s.low} to {s.high}, multiples of {s.multiple}")

    def concrete(value: Any) -> Any:
        if isinstance(value, Size):
            return value.at(values)
        return tuple(concrete(v) for v in value) if isinstance(value, tuple) else value

    nodes = []
    for node in program.nodes:
        if node.block is not None and any(True for _ in sizes_in(node.block)):
            raise UsageError("a kernel's tiles are concrete; instantiate the program before it is searched")
        nodes.append(replace(node, shape=concrete(node.shape), attrs=concrete(node.attrs)))
    made = replace(program, nodes=tuple(nodes))
    check(made)
    return made
