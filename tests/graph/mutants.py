"""Single edits of kernel graphs, for checking that verifiers reject what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from wager.graph.operators import ShapeError
from wager.graph.program import BlockGraph, Node, Program, check, pack


def mutants(program: Program) -> Iterator[tuple[str, Program]]:
    """Well-formed programs that differ from `program` by one edit of one block graph (result shapes follow)."""
    for at, node in enumerate(program.nodes):
        if node.block is None:
            continue
        for name, block in block_edits(node.block):
            nodes = list(program.nodes)
            nodes[at] = replace(node, block=block)
            edited = Program(tuple(nodes), program.outputs)
            try:
                check(edited)
            except ShapeError:
                continue
            yield f"node {at}: {name}", edited


def block_edits(block: BlockGraph) -> Iterator[tuple[str, BlockGraph]]:
    def with_node(i: int, node: Node) -> BlockGraph:
        return replace(block, nodes=(*block.nodes[:i], node, *block.nodes[i + 1 :]))

    for i, node in enumerate(block.nodes):
        if node.op in ("div", "matmul") and len(set(node.inputs)) == 2:
            yield f"swap operands of {node.op} {i}", with_node(i, replace(node, inputs=node.inputs[::-1]))
        swaps = {
            "mul": "add",
            "add": "mul",
            "exp": "silu",
            "silu": "exp",
            "accum": "accum_rms",
            "accum_sum": "accum_rms",
            "accum_rms": "accum_sum",
            "div": "mul",
        }
        if node.op in swaps:
            yield f"{node.op} {i} becomes {swaps[node.op]}", with_node(i, replace(node, op=swaps[node.op]))
        if node.op == "rms_norm":
            yield f"rms_norm {i} becomes square", with_node(i, replace(node, op="square"))
        for attribute in ("imap", "omap"):
            if node.get(attribute) is not None:
                maps = list(node[attribute])
                for axis in range(3):
                    for target in range(-1, len(node.shape)):
                        if target != maps[axis] and block.grid[axis] > 1:
                            edited = tuple(target if a == axis else m for a, m in enumerate(maps))
                            attrs = pack(dict(node.attrs) | {attribute: edited})
                            yield f"{attribute} {i} -> {edited}", with_node(i, replace(node, attrs=attrs))
        if node.op == "input" and block.loop > 1:
            for target in range(-1, len(node.shape)):
                if target != node["fmap"]:
                    yield (
                        f"fmap {i} -> {target}",
                        with_node(i, replace(node, attrs=pack(dict(node.attrs) | {"fmap": target}))),
                    )
        if node.op == "matmul" and node.inputs[0] != node.inputs[1]:
            for side in (0, 1):
                for other in range(i):
                    if other not in node.inputs and block.nodes[other].shape == block.nodes[node.inputs[side]].shape:
                        inputs = tuple(other if s == side else j for s, j in enumerate(node.inputs))
                        yield f"matmul {i} reads {other}", with_node(i, replace(node, inputs=inputs))
    if block.loop > 1:
        yield "loop range halves", replace(block, loop=block.loop // 2)
        yield "loop range doubles", replace(block, loop=block.loop * 2)
