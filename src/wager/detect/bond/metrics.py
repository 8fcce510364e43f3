"""How good scores are: ROC-AUC, average precision, recall at k; and intervals for their means. Ties are defined: see each function."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import rankdata, t

from wager.errors import UsageError


def eval_roc_auc(label: np.ndarray, score: np.ndarray) -> float:
    """Chance that an outlier outscores an inlier, a tie counting one half."""
    positive, score = _checked(label, score)
    n1, n0 = positive.sum(), (~positive).sum()
    return float((rankdata(score)[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def eval_average_precision(label: np.ndarray, score: np.ndarray) -> float:
    """Area under the precision-recall steps; equal scores form one step."""
    positive, score = _checked(label, score)
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    precision = hits[last] / (last + 1)
    return float((np.diff(hits[last], prepend=0) * precision).sum() / positive.sum())


def eval_recall_at_k(label: np.ndarray, score: np.ndarray, k: int | None = None) -> float:
    """Share of the outliers among the k highest scores (k: their number); equal scores in order of index."""
    positive, score = _checked(label, score)
    top = np.argsort(-score, kind="stable")[: int(positive.sum()) if k is None else k]
    return float(positive[top].sum() / positive.sum())


def _checked(label: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    positive, score = np.asarray(label).ravel() > 0, np.asarray(score, dtype=np.float64).ravel()
    if len(positive) != len(score):
        raise UsageError(f"{len(positive)} labels for {len(score)} scores")
    if not positive.any() or positive.all():
        raise UsageError("labels must name at least one outlier and one inlier")
    if np.isnan(score).any():
        raise UsageError("scores contain NaN")
    return positive, score


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval for the mean; unbounded for a single value."""
    v = np.asarray(values, dtype=np.float64)
    if len(v) < 2:
        return -math.inf, math.inf
    half = float(t.ppf((1 + confidence) / 2, len(v) - 1)) * v.std(ddof=1) / math.sqrt(len(v))
    return float(v.mean() - half), float(v.mean() + half)


def quality(label: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """The three metrics, and the AUC for each outlier type where both types occur."""
    label = np.asarray(label)
    found = {
        "auc": eval_roc_auc(label > 0, score),
        "ap": eval_average_precision(label > 0, score),
        "recall": eval_recall_at_k(label > 0, score),
    }
    if (label & 2).any():
        for name, bit in (("contextual", 1), ("structural", 2)):
            if (label & bit).any():
                found[f"auc_{name}"] = eval_roc_auc((label & bit) > 0, score)
    return found
