"""Keeps one pipeline alive: stages in processes, a context daemon beside each, the group that connects them, and what happens when one dies.

- A stage's process is killed: another one maps the daemon's memory, the group is formed anew, the step that was cut short is repeated.
  Nothing is computed again, no token is generated twice.
- A machine gives notice (SIGTERM): a replacement starts beside it while serving goes on; the arranger stops just in time, KV moves first,
  then weights, and the next step runs there.
- A machine dies with its daemon: its KV is lost. The stage loads from disk elsewhere and requests are computed again from their tokens.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

from wager.cluster.deploy.process import Host, Launcher, ProcessDied
from wager.cluster.deploy.worker import StageWorker
from wager.cluster.spotserve.arranger import steps_before_leaving
from wager.cluster.spotserve.context import ContextDaemon
from wager.errors import WagerError
from wager.serve.parallel.pipeline import KVLost, PipelineRunner, live_blocks
from wager.serve.parallel.stage import StageSpec
from wager.serve.parallel.wire import Group, Meeting, StageLost

log = logging.getLogger(__name__)

ATTEMPTS = 5  # to form a group before giving up
DISMISS_S = 5.0  # for a stage to end its part of a step and to see that its group is closed; three steps where these take longer
NETWORK_BYTES_PER_S = 2e8  # taken until a migration was measured
MARGIN = 1.5  # on the estimated time of a migration


@dataclass(frozen=True)
class Event:
    """Something that happened to a replica. kind: kill, migrate or lost (the machine with its memory). seconds: without serving."""

    time_s: float
    kind: str
    stage: int
    seconds: float
    weights_from: str
    moved_bytes: int = 0


@dataclass
class Place:
    """A stage where it runs."""

    spec: StageSpec
    resource: str | None
    daemon: Host
    worker: Host
    path: str = ""
    size: int = 0
    loaded: dict[str, Any] = field(default_factory=dict)
    serving: Future | None = None


@dataclass
class Leaving:
    """A stage whose machine goes at `deadline_s` (monotonic), and the place made for it."""

    stage: int
    deadline_s: float
    fresh: Future[Place]


class Replica:
    """One pipeline. `start` before use. on_event: told of every recovery. forget: drop what daemons hold whenever a process dies, as an
    engine does that restarts from disk (the baseline of the recovery benchmark)."""

    def __init__(
        self, name: str, specs: list[StageSpec], resources: list[str | None], launcher: Launcher, forget: bool = False
    ):
        self.name, self.specs, self.resources, self.launcher, self.forget = name, specs, resources, launcher, forget
        self.places: list[Place] = []
        self.events: list[Event] = []
        self.runner: PipelineRunner | None = None
        self.remaining_steps: Callable[[], int] = lambda: 0
        self.poke: Callable[[Callable[[], None]], None] = lambda function: None
        self.notice_s = 30.0
        self._meeting = Meeting(launcher.host_address)
        self._epochs = itertools.count()
        self._leaving: list[Leaving] = []
        self._pool = ThreadPoolExecutor(max_workers=2 * len(specs) + 2, thread_name_prefix=f"replica-{name}")
        self._bytes_per_s = NETWORK_BYTES_PER_S
        self._lock = threading.Lock()

    # -- starting ----------------------------------------------------------------------------------------------------------------

    def start(self) -> Group:
        """Bring every stage up and connect them."""
        made = [self._pool.submit(self._place, i, self.specs[i], self.resources[i]) for i in range(len(self.specs))]
        self.places = [one.result() for one in made]
        for i, place in enumerate(self.places):
            place.loaded = {}
            self._watch(i)
        return self._connect()

    def _place(self, index: int, spec: StageSpec, resource: str | None, load: bool = True) -> Place:
        """A new daemon and a worker beside it."""
        daemon = self.launcher.start(ContextDaemon, resource=resource)
        worker = self.launcher.start(StageWorker, spec, beside=daemon)
        place = Place(spec, resource, daemon, worker)
        place.size = worker.call("bytes_needed").result()
        place.path = daemon.call("open", f"{self.name}-{index}", place.size).result().path
        if load:
            place.loaded = worker.call("load", place.path, place.size).result()
        return place

    def _watch(self, index: int) -> None:
        self.places[index].worker.on_notice = lambda: self.notice(index, self.notice_s)

    def _connect(self) -> Group:
        """Form a group of all stages. A process that dies meanwhile would keep the others waiting: then all are started again."""
        for _ in range(ATTEMPTS):
            name, size = f"{self.name}-{next(self._epochs)}", len(self.places) + 1
            where = self._meeting.host, self._meeting.port, name
            for rank, place in enumerate(self.places, 1):
                place.serving = place.worker.call("serve", *where, rank, size)
            joining: Future[Group] = Future()
            threading.Thread(target=_join, args=(self._meeting, name, size, joining), daemon=True).start()
            serving = [p.serving for p in self.places if p.serving is not None]
            done, _ = wait([joining, *serving], return_when=FIRST_COMPLETED)
            if joining in done and joining.exception() is None:
                return joining.result()
            for place in self.places:
                if place.serving is not None and not place.serving.done():
                    place.worker.kill()
            wait(serving)
            for index, place in enumerate(self.places):
                if not place.worker.alive:
                    self._restart(index, place)
        raise WagerError(
            f"the stages of replica {self.name} could not be connected in {ATTEMPTS} attempts; see their machines"
        )

    def _restart(self, index: int, place: Place) -> None:
        """A new process over what the daemon holds; on another machine, from disk, when the daemon is gone too."""
        if place.daemon.alive and not self.forget:
            try:
                place.worker = self.launcher.start(StageWorker, place.spec, beside=place.daemon)
                place.loaded = place.worker.call("load", place.path, place.size).result()
                self._watch(index)
                return
            except WagerError:
                pass  # the daemon died with it: its memory cannot be mapped any more
        place.worker.kill()
        place.daemon.kill()
        self.places[index] = self._place(index, place.spec, place.resource)
        self._watch(index)

    # -- a member is gone --------------------------------------------------------------------------------------------------------

    def recover(self, lost: StageLost) -> Group:
        """A new group in which the step can be repeated. Raises KVLost when a stage came back empty, WagerError when one cannot serve."""
        begun = time.perf_counter()
        assert self.runner is not None
        self.runner.group.close()
        self._dismiss()
        for place in self.places:
            error = None if place.serving is None else place.serving.exception()
            if error is not None and not isinstance(error, ProcessDied):
                place.worker.kill()
                wait([place.worker.call("pid")])
                self._repair()
                self.runner.group = self._connect()
                raise WagerError(f"a stage of replica {self.name} failed: {error}") from None
        dead = self._repair()
        group = self._connect()
        empty = any(int(p.loaded["step"]) < self.runner.step - 1 for p in self.places if p.loaded)
        seconds = time.perf_counter() - begun
        for i in dead:
            source = self.places[i].loaded["weights_from"]
            self._note("kill" if source == "memory" else "lost", i, seconds, source)
        for place in self.places:
            place.loaded = {}
        if empty:
            raise KVLost(group)
        return group

    def _dismiss(self) -> None:
        """Wait until every stage has left the group. One that is not told in time is killed: its state outlives it."""
        assert self.runner is not None
        limit_s = max(DISMISS_S, 3 * self.runner.step_s)
        serving = [p.serving for p in self.places if p.serving is not None]
        wait(serving, timeout=limit_s)
        for index, place in enumerate(self.places):
            if place.serving is not None and not place.serving.done():
                log.warning(
                    "stage %d of replica %s has not left in %.0f s: it is started again", index, self.name, limit_s
                )
                place.worker.kill()
        wait(serving)

    def _repair(self) -> list[int]:
        dead = [i for i, place in enumerate(self.places) if not place.worker.alive or _died(place.serving)]
        list(self._pool.map(lambda i: self._restart(i, self.places[i]), dead))
        return dead

    def _note(self, kind: str, stage: int, seconds: float, source: str, moved: int = 0) -> None:
        self.events.append(Event(time.monotonic(), kind, stage, seconds, source, moved))

    # -- a machine leaves --------------------------------------------------------------------------------------------------------

    def notice(self, index: int, grace_s: float) -> None:
        """Stage `index`'s machine goes in `grace_s` seconds: prepare another one, and move there in time. Returns at once."""
        with self._lock:
            if any(one.stage == index for one in self._leaving):
                return
            fresh = self._pool.submit(self._place, index, self.specs[index], self.resources[index], False)
            self._leaving.append(Leaving(index, time.monotonic() + grace_s, fresh))
        fresh.add_done_callback(lambda _: self.poke(self.before_step))
        timer = threading.Timer(max(0.0, grace_s - self._migration_s(index)), lambda: self.poke(self.before_step))
        timer.daemon = True
        timer.start()

    def before_step(self) -> None:
        """Between two steps: move the stages whose time has come."""
        for one in list(self._leaving):
            if not one.fresh.done():
                continue
            assert self.runner is not None
            room = one.deadline_s - time.monotonic()
            left = self.remaining_steps()
            if left and steps_before_leaving(room, self._migration_s(one.stage), self.runner.step_s, left) > 0:
                continue
            with self._lock:
                self._leaving.remove(one)
            self._move(one)

    def _migration_s(self, index: int) -> float:
        return MARGIN * (self.places[index].size / self._bytes_per_s + 0.2)

    def _move(self, one: Leaving) -> None:
        """Freeze, move KV and weights, swap, connect. Falls back to what `recover` does when the old machine dies on the way."""
        runner, old = self.runner, self.places[one.stage]
        assert runner is not None
        begun = time.perf_counter()
        runner.leave()
        self._dismiss()
        new = one.fresh.result()
        name, blocks = f"{self.name}-move-{next(self._epochs)}", live_blocks(runner.blocks)
        where = self._meeting.host, self._meeting.port, name
        sent = old.worker.call("send_state", *where, blocks)
        got = new.worker.call("receive_state", *where, blocks, new.path, new.size)
        moved = 0
        try:
            wait([sent, got], return_when="FIRST_EXCEPTION")
            if sent.done() and sent.exception() is not None and not got.done():
                new.worker.kill()
            new.loaded, moved = got.result(), sent.result()
            self._bytes_per_s = max(1.0, moved / max(1e-3, time.perf_counter() - begun))
        except WagerError:
            self._restart_fresh(one.stage, new)
        old.worker.kill()
        old.daemon.call("close").add_done_callback(lambda _: old.daemon.kill())
        if moved:
            self.places[one.stage] = new
            self._watch(one.stage)
        self._repair()
        runner.group = self._connect()
        place = self.places[one.stage]
        self._note(
            "migrate" if moved else "lost", one.stage, time.perf_counter() - begun, place.loaded["weights_from"], moved
        )
        if int(place.loaded["step"]) < runner.step:
            raise KVLost(runner.group)

    def _restart_fresh(self, index: int, new: Place) -> None:
        new.worker.kill()
        new.daemon.kill()
        self.places[index] = self._place(index, new.spec, new.resource)
        self._watch(index)

    def close(self) -> None:
        if self.runner is not None:
            self.runner.leave()
        for place in self.places:
            wait([place.daemon.call("close")])
            place.worker.kill()
            place.daemon.kill()
        self._pool.shutdown(wait=False, cancel_futures=True)


def with_blocks(specs: list[StageSpec], num_blocks: int) -> list[StageSpec]:
    return [replace(spec, num_blocks=num_blocks) for spec in specs]


def _join(meeting: Meeting, name: str, size: int, result: Future) -> None:
    try:
        result.set_result(meeting.join(name, 0, size))
    except Exception as error:
        result.set_exception(error)


def _died(serving: Future | None) -> bool:
    return serving is not None and serving.done() and isinstance(serving.exception(), ProcessDied)
