"""Objects in processes of their own: call their methods, notice their death. Here on this machine, by forks of a warm template.

The template has imported everything a stage needs, so a stage that was killed is back within milliseconds instead of the seconds that
importing takes. SIGTERM means "this machine will be taken away": the process goes on and tells its owner.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any, Protocol

from wager.errors import UsageError, WagerError

PRELOAD = ["wager.cluster.deploy.warm", "wager.cluster.spotserve.context"]


class ProcessDied(WagerError):
    """The process behind a call is gone."""


class Host(Protocol):
    """An object in another process. `on_notice` is called, on any thread, when the process is told that it will be taken away."""

    pid: int
    on_notice: Callable[[], None]

    def call(self, method: str, *args: Any) -> Future: ...

    def kill(self) -> None: ...

    @property
    def alive(self) -> bool: ...


class Launcher(Protocol):
    """Starts hosts. host_address: where processes started by it can reach this one. beside: on the machine of that host. resource: on a
    machine that has this (Ray's custom resources)."""

    host_address: str

    def start(self, make: Callable[..., Any], *args: Any, beside: Any = None, resource: str | None = None) -> Host: ...

    def close(self) -> None: ...


class LocalHost:
    """See Host. The other end answers calls one after another."""

    def __init__(self, context: Any, make: Callable[..., Any], args: tuple):
        mine, theirs = context.Pipe()
        self._connection: Connection = mine
        self._process = context.Process(target=_answer, args=(theirs, make, args), daemon=True)
        self._process.start()
        theirs.close()
        self.pid: int = self._process.pid
        self.on_notice: Callable[[], None] = lambda: None
        self._waiting: dict[int, Future] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._dead = False
        threading.Thread(target=self._listen, daemon=True, name=f"host-{self.pid}").start()

    def call(self, method: str, *args: Any) -> Future:
        result: Future = Future()
        with self._lock:
            number = next(self._numbers)
            if not self._dead:
                self._waiting[number] = result
                try:
                    self._connection.send((number, method, args))
                    return result
                except OSError:
                    self._waiting.pop(number, None)
        result.set_exception(ProcessDied(f"process {self.pid} is gone"))
        return result

    def kill(self) -> None:
        self._process.kill()

    @property
    def alive(self) -> bool:
        return not self._dead and self._process.is_alive()

    def _listen(self) -> None:
        try:
            while True:
                number, ok, value = self._connection.recv()
                if number is None:
                    self.on_notice()
                    continue
                with self._lock:
                    result = self._waiting.pop(number)
                result.set_result(value) if ok else result.set_exception(WagerError(value))
        except (EOFError, OSError):
            with self._lock:
                self._dead, waiting = True, list(self._waiting.values())
                self._waiting.clear()
            for result in waiting:
                result.set_exception(ProcessDied(f"process {self.pid} is gone"))


class LocalLauncher:
    """Processes on this machine. warm: forks of a template; else fresh interpreters, as a supervisor that restarts a program starts them."""

    host_address = "127.0.0.1"

    def __init__(self, warm: bool = True):
        self._context: Any = multiprocessing.get_context("forkserver" if warm else "spawn")
        if warm:
            self._context.set_forkserver_preload(PRELOAD)
        self._hosts: list[LocalHost] = []

    def start(self, make: Callable[..., Any], *args: Any, beside: Any = None, resource: str | None = None) -> LocalHost:
        if resource is not None:
            raise UsageError(
                f"resource = {resource!r} names a machine of a Ray cluster; deploy with --launcher ray, or drop it"
            )
        host = LocalHost(self._context, make, args)
        self._hosts = [h for h in self._hosts if h.alive] + [host]
        return host

    def close(self) -> None:
        for host in self._hosts:
            host.kill()
        for host in self._hosts:
            host._process.join()
        self._hosts = []


def _answer(connection: Connection, make: Callable[..., Any], args: tuple) -> None:
    """The other process: make the object, answer calls until the owner is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's to handle
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    lock = threading.Lock()

    def say(*message: Any) -> None:
        with lock:
            connection.send(message)

    def pass_notices_on() -> None:
        while True:
            signal.sigwait({signal.SIGTERM})
            say(None, True, None)

    threading.Thread(target=pass_notices_on, daemon=True).start()
    made = make(*args)
    try:
        while True:
            number, method, given = connection.recv()
            try:
                say(number, True, getattr(made, method)(*given))
            except Exception as error:
                say(number, False, f"{type(error).__name__}: {error}")
    except (EOFError, OSError):
        close = getattr(made, "close", None)
        if close is not None:
            close()
        os._exit(0)
