"""A block graph as C++: one parallel region, one task per block, tiles in a per-thread arena.

Levels map so: kernel = one `omp parallel for` over the grid; block = one task on one core with an arena that should fit its second-level
cache; thread graph = one vectorised loop nest. Thread graphs are built by rule: an elementwise operator with one elementwise consumer of
its shape is computed inside that consumer's loop; a matmul whose only consumer is its accumulator adds into the accumulator directly.
Inputs marked as packed arrive as contiguous tiles (weights are laid out once at compile time), others are read in place by strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from wager.errors import UsageError
from wager.graph.lower.memory import Lifetime, plan
from wager.graph.operators import BINARY, UNARY, Shape
from wager.graph.program import BlockGraph, Node
from wager.native import build

RUNTIME = Path(__file__).with_name("runtime.h")
UNARY_CODE = {
    "exp": "wg_exp({x})",
    "sqrt": "__builtin_sqrtf({x})",
    "square": "({x}) * ({x})",
    "silu": "wg_silu({x})",
    "gelu": "wg_gelu({x})",
    "gelu_tanh": "wg_gelu_tanh({x})",
    "relu": "wg_relu({x})",
    "sigmoid": "wg_sigmoid({x})",
    "tanh": "wg_tanh({x})",
    "neg": "-({x})",
    "scale": "({x}) * {value}f",
    "shift": "({x}) + {value}f",
    "clamp": "__builtin_fminf(__builtin_fmaxf({x}, {low}f), {high}f)",
    "leaky_relu": "(({x}) >= 0 ? ({x}) : ({x}) * {slope}f)",
    "rsqrt": "1.0f / __builtin_sqrtf({x})",
    "reciprocal": "1.0f / ({x})",
    "log": "__builtin_logf({x})",
    "abs": "__builtin_fabsf({x})",
    "sin": "__builtin_sinf({x})",
    "cos": "__builtin_cosf({x})",
}
BINARY_CODE = {
    "add": "({a}) + ({b})",
    "sub": "({a}) - ({b})",
    "mul": "({a}) * ({b})",
    "div": "({a}) / ({b})",
    "maximum": "__builtin_fmaxf({a}, {b})",
}


def number(value: float) -> str:
    """A C++ float literal body that reads back exactly (the `f` suffix is added by the caller)."""
    text = repr(float(value))
    return text if "e" in text or "." in text else text + ".0"


def unary_code(op: str, x: str, attrs: dict) -> str:
    if op not in UNARY_CODE:
        raise UsageError(f"operator {op!r} has no C++ form")
    return "(" + UNARY_CODE[op].format(x=x, **{k: number(v) for k, v in attrs.items()}) + ")"


def strides(shape: Sequence[int]) -> list[int]:
    """Row-major."""
    out = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        out[d] = out[d + 1] * shape[d + 1]
    return out


@dataclass(frozen=True)
class View:
    """Where a tile is: a pointer name and a stride per dimension."""

    pointer: str
    strides: tuple[int, ...]


@dataclass
class _Emitter:
    block: BlockGraph
    arguments: list[Shape]
    packed: frozenset[int]
    name: str
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        nodes = self.block.nodes
        self.consumers: list[list[int]] = [[] for _ in nodes]
        for i, node in enumerate(nodes):
            for j in node.inputs:
                self.consumers[j].append(i)
        self.inline = [self._is_inline(i) for i in range(len(nodes))]
        self.views: dict[int, View] = {}
        self.indent = 1

    def _is_inline(self, i: int) -> bool:
        """Elementwise, and its one consumer loops over the same shape: it never needs storage."""
        node, users = self.block.nodes[i], self.consumers[i]
        if node.op not in UNARY and node.op not in BINARY:
            return False
        if len(users) != 1:
            return False
        user = self.block.nodes[users[0]]
        if user.op in UNARY or user.op in BINARY:
            return user.shape == node.shape
        return user.op in ("accum", "accum_sum", "accum_rms", "output")

    def panel(self, i: int) -> bool:
        """A packed tile that only a matmul reads, as its right side: it arrives as panels of two vectors of columns."""
        node, users = self.block.nodes[i], self.consumers[i]
        if node.op != "input" or node["arg"] not in self.packed or len(users) != 1 or len(node.shape) != 2:
            return False
        user = self.block.nodes[users[0]]
        return user.op == "matmul" and user.inputs[1] == i != user.inputs[0] and node.shape[-1] % panel_width() == 0

    def direct(self, i: int) -> int | None:
        """The accumulator that matmul `i` may add into."""
        users = self.consumers[i]
        if self.block.nodes[i].op == "matmul" and len(users) == 1 and self.block.nodes[users[0]].op == "accum":
            return users[0]
        return None

    def emit(self, line: str) -> None:
        self.lines.append("    " * self.indent + line)

    def stored(self) -> list[int]:
        """Nodes with a place in the arena."""
        return [
            i
            for i, n in enumerate(self.block.nodes)
            if n.op not in ("input", "output") and not self.inline[i] and self.direct(i) is None
        ]

    def arena(self) -> int:
        """Assigns offsets; returns the arena's size in floats."""
        stored, last = self.stored(), len(self.block.nodes)
        loop_end = max((i for i, n in enumerate(self.block.nodes) if not self.block.after[i]), default=0)
        loop_end = max([loop_end, *(i for i, n in enumerate(self.block.nodes) if n.op.startswith("accum"))])
        homes: dict[int, int] = {}  # where an elementwise result replaces an operand that nothing reads any more
        lifetimes: dict[int, Lifetime] = {}
        for i in stored:
            end = max([i, *(self._real_uses(i))])
            accumulates = self.block.nodes[i].op.startswith("accum")
            size, start = 4 * math.prod(self.block.nodes[i].shape), 0 if accumulates else i
            end = max(end, loop_end) if accumulates else end
            old = self._replaceable(i, stored)
            homes[i] = homes[old] if old is not None else i
            if old is not None:
                lifetimes[homes[i]] = Lifetime(size, lifetimes[homes[i]].start, end)
            else:
                lifetimes[i] = Lifetime(size, start, end)
        offsets, peak = plan(list(lifetimes.values())) if lifetimes else ([], 0)
        place = dict(zip(lifetimes, offsets, strict=True))
        for i in stored:
            self.emit(f"float* t{i} = arena + {place[homes[i]] // 4};")
            self.views[i] = View(f"t{i}", tuple(strides(self.block.nodes[i].shape)))
        self.last = last
        return peak // 4

    def _replaceable(self, i: int, stored: Sequence[int]) -> int | None:
        """A stored operand of the same shape that elementwise node `i` reads last: each element is read, then written."""
        node = self.block.nodes[i]
        if node.op not in UNARY and node.op not in BINARY:
            return None
        alike = [j for j in node.inputs if j in stored and self.block.nodes[j].shape == node.shape]
        for j in alike:
            kept = self.block.nodes[j].op.startswith("accum") or self.block.after[i] != self.block.after[j]
            if not kept and max(self._real_uses(j)) == i:
                return j
        return None

    def _real_uses(self, i: int) -> list[int]:
        uses = []
        for user in self.consumers[i]:
            uses.append(user)
            if self.inline[user] or self.direct(user) is not None:
                uses += self._real_uses(user)
        return uses

    def source(self) -> str:
        block, nodes = self.block, self.block.nodes
        self.indent = 2
        arena = self.arena()
        head, self.lines = self.lines, []
        for i, node in enumerate(nodes):
            if node.op == "output":
                self._bind_output(i)
        looped = [i for i in range(len(nodes)) if not block.after[i] or nodes[i].op.startswith("accum")]
        self.emit(f"for (long it = 0; it < {block.loop}; it++) {{")
        self.indent = 3
        for i in looped:
            self._node(i)
        self.indent = 2
        self.emit("}")
        for i in looped:
            if nodes[i].op == "accum_rms":
                self._root(i)
        for i in range(len(nodes)):
            if i not in looped:
                self._node(i)
        gx, gy, gz = block.grid
        body = "\n".join([*head, *self.lines])
        return f"""extern "C" void {self.name}(const float* const* in, float* const* out) {{
    #pragma omp parallel for schedule(static)
    for (long b = 0; b < {gx * gy * gz}; b++) {{
        alignas(64) static thread_local float arena[{max(arena, 1)}];
        const long g0 = b / {gy * gz}, g1 = (b / {gz}) % {gy}, g2 = b % {gz};
        (void)g0; (void)g1; (void)g2; (void)arena;
{body}
    }}
}}
"""

    def _node(self, i: int) -> None:
        node = self.block.nodes[i]
        if node.op == "input":
            self._input(i)
        elif node.op == "output":
            self._save(i)
        elif self.inline[i] or self.direct(i) is not None:
            return
        elif node.op == "matmul":
            self._matmul(node, self.views[i], "false")
        elif node.op == "accum":
            self._accumulate(i)
        elif node.op.startswith("accum") or node.op == "sum":
            self._reduce(i)
        elif node.op == "rms_norm":
            self._rms_norm(i)
        elif node.op in UNARY or node.op in BINARY:
            self._loop(node.shape, lambda at: f"{self._address(self.views[i], at)} = {self._value(i, at)};")
        else:
            raise UsageError(f"block operator {node.op!r} has no C++ form")

    def _input(self, i: int) -> None:
        node, block = self.block.nodes[i], self.block
        arg = node["arg"]
        if arg in self.packed:
            index, size = "0", 1
            for axis, (target, parts) in enumerate(
                zip((*node["imap"], node["fmap"]), (*block.grid, block.loop), strict=True)
            ):
                if target >= 0:
                    index = f"({index} * {parts} + {'it' if axis == 3 else f'g{axis}'})"
                    size *= parts
            tile = math.prod(node.shape)
            self.emit(f"const float* t{i} = in[{arg}] + {index} * {tile}L;")
            self.views[i] = View(f"t{i}", tuple(strides(node.shape)))
            return
        whole, steps = self.arguments[arg], strides(self.arguments[arg])
        offset = []
        for dim, size in enumerate(whole):
            rest = size
            for axis, (target, parts) in enumerate(
                zip((*node["imap"], node["fmap"]), (*block.grid, block.loop), strict=True)
            ):
                if target == dim:
                    rest //= parts
                    offset.append(f"{'it' if axis == 3 else f'g{axis}'} * {rest * steps[dim]}L")
        self.emit(f"const float* t{i} = in[{arg}]{''.join(' + ' + o for o in offset)};")
        self.views[i] = View(f"t{i}", tuple(steps))

    def _bind_output(self, i: int) -> None:
        node, block = self.block.nodes[i], self.block
        whole = block.output_shape(node)
        steps = strides(whole)
        index = [n for n, o in enumerate(block.nodes) if o.op == "output"].index(i)
        offset = []
        for dim, size in enumerate(whole):
            rest = size
            for axis in range(3):
                if node["omap"][axis] == dim and block.grid[axis] > 1:
                    rest //= block.grid[axis]
                    offset.append(f"g{axis} * {rest * steps[dim]}L")
        self.emit(f"float* t{i} = out[{index}]{''.join(' + ' + o for o in offset)};")
        self.views[i] = View(f"t{i}", tuple(steps))

    def _address(self, view: View, at: Sequence[str], shape: Shape | None = None) -> str:
        if shape is not None:
            at = at[len(at) - len(shape) :]
            terms = [f"{a} * {s}" for a, s, n in zip(at, view.strides, shape, strict=True) if n > 1]
        else:
            terms = [f"{a} * {s}" for a, s in zip(at, view.strides, strict=True)]
        return f"{view.pointer}[{' + '.join(terms) or '0'}]"

    def _value(self, i: int, at: Sequence[str]) -> str:
        """The expression of elementwise node `i` at an index; its operands are read or computed in place."""
        node = self.block.nodes[i]
        args = [self._operand(j, at) for j in node.inputs]
        if node.op in UNARY:
            return unary_code(node.op, args[0], dict(node.attrs))
        return "(" + BINARY_CODE[node.op].format(a=args[0], b=args[1]) + ")"

    def _operand(self, j: int, at: Sequence[str]) -> str:
        if self.inline[j]:
            return self._value(j, at)
        return self._address(self.views[j], at, self.block.nodes[j].shape)

    def _loop(self, shape: Shape, body, simd: str = "#pragma omp simd") -> None:
        at = [f"i{d}" for d in range(len(shape))]
        for d, size in enumerate(shape):
            if d == len(shape) - 1 and simd:
                self.emit(simd)
            self.emit(f"for (long i{d} = 0; i{d} < {size}; i{d}++)" + (" {" if d < len(shape) - 1 else ""))
            self.indent += 1
        self.emit(body(at))
        for d in range(len(shape)):
            self.indent -= 1
            if d < len(shape) - 1:
                self.emit("}")

    def _matmul(self, node: Node, target: View, add: str) -> None:
        a, b = node.inputs
        shape_a, shape_b = self.block.nodes[a].shape, self.block.nodes[b].shape
        va, vb = self.views[a], self.views[b]
        batch = node.shape[:-2]
        for d, size in enumerate(batch):
            self.emit(f"for (long b{d} = 0; b{d} < {size}; b{d}++)")

        def base(view: View, shape: Shape) -> str:
            lead = len(shape) - 2
            terms = [f"b{d + len(batch) - lead} * {view.strides[d]}" for d in range(lead) if shape[d] > 1]
            return view.pointer + "".join(f" + {t}" for t in terms)

        m, k, n = shape_a[-2], shape_a[-1], shape_b[-1]
        if self.panel(b):
            self.emit(
                f"wg_gemm_panels({m}, {n}, {k}, {base(va, shape_a)}, {va.strides[-2]}, {va.strides[-1]}, {vb.pointer}, "
                f"{base(target, node.shape)}, {target.strides[-2]}, {add});"
            )
            return
        self.emit(
            f"wg_gemm({m}, {n}, {k}, {base(va, shape_a)}, {va.strides[-2]}, {va.strides[-1]}, {base(vb, shape_b)}, "
            f"{vb.strides[-2]}, {vb.strides[-1]}, {base(target, node.shape)}, {target.strides[-2]}, {add});"
        )

    def _accumulate(self, i: int) -> None:
        node = self.block.nodes[i]
        source = node.inputs[0]
        if self.direct(source) == i:
            self._matmul(self.block.nodes[source], self.views[i], "it > 0")
            return

        def body(at: Sequence[str]) -> str:
            place = self._address(self.views[i], at)
            return f"{place} = (it > 0 ? {place} : 0.0f) + {self._operand(source, at)};"

        self._loop(node.shape, body)

    def _reduce(self, i: int) -> None:
        """Sums along a dimension down to a width; accumulators add over the loop too."""
        node = self.block.nodes[i]
        source = node.inputs[0]
        shape = self.block.nodes[source].shape
        dim = node.get("dim", -1) % len(shape)
        width = node.shape[dim]
        outer = [f"i{d}" for d in range(len(shape))]
        for d, size in enumerate(shape):
            if d != dim:
                self.emit(f"for (long i{d} = 0; i{d} < {size}; i{d}++)")
        self.emit(f"for (long w = 0; w < {width}; w++) {{")
        self.indent += 1
        start = "0.0f"
        place = self._address(self.views[i], [*outer[:dim], "w", *outer[dim + 1 :]])
        if node.op != "sum":
            start = f"it > 0 ? {place} : 0.0f"
        self.emit(f"float s = {start};")
        self.emit("#pragma omp simd reduction(+ : s)")
        self.emit(f"for (long j = 0; j < {shape[dim] // width}; j++) {{")
        at = [*outer[:dim], f"(j * {width} + w)" if width > 1 else "j", *outer[dim + 1 :]]
        value = self._operand(source, at)
        self.emit(f"    const float v = {value}; s += {'v * v' if node.op == 'accum_rms' else 'v'};")
        self.emit("}")
        self.emit(f"{place} = s;")
        self.indent -= 1
        self.emit("}")

    def _root(self, i: int) -> None:
        node = self.block.nodes[i]
        count = self.block.loop * self.block.nodes[node.inputs[0]].shape[-1]

        def body(at: Sequence[str]) -> str:
            place = self._address(self.views[i], at)
            return f"{place} = __builtin_sqrtf({place} * {number(1 / count)}f);"

        self._loop(node.shape, body)

    def _rms_norm(self, i: int) -> None:
        node = self.block.nodes[i]
        source, shape = node.inputs[0], node.shape
        at = [f"i{d}" for d in range(len(shape))]
        for d, size in enumerate(shape[:-1]):
            self.emit(f"for (long i{d} = 0; i{d} < {size}; i{d}++) {{")
            self.indent += 1
        read = self._operand(source, at)
        last = at[-1]
        self.emit("float s = 0.0f;")
        self.emit("#pragma omp simd reduction(+ : s)")
        self.emit(f"for (long {last} = 0; {last} < {shape[-1]}; {last}++) s += ({read}) * ({read});")
        self.emit(f"const float r = 1.0f / __builtin_sqrtf(s * {number(1 / shape[-1])}f);")
        self.emit("#pragma omp simd")
        self.emit(
            f"for (long {last} = 0; {last} < {shape[-1]}; {last}++) {self._address(self.views[i], at)} = ({read}) * r;"
        )
        for _ in shape[:-1]:
            self.indent -= 1
            self.emit("}")

    def _save(self, i: int) -> None:
        node = self.block.nodes[i]
        source = node.inputs[0]
        self._loop(node.shape, lambda at: f"{self._address(self.views[i], at)} = {self._operand(source, at)};")


@cache
def panel_width() -> int:
    """Columns of a panel: two vectors of the processor that the generated code is compiled for."""
    return 32 if build.isa() == "avx512" else 16


def panels(block: BlockGraph, arguments: Sequence[Shape], packed: Sequence[int]) -> frozenset[int]:
    """The packed arguments whose tiles are wanted as panels [columns / width, rows, width]."""
    emitter = _Emitter(block, list(arguments), frozenset(packed), "probe")
    return frozenset(n["arg"] for i, n in enumerate(block.nodes) if emitter.panel(i))


def block_source(block: BlockGraph, arguments: Sequence[Shape], name: str, packed: Sequence[int] = ()) -> str:
    """The C++ function `void name(const float* const* in, float* const* out)`. Raises UsageError for an operator without a C++ form.

    `packed` names the arguments that arrive as contiguous tiles (see `pack_argument`).
    """
    return _Emitter(block, list(arguments), frozenset(packed), name).source()


def arena_bytes(block: BlockGraph, arguments: Sequence[Shape]) -> int:
    """The working set of one block: what it stores plus one tile of every input."""
    emitter = _Emitter(block, list(arguments), frozenset(), "probe")
    emitter.indent = 0
    return 4 * (emitter.arena() + sum(math.prod(n.shape) for n in block.inputs))
