"""Improves a placement by what it serves in simulation, not by its flow: small moves, kept when the simulated rate rises.

The flow model does not see round trips, batches that bunch up, or prompts that hold up decodes; a simulation does. This is a search without
proof, for use after the cover program: the flow and its bound are still reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from wager.cluster.helix.flow import Placement

Rates = Callable[
    [Sequence[Placement]], list[float]
]  # simulated output tokens/s of placements, 0 where one serves nothing
Promise = Callable[[Placement], float]
PROMISING = 0.8
LOOKS = 50  # neighbours looked at for one that promises enough
MOVES = ("slide", "stretch", "jump", "swap")


def refine(
    starts: Sequence[tuple[Placement, float]],
    most_layers: dict[str, int],
    layers: int,
    rates: Rates,
    promise: Promise,
    tries: int,
    rng: np.random.Generator,
    at_once: int = 1,
) -> tuple[dict[str, tuple[int, int]], float]:
    """Hill climbing from several placements in turn, over about `tries` simulations, `at_once` of them together.

    starts: placements with their rates. most_layers: node -> layers it may hold at most, also of nodes that hold none yet. promise: a cheap
    estimate; neighbours that promise much less than where they come from are not simulated. Returns the best placement and its rate.
    """
    now = [(dict(placement), rate) for placement, rate in starts]
    best = max(now, key=lambda one: one[1])
    for turn in range(-(-tries // at_once)):
        # the best so far gets every other turn
        place = max(range(len(now)), key=lambda i: now[i][1]) if turn % 2 else turn // 2 % len(now)
        here = now[place][0]
        floor = PROMISING * promise(here)
        tried = []
        for _ in range(LOOKS * at_once):
            changed = neighbour(here, most_layers, layers, rng)
            if changed != here and changed not in tried and covers(changed, layers) and promise(changed) >= floor:
                tried.append(changed)
            if len(tried) == at_once:
                break
        for changed, rate in zip(tried, rates(tried), strict=True):
            if rate > now[place][1]:
                now[place] = changed, rate
        best = max(best, now[place], key=lambda one: one[1])
    return best


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
