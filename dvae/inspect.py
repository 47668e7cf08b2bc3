"""The commands that look into a tokenizer, `dvae reconstruct | codebook | evaluate`: numbers as JSON, pictures as PNG.

Data is read batch by batch; memory does not grow with it. Needs no training.
"""

import logging
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from tqdm import tqdm

from dvae import codebook as codes
from dvae import drawings, files
from dvae.data import Source, check_outside, check_share, open_source
from dvae.drawings import Label, sheet
from dvae.errors import UserError, warn
from dvae.evaluate import CHANNELS, psnr
from dvae.evaluate import evaluate as measure
from dvae.images import grid, save, to_uint8
from dvae.plots import cell_map, usage_picture
from dvae.tokenizer import ImageTokenizer, load

SHOWN = 12  # codes or pictures that are drawn large
CONTEXTS = 256  # pictures of which the tokens are kept, to exchange codes in them
_MOST_LOGITS = 1 << 24  # of one batch; 64 MiB, and three times that for one-hot codes
_TRIED = 32  # codes near a code, and as many from anywhere, that are put in its place


def reconstruct(run: str, images: str, out: str = "out", count: PositiveInt = 32) -> None:
    """Encode pictures, decode them, and write a grid: each original beside its reconstruction.

    Args:
        run: a run folder or an artefact folder of stage 1.
        images: any data source: scenes:val, a folder, a listing, tars, Parquet files, a Hub data set.
        out: folder to write reconstructions.png and reconstructions.json to.
        count: how many pictures, evenly spread over the source.
    """
    model, source = _open(run, images, out)
    rows, pairs, decibels = _rows(source, count), [], []
    for originals in batches(model, source, rows, "reconstructing"):
        with torch.inference_mode():
            decoded = model.decode(model.encode(originals))
        pairs.append(to_uint8(torch.stack([originals, decoded], 1).flatten(0, 1)))
        decibels += psnr(decoded, originals).tolist()
    save(grid(torch.cat(pairs), columns=8), Path(out) / "reconstructions.png")
    mean = sum(decibels) / len(decibels)
    named = [{"key": source.key(row), "psnr": db} for row, db in zip(rows, decibels, strict=True)]
    files.write_json(Path(out) / "reconstructions.json", {"psnr": mean, "pictures": named})
    print(f"PSNR {mean:.2f} dB over {len(rows)} pictures; pairs of original and reconstruction")
    _wrote(out, "reconstructions.png", "reconstructions.json")


def codebook(run: str, data: str, out: str = "out", count: PositiveInt | None = None) -> None:
    """Count the codes over a data source and draw what each one paints, stands for and could be exchanged with.

    Args:
        run: a run folder or an artefact folder of stage 1.
        data: any data source: scenes:val, a folder, a listing, tars, Parquet files, a Hub data set.
        out: folder to write codebook.json and the pictures to: usage.png (how often each code is used), cells.png (how
            varied each cell of the grid is), atlas.png and alone.png (every code in use, the most used first: its mean
            patch in reconstructions, and painted with only itself around, on 8 x 8 cells where the grid is larger),
            most_used.png (the first of these with their numbers) and codes.png (some codes from all sides).
        count: how many pictures are looked at, evenly spread over the source; null: all.
    """
    model, source = _open(run, data, out)
    rows = _rows(source, count)
    seen = codes.observe(model, batches(model, source, rows, "reading pictures"))
    counts, usage, by_cell = seen.usage.counts, seen.usage, codes.perplexity(seen.counts)
    contexts = batches(model, source, [rows[k] for k in codes.spread(len(rows), CONTEXTS)], "reading contexts")
    with torch.inference_mode():
        tokens = torch.cat([model.encode(images) for images in contexts])
    examples = list(_examples(model, tokens))
    alone, folder = _alone(model, counts, examples), Path(out)
    drawn = {
        "usage.png": usage_picture(counts),
        "cells.png": cell_map(by_cell, "How varied is each cell?", "perplexity of its codes"),
        "atlas.png": drawings.atlas(seen.painted, counts),
        "alone.png": drawings.atlas(alone, counts),
        "most_used.png": drawings.labelled_atlas(seen.painted, counts, title="code, and its share of all cells"),
        "codes.png": _from_all_sides(seen, alone, codes.grid_alone(model), examples),
    }
    for name, picture in drawn.items():
        save(picture, folder / name)
    numbers = {
        "codes": model.vocab_size,
        "pictures": len(rows),
        "tokens_per_code": counts.sum().item() / model.vocab_size,
        "used": usage.used,
        "perplexity": usage.perplexity,
        "perplexity_of_cells": by_cell.tolist(),
        "dead": usage.dead.tolist(),
        "counts": counts.tolist(),
        "examples": examples,
    }
    files.write_json(folder / "codebook.json", numbers)
    print(f"{usage.used:.1%} of {model.vocab_size} codes in use over {len(rows)} pictures")
    print(f"perplexity {usage.perplexity:.1f}; {numbers['tokens_per_code']:.1f} tokens per code")
    if numbers["tokens_per_code"] < 4:
        warn(
            f"{counts.sum().item():,} cells cannot show the use of {model.vocab_size:,} codes",
            "give more pictures before you judge it",
        )
    _wrote(out, *drawn, "codebook.json")


def evaluate(
    run: str, data: str, out: str = "out", count: PositiveInt | None = None, features: str | None = None
) -> None:
    """Measure what reconstructions lose: PSNR, SSIM, error per channel, the worst pictures, Frechet distance.

    Args:
        run: a run folder or an artefact folder of stage 1.
        data: any data source: scenes:val, a folder, a listing, tars, Parquet files, a Hub data set.
        out: folder to write evaluation.json and worst.png to.
        count: how many pictures are measured, evenly spread over the source; null: all.
        features: a program saved by torch.export (.pt2) that maps pictures (B, 3, H, W) in [0, 1] to features (B, D),
            for the Frechet distance. Such a file is code: load only what you made or trust.
    """
    judge = None if features is None else load_features(features)
    model, source = _open(run, data, out)
    rows = _rows(source, count)
    found = measure(model, batches(model, source, rows, "measuring"), judge, worst=SHOWN)
    worst = [rows[each["picture"]] for each in found["worst"]]
    for each, row in zip(found["worst"], worst, strict=True):
        each.update(picture=row, key=source.key(row))
    save(_worst(model, source.images(worst).float() / 255, found["worst"]), Path(out) / "worst.png")
    files.write_json(Path(out) / "evaluation.json", found)
    print(f"{found['pictures']} pictures")
    print(f"PSNR {found['psnr']:.2f} dB")
    print("SSIM not measured: it needs 11 pixels a side" if found["ssim"] is None else f"SSIM {found['ssim']:.4f}")
    for name in CHANNELS:
        channel = found["channels"][name]
        print(f"{name:<5} error {255 * channel['error']:.2f}, bias {255 * channel['bias']:+.2f} of 255")
    print(f"{found['used']:.1%} of {model.vocab_size} codes in use, perplexity {found['perplexity']:.1f}")
    if found["frechet"] is None:
        print("Frechet distance not measured: it needs --features, a module that did not learn from these codes")
    else:
        print(f"Frechet distance {found['frechet']:.4f} of {found['features']} features")
        if found["pictures"] <= found["features"]:
            warn(
                f"the Frechet distance comes out too large: {found['pictures']} pictures, {found['features']} features",
                f"compare it with that of as many pictures only, or give more than {found['features']}",
            )
    _wrote(out, "worst.png", "evaluation.json")


# ------------------------------------------------------------------------------------------------------ reading


def _open(run: str, data: str, out: str) -> tuple[ImageTokenizer, Source]:
    check_outside(out, data)
    model = load(run)
    source = open_source(data, model.config.image_size)
    check_share(source, max_bad=1)
    return model, source


def _rows(source: Source, count: int | None) -> list[int]:
    return codes.spread(len(source), len(source) if count is None else count).tolist()


def most(model: ImageTokenizer) -> int:
    """How many pictures have logits of a size that is no burden, at most 64."""
    h, w = model.grid
    return max(1, min(64, _MOST_LOGITS // (model.vocab_size * h * w)))


def batches(model: ImageTokenizer, source: Source, rows: list[int], what: str) -> Iterator[Tensor]:
    """These rows of a source as pictures `(B, 3, H, W)` in [0, 1], with a bar of progress on stderr."""
    size = most(model)
    with tqdm(total=len(rows), desc=what, unit="", leave=False, disable=None) as bar:
        for start in range(0, len(rows), size):
            images = source.images(rows[start : start + size]).float() / 255
            yield images
            bar.update(len(images))


def load_features(path: str) -> Callable[[Tensor], Tensor]:
    """The program in a .pt2 file, as pictures `(B, 3, H, W)` in [0, 1] -> features `(B, D)`.

    Security: a file of torch.export is code of its author; nothing is done to confine it.

    Raises:
        UserError: it cannot be loaded, or (when it is called) it does not give finite features of such pictures.
    """
    hint = "save one by torch.export.save, exported with a batch of any size: dynamic_shapes=({0: Dim.DYNAMIC},)"
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}", "--features wants a program saved by torch.export")
    log = logging.getLogger("torch.export")
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is no program of torch.export", hint)
        log.disabled = True  # it prints the traceback that is told in a line below
        program = torch.export.load(path).module()
    except UserError:
        raise
    except Exception as error:  # of a foreign archive it raises anything
        raise UserError(f"{path} is no program of torch.export: {_line(error)}", hint) from error
    finally:
        log.disabled = False

    def features(images: Tensor) -> Tensor:
        try:
            found = program(images)
        except Exception as error:  # whatever the program may raise
            raise UserError(f"{path} fails on pictures {tuple(images.shape)}: {_line(error)}", hint) from error
        if not (isinstance(found, Tensor) and found.ndim == 2 and len(found) == len(images)):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"{path} gives {shape} for {len(images)} pictures", "it must give features (B, D)")
        if not found.isfinite().all():
            raise UserError(f"{path} gives features that are not finite", "let it map pictures in [0, 1]")
        return found

    return features


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ------------------------------------------------------------------------------------------------------ drawing


def _examples(model: ImageTokenizer, tokens: Tensor) -> Iterator[dict[str, Any]]:
    """Some codes of the tokens, from often to seldom used, with their neighbours in code space and by swap effect."""
    used = drawings.most_used(codes.usage(tokens, model.vocab_size).counts, model.vocab_size)
    chosen = used[codes.spread(len(used), SHOWN)]
    near = codes.neighbours(model, chosen, _TRIED).codes
    anywhere = codes.spread(model.vocab_size, _TRIED)
    shown = tqdm(chosen.tolist(), desc="exchanging codes", unit="", leave=False, disable=None)
    for code, nearest in zip(shown, near, strict=True):
        others = torch.cat([nearest, anywhere]).unique()
        others = others[others != code]
        effect = codes.swap_effect(model, tokens, code, others, batch=most(model))
        order = effect.argsort()[:4]
        yield {
            "code": code,
            "in_code_space": nearest[:4].tolist(),
            "by_swap": others[order].tolist(),
            "swap_effect": effect[order].tolist(),
        }


def _alone(model: ImageTokenizer, counts: Tensor, examples: list[dict[str, Any]]) -> Tensor:
    """`(K, 3, p, q)`: what codes in use and the neighbours of some paint alone; 0 elsewhere."""
    near = {code for example in examples for code in example["in_code_space"] + example["by_swap"]}
    shown = torch.tensor(sorted(near | set(drawings.most_used(counts, len(counts)).tolist())))
    parts = tqdm(shown.split(16), desc="painting codes", unit="16", leave=False, disable=None)
    painted = torch.cat([codes.painted_alone(model, some) for some in parts])
    return painted.new_zeros(len(counts), *painted.shape[1:]).index_copy_(0, shown, painted)


def _from_all_sides(
    seen: codes.Observed, alone: Tensor, grid_alone: tuple[int, int], examples: list[dict[str, Any]]
) -> Tensor:
    """A row a code: what stands under it in the data, what it paints, and its neighbours."""
    rows, share = [], seen.usage.counts / seen.usage.counts.sum()
    for example in examples:
        code = example["code"]
        sure = seen.probability[code] > 0
        patches = [seen.data[code], seen.painted[code], alone[code], *seen.typical[code][sure]]
        labels = ["mean patch", "in context", "alone", *(f"typical {p:.2f}" for p in seen.probability[code][sure])]
        for name, kind in (("near", "in_code_space"), ("swap", "by_swap")):
            patches += [alone[other] for other in example[kind]]
            labels += [f"{name} {other}" for other in example[kind]]
        text = f"code {code}: {share[code]:.2%} of all cells"
        rows.append((text, to_uint8(torch.stack(patches)), [Label(label) for label in labels]))
    near = "near: nearest in code space; swap: exchanged for it, the picture changes least (both painted alone)"
    painted = f"alone: {grid_alone[0]} x {grid_alone[1]} cells of it"
    return sheet(rows, side=72, title=f"{painted}; typical: patches of the data that the encoder is surest of; {near}")


def _worst(model: ImageTokenizer, originals: Tensor, found: list[dict[str, Any]]) -> Tensor:
    """A row a picture: original, reconstruction, and where they differ."""
    with torch.inference_mode():
        decoded = torch.cat([model.decode(model.encode(image[None])) for image in originals])
    differ = (decoded - originals).abs().mean(1)
    side = max(128, originals.shape[-1])
    rows = []
    for original, picture, error, each in zip(to_uint8(originals), to_uint8(decoded), differ, found, strict=True):
        maps = drawings.heat_map(original, error, side, peak=0.5)
        enlarged = torch.nn.functional.interpolate(torch.stack([original, picture]), (side, side), mode="nearest-exact")
        labels = [Label("original"), Label(f"{each['psnr']:.2f} dB"), Label("error, 0 to 0.5")]
        rows.append((each["key"], torch.cat([enlarged, maps[None]]), labels))
    return sheet(rows, side, title="The worst reconstructions")


def _wrote(out: str, *names: str) -> None:
    for name in names:
        print(f"wrote {Path(out) / name}")
