"""When two programs of kernels are the same but for sizes, the order of grid dimensions, operands and nodes."""

from __future__ import annotations

from itertools import permutations

from wager.graph.operators import COMMUTATIVE
from wager.graph.program import BlockGraph, Program


def form(program: Program) -> str:
    """A text that is equal for programs with the same kernels and maps, whatever their sizes."""
    values: list[str] = []
    for i, node in enumerate(program.nodes):
        args = [values[j] for j in node.inputs]
        if node.op == "input":
            values.append(f"in{program.input_positions.index(i)}")
        elif node.op == "result":
            block = program.nodes[node.inputs[0]].block
            assert block is not None
            values.append(_block(block, [values[j] for j in program.nodes[node.inputs[0]].inputs], node["index"]))
        else:
            values.append(_applied(node.op, args))
    return "|".join(values[i] for i in program.outputs)


def _applied(op: str, args: list[str]) -> str:
    return f"{op}({','.join(sorted(args) if op in COMMUTATIVE else args)})"


def _block(block: BlockGraph, arguments: list[str], index: int) -> str:
    """One output of a kernel, with the grid's dimensions in the order that gives the least text."""
    return min(_ordered(block, arguments, index, order) for order in permutations(range(3)))


def _ordered(block: BlockGraph, arguments: list[str], index: int, order: tuple[int, ...]) -> str:
    def maps(row: tuple[int, ...]) -> str:
        return ".".join(str(row[p]) if block.grid[p] > 1 else "-" for p in order)

    values: list[str] = []
    saved = []
    for node in block.nodes:
        args = [values[j] for j in node.inputs]
        if node.op == "input":
            loop = node["fmap"] if block.loop > 1 else "-"
            values.append(f"<{arguments[node['arg']]}:{maps(node['imap'])}:{loop}>")
        elif node.op == "output":
            saved.append(f"{{{args[0]}:{maps(node['omap'])}}}")
            values.append(args[0])
        else:
            values.append(_applied(node.op, args))
    return saved[index]
