"""Pictures that lie in tables: Parquet files, data sets saved by `datasets`, and data sets of the Hugging Face Hub.

    table = open_table("train-{00000..00009}.parquet")     # or "owner/name:validation"
    for row in table.rows():
        content = table.read(row.picture)

Any row is read at once from a memory map, so memory does not grow with the table. Parquet has no random access (a row
costs the decoding of its whole row group), so its columns of pictures and captions are copied once into an Arrow file
in the cache of `datasets` (HF_DATASETS_CACHE), which later openings of the unchanged files use again. Data sets of the
Hub lie in the same cache; no code of theirs is ever run. This file decodes no picture and cleans no caption.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import httpx
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import constants
from huggingface_hub import errors as hub
from tqdm import tqdm

from dvae.errors import DataError, EnvironmentProblem
from dvae.files import replacing, sha256
from dvae.listing import CAPTION_COLUMNS, PICTURE_COLUMNS, Piece, Row, expand, pick_columns, printable

_BATCH_ROWS = 1000
_BATCH_BYTES = 1 << 24  # of decoded rows that are in memory at a time
_BUFFER = 1 << 20  # read from the disk at a time; otherwise a whole row group would be
_LISTINGS = (".tar", ".jsonl", ".json", ".csv", ".tsv")  # a mistyped one of them is not sought on the Hub
_SHOW_PROGRESS = 2000  # rows from which on copying takes noticeable time


class _Columns(NamedTuple):
    picture: pa.Field
    caption: pa.Field | None
    strays: list[str]

    def schema(self) -> pa.Schema:
        return pa.schema([field for field in (self.picture, self.caption) if field is not None])


class Table:
    """Rows in the order of the table, their pictures as undecoded bytes.

    Attributes:
        strays: what in the table looks like a column of captions and is none.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        name: str,
        columns: _Columns,
        parts: Iterable[tuple[str, int]],
        home: Sequence[str] = (),
    ):
        """`parts`: (prefix of the keys, number of rows), in order. `home`: folders whose files the table may name."""
        self.strays = columns.strays
        self._picture, self._caption = columns.picture.name, columns.caption and columns.caption.name
        self._rows = dataset.select_columns(columns.schema().names).with_format("arrow")
        self._parts = list(parts)
        self._home = [Path(folder).resolve() for folder in home]
        if not len(dataset):
            raise DataError(f"{name} has no rows", "give a table with at least one row")
        if sum(count for _, count in self._parts) != len(dataset):
            raise DataError(f"{name} changed while it was opened", "start again when nothing writes to it")

    def rows(self) -> Iterator[Row]:
        """Every row; its `picture` is the number that `read` takes, or a file where the table names one of its own."""
        numbered = (f"{prefix}:{row}" for prefix, count in self._parts for row in range(count))
        index = 0
        for batch in self._rows.iter(_BATCH_ROWS):
            contents, paths = _contents(batch[self._picture])
            captions = batch[self._caption] if self._caption else pa.nulls(len(batch))
            columns = contents.is_valid().to_pylist(), _as_bytes(paths).to_pylist(), _as_bytes(captions).to_pylist()
            for present, path, written in zip(*columns, strict=True):
                picture, fault = (index, "") if present else self._named(path)
                texts, fault = _texts(written) if not fault else ((), fault)
                yield Row(next(numbered), None if fault else picture, texts, None, fault)
                index += 1

    def read(self, index: int) -> bytes:
        """The bytes of the picture in row `index`, as they were put into the table. Raises DataError without them."""
        if index >= len(self._rows):  # the table was longer when somebody noted this number
            raise DataError("no such row", "give the table as it was")
        content = _contents(self._rows[index][self._picture])[0][0].as_py()
        if content is None:
            raise DataError("no picture in this row", "give a table whose rows hold the bytes of pictures")
        return content

    def _named(self, path: bytes | None) -> tuple[Piece | None, str]:
        """A row without bytes: the file that it names, if that came with the table, or why there is no picture."""
        if not path:
            return None, "no picture in this row"
        target = os.path.realpath(os.fsdecode(path.replace(b"\0", b"")))
        if any(Path(target).is_relative_to(folder) for folder in self._home) and os.path.isfile(target):
            return Piece(target, 0, os.path.getsize(target)), ""
        return None, "the table names a file and does not hold its bytes"


def open_table(name: str) -> Table | None:
    """The table that `name` means, or None where it means none.

    - `a.parquet`, `train-{00000..00009}.parquet`, `train-*.parquet`: Parquet files, one after the other.
    - a folder of nothing but `.parquet` files: all of them, by name.
    - a folder that `datasets` wrote by `save_to_disk`: one split of it.
    - `owner/name` or `owner/name:split`, where no such path exists: a split (`train`, unless it is named) of a data
      set on the Hub. What was loaded before is also there without a network.

    The column of pictures holds the bytes of image files, or structs with `bytes` as the Image feature of `datasets`
    has them; that of captions, which may be absent, strings or lists of strings.

    Raises:
        UserError: no column has the name of a picture column.
        DataError: the table is damaged or empty, its pictures are not bytes, or the Hub has no such data set or split.
        EnvironmentProblem: the Hub cannot be reached.
    """
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _open_saved(path, name)
        parquet = files and all(file.suffix.lower() == ".parquet" for file in files)
        return _open_parquet(files, name) if parquet else None
    if name.lower().endswith(".parquet"):
        return _open_parquet(expand(name), name)
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?", name)
    if found and not path.exists() and path.suffix.lower() not in _LISTINGS:
        return _open_hub(found[1], found[2] or "train")
    return None


def _open_saved(path: Path, name: str) -> Table:
    if not (path / "state.json").is_file():
        splits = sorted(file.parent.name for file in path.glob("*/state.json"))
        what = f"{name} holds several splits: {', '.join(splits) or 'none'}"
        raise DataError(what, f"name the folder of one, as in {path / 'train'}")
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise _damaged(name, error) from error
    return Table(dataset, name, _columns(dataset.data.schema, name), [(printable(path.resolve().name), len(dataset))])


def _open_parquet(files: Sequence[Path], name: str) -> Table:
    files = [file.absolute() for file in files]
    folder = Path(os.path.commonpath([file.parent for file in files]))
    keys = [printable(file.relative_to(folder).as_posix()) for file in files]
    columns, counts = None, []
    for file, key in zip(files, keys, strict=True):
        with _reading(file, key) as parquet:
            found = _columns(parquet.schema_arrow, key)
            counts.append(parquet.metadata.num_rows)
        columns = columns or found
        if found != columns:
            what = f"{key} differs from {keys[0]}: {_described(found.schema())}; not {_described(columns.schema())}"
            raise DataError(what, "give files of one kind, or open them one by one")
    schema = columns.schema()
    states = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    identity = sha256(json.dumps([states, _described(schema)]).encode())
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "pictures" / f"{identity}.arrow"
    if not cached.exists():
        progress = tqdm(desc="copying tables", total=sum(counts), leave=False, disable=sum(counts) <= _SHOW_PROGRESS)
        with progress, replacing(cached) as target, pa.ipc.new_stream(target, schema) as stream:
            for file, key in zip(files, keys, strict=True):
                with _reading(file, key) as parquet:
                    for batch in parquet.iter_batches(_batch_rows(parquet), columns=schema.names, use_threads=False):
                        stream.write_batch(batch.select(schema.names).cast(schema))
                        progress.update(len(batch))
    try:
        dataset = datasets.Dataset.from_file(str(cached))
    except (pa.ArrowException, OSError) as error:
        what = f"{cached}, a copy in the cache, is damaged ({_line(error)})"
        raise DataError(what, "remove this copy and start again") from error
    return Table(dataset, name, columns, zip(keys, counts, strict=True))


@contextlib.contextmanager
def _reading(file: Path, key: str) -> Iterator[pq.ParquetFile]:
    if not file.is_file():  # a FIFO would wait for ever
        raise DataError(f"{key} is not a regular file", "give Parquet files")
    try:
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of what is written in the file
            raise
        raise _damaged(key, error) from error


def _batch_rows(parquet: pq.ParquetFile) -> int:
    groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
    size = sum(group.total_byte_size for group in groups)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * parquet.metadata.num_rows // max(1, size)))


def _damaged(name: str, error: Exception) -> DataError:
    return DataError(f"{name} is empty, damaged or of another format ({_line(error)})", "give the whole file anew")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _open_hub(name: str, split: str) -> Table:
    whole = f"{name}:{split}"
    with _reaching(name):
        builder = datasets.load_dataset_builder(name)
        splits = [str(one) for one in builder.config.data_files or builder.info.splits or ()]
    if split not in splits:
        hint = f"name one of them, as in {name}:{splits[0]}" if splits else "name another data set"
        raise DataError(f"{name} has no split {split}; it has: {', '.join(splits) or 'none'}", hint)
    with _reaching(name):
        builder.download_and_prepare()
        dataset = builder.as_dataset(split)
    home = [constants.HF_HUB_CACHE, str(datasets.config.HF_DATASETS_CACHE)]
    return Table(dataset, whole, _columns(dataset.data.schema, whole), [(whole, len(dataset))], home)


@contextlib.contextmanager
def _reaching(name: str) -> Iterator[None]:
    """Say in words what the Hub or the way to it has against a data set; what the disk has goes up as OSError."""
    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        what = f"there is no file or folder called {name}, nor a data set on the Hub that you may read"
        raise DataError(what, "check the name; for a private or gated data set run: hf auth login") from error
    except Exception as error:
        causes = list(_causes(error))
        if any(map(_unreached, causes)):
            reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else constants.ENDPOINT
            what = f"there is no file or folder called {name}, and the Hugging Face Hub cannot be reached ({reason})"
            raise EnvironmentProblem(what, "check the name and the network") from error
        for cause in causes:
            if isinstance(cause, OSError) and cause.errno is not None:
                raise cause from error
        what = f"the data set {name} cannot be loaded ({_line(causes[-1])})"
        raise DataError(what, "name another one, or a folder of its Parquet files") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _unreached(error: BaseException) -> bool:
    if isinstance(error, hub.HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, ConnectionError | httpx.TransportError | hub.LocalEntryNotFoundError)


def _columns(schema: pa.Schema, name: str) -> _Columns:
    """The columns of pictures and captions, and what only looks like one of captions.

    Of several columns with an understood name the first one of a usable type is taken, in the order of the lists.
    """
    pick_columns(schema.names, name)  # refuses a table without a picture's column, or with two of one name
    fields = {field.name.strip().lower(): field for field in schema}
    named = [fields[column] for column in PICTURE_COLUMNS if column in fields]
    picture = next((pa.field(field.name, field.type) for field in named if _holds_bytes(field.type)), None)
    if picture is None:
        what = f"{name} holds no pictures: {_described(named)}, which are no bytes of image files"
        raise DataError(what, "give pictures as bytes, or as the Image feature of datasets stores them")
    named = [fields[column] for column in CAPTION_COLUMNS if column in fields]
    caption = next((pa.field(field.name, _plain(field.type)) for field in named if _holds_text(field.type)), None)
    strays = [f"{_described([field])}: not a column of captions" for field in named if not _holds_text(field.type)]
    return _Columns(picture, caption, strays)


def _described(fields: Iterable[pa.Field]) -> str:
    return ", ".join(f"{printable(field.name)}: {field.type}" for field in fields)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return _is_bytes(kind)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _holds_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if _is_list(kind) else _plain(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _contents(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray | pa.Array]:
    """The bytes of some pictures, and the paths that stand beside them; null where there are none."""
    if not pa.types.is_struct(column.type):
        return column, pa.nulls(len(column))
    place = column.type.get_field_index("path")
    named = place >= 0 and _holds_text(column.type.field(place).type)
    return pc.struct_field(column, "bytes"), pc.struct_field(column, "path") if named else pa.nulls(len(column))


def _as_bytes(captions: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Strings, or lists of them, as bytes: a table may hold what is not UTF-8, and one such row must not end all."""
    return captions.cast(pa.list_(pa.large_binary()) if _is_list(captions.type) else pa.large_binary())


def _texts(written: bytes | list[bytes | None] | None) -> tuple[tuple[str, ...], str]:
    """The captions of one row, or why they cannot be read."""
    lines = written if isinstance(written, list) else [written]
    try:
        return tuple(line.decode() for line in lines if line is not None), ""
    except UnicodeDecodeError as error:
        return (), f"caption is not UTF-8 (byte {error.start})"
