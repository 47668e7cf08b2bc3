"""Drawings have the sizes and the colours that they promise."""

import json

import pytest
import torch

from dvae.drawings import BAD, INK, PAPER, Label, atlas, bars, codebook_report, sheet
from dvae.images import open_image
from dvae.model import load


def plain(colour: tuple[int, int, int], side: int = 8) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, side, side)


def has(picture: torch.Tensor, colour: tuple[int, int, int]) -> int:
    """How many pixels are of exactly this colour."""
    return int((picture == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0).sum())


def test_a_sheet_shows_every_picture_enlarged_and_framed_labels_in_their_colour():
    red, blue = (255, 0, 0), (0, 0, 255)
    rows = [
        ("first", torch.stack([plain(red), plain(blue)]), [Label("a"), Label("b", BAD, framed=True)]),
        ("second", torch.stack([plain(blue)]), [Label()]),
    ]
    drawn = sheet(rows, side=40, title="title")
    assert drawn.dtype == torch.uint8 and drawn.shape[0] == 3
    assert has(drawn, red) == 40 * 40 and has(drawn, blue) == 2 * 40 * 40
    assert has(drawn, BAD) >= 4 * 40 and has(drawn, INK) > 20 and has(drawn, PAPER) > 40 * 40
    taller = sheet([*rows, rows[0]], side=40, title="title")
    assert taller.shape[2] == drawn.shape[2] and taller.shape[1] - drawn.shape[1] == 40 + 14 + 6


def test_every_picture_needs_a_label():
    with pytest.raises(ValueError):
        sheet([("", torch.stack([plain((1, 2, 3))] * 2), [Label()])])


@pytest.mark.parametrize("text", ["", "\u2603 \U0001f600", "x" * 300, "a\x00b\nc"])
def test_a_sheet_bears_any_text(text):
    drawn = sheet([(text, torch.stack([plain((9, 8, 7))]), [Label(text)])], side=32, title=text)
    assert has(drawn, (9, 8, 7)) > 0


def test_the_atlas_has_the_most_used_first_and_leaves_unused_codes_out():
    colours = [(10, 0, 0), (20, 0, 0), (30, 0, 0), (40, 0, 0)]
    patches = torch.stack([plain(c, 4) for c in colours]).float() / 255
    drawn = atlas(patches, torch.tensor([2, 0, 9, 5]), side=12)
    firsts = [drawn[0, 2 + 6, 2 + 6 + k * 14].item() for k in range(4)]
    assert firsts == [30, 40, 10, 255]
    assert has(drawn, colours[1]) == 0 and has(drawn, colours[2]) == 12 * 12


def test_bars_fall_and_their_ink_is_in_proportion():
    drawn = bars(torch.tensor([1, 4, 0, 2]), height=40, width=80)
    assert drawn.shape == (3, 40, 80) and drawn.dtype == torch.uint8
    ink = (drawn[0] == INK[0]).sum(0)
    assert ink.tolist() == [40] * 20 + [20] * 20 + [10] * 20 + [0] * 20
    assert has(drawn, INK) + has(drawn, PAPER) == 40 * 80
    assert (drawn[0, -1, :60] == INK[0]).all()  # they stand on the ground


def test_the_report_of_a_codebook_counts_what_was_encoded(tmp_path, tiny_dvae, capsys):
    codebook_report(str(tiny_dvae), "scenes:train:64", str(tmp_path), count=20)
    said = capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 4 and all(str(path) in said for path in tmp_path.iterdir())
    numbers = json.loads((tmp_path / "codebook.json").read_text())
    assert numbers["pictures"] == 20 and sum(numbers["counts"]) == 20 * 16 and numbers["codes"] == 16
    assert numbers["used"] == sum(count > 0 for count in numbers["counts"]) / 16
    assert open_image(tmp_path / "usage.png").shape == (3, 120, 640)
    assert "20 pictures" in said
    assert load(tiny_dvae).vocab_size == 16
