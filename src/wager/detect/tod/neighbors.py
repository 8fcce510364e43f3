"""Detectors that look at neighbours: KNN, LOF, ABOD, COF, SOD, LOCI. Scores are PyOD's; where its choice is arbitrary (ties), the smaller index wins.

Exact. COF, SOD and LOCI score the rows they are given among themselves, as PyOD does: `decision_function` of new rows does not
look at the training rows. Sources: TOD (arXiv 2110.14007) and the papers named at each class.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from wager.detect.tod import operators, plan
from wager.detect.tod.base import Detector
from wager.detect.tod.batching import Execution
from wager.detect.tod.checks import DataError, check_between, check_choice
from wager.detect.tod.knn import Neighbors, nearest

SEARCH = {"auto": "auto", "brute": "scan", "kd_tree": "tree", "ball_tree": "tree"}


class NeighborDetector(Detector):
    """Shared by detectors with `n_neighbors`, `algorithm` (a hint: the result is the same), `metric` (Euclidean only)."""

    n_neighbors: int
    algorithm: str = "auto"
    metric: str = "minkowski"
    p: int = 2

    def check(self, n: int, d: int) -> None:
        check_between("n_neighbors", self.n_neighbors, 1, 10**9, whole=True)
        check_choice("algorithm", self.algorithm, tuple(SEARCH))
        check_choice("metric", self.metric, ("minkowski", "euclidean"))
        check_between("p", self.p, 2, 2)

    def fit(self, X: Any, y: Any = None) -> Detector:
        from wager.detect.tod.base import fit_many

        check_choice("algorithm", self.algorithm, tuple(SEARCH))
        fit_many([self], X, self._settings())
        return self

    def _settings(self) -> Execution:
        return self.execution or Execution(search=SEARCH[self.algorithm])

    def _clamped(self, n: int, warn: bool = True) -> int:
        if self.n_neighbors < n:
            return self.n_neighbors
        if warn:
            warnings.warn(
                f"n_neighbors={self.n_neighbors} is not less than the {n} rows; {n - 1} are used", stacklevel=4
            )
        return n - 1

    def _near(self, x_RD: np.ndarray, k: int) -> Neighbors:
        return nearest(x_RD, self.X_train_, k, self._settings())

    def adopt(self, x_ND: np.ndarray, values: dict[str, Any]) -> None:
        self.X_train_ = x_ND


class KNN(NeighborDetector):
    """Distance to the k-th nearest neighbour, or the mean or median over the k (Ramaswamy et al. 2000; Angiulli & Pizzuti 2002)."""

    def __init__(
        self,
        contamination=0.1,
        n_neighbors=5,
        method="largest",
        algorithm="auto",
        metric="minkowski",
        p=2,
        n_jobs=None,
        execution=None,
    ):
        self.contamination, self.n_neighbors, self.method, self.algorithm = (
            contamination,
            n_neighbors,
            method,
            algorithm,
        )
        self.metric, self.p, self.n_jobs, self.execution = metric, p, n_jobs, execution

    def check(self, n: int, d: int) -> None:
        super().check(n, d)
        check_choice("method", self.method, ("largest", "mean", "median"))
        if self.n_neighbors >= n:
            raise DataError(
                f"n_neighbors is {self.n_neighbors}, but {n} rows have only {n - 1} others; choose a smaller n_neighbors"
            )

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        return {"score": plan.node("aggregate", plan.node("knn", x, k=self.n_neighbors), method=self.method)}

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        return operators.aggregate(Execution(), self._near(x_RD, self.n_neighbors), self.method)


class LOF(NeighborDetector):
    """Local outlier factor: the neighbours' density over one's own (Breunig et al. 2000)."""

    def __init__(
        self, n_neighbors=20, algorithm="auto", metric="minkowski", p=2, contamination=0.1, n_jobs=None, execution=None
    ):
        self.n_neighbors, self.algorithm, self.metric, self.p = n_neighbors, algorithm, metric, p
        self.contamination, self.n_jobs, self.execution = contamination, n_jobs, execution

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        self.n_neighbors_ = self._clamped(n)
        found = plan.node("knn", x, k=self.n_neighbors_)
        density = plan.node("local_density", found)
        k_distance = plan.node("aggregate", found, method="largest")
        return {"score": plan.node("density_ratio", found, density), "density": density, "k_distance": k_distance}

    def adopt(self, x_ND: np.ndarray, values: dict[str, Any]) -> None:
        self.X_train_, self.density_, self.k_distance_ = x_ND, values["density"], values["k_distance"]

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        found = self._near(x_RD, self.n_neighbors_)
        own = operators.reach_density(found, self.k_distance_)
        return (self.density_[found.index_RK] / own[:, None]).mean(1)


class ABOD(NeighborDetector):
    """Angle-based outlier factor, negated (Kriegel et al. 2008): little variance of angles is abnormal.

    method "fast" looks at each row's n_neighbors nearest, of which, as in PyOD, the row itself is one (it forms no angle); "default" at all
    rows. Without any angle the score is 0.
    """

    minimum_rows = 3

    def __init__(
        self,
        contamination=0.1,
        n_neighbors=5,
        method="fast",
        algorithm="auto",
        metric="minkowski",
        p=2,
        n_jobs=None,
        execution=None,
    ):
        self.contamination, self.n_neighbors, self.method, self.algorithm = (
            contamination,
            n_neighbors,
            method,
            algorithm,
        )
        self.metric, self.p, self.n_jobs, self.execution = metric, p, n_jobs, execution

    def check(self, n: int, d: int) -> None:
        super().check(n, d)
        check_choice("method", self.method, ("fast", "default"))

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        if self.method == "default":
            self.n_neighbors_ = n
            found = plan.node("knn", x, k=n - 1)
        else:
            self.n_neighbors_ = self._clamped(n)
            found = plan.node("with_self", plan.node("knn", x, k=self.n_neighbors_))
        return {"score": plan.node("negated", plan.node("angle_variance", x, found))}

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        found = self._near(x_RD, min(self.n_neighbors_, len(self.X_train_)))
        return -operators.angle_variance(x_RD, self.X_train_, found.index_RK)


class COF(NeighborDetector):
    """Connectivity-based outlier factor: chaining distances instead of densities (Tang et al. 2002)."""

    def __init__(
        self, contamination=0.1, n_neighbors=20, algorithm="auto", metric="minkowski", p=2, n_jobs=None, execution=None
    ):
        self.contamination, self.n_neighbors, self.algorithm = contamination, n_neighbors, algorithm
        self.metric, self.p, self.n_jobs, self.execution = metric, p, n_jobs, execution

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        self.n_neighbors_ = self._clamped(n)
        found = plan.node("knn", x, k=self.n_neighbors_)
        return {"score": plan.node("chain_ratio", plan.node("chaining", x, found), found)}

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        if len(x_RD) <= self.n_neighbors_:
            raise DataError(
                f"COF scores the rows it is given among themselves and needs more than n_neighbors={self.n_neighbors_} of them, got {len(x_RD)}"
            )
        found = nearest(None, x_RD, self.n_neighbors_, self._settings())
        return operators.chain_ratio(Execution(), operators.chaining(x_RD, x_RD, found.index_RK), found)


class SOD(NeighborDetector):
    """Subspace outlier degree over the rows that share most neighbours (Kriegel et al. 2009)."""

    minimum_rows = 3

    def __init__(
        self,
        contamination=0.1,
        n_neighbors=20,
        ref_set=10,
        alpha=0.8,
        algorithm="auto",
        metric="minkowski",
        p=2,
        n_jobs=None,
        execution=None,
    ):
        self.contamination, self.n_neighbors, self.ref_set, self.alpha = contamination, n_neighbors, ref_set, alpha
        self.algorithm, self.metric, self.p, self.n_jobs, self.execution = algorithm, metric, p, n_jobs, execution

    def check(self, n: int, d: int) -> None:
        super().check(n, d)
        check_between("ref_set", self.ref_set, 1, self.n_neighbors, whole=True)
        check_between("alpha", self.alpha, 0.0, 1.0)
        if self.n_neighbors >= n:
            raise DataError(
                f"n_neighbors is {self.n_neighbors}, but {n} rows have only {n - 1} others; choose a smaller n_neighbors"
            )

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        reference = plan.node("shared_neighbors", plan.node("knn", x, k=self.n_neighbors), count=self.ref_set)
        return {"score": plan.node("subspace_distance", x, reference, alpha=self.alpha)}

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        self.check(*x_RD.shape)
        found = nearest(None, x_RD, self.n_neighbors, self._settings())
        return operators.subspace_distance(Execution(), x_RD, operators.shared(found, self.ref_set)[0], self.alpha)


class LOCI(Detector):
    """Local correlation integral: deviation of the alpha-neighbour count at all radii (Papadimitriou et al. 2003).

    The score is the deviation in standard deviations at the first radius where it exceeds k, or at the largest radius; radii with fewer
    than 20 alpha-neighbours on average are passed over.
    """

    def __init__(self, contamination=0.1, alpha=0.5, k=3, n_jobs=None, execution=None):
        self.contamination, self.alpha, self.k, self.n_jobs, self.execution = contamination, alpha, k, n_jobs, execution

    def check(self, n: int, d: int) -> None:
        check_between("alpha", self.alpha, 1e-6, 1.0)
        check_between("k", self.k, 0, 1e6)

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        return {"score": plan.node("finite", plan.node("loci", x, alpha=float(self.alpha), kappa=float(self.k)))}

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        execution = self.execution or Execution()
        return finite(execution, operators.loci(execution, x_RD, float(self.alpha), float(self.k)))


@plan.operator("negated", bytes=lambda n, d: 8 * n, made_of="basic")
def negated(execution: Execution, value_N: np.ndarray) -> np.ndarray:
    return -value_N


@plan.operator("finite", bytes=lambda n, d: 8 * n, made_of="basic")
def finite(execution: Execution, value_N: np.ndarray) -> np.ndarray:
    """0/0, no deviation and no spread, counts as no deviation."""
    return np.nan_to_num(value_N, nan=0.0)
