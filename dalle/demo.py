"""`dalle demo`: from nothing to ranked pictures in minutes, on drawn scenes, with every number judged.

Trains both stages with shipped recipes (configs/dvae/demo.yaml and configs/dalle/demo.yaml, or scenes.yaml of each),
chooses guidance, temperature and ranker on captions that are never reported, then draws 16 candidates for each of 400
captions of known compositions and 400 of compositions that neither stage has ever seen. With `captions` the transformer
reads both ways, for more updates, and the weights of its ranker are fitted.
"""

import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import yaml
from tqdm import tqdm

from dalle import pipeline
from dalle.candidates import Candidates, Settings, Share, draw_and_judge, fit
from dalle.prepare import Prepared, prepare, vocab
from dalle.rerank import COMBINED
from dvae import artefact, codebook, files, scenes
from dvae.commands import find_config
from dvae.data import open_source
from dvae.drawings import BAD, GOOD, Label, sheet
from dvae.errors import UserError
from dvae.images import save

DRAWN = {"demo": 20_000, "scenes": 40_000}  # scenes that a recipe trains on
CANDIDATES = 16
REPORTED = 400  # captions of each kind
CHOSEN_ON = 200  # further captions, half of each kind, for guidance, temperature and ranker
RANKERS = ("likelihood", "pmi", "half-pmi", "contrast")
OF_CAPTIONS = ("caption", "caption-seen", COMBINED)  # rankers that read the picture first
FITTED = ("likelihood", "half-pmi", "caption")  # the scores that `combined` weighs then
# reading both ways: the share of the batches that read the picture first, and how many times as many updates it takes
BOTH = {"demo": (1 / 3, 2), "scenes": (1 / 4, 4 / 3)}
TRIED = (Settings(), *(Settings(temperature, guidance) for temperature, guidance in product((0.5, 0.7), (1.5, 2.5))))
TRIED_CANDIDATES = 8  # enough to choose by, at half the cost
FIRST_REPORTED, FIRST_CHOSEN_ON = 1000, 500  # indices in each split; the first 500 of val validate the trainings


def demo(
    out: str = "runs/demo",
    seed: int = 0,
    quick: bool = False,
    recipe: Literal["demo", "scenes"] = "demo",
    captions: bool = False,
) -> None:
    """Train both stages on drawn scenes, from nothing to ranked pictures, and say how many are true.

    Args:
        out: folder for everything that is made; it must not hold a demo yet.
        seed: of the whole demo.
        quick: a minute's run that shows every step but learns little.
        recipe: the shipped configs to train by: those of the demo (32 px, minutes), or of the scenes (64 px, longer).
        captions: let a third (scenes: a quarter) of the batches read the picture before its words, and train longer:
            the model captions too, and ranks by it.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{out} is not empty", "choose another folder with --out, or remove that one")
    clock: dict[str, float] = {}
    with timed(clock, "total"):
        train(folder, seed, quick, recipe, captions, clock)
        report = measure(folder, seed, quick, clock)
    report["seconds"] = {step: round(seconds, 1) for step, seconds in clock.items()}
    files.write_json(folder / "report.json", report)
    print(table(report))
    chosen = report["chosen"]
    print(f"wrote {folder / 'samples.png'}, {folder / 'report.json'}")
    print(
        f'try: dalle sample {folder / "dalle"} "a red circle above a small blue square" '
        f"--guidance {chosen['guidance']} --temperature {chosen['temperature']} --rerank {chosen['ranker']}"
    )


def train(folder: Path, seed: int, quick: bool, recipe: str, captions: bool, clock: dict[str, float]) -> None:
    from dalle.train import main as train_transformer
    from dvae.train import main as train_tokenizer

    words, tokens = folder / "text.json", folder / "tokens"
    scenes_drawn = f"scenes:train:{2000 if quick else DRAWN[recipe]}"
    short = ["--trainer.max_steps=60", "--trainer.val_check_interval=60"]
    short += ["--model.optimiser.ema=null", "--model.optimiser.learning_rate.warmup=10"]  # too few updates to average
    common = ["--seed_everything", str(seed), *(short if quick else [])]
    print("1/4 training the image tokenizer")
    with timed(clock, "stage 1"):
        source = ["--data.source", scenes_drawn]
        train_tokenizer(["fit", "--config", f"dvae/{recipe}", "--run", str(folder / "dvae"), *source, *common])
    print("2/4 pictures to tokens")
    with timed(clock, "tokens"):
        vocab(scenes_drawn, str(words), size=512, length=18)
        prepare(scenes_drawn, str(folder / "dvae"), str(words), str(tokens), val="scenes:val:500")
    print("3/4 training the transformer")
    with timed(clock, "stage 2"):
        where = ["--run", str(folder / "dalle"), "--data.tokens", str(tokens)]
        both = both_orders(recipe) if captions else []
        train_transformer(["fit", "--config", f"dalle/{recipe}", *where, *both, *common])


def both_orders(recipe: str) -> list[str]:
    """The settings that make a recipe read both ways."""
    config = yaml.safe_load(find_config(f"dalle/{recipe}").read_text(encoding="utf-8"))
    rate, trainer, (share, longer) = config["model"]["optimiser"]["learning_rate"], config["trainer"], BOTH[recipe]
    interval = math.ceil(longer * trainer["val_check_interval"])
    updates = trainer["max_steps"] // trainer["val_check_interval"] * interval
    return [
        f"--model.image_first.share={share}",
        f"--model.optimiser.learning_rate.steps={updates - rate['warmup']}",
        f"--trainer.max_steps={updates}",
        f"--trainer.val_check_interval={interval}",
    ]


def measure(folder: Path, seed: int, quick: bool, clock: dict[str, float]) -> dict:
    print("4/4 drawing, ranking and judging")
    drawer = pipeline.load(folder / "dalle")
    reported, chosen_on = (16, 8) if quick else (REPORTED, CHOSEN_ON)

    def draw(
        split: str, first: int, count: int, candidates: int, settings: Settings, names: Sequence[str]
    ) -> Candidates:
        captions = [scenes.captions(split, index)[0] for index in range(first, first + count)]
        seeds = [seed * 1_000_000 + index for index in range(first, first + count)]
        with tqdm(total=count, desc=f"drawing {split}", unit="prompt", leave=False, disable=None) as bar:
            return draw_and_judge(drawer, captions, candidates, seeds, settings, names, bar.update)

    with timed(clock, "reconstructions"):
        known = reconstructions(drawer, "val", reported)
        unknown = reconstructions(drawer, "heldout", reported)
    names = (*RANKERS, *(OF_CAPTIONS if drawer.model.config.both_orders else ()))
    with timed(clock, "choosing"):
        parts, each = ("val", "heldout"), chosen_on // 2
        drawn = {
            settings: [draw(part, FIRST_CHOSEN_ON, each, TRIED_CANDIDATES, settings, names) for part in parts]
            for settings in TRIED
        }
        if drawer.model.config.both_orders:
            judged = [candidates for both in drawn.values() for candidates in both]
            weights = fit(judged, FITTED)  # the same for all settings, for a user may draw with others
            if weights is not None:
                for candidates in judged:
                    candidates.scores[COMBINED] = sum(w * candidates.scores[name] for name, w in weights.items())
                drawer = with_weights(folder / "dalle" / "model", drawer, weights)
        options = []
        for settings, both in drawn.items():
            for ranker in both[0].scores:
                shares = [candidates.share(ranker).value for candidates in both]
                options.append((sum(shares), settings, ranker, *shares))
        _, settings, ranker, *_ = max(options, key=lambda option: option[0])
    with timed(clock, "judging"):
        results = {
            "seen": draw("val", FIRST_REPORTED, reported, CANDIDATES, settings, names),
            "held-out": draw("heldout", FIRST_REPORTED, reported, CANDIDATES, settings, names),
        }
    picture(folder / "samples.png", results, ranker)
    return {
        "chosen": {**asdict(settings), "ranker": ranker},
        "weights": drawer.weights,
        "tried": [
            {**asdict(tried), "ranker": name, "seen": known_share, "held-out": unknown_share}
            for _, tried, name, known_share, unknown_share in options
        ],
        "gap closed": {kind: candidates.gap(ranker) for kind, candidates in results.items()},
        "reconstructions": {"seen": known.json(), "held-out": unknown.json()},
        "codebook": codes(folder, drawer.tokenizer.config.image_size),
        "captions": {name: exactness(candidates) for name, candidates in results.items()},
        "seed": seed,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "lightning": version("lightning"),
            "python": platform.python_version(),
        },
    }


def with_weights(folder: Path, drawer: pipeline.Pipeline, weights: dict[str, float]) -> pipeline.Pipeline:
    """The model with these weights for its ranker, and its artefact in `folder` written again with them."""
    found = artefact.load(folder, pipeline.KIND)
    pipeline.save(folder, drawer.model, drawer.text, drawer.captions, found.parts["dvae"], found.about, weights)
    return pipeline.load(folder)


def exactness(candidates: Candidates) -> dict[str, dict[str, float]]:
    best = {f"best of {CANDIDATES} by {name}": candidates.share(name).json() for name in candidates.scores}
    return {"single sample": candidates.single.json(), **best, "ceiling": candidates.ceiling().json()}


@torch.inference_mode()
def reconstructions(drawer: pipeline.Pipeline, split: str, count: int) -> Share:
    """How many true pictures still show their caption after encode and decode."""
    rows = range(FIRST_REPORTED, FIRST_REPORTED + count)
    images = scenes.draw([scenes.scene(split, row) for row in rows], drawer.tokenizer.config.image_size)
    decoded = drawer.tokenizer.decode(drawer.tokenizer.encode(images.float() / 255))
    verdicts = scenes.judge(decoded, [scenes.captions(split, row)[0] for row in rows])
    return Share(sum(v.exact for v in verdicts), count)


def codes(folder: Path, size: int) -> dict[str, float]:
    """Use of the codebook over the training pictures, beside the bound that flat background cells allow."""
    prepared = Prepared(folder / "tokens")
    seen = codebook.usage(prepared.train.tokens(range(len(prepared.train))), prepared.sizes.vocab_image)
    source = open_source("scenes:train:2000", size)
    flat = codebook.flat_share(source.images(range(2000)).float() / 255, prepared.sizes.grid)
    bound = codebook.perplexity_bound(flat, len(scenes.BACKGROUNDS), prepared.sizes.vocab_image)
    return {
        "codes": prepared.sizes.vocab_image,
        "tokens_per_code": seen.counts.sum().item() / prepared.sizes.vocab_image,
        "used": seen.used,
        "perplexity": seen.perplexity,
        "perplexity_bound": bound,
        "flat_share": flat,
    }


def picture(path: Path, results: dict[str, Candidates], ranker: str) -> None:
    """Four prompts of each kind, all candidates, the chosen one framed, the judge's verdict under each."""
    rows = []
    for name, candidates in results.items():
        best = candidates.best(ranker)
        for prompt in range(min(4, len(candidates.captions))):
            labels = []
            for k in range(CANDIDATES):
                true, chosen = bool(candidates.exact[prompt, k]), k == int(best[prompt])
                labels.append(Label("true" if true else "false", GOOD if true else BAD, framed=chosen))
            rows.append((f"{name}: {candidates.captions[prompt]}", candidates.images[prompt], labels))
    save(sheet(rows, side=64, title=f"the candidate chosen by {ranker} is framed; green: shows its caption"), path)


def table(report: dict) -> str:
    """The report for a terminal."""

    def share(row: dict[str, float]) -> str:
        return f"{100 * row['value']:5.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"

    chosen, code = report["chosen"], report["codebook"]
    said = ", ".join(f"{name} {weight:.3g}" for name, weight in (report["weights"] or {}).items())
    gaps = [f"{100 * gap[0]:.0f} % ({kind})" for kind, gap in report["gap closed"].items() if gap]
    lines = ["", f"{'exact pictures, with 95 % intervals':<38}{'seen':<24}held-out compositions"]
    seen, held = report["reconstructions"]["seen"], report["reconstructions"]["held-out"]
    lines.append(f"{'reconstructions (stage 1)':<38}{share(seen):<24}{share(held)}")
    for name, row in report["captions"]["seen"].items():
        mark = " *" if name.endswith(f"by {chosen['ranker']}") else ""
        lines.append(f"{name + mark:<38}{share(row):<24}{share(report['captions']['held-out'][name])}")
    lines += [
        f"* chosen on other captions, with guidance {chosen['guidance']} and temperature {chosen['temperature']}"
        + f"; combined is {said}" * bool(said),
        f"ranking closes {' and '.join(gaps) or 'nothing'} of the gap between a single sample and the ceiling",
        "",
        f"codebook: {100 * code['used']:.1f} % of {code['codes']} codes in use over {code['tokens_per_code']:.0f} "
        f"tokens per code, perplexity {code['perplexity']:.0f}; {code['perplexity_bound']:.0f} is the most if each "
        f"background has one code for its flat cells, which are {100 * code['flat_share']:.0f} % of all",
        "seconds: " + ", ".join(f"{step} {seconds:.0f}" for step, seconds in report["seconds"].items()),
    ]
    return "\n".join(lines)


@contextmanager
def timed(clock: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    clock[step] = time.perf_counter() - start
