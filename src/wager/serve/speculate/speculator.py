"""All speculation of an engine: which method each request uses, when drafting is switched off, and who hears of the outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wager.errors import UsageError
from wager.serve.policies import ScheduledSpan
from wager.serve.request import Request
from wager.serve.speculate.drafter import Drafter, SizedDrafter, TimedDrafter
from wager.serve.speculate.gate import Gate
from wager.serve.token_tree import TokenTree

NONE = "none"  # the method of a request that does not want to speculate


class Speculator:
    """The engine's drafters by method name; the first is what a request gets that names none.

    gated: the methods that are switched off where they do not pay. disable_above: no drafts while more than this many requests run.
    """

    def __init__(self, drafters: Mapping[str, Drafter], gated: Sequence[str] = (), disable_above: int | None = None):
        self.drafters, self.disable_above = dict(drafters), disable_above
        self.default = next(iter(self.drafters))
        self.gates = {name: Gate() for name in gated}
        self._pending: dict[str, str] = {}  # request id -> method of its unverified proposal
        self._accepted: list[tuple[str, str, int]] = []
        self._open: dict[str, bool] = {}
        self._drafted_before: set[str] = set()

    @property
    def num_tokens(self) -> int:
        return max(d.num_tokens for d in self.drafters.values())

    @property
    def max_depth(self) -> int:
        return max(d.max_depth for d in self.drafters.values())

    def check_method(self, name: str | None) -> None:
        """Raises UsageError for a method this engine was not started with."""
        if name is not None and name != NONE and name not in self.drafters:
            raise UsageError(
                f"speculative_method {name!r} is not configured; this engine has {', '.join([*self.drafters, NONE])}",
                param="speculative_method",
            )

    def method_of(self, request: Request) -> str:
        return request.params.speculative_method or self.default

    def room(self, num_running: int) -> int:
        """Guesses to make room for in this step, per request; 0 when no method drafts now."""
        if self.disable_above is not None and num_running > self.disable_above:
            return 0
        self._open = {n: n not in self.gates or self.gates[n].open_for(num_running) for n in self.drafters}
        return max((self._nodes(name, num_running) for name, open_ in self._open.items() if open_), default=0)

    def _nodes(self, name: str, num_running: int) -> int:
        drafter = self.drafters[name]
        return drafter.room(max(num_running, 1)) if isinstance(drafter, SizedDrafter) else drafter.num_tokens

    def propose(self, spans: Sequence[ScheduledSpan], num_running: int) -> dict[str, TokenTree]:
        """Trees by request id, for those of the spans that have room for guesses."""
        groups: dict[str, list[tuple[Request, int, int]]] = {}
        for span in spans:
            request = span.request
            depth = request.max_total_tokens - request.num_tokens - 1  # guesses beyond that could never be committed
            if not span.num_draft_tokens or depth <= 0 or request.pooling is not None:
                continue
            name = self.method_of(request)
            if self._open.get(name) and (name not in self.gates or self.gates[name].admits(request.id, num_running)):
                groups.setdefault(name, []).append((request, span.num_draft_tokens, depth))
        trees = {}
        for name, members in groups.items():
            requests, nodes, depths = zip(*members, strict=True)
            for request, tree in zip(requests, self.drafters[name].propose(requests, nodes, depths), strict=True):
                if tree is not None and len(tree):
                    trees[request.id] = tree
                    self._pending[request.id] = name
        return trees

    def committed(self, request: Request, path: Sequence[int]) -> None:
        """The request's tree was verified: `path` is accepted, request.token_ids holds it and one more token."""
        name = self._pending.pop(request.id)
        self.drafters[name].committed(request, path)
        self._accepted.append((name, request.id, len(path)))

    def measured(self, num_running: int, step_ms: float, prefilling: bool) -> None:
        """A step ended; learn from it."""
        accepted, self._accepted = self._accepted, []
        drafted, before = {id_ for _, id_, _ in accepted}, self._drafted_before
        self._drafted_before = drafted
        if prefilling or not num_running:
            return
        methods = {method for method, _, _ in accepted}
        if len(methods) == 1 and len(accepted) == num_running and drafted <= before:  # nobody caught up
            drafter = self.drafters[methods.pop()]
            if isinstance(drafter, TimedDrafter):
                drafter.timed(num_running, step_ms)
        for name, gate in self.gates.items():
            mine = [(id_, count) for method, id_, count in accepted if method == name]
            others = len(accepted) - len(mine)
            if not others and (mine or not self._open.get(name)):
                gate.measured(num_running, step_ms, mine, bool(mine))

    def remove(self, request: Request) -> None:
        self._pending.pop(request.id, None)
        for drafter in self.drafters.values():
            drafter.remove(request)
        for gate in self.gates.values():
            gate.forget(request.id)
