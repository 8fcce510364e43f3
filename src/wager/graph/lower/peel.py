"""A batch dimension that a block computes slice by slice becomes part of the grid: slices fit a nearer cache, and blocks are easier to spread."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from wager.graph.operators import ACCUMULATORS, BINARY, UNARY
from wager.graph.program import BlockGraph, Node, pack

ALONG_LAST = frozenset(("rms_norm", "accum", "accum_rms"))


def peel(block: BlockGraph) -> BlockGraph:
    """The same computation over a larger grid, or the block itself where its slices depend on one another."""
    depth = max((n.shape[0] for n in block.nodes if len(n.shape) == 3), default=1)
    axis = next((a for a in (1, 2) if block.grid[a] == 1), None)
    if depth == 1 or axis is None or not all(_sliced(n, depth, axis, block) for n in block.nodes):
        return block
    grid = tuple(depth if a == axis else size for a, size in enumerate(block.grid))
    return replace(block, grid=grid, nodes=tuple(_slice(n, depth, axis) for n in block.nodes))


def _sliced(node: Node, depth: int, axis: int, block: BlockGraph) -> bool:
    """Whether each slice of the node reads only its own slice."""
    if len(node.shape) != 3 or node.shape[0] not in (1, depth):
        return False
    if node.op in ("input", "output"):
        maps = node["imap"] if node.op == "input" else node["omap"]
        later = any(maps[a] == 0 and block.grid[a] > 1 for a in range(axis + 1, 3))
        return not later and node.get("fmap", -1) != 0 and (node.op == "input" or node.shape[0] == depth)
    if node.op in UNARY or node.op in BINARY or node.op == "matmul" or node.op in ALONG_LAST:
        return True
    return (node.op == "sum" or node.op in ACCUMULATORS) and node.get("dim", -1) % 3 != 0


def _slice(node: Node, depth: int, axis: int) -> Node:
    attrs: dict[str, Any] = dict(node.attrs)
    name = {"input": "imap", "output": "omap"}.get(node.op)
    if name:
        maps = list(attrs[name])
        maps[axis] = 0 if node.shape[0] == depth else -1
        attrs[name] = tuple(maps)
    return replace(node, shape=(1, *node.shape[1:]), attrs=pack(attrs))
