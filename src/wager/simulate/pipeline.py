"""Simulates a model that is spread over machines and links, one event per batch and message.

A request gets a path of stages from the router, then circulates: its prompt goes through the stages, a token comes back to the coordinator,
and the token goes round again until the output is complete. A machine takes what waits (in order of arrival, prompts and decodes together,
up to its limits) as one batch; a batch's results leave as one message per next machine; a link carries one message after another. KV is
counted in blocks of 16 tokens per layer. When blocks run out, the request that was admitted last gives its KV up everywhere and computes it
again. When a machine leaves, so do the requests whose KV it held. The router is the planner's own object; the clock is virtual.

Simplification against per-token simulators: a batch's tokens for one machine travel together, so the first of them arrives with the last.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from wager.errors import UsageError, WagerError
from wager.hardware.cluster import SINK, SOURCE, Link
from wager.simulate.nodes import BLOCK_TOKENS, Live, NodeModel, Path, check_path
from wager.simulate.timeline import Record, Timeline
from wager.simulate.trace import Arrival

TOKEN_BYTES = 2


class Router(Protocol):
    """Chooses each request's path. `route` may return None: the request then waits until another one ends or a machine joins."""

    def route(self, request: Record, now_s: float, state: Simulator) -> Path | None: ...

    def iterated(self, request: Record, path: Path, tokens: int) -> None:
        """The request goes round the same path again, once for each of `tokens` tokens."""
        ...

    def ended(self, request: Record, path: Path) -> None:
        """The request finished or lost its path."""
        ...

    def changed(self, nodes: Mapping[str, NodeModel]) -> None:
        """Machines joined or left."""
        ...


@dataclass(frozen=True)
class Change:
    """Machines that join (with the layers they hold) and leave at `time_s`. A machine that joins again under its name has new layers."""

    time_s: float
    join: tuple[NodeModel, ...] = ()
    leave: tuple[str, ...] = ()


class Flight:
    """One attempt of a request: a path, and KV on its machines. A flight that died is dropped wherever it turns up."""

    __slots__ = ("record", "path", "nodes", "hop", "tokens", "context", "dead", "held")

    def __init__(self, record: Record, path: Path, nodes: list[Live], tokens: int, context: int):
        self.record, self.path, self.nodes = record, path, nodes
        self.hop, self.tokens, self.context = 0, tokens, context
        self.dead = False
        self.held = [0] * len(nodes)  # blocks per layer


class Simulator:
    """See the module's docstring. `links(a, b)` is the channel between two machines (or SOURCE, SINK), None where there is none."""

    def __init__(
        self,
        nodes: Sequence[NodeModel],
        links: Callable[[str, str], Link | None],
        layers: int,
        activation_bytes: float,
        router: Router,
        arrivals: Sequence[Arrival],
        changes: Sequence[Change] = (),
        keep_busy: bool = False,
    ):
        self.layers, self.activation_bytes, self.router, self.keep_busy = layers, activation_bytes, router, keep_busy
        self._links = links
        self.nodes: dict[str, Live] = {n.name: Live(n, 0.0) for n in nodes}
        self._gone: list[Live] = []
        self._channels: dict[tuple[str, str], list] = {}
        self.records = [Record(i, a.arrival_s, a.prompt_tokens, a.output_tokens) for i, a in enumerate(arrivals)]
        self._cached = [a.cached_tokens for a in arrivals]
        self.waiting: deque[Record] = deque()
        self._refused = False  # the router said that the head must wait, and nothing has ended since
        self.flights: dict[int, Flight] = {}
        self._heap: list[tuple[float, int, Callable[[object], None], object]] = []
        self._sequence = 0
        self.now_s, self.events = 0.0, 0
        for record in self.records:
            self._at(record.arrival_s, self._arrive, record)
        for change in changes:
            self._at(change.time_s, self._change, change)
        router.changed({n.name: n for n in nodes})

    def run(self, until_s: float | None = None) -> Timeline:
        """Advance to `until_s`, or until nothing is left to happen; may be called again with a later time."""
        heap, limit = self._heap, float("inf") if until_s is None else until_s
        while heap and heap[0][0] <= limit:
            self.now_s, _, act, what = heapq.heappop(heap)
            self.events += 1
            act(what)
        if until_s is not None:
            self.now_s = until_s
        return self._timeline()

    # -- requests ----------------------------------------------------------------------------------------------------------------

    def _arrive(self, record: Record) -> None:  # type: ignore[override]
        self.waiting.append(record)
        if not self._refused:
            self._admit()

    def _admit(self) -> None:
        """Give paths to waiting requests in order, until the router says that one must wait."""
        while self.waiting:
            record = self.waiting[0]
            path = self.router.route(record, self.now_s, self)
            self._refused = path is None
            if path is None:
                return
            self.waiting.popleft()
            self._start(record, path)

    def _start(self, record: Record, path: Path) -> None:
        check_path(path, {s.node: self.nodes[s.node].model for s in path if s.node in self.nodes}, self.layers)
        done = len(record.token_s)
        cached = self._cached[record.index] if record.restarts == 0 else 0
        lost = self._cached[record.index] - cached
        prompt = record.prompt_tokens + lost + done
        flight = Flight(record, path, [self.nodes[s.node] for s in path], prompt or 1, cached)
        if record.restarts:
            record.recomputed_tokens += prompt
        if cached:
            for hop in range(len(path)):
                if not self._hold(flight, hop, cached):
                    return  # it was sent back to the queue: some machine has no room for what it brings
        record.admitted_s = self.now_s if record.admitted_s is None else record.admitted_s
        record.stages = len(path)
        self.flights[record.index] = flight
        self._send(SOURCE, path[0].node, [flight], flight.tokens * TOKEN_BYTES)

    def _returned(self, flights: list[Flight]) -> None:
        """Tokens reach the coordinator; each request goes round again or ends."""
        ended = False
        for flight in flights:
            if flight.dead:
                continue
            record = flight.record
            record.token_s.append(self.now_s)
            flight.context += flight.tokens
            if len(record.token_s) >= record.output_tokens:
                self._end(flight)
                ended = True
                continue
            flight.hop, flight.tokens = 0, 1
            self.router.iterated(record, flight.path, 1)
            self._send(SOURCE, flight.path[0].node, [flight], TOKEN_BYTES)
        if ended:
            self._admit()

    def _end(self, flight: Flight) -> None:
        flight.dead, self._refused = True, False
        for hop in range(len(flight.path)):
            self._release(flight, hop)
        self.flights.pop(flight.record.index, None)
        self.router.ended(flight.record, flight.path)

    def _restart(self, flight: Flight) -> None:
        """Its KV is gone: back to the head of the queue, to compute prompt and output so far again."""
        self._end(flight)
        flight.record.restarts += 1
        self.waiting.appendleft(flight.record)

    # -- KV ----------------------------------------------------------------------------------------------------------------------

    def _hold(self, flight: Flight, hop: int, tokens: int) -> bool:
        """Blocks for `tokens` on a stage; takes from the request admitted last when there are none. False when the flight itself fell."""
        wanted = -(-tokens // BLOCK_TOKENS)
        missing = wanted - flight.held[hop]
        if missing <= 0:
            return True
        stage, node = flight.path[hop], flight.nodes[hop]
        need = missing * (stage.last - stage.first)
        while node.kv_used + need > node.model.kv_capacity:
            victim = self._youngest(node)
            if victim is None or victim is flight:
                if len(self._holders(node)) <= 1 and wanted * (stage.last - stage.first) > node.model.kv_capacity:
                    raise WagerError(
                        f"node {node.model.name} holds {node.model.kv_blocks * BLOCK_TOKENS} tokens per layer, too few for request "
                        f"{flight.record.index} of {tokens} tokens; give it fewer layers or drop longer requests"
                    )
                self._restart(flight)
                return False
            self._restart(victim)
        node.kv_used += need
        node.kv_peak = max(node.kv_peak, node.kv_used)
        flight.held[hop] = wanted
        return True

    def _release(self, flight: Flight, hop: int) -> None:
        stage, node = flight.path[hop], flight.nodes[hop]
        node.kv_used -= flight.held[hop] * (stage.last - stage.first)
        flight.held[hop] = 0
        if node.kv_used < 0:
            raise WagerError(f"node {node.model.name} gave back more KV than it held: this is a bug in the simulator")

    def _holders(self, node: Live) -> list[Flight]:
        return [f for f in self.flights.values() if any(n is node and h for n, h in zip(f.nodes, f.held, strict=True))]

    def _youngest(self, node: Live) -> Flight | None:
        return max(self._holders(node), key=lambda f: (f.record.admitted_s or 0.0, f.record.index), default=None)

    # -- machines ----------------------------------------------------------------------------------------------------------------

    def _deliver(self, what: tuple[Live, list[Flight]]) -> None:
        node, flights = what
        node.queue.extend(flights)
        if node.batch is None:
            self._form_batch(node)

    def _form_batch(self, node: Live) -> None:
        """Start the next batch out of what waits; nothing when that is nothing."""
        model, queue, batch = node.model, node.queue, []
        prompts = prompt_tokens = decodes = 0
        whole = True
        while queue:
            flight = queue[0]
            if flight.dead:
                queue.popleft()
                continue
            tokens = flight.tokens
            if tokens == 1:
                if decodes >= model.max_decodes:
                    break
            elif prompts and (prompts >= model.max_prompt_requests or prompt_tokens + tokens > model.max_prompt_tokens):
                break
            queue.popleft()
            context = flight.context + tokens
            if flight.held[flight.hop] * BLOCK_TOKENS < context and not self._hold(flight, flight.hop, context):
                continue
            if tokens == 1:
                decodes += 1
            else:
                prompts += 1
                prompt_tokens += tokens
            stage = flight.path[flight.hop]
            whole = whole and stage.first == model.first and stage.last == model.last
            batch.append(flight)
        if any(f.dead for f in batch):  # one that was taken early gave its KV to one taken later
            batch = [f for f in batch if not f.dead]
            decodes = sum(f.tokens == 1 for f in batch)
            prompt_tokens = sum(f.tokens for f in batch if f.tokens > 1)
        if not batch:
            return
        seconds = self._batch_s(model, batch, prompt_tokens, decodes, whole)
        node.batch, node.batches = batch, node.batches + 1
        node.busy_s += seconds
        if self.keep_busy:
            node.busy.append((self.now_s, self.now_s + seconds, len(batch)))
        self._at(self.now_s + seconds, self._finish_batch, (node, batch))

    @staticmethod
    def _batch_s(model: NodeModel, batch: list[Flight], prompt_tokens: int, decodes: int, whole: bool) -> float:
        """Layer times add up; a layer computes only the requests that need it here."""
        overhead = model.overhead_s_per_token * (prompt_tokens + decodes)
        if whole:
            return overhead + model.layers * model.layer_s(prompt_tokens, decodes)
        spans = [(f.path[f.hop].first, f.path[f.hop].last, f.tokens) for f in batch]
        cuts = sorted({cut for first, last, _ in spans for cut in (first, last)})
        seconds = overhead
        for low, high in zip(cuts, cuts[1:], strict=False):
            here = [tokens for first, last, tokens in spans if first <= low < last]
            if here:
                prompts = sum(t for t in here if t > 1)
                seconds += (high - low) * model.layer_s(prompts, sum(t == 1 for t in here))
        return seconds

    def _finish_batch(self, what: tuple[Live, list[Flight]]) -> None:
        node, batch = what
        if node.batch is not batch:
            return  # the machine left meanwhile
        node.batch = None
        onward: dict[str, list[Flight]] = {}
        sizes: dict[str, float] = {}
        for flight in batch:
            if flight.dead:
                continue
            flight.hop += 1
            if flight.hop == len(flight.path):
                target, size = SINK, TOKEN_BYTES
            else:
                target, size = flight.path[flight.hop].node, flight.tokens * self.activation_bytes
            if target in onward:
                onward[target].append(flight)
                sizes[target] += size
            else:
                onward[target], sizes[target] = [flight], size
        for target, flights in onward.items():
            self._send(node.model.name, target, flights, sizes[target])
        if node.queue:
            self._form_batch(node)

    # -- links and machines that come and go -------------------------------------------------------------------------------------

    def _send(self, start: str, end: str, flights: list[Flight], size_bytes: float) -> None:
        channel = self._channels.get((start, end))
        if channel is None:
            link = self._links(start, end)
            if link is None:
                raise UsageError(f"a path goes from {start} to {end}, but no link joins them")
            channel = self._channels[start, end] = [link.bytes_per_s, link.latency_s, 0.0]
        begun = self.now_s if self.now_s > channel[2] else channel[2]
        channel[2] = begun + size_bytes / channel[0]
        if end is SINK or end == SINK:
            self._at(channel[2] + channel[1], self._returned, flights)
        else:
            self._at(channel[2] + channel[1], self._deliver, (self.nodes[end], flights))

    def _change(self, change: Change) -> None:
        leaving = set(change.leave)
        lost = [f for f in self.flights.values() if any(s.node in leaving for s in f.path)]
        for flight in sorted(lost, key=lambda f: -f.record.index):
            self._restart(flight)
        for name in change.leave:
            node = self.nodes.pop(name, None)
            if node is None:
                raise UsageError(f"node {name!r} cannot leave at {change.time_s} s: it is not there")
            node.left_s, node.batch = self.now_s, None
            self._gone.append(node)
        for model in change.join:
            if model.name in self.nodes:
                raise UsageError(f"node {model.name!r} cannot join at {change.time_s} s: it is there already")
            self.nodes[model.name] = Live(model, self.now_s)
        self.router.changed({name: node.model for name, node in self.nodes.items()})
        self._refused = False
        self._admit()

    def _at(self, time_s: float, act: Callable, what: object) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (time_s, self._sequence, act, what))

    def _timeline(self) -> Timeline:
        every = [*self._gone, *self.nodes.values()]
        lives: dict[str, list[Live]] = {}
        for node in every:  # a machine that left and joined again has lived twice
            lives.setdefault(node.model.name, []).append(node)

        def up_s(node: Live) -> float:
            return (self.now_s if node.left_s is None else node.left_s) - node.joined_s

        return Timeline(
            records=self.records,
            end_s=self.now_s,
            busy={name: [interval for n in its for interval in n.busy] for name, its in lives.items()},
            node_busy_s={name: sum(n.busy_s for n in its) for name, its in lives.items()},
            node_up_s={name: sum(map(up_s, its)) for name, its in lives.items()},
            kv_peak={name: max(n.kv_peak / n.model.kv_capacity for n in its) for name, its in lives.items()},
            cost_usd=sum(n.model.usd_per_h * up_s(n) / 3600 for n in every),
            events=self.events,
            batches=sum(n.batches for n in every),
        )

    def check(self) -> None:
        """Laws that hold at every moment. Raises WagerError naming the one that is broken."""
        for node in self.nodes.values():
            held = sum(
                h * (s.last - s.first)
                for f in self.flights.values()
                for n, s, h in zip(f.nodes, f.path, f.held, strict=True)
                if n is node
            )
            if held != node.kv_used or not 0 <= node.kv_used <= node.model.kv_capacity:
                raise WagerError(f"node {node.model.name} counts {node.kv_used} KV blocks but its requests hold {held}")
            if node.batch is None and any(not f.dead for f in node.queue):
                raise WagerError(f"node {node.model.name} idles while requests wait for it")
        known = len(self.waiting) + len(self.flights) + sum(r.finished for r in self.records)
        due = sum(r.arrival_s <= self.now_s for r in self.records)
        if known != due:
            raise WagerError(f"{due} requests have arrived but {known} are accounted for")
