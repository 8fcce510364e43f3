"""A plan as a file that a person can read and edit: TOML, one [[node]] per machine. A wrong edit is refused with its line."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from wager.errors import UsageError

KEYS = {"name": str, "machine": str, "layers": list}


@dataclass(frozen=True)
class PlanFile:
    """Which layers [start, end) each machine holds, and what the planner said about it."""

    model: str
    layers: int
    links: str
    nodes: dict[str, tuple[str, int, int]]
    notes: dict[str, float | str]

    @property
    def placement(self) -> dict[str, tuple[int, int]]:
        return {name: (start, end) for name, (_, start, end) in self.nodes.items()}


def write(plan: PlanFile, path: str | Path) -> None:
    lines = [f'model = "{plan.model}"', f"layers = {plan.layers}", f'links = "{plan.links}"', "", "[notes]"]
    lines += [f'{k} = "{v}"' if isinstance(v, str) else f"{k} = {float(v)!r}" for k, v in plan.notes.items()]
    for name, (machine, start, end) in sorted(plan.nodes.items(), key=lambda item: (item[1][1], item[0])):
        lines += ["", "[[node]]", f'name = "{name}"', f'machine = "{machine}"', f"layers = [{start}, {end}]"]
    write_lines(lines, path)


def write_lines(lines: list[str], path: str | Path) -> None:
    """The file whole or not at all. Raises UsageError naming a folder that cannot be written to."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text("\n".join(lines) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


def read(path: str | Path) -> PlanFile:
    """Raises UsageError naming the line of what is wrong."""
    try:
        text = Path(path).read_text()
        raw = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"the plan {path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the plan {path} is not TOML: {error}") from None
    for key, kind in (("model", str), ("layers", int), ("links", str)):
        if not isinstance(raw.get(key), kind):
            raise UsageError(f"the plan {path} needs {key} = <{kind.__name__}> before its first [section]")
    starts = [number for number, line in enumerate(text.splitlines(), 1) if line.strip() == "[[node]]"]
    nodes: dict[str, tuple[str, int, int]] = {}
    for line, node in zip(starts, raw.get("node", []), strict=False):
        where = f"line {line} of {path}"
        for key, kind in KEYS.items():
            if not isinstance(node.get(key), kind):
                raise UsageError(f"{where}: this node needs {key} = <{kind.__name__}>")
        held = node["layers"]
        if len(held) != 2 or not all(isinstance(v, int) for v in held) or not 0 <= held[0] < held[1] <= raw["layers"]:
            raise UsageError(
                f"{where}: layers = {held} of node {node['name']} is no range [start, end) within 0 to {raw['layers']}"
            )
        if node["name"] in nodes:
            raise UsageError(f"{where}: the node {node['name']} is there twice")
        nodes[node["name"]] = node["machine"], held[0], held[1]
    missing = next((l for l in range(raw["layers"]) if not any(s <= l < e for _, s, e in nodes.values())), None)
    if missing is not None:
        raise UsageError(f"no node in {path} holds layer {missing}; widen the layers of one")
    return PlanFile(raw["model"], raw["layers"], raw["links"], nodes, raw.get("notes", {}))
