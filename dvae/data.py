"""Data sources: rows of pictures with their captions; which of them are usable, and why the others are not.

    source = open_source("photos/", size=64)       # a folder, .tar shards, or the embedded scenes
    check_share(source)                            # more than 1 % unusable: DataError before any training
    for batch in Endless(len(source), 32, seed=0):  # [(epoch, index), ...] for ever, resumable at any batch
        ...

Opening a source decodes every picture once. A bad file is skipped, named and counted, never replaced by another one
and never fatal by itself: used + skipped = listed. This file knows nothing of Lightning and of what rows are for.
"""

import itertools
import os
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dvae import scenes, seeds
from dvae.errors import DataError
from dvae.images import SUFFIXES, open_image, square

UNDERSTOOD = (
    "understood are: scenes[:train|val|heldout[:COUNT]], a folder of pictures with .txt captions beside them, "
    "a WebDataset NAME.tar or several as in NAME-{000..009}.tar, NAME-{a,b}.tar or NAME-*.tar"
)
SCENE_COUNTS = {"train": 20_000, "val": 2_000, "heldout": 2_000}

_LARGEST_PICTURE = 1 << 28  # bytes
_LARGEST_CAPTION = 1 << 20
_SHOW_PROGRESS = 2_000  # rows from which on opening a source takes noticeable time
_THREADS = 4  # Pillow decodes outside Python's lock


class Source:
    """Rows 0 .. len - 1, all usable, in an order that depends on their names only.

    Attributes:
        name: what the source was opened by.
        keys: a stable name of each row, unlike all others.
        skipped: (name, reason) of each listed row that cannot be used.
        listed: number of rows found; always len(source) + len(skipped).
    """

    def __init__(self, name: str, size: int, keys: Sequence[str], skipped: Sequence[tuple[str, str]], listed: int):
        assert len(keys) + len(skipped) == listed
        self.name, self.size, self.keys = name, size, list(keys)
        self.skipped, self.listed = list(skipped), listed

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> Tensor:
        """The whole picture of a row, uint8 (3, H, W)."""
        raise NotImplementedError

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a row; none, one or several."""
        raise NotImplementedError

    def images(self, indices: Sequence[int]) -> Tensor:
        """The pictures of some rows, cut to their central squares: uint8 (B, 3, size, size)."""
        return torch.stack([square(self.image(index), self.size) for index in indices])


class Scenes(Source):
    """The embedded scenes. All are drawn when the first picture is asked for, and kept (3 size² bytes each)."""

    def __init__(self, name: str, size: int, split: str, count: int, seed: int):
        super().__init__(name, size, [f"{split}-{index:06d}" for index in range(count)], [], count)
        self.split, self.seed = split, seed
        self._pictures: Tensor | None = None

    def image(self, index: int) -> Tensor:
        return self.images([index])[0]

    def images(self, indices: Sequence[int]) -> Tensor:
        if self._pictures is None:
            self._pictures = self._draw()
        return self._pictures[torch.as_tensor(indices, dtype=torch.int64)]

    def captions(self, index: int) -> tuple[str, ...]:
        return scenes.captions(self.split, index, seed=self.seed)

    def _draw(self) -> Tensor:
        pictures = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        starts = range(0, len(self), 256)
        for start in tqdm(starts, desc="drawing scenes", leave=False, disable=len(self) <= _SHOW_PROGRESS):
            rows = range(start, min(start + 256, len(self)))
            drawn = [scenes.scene(self.split, index, seed=self.seed) for index in rows]
            pictures[rows.start : rows.stop] = scenes.draw(drawn, self.size)
        return pictures


@dataclass(frozen=True)
class _Piece:
    """Bytes on the disk: a whole file, or the part of a tar that is a member; or the reason why there are none."""

    path: Path
    offset: int = 0
    size: int = 0
    fault: str = ""

    def read(self, largest: int) -> bytes:
        if self.fault:
            raise DataError(self.fault, "")
        if self.size > largest:
            raise DataError(f"too large: {self.size:,} bytes", "")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class _Row:
    key: str
    picture: _Piece
    caption: _Piece | None = None


class Files(Source):
    """Rows that lie on the disk, each read when it is asked for; the captions are kept."""

    def __init__(self, name: str, size: int, rows: Sequence[_Row]):
        with ThreadPoolExecutor(_THREADS) as pool:
            verdicts = pool.map(_examine, rows)
            quiet = len(rows) <= _SHOW_PROGRESS
            verdicts = list(tqdm(verdicts, "checking pictures", len(rows), leave=False, disable=quiet))
        judged = list(zip(rows, verdicts, strict=True))
        usable = [(row, verdict) for row, verdict in judged if not isinstance(verdict, str)]
        skipped = [(row.key, verdict) for row, verdict in judged if isinstance(verdict, str)]
        super().__init__(name, size, [row.key for row, _ in usable], skipped, len(rows))
        self._pictures = [row.picture for row, _ in usable]
        self._captions = [captions for _, captions in usable]

    def image(self, index: int) -> Tensor:
        try:
            return open_image(self._pictures[index].read(_LARGEST_PICTURE))
        except DataError as error:  # it was whole when the source was opened
            hint = "the data changed while it was in use; start again"
            raise DataError(f"{self.name}: {self.keys[index]}: {error.what}", hint) from error

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]


def _examine(row: _Row) -> tuple[str, ...] | str:
    """The captions of a row that can be used, or the reason why it cannot."""
    try:
        open_image(row.picture.read(_LARGEST_PICTURE))
    except DataError as error:
        return error.what
    except OSError as error:
        return error.strerror or str(error)
    if row.caption is None:
        return ()
    try:
        text = row.caption.read(_LARGEST_CAPTION).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"caption is not UTF-8 (byte {error.start})"
    except DataError as error:
        return f"caption: {error.what}"
    except OSError as error:
        return f"caption: {error.strerror or error}"
    return tuple(line.strip() for line in text.splitlines() if line.strip())


class Part(Source):
    """Some rows of another source."""

    def __init__(self, source: Source, indices: Sequence[int], skipped: Sequence[tuple[str, str]], name: str):
        keys = [source.keys[index] for index in indices]
        super().__init__(name, source.size, keys, skipped, len(indices) + len(skipped))
        self._source, self._indices = source, list(indices)

    def image(self, index: int) -> Tensor:
        return self._source.image(self._indices[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return self._source.captions(self._indices[index])

    def images(self, indices: Sequence[int]) -> Tensor:
        return self._source.images([self._indices[index] for index in indices])


def open_source(name: str, size: int, seed: int = 0) -> Source:
    """The source that `name` means, recognised by what it is; squared pictures will have `size` pixels a side.

    - `scenes`, `scenes:val`, `scenes:train:500`: the embedded scenes of that split; `seed` draws other ones.
    - a folder: its pictures, also those in folders below, each with the `.txt` of the same stem as its captions, one
      a line. Hidden names are passed over; linked folders are not entered. A folder of nothing but `.tar` is shards.
    - `shards-{000..009}.tar`, `a.tar`, `*.tar`: WebDataset; the name of a member up to its first dot binds a picture
      and its `.txt`. Nothing is extracted.

    Raises:
        DataError: there is no such source.
    """
    if name == "scenes" or name.startswith("scenes:"):
        return _open_scenes(name, size, seed)
    path = Path(name)
    if path.is_dir():
        rows = sorted(_list_folder(path.resolve()), key=lambda row: row.key)
        shards = sorted(path.glob("*.tar"))
        return Files(name, size, rows if rows or not shards else _list_shards(shards))
    if name.endswith(".tar"):
        return Files(name, size, _list_shards(_expand(name)))
    if path.exists():
        raise DataError(f"{name} is no data source", UNDERSTOOD)
    raise DataError(f"no such data source: {name}", UNDERSTOOD)


def _open_scenes(name: str, size: int, seed: int) -> Source:
    found = re.fullmatch(r"scenes(?::(\w+)(?::(\d+))?)?", name)
    split = (found[1] or "train") if found else ""
    if found is None or split not in scenes.SPLITS:
        raise DataError(f"no such scenes: {name}", UNDERSTOOD)
    return Scenes(name, size, split, int(found[2] or SCENE_COUNTS[split]), seed)


def _list_folder(root: Path) -> Iterator[_Row]:
    folders = [root]
    while folders:
        folder = folders.pop()
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            key = path.relative_to(root).as_posix()
            if path.suffix.lower() in SUFFIXES:
                caption = path.with_suffix(".txt")
                written = caption.exists() or caption.is_symlink()
                yield _Row(key, _file(path, root), _file(caption, root) if written else None)
            elif path.is_dir() and path.is_symlink():
                yield _Row(key, _Piece(path, fault="a linked folder is not entered"))
            elif path.is_dir():
                folders.append(path)


def _file(path: Path, root: Path) -> _Piece:
    try:
        target = path.resolve(strict=True)
        status = target.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else "a loop of links"
        return _Piece(path, fault=f"cannot be read ({reason})")
    if not target.is_relative_to(root):
        return _Piece(path, fault="a link that leads out of the folder")
    if not stat.S_ISREG(status.st_mode):  # reading a FIFO would wait for ever
        return _Piece(path, fault="a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    return _Piece(path, size=status.st_size)


def _expand(pattern: str) -> list[Path]:
    """The shards that a pattern means: `{000..009}` and `{a,b}` name files that must exist, `*` those that do."""
    choices = []
    for text in re.split(r"(\{[^{}]*\})", pattern):
        span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", text)
        if span:
            choices.append([f"{n:0{len(span[1])}d}" for n in range(int(span[1]), int(span[2]) + 1)])
        else:
            choices.append(text[1:-1].split(",") if text.startswith("{") else [text])
    shards = []
    for name in map("".join, itertools.product(*choices)):
        found = [name] if os.path.exists(name) else sorted(glob(name))
        if not found:
            raise DataError(f"no such data source: {name}", UNDERSTOOD)
        shards += map(Path, found)
    return shards


def _list_shards(shards: Sequence[Path]) -> list[_Row]:
    """Every picture in every shard, and one row without a picture for each shard with a fault."""
    shards = [shard.absolute() for shard in shards]
    folder = os.path.commonpath([shard.parent for shard in shards])
    rows: dict[str, _Row] = {}
    for shard in shards:
        name = shard.relative_to(folder).as_posix()
        members, fault = _index(shard)
        captions = {_stem(member): piece for member, piece in members if _suffix(member) == ".txt"}
        for member, piece in members:
            if _suffix(member) in SUFFIXES:
                key = f"{name}/{member}"
                if key in rows:
                    key, piece = f"{key} at byte {piece.offset}", _Piece(shard, fault="a second member of this name")
                rows[key] = _Row(key, piece, captions.get(_stem(member)))
        if fault:
            rows[name] = _Row(name, _Piece(shard, fault=fault))
    return list(rows.values())


# WebDataset's reading of a name: the sample is the path up to the first dot of its last part.


def _stem(member: str) -> str:
    folder, slash, base = member.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _suffix(member: str) -> str:
    return member[len(_stem(member)) :].lower()


def _index(shard: Path) -> tuple[list[tuple[str, _Piece]], str]:
    """Where each member of a tar lies, and what is wrong with the tar (or nothing). A cut tar gives what is whole."""
    members: list[tuple[str, _Piece]] = []
    if not shard.is_file():
        return members, "not a regular file"
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end, reached = shard.stat().st_size, -1
            while member := tar.next():
                if member.offset <= reached or member.size < 0:  # a header that points back would never end
                    return members, f"damaged at byte {member.offset}"
                if member.offset_data + member.size > end:
                    return members, f"truncated at byte {end}"
                fault = "" if member.isreg() and not member.issparse() else "not a regular member"
                members.append((member.name, _Piece(shard, member.offset_data, member.size, fault)))
                reached, tar.members = member.offset, []  # else the library remembers every header
            # it stops without a word at a damaged header; a whole tar ends with a block of zeros
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                return members, f"truncated or damaged at byte {tar.offset}"
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        return members, f"not a whole plain tar ({error})"
    return members, ""


def check_share(source: Source, max_bad: float = 0.01) -> None:
    """Raise DataError where nothing is usable, or where more than the share `max_bad` of what is listed is not."""
    bad = len(source.skipped)
    example = "e.g. {}: {}".format(*source.skipped[0]) if bad else "there are no pictures"
    hint = "mend or remove these files, or raise max_bad" if bad else UNDERSTOOD
    if not len(source):
        raise DataError(f"{source.name}: 0 usable of {source.listed} listed, {example}", hint)
    if bad / source.listed > max_bad:
        raise DataError(f"{source.name}: {bad} of {source.listed} files cannot be used, {example}", hint)


def split(source: Source, share: float) -> tuple[Source, Source]:
    """(training, validation), about `share` of the rows in the second. A row's side depends on its key alone.

    Raises:
        DataError: there are fewer than two rows to share out.
    """
    if len(source) < 2:
        raise DataError(f"{source.name}: {len(source)} rows cannot be split", "give more pictures")
    places = [seeds.key("split", key) / 2**63 for key in source.keys]
    ranked = sorted(range(len(source)), key=places.__getitem__)
    count = min(max(sum(place < share for place in places), 1), len(source) - 1)
    validation, training = sorted(ranked[:count]), sorted(ranked[count:])
    return (
        Part(source, training, source.skipped, f"{source.name} (training part)"),
        Part(source, validation, [], f"{source.name} (validation part)"),
    )


def order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of the rows in an epoch: a permutation of 0 .. length - 1, int64."""
    # sorted uniforms instead of `permutation`, whose algorithm numpy may change from release to release
    return seeds.rng("order", seed, epoch).random(length).argsort(kind="stable")


class Endless:
    """A batch sampler without end: lists of (epoch, index), epoch after epoch without a gap.

    The stream is one for all ranks: its row p is row p mod length of epoch p // length, so each row comes exactly
    once per epoch and a batch may straddle two. Rank r has the rows p = r (mod world). What a batch holds follows
    from its number alone, so a run resumes by `start`, the number of batches that each rank has already had.
    """

    def __init__(self, length: int, batch: int, seed: int, start: int = 0, rank: int = 0, world: int = 1):
        assert length > 0 and batch > 0 and 0 <= rank < world
        self.length, self.batch, self.seed = length, batch, seed
        self.start, self.rank, self.world = start, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        shuffled: tuple[int, np.ndarray] | None = None
        rows: list[tuple[int, int]] = []
        for position in itertools.count(self.start * self.batch * self.world + self.rank, self.world):
            epoch, place = divmod(position, self.length)
            if shuffled is None or shuffled[0] != epoch:
                shuffled = epoch, order(self.seed, epoch, self.length)
            rows.append((epoch, int(shuffled[1][place])))
            if len(rows) == self.batch:
                yield rows
                rows = []
