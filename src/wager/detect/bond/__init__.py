"""Outlier nodes in attributed graphs: fourteen detectors, injection, metrics, and the benchmark protocol (BOND, arXiv 2206.10071)."""

from wager.detect.bond.adversarial import DONE, GAAN, AdONE
from wager.detect.bond.autoencoders import CONAD, DOMINANT, GAE, GUIDE, AnomalyDAE
from wager.detect.bond.graph import Graph
from wager.detect.bond.residual import ANOMALOUS, Radar
from wager.detect.bond.shallow import IF, LOF, SCAN

__all__ = [
    "ANOMALOUS", "CONAD", "DOMINANT", "DONE", "GAAN", "GAE", "GUIDE", "IF", "LOF", "SCAN", "AdONE", "AnomalyDAE", "Graph", "Radar",
]  # fmt: skip
