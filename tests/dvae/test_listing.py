"""Which rows a name means: folders, imagefolders, listings, COCO captions, tars; and every fault that has a name."""

import contextlib
import gzip
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import tarfile
import tempfile
from pathlib import Path

import pytest

from dvae.errors import DataError, UserError
from dvae.listing import Listing, Piece, Row, expand, list_rows, printable

LARGE = 1 << 28


def write(folder, files):
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def listed(name) -> tuple[list[Row], list[str]]:
    """The rows and strays of a source; each row has a picture or a fault, and a key of its own that can be printed."""
    found = list_rows(str(name))
    assert isinstance(found, Listing)
    rows = list(found.rows)
    assert all((row.picture is None) == bool(row.fault) for row in rows)
    assert len({row.key for row in rows}) == len(rows)
    assert all(row.key.isprintable() for row in rows) and all(stray.isprintable() for stray in found.strays)
    return rows, found.strays


def faults(rows):
    return {row.key: row.fault for row in rows if row.fault}


def said(rows, root):
    """(path below the root, captions) of the rows without a fault."""
    return [(os.path.relpath(row.picture.path, root), row.captions) for row in rows if not row.fault]


@contextlib.contextmanager
def in_time(seconds=10):
    def late(*_):
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------------ folders


def test_a_folder_gives_its_pictures_with_the_texts_beside_them(tmp_path):
    write(tmp_path, {"a.png": "A", "a.txt": "one", "x/b.JPG": "B", "x/b.TXT": "two", "c.webp": "C", "notes.md": ""})
    write(tmp_path, {".hidden.png": "", ".git/d.png": ""})
    rows, strays = listed(tmp_path)
    assert [(row.key, row.picture.read(LARGE)) for row in rows] == [
        ("a.png", b"A"),
        ("c.webp", b"C"),
        ("x/b.JPG", b"B"),
    ]
    assert [row.caption and row.caption.read(LARGE) for row in rows] == [b"one", None, b"two"]
    assert strays == []


def test_D17_captions_without_picture_and_pictures_without_caption(tmp_path):
    write(tmp_path, {"a.png": "", "b.txt": "", "x/c.txt": "", "x/d.png": "", "x/d.txt": "", "e.heic": "", "f.svg": ""})
    write(tmp_path, {"metadata.csv": "file_name,text\ngone.png,nothing\na.png,something\n"})
    rows, strays = listed(tmp_path)
    assert [row.key for row in rows] == ["a.png", "x/d.png", "metadata.csv:2 gone.png"]
    assert [row.captions for row in rows[:2]] == [("something",), ()] and rows[1].caption is not None
    assert faults(rows) == {"metadata.csv:2 gone.png": "no such file"}
    assert strays == [
        "e.heic: not one of the formats JPEG, PNG, WEBP, BMP, GIF",
        "f.svg: not one of the formats JPEG, PNG, WEBP, BMP, GIF",
        "x/c.txt: caption without a picture",
        "b.txt: caption without a picture",
    ]


def test_sources_within_a_folder_are_told_apart(tmp_path):
    write(tmp_path, {"a.png": "", "b.parquet": "", "shards/c.tar": ""})
    rows, strays = listed(tmp_path)
    assert [row.key for row in rows] == ["a.png"]
    assert strays == ["b.parquet: not read as a part of this folder", "shards/c.tar: not read as a part of this folder"]
    assert listed(tmp_path / "shards")[0][0].key == "c.tar" and listed(tmp_path / "shards")[1] == []


def test_D23_equal_stems_are_different_rows(tmp_path):
    write(tmp_path, {"a.jpg": "1", "a.png": "2", "a.txt": "both", "x/a.png": "3", "x/a.txt": "other"})
    rows, _ = listed(tmp_path)
    assert [row.key for row in rows] == ["a.jpg", "a.png", "x/a.png"]
    assert [row.caption.read(9) for row in rows] == [b"both", b"both", b"other"]


def test_D25_any_name_is_listed_and_printed_safely(tmp_path):
    names = [
        "two words.png",
        "new\nline.png",
        "new\\nline.png",
        "-rf.png",
        "A.png",
        "a.png",
        "\u202eright.png",
        "é.png",
    ]
    names += ["e\u0301.png", "👩\u200d🚀.png", "x" * 251 + ".png", os.fsdecode(b"caf\xe9.png"), "tab\t.png", "'\".png"]
    for n, name in enumerate(names):
        write(tmp_path, {name: str(n)})
    rows, _ = listed(tmp_path)
    assert {os.path.basename(row.picture.path): int(row.picture.read(9)) for row in rows} == {
        name: n for n, name in enumerate(names)
    }
    keys = {row.key for row in rows}
    assert {"two words.png", "new\\nline.png", "new\\\\nline.png", "caf\\udce9.png", "\\u202eright.png"} <= keys
    assert "👩\\u200d🚀.png" in keys and "-rf.png" in keys


def test_printable_keeps_names_apart():
    alphabet = ["a", "\\", "n", "\n", "x", "\udce9", "\u202e", "0"]
    names = ["".join(chars) for n in range(1, 5) for chars in itertools.product(alphabet, repeat=n)]
    shown = {printable(name) for name in names}
    assert len(shown) == len(names) and all(name.isprintable() for name in shown)
    assert printable("a b/é.png") == "a b/é.png"


def test_D26_links_pipes_sockets_and_folders_named_like_pictures(tmp_path):
    root = tmp_path / "root"
    write(root, {"good.png": "g", "sub/inner.png": "i", "folder.jpg/x.png": "x", "a.png": "a"})
    write(tmp_path, {"outside.png": "", "outside/o.png": "", "secret.txt": "secret"})
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "good.txt")
    with socket.socket(socket.AF_UNIX) as end, chdir(root):
        end.bind("socket.png")
    (root / "out.png").symlink_to(tmp_path / "outside.png")
    (root / "device.png").symlink_to("/dev/zero")
    (root / "in.png").symlink_to("sub/inner.png")
    (root / "broken.png").symlink_to("nowhere.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "round").symlink_to(root)
    (root / "a.txt").symlink_to(tmp_path / "secret.txt")
    with in_time():
        rows, _ = listed(root)
        found = {row.key: row.fault or read(row.picture) for row in rows}
        assert read(rows[[row.key for row in rows].index("good.png")].caption) == "not a regular file"
    assert found == {
        "a.png": "caption: a link that leads out of the folder",
        "broken.png": "a broken link",
        "device.png": "a link that leads out of the folder",
        "folder.jpg": "a folder",
        "good.png": b"g",
        "in.png": b"i",
        "linked": "a linked folder is not entered",
        "loop.png": "too many levels of symbolic links",
        "out.png": "a link that leads out of the folder",
        "pipe.png": "not a regular file",
        "round": "a linked folder is not entered",
        "socket.png": "not a regular file",
        "sub/inner.png": b"i",
    }


def read(piece):
    try:
        return piece.read(LARGE)
    except DataError as error:
        return error.what


@contextlib.contextmanager
def chdir(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "captions.json", "s.tar"])
def test_D26_a_pipe_in_the_place_of_a_listing_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with in_time():
        found = list_rows(str(tmp_path / name))
        assert found is None or [row.fault for row in found.rows] == ["not a regular file"]
    os.mkfifo(tmp_path / "metadata.csv")
    with in_time(), pytest.raises(DataError, match="^metadata.csv: not a regular file$"):
        write(tmp_path, {"a.png": ""})
        listed(tmp_path)


def as_nobody(function, *args):
    """What `function` returns in a child process that is not root, for whom mode bits mean nothing."""

    def child(end):
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        end.send(function(*args))

    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
    process.start()
    there.close()  # so that a child that fails ends the waiting
    answer = here.recv()
    process.join()
    return answer


def open_to_all() -> str:
    """A folder for temporary ones that anybody may reach; pytest's own are closed to others."""
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if all(os.path.isdir(path) and os.stat(path).st_mode & 0o001 for path in (folder, *Path(folder).parents)):
            return folder
    pytest.skip("there is no temporary folder that anybody may reach")


def test_D27_what_may_not_be_read_is_called_so():
    with tempfile.TemporaryDirectory(dir=open_to_all()) as folder:
        os.chmod(folder, 0o755)
        write(folder, {"a.png": "a", "b.png": "b", "b.txt": "", "closed/c.png": "c", "d.png": "d"})
        closed = [Path(folder, name) for name in ("a.png", "b.txt", "closed")]
        for path in closed:
            path.chmod(0)

        def look():
            rows, _ = listed(folder)
            return {row.key: row.fault or (read(row.picture), row.caption and read(row.caption)) for row in rows}

        assert as_nobody(look) == {
            "a.png": ("permission denied", None),
            "b.png": (b"b", "permission denied"),
            "closed": "permission denied",
            "d.png": (b"d", None),
        }
        closed[2].chmod(0o755)


def test_D36_the_order_is_that_of_the_whole_paths_whatever_the_disk_says(tmp_path, monkeypatch):
    names = ["b.png", "a/z.png", "a.png", "a-b/c.png", "a/b.png", "B.png", "d/e/f.png", "d.e/f.png", "a.b/c.png"]
    write(tmp_path, dict.fromkeys(names, ""))
    before = [row.key for row in listed(tmp_path)[0]]
    assert before == sorted(names)
    scandir = os.scandir

    @contextlib.contextmanager
    def shuffled(path):
        with scandir(path) as entries:
            mixed = list(entries)
            random.shuffle(mixed)
            yield iter(mixed)

    monkeypatch.setattr(os, "scandir", shuffled)
    for _ in range(10):
        assert [row.key for row in listed(tmp_path)[0]] == before


def test_folders_may_be_deeper_than_the_stack_of_python(tmp_path):
    with chdir(tmp_path):
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        Path("a.png").touch()
        rows, _ = listed(tmp_path)
        assert [row.key for row in rows] == ["d/" * 1500 + "a.png"]
        os.remove("a.png")
        for _ in range(1500):  # too deep also for those who tidy up
            os.chdir("..")
            os.rmdir("d")


# ------------------------------------------------------------------------------------------------------ imagefolder


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_caption_the_pictures_of_their_folder_and_below(tmp_path, kind):
    def metadata(rows):
        if kind == "csv":
            return "file_name,text\n" + "".join(f'{name},"{text}"\n' for name, text in rows)
        return "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows)

    outer = [
        ("b.png", "outer b"),
        ("x/c.png", "outer c"),
        ("./x/d.png", "outer d"),
        ("b.png", "again b"),
        ("t.tiff", "t"),
    ]
    write(tmp_path, {name: "" for name in ("a.png", "b.png", "train/e.png", "x/c.png", "x/d.png", "t.tiff")})
    write(tmp_path, {"b.txt": "beside", f"metadata.{kind}": metadata(outer)})
    write(tmp_path, {f"x/metadata.{kind}": metadata([("c.png", "inner c"), ("../a.png", "escapes")])})
    rows, strays = listed(tmp_path)
    assert said(rows, tmp_path) == [
        ("a.png", ()),
        ("b.png", ("outer b", "again b")),
        ("t.tiff", ("t",)),  # whoever names it wants it: its examination will say why it cannot be used
        ("train/e.png", ()),
        ("x/c.png", ("inner c",)),
        ("x/d.png", ("outer d",)),
    ]
    assert rows[1].caption.read(9) == b"beside"
    line = 3 if kind == "csv" else 2
    assert faults(rows) == {f"x/metadata.{kind}:{line} ../a.png": "it leads out of the folder of the metadata"}
    assert strays == []


def test_metadata_that_cannot_be_read(tmp_path):
    write(tmp_path, {"a.png": "", "b.png": "", "metadata.csv": "file_name,text\na.png,one,too many\nb.png,two\n"})
    rows, _ = listed(tmp_path)
    assert faults(rows) == {"metadata.csv:2": "3 columns instead of 2"}
    assert said(rows, tmp_path) == [("a.png", ()), ("b.png", ("two",))]
    write(tmp_path, {"metadata.csv": "name,text\na.png,one\n"})
    with pytest.raises(UserError, match="^metadata.csv has no column of pictures; its columns are: name, text$"):
        listed(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.csv").symlink_to("/etc/passwd")
    assert faults(listed(tmp_path)[0]) == {"metadata.csv": "a link that leads out of the folder"}


def test_metadata_name_hidden_linked_and_absolute_files(tmp_path):
    root = tmp_path / "root"
    write(tmp_path, {"secret.png": "", "else/x.png": ""})
    write(root, {".hidden.png": "h", "a.png": ""})
    (root / "link.gif").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path / "else")
    names = [".hidden.png", "link.gif", "folder/x.png", str(tmp_path / "secret.png"), "..", "nul\0.png", "a.png/b"]
    write(root, {"metadata.jsonl": "".join(json.dumps({"file_name": name}) + "\n" for name in names)})
    rows, _ = listed(root)
    assert said(rows, root) == [("a.png", ()), (".hidden.png", ())]
    assert faults(rows) == {
        "folder": "a linked folder is not entered",
        "link.gif": "a link that leads out of the folder",
        "metadata.jsonl:3 folder/x.png": "a link that leads out of the folder",
        f"metadata.jsonl:4 {tmp_path}/secret.png": "it leads out of the folder of the metadata",
        "metadata.jsonl:5 ..": "it leads out of the folder of the metadata",
        "metadata.jsonl:6 nul\\x00.png": "not a valid file name",
        "metadata.jsonl:7 a.png/b": "no such file",
    }


# ------------------------------------------------------------------------------------------------------ listings


def test_listings_name_pictures_and_captions(tmp_path):
    write(tmp_path, {"p/a.png": "A", "b.png": "B"})
    away = tmp_path / "b.png"
    objects = [
        {"image": "p/a.png", "text": ["one", "uno"]},
        {"Image": str(away), "TEXT": 'two, "2"\tb'},
        {"image": "c"},
    ]
    write(tmp_path, {"l.jsonl": "\n\n".join(map(json.dumps, objects))})
    write(
        tmp_path, {"l.csv": f'Caption,id,IMAGE_PATH\n"[""one"", ""uno""]",1,p/a.png\n"two, ""2""\tb",2,{away}\n,3,c\n'}
    )
    write(tmp_path, {"l.tsv": f'Caption\tid\tfile\n["one", "uno"]\t1\tp/a.png\n"two, ""2""\tb"\t2\t{away}\n\t3\tc\n'})
    for kind, numbers in [("jsonl", (1, 3, 5)), ("csv", (2, 3, 4)), ("tsv", (2, 3, 4))]:
        rows, strays = listed(tmp_path / f"l.{kind}")
        names = ("p/a.png", str(away), "c")
        assert [row.key for row in rows] == [f"l.{kind}:{n} {name}" for n, name in zip(numbers, names, strict=True)]
        assert [row.captions for row in rows] in (
            [("one", "uno"), ('two, "2"\tb',), captions] for captions in ((), ("",))
        )
        assert [read(row.picture) for row in rows] == [b"A", b"B", "no such file"]
        assert strays == []


def test_captions_may_be_absent(tmp_path):
    write(tmp_path, {"l.csv": "path\na.png\nb.png\n", "l.jsonl": '{"png": "a.png"}\n{"png": "b.png", "text": null}'})
    for name in ("l.csv", "l.jsonl"):
        assert said(listed(tmp_path / name)[0], tmp_path) == [("a.png", ()), ("b.png", ())]


def test_consecutive_lines_of_one_picture_are_one_row(tmp_path):
    lines = ["a.png,one", "a.png,two", "b.png,three", "b.png,four,", "b.png,five", "a.png,six"]
    write(tmp_path, {"l.csv": "\n".join(["image,text", *lines])})
    rows, _ = listed(tmp_path / "l.csv")
    assert [(row.key, row.captions) for row in rows] == [
        ("l.csv:2 a.png", ("one", "two")),
        ("l.csv:4 b.png", ("three",)),
        ("l.csv:5", ()),
        ("l.csv:6 b.png", ("five",)),
        ("l.csv:7 a.png", ("six",)),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_D20_any_text_comes_through_as_it_was_written(tmp_path, end, kind):
    texts = [
        "plain",
        "e\u0301 é",
        "👩\u200d🚀 🇫🇷",
        "שלום",
        "a\u202eb",
        "zero\0byte",
        'a "quote", and, commas',
        "line\none",
    ]
    if kind == "jsonl":
        lines = [
            json.dumps({"image": f"{n}.png", "text": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)
        ]
    else:
        comma = "," if kind == "csv" else "\t"
        quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
        lines = [f"image{comma}text", *(f"{n}.png{comma}{text}" for n, text in enumerate(quoted))]
    write(tmp_path, {f"l.{kind}": b"\xef\xbb\xbf" + (end.join(lines) + end).encode()})
    rows, _ = listed(tmp_path / f"l.{kind}")
    assert said(rows, tmp_path) == [(f"{n}.png", (text,)) for n, text in enumerate(texts)]


def test_D21_a_line_that_is_not_UTF8_is_named_and_the_others_go_on(tmp_path):
    write(tmp_path, {"l.csv": b"image,text\na.png,one\nb.png,r\xe9el\nc.png,three\n"})
    write(tmp_path, {"l.jsonl": b'{"image": "a.png"}\n{"image": "b\xe9.png"}\n{"image": "c.png"}\n'})
    for name, reason in [("l.csv:3", "not UTF-8 (byte 7)"), ("l.jsonl:2", "not UTF-8 (byte 12)")]:
        rows, _ = listed(tmp_path / name.partition(":")[0])
        assert faults(rows) == {name: reason}
        assert [path for path, _ in said(rows, tmp_path)] == ["a.png", "c.png"]


def test_D22_malformed_lines_of_a_table_are_named_and_the_others_go_on(tmp_path):
    lines = [
        "image,text,id",
        "a.png,one,1",
        "b.png,short",  # 3
        "c.png,long,3,4",  # 4
        'd.png,"open,4',  # 5
        "e.png,five,5",
        'f.png,"x"y,6',  # 7
        ",six,7",  # 8
        "",
        "g.png," + "x" * 10_000_000 + ",8",  # 10
        'h.png,"nine ""9"" ,\nof two lines",9',  # 11 and 12
        'i.png,"open to the end,10',  # 13
        "j.png,eleven,11",
    ]
    write(tmp_path, {"l.csv": "\n".join(lines)})
    rows, _ = listed(tmp_path / "l.csv")
    assert [os.path.basename(path) for path, _ in said(rows, tmp_path)] == ["a.png", "e.png", "h.png", "j.png"]
    assert [row.captions for row in rows if not row.fault][2] == ('nine "9" ,\nof two lines',)
    assert faults(rows) == {
        "l.csv:3": "2 columns instead of 3",
        "l.csv:4": "4 columns instead of 3",
        "l.csv:5": "',' expected after '\"'",
        "l.csv:7": "',' expected after '\"'",
        "l.csv:8": "no picture is named",
        "l.csv:10": "a line of more than 10,000,000 bytes",
        "l.csv:13": "unexpected end of data",
    }


def test_D22_malformed_lines_of_a_jsonl_are_named_and_the_others_go_on(tmp_path):
    lines = [
        "{broken",
        '{"image": "a.png", "text": "one"}',
        "[1, 2]",
        '{"text": "no picture"}',
        '{"image": 7}',
        '{"image": "b.png", "text": 7}',
        '{"image": "c.png", "text": ["x", null]}',
        '{"image": "d.png", "image": "e.png"}',
        '{"image": "d.png", "Image": "e.png"}',
        "[" * 100_000,
        '{"image": "' + "x" * 10_000_000 + '"}',
        '{"image": {"bytes": ""}}',
        '{"image": " "}',
        '{"image": ' + "9" * 5000 + "}",
        '{"image": "z.png", "text": "last"}',
    ]
    write(tmp_path, {"l.jsonl": "\n".join(lines)})
    rows, _ = listed(tmp_path / "l.jsonl")
    assert said(rows, tmp_path) == [("a.png", ("one",)), ("z.png", ("last",))]
    found = faults(rows)
    assert "4300" in found.pop("l.jsonl:14") and found == {
        "l.jsonl:1": "not JSON (Expecting property name enclosed in double quotes at character 1)",
        "l.jsonl:3": "not a JSON object",
        "l.jsonl:4": "has no column of pictures; its columns are: text",
        "l.jsonl:5": "the picture is not named by a text",
        "l.jsonl:6": "caption: not a text",
        "l.jsonl:7": "caption: not a text",
        "l.jsonl:8": "a name comes twice in one object",
        "l.jsonl:9": "has two columns named image",
        "l.jsonl:10": "not JSON (too deeply nested)",
        "l.jsonl:11": "a line of more than 10,000,000 bytes",
        "l.jsonl:12": "the picture is not named by a text",
        "l.jsonl:13": "no picture is named",
    }


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("l.csv", "url,words\nx,y\n", "l.csv has no column of pictures; its columns are: url, words"),
        ("l.csv", "image;text\nx;y\n", "l.csv has no column of pictures; its columns are: image;text"),
        ("l.tsv", "image,text\nx,y\n", "l.tsv has no column of pictures; its columns are: image,text"),
        ("l.csv", "image,text,Text\nx,y,z\n", "l.csv has two columns named text"),
        ("l.csv", b"image,\xff\nx,y\n", "the header of l.csv cannot be read: not UTF-8 (byte 6)"),
        ("l.csv", '"image,text\nx,y\n', "the header of l.csv cannot be read: unexpected end of data"),
        (
            "l.jsonl",
            '\n{"url": "x", "text": "y"}\n',
            "l.jsonl line 2 has no column of pictures; its columns are: url, text",
        ),
        ("l.jsonl", '{"image": "x", "IMAGE": "y"}\n', "l.jsonl line 1 has two columns named image"),
    ],
)
def test_D22_a_missing_or_double_column_is_a_mistake_at_once(tmp_path, name, content, what):
    write(tmp_path, {name: content})
    with pytest.raises(UserError) as caught:
        listed(tmp_path / name)
    assert (caught.value.what, caught.value.code) == (what, 2)
    if "image;text" in what:
        assert "commas" in caught.value.hint
    elif "no column" in what:
        assert "image_path" in caught.value.hint and "sentences" in caught.value.hint


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_D22_a_changed_byte_spoils_no_more_than_its_line_and_its_neighbours(tmp_path, kind):
    count = 12
    pairs = [(f"{n}.png", f'number {n}, "{"x" * n}"') for n in range(count)]
    if kind == "csv":
        lines = ["image,text", *(f'{name},"{text.replace(chr(34), chr(34) * 2)}"' for name, text in pairs)]
    else:
        lines = [json.dumps({"image": name, "text": text}) for name, text in pairs]
    whole = ("\n".join(lines) + "\n").encode()
    begin = len(lines[0]) + 1  # a spoiled header is another matter
    mutate = random.Random(kind)
    for _ in range(400):
        content = bytearray(whole)
        place = mutate.randrange(begin, len(whole))
        content[place] = mutate.choice([mutate.randrange(256), *b'",\n\r\0{}\\'])
        write(tmp_path, {f"l.{kind}": bytes(content)})
        rows, _ = listed(tmp_path / f"l.{kind}")
        good = {(os.path.basename(row.picture.path), row.captions) for row in rows if not row.fault}
        lost = [n for n, (name, text) in enumerate(pairs) if (name, (text,)) not in good]
        assert len(lost) <= 2 and (not lost or lost[-1] - lost[0] == len(lost) - 1), (bytes(content), lost)


def test_an_empty_listing_has_no_rows(tmp_path):
    write(tmp_path, {"l.csv": "", "l.jsonl": "\n\n", "h.csv": "image,text\n"})
    for name in ("l.csv", "l.jsonl", "h.csv"):
        assert listed(tmp_path / name) == ([], [])


# ------------------------------------------------------------------------------------------------------ COCO


COCO = {
    "info": {},
    "images": [
        {"id": 7, "file_name": "b.jpg"},
        {"id": 3, "file_name": "a.jpg"},
        {"id": 9, "file_name": "silent.jpg"},
        {"file_name": "c.jpg"},
        {"id": 7, "file_name": "d.jpg"},
        {"id": 8, "file_name": "a.jpg"},
        "no image",
    ],
    "annotations": [
        {"image_id": 3, "caption": "first of a"},
        {"image_id": 7, "caption": "one of b"},
        {"image_id": 3, "caption": "second of a"},
        {"image_id": 99, "caption": "of nothing"},
        {"image_id": 7},
        [],
    ],
}


@pytest.mark.parametrize("place", ["", "val2017", "../val2017", "images", "../images/val2017"])
def test_COCO_captions(tmp_path, place):
    folder = tmp_path / "annotations"
    folder.mkdir()
    write(folder, {"captions_val2017.json": json.dumps(COCO)})
    write(folder / place, {"a.jpg": "A", "b.jpg": "B"})
    rows, strays = listed(folder / "captions_val2017.json")
    assert [(row.key, row.captions) for row in rows if not row.fault] == [
        ("b.jpg", ("one of b",)),
        ("a.jpg", ("first of a", "second of a")),
        ("silent.jpg", ()),
    ]
    assert [read(row.picture) for row in rows if not row.fault] == [b"B", b"A", "no such file"]
    assert faults(rows) == {
        "captions_val2017.json: images[3]": "without id or file_name",
        "captions_val2017.json: images[4]": "a second picture of this id",
        "captions_val2017.json: images[5]": "a second picture of this name",
        "captions_val2017.json: images[6]": "without id or file_name",
    }
    assert strays == [
        "captions_val2017.json: 2 annotations without image_id or caption, e.g. annotations[4]",
        "captions_val2017.json: captions of 1 images that are not listed, e.g. 99",
    ]


def test_what_is_no_COCO(tmp_path):
    write(
        tmp_path, {"x.json": '{"images": [], "categories": []}', "y.json": "[]", "z.json": "{", "w.json": "[" * 100_000}
    )
    for name, kind, what in [
        ("x.json", UserError, "x.json is not a file of COCO captions; its keys are: images, categories"),
        ("y.json", UserError, "y.json is not a file of COCO captions; it is no JSON object"),
        ("z.json", DataError, "z.json is not JSON"),
        ("w.json", DataError, "w.json is not JSON"),
    ]:
        with pytest.raises(kind) as caught:
            listed(tmp_path / name)
        assert caught.value.what.startswith(what)


# ------------------------------------------------------------------------------------------------------ shards


def test_D28_a_cut_tar_gives_what_is_whole(tmp_path):
    files = {f"{n:02d}.{kind}": b"%d" % n * 300 for n in range(6) for kind in ("png", "txt")}
    tar(tmp_path / "whole.tar", files)
    content = (tmp_path / "whole.tar").read_bytes()
    assert not faults(listed(tmp_path / "whole.tar")[0])
    with tarfile.open(tmp_path / "whole.tar") as archive:
        ends = {member.name: member.offset_data + member.size for member in archive}
        last = archive.offset
    for length in itertools.chain(range(0, len(content), 97), [*ends.values(), *(end - 1 for end in ends.values())]):
        (tmp_path / "cut.tar").write_bytes(content[:length])
        rows, _ = listed(tmp_path / "cut.tar")
        kept = {f"cut.tar/{name}": files[name] for name, end in ends.items() if end <= length and name.endswith("png")}
        assert {row.key: row.picture.read(LARGE) for row in rows if not row.fault} == kept, length
        assert list(faults(rows)) == ([] if length >= last + 512 else ["cut.tar"]), length


def test_D28_a_damaged_header_is_named_with_its_place(tmp_path):
    tar(tmp_path / "s.tar", {f"{n}.png": b"x" for n in range(4)})
    with tarfile.open(tmp_path / "s.tar") as archive:
        third = archive.getmembers()[2].offset
    content = bytearray((tmp_path / "s.tar").read_bytes())
    content[third + 10] ^= 1
    (tmp_path / "s.tar").write_bytes(content)
    rows, _ = listed(tmp_path / "s.tar")
    assert [row.key for row in rows] == ["s.tar/0.png", "s.tar/1.png", "s.tar"]
    assert rows[2].fault == f"truncated or damaged at byte {third}"


def test_D28_what_is_no_tar_says_what_it_is(tmp_path):
    tar(tmp_path / "good.tar", {"a.png": b"a"})
    write(tmp_path, {"empty.tar": b"", "text.tar": b"no tar at all" * 100, "blank.tar": bytes(10240)})
    write(tmp_path, {"zip.tar": gzip.compress((tmp_path / "good.tar").read_bytes())})
    (tmp_path / "folder.tar").mkdir()
    rows, _ = listed(tmp_path / "{blank,empty,folder,good,text,zip}.tar")
    found = faults(rows)
    assert [row.key for row in rows if not row.fault] == ["good.tar/a.png"]  # a tar of nothing has no fault
    assert found.keys() == {"empty.tar", "folder.tar", "text.tar", "zip.tar"}
    assert found["zip.tar"] == "compressed by gzip, where a plain tar was expected"
    assert found["folder.tar"] == "a folder" and found["text.tar"].startswith("not a whole plain tar")


def test_D29_a_pair_is_found_wherever_its_halves_stand(tmp_path):
    order = ["a.png", "b.txt", "c.png", "a.txt", "d.txt", "c.txt", "b.png", "e.png", "d.x.png", "x/a.txt"]
    tar(tmp_path / "s.tar", {name: name.encode() for name in order})
    rows, strays = listed(tmp_path / "s.tar")
    assert {row.key: row.caption and row.caption.read(9) for row in rows} == {
        "s.tar/a.png": b"a.txt",
        "s.tar/b.png": b"b.txt",
        "s.tar/c.png": b"c.txt",
        "s.tar/e.png": None,
    }
    assert strays == ["s.tar/d.txt: caption without a picture", "s.tar/x/a.txt: caption without a picture"]


def test_D30_hostile_members(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE}
        for name, kind in [*kinds.items(), ("folder", tarfile.DIRTYPE)]:
            member = tarfile.TarInfo(f"{name}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        for name in ("../up.png", "/absolute.png", "twice.png", "twice.png", "linked.png", "esc\x1b[2J.png"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
        member = tarfile.TarInfo("linked.txt")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    rows, _ = listed(tmp_path / "s.tar")
    assert [row.key for row in rows if not row.fault] == [
        "s.tar/../up.png",
        "s.tar//absolute.png",
        "s.tar/twice.png",
        "s.tar/esc\\x1b[2J.png",
    ]  # names only: nothing is written
    assert [row.fault for row in rows if row.fault] == ["not a regular member"] * 5 + [
        "a second member of this name",
        "caption: not a regular member",
    ]
    assert os.listdir(tmp_path) == ["s.tar"]


def test_D30_a_header_that_lies_about_its_size(tmp_path):
    member = tarfile.TarInfo("huge.png")
    member.size = 10 << 30
    (tmp_path / "s.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert listed(tmp_path / "s.tar")[0] == [Row("s.tar", None, fault="truncated at byte 2560")]


def test_several_shards(tmp_path):
    for n in range(3):
        tar(tmp_path / f"s-{n:03d}.tar", {f"{name}.png": b"" for name in "ba"})
    write(tmp_path, {"README.txt": ""})
    keys = [f"s-{n:03d}.tar/{name}.png" for n in range(3) for name in "ba"]
    for pattern in (
        "s-{000..002}.tar",
        "s-*.tar",
        "s-{000,001,002}.tar",
        "{s-000,s-001,s-002}.tar",
        "s-00{0..2}.tar",
        "",
    ):
        assert [row.key for row in listed(tmp_path / pattern)[0]] == keys, pattern
    for pattern in ("s-{001..002}.tar", "s-{001,001,002}.tar"):  # a shard that is named twice is one
        assert [row.key for row in listed(tmp_path / pattern)[0]] == keys[2:]
    write(tmp_path / "other", {"s-000.tar": (tmp_path / "s-000.tar").read_bytes()})
    both = [row.key for row in listed(tmp_path / "{s-000,other/s-000}.tar")[0]]
    assert both == ["s-000.tar/b.png", "s-000.tar/a.png", "other/s-000.tar/b.png", "other/s-000.tar/a.png"]


def test_patterns(tmp_path):
    write(tmp_path, {f"{name}.x": "" for name in ("a-08", "a-09", "a-10", "b", "c{1}")})
    for pattern, names in [
        ("a-{08..10}.x", ["a-08", "a-09", "a-10"]),
        ("{b,a-09}.x", ["b", "a-09"]),
        ("{b,a-*}.x", ["b", "a-08", "a-09", "a-10"]),
        ("a-{0,1}{8..9}.x", None),
        ("a-{10..08}.x", None),
        ("a-{0..9999999999}.x", None),
    ]:
        if names is None:
            with pytest.raises(DataError):
                expand(str(tmp_path / pattern))
        else:
            assert [path.stem for path in expand(str(tmp_path / pattern))] == names


# ------------------------------------------------------------------------------------------------------ names


def test_names_that_mean_nothing_here(tmp_path):
    write(tmp_path, {"a.parquet": "", "b.tar.gz": "", "x.py": "", "tables/a.parquet": "", "saved/state.json": ""})
    for name in ("a.parquet", "b.tar.gz", "x.py", "tables", "saved", "nowhere", "nowhere.csv", "no\0where"):
        assert list_rows(str(tmp_path / name)) is None, name
    assert list_rows("") is None and list_rows("owner/name") is None
    write(tmp_path, {"nothing/notes.md": ""})
    assert listed(tmp_path / "nothing") == ([], [])


def test_pieces_are_capped(tmp_path):
    write(tmp_path, {"a": "0123456789"})
    path = str(tmp_path / "a")
    assert Piece(path).read(10) == b"0123456789" and Piece(path, 3, 4).read(4) == b"3456"
    for piece, largest in [(Piece(path), 9), (Piece(path, 3, 4), 3), (Piece(path, 3, 1 << 40), 1 << 30)]:
        with pytest.raises(DataError, match="^too large: "):
            piece.read(largest)


@pytest.mark.parametrize("name, content", [
    ("l.csv", "image,beschreibung\na.png,rot\n"), ("l.tsv", "image\tbeschreibung\na.png\trot\n"),
    ("l.jsonl", '{"image": "a.png", "beschreibung": "rot"}\n{"image": "b.png", "beschreibung": "rot"}\n'),
    ("metadata.csv", "file_name,beschreibung\na.png,rot\n"),
])  # fmt: skip
def test_captions_in_a_column_of_another_name_are_told(tmp_path, name, content):
    write(tmp_path, {name: content, "a.png": "", "b.png": ""})
    rows, strays = listed(tmp_path if name.startswith("metadata") else tmp_path / name)
    assert rows and all(row.captions == () for row in rows)
    first = "file_name" if name.startswith("metadata") else "image"
    assert len(strays) == 1
    assert strays[0].startswith(f"{name}: no column of captions among {first}, beschreibung; understood are text,")


def test_addresses_are_not_paths(tmp_path):
    write(tmp_path, {"l.csv": "image,text\nhttps://x.org/a.png,one\nhttp/b.png,two\n", "http/b.png": "B"})
    rows, _ = listed(tmp_path / "l.csv")
    assert [row.fault for row in rows] == ["an address; pictures are not downloaded", ""]
    assert rows[0].key == "l.csv:2 https://x.org/a.png"
