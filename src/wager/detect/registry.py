"""Tabular detectors by the names the command line uses."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from wager.detect import tod
from wager.errors import UsageError

TABULAR: dict[str, type[tod.Detector]] = {
    "knn": tod.KNN, "lof": tod.LOF, "abod": tod.ABOD, "cof": tod.COF, "sod": tod.SOD, "loci": tod.LOCI, "hbos": tod.HBOS, "loda": tod.LODA,
    "pca": tod.PCA, "ecod": tod.ECOD, "copod": tod.COPOD, "iforest": tod.IForest,
    "feature_bagging": tod.FeatureBagging, "lscp": tod.LSCP, "suod": tod.SUOD,
}  # fmt: skip
DEFAULT = ("knn", "lof", "abod", "cof", "hbos", "pca", "ecod", "copod", "iforest", "loda")


def tabular(names: str, parameters: Sequence[str] = (), **common: Any) -> dict[str, tod.Detector]:
    """Detectors of a list "knn,lof" ("all": every one); parameters "knn.n_neighbors=10". Raises UsageError for unknown names."""
    wanted = list(TABULAR) if names == "all" else [n.strip() for n in names.split(",") if n.strip()]
    unknown = [n for n in wanted if n not in TABULAR]
    if unknown or not wanted:
        raise UsageError(
            f"unknown detector {', '.join(unknown) or repr(names)}; choose from {', '.join(TABULAR)}, or all"
        )
    made = {name: TABULAR[name](**common) for name in wanted}
    for text in parameters:
        name, dot, rest = text.partition(".")
        key, equals, value = rest.partition("=")
        if not dot or not equals or name not in made:
            raise UsageError(f"--param {text!r}: write DETECTOR.NAME=VALUE for one of {', '.join(made)}")
        try:
            parsed = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed = value
        made[name].set_params(**{key: parsed})
    return made
