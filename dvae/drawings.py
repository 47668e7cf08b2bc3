"""Pictures of knowledge, as uint8 tensors `(3, H, W)`: sheets, atlases, maps of cells; opens no files."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dvae.images import grid, to_uint8
from dvae.listing import printable

INK, PAPER, EDGE, GOOD, BAD = (30, 30, 34), (255, 255, 255), (222, 222, 226), (24, 140, 60), (200, 50, 40)


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
    font, title_font, gap, head = ImageFont.load_default(11), ImageFont.load_default(13), 6, 26 if title else 6
    margin = 190 if any(text for text, _, _ in rows) else gap
    line = 14 if any(label.text for _, _, labels in rows for label in labels) else 0
    columns = max(len(pictures) for _, pictures, _ in rows)
    width, height = margin + columns * (side + gap) + gap, head + len(rows) * (side + line + gap)
    width = max(width, round(ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((gap, 6), title, title_font)[2]) + gap)
    paper = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(paper)
    pen.text((gap, 6), title, INK, title_font)
    for r, (text, pictures, labels) in enumerate(rows):
        top = head + r * (side + line + gap)
        lines = max(1, (side + line) // 15)  # what does not fit beside its row would run over the next
        text = textwrap.fill(printable(text), 30, max_lines=lines, placeholder=" ...")
        pen.multiline_text((gap, top), text, INK, font)
        for c, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            left = margin + c * (side + gap)
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            pen.rectangle((left - 1, top - 1, left + side, top + side), outline=EDGE)
            paper.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top))
            pen.text((left, top + side + 1), label.text, label.colour, font)
            if label.framed:
                pen.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), outline=label.colour, width=3)
    return torch.from_numpy(np.array(paper)).permute(2, 0, 1)


def heat_map(picture: Tensor, weights: Tensor, side: int = 192, peak: float | None = None) -> Tensor:
    """Weights of the cells, half-transparent in colours from black over red to yellow, over a picture in grey.

    The colours are matplotlib's `inferno`, whose steps look equally large and stay in order without colour.

    Args:
        picture: uint8 `(3, H, W)`.
        weights: `(h, w)` >= 0, on any grid; each cell is drawn with its edges.
        side: height at which it is shown, pixels; nothing is smoothed.
        peak: the weight that is drawn brightest, so that several maps can share a scale; by default the largest.

    Returns:
        uint8 `(3, side, side * W / H)`.
    """
    from matplotlib import colormaps

    assert (weights >= 0).all()
    peak = weights.max().item() if peak is None else peak
    colours = torch.from_numpy(colormaps["inferno"]((weights / max(peak, 1e-12)).clamp(0, 1).double().cpu().numpy()))
    grey = picture.float().mean(0, keepdim=True).expand(3, -1, -1)
    size = side, round(side * picture.shape[2] / picture.shape[1])
    below, above = (
        torch.nn.functional.interpolate(layer[None], size, mode="nearest-exact")[0]
        for layer in (grey.cpu(), 255 * colours[..., :3].permute(2, 0, 1).float())
    )
    return (0.5 * below + 0.5 * above).round().to(torch.uint8)


def atlas(patches: Tensor, counts: Tensor, side: int = 24) -> Tensor:
    """The patch of each code, the most used first; codes that were never used are left out.

    Args:
        patches: `(K, 3, p, q)` in [0, 1].
        counts: `(K,)`.
        side: size at which each patch is shown, pixels.
    """
    order = most_used(counts, len(counts))
    shown = torch.nn.functional.interpolate(patches[order], (side, side), mode="nearest")
    return grid(to_uint8(shown), columns=32)


def labelled_atlas(patches: Tensor, counts: Tensor, count: int = 96, side: int = 72, title: str = "") -> Tensor:
    """The `count` most used codes as in `atlas`, 16 a row, with the code and its share of the cells under each."""
    order = most_used(counts, count)
    shares = counts[order] / counts.sum().clamp_min(1)
    labels = [Label(f"{code}  {share:.1%}") for code, share in zip(order.tolist(), shares.tolist(), strict=True)]
    shown, places = to_uint8(patches[order]), range(0, len(order), 16)
    return sheet([("", shown[k : k + 16], labels[k : k + 16]) for k in places], side, title)


def most_used(counts: Tensor, count: int) -> Tensor:
    """The `count` codes that were used most, the most used first, int64; those that were never used are left out."""
    return counts.argsort(descending=True, stable=True)[: min(count, int((counts > 0).sum()))]
