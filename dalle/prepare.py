"""Pairs -> token files, once: pictures through the image tokenizer, captions kept as text.

The folder holds all that `dalle fit` needs and is the only thing it reads: train/, val/, the vocabulary text.json, a
copy of the image tokenizer in dvae/, and prepared.json, written last.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dalle.pairs import open_pairs
from dalle.text import Text
from dalle.tokens import Sizes, TokenFiles, TokenWriter
from dvae import artefact, files, seeds
from dvae.data import Source, check_names, check_outside, check_sides, split
from dvae.errors import ArtefactError, DataError, UserError, warn
from dvae.images import crop_near_centre
from dvae.tokenizer import KIND, ImageTokenizer, load

MANIFEST = "prepared.json"
FORMAT = 2
LONGEST = 256  # text ids of the paper
UNFINISHED = "unfinished"  # marks a folder as ours to clear, until it is whole


def vocab(
    data: str, out: str = "text.json", size: int = 16384, length: int | None = None, max_bad: float = 0.01
) -> None:
    """Learn a byte-level BPE vocabulary from the captions of a data source.

    Args:
        data: any data source: scenes:train, a folder, a listing, tars, Parquet files, a Hub data set.
        out: the file to write.
        size: ids, the 256 bytes included; there are fewer where the captions have no more to merge.
        length: text ids per caption, longer captions are cut; null: as many as 99 % of the captions need, at most 256.
        max_bad: share of rows without picture or caption up to which the work is done.
    """
    pairs = open_pairs(data, size=8, max_bad=max_bad)
    text = learn(pairs, size, length)
    files.write_bytes(out, text.to_json().encode())
    print(f"{describe(text, pairs)}\nwrote {out}")


def prepare(
    data: str,
    dvae: str = "",
    text: str | None = None,
    out: str = "tokens",
    val: str | None = None,
    val_share: float = 0.05,
    hold_out: str | None = None,
    size: int = 16384,
    length: int | None = None,
    crops: int = 1,
    batch: int = 64,
    max_bad: float = 0.01,
) -> None:
    """Turn pictures and captions into token files for `dalle fit`.

    Args:
        data: any data source: scenes:train, a folder, a listing, tars, Parquet files, a Hub data set.
        dvae: run folder or artefact folder of the image tokenizer.
        text: the vocabulary: a file that `dalle vocab` wrote, any tokenizer.json, or a run of stage 2, which carries
            its own; null: one is learned from the training captions, of `size` ids at most.
        out: the folder to write; it must be empty, or what an interrupted call has left.
        val: another source to validate on; without it a part of `data` is set aside.
        val_share: its share, chosen by a digest of the pictures' bytes.
        hold_out: a regular expression; the rows with a caption that it matches whole are set aside, instead.
        size: ids of a vocabulary that is learned here.
        length: text ids per caption, in place of what the vocabulary says or of what 99 % of the captions need.
        crops: 1 encodes the central square of each picture; more: that many random crops near the centre of each
            training picture (the paper's listing 2, never flipped), of which training takes one at a time. Small sets
            are overfitted later so.
        batch: pictures encoded at a time.
        max_bad: share of unusable rows up to which the work is done.
    """
    folder = Path(out)
    if folder.exists() and not (folder / UNFINISHED).exists() and any(folder.iterdir()):
        raise UserError(f"{out} is not empty", "choose another --out, or remove that folder")
    check_names(data, val, hold_out)
    check_outside(out, data, val)
    if not dvae:
        raise UserError("no image tokenizer is given", "name the run of stage 1: --dvae RUN")
    if batch < 1:
        raise UserError(f"batch is {batch}", "encode 1 picture or more at a time")
    if crops < 1:
        raise UserError(f"crops is {crops}", "encode 1 crop or more of each picture")
    words = None if text is None else vocabulary(text, length)
    pixels = load(dvae).config.image_size
    train = open_pairs(data, pixels, max_bad)
    if val is None:
        train, held = split(train, val_share, hold_out)
    else:
        held = open_pairs(val, pixels, max_bad)
    check_sides(train, held)
    first = train.captions(0)[0]
    if all(caption == first for caption in captions(train)):
        warn(f"all captions of {train.name} are the same: {first[:60]!r}", "words can teach nothing; give each its own")
    words = words or learn(train, size, length)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    for part in ("train", "val", "dvae"):
        shutil.rmtree(folder / part, ignore_errors=True)  # what an interrupted call has left
    identity = artefact.copy(artefact.find(dvae, KIND), folder / "dvae")
    tokenizer = load(folder / "dvae")  # the copy, for a training that goes on replaces the other
    for part, pairs in (("train", train), ("val", held)):
        _encode(tokenizer, pairs, folder / part, crops if part == "train" else 1, batch)
        for name, reason in pairs.skipped():
            print(f"skipped {name}: {reason}")
        print(f"{part}: {pairs.listed} listed, {len(pairs)} used, {pairs.listed - len(pairs)} skipped")
    print(describe(words, train))
    files.write_bytes(folder / "text.json", words.to_json().encode())
    sizes = Sizes(words.vocab_size, words.text_length, tokenizer.vocab_size, tokenizer.grid)
    digest = files.sha256_file(folder / "text.json")
    tokens = {part: files.sha256_file(folder / part / "tokens.json") for part in ("train", "val")}
    described = {"format": FORMAT, "sizes": asdict(sizes), "dvae": identity, "text": digest, "tokens": tokens}
    described["data"] = data
    described["split"] = {"val": val, "val_share": val_share, "hold_out": hold_out}
    files.write_json(folder / MANIFEST, described)
    (folder / UNFINISHED).unlink()
    print(f"wrote {out}")


def vocabulary(name: str, length: int | None) -> Text:
    """The vocabulary in a file, or the one that a trained transformer carries."""
    try:
        found = None if Path(name).is_file() else artefact.find(name, "dalle")
    except ArtefactError:
        found = None
    if found is None:
        return Text.from_file(name, length)
    return Text.from_json(artefact.load(found, "dalle").files["text"], length, f"the vocabulary of {name}")


def learn(pairs: Source, size: int, length: int | None) -> Text:
    """A vocabulary of at most `size` ids; without a `length`, of one that holds 99 % of the captions whole."""
    text = Text.train(captions(pairs), size, LONGEST if length is None else length)
    if length is not None:
        return text
    enough = int(np.quantile(lengths(text, pairs), 0.99, method="higher"))
    return Text(text.tokenizer, min(max(enough, 1), LONGEST))


def describe(text: Text, pairs: Source) -> str:
    each = lengths(text, pairs)
    return (
        f"{len(each)} captions, a vocabulary of {text.vocab_size} ids, {text.text_length} of them per caption; "
        f"the longest caption has {int(each.max())}, {int((each > text.text_length).sum())} will be cut"
    )


def lengths(text: Text, pairs: Source) -> np.ndarray:
    """int64: the ids of every caption before it is cut."""
    return np.concatenate([text.lengths(some) for some in batched(captions(pairs))])


def captions(pairs: Source) -> Iterator[str]:
    """Every caption of every row, read one by one."""
    for index in range(len(pairs)):
        yield from pairs.captions(index)


def batched(captions: Iterator[str], size: int = 10_000) -> Iterator[list[str]]:
    while some := list(itertools.islice(captions, size)):
        yield some


@torch.inference_mode()
def _encode(tokenizer: ImageTokenizer, pairs: Source, folder: Path, crops: int, batch: int) -> None:
    writer = TokenWriter(folder, tokenizer.grid, tokenizer.vocab_size, crops)
    firsts = range(0, len(pairs), batch)
    for first in tqdm(firsts, desc=f"encoding {folder.name}", unit="batch", leave=False, disable=None):
        rows = range(first, min(first + batch, len(pairs)))
        tokens = [tokenizer.encode(images.float() / 255) for images in _cropped(pairs, rows, crops).unbind(1)]
        writer.write(torch.stack(tokens, 1), [pairs.captions(index) for index in rows])
    writer.close()


def _cropped(pairs: Source, rows: range, crops: int) -> Tensor:
    """The crops of the pictures of some rows, uint8 `(B, C, 3, size, size)`: the central square where there is one."""
    if crops == 1:
        return pairs.images(rows)[:, None]
    pictures = []
    for row in rows:
        image = pairs.image(row)
        rngs = (seeds.rng("crop", crop, row) for crop in range(crops))
        pictures.append(torch.stack([crop_near_centre(image, pairs.size, rng) for rng in rngs]))
    return torch.stack(pictures)


class Prepared:
    """A finished folder of `prepare`, checked: both halves belong together and nothing has changed since.

    Raises:
        DataError: it is missing or unfinished.
        ArtefactError: its tokenizer or vocabulary is not the one that the tokens were made with, or one of these has
            other sizes than the folder says.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            if (self.folder / UNFINISHED).exists():
                raise FileNotFoundError("not finished")
            content = (self.folder / MANIFEST).read_bytes()
            about, self.digest = json.loads(content), files.sha256(content)
            if about["format"] != FORMAT:
                raise DataError(
                    f"{folder} was prepared by another version of this project (format {about['format']})",
                    "prepare it again",
                )
            self.sizes = Sizes(**{**about["sizes"], "grid": tuple(about["sizes"]["grid"])})
            identity, digest, tokens = about["dvae"], about["text"], dict(about["tokens"])
            self.split = dict(about["split"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} holds no prepared tokens", "make them with dalle prepare") from error
        self.dvae = self.folder / "dvae"
        if artefact.verify(self.dvae)["digest"] != identity:
            raise ArtefactError(
                f"the image tokenizer in {self.dvae} is not the one that made these tokens",
                "make the tokens again with dalle prepare",
            )
        self.text = Text.from_file(self.folder / "text.json")
        if files.sha256_file(self.folder / "text.json") != digest:
            raise ArtefactError(
                f"the vocabulary in {self.folder} is not the one that it was prepared with",
                "make the tokens again with dalle prepare",
            )
        self.train, self.val = TokenFiles(self.folder / "train"), TokenFiles(self.folder / "val")
        for part, expected in tokens.items():
            if files.sha256_file(self.folder / part / "tokens.json") != expected:
                raise ArtefactError(
                    f"the tokens in {self.folder / part} belong to another call of dalle prepare",
                    "make the tokens again with dalle prepare",
                )
        self._check_sizes()

    def _check_sizes(self) -> None:
        with torch.random.fork_rng(devices=[]):  # a tokenizer that is built draws numbers; those of a training stay
            tokenizer = load(self.dvae)
        places = [
            ("text.json", "vocab_text", self.text.vocab_size),
            ("text.json", "text_length", self.text.text_length),
        ]
        for place, held in (("dvae", tokenizer), ("train", self.train), ("val", self.val)):
            places += [(place, "vocab_image", held.vocab_size), (place, "grid", held.grid)]
        for place, name, found in places:
            said = getattr(self.sizes, name)
            if found != said:
                raise ArtefactError(
                    f"{name} is {said} in {self.folder / MANIFEST}, {found} in {self.folder / place}",
                    "make the tokens again with dalle prepare",
                )
