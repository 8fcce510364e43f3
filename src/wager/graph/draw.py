"""Draws programs: Graphviz text, and SVG by a layered layout of our own (no external program needed)."""

from __future__ import annotations

from html import escape

from wager.graph.program import Node, Program

BOX_W, BOX_H, GAP_X, GAP_Y = 168, 34, 18, 30
COLOURS = {"input": "#e8eef7", "const": "#e8eef7", "kernel": "#fdeedd", "output": "#e6f4e6"}


def label(node: Node) -> str:
    if node.op == "kernel" and node.block:
        return f"kernel grid {'x'.join(map(str, node.block.grid))} loop {node.block.loop}"
    name = node.get("name") or node.op
    return f"{name} {list(node.shape)}" if node.shape else str(name)


def detail(node: Node) -> str:
    """How a block cuts what it reads, or joins what it writes: "x>0, loop>2" for data dimensions 0 and 2; empty elsewhere."""
    maps = node.get("imap") or node.get("omap")
    if maps is None:
        return ""
    names = zip((*"xyz", "loop"), (*maps, node.get("fmap", -1)), strict=True)
    cuts = ", ".join(f"{name}>{dim}" for name, dim in names if dim >= 0)
    source = f"argument {node['arg']} " if node.op == "input" else ""
    return source + (cuts or "whole")


def dot(program: Program) -> str:
    """Graphviz text; block graphs are clusters."""
    lines = ["digraph program {", "  node [shape=box, fontname=Helvetica];"]
    for i, node in enumerate(program.nodes):
        lines.append(f'  n{i} [label="{label(node)}"];')
        lines += [f"  n{j} -> n{i};" for j in node.inputs]
        if node.block:
            lines.append(f'  subgraph cluster_{i} {{ label="block of n{i}";')
            for k, inner in enumerate(node.block.nodes):
                extra = detail(inner)
                lines.append(f'    n{i}_{k} [label="{label(inner)}{chr(92) + "n" + extra if extra else ""}"];')
                lines += [f"    n{i}_{j} -> n{i}_{k};" for j in inner.inputs]
            lines.append("  }")
    return "\n".join([*lines, "}"])


def svg(program: Program) -> str:
    """The kernel level on the left, every block graph beside it."""
    panels = [("program", program.nodes)]
    panels += [(f"block of kernel {i}", n.block.nodes) for i, n in enumerate(program.nodes) if n.block]
    body, x, height = [], 10, 0
    for title, nodes in panels:
        text, width, tall = _panel(title, nodes, x)
        body.append(text)
        x, height = x + width + 40, max(height, tall)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{x}" height="{height + 20}" font-family="Helvetica,sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>\n"])


def _panel(title: str, nodes: tuple[Node, ...], x0: int) -> tuple[str, int, int]:
    """One level, layer below layer. An edge over several layers passes each between boxes, through a place of its own."""
    rows, paths = _layers(nodes)
    wide = [sum(_width(item) + GAP_X for item in row) - GAP_X for row in rows]
    width, place = max(wide), {}
    for d, row in enumerate(rows):
        x = x0 + (width - wide[d]) // 2
        for item in row:
            place[item] = (x, 34 + d * (BOX_H + GAP_Y))
            x += _width(item) + GAP_X
    out = [f'<text x="{x0}" y="20" font-weight="bold">{escape(title)}</text>']
    for path in paths:
        out.append(f'<path d="{_curve([place[item] for item in path], path)}" fill="none" stroke="#888"/>')
    for i, node in enumerate(nodes):
        x, y = place[i]
        out.append(
            f'<rect x="{x}" y="{y}" width="{BOX_W}" height="{BOX_H}" rx="4" fill="{COLOURS.get(node.op, "#f6f6f6")}" stroke="#555"/>'
        )
        extra = detail(node)
        out.append(f'<text x="{x + 6}" y="{y + (15 if extra else 21)}">{escape(_short(label(node), 28))}</text>')
        if extra:
            out.append(f'<text x="{x + 6}" y="{y + 28}" fill="#666">{escape(_short(extra, 30))}</text>')
    return "\n".join(out), width + GAP_X, 40 + len(rows) * (BOX_H + GAP_Y)


Item = int | tuple[int, int, int]
"""A node, or where the edge from one node to another passes a layer."""


def _layers(nodes: tuple[Node, ...]) -> tuple[list[list[Item]], list[list[Item]]]:
    """Items by layer, each layer in the order of what its items hang from, and every edge as the items along it."""
    depth: list[int] = []
    for node in nodes:
        depth.append(max((depth[j] + 1 for j in node.inputs), default=0))
    for i, node in enumerate(nodes):
        if not node.inputs:  # what is read late stands late
            depth[i] = min((depth[k] for k, n in enumerate(nodes) if i in n.inputs), default=1) - 1
    rows: list[list[Item]] = [[] for _ in range(max(depth) + 1)]
    paths: list[list[Item]] = []
    for i, node in enumerate(nodes):
        rows[depth[i]].append(i)
        for j in dict.fromkeys(node.inputs):
            between: list[Item] = [(j, i, d) for d in range(depth[j] + 1, depth[i])]
            paths.append([j, *between, i])
            for d, item in enumerate(between, depth[j] + 1):
                rows[d].append(item)
    above = {item: [p[p.index(item) - 1] for p in paths if item in p[1:]] for row in rows for item in row}
    for d in range(1, len(rows)):
        at = {item: n for n, item in enumerate(rows[d - 1])}
        rows[d].sort(
            key=lambda item: sum(at[u] for u in above[item]) / max(len(above[item]), 1) if above[item] else 1e9
        )
    return rows, paths


def _width(item: Item) -> int:
    return BOX_W if isinstance(item, int) else 8


def _curve(points: list[tuple[int, int]], path: list[Item]) -> str:
    """Down from the first box to the last, upright where it leaves, passes and arrives."""
    x, y = points[0][0] + _width(path[0]) / 2, points[0][1] + BOX_H
    text = f"M {x} {y}"
    for (left, top), item in zip(points[1:], path[1:], strict=True):
        to, middle = left + _width(item) / 2, (y + top) / 2
        text += f" C {x} {middle} {to} {middle} {to} {top}"
        x, y = to, top + BOX_H
        if not isinstance(item, int):
            text += f" L {x} {y}"
    return text


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
