"""`dalle check` says what is true of a source, by known answers and brute force, and whether training would start."""

import io
import json
import os
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle import check as room
from dalle.check import PICTURES, REPORT, SKIPPED, Rows, check
from dalle.text import Text
from dvae.commands import call
from dvae.data import open_source
from dvae.drawings import Label, sheet
from dvae.errors import ArtefactError, DataError, UserError
from dvae.images import About, open_image, save, to_uint8
from dvae.tokenizer import load


def picture(seed: int, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def write(folder: Path, captions: dict[str, str | None]) -> Path:
    """A folder of pictures, all different, with these captions (None: no .txt)."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, caption) in enumerate(captions.items()):
        save(picture(seed), folder / f"{name}.png")
        if caption is not None:
            (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


def numbered(folder: Path, count: int, first: int = 0) -> Path:
    """`count` pairs that share nothing with those of another `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + count):
        save(picture(seed), folder / f"{seed:03d}.png")
        (folder / f"{seed:03d}.txt").write_text(f"picture number {seed}")
    return folder


@pytest.fixture
def checked(tmp_path, capsys):
    """Check `data`: (the report, what was printed, what was warned of); `problem` is the DataError that is expected."""

    def run(data, problem: str | None = None, **settings) -> tuple[dict, str, str]:
        settings = {"out": str(tmp_path / "check"), "size": 8, "threads": 1} | settings
        capsys.readouterr()
        if problem is None:
            check(str(data), **settings)
        else:
            with pytest.raises(DataError, match=problem) as caught:
                check(str(data), **settings)
            assert caught.value.code == 3
        seen = capsys.readouterr()
        return json.loads((Path(settings["out"]) / REPORT).read_text()), seen.out, seen.err

    return run


@pytest.fixture
def words(tmp_path) -> str:
    """A vocabulary of single bytes, 8 ids a caption: `abcdefg` has 8 ids, for a space comes before the first word."""
    path = tmp_path / "text.json"
    path.write_text(Text.train((), 256, 8).to_json())
    return str(path)


# ---- accounts


def test_D17_pictures_without_caption_and_captions_without_picture_are_named(tmp_path, checked):
    data = write(tmp_path / "data", {"a": "one", "b": None, "c": "three"})
    (data / "lonely.txt").write_text("no picture")
    report, out, _ = checked(data, max_bad=0.5)
    assert (report["listed"], report["pictures"], report["pairs"]) == (3, 3, 2)
    assert report["skipped"] == {"count": 1, "reasons": {"no caption": 1}, "first": [["b.png", "no caption"]]}
    assert len(report["strays"]) == 1 and report["strays"][0].startswith("lonely.txt")
    assert "3 listed = 3 used + 0 skipped" in out and "3 listed = 2 used + 1 skipped" in out
    assert "b.png: no caption" in out and "lonely.txt" in out


@pytest.mark.parametrize("blank", ["", " \n\t\n", "\x00\x01\x1b\n", "\ufeff"])
def test_D18_a_blank_caption_is_no_caption(tmp_path, checked, blank):
    data = write(tmp_path / "data", {"a": "one", "b": blank, "c": "three"})
    report, _, _ = checked(data, max_bad=0.5)
    assert report["skipped"]["first"] == [["b.png", "no caption"]] and report["pairs"] == 2


def test_every_skipped_item_is_in_the_file_and_the_first_ten_on_the_terminal(tmp_path, checked):
    data = numbered(tmp_path / "data", 4)
    for k in range(12):
        (data / f"broken{k:02d}.png").write_bytes(b"no picture")
    for k in range(2):
        (data / f"empty{k}.png").write_bytes(b"")
    save(picture(9), data / "silent.png")
    report, out, _ = checked(data, "15 of 19")
    assert report["skipped"]["count"] == 15 == report["listed"] - report["pairs"]
    assert report["listed"] - report["pictures"] == 14
    assert report["skipped"]["reasons"] == {"not an image": 12, "empty file": 2, "no caption": 1}
    lines = (tmp_path / "check" / SKIPPED).read_text().splitlines()
    expected = [f"broken{k:02d}.png: not an image" for k in range(12)]
    expected += ["empty0.png: empty file", "empty1.png: empty file", "silent.png: no caption"]
    assert lines == expected
    assert [line for line in expected if line in out] == expected[:10] and "all 15 in" in out


def test_reasons_are_counted_without_their_particulars(tmp_path, checked):
    data = numbered(tmp_path / "data", 4)
    for k in range(3):
        (data / f"00{k}.txt").write_bytes(b"x" * k + b"\xe9")
    report, _, _ = checked(data, max_bad=0.9, problem="1 rows cannot be split")
    assert report["skipped"]["reasons"] == {"caption is not UTF-8": 3}
    assert len({reason for _, reason in report["skipped"]["first"]}) == 3


def test_above_max_bad_all_is_said_and_written_before_it_is_refused(tmp_path, checked):
    data = numbered(tmp_path / "data", 9)
    (data / "broken.png").write_bytes(b"no picture")
    report, out, _ = checked(data, "1 of 10")
    assert out.splitlines()[-1] == report["verdict"] == "not ready: 1 of 10 cannot be used, more than max_bad 1 %"
    assert report["next"] is None and (tmp_path / "check" / PICTURES).exists()
    assert not any("smaller" in what for what, _ in report["warnings"])
    report, out, _ = checked(data, max_bad=0.1)
    assert report["verdict"].startswith("ready: 9 pairs") and out.splitlines()[-1] == f"next: {report['next']}"


# ---- sources of all sizes


def test_D32_an_empty_source_is_refused_in_words(tmp_path, checked):
    (tmp_path / "data").mkdir()
    report, out, _ = checked(tmp_path / "data", "0 usable of 0 listed")
    assert report["verdict"].startswith("not ready: ") and "0 usable of 0 listed" in out


def test_D32_nothing_usable_is_refused_in_words(tmp_path, checked):
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.png").write_bytes(b"no picture")
    report, _, _ = checked(tmp_path / "data", "0 usable of 2 listed", max_bad=1)
    assert (report["listed"], report["pictures"], report["skipped"]["count"]) == (2, 0, 2)


def test_D32_a_single_pair_cannot_be_split(tmp_path, checked):
    report, _, _ = checked(write(tmp_path / "data", {"a": "one"}), "cannot be split")
    assert report["pairs"] == 1 and report["verdict"].startswith("not ready: ")


def test_D32_two_pairs_are_ready_and_called_few(tmp_path, checked):
    report, _, _ = checked(write(tmp_path / "data", {"a": "one", "b": "two"}))
    assert report["split"] == [1, 1] and report["verdict"].startswith("ready: 2 pairs; so few teach")


def test_pictures_without_any_caption_are_ready_for_stage_1(tmp_path, checked):
    data = write(tmp_path / "data", dict.fromkeys("abc"))
    report, out, _ = checked(data)
    assert (report["pictures"], report["pairs"], report["skipped"]["count"]) == (3, 0, 0)
    assert report["verdict"].startswith("ready for stage 1") and "captions" not in report
    assert "no picture has a caption" in out and (tmp_path / "check" / PICTURES).exists()


def test_scenes_can_be_checked(checked):
    report, _, _ = checked("scenes:train:50", size=32)
    assert (report["listed"], report["pictures"], report["pairs"]) == (50, 50, 50)
    assert report["sizes"]["shapes"]["square"] == 50 and report["captions"]["letters"] == {"Latin": 50}


# ---- captions


def test_D19_captions_longer_than_the_text_are_counted_and_what_they_lose_is_shown(tmp_path, checked, words):
    data = write(tmp_path / "data", {"a": "ABCDEF", "b": "ABCDEFG", "c": "ABCDEFGH", "d": "one two three\nno"})
    report, out, err = checked(data, text=words)
    captions = report["captions"]
    assert captions["ids"] == {"median": 8, "most": 14, "key": "d.png"}
    assert (captions["count"], captions["limit"], captions["over"]) == (5, 8, 2)
    assert captions["cut"] == [
        {"key": "c.png", "kept": "abcdefg", "lost": "h"},
        {"key": "d.png", "kept": "one two", "lost": "three"},
    ]
    assert captions["padding"] == pytest.approx(1 - (7 + 8 + 8 + 8 + 3) / 40)
    assert [e["caption"] for e in report["examples"]] == ["abcdef", "abcdefg", "abcdefg", "one two [1 of 2 captions]"]
    assert "c.png: abcdefg [cut here] h" in out and "2 are longer than 8 ids and will be cut" in out
    assert "2 of 5 captions will be cut\nhint: dalle vocab with --length 14 would keep 99 %" in err
    assert checked(data, text=words, length=14)[0]["captions"]["over"] == 0


def test_D19_a_caption_of_a_megabyte_is_measured_and_shown_in_part(tmp_path, checked, words):
    data = write(tmp_path / "data", {"a": "word " * 200_000, "b": "two"})
    report, out, _ = checked(data, text=words)
    assert report["captions"]["words"]["most"] == 200_000 and report["captions"]["over"] == 1
    assert len((tmp_path / "check" / REPORT).read_bytes()) < 20_000 and len(out) < 20_000


def test_lengths_without_a_vocabulary(tmp_path, checked):
    data = write(tmp_path / "data", {"a": "Two  Words", "b": "\u00e9t\u00e9", "c": "x" * 300, "d": "y" * 255})
    captions = checked(data)[0]["captions"]
    assert captions["words"] == {"median": 1, "most": 2, "key": "a.png"}
    assert captions["bytes"] == {"median": (9 + 255) / 2, "most": 300, "key": "c.png"}
    assert "ids" not in captions and (captions["limit"], captions["over"]) == (256, 1)
    (data / "d.txt").write_text("y" * 256)  # and a space before the first word, 257 ids where no word is known
    assert checked(data)[0]["captions"]["over"] == 2 and checked(data, length=8)[0]["captions"]["over"] == 3


def test_captions_are_distinct_only_where_the_model_sees_a_difference(tmp_path, checked):
    data = write(tmp_path / "data", {"a": "A dog", "b": "a  DOG", "c": "a cat\na dog", "d": "cafe\u0301\ncaf\u00e9"})
    captions = checked(data)[0]["captions"]
    assert (captions["count"], captions["distinct"]) == (6, 3)


def test_captions_that_are_all_the_same_are_warned_of(tmp_path, checked):
    data = write(tmp_path / "data", dict.fromkeys("abc", "a picture"))
    assert "warning: all 3 captions are the same\nhint: " in checked(data)[2]
    (data / "a.txt").write_text("another")
    assert "the same" not in checked(data)[2]


def test_D20_scripts_and_odd_characters_are_counted_by_caption(tmp_path, checked):
    texts = {
        "a": "Red, 12 \u0437\u0435\u043b\u0451\u043d\u044b\u0439",
        "b": "\u7ea2 \u30ab\u30bf\u30ab\u30ca \uff76 \uff41",
        "c": "\u0639\u0631\u0628\u064a \u05e2\u05d1",
        "d": "\U0001f600 \U0001f468\u200d\U0001f469",
        "e": "a\u202eb\u2066c",
        "f": "in\u200bvisible \ue000 \ufffd",
        "g": "12 34",
    }
    letters = checked(write(tmp_path / "data", texts))[0]["captions"]["letters"]
    assert letters == {
        "Latin": 4, "Cyrillic": 1, "Han": 1, "Katakana": 1, "Arabic": 1, "Hebrew": 1, "emoji and symbols": 1,
        "right-to-left letters": 1, "bidirectional controls": 1, "invisible characters": 1,
        "private or unassigned characters": 1, "replacement characters (a wrong encoding)": 1,
    }  # fmt: skip


def test_a_vocabulary_of_other_scripts_is_warned_of(tmp_path, checked, words):
    data = write(tmp_path / "data", {"a": "\u043a\u043e\u0442", "b": "\u00e9", "c": "cat", "d": "dog"})
    report, _, err = checked(data, text=words)
    assert report["captions"]["foreign"] == 2 and "take more than one id a character" in err
    (data / "a.txt").write_text("cow")
    (data / "b.txt").write_text("e")
    assert "id a character" not in checked(data, text=words)[2]


# ---- pictures


def test_sizes_shapes_and_modes(tmp_path, checked):
    shapes = {"a": (8, 8), "b": (6, 8), "c": (20, 10), "d": (4, 40), "e": (100, 100)}
    for seed, (name, (height, width)) in enumerate(shapes.items()):
        save(picture(seed, height, width), tmp_path / "data" / f"{name}.png")
    sizes = checked(tmp_path / "data", size=8)[0]["sizes"]
    assert sizes["smallest"] == {"key": "d.png", "width": 40, "height": 4, "area_lost": 0.9} == sizes["longest"]
    assert sizes["largest"] == {"key": "e.png", "width": 100, "height": 100, "area_lost": 0}
    assert (sizes["median"], sizes["enlarged"], sizes["area_lost"]) == (8, 2, 0.25)
    assert sizes["shorter_side_from"] == {"4": 2, "8": 2, "64": 1}
    assert sizes["shapes"] == {"square": 2, "up to 4:3": 1, "up to 3:2": 0, "up to 2:1": 1, "up to 4:1": 0, "longer": 1}
    assert (sizes["formats"], sizes["modes"], sizes["notes"]) == ({"PNG": 5}, {"RGB": 5}, {})


def test_a_size_above_that_of_most_pictures_is_warned_of(tmp_path, checked):
    data = numbered(tmp_path / "data", 3)
    assert "most pictures are smaller than 9 x 9" in checked(data, size=9)[2] and checked(data, size=8)[2] == ""


def test_captions_that_are_missing_leave_stage_1(tmp_path, checked):
    report, _, _ = checked(write(tmp_path / "data", {"a": "one", "b": "two", "c": None}), "1 of 3")
    assert report["verdict"].endswith("more than max_bad 1 %; stage 1 alone could train on 3 pictures")


def test_what_was_done_to_pictures_is_counted(tmp_path, checked):
    from PIL import Image

    data = write(tmp_path / "data", dict.fromkeys("abc"))
    Image.new("RGBA", (8, 8), (255, 0, 0, 100)).save(data / "d.png")
    Image.new("L", (8, 8), 7).save(data / "e.jpg")
    sizes = checked(data)[0]["sizes"]
    assert sizes["formats"] == {"PNG": 4, "JPEG": 1} and sizes["modes"] == {"RGB": 3, "RGBA": 1, "L": 1}
    assert sizes["notes"] == {"transparency composited on white": 1}


def test_D24_equal_pictures_are_found_as_by_brute_force(tmp_path, checked):
    rng, rows = np.random.default_rng(5), []
    (tmp_path / "data").mkdir()
    for k in range(40):
        seed = int(rng.integers(25))  # of the pictures with an even one all copies have one caption
        caption = f"caption {rng.integers(2) if seed % 2 else seed}"
        rows.append((f"{k:02d}.png", seed, caption))
        save(picture(seed), tmp_path / "data" / f"{k:02d}.png")
        (tmp_path / "data" / f"{k:02d}.txt").write_text(caption)
    groups: dict[int, list] = {}
    for key, seed, caption in rows:
        groups.setdefault(seed, []).append((key, caption))
    several = [group for group in groups.values() if len(group) > 1]
    found = checked(tmp_path / "data")[0]["duplicates"]
    assert found["groups"] == len(several) > 5 and found["pictures"] == sum(map(len, several))
    assert found["differently_captioned"] == sum(len({caption for _, caption in g}) > 1 for g in several) > 0
    assert found["examples"] == [[key for key, _ in group][:5] for group in several[:5]]


def test_D24_pictures_on_both_sides_are_counted(tmp_path, checked):
    data, val = numbered(tmp_path / "data", 6), numbered(tmp_path / "val", 4, first=4)
    report, _, err = checked(data, val=str(val))
    assert report["validation"]["shared"] == 2 and report["split"] == [6, 4]
    assert "2 of 4 validation pictures are in the training data too" in err
    report, _, err = checked(data, val=str(numbered(tmp_path / "other", 4, first=6)))
    assert report["validation"]["shared"] == 0 and "warning" not in err


# ---- validation


def test_D33_train_and_val_must_differ(tmp_path, checked):
    data = numbered(tmp_path / "data", 3)
    for val in (str(data), f"{data}/", f"{data}/../data"):
        with pytest.raises(UserError, match="training and validation are both") as caught:
            check(str(data), val=val, out=str(tmp_path / "check"))
        assert caught.value.code == 2 and not (tmp_path / "check").exists()


def test_D33_a_val_without_pictures_is_refused_by_its_name(tmp_path, checked):
    (tmp_path / "val").mkdir()
    report, _, _ = checked(numbered(tmp_path / "data", 3), f"{tmp_path}/val: 0 usable of 0", val=str(tmp_path / "val"))
    assert report["pairs"] == 3 and report["verdict"].startswith("not ready: ")


def test_D33_a_val_without_captions_cannot_validate_pairs(tmp_path, checked):
    data, val = numbered(tmp_path / "data", 3, first=5), write(tmp_path / "val", dict.fromkeys("ab"))
    report, _, _ = checked(data, "0 usable of 2 listed, e.g. a.png: no caption", val=str(val))
    assert report["validation"]["skipped"]["reasons"] == {"no caption": 2}


def test_D33_a_missing_source_leaves_nothing_behind(tmp_path, checked):
    with pytest.raises(DataError, match="no such data source"):
        check(str(tmp_path / "missing"), out=str(tmp_path / "check"))
    assert list(tmp_path.iterdir()) == []
    data, out = numbered(tmp_path / "data", 3), str(tmp_path / "check")
    with pytest.raises(DataError, match="no such data source"):
        check(str(data), val=str(tmp_path / "missing"), out=out)
    assert list(tmp_path.iterdir()) == [data]
    checked(data)
    with pytest.raises(DataError, match="no such data source"):
        check(str(tmp_path / "missing"), out=out)
    checked(data)


def test_more_validation_than_training_is_warned_of(tmp_path, checked):
    few, many = numbered(tmp_path / "few", 2), numbered(tmp_path / "many", 3, first=2)
    assert "more to validate on (3) than to train on (2)" in checked(few, val=str(many))[2]
    for equal_or_less in (few, numbered(tmp_path / "equal", 3, first=5)):
        assert "more to validate on" not in checked(many, val=str(equal_or_less))[2]


# ---- what is written


def test_the_pictures_are_those_that_the_model_will_see(tmp_path, checked, tiny_dvae):
    data = tmp_path / "data"
    for k in range(3):
        save(picture(k, 32, 32), data / f"{k}.png")
        (data / f"{k}.txt").write_text(f"Number  {k}")
    model = load(tiny_dvae)
    checked(data, dvae=str(tiny_dvae), size=64)
    rows = []
    for k in range(3):
        decoded = model.decode(model.encode(picture(k, 32, 32)[None].float() / 255))
        labels = [Label("as it will be seen"), Label("after stage 1")]
        rows.append((f"number {k}", torch.stack([picture(k, 32, 32), to_uint8(decoded)[0]]), labels))
    assert torch.equal(open_image(tmp_path / "check" / PICTURES), sheet(rows, side=128, title=str(data)))


def test_five_of_many_are_drawn_and_always_the_same(tmp_path, checked):
    data = numbered(tmp_path / "data", 20)
    first, out, _ = checked(data)
    assert len(first["examples"]) == 5 == len({example["key"] for example in first["examples"]})
    assert all(f"{example['key']}: {example['caption']}" in out for example in first["examples"])
    picture_file = (tmp_path / "check" / PICTURES).read_bytes()
    again, _, _ = checked(data, threads=3)
    assert again == first and (tmp_path / "check" / PICTURES).read_bytes() == picture_file


def test_a_source_that_has_changed_is_looked_at_anew(tmp_path, checked):
    data = numbered(tmp_path / "data", 3)
    assert checked(data)[0]["pairs"] == 3
    numbered(data, 2, first=3)
    (data / "000.png").write_bytes(b"no picture")
    report, _, _ = checked(data, max_bad=0.5)
    assert (report["listed"], report["pairs"]) == (5, 4)


def test_a_folder_of_others_is_never_written_to(tmp_path, checked):
    data, out = numbered(tmp_path / "data", 3), tmp_path / "out"
    for name, content in (("notes.txt", "mine"), (REPORT, "{}"), (REPORT, '{"kind": "another"}'), (REPORT, "[1")):
        out.mkdir(exist_ok=True)
        (out / name).write_text(content)
        with pytest.raises(UserError, match="something other than a check"):
            check(str(data), out=str(out))
        assert {path.name: path.read_text() for path in out.iterdir()} == {name: content}
        (out / name).unlink()
    checked(data, out=str(out))


def test_the_pictures_do_not_become_data(tmp_path):
    data = numbered(tmp_path / "data", 3)
    for out in (data, data / "check", tmp_path / "x" / ".." / "data" / "y"):
        with pytest.raises(UserError, match="lies inside"):
            check(str(data), out=str(out))
    assert len(list(data.iterdir())) == 6


def test_an_interrupted_check_does_not_look_finished_and_is_done_again(tmp_path, checked, monkeypatch):
    data = numbered(tmp_path / "data", 3)
    checked(data)
    with monkeypatch.context() as patched:
        patched.setattr(room, "_draw", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            check(str(data), out=str(tmp_path / "check"))
    assert json.loads((tmp_path / "check" / REPORT).read_text())["verdict"] == "unfinished"
    assert not (tmp_path / "check" / PICTURES).exists()
    assert checked(data)[0]["pairs"] == 3


def test_D25_a_folder_whose_name_is_no_text(tmp_path, checked):
    data = numbered(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \n")), 3)
    report, out, _ = checked(data)
    assert report["pairs"] == 3 and report["source"] == f"{tmp_path}/caf\\udce9 \\n"
    assert all(character.isprintable() or character == "\n" for character in out)


def test_nothing_that_moves_the_cursor_or_turns_the_line_is_printed(tmp_path, checked):
    data = write(tmp_path / "data", {"a": "x\x1b[31mred\x07\u202eback\u2066\u200b \U0001f600", "b": "\x9b2Jclear"})
    (data / "c\x1b[2J.png").write_bytes(b"no picture")
    report, out, err = checked(data, max_bad=0.5)
    assert report["pairs"] == 2 and "red" in out
    assert all(character.isprintable() or character == "\n" for character in out + err)


def test_a_terminal_that_knows_only_ascii_is_enough(tmp_path, monkeypatch):
    data = write(tmp_path / "data", {"a": "\u043a\u043e\u0442", "b": "\U0001f600"})
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    check(str(data), size=8, out=str(tmp_path / "check"))
    terminal.flush()
    assert b"\\u043a\\u043e\\u0442" in terminal.buffer.getvalue()


def test_the_next_command_takes_what_was_examined(tmp_path, checked, words, tiny_dvae):
    data, run, out = numbered(tmp_path / "data", 3), str(tiny_dvae), tmp_path / "my check"
    fit, rest = f"dvae fit --config dvae/emoji --data.source '{out}'", "--data.hold_out null --run runs/my-dvae"
    small = "--model.config.image_size 8 "
    assert checked(data, out=str(out))[0]["next"] == f"{fit} {small}{rest}"
    prepare = f"dalle prepare '{out}' --dvae {run}"
    assert checked(data, out=str(out), dvae=run)[0]["next"] == f"{prepare} --out runs/my-tokens"
    said = checked(data, out=str(out), dvae=run, text=words)[0]["next"]
    assert said == f"{prepare} --text {words} --out runs/my-tokens"
    val = str(numbered(tmp_path / "val", 3, first=3))
    assert checked(data, out=str(out), val=val)[0]["next"] == f"{fit} --data.val '{out}/val' {small}{rest}"
    assert open_source(str(out), 8).listed == open_source(str(out / "val"), 8).listed == 3
    assert "--data.source scenes:train:5 " in checked("scenes:train:5", size=32)[0]["next"], "nothing was kept of them"
    (data / "00.png").write_bytes(b"no picture")
    said = checked(data, out=str(out), max_bad=0.5, size=64)[0]["next"]
    assert said == f"{fit} --data.max_bad 0.5 {rest}"
    said = checked(data, out=str(out), max_bad=0.5, dvae=run)[0]["next"]
    assert said == f"{prepare} --max_bad 0.5 --out runs/my-tokens"


def test_the_command_line_takes_it(tmp_path, capsys):
    data, out = numbered(tmp_path / "data", 3), tmp_path / "check"
    call("dalle check", check, [str(data), "--size", "8", "--out", str(out), "--max_bad", "0.5"])
    assert json.loads((out / REPORT).read_text())["size"] == 8 and "ready: 3 pairs" in capsys.readouterr().out
    for wrong in (["--size", "0"], ["--threads", "-1"], ["--max_bad", "much"]):
        with pytest.raises(UserError, match=wrong[0].strip("-")):
            call("dalle check", check, [str(data), *wrong])


def test_a_wrong_vocabulary_is_said_before_any_work(tmp_path):
    data = numbered(tmp_path / "data", 3)
    with pytest.raises(ArtefactError, match="there is no vocabulary"):
        check(str(data), text=str(tmp_path / "none.json"), out=str(tmp_path / "check"))
    assert not (tmp_path / "check").exists()


class Many:
    """The face of a source with many rows, none of which is held."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def digest(self, index: int) -> str:
        return f"{index:064x}"

    def about(self, index: int) -> About:
        return About(64, 48, "RGB", "JPEG", ("colour profile ignored",))

    def captions(self, index: int) -> tuple[str, ...]:
        return (f"caption number {index}",)


def test_memory_hardly_grows_with_the_source():
    def held(count: int) -> int:
        tracemalloc.start()
        rows = Rows(Many(count), None)
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert rows.pairs == count and rows.formats == Counter(JPEG=count)
        return size

    held(10)  # what is loaded only once
    assert held(15_000) - held(5_000) < 60 * 10_000


# ---- real pictures


def test_real_data_is_ready(real_data, checked):
    report, out, err = checked(real_data, size=64, threads=2)
    assert report["pairs"] > 0 and report["listed"] == report["pairs"] + report["skipped"]["count"]
    assert report["verdict"].startswith("ready: ") and sum(report["split"]) == report["pairs"]
    assert len(report["examples"]) == 5 and out.splitlines()[-1].startswith("next: dvae fit")
