"""Motif counts of every node: triangles, three-node paths, K4, diamonds, four-cycles, degree, all induced, in the order GUIDE uses."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from wager.detect.bond.graph import Graph
from wager.native import build


@cache
def _library() -> ctypes.CDLL:
    return build.load("wager_motifs", [Path(__file__).parent / "cpp" / "motifs.cpp"])


def motif_counts(graph: Graph, threads: int = 1) -> np.ndarray:
    """(N, 6) counts on the simple undirected graph, remembered with it. Exact; O(sum of squared degrees) plus pairs of common neighbours."""
    if (known := graph.__dict__.get("motifs_N6")) is not None:
        return known
    matrix = graph.simple
    start, neighbor = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64)
    out = np.zeros((graph.nodes, 6))
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (start, neighbor)]
    _library().wager_motifs(
        *pointers, ctypes.c_int64(graph.nodes), ctypes.c_void_p(out.ctypes.data), ctypes.c_int(threads)
    )
    graph.__dict__["motifs_N6"] = out  # as cached_property would
    return out
