"""The best static token tree for an acceptance vector and a machine (Sequoia, arXiv 2402.12374).

If the k-th child of an accepted node is accepted with joint probability p_k, a node's chance to be committed is the product of the p_k
along its path, and a tree's expected tokens per pass is the sum over its nodes, the root's 1 included. A dynamic program over (nodes,
levels, children of the root) finds the best tree of every size and depth; the machine's measured times then choose among them.

Counting: the root (last committed token) is a node, a tree of n nodes has n - 1 guesses; d levels take d - 1 draft steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from wager.errors import UsageError
from wager.serve.speculate.hardware_profile import HardwareProfile
from wager.serve.token_tree import depths_of, visible_of


@dataclass(frozen=True)
class Level:
    """Guessed nodes of one depth that get children: their numbers, those among them and the levels above that each sees."""

    nodes: np.ndarray
    visible: np.ndarray


@dataclass(frozen=True)
class GrowMap:
    """A tree to fill with guesses. parents: of the guessed nodes in level order, -1 is the root; children of a node in order of trial.

    scores: each node's chance of being committed, as planned.
    """

    parents: tuple[int, ...]
    scores: tuple[float, ...] = ()
    expected_tokens: float = 0.0
    expected_speedup: float = 0.0
    facts: dict = field(default_factory=dict)

    def __post_init__(self):
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise UsageError(f"grow map: node {node} has parent {parent}; parents come first", param="tree")
        if any(a > b for a, b in zip(self.depths, self.depths[1:], strict=False)):
            raise UsageError("grow map: nodes must be listed level by level", param="tree")

    @staticmethod
    def from_parents(parents: Sequence[int], **facts) -> GrowMap:
        """Any tree with parents first, renumbered level by level; siblings keep their order."""
        given = np.asarray(parents, dtype=np.int64)
        if np.any(given >= np.arange(len(given))):
            raise UsageError("grow map: parents come first", param="tree")
        order = np.argsort(depths_of(given), kind="stable") if len(given) else given
        # within a level, by the place of the parent
        place = {-1: -1}
        ordered: list[int] = []
        depths = depths_of(given) if len(given) else given
        for depth in range(1, int(depths.max(initial=0)) + 1):
            level = [int(n) for n in order if depths[n] == depth]
            level.sort(key=lambda n: place[int(given[n])])
            for n in level:
                place[n] = len(ordered)
                ordered.append(n)
        return GrowMap(tuple(place[int(given[n])] for n in ordered), facts=dict(facts))

    @staticmethod
    def chain(length: int) -> GrowMap:
        return GrowMap(tuple(range(-1, length - 1)))

    @staticmethod
    def sequences(count: int, length: int) -> GrowMap:
        """`count` chains side by side."""
        first = [-1] * count
        return GrowMap(tuple(first + [i for i in range(count * (length - 1))]))

    @staticmethod
    def expansion(widths: Sequence[int]) -> GrowMap:
        """Every node of depth i gets widths[i] children."""
        parents: list[int] = []
        frontier = [-1]
        for width in widths:
            start = len(parents)
            parents += [node for node in frontier for _ in range(width)]
            frontier = list(range(start, len(parents)))
        return GrowMap(tuple(parents))

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> list[int]:
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    @property
    def depth(self) -> int:
        """Draft steps."""
        return max(self.depths, default=0)

    @cached_property
    def children(self) -> list[list[int]]:
        """Entry 0: the root's children; entry i + 1: node i's."""
        lists: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, parent in enumerate(self.parents):
            lists[parent + 1].append(node)
        return lists

    @cached_property
    def frontiers(self) -> list[int]:
        """How many nodes the draft computes in each pass after the root's."""
        counts = [0] * self.depth
        for node, depth in enumerate(self.depths):
            counts[depth - 1] += bool(self.children[node + 1])
        return counts[:-1]

    @cached_property
    def levels(self) -> list[Level]:
        """The draft's passes after the root's: level i holds the nodes of depth i + 1 that have children."""
        seen = visible_of(np.asarray(self.parents, dtype=np.int64))
        computed: list[int] = []
        levels = []
        for depth in range(1, self.depth):
            nodes = [n for n, d in enumerate(self.depths) if d == depth and self.children[n + 1]]
            computed += nodes
            levels.append(Level(np.array(nodes), seen[np.ix_(nodes, computed)]))
        return levels

    def shrunk(self, nodes: int, depth: int) -> GrowMap:
        """The best part of the tree with at most so many guesses and so deep; of siblings the first ones stay."""
        if len(self) <= nodes and self.depth <= depth:
            return self
        keys: list[float] = []
        scores = self.scores or tuple(0.6**d for d in self.depths)
        elder: dict[int, float] = {}
        for node, parent in enumerate(self.parents):
            bound = min(keys[parent] if parent >= 0 else np.inf, elder.get(parent, np.inf))
            keys.append(min(bound, scores[node]))
            elder[parent] = keys[-1]
        kept = [n for n in range(len(self)) if self.depths[n] <= depth]
        kept = sorted(sorted(kept, key=lambda n: (-keys[n], n))[:nodes])
        place = {-1: -1} | {n: i for i, n in enumerate(kept)}
        return GrowMap(tuple(place[self.parents[n]] for n in kept), tuple(scores[n] for n in kept), facts=self.facts)

    def save(self, path: str | Path) -> None:
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1))
        temporary.replace(path)

    @staticmethod
    def load(path: str | Path) -> GrowMap:
        try:
            values = json.loads(Path(path).read_text())
            return GrowMap(
                tuple(values["parents"]), tuple(values.get("scores", ())), values.get("expected_tokens", 0.0),
                values.get("expected_speedup", 0.0), values.get("facts", {}),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"cannot read the token tree {path}: {error}; write one with `wager speculate plan`"
            ) from None

    def text(self) -> str:
        """The tree as indented lines: child number and chance."""
        lines = ["root"]

        def walk(row: int, indent: str) -> None:
            for k, node in enumerate(self.children[row], 1):
                score = f" {self.scores[node]:.3f}" if self.scores else ""
                lines.append(f"{indent}{k}{score}")
                walk(node + 1, indent + "  ")

        walk(0, "  ")
        return "\n".join(lines)


class TreeTables:
    """The dynamic program for one acceptance vector; serves all sizes up to max_nodes and depths up to max_levels.

    p: joint acceptance probability of child 1, 2, ... of an accepted node; or a matrix, row i for parents of depth i, which then serves
    trees of exactly max_levels levels. T[n, b] at d levels = max over m of T[n - m, b - 1] + p_b * M[m] at d - 1 levels, where M is the
    best over b: the b-th child heads a subtree of m nodes.
    """

    def __init__(self, p: Sequence[float] | np.ndarray, max_nodes: int, max_levels: int):
        probabilities = np.asarray(p, dtype=np.float64)
        self.p = probabilities if probabilities.ndim == 2 else np.tile(probabilities, (max_levels, 1))
        if len(self.p) < max_levels or max_nodes < 1 or max_levels < 1 or not self.p.shape[1]:
            raise UsageError(
                f"cannot plan {max_nodes} nodes in {max_levels} levels from a vector of shape {probabilities.shape}"
            )
        self.max_nodes, self.max_levels = max_nodes, max_levels
        branch = min(self.p.shape[1], max(max_nodes - 1, 1))
        n = np.arange(max_nodes + 1)
        take = n[:, None] - n[None, :]  # nodes left to the elder children when the last subtree takes m
        allowed = (take >= 1) & (n[None, :] >= 1)
        take = np.where(allowed, take, 0)
        self.best = np.full((max_levels + 1, max_nodes + 1), -np.inf)  # M[d, n]
        self.width = np.zeros((max_levels + 1, max_nodes + 1), np.int32)  # best b
        self.last = np.zeros((max_levels + 1, branch + 1, max_nodes + 1), np.int32)  # nodes of the last subtree
        self.best[1, 1] = 1.0
        for d in range(2, max_levels + 1):
            elder = np.full(max_nodes + 1, -np.inf)
            elder[1] = 1.0
            best, width = elder.copy(), np.zeros(max_nodes + 1, np.int32)
            for b in range(1, branch + 1):
                below = self.best[d - 1]
                gain = np.where(
                    np.isfinite(below), self.p[max_levels - d, b - 1] * np.where(np.isfinite(below), below, 0), -np.inf
                )
                candidates = np.where(allowed, elder[take] + gain[None, :], -np.inf)
                self.last[d, b] = candidates.argmax(1)
                elder = candidates[n, self.last[d, b]]
                better = elder > best
                best, width = np.where(better, elder, best), np.where(better, b, width)
                if not np.isfinite(elder).any():
                    break
            self.best[d], self.width[d] = best, width

    def expected_tokens(self, nodes: int, levels: int) -> float:
        """F of the best tree of exactly `nodes` nodes (root included) within `levels` levels; -inf when there is none."""
        return float(self.best[levels, nodes])

    def tree(self, nodes: int, levels: int) -> GrowMap:
        """The tree that attains it."""
        if not np.isfinite(self.best[levels, nodes]):
            raise UsageError(
                f"no tree has {nodes} nodes within {levels} levels and {self.p.shape[1]} children per node"
            )
        parents: list[int] = []
        scores: list[float] = []

        def build(nodes: int, levels: int, parent: int, score: float) -> None:
            sizes, b = [], int(self.width[levels, nodes])
            while b:
                sizes.append(int(self.last[levels, b, nodes]))
                nodes -= sizes[-1]
                b -= 1
            for k, size in enumerate(reversed(sizes)):
                number = len(parents)
                parents.append(parent)
                scores.append(score * float(self.p[self.max_levels - levels, k]))
                build(size, levels - 1, number, scores[-1])

        build(nodes, levels, -1, 1.0)
        return _in_level_order(parents, scores, self.expected_tokens(nodes, levels))


def _in_level_order(parents: list[int], scores: list[float], expected: float) -> GrowMap:
    """Renumber from depth-first to level order."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    order, queue = [], list(children.get(-1, []))
    while queue:
        order += queue
        queue = [c for node in queue for c in children.get(node, [])]
    place = {-1: -1} | {node: i for i, node in enumerate(order)}
    return GrowMap(tuple(place[parents[n]] for n in order), tuple(scores[n] for n in order), expected)


def expected_tokens(tree: GrowMap, p: Sequence[float]) -> float:
    """F of any tree under an acceptance vector."""
    scores = [0.0] * len(tree)
    for row, kids in enumerate(tree.children):
        above = scores[row - 1] if row else 1.0
        for k, node in enumerate(kids):
            scores[node] = above * (p[k] if k < len(p) else 0.0)
    return 1.0 + sum(scores)


SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512, 768)


def plan_tree(
    p: Sequence[float] | np.ndarray,
    profile: HardwareProfile,
    *,
    batch: int = 1,
    max_size: int = 64,
    max_depth: int = 8,
    max_branch: int = 16,
    sizes: Sequence[int] | None = None,
) -> GrowMap:
    """The tree with the highest expected speed-up over plain decoding at this batch size; a tree of no guesses when none pays.

    Speed-up = F * t_plain / (t_target(batch, n) + the draft's passes + what a drafted step costs besides), all measured.
    """
    best = GrowMap((), (), 1.0, 1.0)
    for tree in plan_trees(
        p, profile, batch=batch, max_size=max_size, max_depth=max_depth, max_branch=max_branch, sizes=sizes
    ):
        if tree.expected_speedup > best.expected_speedup:
            best = tree
    return best


def plan_trees(
    p: Sequence[float] | np.ndarray,
    profile: HardwareProfile,
    *,
    batch: int = 1,
    max_size: int = 64,
    max_depth: int = 8,
    max_branch: int = 16,
    sizes: Sequence[int] | None = None,
) -> list[GrowMap]:
    """Of each size (`SIZES` up to max_size) the tree with the highest expected speed-up, smallest first.

    p: joint acceptance of an accepted node's children; or a matrix, row d for nodes of depth d.
    """
    sizes = [n for n in (sizes or SIZES) if n <= max_size]
    tables_of = _tables(np.asarray(p, dtype=np.float64)[..., :max_branch], max(sizes, default=1), max_depth + 1)
    plain_ms, found = profile.target_ms(batch, 1), []
    for n in sizes:
        best: GrowMap | None = None
        shallower = -math.inf
        for levels in range(2, max_depth + 2):
            tables = tables_of[levels]
            tokens = tables.expected_tokens(n, levels) if n >= levels else -math.inf
            if not math.isfinite(tokens) or tokens <= shallower:
                continue  # no such tree, or as shallow a one is as good
            shallower = tokens
            at_least_ms = profile.step_ms(batch, n, [1] * (levels - 2))
            if best is not None and tokens * plain_ms <= best.expected_speedup * at_least_ms:
                continue
            tree = tables.tree(n, levels)
            cost_ms = profile.step_ms(batch, n, tree.frontiers)
            speedup = tree.expected_tokens * plain_ms / cost_ms
            if best is None or speedup > best.expected_speedup:
                facts = {"batch": batch, "levels": levels, "size": n, "cost_ms": cost_ms, "plain_ms": plain_ms}
                best = GrowMap(tree.parents, tree.scores, tree.expected_tokens, speedup, facts)
        if best is not None:
            found.append(best)
    return found


def _tables(p: np.ndarray, max_nodes: int, max_levels: int) -> dict[int, TreeTables]:
    """By number of levels: one table for a vector; for a matrix one each, since it tells how deep a node lies by the levels left."""
    if p.ndim == 1:
        return dict.fromkeys(range(2, max_levels + 1), TreeTables(p, max_nodes, max_levels))
    leaves = np.zeros((1, p.shape[1]))
    return {levels: TreeTables(np.vstack((p[: levels - 1], leaves)), max_nodes, levels) for levels in range(2, max_levels + 1)}  # fmt: skip
