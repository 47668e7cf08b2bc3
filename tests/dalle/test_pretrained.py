"""The model that comes with the project: whole, small, found by its name, good; and a diagnosis of it, well and broken.

Its own pictures of captions that it knows are the data here, for the project carries no others.
"""

from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from dalle import pipeline
from dalle.__main__ import main
from dalle.diagnose import DATA, SAMPLING, STAGE_1, STAGE_2, Case, Side, _ask_data, examine, verdict
from dalle.model import DALLE
from dvae import artefact
from dvae.__main__ import main as dvae_main
from dvae.images import open_image
from dvae.tokenizer import load

NAME, PICTURES = "emoji", 200
SETTINGS = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance": 1.0}


@pytest.fixture(scope="module")
def drawer() -> pipeline.Pipeline:
    return pipeline.load(NAME)


@pytest.fixture(scope="module")
def case(drawer) -> Case:
    """A healthy case: pictures of different captions of its training, drawn at a low temperature."""
    captions = drawer.captions[:PICTURES]
    assert len(set(captions)) == PICTURES
    tokens = drawer.sample(captions, 1, temperature=0.5).tokens
    with torch.inference_mode():
        images = torch.cat([drawer.tokenizer.decode(some) for some in tokens.split(32)])
    # its own pictures come back exactly, which no real ones do
    images = (images + 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    half = PICTURES // 2
    sides = (Side(images[:half], captions[:half], 3180), Side(images[half:], captions[half:], 123))
    return Case(NAME, drawer.tokenizer, drawer, *sides, 0.0, False, None, np.zeros(0), SETTINGS, 0)


def first(case: Case) -> str | None:
    return verdict(examine(case)[0])[0]


def first_of_data(case: Case, **changed) -> str | None:
    return verdict(list(_ask_data(case._replace(train=case.train._replace(**changed)))))[0]


def first_of_stage_1(case: Case, tokenizer: nn.Module) -> str | None:
    return first(case._replace(tokenizer=tokenizer, drawer=None))


def with_model(case: Case, model: nn.Module | None = None, tokenizer: nn.Module | None = None) -> Case:
    tokenizer = tokenizer or case.tokenizer
    drawer = pipeline.Pipeline(
        model or case.drawer.model, case.drawer.text, tokenizer, case.drawer.captions, case.drawer.source
    )
    return case._replace(tokenizer=tokenizer, drawer=drawer)


def test_it_is_found_by_its_name_for_either_stage(drawer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert artefact.pretrained() == [NAME]
    assert artefact.digest(artefact.find(NAME, "dvae")) == artefact.digest(
        artefact.load(artefact.find(NAME, "dalle"), "dalle").parts["dvae"]
    )
    assert load(NAME).config == drawer.tokenizer.config
    (tmp_path / NAME).mkdir()  # a folder of that name that holds no model is not in the way
    assert artefact.find(NAME, "dalle") == artefact.PRETRAINED / NAME
    with pytest.raises(artefact.ArtefactError) as caught:
        artefact.find("emojis", "dalle")
    assert "a model that comes with the project: emoji" in caught.value.hint


def test_it_draws_right_after_the_install(tmp_path):
    out = tmp_path / "samples"
    assert main(["sample", NAME, "woman scientist medium skin tone", "--count", "2", "--out", str(out)]) == 0
    assert open_image(out / "woman-scientist-medium-skin-tone-seed0-1.png").shape == (3, 64, 64)


def test_stage_1_is_reached_by_the_same_name(tmp_path):
    assert dvae_main(["codebook", NAME, "scenes:val:8", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "codebook.json").is_file()


def test_it_says_where_it_comes_from():
    card = (artefact.PRETRAINED / NAME / "README.md").read_text()
    for word in ("SIL OFL 1.1", "## Data", "## Licence", "## Recipe", "## Results", "## Limits"):
        assert word in card


def test_the_healthy_model_raises_no_alarm(case):
    assert first(case._replace(updates=20, settings=SETTINGS | {"temperature": 0.7, "guidance": 1.5})) is None


def test_faults_of_the_data(case):
    captions = case.train.captions
    assert first_of_data(case) is None
    assert first_of_data(case, captions=captions[7:] + captions[:7]) == DATA
    assert first_of_data(case, captions=["the same"] * len(captions)) == DATA
    assert first_of_data(case, captions=[caption + " and so on" * 12 for caption in captions]) == DATA
    assert first_of_data(case, images=case.train.images / 255) == DATA
    assert first_of_data(case, total=40) == DATA
    assert first_of_data(case._replace(copies=0.9)) == DATA


class Broken(nn.Module):
    """A tokenizer whose pictures or codes are changed by a function on their way."""

    def __init__(self, tokenizer, see=lambda images: images, paint=lambda images: images, say=lambda logits: logits):
        super().__init__()
        self.config, self.grid, self.vocab_size = tokenizer.config, tokenizer.grid, tokenizer.vocab_size
        self.logits = lambda images: say(tokenizer.logits(see(images)))
        self.decode = lambda tokens: paint(tokenizer.decode(tokens))
        self.decode_soft = lambda probabilities: paint(tokenizer.decode_soft(probabilities))


def test_faults_of_stage_1(case):
    tokenizer = case.tokenizer
    some = torch.full((tokenizer.vocab_size, 1, 1), -1e4)
    some[:5] = 0  # all but five codes are never chosen
    faults = {
        "collapsed": Broken(tokenizer, say=lambda logits: logits + some),
        "range": Broken(tokenizer, see=lambda images: 2 * images - 1),
        "faded": Broken(tokenizer, paint=lambda images: 0.5 * images),
    }
    assert first_of_stage_1(case, tokenizer) is None
    for name, broken in faults.items():
        assert first_of_stage_1(case, broken) == STAGE_1, name


def test_faults_of_stage_2(case):
    torch.manual_seed(0)
    untrained = DALLE(case.drawer.model.config).eval().requires_grad_(False)
    assert first(with_model(case, untrained)) == STAGE_2
    order = torch.randperm(case.tokenizer.vocab_size, generator=torch.Generator().manual_seed(0))
    other = Broken(case.tokenizer, say=lambda logits: logits[:, order])  # the same pictures by other numbers
    other.decode = lambda tokens: case.tokenizer.decode(order[tokens])
    other.decode_soft = lambda probabilities: case.tokenizer.decode_soft(probabilities[:, order.argsort()])
    assert first(with_model(case, tokenizer=other)) == STAGE_2


def test_faults_of_sampling(case):
    for wrong in ({"temperature": 3.0}, {"guidance": 15.0}):
        assert first(case._replace(settings=SETTINGS | wrong)) == SAMPLING, wrong
    right = DALLE.step

    def forgetful(self, tokens, cell, cache):
        """The state before this one is forgotten by the first head."""
        logits = right(self, tokens, cell, cache)
        cache.stored[:, 0, :, 0, cache.length - 1] = 0
        return logits

    with mock.patch.object(DALLE, "step", forgetful):
        assert first(case) == SAMPLING
