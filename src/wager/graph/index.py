"""Integer index expressions: affine in iterators, with floor division and remainder by constants. Hash-consed by value, always canonical."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, Union

import numpy as np

Ranges = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Div:
    """Floor of `of` / `by`."""

    of: Affine
    by: int


@dataclass(frozen=True)
class Mod:
    """Remainder of floor division, in [0, by)."""

    of: Affine
    by: int


Atom: TypeAlias = Union[str, Div, Mod]  # noqa: UP007 - Div refers to it before it exists


def _order(atom: Atom) -> tuple[int, str]:
    return (0, atom) if isinstance(atom, str) else (1, repr(atom))


@dataclass(frozen=True)
class Affine:
    """const + sum of coefficient * atom; an atom is an iterator's name, a Div or a Mod. Half-open ranges everywhere."""

    terms: tuple[tuple[Atom, int], ...] = ()
    const: int = 0

    def __add__(self, other: Affine | int) -> Affine:
        if isinstance(other, int):
            return Affine(self.terms, self.const + other)
        sums: dict[Atom, int] = dict(self.terms)
        for atom, c in other.terms:
            sums[atom] = sums.get(atom, 0) + c
        return Affine(
            tuple(sorted(((a, c) for a, c in sums.items() if c), key=lambda t: _order(t[0]))), self.const + other.const
        )

    def __sub__(self, other: Affine | int) -> Affine:
        return self + (other * -1 if isinstance(other, Affine) else -other)

    def __mul__(self, factor: int) -> Affine:
        if factor == 0:
            return Affine()
        return Affine(tuple((a, c * factor) for a, c in self.terms), self.const * factor)

    @property
    def iterators(self) -> set[str]:
        names: set[str] = set()
        for atom, _ in self.terms:
            names |= {atom} if isinstance(atom, str) else atom.of.iterators
        return names

    def coefficient(self, name: str) -> int:
        return next((c for a, c in self.terms if a == name), 0)

    @property
    def plain(self) -> bool:
        """No division or remainder."""
        return all(isinstance(a, str) for a, _ in self.terms)

    def substitute(self, by: Mapping[str, Affine], ranges: Ranges | None = None) -> Affine:
        out = Affine((), self.const)
        for atom, c in self.terms:
            if isinstance(atom, str):
                out = out + by.get(atom, it(atom)) * c
            else:
                inner = atom.of.substitute(by, ranges)
                out = out + (floordiv if isinstance(atom, Div) else remainder)(inner, atom.by, ranges) * c
        return out

    def bounds(self, ranges: Ranges) -> tuple[int, int]:
        """The smallest and largest value (an enclosure when atoms share iterators)."""
        low = high = self.const
        for atom, c in self.terms:
            if isinstance(atom, str):
                a, b = ranges[atom][0], ranges[atom][1] - 1
            else:
                a, b = atom.of.bounds(ranges)
                if isinstance(atom, Div):
                    a, b = a // atom.by, b // atom.by
                elif a // atom.by == b // atom.by:
                    a, b = a % atom.by, b % atom.by
                else:
                    a, b = 0, atom.by - 1
            low, high = low + min(a * c, b * c), high + max(a * c, b * c)
        return low, high

    def evaluate(self, env: Mapping[str, np.ndarray]) -> np.ndarray:
        total: np.ndarray = np.asarray(self.const, dtype=np.int64)
        for atom, c in self.terms:
            if isinstance(atom, str):
                value = env[atom]
            else:
                value = atom.of.evaluate(env)
                value = value // atom.by if isinstance(atom, Div) else value % atom.by
            total = total + c * value
        return total

    def code(self, rename: Callable[[str], str] = str) -> str:
        """C++ text."""
        parts = [str(self.const)] if self.const or not self.terms else []
        for atom, c in self.terms:
            if isinstance(atom, str):
                text = rename(atom)
            else:
                name = "wg_floordiv" if isinstance(atom, Div) else "wg_mod"
                text = f"{name}({atom.of.code(rename)}, {atom.by})"
            parts.append(text if c == 1 else f"{c} * {text}")
        return " + ".join(parts)

    def __str__(self) -> str:
        parts = []
        for atom, c in self.terms:
            text = atom if isinstance(atom, str) else f"({atom.of}){'//' if isinstance(atom, Div) else '%'}{atom.by}"
            parts.append(text if c == 1 else f"{c}*{text}")
        if self.const or not parts:
            parts.append(str(self.const))
        return "+".join(parts).replace("+-", "-")


def it(name: str) -> Affine:
    return Affine(((name, 1),))


def number(value: int) -> Affine:
    return Affine((), value)


def floordiv(x: Affine, by: int, ranges: Ranges | None = None) -> Affine:
    """x // by; parts that divide leave the floor, and a remainder that stays within [0, by) vanishes."""
    if by == 1:
        return x
    outside = Affine(tuple((a, c // by) for a, c in x.terms if c % by == 0), x.const // by)
    inside = Affine(tuple((a, c) for a, c in x.terms if c % by), x.const % by)
    if not inside.terms:
        return outside
    if ranges is not None and inside.iterators <= set(ranges):
        low, high = inside.bounds(ranges)
        if low // by == high // by:
            return outside + low // by
    return outside + Affine(((Div(inside, by), 1),))


def remainder(x: Affine, by: int, ranges: Ranges | None = None) -> Affine:
    if by == 1:
        return Affine()
    inside = Affine(tuple((a, c) for a, c in x.terms if c % by), x.const % by)
    if not inside.terms:
        return inside
    if ranges is not None and inside.iterators <= set(ranges):
        low, high = inside.bounds(ranges)
        if low // by == high // by:
            return inside - (low // by) * by
    return Affine(((Mod(inside, by), 1),))
