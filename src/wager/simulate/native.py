"""The simulator of `pipeline.py` as compiled code, for planners that simulate hundreds of times.

Same events, same order, same arithmetic: the times are the reference's to the last bit (tests hold it to that). The router stays a Python object
and is asked once per request. It hears of iterations before it is asked again, not at every token, so `iterated` may get more than one token.
Machines that join or leave are the reference's business.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from wager.errors import BuildError, UsageError, WagerError
from wager.hardware.cluster import SINK, SOURCE, Link
from wager.native import build
from wager.simulate.nodes import BLOCK_TOKENS, NodeModel, check_path
from wager.simulate.pipeline import Router, Simulator
from wager.simulate.timeline import Record, Timeline
from wager.simulate.trace import Arrival

SOURCE_FILE = Path(__file__).parent / "cpp" / "pipeline.cpp"
NO_LINK, NO_ROOM, NEGATIVE, CALLBACK = 1, 2, 3, 4

_P, _I, _D, _L = ctypes.c_void_p, ctypes.c_int32, ctypes.c_double, ctypes.c_int64
_Route = ctypes.CFUNCTYPE(_I, _I, _D)
_Iterated = ctypes.CFUNCTYPE(_I, _I, _I)
_Ended = ctypes.CFUNCTYPE(_I, _I)
_SIGNATURES = {
    "wager_pipeline_new": (_P, (_I, _D, _I)),
    "wager_pipeline_free": (None, (_P,)),
    "wager_pipeline_node": (None, (_P, _I, _P, _D, _P, _P)),
    "wager_pipeline_links": (None, (_P, _P, _P)),
    "wager_pipeline_arrivals": (None, (_P, _I, _P, _P, _P, _P)),
    "wager_pipeline_router": (None, (_P, _I, _Route, _Iterated, _Ended)),
    "wager_pipeline_route_buffer": (ctypes.POINTER(_I), (_P,)),
    "wager_pipeline_run": (_I, (_P, _D, _P)),
    "wager_pipeline_now": (_D, (_P,)),
    "wager_pipeline_events": (_L, (_P,)),
    "wager_pipeline_record": (_D, (_P, _I, _P)),
    "wager_pipeline_tokens": (ctypes.POINTER(_D), (_P, _I)),
    "wager_pipeline_live": (_D, (_P, _I, _P)),
    "wager_pipeline_busy": (None, (_P, _I, _P, _P, _P)),
}


@cache
def library() -> ctypes.CDLL:
    """The compiled event loop. Raises BuildError when this machine has no compiler."""
    lib = build.load("wager_pipeline", [SOURCE_FILE])
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


@cache
def available() -> bool:
    try:
        library()
    except BuildError as error:
        logging.getLogger(__name__).warning("simulations run in Python, some twenty times slower: %s", error)
        return False
    return True


def simulate(
    nodes: Sequence[NodeModel],
    links: Callable[[str, str], Link | None],
    layers: int,
    activation_bytes: float,
    router: Router,
    arrivals: Sequence[Arrival],
    until_s: float | None = None,
    keep_busy: bool = False,
) -> Timeline:
    """`Simulator(...).run(until_s)`, compiled where there is a compiler."""
    if not available():
        return Simulator(nodes, links, layers, activation_bytes, router, arrivals, keep_busy=keep_busy).run(until_s)
    with _Pipeline(nodes, links, layers, activation_bytes, router, arrivals, keep_busy) as pipeline:
        return pipeline.run(until_s)


class _LiveView:
    """What a router may look at of a machine while the simulation runs: the lengths of `queue` and `batch`, `busy_s`, `batches`."""

    def __init__(self, pipeline: _Pipeline, index: int):
        self.model, self._pipeline, self._index = pipeline.models[index], pipeline, index

    def counts(self) -> tuple[np.ndarray, float]:
        counts_6 = np.zeros(6, np.int64)
        busy_s = self._pipeline.lib.wager_pipeline_live(self._pipeline.handle, self._index, counts_6.ctypes.data)
        return counts_6, busy_s

    @property
    def queue(self) -> range:
        return range(int(self.counts()[0][0]))

    @property
    def batch(self) -> range | None:
        running = int(self.counts()[0][1])
        return None if running < 0 else range(running)

    @property
    def batches(self) -> int:
        return int(self.counts()[0][2])

    @property
    def busy_s(self) -> float:
        return self.counts()[1]


class _Pipeline:
    """One run: the state a router sees (`nodes`, `now_s`) and the conversion both ways."""

    def __init__(
        self,
        nodes: Sequence[NodeModel],
        links: Callable[[str, str], Link | None],
        layers: int,
        activation_bytes: float,
        router: Router,
        arrivals: Sequence[Arrival],
        keep_busy: bool,
    ):
        self.lib, self.models, self.layers, self.router = library(), list(nodes), layers, router
        self.index = {n.name: i for i, n in enumerate(self.models)}
        self._by_name = {n.name: n for n in self.models}
        self.names = [*self.index, SOURCE, SINK]
        self.records = [Record(i, a.arrival_s, a.prompt_tokens, a.output_tokens) for i, a in enumerate(arrivals)]
        self._paths: dict[int, Any] = {}
        self._failed: BaseException | None = None
        self.now_s = 0.0
        self.handle = self.lib.wager_pipeline_new(len(nodes), activation_bytes, keep_busy)
        self.nodes = {n.name: _LiveView(self, i) for i, n in enumerate(self.models)}
        self._fill(links, arrivals)
        most = max(1, min(layers, len(nodes) * layers))
        # ctypes needs these objects alive as long as the handle
        self._calls = (_Route(self._route), _Iterated(self._iterated), _Ended(self._ended))
        self.lib.wager_pipeline_router(self.handle, most, *self._calls)
        self._buffer = self.lib.wager_pipeline_route_buffer(self.handle)
        router.changed(self._by_name)

    def __enter__(self) -> _Pipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.lib.wager_pipeline_free(self.handle)

    def _fill(self, links: Callable[[str, str], Link | None], arrivals: Sequence[Arrival]) -> None:
        for i, n in enumerate(self.models):
            limits_8 = np.array(
                [n.first, n.last, n.max_prompt_requests, n.max_prompt_tokens, n.max_decodes, n.kv_blocks, len(n.prompt_s), len(n.decode_s)],
                np.int64,
            )  # fmt: skip
            prompt_s, decode_s = np.array(n.prompt_s, float), np.array(n.decode_s, float)
            self.lib.wager_pipeline_node(
                self.handle, i, limits_8.ctypes.data, n.overhead_s_per_token, prompt_s.ctypes.data, decode_s.ctypes.data
            )
        size = len(self.names)
        rate_EE, latency_EE = np.zeros((size, size)), np.zeros((size, size))
        for i, a in enumerate(self.names):
            for j, b in enumerate(self.names):
                link = links(a, b) if i != j else None
                if link is not None:
                    rate_EE[i, j], latency_EE[i, j] = link.bytes_per_s, link.latency_s
        self.lib.wager_pipeline_links(self.handle, rate_EE.ctypes.data, latency_EE.ctypes.data)
        times = np.array([a.arrival_s for a in arrivals], float)
        columns = [
            np.array([getattr(a, f) for a in arrivals], np.int32)
            for f in ("prompt_tokens", "output_tokens", "cached_tokens")
        ]
        self.lib.wager_pipeline_arrivals(
            self.handle, len(arrivals), times.ctypes.data, *(c.ctypes.data for c in columns)
        )

    # -- called from the event loop; an exception cannot cross it, so it waits here -------------------------------------------------

    def _route(self, index: int, now_s: float) -> int:
        try:
            self.now_s = now_s
            record = self._current(index)
            path = self.router.route(record, now_s, self)  # type: ignore[arg-type]
            if path is None:
                return 0
            check_path(path, self._by_name, self.layers)
            self._paths[index] = path
            at = 0
            for stage in path:
                self._buffer[at], self._buffer[at + 1], self._buffer[at + 2] = (
                    self.index[stage.node],
                    stage.first,
                    stage.last,
                )
                at += 3
            return len(path)
        except BaseException as error:
            self._failed = error
            return -1

    def _iterated(self, index: int, tokens: int) -> int:
        try:
            self.router.iterated(self.records[index], self._paths[index], tokens)
            return 0
        except BaseException as error:
            self._failed = error
            return -1

    def _ended(self, index: int) -> int:
        try:
            self.router.ended(self.records[index], self._paths.pop(index))
            return 0
        except BaseException as error:
            self._failed = error
            return -1

    def _current(self, index: int) -> Record:
        """The record as it is now: only one that lost its KV has tokens when it is routed."""
        record, counts_4 = self.records[index], np.zeros(4, np.int32)
        self.lib.wager_pipeline_record(self.handle, index, counts_4.ctypes.data)
        if counts_4[1]:
            self._read(index)
        return record

    def _read(self, index: int) -> None:
        record, counts_4 = self.records[index], np.zeros(4, np.int32)
        admitted_s = self.lib.wager_pipeline_record(self.handle, index, counts_4.ctypes.data)
        count, record.restarts, record.recomputed_tokens, record.stages = counts_4.tolist()
        record.admitted_s = None if admitted_s < 0 else admitted_s
        record.token_s = self.lib.wager_pipeline_tokens(self.handle, index)[:count] if count else []

    # -- results -------------------------------------------------------------------------------------------------------------------

    def run(self, until_s: float | None) -> Timeline:
        why_3 = np.zeros(3, np.int32)
        limit = float("inf") if until_s is None else until_s
        error = self.lib.wager_pipeline_run(self.handle, limit, why_3.ctypes.data)
        if error:
            raise self._reason(error, *why_3.tolist())
        for record in self.records:
            self._read(record.index)
        end_s = self.lib.wager_pipeline_now(self.handle) if until_s is None else until_s
        live = {name: view.counts() for name, view in self.nodes.items()}
        return Timeline(
            records=self.records,
            end_s=end_s,
            busy={name: self._busy(i, int(live[name][0][5])) for i, name in enumerate(live)},
            node_busy_s={name: busy_s for name, (_, busy_s) in live.items()},
            node_up_s=dict.fromkeys(live, end_s),
            kv_peak={n.name: int(live[n.name][0][4]) / n.kv_capacity for n in self.models},
            cost_usd=sum(n.usd_per_h * end_s / 3600 for n in self.models),
            events=self.lib.wager_pipeline_events(self.handle),
            batches=sum(int(counts[2]) for counts, _ in live.values()),
        )

    def _busy(self, index: int, spans: int) -> list[tuple[float, float, int]]:
        start_s, end_s, requests = np.zeros(spans), np.zeros(spans), np.zeros(spans, np.int32)
        self.lib.wager_pipeline_busy(self.handle, index, start_s.ctypes.data, end_s.ctypes.data, requests.ctypes.data)
        return list(zip(start_s.tolist(), end_s.tolist(), requests.tolist(), strict=True))

    def _reason(self, error: int, first: int, second: int, tokens: int) -> BaseException:
        if error == CALLBACK:
            assert self._failed is not None
            return self._failed
        if error == NO_LINK:
            return UsageError(f"a path goes from {self.names[first]} to {self.names[second]}, but no link joins them")
        node = self.models[first]
        if error == NO_ROOM:
            return WagerError(
                f"node {node.name} holds {node.kv_blocks * BLOCK_TOKENS} tokens per layer, too few for request {second} of {tokens} "
                "tokens; give it fewer layers or drop longer requests"
            )
        assert error == NEGATIVE
        return WagerError(f"node {node.name} gave back more KV than it held: this is a bug in the simulator")
