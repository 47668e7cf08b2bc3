"""Drawn pictures beside the true ones and beside the nearest training pictures: learned, mixed or merely copied?

For captions of the training part and of the held-out part of a data source, the best of some candidates is drawn, and
every training picture is asked how far it is. Distance is the root mean square difference of two pictures, reduced to
16 x 16 pixels so that a shift by a pixel counts little; 0 is equal, 1 is black against white.

P captions, N candidates of each.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from tqdm import tqdm

from dalle import pipeline
from dalle.candidates import small
from dalle.pairs import open_pairs
from dvae import artefact, files, seeds
from dvae.data import Source, check_names, check_outside, split
from dvae.drawings import Label, sheet
from dvae.errors import UserError, warn
from dvae.images import save, to_uint8

_BATCH = 512


def compare(
    run: str,
    data: str,
    out: str = "compared",
    val: str | None = None,
    hold_out: str | None = None,
    val_share: float | None = None,
    count: PositiveInt = 30,
    candidates: PositiveInt = 16,
    temperature: float = 1.0,
    guidance: float = 1.0,
    rerank: str | None = None,
    seed: int = 0,
    max_bad: float = 0.01,
) -> None:
    """Draw known and held-out captions, each beside its true picture and the nearest picture of the training set.

    Writes seen.png, heldout.png and compared.json.

    Args:
        run: run folder or artefact folder of stage 2.
        data: the data source that it was trained on.
        out: folder to write, new or empty.
        val: the source of what is held out; null, like the next two: as `dalle prepare` was told.
        hold_out: a regular expression; the rows with a caption that it matches whole are held out.
        val_share: a share of the rows that is held out, chosen by a digest of the pictures' bytes.
        count: captions of either kind, chosen by chance.
        candidates: pictures drawn for each caption; the best one is compared.
        temperature: above 1 more varied, below 1 more careful.
        guidance: scale of classifier-free guidance; 1 is none.
        rerank: none, likelihood, pmi, half-pmi, contrast, caption, each but the first also as NAME-seen, or combined;
            null: combined where the model captions, half-pmi or likelihood elsewhere.
        seed: another one chooses other captions and draws other pictures.
        max_bad: share of rows that may be unusable.
    """
    check_names(data, val, hold_out)
    check_outside(out, data, val)
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{out} is not empty", "choose another folder with --out, or remove that one")
    drawer = pipeline.load(run)
    settings = {"temperature": temperature, "guidance": guidance, "rerank": drawer.ranker if rerank is None else rerank}
    pipeline.warn_of_null(drawer, guidance, rerank)
    size = drawer.tokenizer.config.image_size
    parts = {"val": val, "hold_out": hold_out, "val_share": val_share}
    if not any(parts.values()):
        parts |= artefact.verify(drawer.source)["about"].get("split", {})
    training = open_pairs(data, size, max_bad)
    if parts["val"] is None:
        training, held = split(training, parts["val_share"] or 0.05, parts["hold_out"])
    else:
        held = open_pairs(parts["val"], size, max_bad)
    warn_of_trained(drawer, held)
    report: dict[str, Any] = {"run": run, "data": data, **parts}
    report |= {"candidates": candidates, "seed": seed, **settings}
    for name, part in (("seen", training), ("heldout", held)):
        rows = sorted(seeds.rng("compare", seed, name).random(len(part)).argsort()[:count].tolist())
        captions = [part.captions(row)[0] for row in rows]
        drawn = draw(drawer, captions, candidates, seed, settings)
        own = part.images(rows)
        nearest, distance, ranks = measure(drawn, own, training)
        neighbours = [training.captions(row)[0] for row in nearest]
        with torch.inference_mode():
            reconstructed = to_uint8(drawer.tokenizer.decode(drawer.tokenizer.encode(own.float() / 255)))
        lines = []
        for k, caption in enumerate(captions):
            four = torch.stack([drawn[k], own[k], reconstructed[k], training.images([nearest[k]])[0]])
            labels = ["drawn", f"true: place {ranks[k]}", "reconstructed", f"nearest: {distance[k]:.2f}"]
            lines.append((f"{caption}  (nearest: {neighbours[k]})", four, [Label(text) for text in labels]))
        title = f"{name} captions; the nearest is the training picture most like the drawn one"
        save(sheet(lines, side=96, title=title), folder / f"{name}.png")
        report[name] = {
            "own_picture_first": sum(place == 1 for place in ranks) / len(ranks),
            "own_picture_in_first_ten": sum(place <= 10 for place in ranks) / len(ranks),
            "median_place_of_own_picture": float(np.median(ranks)),
            "nearest_has_the_caption": sum(map(str.__eq__, captions, neighbours)) / len(ranks),
            "median_distance_of_nearest": float(np.median(distance)),
            "rows": [
                {"caption": caption, "place": place, "nearest": training.key(row), "distance": round(far, 4)}
                for caption, place, row, far in zip(captions, ranks, nearest, distance, strict=True)
            ],
        }
    files.write_json(folder / "compared.json", report)
    for name in ("seen", "heldout"):
        said = report[name]
        print(
            f"{name}: of {len(said['rows'])} pictures {said['own_picture_first']:.0%} are more like the true one "
            f"than like any of {len(training):,} of training, {said['own_picture_in_first_ten']:.0%} more than like "
            f"the tenth nearest; the nearest has the same caption in {said['nearest_has_the_caption']:.0%}"
        )
    print("wrote " + ", ".join(str(folder / file) for file in ("seen.png", "heldout.png", "compared.json")))


def warn_of_trained(drawer: pipeline.Pipeline, held: Source) -> None:
    """The model carries a sample of its training captions: where captions tell pictures apart, none may be held out."""
    known = set(drawer.captions)
    if 2 * len(known) < len(drawer.captions):
        return
    trained = sum(not known.isdisjoint(held.captions(row)) for row in range(len(held)))
    if trained:
        warn(
            f"{trained} of the {len(held)} rows taken for held out have captions that this model was trained on",
            "give the --val, --hold_out or --val_share that dalle prepare was given",
        )


def draw(
    drawer: pipeline.Pipeline, captions: Sequence[str], candidates: int, seed: int, settings: dict[str, Any]
) -> Tensor:
    """The best of some candidates for each caption: uint8 `(P, 3, H, W)`."""
    numbered = enumerate(tqdm(captions, "drawing", unit="caption", leave=False, disable=None))
    each = [drawer(text, candidates, 1, seed * 1_000_000 + k, **settings)[0].image for k, text in numbered]
    return torch.stack(each)


def measure(drawn: Tensor, own: Tensor, training: Source) -> tuple[list[int], list[float], list[int]]:
    """For drawn pictures and the true ones of their captions, both uint8 `(P, 3, H, W)`.

    Returns:
        The row of the nearest training picture, its distance, and the place of the true one: 1 + the number of
        training pictures, none of them equal to it, that are nearer.
    """
    points = small(drawn)
    true = (points - small(own)).square().mean(1).sqrt()
    best, nearest = torch.full_like(true, torch.inf), torch.zeros(len(true), dtype=torch.int64)
    nearer = torch.zeros(len(true), dtype=torch.int64)
    for first in tqdm(range(0, len(training), _BATCH), "comparing", leave=False, disable=None):
        others = small(training.images(range(first, min(first + _BATCH, len(training)))))
        distance = torch.stack([(others - point).square().mean(1).sqrt() for point in points])  # (P, B)
        least, place = distance.min(1)
        nearest = torch.where(least < best, place + first, nearest)
        best = torch.minimum(best, least)
        nearer += (distance < true[:, None] - 1e-6).sum(1)
    return nearest.tolist(), best.tolist(), (nearer + 1).tolist()
