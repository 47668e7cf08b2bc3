"""Pairs -> token files, once: pictures through the image tokenizer, captions kept as text.

The folder holds all that `dalle fit` needs and is the only thing it reads: train/, val/, the vocabulary text.json, a
copy of the image tokenizer in dvae/, and prepared.json, written last.
"""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from dalle.pairs import open_pairs
from dalle.text import Text
from dalle.tokens import Sizes, TokenFiles, TokenWriter
from dvae import artefact, files, seeds
from dvae.data import Source, check_names, check_outside, check_sides, split
from dvae.errors import ArtefactError, DataError, UserError, warn
from dvae.images import crop_near_centre
from dvae.loading import deaths_told, once
from dvae.tokenizer import KIND, ImageTokenizer, load

MANIFEST = "prepared.json"
FORMAT = 2
LONGEST = 256  # text ids of the paper
UNFINISHED = "unfinished"  # marks a folder as ours to clear, until it is whole
WORTH = 16  # batches that are worth the start of a loading process


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
    counts = Counter(lengths(text, map(pairs.captions, range(len(pairs)))))
    text = shortened(text, counts) if length is None else text
    files.write_bytes(out, text.to_json().encode())
    print(f"{describe(text, counts)}\nwrote {out}")


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
    workers: int | None = None,
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
        workers: processes that load pictures while others are encoded; 0 loads in the encoding process; null: one for
            each core but that one, and at most one for every 16 batches.
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
    if workers is not None and workers < 0:
        raise UserError(f"workers is {workers}", "0 loads in the process itself, 1 in another one beside it")
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
    counts = {}
    for part, pairs in (("train", train), ("val", held)):
        processes = spare(-(-len(pairs) // batch)) if workers is None else workers
        examples = Pairs(pairs, crops if part == "train" else 1)
        counts[part] = _encode(tokenizer, words, examples, folder / part, batch, processes)
        for name, reason in pairs.skipped():
            print(f"skipped {name}: {reason}")
        print(f"{part}: {pairs.listed} listed, {len(pairs)} used, {pairs.listed - len(pairs)} skipped")
    if text is None and length is None:
        words = shortened(words, counts["train"])
    print(describe(words, counts["train"]))
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
    """A vocabulary of at most `size` ids; without a `length`, of the longest one, to be `shortened`."""
    return Text.train(captions(pairs), size, LONGEST if length is None else length)


def shortened(text: Text, counts: Counter[int]) -> Text:
    """With the ids per caption that 99 % of the captions need, LONGEST at most; `counts`: captions by their ids."""
    last = math.ceil(0.99 * (counts.total() - 1))  # the place of the longest of them among all, sorted, from 0
    ids = sorted(counts)
    enough = ids[np.searchsorted(np.cumsum([counts[some] for some in ids]), last, side="right")]
    return Text(text.tokenizer, min(max(enough, 1), LONGEST))


def describe(text: Text, counts: Counter[int]) -> str:
    cut = sum(captions for ids, captions in counts.items() if ids > text.text_length)
    return (
        f"{counts.total()} captions, a vocabulary of {text.vocab_size} ids, {text.text_length} of them per caption; "
        f"the longest caption has {max(counts)}, {cut} will be cut"
    )


def captions(pairs: Source) -> Iterator[str]:
    """Every caption of every row, read one by one."""
    for index in range(len(pairs)):
        yield from pairs.captions(index)


def lengths(text: Text, rows: Iterable[Sequence[str]]) -> Iterator[int]:
    """The ids of every caption of some rows before it is cut."""
    for some in rows:
        yield from text.lengths(some).tolist()


def spare(batches: int) -> int:
    """Loading processes that so many batches are worth, beside the one that encodes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores - 1, batches // WORTH)


class Pairs(Dataset):
    """Batches of one source: pictures uint8 `(B, C, 3, size, size)` and the captions of each.

    Args:
        crops: 1: the central square of each picture, C = 1; more: so many random crops near its centre.
    """

    def __init__(self, source: Source, crops: int):
        self.source, self.crops = source, crops

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, rows: list[tuple[int, int]]) -> tuple[Tensor, list[tuple[str, ...]]]:
        indices = [index for _, index in rows]
        return self._images(indices), [self.source.captions(index) for index in indices]

    def _images(self, indices: Sequence[int]) -> Tensor:
        if self.crops == 1:
            return self.source.images(indices)[:, None]
        pictures = []
        for index in indices:
            image = self.source.image(index)
            rngs = (seeds.rng("crop", crop, index) for crop in range(self.crops))
            pictures.append(torch.stack([crop_near_centre(image, self.source.size, rng) for rng in rngs]))
        return torch.stack(pictures)


@deaths_told("often for want of memory: start again with fewer --workers (0: without any)")
@torch.inference_mode()
def _encode(
    tokenizer: ImageTokenizer, text: Text, pairs: Pairs, folder: Path, batch: int, workers: int
) -> Counter[int]:
    """Write the tokens and captions of all pairs; returns the number of captions by their ids before they are cut."""
    writer, counts = TokenWriter(folder, tokenizer.grid, tokenizer.vocab_size, pairs.crops), Counter()
    batches, total = once(pairs, batch, workers), -(-len(pairs) // batch)
    for crops, some in tqdm(batches, f"encoding {folder.name}", total, unit="batch", leave=False, disable=None):
        tokens = [tokenizer.encode(images.float() / 255) for images in crops.unbind(1)]
        writer.write(torch.stack(tokens, 1), some)
        counts.update(lengths(text, some))
    writer.close()
    return counts


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
