"""The same objects as actors of a Ray cluster, on whichever node has room, or on a named one."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from wager.cluster.deploy.process import ProcessDied
from wager.errors import UsageError, WagerError


def require_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UsageError(
            "running a plan on Ray needs Ray, which is not installed: pip install 'wager[deploy]', "
            "or run the plan on this machine alone with --launcher local"
        ) from None
    return ray


class RayActor:
    """Lives in the actor's process."""

    def __init__(self, make: Callable[..., Any], args: tuple):
        self.made = make(*args)

    def where(self) -> tuple[int, str]:
        import ray

        return os.getpid(), ray.get_runtime_context().get_node_id()

    def call(self, method: str, args: tuple) -> tuple[bool, Any]:
        try:
            return True, getattr(self.made, method)(*args)
        except Exception as error:
            return False, f"{type(error).__name__}: {error}"


class RayHost:
    """See wager.cluster.deploy.process.Host. Ray has no notices of its own here: the deployment's owner passes them on."""

    def __init__(self, ray: Any, make: Callable[..., Any], args: tuple, options: dict[str, Any]):
        self._ray = ray
        self._actor = ray.remote(RayActor).options(max_restarts=0, **options).remote(make, args)
        self.on_notice: Callable[[], None] = lambda: None
        self._dead = False
        self.pid: int
        self.node_id: str
        self.pid, self.node_id = ray.get(self._actor.where.remote())

    def call(self, method: str, *args: Any) -> Future:
        result: Future = Future()

        def finish(done: Future) -> None:
            error = done.exception()
            if error is not None:
                self._dead = True
                result.set_exception(
                    ProcessDied(f"the actor of process {self.pid} is gone: {str(error).splitlines()[0]}")
                )
                return
            ok, value = done.result()
            result.set_result(value) if ok else result.set_exception(WagerError(value))

        self._actor.call.remote(method, args).future().add_done_callback(finish)
        return result

    def kill(self) -> None:
        self._dead = True
        self._ray.kill(self._actor)

    @property
    def alive(self) -> bool:
        return not self._dead


class RayLauncher:
    """Actors of the cluster at `address` ("auto" finds one that runs; None starts one on this machine). cpus: that one stage reserves."""

    def __init__(self, address: str | None = None, cpus: float = 0.0):
        self._ray = require_ray()
        self._started = not self._ray.is_initialized()
        self.cpus = cpus
        if self._started:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # Ray's workers have the lowest priority but a few unless told: a stage would starve beside anything else on its machine
            os.environ.setdefault("RAY_worker_niceness", "0")
            try:
                options: dict[str, Any] = {"include_dashboard": False} if address is None else {}
                self._ray.init(
                    address=address, log_to_driver=False, logging_level="error", configure_logging=False, **options
                )
            except Exception as error:
                raise WagerError(
                    f"no Ray cluster at {address or 'this machine'}: {str(error).splitlines()[0]}; start one with `ray start --head`, "
                    "or use --launcher local"
                ) from None
        self.host_address: str = self._ray.util.get_node_ip_address()
        self._hosts: list[RayHost] = []

    def start(self, make: Callable[..., Any], *args: Any, beside: Any = None, resource: str | None = None) -> RayHost:
        options: dict[str, Any] = {"num_cpus": self.cpus}
        if beside is not None:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(beside.node_id, soft=False)
        elif resource is not None:
            options["resources"] = {resource: 0.001}
        host = RayHost(self._ray, make, args, options)
        self._hosts.append(host)
        return host

    def close(self) -> None:
        for host in self._hosts:
            if host.alive:
                host.kill()
        self._hosts = []
        if self._started:
            self._ray.shutdown()
