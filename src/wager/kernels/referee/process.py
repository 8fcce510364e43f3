"""The judge's end of a worker: requests with a deadline, and a clock of its own beside the worker's.

Workers are forked from a server process that has imported torch once and nothing of any candidate.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

from wager.kernels.referee import worker

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["wager.kernels.referee.worker"])


class WorkerFailed(Exception):
    """The worker reported an error, fell silent, or ended."""


class Worker:
    """One operator in one process."""

    def __init__(self, timeout_s: float, threads: int, log: Path):
        self.timeout_s = timeout_s
        self._channel, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=worker.serve, args=(theirs, str(log), threads), daemon=True)
        self._process.start()
        theirs.close()
        self.window_s = 0.0  # between the last request's start and end events, by our clock

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Raises WorkerFailed with the worker's message."""
        deadline, marks = time.monotonic() + self.timeout_s, {}
        try:
            self._channel.send_bytes(json.dumps({"op": op, **arguments}).encode())
            while True:
                if not self._channel.poll(max(0.0, deadline - time.monotonic())):
                    self.close()
                    raise WorkerFailed(f"no answer within {self.timeout_s:g} s")
                reply = json.loads(self._channel.recv_bytes())
                if "event" not in reply:
                    break
                marks[reply["event"]] = time.perf_counter()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            raise WorkerFailed(f"the process ended with status {self._process.exitcode}") from None
        except ValueError:
            raise WorkerFailed("the answer is not JSON") from None
        self.window_s = marks.get("end", 0.0) - marks.get("start", 0.0)
        if not reply.get("ok"):
            raise WorkerFailed(str(reply.get("error")))
        return reply

    def close(self) -> None:
        """End the process and everything it started."""
        if self._process.pid is not None and self._process.is_alive():
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                self._process.kill()
        self._process.join(5)
        self._channel.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
