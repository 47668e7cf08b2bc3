"""The `complete` command: a picture of the user's, of which a part is drawn anew -> pictures, a sheet, a JSON.

`edited` does the same for a loaded pipeline and a picture in memory, and writes nothing:

    pipeline = dalle.load("runs/demo/dalle")
    picture = open_image(Path("mine.png"))
    best = edited(pipeline, "a red circle above a small blue square", picture, rows=2).pictures[0]
"""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dalle import edit, pipeline
from dalle.pipeline import Picture, Pipeline
from dalle.rerank import Scorer, scorer
from dalle.samples import free_stem, read_prompts
from dvae import artefact, files
from dvae.drawings import Label, sheet
from dvae.errors import EnvironmentProblem, UserError, warn
from dvae.images import open_image, save, square, to_uint8

_CROPPED = 0.1  # share of a picture that may be cropped away without a word
_WHITE = 128  # grey level from which on a pixel of a mask is white
_SIDEWAYS = ("left", "right")
_MARK = (230, 0, 200)  # the colour in which the sheet shows what is redrawn


@dataclass(frozen=True)
class Edited:
    """What was made of a picture.

    before: uint8 (3, H, W), the picture as the model read it, on the white canvas where it was extended.
    redrawn: bool (h, w), the cells of the canvas that were drawn anew.
    pictures: best first; their size is that of `before`.
    """

    before: Tensor
    redrawn: Tensor
    pictures: list[Picture]


def complete(
    run: str,
    caption: str,
    image: str | None = None,
    rows: int | None = None,
    mask: str | None = None,
    extend: str | None = None,
    cells: int | None = None,
    variation: float | None = None,
    blend: int = 0,
    count: int = 16,
    keep: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    rerank: str | None = None,
    passes: int = 0,
    seed: int = 0,
    out: str = "completed",
) -> None:
    """Draw a part of a picture anew, as the caption says; give one of --rows, --mask, --extend and --variation.

    The picture is cropped to its central square and scaled to the model's size, with a warning where more than a tenth
    is lost. What is not redrawn stays as it is then, bit for bit, except under --variation. Nothing that exists is
    overwritten.

    Args:
        run: run folder or artefact folder of stage 2.
        caption: what the whole picture is to show.
        image: the picture, a JPEG, PNG, WebP, BMP or GIF.
        rows: keep so many rows of cells at the top and draw those below.
        mask: a picture of the size of the image or of the model's pictures, white where it is to be redrawn; a cell is
            redrawn whole if any white pixel lies in its patch.
        extend: left, right, up or down: draw on beyond that side.
        cells: by how many columns or rows of cells; null: half of the model's grid. Only with extend.
        variation: share of the cells to redraw, chosen by the seed, from 0 (one picture, as stage 1 repaints it) to 1
            (all); every pixel is painted by stage 1.
        blend: pixels, into the redrawn patches, over which steps of colour at their border are levelled out. Not with
            variation.
        count: candidates.
        keep: how many of them are written, best first; null: four, or all where there are fewer.
        temperature: above 1 more varied, below 1 more careful.
        top_k: draw from the k most likely codes only.
        top_p: draw from the most likely codes that together have this probability.
        guidance: scale of classifier-free guidance; 1 is none.
        rerank: a score of `dalle.rerank`, of the whole picture; or rest, the likelihood of what is kept given what is
            redrawn before it; null: combined where the model captions, half-pmi or likelihood elsewhere.
        passes: how often each redrawn cell is drawn once more, given all others; each pass takes many times as long as
            the first drawing.
        seed: the same seed draws the same pictures.
        out: folder for the pictures, a labelled sheet and a JSON of how they were made.
    """
    keep = min(4, count) if keep is None else keep
    (caption,) = read_prompts(caption, None)
    if image is None:
        raise UserError("there is no picture to complete", "give one with --image FILE")
    _check_mode(rows, mask, extend, cells, variation, blend)
    picture = open_image(Path(image))
    marked = None if mask is None else white(open_image(Path(mask)))
    drawer = pipeline.load(run)
    pipeline.warn_of_null(drawer, guidance, rerank)
    how = {"rows": rows, "extend": extend, "cells": cells, "variation": variation, "blend": blend}
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance, "passes": passes}
    settings["rerank"] = drawer.ranker if rerank is None else rerank
    _check_caption(drawer, caption)
    canvas, _ = plan(drawer, picture, mask=marked, seed=seed, **how)  # says what is wrong before the folder is made
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = EnvironmentProblem(f"{out} cannot be written: {error.strerror}", "choose another folder with --out")
        raise problem from error
    _warn_of_crop(image, picture, marked)
    if (length := int(drawer.text.lengths([caption])[0])) > drawer.text.text_length:
        read = drawer.text.decode(drawer.text.encode(caption))
        warn(
            f"the caption has {length} ids, this model reads {drawer.text.text_length}: {read!r} is all that counts",
            "say it shorter; how long captions may be is chosen by dalle prepare --length",
        )
    total = int(canvas.redrawn.sum()) * count * (1 + passes)
    with tqdm(total=total, desc=caption[:40], unit="token", leave=False, disable=None) as bar:
        done = edited(
            drawer, caption, picture, mask=marked, count=count, keep=keep, seed=seed, progress=bar.update,
            **how, **settings,
        )  # fmt: skip
    stem = free_stem(folder, caption, seed)
    names = [f"{stem}-{place}.png" for place in range(1, len(done.pictures) + 1)]
    for each, name in zip(done.pictures, names, strict=True):
        save(each.image, folder / name)
    save(overview(caption, done), folder / f"{stem}.png")
    made = {
        "prompt": caption,
        "image": image,
        "image_sha256": files.sha256_file(image),
        "mask": mask,
        "mask_sha256": None if mask is None else files.sha256_file(mask),
        **how,
        "redrawn": done.redrawn.int().tolist(),
        "seed": seed,
        "count": count,
        "keep": keep,
        **settings,
        "artefact": artefact.digest(drawer.source),
        "pictures": [
            {"file": name, "candidate": each.number, "score": each.score, "tokens": each.tokens.flatten().tolist()}
            for name, each in zip(names, done.pictures, strict=True)
        ],
    }
    files.write_json(folder / f"{stem}.json", made)
    print("wrote " + ", ".join(str(folder / name) for name in (f"{stem}.png", *names, f"{stem}.json")))


@torch.inference_mode()
def edited(
    drawer: Pipeline,
    caption: str,
    picture: Tensor,
    *,
    rows: int | None = None,
    mask: Tensor | None = None,
    extend: str | None = None,
    cells: int | None = None,
    variation: float | None = None,
    blend: int = 0,
    count: int = 16,
    keep: int = 4,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    rerank: str | None = None,
    passes: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Edited:
    """Draw `count` candidates of a part of a picture, and return the `keep` that the scorer likes best, best first.

    A candidate that was drawn twice is kept twice only where there are not enough others. The same seed and the same
    settings, `count` among them, give the same pictures.

    Args:
        picture: uint8 (3, H, W) of any size and shape; only its central square is read.
        mask: bool (H, W) of the same size or of the model's pictures, True where it is to be redrawn.
        rows, extend, cells, variation, blend, and the rest: see `complete`.
    Raises:
        UserError: not exactly one of rows, mask, extend and variation is given, or a setting is out of its range.
    """
    _check_mode(rows, mask, extend, cells, variation, blend)
    _check_caption(drawer, caption)
    how = {"rows": rows, "mask": mask, "extend": extend, "cells": cells, "variation": variation, "blend": blend}
    canvas, before = plan(drawer, picture, seed=seed, **how)
    ids, null = drawer.text.encode(caption), drawer.text.null()
    ranker = drawer.ranker if rerank is None else rerank

    def paint(tokens: Tensor) -> Tensor:
        images = to_uint8(drawer.tokenizer.decode(tokens.cpu()))
        return images if variation is not None else edit.paste(before, images, canvas.redrawn, blend)

    def repaint(tokens: Tensor) -> Tensor:
        """As `Pipeline.repaint`, of the edited picture; a window of an extension is painted alone."""
        if extend is not None:
            return drawer.repaint(tokens)
        return drawer.tokenizer.encode(paint(tokens).float() / 255).to(tokens.device)

    def score(redrawn: Tensor) -> Scorer:
        if ranker == "rest":
            return functools.partial(edit.rest, redrawn=redrawn)
        both_orders, weights = drawer.model.config.both_orders, drawer.weights
        return scorer(ranker, drawer.captions_ids, null, repaint, weights=weights, both_orders=both_orders)

    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance, "passes": passes}
    drawn = edit.draw_canvas(
        drawer.packed, ids, canvas, count, keep, score, null_ids=null, seed=seed, progress=progress, **settings
    )
    order = drawn.order[: keep if canvas.redrawn.any() else 1]  # where nothing is redrawn all are the same
    pictures = [
        Picture(image, drawn.tokens[k].cpu(), caption, seed, k, float(drawn.scores[k]))
        for image, k in zip(paint(drawn.tokens[order]), order.tolist(), strict=True)
    ]
    return Edited(before, canvas.redrawn, pictures)


def plan(
    drawer: Pipeline,
    picture: Tensor,
    *,
    rows: int | None,
    mask: Tensor | None,
    extend: str | None,
    cells: int | None,
    variation: float | None,
    blend: int,
    seed: int,
) -> tuple[edit.Canvas, Tensor]:
    """What is to be drawn, and the picture before it, uint8 (3, H, W), on the canvas; see `edited`."""
    size, grid = drawer.tokenizer.config.image_size, tuple(drawer.model.config.grid)
    if not (isinstance(blend, int) and 0 <= blend <= size):
        raise UserError(f"blend is {blend!r}", f"give pixels from 0 to {size}, the size of this model's pictures")
    before = square(picture, size)
    if extend is not None:
        half = max(1, grid[extend in _SIDEWAYS] // 2)
        canvas = edit.extended(tokens_of(drawer, before), extend, half if cells is None else cells)
        high, wide = canvas.tokens.shape
        top, left = (high - grid[0]) * (extend == "up"), (wide - grid[1]) * (extend == "left")
        patch = size // grid[0], size // grid[1]
        place = left, wide - grid[1] - left, top, high - grid[0] - top
        padding = [cell * patch[k < 2] for k, cell in enumerate(place)]
        return canvas, F.pad(before, padding, value=255)
    if variation is not None:
        return edit.masked(tokens_of(drawer, before), edit.share_of(grid, variation, seed)), before
    redrawn = edit.below(grid, rows) if mask is None else edit.touched(framed(mask, picture, size), grid)
    return edit.masked(tokens_of(drawer, edit.hidden(before, redrawn)), redrawn), before


def framed(mask: Tensor, picture: Tensor, size: int) -> Tensor:
    """The part of a mask, bool, that lies on what is read of the picture, uint8 (3, H, W); it is of that picture's size
    or of the model's, `size` pixels a side."""
    if not mask.any():
        raise UserError("the mask marks nothing", "paint white what is to be redrawn, and black what is kept")
    if mask.shape == picture.shape[1:]:
        side = min(mask.shape)
        top, left = (length - side for length in mask.shape)
        inside = mask[top // 2 : top // 2 + side, left // 2 : left // 2 + side]
        if not inside.any():
            raise UserError(
                "the mask marks only what is cropped away", "the model reads the central square of a picture: crop it"
            )
        return inside
    if mask.shape != (size, size):
        (high, wide), own = mask.shape, picture.shape[1:]
        raise UserError(
            f"the mask has {wide} x {high} pixels, the picture {own[1]} x {own[0]}",
            f"make it as large as the picture, or {size} x {size} pixels as the model's pictures are",
        )
    return mask


def white(mask: Tensor) -> Tensor:
    """bool (H, W): which pixels of a picture, uint8 (3, H, W), are white rather than black."""
    return mask.float().mean(0) >= _WHITE


def tokens_of(drawer: Pipeline, picture: Tensor) -> Tensor:
    """int64 (h, w) of uint8 (3, S, S), S the size of the model's pictures."""
    return drawer.tokenizer.encode(picture[None].float() / 255)[0]


def overview(caption: str, done: Edited) -> Tensor:
    """One row: the picture, what was redrawn, and the results with their scores; uint8 (3, H, W)."""
    where = done.redrawn
    high, wide = (pixels // cells for pixels, cells in zip(done.before.shape[1:], where.shape, strict=True))
    where = where.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    mark = ((done.before.float() + torch.tensor(_MARK)[:, None, None]) / 2).to(torch.uint8)
    tiles = torch.stack([done.before, torch.where(where, mark, done.before), *(each.image for each in done.pictures)])
    high, wide = tiles.shape[2:]
    side = max(high, wide)
    spare = side - wide, side - high
    tiles = F.pad(tiles, (spare[0] // 2, spare[0] - spare[0] // 2, spare[1] // 2, spare[1] - spare[1] // 2), value=255)
    labels = ["picture", "redrawn", *(f"{place}: {p.score:.2f}" for place, p in enumerate(done.pictures, 1))]
    return sheet([(caption, tiles, [Label(text) for text in labels])], side=max(96, side))


def _check_mode(
    rows: int | None, mask: object, extend: str | None, cells: int | None, variation: float | None, blend: int
) -> None:
    given = {"--rows": rows, "--mask": mask, "--extend": extend, "--variation": variation}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise UserError(
            f"{' and '.join(named)} cannot go together" if named else "it is not said what to redraw",
            f"give one of {', '.join(given)}",
        )
    if cells is not None and extend is None:
        raise UserError("cells says how far to extend, but not where", "add --extend right, or left, up, down")
    if blend and variation is not None:
        raise UserError("blend is of no use to a variation", "leave --blend away: stage 1 paints the whole picture")


def _check_caption(drawer: Pipeline, caption: str) -> None:
    """An empty caption is the null prompt, with which nothing could be asked for, and pmi would be 0."""
    if not int(drawer.text.lengths([caption])[0]):
        raise UserError("the caption is empty", "say what the whole picture is to show")


def _warn_of_crop(image: str, picture: Tensor, marked: Tensor | None) -> None:
    high, wide = picture.shape[1:]
    if marked is not None and marked.shape == (high, wide) and framed(marked, picture, 0).sum() < marked.sum():
        warn("a part of what the mask marks is cropped away with the picture", "crop both to a square yourself")
    if min(high, wide) < (1 - _CROPPED) * max(high, wide):
        warn(
            f"of {image}, {wide} x {high} pixels, only the central square is read",
            "crop it yourself to what is to be seen",
        )
