"""Detectors made of detectors: FeatureBagging, LSCP, SUOD. Members are parts of one plan, so that steps they share run once.

FeatureBagging's and LSCP's training scores are PyOD's, seeds included. LSCP scores new rows in the feature subsets drawn at `fit`, so that the same
rows get the same scores twice (PyOD draws anew at each call). Sources: TOD (arXiv 2110.14007) and the papers named at each class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wager.detect.tod import plan
from wager.detect.tod.base import Detector
from wager.detect.tod.checks import DataError, check_between, check_choice
from wager.detect.tod.knn import nearest
from wager.detect.tod.marginals import draw, random_stream
from wager.detect.tod.neighbors import LOF, NeighborDetector

SEED_LIMIT = 2**31 - 1
ITERATIONS = 20  # random feature subsets of which a row's local region must recur in more than half (LSCP)
COMBINATIONS = ("average", "max", "median")


@plan.operator("columns", bytes=lambda n, d, features: 8 * n * len(features), made_of="feature sampling")
def columns(execution: Any, x_ND: np.ndarray, features: tuple[int, ...]) -> np.ndarray:
    """Some features of every row."""
    return np.ascontiguousarray(x_ND[:, list(features)])


@plan.operator("projected", bytes=lambda n, d, matrix: 8 * n * matrix.shape[1], made_of="matmul")
def projected(execution: Any, x_ND: np.ndarray, matrix: Any) -> np.ndarray:
    """Rows under a random projection."""
    return x_ND @ matrix.array_DP


def copy_of(detector: Detector) -> Any:
    """An unfitted detector with the same parameters."""
    return type(detector)(**detector.get_params(deep=False))


def combine(scores_NM: np.ndarray, how: str) -> np.ndarray:
    return {"average": np.mean, "max": np.max, "median": np.median}[how](scores_NM, axis=1)


def standardized(train_NM: np.ndarray, other_RM: np.ndarray) -> np.ndarray:
    """Columns of `other` in units of the spread of `train`; a constant column is only centred."""
    spread_M = train_NM.std(0)
    return (other_RM - train_NM.mean(0)) / np.where(spread_M > 0, spread_M, 1.0)


class Ensemble(Detector):
    """Members (estimators_) that see views of the rows; `view` says which."""

    random_state: Any = None
    estimators_: list[Any]

    def join(self, views: Sequence[plan.Node], widths: Sequence[int], n: int) -> dict[str, plan.Node]:
        """The members' graphs, each over its view, under names that say whose they are."""
        graphs: dict[str, plan.Node] = {}
        for i, (member, node, d) in enumerate(zip(self.estimators_, views, widths, strict=True)):
            member.check(n, d)
            graphs |= {f"{i}.{name}": root for name, root in member.graph(node, n, d).items()}
        return graphs

    def view(self, i: int, x_RD: np.ndarray) -> np.ndarray:
        """What member i sees of the rows."""
        return x_RD

    def adopt(self, x_ND: np.ndarray, values: dict[str, Any]) -> None:
        for i, member in enumerate(self.estimators_):
            own = {name.partition(".")[2]: v for name, v in values.items() if name.partition(".")[0] == str(i)}
            x = np.ascontiguousarray(self.view(i, x_ND))
            member.adopt(x, own)
            member.finish(own["score"], x.shape[1])
        values["score"] = self.combined(x_ND, values)

    def trained(self) -> np.ndarray:
        return np.stack([member.decision_scores_ for member in self.estimators_], 1)

    def asked(self, x_RD: np.ndarray) -> np.ndarray:
        """Each member's scores of the rows, as new rows."""
        views = (np.ascontiguousarray(self.view(i, x_RD)) for i in range(len(self.estimators_)))
        return np.stack([m.decision_function(v) for m, v in zip(self.estimators_, views, strict=True)], 1)

    def combined(self, x_ND: np.ndarray, values: dict[str, Any]) -> np.ndarray:
        """Scores of the training rows from those of the members."""
        raise NotImplementedError


def bagged(random: np.random.RandomState, d: int, low: int, high: int, repeat: bool = False) -> tuple[int, ...]:
    """Between low and high - 1 of d features, in the order drawn."""
    count = int(random.randint(low, high))
    return tuple(int(f) for f in (random.randint(0, d, count) if repeat else draw(random, d, count)))


class FeatureBagging(Ensemble):
    """The mean (or maximum) over copies of a detector, each fitted on a random half to all of the features (Lazarevic & Kumar 2005)."""

    def __init__(
        self,
        base_estimator=None,
        n_estimators=10,
        contamination=0.1,
        max_features: int | float = 1.0,
        bootstrap_features=False,
        random_state=None,
        combination="average",
        n_jobs=None,
        execution=None,
    ):
        self.base_estimator, self.n_estimators, self.contamination = base_estimator, n_estimators, contamination
        self.max_features, self.bootstrap_features, self.random_state = max_features, bootstrap_features, random_state
        self.combination, self.n_jobs, self.execution = combination, n_jobs, execution

    def check(self, n: int, d: int) -> None:
        check_between("n_estimators", self.n_estimators, 1, 10**6, whole=True)
        check_choice("combination", self.combination, COMBINATIONS)
        if d < 2:
            raise DataError(f"X has {d} feature; FeatureBagging draws subsets and needs at least 2")
        check_between("max_features", self.max_features, 0, d)
        if self._most(d) < max(1, d // 2):
            raise DataError(f"max_features is {self.max_features}; subsets have at least half of the {d} features")

    def _most(self, d: int) -> int:
        return self.max_features if isinstance(self.max_features, int) else int(self.max_features * d)

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        seeds = random_stream(self.random_state).randint(SEED_LIMIT, size=self.n_estimators)
        base = self.base_estimator or LOF()
        self.estimators_, self.estimators_features_ = [], []
        for seed in seeds:
            random = np.random.RandomState(seed)
            features = bagged(random, d, max(1, d // 2), self._most(d) + 1, self.bootstrap_features)
            member = copy_of(base)
            if "random_state" in member.get_params():
                member.set_params(random_state=int(random.randint(SEED_LIMIT)))
            self.estimators_.append(member)
            self.estimators_features_.append(features)
        views = [plan.node("columns", x, features=features) for features in self.estimators_features_]
        return self.join(views, [len(f) for f in self.estimators_features_], n)

    def view(self, i: int, x_RD: np.ndarray) -> np.ndarray:
        return x_RD[:, list(self.estimators_features_[i])]

    def combined(self, x_ND: np.ndarray, values: dict[str, Any]) -> np.ndarray:
        return combine(self.trained(), self.combination)

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        return combine(self.asked(x_RD), self.combination)


class LSCP(Ensemble):
    """Locally selective combination (Zhao et al. 2019): for each row the mean score of the members that agree, in its neighbourhood, with all.

    A row's region are the training rows among its nearest in more than half of 20 random feature subsets. Members are compared there, by
    correlation, with the largest standardised score; those in the fullest bin of correlations count. A member that is constant there
    correlates by 0.
    """

    def __init__(
        self,
        detector_list=None,
        local_region_size=30,
        local_max_features=1.0,
        n_bins=10,
        random_state=None,
        contamination=0.1,
        n_jobs=None,
        execution=None,
    ):
        self.detector_list, self.local_region_size = detector_list, local_region_size
        self.local_max_features, self.n_bins, self.random_state = local_max_features, n_bins, random_state
        self.contamination, self.n_jobs, self.execution = contamination, n_jobs, execution

    def check(self, n: int, d: int) -> None:
        check_between("local_region_size", self.local_region_size, 2, 10**9, whole=True)
        check_between("local_max_features", self.local_max_features, 0.5, 1.0)
        check_between("n_bins", self.n_bins, 1, 10**6, whole=True)
        if self.detector_list is not None and len(self.detector_list) < 2:
            raise DataError(f"detector_list has {len(self.detector_list)} detector(s); LSCP selects among at least 2")
        if d < 2:
            raise DataError(f"X has {d} feature; LSCP draws subsets and needs at least 2")

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        given = self.detector_list or [LOF(min(k, max(1, n - 1))) for k in (10, 20, 30, 40)]
        self.estimators_ = [copy_of(member) for member in given]
        random, low = random_stream(self.random_state), d // 2
        high = max(low + 1, int(d * self.local_max_features))
        self.subspaces_ = [bagged(random, d, low, high) for _ in range(ITERATIONS)]
        self._region = min(self.local_region_size, n)
        regions = {
            f"region.{i}": plan.node(
                "with_self", plan.node("knn", plan.node("columns", x, features=f), k=min(self._region, n - 1))
            )
            for i, f in enumerate(self.subspaces_)
        }
        return self.join([x] * len(self.estimators_), [d] * len(self.estimators_), n) | regions

    def combined(self, x_ND: np.ndarray, values: dict[str, Any]) -> np.ndarray:
        self.X_train_ = x_ND
        lists = [values[f"region.{i}"].index_RK for i in range(ITERATIONS)]
        return self._selected(np.concatenate(lists, 1), self.asked(x_ND))

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        k, lists = min(self._region, len(self.X_train_)), []
        for features in self.subspaces_:
            base, query = (np.ascontiguousarray(a[:, list(features)]) for a in (self.X_train_, x_RD))
            lists.append(nearest(query, base, k, self.execution).index_RK)
        return self._selected(np.concatenate(lists, 1), self.asked(x_RD))

    def _selected(self, near_RL: np.ndarray, scores_RM: np.ndarray, block: int = 4096) -> np.ndarray:
        train_NM = self.trained()
        own_NM, asked_RM = standardized(train_NM, train_NM), standardized(train_NM, scores_RM)
        parts = []
        for start in range(0, len(near_RL), block):
            correlation = agreement(near_RL[start : start + block], own_NM, ITERATIONS // 2)
            weight = fullest_bin(correlation, min(self.n_bins, correlation.shape[1]))
            parts.append((asked_RM[start : start + block] * weight).sum(1) / weight.sum(1))
        return np.concatenate(parts)


def agreement(near_RL: np.ndarray, scores_NM: np.ndarray, more_than: int) -> np.ndarray:
    """Correlation of each member's scores with the largest member's, over the rows that occur often in each list."""
    rows, length = near_RL.shape
    ordered = np.sort(near_RL, 1)
    last = np.ones_like(ordered, bool)
    last[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    at_row, at_column = np.nonzero(last)
    before = np.r_[-1, at_column[:-1]]
    before[np.r_[True, at_row[1:] != at_row[:-1]]] = -1
    often = at_column - before > more_than
    row_P, member_P = at_row[often], ordered[at_row[often], at_column[often]]
    count_R = np.maximum(np.bincount(row_P, minlength=rows), 1)

    def mean(value_P: np.ndarray) -> np.ndarray:
        return np.bincount(row_P, value_P, rows) / count_R

    target_P = scores_NM.max(1)[member_P]
    target_P = target_P - mean(target_P)[row_P]
    spread_R, out = mean(target_P**2), np.zeros((rows, scores_NM.shape[1]))
    for m in range(scores_NM.shape[1]):
        value_P = scores_NM[member_P, m]
        value_P = value_P - mean(value_P)[row_P]
        with np.errstate(divide="ignore", invalid="ignore"):
            out[:, m] = mean(value_P * target_P) / np.sqrt(mean(value_P**2) * spread_R)
    return np.clip(np.nan_to_num(out, nan=0.0, posinf=0.0, neginf=0.0), -1, 1)


def fullest_bin(value_RM: np.ndarray, bins: int) -> np.ndarray:
    """How often each value lies in a fullest of `bins` equal bins of its row; a value on a border between two fullest counts twice."""
    low, high = value_RM.min(1), value_RM.max(1)
    flat = low == high
    edge_RB = np.linspace(np.where(flat, low - 0.5, low), np.where(flat, high + 0.5, high), bins + 1, axis=1)
    from_RMB = value_RM[:, :, None] >= edge_RB[:, None, :-1]
    below_RMB = value_RM[:, :, None] < edge_RB[:, None, 1:]
    below_RMB[:, :, -1] = True
    count_RB = (from_RMB & below_RMB).sum(1)
    fullest_RB = count_RB == count_RB.max(1, keepdims=True)
    inside_RMB = from_RMB & (value_RM[:, :, None] <= edge_RB[:, None, 1:])
    return (inside_RMB & fullest_RB[:, None]).sum(2).astype(float)


class Matrix:
    """A projection as an attribute of a node: equal only to itself."""

    def __init__(self, array_DP: np.ndarray):
        self.array_DP, self.shape = array_DP, array_DP.shape

    def __repr__(self) -> str:
        return "{}x{}".format(*self.shape)


class SUOD(Ensemble):
    """Many detectors at once, those that look at neighbours on random projections of wide data (Zhao et al. 2021, arXiv 2003.05731).

    A projection to `target_share` of the features keeps distances nearly (Johnson & Lindenstrauss); members' scores are standardised and
    combined. Approximate by design: a projected member's scores are not those of the unprojected one. project=False keeps them exact.
    """

    def __init__(
        self,
        base_estimators=None,
        contamination=0.1,
        combination="average",
        project=True,
        target_share=0.5,
        project_from=20,
        random_state=None,
        n_jobs=None,
        execution=None,
    ):
        self.base_estimators, self.contamination, self.combination = base_estimators, contamination, combination
        self.project, self.target_share, self.project_from = project, target_share, project_from
        self.random_state, self.n_jobs, self.execution = random_state, n_jobs, execution

    def check(self, n: int, d: int) -> None:
        check_choice("combination", self.combination, COMBINATIONS)
        check_choice("project", self.project, (True, False))
        check_between("target_share", self.target_share, 1e-9, 1.0)
        check_between("project_from", self.project_from, 1, 10**9, whole=True)
        if self.base_estimators is not None and not self.base_estimators:
            raise DataError("base_estimators is empty; give at least one detector")

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        from wager.detect.tod.marginals import COPOD, HBOS

        given = self.base_estimators or [LOF(min(20, n - 1)), LOF(min(35, n - 1)), HBOS(), COPOD()]
        self.estimators_ = [copy_of(member) for member in given]
        random, target = random_stream(self.random_state), max(1, int(self.target_share * d))
        self.matrices_: list[Matrix | None] = [
            Matrix(random.standard_normal((d, target)) / np.sqrt(target))
            if self.project and d >= self.project_from and isinstance(member, NeighborDetector)
            else None
            for member in self.estimators_
        ]
        views = [x if m is None else plan.node("projected", x, matrix=m) for m in self.matrices_]
        return self.join(views, [d if m is None else target for m in self.matrices_], n)

    def view(self, i: int, x_RD: np.ndarray) -> np.ndarray:
        matrix = self.matrices_[i]
        return x_RD if matrix is None else x_RD @ matrix.array_DP

    def combined(self, x_ND: np.ndarray, values: dict[str, Any]) -> np.ndarray:
        return combine(standardized(self.trained(), self.trained()), self.combination)

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        return combine(standardized(self.trained(), self.asked(x_RD)), self.combination)
