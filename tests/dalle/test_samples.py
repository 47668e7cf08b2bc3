"""What `dalle sample` leaves in a folder: whole, true, and never over anything that was there."""

import json
from pathlib import Path

import pytest
import torch

from dalle.pipeline import load
from dalle.samples import free_stem, read_prompts, sample
from dvae import artefact
from dvae.errors import EnvironmentProblem, UserError
from dvae.images import open_image

DRAWN = {"temperature": 0.9, "top_k": 12, "top_p": None, "guidance": 1.5}
SETTINGS = DRAWN | {"rerank": "pmi", "prune": False, "exact": False}
HOSTILE = [
    "../../etc/passwd", "/etc/passwd", "..", ".", ".hidden", "a/b\\c", "nul\x00byte", "x" * 300, "\U0001f600\U0001f4a9",
    "-rf *", "$(reboot); `ls`", "con", "tab\tand\nline", "%s%n {0}", "\u202eright to left", "*?[a]",
    "a\u0301" * 200,
]  # fmt: skip


def draw(run, out, prompt=None, prompts=None, count=3, keep=2, seed=4, settings=SETTINGS):
    sample(str(run), prompt, prompts, count, keep, seed=seed, out=str(out), **settings)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pictures_sheet_and_json(tmp_path, tiny_dalle, capsys):
    draw(tiny_dalle, tmp_path, "A red circle, above!")
    stem = "a-red-circle-above-seed4"
    names = [f"{stem}-1.png", f"{stem}-2.png"]
    assert sorted(listing(tmp_path)) == sorted([*names, f"{stem}.png", f"{stem}.json"])
    best = load(tiny_dalle)("A red circle, above!", 3, 2, 4, **SETTINGS)
    for name, picture in zip(names, best, strict=True):
        assert torch.equal(open_image(tmp_path / name), picture.image)
    sheet = open_image(tmp_path / f"{stem}.png")
    assert sheet.shape[1] >= 96 and sheet.shape[2] >= 2 * 96
    made = json.loads((tmp_path / f"{stem}.json").read_text())
    assert made.pop("pictures") == [
        {"file": name, "candidate": p.number, "score": p.score, "tokens": p.tokens.flatten().tolist()}
        for name, p in zip(names, best, strict=True)
    ]
    digest = artefact.digest(tiny_dalle / "model")
    asked = {"prompt": "A red circle, above!", "seed": 4, "count": 3, "keep": 2, **SETTINGS}
    assert made == {**asked, "precision": "float32", "artefact": digest}
    out = capsys.readouterr().out
    assert out.startswith("wrote ") and all(str(tmp_path / name) in out for name in listing(tmp_path))


def test_the_json_is_enough_to_draw_them_again(tmp_path, tiny_dalle):
    draw(tiny_dalle, tmp_path, "a cross")
    made = json.loads(next(tmp_path.glob("*.json")).read_text())
    settings = {name: made[name] for name in SETTINGS}
    again = load(tiny_dalle)(made["prompt"], made["count"], made["keep"], made["seed"], **settings)
    assert [p.tokens.flatten().tolist() for p in again] == [entry["tokens"] for entry in made["pictures"]]


def test_nothing_is_ever_overwritten(tmp_path, tiny_dalle):
    """Each call adds a full set; the second one's sheet is not called as the first one's second picture."""
    seen = {}
    for call in range(1, 5):
        draw(tiny_dalle, tmp_path, "a red circle", seed=4)
        now = listing(tmp_path)
        assert len(now) == 4 * call
        assert {name: now[name] for name in seen} == seen
        seen = now


@pytest.mark.parametrize("there", ["a-seed4.png", "a-seed4-1.png", "a-seed4-take2.png", "a-seed4.json"])
def test_a_file_that_was_there_stays(tmp_path, tiny_dalle, there):
    (tmp_path / there).write_bytes(b"precious")
    draw(tiny_dalle, tmp_path, "a")
    draw(tiny_dalle, tmp_path, "a")
    assert (tmp_path / there).read_bytes() == b"precious" and len(listing(tmp_path)) == 9


def test_names_that_are_taken_at_once_differ(tmp_path):
    stems = [free_stem(tmp_path, "a red circle", 0) for _ in range(5)]
    assert stems[0] == "a-red-circle-seed0" and len(set(stems)) == 5
    assert free_stem(tmp_path, "a red circle", 1) == "a-red-circle-seed1"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_prompts_stay_inside_the_folder(tmp_path, text):
    folder = tmp_path / "out"
    folder.mkdir()
    stem = free_stem(folder, text, 0)
    assert [path.name for path in folder.iterdir()] == [f"{stem}.json"]
    assert stem.isascii() and not set(stem) - set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert not stem.startswith("-") and len(stem) < 100
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_hostile_prompts_are_drawn_and_remembered_to_the_letter(tmp_path, tiny_dalle):
    folder = tmp_path / "out"
    for text in HOSTILE:
        draw(tiny_dalle, folder, text, count=1, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    made = [json.loads(path.read_text())["prompt"] for path in folder.glob("*.json")]
    assert sorted(made) == sorted(HOSTILE) and len(list(folder.iterdir())) == 3 * len(HOSTILE)


def test_prompts_from_a_file_are_drawn_one_a_line(tmp_path, tiny_dalle):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red circle\r\n\r\n  a cross \n\u2603".encode())
    draw(tiny_dalle, tmp_path / "out", prompts=str(tmp_path / "prompts.txt"))
    made = [json.loads(path.read_text())["prompt"] for path in (tmp_path / "out").glob("*.json")]
    assert sorted(made) == ["a cross", "a red circle", "\u2603"]


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"one\ntwo", ["one", "two"]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        (b"one\r\n\r\ntwo\r\n", ["one", "two"]),
        (b"\n  one  \n\n", ["one"]),
        ("\u00e9\n\u2603".encode(), ["\u00e9", "\u2603"]),
    ],
)
def test_lines_of_a_prompts_file(tmp_path, content, expected):
    (tmp_path / "p.txt").write_bytes(content)
    assert read_prompts(None, str(tmp_path / "p.txt")) == expected


@pytest.mark.parametrize(
    "content", [b"", b"\n \n\t\n", b"\xef\xbb\xbf", "caf\u00e9".encode("latin-1"), b"\xff\xfea\0", None]
)
def test_faults_of_a_prompts_file(tmp_path, content):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompts(None, str(tmp_path / "p.txt"))
    assert caught.value.code == 2 and "p.txt" in caught.value.what


@pytest.mark.parametrize("prompt, prompts", [(None, None), ("a", "p.txt"), ("\udcff", None)])
def test_one_prompt_or_one_file_and_text(prompt, prompts):
    with pytest.raises(UserError):
        read_prompts(prompt, prompts)


def test_an_out_that_cannot_be_a_folder_is_said_before_anything_is_drawn(tmp_path, tiny_dalle):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EnvironmentProblem, match="cannot be written"):
            draw(tiny_dalle, out, "a")
    assert listing(tmp_path) == {"file": b"x"}


def test_a_prompt_that_is_cut_is_told(tiny_dalle, tmp_path, capsys):
    draw(tiny_dalle, tmp_path / "a", "a red circle")
    assert "warning" not in capsys.readouterr().err
    draw(tiny_dalle, tmp_path / "b", "a red circle " * 20 + "left of a square")
    said = capsys.readouterr().err
    assert "this model reads 16" in said and "'a red circle a red" in said and "square" not in said


def test_few_pictures_are_all_kept(tiny_dalle, tmp_path):
    for count, kept in ((2, 2), (6, 4)):
        sample(str(tiny_dalle), "a red circle", count=count, out=str(tmp_path / str(count)))
        assert len(list((tmp_path / str(count)).glob("*-[0-9].png"))) == kept


def test_prompts_without_words_are_refused_and_strange_characters_are_told(tmp_path, tiny_dalle, capsys):
    for prompt in ("", "  "):
        with pytest.raises(UserError, match="says nothing"):
            draw(tiny_dalle, tmp_path, prompt)
    assert not [path for path in listing(tmp_path) if path.endswith((".png", ".json"))]
    draw(tiny_dalle, tmp_path, "a red \u2603 circle")
    assert "no caption of the training had \u2603" in capsys.readouterr().err
