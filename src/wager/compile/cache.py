"""What searches found before: one JSON file per (program, search settings, machine), in the user's cache directory.

The key holds everything that decides the answer: the program with its shapes, the search and its limits, the processor's instruction sets,
the number of threads and torch's version. A hit saves the search and the race; the program found is verified and timed against the original
again all the same.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from wager.compile.units import fingerprint
from wager.errors import UsageError
from wager.graph.program import Program, from_json, to_json
from wager.native import build


def path(program: Program, *settings: Any) -> Path:
    """Where the answer for these settings on this machine belongs."""
    machine = (build.cpu_flags(), os.cpu_count(), torch.get_num_threads(), torch.__version__)
    return build.cache_dir().parent / "compiled" / f"{fingerprint(to_json(program), settings, machine)}.json"


def read(place: Path) -> tuple[Program, dict[str, Any]] | None:
    """The program found before and its counters; None when there is none or the file is damaged (it is then written again)."""
    try:
        data = json.loads(place.read_text())
        return from_json(json.dumps(data["program"])), data["counters"]
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        return None


def write(place: Path, program: Program, counters: dict[str, Any]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"program": json.loads(to_json(program)), "counters": counters}))
    temporary.replace(place)
