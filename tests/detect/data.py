"""Small data for the tests: points with duplicates, near-ties, wide ranges; graphs with loops, repeats, isolated nodes."""

import numpy as np
import torch

from wager.detect.bond import Graph


def points(seed: int, n: int, d: int, kind: str) -> np.ndarray:
    """`plain`, `duplicates`, `grid` (integer ties), `ulp` (neighbours one rounding apart), `sphere` (all but equally far from
    the first), `wide` (1e-6 to 1e6), `constant` (columns)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    if kind == "duplicates":
        x[: n // 2] = x[rng.integers(n // 2, n, n // 2)]
    if kind == "grid":
        x = rng.integers(0, 3, (n, d)).astype(float)
    if kind == "ulp":
        base = rng.normal(size=(max(1, n // 4), d))
        x = base[rng.integers(0, len(base), n)]
        x = np.where(rng.random((n, d)) < 0.3, np.nextafter(x, np.inf), x)
    if kind == "sphere":
        x = x / np.linalg.norm(x, axis=1, keepdims=True) * (1 + 1e-12 * rng.random((n, 1)))
        x[0] = 0
    if kind == "wide":
        x *= 10.0 ** rng.uniform(-6, 6, (n, 1))
    if kind == "constant":
        x[:, ::2] = 7.0
    if kind == "offset":
        x = x * 1e-3 + 1e6
    return np.ascontiguousarray(x)


KINDS = ("plain", "duplicates", "grid", "ulp", "sphere", "wide", "constant", "offset")


def oracle(query: np.ndarray, base: np.ndarray, k: int, own: bool) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours by sorting all float64 distances, ties by index; numpy alone."""
    square = ((query[:, None] - base[None]) ** 2).sum(2)
    if own:
        np.fill_diagonal(square, np.inf)
    index = np.argsort(square, axis=1, kind="stable")[:, :k]
    return np.sqrt(np.take_along_axis(square, index, 1)), index


def graph(seed: int, n: int = 30, d: int = 5, edges: int = 80, *, messy: bool = True) -> Graph:
    """Random directed edges; messy: loops, repeated edges and a node without any."""
    g = torch.Generator().manual_seed(seed)
    e = torch.randint(0, n - 1 if messy else n, (2, edges), generator=g)
    if messy:
        e = torch.cat([e, e[:, :7], torch.tensor([[0, 3], [0, 3]])], 1)
    return Graph(torch.randn(n, d, generator=g), e)


def dense(g: Graph) -> torch.Tensor:
    """The adjacency, repeated edges counted."""
    s = torch.zeros(g.nodes, g.nodes)
    return s.index_put_((g.edge_index[0], g.edge_index[1]), torch.ones(g.edge_index.shape[1]), accumulate=True)
