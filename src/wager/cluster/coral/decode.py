"""Decoding on a replica, one event per stage and batch.

A replica of S stages has S batches under way, as an engine with pipeline stages does: each goes round the stages in turn, a stage works on one at a
time, in order of arrival. A request joins the smallest batch when that begins its next round. The machines of a stage share a batch so that the
slowest is as fast as can be; the batch goes on when all have done their part. KV is set aside for a request's whole length when it is admitted, so
that nothing is ever evicted.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from wager.errors import WagerError
from wager.hardware.cluster import Link
from wager.simulate.timeline import Record, Timeline


@dataclass(frozen=True)
class DecodeStage:
    """`seconds_B[b]`: of a batch of b on all layers of the stage; `most`: the largest batch it may take; `kv_tokens`: room of its machines."""

    names: tuple[str, ...]
    seconds_B: np.ndarray
    kv_tokens: int

    @property
    def most(self) -> int:
        return len(self.seconds_B) - 1


@dataclass(frozen=True)
class DecodeReplica:
    tokens_per_s: float
    stages: tuple[DecodeStage, ...]
    usd_per_h: float

    @property
    def batch(self) -> int:
        return min(s.most for s in self.stages)

    @property
    def kv_tokens(self) -> int:
        return min(s.kv_tokens for s in self.stages)


def shared_seconds(machines: Sequence[np.ndarray]) -> np.ndarray:
    """[B + 1] seconds of a batch that machines share; machines[i][b] is what b sequences take on machine i, up to the most it may have.

    Sequence after sequence goes where it ends first, which is the best split when more sequences never take less time."""
    counts, seconds, most = [0] * len(machines), [0.0], sum(len(m) - 1 for m in machines)
    for _ in range(most):
        free = [i for i, m in enumerate(machines) if counts[i] + 1 < len(m)]
        best = min(free, key=lambda i: machines[i][counts[i] + 1])
        counts[best] += 1
        seconds.append(max(seconds[-1], float(machines[best][counts[best]])))
    return np.array(seconds)


@dataclass(eq=False)
class _Group:
    """One of a replica's batches: who takes part in the round under way, and who joins at the next."""

    active: list[Record] = field(default_factory=list)
    joining: list[Record] = field(default_factory=list)
    running: bool = False

    def __len__(self) -> int:
        return len(self.active) + len(self.joining)


class _Live:
    def __init__(self, replica: DecodeReplica):
        self.replica = replica
        self.groups = [_Group() for _ in replica.stages]
        self.free_s = [0.0] * len(replica.stages)
        self.busy_s = [0.0] * len(replica.stages)
        self.kv_used, self.kv_peak, self.load, self.batches = 0, 0, 0.0, 0

    def room(self, tokens: int) -> bool:
        return self.kv_used + tokens <= self.replica.kv_tokens and min(map(len, self.groups)) < self.replica.batch


@dataclass(frozen=True)
class Decode:
    """A request that comes with its KV: `context` tokens, of which it generates `record.output_tokens` more."""

    at_s: float
    context: int
    record: Record


class DecodeSimulation:
    """Replicas of one model; requests come to them by weighted round robin over tokens/s, those without room are passed over."""

    def __init__(self, replicas: Sequence[DecodeReplica], link: Link, activation_bytes: float):
        self.live = [_Live(r) for r in replicas]
        self.link, self.activation_bytes = link, activation_bytes
        self.waiting: deque[Decode] = deque()
        self._heap: list[tuple[float, int, tuple]] = []
        self._sequence, self._kv, self.now_s = 0, {}, 0.0

    def run(self, requests: Sequence[Decode], until_s: float) -> None:
        """Fill the requests' records with token times. Raises WagerError for one that no replica can ever hold."""
        largest = max((x.replica.kv_tokens for x in self.live), default=0)
        for one in sorted(requests, key=lambda r: r.at_s):
            if self._tokens(one) > largest and self.live:
                raise WagerError(
                    f"request {one.record.index} needs KV for {self._tokens(one)} tokens, the largest replica holds {largest}"
                )
            self._at(one.at_s, ("arrive", one))
        while self._heap and self._heap[0][0] <= until_s:
            self.now_s, _, what = heapq.heappop(self._heap)
            if what[0] == "arrive":
                self.waiting.append(what[1])
                self._admit()
            else:
                self._passed(*what[1:])
        self.now_s = until_s

    def _tokens(self, one: Decode) -> int:
        return one.context + one.record.output_tokens

    def _admit(self) -> None:
        while self.waiting:
            one = self.waiting[0]
            tokens = self._tokens(one)
            able = [x for x in self.live if x.room(tokens)]
            if not able:
                return
            self.waiting.popleft()
            live = min(able, key=lambda x: x.load + 1 / x.replica.tokens_per_s)
            live.load += 1 / live.replica.tokens_per_s
            live.kv_used += tokens
            live.kv_peak = max(live.kv_peak, live.kv_used)
            self._kv[one.record.index] = tokens
            one.record.admitted_s = self.now_s
            group = min(live.groups, key=len)
            group.joining.append(one.record)
            if not group.running:
                self._round(live, group)

    def _round(self, live: _Live, group: _Group) -> None:
        group.active += group.joining
        group.joining = []
        group.running = bool(group.active)
        if group.running:
            self._enter(live, group, 0)

    def _enter(self, live: _Live, group: _Group, stage: int) -> None:
        seconds = float(live.replica.stages[stage].seconds_B[len(group.active)])
        begun = max(self.now_s, live.free_s[stage])
        live.free_s[stage] = begun + seconds
        live.busy_s[stage] += seconds
        live.batches += 1
        stages = len(live.replica.stages)
        hop = 0.0
        if stages > 1:
            hop = self.link.latency_s + len(group.active) * self.activation_bytes / self.link.bytes_per_s
        self._at(begun + seconds + hop, ("passed", live, group, stage))

    def _passed(self, live: _Live, group: _Group, stage: int) -> None:
        if stage + 1 < len(live.replica.stages):
            self._enter(live, group, stage + 1)
            return
        for record in group.active:
            record.token_s.append(self.now_s)
            if record.finished:
                live.kv_used -= self._kv.pop(record.index)
        group.active = [r for r in group.active if not r.finished]
        self._round(live, group)
        self._admit()

    def _at(self, time_s: float, what: tuple) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (time_s, self._sequence, what))

    def timeline(self, records: list[Record]) -> Timeline:
        busy = {
            name: x.busy_s[s] for x in self.live for s, stage in enumerate(x.replica.stages) for name in stage.names
        }
        peak = {
            n: x.kv_peak / x.replica.kv_tokens for x in self.live for stage in x.replica.stages for n in stage.names
        }
        cost = sum(x.replica.usd_per_h for x in self.live) * self.now_s / 3600
        return Timeline(
            records, self.now_s, {n: [] for n in busy}, busy, dict.fromkeys(busy, self.now_s), peak, cost, self._sequence,
            sum(x.batches for x in self.live),
        )  # fmt: skip
