"""Drawn pictures beside true and nearest ones: distances by brute force, and the files of the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dalle import compare, pipeline
from dalle.prepare import Prepared
from dvae.data import open_source
from dvae.errors import UserError


@pytest.fixture(scope="module")
def training():
    return open_source("scenes:train:60", 32)


def far(one, other):
    """The distance of two pictures by the words of the module: the root mean square of 16 x 16 pixels."""
    halves = [np.asarray(picture, np.float64).reshape(3, 16, 2, 16, 2).mean((2, 4)) / 255 for picture in (one, other)]
    return float(np.sqrt(np.square(halves[0] - halves[1]).mean()))


def test_measure_is_a_search_through_all(training, monkeypatch):
    monkeypatch.setattr(compare, "_BATCH", 7)
    drawn = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn[:3] = open_source("scenes:val:3", 32).images(range(3))
    own = open_source("scenes:val:9", 32).images(range(4, 9))
    nearest, distance, places = compare.measure(drawn, own, training)
    pictures = training.images(range(60))
    for k in range(5):
        every = [far(drawn[k], picture) for picture in pictures]
        assert nearest[k] == int(np.argmin(every))
        assert distance[k] == pytest.approx(min(every), abs=1e-6)
        assert places[k] == 1 + sum(d < far(drawn[k], own[k]) for d in every)
    assert len(set(places)) > 1


def test_a_copy_of_a_training_picture_is_found(training):
    drawn = training.images([17, 3])
    nearest, distance, places = compare.measure(drawn, drawn, training)
    assert (nearest, distance, places) == ([17, 3], [0.0, 0.0], [1, 1])
    other = training.images([3, 17])
    _, _, places = compare.measure(drawn, other, training)
    assert min(places) > 1, "the true one is the other one, and the copy stands before it"


def test_the_files_of_the_command(tiny_dalle, tmp_path, capsys):
    compare.compare(str(tiny_dalle), "scenes:train:40", str(tmp_path / "out"), count=3, candidates=2, val_share=0.3)
    said = capsys.readouterr()
    assert "have captions that this model was trained on" in said.err, "a share of what it knows is not held out"
    report = json.loads((tmp_path / "out" / "compared.json").read_text())
    for name in ("seen", "heldout"):
        picture = Image.open(tmp_path / "out" / f"{name}.png")
        assert picture.height > 3 * 96 and picture.width > 4 * 96
        rows = report[name]["rows"]
        assert len(rows) == 3 and len({row["caption"] for row in rows}) == 3
        assert report[name]["own_picture_first"] == pytest.approx(sum(row["place"] == 1 for row in rows) / 3)
        assert f"{name}: of 3 pictures" in said.out
    keys = {row["nearest"] for name in ("seen", "heldout") for row in report[name]["rows"]}
    assert keys <= {f"train-{index:06d}" for index in range(40)}
    other = tmp_path / "other"
    compare.compare(str(tiny_dalle), "scenes:train:40", str(other), val="scenes:val:9", count=2, candidates=2)
    assert "trained on" not in capsys.readouterr().err
    with pytest.raises(UserError, match="both set"):
        compare.compare(str(tiny_dalle), "scenes:train:40", str(tmp_path / "no"), val="scenes:val:9", hold_out=".*")
    with pytest.raises(UserError, match="not empty"):
        compare.compare(str(tiny_dalle), "scenes:train:40", str(tmp_path / "out"))


def test_the_split_is_that_of_prepare_unless_it_is_told(tiny_dalle, tiny_tokens, tmp_path):
    drawer, prepared = pipeline.load(tiny_dalle), Prepared(tiny_tokens)
    assert prepared.split["val"] == "scenes:val:8"
    about = {"split": {"val": None, "val_share": 0.05, "hold_out": ".*red.*"}}
    pipeline.save(tmp_path / "run", drawer.model, drawer.text, drawer.captions, prepared.dvae, about)
    for told, red in ({}, {True}), ({"hold_out": ".*blue.*"}, {True, False}):
        out = tmp_path / f"out-{len(told)}"
        compare.compare(str(tmp_path / "run"), "scenes:train:64", str(out), count=9, candidates=1, **told)
        report = json.loads((out / "compared.json").read_text())
        assert {"red" in row["caption"] for row in report["heldout"]["rows"]} == red
        assert report["hold_out"] == told.get("hold_out", ".*red.*")
