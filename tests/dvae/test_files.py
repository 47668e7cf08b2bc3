import hashlib
import json
import os

import pytest

from dvae import files


class Killed(BaseException):
    """What a kill looks like to the code that it hits."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_and_makes_the_folder(tmp_path):
    files.write_bytes(tmp_path / "new" / "a.bin", b"abc")
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"abc"
    assert names(tmp_path / "new") == ["a.bin"]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")
    with pytest.raises(Killed), files.replacing(path) as file:
        file.write(b"half of the n")
        raise Killed
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_the_target_is_never_seen_half_written(tmp_path):
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")
    with files.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_bytes_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths))[1])
    files.write_bytes(tmp_path / "a.bin", b"abc")
    assert calls == ["fsync", "replace", "fsync"]  # the file, the rename, the folder


def test_the_temporary_file_lies_beside_its_target_and_is_swept(tmp_path):
    child = os.fork()
    if child == 0:  # a process that dies half-way, without any clean-up
        with files.replacing(tmp_path / "a.bin") as file:
            file.write(b"half")
            file.flush()
            os._exit(0)
    os.waitpid(child, 0)
    (left,) = names(tmp_path)
    assert "a.bin" in left and left != "a.bin"
    (tmp_path / "mine.txt").write_text("kept")
    files.sweep(tmp_path)
    assert names(tmp_path) == ["mine.txt"]


def test_json_is_readable_text(tmp_path):
    value = {"caption": "ein blauer Käfer", "numbers": [1, 2.5, None]}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and "Käfer" in text and text.endswith("}\n")


def test_digests(tmp_path):
    content = bytes(range(256)) * 9_000  # more than one block
    (tmp_path / "a.bin").write_bytes(content)
    assert files.sha256_file(tmp_path / "a.bin") == files.sha256(content) == hashlib.sha256(content).hexdigest()
