"""Image tokens and captions on disk, side by side: what the transformer trains on.

A folder holds `tokens.bin` (uint16, one grid after the other, C crops of each picture), `captions.jsonl` (a list of
captions per picture, as text, so that BPE dropout can act anew at each step), `lines.bin` (int64, where each line
begins) and, written last, `tokens.json`: a folder without it is unfinished and is refused.

N pictures, C crops, h w grid.
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dvae.errors import DataError
from dvae.files import sha256_file, write_json

PARTS = ("tokens.bin", "captions.jsonl", "lines.bin")
FORMAT = 2


@dataclass(frozen=True)
class Sizes:
    """What a transformer must know of the tokens it will see."""

    vocab_text: int
    text_length: int
    vocab_image: int
    grid: tuple[int, int]


class TokenWriter:
    """Appends rows; `close` makes the folder valid."""

    def __init__(self, folder: str | Path, grid: tuple[int, int], vocab_size: int, crops: int = 1):
        if vocab_size > 1 << 16:
            raise DataError(f"{vocab_size} codes do not fit 16 bits", "use an image tokenizer of at most 65536 codes")
        self.folder, self.grid, self.vocab_size, self.crops = Path(folder), grid, vocab_size, crops
        self.pictures = self.end = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "tokens.json").unlink(missing_ok=True)
        self.tokens = open(self.folder / "tokens.bin", "wb")
        self.captions = open(self.folder / "captions.jsonl", "wb")
        self.lines = open(self.folder / "lines.bin", "wb")
        self.lines.write(struct.pack("<q", 0))

    def write(self, tokens: Tensor, captions: Sequence[Sequence[str]]) -> None:
        """Rows of tokens `(B, C, h, w)` with the captions of each."""
        assert tokens.shape == (len(captions), self.crops, *self.grid)
        self.tokens.write(tokens.numpy().astype("<u2").tobytes())
        for some in captions:
            line = json.dumps(list(some), ensure_ascii=False).encode() + b"\n"
            self.end += self.captions.write(line)
            self.lines.write(struct.pack("<q", self.end))
        self.pictures += len(captions)

    def close(self) -> None:
        for file in (self.tokens, self.captions, self.lines):
            file.close()
        described = {"format": FORMAT, "pictures": self.pictures, "crops": self.crops, "grid": self.grid}
        digests = {name: sha256_file(self.folder / name) for name in PARTS}
        write_json(self.folder / "tokens.json", {**described, "vocab_image": self.vocab_size, "sha256": digests})


class TokenFiles:
    """Reads what `TokenWriter` wrote, by memory map: memory does not grow with the data.

    Raises:
        DataError: the folder is missing, unfinished or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / "tokens.json").read_text())
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}")
            self.grid, self.vocab_size = tuple(about["grid"]), about["vocab_image"]
            self.crops, count = about["crops"], about["pictures"]
            whole = all(sha256_file(self.folder / name) == about["sha256"][name] for name in PARTS)
            whole &= (self.folder / "tokens.bin").stat().st_size == 2 * count * self.crops * math.prod(self.grid)
            whole &= (self.folder / "lines.bin").stat().st_size == 8 * (count + 1)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} holds no finished token files", "make them with dalle prepare") from error
        if not whole:
            raise DataError(f"the token files in {folder} are damaged", "make them again with dalle prepare")
        self.rows = np.memmap(self.folder / "tokens.bin", "<u2", "r", shape=(count, self.crops, *self.grid))
        self.lines = np.memmap(self.folder / "lines.bin", "<i8", "r", shape=(count + 1,))
        self.text = np.memmap(self.folder / "captions.jsonl", "u1", "r")

    def __len__(self) -> int:
        return len(self.rows)

    def tokens(self, indices: Sequence[int], crops: Sequence[int] | int = 0) -> Tensor:
        """`(B, h, w)` int64: of each picture one of its crops, 0 .. C - 1."""
        return torch.from_numpy(self.rows[list(indices), crops].astype(np.int64))

    def captions(self, index: int) -> list[str]:
        return json.loads(self.text[self.lines[index] : self.lines[index + 1]].tobytes())
