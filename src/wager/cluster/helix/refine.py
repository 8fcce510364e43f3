"""Improves a placement by what it serves in simulation, not by its flow: small moves, kept when the simulated rate rises.

The flow model does not see round trips, batches that bunch up, or prompts that hold up decodes; a simulation does, and it says which machines
were busy: every other move takes a machine that had little to do to layers of one that had too much. This is a search without proof, for use
after the cover program: the flow and its bound are still reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from wager.cluster.helix.flow import Placement

PROMISING = 0.8
LOOKS = 50  # neighbours looked at for one that promises enough
MOVES = ("slide", "stretch", "jump", "swap", "boundary")
EXTREMES = 4  # a machine with little to do is one of so many, and so is one with too much


@dataclass(frozen=True)
class Tried:
    """A placement that was simulated: output tokens/s (0 where it serves nothing) and the share of the time that each machine worked."""

    placement: Mapping[str, tuple[int, int]]
    rate: float
    busy: Mapping[str, float] = field(default_factory=dict)


Try = Callable[[Sequence[Placement]], list[Tried]]
Promise = Callable[[Placement], float]


def refine(
    starts: Sequence[Tried],
    most_layers: dict[str, int],
    layers: int,
    simulate: Try,
    promise: Promise,
    tries: int,
    rng: np.random.Generator,
    at_once: int = 1,
) -> Tried:
    """Hill climbing from several placements in turn, over about `tries` simulations, `at_once` of them together; returns the best.

    most_layers: node -> layers it may hold at most, also of nodes that hold none yet. promise: a cheap estimate; neighbours that promise much
    less than where they come from are not simulated.
    """
    now = list(starts)
    seen = [dict(one.placement) for one in starts]
    for turn in range(-(-tries // at_once)):
        # the best so far gets every other turn
        place = max(range(len(now)), key=lambda i: now[i].rate) if turn % 2 else turn // 2 % len(now)
        here = now[place]
        floor = PROMISING * promise(here.placement)
        fresh = []
        for _ in range(LOOKS * at_once):
            changed = neighbour(here, most_layers, layers, rng)
            if changed not in seen and covers(changed, layers) and promise(changed) >= floor:
                fresh.append(changed)
                seen.append(changed)
            if len(fresh) == at_once:
                break
        now[place] = max([here, *simulate(fresh)], key=lambda one: one.rate)
    return max(now, key=lambda one: one.rate)


def covers(placement: Placement, layers: int) -> bool:
    held = np.zeros(layers, bool)
    for start, end in placement.values():
        held[start:end] = True
    return bool(held.all())


def neighbour(
    tried: Tried, most_layers: dict[str, int], layers: int, rng: np.random.Generator
) -> dict[str, tuple[int, int]]:
    """One to three moves away; every window stays within the model and the machine."""
    changed = dict(tried.placement)
    for _ in range(int(rng.integers(1, 4))):
        if tried.busy and rng.integers(2):
            _relieve(changed, tried.busy, most_layers, layers, rng)
            continue
        node = str(rng.choice(sorted(most_layers)))
        if node not in changed:  # it holds nothing yet: anything may help
            most = most_layers[node]
            changed[node] = fitted(int(rng.integers(layers)), int(rng.integers(1, most + 1)), most, layers)
            continue
        _move(changed, node, most_layers, layers, rng)
    return changed


def _relieve(
    placement: dict[str, tuple[int, int]],
    busy: Mapping[str, float],
    most_layers: dict[str, int],
    layers: int,
    rng: np.random.Generator,
) -> None:
    """A machine that had little to do holds layers of one that had too much, or that one gives a layer up at an end."""
    order = sorted(most_layers, key=lambda n: (busy.get(n, 0.0), n))
    idle = order[int(rng.integers(min(EXTREMES, len(order))))]
    hard = order[-1 - int(rng.integers(min(EXTREMES, len(order))))]
    if idle == hard or hard not in placement:
        return
    start, end = placement[hard]
    most = most_layers[idle]
    size = min(most, end - start) if rng.integers(2) else int(rng.integers(1, most + 1))
    first = start if rng.integers(2) else end - size
    placement[idle] = fitted(first, size, most, layers)
    if rng.integers(3) == 0 and end - start > 1:
        placement[hard] = (start + 1, end) if rng.integers(2) else (start, end - 1)


def _move(
    changed: dict[str, tuple[int, int]], node: str, most_layers: dict[str, int], layers: int, rng: np.random.Generator
) -> None:
    """A random move of a node that holds layers."""
    start, end = changed[node]
    size, most = end - start, most_layers[node]
    move = MOVES[int(rng.integers(len(MOVES)))]
    if move == "boundary":
        _move_boundary(changed, node, most_layers, layers, rng)
        return
    if move == "slide":
        start += int(rng.choice([-2, -1, 1, 2]))
    elif move == "jump":
        start, size = int(rng.integers(layers)), int(rng.integers(1, most + 1))
    elif move == "stretch":
        grown = int(rng.choice([-1, 1]))
        size += grown
        start -= grown * int(rng.integers(2))  # at its beginning or at its end
    else:
        other = str(rng.choice(sorted(changed)))
        theirs = changed[other]
        changed[other] = fitted(start, size, most_layers[other], layers)
        start, size = theirs[0], theirs[1] - theirs[0]
    changed[node] = fitted(start, size, most, layers)


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
