"""The operators that detectors are made of, each with its bytes and, where rows can be cut, its map and merge.

Legend: N training rows, R rows asked about, D features, K neighbours. Exact: float64 throughout, neighbours by `knn`.
Source: TOD (arXiv 2110.14007).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from wager.detect.tod import native
from wager.detect.tod.batching import Execution
from wager.detect.tod.knn import Neighbors, nearest
from wager.detect.tod.plan import operator


def join(parts: list[np.ndarray], **attrs: Any) -> np.ndarray:
    """Rows of parts one after the other."""
    return np.concatenate(parts)


@operator(
    "knn", bytes=lambda n, d, k: n * (4 * d + 16 * k + 8) + 8192 * (12 * d + 12 * (4 * k + 64)), made_of="cdist + topk"
)
def knn(execution: Execution, x_ND: np.ndarray, k: int) -> Neighbors:
    """k nearest others of every row; tiles, candidates and float64 verification are in `knn`."""
    return nearest(None, x_ND, k, execution)


@operator("first", bytes=lambda n, d, k: 16 * n * k, made_of="gather")
def first(execution: Execution, found: Neighbors, k: int) -> Neighbors:
    """The nearest k of a longer list."""
    return found.first(k)


@operator("with_self", bytes=lambda n, d: 0, made_of="topk")
def with_self(execution: Execution, found: Neighbors) -> Neighbors:
    """Lists of the same length that begin with the row itself."""
    return found.with_self()


@operator("aggregate", bytes=lambda n, d, method: 16 * n, made_of="aggregation")
def aggregate(execution: Execution, found: Neighbors, method: str) -> np.ndarray:
    """Largest, mean or median distance of each row's neighbours."""
    if method == "largest":
        return found.distance_RK[:, -1].copy()
    return (np.mean if method == "mean" else np.median)(found.distance_RK, axis=1)


@operator("local_density", bytes=lambda n, d: 0, made_of="neighbours within range")
def local_density(execution: Execution, found: Neighbors) -> np.ndarray:
    """Inverse mean reach: reach(i, j) = max(k-distance(j), d(i, j)); 1e-10 keeps duplicates finite."""
    return reach_density(found, found.distance_RK[:, -1])


def reach_density(found: Neighbors, k_distance_N: np.ndarray) -> np.ndarray:
    reach_RK = np.maximum(found.distance_RK, k_distance_N[found.index_RK])
    return 1.0 / (reach_RK.mean(1) + 1e-10)


@operator("density_ratio", bytes=lambda n, d: 0, made_of="gather, mean")
def density_ratio(execution: Execution, found: Neighbors, density_N: np.ndarray) -> np.ndarray:
    """Mean density of the neighbours over one's own (LOF)."""
    return (density_N[found.index_RK] / density_N[:, None]).mean(1)


def _angles(inputs: list[Any], start: int, stop: int) -> np.ndarray:
    x_ND, found = inputs
    return angle_variance(np.ascontiguousarray(x_ND[start:stop]), x_ND, found.index_RK[start:stop])


@operator(
    "angle_variance", bytes=lambda n, d: 16 * n, map=_angles, merge=join, made_of="cosine similarity, gather, variance"
)
def angles(execution: Execution, x_ND: np.ndarray, found: Neighbors) -> np.ndarray:
    """Variance of the distance-weighted cosines over pairs of neighbours (ABOD)."""
    return angle_variance(x_ND, x_ND, found.index_RK)


def angle_variance(query_RD: np.ndarray, base_ND: np.ndarray, index_RK: np.ndarray) -> np.ndarray:
    """`angles` for any rows. No angle can be formed with a point equal to the row; without any angle the variance is 0."""
    return _of_neighbors("wager_angle_variance", query_RD, base_ND, index_RK)


def _of_neighbors(function: str, query_RD: np.ndarray, base_ND: np.ndarray, index_RK: np.ndarray) -> np.ndarray:
    """One number for each row from its neighbours, by a native function."""
    out = np.empty(len(query_RD))
    index = np.ascontiguousarray(index_RK)
    native.call(function, query_RD, base_ND, index, *index.shape, base_ND.shape[1], out)
    return out


def _chains(inputs: list[Any], start: int, stop: int) -> np.ndarray:
    x_ND, found = inputs
    return chaining(np.ascontiguousarray(x_ND[start:stop]), x_ND, found.index_RK[start:stop])


@operator("chaining", bytes=lambda n, d: 8 * n, map=_chains, merge=join, made_of="cdist, gather")
def chains(execution: Execution, x_ND: np.ndarray, found: Neighbors) -> np.ndarray:
    """Average chaining distance along each row's set-based nearest path (COF)."""
    return chaining(x_ND, x_ND, found.index_RK)


def chaining(query_RD: np.ndarray, base_ND: np.ndarray, index_RK: np.ndarray) -> np.ndarray:
    return _of_neighbors("wager_chaining", query_RD, base_ND, index_RK)


@operator("chain_ratio", bytes=lambda n, d: 0, made_of="gather, sum")
def chain_ratio(execution: Execution, chain_N: np.ndarray, found: Neighbors) -> np.ndarray:
    """Own chaining distance over the neighbours' mean (COF); 0/0 among duplicates is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(chain_N * found.index_RK.shape[1] / chain_N[found.index_RK].sum(1))


@operator("shared_neighbors", bytes=lambda n, d, count: 16 * n * count + 12 * n, made_of="cdist + topk + intersect")
def shared_neighbors(execution: Execution, found: Neighbors, count: int) -> np.ndarray:
    """The `count` rows that share most neighbours with each row, ties by smaller index."""
    return shared(found, count)[0]


def shared(found: Neighbors, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`shared_neighbors`, and for each row whether its cut lies inside a tie."""
    n, k = found.index_RK.shape
    out, tie = np.empty((n, count), np.int64), np.empty(n, np.uint8)
    native.call("wager_shared", np.ascontiguousarray(found.index_RK), n, k, count, out, tie)
    return out, tie.astype(bool)


@operator("subspace_distance", bytes=lambda n, d, alpha: 8 * n, made_of="gather, mean, variance")
def subspace_distance(execution: Execution, x_ND: np.ndarray, reference_NK: np.ndarray, alpha: float) -> np.ndarray:
    """Distance to the mean of the reference rows in the features where these vary less than alpha times the average (SOD)."""
    out = np.empty(len(x_ND))
    native.call("wager_subspace", x_ND, reference_NK, *reference_NK.shape, x_ND.shape[1], float(alpha), out)
    return out


@operator("loci", bytes=lambda n, d, alpha, kappa: 36 * n * n, made_of="cdist, neighbours within range")
def loci(execution: Execution, x_ND: np.ndarray, alpha: float, kappa: float) -> np.ndarray:
    """Multi-granularity deviation over all critical radii, by one sweep over sorted pair distances."""
    from scipy.spatial.distance import pdist, squareform

    from wager.errors import CapacityError

    n = len(x_ND)
    if 36 * n * n > execution.budget_bytes:
        raise CapacityError(
            f"LOCI on {n} rows needs {36 * n * n / 1e9:.1f} GB for all pair distances, the budget is "
            f"{execution.budget_bytes / 1e9:.1f} GB; give fewer rows or a larger memory budget"
        )
    distance = squareform(pdist(x_ND))
    order = np.argsort(distance, axis=None, kind="stable")
    out = np.empty(n)
    native.call(
        "wager_loci", distance, distance.ravel()[order], (order // n).astype(np.int32), n, float(alpha), float(kappa),
        float(distance.max() / alpha), 20, out,
    )  # fmt: skip
    return out


@operator("tail_probability", bytes=lambda n, d: 40 * n * d, made_of="sort, ECDF")
def tail_probability(execution: Execution, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-log of the left and right empirical tails of every value, column by column; skewness decides nothing here."""
    left, right = np.empty_like(x_ND), np.empty_like(x_ND)
    n = len(x_ND)
    for j in range(x_ND.shape[1]):
        ordered = np.sort(x_ND[:, j])
        left[:, j] = -np.log(np.searchsorted(ordered, x_ND[:, j], "right") / n)
        right[:, j] = -np.log((n - np.searchsorted(ordered, x_ND[:, j], "left")) / n)
    return left, right


@operator("tail_score", bytes=lambda n, d, rule: 32 * n * d, made_of="skewness, max, sum")
def tail_score(execution: Execution, x_ND: np.ndarray, tails: tuple[np.ndarray, np.ndarray], rule: str) -> np.ndarray:
    """Sum over features of the largest of left, right (ecod) or their mean (copod) and the tail that the skewness points at."""
    left, right = tails
    sign_D = skewness_sign(x_ND)
    pointed = -left * np.sign(sign_D - 1) + right * np.sign(sign_D + 1)
    other = np.maximum(left, right) if rule == "ecod" else (left + right) / 2
    return np.maximum(pointed, other).sum(1)


def skewness_sign(x_ND: np.ndarray) -> np.ndarray:
    """-1, 0 or 1 for each feature."""
    from scipy.stats import skew

    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss")  # constant features have no skewness
        return np.sign(np.nan_to_num(skew(x_ND, axis=0)))
