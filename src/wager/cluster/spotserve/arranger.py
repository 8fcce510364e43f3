"""How many more tokens to generate before stopping for a migration: as many as still fit, none if stopping saves nothing."""

from __future__ import annotations

import math


def steps_before_leaving(notice_s: float, migration_s: float, step_s: float, steps_left: int) -> int:
    """A machine leaves in `notice_s`: the most steps S with S * step < notice - migration."""
    room = notice_s - migration_s
    if room <= 0 or step_s <= 0:
        return 0
    steps = min(steps_left, math.floor(room / step_s))
    while steps > 0 and steps * step_s >= room:
        steps -= 1
    return steps


def steps_before_joining(ready_in_s: float, step_s: float, steps_left: int) -> int:
    """A machine is ready in `ready_in_s`: the fewest steps that last until then; all that are left if these end before."""
    return min(steps_left, max(0, math.ceil(ready_in_s / step_s)))


def worth_moving(migration_s: float, done_s: float) -> bool:
    """Moving KV pays only if computing it again would take longer."""
    return migration_s < done_s
