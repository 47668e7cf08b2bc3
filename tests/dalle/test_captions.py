"""The commands `dalle caption` and `dalle score`: what they say is what the model says, and every mistake is told."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dalle import captions, pipeline
from dalle.__main__ import main
from dalle.caption import beam, sampled
from dalle.captions import describe, fits, probabilities
from dalle.model import DALLE, DALLEConfig
from dalle.prepare import Prepared
from dvae import scenes
from dvae.errors import UserError
from dvae.images import open_image, save, square

TEXTS = ["a red circle", "a large blue square on sand", "a cross"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_tokens) -> Path:
    """The run folder of an untrained transformer of both orders, with weights that make its chances differ."""
    folder, prepared = tmp_path_factory.mktemp("both"), Prepared(tiny_tokens)
    s = prepared.sizes
    torch.manual_seed(2)
    sizes = (s.vocab_text, s.text_length, s.vocab_image, s.grid)
    model = DALLE(DALLEConfig(*sizes, depth=1, width=32, heads=2, both_orders=True))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pipeline.save(folder / "model", model, prepared.text, TEXTS, prepared.dvae, {"step": 0})
    return folder


@pytest.fixture(scope="module")
def drawer(run):
    return pipeline.load(run)


@pytest.fixture(scope="module")
def one_way(tiny_dalle):
    return pipeline.load(tiny_dalle)


@pytest.fixture(scope="module")
def images():
    return scenes.draw([scenes.scene("val", index) for index in range(4)], 32).float() / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    for index, image in enumerate(images):
        save(image, path / f"{index}.png")
    return path


@pytest.fixture
def dalle(capsys):
    """Runs a command line; returns its exit code, its output and its errors, both as lines."""

    def call(*args):
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as ending:
            code = ending.code or 0
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return call


@pytest.fixture
def refused(dalle):
    def call(code, *args):
        found, out, err = dalle(*args)
        assert found == code and out == [], (found, out, err)
        assert len(err) == 2 and err[0].startswith("error: ") and err[1].startswith("hint: "), err
        return err[0], err[1]

    return call


# ------------------------------------------------------------------------------------------------- from Python


def ln_p(drawer, images, texts):
    """By `forward`: ln p(text | image), ln p(image | text), both (B, P), ln p(text) (P,), ln p(image | null) (B,)."""
    tokens, ids = drawer.tokenizer.encode(images), drawer.text.encode([*texts, ""])
    with torch.no_grad():
        rows = ids.repeat(len(tokens), 1), tokens.repeat_interleave(len(ids), 0)
        first = drawer.model(*rows)
        second = drawer.model(*rows, image_first=True) if drawer.model.config.both_orders else first

    def of(logits, targets, told=None):
        each = logits.log_softmax(-1).gather(2, targets.flatten(1)[..., None])[..., 0]
        return (each if told is None else each * told).sum(1).unflatten(0, (-1, len(ids)))

    before = torch.cat([rows[0][:, :1] * 0, rows[0][:, :-1]], 1)
    told = before < drawer.text.vocab_size  # the words and the first pad
    image = of(first.image, rows[1])
    return of(second.text, rows[0], told)[:, :-1], image[:, :-1], of(first.text, rows[0], told)[0, :-1], image[:, -1]


@pytest.mark.parametrize("by, prior", [(by, prior) for by in captions.BYS for prior in captions.PRIORS])
def test_probabilities_are_the_posterior(drawer, images, by, prior):
    caption, likelihood, text, _ = ln_p(drawer, images, TEXTS)
    logs = likelihood + text * (prior == "model") if by == "likelihood" else caption - text * (prior != "model")
    found = probabilities(drawer, images, TEXTS, by, prior)
    torch.testing.assert_close(torch.tensor(found), logs.softmax(1), atol=1e-4, rtol=0)
    assert all(sum(row) == pytest.approx(1) for row in found) and logs.std() > 0.1


def test_probabilities_of_a_model_of_one_order(one_way, images):
    _, likelihood, text, _ = ln_p(one_way, images, TEXTS)
    for settings in ({}, {"by": "likelihood", "prior": "uniform"}):
        found = torch.tensor(probabilities(one_way, images, TEXTS, **settings))
        torch.testing.assert_close(found, likelihood.softmax(1), atol=1e-4, rtol=0)
    found = torch.tensor(probabilities(one_way, images, TEXTS, prior="model"))
    torch.testing.assert_close(found, (likelihood + text).softmax(1), atol=1e-4, rtol=0)


def test_probabilities_depend_on_no_other_picture_and_on_no_order_of_texts(drawer, images):
    whole = torch.tensor(probabilities(drawer, images, TEXTS))
    alone = torch.tensor([probabilities(drawer, image[None], TEXTS)[0] for image in images])
    torch.testing.assert_close(whole, alone, atol=1e-4, rtol=0)
    turned = torch.tensor(probabilities(drawer, images, TEXTS[::-1]))
    torch.testing.assert_close(whole, turned.flip(1), atol=1e-4, rtol=0)


def test_fits_by_hand(drawer, one_way, images):
    for which, by in ((drawer, "caption"), (drawer, "likelihood"), (one_way, "likelihood")):
        caption, likelihood, _, null = ln_p(which, images, TEXTS[:1])
        expected = caption[:, 0] if by == "caption" else likelihood[:, 0] - null
        torch.testing.assert_close(torch.tensor(fits(which, images, TEXTS[0], by)), expected, atol=1e-3, rtol=0)


def test_likelihoods_of_a_model_that_never_learned_the_null_prompt_are_not_compared_between_pictures(drawer, images):
    drawer = pipeline.load(drawer.source)
    drawer.knows_null = False
    with pytest.raises(UserError, match="without dropped captions"):
        fits(drawer, images, "a red circle", "likelihood")
    assert len(fits(drawer, images, "a red circle", "caption")) == len(images)
    assert len(probabilities(drawer, images, TEXTS, "likelihood")) == len(images)


def test_describe_says_in_words_what_beam_and_draws_find(drawer, images):
    tokens = drawer.tokenizer.encode(images)
    settings = {"temperature": 0.8, "seed": 3, "top_p": 0.9, "top_k": 50}
    for told, found in (
        (describe(drawer, images, count=3, width=5), beam(drawer.packed, tokens, 5, 5)),
        (describe(drawer, images, count=12), beam(drawer.packed, tokens, 12, 12)),
        (describe(drawer, images, "sampled", 6, **settings), sampled(drawer.packed, tokens, 6, **settings)),
    ):
        for own, ids in zip(told, found, strict=True):
            pairs = {}
            for row, logprob in zip(ids.text_ids, ids.logprobs.tolist(), strict=True):
                pairs.setdefault(drawer.text.decode(row), logprob)
            assert own == list(pairs.items())[: len(own)] and len(own) in (3, len(pairs))
            assert [each.score for each in own] == sorted((each.score for each in own), reverse=True)


def test_ids_that_spell_the_same_words_are_one_caption(drawer, images, monkeypatch):
    monkeypatch.setattr(type(drawer.text), "decode", lambda text, ids: "odd" if ids[0] % 2 else "even")
    for (told,) in (describe(drawer, images[:1], count=8, width=60), describe(drawer, images[:1], "sampled", 30)):
        assert sorted(each.text for each in told) == ["even", "odd"]
    (found,) = beam(drawer.packed, drawer.tokenizer.encode(images[:1]), 8)
    assert describe(drawer, images[:1], count=8)[0][0].score == found.logprobs[0].item()


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 16, 16), (1, 1, 32, 32)])
def test_pictures_of_another_size(drawer, shape):
    for ask in (
        lambda x: describe(drawer, x), lambda x: probabilities(drawer, x, TEXTS), lambda x: fits(drawer, x, "a"),
    ):  # fmt: skip
        with pytest.raises(UserError, match="do not fit this model"):
            ask(torch.zeros(shape))


@pytest.mark.parametrize(
    "texts", ["a cat", [], ["a", ""], ["a", " \t"], ["a", "b", "a"], ["A  red circle", "a red circle"]]
)
def test_texts_that_say_nothing_or_the_same(drawer, images, texts):
    with pytest.raises(UserError):
        probabilities(drawer, images, texts)


# ------------------------------------------------------------------------------------------- from the command line


def test_caption_of_one_picture(dalle, run, drawer, folder, images):
    code, out, err = dalle("caption", run, folder / "1.png", "--count", 3)
    (told,) = describe(drawer, images[1:2], count=3)
    assert code == 0 and not err and len(out) == 3
    for line, each in zip(out, told, strict=True):
        key, score, text = line.split(maxsplit=2)
        assert key == str(folder / "1.png") and float(score) == pytest.approx(each.score, abs=0.02)
        assert text == captions.printable(each.text)


def test_a_picture_is_squared_and_known_by_its_content(dalle, run, drawer, tmp_path, images):
    wide = torch.cat([images[0], torch.ones(3, 32, 16)], 2)
    save(wide, tmp_path / "wide.png")
    shutil.copy(tmp_path / "wide.png", tmp_path / "no suffix")
    pixels = square(open_image(tmp_path / "wide.png"), 32)[None].float() / 255
    ((told,),) = describe(drawer, pixels)
    for name in ("wide.png", "no suffix"):
        code, out, _ = dalle("caption", run, tmp_path / name)
        assert code == 0 and out[0].endswith(captions.printable(told.text))


@pytest.mark.parametrize(
    "flags, settings",
    [
        ([], {"method": "beam", "count": 1, "width": 8}),
        (["--count", "9"], {"method": "beam", "count": 9, "width": 9}),
        (["--width", "3", "--count", "2"], {"method": "beam", "count": 2, "width": 3}),
        ("--method sampled --count 4 --temperature 0.7 --top_k 20 --top_p 0.9 --seed 5".split(),
         {"method": "sampled", "count": 4, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 5}),
        (["--method", "sampled"],
         {"method": "sampled", "count": 1, "temperature": 1.0, "top_k": None, "top_p": None, "seed": 0}),
    ],
)  # fmt: skip
def test_captions_of_a_folder_and_the_json_of_how_they_were_made(
    dalle, run, drawer, folder, images, tmp_path, flags, settings
):
    out = tmp_path / "below" / "said.json"
    code, lines, _ = dalle("caption", run, folder, "--out", out, *flags)
    made = json.loads(out.read_text())
    pictures = made.pop("pictures")
    digest = captions.artefact.digest(run / "model")
    assert code == 0 and made == {"images": captions.printable(str(folder)), **settings, "artefact": digest}
    told = describe(drawer, images, **settings)
    assert [each["key"] for each in pictures] == ["0.png", "1.png", "2.png", "3.png"]
    for each, own in zip(pictures, told, strict=True):
        assert [c["text"] for c in each["captions"]] == [c.text for c in own]
        assert [c["score"] for c in each["captions"]] == pytest.approx([c.score for c in own], abs=1e-3)
    assert len(lines) == sum(map(len, told)) + 1 and lines[-1] == f"wrote {out}"


def test_a_scenes_source_and_its_keys(dalle, run):
    code, out, _ = dalle("caption", run, "scenes:val:3")
    assert code == 0 and [line.split()[0] for line in out] == [f"val-{index:06d}" for index in range(3)]


def test_score_of_texts_is_sorted_and_in_percent(dalle, run, drawer, folder, images):
    for flags, settings in (
        ([], {}),
        (["--by", "caption", "--prior", "model"], {"by": "caption", "prior": "model"}),
    ):
        code, out, err = dalle("score", run, folder / "2.png", *TEXTS, *flags)
        (chances,) = probabilities(drawer, images[2:3], TEXTS, **settings)
        order = sorted(range(3), key=lambda n: -chances[n])
        assert code == 0 and not err and [line.split("%  ", 1)[1] for line in out] == [TEXTS[n] for n in order]
        percent = [float(line.split("%")[0]) for line in out]
        assert percent == pytest.approx([100 * chances[n] for n in order], abs=0.02)
        assert dalle("score", run, folder / "2.png", *TEXTS, *flags, "--keep", 2)[1] == out[:2]


def test_search_names_the_pictures_that_fit_best(dalle, run, tiny_dalle, drawer, one_way, folder, images):
    for which, of, flags in ((run, drawer, []), (run, drawer, ["--by", "caption"]), (tiny_dalle, one_way, [])):
        code, out, err = dalle("score", which, folder, "a red circle", *flags)
        found = fits(of, images, "a red circle", *flags[1:])
        order = sorted(range(4), key=lambda n: -found[n])
        assert code == 0 and not err and [line.split()[1] for line in out] == [f"{n}.png" for n in order]
        assert [float(line.split()[0]) for line in out] == pytest.approx([found[n] for n in order], abs=0.02)
        assert dalle("score", which, folder, "a red circle", *flags, "--keep", 2)[1] == out[:2]
    assert len(dalle("score", run, "scenes:val:12", "a red circle")[1]) == 10


@pytest.mark.parametrize("at_once", [1, 3])
def test_batches_of_pictures_keep_their_names(dalle, run, folder, monkeypatch, at_once):
    expected = [dalle(command, run, folder, *texts) for command, *texts in (("caption",), ("score", "a red circle"))]
    monkeypatch.setattr("dvae.inspect.most", lambda model: at_once)
    found = [dalle(command, run, folder, *texts) for command, *texts in (("caption",), ("score", "a red circle"))]
    assert found == expected


def test_texts_are_taken_to_the_letter_and_options_may_stand_anywhere(dalle, run, folder):
    texts = ["null", "[1, 2]", "12", "a: b", "--by", "@file", "{a: b}", "-x"]
    code, out, err = dalle("score", "--keep", 8, run, folder / "0.png", "--", *texts)
    assert code == 0 and sorted(line.split("%  ", 1)[1] for line in out) == sorted(texts), err
    plain = dalle("score", run, folder / "0.png", *TEXTS, "--by", "caption")
    for args in (
        ("--by", "caption", run, folder / "0.png", *TEXTS),
        (run, folder / "0.png", "--by=caption", *TEXTS),
        (run, folder / "0.png", TEXTS[0], "--by", "caption", *TEXTS[1:]),
        (run, "--by", "caption", folder / "0.png", *TEXTS),
    ):
        assert dalle("score", *args) == plain


def test_a_text_that_is_cut_is_told(dalle, run, folder):
    long = "a red circle " * 20
    code, out, err = dalle("score", run, folder / "0.png", "a cross", long + "left of a square")
    assert code == 0 and len(out) == 2 and len(err) == 2
    assert err[0].startswith("warning: a text has") and "reads 16" in err[0] and "--length" in err[1]
    assert "the same to this model" in dalle("score", run, folder / "0.png", long + "a", long + "b")[2][-2]


def test_a_model_of_one_order_scores_and_does_not_caption(dalle, refused, tiny_dalle, folder):
    assert dalle("score", tiny_dalle, folder / "0.png", *TEXTS)[0] == 0
    for args in (
        ("caption", tiny_dalle, folder), ("score", tiny_dalle, folder / "0.png", *TEXTS, "--by", "caption"),
        ("score", tiny_dalle, folder, "a cross", "--by", "caption"),
    ):  # fmt: skip
        what, hint = refused(2, *args)
        assert "words before pictures only" in what and "--model.image_first.share 0.25" in hint


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--count", "0"], "count"), (["--count", "-1"], "count"), (["--count", "x"], "count"),
        (["--width", "0"], "width"), (["--width", "2", "--count", "3"], "width"), (["--method", "greedy"], "method"),
        (["--temperature", "1"], "temperature"), (["--seed", "0"], "seed"), (["--top_k", "3"], "top_k"),
        (["--method", "sampled", "--width", "4"], "width"), (["--method", "sampled", "--count", "0"], "count"),
        (["--method", "sampled", "--temperature", "-1"], "temperature"),
        (["--method", "sampled", "--temperature", "nan"], "temperature"),
        (["--method", "sampled", "--temperature", "0"], "temperature"),
        (["--method", "sampled", "--top_k", "0"], "top_k"), (["--method", "sampled", "--top_p", "2"], "top_p"),
        (["--method", "sampled", "--seed", "-1"], "seed"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_settings_of_caption_write_nothing(refused, run, folder, tmp_path, flags, word):
    what, _ = refused(2, "caption", run, folder / "0.png", "--out", tmp_path / "new" / "said.json", *flags)
    assert word in what and not list(tmp_path.iterdir())


def test_wrong_usage_of_score(refused, run, folder):
    picture, score = folder / "0.png", lambda *args: refused(2, "score", run, *args)[0]
    assert "no texts" in score(picture) and "no text" in score(folder)
    assert "nothing to tell it from" in score(picture, "a cross")
    assert "2 texts for many pictures" in score(folder, "a", "b") == score("scenes:val:4", "a", "b")
    assert "--prior" in score(folder, "a", "--prior", "model")
    assert "empty" in score(picture, "a", "") and "empty" in score(picture, "a", "  ") and "empty" in score(folder, "")
    assert "'a' is given twice" in score(picture, "a", "b", "a")
    assert "the same to this model" in score(picture, "A cross", "a  cross")
    assert "not UTF-8" in score(picture, "a", "\udcff") and "not UTF-8" in score(folder, "\udcff")
    assert "by is 'clip'" in score(picture, *TEXTS, "--by", "clip")
    assert "prior is 'flat'" in score(picture, *TEXTS, "--prior", "flat")
    for wrong in (["--keep", "0"], ["--keep", "x"], ["--by"], ["--bogus", "1"], ["--by", "--keep", "2"], ["-x"]):
        score(picture, *TEXTS, *wrong)


@pytest.mark.parametrize("command, texts", [("caption", ()), ("score", ("a", "b")), ("score", ("a",))])
def test_pictures_that_are_not_there_or_not_readable(dalle, refused, run, folder, tmp_path, command, texts):
    what, _ = refused(2 if texts == ("a",) else 3, command, run, tmp_path / "none.png", *texts)
    (tmp_path / "bad.png").write_bytes((folder / "0.png").read_bytes()[:60])
    if texts != ("a",):  # of one picture
        assert "no such file" in what
        assert "truncated" in refused(3, command, run, tmp_path / "bad.png", *texts)[0]
        (tmp_path / "note.txt").write_text("no picture")
        assert "not an image" in refused(3, command, run, tmp_path / "note.txt", *texts)[0]
    if texts != ("a", "b"):  # of many
        assert "no such data source" in refused(3, command, run, tmp_path / "none", *texts)[0]
        (tmp_path / "empty").mkdir()
        assert "0 usable of 0" in refused(3, command, run, tmp_path / "empty", *texts)[0]
        assert "0 usable of 1" in refused(3, command, run, tmp_path, *texts)[0]
        shutil.copy(folder / "0.png", tmp_path / "good.png")
        code, out, err = dalle(command, run, tmp_path, *texts)
        assert code == 0 and len(out) == 1 and "good.png" in out[0]
        assert err[0] == "warning: 1 of 2 cannot be used, e.g. bad.png: truncated" and len(err) == 2


def test_a_run_that_is_missing_or_a_tokenizer(refused, run, tiny_dvae, folder, tmp_path):
    for folder_of_run in (tmp_path / "none", tiny_dvae):
        refused(4, "caption", folder_of_run, folder)
        refused(4, "score", folder_of_run, folder, "a cross")


def test_an_out_that_cannot_be_written_or_would_spoil_the_pictures(refused, run, folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "file").write_text("x")
    refused(5, "caption", run, folder, "--out", tmp_path / "file" / "said.json")
    refused(2, "caption", run, folder, "--out", tmp_path)
    refused(2, "caption", run, folder, "--out", folder / "said.json")
    refused(2, "caption", run, folder / "0.png", "--out", folder / "0.png")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "x"


def test_logits_that_are_no_finite_numbers(refused, run, folder, tmp_path):
    drawer = pipeline.load(run)
    with torch.no_grad():
        drawer.model.text_head.weight[0] = drawer.model.image_head.weight[0] = 3e38
    drawer.save_pretrained(tmp_path / "model")
    refused(6, "caption", tmp_path, folder)
    for by in captions.BYS:
        refused(6, "score", tmp_path, folder, "a cross", "--by", by)
        refused(6, "score", tmp_path, folder / "0.png", *TEXTS, "--by", by)


def test_help_names_the_texts(dalle):
    code, out, _ = dalle("score", "--help")
    assert code == 0 and "two texts or more for a picture, one for a data source" in " ".join(" ".join(out).split())
