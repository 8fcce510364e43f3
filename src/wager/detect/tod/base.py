"""What every tabular detector can do: PyOD's and scikit-learn's interface over a plan.

A detector names its parameters in __init__, describes its work as a graph (`graph`), keeps what it needs of the results (`adopt`), and scores
new rows (`score_new`). `fit_many` runs several as one plan, so that shared steps run once.
Source: TOD (arXiv 2110.14007).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import erf
from scipy.stats import binom

from wager.detect.tod import native, operators, plan
from wager.detect.tod.batching import Execution
from wager.detect.tod.checks import DataError, NotFittedError, check_between, check_choice, check_rows

assert operators  # importing it registers the operators


class Detector:
    """Base of the detectors. After `fit`: decision_scores_ (higher is more abnormal), threshold_, labels_, n_features_in_."""

    minimum_rows = 2
    contamination: float
    n_jobs: int | None = None
    execution: Execution | None = None

    # -- what a detector defines ---------------------------------------------------------------------------------------------------------

    def check(self, n: int, d: int) -> None:
        """Refuse parameters that do not suit n rows of d features."""

    def graph(self, x: plan.Node, n: int, d: int) -> dict[str, plan.Node]:
        """Named roots; "score" is the decision score of the training rows."""
        raise NotImplementedError

    def adopt(self, x_ND: np.ndarray, values: dict[str, Any]) -> None:
        """Keep what scoring new rows needs."""

    def score_new(self, x_RD: np.ndarray) -> np.ndarray:
        """Scores of new rows against the training rows."""
        raise NotImplementedError

    # -- fitting and scoring -------------------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> Detector:
        """Score the training rows. y is ignored: labels never reach a detector."""
        fit_many([self], X, self.execution)
        return self

    def fit_predict(self, X: Any, y: Any = None) -> np.ndarray:
        return self.fit(X).labels_

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores of the rows; higher is more abnormal."""
        self._check_fitted()
        x = check_rows(X, features=self.n_features_in_)
        with native.limited(self.n_jobs):
            return self.score_new(x)

    def predict(self, X: Any, return_confidence: bool = False) -> Any:
        """1 for rows whose score exceeds the threshold, else 0; with their confidence if asked."""
        scores = self.decision_function(X)
        labels = (scores > self.threshold_).astype(int)
        return (labels, self._confidence(scores)) if return_confidence else labels

    def predict_proba(self, X: Any, method: str = "linear", return_confidence: bool = False) -> Any:
        """Columns P(inlier), P(outlier): min-max of the training scores ("linear") or unified scores ("unify", Kriegel et al. 2011)."""
        check_choice("method", method, ("linear", "unify"))
        scores = self.decision_function(X)
        if method == "linear":
            low, high = self.decision_scores_.min(), self.decision_scores_.max()
            outlier = ((scores - low) / ((high - low) or 1.0)).clip(0, 1)
        else:
            spread = self.decision_scores_.std() or 1.0
            outlier = erf((scores - self.decision_scores_.mean()) / (spread * np.sqrt(2))).clip(0, 1)
        proba = np.stack([1 - outlier, outlier], 1)
        return (proba, self._confidence(scores)) if return_confidence else proba

    def predict_confidence(self, X: Any) -> np.ndarray:
        """How likely the same prediction is under a slightly different training set (Perini et al. 2020)."""
        return self._confidence(self.decision_function(X))

    def _confidence(self, scores: np.ndarray) -> np.ndarray:
        n = len(self.decision_scores_)
        below = np.searchsorted(np.sort(self.decision_scores_), scores, "right")
        outlier = 1 - binom.cdf(n - int(n * self.contamination), n, (1 + below) / (2 + n))
        return np.where(scores > self.threshold_, outlier, 1 - outlier)

    def finish(self, scores_N: np.ndarray, d: int) -> None:
        """Scores, threshold (the (1 - contamination) percentile, exceeded strictly) and labels."""
        self.n_features_in_ = d
        self.decision_scores_ = np.ascontiguousarray(scores_N, dtype=np.float64)
        self.threshold_ = float(np.percentile(self.decision_scores_, 100 * (1 - self.contamination)))
        self.labels_ = (self.decision_scores_ > self.threshold_).astype(int)

    def _check_fitted(self) -> None:
        if not hasattr(self, "decision_scores_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet; call fit first")

    # -- scikit-learn's protocol ---------------------------------------------------------------------------------------------------------

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        params = {name: getattr(self, name) for name in self._names()}
        if deep:
            for name, value in list(params.items()):
                if hasattr(value, "get_params"):
                    params |= {f"{name}__{k}": v for k, v in value.get_params().items()}
        return params

    def set_params(self, **params: Any) -> Detector:
        for name, value in params.items():
            own, _, nested = name.partition("__")
            if own not in self._names():
                raise DataError(f"{type(self).__name__} has no parameter {own!r}; it has {', '.join(self._names())}")
            if nested:
                getattr(self, own).set_params(**{nested: value})
            else:
                setattr(self, own, value)
        return self

    def __repr__(self) -> str:
        defaults = {n: p.default for n, p in inspect.signature(type(self).__init__).parameters.items()}
        shown = [
            f"{k}={v!r}" for k, v in self.get_params(deep=False).items() if v is not defaults[k] and v != defaults[k]
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags  # pyright: ignore[reportMissingImports] - only scikit-learn asks

        return Tags(estimator_type="outlier_detector", target_tags=TargetTags(required=False), input_tags=InputTags())

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "decision_scores_")


def fit_many(
    detectors: Sequence[Detector],
    X: Any,
    execution: Execution | None = None,
    progress: Callable[[str], None] | None = None,
) -> plan.Run:
    """Fit several detectors on the same rows as one plan; steps they share run once. Returns what each step took.

    Each detector ends in the state that its own `fit` would have given, to the bit.
    """
    x = check_rows(X, at_least=max((d.minimum_rows for d in detectors), default=1))
    n, d = x.shape
    graphs = graphs_of(detectors, n, d)
    names = [(i, name) for i, graph in enumerate(graphs) for name in graph]
    roots = plan.fold([graphs[i][name] for i, name in names])
    threads = next((det.n_jobs for det in detectors if det.n_jobs is not None), None)
    with native.limited(threads):
        done = plan.run(roots, x, execution or Execution(), progress)
    values: list[dict[str, Any]] = [{} for _ in detectors]
    for (i, name), value in zip(names, done.values, strict=True):
        values[i][name] = value
    for det, own in zip(detectors, values, strict=True):
        det.adopt(x, own)
        det.finish(own["score"], d)
    return done


def graphs_of(detectors: Sequence[Detector], n: int, d: int) -> list[dict[str, plan.Node]]:
    """Checked graphs over one data leaf."""
    leaf = plan.data()
    for det in detectors:
        check_between("contamination", det.contamination, 1e-9, 0.5)
        det.check(n, d)
    return [det.graph(leaf, n, d) for det in detectors]


def explain(detectors: Detector | Sequence[Detector], X: Any, execution: Execution | None = None) -> str:
    """The shared plan of the detectors for these rows, in words: steps, bytes, parts, users."""
    several = [detectors] if isinstance(detectors, Detector) else list(detectors)
    x = check_rows(X)
    graphs = graphs_of(several, *x.shape)
    roots = {
        f"{type(det).__name__}[{i}].{name}": root
        for i, (det, g) in enumerate(zip(several, graphs, strict=True))
        for name, root in g.items()
    }
    return plan.explain(roots, (x.shape[0], x.shape[1]), execution)
