"""Row blocks to whoever can do them: this process, several processes, or the machines of a Ray cluster; finished blocks outlive a kill.

A block's result depends on its rows alone, so any number of workers, in any order, gives the same bits. Blocks are handed out one at a
time from a common queue. With a checkpoint folder each finished block is written (to a temporary name, then renamed) under a key over
the data and the question; a later run reads what is there and computes the rest.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from wager.detect.tod.batching import Execution
from wager.errors import UsageError

Block = tuple[int, int]
Result = tuple[np.ndarray, np.ndarray, dict[str, float]]


def run_blocks(
    searcher: Any, query_RD: np.ndarray | None, blocks: Sequence[Block], execution: Execution
) -> Iterator[tuple[Block, Result]]:
    """Every block with its result, in any order."""
    store = Store(execution.checkpoint, searcher, query_RD) if execution.checkpoint else None
    todo = []
    for block in blocks:
        kept = store.read(block) if store else None
        if kept is None:
            todo.append(block)
        else:
            yield block, kept
    for block, result in _compute(searcher, query_RD, todo, execution):
        if store:
            store.write(block, result)
        yield block, result


def _compute(
    searcher: Any, query_RD: np.ndarray | None, blocks: Sequence[Block], execution: Execution
) -> Iterable[tuple[Block, Result]]:
    if execution.ray_address is not None:
        return _on_ray(searcher, query_RD, blocks, execution.ray_address)
    if execution.workers > 1 and len(blocks) > 1:
        return _in_processes(searcher, query_RD, blocks, execution.workers)
    return ((block, searcher.block(query_RD, *block)) for block in blocks)


_task: tuple[Any, np.ndarray | None] | None = None


def _start(searcher: Any, query_RD: np.ndarray | None, threads: int) -> None:
    global _task
    os.environ["OMP_NUM_THREADS"] = str(threads)
    _task = (searcher, query_RD)


def _do(block: Block) -> Result:
    assert _task is not None
    searcher, query_RD = _task
    return searcher.block(query_RD, *block)


def _in_processes(
    searcher: Any, query_RD: np.ndarray | None, blocks: Sequence[Block], workers: int
) -> Iterator[tuple[Block, Result]]:
    from wager.detect.tod import native

    threads = max(1, native.threads() // workers)
    context = multiprocessing.get_context("spawn")  # a forked OpenMP runtime may hang
    with ProcessPoolExecutor(workers, context, _start, (searcher, query_RD, threads)) as pool:
        futures = {pool.submit(_do, block): block for block in blocks}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _on_ray(
    searcher: Any, query_RD: np.ndarray | None, blocks: Sequence[Block], address: str
) -> Iterator[tuple[Block, Result]]:
    """One task a block; the data travel once to each machine. A task whose worker dies is done again by Ray. address "local" starts a cluster
    of this machine's processors for the occasion; one that is already joined is used as it is."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError("ray_address needs Ray: pip install 'wager[deploy]'") from None
    joined = ray.is_initialized()
    if not joined:
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UsageError(f"no Ray cluster at {address!r} ({error}); start one with `ray start --head`") from None
    try:
        shared = ray.put((searcher, query_RD))

        @ray.remote
        def work(task: Any, block: Block) -> Result:
            return task[0].block(task[1], *block)

        waiting = {work.remote(shared, block): block for block in blocks}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(ready[0]), ray.get(ready[0])
    finally:
        if not joined:
            ray.shutdown()


class Store:
    """Finished blocks in a folder, one file each, named by what was asked and of which data."""

    def __init__(self, folder: str, searcher: Any, query_RD: np.ndarray | None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.blake2b(digest_size=12)
        for array in (searcher.base_ND, query_RD):
            digest.update(b"self" if array is None else repr(array.shape).encode())
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        self.key = f"{digest.hexdigest()}-k{searcher.k}"

    def path(self, block: Block) -> Path:
        return self.folder / f"{self.key}-{block[0]}-{block[1]}.npz"

    def read(self, block: Block) -> Result | None:
        path = self.path(block)
        if not path.exists():
            return None
        with np.load(path) as kept:
            return kept["distance"], kept["index"], {"resumed_rows": float(block[1] - block[0])}

    def write(self, block: Block, result: Result) -> None:
        path = self.path(block)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
        np.savez(temporary, distance=result[0], index=result[1])
        temporary.replace(path)
