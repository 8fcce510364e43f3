"""The e-graph: classes of equal terms, closed under congruence.

A node is (operator, payload, classes of its arguments); equal nodes are one node, and classes that hold the same node are one class. Merging
is deferred: `union` joins two classes, `rebuild` restores both properties ("egg: Fast and Extensible Equality Saturation", arXiv 2004.03082).
Every class carries a fact (a shape, say) computed from its nodes; classes with different facts are never equal, and joining them names the
rule that tried to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from wager.errors import WagerError

Payload = tuple[Any, ...]
ENode = tuple[str, Payload, tuple[int, ...]]


class Unsound(WagerError):
    """A rule made two terms equal whose facts differ."""


@dataclass(frozen=True)
class Term:
    """An operator over terms; `payload` is what is not a term (a dimension, a size, a name)."""

    op: str
    payload: Payload = ()
    args: tuple[Term, ...] = ()

    def __str__(self) -> str:
        head = self.op + (f"[{','.join(map(str, self.payload))}]" if self.payload else "")
        return f"({head} {' '.join(map(str, self.args))})" if self.args else head


class EGraph:
    """`fact(op, payload, facts of the arguments)` gives a node's fact; it raises ValueError for a node that makes no sense."""

    def __init__(self, fact: Callable[[str, Payload, list[Any]], Any] | None = None):
        self._fact = fact
        self._parent: list[int] = []
        self._known: dict[ENode, int] = {}
        self.classes: dict[int, dict[str, set[ENode]]] = {}
        self._users: dict[int, list[tuple[ENode, int]]] = {}
        self.facts: dict[int, Any] = {}
        self._pending: list[int] = []
        self.touched: set[int] = set()
        """Classes that are new or were joined since the owner last emptied this set."""
        self.by_op: dict[str, set[int]] = defaultdict(set)
        """Classes that hold a node of an operator; some may have been joined into others since."""

    @property
    def nodes(self) -> int:
        return len(self._known)

    def find(self, a: int) -> int:
        parent = self._parent
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        return a

    def _canonical(self, node: ENode) -> ENode:
        return (node[0], node[1], tuple(self.find(c) for c in node[2]))

    def node(self, op: str, payload: Payload = (), args: tuple[int, ...] = ()) -> int:
        """The class of a node, made where it is new. Raises ValueError when it has no fact."""
        node = (op, payload, tuple(self.find(c) for c in args))
        known = self._known.get(node)
        if known is not None:
            return self.find(known)
        fact = self._fact(op, payload, [self.facts[c] for c in node[2]]) if self._fact else None
        made = len(self._parent)
        self._parent.append(made)
        self._known[node] = made
        self.classes[made], self._users[made], self.facts[made] = {op: {node}}, [], fact
        for c in set(node[2]):
            self._users[c].append((node, made))
        self.by_op[op].add(made)
        self.touched.add(made)
        return made

    def add(self, term: Term) -> int:
        return self.node(term.op, term.payload, tuple(self.add(a) for a in term.args))

    def lookup(self, term: Term) -> int | None:
        """The class of a term that is represented, else None. Adds nothing."""
        args = []
        for a in term.args:
            found = self.lookup(a)
            if found is None:
                return None
            args.append(found)
        known = self._known.get((term.op, term.payload, tuple(args)))
        return None if known is None else self.find(known)

    def union(self, a: int, b: int, reason: str = "") -> bool:
        """Joins two classes; False when they were one. Call `rebuild` before reading. Raises Unsound when their facts differ."""
        a, b = self.find(a), self.find(b)
        if a == b:
            return False
        if self.facts[a] != self.facts[b]:
            raise Unsound(f"rule {reason!r} equates {self.facts[a]} with {self.facts[b]}; the rule is wrong")
        if len(self._users[a]) < len(self._users[b]):
            a, b = b, a
        self._parent[b] = a
        mine = self.classes[a]
        for op, nodes in self.classes.pop(b).items():
            mine.setdefault(op, set()).update(nodes)
            self.by_op[op].add(a)
        self._users[a] += self._users.pop(b)
        del self.facts[b]
        self._pending.append(a)
        self.touched.add(a)
        return True

    def rebuild(self) -> None:
        """Restores congruence: nodes whose arguments were joined are looked up again, and join in turn."""
        while self._pending:
            todo = {self.find(c) for c in self._pending}
            self._pending = []
            for c in todo:
                self._repair(self.find(c))

    def _repair(self, c: int) -> None:
        users, fresh = self._users[c], {}
        self._users[c] = []
        for node, owner in users:
            new, owner = self._canonical(node), self.find(owner)
            if new != node:
                self._known.pop(node, None)
                held = self.classes[owner].get(node[0])
                if held is not None:
                    held.discard(node)
                    held.add(new)
            other = fresh.get(new, self._known.get(new))
            if other is not None and self.find(other) != owner:
                self.union(owner, other, "congruence")
            owner = self.find(owner)
            fresh[new] = self._known[new] = owner
        self._users[self.find(c)] += list(fresh.items())

    def of(self, op: str) -> set[int]:
        """Classes that hold a node of this operator."""
        found = {self.find(c) for c in self.by_op[op]}
        self.by_op[op] = found
        return found

    def users_of(self, c: int) -> Iterator[int]:
        """Classes with a node that reads class `c`."""
        return (self.find(owner) for _, owner in self._users[self.find(c)])

    def enodes(self, c: int, op: str) -> list[ENode]:
        """The nodes of class `c` with this operator, arguments up to date."""
        held = self.classes[self.find(c)].get(op)
        if not held:
            return []
        return list({self._canonical(n) for n in held})

    def equal(self, a: int, b: int) -> bool:
        return self.find(a) == self.find(b)
