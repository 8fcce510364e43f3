"""The front door: `wager COMMAND`. Commands are listed here and imported only when one is run, so `wager --help` stays light."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from wager.errors import UsageError, WagerError


@dataclass(frozen=True)
class Mount:
    """A command and where it lives: `target` is "module:app" for a whole Typer app, "module:app:command" for one of its commands."""

    target: str
    help: str
    panel: str


PIPED_COLUMNS = "120"  # width of tables in files and pipes, which have none of their own
SERVE, COMPILE, DETECT, LOOK = "Serve", "Compile", "Detect", "Look around"

COMMANDS = {
    "serve": Mount("wager.serve.cli:app:serve", "Serve a model over the OpenAI API, with a chat page at /.", SERVE),
    "chat": Mount("wager.serve.cli:app:chat", "Chat with a model in the terminal.", SERVE),
    "generate": Mount("wager.serve.cli:app:generate", "Complete prompts and print the text.", SERVE),
    "bench": Mount("wager.serve.bench.cli:app", "Measure a server (serve) or the engine (latency, throughput).", SERVE),
    "plan": Mount("wager.cluster.cli:app:plan", "Plan where a model's layers go, or which machines to rent.", SERVE),
    "simulate": Mount("wager.cluster.cli:app:simulate", "Serve a trace on a plan under a virtual clock.", SERVE),
    "deploy": Mount(
        "wager.cluster.deploy.cli:app:deploy", "Run a plan: stages in processes, an OpenAI API in front.", SERVE
    ),
    "cluster": Mount("wager.cluster.cli:app", "Plan, price and simulate serving on many machines.", SERVE),
    "speculate": Mount(
        "wager.serve.speculate.cli:app",
        "Measure and plan speculative decoding: profile, acceptance, plan, replay.",
        SERVE,
    ),
    "compile": Mount("wager.compile.cli:app", "Make tensor programs faster, with a proof.", COMPILE),
    "detect": Mount("wager.detect.cli:app", "Find outliers in tables (TOD) and graphs (BOND).", DETECT),
    "doctor": Mount(
        "wager.doctor:app:doctor", "Say what this installation has, lacks, and why it is as fast as it is.", LOOK
    ),
    "build-kernels": Mount(
        "wager.build_kernels:app:build-kernels",
        "Compile every C++ unit now, for this machine or a named instruction set.",
        LOOK,
    ),
    "hardware": Mount(
        "wager.hardware.measure:app:hardware", "Measure this machine: memory bandwidth, matrix peaks, the ridge.", LOOK
    ),
    "kernels": Mount(
        "wager.kernels.referee.cli:app", "Referee kernels: capture what models call, judge candidates, search.", LOOK
    ),
    "features": Mount(
        "wager.serve.features:app:features", "List what the engine can do, exact or approximate, and its tests.", LOOK
    ),
    "systems": Mount(
        "wager.systems:app:systems", "List the research systems, what they do, and what was measured.", LOOK
    ),
}


class FrontDoor(TyperGroup):
    """Shows every mounted command in the help from this table alone and imports the one that is run."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        mount = COMMANDS.get(cmd_name)
        if mount is None:
            return None
        return TyperCommand(cmd_name, help=mount.help, rich_help_panel=mount.panel, callback=lambda: None)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(COMMANDS[name]) if command is not None and name else command, rest


def load(mount: Mount) -> Any:
    """The command behind a mount, imported now."""
    module, app_name, *command = mount.target.split(":")
    app = getattr(importlib.import_module(module), app_name)
    group = typer.main.get_group(app)
    return group.commands[command[0]] if command else group


app = typer.Typer(
    name="wager",
    cls=FrontDoor,
    help="Bet cheaply, verify exactly: an LLM serving engine and the systems around it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def front_door(
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error (may stand anywhere)."),
) -> None:
    if version:
        from wager import __version__

        print(f"wager {__version__}")
        raise typer.Exit()


def main(argv: list[str] | None = None) -> None:
    """Run one command. A WagerError becomes one line: exit 2 for a UsageError, 1 for any other; so does a file that cannot be opened.
    --debug shows the traceback."""
    args, debug = take_debug(sys.argv[1:] if argv is None else argv)
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", PIPED_COLUMNS)
    try:
        app(args=args, prog_name="wager")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `wager ... | head`: the reader has seen enough
        sys.stderr.close()
        sys.exit(0)
    except (WagerError, OSError) as error:
        said = in_one_line(error)
        if debug or said is None:
            raise
        print(f"wager: error: {said}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def in_one_line(error: WagerError | OSError) -> str | None:
    """What went wrong. None for a system's error that names no file: that one is a fault of ours and needs its traceback."""
    if isinstance(error, OSError):
        return None if error.filename is None else f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def take_debug(args: list[str]) -> tuple[list[str], bool]:
    """Remove --debug from before a bare `--`; whether it was there."""
    end = args.index("--") if "--" in args else len(args)
    kept = [a for a in args[:end] if a != "--debug"]
    return kept + args[end:], len(kept) < end
