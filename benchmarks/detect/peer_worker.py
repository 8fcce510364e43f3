# pyright: reportMissingImports=false
"""PyOD, scikit-learn and pygod in an environment of their own, driven by benchmarks.worker.

    python benchmarks/detect/peer_worker.py      (requests on stdin; see `OPERATIONS`)

Needs pyod==3.6.7 scikit-learn, and pygod==1.1.0 torch-geometric for graphs. pygod's neighbour loader wants compiled extensions that have no
wheels for this torch; full-batch training needs no sampling, so a loader that yields the whole graph once stands in for it.
"""

from __future__ import annotations

import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.worker import serve

warnings.filterwarnings("ignore")
X: np.ndarray = np.zeros((0, 0))
GRAPH: dict[str, Any] = {}


def load_table(path: str, rows: int | None = None, jitter: float = 0.0) -> list[int]:
    """Keep a table for `fit`; jitter breaks ties by noise of that relative size, the same for everybody."""
    global X
    with np.load(path) as stored:
        X = np.ascontiguousarray(stored["X"][:rows], dtype=np.float64)
    if jitter:
        scale = X.std(0) + 1e-3 * np.abs(X).max()
        X = X + jitter * scale * np.random.default_rng(0).normal(size=X.shape)
    return list(X.shape)


def detector(name: str, config: dict[str, Any]) -> Any:
    import importlib

    kinds = {"iforest": "IForest", "feature_bagging": "FeatureBagging"}
    return getattr(importlib.import_module(f"pyod.models.{name}"), kinds.get(name, name.upper()))(**config)


def fit(names: list[str], configs: list[dict[str, Any]], n_jobs: int) -> float:
    """Seconds to fit PyOD's detectors one after the other, with n_jobs where they take it."""
    made = []
    for name, config in zip(names, configs, strict=True):
        try:
            made.append(detector(name, config | {"n_jobs": n_jobs}))
        except TypeError:
            made.append(detector(name, config))
    start = time.perf_counter()
    for one in made:
        one.fit(X)
    return time.perf_counter() - start


def scores(name: str, config: dict[str, Any]) -> str:
    """Fit and keep the scores in a file; its path."""
    import tempfile

    made = detector(name, config).fit(X)
    with tempfile.NamedTemporaryFile(suffix=".npy", delete=False) as file:
        np.save(file, made.decision_scores_)
    return file.name


def references() -> str:
    """The reference sets that PyOD's SOD chooses, in a file; its path."""
    import tempfile

    from pyod.models.sod import SOD

    with tempfile.NamedTemporaryFile(suffix=".npy", delete=False) as file:
        np.save(file, SOD()._snn(X))
    return file.name


def neighbors(k: int, n_jobs: int) -> float:
    """Seconds of scikit-learn's own search."""
    from sklearn.neighbors import NearestNeighbors

    start = time.perf_counter()
    NearestNeighbors(n_neighbors=k, n_jobs=n_jobs).fit(X).kneighbors()
    return time.perf_counter() - start


def load_graph(path: str) -> int:
    import torch
    from torch_geometric.data import Data

    with np.load(path) as stored:
        GRAPH["x"] = torch.from_numpy(stored["x"].astype(np.float32))
        GRAPH["edge_index"] = torch.from_numpy(stored["edge_index"].astype(np.int64))
    GRAPH["make"] = lambda: Data(x=GRAPH["x"].clone(), edge_index=GRAPH["edge_index"].clone())
    return len(GRAPH["x"])


class WholeGraph:
    """Yields the graph once, as pygod's loader does for a batch of all nodes."""

    def __init__(self, data: Any, num_neigh: Any, batch_size: int):
        import torch

        self.data = data
        data.batch_size, data.n_id = batch_size, torch.arange(data.x.shape[0])

    def __iter__(self):
        yield self.data


def train(name: str, config: dict[str, Any], seed: int, threads: int, mended: bool = False) -> dict[str, Any]:
    """Fit a pygod detector: scores, seconds, peak bytes of this process since its start of training.

    `mended`: SCAN's similarities stay fractions; otherwise numpy takes the type of a node's from the first, which may be the whole number 0.
    """
    import pygod.detector
    import pygod.detector.base
    import torch

    pygod.detector.base.NeighborLoader = WholeGraph
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if "backbone" in config:
        import torch_geometric.nn as layers

        config = config | {"backbone": getattr(layers, config["backbone"])}
    made = getattr(pygod.detector, name)(**config)
    if mended and name == "SCAN":
        similarity = made._similarity
        made._similarity = lambda u, v: float(similarity(u, v))
    data = GRAPH["make"]()
    reset_peak()
    before = status_bytes("VmRSS")
    start = time.perf_counter()
    made.fit(data)
    seconds = time.perf_counter() - start
    return {"scores": made.decision_score_.tolist(), "seconds": seconds, "peak_bytes": status_bytes("VmHWM") - before}


def motifs() -> float:
    """Seconds of pygod's motif counting, on the nodes that have an edge: it fails on others."""
    import tempfile

    from pygod.nn import GUIDEBase
    from torch_geometric.data import Data

    kept, renamed = GRAPH["edge_index"].unique(return_inverse=True)
    data = Data(x=GRAPH["x"][kept], edge_index=renamed)
    with tempfile.TemporaryDirectory() as fresh:
        start = time.perf_counter()
        GUIDEBase.calc_gdd(data, cache_dir=fresh)
        return time.perf_counter() - start


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


OPERATIONS = {
    "load_table": load_table, "fit": fit, "scores": scores, "references": references, "neighbors": neighbors, "load_graph": load_graph, "train": train, "motifs": motifs,
}  # fmt: skip

if __name__ == "__main__":
    serve(OPERATIONS)
