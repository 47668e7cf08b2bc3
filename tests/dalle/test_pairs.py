"""Only rows with picture and caption are paired, and every other row is accounted for."""

import pytest
import torch

from dalle.pairs import open_pairs
from dvae import scenes
from dvae.errors import DataError
from dvae.images import save


@pytest.fixture
def folder(tmp_path):
    """Three good pairs (one with two captions), a picture without caption, one with a blank one, a broken picture."""
    for k, name in enumerate(("a", "b", "c", "silent", "blank")):
        save(torch.full((3, 8, 8), k / 8), tmp_path / f"{name}.png")
    for name, text in (("a", "one"), ("b", "two\nzwei\n"), ("c", "three"), ("blank", "  \n\n"), ("broken", "four")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


def test_used_and_skipped_make_up_what_is_listed(folder):
    pairs = open_pairs(str(folder), 8, max_bad=0.5)
    assert [pairs.captions(index) for index in range(len(pairs))] == [("one",), ("two", "zwei"), ("three",)]
    assert torch.equal(pairs.images([2])[0], torch.full((3, 8, 8), 64, dtype=torch.uint8))
    reasons = {name.rsplit("/", 1)[-1]: reason for name, reason in pairs.skipped()}
    assert len(reasons) == 3 and sum(reason == "no caption" for reason in reasons.values()) == 2
    assert pairs.listed == 6 == len(pairs) + len(reasons)


def test_pictures_without_caption_count_as_bad(folder):
    with pytest.raises(DataError, match="3 of 6"):
        open_pairs(str(folder), 8, max_bad=0.49)


def test_no_caption_at_all_is_refused(tmp_path):
    save(torch.zeros(3, 8, 8), tmp_path / "a.png")
    with pytest.raises(DataError, match="0 usable of 1"):
        open_pairs(str(tmp_path), 8, max_bad=1)


def test_scenes_are_pairs_throughout():
    pairs = open_pairs("scenes:train:64", 32)
    assert len(pairs) == pairs.listed == 64 and list(pairs.skipped()) == []
    assert pairs.captions(5) == scenes.captions("train", 5)
