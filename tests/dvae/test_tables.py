import errno
import functools
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dvae import tables
from dvae.errors import DataError, EnvironmentProblem, UserError
from dvae.files import sha256
from dvae.images import open_image
from dvae.listing import Piece, Row
from dvae.tables import open_table

ROOT = Path(__file__).resolve().parents[2]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture(scope="session")
def real_parquet() -> Path:
    """A real Parquet file of captioned pictures."""
    named = os.environ.get("DALLE_TEST_PARQUET")
    beside = ROOT.parent / "shared" / "data" / "cifar10" / "train-00000-of-00001.parquet"
    path = Path(named) if named else beside
    if not path.exists():
        pytest.skip(f"there is no real Parquet file at {path}; name one in DALLE_TEST_PARQUET")
    return path


def png(seed: int) -> bytes:
    picture = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def images(*seeds: int) -> pa.Array:
    return pa.array([{"bytes": png(seed), "path": f"{seed}.png"} for seed in seeds], IMAGE)


def write(path: Path, columns: dict, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def contents(table) -> list[tuple]:
    """Every row as (key, picture's bytes or None, captions, fault)."""
    found = [(row.key, row.picture, row.captions, row.fault) for row in table.rows()]
    return [(key, None if fault else table.read(place), captions, fault) for key, place, captions, fault in found]


# ------------------------------------------------------------------------------------------------------ Parquet


def test_a_real_file_reads_as_pyarrow_says(real_parquet):
    table = open_table(str(real_parquet))
    whole = pq.read_table(real_parquet, columns=["image", "text"])
    rows = list(table.rows())
    assert [row.key for row in rows] == [f"{real_parquet.name}:{number}" for number in range(len(whole))]
    assert [row.picture for row in rows] == list(range(len(whole)))
    assert [row.captions for row in rows] == [(text,) for text in whole["text"].to_pylist()]
    assert not any(row.fault for row in rows) and len(rows) > 10
    for index in np.random.default_rng(0).integers(0, len(rows), 200).tolist():
        content = table.read(index)
        assert content == whole["image"][index]["bytes"].as_py()
        assert open_image(content).shape[0] == 3


@pytest.mark.parametrize("group", [1, 3, 100])
def test_rows_come_in_file_order(tmp_path, group):
    for name, seeds in [("b/x.parquet", range(5)), ("a/x.parquet", range(5, 12)), ("a/y.parquet", range(12, 13))]:
        columns = {"text": [f"picture {seed}" for seed in seeds], "n": list(seeds), "image": images(*seeds)}
        write(tmp_path / name, columns, row_group_size=group)
    table = open_table(f"{tmp_path}/{{b/x,a/x,a/y}}.parquet")
    keys = [*(f"b/x.parquet:{n}" for n in range(5)), *(f"a/x.parquet:{n}" for n in range(7)), "a/y.parquet:0"]
    assert contents(table) == [(key, png(n), (f"picture {n}",), "") for n, key in enumerate(keys)]
    assert [row.key for row in open_table(f"{tmp_path}/a/*.parquet").rows()] == [
        *(f"x.parquet:{n}" for n in range(7)),
        "y.parquet:0",
    ]


def test_a_folder_of_nothing_but_parquet_is_a_table(tmp_path):
    for name in ("2.parquet", "10.PARQUET", "1.parquet"):
        write(tmp_path / name, {"image": images(1)})
    (tmp_path / ".hidden").write_text("passed over")
    assert [row.key for row in open_table(str(tmp_path)).rows()] == ["1.parquet:0", "10.PARQUET:0", "2.parquet:0"]
    (tmp_path / "other.md").write_text("not a table")
    assert open_table(str(tmp_path)) is None


def test_other_names_are_no_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_open_hub", lambda name, split: pytest.fail(f"sought {name} on the Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "owner/file").write_text("")
    for name in [
        "",
        "scenes",
        "scenes:val",
        "name",
        "owner/name",
        "owner/file",
        str(tmp_path),
        "owner/name/deeper",
        "./a/b",
    ] + ["/a/b", "../a", "a/b.csv", "a/b.tar", "a/b.jsonl", "a/{b,c}", "a/*", "a b/c", "https://a/b", "owner/name/"]:
        assert open_table(name) is None


def test_D25_any_file_name_works_and_keys_are_printable(tmp_path):
    for name in ("a [1] {x}.parquet", "line\nbreak.parquet", "-dash.parquet", "a::b.parquet"):
        write(tmp_path / ".cache" / name, {"image": images(3), "text": ["x"]})
    rows = contents(open_table(str(tmp_path / ".cache")))
    assert [key for key, *_ in rows] == [
        "-dash.parquet:0",
        "a [1] {x}.parquet:0",
        "a::b.parquet:0",
        "line\\nbreak.parquet:0",
    ]
    assert {content for _, content, *_ in rows} == {png(3)}


@pytest.mark.parametrize(
    "column, values",
    [
        ("image", images(1, 2)),
        ("IMG", pa.array([png(1), png(2)], pa.binary())),
        ("jpg", pa.array([png(1), png(2)], pa.large_binary())),
        ("Picture", pa.array([{"bytes": png(1)}, {"bytes": png(2)}], pa.struct([("bytes", pa.large_binary())]))),
        ("png", pa.array([{"path": 7, "bytes": png(1)}, {"path": 8, "bytes": png(2)}])),
    ],
)
def test_pictures_in_every_form(tmp_path, column, values):
    path = write(tmp_path / "a.parquet", {"path": ["no", "bytes"], column: values})
    assert contents(open_table(str(path))) == [("a.parquet:0", png(1), (), ""), ("a.parquet:1", png(2), (), "")]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["a cat", None, ""]),
        pa.array(["a cat", None, ""], pa.large_string()),
        pa.array(["a cat", None, ""]).dictionary_encode(),
        pa.array([["a cat"], None, [None, ""]]),
        pa.array([["a cat"], [], [""]], pa.large_list(pa.large_string())),
    ],
)
@pytest.mark.parametrize("column", ["text", "Caption", "sentences"])
def test_captions_in_every_form(tmp_path, column, values):
    path = write(tmp_path / "a.parquet", {"image": images(1, 2, 3), column: values, "label": [0, 1, 2]})
    table = open_table(str(path))
    assert [row.captions for row in table.rows()] == [("a cat",), (), ("",)] and table.strays == []


def test_classes_are_no_captions(tmp_path):
    features = datasets.Features(image=datasets.Image(), text=datasets.ClassLabel(names=["cat", "dog"]))
    values = {"image": images(1, 2).to_pylist(), "text": [0, 1]}
    datasets.Dataset.from_dict(values, features=features).to_parquet(tmp_path / "a.parquet")
    table = open_table(str(tmp_path / "a.parquet"))
    assert [row.captions for row in table.rows()] == [(), ()]
    assert table.strays == ["text: int64: not a column of captions"]


def test_a_row_without_its_bytes_has_a_fault(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(9))
    path = str(tmp_path / "secret.png")
    values = [{"bytes": png(1), "path": path}, {"bytes": None, "path": path}, {"bytes": None, "path": None}, None]
    write(tmp_path / "a.parquet", {"image": pa.array(values, IMAGE), "text": list("abcd")})
    named = "the table names a file and does not hold its bytes"
    assert list(open_table(str(tmp_path / "a.parquet")).rows()) == [
        Row("a.parquet:0", 0, ("a",)),
        Row("a.parquet:1", None, (), None, named),
        Row("a.parquet:2", None, (), None, "no picture in this row"),
        Row("a.parquet:3", None, (), None, "no picture in this row"),
    ]


@pytest.mark.parametrize("listed", [False, True])
def test_D21_a_caption_that_is_not_utf8_costs_one_row(tmp_path, listed):
    texts = pa.array([b"good", b"une t\xe2che", b"good too"], pa.binary()).view(pa.string())
    if listed:
        texts = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), texts)
    path = write(tmp_path / "a.parquet", {"image": images(1, 2, 3), "text": texts})
    assert contents(open_table(str(path))) == [
        ("a.parquet:0", png(1), ("good",), ""),
        ("a.parquet:1", None, (), "caption is not UTF-8 (byte 5)"),
        ("a.parquet:2", png(3), ("good too",), ""),
    ]


def test_D22_a_missing_column_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", {"pixels": images(1), "label": [1]})
    with pytest.raises(UserError) as caught:
        open_table(str(path))
    assert caught.value.what == "a.parquet has no column of pictures; its columns are: pixels, label"
    assert caught.value.code == 2 and "image_path" in caught.value.hint


def test_D22_two_columns_of_one_name_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": images(1), "Image": images(2)})
    with pytest.raises(UserError) as caught:
        open_table(str(path))
    assert caught.value.what == "a.parquet has two columns named image" and caught.value.code == 2


@pytest.mark.parametrize("values", [["a.png"], [7], pa.array([{"path": "a.png"}]), pa.array([[1, 2]])])
def test_pictures_of_a_wrong_type_are_refused(tmp_path, values):
    path = write(tmp_path / "a.parquet", {"image": values, "text": ["x"]})
    with pytest.raises(DataError) as caught:
        open_table(str(path))
    kind = pq.read_schema(path).field("image").type
    assert caught.value.what == f"a.parquet holds no pictures: image: {kind}, which are no bytes of image files"


def test_files_of_different_kinds_are_refused(tmp_path):
    write(tmp_path / "a.parquet", {"image": images(1), "text": ["x"]})
    write(tmp_path / "b.parquet", {"image": images(1), "caption": ["x"]})
    with pytest.raises(DataError, match=r"b\.parquet differs from a\.parquet: .*caption: string; not .*text: string"):
        open_table(str(tmp_path))


def test_an_empty_table_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": images(), "text": pa.array([], pa.string())})
    with pytest.raises(DataError) as caught:
        open_table(str(path))
    assert caught.value.what == f"{path} has no rows"
    write(tmp_path / "b.parquet", {"image": images(1), "text": ["x"]})
    assert [row.key for row in open_table(str(tmp_path)).rows()] == ["b.parquet:0"]


def test_what_is_not_parquet_is_refused(tmp_path, cache):
    for name, content in [("empty", b""), ("text", b"I am a text"), ("picture", png(1))]:
        (tmp_path / f"{name}.parquet").write_bytes(content)
        with pytest.raises(DataError, match=f"^{name}.parquet is empty, damaged or of another format") as caught:
            open_table(str(tmp_path / f"{name}.parquet"))
        assert "\n" not in caught.value.what
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(DataError, match=r"^pipe\.parquet is not a regular file$"):
        open_table(str(tmp_path / "pipe.parquet"))
    with pytest.raises(DataError, match=r"^no such data source: .*absent\.parquet$"):
        open_table(str(tmp_path / "absent.parquet"))
    assert list(cache.rglob("*.arrow")) == []


def test_a_damaged_file_is_refused_or_read_but_never_a_traceback(tmp_path, cache):
    columns = {"image": images(*range(40)), "text": [f"picture {n}" for n in range(40)]}
    whole = write(tmp_path / "whole.parquet", columns, row_group_size=10).read_bytes()
    path, rng = tmp_path / "a.parquet", np.random.default_rng(0)
    refused = 0
    for place in np.linspace(0, len(whole) - 1, 50).astype(int).tolist():
        path.write_bytes(whole[:place])
        with pytest.raises(DataError, match=r"^a\.parquet is empty, damaged or of another format \(.+\)$"):
            open_table(str(path))
    for _ in range(200):
        damaged = bytearray(whole)
        place = int(rng.integers(len(whole)))
        damaged[place : place + 8] = rng.bytes(len(damaged[place : place + 8]))
        path.write_bytes(damaged)
        try:
            rows = contents(open_table(str(path)))
        except UserError as error:
            assert error.what and "\n" not in error.what and error.hint
            refused += 1
        else:
            assert [key for key, *_ in rows] == [f"a.parquet:{n}" for n in range(len(rows))]
    assert 0 < refused < 200
    assert not [left for left in cache.rglob("*") if left.is_file() and left.suffix != ".arrow"]


# ------------------------------------------------------------------------------------------------------ the cache


def test_an_unchanged_file_is_copied_once(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.parquet", {"image": images(1, 2), "text": ["x", "y"], "weights": [[1.0] * 999] * 2})
    first = contents(open_table(str(path)))
    (copy,) = cache.rglob("*.arrow")
    assert pa.ipc.open_stream(copy.read_bytes()).schema.names == ["image", "text"]
    monkeypatch.setattr(tables, "replacing", lambda path: pytest.fail("copied again"))
    assert contents(open_table(str(path))) == first


def test_D31_a_changed_file_is_copied_anew(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": images(1, 2)})
    old = open_table(str(path))
    assert [content for _, content, *_ in contents(old)] == [png(1), png(2)]
    write(path, {"image": images(2, 1)})
    os.utime(path, (2e9, 2e9))
    assert [content for _, content, *_ in contents(open_table(str(path)))] == [png(2), png(1)]
    assert [content for _, content, *_ in contents(old)] == [png(1), png(2)]


def test_a_full_disk_is_the_machines_fault_and_leaves_nothing(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.parquet", {"image": images(1)})
    replacing = tables.replacing

    @contextmanager
    def full(target):
        with replacing(target) as file:

            class Full(io.RawIOBase):
                def writable(self):
                    return True

                def write(self, content):
                    file.write(bytes(content))
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            yield Full()

    monkeypatch.setattr(tables, "replacing", full)
    with pytest.raises(OSError) as caught:
        open_table(str(path))
    assert caught.value.errno == errno.ENOSPC
    assert [left for left in cache.rglob("*") if left.is_file()] == []
    monkeypatch.undo()
    assert len(contents(open_table(str(path)))) == 1


def test_a_damaged_copy_is_named(tmp_path, cache):
    path = write(tmp_path / "a.parquet", {"image": images(1)})
    open_table(str(path))
    (copy,) = cache.rglob("*.arrow")
    copy.write_bytes(b"nonsense")
    with pytest.raises(DataError) as caught:
        open_table(str(path))
    assert str(copy) in caught.value.what and caught.value.hint == "remove this copy and start again"


def test_a_huge_row_group_is_not_held_in_memory(tmp_path):
    """Arrow's own count of bytes, in a process that does nothing else."""
    rows, size = 12_000, 5_000
    content = np.random.default_rng(0).bytes(rows * size)
    values = pa.array([content[n * size : (n + 1) * size] for n in range(rows)], pa.binary())
    path = write(tmp_path / "a.parquet", {"image": values}, row_group_size=rows)
    program = """if True:
        import hashlib, sys
        import pyarrow
        from dvae.tables import open_table

        table = open_table(sys.argv[1])
        opened, held = pyarrow.default_memory_pool().max_memory(), pyarrow.total_allocated_bytes()
        digest = hashlib.sha256()
        for row in table.rows():
            digest.update(table.read(row.picture))
        print(row.picture + 1, opened, held, pyarrow.total_allocated_bytes(), digest.hexdigest())
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program, str(path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    count, opened, held, kept, digest = run.stdout.split()
    assert int(count) == rows and digest == sha256(content)
    assert 1_000_000 < int(opened) < len(content) * 0.7
    assert int(held) < 1_000_000 and int(kept) < 1_000_000


def test_D31_a_row_that_is_no_longer_there_is_named(tmp_path):
    write(tmp_path / "a.parquet", {"image": pa.array([None, {"bytes": png(1)}], IMAGE)})
    table = open_table(str(tmp_path / "a.parquet"))
    for index, reason in [(0, "no picture in this row"), (2, "no such row")]:
        with pytest.raises(DataError) as caught:
            table.read(index)
        assert caught.value.what == reason


def test_a_table_travels_to_a_worker(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": images(1, 2), "text": ["x", "y"]})
    table = open_table(str(path))
    assert contents(pickle.loads(pickle.dumps(table))) == contents(table)


# ------------------------------------------------------------------------------------------------------ save_to_disk


def test_a_saved_data_set_is_a_table(tmp_path):
    values = {"image": images(*range(6)).to_pylist(), "text": [f"picture {n}" for n in range(6)]}
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    saved = datasets.Dataset.from_dict(values, features=features).select([4, 0, 5])
    datasets.DatasetDict(train=saved, test=saved.select([0])).save_to_disk(tmp_path / "saved")
    assert contents(open_table(f"{tmp_path}/saved/train")) == [
        (f"train:{place}", png(n), (f"picture {n}",), "") for place, n in enumerate([4, 0, 5])
    ]
    with pytest.raises(DataError) as caught:
        open_table(f"{tmp_path}/saved")
    assert caught.value.what == f"{tmp_path}/saved holds several splits: test, train"
    next((tmp_path / "saved/train").glob("*.arrow")).write_bytes(b"nonsense")
    with pytest.raises(DataError, match="saved/train is empty, damaged or of another format"):
        open_table(f"{tmp_path}/saved/train")


# ------------------------------------------------------------------------------------------------------ the Hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as loading a data set asks for: files of `repositories`, their lists, and 404."""

    protocol_version = "HTTP/1.1"

    def __init__(self, repositories: dict[str, dict[str, bytes]], *args):
        self.repositories = repositories
        super().__init__(*args)

    def do_GET(self):
        path = unquote(urlparse(self.path).path).strip("/")
        for name, files in self.repositories.items():
            if path.startswith(f"datasets/{name}/resolve/"):
                return self.send_file(files, path.split("/", 5)[5])
            if path == f"api/datasets/{name}" or path.startswith(f"api/datasets/{name}/revision/"):
                listed = [{"rfilename": file} for file in files]
                return self.send_json({"id": name, "sha": COMMIT, "siblings": listed})
            if path.startswith(f"api/datasets/{name}/tree/"):
                return self.send_tree(files, "/".join(path.split("/")[6:]))
        self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def send_file(self, files, file):
        if file in files:
            self.send(200, files[file], {"ETag": f'"{sha256(files[file])}"', "X-Repo-Commit": COMMIT})
        else:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def send_tree(self, files, folder):
        assert parse_qs(urlparse(self.path).query)["recursive"] == ["false"]
        below = [Path(file).relative_to(folder) for file in files if Path(file).is_relative_to(folder)]
        if not below:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        self.send_json(
            [
                {"type": "file", "path": str(folder / path), "oid": "0" * 40, "size": len(files[str(folder / path)])}
                for path in below
                if len(path.parts) == 1
            ]
            + [
                {"type": "directory", "path": str(Path(folder, name)), "oid": "0" * 40}
                for name in sorted({path.parts[0] for path in below if len(path.parts) > 1})
            ]
        )

    def send_json(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status, content, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub():
    """The address of a Hub with four data sets."""
    outside = str(Path(__file__).resolve())
    train = io.BytesIO()
    values = [{"bytes": png(1), "path": "1.png"}, {"bytes": None, "path": outside}, {"bytes": png(2), "path": None}]
    pq.write_table(pa.table({"image": pa.array(values, IMAGE), "text": ["one", "outside", "two"]}), train)
    validation = io.BytesIO()
    pq.write_table(pa.table({"image": images(3), "text": ["three"]}), validation)
    metadata = b'{"file_name": "a.png", "text": "a picture"}\n{"file_name": "b.png", "text": "another"}\n'
    repositories = {
        "owner/table": {
            "README.md": b"# A table\n",
            "data/train-00000-of-00001.parquet": train.getvalue(),
            "data/validation-00000-of-00001.parquet": validation.getvalue(),
        },
        "owner/empty": {"README.md": b"# Nothing else\n"},
        "owner/folder": {"a.png": png(4), "b.png": png(5), "metadata.jsonl": metadata},
        "owner/script": {"README.md": b"# Old\n", "script.py": b"raise SystemExit('code of strangers was run')\n"},
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, repositories))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# The environment counts when huggingface_hub is imported, hence a process of its own. It does not wait between tries.
PROGRAM = """
import json, sys, time
from dvae.errors import UserError
from dvae.tables import open_table

time.sleep = lambda seconds: None
answers = []
for name in sys.argv[1:]:
    try:
        table = open_table(name)
        rows = [[*row[:3], row.fault] for row in table.rows()]
        read = [table.read(row[1]).hex() if isinstance(row[1], int) else None for row in rows]
        answers.append({"rows": rows, "read": read})
    except UserError as error:
        answers.append({"error": type(error).__name__, "what": error.what, "hint": error.hint})
print(json.dumps(answers))
"""


def ask(folder: Path, endpoint: str, *names: str, offline: bool = False) -> list[dict]:
    """What opening these data sets leads to in a new process: {rows, read} or {error, what, hint} of each."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "home"), "HF_ENDPOINT": endpoint}
    environment |= {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": str(int(offline))}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


NOWHERE = "http://127.0.0.1:1"  # nothing listens there


def test_the_hub_serves_tables_and_folders(tmp_path, hub):
    names = ["owner/table", "owner/table:validation", "owner/folder", "owner/table:test"]
    train, validation, folder, absent = ask(tmp_path, hub, *names)
    assert train["rows"] == [
        ["owner/table:train:0", 0, ["one"], ""],
        ["owner/table:train:1", None, [], "the table names a file and does not hold its bytes"],
        ["owner/table:train:2", 2, ["two"], ""],
    ]
    assert train["read"] == [png(1).hex(), None, png(2).hex()]
    assert validation["rows"] == [["owner/table:validation:0", 0, ["three"], ""]]
    assert validation["read"] == [png(3).hex()]
    assert [(key, captions, fault) for key, _, captions, fault in folder["rows"]] == [
        ("owner/folder:train:0", ["a picture"], ""),
        ("owner/folder:train:1", ["another"], ""),
    ]
    pieces = [Piece(*picture) for _, picture, *_ in folder["rows"]]
    assert [piece.read(1_000_000) for piece in pieces] == [png(4), png(5)]
    assert absent == {
        "error": "DataError",
        "what": "owner/table has no split test; it has: train, validation",
        "hint": "name one of them, as in owner/table:train",
    }
    # what was loaded is there without a network, and nothing else is
    again, other = ask(tmp_path, NOWHERE, "owner/table:validation", "owner/other", offline=True)
    assert again == validation
    assert other["error"] == EnvironmentProblem.__name__


def test_the_hub_has_no_such_pictures(tmp_path, hub):
    empty, absent, script = ask(tmp_path, hub, "owner/empty", "owner/absent", "owner/script")
    assert empty["error"] == absent["error"] == script["error"] == "DataError"
    assert empty["what"].startswith("the data set owner/empty cannot be loaded (")
    assert "doesn't contain any data files" in empty["what"]
    what = "there is no file or folder called owner/absent, nor a data set on the Hub that you may read"
    assert absent["what"] == what
    assert "Dataset scripts are no longer supported" in script["what"]


@pytest.mark.parametrize("offline", [False, True])
def test_the_hub_cannot_be_reached(tmp_path, offline):
    (answer,) = ask(tmp_path, NOWHERE, "owner/table", offline=offline)
    reason = "HF_HUB_OFFLINE is set" if offline else NOWHERE
    assert answer == {
        "error": "EnvironmentProblem",
        "what": f"there is no file or folder called owner/table, and the Hugging Face Hub cannot be reached ({reason})",
        "hint": "check the name and the network",
    }
    assert EnvironmentProblem.code == 5
