"""Tests of Triton kernels run on a GPU where there is one, else in a process of their own under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INSIDE = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
PRESENT = importlib.util.find_spec("triton") is not None

inside = pytest.mark.skipif(not (INSIDE and PRESENT), reason="runs under Triton's interpreter or on a GPU")
"""Marks a test that launches kernels."""


def outside(test):
    """Marks the one test of a file that calls `run_inside`."""
    already = pytest.mark.skipif(INSIDE, reason="already inside the interpreter or on a GPU")
    return already(pytest.mark.skipif(not PRESENT, reason="triton is not installed")(test))


def run_inside(file: str, *options: str) -> None:
    """The file's tests under the interpreter; fails with what they print."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *options,
         "--override-ini=addopts=--import-mode=importlib", file],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
