"""`wager deploy plan.toml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wager.errors import UsageError

app = typer.Typer(add_completion=False)


@app.callback()
def _group() -> None: ...


@app.command()
def deploy(
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="a plan in TOML: one [[node]] per stage, and a [deploy] section")
    ],
    launcher: Annotated[str, typer.Option(help="ray (a cluster) or local (processes of this machine)")] = "ray",
    address: Annotated[
        str | None, typer.Option(help="ray: of a running cluster, e.g. auto; left out, one starts here")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free port")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(help="accepted bearer key; may be repeated; also WAGER_API_KEY")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="the name clients use")] = None,
    drain: Annotated[float, typer.Option(help="seconds that running requests get after SIGTERM")] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
    check: Annotated[bool, typer.Option(help="say what would run, and leave")] = False,
) -> None:
    """Run PLAN: its stages in processes, a router with the OpenAI API in front."""
    import os

    from wager.cluster.deploy.plan import read

    if launcher not in ("ray", "local"):
        raise UsageError(f"launcher {launcher!r} is unknown; use ray or local")
    loaded = read(plan)
    for line in describe(loaded):
        print(line, flush=True)
    if check:
        return
    if launcher == "ray":
        from wager.cluster.deploy.ray_process import require_ray

        require_ray()
    from wager.serve.cli import listen
    from wager.serve.http.settings import ServerSettings

    keys = tuple(api_key or ()) or tuple(filter(None, [os.environ.get("WAGER_API_KEY")]))

    def load(metrics: Any) -> Any:
        from wager.cluster.deploy.run import start

        return start(loaded, make_launcher(launcher, address), served_model_name, [metrics])

    def announce(llm: Any) -> str:
        return f"ready: {llm.served_name}, {len(loaded.replicas)} replicas, context {llm.max_model_len} tokens"

    listen(load, announce, loaded.checkpoint, ServerSettings(api_keys=keys, drain_s=drain), host, port, log_level)


def make_launcher(kind: str, address: str | None) -> Any:
    if kind == "ray":
        from wager.cluster.deploy.ray_process import RayLauncher

        return RayLauncher(address)
    from wager.cluster.deploy.process import LocalLauncher

    return LocalLauncher()


def describe(plan: Any) -> list[str]:
    lines = []
    for replica in plan.replicas:
        stages = " -> ".join(f"{s.node} [{s.first}, {s.last})" for s in replica.stages)
        lines.append(f"replica {replica.name} (weight {replica.weight:g}): {stages}")
    if plan.idle:
        lines.append(f"idle, no pipeline needs them: {', '.join(plan.idle)}")
    return lines
