"""Memory-bound kernels (eOperators) from index expressions, as C++.

A scope's stages are inlined: a read outside a stage's range or inside a tensor's padding is zero, so ranges become guards. Guards that do not
depend on the innermost (vector) loop are tested outside it. Sums run outside the vector loop into a small accumulator row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor as TorchTensor

from wager.graph.expression import Body, Call, Number, Read, Scope, Tensor, substitute
from wager.graph.index import Affine, Div, Mod, it
from wager.graph.lower.code import BINARY_CODE, number, strides, unary_code
from wager.graph.lower.library import POINTER, compile_source

Guard = tuple[Affine, int, int]
MAX_ROW = 4096


@dataclass(frozen=True)
class Chain:
    """Stages merged: sum over `sums` of `leaf` where every guard (index in [low, high)) holds, else zero."""

    sums: tuple[tuple[str, int, int], ...]
    guards: tuple[Guard, ...]
    leaf: Body


class _Names:
    def __init__(self) -> None:
        self.count = 0

    def fresh(self) -> str:
        self.count += 1
        return f"q{self.count}"


def flatten(body: Body, ranges: dict[str, tuple[int, int]], names: _Names) -> Chain:
    """Inlines the stages of a read; other bodies stay as they are."""
    if not isinstance(body, Read):
        return Chain((), (), body)
    if isinstance(body.object, Tensor):
        guards = []
        for index, size in zip(body.index, body.object.shape, strict=True):
            low, high = index.bounds(ranges)
            if low < 0 or high >= size:
                guards.append((index, 0, size))
        return Chain((), tuple(guards), body)
    inner = body.object
    guards = []
    for index, (_, a, b) in zip(body.index, inner.loops, strict=True):
        low, high = index.bounds(ranges)
        if low < a or high >= b:
            guards.append((index, a, b))
    renamed = {n: names.fresh() for n, _, _ in inner.sums}
    sums = tuple((renamed[n], a, b) for n, a, b in inner.sums)
    by = {n: index for (n, _, _), index in zip(inner.loops, body.index, strict=True)}
    by |= {old: it(new) for old, new in renamed.items()}
    wider = ranges | {n: (a, b) for n, a, b in sums}
    deeper = flatten(substitute(inner.body, by, wider), wider, names)
    return Chain((*sums, *deeper.sums), (*guards, *deeper.guards), deeper.leaf)


def source(scope: Scope, inputs: Sequence[Tensor], name: str) -> str:
    """`void name(const float* const* in, float* out)`; the output is contiguous in loop order, `inputs` give the pointers' order."""
    return _Writer(scope, {t.name: i for i, t in enumerate(inputs)}, name).run()


class _Writer:
    def __init__(self, scope: Scope, order: Mapping[str, int], name: str):
        self.scope, self.order, self.name = scope, order, name
        self.names, self.lines, self.rows = _Names(), [], 0
        self.ranges = dict(scope.ranges)

    def run(self) -> str:
        loops = self.scope.loops or (("one", 0, 1),)
        outer, (vector, low, high) = loops[:-1], loops[-1]
        self.vector, width = vector, high - low
        steps = strides([b - a for _, a, b in loops])
        self.width = min(width, MAX_ROW)
        out = " + ".join([f"({n} - {a}) * {s}L" for (n, a, _), s in zip(outer, steps, strict=False)] or ["0"])
        if width > MAX_ROW:
            self.lines.append(
                f"for (long v0 = {low}; v0 < {high}; v0 += {MAX_ROW}) {{ const long vn = v0 + {MAX_ROW} < {high} ? v0 + {MAX_ROW} : {high};"
            )
        else:
            self.lines.append(f"{{ const long v0 = {low}, vn = {high};")
        body = Read(self.scope, tuple(it(n) for n, _, _ in self.scope.loops)) if self.scope.sums else self.scope.body
        value = self.value(body)
        self.lines.append('_Pragma("omp simd")')
        self.lines.append(
            f"for (long {vector} = v0; {vector} < vn; {vector}++) out[{out} + {vector} - {low}] = {value};"
        )
        self.lines.append("}")
        collapse = f" collapse({len(outer)})" if len(outer) > 1 else ""
        head = f"#pragma omp parallel for schedule(static){collapse}\n" if outer else ""
        nest = "\n".join(f"for (long {n} = {a}; {n} < {b}; {n}++)" for n, a, b in outer)
        inner = "\n".join(self.lines)
        return f'extern "C" void {self.name}(const float* const* in, float* out) {{\n{head}{nest} {{\n{inner}\n}}\n}}\n'

    def value(self, body: Body) -> str:
        """C++ for the body's value at the current vector position; sums are computed into a row first."""
        if isinstance(body, Number):
            return number(body.value) + "f"
        if isinstance(body, Call):
            args = [self.value(a) for a in body.args]
            if body.fn in BINARY_CODE:
                return "(" + BINARY_CODE[body.fn].format(a=args[0], b=args[1]) + ")"
            return unary_code(body.fn, args[0], dict(body.attrs))
        if body.object is self.scope:
            chain = flatten(self.scope.body, self.ranges, self.names)
            chain = Chain((*self.scope.sums, *chain.sums), chain.guards, chain.leaf)
        else:
            chain = flatten(body, self.ranges, self.names)
        for n, a, b in chain.sums:
            self.ranges[n] = (a, b)
        if not chain.sums:
            return self.guarded(chain, self.leaf(chain.leaf))
        return self.row(chain)

    def row(self, chain: Chain) -> str:
        """Emits the sum into an accumulator row; returns how to read it."""
        row = f"row{self.rows}"
        self.rows += 1
        self.lines.append(f"float {row}[{self.width}]; for (long i = 0; i < vn - v0; i++) {row}[i] = 0.0f;")
        for n, a, b in chain.sums:
            self.lines.append(f"for (long {n} = {a}; {n} < {b}; {n}++)")
        outside = [g for g in chain.guards if self.vector not in g[0].iterators]
        inside = Chain((), tuple(g for g in chain.guards if self.vector in g[0].iterators), chain.leaf)
        if outside:
            self.lines.append("if (" + " && ".join(self.test(g) for g in outside) + ")")
        value = self.guarded(inside, self.leaf(chain.leaf))
        self.lines.append('{ _Pragma("omp simd")')
        self.lines.append(
            f"for (long {self.vector} = v0; {self.vector} < vn; {self.vector}++) {row}[{self.vector} - v0] += {value}; }}"
        )
        return f"{row}[{self.vector} - v0]"

    def leaf(self, leaf: Body) -> str:
        if isinstance(leaf, Read) and isinstance(leaf.object, Tensor):
            steps = strides(leaf.object.shape)
            place = " + ".join(
                f"({self.code(i)}) * {s}L"
                for i, s, n in zip(leaf.index, steps, leaf.object.shape, strict=True)
                if n > 1
            )
            return f"in[{self.order[leaf.object.name]}][{place or '0'}]"
        return self.value(leaf)

    def guarded(self, chain: Chain, value: str) -> str:
        if not chain.guards:
            return value
        return f"({' && '.join(self.test(g) for g in chain.guards)} ? {value} : 0.0f)"

    def test(self, guard: Guard) -> str:
        index, low, high = guard
        return f"(unsigned long)({self.code(index)} - ({low})) < {high - low}UL"

    def code(self, index: Affine) -> str:
        """Like Affine.code, with plain division where the operand cannot be negative."""
        parts = [str(index.const)] if index.const or not index.terms else []
        for atom, c in index.terms:
            if isinstance(atom, str):
                text = atom
            else:
                low, _ = atom.of.bounds(self.ranges)
                inside = self.code(atom.of)
                if low >= 0:
                    text = f"((unsigned)({inside}) {'/' if isinstance(atom, Div) else '%'} {atom.by}u)"
                    text = f"(long){text}"
                else:
                    text = f"{'wg_floordiv' if isinstance(atom, Div) else 'wg_mod'}({inside}, {atom.by})"
            parts.append(text if c == 1 else f"{c} * {text}")
        return " + ".join(parts)


class EOperator:
    """A compiled memory-bound kernel. Call with contiguous float32 tensors in the order of `inputs`."""

    def __init__(self, scope: Scope, inputs: Sequence[Tensor]):
        self.scope, self.inputs = scope, tuple(inputs)
        self.function = _function(source(scope, self.inputs, "wager_eoperator"))
        self.pointers = (POINTER * max(len(self.inputs), 1))()

    def __call__(self, *args: TorchTensor) -> TorchTensor:
        out = torch.empty(self.scope.shape)
        kept = [a if a.is_contiguous() else a.contiguous() for a in args]
        for i, a in enumerate(kept):
            self.pointers[i] = a.data_ptr()
        self.function(self.pointers, out.data_ptr())
        return out


@lru_cache(maxsize=512)
def _function(text: str) -> Any:
    function = compile_source([text], "wager_eoperator", products=False).wager_eoperator
    function.argtypes, function.restype = (POINTER, POINTER), None
    return function


def leaf_tensors(scope: Scope) -> list[Tensor]:
    """The tensors a kernel for `scope` reads, in a fixed order (routine results count as tensors)."""
    from wager.graph.expression import reads

    found: dict[str, Tensor] = {}
    for read in reads(scope.body):
        for t in leaf_tensors(read.object) if isinstance(read.object, Scope) else [read.object]:
            found.setdefault(t.name, t)
    return list(found.values())


def is_identity(scope: Scope) -> bool:
    """Whether the scope copies one whole tensor in order: then it is only a view."""
    if scope.sums or not isinstance(scope.body, Read) or isinstance(scope.body.object, Scope):
        return False
    tensor, total, expected = scope.body.object, Affine(), Affine()
    if torch.Size(tensor.shape).numel() != torch.Size(scope.shape).numel():
        return False
    ranges = scope.ranges
    for index, step, size in zip(scope.body.index, strides(tensor.shape), tensor.shape, strict=True):
        low, high = index.bounds(ranges)
        if low < 0 or high >= size:
            return False
        total = total + index * step
    for (n, a, _), step in zip(scope.loops, strides(scope.shape), strict=True):
        expected = expected + (it(n) - a) * step
    return total == expected or recompose(total) == recompose(expected)


def recompose(x: Affine) -> Affine:
    """x//k*k + x%k = x, applied until nothing changes."""
    changed = True
    while changed:
        changed = False
        for atom, c in x.terms:
            if isinstance(atom, Mod):
                partner = next(
                    (
                        d
                        for d, e in x.terms
                        if isinstance(d, Div) and d.of == atom.of and d.by == atom.by and e == c * atom.by
                    ),
                    None,
                )
                if partner is None:
                    continue
                rest = x - Affine(((atom, c),)) - Affine(((partner, c * atom.by),))
                x, changed = rest + atom.of * c, True
                break
            if (
                isinstance(atom, Div)
                and len(atom.of.terms) == 1
                and not atom.of.const
                and isinstance(atom.of.terms[0][0], str)
            ):
                finer = next(
                    (
                        m
                        for m, e in x.terms
                        if isinstance(m, Mod)
                        and len(m.of.terms) == 1
                        and isinstance(m.of.terms[0][0], Div)
                        and m.of.terms[0][0].of == atom.of
                        and atom.by == m.of.terms[0][0].by * m.by
                        and e * m.by == c
                    ),
                    None,
                )
                if finer is not None:  # (x//ab)*b + (x//a)%b = x//a
                    e = c // finer.by
                    rest = x - Affine(((atom, c),)) - Affine(((finer, e),))
                    x, changed = rest + finer.of * e, True
                    break
    return x
