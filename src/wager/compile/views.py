"""Permuted inputs are layouts, not work: a search sees the tensor as its readers do, and the kernel found reads it as it lies."""

from __future__ import annotations

from dataclasses import replace

from wager.graph.program import Node, Program, pack


def _views(program: Program) -> dict[int, int]:
    """Inputs that only one permutation reads, by the position of that permutation."""
    readers: dict[int, list[int]] = {i: [] for i in program.input_positions}
    for i, node in enumerate(program.nodes):
        for j in node.inputs:
            if j in readers:
                readers[j].append(i)
    alone = {i: users[0] for i, users in readers.items() if len(users) == 1 and i not in program.outputs}
    return {at: i for i, at in alone.items() if program.nodes[at].op == "permute" and at not in program.outputs}


def absorb(program: Program) -> Program:
    """The program with permuted inputs of its own: as many, in the same order, with the same names."""
    program = program.pruned()
    views = _views(program)
    place: dict[int, int] = {}
    nodes: list[Node] = []
    for i, node in enumerate(program.nodes):
        if i in views:
            continue
        seen = next((at for at, source in views.items() if source == i), None)
        if seen is not None:
            shape = program.nodes[seen].shape
            node = Node("input", (), shape, pack(dict(node.attrs) | {"shape": shape}))
            place[seen] = len(nodes)
        place[i] = len(nodes)
        nodes.append(replace(node, inputs=tuple(place[j] for j in node.inputs)))
    return Program(tuple(nodes), tuple(place[i] for i in program.outputs))


def restore(found: Program, original: Program) -> Program:
    """A program over absorbed inputs as one over the original's."""
    original = original.pruned()
    views = {source: at for at, source in _views(original).items()}
    nodes: list[Node] = []
    given = []
    for i in original.input_positions:
        nodes.append(original.nodes[i])
        given.append(len(nodes) - 1)
        if i in views:
            nodes.append(replace(original.nodes[views[i]], inputs=(len(nodes) - 1,)))
            given[-1] = len(nodes) - 1
    place = dict(zip(found.input_positions, given, strict=True))
    for i, node in enumerate(found.nodes):
        if i not in place:
            nodes.append(replace(node, inputs=tuple(place[j] for j in node.inputs)))
            place[i] = len(nodes) - 1
    return Program(tuple(nodes), tuple(place[i] for i in found.outputs))
