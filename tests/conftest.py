"""What every test shares: the project on the path, one torch thread, and the shared data where there is some."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are small; threads only make them wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network


@pytest.fixture
def shared() -> Path:
    """Return the folder of shared test data, or skip: only a development checkout has it."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return folder
