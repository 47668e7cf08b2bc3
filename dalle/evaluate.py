"""`dalle evaluate`: does it work, and is the ranking worth its cost? One protocol, written into its results.

For captions of known and of held-out compositions: the losses of both modalities; what stage 1 keeps of true pictures;
how many pictures show their captions, picked by chance, by each ranker out of 1, 2, 4, ... candidates, and by a perfect
one; the same for a sweep of guidance; how different candidates are; controls that must fail. Verdicts need a judge that
is not the model: scenes have an exact one, for other pictures `measure` takes one from Python (tests/benchmarks).

P prompts, N candidates of each.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from tqdm import tqdm

from dalle import pipeline, rerank
from dalle.candidates import Candidates, Judge, PixelScorer, Settings, Share, diversity, draw_and_judge, judge_scenes
from dalle.model import losses
from dalle.pairs import open_pairs
from dalle.pipeline import Pipeline
from dalle.sampling import Sampled, check_settings
from dvae import artefact, files, plots, seeds
from dvae.data import Source, check_names, check_outside, split
from dvae.errors import UserError
from dvae.evaluate import Moments, frechet_distance, precision_recall, psnr
from dvae.images import save, to_uint8
from dvae.inspect import load_features

SCENES = "scenes"  # the data whose judge is exact
FIRST = 1000  # of the scenes of a split that are reported; those before validate trainings and choose settings
SWEPT = (1.0, 1.5, 2.0, 3.0, 5.0)  # guidance
CONTROLLED = 100  # captions that the controls are made with, at the most
_TOGETHER = 32  # pictures in a pass


class Rows(NamedTuple):
    """Some rows of a data source: their captions and pictures are what is measured with."""

    source: Source
    rows: list[int]

    @property
    def captions(self) -> list[str]:
        return [self.source.captions(row)[0] for row in self.rows]

    def images(self, places: slice = slice(None)) -> Tensor:
        """float `(P, 3, H, W)` in [0, 1]."""
        return self.source.images(self.rows[places]).float() / 255


@dataclass(frozen=True)
class Protocol:
    """How it is measured.

    Args:
        prompts: captions of either kind.
        count: candidates of each; best-of-N is told for 1, 2, 4, ... up to it.
        swept: candidates of each for the sweep of guidance, 0 for none.
        seed: another one draws other pictures, of other captions but for scenes.
        settings: how candidates are drawn; the sweep takes its temperature.
    """

    prompts: int
    count: int
    swept: int
    seed: int
    settings: Settings


def evaluate(
    run: str,
    data: str,
    out: str = "evaluated",
    val: str | None = None,
    hold_out: str | None = None,
    val_share: float | None = None,
    prompts: PositiveInt = 400,
    count: PositiveInt = 16,
    swept: NonNegativeInt = 4,
    temperature: float = 1.0,
    guidance: float = 1.0,
    features: str | None = None,
    seed: int = 0,
    max_bad: float = 0.01,
) -> None:
    """Measure a trained transformer: losses, best-of-N of each ranker, a sweep of guidance, controls.

    Writes evaluated.json, and best-of-n.png and guidance.png where there is a judge.

    Args:
        run: run folder or artefact folder of stage 2.
        data: scenes, which have an exact judge, or the data source that it was trained on.
        out: folder to write, new or empty.
        val: the source of what is held out; null, like the next two: as `dalle prepare` was told.
        hold_out: a regular expression; the rows with a caption that it matches whole are held out.
        val_share: a share of the rows that is held out, chosen by a digest of the pictures' bytes.
        prompts: captions of either kind.
        count: candidates of each.
        swept: candidates of each caption at each scale of the sweep of guidance; 0 leaves it out.
        temperature: above 1 more varied, below 1 more careful.
        guidance: scale of classifier-free guidance; 1 is none.
        features: a program saved by torch.export (.pt2) that maps pictures (B, 3, H, W) in [0, 1] to features (B, D),
            for the Frechet distance, precision and recall.
        seed: another one draws other pictures.
        max_bad: share of rows that may be unusable.
    """
    folder = Path(out)
    check_names(data, val, hold_out)
    check_outside(out, data, val)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{out} is not empty", "choose another folder with --out, or remove that one")
    module = None if features is None else load_features(features)
    drawer = pipeline.load(run)
    check_settings(drawer.model, temperature, guidance=guidance)
    pipeline.warn_of_null(drawer, guidance, None)
    protocol = Protocol(prompts, count, swept, seed, Settings(temperature, guidance))
    parts = {"val": val, "hold_out": hold_out, "val_share": val_share}
    if data == SCENES:
        if any(part is not None for part in parts.values()):
            raise UserError("scenes have splits of their own", "leave --val, --hold_out and --val_share away")
        kinds, judge = scenes_rows(drawer, prompts), judge_scenes
    else:
        if not any(parts.values()):
            parts |= artefact.verify(drawer.source)["about"].get("split", {})
        kinds, judge = data_rows(drawer, data, parts, prompts, seed, max_bad), None
    found = {"protocol": {"data": data, "judge": "exact" if judge else None, **parts, **described(drawer, protocol)}}
    found |= measure(drawer, kinds, protocol, judge, features=module)
    if judge is not None:
        save(best_of_picture(found), folder / "best-of-n.png")
        if swept:
            save(guidance_picture(found), folder / "guidance.png")
    files.write_json(folder / "evaluated.json", found)
    print(table(found))
    print("wrote " + ", ".join(str(path) for path in sorted(folder.iterdir())))


# ------------------------------------------------------------------------------------------------- what is measured on


def scenes_rows(drawer: Pipeline, prompts: int) -> dict[str, Rows]:
    """Scenes of known compositions, and of those that no training shows."""
    size, rows = drawer.tokenizer.config.image_size, list(range(FIRST, FIRST + prompts))
    names = {"seen": "val", "held-out": "heldout"}
    return {kind: Rows(open_pairs(f"scenes:{name}:{FIRST + prompts}", size), rows) for kind, name in names.items()}


def data_rows(
    drawer: Pipeline, data: str, parts: Mapping[str, Any], prompts: int, seed: int, max_bad: float = 0.01
) -> dict[str, Rows]:
    """Rows of the training part and of the held-out part of a data source, chosen by chance."""
    size = drawer.tokenizer.config.image_size
    training = open_pairs(data, size, max_bad)
    if parts.get("val") is None:
        training, held = split(training, parts.get("val_share") or 0.05, parts.get("hold_out"))
    else:
        held = open_pairs(parts["val"], size, max_bad)
    chosen = {}
    for kind, part in (("seen", training), ("held-out", held)):
        order = seeds.rng("evaluate", seed, kind).random(len(part)).argsort()
        chosen[kind] = Rows(part, sorted(order[:prompts].tolist()))
    return chosen


def described(drawer: Pipeline, protocol: Protocol) -> dict[str, Any]:
    """Everything that a result depends on, as JSON values."""
    return {
        **asdict(protocol),
        "artefact": artefact.digest(drawer.source),
        "ranker": drawer.ranker,
        "weights": drawer.weights,
        "parameters": sum(parameter.numel() for parameter in drawer.model.parameters()),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version(),
                     "trainable-dalle": version("trainable-dalle")},
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- what is measured


@torch.inference_mode()
def measure(
    drawer: Pipeline,
    kinds: Mapping[str, Rows],
    protocol: Protocol,
    judge: Judge | None = None,
    pixel_scorers: Mapping[str, PixelScorer] | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """All numbers of a protocol, as JSON values, for each kind of rows.

    Args:
        judge: says whether pictures show their captions; without it there are no verdicts.
        pixel_scorers: rankers from outside the model, to compare with.
        features: maps pictures (B, 3, H, W) in [0, 1] to features (B, D).
    """
    found: dict[str, Any] = {"kinds": {}}
    names = rankers(drawer) if judge else [drawer.ranker]  # without verdicts no score can be compared
    for kind, rows in kinds.items():
        own = {"prompts": len(rows.rows), "losses": modality_losses(drawer, rows)}
        own["reconstructions"] = reconstructions(drawer, rows, judge)
        asked = protocol.count, protocol.settings, protocol.seed, judge, names
        drawn = _draw(drawer, rows, *asked, kind, pixel_scorers=pixel_scorers)
        own["diversity"] = diversity(drawn.images)
        if judge is not None:
            own["best_of"], own["gap"] = curves(drawn)
            own["controls"] = controls(drawer, Rows(rows.source, rows.rows[:CONTROLLED]), protocol, judge, names)
            own["chosen"] = choices(drawn, drawer.ranker)
        if features is not None:
            own |= likeness(drawn, drawer.ranker, rows, features)
        own["sweep"] = []
        for scale in SWEPT if protocol.swept else ():
            settings = Settings(protocol.settings.temperature, scale)
            asked = protocol.swept, settings, protocol.seed, judge, [drawer.ranker]
            some = _draw(drawer, rows, *asked, f"{kind}, guidance {scale}")
            line = {"guidance": scale, "diversity": diversity(some.images)}
            if judge is not None:
                line |= {"single": some.single.json(), "best": some.share(drawer.ranker).json()}
            own["sweep"].append(line)
        found["kinds"][kind] = own
    return found


def rankers(drawer: Pipeline) -> list[str]:
    """The scores that this model can be asked for, the default among them."""
    possible = []
    for name in rerank.NAMES:
        try:
            drawer.scorer(name)
        except UserError:  # it does not caption, or carries no captions
            continue
        if drawer.knows_null or name.removesuffix(rerank.SEEN) not in ("pmi", "half-pmi"):
            possible.append(name)
    return possible


def _draw(
    drawer: Pipeline,
    rows: Rows,
    count: int,
    settings: Settings,
    seed: int,
    judge: Judge | None,
    names: Sequence[str],
    said: str,
    **others: Any,
) -> Candidates:
    numbers = [seed * 1_000_000 + row for row in rows.rows]
    with tqdm(total=len(rows.rows), desc=f"drawing {said}", unit="prompt", leave=False, disable=None) as bar:
        told = {"progress": bar.update, "judge": judge or _nobody, **others}
        return draw_and_judge(drawer, rows.captions, count, numbers, settings, names, **told)


def _nobody(pictures: Tensor, captions: Sequence[str]) -> list[bool]:
    return [False] * len(captions)


def modality_losses(drawer: Pipeline, rows: Rows) -> dict[str, float]:
    """Nats per token: of texts and of pictures after their texts, and in the other order where the model has it."""
    sums: dict[str, float] = {}
    for first in range(0, len(rows.rows), _TOGETHER):
        some = slice(first, first + _TOGETHER)
        tokens, ids = drawer.tokenizer.encode(rows.images(some)), drawer.text.encode(rows.captions[some])
        keep = torch.ones(len(ids), dtype=torch.bool)
        both = {"text": False, "caption": True} if drawer.model.config.both_orders else {"text": False}
        for name, image_first in both.items():
            text, image = losses(drawer.model(ids, tokens, image_first=image_first), ids, tokens, keep)
            for key, value in ((name, text), ("picture" if image_first else "image", image)):
                sums[key] = sums.get(key, 0.0) + value.item() * len(ids)
    return {name: value / len(rows.rows) for name, value in sums.items()}


def reconstructions(drawer: Pipeline, rows: Rows, judge: Judge | None) -> dict[str, Any]:
    """What stage 1 keeps of the true pictures, the bound of everything after it: PSNR in dB, and how many still show
    their captions."""
    decibels, exact = 0.0, 0
    for first in range(0, len(rows.rows), _TOGETHER):
        some = slice(first, first + _TOGETHER)
        images = rows.images(some)
        decoded = to_uint8(drawer.tokenizer.decode(drawer.tokenizer.encode(images))).float() / 255
        decibels += psnr(decoded, images).sum().item()
        exact += sum(judge(decoded, rows.captions[some])) if judge else 0
    found: dict[str, Any] = {"psnr": decibels / len(rows.rows)}
    return found | ({"exact": Share(exact, len(rows.rows)).json()} if judge else {})


def curves(drawn: Candidates) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Best-of-N for N = 1, 2, 4, ...: by ranker and N; and the gap that each closes at the largest N, with its
    interval."""
    most = drawn.exact.shape[1]
    sizes = [2**k for k in range(most.bit_length()) if 2**k <= most]
    best = {"chance": {str(n): drawn.single.json() for n in sizes}}
    best |= {name: {str(n): drawn.share(name, n).json() for n in sizes} for name in drawn.scores}
    best["ceiling"] = {str(n): drawn.ceiling(n).json() for n in sizes}
    gaps = {name: drawn.gap(name, sizes[-1]) for name in drawn.scores if name != "none"}
    return best, {name: list(gap) for name, gap in gaps.items() if gap is not None}


def choices(drawn: Candidates, ranker: str) -> list[dict[str, Any]]:
    """For each prompt its caption, which candidate the default ranker chose, and whether it and how many are true."""
    best = drawn.best(ranker)
    return [
        {"caption": caption, "candidate": int(k), "true": bool(row[k]), "true_candidates": int(row.sum())}
        for caption, k, row in zip(drawn.captions, best, drawn.exact, strict=True)
    ]


def controls(drawer: Pipeline, rows: Rows, protocol: Protocol, judge: Judge, names: Sequence[str]) -> dict[str, Any]:
    """What must fail: rankers that are told another prompt's caption, and a blank picture among the candidates.

    Told another caption, a ranker knows no more of what the picture should show than chance, but for what it thinks of
    pictures in general; `wrong_caption` is the best of N that it then picks, beside `chance`. `blank_wins` is how often
    a picture of one flat colour would be picked over all candidates.
    """
    captions, settings = rows.captions, protocol.settings
    asked = protocol.count, settings, protocol.seed, judge, names
    drawn = _draw(drawer, rows, *asked, "for wrong captions", told=captions[1:] + captions[:1])
    wins = dict.fromkeys(names, 0)
    blanks = drawer.tokenizer.encode(flat_pictures(drawer.tokenizer.config.image_size))
    for caption, row in zip(captions, rows.rows, strict=True):
        ids = drawer.text.encode(caption)
        sampled = drawer.sample([caption], protocol.count, protocol.seed * 1_000_000 + row, **asdict(settings))
        both = Sampled(torch.cat([sampled.tokens, blanks]), None, None)
        evidence = drawer.evidence(ids, both)
        for name in names:
            scores = evidence.score(name)
            wins[name] += int(scores[protocol.count :].max() > scores[: protocol.count].max())
    return {
        "chance": drawn.single.json(),
        "wrong_caption": {name: drawn.share(name).json() for name in names},
        "blank_wins": {name: Share(count, len(captions)).json() for name, count in wins.items()},
    }


def flat_pictures(size: int) -> Tensor:
    """Pictures of one colour, float (5, 3, H, W): black, grey, white, a sandy one and a blue one."""
    colours = torch.tensor([[0, 0, 0], [0.5, 0.5, 0.5], [1, 1, 1], [0.8, 0.7, 0.55], [0.3, 0.5, 0.8]])
    return colours[:, :, None, None].expand(-1, -1, size, size).contiguous()


def likeness(drawn: Candidates, ranker: str, rows: Rows, features: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The chosen pictures against the true ones of the same captions, by features from outside: Frechet distance,
    precision and recall."""
    best = drawn.images[torch.arange(len(drawn.captions)), drawn.best(ranker)].float() / 255
    drawn_features = torch.cat([features(some) for some in best.split(_TOGETHER)])
    real = [features(rows.images(slice(k, k + _TOGETHER))) for k in range(0, len(rows.rows), _TOGETHER)]
    real_features = torch.cat(real)
    moments = Moments(real_features.shape[1]), Moments(real_features.shape[1])
    for one, vectors in zip(moments, (real_features, drawn_features), strict=True):
        one.add(vectors)
    precision, recall = precision_recall(real_features, drawn_features)
    return {"frechet": frechet_distance(*moments), "precision": precision, "recall": recall}


# ------------------------------------------------------------------------------------------------------- how it is told


def best_of_picture(found: Mapping[str, Any]) -> Tensor:
    """Best-of-N of each ranker with 95 % intervals, a panel for each kind of captions: uint8 `(3, H, W)`."""
    panels = {}
    for kind, own in found["kinds"].items():
        lines = {name: _line(by_n) for name, by_n in own["best_of"].items() if name != "none"}
        panels[f"{kind} compositions: pictures that show their caption"] = lines
    return plots.lines(panels, "best of N candidates", strong=found["protocol"]["ranker"], binary=True)


def guidance_picture(found: Mapping[str, Any]) -> Tensor:
    """Exactness and diversity over the scale of guidance, a panel for each: uint8 `(3, H, W)`."""
    shares, differences = {}, {}
    for kind, own in found["kinds"].items():
        scales = np.array([line["guidance"] for line in own["sweep"]])
        for name, label in (("single", "one sample"), ("best", f"best of {found['protocol']['swept']}")):
            shares[f"{kind}, {label}"] = _line({s: line[name] for s, line in zip(scales, own["sweep"], strict=True)})
        values = np.array([line["diversity"] for line in own["sweep"]])
        differences[kind] = plots.Line(scales, values, values, values)
    panels = {"pictures that show their caption": shares, "difference of candidates": differences}
    return plots.lines(panels, "guidance")


def _line(by_n: Mapping[Any, Mapping[str, float]]) -> plots.Line:
    columns = ([share[key] for share in by_n.values()] for key in ("value", "low", "high"))
    return plots.Line(np.array([float(n) for n in by_n]), *(np.array(column) for column in columns))


def table(found: Mapping[str, Any]) -> str:
    """The results for a terminal."""
    lines, ranker = [], found["protocol"]["ranker"]
    for kind, own in found["kinds"].items():
        losses_told = ", ".join(f"{name} {value:.3f}" for name, value in own["losses"].items())
        lines += ["", f"{kind}, {own['prompts']} captions", f"  losses, nats per token: {losses_told}"]
        kept = own["reconstructions"]
        exact = f", {_told(kept['exact'])} show their captions" if "exact" in kept else ""
        lines.append(f"  reconstructions: {kept['psnr']:.1f} dB{exact}")
        lines.append(f"  difference of candidates: {own['diversity']:.3f}")
        if "frechet" in own:
            named = ("frechet", "precision", "recall")
            lines.append("  chosen pictures: " + ", ".join(f"{name} {own[name]:.3f}" for name in named))
        for name, by_n in own.get("best_of", {}).items():
            value, low, high = (100 * end for end in own["gap"].get(name, (0, 0, 0)))
            closed = f"   gap closed {value:.0f} % [{low:.0f}, {high:.0f}]" if name in own["gap"] else ""
            mark = " *" if name == ranker else ""
            n, share = list(by_n.items())[-1]
            label = {"chance": "picked by chance", "ceiling": f"any of {n}"}.get(name, f"best of {n} by {name}{mark}")
            lines.append(f"  {label:<34}{_told(share)}{closed}")
        if "controls" in own:
            wrong, blank = (own["controls"][key][ranker] for key in ("wrong_caption", "blank_wins"))
            lines.append(f"  controls: told a wrong caption {_told(wrong)}, a blank picture wins {_told(blank)}")
    return "\n".join([*lines, "* the default of this model", ""])


def _told(share: Mapping[str, float]) -> str:
    return f"{100 * share['value']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
