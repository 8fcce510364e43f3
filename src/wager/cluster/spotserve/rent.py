"""What to ask the market for: enough machines for the layout that the controller wants, and a few to spare; what is too much is given back.

The availability file says which spot machines can be had when: one that was asked for in time is ready when the file adds it, one asked for
later after its boot. On-demand machines can always be had, after the boot. What is missing is asked for as spot and, where allowed, on demand
at once; spot stays asked for while machines on demand stand in, and when it comes these are the first to go. What was needed within the last boot
is kept. (SpotServe, algorithm 1: arXiv 2311.15566.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from wager.cluster.spotserve.bill import ON_DEMAND, SPOT, Lease, lifetimes
from wager.cluster.spotserve.cloud import Cloud
from wager.cluster.spotserve.outcome import Outcome
from wager.errors import UsageError
from wager.hardware.availability import Availability

DRAIN_S = 30.0  # a machine that is given back goes on for so long: the time to move away from it


@dataclass(frozen=True)
class Rental:
    """reserve: machines beyond what the layout needs. boot_s: from asking to ready, start of the engine included. most: machines that may be held,
    those to spare included; None for as many as the availability file ever has at once, and the reserve where on-demand is allowed."""

    reserve: int = 2
    allow_on_demand: bool = False
    boot_s: float = 120.0
    most: int | None = None

    def __post_init__(self):
        if self.reserve < 0 or self.boot_s < 0:
            raise UsageError(f"a reserve of {self.reserve} machines or a boot of {self.boot_s} s is negative")
        if self.most is not None and self.most < 1:
            raise UsageError(f"at most {self.most} machines serve nothing")


@dataclass(frozen=True)
class Event:
    """Of the market. kind: release (given back), notice, left, offer (spot can be had), joined, tick."""

    time_s: float
    kind: str
    node: str = ""
    leave_s: float = 0.0


@dataclass
class _Machine:
    kind: str
    from_s: float
    ready_s: float
    until_s: float = 0.0  # when the market takes it away
    joined: bool = False
    leaves_s: float | None = None


class Renter:
    """Asks and gives back. `need(machines)`: how many machines the controller's layout takes of at most so many, None while the load is unknown.
    `used()`: machines that hold a part of the layout; idle ones are given back first. Leases that ended are in `leases`."""

    def __init__(
        self, trace: Availability, cloud: Cloud, rental: Rental, outcome: Outcome,
        need: Callable[[float, int], int | None], used: Callable[[], set[str]],
    ):  # fmt: skip
        self.cloud, self.rental, self.outcome, self.need, self.used = cloud, rental, outcome, need, used
        ever = lifetimes(trace)
        self.end_s = trace.end_s
        self.most = (
            max(len(trace.alive(e.time_s)) for e in trace.events) + (rental.reserve if rental.allow_on_demand else 0)
            if rental.most is None
            else rental.most
        )
        self.comes = [Event(s.from_s, "offer", s.node, s.to_s) for s in ever]
        self.free: dict[str, float] = {}  # spot machines that can be had, and when they are taken away
        self.held: dict[str, _Machine] = {}
        self.asked: deque[float] = deque()  # since when, of every spot machine that is waited for
        self.leases: list[Lease] = []
        self.recent: deque[tuple[float, int]] = deque()
        self.bought = 0

    # -- what happens ------------------------------------------------------------------------------------------------------------

    def offer(self, event: Event) -> Iterator[Event]:
        """A spot machine can be had from now on."""
        self.free[event.node] = event.leave_s
        yield from self._grant(event.time_s)

    def notice(self, node: str, at: float, leave_s: float) -> bool:
        """Whether a machine that serves will go then. One that still boots is of no use any more; one that was given back goes anyway."""
        machine = self.held.get(node)
        if machine is None or machine.leaves_s is not None and machine.leaves_s <= leave_s:
            return False
        self.outcome.log(at, "notice", f"{node} leaves at {leave_s:.1f} s")
        machine.leaves_s = leave_s if machine.joined else at
        machine.until_s = at
        if not machine.joined:
            self.close(node, at)
        return machine.joined

    def join(self, node: str, at: float) -> bool:
        """Whether a machine that was asked for is ready, and still wanted."""
        machine = self.held.get(node)
        if machine is None or machine.leaves_s is not None or at < machine.ready_s:
            return False
        self.outcome.log(at, "joined", f"{node} ({machine.kind})")
        machine.joined = True
        return True

    def close(self, node: str, at: float) -> bool:
        """A machine is gone and no longer paid for; False when it went before."""
        machine = self.held.get(node)
        if machine is None or machine.leaves_s is None or machine.leaves_s > at:
            return False
        del self.held[node]
        self.outcome.log(at, "left", node)
        self.leases.append(Lease(node, machine.kind, machine.from_s, at))
        if machine.kind == SPOT and machine.until_s > at:  # given back: somebody can have it
            self.free[node] = machine.until_s
        return True

    def finish(self) -> list[Lease]:
        """Every lease; those that run end with the trace."""
        running = [Lease(node, m.kind, m.from_s, self.end_s) for node, m in self.held.items()]
        return self.leases + running

    # -- what to do --------------------------------------------------------------------------------------------------------------

    def review(self, at: float, first: bool = False) -> Iterator[Event]:
        """Ask for what is missing, give back what is too much. first: machines are ready at once, as the first ones of a trace are."""
        wanted = self._wanted(at)
        here = [m for m in self.held.values() if m.leaves_s is None]
        missing = (self.most if wanted is None else wanted) - len(here)
        spot = sum(m.kind == SPOT for m in here)
        waiting = max(0, (self.most if wanted is None else wanted) - spot)
        more = waiting - len(self.asked)
        while len(self.asked) > waiting:
            self.asked.pop()
        self.asked.extend([at - self.rental.boot_s if first else at] * max(0, more))
        buy = missing if self.rental.allow_on_demand and wanted is not None else 0
        if more > 0 or buy > 0:
            self.outcome.log(at, "asked", f"{max(0, more)} spot, {max(0, buy)} on-demand")
        before = len(self.held)
        yield from list(self._grant(at))
        for _ in range(buy - (len(self.held) - before)):  # what spot answers at once is not needed on demand
            node, self.bought = f"on-demand-{self.bought}", self.bought + 1
            ready = at if first else at + self.rental.boot_s
            self.held[node] = _Machine(ON_DEMAND, at, ready)
            yield Event(ready, "joined", node)
        if wanted is not None:
            yield from self._give_back(at, wanted)

    def _wanted(self, at: float) -> int | None:
        """Machines to hold, those to spare included."""
        layout_at_most = self.most - self.rental.reserve
        need = self.need(at, layout_at_most) if layout_at_most > 0 else 0
        if need == 0:  # with some to spare the model does not fit
            need = self.need(at, self.most)
        if need is None:
            return None
        self.recent.append((at, need))
        while self.recent[0][0] < at - self.rental.boot_s:
            self.recent.popleft()
        return min(self.most, max(n for _, n in self.recent) + self.rental.reserve)

    def _grant(self, at: float) -> Iterator[Event]:
        """Spot machines that can be had go to the oldest requests; the cloud hands out none that it is about to take away."""
        grace = self.cloud.notice_s
        self.free = {n: leave for n, leave in self.free.items() if leave >= self.end_s or leave - grace > at}
        while self.asked and self.free and sum(m.leaves_s is None for m in self.held.values()) < self.most:
            node = next(iter(self.free))
            leave, since = self.free.pop(node), self.asked.popleft()
            ready = max(at, since + self.rental.boot_s)
            self.held[node] = _Machine(SPOT, at, ready, leave)
            yield Event(ready, "joined", node)
            if leave < self.end_s:
                yield Event(max(at, leave - grace), "notice", node, leave)

    def _give_back(self, at: float, wanted: int) -> Iterator[Event]:
        """Machines beyond what is wanted, those on demand first, and never one whose place is still booting."""
        used = self.used()
        while True:
            here = {n: m for n, m in self.held.items() if m.leaves_s is None}
            ready = sum(m.joined for m in here.values())
            first = ON_DEMAND if any(m.kind == ON_DEMAND for m in here.values()) else SPOT
            able = [n for n, m in here.items() if m.kind == first and ready - m.joined >= wanted]
            if len(here) <= wanted or not able:
                return
            node = min(able, key=lambda n: (here[n].joined, n in used, n))
            machine = here[node]
            self.outcome.log(at, "released", f"{node} ({machine.kind})")
            machine.leaves_s = at + DRAIN_S if machine.joined else at
            if machine.joined:
                yield Event(at, "release", node, at + DRAIN_S)
            else:
                self.close(node, at)
