"""Where the published instances, profiles and traces lie, when they are on this machine: WAGER_DATA, or shared/data beside the checkout."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    beside = [parent / "shared" / "data" for parent in Path(__file__).resolve().parents]
    for folder in ([Path(os.environ["WAGER_DATA"])] if os.environ.get("WAGER_DATA") else []) + beside:
        if folder.is_dir():
            return folder
    pytest.skip("no data folder; set WAGER_DATA to check against the published instances")
