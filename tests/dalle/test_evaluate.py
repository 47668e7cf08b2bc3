"""`dalle evaluate`: its numbers are those of its parts, its controls fail, and its protocol says it all."""

import json

import pytest
import torch
from PIL import Image

from dalle import evaluate as command
from dalle.__main__ import main
from dalle.candidates import Settings, draw_and_judge
from dalle.evaluate import Protocol, best_of_picture, data_rows, described, flat_pictures, measure, rankers, scenes_rows
from dalle.model import DALLE, DALLEConfig, losses
from dalle.pipeline import load, save
from dalle.rerank import NAMES
from dvae import artefact, scenes
from dvae.errors import DataError, UserError
from dvae.evaluate import psnr

PROTOCOL = Protocol(prompts=3, count=4, swept=2, seed=1, settings=Settings(0.8, 1.5))


@pytest.fixture(scope="module")
def drawer(tiny_dalle, tmp_path_factory):
    """The tiny model, reading both ways."""
    one, folder = load(tiny_dalle), tmp_path_factory.mktemp("both")
    c = one.model.config
    torch.manual_seed(5)
    model = DALLE(DALLEConfig(c.vocab_text, c.text_length, c.vocab_image, c.grid, 1, 32, 2, both_orders=True))
    found = artefact.load(one.source, "dalle")
    save(folder, model, one.text, one.captions, found.parts["dvae"], found.about)
    return load(folder)


@pytest.fixture(scope="module")
def found(drawer):
    kinds = scenes_rows(drawer, PROTOCOL.prompts)
    return measure(drawer, kinds, PROTOCOL, lambda pictures, captions: (pictures.mean((1, 2, 3)) > 0.4).tolist())


def test_every_number_is_that_of_its_part(drawer, found):
    assert list(found["kinds"]) == ["seen", "held-out"]
    for kind, split in (("seen", "val"), ("held-out", "heldout")):
        own = found["kinds"][kind]
        captions = [scenes.captions(split, index)[0] for index in range(1000, 1003)]
        images = scenes.draw([scenes.scene(split, index) for index in range(1000, 1003)], 32).float() / 255
        ids, tokens = drawer.text.encode(captions), drawer.tokenizer.encode(images)
        keep = torch.ones(3, dtype=torch.bool)
        text, image = losses(drawer.model(ids, tokens), ids, tokens, keep)
        caption, picture = losses(drawer.model(ids, tokens, image_first=True), ids, tokens, keep)
        expected = {"text": text, "image": image, "caption": caption, "picture": picture}
        assert own["losses"] == pytest.approx({name: value.item() for name, value in expected.items()}, abs=1e-5)
        decoded = (drawer.tokenizer.decode(tokens) * 255).round() / 255
        assert own["reconstructions"]["psnr"] == pytest.approx(psnr(decoded, images).mean().item(), abs=1e-3)
        assert own["reconstructions"]["exact"]["value"] == pytest.approx(
            (decoded.mean((1, 2, 3)) > 0.4).float().mean().item()
        )
        seeds = [1_000_000 + index for index in range(1000, 1003)]
        drawn = draw_and_judge(drawer, captions, 4, seeds, Settings(0.8, 1.5), ["contrast", "combined"],
                               judge=lambda pictures, _: (pictures.mean((1, 2, 3)) > 0.4).tolist())  # fmt: skip
        for n in (1, 2, 4):
            for name in ("contrast", "combined"):
                assert own["best_of"][name][str(n)] == drawn.share(name, n).json()
            assert own["best_of"]["ceiling"][str(n)] == drawn.ceiling(n).json()
            assert own["best_of"]["chance"][str(n)] == drawn.single.json()
        assert [line["guidance"] for line in own["sweep"]] == list(command.SWEPT)
        assert [choice["candidate"] for choice in own["chosen"]] == drawn.best("combined").tolist()


def test_all_rankers_that_the_model_can_be_asked_for(drawer, tiny_dalle, found):
    assert rankers(drawer) == list(NAMES) and drawer.ranker == "combined"
    assert set(found["kinds"]["seen"]["best_of"]) == {*NAMES, "chance", "ceiling"}
    one = load(tiny_dalle)
    assert rankers(one) == [name for name in NAMES if not name.startswith("caption") and name != "combined"]
    one.knows_null = False
    assert not any("pmi" in name for name in rankers(one))


def test_a_ranker_that_knows_the_verdict_of_blank_pictures_and_wrong_captions(drawer, found):
    """`none` keeps the order of drawing: a blank picture cannot win by it, and a wrong caption changes nothing."""
    for own in found["kinds"].values():
        controls = own["controls"]
        assert controls["blank_wins"]["none"]["value"] == 0
        assert controls["wrong_caption"]["none"] == own["best_of"]["none"]["4"]
        assert set(controls["wrong_caption"]) == set(NAMES)
    flat = flat_pictures(32)
    assert flat.shape == (5, 3, 32, 32) and (flat.flatten(2).std(2) == 0).all()


def test_the_command_writes_its_protocol_and_its_pictures(drawer, tmp_path, capsys):
    given = ["--prompts", "2", "--count", "4", "--swept", "2", "--temperature", "0.7", "--guidance", "1.5"]
    out = ["--out", str(tmp_path / "out")]
    assert main(["evaluate", str(drawer.source), "scenes", *given, *out]) == 0
    said = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "evaluated.json").read_text())
    told = written["protocol"]
    assert told["settings"] == {"temperature": 0.7, "guidance": 1.5} and told["judge"] == "exact"
    assert (told["data"], told["prompts"], told["count"], told["swept"], told["seed"]) == ("scenes", 2, 4, 2, 0)
    assert told["artefact"] == artefact.digest(drawer.source) and told["versions"]["torch"] == torch.__version__
    assert told["ranker"] == "combined" and told["weights"] == drawer.weights
    for name in ("best-of-n.png", "guidance.png"):
        assert Image.open(tmp_path / "out" / name).size[0] > 800
        assert name in said
    assert "best of 4 by combined *" in said and "a blank picture wins" in said
    assert main(["evaluate", str(drawer.source), "scenes", *given, *out]) == UserError.code
    assert "is not empty" in capsys.readouterr().err
    again = measure(drawer, scenes_rows(drawer, 2), Protocol(2, 4, 2, 0, Settings(0.7, 1.5)), command.judge_scenes)
    assert json.loads(json.dumps(again)) == {"kinds": written["kinds"]}
    assert described(drawer, PROTOCOL)["parameters"] == sum(p.numel() for p in drawer.model.parameters())
    assert best_of_picture(written).dtype == torch.uint8


def test_data_without_a_judge_and_features(drawer, tmp_path, capsys):
    from dvae.images import save as save_png

    for index in range(40):
        picture = scenes.draw([scenes.scene("train", index)], 32)[0]
        save_png(picture, tmp_path / "data" / f"{index}.png")
        (tmp_path / "data" / f"{index}.txt").write_text(scenes.captions("train", index)[0])
    out = tmp_path / "out"
    given = ["--prompts", "6", "--count", "2", "--swept", "0", "--val_share", "0.3", "--out", str(out)]
    assert main(["evaluate", str(drawer.source), str(tmp_path / "data"), *given]) == 0
    written = json.loads((out / "evaluated.json").read_text())
    assert written["protocol"]["judge"] is None and "best_of" not in written["kinds"]["seen"]
    assert sorted(path.name for path in out.iterdir()) == ["evaluated.json"]
    assert "losses, nats per token" in capsys.readouterr().out
    kinds = data_rows(drawer, str(tmp_path / "data"), {"val_share": 0.3}, 6, 0)
    keys = [{rows.source.key(row) for row in rows.rows} for rows in kinds.values()]
    assert keys[0].isdisjoint(keys[1]) and len(keys[0]) == 6
    other = measure(drawer, kinds, Protocol(6, 2, 0, 0, Settings()), features=lambda pictures: pictures.mean((2, 3)))
    assert {"frechet", "precision", "recall"} <= other["kinds"]["seen"].keys()


@pytest.mark.parametrize(
    "data, given, error",
    [
        ("scenes", ["--val_share", "0.1"], UserError),
        ("scenes", ["--temperature", "-1"], UserError),
        ("scenes", ["--temperature", "nan"], UserError),
        ("scenes", ["--guidance", "-0.1"], UserError),
        ("scenes", ["--prompts", "0"], UserError),
        ("scenes", ["--count", "0"], UserError),
        ("nothing.tar", [], DataError),
    ],
)
def test_bad_input_is_told_in_two_lines_and_writes_nothing(drawer, tmp_path, capsys, data, given, error):
    assert main(["evaluate", str(drawer.source), data, *given, "--out", str(tmp_path / "out")]) == error.code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("error: ") and said[1].startswith("hint: ")
    assert not (tmp_path / "out").exists()
