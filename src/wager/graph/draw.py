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
    depth: list[int] = []
    for node in nodes:
        depth.append(max((depth[j] + 1 for j in node.inputs), default=0))
    rows: dict[int, list[int]] = {}
    for i, d in enumerate(depth):
        rows.setdefault(d, []).append(i)
    place = {
        i: (x0 + k * (BOX_W + GAP_X), 34 + d * (BOX_H + GAP_Y)) for d, row in rows.items() for k, i in enumerate(row)
    }
    out = [f'<text x="{x0}" y="20" font-weight="bold">{escape(title)}</text>']
    for i, node in enumerate(nodes):
        for j in node.inputs:
            (ax, ay), (bx, by) = place[j], place[i]
            out.append(f'<line x1="{ax + BOX_W / 2}" y1="{ay + BOX_H}" x2="{bx + BOX_W / 2}" y2="{by}" stroke="#888"/>')
    for i, node in enumerate(nodes):
        x, y = place[i]
        out.append(
            f'<rect x="{x}" y="{y}" width="{BOX_W}" height="{BOX_H}" rx="4" fill="{COLOURS.get(node.op, "#f6f6f6")}" stroke="#555"/>'
        )
        extra = detail(node)
        out.append(f'<text x="{x + 6}" y="{y + (15 if extra else 21)}">{escape(label(node)[:28])}</text>')
        if extra:
            out.append(f'<text x="{x + 6}" y="{y + 28}" fill="#666">{escape(extra[:30])}</text>')
    width = max(len(r) for r in rows.values()) * (BOX_W + GAP_X)
    return "\n".join(out), width, 40 + len(rows) * (BOX_H + GAP_Y)
