"""Captions -> ids -> captions, padding, and BPE dropout that can be repeated."""

import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dalle.text import Text, _merge
from dvae.errors import ArtefactError, DataError, UserError

WORDS = (
    "red blue green circle square triangle above below small large café naïve 日本語 картина 🙂 👩‍👩‍👧 it's 3.14 don't"
).split()
CORPUS = [f"a {a} {b} of the {c}" for a in WORDS for b in WORDS for c in WORDS[:6]]


def captions(number, seed=0):
    """Sentences of known and unknown words, marks and scripts."""
    rng = random.Random(seed)
    odd = [
        "zyzzyva",
        "ÅNGSTRÖM",
        "e\u0301te\u0301",
        "漢字かな交じり",
        "🏳️‍🌈",
        "\u200b",
        "x" * 40,
        "!?…",
        "A-B_c",
        "İstanbul",
        "\x00",
    ]
    return [" ".join(rng.choices(WORDS + odd, k=rng.randint(0, 12))) for _ in range(number)]


@pytest.fixture(scope="module")
def text():
    return Text.train(CORPUS, 330, 12)


@pytest.fixture(scope="module")
def long():
    return Text.train(CORPUS, 330, 400)


def byte_bpe(suffix=""):
    """A foreign vocabulary in the manner of GPT-2, or with the word ends of CLIP."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix) if suffix else models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=700,
            show_progress=False,
            initial_alphabet=alphabet,
            special_tokens=["<|endoftext|>"] + [letter + suffix for letter in sorted(alphabet) if suffix],
            **({"end_of_word_suffix": suffix} if suffix else {}),
        ),
    )
    return tokenizer


def test_padding_is_a_token_of_its_own_at_each_position(text):
    ids = text.encode(["a red circle", "", " \n\t "])
    assert ids.dtype == torch.int64 and ids.shape == (3, 12)
    n = int(text.lengths(["a red circle"]))
    assert 0 < n < 12
    assert (ids[0, :n] < text.vocab_size).all()
    assert ids[0, n:].tolist() == [text.vocab_size + p for p in range(n, 12)]
    assert text.null().shape == (1, 12) and text.null()[0].tolist() == [text.vocab_size + p for p in range(12)]
    assert torch.equal(ids[1:2], text.null()) and torch.equal(ids[2:3], text.null())
    assert text.ids == text.vocab_size + 12
    assert text.encode([]).shape == (0, 12)


def test_cleaning_makes_equal_what_reads_equal(text):
    plain = text.encode("a small café above")
    assert torch.equal(plain, text.encode("  A  SMALL\n cafe\u0301\tabove "))
    assert not torch.equal(plain, text.encode("a small cafe above"))
    first, later = text.encode("red circle"), text.encode("circle red")
    assert sorted(first[0].tolist()) == sorted(later[0].tolist())  # a word is the same wherever it stands


def test_decode_gives_the_cleaned_caption(long):
    for caption in captions(300):
        cleaned = long.tokenizer.normalizer.normalize_str(caption)
        ids = long.encode(caption)
        assert long.decode(ids) == long.decode(ids[0].tolist()) == cleaned.strip()


def test_long_captions_are_cut_at_a_token_and_can_be_counted(text):
    batch = captions(300)
    whole = Text(text.tokenizer, 1000).encode(batch)
    lengths = (whole < text.vocab_size).sum(1)
    assert torch.equal(text.lengths(batch), lengths)
    assert 20 < int((lengths > 12).sum()) < 300
    ids = text.encode(batch)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(ids[row, : min(length, 12)], whole[row, : min(length, 12)])
        assert (ids[row, length:] >= text.vocab_size).all()


def test_training_is_deterministic_in_any_order(text):
    shuffled = random.Random(1).sample(CORPUS, len(CORPUS))
    assert Text.train(CORPUS, 330, 12).to_json() == Text.train(iter(shuffled), 330, 12).to_json() == text.to_json()
    assert text.vocab_size == 330
    assert Text.train(["ab"], 330, 12).vocab_size < 260  # nothing more to merge


def test_json_and_pickle_hold_everything(text, tmp_path):
    batch = captions(100)
    (tmp_path / "text.json").write_text(text.to_json(), encoding="utf-8")
    copies = [Text.from_json(text.to_json()), Text.from_file(tmp_path / "text.json"), pickle.loads(pickle.dumps(text))]
    for copy in copies:
        assert torch.equal(copy.encode(batch), text.encode(batch)) and copy.to_json() == text.to_json()
    assert Text.from_file(tmp_path / "text.json", text_length=5).encode(batch).shape == (100, 5)


def test_foreign_tokenizer_json(tmp_path):
    tokenizer = byte_bpe()
    tokenizer.model.dropout = 0.5  # as saved by a careless hand; padding and truncation likewise
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="how long"):
        Text.from_file(tmp_path / "tokenizer.json")
    text, plain = Text.from_file(tmp_path / "tokenizer.json", text_length=30), byte_bpe()
    for caption in captions(50):
        expected = plain.encode(caption, add_special_tokens=False).ids[:30]
        assert text.encode(caption)[0].tolist() == expected + list(range(text.vocab_size + len(expected), text.ids))
    assert text.vocab_size == plain.get_vocab_size()
    assert json.loads(text.to_json())["tokenizer"]["model"]["dropout"] is None


@pytest.mark.parametrize("kind", ["own", "gpt2", "clip"])
def test_dropout_at_zero_is_the_library(kind, long):
    text = long if kind == "own" else Text(byte_bpe("</w>" if kind == "clip" else ""), 400)
    for caption in captions(300):
        ids = text._dropped(caption, 0.0, np.random.default_rng(0))
        assert ids == text.tokenizer.encode(caption, add_special_tokens=False).ids


def test_dropout_repeats_itself_and_breaks_words_into_more_pieces(long):
    batch = captions(60)
    lengths = []
    for p in (0, 0.1, 0.3, 0.6, 1):
        first, second = (long.encode(batch, p, np.random.default_rng(3)) for _ in range(2))
        assert torch.equal(first, second)
        assert [long.decode(ids) for ids in first] == [long.decode(ids) for ids in long.encode(batch)]
        lengths.append(int((first < long.vocab_size).sum()))
    assert lengths == sorted(lengths) and lengths[0] < lengths[1] < lengths[-1]
    single_bytes = sum(
        len(word)
        for c in batch
        for word, _ in long.tokenizer.pre_tokenizer.pre_tokenize_str(long.tokenizer.normalizer.normalize_str(c))
    )
    assert lengths[-1] == single_bytes
    other = long.encode(batch, 0.3, np.random.default_rng(4))
    assert not torch.equal(other, long.encode(batch, 0.3, np.random.default_rng(3)))


def test_dropout_has_the_right_chance():
    ranks, p, trials = {("a", "b"): 0, ("ab", "c"): 1}, 0.25, 20_000
    rng = np.random.default_rng(0)
    found = Counter(tuple(_merge(list("abc"), ranks, p, rng)) for _ in range(trials))
    expected = {("a", "b", "c"): p, ("ab", "c"): (1 - p) * p, ("abc",): (1 - p) ** 2}
    assert found.keys() == expected.keys()
    for parts, chance in expected.items():
        assert abs(found[parts] - trials * chance) < 5 * (trials * chance * (1 - chance)) ** 0.5


def test_dropout_is_refused_where_it_cannot_be_done(text):
    words = Tokenizer(models.WordLevel({"red": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign = Text(words, 4)
    assert foreign.encode("red moon").tolist() == [[0, 1, 4, 5]]
    with pytest.raises(UserError, match="byte-level BPE"):
        foreign.encode("red", 0.1, np.random.default_rng(0))
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="dropout"):
            text.encode("red", wrong, np.random.default_rng(0))


def test_mistakes_are_named(text, tmp_path):
    with pytest.raises(DataError, match="caption 1 is 7"):
        text.encode(["red", 7])
    with pytest.raises(DataError, match="caption 2 is None"):
        Text.train(["red", "blue", None], 300, 4)
    for size in (255, 0, 3.5):
        with pytest.raises(UserError, match="vocab_size"):
            Text.train(CORPUS, size, 4)
    for length in (0, -1, 2.5):
        with pytest.raises(UserError, match="text_length"):
            Text.train(["red"], 300, length)
    with pytest.raises(ArtefactError, match="no vocabulary"):
        Text.from_file(tmp_path / "missing.json")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ArtefactError):
        Text.from_file(tmp_path / "picture.png")


def test_a_damaged_file_is_an_artefact_error(text):
    content = text.to_json()
    damaged = ["", "null", "3", "[]", "{}", '{"tokenizer": 3, "text_length": 4}', '{"tokenizer": {}, "text_length": 4}']
    damaged += [content[:at] for at in range(0, len(content) - 3, len(content) // 40)]
    damaged += [content.replace('"BPE"', '"BPF"'), content.replace('"text_length": 12', '"text_length": "twelve"')]
    damaged += [content.replace('"text_length": 12,', "")]
    assert all(one != content for one in damaged)
    for one in damaged:
        with pytest.raises(ArtefactError):
            Text.from_json(one)


def test_half_an_emoji_does_not_stop_anything(text):
    broken = json.loads('"red \\ud83d circle"')
    assert torch.equal(text.encode(broken), text.encode("red ? circle"))
    assert Text.train([broken], 300, 4).vocab_size >= 256
