"""Tabular outlier detectors, drop-in for PyOD: the same scores, from one shared plan of exact tensor operators (TOD, arXiv 2110.14007)."""

from wager.detect.tod.base import Detector, explain, fit_many
from wager.detect.tod.batching import Execution
from wager.detect.tod.ensembles import LSCP, SUOD, FeatureBagging
from wager.detect.tod.marginals import COPOD, ECOD, HBOS, LODA, PCA, IForest
from wager.detect.tod.neighbors import ABOD, COF, KNN, LOCI, LOF, SOD
from wager.detect.tod.plan import operator

__all__ = [
    "ABOD", "COF", "COPOD", "ECOD", "HBOS", "KNN", "LOCI", "LODA", "LOF", "LSCP", "PCA", "SOD", "SUOD", "Detector", "Execution", "FeatureBagging",
    "IForest", "explain",
    "fit_many", "operator",
]  # fmt: skip
