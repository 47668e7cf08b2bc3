"""Pairs -> token files, once: pictures through the image tokenizer, captions kept as text.

The folder holds all that `dalle fit` needs and is the only thing it reads: train/, val/, the vocabulary text.json, a
copy of the image tokenizer in dvae/, and prepared.json, written last.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from dalle.pairs import open_pairs
from dalle.text import Text
from dalle.tokens import Sizes, TokenFiles, TokenWriter
from dvae import artefact, files
from dvae.data import Source, split
from dvae.errors import ArtefactError, DataError, UserError
from dvae.model import DVAE, load

MANIFEST = "prepared.json"
UNFINISHED = "unfinished"  # marks a folder as ours to clear, until it is whole


def vocab(data: str, out: str, size: int = 16384, length: int = 256, max_bad: float = 0.01) -> None:
    """Learn a byte-level BPE vocabulary from the captions of a data source.

    Args:
        data: any data source: scenes, a folder, tars.
        out: the file to write, usually text.json.
        size: ids, the bytes included (256 at the least).
        length: text ids per caption; longer captions are cut.
        max_bad: share of rows without picture or caption up to which the work is done.
    """
    pairs = open_pairs(data, size=8, max_bad=max_bad)
    captions = [caption for index in range(len(pairs)) for caption in pairs.captions(index)]
    text = Text.train(captions, size, length)
    lengths = text.lengths(captions)
    files.write_bytes(out, text.to_json().encode())
    print(
        f"{len(captions)} captions, {text.vocab_size} ids; longest {int(lengths.max())} of {length} ids, "
        f"{int((lengths > length).sum())} will be cut\nwrote {out}"
    )


def prepare(
    data: str,
    dvae: str,
    text: str,
    out: str,
    val: str | None = None,
    val_share: float = 0.05,
    length: int | None = None,
    batch: int = 64,
    max_bad: float = 0.01,
) -> None:
    """Turn pictures and captions into token files for `dalle fit`.

    Args:
        data: any data source: scenes:train, a folder, tars.
        dvae: run folder or artefact folder of the image tokenizer.
        text: the vocabulary: a file that `dalle vocab` wrote, or any tokenizer.json.
        out: the folder to write; it must be empty, or what an interrupted call has left.
        val: another source to validate on; without it a share of `data` is set aside.
        val_share: that share, chosen by a digest of the rows' names.
        length: text ids per caption, where the vocabulary is a tokenizer.json that does not say.
        batch: pictures encoded at a time.
        max_bad: share of unusable rows up to which the work is done.
    """
    folder = Path(out)
    if folder.exists() and not (folder / UNFINISHED).exists() and any(folder.iterdir()):
        raise UserError(f"{out} is not empty", "choose another --out, or remove that folder")
    if batch < 1:
        raise UserError(f"batch is {batch}", "encode 1 picture or more at a time")
    words = Text.from_file(text, length)
    size = load(dvae).config.image_size
    train = open_pairs(data, size, max_bad)
    if val is None:
        train, held = split(train, val_share)
    else:
        held = open_pairs(val, size, max_bad)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    for part in ("train", "val", "dvae"):
        shutil.rmtree(folder / part, ignore_errors=True)  # what an interrupted call has left
    identity = artefact.copy(artefact.find(dvae, DVAE.kind), folder / "dvae")
    tokenizer = load(folder / "dvae")  # the copy, for a training that goes on replaces the other
    for part, pairs in (("train", train), ("val", held)):
        _encode(tokenizer, pairs, folder / part, batch)
        for name, reason in pairs.skipped:
            print(f"skipped {name}: {reason}")
        print(f"{part}: {pairs.listed} listed, {len(pairs)} used, {len(pairs.skipped)} skipped")
    captions = [caption for index in range(len(train)) for caption in train.captions(index)]
    cut = int((words.lengths(captions) > words.text_length).sum())
    if cut:
        print(f"{cut} of {len(captions)} captions are longer than {words.text_length} ids and will be cut")
    files.write_bytes(folder / "text.json", words.to_json().encode())
    sizes = Sizes(words.vocab_size, words.text_length, tokenizer.vocab_size, tokenizer.grid)
    digest = files.sha256_file(folder / "text.json")
    (folder / UNFINISHED).unlink()
    tokens = {part: files.sha256_file(folder / part / "tokens.json") for part in ("train", "val")}
    described = {"format": 1, "sizes": asdict(sizes), "dvae": identity, "text": digest, "tokens": tokens}
    files.write_json(folder / MANIFEST, described)
    print(f"wrote {out}")


@torch.inference_mode()
def _encode(tokenizer: DVAE, pairs: Source, folder: Path, batch: int) -> None:
    writer = TokenWriter(folder, tokenizer.grid, tokenizer.vocab_size)
    for first in tqdm(range(0, len(pairs), batch), desc=f"encoding {folder.name}", unit="batch", leave=False):
        rows = range(first, min(first + batch, len(pairs)))
        tokens = tokenizer.encode(pairs.images(rows).float() / 255)
        writer.write(tokens, [pairs.captions(index) for index in rows])
    writer.close()


class Prepared:
    """A finished folder of `prepare`, checked: both halves belong together and nothing has changed since.

    Raises:
        DataError: it is missing or unfinished.
        ArtefactError: its tokenizer or vocabulary is not the one that the tokens were made with.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / MANIFEST).read_text())
            self.sizes = Sizes(**{**about["sizes"], "grid": tuple(about["sizes"]["grid"])})
            identity, digest, tokens = about["dvae"], about["text"], dict(about["tokens"])
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
