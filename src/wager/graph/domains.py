"""Number systems a program can be evaluated in: float64, a pair of finite fields, intervals.

A domain turns operators into functions of its own values; moving data (reshape, cut, broadcast) goes through `move`, which applies one
numpy function to every array a value is made of.

Finite fields (arXiv 2405.05751, section 6): a value is a pair (residue mod p, residue mod q) with q | p - 1. exp maps the q residue to a
power of a q-th root of unity mod p and forgets the q part, so only one exp may lie on a path. Functions without algebra in a field (sqrt, relu,
tanh, ...) are uninterpreted: one random function per name and trial. Equal arguments give equal values, different ones fresh uniform values,
so an equivalent program that uses only argument equality is never rejected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from scipy import special

from wager.errors import UsageError

Array = np.ndarray


class NotInDomain(UsageError):
    """The domain has no meaning for this operator (e.g. a second exp on one path in a finite field)."""


class UnluckyDraw(Exception):
    """A division by zero in a finite field: the trial says nothing and is drawn again."""


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FLOAT_UNARY: dict[str, Callable[..., Array]] = {
    "exp": np.exp,
    "sqrt": np.sqrt,
    "square": np.square,
    "silu": lambda x: x * special.expit(x),
    "gelu": lambda x: 0.5 * x * (1 + special.erf(x / math.sqrt(2))),
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": special.expit,
    "tanh": np.tanh,
    "neg": np.negative,
    "scale": lambda x, value: x * value,
    "shift": lambda x, value: x + value,
    "clamp": lambda x, low, high: np.clip(x, low, high),
    "leaky_relu": lambda x, slope: np.where(x >= 0, x, x * slope),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "log": np.log,
    "abs": np.abs,
    "sin": np.sin,
    "cos": np.cos,
}


class Float64:
    """IEEE double, or another floating type for comparison."""

    def __init__(self, dtype: Any = np.float64):
        self.dtype = dtype

    def constant(self, value: float) -> Array:
        return np.asarray(value, dtype=self.dtype)

    def move(self, function: Callable[[Array], Array], x: Array) -> Array:
        return function(x)

    def combine(self, function: Callable[[list[Array]], Array], values: list[Array]) -> Array:
        return function(values)

    def unary(self, op: str, x: Array, attrs: dict[str, Any]) -> Array:
        return FLOAT_UNARY[op](x, **attrs)

    def binary(self, op: str, a: Array, b: Array) -> Array:
        return {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "maximum": np.maximum}[op](
            a, b
        )

    def matmul(self, a: Array, b: Array) -> Array:
        return np.matmul(a, b)

    def sum(self, x: Array, axes: tuple[int, ...]) -> Array:
        return x.sum(axis=axes, keepdims=True)

    def max(self, x: Array, axes: tuple[int, ...]) -> Array:
        return x.max(axis=axes, keepdims=True)


@dataclass(frozen=True)
class Pair:
    """Residues mod p and mod q; `q` is None behind an exp."""

    p: Array
    q: Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.p.shape


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


TWIN_PRIMES = (2**31 - 69, 2**30 - 35)
"""p = 2q + 1: as large as int64 products allow, for small programs where exact matrix products need not use BLAS."""


@cache
def field_primes(least_p: int = 1_000_003, least_q: int = 100_003) -> tuple[int, int]:
    """(p, q), both prime, q | p - 1. Small enough that a product over 4096 terms is exact in float64."""
    q = least_q
    while True:
        if is_prime(q):
            factor = max(2, -(-least_p // q))
            for k in range(factor + factor % 2, factor + 40, 2):
                if is_prime(k * q + 1):
                    return k * q + 1, q
        q += 1


class FiniteField:
    """One trial: a random root of unity and random uninterpreted functions, both drawn from `rng`."""

    def __init__(self, rng: np.random.Generator, primes: tuple[int, int] | None = None):
        self.p, self.q = primes or field_primes()
        self.rng = rng
        base = 1
        while base == 1:
            base = pow(int(rng.integers(2, self.p)), (self.p - 1) // self.q, self.p)
        self.omega = base
        self.salt = int(rng.integers(1, 2**62))

    @cached_property
    def powers(self) -> Array:
        """omega ** i mod p for i < q."""
        table = np.ones(1, dtype=np.int64)
        step = self.omega
        while len(table) < self.q:
            table = np.concatenate([table, table * step % self.p])
            step = step * step % self.p
        return table[: self.q]

    def _power_of_omega(self, exponents: Array) -> Array:
        if self.q < 2**20:
            return self.powers[exponents]
        result, step = np.ones_like(exponents), self.omega
        for bit in range(self.q.bit_length()):
            result = np.where((exponents >> bit) & 1, result * step % self.p, result)
            step = step * step % self.p
        return result

    def random(self, shape: tuple[int, ...]) -> Pair:
        return Pair(self.rng.integers(0, self.p, shape), self.rng.integers(0, self.q, shape))

    def constant(self, value: float) -> Pair:
        """A rational with a small denominator keeps its meaning; any other number becomes its own random element."""
        number = float(value)
        for denominator in (1, *(2**k for k in range(1, 24)), *range(3, 8193)):
            scaled = number * denominator
            if abs(scaled) < 2**31 and scaled == round(scaled):
                top = round(scaled)
                if denominator % self.p and denominator % self.q:
                    return Pair(
                        np.asarray(top * pow(denominator, -1, self.p) % self.p),
                        np.asarray(top * pow(denominator, -1, self.q) % self.q),
                    )
        seed = np.asarray(np.float64(number).view(np.int64))
        return Pair(self._hash("constant", seed, self.p), self._hash("constant", seed, self.q))

    def move(self, function: Callable[[Array], Array], x: Pair) -> Pair:
        return Pair(function(x.p), None if x.q is None else function(x.q))

    def combine(self, function: Callable[[list[Array]], Array], values: list[Pair]) -> Pair:
        qs = [v.q for v in values if v.q is not None]
        return Pair(function([v.p for v in values]), function(qs) if len(qs) == len(values) else None)

    def unary(self, op: str, x: Pair, attrs: dict[str, Any]) -> Pair:
        if op == "exp":
            return self._exp(x)
        if op == "square":
            return self.binary("mul", x, x)
        if op == "neg":
            return Pair(-x.p % self.p, None if x.q is None else -x.q % self.q)
        if op == "scale":
            return self.binary("mul", x, self.constant(attrs["value"]))
        if op == "shift":
            return self.binary("add", x, self.constant(attrs["value"]))
        if op == "reciprocal":
            return self.binary("div", self.constant(1), x)
        if op == "rsqrt":
            return self.binary("div", self.constant(1), self.unary("sqrt", x, {}))
        if op in ("silu", "sigmoid"):
            one = self.constant(1)
            below = self.binary("add", one, self._exp(self.unary("neg", x, {})))
            return self.binary("div", x if op == "silu" else one, below)
        return self._uninterpreted(f"{op}{sorted(attrs.items())}", x)

    def _exp(self, x: Pair) -> Pair:
        if x.q is None:
            raise NotInDomain("a second exp on one path cannot be checked in a finite field; use the float64 check")
        return Pair(self._power_of_omega(x.q), None)

    def _uninterpreted(self, name: str, x: Pair) -> Pair:
        """A fresh element for every different argument. Behind an exp the argument is its p residue alone."""
        seed = x.p if x.q is None else x.p * self.q + x.q
        return Pair(self._hash(name + ":p", seed, self.p), self._hash(name + ":q", seed, self.q))

    def _hash(self, name: str, x: Array, modulus: int) -> Array:
        with np.errstate(over="ignore"):
            tag = np.uint64(
                int.from_bytes(name.encode()[-7:].rjust(7, b"\0"), "little") ^ (len(name) << 57) ^ self.salt
            )
            z = x.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + tag
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
            return ((z ^ (z >> np.uint64(31))) % np.uint64(modulus)).astype(np.int64)

    def binary(self, op: str, a: Pair, b: Pair) -> Pair:
        if op == "maximum":
            low, high = np.minimum(a.p, b.p), np.maximum(a.p, b.p)
            return self._uninterpreted("maximum", Pair(self._hash("pair", low * self.p + high, 2**62), None))
        function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}.get(op)
        if function is not None:
            both = a.q is not None and b.q is not None
            return Pair(function(a.p, b.p) % self.p, function(a.q, b.q) % self.q if both else None)
        return self.binary(
            "mul", a, Pair(self._inverse(b.p, self.p), None if b.q is None else self._inverse(b.q, self.q))
        )

    @staticmethod
    def _inverse(x: Array, modulus: int) -> Array:
        if not np.all(x % modulus):
            raise UnluckyDraw
        result, power, exponent = np.ones_like(x), x % modulus, modulus - 2
        while exponent:
            if exponent & 1:
                result = result * power % modulus
            power = power * power % modulus
            exponent >>= 1
        return result

    def matmul(self, a: Pair, b: Pair) -> Pair:
        both = a.q is not None and b.q is not None
        return Pair(
            _modular_matmul(a.p, b.p, self.p),
            _modular_matmul(a.q, b.q, self.q) if both and a.q is not None and b.q is not None else None,
        )

    def sum(self, x: Pair, axes: tuple[int, ...]) -> Pair:
        q = None if x.q is None else x.q.sum(axis=axes, keepdims=True) % self.q
        return Pair(x.p.sum(axis=axes, keepdims=True) % self.p, q)

    def max(self, x: Pair, axes: tuple[int, ...]) -> Pair:
        raise NotInDomain("a maximum over a dimension cannot be checked in a finite field; use the float64 check")


class FunctionField(FiniteField):
    """The same with exp as one more function about which nothing is known: a random one, so that it may occur twice on a path."""

    def _exp(self, x: Pair) -> Pair:
        return self._uninterpreted("exp", x)


def _modular_matmul(a: Array, b: Array, modulus: int) -> Array:
    """Exact: for small moduli every partial sum stays below 2**53, so float64 BLAS does integer arithmetic."""
    step = 2**53 // (modulus * modulus)
    if step == 0:
        return (a[..., :, :, None] * b[..., None, :, :] % modulus).sum(axis=-2) % modulus
    total = None
    for start in range(0, a.shape[-1], step):
        part = np.matmul(
            a[..., start : start + step].astype(np.float64), b[..., start : start + step, :].astype(np.float64)
        )
        part = (part % modulus).astype(np.int64)
        total = part if total is None else (total + part) % modulus
    assert total is not None
    return total
