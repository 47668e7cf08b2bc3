import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dvae import artefact, files
from dvae.errors import ArtefactError, NumericsError

CONFIG = {"image_size": 32, "groups": [1, 2], "beta": 6.6, "name": "klein & fein"}


def tensors(seed=0):
    noise = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(4, 3, generator=noise),
        "half": torch.randn(5, generator=noise).to(torch.bfloat16),
        "count": torch.tensor([seed, 7]),
        "none": torch.zeros(0, 2),
    }


@pytest.fixture
def dvae(tmp_path):
    artefact.save(tmp_path / "tokenizer", "dvae", {"vocab_size": 8}, tensors(9))
    return tmp_path / "tokenizer"


@pytest.fixture
def dalle(tmp_path, dvae):
    """An artefact with everything in it: weights, a text, a part."""
    folder = tmp_path / "model"
    artefact.save(
        folder, "dalle", CONFIG, tensors(), files={"text": '{"größe": 1}'}, parts={"dvae": dvae}, about={"step": 3}
    )
    return folder


def same(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def facts(found):
    """What an artefact says, but for `about`."""
    return found.kind, found.config, found.files, sorted(found.parts), found.digest


def forge(folder, change):
    """Rewrite the manifest as someone would who knows how digests are made."""
    manifest = json.loads((folder / "artefact.json").read_text())
    change(manifest)
    manifest["digest"] = artefact._digest(manifest)
    (folder / "artefact.json").write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------------------------------ whole


def test_round_trip(dalle, dvae):
    found = artefact.load(dalle, "dalle")
    assert (found.kind, found.config, found.about) == ("dalle", CONFIG, {"step": 3})
    assert found.files == {"text": '{"größe": 1}'}
    assert same(found.tensors, tensors())
    part = artefact.load(found.parts["dvae"], "dvae")
    assert part.config == {"vocab_size": 8} and same(part.tensors, tensors(9))
    assert part.digest == artefact.digest(dvae)
    assert found.parts["dvae"].parent == dalle  # a copy: the artefact needs nothing outside
    shutil.rmtree(dvae)
    assert facts(artefact.load(dalle, "dalle")) == facts(found)


def test_tensors_that_share_memory_or_are_views(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    tied = {"a": weight, "b": weight, "turned": weight.T, "row": weight[1], "grown": torch.ones(1).expand(3)}
    artefact.save(tmp_path / "m", "dvae", {}, tied)
    assert same(artefact.load(tmp_path / "m", "dvae").tensors, tied)


def test_digest_is_of_the_content_only(tmp_path, dvae):
    def saved(name, **changes):
        arguments = {"kind": "dalle", "config": CONFIG, "tensors": tensors(), "files": {"text": "{}"}} | changes
        return artefact.save(tmp_path / name, **arguments)

    first = saved("a")
    assert first == saved("b", about={"loss": 1.5}) == artefact.digest(tmp_path / "a")
    assert first == saved("c", config=dict(reversed(CONFIG.items())))
    others = [
        saved("d", kind="dvae"),
        saved("e", config=CONFIG | {"beta": 6.7}),
        saved("f", tensors=tensors(1)),
        saved("g", files={"text": "[]"}),
        saved("h", files={"words": "{}"}),
        saved("i", parts={"dvae": dvae}),
    ]
    assert len({first, *others}) == 7


def test_a_newer_one_replaces_it_and_leaves_nothing_over(dalle, tmp_path):
    (dalle / "README.md").write_text("mine")
    artefact.save(tmp_path / "other", "dvae", {"vocab_size": 9}, tensors(8))
    for number in range(3):
        artefact.save(dalle, "dalle", {"n": number}, tensors(number + 1), parts={"dvae": tmp_path / "other"})
        found = artefact.load(dalle, "dalle")
        assert found.config == {"n": number} and same(found.tensors, tensors(number + 1)) and found.files == {}
        assert artefact.load(found.parts["dvae"], "dvae").config == {"vocab_size": 9}
        assert len(everything(dalle)) == 2 + 2 + 1
    assert (dalle / "README.md").read_text() == "mine"


def test_its_own_part_can_be_saved_again(dalle):
    found = artefact.load(dalle, "dalle")
    artefact.save(dalle, "dalle", CONFIG, tensors(5), parts=found.parts)
    assert artefact.load(dalle, "dalle").parts == found.parts


def test_copy(dalle, dvae, tmp_path):
    whole = artefact.load(dalle, "dalle")
    for source, kind in [(dvae, "dvae"), (dalle, "dalle")]:  # the second replaces the first
        assert artefact.copy(source, tmp_path / "new" / "copy") == artefact.digest(source)
        assert everything(tmp_path / "new" / "copy") == everything(source)
        artefact.load(tmp_path / "new" / "copy", kind)
    shutil.rmtree(dalle)
    assert facts(artefact.load(tmp_path / "new" / "copy", "dalle")) == facts(whole)


def test_equal_artefacts_are_equal_files(tmp_path):
    for name in "ab":
        artefact.save(tmp_path / name, "dvae", CONFIG, tensors(), about={"step": 1})
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    for name in everything(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_find(dalle, dvae, tmp_path):
    assert artefact.find(tmp_path, "dalle") == dalle  # a run folder holds model/
    assert artefact.find(dalle, "dalle") == dalle
    assert artefact.find(str(dvae), "dvae") == dvae
    carried = artefact.find(tmp_path, "dvae")  # a transformer's run stands for the tokenizer that it carries
    assert carried.parent == dalle and artefact.digest(carried) == artefact.digest(dvae)
    with pytest.raises(ArtefactError, match="this is a dvae artefact, a dalle artefact was expected"):
        artefact.find(dvae, "dalle")
    with pytest.raises(ArtefactError, match="no trained dvae in"):
        artefact.find(tmp_path / "nowhere", "dvae")


def test_numbers_that_are_not_finite(tmp_path):
    for value in (float("nan"), float("inf")):
        bad = tensors() | {"worse": torch.tensor([1.0, value])}
        with pytest.raises(NumericsError, match="worse"):
            artefact.save(tmp_path / "m", "dvae", CONFIG, bad)
    assert not (tmp_path / "m").exists()
    artefact.save(tmp_path / "m", "dvae", CONFIG, tensors(), about={"psnr": float("inf"), "step": 1})
    assert artefact.load(tmp_path / "m", "dvae").about == {"psnr": None, "step": 1}


# ------------------------------------------------------------------------------------------------------ damage


def refused(folder, match, kind="dalle"):
    with pytest.raises(ArtefactError, match=match) as caught:
        artefact.load(folder, kind)
    assert caught.value.code == 4 and caught.value.hint


def test_missing_and_foreign(dalle, dvae, tmp_path):
    refused(tmp_path / "nothing", "is no artefact: artefact.json is missing")
    refused(dvae, "this is a dvae artefact, a dalle artefact was expected")
    refused(dalle, "this is a dalle artefact, a dvae artefact was expected", kind="dvae")


def test_every_bit_counts(dalle):
    """300 single-bit flips in each file: refused, naming the file, or harmless as in `about` and in 1e-5 = 1E-5."""
    whole = artefact.load(dalle, "dalle")
    chance = random.Random(1)
    names = everything(dalle)
    assert len(names) == 5
    for name in names:
        content = (dalle / name).read_bytes()
        caught = 0
        for _ in range(300):
            place = chance.randrange(len(content) * 8)
            damaged = bytearray(content)
            damaged[place // 8] ^= 1 << place % 8
            (dalle / name).write_bytes(damaged)
            try:
                found = artefact.load(dalle, "dalle")
                assert name.endswith("artefact.json"), (name, place)
                assert facts(found) == facts(whole) and same(found.tensors, whole.tensors), (name, place)
            except ArtefactError as error:
                assert name.split("/")[-1] in error.what or "newer" in error.what, (name, error.what)
                caught += 1
        assert caught == 300 or (name.endswith("artefact.json") and caught > 270), (name, caught)
        (dalle / name).write_bytes(content)
    assert facts(artefact.load(dalle, "dalle")) == facts(whole)


def test_every_truncation_and_every_absence(dalle):
    for name in everything(dalle):
        content = (dalle / name).read_bytes()
        for length in [0, 1, *range(2, len(content) - 1, max(1, len(content) // 40)), len(content) - 2]:
            (dalle / name).write_bytes(content[:length])
            refused(dalle, name.split("/")[-1])
        (dalle / name).write_bytes(content + b"x")
        refused(dalle, name.split("/")[-1])
        (dalle / name).unlink()
        refused(dalle, name.split("/")[-1])
        (dalle / name).write_bytes(content)
    artefact.load(dalle, "dalle")


def test_swapped_files(dalle):
    names = everything(dalle)
    contents = {name: (dalle / name).read_bytes() for name in names}
    for left in names:
        for right in names:
            if left < right:
                (dalle / left).write_bytes(contents[right])
                (dalle / right).write_bytes(contents[left])
                refused(dalle, "damaged|expected")
                (dalle / left).write_bytes(contents[left])
                (dalle / right).write_bytes(contents[right])


def test_another_part_of_the_same_shape(dalle, tmp_path):
    part = artefact.load(dalle, "dalle").parts["dvae"]
    shutil.rmtree(part)
    artefact.save(part, "dvae", {"vocab_size": 8}, tensors(10))
    refused(dalle, "another part than the one that was saved")


def test_a_damaged_part_is_not_copied(dvae, tmp_path):
    (weights,) = dvae.glob("weights-*")
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(ArtefactError, match="SHA-256"):
        artefact.save(tmp_path / "model", "dalle", CONFIG, tensors(), parts={"dvae": dvae})
    assert not (tmp_path / "model").exists()


# ------------------------------------------------------------------------------------------------------ hostile


def test_unknown_and_missing_keys(dalle):
    original = (dalle / "artefact.json").read_text()
    for change, match in [
        (lambda m: m.update(_class_path="os.system"), "unknown key '_class_path'"),
        (lambda m: m["files"]["text"].update(more=1), "entry 'text' of 'files'"),
        (lambda m: m["parts"]["dvae"].update(more=1), "entry 'dvae' of 'parts'"),
        (lambda m: m["files"].update(weights=[]), "entry 'weights' of 'files'"),
        (lambda m: m["files"].pop("weights"), "there are no weights"),
        (lambda m: m["files"]["text"].update(bytes="12"), "size of 'text'"),
        (lambda m: m["files"]["text"].update(bytes=1 << 40), "size of 'text'"),
        (lambda m: m["files"]["text"].update(sha256=1), "entry 'text' of 'files'"),
        (lambda m: m.update(kind="vqgan"), "kind 'vqgan'"),
        (lambda m: m.update(kind=["dalle"]), "kind"),
        (lambda m: m.update(config=[1]), "'config' is not an object"),
        (lambda m: m.update(about="x"), "'about' is not an object"),
        (lambda m: m.update(format=0), "format 0"),
        (lambda m: m.update(format=True), "format True"),
        (lambda m: m.update(format="1"), "format '1'"),
        (lambda m: m.update(format=2, surprise=1), "format 2, newer than this program reads"),
    ]:
        forge(dalle, change)
        refused(dalle, match)
        (dalle / "artefact.json").write_text(original)
    for key in json.loads(original):
        manifest = json.loads(original)
        del manifest[key]
        (dalle / "artefact.json").write_text(json.dumps(manifest))
        refused(dalle, f"key {key!r} is missing")


@pytest.mark.parametrize(
    "name", ["../x.json", "/etc/passwd", "a/b.json", "..", ".", "", "a\\b", "text.json", "x\0", "C:x"]
)
def test_names_cannot_lead_out_of_the_folder(dalle, name, monkeypatch):
    original = (dalle / "artefact.json").read_text()
    outside = b"from outside"
    (dalle.parent / "x.json").write_bytes(outside)
    sha256 = files.sha256(outside)
    read = []
    monkeypatch.setattr(artefact, "_read_file", lambda folder, entry: read.append(entry))
    for change in (
        lambda m: m["files"].update(text={"file": name, "sha256": sha256, "bytes": len(outside)}),
        lambda m: m["files"]["weights"].update(file=name),
        lambda m: m["parts"]["dvae"].update(folder=name),
        lambda m: m["files"].update({name: {"file": f"{name}-{sha256[:12]}.json", "sha256": sha256, "bytes": 12}}),
        lambda m: m["parts"].update({name: {"folder": f"{name}-{sha256[:12]}", "digest": sha256}}),
    ):
        forge(dalle, change)
        refused(dalle, "damaged")
        (dalle / "artefact.json").write_text(original)
    assert read == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        "7",
        '"artefact"',
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format": 1, "format": 1}',
        '{"format": NaN}',
        "9" * 10_000,
        '{"format": ' + "9" * 10_000 + "}",
        "\ud800".encode("utf-8", "surrogatepass"),
        b"\xff\xfe{\0}\0",
        "<html><body>404</body></html>",
        " " * ((1 << 20) + 1),
    ],
    ids=range(16),
)
def test_manifests_that_are_none(dalle, content):
    (dalle / "artefact.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(dalle, "artefact.json is damaged|newer")


def test_numbers_beyond_all_bounds(dalle):
    text = (dalle / "artefact.json").read_text()
    assert "6.6" in text
    for number in ("1e999", "Infinity", "-Infinity", "NaN"):
        (dalle / "artefact.json").write_text(text.replace("6.6", number))
        refused(dalle, "artefact.json is damaged")


def with_weights(folder, content):
    """Put `content` in the place of the weights, with digests that are right."""
    sha256 = files.sha256(content)
    name = f"weights-{sha256[:12]}.safetensors"
    (folder / name).write_bytes(content)
    forge(folder, lambda m: m["files"].update(weights={"file": name, "sha256": sha256, "bytes": len(content)}))


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_in_the_place_of_the_weights_runs_nothing(dvae, tmp_path):
    torch.save({"weight": Payload(tmp_path / "canary")}, tmp_path / "evil.pt")
    for content in (pickle.dumps(Payload(tmp_path / "canary")), (tmp_path / "evil.pt").read_bytes()):
        with_weights(dvae, content)
        refused(dvae, "weights-.* is damaged", kind="dvae")
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()  # the payload would have worked


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(8),
        b"\xff" * 8,
        (1 << 62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}     ',
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"X99","shape":[1],"data_offsets":[0,4]}}      ' + bytes(4),
    ],
    ids=range(7),
)
def test_weights_that_are_none(dvae, content):
    with_weights(dvae, content)
    refused(dvae, "weights-.* is damaged", kind="dvae")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite(dvae, dtype):
    with_weights(
        dvae, safetensors.torch.save({"fine": torch.ones(2), "bad": torch.tensor([0, torch.nan], dtype=dtype)})
    )
    refused(dvae, "tensor bad holds values that are not finite", kind="dvae")


# ------------------------------------------------------------------------------------------------------ kills


class Killed(BaseException):
    """What a kill looks like to the code that it hits."""


def kill_at(monkeypatch, moment):
    """From the `moment`-th change of the disk on nothing changes any more, as when the process is gone."""
    count = [0]

    def deadly(change):
        def attempt(*arguments, **options):
            count[0] += 1
            if count[0] >= moment:
                raise Killed
            return change(*arguments, **options)

        return attempt

    monkeypatch.setattr(os, "replace", deadly(os.replace))
    monkeypatch.setattr(Path, "unlink", deadly(Path.unlink))
    monkeypatch.setattr(shutil, "rmtree", deadly(shutil.rmtree))
    return count


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one(dalle, tmp_path, monkeypatch):
    artefact.save(tmp_path / "other", "dvae", {"vocab_size": 9}, tensors(8))
    old = artefact.load(dalle, "dalle")
    shutil.copytree(dalle, tmp_path / "before")

    def save_new():
        return artefact.save(
            dalle, "dalle", {"new": 1}, tensors(1), files={"text": "[1]"}, parts={"dvae": tmp_path / "other"}
        )

    new, ends, moment = save_new(), [], 0
    clean = everything(dalle)
    while True:
        moment += 1
        shutil.rmtree(dalle)
        shutil.copytree(tmp_path / "before", dalle)
        with monkeypatch.context() as patch:
            count = kill_at(patch, moment)
            try:
                save_new()
                assert count[0] < moment
                break
            except Killed:
                pass
        found = artefact.load(dalle, "dalle")
        assert found.digest in (old.digest, new)
        expected = tensors(0 if found.digest == old.digest else 1)
        assert same(found.tensors, expected)
        artefact.load(found.parts["dvae"], "dvae")
        ends.append(found.digest == new)
        assert save_new() == new
        assert everything(dalle) == clean  # what the kill left was swept
    # weights, text, two files of the part, then the manifest: before it the old one stands, after it the new one
    assert ends[:5] == [False] * 5 and len(ends) > 7 and all(ends[5:])


def test_a_kill_in_the_very_first_save_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    for moment in (1, 2):
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            with pytest.raises(Killed):
                artefact.save(tmp_path / "m", "dvae", CONFIG, tensors())
        refused(tmp_path / "m", "is no artefact", kind="dvae")
    artefact.save(tmp_path / "m", "dvae", CONFIG, tensors())
    assert len(everything(tmp_path / "m")) == 2


def test_a_load_while_a_training_replaces_it(dvae, monkeypatch):
    """The manifest that was read first may speak of weights that are gone a moment later."""
    read = artefact._read_file
    replaced = []

    def slow(folder, entry):
        if not replaced:
            replaced.append(artefact.save(dvae, "dvae", {"vocab_size": 8}, tensors(2)))
        return read(folder, entry)

    monkeypatch.setattr(artefact, "_read_file", slow)
    found = artefact.load(dvae, "dvae")
    assert replaced == [found.digest] and same(found.tensors, tensors(2))
