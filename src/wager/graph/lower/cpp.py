"""A block graph as C++: one parallel region, one task per block, tiles in a per-thread arena.

Levels map so: kernel = one `omp parallel for` over the grid; block = one task on one core with an arena that should fit its second-level
cache; thread graph = one vectorised loop nest (see tiles.py). Inputs marked as packed arrive as contiguous tiles (weights are laid out once at
compile time), others are read in place by strides or copied into the arena, as the layout says (see layout.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wager.errors import UsageError
from wager.graph.lower.code import BINARY_CODE, epilogue_type, number, ordered_strides, panel_width, unary_code
from wager.graph.lower.tiles import Layout, Tiles, product_form, row_major, vector_operations
from wager.graph.operators import BINARY, UNARY, Shape
from wager.graph.program import BlockGraph, Node

HEADERS = Path(__file__).parent
LINE = 16  # floats of a cache line
WORTH_WAKING = 60_000  # vector operations: about 20 microseconds of one core
FAR_BYTES = 4096  # rows this long are foreseen by the processor


@dataclass(frozen=True)
class View:
    """Where a tile is: a pointer name and a stride per dimension."""

    pointer: str
    strides: tuple[int, ...]


class _Emitter:
    def __init__(
        self, block: BlockGraph, arguments: Sequence[Shape], packed: frozenset[int], name: str, layout: Layout
    ):
        self.block, self.arguments, self.name = block, list(arguments), name
        self.layout, self.tiles = layout, Tiles(block, packed, layout)
        self.lines: list[str] = []
        self.types: list[str] = []
        self.views: dict[int, View] = {}
        self.indent = 2

    def emit(self, line: str) -> None:
        self.lines.append("    " * self.indent + line)

    def source(self) -> str:
        block, nodes, tiles = self.block, self.block.nodes, self.tiles
        places, arena = tiles.places()
        for i, at in places.items():
            self.emit(f"float* t{i} = arena + {at};")
            self.views[i] = View(f"t{i}", ordered_strides(nodes[i].shape, tiles.order(i)))
        for i, node in enumerate(nodes):
            if node.op == "output":
                self._bind_output(i)
            elif tiles.once(i):
                self._input(i)
        looped = [i for i in range(len(nodes)) if not block.after[i] or nodes[i].op.startswith("accum")]
        self.emit(f"for (long it = 0; it < {block.loop}; it++) {{")
        self.indent = 3
        for i in looped:
            if not tiles.once(i):
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
        body = "\n".join(self.lines)
        return f"""{"".join(self.types)}extern "C" void {self.name}(const float* const* in, float* const* out) {{
    {self._pragma()}
    for (long b = 0; b < {gx * gy * gz}; b++) {{
        alignas(64) static thread_local float arena[{max(arena, 1)}];
        const long g0 = b / {gy * gz}, g1 = (b / {gz}) % {gy}, g2 = b % {gz};
        (void)g0; (void)g1; (void)g2; (void)arena;
{body}
    }}
}}
"""

    def _pragma(self) -> str:
        """Waking the other threads takes longer than a small kernel."""
        small = self.block.blocks == 1 or vector_operations(self.block) < WORTH_WAKING
        return "" if small else "#pragma omp parallel for schedule(static)"

    def _node(self, i: int) -> None:
        node = self.block.nodes[i]
        if node.op == "input":
            self._input(i)
        elif node.op == "output":
            self._save(i)
        elif self.tiles.inline[i] or self.tiles.home(i) != i:
            return
        elif node.op == "matmul":
            self._matmul(node, self.views[i], "false")
        elif node.op == "accum":
            self._accumulate(i)
        elif node.op.startswith("accum") or node.op == "sum":
            self._reduce(i)
        elif node.op == "rms_norm":
            self._rms_norm(i)
        elif i in self.tiles.epilogues.values():
            self._product_with_epilogue(i)
        elif node.op in UNARY or node.op in BINARY:
            self._loop(
                node.shape,
                self.tiles.order(i),
                lambda at: f"{self._address(self.views[i], at)} = {self._value(i, at)};",
            )
        else:
            raise UsageError(f"block operator {node.op!r} has no C++ form")

    def _cuts(self, maps: Sequence[int], dim: int, size: int, step: int) -> list[str]:
        """The terms by which grid and loop indices move along dimension `dim` of a whole tensor."""
        terms, rest = [], size
        for axis, (target, parts) in enumerate(zip(maps, (*self.block.grid, self.block.loop), strict=False)):
            if target == dim and parts > 1:
                rest //= parts
                terms.append(f"{'it' if axis == 3 else f'g{axis}'} * {rest * step}L")
        return terms

    def _input(self, i: int) -> None:
        node, block = self.block.nodes[i], self.block
        arg, maps = node["arg"], (*node["imap"], node["fmap"])
        if arg in self.tiles.packed:
            index = "0"
            for axis, (target, parts) in enumerate(zip(maps, (*block.grid, block.loop), strict=True)):
                if target >= 0:
                    index = f"({index} * {parts} + {'it' if axis == 3 else f'g{axis}'})"
            self.emit(f"const float* t{i} = in[{arg}] + {index} * {math.prod(node.shape)}L;")
            self.views[i] = View(f"t{i}", ordered_strides(node.shape, self.tiles.order(i)))
            return
        whole = self.arguments[arg]
        steps = ordered_strides(whole, self.layout.arguments[arg])
        offset = [t for d, size in enumerate(whole) for t in self._cuts(maps, d, size, steps[d])]
        copied = i in self.layout.copied
        name = f"s{i}" if copied else f"t{i}"
        self.emit(f"const float* {name} = in[{arg}]{''.join(' + ' + o for o in offset)};")
        source = View(name, steps)
        self._fetch_ahead(node, source)
        if not copied:
            self.views[i] = source
            return
        self._loop(
            node.shape,
            self.tiles.order(i),
            lambda at: f"{self._address(self.views[i], at)} = {self._address(source, at)};",
        )

    def _fetch_ahead(self, node: Node, view: View) -> None:
        """Asks for the next turn's tile while this one is computed where its rows lie apart: the processor does not foresee those."""
        dim, loop = node["fmap"], self.block.loop
        rank, near = len(node.shape), next((d for d, s in enumerate(view.strides) if s == 1), 0)
        run = node.shape[near]
        if dim < 0 or loop == 1 or rank < 2 or run >= math.prod(node.shape) or run < LINE:
            return
        others = [d for d in range(rank) if d != near]
        if run * 4 >= FAR_BYTES or view.strides[others[-1]] == run:
            return
        self.emit(f"if (it + 1 < {loop})")
        for d in others:
            self.emit(f"for (long i{d} = 0; i{d} < {node.shape[d]}; i{d}++)")
        at = [f"i{d}" if d != near else "r" for d in range(rank)]
        step = node.shape[dim] * view.strides[dim]
        self.emit(
            f"for (long r = 0; r < {run}; r += {LINE}) __builtin_prefetch(&{self._address(view, at)} + {step}L, 0, 2);"
        )

    def _bind_output(self, i: int) -> None:
        node, block = self.block.nodes[i], self.block
        whole = block.output_shape(node)
        index = self._output_index(i)
        steps = ordered_strides(whole, self.layout.results[index])
        offset = [t for d, size in enumerate(whole) for t in self._cuts(node["omap"], d, size, steps[d])]
        self.emit(f"float* t{i} = out[{index}]{''.join(' + ' + o for o in offset)};")
        self.views[i] = View(f"t{i}", steps)

    def _output_index(self, i: int) -> int:
        return sum(node.op == "output" for node in self.block.nodes[:i])

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
        if self.tiles.inline[j]:
            return self._value(j, at)
        return self._address(self.views[j], at, self.block.nodes[j].shape)

    def _loop(self, shape: Shape, order: Sequence[int], body: Callable[[list[str]], str]) -> None:
        """Loops nested in this order of dimensions, the innermost one vectorised."""
        for n, d in enumerate(order):
            if n == len(order) - 1:
                self.emit("#pragma omp simd")
            self.emit(f"for (long i{d} = 0; i{d} < {shape[d]}; i{d}++)" + (" {" if n < len(order) - 1 else ""))
            self.indent += 1
        self.emit(body([f"i{d}" for d in range(len(shape))]))
        for n in range(len(order)):
            self.indent -= 1
            if n < len(order) - 1:
                self.emit("}")

    def _matmul(self, node: Node, target: View, add: str, epilogue: str = "") -> None:
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
        left, right, out = base(va, shape_a), base(vb, shape_b), base(target, node.shape)
        (ar, ac), (br, bc), (cr, cc) = va.strides[-2:], vb.strides[-2:], target.strides[-2:]
        near = [step == 1 for step in (ar, ac, br, bc, cr, cc)]
        form = "panels" if self.tiles.panel(b) else product_form(m, n, k, near, panel_width() // 2)
        arguments = {
            "panels": f"{m}, {n}, {k}, {left}, {ar}, {ac}, {vb.pointer}, {out}, {cr}",
            "plain": f"{m}, {n}, {k}, {left}, {ar}, {ac}, {right}, {br}, {out}, {cr}",
            "swapped": f"{n}, {m}, {k}, {right}, {bc}, {br}, {left}, {ac}, {out}, {cc}",
            "dots": f"{m}, {n}, {k}, {left}, {ar}, {right}, {bc}, {out}, {cr}, {cc}",
            "slow": f"{m}, {n}, {k}, {left}, {ar}, {ac}, {right}, {br}, {bc}, {out}, {cr}, {cc}",
        }[form]
        name = "plain" if form == "swapped" else form
        call = f"wg_{name}<{epilogue}>" if epilogue else f"wg_call_{name}"
        self.emit(f"{call}({arguments}, {add});")

    def _product_with_epilogue(self, i: int) -> None:
        """A matmul and the unary operators behind it, applied to every finished entry."""
        nodes, chain, at = self.block.nodes, [], i
        while nodes[at].op != "matmul":
            chain.append(nodes[at])
            at = nodes[at].inputs[0]
        name = f"{self.name}_e{i}"
        self.types.append(epilogue_type(name, [(n.op, dict(n.attrs)) for n in reversed(chain)]))
        self._matmul(nodes[at], self.views[i], "false", name)

    def _accumulate(self, i: int) -> None:
        node = self.block.nodes[i]
        source = node.inputs[0]
        if self.tiles.direct(source) == i:
            self._matmul(self.block.nodes[source], self.views[i], "it > 0")
            return

        def body(at: Sequence[str]) -> str:
            place = self._address(self.views[i], at)
            return f"{place} = (it > 0 ? {place} : 0.0f) + {self._operand(source, at)};"

        self._loop(node.shape, self.tiles.order(i), body)

    def _reduce(self, i: int) -> None:
        """Sums along a dimension down to a width; accumulators add over the loop too."""
        node = self.block.nodes[i]
        shape = self.block.nodes[node.inputs[0]].shape
        dim = node.get("dim", -1) % len(shape)
        near = self.tiles.reading_order(i)
        along = dim if near == dim else near
        outer = [d for d in range(len(shape)) if d not in (dim, along)]
        for d in outer:
            self.emit(f"for (long i{d} = 0; i{d} < {shape[d]}; i{d}++)")
        self.emit(f"for (long w = 0; w < {node.shape[dim]}; w++) {{")
        self.indent += 1
        if along == dim:
            self._sum_along(i, shape, dim)
        else:
            self._sum_across(i, shape, dim, along)
        self.indent -= 1
        self.emit("}")

    def _sum_along(self, i: int, shape: Shape, dim: int) -> None:
        """One sum at a time, its terms side by side in memory."""
        node, width = self.block.nodes[i], self.block.nodes[i].shape[dim]
        at = [f"i{d}" for d in range(len(shape))]
        place = self._address(self.views[i], [*at[:dim], "w", *at[dim + 1 :]])
        source = node.inputs[0]
        start = "0.0f" if node.op == "sum" else f"it > 0 ? {place} : 0.0f"
        if width == 1 and not self.tiles.inline[source] and self.views[source].strides[dim] == 1:
            at[dim] = "0"
            first, squared = self._operand(source, at), "true" if node.op == "accum_rms" else "false"
            self.emit(f"{place} = ({start}) + wg_total<{squared}>(&{first}, {shape[dim]});")
            return
        at[dim] = f"(j * {width} + w)" if width > 1 else "j"
        self.emit(f"float s = {start};")
        self.emit("#pragma omp simd reduction(+ : s)")
        self.emit(f"for (long j = 0; j < {shape[dim] // width}; j++) {{")
        value = self._operand(source, at)
        self.emit(f"    const float v = {value}; s += {'v * v' if node.op == 'accum_rms' else 'v'};")
        self.emit("}")
        self.emit(f"{place} = s;")

    def _sum_across(self, i: int, shape: Shape, dim: int, along: int) -> None:
        """Many sums at a time, which lie side by side in memory, term after term."""
        node, width = self.block.nodes[i], self.block.nodes[i].shape[dim]
        at = [f"i{d}" for d in range(len(shape))]
        place = self._address(self.views[i], [*at[:dim], "w", *at[dim + 1 :]])
        loop = f"for (long i{along} = 0; i{along} < {shape[along]}; i{along}++)"
        at[dim] = f"(j * {width} + w)" if width > 1 else "j"
        value = self._operand(node.inputs[0], at)
        if node.op == "sum":
            self.emit(f"{loop} {place} = 0.0f;")
        else:
            self.emit(f"if (it == 0) {loop} {place} = 0.0f;")
        self.emit(f"for (long j = 0; j < {shape[dim] // width}; j++) {{")
        self.emit("#pragma omp simd")
        self.emit(f"    {loop} {{ const float v = {value}; {place} += {'v * v' if node.op == 'accum_rms' else 'v'}; }}")
        self.emit("}")

    def _root(self, i: int) -> None:
        node = self.block.nodes[i]
        count = self.block.loop * self.block.nodes[node.inputs[0]].shape[-1]

        def body(at: Sequence[str]) -> str:
            place = self._address(self.views[i], at)
            return f"{place} = __builtin_sqrtf({place} * {number(1 / count)}f);"

        self._loop(node.shape, self.tiles.order(i), body)

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
        self._loop(
            node.shape,
            self.layout.results[self._output_index(i)],
            lambda at: f"{self._address(self.views[i], at)} = {self._operand(node.inputs[0], at)};",
        )


def block_source(
    block: BlockGraph, arguments: Sequence[Shape], name: str, packed: Sequence[int] = (), layout: Layout | None = None
) -> str:
    """The C++ function `void name(const float* const* in, float* const* out)`. Raises UsageError for an operator without a C++ form.

    `packed` names the arguments that arrive as contiguous tiles (see `NativeKernel.pack`); without a layout all is row-major.
    """
    return _Emitter(block, arguments, frozenset(packed), name, layout or row_major(block, arguments)).source()
