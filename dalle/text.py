"""Captions <-> ids.

A caption is cleaned (lowercase, NFC, single spaces), cut into byte-level BPE tokens, and padded to a fixed length. The
pad at position p is the id `vocab_size + p`: a token of its own for each position (section 2.2). Any Hugging Face
`tokenizer.json` can take the place of a vocabulary trained here; its special tokens are never added, for the sequence
has its own start. This file knows nothing of images, nor of what a model does with the ids.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from dvae.errors import ArtefactError, DataError, UserError

_BYTES = 256


class Text:
    """A vocabulary and a length.

    Args:
        tokenizer: any `tokenizers.Tokenizer`; its own padding, truncation and dropout are switched off.
        text_length: ids per caption, pads counted (T).
    """

    def __init__(self, tokenizer: Tokenizer, text_length: int):
        if not isinstance(text_length, int) or text_length < 1:
            raise UserError(f"text_length is {text_length!r}", "give a whole number from 1 on, such as 32")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if isinstance(tokenizer.model, models.BPE):
            tokenizer.model.dropout = None  # the library's cannot be seeded, and it is saved with the vocabulary
        self.tokenizer, self.text_length = tokenizer, text_length
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, text_length: int) -> "Text":
        """Learn a byte-level BPE; the same captions in any order give the same vocabulary.

        The vocabulary comes out smaller than `vocab_size` (from 256 on, the single bytes) if the captions have no more
        to merge. Anything can be encoded afterwards, whatever was seen here.
        """
        if not isinstance(vocab_size, int) or vocab_size < _BYTES:
            raise UserError(f"vocab_size is {vocab_size!r}", f"give at least {_BYTES}, one id for each byte")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.Lowercase(),
                normalizers.NFC(),
                normalizers.Replace(Regex(r"\s+"), " "),
                normalizers.Strip(),
            ]
        )
        # the space belongs to the word after it; one before the first word gives a word one id wherever it stands
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        tokenizer.train_from_iterator((_checked(caption, i) for i, caption in enumerate(captions)), trainer)
        return cls(tokenizer, text_length)

    @classmethod
    def from_file(cls, path: str | Path, text_length: int | None = None) -> "Text":
        """Read what `to_json` wrote, or a Hugging Face `tokenizer.json`, which needs a `text_length`.

        A `text_length` that is given is taken in place of the file's.
        """
        try:
            content = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ArtefactError(f"there is no vocabulary at {path}", "train one with `dalle vocab`") from None
        except UnicodeDecodeError:
            raise ArtefactError(f"{path} is not a text file", "give a text.json or a tokenizer.json") from None
        return cls.from_json(content, text_length, name=str(path))

    @classmethod
    def from_json(cls, content: str, text_length: int | None = None, name: str = "the vocabulary") -> "Text":
        """As `from_file`, from the file's content; `name` is what errors call it."""
        try:
            described = json.loads(content)
            if "tokenizer" in described:  # ours; Hugging Face's has no such key
                text_length = int(described["text_length"]) if text_length is None else text_length
                described = described["tokenizer"]
            tokenizer = Tokenizer.from_str(json.dumps(described))
        except Exception as error:  # the library raises plain Exception
            raise ArtefactError(
                f"{name} cannot be read as a vocabulary ({error})",
                "give a text.json of `dalle vocab` or a Hugging Face tokenizer.json, whole",
            ) from None
        if text_length is None:
            raise UserError(f"{name} does not say how long a caption is", "give text_length, such as 32")
        return cls(tokenizer, text_length)

    def to_json(self) -> str:
        """All there is to know, as text; equal vocabularies give equal text."""
        described = {"text_length": self.text_length, "tokenizer": json.loads(self.tokenizer.to_str())}
        return json.dumps(described, indent=1, ensure_ascii=False) + "\n"

    @property
    def ids(self) -> int:
        """All ids: those of the vocabulary, then one pad for each position."""
        return self.vocab_size + self.text_length

    def null(self) -> Tensor:
        """int64 (1, T): the empty caption, all pads; the null prompt of guidance."""
        return torch.arange(self.vocab_size, self.ids)[None]

    def encode(
        self, caption: str | Sequence[str], dropout: float = 0, generator: np.random.Generator | None = None
    ) -> Tensor:
        """int64 (B, T), pads placed; one caption is a batch of one, and an empty caption is the null prompt.

        A caption that is too long is cut after its T-th token; `lengths` tells which are.

        Args:
            dropout: chance of leaving out a merge, each time that it could be made (BPE dropout; the paper trains with
                0.1). A word then falls into other pieces each time. Added tokens of a foreign vocabulary are read as
                plain text.
            generator: where that chance comes from; needed if dropout > 0.
        """
        captions = [caption] if isinstance(caption, str) else caption
        if not 0 <= dropout <= 1:
            raise UserError(f"BPE dropout is {dropout}", "give a chance from 0 to 1, such as 0.1")
        ids = self.null().repeat(len(captions), 1)
        for i, one in enumerate(captions):
            one = _checked(one, i)
            pieces = self._dropped(one, dropout, generator) if dropout else self._ids(one)
            pieces = pieces[: self.text_length]
            ids[i, : len(pieces)] = torch.tensor(pieces, dtype=torch.int64)
        return ids

    def clean(self, caption: str) -> str:
        """A caption as it is read: for vocabularies of this project lowercase, with single spaces."""
        normalizer = self.tokenizer.normalizer
        return _checked(caption, 0) if normalizer is None else normalizer.normalize_str(_checked(caption, 0))

    def lengths(self, captions: Sequence[str]) -> Tensor:
        """int64 (B,): tokens of each caption before it is cut; those above `text_length` are cut by `encode`."""
        return torch.tensor([len(self._ids(_checked(one, i))) for i, one in enumerate(captions)], dtype=torch.int64)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The cleaned caption of T ids, (T,) or (1, T); pads are dropped."""
        ids = torch.as_tensor(ids).flatten().tolist()
        return self.tokenizer.decode([i for i in ids if i < self.vocab_size], skip_special_tokens=False).strip()

    def _ids(self, caption: str) -> list[int]:
        return self.tokenizer.encode(caption, add_special_tokens=False).ids

    def _dropped(self, caption: str, dropout: float, generator: np.random.Generator | None) -> list[int]:
        """Ids of a caption under BPE dropout: at least the first T of them."""
        assert generator is not None, "BPE dropout needs a generator"
        ids, (ranks, vocab, suffix) = [], self._merges
        if self.tokenizer.normalizer is not None:
            caption = self.tokenizer.normalizer.normalize_str(caption)
        for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(caption):
            ids += (vocab[part] for part in _merge([*word[:-1], word[-1] + suffix], ranks, dropout, generator))
            if len(ids) >= self.text_length:
                break
        return ids

    @functools.cached_property
    def _merges(self) -> tuple[dict[tuple[str, str], int], dict[str, int], str]:
        """Rank of each merge, the lower the earlier; id of each token; what marks the end of a word."""
        model = json.loads(self.tokenizer.to_str())["model"]
        suffix = model.get("end_of_word_suffix") or ""
        if (
            model["type"] != "BPE"
            or model["continuing_subword_prefix"]
            or model["ignore_merges"]
            or self.tokenizer.pre_tokenizer is None
            or not all({byte, byte + suffix} <= model["vocab"].keys() for byte in pre_tokenizers.ByteLevel.alphabet())
        ):
            raise UserError(
                "BPE dropout needs a vocabulary of byte-level BPE, and this is of another kind",
                "set the dropout to 0, or train a vocabulary with `dalle vocab`",
            )
        return {tuple(pair): rank for rank, pair in enumerate(model["merges"])}, model["vocab"], suffix


def _checked(caption: str, index: int) -> str:
    if not isinstance(caption, str):
        raise DataError(f"caption {index} is {caption!r}, not text", "give captions as strings; an empty one is fine")
    return caption.encode("utf-8", "replace").decode()  # half an emoji, as broken JSON may bring, becomes "?"


def _merge(
    parts: list[str], ranks: dict[tuple[str, str], int], dropout: float, generator: np.random.Generator
) -> list[str]:
    """Merge the characters of a word as BPE does, but pass over each possible merge with chance `dropout` at each step
    (Provilkov et al., 2020). At 0 it is BPE."""
    while len(parts) > 1:
        kept = generator.random(len(parts) - 1) >= dropout
        pairs = zip(parts, parts[1:], strict=False)
        possible = [(ranks[pair], at) for at, pair in enumerate(pairs) if pair in ranks and kept[at]]
        if not possible:
            break
        _, at = min(possible)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
