"""The front door: light, complete, and honest about errors."""

import importlib
import os
import subprocess
import sys

import pytest
import typer

from wager import cli
from wager.errors import CheckpointError, UsageError


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "wager", *args], capture_output=True, text=True, timeout=600)


def test_help_lists_every_command_without_importing_one():
    code = (
        "import sys; from wager.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print('heavy:', [m for m in ('torch', 'numpy', 'fastapi', 'wager.serve', 'wager.systems') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600).stdout
    assert all(name in out for name in cli.COMMANDS)
    assert out.rstrip().endswith("heavy: []")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_mounted_command_loads_and_describes_itself(name):
    command = cli.load(cli.COMMANDS[name])
    assert command.help, f"`wager {name} --help` says nothing"


def test_piped_tables_are_wider_than_a_small_terminal_unless_told_otherwise():
    def widest(columns: str | None) -> int:
        environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | (
            {"COLUMNS": columns} if columns else {}
        )
        command = [sys.executable, "-m", "wager", "systems", "--help"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        return max(map(len, printed.splitlines()))

    assert widest(None) == 120 and widest("90") == 90


def test_version_is_the_package_version():
    import wager

    assert run("--version").stdout.strip() == f"wager {wager.__version__}"


def test_unknown_command_is_a_usage_error():
    result = run("srve")
    assert result.returncode == 2
    assert "srve" in result.stderr


@pytest.mark.parametrize(
    "error, status, said",
    [
        (UsageError("bad\nvalue 7"), 2, "bad value 7"),
        (CheckpointError("no tensor x"), 1, "no tensor x"),
        (FileNotFoundError(2, "No such file or directory", "links.csv"), 1, "links.csv: No such file or directory"),
    ],
)
def test_errors_are_one_line_and_show_a_traceback_only_on_request(monkeypatch, capsys, error, status, said):
    def fail():
        raise error

    sub = typer.Typer()
    sub.command("systems")(fail)
    sub.callback()(lambda: None)
    monkeypatch.setattr(importlib.import_module("wager.systems"), "app", sub)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["systems"])
    assert exit_.value.code == status
    err = capsys.readouterr().err
    assert err == f"wager: error: {said}\n"
    with pytest.raises(type(error)):
        cli.main(["systems", "--debug"])


def test_debug_after_a_double_dash_belongs_to_the_command():
    assert cli.take_debug(["generate", "--debug", "--", "--debug"]) == (["generate", "--", "--debug"], True)
    assert cli.take_debug(["generate", "--", "--debug"]) == (["generate", "--", "--debug"], False)


def test_lazy_public_face():
    code = (
        "import sys, wager\nassert 'torch' not in sys.modules\n"
        "from wager import SamplingParams\nassert SamplingParams(max_tokens=3).max_tokens == 3\n"
        "assert 'torch' not in sys.modules\n"
        "try: wager.nothing\nexcept AttributeError as e: print(e)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert "nothing" in result.stdout, result.stderr
