"""Start `wager serve` for a benchmark, watch it, and stop it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil

START_LIMIT_S = 300.0


class Server:
    """A server process on a free port of this machine; use as a context manager."""

    def __init__(self, model: str, options: Sequence[str] = (), log: Path | None = None):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "wager", "serve", model, "--port", str(self.port), *options]
        self._log = (log or Path("/dev/null")).open("w")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def wait_until_ready(self) -> float:
        """Seconds until /health answered 200. Raises RuntimeError when the server ends or takes too long."""
        begin = time.monotonic()
        while time.monotonic() - begin < START_LIMIT_S:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self._process.returncode}; see {self._log.name}")
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return time.monotonic() - begin
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"the server was not ready after {START_LIMIT_S:.0f} s; see {self._log.name}")

    def rss_bytes(self) -> int:
        """Resident memory of the server and its children."""
        root = psutil.Process(self._process.pid)
        return sum(p.memory_info().rss for p in (root, *root.children(recursive=True)))

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics without its labels and prefix ("num_requests_running"); samples that share a name are added up."""
        found: dict[str, float] = {}
        for line in httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines():
            match = re.match(r"(?:\w+:)?(\w+)(?:\{.*\})? (\S+)$", line)
            if match:
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
        return found

    def stop(self) -> int:
        """Ask it to drain and end; its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()
        return self._process.returncode

    def __enter__(self) -> Server:
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
