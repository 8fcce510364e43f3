"""Published graphs and derivations where this machine has them: WAGER_DATA names the folder that holds `compilers/`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def compilers_data() -> Path:
    root = os.environ.get("WAGER_DATA")
    if not root or not (Path(root) / "compilers").is_dir():
        pytest.skip("WAGER_DATA does not name a folder with compilers/")
    return Path(root) / "compilers"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1234)
