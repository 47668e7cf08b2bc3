"""What all tests share: one thread, fixed seeds, real data where there is some, and both stages in tiny."""

import contextlib
import io
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle import pipeline
from dalle.model import DALLE, DALLEConfig
from dalle.native import attend
from dalle.prepare import Prepared, prepare, vocab
from dvae import scenes
from dvae.data import open_source
from dvae.model import DVAE, DVAEConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _as_if_in_front():
    """One thread, and a Ctrl-C that is heard, which shells take from what they start in the background.

    That there is no C compiler is told here, once, and not inside of a test."""
    torch.set_num_threads(1)
    attend()
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


TINY_DVAE = DVAEConfig(
    image_size=32, vocab_size=16, hidden=8, groups=2, blocks=1, bottleneck=2, code_width=8, kernel=6, patch=4
)


@pytest.fixture(scope="session")
def tiny_dvae(tmp_path_factory) -> Path:
    """The artefact of an untrained image tokenizer: 32 x 32 pixels, 4 x 4 cells, 16 codes, many of them in use."""
    folder = tmp_path_factory.mktemp("dvae")
    torch.manual_seed(1)
    model = DVAE(TINY_DVAE)
    with torch.no_grad():  # level the codes, for one of an untrained encoder would win everywhere
        logits = model.logits(open_source("scenes:train:64", 32).images(range(64)).float() / 255)
        model.encoder.output.bias -= logits.mean((0, 2, 3))
    model.save(folder / "model", {"step": 0})
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_tokens(tmp_path_factory, tiny_dvae) -> Path:
    """What `prepare` makes of 64 scenes, 8 of another split to validate on, and a vocabulary of 300 ids."""
    folder = tmp_path_factory.mktemp("tokens")
    with contextlib.redirect_stdout(io.StringIO()):
        vocab("scenes:train:64", str(folder / "text.json"), size=300, length=16)
        out = folder / "prepared"
        prepare("scenes:train:64", str(tiny_dvae), str(folder / "text.json"), str(out), val="scenes:val:8")
    return out


@pytest.fixture(scope="session")
def tiny_dalle(tmp_path_factory, tiny_tokens) -> Path:
    """A run folder of an untrained transformer with all that drawing needs: one block, 32 wide."""
    run = tmp_path_factory.mktemp("dalle")
    prepared = Prepared(tiny_tokens)
    s = prepared.sizes
    torch.manual_seed(2)
    model = DALLE(DALLEConfig(s.vocab_text, s.text_length, s.vocab_image, s.grid, depth=1, width=32, heads=2))
    captions = [caption for index in range(32) for caption in scenes.captions("train", index)]
    pipeline.save(run / "model", model, prepared.text, captions, prepared.dvae, {"step": 0})
    return run
