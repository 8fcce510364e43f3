"""Engines in processes of their own, driven by JSON lines, so that two engines of two environments alternate within one run.

The parent starts `PYTHON worker_script.py`, sends `{"op": name, ...arguments}` on a line and reads `{"ok": true, "value": ...}` or
`{"ok": false, "error": text}` back. The script calls `serve({"op name": function})`. While a worker is not being asked it is stopped
(SIGSTOP on its process group), so that an idle engine's spinning threads cannot disturb the one that is measured.

Only the standard library is used here: worker scripts import this file from environments that hold nothing of ours.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerError(RuntimeError):
    """The worker died, or its function raised; the message carries the worker's own."""


class Worker:
    """A worker process. `call` asks for one operation; use as a context manager so that it is ended."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        pause_when_idle: bool = True,
    ):
        self.command = list(command)
        self.pause_when_idle = pause_when_idle
        self._log = log.open("w") if log else None
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )

    def call(self, op: str, **arguments: Any) -> Any:
        """The value that operation `op` returns. Raises WorkerError."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        self._signal(signal.SIGCONT)
        try:
            stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise WorkerError(f"worker {self.command[:2]} ended with status {status} during {op!r}")
        reply = json.loads(line)
        if self.pause_when_idle:
            self._signal(signal.SIGSTOP)
        if not reply["ok"]:
            raise WorkerError(f"worker {self.command[:2]} failed in {op!r}: {reply['error']}")
        return reply["value"]

    def close(self) -> None:
        """End the worker: its input is closed, and after a while it is killed with everything it started."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            pass
        self._signal(signal.SIGKILL)
        self._process.wait()
        if self._log:
            self._log.close()

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def serve(operations: Mapping[str, Callable[..., Any]]) -> None:
    """The worker's side: answer requests from stdin until it closes. Whatever the engine prints goes to stderr, not into the protocol."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        try:
            reply = {"ok": True, "value": operations[op](**request)}
        except Exception as error:
            traceback.print_exc()
            reply = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
