"""The tools that measure rankers: the yardstick's loss, size, seeds and files, and the judges' reading of captions."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dalle.text import Text
from dvae import scenes
from dvae.data import open_source
from dvae.errors import DataError, UserError
from dvae.inspect import load_features


def tool(name):
    """A script of tests/benchmarks, which is no package."""
    path = Path(__file__).parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


yardstick, judges = tool("yardstick"), tool("judges")
COLOURS = {"red": (230, 20, 20), "green": (20, 160, 40), "blue": (20, 40, 230), "white": (250, 250, 250)}
SIZE = 150_000  # parameters of the yardsticks trained here


@pytest.fixture(scope="module")
def squares():
    """Plain pictures of 16 pixels a side, uint8 (M, 3, 16, 16), and what they are called."""
    pictures = torch.stack(
        [torch.tensor(colour).byte()[:, None, None].expand(3, 16, 16) for colour in COLOURS.values()]
    )
    return pictures.repeat(8, 1, 1, 1), [(f"a {colour} square",) for colour in COLOURS] * 8


@pytest.fixture(scope="module")
def words():
    return Text.train([f"a {colour} square" for colour in COLOURS], 300, 6)


@pytest.fixture(scope="module")
def trained(squares, words):
    return yardstick.train(squares, words, steps=40, parameters=SIZE, batch=16, seed=3, learning_rate=1e-2)


# ------------------------------------------------------------------------------------------------------- yardstick


def test_infonce_is_the_loop_written_out():
    chance = torch.Generator().manual_seed(1)
    images, captions = (F.normalize(torch.randn(5, 4, generator=chance), dim=1) for _ in range(2))
    names = ["a", "b", "a", "c", "d"]
    same = torch.tensor([[one == other for other in names] for one in names])
    total = 0.0
    for i in range(5):
        right = [j for j in range(5) if names[j] == names[i]]
        for anchor, others in ((images[i], captions), (captions[i], images)):
            odds = [math.exp(7.0 * float(anchor @ other)) for other in others]
            total -= sum(math.log(odds[j] / sum(odds)) for j in right) / len(right) / 2
    assert yardstick.infonce(images, captions, 7.0, same).item() == pytest.approx(total / 5, rel=1e-5)


@pytest.mark.parametrize("side, parameters", [(32, SIZE), (64, 300_000), (32, 1_900_000)])
def test_the_number_of_parameters_is_met(words, side, parameters):
    model = yardstick.Encoders(yardstick.fitted(side, words, parameters))
    assert abs(sum(p.numel() for p in model.parameters()) / parameters - 1) < 0.01


def test_too_few_parameters_and_odd_sides_are_refused(words):
    with pytest.raises(UserError, match="no yardstick"):
        yardstick.fitted(32, words, 1_000)
    with pytest.raises(UserError, match="pixels a side"):
        yardstick.fitted(30, words, SIZE)


def test_a_trivial_pairing_is_learned(trained, squares):
    images, captions = squares
    table = torch.stack([trained.score(images[:4].float() / 255, [name[0]] * 4) for name in captions[:4]], 1)
    assert table.argmax(1).tolist() == [0, 1, 2, 3]
    assert table.abs().max() <= 1 + 1e-6
    assert trained.about["parameters"] == pytest.approx(SIZE, rel=0.05)


def test_the_same_seed_gives_the_same_weights(trained, squares, words):
    torch.rand(3)  # what was drawn elsewhere does not matter
    settings = {"parameters": SIZE, "batch": 16, "near": 2}
    first, again, other = (yardstick.train(squares, words, 4, seed=seed, **settings).model for seed in (3, 3, 4))
    weights = again.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in first.state_dict().items())
    assert not torch.equal(first.of_text.weight, other.of_text.weight)


def test_a_saved_one_scores_the_same(trained, squares, tmp_path):
    images, captions = squares[0][:4].float() / 255, [names[0] for names in squares[1][:4]]
    trained.save(tmp_path / "yardstick")
    again = yardstick.load(tmp_path / "yardstick")
    assert torch.equal(trained.score(images, captions), again.score(images, captions))
    assert again.about == trained.about


def test_pads_and_company_do_not_change_a_caption(trained):
    alone = trained.captions(["a red square"])
    together = trained.captions(["a red square", "a white square with a very long name"])
    torch.testing.assert_close(alone[0], together[0])


def test_neighbours_share_words_and_are_not_the_same_caption(words):
    captions = ["a red square", "a red square", "a red blue square", "a green square", "white white"]
    near = yardstick.neighbours(words.encode(captions), words.vocab_size, 2)
    assert near[0, 0] == 2 and near[1, 0] == 2  # not each other
    assert near[3].tolist() != [4, 4] and 3 not in near[3].tolist()


def test_varied_pictures_keep_what_they_show():
    images = open_source("scenes:val:8", 32).images(range(8)).float() / 255
    chance = torch.Generator().manual_seed(0)
    captions = [scenes.captions("val", row)[0] for row in range(8)]
    assert sum(verdict.exact for verdict in scenes.judge(yardstick.varied(images, chance, 1), captions)) >= 7


def test_one_word_makes_a_caption_of_a_scene_false():
    caption = "a small violet disc is to the left of the big red fork on a grey background"
    false = dict(map(reversed, yardstick.of_scene(caption)))
    assert false["a small violet disc is to the right of the big red fork on a grey background"] == "side"
    assert false["a small violet disc is to the left of the big red fork on a sand background"] == "background"
    # 2 sizes, 7 + 7 colours, 4 + 4 shapes, a side, 2 backgrounds; none of them says what the caption says
    assert len(false) == 2 + 14 + 8 + 1 + 2
    assert all(scenes.parse(other) != scenes.parse(caption) for other in false)


def test_one_word_tells_other_captions_apart():
    others = ["woman cook", "man cook", "man pilot", "man", "man cook dark skin tone"]
    assert yardstick.of_others("man cook", others) == [("word", "woman cook"), ("word", "man pilot")]


# ---------------------------------------------------------------------------------------------------------- judges


@pytest.mark.parametrize(
    "caption, read",
    [
        ("woman scientist medium skin tone", ("woman", "scientist", "medium")),
        ("man walking facing right medium-dark skin tone", ("man", "walking facing right", "medium-dark")),
        ("artist light skin tone", ("person", "artist", "light")),
        ("person biking", ("person", "biking", "yellow")),
        ("Man  with veil DARK skin tone", ("man", "with veil", "dark")),
        ("woman medium-light skin tone curly hair", ("woman", "curly hair", "medium-light")),
        ("man bald", ("man", "bald", "yellow")),
        ("kiss woman man dark skin tone light skin tone", None),
        ("red apple", None),
        ("man", None),
        ("woman scientist purple skin tone", None),
        ("curly hair", None),
    ],
)
def test_emoji_captions_are_read(caption, read):
    assert judges.read_emoji(caption) == read


def test_photo_captions_are_read():
    assert judges.read_photo("a photo of an airplane") == ("airplane",)
    assert judges.read_photo("a photo of a frog") == ("frog",)
    assert judges.read_photo("a photo of a cow") is None


def test_a_judge_asks_for_all_attributes_and_is_saved(tmp_path):
    captions = ["man cook dark skin tone", "woman pilot light skin tone"] * 4
    images = torch.stack([torch.full((3, 64, 64), 40 if "man c" in caption else 220) for caption in captions]).byte()
    judge = judges.train("emoji", images, captions, steps=12, widths=(4, 8))
    judge.save(tmp_path / "judge")
    again, real = judges.load(tmp_path / "judge"), images[:2].float() / 255
    assert again.see(real) == judge.see(real)
    assert judge.judge(real, captions[:2]) == judge.right(real, captions[:2]).all(1).tolist()
    seen = judge.see(real)[0]
    said = " ".join(seen[:2]) + ("" if seen[2] == "yellow" else f" {seen[2]} skin tone")
    assert judge.kind.read(said) != seen or judge.judge(real[:1], [said]) == [True]
    with pytest.raises(DataError, match="red apple"):
        judge.judge(real[:1], ["red apple"])
    features = load_features(str(tmp_path / "judge.pt2"))
    for some in (real, real[:1], torch.rand(5, 3, 64, 64)):
        found = features(some)
        assert found.shape == (len(some), 16)
        logits = [head(found) for head in judge.net.heads]
        torch.testing.assert_close(logits, judge.net(some))
