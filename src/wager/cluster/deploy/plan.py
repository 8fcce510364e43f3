"""What to run, as a TOML file that a person may edit: a planner's plan, and a [deploy] section that says which checkpoint and how.

    model = "demo"             # the planner's name of the model; the checkpoint too, unless [deploy] names one
    layers = 5
    links = ""                 # the planner's; not needed to deploy

    [deploy]                   # all optional
    checkpoint = "demo"        # demo, a directory, or a hub id
    max_num_seqs = 32

    [[node]]
    name = "n0"
    machine = "cpu"
    layers = [0, 3]
    replica = "a"              # nodes of one replica are the stages of one pipeline; left out, pipelines are formed from the layers
    weight = 1.0               # share of the requests, of the replica's first stage

A node that a plan lets overlap with the stage before it runs only the layers after those (partial inference).
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wager.errors import UsageError

TOP = {"model": str, "layers": int, "links": str, "notes": dict, "deploy": dict, "node": list}
NODE = {"name": str, "machine": str, "layers": list, "replica": str, "weight": (int, float), "resource": str}
DEPLOY = {
    "checkpoint": str, "dtype": str, "quantization": str, "max_model_len": int, "max_num_seqs": int,
    "max_num_batched_tokens": int, "kv_cache_memory": (int, str), "block_size": int, "seed": int,
    "enable_prefix_caching": bool, "scheduling_policy": str, "max_queue": int, "threads": int, "micro_batches": int,
    "notice_s": (int, float),
}  # fmt: skip
NOT_ENGINE = ("checkpoint", "threads", "micro_batches", "notice_s")


@dataclass(frozen=True)
class StagePlan:
    """A machine and the layers [first, last) it runs for its replica."""

    node: str
    first: int
    last: int
    resource: str | None = None


@dataclass(frozen=True)
class ReplicaPlan:
    name: str
    weight: float
    stages: tuple[StagePlan, ...]


@dataclass(frozen=True)
class DeployPlan:
    """replicas in order of the file; idle: nodes that no pipeline could use; engine: options of EngineConfig."""

    checkpoint: str
    layers: int
    replicas: tuple[ReplicaPlan, ...]
    idle: tuple[str, ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    micro_batches: int | None = None
    notice_s: float = 30.0


class Located:
    """Knows on which line a table begins and a key stands."""

    def __init__(self, path: str | Path, text: str):
        self.path, self.lines = path, text.splitlines()

    def error(self, line: int | None, message: str) -> UsageError:
        where = f"line {line} of {self.path}" if line else f"the plan {self.path}"
        return UsageError(f"{where}: {message}")

    def header(self, name: str, number: int = 0) -> int | None:
        """Line of the `number`-th [[name]] or [name]."""
        pattern = re.compile(rf"^\s*\[\[?\s*{re.escape(name)}\s*\]?\]\s*(#.*)?$")
        found = [i for i, line in enumerate(self.lines, 1) if pattern.match(line)]
        return found[number] if number < len(found) else None

    def key(self, name: str, after: int | None) -> int | None:
        """Line of a key in the table that begins at line `after` (None: before the first table)."""
        for i in range(after or 0, len(self.lines)):
            line = self.lines[i]
            if line.lstrip().startswith("["):
                return after
            if re.match(rf"^\s*[\"']?{re.escape(name)}[\"']?\s*=", line):
                return i + 1
        return after


def read(path: str | Path) -> DeployPlan:
    """Raises UsageError naming the line of what is wrong and what to do."""
    try:
        text = Path(path).read_text()
        raw = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"the plan {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the plan {path} is not TOML: {error}") from None
    at = Located(path, text)
    _known(at, raw, TOP, None, "the plan")
    for key in ("model", "layers"):
        if key not in raw:
            raise at.error(None, f"{key} = ... is missing before the first [section]; `wager plan` writes it")
    if raw["layers"] < 1:
        raise at.error(at.key("layers", None), f"layers = {raw['layers']} must be at least 1")
    deploy = raw.get("deploy", {})
    header = at.header("deploy")
    _known(at, deploy, DEPLOY, header, "[deploy]")
    for key, value in deploy.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "seed" and value <= 0:
            raise at.error(at.key(key, header), f"{key} = {value} must be positive")
    nodes = raw.get("node", [])
    if not nodes:
        raise at.error(None, "there is no [[node]]; `wager plan` writes one per machine")
    for number, node in enumerate(nodes):
        _check_node(at, node, number, raw["layers"], {n.get("name") for n in nodes[:number]})
    replicas, idle = _replicas(at, nodes, raw["layers"])
    return DeployPlan(
        deploy.get("checkpoint", raw["model"]), raw["layers"], replicas, idle,
        {k: v for k, v in deploy.items() if k not in NOT_ENGINE},
        deploy.get("threads"), deploy.get("micro_batches"), float(deploy.get("notice_s", 30.0)),
    )  # fmt: skip


def _known(at: Located, table: Mapping[str, Any], kinds: Mapping[str, Any], header: int | None, what: str) -> None:
    for key, value in table.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, 1)
            remedy = f"did you mean {near[0]}?" if near else f"it takes {', '.join(kinds)}"
            line = at.header(key) if isinstance(value, (dict, list)) and at.header(key) else at.key(key, header)
            raise at.error(line, f"{what} does not know {key!r}; {remedy}")
        kind = kinds[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise at.error(at.key(key, header), f"{key} = {value!r} must be of type {names}")


def _check_node(at: Located, node: Mapping[str, Any], number: int, layers: int, earlier: set) -> None:
    header = at.header("node", number)
    if not isinstance(node, Mapping):
        raise at.error(header, "write each node as a [[node]] section")
    _known(at, node, NODE, header, "[[node]]")
    for key in ("name", "layers"):
        if key not in node:
            raise at.error(header, f"this node needs {key} = ...")
    held = node["layers"]
    whole = len(held) == 2 and all(isinstance(v, int) and not isinstance(v, bool) for v in held)
    if not whole or not 0 <= held[0] < held[1] <= layers:
        raise at.error(
            at.key("layers", header),
            f"layers = {held} of node {node['name']} is no range [start, end) within 0 to {layers}; write e.g. [0, {layers}]",
        )
    if node["name"] in earlier:
        raise at.error(at.key("name", header), f"the node {node['name']} is there twice; rename one")
    if node.get("weight", 1.0) <= 0:
        raise at.error(
            at.key("weight", header), f"weight = {node['weight']} must be positive; remove the node to idle it"
        )


def _replicas(at: Located, nodes: list[dict], layers: int) -> tuple[tuple[ReplicaPlan, ...], tuple[str, ...]]:
    named = [n for n in nodes if "replica" in n]
    if named and len(named) < len(nodes):
        number = next(i for i, n in enumerate(nodes) if "replica" not in n)
        raise at.error(
            at.header("node", number), 'either every node names its replica or none does; add replica = "..."'
        )
    if not named:
        return form_pipelines(at, nodes, layers)
    groups: dict[str, list[dict]] = {}
    for node in nodes:
        groups.setdefault(node["replica"], []).append(node)
    replicas = []
    for name, members in groups.items():
        chain, done = [], 0
        for node in sorted(members, key=lambda n: (n["layers"][0], n["layers"][1])):
            first, last = node["layers"]
            header = at.header("node", nodes.index(node))
            if first > done:
                raise at.error(
                    at.key("layers", header),
                    f"in replica {name} no node holds layer {done} before node {node['name']} begins at {first}; widen one",
                )
            if last <= done:
                raise at.error(
                    at.key("layers", header),
                    f"replica {name} has no layers left for node {node['name']}; give it layers from {done} on, or another replica",
                )
            chain.append((node, done, last))
            done = last
        if done < layers:
            raise at.error(
                at.header("node", nodes.index(members[-1])),
                f"in replica {name} no node holds layer {done}; widen the last one",
            )
        replicas.append(_replica(name, chain))
    return tuple(replicas), ()


def form_pipelines(at: Located, nodes: list[dict], layers: int) -> tuple[tuple[ReplicaPlan, ...], tuple[str, ...]]:
    """Node-disjoint pipelines through the plan: each takes, at every hop, the free node that reaches furthest. What is left idles."""
    free, replicas = list(nodes), []
    while True:
        chain, done = [], 0
        while done < layers:
            used = [n for n, _, _ in chain]
            able = [n for n in free if n["layers"][0] <= done < n["layers"][1] and n not in used]
            if not able:
                break
            # closest beginning first: a node that could also begin a pipeline is left to do that
            node = max(able, key=lambda n: (n["layers"][0], n["layers"][1], n["name"]))
            chain.append((node, done, node["layers"][1]))
            done = node["layers"][1]
        if done < layers:
            break
        replicas.append(_replica(f"r{len(replicas)}", chain))
        free = [n for n in free if all(n is not used for used, _, _ in chain)]
    if not replicas:
        raise at.error(at.header("node"), f"no chain of nodes holds all {layers} layers; widen the layers of some")
    return tuple(replicas), tuple(n["name"] for n in free)


def _replica(name: str, chain: list[tuple[dict, int, int]]) -> ReplicaPlan:
    stages = tuple(StagePlan(n["name"], first, last, n.get("resource")) for n, first, last in chain)
    return ReplicaPlan(name, float(chain[0][0].get("weight", 1.0)), stages)
