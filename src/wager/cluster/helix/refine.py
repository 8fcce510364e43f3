"""Improves a placement by what it serves in simulation, not by its flow: small moves, kept when the simulated rate rises.

The flow model does not see round trips, batches that bunch up, or prompts that hold up decodes; a simulation does. This is a search without
proof, for use after the cover program: the flow and its bound are still reported.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from wager.cluster.helix.flow import Placement

Rate = Callable[[Placement], float]  # simulated output tokens/s of a placement, 0 where it serves nothing
MOVES = ("slide", "stretch", "jump", "swap")


def refine(
    placement: Placement, most_layers: dict[str, int], layers: int, rate: Rate, tries: int, rng: np.random.Generator
) -> tuple[dict[str, tuple[int, int]], float]:
    """Hill climbing over `tries` simulations. most_layers: node -> layers it may hold at most, also of nodes that hold none yet."""
    best = dict(placement)
    best_rate = rate(best)
    for _ in range(tries):
        changed = neighbour(best, most_layers, layers, rng)
        if changed == best or not covers(changed, layers):
            continue
        changed_rate = rate(changed)
        if changed_rate > best_rate:
            best, best_rate = changed, changed_rate
    return best, best_rate


def covers(placement: Placement, layers: int) -> bool:
    held = np.zeros(layers, bool)
    for start, end in placement.values():
        held[start:end] = True
    return bool(held.all())


def neighbour(
    placement: Placement, most_layers: dict[str, int], layers: int, rng: np.random.Generator
) -> dict[str, tuple[int, int]]:
    """One to three random moves away; every window stays within the model and the machine."""
    changed = dict(placement)
    for _ in range(int(rng.integers(1, 4))):
        node = str(rng.choice(sorted(most_layers)))
        start, end = changed.get(node, (0, 1))
        move = MOVES[int(rng.integers(len(MOVES)))]
        if move == "swap":
            other = str(rng.choice(sorted(most_layers)))
            windows = changed.get(node), changed.get(other)
            if all(w is not None for w in windows):
                for name, window in ((node, windows[1]), (other, windows[0])):
                    assert window is not None
                    changed[name] = fitted(window[0], window[1] - window[0], most_layers[name], layers)
            continue
        if move == "slide":
            start += int(rng.choice([-2, -1, 1, 2]))
        elif move == "jump":
            start = int(rng.integers(layers))
        size = end - changed.get(node, (0, 1))[0]
        if move == "stretch":
            size += int(rng.choice([-1, 1]))
            start += int(rng.integers(2)) * int(rng.choice([-1, 1]))
        changed[node] = fitted(start, size, most_layers[node], layers)
    return changed


def fitted(start: int, size: int, most: int, layers: int) -> tuple[int, int]:
    """The nearest window that the machine can hold."""
    size = max(1, min(size, most, layers))
    start = max(0, min(start, layers - size))
    return start, start + size
