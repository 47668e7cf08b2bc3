"""Data sources: which of their pictures are usable and why the others are not; their rows, and the order of them.

    source = open_source("photos/", size=64, folder=Path("runs/mine/data"))
    check_share(source)                            # more than 1 % unusable: DataError before any training
    for batch in Endless(len(source), 32, seed=0):  # [(epoch, index), ...] for ever, resumable at any batch
        ...

Opening a source examines every picture once and writes what it saw to a manifest on the disk, from which the rows are
then read: memory does not grow with the data. A bad file is skipped, named and counted, never replaced by another one
and never fatal by itself: used + skipped = listed. This file knows nothing of Lightning and of what rows are for.
"""

import io
import itertools
import json
import os
import re
import shutil
import struct
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import TimeoutError, pool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dvae import scenes, seeds
from dvae.errors import DataError, EnvironmentProblem, UserError, warn
from dvae.files import replacing, sha256, sha256_file, write_json
from dvae.images import SUFFIXES, About, examine, open_image, square
from dvae.listing import UNDERSTOOD, Listing, Piece, Row, list_rows, printable

if TYPE_CHECKING:
    from dvae.tables import Table

SCENE_COUNTS = {"train": 20_000, "val": 2_000, "heldout": 2_000}
MANIFEST, ROWS, USABLE = "manifest.json", "rows.jsonl", "usable.bin"

_FORMAT = 1  # of the manifest; it changes whenever another verdict could be found of the same bytes
_LARGEST_PICTURE = 1 << 28  # bytes
_LARGEST_CAPTION = 1 << 20
_PATIENCE = 60  # seconds without an answer, after which a disk is taken for dead
_AHEAD = 4  # rows that are under examination or done, for each thread


class Source:
    """Rows 0 .. len - 1, all usable, in an order that depends on their names only.

    Attributes:
        name: what the source was opened by.
        size: side of the squared pictures, pixels.
        listed: number of rows found; always len(source) and the number of those `skipped`.
        strays: what lies there and is no row, e.g. "b.txt: caption without a picture".
        identity: equal for sources of equal rows.
    """

    def __init__(self, name: str, size: int, count: int, listed: int, identity: str, strays: Sequence[str] = ()):
        assert 0 <= count <= listed
        self.name, self.size, self.listed, self.strays, self.identity = name, size, listed, list(strays), identity
        self._count = count

    def __len__(self) -> int:
        return self._count

    def key(self, index: int) -> str:
        """A stable, printable name of a row, unlike all others."""
        raise NotImplementedError

    def digest(self, index: int) -> str:
        """Hex SHA-256 of the bytes of a row's picture; of scenes, of what they are drawn from."""
        raise NotImplementedError

    def about(self, index: int) -> About:
        """What the examination saw: width, height, mode, format, notes."""
        raise NotImplementedError

    def image(self, index: int) -> Tensor:
        """The whole picture of a row, uint8 (3, H, W)."""
        raise NotImplementedError

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a row, cleaned; none, one or several."""
        raise NotImplementedError

    def captioned(self) -> np.ndarray:
        """bool `(len,)`: which rows have a caption."""
        raise NotImplementedError

    def images(self, indices: Sequence[int]) -> Tensor:
        """The pictures of some rows, cut to their central squares: uint8 (B, 3, size, size)."""
        return torch.stack([square(self.image(index), self.size) for index in indices])

    def keep(self) -> None:
        """For those who come back, epoch after epoch: pictures that are drawn stay in memory (3 size² bytes each)."""

    def skipped(self) -> Iterator[tuple[str, str]]:
        """(key, reason) of each listed row that cannot be used."""
        raise NotImplementedError


class Scenes(Source):
    """The embedded scenes: drawn whenever they are asked for, or all at once if they are to be kept."""

    def __init__(self, name: str, size: int, split: str, count: int, seed: int):
        super().__init__(name, size, count, count, f"{split} {count} {seed}")
        self.split, self.seed = split, seed
        self._kept: Tensor | None = None

    def key(self, index: int) -> str:
        return f"{self.split}-{index:06d}"

    def digest(self, index: int) -> str:
        return sha256(repr(scenes.scene(self.split, index, seed=self.seed)).encode())

    def about(self, index: int) -> About:
        return About(self.size, self.size, "RGB", "scene", ())

    def image(self, index: int) -> Tensor:
        return self.images([index])[0]

    def images(self, indices: Sequence[int]) -> Tensor:
        if self._kept is not None:
            return self._kept[torch.as_tensor(indices, dtype=torch.int64)]
        return scenes.draw([scenes.scene(self.split, int(index), seed=self.seed) for index in indices], self.size)

    def keep(self) -> None:
        if self._kept is not None:
            return
        pictures = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        starts = range(0, len(self), 256)
        for start in tqdm(starts, desc="drawing scenes", leave=False, delay=1, disable=None):
            rows = range(start, min(start + 256, len(self)))
            pictures[rows.start : rows.stop] = self.images(rows)
        self._kept = pictures

    def captions(self, index: int) -> tuple[str, ...]:
        return scenes.captions(self.split, index, seed=self.seed)

    def captioned(self) -> np.ndarray:
        return np.ones(len(self), bool)

    def skipped(self) -> Iterator[tuple[str, str]]:
        return iter(())


class Files(Source):
    """The rows of a manifest, each read when it is asked for; 8 bytes of memory a row.

    Raises:
        DataError: (when a row is read) its picture is not the one that was examined.
    """

    def __init__(self, name: str, size: int, folder: Path, table: "Table | None" = None):
        manifest = json.loads((folder / MANIFEST).read_text())
        identity = manifest["sha256"][ROWS]
        super().__init__(name, size, manifest["used"], manifest["listed"], identity, manifest["strays"])
        self.folder, self._table = folder, table
        self._lines = np.fromfile(folder / USABLE, "<i8")

    def __reduce__(self):  # a data-loading process reads the manifest itself
        return type(self), (self.name, self.size, self.folder, self._table)

    def key(self, index: int) -> str:
        return self._row(index)["key"]

    def digest(self, index: int) -> str:
        return self._row(index)["sha256"]

    def about(self, index: int) -> About:
        row = self._row(index)
        return About(row["width"], row["height"], row["mode"], row["format"], tuple(row["notes"]))

    def image(self, index: int) -> Tensor:
        row = self._row(index)
        try:
            picture = row["row"] if "row" in row else Piece(row["path"], row["offset"], row["size"])
            content, reason = _read(picture, self._table), "other bytes"
        except DataError as error:
            content, reason = None, error.what
        if content is None or sha256(content) != row["sha256"]:
            raise DataError(
                f"{self.name}: {row['key']} changed since it was examined ({reason})",
                "bring that file back; if it is meant to be another one, check the data again and begin a new run",
            )
        return open_image(content)

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(self._row(index)["captions"])

    def captioned(self) -> np.ndarray:
        usable = (row for row in self._rows() if "fault" not in row)
        return np.fromiter((bool(row["captions"]) for row in usable), bool, len(self))

    def skipped(self) -> Iterator[tuple[str, str]]:
        return ((row["key"], row["fault"]) for row in self._rows() if "fault" in row)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """All that are listed."""
        with open(self.folder / ROWS, encoding="utf-8", newline="\n") as rows:
            yield from map(json.loads, rows)

    def _row(self, index: int) -> dict[str, Any]:
        with open(self.folder / ROWS, "rb") as rows:  # no file that stays open: its place would be shared by processes
            rows.seek(self._lines[index])
            return json.loads(rows.readline())


class Part(Source):
    """Some rows of another source, in their order. Memory: 8 bytes a row.

    Args:
        faulty: those that the other source skips are listed and skipped here.
        reason: why the rows that are left out cannot be used, so that they too are listed and skipped here; "" where
            they belong to another part.
    """

    def __init__(self, source: Source, indices: np.ndarray, name: str, faulty: bool, reason: str = ""):
        listed = len(indices)
        listed += source.listed - len(source) if faulty else 0
        listed += len(source) - len(indices) if reason else 0
        identity = f"{source.identity} {sha256(indices.tobytes())}"
        super().__init__(name, source.size, len(indices), listed, identity, source.strays if faulty else ())
        self._source, self._indices, self._faulty, self._reason = source, indices, faulty, reason

    def key(self, index: int) -> str:
        return self._source.key(int(self._indices[index]))

    def digest(self, index: int) -> str:
        return self._source.digest(int(self._indices[index]))

    def about(self, index: int) -> About:
        return self._source.about(int(self._indices[index]))

    def image(self, index: int) -> Tensor:
        return self._source.image(int(self._indices[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        return self._source.captions(int(self._indices[index]))

    def captioned(self) -> np.ndarray:
        return self._source.captioned()[self._indices]

    def images(self, indices: Sequence[int]) -> Tensor:
        return self._source.images([int(self._indices[index]) for index in indices])

    def keep(self) -> None:
        self._source.keep()

    def skipped(self) -> Iterator[tuple[str, str]]:
        if self._faulty:
            yield from self._source.skipped()
        if self._reason:
            for index in np.setdiff1d(np.arange(len(self._source)), self._indices, assume_unique=True).tolist():
                yield self._source.key(index), self._reason


# ------------------------------------------------------------------------------------------------------ opening


def open_source(name: str, size: int, seed: int = 0, folder: Path | None = None, threads: int = 4) -> Source:
    """The source that `name` means, recognised by what it is; squared pictures will have `size` pixels a side.

    - `scenes`, `scenes:val`, `scenes:train:500`: the embedded scenes of that split; `seed` draws other ones.
    - a folder, a listing, COCO captions, WebDataset tars: see `dvae.listing`.
    - Parquet files, data sets of the Hugging Face Hub: see `dvae.tables`.
    - a folder that holds a manifest, as `dalle check` writes it: the rows that were examined then.

    Args:
        folder: keeps the manifest. Where it already holds a whole one of this name, its rows are taken and nothing is
            examined, whatever has come since. None: a temporary folder, as long as the source lives.
        threads: pictures examined at a time; any number gives the same rows.

    Raises:
        DataError: there is no such source, or it cannot be read at all.
        UserError: it names no column of pictures.
    """
    if name == "scenes" or name.startswith("scenes:"):
        return _open_scenes(name, size, seed)
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="dvae-"))
        try:
            source = _open_files(name, size, folder, threads)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(source, _remove, folder, os.getpid())
        return source
    return _open_files(name, size, Path(folder), threads)


def examined(folder: Path, name: str) -> bool:
    """Whether `folder` holds a whole manifest of the source `name`."""
    manifest = _manifest(folder)
    return manifest is not None and manifest["name"] == printable(name)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder, if there is one and it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        whole = all(sha256_file(folder / file) == manifest["sha256"][file] for file in (ROWS, USABLE))
        return manifest if whole and manifest["format"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def clean(caption: str) -> str:
    """A caption on one line: control characters and runs of white space are single spaces; no byte order marks."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", caption.replace("\ufeff", "")).split())


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)


def _open_scenes(name: str, size: int, seed: int) -> Source:
    found = re.fullmatch(r"scenes(?::(\w+)(?::(\d+))?)?", name)
    split = (found[1] or "train") if found else ""
    if found is None or split not in scenes.SPLITS:
        raise DataError(f"no such scenes: {name}", UNDERSTOOD)
    return Scenes(name, size, split, int(found[2] or SCENE_COUNTS[split]), seed)


def _open_files(name: str, size: int, folder: Path, threads: int) -> Files:
    if not examined(folder, name):
        if (checked := _manifest(Path(name))) is not None:
            _copy_manifest(Path(name), checked, name, folder)
        else:
            _examine_all(name, folder, threads)
    tabled = json.loads((folder / MANIFEST).read_text())["table"]
    table = None if tabled is None else _open_table(tabled)
    if tabled is not None and table is None:
        raise DataError(f"{name}: the table {tabled} is no longer there", "bring it back, or give another source")
    return Files(name, size, folder, table)


def _examine_all(name: str, folder: Path, threads: int) -> None:
    listing, table = list_rows(name), None
    if listing is None:
        table = _open_table(name)
        if table is None:
            there = Path(name).exists()
            hint = UNDERSTOOD
            if Path(name).suffix.lower() in (".zip", ".gz", ".tgz", ".xz", ".zst", ".7z", ".rar"):
                hint = "unpack it and give the folder, or a plain .tar"
            elif Path(name).suffix.lower() in SUFFIXES:
                hint = "give the folder that the picture lies in"
            raise DataError(f"{name} is no data source" if there else f"no such data source: {name}", hint)
        listing = Listing(table.rows(), table.strays)
    _write_manifest(name, listing, table, folder, threads)


def _copy_manifest(source: Path, manifest: dict[str, Any], name: str, folder: Path) -> None:
    """The manifest of `source` in `folder`, which keeps it whatever becomes of the other."""
    for file in (ROWS, USABLE):
        with replacing(folder / file) as target, open(source / file, "rb") as content:
            shutil.copyfileobj(content, target)
    write_json(folder / MANIFEST, {**manifest, "name": printable(name)})


def _on_hub(name: str) -> bool:
    """Whether a name is that of a data set on the Hub, and not a mistyped path below a folder that is here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) is not None and not Path(name.split("/")[0]).exists()


def _open_table(name: str) -> "Table | None":
    if not (_on_hub(name) or Path(name).is_dir() or name.lower().endswith(".parquet")):
        return None
    from dvae.tables import open_table  # seconds, which only tables should cost

    return open_table(name)


def _write_manifest(name: str, listing: Listing, table: "Table | None", folder: Path, threads: int) -> None:
    """Examine the rows of a listing, in `threads` at a time, and write what was seen.

    rows.jsonl has one object per listed row, in order; usable.bin where the line of each usable one begins (int64);
    manifest.json, written last, what makes them whole.
    """
    listed = used = 0
    with (
        replacing(folder / ROWS) as rows,
        replacing(folder / USABLE) as usable,
        pool.ThreadPool(threads) as workers,  # unlike an executor, it lets go of a thread that is stuck
    ):
        seen = _in_order(workers, lambda row: _examine(row, table), listing.rows, _AHEAD * threads)
        for row in tqdm(seen, desc="examining pictures", unit="", leave=False, delay=1, disable=None):
            listed += 1
            if "fault" not in row:
                used += 1
                usable.write(struct.pack("<q", rows.tell()))
            # a file's name may have bytes that are no UTF-8: as an escape of JSON they survive
            rows.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
    manifest = {"format": _FORMAT, "name": printable(name), "listed": listed, "used": used}
    # a relative path would mean something else in another working directory
    manifest["table"] = None if table is None else name if _on_hub(name) else os.path.abspath(name)
    manifest |= {"strays": listing.strays, "sha256": {file: sha256_file(folder / file) for file in (ROWS, USABLE)}}
    write_json(folder / MANIFEST, manifest)


def _in_order(
    workers: pool.ThreadPool, examined: Callable[[Row], dict[str, Any]], rows: Iterable[Row], ahead: int
) -> Iterator[dict[str, Any]]:
    """Each row `examined`, in the order of the rows; at most `ahead` of them are in memory."""
    waiting: deque[tuple[Row, pool.AsyncResult]] = deque()

    def first() -> dict[str, Any]:
        row, result = waiting.popleft()
        try:
            return result.get(_PATIENCE)
        except TimeoutError as error:
            raise EnvironmentProblem(
                f"{row.key}: no answer within {_PATIENCE:g} seconds", "see whether its disk or network is alive"
            ) from error

    for row in rows:
        waiting.append((row, workers.apply_async(examined, (row,))))
        if len(waiting) == ahead:
            yield first()
    while waiting:
        yield first()


def _examine(row: Row, table: "Table | None") -> dict[str, Any]:
    """A row as the manifest has it: all that is known of a usable one, or why it is none."""
    try:
        if row.fault:
            raise DataError(row.fault, "")
        content = _read(row.picture, table)
        about = examine(content)
        captions = _captions(row)
    except DataError as error:
        return {"key": row.key, "fault": error.what}
    if isinstance(row.picture, Piece):
        place = {"path": row.picture.path, "offset": row.picture.offset, "size": len(content)}
    else:
        place = {"row": row.picture}
    return {"key": row.key, **place, "sha256": sha256(content), **about._asdict(), "captions": captions}


def _read(picture: Piece | int, table: "Table | None") -> bytes:
    if isinstance(picture, Piece):
        return picture.read(_LARGEST_PICTURE)
    content = table.read(picture)
    if len(content) > _LARGEST_PICTURE:
        raise DataError(f"too large: {len(content):,} bytes", "")
    return content


def _captions(row: Row) -> list[str]:
    """The captions of a row, cleaned, those that say nothing left out; DataError where one cannot be used."""
    captions = list(row.captions)
    try:
        if row.caption is not None:
            captions += io.StringIO(row.caption.read(_LARGEST_CAPTION).decode(), newline=None)
        size = max((len(caption.encode()) for caption in captions), default=0)
    except UnicodeDecodeError as error:
        raise DataError(f"caption is not UTF-8 (byte {error.start})", "") from error
    except UnicodeEncodeError as error:
        raise DataError(f"caption is not Unicode (half a surrogate pair at character {error.start})", "") from error
    except DataError as error:
        raise DataError(f"caption: {error.what}", "") from error
    if size > _LARGEST_CAPTION:
        raise DataError(f"caption: too large: {size:,} bytes", "")
    return [caption for caption in map(clean, captions) if caption]


# ------------------------------------------------------------------------------------------------------ using


def check_share(source: Source, max_bad: float = 0.01) -> None:
    """Raise DataError where nothing is usable, or where more than the share `max_bad` of what is listed is not."""
    if not 0 <= max_bad <= 1:
        raise UserError(f"max_bad is {max_bad}", "give a share from 0 to 1, such as 0.01")
    bad = source.listed - len(source)
    if bad:
        example, hint = "e.g. {}: {}".format(*next(source.skipped())), "mend or remove these files"
        hint = "save the texts as UTF-8" if "not UTF-8" in example else hint
    else:
        example, hint = f"e.g. {source.strays[0]}" if source.strays else "there are no pictures", UNDERSTOOD
    if not len(source):
        raise DataError(f"{source.name}: 0 usable of {source.listed} listed, {example}", hint)
    if bad / source.listed > max_bad:
        raise DataError(
            f"{source.name}: {bad} of {source.listed} cannot be used, {example}",
            f"{hint}, or allow more by max_bad (a share, now {max_bad:g})",
        )


def check_outside(out: str | Path, *sources: str | None) -> None:
    """Raise UserError where what is written to `out` would become a part of a source."""
    for name in sources:
        if name is not None and Path(name).is_dir() and Path(out).resolve().is_relative_to(Path(name).resolve()):
            raise UserError(f"{out} lies inside {name}", "write elsewhere, or what is written there becomes data")


def check_names(data: str, val: str | None, hold_out: str | None = None) -> None:
    """Raise UserError where a source would be validated on that is trained on, or two things at once."""

    def meant(name: str) -> str:
        return {"scenes": "scenes:train"}.get(name, name) if name.startswith("scenes") else os.path.realpath(name)

    if val is not None and hold_out is not None:
        raise UserError("val and hold_out are both set", "set one of them to null: validate on a source or on a part")
    if val is not None and meant(data) == meant(val):
        raise UserError(f"training and validation are both {data}", "validate on another source, or on a share of it")


def check_sides(training: Source, validation: Source) -> None:
    """Warn where more is held back than learned from."""
    if len(validation) > len(training):
        warn(
            f"{len(validation):,} rows to validate on, but only {len(training):,} to train on",
            "exchange the two, or hold fewer back",
        )


def split(source: Source, share: float, hold_out: str | None = None) -> tuple[Source, Source]:
    """(training, validation), about `share` of the rows in the second, or just those that `hold_out` matches.

    By share, a row's side depends on the bytes of its picture alone: other rows that come or go do not move it, and
    copies of a picture are on one side.

    Args:
        hold_out: a regular expression; rows with a caption that it matches from end to end are validated on.

    Raises:
        DataError: there are fewer than two different pictures, or nothing is left for one of the sides.
        UserError: `hold_out` is no regular expression.
    """
    held = _by_share(source, share) if hold_out is None else _by_caption(source, hold_out)
    return (
        Part(source, np.flatnonzero(~held), f"{source.name} (training part)", faulty=True),
        Part(source, np.flatnonzero(held), f"{source.name} (validation part)", faulty=False),
    )


def _by_share(source: Source, share: float) -> np.ndarray:
    count = len(source)
    places = np.fromiter((seeds.key("split", source.digest(index)) / 2**63 for index in range(count)), float, count)
    if count == 0 or places.min() == places.max():
        what = f"{count} rows" + (" of one picture" if count > 1 else "")
        raise DataError(f"{source.name}: {what} cannot be split", "give more pictures")
    # at least the lowest place is below the bound, and never the highest
    return places < np.clip(share, np.nextafter(places.min(), 1), places.max())


def _by_caption(source: Source, expression: str) -> np.ndarray:
    try:
        matches = re.compile(expression).fullmatch
    except re.error as error:
        raise UserError(
            f"hold_out is no regular expression: {error}", 'write one as in Python, such as "(red|blue) car"'
        ) from error
    count = len(source)
    held = np.fromiter((any(map(matches, source.captions(index))) for index in range(count)), bool, count)
    if held.all() or not held.any():
        which = "every" if count and held.all() else "no"
        raise DataError(
            f"{source.name}: hold_out ({expression}) matches a caption of {which} row",
            "let it match some captions whole, or set it to null to hold out a share",
        )
    return held


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
