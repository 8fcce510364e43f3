"""Machines and the links between them, as plain data that planners, the simulator and the deployer share.

Units: bytes, bytes/s, seconds, USD per hour; there is no other. A *node* is one machine: equal devices that compute as one (tensor
parallel inside). SOURCE and SINK are the coordinator: requests leave the one and tokens come back to the other.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wager.errors import UsageError

SOURCE, SINK = "source", "sink"


@dataclass(frozen=True)
class Device:
    """One accelerator (or socket): what it holds, how fast it reads its memory, how fast it multiplies in half precision, and how fast
    it talks to its peers in the same machine (both ways together); infinite where nothing is known."""

    name: str
    memory_bytes: float
    read_bytes_per_s: float
    half_flops: float
    source: str = ""
    peer_bytes_per_s: float = float("inf")

    @property
    def ridge(self) -> float:
        """Operations per byte above which arithmetic limits."""
        return self.half_flops / self.read_bytes_per_s


@dataclass(frozen=True)
class Link:
    """A directed channel that carries one message after another."""

    bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self):
        if not self.bytes_per_s > 0 or self.latency_s < 0:
            raise UsageError(f"a link of {self.bytes_per_s} bytes/s and {self.latency_s} s cannot carry anything")

    def seconds(self, size_bytes: float) -> float:
        return self.latency_s + size_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Node:
    """`machine` names the measured profile or the catalog's configuration: equal machines are interchangeable."""

    name: str
    machine: str
    region: str = ""
    zone: str = ""
    usd_per_h: float = 0.0
    nic_bytes_per_s: float = float("inf")


@dataclass(frozen=True)
class Cluster:
    """Nodes and directed links. A pair without an entry in `links` is joined by `default_link`, or not at all when that is None."""

    nodes: tuple[Node, ...]
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    default_link: Link | None = None

    def __post_init__(self):
        names = Counter(n.name for n in self.nodes)
        twice = [name for name, count in names.items() if count > 1]
        if twice or {SOURCE, SINK} & set(names):
            raise UsageError(f"node name {(twice or [SOURCE])[0]!r} is used twice or reserved; rename it")
        known = {*names, SOURCE, SINK}
        stray = next((pair for pair in self.links if not set(pair) <= known), None)
        if stray:
            raise UsageError(f"the link {stray[0]} to {stray[1]} names a node that is not in the cluster")

    def link(self, start: str, end: str) -> Link | None:
        return self.links.get((start, end), self.default_link)

    def node(self, name: str) -> Node:
        found = next((n for n in self.nodes if n.name == name), None)
        if found is None:
            raise UsageError(f"there is no node {name!r}; the cluster has {', '.join(n.name for n in self.nodes)}")
        return found

    @property
    def counts(self) -> Counter[str]:
        """How many nodes of each machine."""
        return Counter(n.machine for n in self.nodes)

    @property
    def usd_per_h(self) -> float:
        return sum(n.usd_per_h for n in self.nodes)

    def without(self, names: Iterable[str]) -> Cluster:
        """The cluster after these nodes have left."""
        gone = set(names)
        links = {pair: link for pair, link in self.links.items() if not gone & set(pair)}
        return Cluster(tuple(n for n in self.nodes if n.name not in gone), links, self.default_link)


def uniform(machines: Sequence[str], link: Link, **fields) -> Cluster:
    """A one-site cluster: a node n0, n1, ... for each machine, every pair joined by the same kind of link."""
    return Cluster(tuple(Node(f"n{i}", machine, **fields) for i, machine in enumerate(machines)), {}, link)


def read_links(path: str | Path, machines: Sequence[str]) -> Cluster:
    """A cluster from a table from,to,bandwidth_MB_per_s,latency_ms whose node numbers index `machines`; links go both ways.

    Raises UsageError naming the line that is wrong.
    """
    links: dict[tuple[str, str], Link] = {}
    with open(path, newline="") as handle:
        for line, row in enumerate(csv.DictReader(handle), 2):
            try:
                start, end = (_end(row[key], len(machines)) for key in ("from", "to"))
                link = Link(float(row["bandwidth_MB_per_s"]) * 1e6, float(row["latency_ms"]) / 1e3)
            except (KeyError, TypeError, ValueError, UsageError) as error:
                raise UsageError(f"line {line} of {path} is no link: {error}") from None
            links[start, end] = link
            links.setdefault((end, start), link)
    return Cluster(tuple(Node(f"n{i}", machine) for i, machine in enumerate(machines)), links)


def _end(text: str, count: int) -> str:
    if text in (SOURCE, SINK):
        return text
    if not 0 <= int(text) < count:
        raise ValueError(f"node {text} is not among the {count} machines")
    return f"n{int(text)}"
