"""Detectors that look at features or projections: HBOS, LODA, PCA, ECOD, COPOD, IForest. Scores are PyOD's, seeds included.

Exact, except that PCA leaves out directions in which the training rows do not vary at all: PyOD divides by their rounding noise.
ECOD and COPOD, as in PyOD, rank new rows together with the training rows. Sources: TOD (arXiv 2110.14007), ECOD (arXiv 2201.00382),
COPOD (arXiv 2009.09463), and the papers named at each class.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from wager.detect.tod import native, operators, plan
from wager.detect.tod.base import Detector
from wager.detect.tod.batching import Execution
from wager.detect.tod.checks import DataError, check_between


@plan.operator("histograms", bytes=lambda n, d, bins, density: 8 * n, made_of="histogram")
def histograms(
    execution: Execution, x_ND: np.ndarray, bins: int | str, density: bool
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Heights and edges of an equal-width histogram of every column; bins "auto" by Birge and Rozenholc."""
    pairs = [np.histogram(c, optimal_bins(c) if bins == "auto" else bins, density=density) for c in x_ND.T]
    return [h for h, _ in pairs], [e for _, e in pairs]


def optimal_bins(column_N: np.ndarray) -> int:
    """The number of bins that maximises the penalised likelihood of Birge and Rozenholc (2006)."""
    n = len(column_N)

    def likelihood(bins: int) -> float:
        counts = np.histogram(column_N, bins)[0]
        penalty = bins - 1 + np.log(bins) ** 2.5
        return float((counts * np.log(bins * counts / n + 1) - penalty).sum())

    return 1 + int(np.argmax([likelihood(b) for b in range(1, max(2, int(np.sqrt(n))))]))


class HBOS(Detector):
    """Histogram-based outlier score: sum over features of -log2(density + alpha) (Goldstein & Dengel 2012)."""

    minimum_rows = 1

    def __init__(self, n_bins=10, alpha=0.1, tol=0.5, contamination=0.1, n_jobs=None, execution=None):
        self.n_bins, self.alpha, self.tol, self.contamination = n_bins, alpha, tol, contamination
        self.n_jobs, self.execution = n_jobs, execution

    def check(self, n: int, d: int) -> None:
        if self.n_bins != "auto":
            check_between("n_bins", self.n_bins, 2, 10**9, whole=True)
        check_between("alpha", self.alpha, 1e-300, 1)
        check_between("tol", self.tol, 0, 1)

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        made = plan.node("histograms", x, bins=self.n_bins, density=True)
        return {"score": plan.node("histogram_score", x, made, alpha=self.alpha, tol=self.tol), "histograms": made}

    def adopt(self, x_ND: np.ndarray, values: dict[str, Any]) -> None:
        self.hist_, self.bin_edges_ = values["histograms"]

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        return histogram_score(Execution(), x_RD, (self.hist_, self.bin_edges_), self.alpha, self.tol)


@plan.operator("histogram_score", bytes=lambda n, d, alpha, tol: 24 * n, made_of="gather, log, sum")
def histogram_score(
    execution: Execution, x_RD: np.ndarray, made: tuple[list, list], alpha: float, tol: float
) -> np.ndarray:
    """-sum log2(density + alpha). A value outside the histogram by at most tol bins belongs to the nearest bin, farther out to the rarest."""
    total = np.zeros(len(x_RD))
    for values, height, edge in zip(x_RD.T, *made, strict=True):
        log = np.log2(height + alpha)
        at = np.searchsorted(edge, values, "left")
        score = log[np.clip(at - 1, 0, len(height) - 1)]
        far_below = (at == 0) & (edge[0] - values > (edge[1] - edge[0]) * tol)
        far_above = (at == len(edge)) & (values - edge[-1] > (edge[-1] - edge[-2]) * tol)
        total += np.where(far_below | far_above, log.min(), score)
    return -total


class LODA(Detector):
    """Lightweight on-line detector of anomalies: -mean log density over sparse random projections (Pevny 2016)."""

    def __init__(self, contamination=0.1, n_bins=10, n_random_cuts=100, random_state=None, n_jobs=None, execution=None):
        self.contamination, self.n_bins, self.n_random_cuts = contamination, n_bins, n_random_cuts
        self.random_state, self.n_jobs, self.execution = random_state, n_jobs, execution

    def check(self, n: int, d: int) -> None:
        if self.n_bins != "auto":
            check_between("n_bins", self.n_bins, 2, 10**9, whole=True)
        check_between("n_random_cuts", self.n_random_cuts, 1, 10**9, whole=True)

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        random = random_stream(self.random_state)
        projection_PD = random.standard_normal((self.n_random_cuts, d))
        for row in projection_PD:
            row[random.permutation(d)[: d - int(np.sqrt(d))]] = 0
        self.projections_ = projection_PD
        self._projected = Projected(projection_PD)
        made = plan.node("projected_histograms", x, projection=self._projected, bins=self.n_bins)
        return {"score": plan.node("projected_score", x, made, projection=self._projected), "histograms": made}

    def adopt(self, x_ND: np.ndarray, values: dict[str, Any]) -> None:
        self.histograms_, self.limits_ = values["histograms"]

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        return projected_score(Execution(), x_RD, (self.histograms_, self.limits_), self._projected)


class Projected:
    """A projection matrix as an attribute of a node: equal only to itself."""

    def __init__(self, matrix_PD: np.ndarray):
        self.matrix_PD = matrix_PD

    def __repr__(self) -> str:
        return "{}x{}".format(*self.matrix_PD.shape)


@plan.operator(
    "projected_histograms", bytes=lambda n, d, projection, bins: 16 * n, made_of="feature sampling, histogram"
)
def projected_histograms(
    execution: Execution, x_ND: np.ndarray, projection: Projected, bins: int | str
) -> tuple[list, list]:
    heights, limits = [], []
    for row in projection.matrix_PD:
        values = row @ x_ND.T
        height, limit = np.histogram(values, optimal_bins(values) if bins == "auto" else bins)
        height = height.astype(np.float64) + 1e-12
        heights.append(height / height.sum())
        limits.append(limit)
    return heights, limits


@plan.operator("projected_score", bytes=lambda n, d, projection: 32 * n, made_of="gather, log, mean")
def projected_score(
    execution: Execution, x_RD: np.ndarray, made: tuple[list, list], projection: Projected
) -> np.ndarray:
    """Mean of -log p over the projections, divided once more by their number as PyOD does."""
    total, cuts = np.zeros(len(x_RD)), len(projection.matrix_PD)
    for row, height, limit in zip(projection.matrix_PD, *made, strict=True):
        total -= np.log(height[np.searchsorted(limit[: len(height) - 1], row @ x_RD.T, "left")]) / cuts
    return total / cuts


def random_stream(seed: Any) -> np.random.RandomState:
    """PyOD's and scikit-learn's stream for this seed; a fresh one for None."""
    if isinstance(seed, np.random.RandomState):
        return seed
    return np.random.RandomState(seed)


class PCA(Detector):
    """Sum over principal axes of the distance to the axis vector, weighted by its inverse variance (Shyu et al. 2003, in PyOD's form)."""

    def __init__(
        self,
        n_components=None,
        n_selected_components=None,
        contamination=0.1,
        weighted=True,
        standardization=True,
        n_jobs=None,
        execution=None,
    ):
        self.n_components, self.n_selected_components, self.contamination = (
            n_components,
            n_selected_components,
            contamination,
        )
        self.weighted, self.standardization, self.n_jobs, self.execution = weighted, standardization, n_jobs, execution

    def check(self, n: int, d: int) -> None:
        if self.n_components is not None:
            check_between("n_components", self.n_components, 1, min(n, d), whole=True)
        if self.n_selected_components is not None:
            check_between(
                "n_selected_components", self.n_selected_components, 1, self.n_components or min(n, d), whole=True
            )

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        axes = plan.node("axes", x, standardize=self.standardization, count=self.n_components or min(n, d))
        return {
            "score": plan.node("axes_score", x, axes, selected=self.n_selected_components, weighted=self.weighted),
            "axes": axes,
        }

    def adopt(self, x_ND: np.ndarray, values: dict[str, Any]) -> None:
        self._axes = values["axes"]
        _, _, self.components_, self.explained_variance_, self.explained_variance_ratio_ = self._axes

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        return axes_score(Execution(), x_RD, self._axes, self.n_selected_components, self.weighted)


@plan.operator("axes", bytes=lambda n, d, standardize, count: 16 * n * d, made_of="SVD")
def axes(execution: Execution, x_ND: np.ndarray, standardize: bool, count: int) -> tuple[np.ndarray, ...]:
    """(centre, scale, components, variances, variance ratios); each component's largest entry is positive."""
    n = len(x_ND)
    centre_D = x_ND.mean(0) if standardize else np.zeros(x_ND.shape[1])
    scale_D = x_ND.std(0) if standardize else np.ones(x_ND.shape[1])
    scale_D = np.where(scale_D > 10 * np.finfo(float).eps * np.abs(centre_D), scale_D, 1.0)
    z = (x_ND - centre_D) / scale_D
    z = z - z.mean(0)
    triangle: Any = np.linalg.qr(z, mode="r") if n > 2 * z.shape[1] else z  # the same singular values, in fewer rows
    return axes_of(triangle, n, z.shape[1], centre_D, scale_D, count)


def axes_of(
    triangle: np.ndarray, n: int, d: int, centre_D: np.ndarray, scale_D: np.ndarray, count: int
) -> tuple[np.ndarray, ...]:
    """`axes` from a matrix with the singular values of the n x d standardized rows."""
    _, singular, components = np.linalg.svd(triangle, full_matrices=False)
    variance = singular**2 / (n - 1)
    keep = singular > max(n, d) * np.finfo(float).eps * singular.max(initial=0)  # the usual numerical rank
    if not keep.any():
        raise DataError("all features are constant; PCA has no direction to look along")
    total = variance.sum()
    components, variance = components[keep][:count], variance[keep][:count]
    size = np.abs(components)
    first = (size >= (1 - 1e-10) * size.max(1, keepdims=True)).argmax(
        1
    )  # equal entries: the first, whatever rounding says
    lead = np.take_along_axis(components, first[:, None], 1)
    return centre_D, scale_D, components * np.sign(lead), variance, variance / total


@plan.operator("axes_score", bytes=lambda n, d, selected, weighted: 8 * n * d * 2, made_of="cdist, sum")
def axes_score(
    execution: Execution, x_RD: np.ndarray, found: tuple[np.ndarray, ...], selected: int | None, weighted: bool
) -> np.ndarray:
    from scipy.spatial.distance import cdist

    centre_D, scale_D, components, _, ratio = found
    count = min(selected or len(components), len(components))
    weights = ratio[-count:] if weighted else np.ones(count)
    return (cdist((x_RD - centre_D) / scale_D, components[-count:]) / weights).sum(1)


class ECOD(Detector):
    """Empirical cumulative distributions: sum over features of the most extreme tail (Li et al. 2022, arXiv 2201.00382)."""

    minimum_rows = 1
    rule = "ecod"

    def __init__(self, contamination=0.1, n_jobs=None, execution=None):
        self.contamination, self.n_jobs, self.execution = contamination, n_jobs, execution

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        return {"score": plan.node("tail_score", x, plan.node("tail_probability", x), rule=self.rule)}

    def adopt(self, x_ND: np.ndarray, values: dict[str, Any]) -> None:
        self.X_train_ = x_ND

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        both = np.concatenate([self.X_train_, x_RD])
        tails = operators.tail_probability(Execution(), both)
        return operators.tail_score(Execution(), both, tails, self.rule)[-len(x_RD) :]


class COPOD(ECOD):
    """Copula-based outlier detection: as ECOD, with the mean of both tails (Li et al. 2020, arXiv 2009.09463)."""

    rule = "copod"


class IForest(Detector):
    """Isolation forest: outliers are cut off in few random cuts (Liu et al. 2008). Equal random_state, equal trees as scikit-learn's."""

    minimum_rows = 1

    def __init__(
        self,
        n_estimators=100,
        max_samples: str | int | float = "auto",
        contamination=0.1,
        random_state=None,
        n_jobs=None,
        execution=None,
    ):
        self.n_estimators, self.max_samples, self.contamination = n_estimators, max_samples, contamination
        self.random_state, self.n_jobs, self.execution = random_state, n_jobs, execution

    def check(self, n: int, d: int) -> None:
        check_between("n_estimators", self.n_estimators, 1, 10**7, whole=True)
        if self.max_samples != "auto":
            check_between("max_samples", self.max_samples, 1e-9, 10**9)

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        count = 256 if self.max_samples == "auto" else self.max_samples
        count = max(1, int(count * n)) if isinstance(count, float) else min(int(count), n)
        random = random_stream(self.random_state)
        if isinstance(self.random_state, np.random.RandomState) or self.random_state is None:
            random.uniform(size=n)
        seeds = tuple(int(s) for s in random.randint(2**31 - 1, size=self.n_estimators))
        made = plan.node("forest", x, seeds=seeds, samples=min(count, n))
        return {"score": plan.node("path_score", x, made), "forest": made}

    def adopt(self, x_ND: np.ndarray, values: dict[str, Any]) -> None:
        self.forest_ = values["forest"]
        self.offset_ = float(np.percentile(-values["score"], 100 * self.contamination))
        values["score"] = values["score"] + self.offset_

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        return path_score(Execution(), x_RD, self.forest_) + self.offset_


@plan.operator(
    "forest", bytes=lambda n, d, seeds, samples: 4 * n * d + 96 * samples * len(seeds), made_of="feature sampling"
)
def forest(execution: Execution, x_ND: np.ndarray, seeds: tuple[int, ...], samples: int) -> dict[str, Any]:
    """Trees grown from seeded samples, as arrays over (tree, node)."""
    n, trees, nodes = len(x_ND), len(seeds), 2 * samples
    sample_TS = np.empty((trees, samples), np.int64)
    growth = np.empty(trees, np.uint32)
    for t, seed in enumerate(seeds):
        tree_seed = np.random.RandomState(seed).randint(2**31 - 1)
        growth[t] = np.random.RandomState(tree_seed).randint(0, 2**31 - 1)
        sample_TS[t] = draw(np.random.RandomState(seed), n, samples)
    made: dict[str, Any] = {name: np.zeros((trees, nodes), np.int64) for name in ("feature", "left", "right", "size")}
    made["cut"] = np.zeros((trees, nodes))
    depth = int(np.ceil(np.log2(max(samples, 2))))
    native.call(
        "wager_forest_grow", x_ND.astype(np.float32), x_ND.shape[1], sample_TS, growth, trees, samples, depth, nodes,
        made["feature"], made["cut"], made["left"], made["right"], made["size"],
    )  # fmt: skip
    return made | {"samples": samples}


def draw(random: np.random.RandomState, n: int, count: int) -> np.ndarray:
    """`count` of n rows without replacement, in scikit-learn's three ways: by rejection (few), permutation, or reservoir (nearly all)."""
    share = count / n
    if 0.01 < share < 0.99:
        return random.permutation(n)[:count]
    if share <= 0.01:
        drawn, chosen = np.empty(0, np.int64), np.empty(0, np.int64)
        while len(chosen) < count:  # many at once are the same stream as one by one
            drawn = np.concatenate([drawn, random.randint(n, size=2 * count)])
            chosen = np.sort(np.unique(drawn, return_index=True)[1])
        return drawn[chosen[:count]]
    out = np.arange(count)
    for i in range(count, n):
        j = random.randint(0, i + 1)
        if j < count:
            out[j] = i
    return out


@plan.operator("path_score", bytes=lambda n, d: 4 * n * d + 16 * n, made_of="gather")
def path_score(execution: Execution, x_RD: np.ndarray, made: dict[str, Any]) -> np.ndarray:
    """2^-(mean path length / the mean of an unsuccessful search in a tree of that many rows)."""
    trees, nodes = made["feature"].shape
    total = np.empty(len(x_RD))
    native.call(
        "wager_forest_paths", x_RD.astype(np.float32), len(x_RD), x_RD.shape[1], trees, nodes, made["feature"], made["cut"],
        made["left"], made["right"], unsuccessful(made["size"]), total,
    )  # fmt: skip
    usual = trees * float(unsuccessful(np.array([made["samples"]]))[0])
    return 2.0 ** -(total / usual if usual else np.ones_like(total))


def unsuccessful(rows: np.ndarray) -> np.ndarray:
    """Mean path length of an unsuccessful search in a binary search tree of so many rows."""
    r = np.maximum(rows, 3).astype(np.float64)
    long = 2 * (np.log(r - 1) + np.euler_gamma) - 2 * (r - 1) / r
    return np.where(rows <= 1, 0.0, np.where(rows == 2, 1.0, long))
