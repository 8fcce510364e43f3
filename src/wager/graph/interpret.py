"""Evaluates a program in any domain. The reference semantics of every operator; slow and plain.

A block graph is evaluated for all blocks and loop iterations at once: tiles carry four leading axes (grid x, y, z, loop), of size 1 where
the value does not depend on that axis. Cutting a dimension moves digits of its index to the front, saving an output moves them back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wager.errors import UsageError
from wager.graph.domains import Float64
from wager.graph.operators import BINARY, UNARY, Shape
from wager.graph.program import BlockGraph, Node, Program

LEAD = 4


def run(program: Program, inputs: Sequence[Any], domain: Any = None) -> list[Any]:
    """The outputs for `inputs` in the program's input order. A value is dropped after its last use."""
    domain = domain or Float64()
    given = iter(inputs)
    values: list[Any] = []
    last = last_uses(program)
    for at, node in enumerate(program.nodes):
        args = [values[i] for i in node.inputs]
        if node.op == "input":
            values.append(next(given))
        elif node.op == "kernel":
            assert node.block is not None
            values.append(run_block(node.block, args, domain))
        elif node.op == "result":
            values.append(args[0][node["index"]])
        else:
            values.append(apply(node, args, domain))
        for i in (*node.inputs, at):
            if last[i] <= at:
                values[i] = None
    return [values[i] for i in program.outputs]


def last_uses(program: Program) -> list[int]:
    """For each node the last one that reads it (itself where none does); past the end for the program's outputs."""
    last = list(range(len(program.nodes)))
    for at, node in enumerate(program.nodes):
        for i in node.inputs:
            last[i] = at
    for i in program.outputs:
        last[i] = len(program.nodes)
    return last


def apply(node: Node, args: Sequence[Any], domain: Any, lead: int = 0) -> Any:
    """One operator; the first `lead` axes of every value are batch axes."""
    op, attrs = node.op, dict(node.attrs)
    if op == "const":
        return domain.constant(attrs["value"])
    if op in UNARY:
        return domain.unary(op, args[0], attrs)
    if op in BINARY:
        return domain.binary(op, *args)
    if op == "matmul":
        return domain.matmul(*args)
    if op == "sum":
        return sum_to_width(args[0], attrs.get("dim", -1), attrs.get("width", 1), domain, lead)
    if op == "rms_norm":
        return domain.binary("div", args[0], root_mean_square(args[0], (len(args[0].shape) - 1,), domain))
    if op == "reshape":
        return domain.move(lambda x: x.reshape(attrs["shape"]), args[0])
    if op == "permute":
        return domain.move(lambda x: x.transpose(attrs["order"]), args[0])
    if op == "expand":
        return domain.move(lambda x: np.broadcast_to(x, attrs["shape"]), args[0])
    if op in ("pad", "slice", "unfold"):
        return domain.move(lambda x: part(op, x, attrs), args[0])
    if op == "concat":
        return domain.combine(lambda xs: np.concatenate(xs, axis=attrs["dim"]), list(args))
    return _network_operator(node, args, domain)


def _network_operator(node: Node, args: Sequence[Any], domain: Any) -> Any:
    """Operators of whole networks, by the definitions of their windows."""
    op, attrs = node.op, dict(node.attrs)
    if op == "softmax":
        dim = attrs["dim"]
        top = domain.max(args[0], (dim,))
        raised = domain.unary("exp", domain.binary("sub", args[0], top), {})
        return domain.binary("div", raised, domain.sum(raised, (dim,)))
    if op == "prelu":
        slope = domain.move(lambda s: s.reshape((-1,) + (1,) * (len(node.shape) - 2)), args[1])
        down = domain.binary(
            "mul", domain.unary("neg", domain.unary("relu", domain.unary("neg", args[0], {}), {}), {}), slope
        )
        return domain.binary("add", domain.unary("relu", args[0], {}), down)
    if op == "conv":
        return _convolution(node, args, domain)
    if op == "max_pool":
        (kh, kw), (sh, sw), (ph, pw) = attrs["kernel"], attrs["stride"], attrs["padding"]
        x = np.pad(args[0], ((0, 0), (0, 0), (ph, ph), (pw, pw)), constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), axis=(2, 3))[:, :, ::sh, ::sw]
        return windows.max(axis=(-2, -1))
    raise UsageError(f"operator {op!r} has no definition in the interpreter; rewrite the program without it")


def _convolution(node: Node, args: Sequence[Any], domain: Any) -> Any:
    """Sum over window positions of strided slices times a weight slice."""
    attrs = dict(node.attrs)
    (sh, sw), (ph, pw), (dh, dw), groups = attrs["stride"], attrs["padding"], attrs["dilation"], attrs.get("groups", 1)
    n, f, oh, ow = node.shape
    weight = args[1]
    if attrs.get("transposed"):  # spread the input by the stride, flip the window, and convolve
        height, width = weight.shape[2:]
        eh, ew = attrs.get("output_padding", (0, 0))
        cin = weight.shape[0]

        def spread(x: np.ndarray) -> np.ndarray:
            wide = np.zeros((n, cin, (x.shape[2] - 1) * sh + 1, (x.shape[3] - 1) * sw + 1), x.dtype)
            wide[:, :, ::sh, ::sw] = x
            top, left = dh * (height - 1) - ph, dw * (width - 1) - pw
            wide = np.pad(wide, ((0, 0), (0, 0), (max(top, 0), max(top + eh, 0)), (max(left, 0), max(left + ew, 0))))
            return wide[
                :,
                :,
                max(-top, 0) : wide.shape[2] - max(-top - eh, 0),
                max(-left, 0) : wide.shape[3] - max(-left - ew, 0),
            ]

        def flip(w: np.ndarray) -> np.ndarray:
            grouped = w.reshape(groups, cin // groups, f // groups, height, width)[..., ::-1, ::-1]
            return grouped.swapaxes(1, 2).reshape(f, cin // groups, height, width)

        x, weight, sh, sw = domain.move(spread, args[0]), domain.move(flip, weight), 1, 1
    else:
        x = domain.move(lambda t: np.pad(t, ((0, 0), (0, 0), (ph, ph), (pw, pw))), args[0])
    total = None
    for r in range(weight.shape[2]):
        for s in range(weight.shape[3]):
            patch = domain.move(
                lambda t, r=r, s=s: t[
                    :, :, r * dh : r * dh + (oh - 1) * sh + 1 : sh, s * dw : s * dw + (ow - 1) * sw + 1 : sw
                ].reshape(n, groups, -1, oh * ow),
                x,
            )
            taps = domain.move(lambda w, r=r, s=s: w[:, :, r, s].reshape(groups, f // groups, -1), weight)
            part = domain.matmul(taps, patch)
            total = part if total is None else domain.binary("add", total, part)
    out = domain.move(lambda t: t.reshape(n, f, oh, ow), total)
    if len(args) > 2:
        out = domain.binary("add", out, domain.move(lambda b: b.reshape(1, f, 1, 1), args[2]))
    return out


def part(op: str, x: np.ndarray, attrs: Mapping[str, Any]) -> np.ndarray:
    """What pad, slice and unfold do to an array."""
    if op == "pad":
        return np.pad(x, attrs["widths"])
    if op == "slice":
        at = [slice(None)] * x.ndim
        at[attrs["dim"]] = slice(attrs["start"], attrs["end"], attrs["step"])
        return x[tuple(at)]
    windows = np.lib.stride_tricks.sliding_window_view(x, attrs["size"], axis=attrs["dim"])
    at = [slice(None)] * windows.ndim
    at[attrs["dim"]] = slice(None, None, attrs["step"])
    return windows[tuple(at)]


def root_mean_square(x: Any, axes: tuple[int, ...], domain: Any) -> Any:
    count = math.prod(x.shape[a] for a in axes)
    return domain.unary(
        "sqrt", domain.unary("scale", domain.sum(domain.unary("square", x, {}), axes), {"value": 1 / count}), {}
    )


def sum_to_width(x: Any, dim: int, width: int, domain: Any, lead: int = 0) -> Any:
    axis = dim % (len(x.shape) - lead) + lead
    shape = x.shape
    folded = domain.move(lambda t: t.reshape(*shape[:axis], shape[axis] // width, width, *shape[axis + 1 :]), x)
    total = domain.sum(folded, (axis,))
    return domain.move(lambda t: t.reshape(*shape[:axis], width, *shape[axis + 1 :]), total)


def run_block(block: BlockGraph, arguments: Sequence[Any], domain: Any) -> list[Any]:
    """The saved outputs of one kernel node."""
    values: list[Any] = []
    outputs = []
    for node in block.nodes:
        args = [values[i] for i in node.inputs]
        if node.op == "input":
            value = domain.move(
                lambda t, node=node: cut_tiles(t, node["imap"], node["fmap"], block), arguments[node["arg"]]
            )
        elif node.op == "output":
            value = domain.move(lambda t, node=node: join_tiles(t, node["omap"], block), args[0])
            outputs.append(value)
        elif node.op.startswith("accum"):
            value = _accumulate(node, args[0], block.loop, domain)
        else:
            value = apply(node, args, domain, LEAD)
        values.append(value)
    return outputs


def _accumulate(node: Node, x: Any, loop: int, domain: Any) -> Any:
    """Over the loop axis (a value that does not vary with the loop is added `loop` times), then along the last dimension."""
    full = domain.move(lambda t: np.broadcast_to(t, (*t.shape[: LEAD - 1], loop, *t.shape[LEAD:])), x)
    if node.op == "accum_rms":
        return root_mean_square(full, (LEAD - 1, len(full.shape) - 1), domain)
    total = domain.sum(full, (LEAD - 1,))
    if node.op == "accum":
        return total
    return sum_to_width(total, -1, node.get("width", 1), domain, LEAD)


def cut_tiles(x: np.ndarray, imap: Sequence[int], fmap: int, block: BlockGraph) -> np.ndarray:
    """Index of a cut dimension = (grid digit, loop digit, position in the tile), outermost first."""
    shape: list[int] = []
    front = [-1] * LEAD
    for dim, size in enumerate(x.shape):
        rest = size
        for axis, (target, parts) in enumerate(zip((*imap, fmap), (*block.grid, block.loop), strict=True)):
            if target == dim:
                front[axis] = len(shape)
                shape.append(parts)
                rest //= parts
        shape.append(rest)
    x = x.reshape(shape)
    rest_axes = [i for i in range(len(shape)) if i not in front]
    lead = [front[a] for a in range(LEAD) if front[a] >= 0]
    x = x.transpose(lead + rest_axes)
    keep = iter(x.shape)
    return x.reshape([next(keep) if front[a] >= 0 else 1 for a in range(LEAD)] + list(x.shape[len(lead) :]))


def join_tiles(x: np.ndarray, omap: Sequence[int], block: BlockGraph) -> np.ndarray:
    """Concatenates the blocks' tiles along the dimensions that `omap` names."""
    tile: Shape = x.shape[LEAD:]
    x = np.broadcast_to(x, (*block.grid, 1, *tile))
    order: list[int] = []
    shape: list[int] = []
    for dim, size in enumerate(tile):
        grids = [a for a in range(3) if omap[a] == dim and block.grid[a] > 1]
        order += [*grids, LEAD + dim]
        shape.append(size * math.prod(block.grid[a] for a in grids))
    unused = [a for a in range(LEAD) if a not in order]
    return x.transpose(unused + order).reshape(shape)


def random_inputs(program: Program, rng: np.random.Generator, scale: float = 1.0) -> list[np.ndarray]:
    """Normal numbers of standard deviation `scale` for every input."""
    return [rng.standard_normal(shape) * scale for shape in program.input_shapes]


def feed(program: Program, named: Mapping[str, Any]) -> list[Any]:
    """Inputs by name, in order."""
    return [named[name] for name in program.input_names]
