"""The protocol: which detectors, what hyper-parameters a trial may draw, and how. Two named sets, both drawn uniformly, never tuned on labels.

bond-2022: as published; on injected sets the balance of attributes and structure is not drawn but follows the spread of both errors ("auto").
pygod-1: the grid of the library's later benchmark, with its quirks (CONAD's ranking, GAAN's row pairs, AdONE's pairing).
Source: BOND (arXiv 2206.10071).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wager.detect.bond import residual, shallow
from wager.detect.bond.adversarial import DONE, GAAN, AdONE
from wager.detect.bond.autoencoders import CONAD, DOMINANT, GAE, GUIDE, AnomalyDAE
from wager.detect.bond.base import GraphDetector
from wager.errors import UsageError

Grid = dict[str, Sequence[Any]]
PROTOCOLS = ("bond-2022", "pygod-1")
INJECTED = ("inj_", "gen_")
NARROW = ("disney", "books", "enron", "dgraph")


@dataclass(frozen=True)
class Entry:
    """A detector of the benchmark: how to make it, and its own part of the grid beside the shared one of learning detectors."""

    make: Callable[..., GraphDetector]
    own: Mapping[str, Sequence[Any]]
    learns: bool = True
    balance: str = ""  # the parameter that weighs attributes against structure
    width: str = "hid_dim"
    seeded: bool = True


def _gae(backbone: str) -> Callable[..., GraphDetector]:
    return lambda **config: GAE(backbone=backbone, **config)


DETECTORS: dict[str, Entry] = {
    "lof": Entry(shallow.LOF, {}, learns=False, seeded=False),
    "if": Entry(shallow.IF, {}, learns=False),
    "mlpae": Entry(_gae("mlp"), {}),
    "scan": Entry(shallow.SCAN, {"eps": (0.3, 0.5, 0.8), "mu": (2, 5, 10)}, learns=False, seeded=False),
    "radar": Entry(residual.Radar, {"lr": (0.1, 0.05, 0.01), "weight_decay": (0.01,)}, learns=False),
    "anomalous": Entry(residual.ANOMALOUS, {"lr": (0.1, 0.05, 0.01), "weight_decay": (0.01,)}, learns=False),
    "gcnae": Entry(_gae("gcn"), {}),
    "dominant": Entry(DOMINANT, {}, balance="weight"),
    "done": Entry(DONE, {}),
    "adone": Entry(AdONE, {}),
    "anomalydae": Entry(AnomalyDAE, {"theta": (10.0, 40.0, 90.0), "eta": (3.0, 5.0, 8.0)}, balance="alpha"),
    "gaan": Entry(GAAN, {"noise_dim": (8, 16, 32)}, balance="weight"),
    "guide": Entry(GUIDE, {"hid_s": (4, 5, 6)}, balance="alpha", width="hid_a"),
    "conad": Entry(CONAD, {}, balance="weight"),
}
QUIRKS = {"conad": {"ranking": "reference"}, "gaan": {"pairs": "rows"}, "adone": {"pairing": "all"}}


def hidden_widths(dataset: str) -> tuple[int, ...]:
    if dataset == "reddit":
        return (32, 48, 64)
    return (8, 12, 16) if dataset in NARROW else (32, 64, 128, 256)


def grid(detector: str, dataset: str, protocol: str, epochs: int = 300) -> Grid:
    """Every hyper-parameter that a trial draws, with its choices. Raises UsageError for an unknown name."""
    if protocol not in PROTOCOLS:
        raise UsageError(f"unknown protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
    entry = entry_of(detector)
    choices: Grid = {}
    if entry.learns:
        choices |= {"dropout": (0.0, 0.1, 0.3), "lr": (0.1, 0.05, 0.01), "weight_decay": (0.01,), "epoch": (epochs,)}
        choices[entry.width] = hidden_widths(dataset)
    elif "lr" in entry.own:
        choices["epoch"] = (epochs,)
    if entry.balance:
        automatic = protocol == "bond-2022" and dataset.startswith(INJECTED)
        choices[entry.balance] = ("auto",) if automatic else (0.8, 0.5, 0.2)
    choices |= dict(entry.own)
    if protocol == "pygod-1":
        choices |= {name: (value,) for name, value in QUIRKS.get(detector, {}).items()}
    return choices


def entry_of(detector: str) -> Entry:
    if detector not in DETECTORS:
        raise UsageError(f"unknown detector {detector!r}; choose from {', '.join(DETECTORS)}")
    return DETECTORS[detector]


def trial_config(
    detector: str, dataset: str, protocol: str, trial: int, seed: int, epochs: int = 300
) -> tuple[dict[str, Any], int]:
    """The hyper-parameters and the seed of one trial: a function of its name alone, whatever ran before it."""
    name = zlib.crc32(f"{detector}|{dataset}".encode())
    random = np.random.default_rng([seed, name, trial])
    drawn = {
        key: choices[int(random.integers(len(choices)))]
        for key, choices in sorted(grid(detector, dataset, protocol, epochs).items())
    }
    return drawn, int(random.integers(2**31 - 1))


def make(detector: str, config: Mapping[str, Any], seed: int, symmetrize: bool = False) -> GraphDetector:
    """The detector of one trial."""
    entry = entry_of(detector)
    extra: dict[str, Any] = {"seed": seed} if entry.seeded else {}
    if detector not in ("lof", "if"):
        extra["symmetrize"] = symmetrize
    return entry.make(**config, **extra)
