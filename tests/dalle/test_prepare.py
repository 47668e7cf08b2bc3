"""Prepared folders hold what encoding gives, belong together, and are whole or not there."""

import contextlib
import gc
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tracemalloc
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from dalle import prepare as room
from dalle.__main__ import main
from dalle.pairs import open_pairs
from dalle.prepare import MANIFEST, UNFINISHED, Pairs, Prepared, prepare, vocab
from dalle.text import Text
from dvae import artefact, scenes, seeds
from dvae.data import Scenes, open_source, split
from dvae.errors import ArtefactError, DataError, UserError
from dvae.files import sha256_file
from dvae.images import crop_near_centre, save
from dvae.model import DVAE
from dvae.tokenizer import load

ROOT = Path(__file__).resolve().parent.parent.parent


def listing(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def words(tiny_tokens) -> str:
    return str(tiny_tokens / "text.json")


@pytest.fixture
def copied(tmp_path, tiny_tokens):
    """A prepared folder that a test may damage."""
    return shutil.copytree(tiny_tokens, tmp_path / "copied")


def test_tokens_on_disk_are_those_that_encode_gives(tiny_tokens, tiny_dvae):
    prepared, tokenizer = Prepared(tiny_tokens), load(tiny_dvae)
    for part, name in ((prepared.train, "scenes:train:64"), (prepared.val, "scenes:val:8")):
        source = open_source(name, 32)
        assert len(part) == len(source)
        expected = tokenizer.encode(source.images(range(len(source))).float() / 255)
        assert torch.equal(part.tokens(range(len(source))), expected)
        assert [part.captions(k) for k in range(len(part))] == [list(source.captions(k)) for k in range(len(source))]
    assert len(prepared.train.tokens(range(64)).unique()) > 8


def test_crops_are_those_of_listing_2_and_validation_has_none(tmp_path, tiny_dvae, words):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(24):
        image = torch.from_numpy(np.random.default_rng(k).integers(0, 256, (3, 48, 40), np.uint8))
        save(image, folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"picture {k}")
    out = tmp_path / "out"
    prepare(str(folder), str(tiny_dvae), words, str(out), val_share=0.3, crops=3, batch=5)
    prepared, tokenizer = Prepared(out), load(tiny_dvae)
    train, held = split(open_source(str(folder), 32), 0.3)
    assert (prepared.train.crops, prepared.val.crops) == (3, 1) and len(prepared.train) == len(train)
    squares = held.images(range(len(held))).float() / 255
    assert torch.equal(prepared.val.tokens(range(len(held))), tokenizer.encode(squares))
    for crop in range(3):
        rngs = [seeds.rng("crop", crop, k) for k in range(len(train))]
        cropped = torch.stack([crop_near_centre(train.image(k), 32, rng) for k, rng in enumerate(rngs)])
        expected = tokenizer.encode(cropped.float() / 255)
        assert torch.equal(prepared.train.tokens(range(len(train)), crop), expected)
    assert len({prepared.train.tokens(range(len(train)), crop).numpy().tobytes() for crop in range(3)}) == 3


def test_a_vocabulary_may_be_that_of_a_trained_transformer(tmp_path, tiny_dvae, tiny_dalle, words):
    for name, text in (("file", words), ("run", str(tiny_dalle))):
        prepare("scenes:train:20", str(tiny_dvae), text, str(tmp_path / name), val="scenes:val:4")
    assert (tmp_path / "run" / "text.json").read_bytes() == (tmp_path / "file" / "text.json").read_bytes()
    with pytest.raises(ArtefactError, match="there is no vocabulary at"):
        prepare("scenes:train:20", str(tiny_dvae), str(tmp_path / "none"), str(tmp_path / "other"), val="scenes:val:4")


def test_tokens_of_another_version_are_refused_by_name(copied):
    described = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps({**described, "format": 1}))
    with pytest.raises(DataError, match="prepared by another version"):
        Prepared(copied)


def test_captions_stay_text(tiny_tokens):
    line = (tiny_tokens / "train" / "captions.jsonl").read_text().splitlines()[3]
    assert tuple(json.loads(line)) == scenes.captions("train", 3)


def test_sizes_are_those_of_both_tokenizers(tiny_tokens, tiny_dvae):
    prepared = Prepared(tiny_tokens)
    s = prepared.sizes
    assert (s.vocab_image, s.grid) == (16, (4, 4))
    assert (s.vocab_text, s.text_length) == (prepared.text.vocab_size, 16)
    assert artefact.digest(prepared.dvae) == artefact.digest(tiny_dvae)


def test_the_folder_needs_nothing_else(tmp_path, tiny_tokens):
    moved = shutil.copytree(tiny_tokens, tmp_path / "elsewhere")
    assert {path.name for path in moved.iterdir()} == {"train", "val", "dvae", "text.json", MANIFEST}
    assert torch.equal(Prepared(moved).train.tokens([1, 2]), Prepared(tiny_tokens).train.tokens([1, 2]))


def test_batches_do_not_matter(tmp_path, tiny_tokens, tiny_dvae, words):
    prepare("scenes:train:64", str(tiny_dvae), words, str(tmp_path), val="scenes:val:8", batch=7)
    assert listing(tmp_path) == listing(tiny_tokens)


def test_without_val_a_share_is_set_aside(tmp_path, tiny_dvae, words):
    prepare("scenes:train:64", str(tiny_dvae), words, str(tmp_path), val_share=0.25)
    prepared = Prepared(tmp_path)
    sides = [[tuple(part.captions(k)) for k in range(len(part))] for part in (prepared.train, prepared.val)]
    assert 5 <= len(sides[1]) <= 30
    assert sorted(sides[0] + sides[1]) == sorted(scenes.captions("train", index) for index in range(64))


def test_captions_that_will_be_cut_are_counted(tmp_path, tiny_dvae, words, capsys):
    captions = [caption for index in range(64) for caption in scenes.captions("train", index)]
    lengths = Text.from_file(words).lengths(captions)
    length = int(lengths.median())
    long = int((lengths > length).sum())
    assert 0 < long < len(captions)
    prepare("scenes:train:64", str(tiny_dvae), words, str(tmp_path), val="scenes:val:8", length=length)
    out = capsys.readouterr().out
    assert f"{len(captions)} captions, " in out and f" {length} of them per caption" in out
    assert f" {long} will be cut" in out
    assert "train: 64 listed, 64 used, 0 skipped" in out
    assert Prepared(tmp_path).sizes.text_length == length


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("calls", [1, 2, 4])
def test_an_interrupted_call_leaves_nothing_that_loads_and_the_next_one_succeeds(
    tmp_path, monkeypatch, tiny_tokens, tiny_dvae, words, calls, workers
):
    """The interruption comes at the first batch, in the middle of train, and in the middle of val."""
    out, left, encode = tmp_path / "out", [calls], DVAE.encode

    def interrupted(self, images):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return encode(self, images)

    arguments = ("scenes:train:64", str(tiny_dvae), words, str(out), "scenes:val:8")
    with monkeypatch.context() as patched:
        patched.setattr(DVAE, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(*arguments, batch=24, workers=workers)
    with pytest.raises(DataError):
        Prepared(out)
    prepare(*arguments)
    assert listing(out) == listing(tiny_tokens)


def test_an_interruption_before_the_manifest_leaves_nothing_that_loads(tmp_path, monkeypatch, tiny_dvae, words):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "asdict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("scenes:train:64", str(tiny_dvae), words, str(tmp_path), val="scenes:val:8")
    with pytest.raises(DataError, match="no prepared tokens"):
        Prepared(tmp_path)


def test_useless_data_are_warned_of(tmp_path, tiny_dvae, words, capsys):
    for n in range(4):
        save(open_source("scenes:train:4", 32).image(n), tmp_path / "same" / f"{n}.png")
        (tmp_path / "same" / f"{n}.txt").write_text("a thing")
    prepare("scenes:train:4", str(tiny_dvae), words, str(tmp_path / "less"), val="scenes:val:8")
    assert "warning: 8 rows to validate on, but only 4 to train on" in capsys.readouterr().err
    prepare(str(tmp_path / "same"), str(tiny_dvae), words, str(tmp_path / "equal"), val_share=0.3)
    assert "are the same: 'a thing'" in capsys.readouterr().err
    prepare("scenes:train:8", str(tiny_dvae), words, str(tmp_path / "good"), val_share=0.3)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("limit", [1_000, 40_000], ids=["in the tokenizer", "in the captions"])
def test_a_full_disk_is_told_and_leaves_nothing_that_loads(tmp_path, tiny_dvae, words, limit, capsys):
    arguments = ["prepare", "scenes:train:800", "--dvae", str(tiny_dvae), "--text", words, "--val", "scenes:val:8"]
    arguments += ["--out", str(tmp_path / "out")]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))  # Python ignores the signal; writing fails
    try:
        code = main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "hint", "Trace"))]
    assert code == 5 and [line.split(":")[0] for line in lines] == ["error", "hint"] and "large" in lines[0]
    with pytest.raises(DataError):
        Prepared(tmp_path / "out")
    assert main(arguments) == 0 and len(Prepared(tmp_path / "out").train) == 800


def test_a_failure_at_the_very_end_can_be_repeated(tmp_path, monkeypatch, tiny_dvae, words):
    arguments = ("scenes:train:64", str(tiny_dvae), words, str(tmp_path / "out"), "scenes:val:8")
    real = room.files.write_json

    def full(path, value):
        if path.name == MANIFEST:
            raise OSError(28, "No space left on device")
        real(path, value)

    with monkeypatch.context() as patched:
        patched.setattr(room.files, "write_json", full)
        with pytest.raises(OSError):
            prepare(*arguments)
    with pytest.raises(DataError):
        Prepared(tmp_path / "out")
    prepare(*arguments)
    assert len(Prepared(tmp_path / "out").train) == 64


def test_a_finished_folder_is_not_overwritten(copied, tiny_dvae, words):
    before = listing(copied)
    with pytest.raises(UserError, match="not empty"):
        prepare("scenes:train:64", str(tiny_dvae), words, str(copied))
    assert listing(copied) == before


@pytest.mark.parametrize("inside", ["train/picture.png", "val/picture.png", "dvae/model/artefact.json", "notes.txt"])
def test_a_folder_with_anything_of_the_users_is_left_alone(tmp_path, tiny_dvae, words, inside):
    """A data set has a train/ too, and a run folder a dvae/."""
    path = tmp_path / inside
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        prepare("scenes:train:64", str(tiny_dvae), words, str(tmp_path))
    assert listing(tmp_path) == {inside: b"precious"}


def test_the_tokenizer_that_is_kept_is_the_one_that_encoded(tmp_path, monkeypatch, tiny_dvae, words):
    """A training of stage 1 that goes on replaces its model/ while the pictures are being encoded."""
    run = tmp_path / "run"
    shutil.copytree(tiny_dvae, run / "model")
    encode, model = DVAE.encode, load(tiny_dvae)

    def replaced_meanwhile(self, images):
        DVAE(model.config).save(run / "model")
        return encode(self, images)

    monkeypatch.setattr(DVAE, "encode", replaced_meanwhile)
    prepare("scenes:train:64", str(run), words, str(tmp_path / "out"), val="scenes:val:8")
    prepared = Prepared(tmp_path / "out")
    assert artefact.digest(run / "model") != artefact.digest(tiny_dvae) == artefact.digest(prepared.dvae)
    images = open_source("scenes:train:64", 32).images(range(64)).float() / 255
    assert torch.equal(prepared.train.tokens(range(64)), encode(load(prepared.dvae), images))


def test_wrong_inputs_leave_no_folder(tmp_path, tiny_dvae, words):
    out = tmp_path / "out"
    for kind, change in (
        (DataError, {"data": "/nowhere/at/all"}),
        (DataError, {"val": "scenes:nosuch"}),
        (ArtefactError, {"dvae": str(tmp_path)}),
        (ArtefactError, {"text": str(tmp_path / "text.json")}),
        (UserError, {"batch": 0}),
        (UserError, {"workers": -1}),
    ):
        given = {"data": "scenes:train:64", "dvae": str(tiny_dvae), "text": words, "out": str(out), **change}
        with pytest.raises(kind):
            prepare(**given)
        assert not out.exists()


@pytest.mark.parametrize("vocab_size", [16, 17])
def test_a_foreign_tokenizer_is_refused_also_one_of_the_same_shape(copied, tiny_dvae, vocab_size):
    torch.manual_seed(99)
    shutil.rmtree(copied / "dvae")
    DVAE(replace(load(tiny_dvae).config, vocab_size=vocab_size)).save(copied / "dvae")
    with pytest.raises(ArtefactError, match="not the one that made these tokens"):
        Prepared(copied)


def test_a_foreign_vocabulary_is_refused(copied):
    text = Text.train(["other words entirely"], 300, 16)
    (copied / "text.json").write_text(text.to_json())
    with pytest.raises(ArtefactError, match="vocabulary"):
        Prepared(copied)


@pytest.mark.parametrize(
    "gone, kind",
    [
        (MANIFEST, DataError), ("text.json", ArtefactError), ("dvae", ArtefactError),
        ("dvae/artefact.json", ArtefactError), ("train", DataError), ("val/tokens.json", DataError),
    ],
)  # fmt: skip
def test_a_missing_piece_is_refused(copied, gone, kind):
    path = copied / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(kind):
        Prepared(copied)


def test_a_broken_manifest_is_refused(copied):
    for content in ("", "{", "[]", "null", '{"sizes": {}}', '{"sizes": {"grid": 4}, "dvae": "", "text": ""}'):
        (copied / MANIFEST).write_text(content)
        with pytest.raises(DataError):
            Prepared(copied)


def test_vocab_learns_from_the_captions_and_says_how_long_they_are(tmp_path, capsys):
    vocab("scenes:train:64", str(tmp_path / "text.json"), size=280, length=7)
    text = Text.from_file(tmp_path / "text.json")
    captions = [caption for index in range(64) for caption in scenes.captions("train", index)]
    lengths = text.lengths(captions)
    assert (text.vocab_size, text.text_length) == (280, 7)
    out = capsys.readouterr().out
    assert f"{len(captions)} captions, a vocabulary of 280 ids, 7 of them per caption" in out
    assert f"the longest caption has {lengths.max()}" in out
    assert f"{int((lengths > 7).sum())} will be cut" in out and (lengths > 7).any()


def test_tokens_of_another_call_are_refused(tiny_tokens, tmp_path):
    folder = shutil.copytree(tiny_tokens, tmp_path / "mixed")
    about = json.loads((folder / "val" / "tokens.json").read_text())
    (folder / "val" / "tokens.json").write_text(json.dumps(about))  # the same words, other bytes: another call's file
    with pytest.raises(ArtefactError, match="another call"):
        Prepared(folder)


def test_without_a_vocabulary_one_is_learned_that_holds_nearly_all_captions(tmp_path, tiny_dvae):
    prepare("scenes:train:200", str(tiny_dvae), out=str(tmp_path / "out"), val="scenes:val:8", size=300)
    captions = [caption for index in range(200) for caption in scenes.captions("train", index)]
    prepared = Prepared(tmp_path / "out")
    assert prepared.sizes.vocab_text == prepared.text.vocab_size <= 300
    assert prepared.text.to_json() == Text.train(captions, 300, prepared.text.text_length).to_json()
    lengths = prepared.text.lengths(captions)
    longer = [int((lengths > length).sum()) for length in (prepared.text.text_length - 1, prepared.text.text_length)]
    assert longer[0] > 2 >= longer[1], "one id less would cut more than 1 % of the captions"


def test_sizes_that_contradict_each_other_are_refused(copied):
    manifest = json.loads((copied / MANIFEST).read_text())
    true = manifest["sizes"]

    def refused(place: str, **sizes) -> None:
        ((name, said),) = sizes.items()
        (copied / MANIFEST).write_text(json.dumps({**manifest, "sizes": {**true, name: said}}))
        said, found = (tuple(value) if name == "grid" else value for value in (said, true[name]))
        with pytest.raises(ArtefactError) as error:
            Prepared(copied)
        assert error.value.what == f"{name} is {said} in {copied / MANIFEST}, {found} in {copied / place}"
        assert error.value.hint == "make the tokens again with dalle prepare"

    refused("text.json", vocab_text=299)
    refused("text.json", text_length=17)
    refused("dvae", vocab_image=17)
    refused("dvae", grid=[4, 5])
    (copied / MANIFEST).write_text(json.dumps(manifest))
    assert Prepared(copied).sizes.grid == (4, 4)


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("name, value", [("vocab_image", 15), ("grid", [2, 8])])
def test_token_files_of_other_sizes_are_refused(copied, part, name, value):
    manifest, path = json.loads((copied / MANIFEST).read_text()), copied / part / "tokens.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    manifest["tokens"][part] = sha256_file(path)
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError) as error:
        Prepared(copied)
    said, found = (tuple(x) if name == "grid" else x for x in (manifest["sizes"][name], value))
    assert error.value.what == f"{name} is {said} in {copied / MANIFEST}, {found} in {copied / part}"


def test_a_tokenizer_of_another_grid_is_refused(copied, tiny_dvae):
    """The same codes on larger pictures, and its digest noted as if the tokens were its own."""
    config = replace(load(tiny_dvae).config, image_size=48)
    shutil.rmtree(copied / "dvae")
    DVAE(config).save(copied / "dvae")
    manifest = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps({**manifest, "dvae": artefact.digest(copied / "dvae")}))
    with pytest.raises(ArtefactError) as error:
        Prepared(copied)
    assert error.value.what == f"grid is (4, 4) in {copied / MANIFEST}, (6, 6) in {copied / 'dvae'}"


def test_looking_at_tokens_leaves_the_random_numbers_of_a_training_alone(tiny_tokens):
    before = torch.get_rng_state()
    Prepared(tiny_tokens)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------- who does the work


def pictures(folder, count=40):
    """A folder of pictures of their own size, each with one or two captions."""
    for k in range(count):
        image = torch.from_numpy(np.random.default_rng(k).integers(0, 256, (3, 40 + k % 3, 36), np.uint8))
        save(image, folder / f"{k:02d}.png")
        (folder / f"{k:02d}.txt").write_text(f"picture number {k}\n" + "another word\n" * (k % 2))
    return folder


def tar(folder, source):
    folder.mkdir()
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for path in sorted(source.iterdir()):
            archive.add(path, path.name)
    return folder / "shard.tar"


def parquet(folder, source):
    folder.mkdir()
    names = sorted(path.stem for path in source.glob("*.png"))
    columns = {
        "image": [{"bytes": (source / f"{name}.png").read_bytes(), "path": None} for name in names],
        "text": [(source / f"{name}.txt").read_text().splitlines() for name in names],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    return folder / "a.parquet"


@pytest.fixture(params=["scenes", "folder", "tar", "parquet"])
def source(request, tmp_path, monkeypatch) -> str:
    """A name of a data source of 40 pairs, of each kind that is read in its own way."""
    if request.param == "scenes":
        return "scenes:train:40"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = pictures(tmp_path / "pictures")
    makers = {"folder": lambda _, there: there, "tar": tar, "parquet": parquet}
    return str(makers[request.param](tmp_path / "data", folder))


def test_whoever_loads_the_pictures_the_folder_is_the_same(tmp_path, tiny_dvae, source, capsys):
    said = {}
    for workers, batch in ((0, 64), (0, 6), (1, 6), (2, 5)):
        out = tmp_path / f"{workers} {batch}"
        prepare(source, str(tiny_dvae), out=str(out), val_share=0.3, size=280, crops=2, batch=batch, workers=workers)
        said[out] = capsys.readouterr().out.replace(str(out), "out"), listing(out)
    first, *others = said.values()
    assert others == [first] * 3


def test_what_a_loading_process_needs_survives_the_way_to_it(source):
    """Where processes are not forked, all is pickled."""
    train, _ = split(open_pairs(source, 32), 0.3)
    here, there = Pairs(train, 2), pickle.loads(pickle.dumps(Pairs(train, 2)))
    rows = [(0, 3), (0, 0)]
    (images, captions), (others, words) = here.__getitems__(rows), there.__getitems__(rows)
    assert torch.equal(images, others) and captions == words and images.shape == (2, 2, 3, 32, 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_rows_are_told_and_counted(tmp_path, tiny_dvae, workers, capsys):
    folder = pictures(tmp_path / "pictures")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:90])
    (folder / "09.txt").write_text(" ")
    arguments = {"val": "scenes:val:4", "size": 280, "batch": 6, "max_bad": 0.1, "workers": workers}
    prepare(str(folder), str(tiny_dvae), out=str(tmp_path / "out"), **arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("skipped")] == [
        "skipped 07.png: truncated", "skipped 09.png: no caption"
    ]  # fmt: skip
    assert "train: 40 listed, 38 used, 2 skipped" in lines and "val: 4 listed, 4 used, 0 skipped" in lines
    assert len(Prepared(tmp_path / "out").train) == 38


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_changes_meanwhile_is_named(tmp_path, monkeypatch, tiny_dvae, words, workers, capsys):
    folder, encode = pictures(tmp_path / "pictures"), DVAE.encode

    def meanwhile(self, images):
        (folder / "38.png").write_bytes((folder / "37.png").read_bytes())
        return encode(self, images)

    monkeypatch.setattr(DVAE, "encode", meanwhile)
    arguments = ["prepare", folder, "--dvae", tiny_dvae, "--text", words, "--val", "scenes:val:4", "--batch", 2]
    assert main([*map(str, arguments), "--out", str(tmp_path / "out"), "--workers", str(workers)]) == 3
    said = capsys.readouterr().err
    assert said.startswith(f"error: {folder}: 38.png changed since it was examined (other bytes)\nhint: bring")
    assert said.count("\n") == 2 and (tmp_path / "out" / UNFINISHED).exists()


def test_a_loading_process_that_dies_is_told(tmp_path, monkeypatch, tiny_dvae, words, capsys):
    encode = DVAE.encode

    def killing(self, images):
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        return encode(self, images)

    arguments = ["prepare", "scenes:train:64", "--dvae", str(tiny_dvae), "--text", words, "--batch", "2"]
    arguments += ["--workers", "1", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(DVAE, "encode", killing)
        assert main(arguments) == 5
    said = capsys.readouterr().err
    assert said.startswith("error: a loading process died: ") and "fewer --workers" in said and said.count("\n") == 2
    assert main(arguments) == 0


def test_ctrl_c_reaches_all_processes_and_leaves_a_folder_to_be_cleared(tmp_path, tiny_dvae, words):
    out = tmp_path / "out"
    arguments = ["prepare", "scenes:train:20000", "--dvae", str(tiny_dvae), "--text", words, "--out", str(out)]
    arguments += ["--val", "scenes:val:8", "--batch", "1", "--workers", "2"]
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job has none
    program += "import sys, dalle.__main__; sys.exit(dalle.__main__.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        written = out / "train" / "tokens.bin"
        while process.poll() is None and not (written.exists() and written.stat().st_size):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):  # as it should be: nobody is left
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and said == ""
    assert (out / UNFINISHED).exists() and not (out / "train" / "tokens.json").exists()
    with pytest.raises(DataError):
        Prepared(out)


def test_by_itself_it_starts_processes_where_they_are_worth_it(tmp_path, monkeypatch, tiny_dvae, words):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert [room.spare(batches) for batches in (0, 1, 15, 16, 47, 48, 10_000)] == [0, 0, 0, 1, 2, 3, 3]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1), raising=False)
    assert room.spare(10_000) == 0
    monkeypatch.delattr(os, "sched_getaffinity")  # which not every system has
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert room.spare(10_000) == 2
    asked, real = [], room.once
    monkeypatch.setattr(room, "once", lambda pairs, batch, workers: (asked.append(workers), real(pairs, batch, 0))[1])
    arguments = ("scenes:train:64", str(tiny_dvae), words)
    for name, settings in (("few", {}), ("many", {"batch": 4}), ("none", {"batch": 4, "workers": 0})):
        prepare(*arguments, str(tmp_path / name), "scenes:val:8", **settings)
    assert asked == [0, 0, 1, 0, 0, 0]


# --------------------------------------------------------------------------------------------- what it reads and keeps


@pytest.mark.parametrize("learned", [False, True])
def test_captions_are_read_once_to_learn_their_words_and_once_to_be_written(
    tmp_path, monkeypatch, tiny_dvae, words, learned
):
    read, captions = Counter(), Scenes.captions
    monkeypatch.setattr(Scenes, "captions", lambda self, k: (read.update([(self.name, k)]), captions(self, k))[1])
    text = None if learned else words
    prepare("scenes:train:64", str(tiny_dvae), text, str(tmp_path), "scenes:val:8", size=280, batch=16, workers=0)
    seen = {("scenes:train:64", k): 1 + learned for k in range(64)} | {("scenes:val:8", k): 1 for k in range(8)}
    looked_at = Counter({("scenes:train:64", 0): 2, ("scenes:train:64", 1): 1})  # whether all are the same
    assert read == Counter(seen) + looked_at


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch, tiny_dvae):
    held, alive, drawn = [], [], []
    captions, draw = Scenes.captions, scenes.draw

    def read(self, index):
        if index == len(self) - 1:
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
        return captions(self, index)

    def counted(rows, size):
        alive.append(sum(picture() is not None for picture in drawn))
        made = draw(rows, size)
        drawn.append(weakref.ref(made))
        return made

    def bytes_held(count, out):
        """When the last caption is read: by the learning of the vocabulary, by the writing, and of the validation."""
        held.clear()
        tracemalloc.start()
        settings = {"val": "scenes:val:8", "size": 280, "batch": 50, "workers": 0}
        prepare(f"scenes:train:{count}", str(tiny_dvae), out=str(tmp_path / out), **settings)
        tracemalloc.stop()
        return np.array(held)

    monkeypatch.setattr(Scenes, "captions", read)
    bytes_held(300, "first")  # what is held once and for all
    small, large = bytes_held(300, "small"), bytes_held(1100, "large")
    grown = (large - small) / 800
    assert grown.shape == (3,) and grown.max() < 60, f"{grown} bytes a row; a caption has more than 100"
    monkeypatch.setattr(scenes, "draw", counted)
    bytes_held(400, "drawn")
    assert len(alive) == 9 and max(alive) <= 1, "a picture is given up when it is encoded"


def test_99_percent_is_the_quantile_of_all_lengths():
    text = Text.train(["a few words"], 256, 16)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        each = rng.integers(0, rng.integers(1, 300), rng.integers(1, 500))
        expected = int(np.quantile(each, 0.99, method="higher"))
        assert room.shortened(text, Counter(each.tolist())).text_length == min(max(expected, 1), room.LONGEST)
