"""Token files say again what was written, or refuse."""

import json

import numpy as np
import pytest
import torch

from dalle.tokens import PARTS, TokenFiles, TokenWriter
from dvae.errors import DataError

CAPTIONS = [["a red circle"], ["one", "two\nlines", ""], ['\u2603 \U0001f600 "quoted" \\ \x00'], [], ["e\u0301"]]


def write(folder, tokens, captions, vocab_size=65536, batch=2):
    writer = TokenWriter(folder, tuple(tokens.shape[1:]), vocab_size)
    for first in range(0, len(tokens), batch):
        writer.write(tokens[first : first + batch, None], captions[first : first + batch])
    writer.close()


@pytest.fixture
def rows() -> torch.Tensor:
    tokens = torch.randint(0, 65536, (5, 2, 3))
    tokens[0, 0] = torch.tensor([0, 32768, 65535])  # the ends of 16 bits, and the sign of a signed reader
    return tokens


def test_round_trip(tmp_path, rows):
    write(tmp_path, rows, CAPTIONS)
    read = TokenFiles(tmp_path)
    assert len(read) == 5 and read.grid == (2, 3) and read.vocab_size == 65536
    order = [4, 0, 0, 2]
    assert read.tokens(order).dtype == torch.int64 and torch.equal(read.tokens(order), rows[order])
    assert [read.captions(index) for index in range(5)] == CAPTIONS


def test_each_crop_of_a_picture_is_found_again(tmp_path):
    tokens = torch.randint(0, 65536, (5, 4, 2, 3))
    writer = TokenWriter(tmp_path, (2, 3), 65536, crops=4)
    writer.write(tokens, CAPTIONS)
    writer.close()
    read = TokenFiles(tmp_path)
    assert len(read) == 5 and read.crops == 4
    assert torch.equal(read.tokens([4, 0, 0], [3, 1, 2]), torch.stack([tokens[4, 3], tokens[0, 1], tokens[0, 2]]))
    assert torch.equal(read.tokens(range(5)), tokens[:, 0])
    assert [read.captions(index) for index in range(5)] == CAPTIONS


def test_how_the_rows_are_batched_does_not_matter(tmp_path, rows):
    for batch in (1, 2, 5):
        write(tmp_path / str(batch), rows, CAPTIONS, batch=batch)
    for name in (*PARTS, "tokens.json"):
        assert len({(tmp_path / str(batch) / name).read_bytes() for batch in (1, 2, 5)}) == 1


def test_the_bytes_on_disk_are_little_endian_uint16(tmp_path, rows):
    write(tmp_path, rows, CAPTIONS)
    assert (tmp_path / "tokens.bin").read_bytes() == rows.numpy().astype(np.dtype("<u2")).tobytes()


def test_more_codes_than_16_bits_hold_are_refused(tmp_path):
    TokenWriter(tmp_path / "most", (1, 1), 65536).close()
    with pytest.raises(DataError, match="16 bits"):
        TokenWriter(tmp_path / "more", (1, 1), 65537)
    assert not (tmp_path / "more").exists()


def test_an_unfinished_folder_is_refused(tmp_path, rows):
    writer = TokenWriter(tmp_path, (2, 3), 65536)
    writer.write(rows[:, None], CAPTIONS)
    with pytest.raises(DataError, match="no finished"):
        TokenFiles(tmp_path)
    writer.close()
    assert len(TokenFiles(tmp_path)) == 5


def test_a_folder_that_is_written_again_is_unfinished_meanwhile(tmp_path, rows):
    write(tmp_path, rows, CAPTIONS)
    writer = TokenWriter(tmp_path, (2, 3), 65536)
    with pytest.raises(DataError, match="no finished"):
        TokenFiles(tmp_path)
    writer.write(rows[:1, None], CAPTIONS[:1])
    writer.close()
    assert len(TokenFiles(tmp_path)) == 1


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("fault", ["flip", "cut", "grow", "gone"])
def test_a_damaged_part_is_refused(tmp_path, rows, part, fault):
    write(tmp_path, rows, CAPTIONS)
    path, content = tmp_path / part, (tmp_path / part).read_bytes()
    if fault == "gone":
        path.unlink()
    else:
        flipped = content[:7] + bytes([content[7] ^ 4]) + content[8:]
        path.write_bytes({"flip": flipped, "cut": content[:-1], "grow": content + b"\0"}[fault])
    with pytest.raises(DataError):
        TokenFiles(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"pictures": 6},
        {"pictures": 4},
        {"pictures": "5"},
        {"grid": [3, 3]},
        {"grid": 6},
        {"sha256": {}},
        {"grid": None},
    ],
    ids=str,
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, rows, change):
    write(tmp_path, rows, CAPTIONS)
    about = json.loads((tmp_path / "tokens.json").read_text())
    (tmp_path / "tokens.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(DataError):
        TokenFiles(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_a_description_that_is_none_is_refused(tmp_path, rows, content):
    write(tmp_path, rows, CAPTIONS)
    (tmp_path / "tokens.json").write_bytes(content)
    with pytest.raises(DataError):
        TokenFiles(tmp_path)
