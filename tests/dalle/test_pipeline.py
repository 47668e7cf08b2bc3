"""One object from caption to ranked pictures: the same again from disk, from any company, and never a wrong pair."""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import dalle
from dalle.__main__ import main
from dalle.model import DALLE
from dalle.pipeline import KIND, Pipeline, load, save
from dalle.shrink import shrink
from dalle.text import Text
from dvae import artefact
from dvae.errors import ArtefactError, UserError
from dvae.images import to_uint8
from dvae.model import DVAE
from dvae.tokenizer import load as load_dvae

CAPTION = "a red circle above a small blue square"


@pytest.fixture(scope="module")
def pipeline(tiny_dalle) -> Pipeline:
    return load(tiny_dalle)


def same(first, second) -> bool:
    return [(p.number, p.score, p.tokens.tolist(), p.image.tolist()) for p in first] == [
        (p.number, p.score, p.tokens.tolist(), p.image.tolist()) for p in second
    ]


def test_pictures_are_what_they_say(pipeline):
    pictures = pipeline(CAPTION, count=6, keep=4, seed=3)
    assert len(pictures) == 4
    for picture in pictures:
        assert picture.image.dtype == torch.uint8 and picture.image.shape == (3, 32, 32)
        assert picture.tokens.dtype == torch.int64 and picture.tokens.shape == (4, 4)
        assert (picture.caption, picture.seed) == (CAPTION, 3)
        assert torch.equal(picture.image, to_uint8(pipeline.tokenizer.decode(picture.tokens[None])[0]))
        assert picture.pil().size == (32, 32)
        assert picture.pil().getpixel((5, 9)) == tuple(picture.image[:, 9, 5].tolist())
    assert len({picture.number for picture in pictures}) == 4
    assert len({tuple(picture.tokens.flatten().tolist()) for picture in pictures}) == 4


def test_a_changed_weight_is_drawn_with(tiny_dalle):
    pipeline = load(tiny_dalle)
    before, packed = pipeline(CAPTION, count=4), pipeline.packed
    assert pipeline.packed is packed
    with torch.no_grad():
        pipeline.model.blocks[0].mlp.out.weight.normal_()
    after = pipeline(CAPTION, count=4)
    assert pipeline.packed is not packed and [p.score for p in after] != [p.score for p in before]


def test_a_pipeline_may_be_loaded_where_nothing_is_recorded(tiny_dalle, pipeline):
    with torch.inference_mode():
        assert same(load(tiny_dalle)(CAPTION, count=4), pipeline(CAPTION, count=4))


def test_bfloat16_is_asked_for_when_loading(tiny_dalle):
    narrow = load(tiny_dalle, precision="bfloat16")
    assert narrow.packed.blocks[0].mlp.out.weight.dtype == torch.bfloat16
    assert len(narrow(CAPTION, count=4)) == 4
    with pytest.raises(UserError, match="half"):
        load(tiny_dalle, precision="half")


@pytest.mark.parametrize("name", ["likelihood", "pmi", "half-pmi", "contrast", "none"])
def test_the_best_are_kept_best_first(pipeline, name):
    everything = pipeline(CAPTION, count=8, keep=8, rerank=name)
    scores = [picture.score for picture in everything]
    assert scores == sorted(scores, reverse=True)
    if name == "none":
        assert [picture.number for picture in everything] == list(range(8))
    else:
        assert len(set(scores)) == 8
    kept = pipeline(CAPTION, count=8, keep=3, rerank=name)
    assert [p.number for p in kept] == [p.number for p in everything[:3]]


def test_likelihood_is_the_sum_of_log_probabilities_of_the_plain_model(pipeline):
    for picture in pipeline(CAPTION, count=3, keep=3, rerank="likelihood", temperature=0.7, top_k=9, guidance=2.0):
        logits = pipeline.model(pipeline.text.encode(CAPTION), picture.tokens[None]).image[0]
        expected = logits.log_softmax(-1).gather(1, picture.tokens.flatten()[:, None]).sum()
        assert picture.score == pytest.approx(expected.item(), abs=1e-3)


def test_the_same_seed_draws_the_same_pictures_whatever_the_count(pipeline):
    many = pipeline(CAPTION, count=9, keep=9, seed=5, rerank="none")
    few = pipeline(CAPTION, count=3, keep=3, seed=5, rerank="none")
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(few, many, strict=False))
    other = pipeline(CAPTION, count=3, keep=3, seed=6, rerank="none")
    assert not any(torch.equal(a.tokens, b.tokens) for a, b in zip(few, other, strict=True))


def test_what_else_is_drawn_and_earlier_calls_do_not_matter(pipeline):
    alone = pipeline.sample([CAPTION], 3, 5).tokens
    torch.rand(10)
    together = pipeline.sample(["a cross", CAPTION, ""], 3, [1, 5, 2]).tokens
    assert torch.equal(together[3:6], alone)


def test_exact_is_bit_equal_for_any_count(pipeline):
    many = pipeline(CAPTION, count=11, keep=11, seed=5, rerank="none", exact=True)
    few = pipeline(CAPTION, count=2, keep=2, seed=5, rerank="none", exact=True)
    assert same(few, many[:2])
    logprobs = [pipeline.sample([CAPTION], count, 5, exact=True).logprobs[:2] for count in (2, 11)]
    assert torch.equal(*logprobs)


def test_settings_reach_the_sampler(pipeline):
    def drawn(**settings):
        return [p.tokens.tolist() for p in pipeline(CAPTION, count=4, keep=4, rerank="none", **settings)]

    plain = drawn()
    for setting in ({"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.2}, {"guidance": 9.0}):
        assert drawn(**setting) != plain
    greedy = drawn(top_k=1)
    assert greedy.count(greedy[0]) == 4


def test_every_setting_reaches_the_sampler_as_it_is(pipeline, monkeypatch):
    given = {"temperature": 0.5, "top_k": 7, "top_p": 0.8, "guidance": 3.0, "exact": True, "progress": len}
    seen = []

    def spy(*args, **settings):
        seen.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("dalle.pipeline.sample", spy)
    with pytest.raises(KeyboardInterrupt):
        pipeline(CAPTION, 2, 1, 11, **given)
    assert {name: seen[0][name] for name in given} == given and seen[0]["seeds"] == 11


def test_progress_adds_up(pipeline):
    steps = []
    pipeline(CAPTION, count=5, keep=1, progress=steps.append)
    assert sum(steps) == 5 * 16


@pytest.mark.parametrize("count, keep", [(4, 0), (4, 5), (4, -1), (0, 0), (-3, -3), (0, 4)])
def test_keep_is_from_one_to_count(pipeline, count, keep):
    with pytest.raises(UserError, match="keep"):
        pipeline(CAPTION, count=count, keep=keep)


@pytest.mark.parametrize("rerank", ["clip", "", "Contrast"])
def test_an_unknown_ranker_is_refused(pipeline, rerank):
    with pytest.raises(UserError, match="no score named"):
        pipeline(CAPTION, rerank=rerank)


def test_load_gives_back_what_was_saved(tiny_dalle, pipeline):
    again = dalle.load(str(tiny_dalle))
    assert same(again(CAPTION, 4, 4, 1), pipeline(CAPTION, 4, 4, 1))
    assert same(dalle.load(tiny_dalle / "model")(CAPTION, 4, 4, 1), pipeline(CAPTION, 4, 4, 1))
    assert again.captions == pipeline.captions and len(again.captions) >= 32
    assert not again.model.training and not any(p.requires_grad for p in again.model.parameters())


def test_save_pretrained_and_from_pretrained_undo_each_other(tmp_path, tiny_dalle, pipeline):
    pipeline.save_pretrained(tmp_path / "hub")
    assert artefact.digest(tmp_path / "hub") == artefact.digest(tiny_dalle / "model")
    again = Pipeline.from_pretrained(str(tmp_path / "hub"))
    assert isinstance(again, Pipeline)
    assert same(again(CAPTION, 4, 4, 1), pipeline(CAPTION, 4, 4, 1))
    again.save_pretrained(tmp_path / "once_more")
    assert artefact.digest(tmp_path / "once_more") == artefact.digest(tiny_dalle / "model")
    assert artefact.load(tmp_path / "once_more", KIND).about == {"step": 0}


def other_dvae(pipeline, **change) -> DVAE:
    torch.manual_seed(77)
    return DVAE(replace(pipeline.tokenizer.config, **change))


def test_another_dvae_put_in_the_place_of_the_part_is_refused(tmp_path, pipeline):
    """Of the same shape, whole in itself, and under the name of the old one."""
    pipeline.save_pretrained(tmp_path)
    (part,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for path in part.iterdir():
        path.unlink()
    other_dvae(pipeline).save(part)
    load_dvae(part)
    with pytest.raises(ArtefactError, match="another part than the one that was saved"):
        load(tmp_path)


@pytest.mark.parametrize("change", [{"vocab_size": 20}, {"image_size": 64}, {"groups": 3}], ids=str)
def test_a_dvae_of_other_codes_or_another_grid_is_refused(tmp_path, pipeline, change):
    """Even where someone writes a whole artefact of both."""
    other_dvae(pipeline, **change).save(tmp_path / "dvae")
    save(tmp_path / "dalle", pipeline.model, pipeline.text, pipeline.captions, tmp_path / "dvae", {})
    with pytest.raises(ArtefactError, match="codes on a .* grid"):
        load(tmp_path / "dalle")


@pytest.mark.parametrize("size, length", [(290, 16), (300, 15)])
def test_a_vocabulary_of_another_size_is_refused(tmp_path, pipeline, size, length):
    text = Text.train(pipeline.captions, size, length)
    dvae = artefact.load(pipeline.source, KIND).parts["dvae"]
    save(tmp_path, pipeline.model, text, pipeline.captions, dvae, {})
    with pytest.raises(ArtefactError, match="text ids"):
        load(tmp_path)


def test_a_vocabulary_put_in_the_place_of_the_old_one_is_refused(tmp_path, pipeline):
    pipeline.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("text-*.json")
    path.write_text(path.read_text().replace('"text_length": 16', '"text_length": 61'))
    with pytest.raises(ArtefactError, match="damaged"):
        load(tmp_path)


def write(folder: Path, pipeline: Pipeline, **change) -> None:
    """An artefact with valid digests whose content is not what `save` writes."""
    found = artefact.load(pipeline.source, KIND)
    given = {"config": found.config, "files": found.files, "parts": found.parts, **change}
    artefact.save(folder, KIND, given.pop("config"), found.tensors, **given)


def test_artefacts_with_something_missing_or_wrong_are_refused(tmp_path, pipeline):
    found = artefact.load(pipeline.source, KIND)
    write(tmp_path / "whole", pipeline)
    load(tmp_path / "whole")
    wrong = {
        "part": {"parts": {}},
        "text": {"files": {"captions": "[]"}},
        "captions": {"files": {"text": found.files["text"]}},
        "captions_json": {"files": {**found.files, "captions": "["}},
        "captions_kind": {"files": {**found.files, "captions": '{"a": 1}'}},
        "captions_numbers": {"files": {**found.files, "captions": "[1]"}},
        "text_json": {"files": {**found.files, "text": "{}"}},
        "unknown": {"config": {**found.config, "novel": 1}},
        "grid": {"config": {**found.config, "grid": 4}},
        "width": {"config": {**found.config, "width": 64}},
        "heads": {"config": {**found.config, "heads": 3}},
    }
    for name, change in wrong.items():
        write(tmp_path / name, pipeline, **change)
        with pytest.raises(ArtefactError):
            load(tmp_path / name)


def test_stage_one_is_not_a_pipeline(tiny_dvae):
    with pytest.raises(ArtefactError, match="a dvae artefact"):
        load(tiny_dvae)


def test_without_captions_contrast_is_refused_in_words_and_the_others_work(tmp_path, pipeline):
    save(tmp_path, pipeline.model, pipeline.text, [], artefact.load(pipeline.source, KIND).parts["dvae"], {})
    bare = load(tmp_path)
    assert len(bare(CAPTION, 2, 1, rerank="likelihood")) == len(bare(CAPTION, 2, 1)) == 1
    with pytest.raises(UserError, match="nothing to rank by contrast"):
        bare(CAPTION, 2, 1, rerank="contrast")


def test_half_pmi_is_the_default(pipeline):
    default, half = (pipeline(CAPTION, count=6, keep=6, **given) for given in ({}, {"rerank": "half-pmi"}))
    assert [(p.number, p.score) for p in default] == [(p.number, p.score) for p in half]
    assert len({p.score for p in half}) > 1
    assert sorted(p.score for p in half) != sorted(p.score for p in pipeline(CAPTION, 6, 6, rerank="pmi"))


def test_the_config_on_disk_is_the_models(tiny_dalle, pipeline):
    manifest = json.loads((tiny_dalle / "model" / "artefact.json").read_text())
    assert manifest["config"] == json.loads(json.dumps(asdict(pipeline.model.config)))
    assert isinstance(pipeline.model, DALLE)


BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""
DRAW = """
import sys
from dalle.__main__ import main
code = main(["sample", sys.argv[1], "a red circle", "--count", "2", "--keep", "1", "--out", sys.argv[2]])
print("lightning" in {name.split(".")[0] for name in sys.modules}, "tokenizers" in sys.modules)
sys.exit(code)
"""


@pytest.mark.parametrize("before", ["", BLOCK], ids=["free", "blocked"])
def test_drawing_needs_no_lightning(tmp_path, tiny_dalle, before):
    done = subprocess.run(
        [sys.executable, "-c", before + DRAW, str(tiny_dalle), str(tmp_path / "out")],
        capture_output=True, text=True, cwd=Path(dalle.__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False True"
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_without_dropped_captions_the_null_prompt_ranks_nothing(tmp_path, tiny_dalle, pipeline, capsys):
    part = artefact.load(pipeline.source, KIND).parts["dvae"]
    for share, ranker in ((0.0, "likelihood"), (0.1, "half-pmi"), (None, "half-pmi")):  # None: of an older training
        about = {} if share is None else {"caption_dropout": share}
        save(tmp_path / str(share), pipeline.model, pipeline.text, pipeline.captions, part, about)
        drawer = load(tmp_path / str(share))
        assert drawer.ranker == ranker
        assert same(drawer(CAPTION, count=6, keep=3), pipeline(CAPTION, count=6, keep=3, rerank=ranker))
    warning = "warning: this model was trained without dropped captions: guidance, pmi and half-pmi mean nothing"
    for share, settings, warned in (
        ("0.0", ["--guidance", "2"], True),
        ("0.0", ["--rerank", "pmi"], True),
        ("0.0", [], False),
        ("0.1", ["--guidance", "2", "--rerank", "pmi"], False),
    ):
        out = ["--count", "2", "--out", str(tmp_path / "out")]
        assert main(["sample", str(tmp_path / share), CAPTION, *settings, *out]) == 0
        assert (warning in capsys.readouterr().err) == warned
    made = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert made["rerank"] in ("likelihood", "half-pmi", "pmi")


def both_orders(pipeline, folder, weights=None) -> Pipeline:
    """The pipeline of a random model of both orders."""
    c = pipeline.model.config
    torch.manual_seed(3)
    model = DALLE(replace(c, both_orders=True))
    part = artefact.load(pipeline.source, KIND).parts["dvae"]
    save(folder, model, pipeline.text, pipeline.captions, part, {}, weights)
    return load(folder)


def test_a_model_that_captions_ranks_by_combined_and_fitted_weights_are_kept(tmp_path, pipeline):
    plain = both_orders(pipeline, tmp_path / "plain")
    assert plain.ranker == "combined" and plain.weights is None
    scores, caption, likelihood = (
        {p.number: p.score for p in plain(CAPTION, 6, 6, guidance=1.5, rerank=name)}
        for name in (None, "caption", "likelihood")
    )
    mean, deviation = statistics.fmean(likelihood.values()), statistics.pstdev(likelihood.values())
    expected = {k: caption[k] + min(0, (likelihood[k] - mean) / deviation) for k in scores}
    assert scores == pytest.approx(expected, abs=1e-3)

    weights = {"caption-seen": 1.0, "half-pmi": 0.25}
    fitted = both_orders(pipeline, tmp_path / "fitted", weights)
    assert fitted.ranker == "combined" and fitted.weights == weights
    fitted.save_pretrained(tmp_path / "again")
    assert Pipeline.from_pretrained(str(tmp_path / "again")).weights == weights
    shrink(str(tmp_path / "fitted"), str(tmp_path / "small"))
    assert load(tmp_path / "small").weights == weights


@pytest.mark.parametrize("content", ["[]", "{}", '{"weights": {}}', '{"weights": {"clip": 1}}', '{"weights": [1]}',
                                     '{"weights": {"combined": 1}}', '{"weights": {"caption": "x"}}'])  # fmt: skip
def test_weights_of_nothing_known_are_refused(tmp_path, pipeline, content):
    both_orders(pipeline, tmp_path / "a", {"likelihood": 1.0})
    found = artefact.load(tmp_path / "a", KIND)
    files = found.files | {"ranker": content}
    artefact.save(tmp_path / "b", KIND, found.config, found.tensors, files=files, parts=found.parts)
    with pytest.raises(ArtefactError, match="weights of known scores"):
        load(tmp_path / "b")


def test_pruned_pictures_are_the_unpruned_ones(pipeline):
    """What is left is drawn as it would have been; the hopeless are those that half-pmi ranks last on the way."""
    everything = pipeline(CAPTION, 16, 16, seed=2, guidance=1.5)
    by_number = {p.number: p for p in everything}
    steps = []
    pruned = pipeline(CAPTION, 16, 3, seed=2, guidance=1.5, prune=True, progress=steps.append)
    assert len(pruned) == 3 and sum(steps) == 16 * 4 + 6 * 4 + 3 * 8
    for picture in pruned:
        assert torch.equal(picture.tokens, by_number[picture.number].tokens)
        assert picture.score == pytest.approx(by_number[picture.number].score, abs=1e-3)
    sampled = pipeline.sample([CAPTION], 16, 2, guidance=1.5)
    left = list(range(16))
    for cells, keep in ((4, 6), (8, 3)):
        partial = sampled.logprobs[:, :cells].sum(1) - sampled.null[:, :cells].sum(1) / 2
        left = sorted(left, key=lambda k: -partial[k].item())[:keep]
    assert {p.number for p in pruned} == set(left)
    for given in (dict(keep=4), dict(keep=1, exact=True)):
        with pytest.raises(UserError, match="prune draws 3 of 16"):
            pipeline(CAPTION, 16, prune=True, **given)


def test_a_model_of_one_order_is_not_asked_to_caption(pipeline):
    for name in ("caption", "caption-seen", "combined"):
        with pytest.raises(UserError, match="does not caption"):
            pipeline(CAPTION, 2, 1, rerank=name)


@pytest.mark.parametrize("caption", ["", " \t\n"])
def test_captions_that_say_nothing_are_refused_and_strange_characters_are_known(pipeline, caption):
    for given in ((caption, {}), (CAPTION, {"blend": (caption, 0.5)})):
        with pytest.raises(UserError, match="says nothing"):
            pipeline(given[0], 2, 1, **given[1])
    assert pipeline.unread("a r\u00e9d circle, \u00c9") == {"\u00e9"} | {","} - set("".join(pipeline.captions))
    assert len(pipeline("a r\u00e9d circle", 2, 1)) == 1


def test_pictures_without_words_and_between_two_captions(pipeline):
    drawn = pipeline.unconditional(3, seed=5, temperature=0.8)
    assert torch.equal(torch.stack([p.tokens for p in drawn]), pipeline.sample([""], 3, 5, temperature=0.8).tokens)
    assert [(p.number, p.caption, p.score) for p in drawn] == [(k, "", 0.0) for k in range(3)]
    one, other = CAPTION, "a blue square"

    def tokens(caption, **given):
        return [p.tokens.tolist() for p in pipeline(caption, 4, 4, 2, rerank="none", guidance=2.0, **given)]

    assert tokens(one, blend=(other, 0.0)) == tokens(one)
    assert tokens(one, blend=(other, 1.0)) == tokens(other)
    assert tokens(one, blend=(other, 0.5)) not in (tokens(one), tokens(other))
    blended = pipeline(one, 4, 4, 2, blend=(other, 0.5), rerank="likelihood")
    for picture in blended:  # ranked as pictures of the first
        logits = pipeline.model(pipeline.text.encode(one), picture.tokens[None]).image[0].log_softmax(-1)
        expected = logits.gather(1, picture.tokens.flatten()[:, None]).sum().item()
        assert picture.score == pytest.approx(expected, abs=1e-3)
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="share of the second prompt"):
            pipeline(one, 2, 1, blend=(other, share))
    mute = load(pipeline.source)
    mute.knows_null = False
    with pytest.raises(UserError, match="nothing without words"):
        mute.unconditional()
