"""Pictures of knowledge, as uint8 tensors `(3, H, W)`: atlas, bars, labelled sheets; for commands and notebooks."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dvae import codebook, files
from dvae.data import check_share, open_source
from dvae.images import grid, save, to_uint8
from dvae.model import load

INK, PAPER, GOOD, BAD = (30, 30, 34), (255, 255, 255), (24, 140, 60), (200, 50, 40)


@dataclass(frozen=True)
class Label:
    """A line of text under a picture, and its colour; `framed` draws a frame of that colour around the picture."""

    text: str = ""
    colour: tuple[int, int, int] = INK
    framed: bool = False


def sheet(rows: Sequence[tuple[str, Tensor, Sequence[Label]]], side: int = 64, title: str = "") -> Tensor:
    """Rows of pictures with a text before each row and a label under each picture.

    Args:
        rows: (text, uint8 pictures `(B, 3, H, W)`, B labels) for each row.
        side: size at which each picture is shown, pixels; pictures are enlarged without smoothing.
    """
    font, gap, head, margin = ImageFont.load_default(11), 6, 26 if title else 6, 190
    line = 14 if any(label.text for _, _, labels in rows for label in labels) else 0
    columns = max(len(pictures) for _, pictures, _ in rows)
    width, height = margin + columns * (side + gap) + gap, head + len(rows) * (side + line + gap)
    paper = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(paper)
    pen.text((gap, 6), title, INK, ImageFont.load_default(13))
    for r, (text, pictures, labels) in enumerate(rows):
        top = head + r * (side + line + gap)
        pen.multiline_text((gap, top), textwrap.fill(text, 30), INK, font)
        for c, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            left = margin + c * (side + gap)
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            paper.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top))
            pen.text((left, top + side + 1), label.text, label.colour, font)
            if label.framed:
                pen.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), outline=label.colour, width=3)
    return torch.from_numpy(np.array(paper)).permute(2, 0, 1)


def atlas(patches: Tensor, counts: Tensor, side: int = 24) -> Tensor:
    """The patch of each code, the most used first; codes that were never used are left out.

    Args:
        patches: `(K, 3, p, q)` in [0, 1].
        counts: `(K,)`.
        side: size at which each patch is shown, pixels.
    """
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    shown = torch.nn.functional.interpolate(patches[order], (side, side), mode="nearest")
    return grid(to_uint8(shown), columns=32)


def bars(values: Tensor, height: int = 120, width: int = 640) -> Tensor:
    """Values `(K,)` from the largest to the smallest, as one bar each, the tallest of full height."""
    ordered = values.double().sort(descending=True).values
    columns = (torch.arange(width) * len(ordered)) // width
    tall = (ordered[columns] / ordered.max().clamp_min(1e-12) * height).round()
    filled = torch.arange(height, 0, -1)[:, None] <= tall
    ink, paper = torch.tensor(INK), torch.tensor(PAPER)
    return torch.where(filled[None], ink[:, None, None], paper[:, None, None]).to(torch.uint8)


def reconstruct(run: str, images: str, out: str = "out", count: PositiveInt = 32) -> None:
    """Encode pictures, decode them, and write a grid: each original beside its reconstruction.

    Args:
        run: a run folder or an artefact folder of stage 1.
        images: any data source: scenes:val, a folder, a listing, tars, Parquet files, a Hub data set.
        out: folder to write reconstructions.png to.
        count: how many pictures.
    """
    model = load(run)
    source = open_source(images, model.config.image_size)
    check_share(source, max_bad=1)
    originals = source.images(range(min(count, len(source)))).float() / 255
    with torch.inference_mode():
        decoded = model.decode(model.encode(originals))
    path = Path(out) / "reconstructions.png"
    save(grid(to_uint8(torch.stack([originals, decoded], 1).flatten(0, 1)), columns=8), path)
    psnr = (-10 * (decoded - originals).square().mean((1, 2, 3)).clamp_min(1e-10).log10()).mean()
    print(f"PSNR {psnr:.2f} dB over {len(originals)} pictures; pairs of original and reconstruction\nwrote {path}")


def codebook_report(run: str, data: str, out: str = "out", count: PositiveInt = 2000) -> None:
    """Count the codes over a data source and draw what each one paints.

    Args:
        run: a run folder or an artefact folder of stage 1.
        data: any data source: scenes:val, a folder, a listing, tars, Parquet files, a Hub data set.
        out: folder to write atlas.png, alone.png, usage.png and codebook.json to.
        count: at most this many pictures are looked at.
    """
    model = load(run)
    source = open_source(data, model.config.image_size)
    check_share(source, max_bad=1)
    images = source.images(range(min(count, len(source)))).float() / 255
    in_context, counts = codebook.painted_in_context(model, images)
    seen = codebook.Usage(counts)
    folder = Path(out)
    save(atlas(in_context, counts), folder / "atlas.png")
    save(atlas(codebook.painted_alone(model), counts), folder / "alone.png")
    save(bars(counts), folder / "usage.png")
    numbers = {
        "codes": model.vocab_size,
        "pictures": len(images),
        "tokens_per_code": counts.sum().item() / model.vocab_size,
        "used": seen.used,
        "perplexity": seen.perplexity,
        "counts": counts.tolist(),
    }
    files.write_json(folder / "codebook.json", numbers)
    print(f"{seen.used:.1%} of {model.vocab_size} codes in use over {len(images)} pictures")
    print(f"perplexity {seen.perplexity:.1f}")
    for name in ("atlas.png", "alone.png", "usage.png", "codebook.json"):
        print(f"wrote {folder / name}")
