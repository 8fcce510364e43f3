"""Searches as lists of independent units: run here or in worker processes, kept on disk as they finish, gone on with after a kill.

A unit is a picklable value with a number; its result is plain JSON. Results are handed on in the order of the units however many processes
work, so that a search finds the same with one worker, with several, and in two sittings. The journal is a text file with one finished unit a
line behind a heading that names the search; the last line may be torn by a kill and is then done again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from wager.errors import UsageError

AHEAD = 4  # units that wait for each worker
PATIENCE_S = 0.2  # between two looks at the clock while workers are busy


def fingerprint(*parts: Any) -> str:
    """A short name of a search: equal for equal settings."""
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=10).hexdigest()


class Journal:
    """Finished units on disk; without a path, in memory only."""

    def __init__(self, path: str | Path | None, key: str):
        """Raises UsageError when the file belongs to another search or is not a journal."""
        self.path, self.done = Path(path) if path else None, {}
        if self.path is None:
            return
        if self.path.exists() and self.path.stat().st_size:
            self._load(key)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"wager-search": key}) + "\n")

    def _load(self, key: str) -> None:
        assert self.path is not None
        lines = self.path.read_text().split("\n")
        try:
            found = json.loads(lines[0])["wager-search"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{self.path} is not the state of a search; name another file") from None
        if found != key:
            raise UsageError(
                f"{self.path} is the state of another search (program, limits or sizes differ); name another file"
            )
        whole = [lines[0]]
        for line in lines[1:]:
            try:
                unit, result = json.loads(line)
            except ValueError:
                break  # the kill came while this line was written
            self.done[unit] = result
            whole.append(line)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("\n".join(whole) + "\n")
        temporary.replace(self.path)

    def record(self, unit: int, result: Any) -> None:
        self.done[unit] = result
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps([unit, result]) + "\n")


def run(
    units: Iterable[Any],
    work: Callable[[Any], Any],
    journal: Journal,
    over: Callable[[], bool],
    workers: int = 1,
) -> Iterator[tuple[int, Any, Any]]:
    """(number, unit, result) in order. `work` returns None for a unit that it did not finish. Stops when `over()`.

    Raises UsageError for a number of workers below 1. `work` must be picklable when there are several.
    """
    if workers < 1:
        raise UsageError(f"workers is {workers}; at least 1 process has to search")
    numbered = enumerate(units)
    if workers == 1:
        for number, unit in numbered:
            if number not in journal.done:
                if over() or (result := work(unit)) is None:
                    return
                journal.record(number, result)
            yield number, unit, journal.done[number]
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield from _in_pool(numbered, work, journal, over, pool, workers)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_pool(
    numbered: Iterator[tuple[int, Any]],
    work: Callable[[Any], Any],
    journal: Journal,
    over: Callable[[], bool],
    pool: ProcessPoolExecutor,
    workers: int,
) -> Iterator[tuple[int, Any, Any]]:
    waiting: dict[int, tuple[Any, Future | None]] = {}
    turn, exhausted = 0, False
    while not over():
        while not exhausted and len(waiting) < workers * AHEAD:
            try:
                number, unit = next(numbered)
            except StopIteration:
                exhausted = True
                break
            waiting[number] = (unit, None if number in journal.done else pool.submit(work, unit))
        if not waiting:
            return
        busy = [f for _, f in waiting.values() if f is not None and not f.done()]
        if busy and (first := waiting[turn][1]) is not None and not first.done():
            wait(busy, timeout=PATIENCE_S, return_when=FIRST_COMPLETED)
        while turn in waiting:
            unit, future = waiting[turn]
            if future is not None:
                if not future.done():
                    break
                result = future.result()
                if result is None:
                    return
                journal.record(turn, result)
            yield turn, unit, journal.done[turn]
            del waiting[turn]
            turn += 1
