"""SpotServe's policy: at every notice and join the next layout is chosen by simulating it, and moved to without losing a token.

propose: the controller's choice and the layouts that the latency model likes next; price: each is played on a copy of the service, from the
present queue and batches through the move and on over arrivals like the latest; verify: the move keeps its deadline, else KV is given up. A
machine that leaves is served on until just before (arranger); one that joins is used once its weights have arrived. Without playing, the
controller's choice is taken, or the first of the others whose move keeps the deadline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from wager.cluster.spotserve import controller
from wager.cluster.spotserve.latency import Layout
from wager.cluster.spotserve.load import Load
from wager.cluster.spotserve.mapper import Place, inherit
from wager.cluster.spotserve.outcome import Outcome
from wager.cluster.spotserve.service import Served, Service
from wager.cluster.spotserve.transition import Mover, Transition, decoded, perform

CANDIDATES = 10  # layouts that are played
FUTURES = 2  # forecasts each is played on
HORIZON_S = 90.0  # arrivals are forecast over this long
TAIL = 0.1  # a layout is as good as the mean latency of this share of the slowest requests
STAYING = 0.05  # a move without need must improve the tail by this share
NEAR = 0.01  # after a change of machines, by this


@dataclass(frozen=True)
class Skills:
    """What the policy does besides; it can be left out to see what it is worth. look_ahead: layouts are played, not only modelled."""

    look_ahead: bool = True


@dataclass(frozen=True)
class Pending:
    """A decided move: what has been sent ahead for it counts at `stop_s`. deadline_s: when a machine leaves."""

    step: Transition
    stop_s: float
    deadline_s: float

    def sharp(self, layout: Layout | None) -> set[int]:
        """Pipelines of `layout` that must not work beyond `stop_s`."""
        if layout is None or self.deadline_s == math.inf:
            return set()
        return set(range(layout.data)) - set(self.step.same.values())


@dataclass(frozen=True)
class Choice:
    """A layout that was played: the tail latency with it, and the move to it (None where it is there already)."""

    target: Layout
    tail_s: float
    pending: Pending | None

    @property
    def stops_nobody(self) -> bool:
        """Whether every pipeline goes on."""
        return self.pending is None or not self.pending.step.ending

    @property
    def in_time(self) -> bool:
        """Whether the move ends before the machine leaves."""
        move = self.pending
        return move is None or move.stop_s + move.step.stop_s <= move.deadline_s + 1e-6


class Migrate:
    """See the module's docstring. Driven by the simulation: `notice`, `joined`, `left`, `tick`, and `stop` at `pending.stop_s`."""

    def __init__(
        self, service: Service, mover: Mover, load: Load, outcome: Outcome, rng: np.random.Generator, skills: Skills
    ):
        self.service, self.mover, self.load, self.outcome, self.rng = service, mover, load, outcome, rng
        self.cloud = mover.cloud
        self.members: set[str] = set()
        self.doomed: dict[str, float] = {}
        self.held: dict[str, Place] = {}
        self.pending: Pending | None = None
        self.moving_until = 0.0
        self.skills = skills

    # -- what happens ------------------------------------------------------------------------------------------------------------

    def notice(self, at: float, nodes: set[str], leave_s: float) -> None:
        self.doomed.update(dict.fromkeys(nodes & self.members, leave_s))
        self._decide(at)

    def joined(self, at: float, nodes: set[str]) -> None:
        self.members |= nodes
        self._decide(at)

    def left(self, at: float, nodes: set[str]) -> None:
        """Machines are gone: normally nothing is on them any more."""
        self.members -= nodes
        for node in nodes:
            self.doomed.pop(node, None)
        here = set(self.cloud.devices(self.members))
        if set(self.held) <= here:
            return
        self.pending = None
        self.outcome.log(
            at,
            "lost",
            f"{sum(len(b.requests) for b in self.service.batches.values())} requests lose their tokens: machines in use are gone",
        )
        self.service.drop(list(self.service.batches))
        self.held = {x: p for x, p in self.held.items() if x in here}
        self._decide(at, broken=True)

    def tick(self, at: float) -> None:
        """Between changes: leave a layout that the load has outgrown, or that is not the best when it is calm."""
        layout = self.service.layout
        if self.pending is not None or layout is None or at < self.moving_until:
            return
        rate = self.load.rate(at)
        if rate == math.inf:
            return
        best = self._controlled(at, len(self._devices()))
        if best is None or best == layout:
            return
        model, output, continuous = self.mover.model, self.mover.output, self.service.continuous
        reach = [self._reach(c) for c in (layout, best)]
        seconds = [controller.request_s(model, c, output, rate, continuous) for c in (layout, best)]
        outgrown = self._wanted(at) > reach[0] and reach[1] > reach[0] * (1 + STAYING)
        calm = not self.service.queue and seconds[1] < seconds[0] * (1 - STAYING)
        if outgrown or calm:
            self._decide(at, needless=True)

    def stop(self, at: float) -> None:
        """The decided move."""
        assert self.pending is not None
        pending, self.pending = self.pending, None
        service, step = self.service, pending.step
        devices = self._devices()
        done = self.mover.plan(
            service.layout, self.held, service.batches, step.target, devices, goal=step.goal, arrived=step.ahead
        )
        if at + done.stop_s > pending.deadline_s + 1e-6:
            # the notice is too short for all of it: KV is given up, and what the leaving machines hold comes from elsewhere
            lost = set(service.batches) - set(done.same.values())
            self.outcome.log(
                at,
                "lost",
                f"{sum(len(service.batches[d].started) for d in lost)} requests lose their tokens: the notice is too short",
            )
            service.drop(sorted(lost))
            self.held = {x: p for x, p in self.held.items() if x in set(devices)}
            done = self.mover.plan(service.layout, self.held, service.batches, step.target, devices, ahead_for_s=0.0)
        perform(service, done, at)
        self.held = dict(done.goal)
        self.moving_until = at + done.stop_s
        self.outcome.moved(at, at + done.stop_s, at + done.stall_s, done.target, done.moved_bytes)

    # -- what to do --------------------------------------------------------------------------------------------------------------

    def _devices(self) -> list[str]:
        """Of the machines that stay."""
        return self.cloud.devices(self.members - set(self.doomed))

    def _decide(self, at: float, needless: bool = False, broken: bool = False) -> None:
        """Set `pending`. needless: nothing happened to the machines. broken: the present layout can serve no more."""
        devices, layout = self._devices(), self.service.layout
        leaving = [s for node, s in self.doomed.items() if any(x.startswith(f"{node}/") for x in self.held)]
        deadline = at if broken else min(leaving, default=math.inf)
        candidates = self._candidates(at, len(devices))
        if not candidates:
            self._give_up(at, broken or deadline == math.inf)
            return
        if layout is None:
            self._start(at, candidates, devices)
            return
        stay = set(self.held) <= set(devices)
        if stay and self.skills.look_ahead and layout not in candidates:
            candidates.append(layout)
        futures = self._futures(at)
        priced = []
        for target in candidates:
            priced.append(self._price(at, target, devices, deadline, stay, futures))
            if not futures and priced[-1].in_time:
                priced = priced[-1:]
                break
        decided = self.pending
        if decided is not None and decided.deadline_s == deadline and set(decided.step.goal) <= set(devices):
            # what has moved ahead for it is there already
            if futures:
                tail = float(np.mean([self._play(at, decided, future) for future in futures]))
                priced.append(Choice(decided.step.target, tail, decided))
            elif decided.step.target == priced[-1].target:
                priced = [Choice(decided.step.target, 0.0, decided)]
        best = self._best(priced)
        if stay and self.skills.look_ahead:
            staying = next(c for c in priced if c.pending is None)
            if best.tail_s > staying.tail_s * (1 - (STAYING if needless else NEAR)):
                best = self._best([c for c in priced if c.stops_nobody])
        self.pending = best.pending

    def _best(self, priced: Sequence[Choice]) -> Choice:
        """In time, with the shortest tail; of tails about as short the most throughput, for the load may grow."""
        shortest = min(priced, key=lambda c: (not c.in_time, c.tail_s))
        near = [c for c in priced if c.in_time == shortest.in_time and c.tail_s <= shortest.tail_s * (1 + NEAR)]
        return max(near, key=lambda c: (self._reach(c.target), -c.tail_s))

    def _reach(self, layout: Layout) -> float:
        return controller.throughput(self.mover.model, layout, self.mover.output, self.service.continuous)

    def _wanted(self, at: float) -> float:
        """Requests/s: what arrives, and the queue to be worked off in one window."""
        return self.load.rate(at) + len(self.service.queue) / self.cloud.rate_window_s

    def _controlled(self, at: float, devices: int) -> Layout | None:
        """The controller's choice."""
        return controller.choose(
            self.mover.model, devices, self._wanted(at), self.mover.output, self.cloud.device_memory_bytes,
            self.mover.context, self.service.continuous, self.cloud.min_gpus,
        )  # fmt: skip

    def _candidates(self, at: float, devices: int) -> list[Layout]:
        """The controller's choice, then the layouts with the least modelled latency, where none keeps up those with most throughput."""
        chosen = self._controlled(at, devices)
        if chosen is None:
            return []
        model, output, wanted, continuous = (
            self.mover.model,
            self.mover.output,
            self._wanted(at),
            self.service.continuous,
        )
        every = controller.layouts(
            model, devices, self.cloud.device_memory_bytes, self.mover.context, self.cloud.min_gpus
        )

        def key(c: Layout) -> tuple[float, float, int]:
            seconds = controller.request_s(model, c, output, wanted, continuous) if wanted < math.inf else math.inf
            return seconds, -controller.throughput(model, c, output, continuous), c.devices

        if continuous:  # a slot that is not used costs no time: of otherwise equal layouts the one with most slots
            every = {(c.data, c.pipeline, c.tensor): c for c in sorted(every)}.values()
        return list(dict.fromkeys([chosen, *sorted(every, key=key)]))[:CANDIDATES]

    def _futures(self, at: float) -> list[list[Served]]:
        tokens = self.mover.output
        if not self.skills.look_ahead:
            return []
        return [[Served(-1, t, tokens) for t in self.load.forecast(at, HORIZON_S, self.rng)] for _ in range(FUTURES)]

    def _price(
        self,
        at: float,
        target: Layout,
        devices: Sequence[str],
        deadline: float,
        stay: bool,
        futures: list[list[Served]],
    ) -> Choice:
        """The move to this layout (None where there is none to make) and the tail latency with it, where layouts are played."""
        pending = None
        if not (stay and target == self.service.layout):
            pending = self._propose(at, target, devices, deadline)
        tails = [self._play(at, pending, future) for future in futures]
        return Choice(target, float(np.mean(tails)) if tails else 0.0, pending)

    def _propose(self, at: float, target: Layout, devices: Sequence[str], deadline: float) -> Pending:
        service = self.service
        before = max(at, self.moving_until)
        step = self.mover.plan(
            service.layout, self.held, service.batches, target, devices, most_kv=True,
            ahead_for_s=max(0.0, (deadline - before) / 2),
        )  # fmt: skip
        soonest = before + step.ahead_s
        return Pending(step, soonest if deadline == math.inf else max(before, deadline - step.stop_s), deadline)

    def _play(self, at: float, pending: Pending | None, future: list[Served]) -> float:
        """Mean latency of the slowest requests when this is done, on a copy."""
        coming = [Served(r.index, r.arrival_s, r.tokens) for r in future]
        copy = self.service.fork(coming)
        requests = [*copy.unfinished(), *coming]
        if not requests:
            return 0.0
        if pending is not None:
            copy.serve_until(pending.stop_s, pending.sharp(copy.layout))
            heirs = inherit(decoded(copy.batches), pending.step.target, pending.step.same)
            perform(copy, replace(pending.step, heirs=heirs), pending.stop_s)
        end = at + 3 * HORIZON_S
        copy.serve_until(end)
        late = [(end if r.finished_s is None else r.finished_s) - r.arrival_s for r in requests]
        return float(np.mean(np.sort(late)[-max(1, math.ceil(TAIL * len(late))) :]))

    def _start(self, at: float, candidates: Sequence[Layout], devices: Sequence[str]) -> None:
        """The first layout, or the first after the model had no room: nothing is held, weights come from storage (before the trace, once)."""
        choices = []
        futures = self._futures(at)
        for target in candidates:
            self.service.layout, self.service.free_s = target, {}
            choices.append(self._price(at, target, devices, math.inf, True, futures))
        best = self._best(choices if futures else choices[:1])
        step = self.mover.plan(None, {}, {}, best.target, devices)
        ready = at if not self.outcome.layouts else at + self.cloud.engine_start_s + step.stop_s
        self.service.layout, self.service.batches = best.target, {}
        self.service.free_s = dict.fromkeys(range(best.target.data), ready)
        self.held, self.moving_until = dict(step.goal), ready
        self.outcome.moved(at, ready, ready, best.target, step.moved_bytes)

    def _give_up(self, at: float, now: bool) -> None:
        """The model no longer fits: serve on while the machines are there, then lose everything."""
        self.pending = None
        if now and self.service.layout is not None:
            self.service.drop(list(self.service.batches))
            self.service.layout, self.held = None, {}
            self.outcome.moved(at, at, at, None, 0.0)
