"""A picture of a token tree: nodes by level, size and shade by the chance of being committed."""

from __future__ import annotations

from pathlib import Path

from wager.errors import UsageError
from wager.serve.speculate.tree_plan import GrowMap

LABELLED = 48  # guesses up to which every node bears its chance


def draw_tree(tree: GrowMap, path: str | Path) -> None:
    """Write an SVG or PNG. Raises UsageError when matplotlib is missing or the suffix is neither."""
    if Path(path).suffix not in (".svg", ".png"):
        raise UsageError(f"--plot takes a .svg or .png file, got {path}", param="plot")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("a picture needs matplotlib: pip install 'wager[plot]'", param="plot") from None
    place = positions(tree)
    figure = Figure(figsize=(max(4.0, 0.28 * (max(x for x, _ in place) + 2)), 0.7 * (tree.depth + 2)))
    axes = figure.add_subplot()
    for node, parent in enumerate(tree.parents):
        (x0, y0), (x1, y1) = place[parent + 1], place[node + 1]
        axes.plot([x0, x1], [y0, y1], color="0.75", linewidth=1, zorder=1)
    scores = [1.0, *(tree.scores or [0.5] * len(tree))]
    xs, ys = [x for x, _ in place], [y for _, y in place]
    axes.scatter(xs, ys, s=[30 + 170 * s for s in scores], c=scores, cmap="viridis_r", vmin=0, vmax=1, zorder=2)
    if len(tree) <= LABELLED:
        for x, y, score in zip(xs, ys, scores, strict=True):
            label = f"{score:.2f}".removeprefix("0") if score < 1 else "1"
            axes.annotate(label, (x, y), (7, 4), textcoords="offset points", fontsize=6, color="0.3")
    title = f"{len(tree)} guesses, {tree.depth} draft steps"
    if tree.expected_tokens:
        title += f": {tree.expected_tokens:.2f} tokens/step"
    if tree.expected_speedup:
        title += f", {tree.expected_speedup:.2f}x expected"
    axes.set_title(f"{title}\nnodes: chance of being committed", fontsize=9)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight")


def positions(tree: GrowMap) -> list[tuple[float, float]]:
    """(x, y) of the root and every node: leaves side by side, parents over the middle of their children."""
    place: list[tuple[float, float]] = [(0.0, 0.0)] * (len(tree) + 1)
    columns = 0

    def put(row: int, depth: int) -> float:
        nonlocal columns
        kids = tree.children[row]
        if kids:
            xs = [put(kid + 1, depth + 1) for kid in kids]
            x = (xs[0] + xs[-1]) / 2
        else:
            x, columns = float(columns), columns + 1
        place[row] = (x, -float(depth))
        return x

    put(0, 0)
    return place
