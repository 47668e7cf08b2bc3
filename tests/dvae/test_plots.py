"""Curves say what metrics.csv says, in any state of it; drawing changes nothing outside of itself."""

import math
import random
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib import colormaps

from dvae import plots

STAGE_1 = """step,train/loss,train/nll,train/learning_rate,val/loss,val/psnr,codebook/used
1,3.5,3.0,0.1,,,
2,2.5,2.0,0.2,2.25,20.5,0.5
3,1.5,1.25,0.3,,,
4,1.0,0.75,0.4,2.5,21.5,0.75
"""
BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def pixels(picture, colour):
    """How many pixels are of exactly this colour."""
    return int((picture == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0).sum())


def test_columns_are_read_with_their_updates():
    curves = plots.read(STAGE_1)
    assert curves.keys() == {*STAGE_1.splitlines()[0].split(",")} - {"step"}
    assert curves["train/loss"].updates.tolist() == [1, 2, 3, 4]
    assert curves["train/loss"].values.tolist() == [3.5, 2.5, 1.5, 1.0]
    assert curves["val/loss"].updates.tolist() == [2, 4] and curves["val/loss"].values.tolist() == [2.25, 2.5]
    assert plots.best(curves) == 2


def test_curves_of_one_quantity_share_a_panel_and_unknown_ones_get_their_own():
    curves = plots.read("step,val/image_loss,mine,train/image_loss,train/kl_weight\n1,2,7,3,0\n2,1,8,2,0\n")
    panels = {panel.title: list(panel.curves) for panel in plots.panels(curves)}
    assert panels == {"image loss, nats per token": ["training", "validation"], "mine": ["mine"]}
    scales = {panel.title: panel.scale for panel in plots.panels(plots.read(STAGE_1 + "5,,,,,,\n"))}
    assert scales["share of codes in use"] == "share" and scales["loss"] == "linear"


def test_both_colours_are_on_the_sheet_and_more_panels_make_it_larger():
    one = plots.curves_picture(plots.read("step,train/loss,val/loss\n1,3,\n2,2,2\n3,1,1\n"))
    assert one.dtype == torch.uint8 and one.shape[0] == 3
    assert pixels(one, BLUE) > 50 and pixels(one, ORANGE) > 20
    training = plots.curves_picture(plots.read("step,train/loss\n1,3\n2,2\n3,1\n"))
    assert pixels(training, BLUE) > 50 and pixels(training, ORANGE) == 0
    four = plots.curves_picture(plots.read(STAGE_1))
    assert four.shape[2] == 3 * one.shape[2] and four.shape[1] == 2 * one.shape[1]


HOSTILE = {
    "nothing": "",
    "header only": "step,train/loss\n",
    "no step": "train/loss\n1\n2\n",
    "one row": "step,train/loss,val/loss\n5,1.0,2.0\n",
    "not a number": "step,train/loss,val/loss\n1,nan,nan\n2,nan,inf\n3,-inf,nan\n",
    "some numbers": "step,train/loss,train/gradient_norm\n1,nan,nan\n2,3,-1\n3,nan,0\n4,2,5\n",
    "words": "step,train/loss\nx,1\n2,y\n3,\n4,5\n",
    "too large": "step,train/loss,val/loss\n1,1e308,-1e308\n2,5e307,1e400\n3,1,1\n",
    "too late": "step,train/loss\n1e300,1\n",
    "negative": "step,train/gradient_norm\n1,-1\n2,-2\n",
    "constant": "step,val/loss\n1,2\n2,2\n3,2\n",
    "zero": "step,val/loss\n1,0\n2,0\n",
    "at update 0": "step,val/loss\n0,2\n",
    "more cells than columns": "step,train/loss\n1,2,3,4\n2,1\n",
    "two runs": STAGE_1 + "step,val/image_loss\n" + "5,1,2,3,4,5,6,7,8\n",
    "hostile names": 'step,"$\\frac{","<script>","a\n%s{x}"\n1,1,1,1\n2,2,2,2\n',
    "a huge cell": f"step,val/loss,{'n' * 10_000}\n1,2,3\n2,{'9' * 200_000},4\n",
    "lone carriage returns": "step,val/loss\n1,2\n2\r,1\n",
    "a NUL": "step,train/loss\n1,2\0\n2,1\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_any_state_of_the_file_is_drawn(text):
    curves = plots.read(text)
    assert plots.curves_picture(curves).shape[0] == 3
    best = plots.best(curves)
    assert best is None or isinstance(best, int)
    for panel in plots.panels(curves):
        ElementTree.fromstring(plots.panel_svg(panel, best, dark=True))


def test_a_file_without_numbers_says_so():
    empty, full = (plots.curves_picture(plots.read(text)) for text in ("", "step,val/loss\n1,2\n2,1\n"))
    assert pixels(empty, ORANGE) == 0 < pixels(full, ORANGE)
    assert (empty != 255).sum() > 0, "a sentence"
    assert plots.panels(plots.read("")) == [] and plots.best(plots.read("step,train/loss\n1,2\n")) is None


def test_a_long_curve_is_thinned_to_the_means_of_neighbours():
    values = np.arange(10_000.0)
    values[[3, 7]] = math.nan
    updates, means = plots._thinned(plots.Curve(np.arange(10_000.0) * 2, values))
    assert len(updates) == len(means) == 400
    assert updates[0] == 48 and updates[-1] == 19_998
    assert means[1] == np.arange(25, 50).mean()
    assert means[0] == pytest.approx((sum(range(25)) - 10) / 23)
    gap = np.full(1000, math.nan)
    gap[:600] = 1
    means = plots._thinned(plots.Curve(np.arange(1000.0), gap)).values
    assert np.isfinite(means[:200]).all() and np.isnan(means[200:]).all()


def test_an_svg_needs_nothing_from_outside_and_has_two_faces():
    (panel,) = plots.panels(plots.read("step,train/loss,val/loss\n1,3,\n2,2,2\n3,1,1\n"))
    light, dark = (plots.panel_svg(panel, 3, dark) for dark in (False, True))
    assert b"#0072b2" in light and b"#d55e00" in light and b"#ffffff" in light
    assert b"#56b4e9" in dark and b"#e69f00" in dark and b"#16181d" in dark and b"#0072b2" not in dark
    for svg in (light, dark):
        tree = ElementTree.fromstring(svg)
        assert not any(node.tag.endswith(("text", "script", "image")) for node in tree.iter())
        links = [value for node in tree.iter() for name, value in node.attrib.items() if name.endswith("href")]
        assert links and all(link.startswith("#") for link in links)


@pytest.mark.parametrize("counts", [[5], [0, 0, 0], [1, 0], [7] * 100, list(range(1000)), [10**12, 1]])
def test_any_use_of_a_codebook_is_drawn(counts):
    picture = plots.usage_picture(torch.tensor(counts))
    assert picture.dtype == torch.uint8 and picture.shape[0] == 3
    assert (pixels(picture, BLUE) > 0) == (sum(counts) > 0)


def test_the_ink_of_a_codebook_stands_where_its_codes_are_in_use():
    picture = plots.usage_picture(torch.tensor([3] * 50 + [0] * 50))
    blue = (picture == torch.tensor(BLUE, dtype=torch.uint8)[:, None, None]).all(0).any(0).nonzero()[:, 0]
    axes = 0.55 * 110, picture.shape[2] - 0.12 * 110  # inches of margin
    assert abs(blue[0] - axes[0]) < 3
    assert abs(blue[-1] - (axes[0] + axes[1]) / 2) < 4, "half of the codes, half of the width"


def test_drawing_is_repeatable_and_draws_no_random_numbers():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    (panel, *_), counts = plots.panels(plots.read(STAGE_1)), torch.arange(9)
    pictures = [(plots.curves_picture(plots.read(STAGE_1)), plots.usage_picture(counts)) for _ in range(2)]
    plots.panel_svg(panel)
    assert states() == before
    assert all(torch.equal(one, other) for one, other in zip(*pictures, strict=True))


def test_no_window_no_pyplot_and_no_matplotlib_before_it_is_needed():
    program = (
        "import sys; from dvae import plots; curves = plots.read('step,val/loss\\n1,2\\n2,1\\n');"
        "assert 'matplotlib' not in sys.modules; plots.curves_picture(curves);"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (32, 32)])
def test_a_cell_map_has_the_colour_of_every_cell(shape):
    values = torch.arange(shape[0] * shape[1]).view(shape).double() + 1
    drawn = plots.cell_map(values, "title", "unit")
    assert drawn.shape == (3, 360, 462) and drawn.dtype == torch.uint8
    for value in (1, values.max().item()):
        assert pixels(drawn, colormaps["inferno"](value / values.max().item(), bytes=True)[:3]) > 4
    assert pixels(plots.cell_map(torch.zeros(2, 2), "", ""), colormaps["inferno"](0.0, bytes=True)[:3]) > 10_000


def test_bars_are_as_high_as_their_values():
    drawn = plots.bars(torch.tensor([1.0, 4.0, 0.0, 2.0]), "title", "position", "nats")
    assert drawn.shape == (3, 360, 462)
    blue = (drawn == torch.tensor(BLUE, dtype=torch.uint8)[:, None, None]).all(0).sum(0)  # of each column of pixels
    heights = [height for height, before in zip(blue[1:], blue, strict=False) if height > before]  # where a bar begins
    high, highest, low = (int(blue[start:end].max()) for start, end in ((0, 155), (155, 260), (260, 462)))
    assert len(heights) >= 3 and highest == pytest.approx(4 * high, abs=4) and low == pytest.approx(2 * high, abs=4)


def test_lines_stand_at_their_values_and_bounds_in_ink():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    low, middle, high = (plots.Line(x, x * 0 + y, x * 0 + y - 0.05, x * 0 + y + 0.05) for y in (0.25, 0.5, 0.75))
    some = {"chance": low, "ours": high, "theirs": middle}
    drawn = plots.lines({"title": some}, "best of N", strong="ours", binary=True)
    assert drawn.dtype == torch.uint8 and drawn.shape[0] == 3
    twice = plots.lines({"title": some, "other": some}, "best of N")
    assert twice.shape[2] == pytest.approx(2 * drawn.shape[2], abs=2)
    blue = (drawn == torch.tensor(BLUE, dtype=torch.uint8)[:, None, None]).all(0)
    rows = blue.sum(1).topk(2).indices.float().mean()
    orange = (drawn == torch.tensor(pixel("#d55e00"), dtype=torch.uint8)[:, None, None]).all(0)
    assert rows < orange.sum(1).argmax(), "three quarters stand above a half"


def pixel(colour):
    return [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
