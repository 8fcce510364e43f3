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
MOVES = ("slide", "stretch", "jump", "swap", "boundary")


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
        most = most_layers[node]
        if node not in changed:  # it holds nothing yet: anything may help
            changed[node] = fitted(int(rng.integers(layers)), int(rng.integers(1, most + 1)), most, layers)
            continue
        start, end = changed[node]
        size = end - start
        move = MOVES[int(rng.integers(len(MOVES)))]
        if move == "slide":
            start += int(rng.choice([-2, -1, 1, 2]))
        elif move == "jump":
            start, size = int(rng.integers(layers)), int(rng.integers(1, most + 1))
        elif move == "stretch":
            grown = int(rng.choice([-1, 1]))
            size += grown
            start -= grown * int(rng.integers(2))  # at its beginning or at its end
        elif move == "boundary":
            _move_boundary(changed, node, most_layers, layers, rng)
            continue
        else:
            other = str(rng.choice(sorted(changed)))
            theirs = changed[other]
            changed[other] = fitted(start, size, most_layers[other], layers)
            start, size = theirs[0], theirs[1] - theirs[0]
        changed[node] = fitted(start, size, most, layers)
    return changed


def _move_boundary(
    placement: dict[str, tuple[int, int]], node: str, most_layers: dict[str, int], layers: int, rng: np.random.Generator
) -> None:
    """Where the node's window ends and others begin, move that by a layer or two: no layer is uncovered."""
    start, end = placement[node]
    step = int(rng.choice([-2, -1, 1, 2]))
    for name, (first, last) in list(placement.items()):
        if first == end and 0 < last - (first + step) <= most_layers[name] and first + step >= 0:
            placement[name] = (first + step, last)
        elif last == end and name != node and 0 < end + step - first <= most_layers[name] and end + step <= layers:
            placement[name] = (first, end + step)
    if 0 < end + step - start <= most_layers[node] and end + step <= layers:
        placement[node] = (start, end + step)


def fitted(start: int, size: int, most: int, layers: int) -> tuple[int, int]:
    """The nearest window that the machine can hold."""
    size = max(1, min(size, most, layers))
    start = max(0, min(start, layers - size))
    return start, start + size
