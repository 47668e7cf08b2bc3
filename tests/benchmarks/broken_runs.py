"""Break small runs in fourteen ways and ask `dalle diagnose` which stage is at fault.

    python tests/benchmarks/broken_runs.py --seeds 1 2 --out runs/broken

trains for each seed both stages on 4,000 scenes, well and broken, then asks of each run; about 20 minutes a seed on one
core. The thresholds of dalle/diagnose.py were chosen with seed 0. Writes OUT/SEED/FAULT/diagnosis.md, and the table.
"""

import argparse
import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from dalle import pipeline
from dalle.diagnose import DATA, SAMPLING, STAGE_1, STAGE_2, diagnose
from dalle.model import DALLE
from dalle.prepare import prepare
from dalle.train import main as train_transformer
from dvae import seeds
from dvae.artefact import load as load_artefact
from dvae.data import open_source
from dvae.images import save
from dvae.train import LitDVAE
from dvae.train import main as train_tokenizer

PICTURES = 4000
STEPS_1, STEPS_2, FEW_STEPS_2 = 1500, 450, 150  # updates; the last of those whose stage 1 or data are broken already


def listing(folder: Path, name: str, pairs: list[tuple[str, str]]) -> str:
    with open(folder / f"{name}.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "text"), *pairs])
    return str(folder / f"{name}.csv")


def fit_tokenizer(run: Path, data: str, seed: int, steps: int, *more: str) -> str:
    schedule = ["--model.optimiser.learning_rate.steps", str(steps), "--model.temperature.steps", str(steps * 2 // 3)]
    schedule += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
    where = ["--data.source", data, "--data.val", "null", "--run", str(run), "--seed_everything", str(seed)]
    train_tokenizer(["fit", "--config", "dvae/demo", *where, *schedule, *QUIET, *more])
    return str(run)


def fit_transformer(run: Path, dvae: str, data: str, seed: int, steps: int, *more: str, length: int = 18) -> str:
    tokens = run.parent / f"{run.name}-tokens"
    prepare(data, dvae, out=str(tokens), size=512, length=length)
    schedule = ["--model.optimiser.learning_rate.steps", str(steps)]
    schedule += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
    where = ["--data.tokens", str(tokens), "--run", str(run), "--seed_everything", str(seed), "--model.prompts", "0"]
    train_transformer(["fit", "--config", "dalle/demo", *where, *schedule, *QUIET, *more])
    return str(run)


QUIET = ["--trainer.enable_progress_bar", "false"]


@contextlib.contextmanager
def wrong_range() -> Iterator[None]:
    """Pictures in [-1, 1], where the model takes them for [0, 1]."""
    right = LitDVAE.pictures
    with mock.patch.object(LitDVAE, "pictures", lambda self, batch: 2 * right(self, batch) - 1):
        yield


@contextlib.contextmanager
def position_mismatch() -> Iterator[None]:
    """Sampling looks up the position of the cell before the one that it draws."""
    right = DALLE.step

    def step(self, tokens, cell, cache):
        columns = self.config.grid[1]
        row, column = divmod(max(cell - 1, 0), columns)
        rows, held = self.row_position.weight, self.column_position.weight
        moved = rows.clone(), held.clone()
        moved[0][cell // columns], moved[1][cell % columns] = rows[row], held[column]
        with mock.patch.object(self.row_position, "weight", torch.nn.Parameter(moved[0], requires_grad=False)):
            with mock.patch.object(self.column_position, "weight", torch.nn.Parameter(moved[1], requires_grad=False)):
                return right(self, tokens, cell, cache)

    with mock.patch.object(DALLE, "step", step):
        yield


def with_other_tokenizer(run: Path, healthy: str, other: str) -> str:
    """The transformer of one run with the image tokenizer of another of the same shape."""
    drawer = pipeline.load(healthy)
    about = load_artefact(drawer.source, "dalle").about
    pipeline.save(run / "model", drawer.model, drawer.text, drawer.captions, Path(other) / "model", about)
    return str(run)


def cases(folder: Path, seed: int) -> Iterator[tuple[str, str | None, Callable[[str], None]]]:
    """(name, stage at fault or None, a function that writes the diagnosis to a folder), each trained when it comes."""
    source = open_source(f"scenes:train:{PICTURES}", 32, seed)
    pairs = []
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for index in range(PICTURES):
        save(source.image(index), folder / "pictures" / f"{index}.png")
        pairs.append((f"pictures/{index}.png", source.captions(index)[0]))
    data = listing(folder, "all", pairs)

    def ask(run: str, about: str = data, **settings) -> Callable[[str], None]:
        return lambda out: diagnose(run, about, out=out, **settings)

    dvae = fit_tokenizer(folder / "dvae", data, seed, STEPS_1)
    dalle = fit_transformer(folder / "dalle", dvae, data, seed, STEPS_2)
    yield "healthy", None, ask(dalle)
    yield "healthy, guidance 1.5, temperature 0.5", None, ask(dalle, guidance=1.5, temperature=0.5)

    order = seeds.rng("shuffled", seed).permutation(PICTURES)
    shuffled = listing(folder, "shuffled", [(image, pairs[k][1]) for (image, _), k in zip(pairs, order, strict=True)])
    run = fit_transformer(folder / "shuffled", dvae, shuffled, seed, FEW_STEPS_2)
    yield "shuffled captions", DATA, ask(run, shuffled)
    run = fit_transformer(folder / "truncated", dvae, data, seed, FEW_STEPS_2, length=5)
    yield "truncated captions", DATA, ask(run)
    tiny = listing(folder, "tiny", pairs[:40])
    run = fit_transformer(folder / "tiny", dvae, tiny, seed, FEW_STEPS_2)
    yield "tiny set", DATA, ask(run, tiny)

    off = ["--model.usage_weight.start", "-0.3", "--model.revival", "null"]  # few codes are rewarded, none revived
    broken = fit_tokenizer(folder / "dvae-collapsed", data, seed, 400, *off)
    run = fit_transformer(folder / "collapsed", broken, data, seed, FEW_STEPS_2)
    yield "collapsed codebook", STAGE_1, ask(run)
    broken = fit_tokenizer(folder / "dvae-undertrained", data, seed, 25, "--model.optimiser.ema", "null")
    run = fit_transformer(folder / "undertrained", broken, data, seed, FEW_STEPS_2)
    yield "undertrained tokenizer", STAGE_1, ask(run)
    with wrong_range():
        broken = fit_tokenizer(folder / "dvae-range", data, seed, 800)
    run = fit_transformer(folder / "range", broken, data, seed, FEW_STEPS_2)
    yield "wrong pixel range", STAGE_1, ask(run)

    run = fit_transformer(folder / "untrained", dvae, data, seed, 3, "--model.optimiser.ema", "null")
    yield "untrained transformer", STAGE_2, ask(run)
    some = listing(folder, "some", pairs[:300])
    wide = ["--model.width", "384", "--model.from_codes", "0", "--model.optimiser.weight_decay", "0"]
    run = fit_transformer(folder / "overfitted", dvae, some, seed, STEPS_2, *wide)
    yield "overfitted transformer", STAGE_2, ask(run, some)
    fast = ["--model.optimiser.learning_rate.start", "0.5", "--model.optimiser.clip", "null"]
    run = fit_transformer(folder / "fast", dvae, data, seed, FEW_STEPS_2, *fast)
    yield "learning rate too high", STAGE_2, ask(run)
    other = fit_tokenizer(folder / "dvae-other", data, seed + 1000, 400)
    yield "wrong tokenizer", STAGE_2, ask(with_other_tokenizer(folder / "swapped", dalle, other))

    yield "temperature too high", SAMPLING, ask(dalle, temperature=2.5)
    yield "top-k 1", SAMPLING, ask(dalle, top_k=1)
    yield "guidance far too high", SAMPLING, ask(dalle, guidance=15.0)
    with position_mismatch():
        yield "position mismatch", SAMPLING, ask(dalle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/broken"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in args.seeds:
        folder = args.out / str(seed)
        for name, stage, ask in silent(cases(folder, seed)):
            out = folder / "diagnoses" / name.replace(" ", "-")
            with contextlib.redirect_stdout(io.StringIO()):
                ask(str(out))
            found = json.loads((out / "diagnosis.json").read_text())
            faults = [f"{f['check']} ({f['found']})" for f in found["findings"] if f["verdict"] == "fault"]
            rows.append((seed, name, stage, found["first"]))
            right = "right" if found["first"] == stage else "WRONG"
            print(f"{right}  seed {seed}  {name}: {stage} / {found['first']}  {'; '.join(faults)}", flush=True)
    broken = [row for row in rows if row[2]]
    named = sum(stage == first for _, _, stage, first in broken)
    alarms = sum(first is not None for _, _, stage, first in rows if stage is None)
    print(f"{named} of {len(broken)} broken runs name the right stage")
    print(f"{alarms} of {len(rows) - len(broken)} healthy runs alarm")


def silent(steps: Iterator) -> Iterator:
    """The items of a generator that prints."""
    while True:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                step = next(steps)
            except StopIteration:
                return
        yield step


if __name__ == "__main__":
    main()
