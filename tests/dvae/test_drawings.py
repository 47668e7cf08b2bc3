"""Drawings have the sizes and the colours that they promise."""

import pytest
import torch
from matplotlib import colormaps

from dvae.drawings import BAD, INK, PAPER, Label, atlas, heat_map, labelled_atlas, most_used, sheet


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


def test_the_labelled_atlas_has_sixteen_a_row_and_leaves_unused_codes_out():
    colours = [(k, 0, 0) for k in range(1, 41)]
    patches = torch.stack([plain(c, 4) for c in colours]).float() / 255
    counts = torch.arange(40)
    drawn = labelled_atlas(patches, counts, count=20, side=40)
    assert drawn.shape == (3, 6 + 2 * (40 + 14 + 6), 6 + 16 * (40 + 6) + 6)
    assert [has(drawn, c) for c in colours] == [0] * 20 + [40 * 40] * 20
    firsts = [drawn[0, 26, 6 + 20 + k * 46].item() for k in range(16)]
    assert firsts == list(range(40, 24, -1))
    assert has(labelled_atlas(patches, counts, side=40), colours[0]) == 0


def test_the_most_used_codes_come_first_and_the_earlier_of_equal_ones():
    assert most_used(torch.tensor([3, 0, 9, 3, 1]), 3).tolist() == [2, 0, 3]
    assert most_used(torch.tensor([0, 0, 1]), 3).tolist() == [2]


def test_a_heat_map_shows_the_weights_over_the_grey_picture():
    picture = torch.stack([torch.full((16, 16), level) for level in (30, 60, 90)]).to(torch.uint8)
    weights = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    drawn = heat_map(picture, weights, side=32)
    assert drawn.shape == (3, 32, 32) and drawn.dtype == torch.uint8
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cell = drawn[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].flatten(1)
        colour = torch.tensor(colormaps["inferno"](weights[row, column].item() / 4)[:3]).float() * 255
        assert (cell == cell[:, :1]).all()
        assert torch.allclose(cell[:, 0].float(), 0.5 * 60 + 0.5 * colour, atol=0.51)


def test_the_brightness_of_a_heat_map_rises_with_the_weight():
    grey = torch.zeros(3, 8, 8, dtype=torch.uint8)
    drawn = heat_map(grey, torch.arange(8.0)[None], side=8).float()
    light = 0.2126 * drawn[0] + 0.7152 * drawn[1] + 0.0722 * drawn[2]
    assert (light[0].diff() > 0).all()


def test_heat_maps_share_a_scale_by_their_peak_and_bear_weights_of_zero():
    picture, weights = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.tensor([[1.0, 2.0]])
    shared = heat_map(picture, weights, side=8, peak=4.0)
    assert torch.equal(shared[:, 0, 4], heat_map(picture, weights * 2, side=8, peak=8.0)[:, 0, 4])
    assert not torch.equal(shared, heat_map(picture, weights, side=8))
    nothing = heat_map(picture, torch.zeros(2, 2), side=8)
    assert (nothing == nothing[:, :1, :1]).all()
    with pytest.raises(AssertionError):
        heat_map(picture, -weights)


def test_a_heat_map_keeps_the_shape_of_its_picture():
    picture = torch.zeros(3, 8, 16, dtype=torch.uint8)
    picture[:, :, 8:] = 255
    drawn = heat_map(picture, torch.ones(3, 1), side=24)
    assert drawn.shape == (3, 24, 48)
    assert (drawn[:, :, 24:] == drawn[:, :1, -1:]).all() and (drawn[:, :, :24] == drawn[:, :1, :1]).all()
    assert (drawn[:, 0, 0] < drawn[:, 0, -1]).all()


def test_a_title_is_never_cut_off():
    rows = [("", torch.stack([plain((9, 8, 7))]), [Label()])]
    drawn = sheet(rows, side=32, title="x" * 80)
    ink = (drawn != 255).any(0).nonzero()[:, 1]
    assert drawn.shape[2] > 400 and ink.max() < drawn.shape[2] - 2
    assert sheet(rows, side=32).shape == (3, 6 + 32 + 6, 6 + 32 + 6 + 6)
