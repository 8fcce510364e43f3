"""How often the k-th child of an accepted node is accepted: the acceptance vector that tree planning rests on.

p[k] is joint: children 1..k were rejected before and child k + 1 is accepted. So the entries and `reject` add up to one. A vector belongs
to one pair of models, one temperature, one top-p and one accept rule.
"""

from __future__ import annotations

import json
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from wager.errors import UsageError
from wager.serve.speculate.ratio import draw_without_replacement, without_replacement

PRIOR = (0.55, 0.12, 0.06, 0.03, 0.02, 0.015, 0.01, 0.008)  # a middling pair of models, until there is something better


@dataclass(frozen=True)
class AcceptanceVector:
    """counts[k]: decisions in which child k + 1 was accepted; rejected: those in which none was."""

    counts: tuple[float, ...]
    rejected: float
    temperature: float = 0.0
    top_p: float = 1.0
    method: str = "dynamic"

    @property
    def total(self) -> float:
        return sum(self.counts) + self.rejected

    @property
    def p(self) -> tuple[float, ...]:
        return tuple(c / max(self.total, 1e-12) for c in self.counts)

    @property
    def reject(self) -> float:
        return self.rejected / max(self.total, 1e-12)

    def save(self, path: str | Path) -> None:
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps({**asdict(self), "p": self.p, "reject_all": self.reject}, indent=1))
        temporary.replace(path)

    @staticmethod
    def load(path: str | Path) -> AcceptanceVector:
        """Reads what `save` wrote, or any JSON with `p` and `reject_all`."""
        try:
            values = json.loads(Path(path).read_text())
            values = values["vectors"][0] if "vectors" in values else values
            if "counts" in values:
                return AcceptanceVector(
                    tuple(values["counts"]),
                    values["rejected"],
                    values["temperature"],
                    values["top_p"],
                    values["method"],
                )
            return AcceptanceVector(tuple(values["p"]), values["reject_all"], method="given")
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UsageError(
                f"cannot read the acceptance vector {path}: {error}; write one with `wager speculate acceptance`"
            ) from None


class AcceptanceCounter:
    """Learns p from decisions at nodes with different numbers of children, starting from a prior worth `weight` decisions.

    p[k] is estimated from nodes with more than k children, so narrow nodes say nothing about wide ones.
    """

    def __init__(self, width: int, prior: Sequence[float] = PRIOR, weight: float = 20.0):
        padded = np.zeros(width)
        padded[: min(width, len(prior))] = prior[:width]
        self.accepted, self.tried = weight * padded, np.full(width, weight)
        self.counts, self.rejected = np.zeros(width), 0

    def add(self, children: int, accepted: int | None) -> None:
        """A node with so many children was decided: the index of the accepted one, or None."""
        self.tried[:children] += 1
        if accepted is None:
            self.rejected += 1
        elif accepted < len(self.accepted):
            self.accepted[accepted] += 1
            self.counts[accepted] += 1

    @property
    def decisions(self) -> int:
        return int(self.counts.sum()) + self.rejected

    @property
    def p(self) -> np.ndarray:
        return self.accepted / self.tried


REFRESH = 16
CONFIDENCE = (
    0.1,
    0.2,
    0.3,
    0.4,
    0.55,
    0.7,
    0.85,
    0.95,
)  # edges of bins for the probability of a draft's most likely token
OTHERS = (0.35, 0.15, 0.08, 0.05, 0.03)  # of what the first child leaves, believed of the others until they were tried


class ConfidenceCounter:
    """Acceptance of the k-th child by how sure the draft is at the node, p[bin, k], for all requests and for each class of them; what a
    class has seldom seen leans on all, and what all have seldom seen on a prior: a draft is right a little more often than it says."""

    def __init__(self, width: int, classes: int, prior: float = 8.0, lean: float = 12.0):
        bins = len(CONFIDENCE) + 1
        middles = (np.array([0.0, *CONFIDENCE]) + np.array([*CONFIDENCE, 1.0])) / 2
        first = 0.3 + 0.7 * middles
        believed = np.zeros((bins, max(width, len(OTHERS) + 1)))
        believed[:, 0] = first
        believed[:, 1 : len(OTHERS) + 1] = (1 - first)[:, None] * np.array(OTHERS)
        # lists: a decision changes a few entries, sooner than an array would
        self.accepted, self.tried = (prior * believed[:, :width]).tolist(), [[prior] * width for _ in range(bins)]
        self.class_accepted, self.class_tried = ([[[0.0] * width for _ in range(bins)] for _ in range(classes)] for _ in range(2))  # fmt: skip
        self.visits = [[1 / bins] * bins for _ in range(classes)]
        self.lean, self.usual = lean, float(first.mean())
        self._kept: dict[int, tuple[list[list[float]], float]] = {}
        self._fresh = 0  # decisions since then

    @staticmethod
    def bin(confidence: float) -> int:
        return bisect(CONFIDENCE, confidence)

    def add(self, number: int, confidence: float, children: int, accepted: int | None) -> None:
        """A node with so many children, of a request of class `number`, was decided: the index of the accepted one, or None."""
        row = self.bin(confidence)
        every, own = self.tried[row], self.class_tried[number][row]
        for k in range(children):
            every[k] += 1
            own[k] += 1
        if accepted is not None:
            self.accepted[row][accepted] += 1
            self.class_accepted[number][row][accepted] += 1
        self.visits[number][row] += 1
        self.usual += 0.01 * ((accepted is not None) - self.usual)
        self._fresh += 1
        if self._fresh >= REFRESH:
            self._kept.clear()
            self._fresh = 0

    def chances(self, number: int) -> tuple[list[list[float]], float]:
        """p of a class, child by child never rising, and the chance of a first child at a node of which nothing is known yet. Computed anew
        after every REFRESH decisions."""
        if number not in self._kept:
            every = np.array(self.accepted) / self.tried
            p = (self.class_accepted[number] + self.lean * every) / (np.array(self.class_tried[number]) + self.lean)
            visits = np.array(self.visits)
            weight = visits[number] + self.lean * visits.sum(0) / visits.sum()
            self._kept[number] = np.minimum.accumulate(p, 1).tolist(), float(p[:, 0] @ weight / weight.sum())
        return self._kept[number]


def greedy_bucket(target_W: np.ndarray, draft_W: np.ndarray, width: int) -> int:
    """Rank of the target's choice among the draft's `width` most likely tokens; `width` when it is not among them."""
    best = int(target_W.argmax())
    order = np.argsort(-draft_W, kind="stable")[:width]
    hit = np.flatnonzero(order == best)
    return int(hit[0]) if len(hit) else width


def sampled_bucket(target_W: np.ndarray, draft_W: np.ndarray, width: int, rng: np.random.Generator) -> int:
    """Index of the accepted child of one node under the rule without replacement; `width` when all were rejected."""
    tokens = draw_without_replacement(draft_W, width, rng.random(width))
    child, _ = without_replacement(target_W, draft_W, tokens, rng.random(len(tokens) + 1))
    return width if child is None else child


def measure_static(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    width: int,
    temperature: float,
    top_p: float,
    rng: np.random.Generator,
) -> AcceptanceVector:
    """Teacher-forced: `pairs` are the (target_W, draft_W) distributions at positions of reference texts."""
    buckets = np.zeros(width + 1)
    for target_W, draft_W in pairs:
        if temperature < 1e-5:
            buckets[greedy_bucket(target_W, draft_W, width)] += 1
        else:
            buckets[sampled_bucket(target_W, draft_W, width, rng)] += 1
    return AcceptanceVector(tuple(buckets[:width].tolist()), float(buckets[width]), temperature, top_p, "static")
