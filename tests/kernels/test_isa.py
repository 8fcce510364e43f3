"""The same tests on what other processors would run: the kernels compiled for older instruction sets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wager.errors import UsageError
from wager.kernels import native
from wager.kernels.registry import choice
from wager.native import build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.skipif(choice().form != "native", reason="native kernels cannot be built here")
@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "baseline"])
def test_kernels_of_other_instruction_sets(isa):
    if not build.runs_here(isa):
        pytest.skip(f"this processor does not run {isa}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
         "--override-ini=addopts=--import-mode=importlib", str(HERE / "test_native.py"), str(HERE / "test_quantized.py")],
        env={**os.environ, "WAGER_ISA": isa, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("WAGER_ISA", "sse9")
    with pytest.raises(UsageError, match="sse9.*avx2"):
        native.march()
