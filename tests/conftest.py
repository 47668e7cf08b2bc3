"""What all tests share: one thread, fixed seeds, and real data where there is some."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> str:
    """A data source of real captioned pictures, as `open_source` understands it."""
    path = os.environ.get("DALLE_TEST_DATA") or str(ROOT.parent / "shared" / "data" / "noto-emoji")
    if not Path(path).exists():
        pytest.skip(f"there is no real data at {path}; name some captioned pictures in DALLE_TEST_DATA")
    return path
