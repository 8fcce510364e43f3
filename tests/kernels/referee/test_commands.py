"""The commands, the search loop and the engine swap."""

import json
import random
from pathlib import Path

import pytest
import torch

from wager.cli import main
from wager.errors import UsageError
from wager.kernels import reference, registry
from wager.kernels.referee import injection
from wager.kernels.referee.architectures import architecture
from wager.kernels.referee.capture import capture, select
from wager.kernels.referee.judge import Options, Status
from wager.kernels.referee.search import CHOICES, Mutation, report, search

NATIVE = Path(registry.__file__).parent / "referee" / "candidates" / "native.py"
needs_native = pytest.mark.skipif(registry.choice().form != "native", reason="native kernels cannot be built here")


def wager(*arguments):
    """The exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main(["kernels", *arguments])
    return ended.value.code


@needs_native
def test_our_own_kernels_are_accepted(tmp_path, capsys):
    assert wager("capture", str(tmp_path / "c.json"), "--architecture", "llama", "--architecture", "gemma4") == 0
    arguments = [
        "judge",
        str(NATIVE),
        "--capture",
        str(tmp_path / "c.json"),
        "--max-shapes",
        "2",
        "--iterations",
        "2",
        "--rounds",
        "1",
    ]
    assert wager(*arguments, "--output-json", str(tmp_path / "v.json")) == 0
    verdicts = json.loads((tmp_path / "v.json").read_text())["verdicts"]
    assert {v["operator"] for v in verdicts} == {"Linear", "RMSNorm", "SiluAndMul", "GeluAndMul", "RotaryEmbedding"}
    assert all(v["status"] == "PASSED" and v["speedup"] > 0 for v in verdicts), verdicts


def test_a_failing_candidate_exits_1(tmp_path, capsys):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import torch\nfrom torch import nn\nclass ReLU(nn.Module):\n    def forward(self, x):\n        return x + 1\n"
    )
    assert wager("judge", str(bad), "--max-shapes", "1", "--iterations", "2", "--rounds", "1") == 1
    assert "INCORRECT_NUMERICAL" in capsys.readouterr().out


def test_bad_requests(tmp_path, capsys):
    for arguments, words in (
        (["judge", "--operator", "Lineer"], "Lineer"),
        (["judge", str(tmp_path / "none.py")], "cannot be read"),
    ):
        assert wager(*arguments) == 2 and words in capsys.readouterr().err


@needs_native
def test_search_tries_different_constants(tmp_path):
    cases = select(capture(architecture("llama")), "Linear", 1)
    options = Options(iterations=2, rounds=1, warmup=1, flush_bytes=1 << 20, timeout_s=120)
    found = search("Linear", Mutation(random.Random(1), 2), *cases, tmp_path, options)
    assert len({a.source for a in found}) == 2 and len(list(tmp_path.glob("*.py"))) == 2
    assert all(a.verdict.status is Status.PASSED for a in found), [report(a) for a in found]
    assert "x the baseline" in report(found[0])


def test_mutation_ends_when_all_is_tried():
    total = 1
    for values in CHOICES.values():
        total *= len(values)
    driver, made = Mutation(random.Random(0), 10**6), []
    while (source := driver.propose([])) is not None:
        made.append(source)
    assert len(made) == len(set(made)) == total


def test_injection_replaces_and_only_what_it_defines(tmp_path, monkeypatch):
    path = tmp_path / "candidate.py"
    path.write_text(
        "from torch import nn\nclass SiluAndMul(nn.Module):\n    def forward(self, x):\n        return x[..., ::2] * 0 + 5\n"
    )
    monkeypatch.setenv(injection.VARIABLE, str(path))
    table = dict(vars(registry))
    injection.install(table)
    assert injection.active == ["SiluAndMul"]
    assert (table["silu_mul"](torch.ones(2, 8)) == 5).all() and table["rms_norm"] is registry.rms_norm
    x, weight = torch.randn(3, 16), torch.randn(32, 16)
    assert (table["pack_linear"](weight).gated(x, "silu") == 5).all(), "the fused gate steps aside"
    torch.testing.assert_close(table["pack_linear"](weight)(x), reference.linear(x, weight), atol=1e-5, rtol=1e-5)
    assert table["block_input"]() is None
    assert registry.silu_mul is not table["silu_mul"], "the registry of this process is as it was"
    path.write_text("x = 1\n")
    with pytest.raises(UsageError, match="defines none"):
        injection.install(table)
