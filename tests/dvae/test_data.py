"""Sources of pictures: every listed row is used or skipped with its reason, the manifest, the split, the order."""

import csv
import errno
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from dvae import data, images, scenes
from dvae.errors import DataError, EnvironmentProblem, UserError
from dvae.files import sha256
from dvae.listing import Piece

ROOT = Path(__file__).resolve().parent.parent.parent


def png(seed=0, height=10, width=12):
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def keys(source):
    return [source.key(index) for index in range(len(source))]


def captions(source):
    return [source.captions(index) for index in range(len(source))]


def accounted(source):
    """The source, after all that a source promises has been checked on it."""
    skipped = list(source.skipped())
    assert len(source) + len(skipped) == source.listed
    assert len(set(keys(source)) | {key for key, _ in skipped}) == source.listed
    assert all(reason for _, reason in skipped)
    for index in range(len(source)):
        image, about = source.image(index), source.about(index)
        assert image.dtype == torch.uint8 and image.shape == (3, about.height, about.width)
        assert isinstance(source.captions(index), tuple) and len(source.digest(index)) == 64
    assert source.captioned().tolist() == [bool(some) for some in captions(source)]
    if len(source):
        batch = source.images(range(len(source)))
        assert batch.shape == (len(source), 3, source.size, source.size) and batch.dtype == torch.uint8
    return source


def rows(source):
    """What a source says, in a form that compares: key -> (pixels, captions)."""
    return {source.key(n): (source.image(n).numpy().tobytes(), source.captions(n)) for n in range(len(source))}


# ------------------------------------------------------------------------------------------------------ sources


def test_a_folder_with_good_and_bad_files(tmp_path):
    write(
        tmp_path,
        {
            "a.png": png(1),
            "a.txt": b"a red thing\n\n  the same thing \r\n",
            "deep/er/b.PNG": png(2),
            "deep/er/b.txt": b"\xef\xbb\xbfwith a mark of bytes",
            "alone.png": png(3),
            "blank.png": png(4),
            "blank.txt": b" \n\t\n",
            "cut.png": png(5)[:150],
            "empty.jpg": b"",
            "latin.png": png(6),
            "latin.txt": "une tache r\xe9elle".encode("latin-1"),
            "text.png": b"I am a text",
            "notes.md": b"not listed",
            "orphan.txt": b"a caption of nothing",
            ".hidden.png": png(7),
            ".git/c.png": png(8),
        },
    )
    os.mkfifo(tmp_path / "pipe.png")
    source = accounted(data.open_source(str(tmp_path), size=8))
    assert dict(zip(keys(source), captions(source), strict=True)) == {
        "a.png": ("a red thing", "the same thing"),
        "alone.png": (),
        "blank.png": (),
        "deep/er/b.PNG": ("with a mark of bytes",),
    }
    assert dict(source.skipped()) == {
        "cut.png": "truncated",
        "empty.jpg": "empty file",
        "latin.png": "caption is not UTF-8 (byte 11)",
        "pipe.png": "not a regular file",
        "text.png": "not an image",
    }
    assert source.strays == ["orphan.txt: caption without a picture"]
    assert torch.equal(source.image(0), images.open_image(tmp_path / "a.png"))
    assert torch.equal(source.images([2, 0])[1], images.square(source.image(0), 8))
    assert source.digest(0) == sha256(png(1)) and source.about(0) == images.examine(png(1))


FILES = {
    "a.png": png(1),
    "a.txt": b"first\nagain",
    "b.x.jpg": b"another field of sample b",
    "b.png": png(2),
    "b.txt": b"second",
    "sub.dir/c.PNG": png(3),
    "sub.dir/c.txt": b"third",
    "d.txt": b"before its picture",
    "d.png": png(4),
    "e.png": png(5)[:100],
    "readme.md": b"ignored",
}


def test_every_kind_of_source_reads_as_its_files(tmp_path):
    folder, wild = tmp_path / "folder", tmp_path / "wild"
    files = {name: content for name, content in FILES.items() if name != "b.x.jpg"}
    write(folder, files)
    pictures = [name for name in files if name.lower().endswith(".png")]
    said = {name: files.get(str(Path(name).with_suffix(".txt")), b"").decode().split("\n") for name in pictures}
    write(wild, {name: files[name] for name in pictures})
    with open(wild / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *((name, text) for name in said for text in said[name])])
    lines = [json.dumps({"image": f"wild/{name}", "captions": texts}) for name, texts in said.items()]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    coco = {"images": [], "annotations": []}
    for n, (name, texts) in enumerate(said.items()):
        coco["images"].append({"id": n, "file_name": name})
        coco["annotations"] += [{"image_id": n, "caption": text} for text in texts]
    (tmp_path / "captions_wild.json").write_text(json.dumps(coco))
    tar(tmp_path / "shard.tar", FILES)
    before = sorted(os.listdir(tmp_path))

    plain = accounted(data.open_source(str(folder), size=8))
    assert plain.listed == 5 and list(plain.skipped()) == [("e.png", "truncated")]
    expected = sorted(rows(plain).values())
    assert captions(plain) == [("first", "again"), ("second",), ("before its picture",), ("third",)]
    for name in ("shard.tar", "wild", "list.jsonl", "captions_wild.json"):
        source = accounted(data.open_source(str(tmp_path / name), size=8))
        assert sorted(rows(source).values()) == expected, name
        assert [reason for _, reason in source.skipped()] == ["truncated"], name
    assert sorted(os.listdir(tmp_path)) == before  # nothing was extracted


def test_caps_on_sizes(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": png(1), "a.txt": b"x" * 100, "b.png": png(2)})
    monkeypatch.setattr(data, "_LARGEST_CAPTION", 99)
    assert list(data.open_source(str(tmp_path), size=8).skipped()) == [("a.png", "caption: too large: 100 bytes")]
    monkeypatch.setattr(data, "_LARGEST_PICTURE", 99)
    assert len(data.open_source(str(tmp_path), size=8)) == 0


def test_D19_a_caption_of_a_megabyte_is_whole_and_a_larger_one_is_named(tmp_path):
    long, longer = "word " * 200_000 + "end", "x" * ((1 << 20) + 1)
    write(tmp_path, {f"{name}.png": png(1) for name in "abcd"} | {"c.txt": long.encode(), "d.txt": longer.encode()})
    with open(tmp_path / "l.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "text"), ("a.png", long), ("b.png", longer)])
    for name, used in (("", ["c.png"]), ("l.csv", ["l.csv:2 a.png"])):
        source = data.open_source(str(tmp_path / name), size=8)
        spoken = [index for index in range(len(source)) if source.captions(index)]
        assert [source.key(index) for index in spoken] == used and source.captions(spoken[0]) == (long,)
        assert [reason for _, reason in source.skipped()] == ["caption: too large: 1,048,577 bytes"]


def test_D18_D20_captions_are_cleaned_by_one_rule(tmp_path):
    for written, expected in [
        (" two  words\t", "two words"),
        ("\ufeffmark\ufeff", "mark"),
        ("nul\0and\x1bescape\x7f\x85", "nul and escape"),
        ("e\u0301 é", "e\u0301 é"),  # what is equal is for the vocabulary to say
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("שלום a\u202eb", "שלום a\u202eb"),
        ("\x00 \x1f\ufeff\u3000", ""),
    ]:
        assert data.clean(written) == expected and data.clean(expected) == expected
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    assert data.clean(data.clean(every)) == data.clean(every)
    write(tmp_path, {"a.png": png(1), "a.txt": "\ufeffone\r\n\x00\x01\r\ntwo\x0b2\rthree\u20283\n\n".encode()})
    lines = [
        {"image": "a.png", "text": [" one\nline ", "\x00", ""]},
        {"image": "a.png", "text": "\t"},
        {"image": "a.png"},
    ]
    write(tmp_path, {"l.jsonl": "\n".join(map(json.dumps, lines[:1])).encode()})
    assert captions(data.open_source(str(tmp_path), size=8)) == [("one", "two 2", "three 3")]
    assert captions(data.open_source(str(tmp_path / "l.jsonl"), size=8)) == [("one line",)]
    write(tmp_path, {"l.jsonl": "\n".join(map(json.dumps, lines[1:])).encode()})
    assert captions(data.open_source(str(tmp_path / "l.jsonl"), size=8)) == [()]


def test_D21_captions_that_are_no_text_are_named_with_their_place(tmp_path):
    write(tmp_path, {"a.png": png(1), "b.png": png(2), "b.txt": b"good\nbad \xff"})
    write(tmp_path, {"l.jsonl": b'{"image": "a.png", "text": "lone \\ud800"}\n{"image": "\\ud800.png"}'})
    assert list(data.open_source(str(tmp_path), size=8).skipped()) == [("b.png", "caption is not UTF-8 (byte 9)")]
    assert list(data.open_source(str(tmp_path / "l.jsonl"), size=8).skipped()) == [
        ("l.jsonl:1 a.png", "caption is not Unicode (half a surrogate pair at character 5)"),
        ("l.jsonl:2 \\ud800.png", "not a valid file name"),
    ]


def test_D22_a_missing_column_is_a_mistake_and_leaves_nothing(tmp_path):
    write(tmp_path, {"l.csv": b"url,text\nx,y\n"})
    with pytest.raises(UserError, match="no column of pictures") as caught:
        data.open_source(str(tmp_path / "l.csv"), size=8, folder=tmp_path / "seen")
    assert caught.value.code == 2 and os.listdir(tmp_path / "seen") == []


def test_D25_any_file_name_is_read_again_by_its_row(tmp_path):
    names = ["two words.png", "new\nline.png", "new\\nline.png", "-rf.png", "A.png", "a.png", "x" * 251 + ".png"]
    names += [os.fsdecode(b"caf\xe9.png"), "\u2028.png", "e\u0301.png", "é.png", '"{}".png']
    folder = tmp_path / os.fsdecode(b"dossier \xe9t\xe9\n")
    write(folder, {name: png(n) for n, name in enumerate(names)})
    seen = tmp_path / "seen"
    for _ in range(2):  # examined, and from the manifest
        source = accounted(data.open_source(str(folder), size=8, folder=seen))
        assert len(source) == len(names)
        assert {source.digest(n) for n in range(len(names))} == {sha256(png(n)) for n in range(len(names))}
    assert len((seen / data.ROWS).read_bytes().decode().split("\n")) == len(names) + 1


def test_names_of_kinds(tmp_path):
    write(tmp_path, {"a.py": b"", "b.tar.gz": b"", "folder/notes.md": b""})
    for name, what in [
        ("nowhere", "no such data source"),
        ("x-*.tar", "no such data source"),
        ("no.csv", "no such data source"),
        ("a.py", "is no data source"),
        ("b.tar.gz", "is no data source"),
    ]:
        with pytest.raises(DataError, match=what) as caught:
            data.open_source(str(tmp_path / name), size=8)
        kinds = ("unpack",) if name.endswith("gz") else ("scenes", ".tar", ".csv", ".parquet")
        assert caught.value.code == 3 and all(kind in caught.value.hint for kind in kinds)
    assert data.open_source(str(tmp_path / "folder"), size=8).listed == 0


# ------------------------------------------------------------------------------------------------------ the manifest


@pytest.fixture
def ten(tmp_path):
    """Nine good pictures, one bad one and a stray, with a folder for the manifest beside them."""
    files = {f"{n}.png": png(n) for n in range(9)} | {"4.txt": b"four\nvier", "bad.png": b"x", "stray.txt": b""}
    write(tmp_path / "ten", files)
    return tmp_path / "ten", tmp_path / "seen"


def opened(ten, **options):
    return data.open_source(str(ten[0]), size=8, folder=ten[1], **options)


def test_the_manifest_says_what_was_seen(ten):
    source = opened(ten)
    assert sorted(os.listdir(ten[1])) == ["manifest.json", "rows.jsonl", "usable.bin"]
    lines = (ten[1] / "rows.jsonl").read_text().splitlines()
    assert len(lines) == source.listed == 10
    row = json.loads(lines[4])
    assert row == {
        "key": "4.png",
        "path": str(ten[0].resolve() / "4.png"),
        "offset": 0,
        "size": len(png(4)),
        "sha256": sha256(png(4)),
        "width": 12,
        "height": 10,
        "mode": "RGB",
        "format": "PNG",
        "notes": [],
        "captions": ["four", "vier"],
    }
    assert json.loads(lines[9]) == {"key": "bad.png", "fault": "not an image"}
    begins = np.fromfile(ten[1] / "usable.bin", "<i8")
    text = (ten[1] / "rows.jsonl").read_bytes()
    assert [json.loads(text[begin:].split(b"\n")[0])["key"] for begin in begins] == keys(source)
    about = json.loads((ten[1] / "manifest.json").read_text())
    assert (about["name"], about["listed"], about["used"]) == (str(ten[0]), 10, 9)
    assert about["strays"] == ["stray.txt: caption without a picture"] == source.strays


def test_a_whole_manifest_is_used_without_looking_again(ten, monkeypatch):
    first = rows(accounted(opened(ten)))
    write(ten[0], {"new.png": png(99), "4.txt": b"changed"})
    monkeypatch.setattr(data, "examine", None)
    monkeypatch.setattr(data, "list_rows", None)
    again = accounted(opened(ten))
    assert rows(again) == first and again.listed == 10
    assert list(again.skipped()) == [("bad.png", "not an image")] and again.strays


@pytest.mark.parametrize("spoiled", ["manifest.json", "rows.jsonl", "usable.bin", "another name", "another format"])
def test_a_manifest_that_is_not_whole_or_of_another_source_is_made_anew(ten, spoiled, monkeypatch):
    opened(ten)
    if spoiled == "another name":
        ten[0].rename(ten[0].with_name("twenty"))
        ten = ten[0].with_name("twenty"), ten[1]
    elif spoiled == "another format":
        monkeypatch.setattr(data, "_FORMAT", 2)
    else:
        content = (ten[1] / spoiled).read_bytes()
        (ten[1] / spoiled).write_bytes(content[: len(content) // 2])
    assert not data.examined(ten[1], str(ten[0]))
    write(ten[0], {"new.png": png(99)})
    assert len(accounted(opened(ten))) == 10 and data.examined(ten[1], str(ten[0]))


def test_a_manifest_that_was_not_finished_is_none(ten, monkeypatch):
    """As after a kill or a full disk at any moment of the writing."""
    for nth in range(1, 8):
        calls = itertools.count(1)

        def full(*args, real=os.fsync, calls=calls, nth=nth):
            if next(calls) == nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                opened((ten[0], ten[1] / str(nth)))
                assert nth > 6, "three files, and their folder after each"
            except OSError as error:
                assert error.errno == errno.ENOSPC
                assert nth == 6 or not data.examined(ten[1] / str(nth), str(ten[0]))
        assert not list((ten[1] / str(nth)).glob(".part-*"))
        assert len(accounted(opened((ten[0], ten[1] / str(nth))))) == 9


def test_a_disk_that_is_really_full_is_told(ten):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as caught:
            opened(ten)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and not data.examined(ten[1], str(ten[0]))
    assert not {"manifest.json", "rows.jsonl"} & set(os.listdir(ten[1])) and not list(ten[1].glob(".part-*"))


def test_a_temporary_manifest_goes_with_its_source(ten, monkeypatch, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(data.tempfile, "tempdir", str(temporary))
    source = data.open_source(str(ten[0]), size=8)
    part, _ = data.split(source, 0.3)
    del source
    assert len(os.listdir(temporary)) == 1 and part.image(0) is not None
    if os.fork() == 0:
        part = _ = None  # in a forked child it stays
        os._exit(0)
    os.wait()
    assert len(os.listdir(temporary)) == 1
    del part, _
    assert os.listdir(temporary) == []
    monkeypatch.setattr(data, "examine", None)
    with pytest.raises(TypeError):
        data.open_source(str(ten[0]), size=8)
    assert os.listdir(temporary) == []


def test_a_source_travels_to_another_process(ten):
    source = opened(ten)
    for one in (source, data.split(source, 0.3)[0]):
        assert rows(pickle.loads(pickle.dumps(one))) == rows(one)


@pytest.mark.parametrize("change", ["gone", "empty", "other", "longer", "pipe", "closed tar"])
def test_D31_a_picture_that_changed_is_named(ten, change):
    if change == "closed tar":
        tar(ten[0] / "s.tar", {f"{n}.png": png(n) for n in range(9)})
        source = data.open_source(str(ten[0] / "s.tar"), size=8, folder=ten[1])
        os.truncate(ten[0] / "s.tar", 512 + 100)
        reason, key = "other bytes", "s.tar/0.png"
    else:
        source, path, key = opened(ten), ten[0] / "0.png", "0.png"
        reason = {"gone": "no such file", "pipe": "not a regular file"}.get(change, "other bytes")
        if change in ("gone", "pipe"):
            path.unlink()
        if change == "pipe":
            os.mkfifo(path)
        elif change != "gone":
            path.write_bytes({"empty": b"", "other": png(50), "longer": png(0) + b"!"}[change])
    with pytest.raises(DataError) as caught:
        source.images([0])
    assert caught.value.what == f"{source.name}: {key} changed since it was examined ({reason})"
    assert "bring that file back" in caught.value.hint
    if change != "closed tar":
        assert source.image(1).shape == (3, 10, 12)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_D36_any_number_of_threads_writes_the_same_manifest(ten, threads, tmp_path):
    tar(ten[0] / "s.tar", {f"{n % 7}/{n}.png": png(n, 5 + n, 5) for n in range(60)})
    os.truncate(ten[0] / "s.tar", 40_000)
    for name in (str(ten[0]), str(ten[0] / "s.tar")):
        contents = []
        for count in (1, threads):
            folder = tmp_path / f"{count}"
            data.open_source(name, size=8, folder=folder, threads=count)
            contents.append([(folder / file).read_bytes() for file in (data.ROWS, data.USABLE, data.MANIFEST)])
        assert contents[0] == contents[1]


def test_D36_hashes_of_strings_do_not_shift_the_order(ten, tmp_path):
    write(ten[0], {"metadata.csv": b"file_name,text\n" + b"".join(b"gone%d.png,x\n" % n for n in range(9))})
    program = "import sys; from pathlib import Path; from dvae.data import open_source\n"
    program += "open_source(sys.argv[1], 8, folder=Path(sys.argv[2]))"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(ten[0]), str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        )
        for seed in "012"
    ]
    assert [child.wait() for child in children] == [0, 0, 0]
    contents = {(tmp_path / seed / data.ROWS).read_bytes() for seed in "012"}
    assert len(contents) == 1 and contents.pop().count(b"no such file") == 9


def test_memory_does_not_grow_with_the_rows(tmp_path):
    count, pictures = 3000, [png(n, 1, 1) for n in range(3)]
    files = ((f"{n:05d}", pictures[n % 3]) for n in range(count))
    tar(
        tmp_path / "s.tar",
        {f"{name}{end}": part for name, p in files for end, part in ((".png", p), (".txt", b"words"))},
    )
    small = tmp_path / "small"
    write(small, {"a.png": pictures[0]})
    data.open_source(str(small), size=8).images([0])  # what is held once and for all
    tracemalloc.start()
    try:
        source = data.open_source(str(tmp_path / "s.tar"), size=8)
        held = tracemalloc.get_traced_memory()[0]
        part, _ = data.split(source, 0.5)
        for index in range(0, count, 7):
            source.images([index])
        read = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(source) == count
    assert held < 100 * count and read < 100 * count


# ------------------------------------------------------------------------------------------------------ scenes


def test_scenes():
    source = accounted(data.open_source("scenes:val:40", size=16, seed=3))
    assert (len(source), source.listed, source.strays) == (40, 40, [])
    numbers = [7, 0, 39, 7]
    drawn = scenes.draw([scenes.scene("val", n, seed=3) for n in numbers], 16)
    assert torch.equal(source.images(numbers), drawn)
    assert torch.equal(source.image(39), drawn[2])
    assert source.captions(7) == scenes.captions("val", 7, seed=3)
    other = data.open_source("scenes:val:40", size=16, seed=4)
    assert not torch.equal(source.images(range(40)), other.images(range(40)))
    digests = {source.digest(n) for n in range(40)}
    assert len(digests) == 40 and not digests & {other.digest(n) for n in range(40)}


def test_scenes_that_are_kept_are_drawn_once_and_others_when_they_are_asked_for(monkeypatch):
    drawn = []
    draw = scenes.draw
    monkeypatch.setattr(scenes, "draw", lambda rows, size: (drawn.append(len(rows)), draw(rows, size))[1])
    source = data.open_source("scenes:train:300", size=8)
    assert drawn == []
    asked = source.images([299]), source.images(range(7)), source.image(5)
    assert drawn == [1, 7, 1] and source._kept is None
    drawn.clear()
    part, _ = data.split(source, 0.5)
    part.keep(), source.keep()
    again = source.images([299]), source.images(range(7)), source.image(5)
    assert sum(drawn) == 300 and all(map(torch.equal, asked, again))


def test_scenes_by_name():
    lengths = {"scenes": 20_000, "scenes:train": 20_000, "scenes:val": 2_000, "scenes:heldout": 2_000}
    assert {name: len(data.open_source(name, size=8)) for name in lengths} == lengths
    for name in ("scenes:", "scenes:test", "scenes:train:", "scenes:train:x", "scenes:train:-1", "scenes:train:5:6"):
        with pytest.raises(DataError, match="no such scenes"):
            data.open_source(name, size=8)


# ------------------------------------------------------------------------------------------------------ refusing


def test_check_share(tmp_path):
    write(tmp_path, {f"{n:03d}.png": png(n) for n in range(97)} | {f"bad{n}.png": png(n)[:90] for n in range(3)})
    source = data.open_source(str(tmp_path), size=8)
    data.check_share(source, max_bad=0.03)
    with pytest.raises(DataError, match=r"3 of 100 cannot be used, e\.g\. bad0\.png: truncated"):
        data.check_share(source)
    with pytest.raises(DataError, match="3 of 100"):
        data.check_share(source, max_bad=0.029)


def test_D32_nothing_usable(tmp_path):
    with pytest.raises(DataError, match="0 usable of 0 listed, there are no pictures"):
        data.check_share(data.open_source(str(tmp_path), size=8), max_bad=1.0)
    write(tmp_path, {"a.heic": b"", "b.txt": b""})
    with pytest.raises(DataError, match=r"0 usable of 0 listed, e\.g\. a\.heic: not one of the formats JPEG"):
        data.check_share(data.open_source(str(tmp_path), size=8), max_bad=1.0)
    write(tmp_path, {"a.png": b""})
    with pytest.raises(DataError, match=r"0 usable of 1 listed, e\.g\. a\.png: empty file"):
        data.check_share(data.open_source(str(tmp_path), size=8), max_bad=1.0)
    write(tmp_path, {"l.csv": b"image,text\nnowhere/a.png,one\n"})
    with pytest.raises(DataError, match=r"0 usable of 1 listed, e\.g\. l\.csv:2 nowhere/a\.png: no such file"):
        data.check_share(data.open_source(str(tmp_path / "l.csv"), size=8), max_bad=1.0)


# ------------------------------------------------------------------------------------------------------ splitting


@pytest.fixture
def twenty(tmp_path):
    write(tmp_path, {f"{n:02d}.png": png(n) for n in range(20)} | {"bad.png": b"", "03.txt": b"three", "s.txt": b""})
    return data.open_source(str(tmp_path), size=8)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.99, 1.0])
def test_split_shares_out_every_row(twenty, share):
    parts = data.split(twenty, share)
    training, validation = map(accounted, parts)
    assert len(training) and len(validation)
    assert rows(training) | rows(validation) == rows(twenty)
    assert len(training) + len(validation) == 20
    assert training.listed + validation.listed == twenty.listed
    assert training.strays + validation.strays == twenty.strays and twenty.strays
    assert [keys(part) for part in data.split(twenty, share)] == [keys(part) for part in parts]


def test_split_has_the_share_and_is_random():
    source = data.open_source("scenes:train:2000", size=8)
    training, validation = data.split(source, 0.1)
    assert abs(len(validation) - 200) < 54  # 4 standard deviations
    places = [int(key.rpartition("-")[2]) for key in keys(validation)]
    assert abs(np.mean(places) - 1000) < 160


def test_a_row_stays_on_its_side_when_others_come_or_it_gets_another_name(tmp_path):
    small, large = (data.open_source(f"scenes:train:{count}", size=8) for count in (300, 900))
    assert set(keys(data.split(small, 0.2)[1])) <= set(keys(data.split(large, 0.2)[1]))
    for folder, name in (("one", "{}.png"), ("two", "other/{}x.png")):
        write(tmp_path / folder, {name.format(n): png(n) for n in range(30)})
    sides = [data.split(data.open_source(str(tmp_path / folder), size=8), 0.5)[1] for folder in ("one", "two")]
    one, two = ({side.digest(n) for n in range(len(side))} for side in sides)
    assert one == two and 5 < len(one) < 25


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_D24_copies_of_a_picture_are_on_one_side(tmp_path, share):
    write(tmp_path, {f"{copy}/{n}.png": png(n) for n in range(4) for copy in "abcde"})
    training, validation = data.split(data.open_source(str(tmp_path), size=8), share)
    one, other = ({part.digest(n) for n in range(len(part))} for part in (training, validation))
    assert one and other and not one & other and len(one | other) == 4
    assert len(training) == 5 * len(one) and len(validation) == 5 * len(other)


def test_split_needs_two_pictures(tmp_path):
    with pytest.raises(DataError, match="1 rows cannot be split"):
        data.split(data.open_source("scenes:train:1", size=8), 0.5)
    assert [len(part) for part in data.split(data.open_source("scenes:train:2", size=8), 0.5)] == [1, 1]
    write(tmp_path, {f"{n}.png": png(0) for n in range(5)})
    with pytest.raises(DataError, match="5 rows of one picture cannot be split"):
        data.split(data.open_source(str(tmp_path), size=8), 0.5)


def test_parts_of_parts_account_for_every_row(twenty):
    spoken = data.Part(twenty, np.array([3, 5, 6, 7]), "some", faulty=True, reason="left out")
    accounted(spoken)
    assert spoken.listed == 21 and len(list(spoken.skipped())) == 17
    training, validation = map(accounted, data.split(spoken, 0.5))
    assert training.listed + validation.listed == 21 and list(validation.skipped()) == []


# ------------------------------------------------------------------------------------------------------ order


def taken(sampler, batches):
    return list(itertools.islice(iter(sampler), batches))


def test_order_is_a_permutation_and_a_function():
    first = data.order(0, 0, 1000)
    assert first.dtype == np.int64 and sorted(first) == list(range(1000))
    assert np.array_equal(first, data.order(0, 0, 1000))
    others = [data.order(0, 1, 1000), data.order(1, 0, 1000), np.arange(1000)]
    assert all((first == other).mean() < 0.01 for other in others)
    assert data.order(5, 2, 6).tolist() == [0, 3, 1, 4, 5, 2]


@pytest.mark.parametrize("length, batch", [(10, 3), (10, 5), (7, 16), (1, 4), (12, 1)])
def test_each_row_comes_once_per_epoch_without_gap(length, batch):
    pairs = list(itertools.chain(*taken(data.Endless(length, batch, seed=2), 5 * length)))
    for epoch in range(5):
        own = pairs[epoch * length : (epoch + 1) * length]
        assert own == [(epoch, index) for index in data.order(2, epoch, length)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_start_is_a_resume(world):
    for rank in range(world):
        whole = taken(data.Endless(11, 4, seed=5, rank=rank, world=world), 40)
        for start in range(25):
            rest = taken(data.Endless(11, 4, seed=5, start=start, rank=rank, world=world), 40 - start)
            assert rest == whole[start:]


@pytest.mark.parametrize("length, batch, world", [(10, 3, 2), (7, 4, 3), (5, 8, 4)])
def test_ranks_share_one_stream(length, batch, world):
    count = 6
    alone = list(itertools.chain(*taken(data.Endless(length, batch * world, seed=1), count)))
    ranks = [taken(data.Endless(length, batch, seed=1, rank=rank, world=world), count) for rank in range(world)]
    flat = [list(itertools.chain(*batches)) for batches in ranks]
    assert [flat[n % world][n // world] for n in range(len(alone))] == alone
    assert sum(map(len, flat)) == len(alone)
    for b in range(count):  # at each batch all ranks together have what one rank with the whole batch has
        together = set(itertools.chain(*(batches[b] for batches in ranks)))
        assert together == set(alone[b * batch * world : (b + 1) * batch * world])


def test_a_loader_takes_it():
    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, pair):
            return pair

    sampler = data.Endless(5, 3, seed=0)
    with pytest.raises(TypeError):
        len(sampler)
    loader = torch.utils.data.DataLoader(Rows(), batch_sampler=sampler, collate_fn=list)
    assert list(itertools.islice(iter(loader), 9)) == taken(sampler, 9)


# ------------------------------------------------------------------------------------------------------ real data


def test_real_data(real_data):
    source = data.open_source(real_data, size=32)
    data.check_share(source)
    assert len(source) + len(list(source.skipped())) == source.listed > 0
    few = range(0, len(source), max(1, len(source) // 50))
    assert source.images(few).shape == (len(few), 3, 32, 32)
    assert all(source.captions(n) for n in few)
    training, validation = data.split(source, 0.05)
    assert len(training) + len(validation) == len(source) and len(validation) > 0


# -------------------------------------------------------------------------------------------------- checked folders


@pytest.mark.parametrize("kind", ["folder", "listing", "tar", "parquet"])
def test_a_folder_with_a_manifest_is_a_source(tmp_path, monkeypatch, kind):
    pictures = {f"{n}.png": png(n) for n in range(4)} | {"bad.png": b"no picture"}
    captions = {f"{n}.txt": f"number {n}".encode() for n in range(4)}
    write(tmp_path / "all", pictures | captions)
    names = {"folder": "all", "listing": "all/list.csv", "tar": "a.tar", "parquet": "a.parquet"}
    lines = "".join(f"{name},number {name[0]}\n" for name in pictures)
    write(tmp_path, {"all/list.csv": f"image,text\n{lines}".encode()} if kind == "listing" else {})
    tar(tmp_path / "a.tar", pictures | captions)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    columns = {"image": [{"bytes": content, "path": None} for content in pictures.values()], "text": list(pictures)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path)
    before = data.open_source(names[kind], 8, folder=tmp_path / "checked")
    assert len(before) == 4 and before.listed == 5
    monkeypatch.setattr(data, "examine", None)  # nothing is examined again
    monkeypatch.chdir(tmp_path / "checked")  # a relative name would mean something else here
    for folder in (None, tmp_path / "run"):
        after = data.open_source(str(tmp_path / "checked"), 8, folder=folder)
        assert rows(after) == rows(before) and list(after.skipped()) == list(before.skipped())
    monkeypatch.chdir(tmp_path)
    if kind == "parquet":
        (tmp_path / "a.parquet").rename(tmp_path / "b.parquet")
        with pytest.raises(DataError, match="a.parquet"):
            data.open_source(str(tmp_path / "checked"), 8)
        (tmp_path / "b.parquet").rename(tmp_path / "a.parquet")
    shutil.rmtree(tmp_path / "checked")
    assert len(data.open_source(str(tmp_path / "checked"), 8, folder=tmp_path / "run")) == 4, "a run keeps its own"
    with pytest.raises(DataError, match="no such data source"):
        data.open_source(str(tmp_path / "checked"), 8)


def test_a_damaged_manifest_is_none(tmp_path):
    write(tmp_path / "all", {f"{n}.png": png(n) for n in range(3)})
    data.open_source(str(tmp_path / "all"), 8, folder=tmp_path / "checked")
    with open(tmp_path / "checked" / data.ROWS, "a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match="0 usable of 0"):
        data.check_share(data.open_source(str(tmp_path / "checked"), 8))


# ------------------------------------------------------------------------------------------------------- hold out


def test_hold_out_takes_the_captions_that_match_whole(tmp_path):
    texts = ["red car", "a red car", "red car at night\nred bus", "blue car", "red bus\nx"]
    write(tmp_path, {f"{n}.png": png(n) for n in range(5)} | {f"{n}.txt": t.encode() for n, t in enumerate(texts)})
    source = data.open_source(str(tmp_path), 8)
    training, held = data.split(source, 0.5, "red (car|bus)")
    assert [held.key(n) for n in range(len(held))] == ["0.png", "2.png", "4.png"]
    assert [training.key(n) for n in range(len(training))] == ["1.png", "3.png"]
    for expression, which in (("none such", "no row"), (".*", "every row")):
        with pytest.raises(DataError, match=which):
            data.split(source, 0.5, expression)
    with pytest.raises(UserError, match="no regular expression"):
        data.split(source, 0.5, "red (car")


def test_D35_a_disk_that_does_not_answer_is_named(tmp_path, monkeypatch):
    write(tmp_path, {f"{n}.png": png(n) for n in range(6)})
    stuck, real = threading.Event(), Piece.read

    def read(piece, largest):
        if piece.path.endswith("3.png"):
            stuck.wait()
        return real(piece, largest)

    monkeypatch.setattr(Piece, "read", read)
    monkeypatch.setattr(data, "_PATIENCE", 0.2)
    try:
        with pytest.raises(EnvironmentProblem, match=r"^3\.png: no answer within 0\.2 seconds"):
            data.open_source(str(tmp_path), 8, folder=tmp_path / "seen", threads=2)
    finally:
        stuck.set()
    assert not data.examined(tmp_path / "seen", str(tmp_path))


def test_D33_training_and_validation_must_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to("photos")
    same = [("photos", "photos/"), ("photos", str(tmp_path / "photos")), ("link", "photos"), ("scenes", "scenes:train")]
    for one, other in [*same, ("scenes:val:8", "scenes:val:8"), ("a/b:train", "a/b:train")]:
        with pytest.raises(UserError, match="are both"):
            data.check_names(one, other)
    for one, other in [("photos", None), ("photos", "more"), ("scenes", "scenes:val"), ("a/b:train", "a/b:test")]:
        data.check_names(one, other)


def test_more_validation_than_training_is_warned_of(capsys):
    source = data.open_source("scenes:train:8", 32)
    data.check_sides(source, data.open_source("scenes:val:8", 32))
    assert not capsys.readouterr().err
    data.check_sides(source, data.open_source("scenes:val:9", 32))
    assert "9 rows to validate on, but only 8 to train on" in capsys.readouterr().err


def test_what_is_written_may_not_become_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "below").mkdir(parents=True)
    within = [("photos/run", ["photos"]), ("photos", ["photos/"]), ("x", ["."]), ("photos/x", ["y", "photos"])]
    for out, sources in within:
        with pytest.raises(UserError, match="lies inside"):
            data.check_outside(out, *sources)
    for out, sources in [("run", ["photos"]), ("photos2", ["photos", None]), ("photos/x", ["photos/below", "scenes"])]:
        data.check_outside(out, *sources)


def test_a_mistyped_path_is_not_sought_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    monkeypatch.setattr("dvae.tables.open_table", None)  # which would ask the Hub
    with pytest.raises(DataError, match="no such data source: photos/typo"):
        data.open_source("photos/typo", 8)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_max_bad_is_a_share(share):
    with pytest.raises(UserError, match="max_bad is"):
        data.check_share(data.open_source("scenes:val:2", 32), share)
