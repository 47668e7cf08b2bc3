"""What `dalle complete` leaves in a folder, what `edited` keeps of a picture, and how mistakes are told."""

import json
import math

import pytest
import torch
from PIL import Image

from dalle import pipeline
from dalle.__main__ import main
from dalle.complete import complete, edited, framed, white
from dvae import artefact, scenes
from dvae.drawings import Label, sheet
from dvae.errors import UserError
from dvae.files import sha256_file
from dvae.images import open_image, save, square, to_uint8

CAPTION = "a red circle"
MODES = [
    {"rows": 2}, {"mask": "mask.png"}, {"extend": "right", "cells": 3}, {"extend": "up"}, {"variation": 0.5},
    {"mask": "mask.png", "blend": 2}, {"rows": 1, "passes": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def drawer(tiny_dalle):
    return pipeline.load(tiny_dalle)


@pytest.fixture(scope="module")
def picture():
    return scenes.draw([scenes.scene("val", 1)], 64)[0]


@pytest.fixture
def folder(tmp_path, picture, monkeypatch):
    """The working folder, with a picture of 64 x 64, masks of that size and others, and what is none."""
    monkeypatch.chdir(tmp_path)
    save(picture, "picture.png")
    for name, size, marked in (
        ("mask.png", (64, 64), (slice(20, 40), slice(0, 17))), ("small.png", (32, 32), (slice(10, 20), slice(0, 8))),
        ("black.png", (64, 64), (slice(0, 0), slice(0, 0))), ("odd.png", (64, 32), (slice(0, 9), slice(0, 9))),
    ):  # fmt: skip
        mask = torch.zeros(3, *size, dtype=torch.uint8)
        mask[(slice(None), *marked)] = 255
        save(mask, name)
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def draw(drawer, picture, **settings):
    return edited(drawer, CAPTION, picture, **{"count": 5, "keep": 3, "rerank": "likelihood", **settings})


def box(height=64, width=64, rows=slice(20, 40), columns=slice(0, 17)):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[rows, columns] = True
    return mask


def patches(cells, side=8):
    return cells.repeat_interleave(side, 0).repeat_interleave(side, 1)


def tokens_of(drawer, picture):
    return drawer.tokenizer.encode(picture[None].float() / 255)[0]


# ------------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    "settings", [{"mask": box()}, {"mask": box(), "blend": 3}, {"rows": 2}, {"rows": 3, "blend": 9}]
)
def test_pixels_outside_the_redrawn_patches_are_those_of_the_picture_as_it_is_read(drawer, picture, settings):
    done = draw(drawer, picture, **settings)
    read, kept = square(picture, 32), ~patches(done.redrawn)
    assert torch.equal(done.before, read) and kept.any() and len(done.pictures) == 3
    for each in done.pictures:
        assert torch.equal(each.image[:, kept], read[:, kept])
        assert not torch.equal(each.image[:, ~kept], read[:, ~kept])


def test_redrawn_are_the_cells_that_the_mask_touches(drawer, picture):
    done = draw(drawer, picture, mask=box())  # pixels 10..19 and 0..8 of 32
    assert done.redrawn.nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert torch.equal(done.redrawn, draw(drawer, picture, mask=box(32, 32, slice(10, 20), slice(0, 9))).redrawn)
    assert draw(drawer, picture, mask=torch.ones(64, 64, dtype=torch.bool)).redrawn.all()


def test_kept_tokens_stand_in_every_picture_and_what_was_masked_has_no_influence(drawer, picture):
    mask, read = box(32, 32, slice(10, 20), slice(0, 9)), square(picture, 32)
    changed = torch.where(patches(draw(drawer, read, mask=mask).redrawn), 255 - read, read)
    assert not torch.equal(read, changed)
    first, second = (draw(drawer, each, mask=mask) for each in (read, changed))
    assert [p.tokens.tolist() for p in first.pictures] == [p.tokens.tolist() for p in second.pictures]
    assert all(torch.equal(one.image, two.image) for one, two in zip(first.pictures, second.pictures, strict=True))
    kept = {tuple(p.tokens[~first.redrawn].tolist()) for p in first.pictures}
    assert len(kept) == 1


@pytest.mark.parametrize("side, cells", [("left", 3), ("right", 1), ("up", 4), ("down", None)])
def test_an_extension_keeps_the_picture_in_its_place(drawer, picture, side, cells):
    done = draw(drawer, picture, extend=side, **({} if cells is None else {"cells": cells}))
    more = 8 * (2 if cells is None else cells)
    size = (32, 32 + more) if side in ("left", "right") else (32 + more, 32)
    top, left = more * (side == "up"), more * (side == "left")
    for each in done.pictures:
        assert each.image.shape == (3, *size) == done.before.shape and each.tokens.shape == done.redrawn.shape
        assert torch.equal(each.image[:, top : top + 32, left : left + 32], square(picture, 32))
        kept = each.tokens[top // 8 : top // 8 + 4, left // 8 : left // 8 + 4]
        assert torch.equal(kept, tokens_of(drawer, square(picture, 32)))


def test_no_variation_is_the_picture_repainted_once_and_full_variation_is_all_new(drawer, picture):
    tokens = tokens_of(drawer, square(picture, 32))
    repainted = to_uint8(drawer.tokenizer.decode(tokens[None]))[0]
    none = draw(drawer, picture, variation=0)
    (only,) = none.pictures
    assert torch.equal(only.image, repainted) and torch.equal(only.tokens, tokens) and not none.redrawn.any()
    everything = draw(drawer, picture, variation=1.0)
    assert everything.redrawn.all()
    other = draw(drawer, torch.zeros_like(picture), variation=1.0)  # nothing is left of the picture
    assert [p.tokens.tolist() for p in everything.pictures] == [p.tokens.tolist() for p in other.pictures]
    half = draw(drawer, picture, variation=0.5)
    assert int(half.redrawn.sum()) == 8
    for each in half.pictures:
        assert torch.equal(each.tokens[~half.redrawn], tokens[~half.redrawn])
        painted = to_uint8(drawer.tokenizer.decode(each.tokens[None]))[0]  # alone: another sum's last bit may round
        assert (each.image.int() - painted.int()).abs().max() <= 1


@pytest.mark.parametrize("settings", [{"rows": 2}, {"extend": "left", "cells": 3}, {"variation": 0.4}, {"mask": box()}])
def test_the_same_seed_draws_the_same_pictures_and_another_one_others(drawer, picture, settings):
    first, again, other = (draw(drawer, picture, seed=seed, **settings).pictures for seed in (1, 1, 2))
    assert all(torch.equal(one.image, two.image) for one, two in zip(first, again, strict=True))
    assert [p.score for p in first] == [p.score for p in again]
    assert any(not torch.equal(one.image, two.image) for one, two in zip(first, other, strict=True))


def test_best_come_first_and_a_score_is_that_of_the_whole_picture(drawer, picture):
    done = draw(drawer, picture, rows=2, count=12, keep=12)
    scores = [each.score for each in done.pictures]
    distinct = len({tuple(each.tokens.flatten().tolist()) for each in done.pictures})
    assert scores[:distinct] == sorted(scores[:distinct], reverse=True)
    ids = drawer.text.encode(CAPTION)
    for each in done.pictures[:3]:
        logits = drawer.model(ids, each.tokens[None]).image.log_softmax(-1)
        expected = logits.gather(2, each.tokens.flatten()[None, :, None]).sum()
        assert each.score == pytest.approx(float(expected), rel=1e-4)
    rest = draw(drawer, picture, rows=2, rerank="rest").pictures
    assert rest[0].score == pytest.approx(rest[-1].score, rel=1e-5)  # what is kept comes first: all fit it alike


def test_without_a_ranker_it_is_that_of_the_model(tiny_dalle, picture):
    own = pipeline.load(tiny_dalle)
    for own.knows_null, own.weights, ranker in (
        (True, None, "half-pmi"), (False, None, "likelihood"), (True, {"pmi": 2.0, "likelihood": 0.5}, "combined"),
    ):  # fmt: skip
        first, second = (draw(own, picture, rows=2, rerank=rerank).pictures for rerank in (None, ranker))
        assert [p.score for p in first] == [p.score for p in second]


def test_masks_are_cropped_as_their_pictures():
    wide, mask = torch.zeros(3, 40, 100, dtype=torch.uint8), torch.zeros(40, 100, dtype=torch.bool)
    mask[:, 50] = True
    inside = framed(mask, wide, 32)
    assert inside.shape == (40, 40) and inside[:, 20].all() and inside.sum() == 40
    assert torch.equal(framed(mask.t(), wide.transpose(1, 2), 32), inside.t())
    with pytest.raises(UserError, match="cropped away"):
        framed(torch.roll(mask, 45, 1), wide, 32)
    small = torch.eye(32, dtype=torch.bool)
    assert torch.equal(framed(small, wide, 32), small)
    with pytest.raises(UserError, match="100 x 41 pixels, the picture 100 x 40"):
        framed(torch.ones(41, 100, dtype=torch.bool), wide, 32)


def test_white_is_from_half_on():
    grey = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).expand(3, 1, 4)
    assert white(grey).tolist() == [[False, False, True, True]]


# ------------------------------------------------------------------------------------------------------- the command


def run(*args):
    try:
        return main(["complete", *(str(arg) for arg in args)])
    except SystemExit as ending:
        return ending.code or 0


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_pictures_sheet_and_json(folder, tiny_dalle, drawer, picture, mode, capsys):
    settings = {"count": 4, "keep": 2, "seed": 3, "temperature": 0.9, "top_k": 12, "top_p": 0.95, "guidance": 1.5,
                "rerank": "pmi", **mode}  # fmt: skip
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    assert run(tiny_dalle, CAPTION, "--image", "picture.png", "--out", "out", *flags) == 0
    stem, out = "a-red-circle-seed3", folder / "out"
    names = [f"{stem}-1.png", f"{stem}-2.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, f"{stem}.png", f"{stem}.json"])
    marked = white(open_image(folder / "mask.png")) if "mask" in mode else None
    done = edited(drawer, CAPTION, picture, **{**settings, "mask": marked})
    for name, each in zip(names, done.pictures, strict=True):
        assert torch.equal(open_image(out / name), each.image)
    made = json.loads((out / f"{stem}.json").read_text())
    assert made.pop("pictures") == [
        {"file": name, "candidate": p.number, "score": p.score, "tokens": p.tokens.flatten().tolist()}
        for name, p in zip(names, done.pictures, strict=True)
    ]
    assert made.pop("redrawn") == done.redrawn.int().tolist() and made.pop("prompt") == CAPTION
    assert made.pop("artefact") == artefact.digest(tiny_dalle / "model")
    assert made.pop("image_sha256") == sha256_file("picture.png") and made.pop("image") == "picture.png"
    assert made.pop("mask_sha256") == (sha256_file("mask.png") if "mask" in mode else None)
    unset = {"rows": None, "mask": None, "extend": None, "cells": None, "variation": None, "blend": 0, "passes": 0}
    assert made == {**unset, **settings}
    told = capsys.readouterr().out
    assert told.startswith("wrote ") and all(str(path.relative_to(folder)) in told for path in out.iterdir())


def test_the_sheet_shows_the_picture_what_is_redrawn_and_the_results(folder, tiny_dalle, drawer, picture):
    complete(str(tiny_dalle), CAPTION, "picture.png", rows=1, count=3, keep=2, rerank="likelihood", out="out")
    shown = open_image(next((folder / "out").glob("*seed0.png")))
    done = draw(drawer, picture, rows=1, count=3, keep=2)
    mark = ((done.before.float() + torch.tensor([230, 0, 200])[:, None, None]) / 2).to(torch.uint8)
    tiles = [done.before, torch.where(patches(done.redrawn), mark, done.before), *(p.image for p in done.pictures)]
    labels = ["picture", "redrawn", *(f"{k}: {p.score:.2f}" for k, p in enumerate(done.pictures, 1))]
    assert torch.equal(shown, sheet([(CAPTION, torch.stack(tiles), [Label(text) for text in labels])], side=96))


def test_nothing_is_ever_overwritten(folder, tiny_dalle):
    seen = {}
    for call in range(1, 4):
        complete(str(tiny_dalle), CAPTION, "picture.png", rows=2, count=2, keep=1, out=".")
        now = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert len(now) == 6 + 3 * call
        assert {name: now[name] for name in seen} == seen
        seen = now


BAD = [
    ([], 2, "not said what to redraw"),
    (["--rows", "2", "--variation", "0.5"], 2, "--rows and --variation"),
    (["--rows", "2", "--mask", "mask.png", "--extend", "left"], 2, "--rows and --mask and --extend"),
    (["--rows", "0"], 2, "rows is 0"), (["--rows", "4"], 2, "rows is 4"), (["--rows", "-1"], 2, "rows is -1"),
    (["--rows", "nan"], 2, "rows"), (["--rows", "1.5"], 2, "rows"),
    (["--mask", "odd.png"], 2, "the mask has 32 x 64 pixels, the picture 64 x 64"),
    (["--mask", "black.png"], 2, "marks nothing"), (["--mask", "none.png"], 3, "none.png: no such file"),
    (["--mask", "text.png"], 3, "text.png: not an image"), (["--mask", "."], 3, "not a file"),
    (["--extend", "sideways"], 2, "sideways"), (["--extend", "left", "--cells", "0"], 2, "cells is 0"),
    (["--extend", "left", "--cells", "nan"], 2, "cells"), (["--rows", "2", "--cells", "2"], 2, "cells"),
    (["--variation", "nan"], 2, "variation is nan"), (["--variation", "1.1"], 2, "variation is 1.1"),
    (["--variation", "-0.1"], 2, "variation is -0.1"), (["--variation", "much"], 2, "variation"),
    (["--variation", "0.5", "--blend", "2"], 2, "blend"), (["--rows", "2", "--blend", "-1"], 2, "blend is -1"),
    (["--rows", "2", "--blend", "33"], 2, "blend is 33"), (["--rows", "2", "--passes", "-1"], 2, "passes is -1"),
    (["--rows", "2", "--temperature", "nan"], 2, "temperature"), (["--rows", "2", "--top_p", "nan"], 2, "top_p"),
    (["--rows", "2", "--guidance", "inf"], 2, "guidance"), (["--rows", "2", "--top_k", "17"], 2, "top_k"),
    (["--rows", "2", "--count", "0"], 2, "count"), (["--rows", "2", "--keep", "5", "--count", "4"], 2, "keep is 5"),
    (["--rows", "2", "--rerank", "clip"], 2, "clip"), (["--rows", "2", "--seed", "-1"], 2, "seed is -1"),
    (["--variation", "0.5", "--seed", str(2**63)], 2, "seed is"),
    (["--rows", "2", "--image", "none.png"], 3, "none.png: no such file"),
    (["--rows", "2", "--image", "text.png"], 3, "text.png: not an image"),
    (["--rows", "2", "--out", "text.png"], 5, "text.png"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, code, word", BAD, ids=[" ".join(wrong) for wrong, _, _ in BAD])
def test_mistakes_are_two_lines_and_leave_nothing(wrong, code, word, folder, tiny_dalle, capsys):
    before = sorted(path.name for path in folder.iterdir())
    assert run(tiny_dalle, CAPTION, "--image", "picture.png", "--out", "out", *wrong) == code
    said = capsys.readouterr()
    what, hint = said.err.rstrip("\n").split("\n")
    assert what.startswith("error: ") and word in what and hint.startswith("hint: ") and len(hint) > 16
    assert said.out == ""
    assert [name for name in sorted(p.name for p in folder.iterdir()) if name != "out"] == before
    assert not (folder / "out").exists() or not list((folder / "out").iterdir())


@pytest.mark.parametrize("caption", ["", "  ", "\n"])
def test_an_empty_caption_is_refused(caption, folder, tiny_dalle, capsys):
    assert run(tiny_dalle, caption, "--image", "picture.png", "--rows", 2, "--out", "out") == 2
    assert "the caption is empty" in capsys.readouterr().err and not (folder / "out").exists()


def test_no_picture_and_no_run(folder, tiny_dalle, capsys):
    assert run(tiny_dalle, CAPTION, "--rows", 2) == 2
    assert "--image FILE" in capsys.readouterr().err
    assert run(folder / "nowhere", CAPTION, "--image", "picture.png", "--rows", 2) == 4
    assert run(tiny_dalle) == 2
    assert not (folder / "completed").exists()


def test_only_the_square_of_a_long_picture_is_read_and_that_is_told(folder, tiny_dalle, picture, capsys):
    long = torch.cat([torch.zeros(3, 64, 60, dtype=torch.uint8), picture, torch.zeros(3, 64, 60, dtype=torch.uint8)], 2)
    save(long, "long.png")
    save(torch.cat([picture[:, :, :2], picture], 2), "nearly.png")
    common = {"rows": 2, "count": 2, "keep": 1, "out": "out"}
    for name, warned in (("picture.png", False), ("nearly.png", False), ("long.png", True)):
        complete(str(tiny_dalle), CAPTION, name, **common)
        told = capsys.readouterr().err
        assert ("184 x 64 pixels, only the central square is read" in told) == warned and ("warning" in told) == warned
    stem = "out/a-red-circle-seed0"
    last = open_image(folder / f"{stem}-take3-1.png")
    assert torch.equal(last[:, :16], square(long, 32)[:, :16])


def test_a_mask_that_is_cropped_in_part_is_told(folder, tiny_dalle, picture, capsys):
    save(torch.cat([picture, picture[:, :, :4]], 2), "nearly.png")
    for name, columns, warned in (("in.png", slice(2, 9), False), ("out.png", slice(0, 9), True)):
        save(box(64, 68, slice(0, 9), columns).expand(3, -1, -1).to(torch.uint8) * 255, name)
        complete(str(tiny_dalle), CAPTION, "nearly.png", mask=name, count=2, keep=1, out="out")
        assert ("what the mask marks is cropped away" in capsys.readouterr().err) == warned


def test_a_caption_that_is_cut_is_told(folder, tiny_dalle, capsys):
    complete(str(tiny_dalle), "a red circle " * 20, "picture.png", rows=2, count=2, keep=1, out="out")
    assert "this model reads 16" in capsys.readouterr().err


def test_a_mask_with_an_alpha_channel_redraws_what_is_clear(folder, tiny_dalle):
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 17, 17))
    mask.save("clear.png")
    complete(str(tiny_dalle), CAPTION, "picture.png", mask="clear.png", count=2, keep=1, out="out")
    made = json.loads(next((folder / "out").glob("*.json")).read_text())
    assert made["redrawn"] == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_settings_of_edited_are_checked_too(drawer, picture):
    for wrong in ({}, {"rows": 2, "variation": 0.5}, {"rows": 2, "keep": 0}, {"rows": 2, "blend": 1.5},
                  {"rows": 2, "temperature": math.nan}):  # fmt: skip
        with pytest.raises(UserError):
            draw(drawer, picture, **wrong)
    with pytest.raises(UserError, match="caption is empty"):
        edited(drawer, " ", picture, rows=2)
