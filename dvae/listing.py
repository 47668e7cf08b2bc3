"""What the name of a data source means: the files that belong to it, one row for each picture, in a fixed order.

    listing = list_rows("photos/")        # a folder, a listing, COCO captions, WebDataset tars; None for other names
    for row in listing.rows:              # row.key, row.picture, row.captions, row.caption, row.fault
        ...

Rows are found while they are asked for, so that memory is that of one folder or one tar; only a COCO file is held as a
whole. No picture is opened here and no caption is judged. This file knows nothing of tensors, tables or manifests.
"""

import csv
import itertools
import json
import os
import posixpath
import re
import stat
import tarfile
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dvae.errors import DataError, UserError
from dvae.images import FORMATS, SUFFIXES

PICTURE_COLUMNS = ("image", "image_path", "img", "file_name", "filename", "file", "path", "picture", "png", "jpg")
CAPTION_COLUMNS = ("text", "caption", "captions", "sentence", "sentences", "txt", "description")
UNDERSTOOD = (
    "understood are: scenes[:train|val|heldout[:COUNT]], a folder of pictures with .txt captions or a metadata.jsonl "
    "or metadata.csv, a listing .jsonl, .csv or .tsv, COCO captions .json, WebDataset NAME.tar or several as in "
    "NAME-{000..009}.tar, NAME-{a,b}.tar or NAME-*.tar, NAME.parquet, OWNER/NAME[:SPLIT] on the Hugging Face Hub"
)

_METADATA = ("metadata.csv", "metadata.jsonl")
# told as strays where they lie beside pictures, for their owner may believe that they are used
_OTHER_PICTURES = (".avif", ".eps", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".pdf", ".psd", ".svg", ".tif", ".tiff")
_SOURCES = (".parquet", ".tar")
_LARGEST_LINE = 10_000_000  # bytes
_MOST_SHARDS = 1_000_000


class Piece(NamedTuple):
    """Bytes on the disk: a whole file (offset 0), or `size` bytes of one from `offset` on, as a member of a tar."""

    path: str
    offset: int = 0
    size: int = 0

    def read(self, largest: int) -> bytes:
        """The bytes. Raises DataError with a short reason where there are none, or more than `largest`."""
        if self.size > largest:
            raise _bad(f"too large: {self.size:,} bytes")
        with _opened(self.path) as file:
            try:
                if self.offset:
                    file.seek(self.offset)
                    return file.read(self.size)
                size = os.fstat(file.fileno()).st_size
                if size > largest:
                    raise _bad(f"too large: {size:,} bytes")
                return file.read()
            except OSError as error:
                raise _bad(_reason(error)) from error


class Row(NamedTuple):
    """One listed picture.

    Attributes:
        key: stable, printable and unlike every other key of the source: `cats/a.png`, `shard.tar/a.png`,
            `list.csv:17 cats/a.png`.
        picture: where its bytes lie; an int is a row of a table; None where there is a fault.
        captions: those that the listing says, as they are written there.
        caption: a text file of captions, one a line.
        fault: why the row cannot be used, or "".
    """

    key: str
    picture: Piece | int | None
    captions: tuple[str, ...] = ()
    caption: Piece | None = None
    fault: str = ""


class Listing(NamedTuple):
    """The rows of a source, and what lies there and is no row: complete when the rows have been consumed."""

    rows: Iterable[Row]
    strays: list[str]


def list_rows(name: str) -> Listing | None:
    """What `name` means, recognised by what it is; None where it means nothing to this file.

    - a folder: its pictures, also those in folders below, each with the `.txt` of the same stem as its captions, one
      a line, and with those that a `metadata.jsonl` or `metadata.csv` in its folder or above says (Hugging Face's
      imagefolder). Hidden names are passed over; linked folders are not entered. A folder of nothing but `.tar` is
      shards.
    - `x.jsonl`, `x.csv`, `x.tsv`: one picture a line, by its path, relative to the listing's own folder; consecutive
      lines of the same picture are one row of several captions.
    - `x.json`: COCO captions; the pictures lie beside it, or where COCO has them.
    - `a.tar`, `shards-{000..009}.tar`, `*.tar`: WebDataset; the name of a member up to its first dot binds a picture
      and its `.txt`. Nothing is extracted.

    Raises (some only while the rows are consumed):
        DataError: there is no such shard, or the listing as a whole cannot be read.
        UserError: the listing has no column of pictures, or two columns of one name.
    """
    strays: list[str] = []
    path = name.rstrip("/") or name
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        rows = _walk(os.path.realpath(path), strays)
        first = next(rows, None)
        if first is not None:
            return Listing(itertools.chain([first], rows), strays)
        names = os.listdir(path)
        if shards := sorted(Path(path, shard) for shard in names if shard.endswith(".tar") and shard[0] != "."):
            strays = []  # of the folder; the shards have their own
            return Listing(_list_shards(shards, strays), strays)
        tables = any(name.endswith(".parquet") or name in ("state.json", "dataset_dict.json") for name in names)
        return None if tables else Listing((), strays)
    if suffix == ".tar":
        return Listing(_list_shards(expand(path), strays), strays)
    if os.path.isfile(path) and suffix in (".jsonl", ".csv", ".tsv"):
        return Listing(_list_lines(path, strays), strays)
    if os.path.isfile(path) and suffix == ".json":
        return Listing(_list_coco(path, strays), strays)
    return None


def printable(name: str) -> str:
    """`name` without control characters, invisible ones or bytes that are no UTF-8; different names stay different."""
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode() for char in name
    )


def pick_columns(names: Sequence[str], where: str) -> tuple[int, int | None]:
    """The places of the pictures' and of the captions' column among `names`; case does not matter.

    Raises:
        UserError: there is no column of pictures, or a name comes twice.
    """
    known = [name.strip().lower() for name in names]
    twice = sorted({name for name in known if known.count(name) > 1})
    if twice:
        raise UserError(f"{where} has two columns named {', '.join(map(printable, twice))}", "rename one of them")
    places = {name: place for place, name in enumerate(known)}
    pictures = [places[name] for name in PICTURE_COLUMNS if name in places]
    captions = [places[name] for name in CAPTION_COLUMNS if name in places]
    if not pictures:
        found = printable(", ".join(names[:20]))
        hint = f"understood are, for pictures: {', '.join(PICTURE_COLUMNS)}; for captions: {', '.join(CAPTION_COLUMNS)}"
        if len(names) == 1 and ";" in names[0]:
            hint = "save it with commas between the columns instead of semicolons"
        raise UserError(f"{where} has no column of pictures; its columns are: {found}", hint)
    return pictures[0], captions[0] if captions else None


def _without_captions(name: str, columns: Sequence[str]) -> str:
    found, understood = printable(", ".join(columns[:20])), ", ".join(CAPTION_COLUMNS)
    return f"{name}: no column of captions among {found}; understood are {understood}"


def _bad(reason: str) -> DataError:
    return DataError(reason, "mend or remove the file")


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "no such file"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return "not a valid file name"  # a NUL, or a lone surrogate


def _opened(path: str) -> BinaryIO:
    """A regular file, open for reading. Raises DataError with a short reason."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # reading a FIFO would wait for ever
            raise _bad("a folder" if stat.S_ISDIR(mode) else "not a regular file")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        raise _bad(_reason(error)) from error


# ------------------------------------------------------------------------------------------------------ folders


class _Named(NamedTuple):
    """What the metadata of a folder say of a picture: in which line, and its captions."""

    key: str
    captions: tuple[str, ...]


_Metadata = list[tuple[str, dict[str, _Named]]]  # (folder, path below it -> what is said), the innermost last


def _walk(root: str, strays: list[str]) -> Iterator[Row]:
    metadata: _Metadata = []
    folders = [_visit(root, "", metadata, strays)]
    while folders:  # not by recursion, for folders may lie deeper than Python's stack
        for found in folders[-1]:
            if isinstance(found, str):
                folders.append(_visit(root, found, metadata, strays))
                break
            yield found
        else:
            folders.pop()


def _visit(root: str, below: str, metadata: _Metadata, strays: list[str]) -> Iterator[Row | str]:
    """The rows of one folder, and in between the folders in it; the next row is asked for when those are done.

    `below` is the folder's path below the root, "" or with a slash at its end.
    """
    try:
        with os.scandir(os.path.join(root, below)) as entries:
            # a folder takes the place that its slash gives it, so that rows come in the order of their whole paths
            kinds = {entry.name + "/" * entry.is_dir(follow_symlinks=False): entry.is_symlink() for entry in entries}
    except OSError as error:
        yield Row(printable(below.rstrip("/")) or ".", None, fault=_reason(error))
        return
    names = sorted(name for name in kinds if not name.startswith("."))
    texts = {_parts(name)[0]: name for name in names if _parts(name)[1] == ".txt"}
    bound = set()
    depth = len(metadata)
    for name in _METADATA:
        if name in kinds:
            said: dict[str, _Named] = {}
            yield from _read_metadata(root, below + name, said, strays)
            metadata.append((below, said))
    for name in names:
        path = os.path.join(root, below, name)
        key, (stem, suffix) = printable((below + name).rstrip("/")), _parts(name)
        link = kinds[name]
        said_of = _take(metadata, below + name)
        if suffix in SUFFIXES or said_of:
            picture, fault = _within(path, root, link)
            caption = None
            if stem in texts:
                bound.add(texts[stem])
                caption, spoiled = _within(os.path.join(root, below, texts[stem]), root, kinds[texts[stem]])
                fault = fault or (f"caption: {spoiled}" if spoiled else "")
            yield Row(key, None if fault else picture, said_of.captions if said_of else (), caption, fault)
        elif name.endswith("/"):
            yield below + name
        elif link and os.path.isdir(path):
            yield Row(key, None, fault="a linked folder is not entered")
        elif suffix in _OTHER_PICTURES:
            strays.append(f"{key}: not one of the formats {', '.join(FORMATS)}")
        elif suffix in _SOURCES:
            strays.append(f"{key}: not read as a part of this folder")
    strays += [f"{printable(below + name)}: caption without a picture" for name in sorted(set(texts.values()) - bound)]
    while len(metadata) > depth:
        for name, named in metadata.pop()[1].items():  # what was not met on the way
            picture, fault = _within(os.path.join(root, below, name), root, True)
            if name.startswith("/") or name.split("/")[0] == "..":
                fault = "it leads out of the folder of the metadata"
            yield Row(named.key, None if fault else picture, named.captions, fault=fault)


def _parts(name: str) -> tuple[str, str]:
    """(stem, lower-case suffix) of a name that may end with a folder's slash."""
    stem, suffix = os.path.splitext(name.rstrip("/"))
    return stem, suffix.lower()


def _within(path: str, root: str, link: bool) -> tuple[Piece | None, str]:
    """The file, or why it is none: where `link` says that there may be one, it must not lead out of the root."""
    if link:
        try:
            target = os.path.realpath(path, strict=True)
        except (OSError, ValueError) as error:
            broken = os.path.islink(path) and isinstance(error, FileNotFoundError)
            return None, "a broken link" if broken else _reason(error)
        if os.path.commonpath([root, target]) != root:
            return None, "a link that leads out of the folder"
    return Piece(path.rstrip("/")), ""


def _read_metadata(root: str, below: str, said: dict[str, _Named], strays: list[str]) -> Iterator[Row]:
    """Fill `said` from the metadata file at `below`; the rows are the lines of it that cannot be read."""
    path = os.path.join(root, below)
    _, fault = _within(path, root, os.path.islink(path))
    if fault:
        yield Row(printable(below), None, fault=fault)
        return
    for line in _read_lines(path, printable(below), strays):
        key = f"{printable(below)}:{line.number}"
        if line.fault:
            yield Row(key, None, fault=line.fault)
            continue
        name = posixpath.normpath(line.picture)
        before = said.get(name, _Named(f"{key} {printable(line.picture)}", ()))
        said[name] = before._replace(captions=before.captions + line.captions)


def _take(metadata: _Metadata, path: str) -> _Named | None:
    """What the innermost metadata say of a picture; it counts as met in all of them."""
    found = [said.pop(path[len(folder) :], None) for folder, said in metadata]
    return next((named for named in reversed(found) if named), None)


# ------------------------------------------------------------------------------------------------------ listings


class _Line(NamedTuple):
    """A line of a listing: a picture and its captions, or a fault."""

    number: int
    picture: str = ""
    captions: tuple[str, ...] = ()
    fault: str = ""


def _list_lines(path: str, strays: list[str]) -> Iterator[Row]:
    name, folder = printable(os.path.basename(path)), os.path.abspath(os.path.dirname(path))
    for _, same in itertools.groupby(_read_lines(path, name, strays), key=lambda line: line.picture or line.number):
        first = next(same)
        key = f"{name}:{first.number}"
        if first.fault:
            yield Row(key, None, fault=first.fault)
        elif re.match("https?://", first.picture):
            yield Row(f"{key} {printable(first.picture)}", None, fault="an address; pictures are not downloaded")
        else:
            captions = first.captions + tuple(caption for line in same for caption in line.captions)
            picture = Piece(os.path.join(folder, first.picture))
            yield Row(f"{key} {printable(first.picture)}", picture, captions)


def _read_lines(path: str, name: str, strays: list[str]) -> Iterator[_Line]:
    """The lines of a listing, in order; a bad one is a fault, and those after it are not touched by it."""
    try:
        file = _opened(path)
    except DataError as error:
        raise DataError(f"{name}: {error.what}", error.hint) from error
    with file:
        if path.lower().endswith(".jsonl"):
            yield from _read_jsonl(file, name, strays)
        else:
            yield from _read_table(file, name, "\t" if path.lower().endswith(".tsv") else ",", strays)


def _numbered(file: BinaryIO) -> Iterator[tuple[int, str, str]]:
    """(number, text, fault) of each line."""
    for number in itertools.count(1):
        line = file.readline(_LARGEST_LINE + 1)
        if not line:
            return
        if len(line) > _LARGEST_LINE:
            while line and not line.endswith(b"\n"):
                line = file.readline(_LARGEST_LINE)
            yield number, "", f"a line of more than {_LARGEST_LINE:,} bytes"
            continue
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8"), ""
        except UnicodeDecodeError as error:
            yield number, "", f"not UTF-8 (byte {error.start})"


def _read_jsonl(file: BinaryIO, name: str, strays: list[str]) -> Iterator[_Line]:
    begun = False
    for number, text, fault in _numbered(file):
        if not fault and not text.strip():
            continue
        try:
            if fault:
                raise ValueError(fault)
            value = json.loads(text, object_pairs_hook=_object)
            if not isinstance(value, dict):
                raise ValueError("not a JSON object")
            try:
                picture, caption = pick_columns(list(value), f"{name} line {number}")
            except UserError as error:
                if not begun:
                    raise
                raise ValueError(error.what.removeprefix(f"{name} line {number} ")) from error
            if not begun and caption is None:
                strays.append(_without_captions(name, list(value)))
            begun = True
            values = list(value.values())
            yield _Line(number, _path(values[picture]), () if caption is None else _texts(values[caption]))
        except json.JSONDecodeError as error:
            yield _Line(number, fault=f"not JSON ({error.msg} at character {error.pos})")
        except RecursionError:
            yield _Line(number, fault="not JSON (too deeply nested)")
        except ValueError as error:
            yield _Line(number, fault=str(error))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name comes twice in one object")
    return made


class _BadLine(Exception):
    pass


class _Replay(Iterator[str]):
    """The lines of a file; after a record that went wrong, all but its first line can be given once more."""

    def __init__(self, lines: Iterator[tuple[int, str, str]]):
        self.lines, self.waiting, self.given = lines, deque[tuple[int, str, str]](), list[tuple[int, str, str]]()

    def __next__(self) -> str:
        line = self.waiting.popleft() if self.waiting else next(self.lines)
        self.given.append(line)
        if line[2]:
            raise _BadLine(line[2])
        return line[1]

    def again(self) -> None:
        self.waiting.extendleft(reversed(self.given[1:]))


def _read_table(file: BinaryIO, name: str, delimiter: str, strays: list[str]) -> Iterator[_Line]:
    csv.field_size_limit(_LARGEST_LINE)  # the module's own limit is less than one long caption
    lines = _Replay(_numbered(file))
    # strict, for otherwise a quote without its partner would swallow good lines in silence
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    picture, caption = 0, None
    while True:
        lines.given.clear()
        try:
            cells = next(records)
        except StopIteration:
            return
        except (csv.Error, _BadLine) as error:
            cells, fault = [], str(error)
        else:
            if not cells:
                continue
            fault = f"{len(cells)} columns instead of {len(header)}" if header and len(cells) != len(header) else ""
        if header is None:
            if fault:
                raise UserError(f"the header of {name} cannot be read: {fault}", "name the columns in the first line")
            header = cells
            picture, caption = pick_columns(header, name)
            if caption is None:
                strays.append(_without_captions(name, header))
            continue
        number = lines.given[0][0]
        if fault:
            lines.again()
            yield _Line(number, fault=fault)
            continue
        try:
            yield _Line(number, _path(cells[picture]), () if caption is None else _texts(_unfolded(cells[caption])))
        except ValueError as error:
            yield _Line(number, fault=str(error))


def _path(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("the picture is not named by a text")
    if not value.strip():
        raise ValueError("no picture is named")
    return value.strip()


def _texts(value: Any) -> tuple[str, ...]:
    """Captions as they stand in JSON: a text, a list of texts, or null."""
    texts = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("caption: not a text")
    return tuple(texts)


def _unfolded(cell: str) -> str | list[str]:
    """The captions in one cell: a JSON list of texts, or else the text itself."""
    if cell.lstrip().startswith("["):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            return value
    return cell


# ------------------------------------------------------------------------------------------------------ COCO


def _list_coco(path: str, strays: list[str]) -> Iterator[Row]:
    name = printable(os.path.basename(path))
    try:
        with _opened(path) as file:
            value = json.load(file)
    except DataError as error:
        raise DataError(f"{name}: {error.what}", error.hint) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not JSON ({error})", UNDERSTOOD) from error
    keys = list(value) if isinstance(value, dict) else []
    images, annotations = (value[key] if key in keys else None for key in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list):
        found = f"its keys are: {printable(', '.join(keys[:20]))}" if keys else "it is no JSON object"
        raise UserError(
            f"{name} is not a file of COCO captions; {found}",
            'it needs {"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}',
        )
    captions: dict[Any, list[str]] = defaultdict(list)
    spoiled = []
    for place, annotation in enumerate(annotations):
        number, caption = map(annotation.get, ("image_id", "caption")) if isinstance(annotation, dict) else (None, None)
        if isinstance(number, (int, str)) and isinstance(caption, str):
            captions[number].append(caption)
        else:
            spoiled.append(place)
    named = [image if isinstance(image, dict) else {} for image in images]
    folder = _coco_folder(path, [image["file_name"] for image in named if isinstance(image.get("file_name"), str)])
    met, files = set(), set()
    for place, image in enumerate(named):
        key, file, number = f"{name}: images[{place}]", image.get("file_name"), image.get("id")
        if not isinstance(file, str) or not file or not isinstance(number, (int, str)):
            yield Row(key, None, fault="without id or file_name")
        elif number in met or file in files:
            yield Row(key, None, fault=f"a second picture of this {'id' if number in met else 'name'}")
        else:
            met.add(number)
            files.add(file)
            yield Row(printable(file), Piece(os.path.join(folder, file)), tuple(captions.get(number, ())))
    lost = [number for number in captions if number not in met]
    if spoiled:
        strays.append(f"{name}: {len(spoiled)} annotations without image_id or caption, e.g. annotations[{spoiled[0]}]")
    if lost:
        strays.append(f"{name}: captions of {len(lost)} images that are not listed, e.g. {printable(str(lost[0]))}")


def _coco_folder(path: str, names: Sequence[str]) -> str:
    """Where the pictures of `.../captions_val2017.json` lie: the first usual place that holds one of them."""
    here = os.path.dirname(os.path.abspath(path))
    split = os.path.splitext(os.path.basename(path))[0].rpartition("_")[2]
    usual = ("", split, f"../{split}", "images", f"images/{split}", "../images", f"../images/{split}")
    folders = [os.path.normpath(os.path.join(here, folder)) for folder in usual]
    return next((folder for name in names for folder in folders if os.path.isfile(os.path.join(folder, name))), here)


# ------------------------------------------------------------------------------------------------------ shards


def expand(pattern: str) -> list[Path]:
    """The files that a pattern means, each once: `{000..009}` and `{a,b}` name files that must exist, `*` finds them.

    Raises:
        DataError: one of them does not exist, or a span means more than a million.
    """
    choices: list[Sequence[str]] = []
    for text in re.split(r"(\{[^{}]*\})", pattern):
        span = re.fullmatch(r"\{([0-9]{1,12})\.\.([0-9]{1,12})\}", text)
        if span:
            numbers = range(int(span[1]), int(span[2]) + 1)
            if len(numbers) > _MOST_SHARDS:
                raise DataError(f"{pattern} means more than {_MOST_SHARDS:,} files", UNDERSTOOD)
            choices.append([f"{number:0{len(span[1])}d}" for number in numbers])
        else:
            choices.append(text[1:-1].split(",") if text.startswith("{") else [text])
    found: dict[str, None] = {}
    for name in map("".join, itertools.product(*choices)):
        names = [name] if os.path.exists(name) else sorted(glob(name))
        if not names:
            raise DataError(f"no such data source: {name}", UNDERSTOOD)
        found |= dict.fromkeys(names)
    if not found:
        raise DataError(f"{pattern} means no files", UNDERSTOOD)
    return [Path(name) for name in found]


def _list_shards(shards: Sequence[Path], strays: list[str]) -> Iterator[Row]:
    shards = [shard.absolute() for shard in shards]
    folder = os.path.commonpath([shard.parent for shard in shards])
    for shard in shards:
        yield from _list_shard(str(shard), printable(shard.relative_to(folder).as_posix()), strays)


def _list_shard(shard: str, name: str, strays: list[str]) -> Iterator[Row]:
    """Every picture in a shard, and one row without a picture where the shard has a fault."""
    members, fault = _index(shard)
    # by stem, for a picture and its caption need not stand side by side
    texts = {_stem(member.name): member for member in members if _suffix(member.name) == ".txt"}
    met, bound = set(), set()
    for member in members:
        stem, suffix, key = _stem(member.name), _suffix(member.name), f"{name}/{printable(member.name)}"
        if suffix in SUFFIXES:
            caption = texts.get(stem)
            bound.add(stem)
            reason = member.fault or (f"caption: {caption.fault}" if caption and caption.fault else "")
            if member.name in met:
                key, reason = f"{key} at byte {member.piece.offset}", "a second member of this name"
            met.add(member.name)
            yield Row(key, None if reason else member.piece, (), caption.piece if caption else None, reason)
        elif suffix in _OTHER_PICTURES:
            strays.append(f"{key}: not one of the formats {', '.join(FORMATS)}")
    lost = (member for stem, member in texts.items() if stem not in bound)
    strays += [f"{name}/{printable(member.name)}: caption without a picture" for member in lost]
    if fault:
        yield Row(name, None, fault=fault)


# WebDataset's reading of a name: the sample is the path up to the first dot of its last part.


def _stem(member: str) -> str:
    folder, slash, base = member.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _suffix(member: str) -> str:
    return member[len(_stem(member)) :].lower()


class _Member(NamedTuple):
    name: str
    piece: Piece
    fault: str


def _index(shard: str) -> tuple[list[_Member], str]:
    """Where each member of a tar lies, and what is wrong with the tar (or ""). A cut tar gives what is whole."""
    members: list[_Member] = []
    try:
        with _opened(shard) as file:
            end, reached = os.fstat(file.fileno()).st_size, -1
            if file.read(2) == b"\x1f\x8b":
                return members, "compressed by gzip, where a plain tar was expected"
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    if member.offset <= reached or member.size < 0:  # a header that points back would never end
                        return members, f"damaged at byte {member.offset}"
                    if member.offset_data + member.size > end:
                        return members, f"truncated at byte {end}"
                    fault = "" if member.isreg() and not member.issparse() else "not a regular member"
                    members.append(_Member(member.name, Piece(shard, member.offset_data, member.size), fault))
                    reached, tar.members = member.offset, []  # else the library remembers every header
                # it stops without a word at a damaged header; a whole tar ends with a block of zeros
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    return members, f"truncated or damaged at byte {tar.offset}"
    except DataError as error:
        return members, error.what
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        return members, f"not a whole plain tar ({error})"
    return members, ""
