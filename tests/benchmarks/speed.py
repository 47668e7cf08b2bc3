"""How fast this CPU draws and trains, beside transformers' GPT-2, a plain loop and what the machine could do.

    python tests/benchmarks/speed.py --out speed                                   # S and M, everything
    python tests/benchmarks/speed.py --parts sampling --shapes M --batches 16      # one part of it

Weights are random, see contestants.py. What is compared takes turns in one process, after a round to warm up. Told are
medians, and under "/ NAME" how many times as long each took as NAME in the same round: the median of these ratios, with
the least and the largest. All times are wall times: nothing else should run. GPT-2 needs transformers (pip install
"transformers>=5,<6"), and memory needs Linux. OUT/speed.json holds everything with all single times, OUT/speed.png the
sampling.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from contestants import (
    CONTESTANTS,
    FORMULAS,
    PRECISIONS,
    SHAPES,
    Contestant,
    Shape,
    drawing_bound,
    rates,
    seconds,
    training_bound,
)
from torch import Tensor

from dalle.layout import KINDS, Layout
from dalle.model import DALLE, KVCache
from dalle.packing import packed
from dalle.pairs import open_pairs
from dalle.prepare import prepare
from dvae import plots
from dvae.errors import report
from dvae.files import write_json
from dvae.images import save
from dvae.lit import Optimiser, versions
from dvae.model import DVAE, DVAEConfig
from dvae.schedules import Schedule
from dvae.train import LitDVAE

ROOT = Path(__file__).resolve().parent.parent.parent
BATCH = 16  # pictures at a time where only one number of them is measured
SIDES, TEXT = (8, 16, 32), 256  # of the grids on which attention patterns are compared, and text ids before them
STEPS = 16  # cells, evenly spaced over the grid, at which decode steps are measured
SCENES, PICTURES = "scenes:train:2000", 2000

# ----------------------------------------------------------------------------------------------------------- measuring


def check(names: Sequence[str]) -> None:
    """That each contestant draws one token for every cell of every picture."""
    shape = SHAPES["tiny"]
    for name in names:
        drawn = CONTESTANTS[name](shape).draw(shape.texts(3))
        assert drawn.shape == (3, shape.cells), f"{name} drew {tuple(drawn.shape)}"


def attention_seconds(model: DALLE, work: Callable[[], object]) -> float:
    """What a work spends inside the attentions of a model, their projections left out: storing and reading K/V."""
    spent, hooks = 0.0, []

    def clock(sign: int) -> Callable[..., None]:
        def add(*_: Any) -> None:
            nonlocal spent
            spent += sign * time.perf_counter()

        return add

    for attention in (block.attention for block in model.blocks):
        for module, sign in ((attention, 1), (attention.qkv, -1), (attention.out, -1)):
            hooks += [module.register_forward_pre_hook(clock(-sign)), module.register_forward_hook(clock(sign))]
    work()
    for hook in hooks:
        hook.remove()
    return spent


def interleaved(measures: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """What each measure gives in every round in which all take turns; a round before them is not counted."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repetitions + 1):
        for name, measure in measures.items():
            found[name].append(measure())
    return {name: values[1:] for name, values in found.items()}


def timed(works: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    return interleaved({name: partial(seconds, work) for name, work in works.items()}, repetitions)


def ratio(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Median, least and largest of the ratios of paired times."""
    ratios = [own / other for own, other in zip(times, others, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def told(times: Mapping[str, Sequence[float]], bases: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """For each name its median, and its ratios to those of `bases` that were measured."""
    return {
        name: {
            "seconds": statistics.median(values),
            **{f"/ {base}": ratio(values, times[base]) for base in bases if base in times},
            "times": list(values),
        }
        for name, values in times.items()
    }


# ----------------------------------------------------------------------------------------------------------- the parts


def sampling(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds to draw the image tokens of a batch, each picture of a text of its own."""
    rows = []
    for name in given.shapes:
        shape = SHAPES[name]
        contestants = {peer: CONTESTANTS[peer](shape) for peer in given.contestants}
        for batch in given.batches:
            text, bound = shape.texts(batch), drawing_bound(shape, batch)
            works = {peer: partial(contestant.draw, text) for peer, contestant in contestants.items()}
            for peer, row in told(timed(works, given.repetitions), ["ours"]).items():
                about = {"shape": name, "batch": batch, "contestant": peer}
                rows.append({**about, **row, "bound": bound, "/ bound": row["seconds"] / bound})
    return rows


def update(loss: Callable[[], Tensor], optimiser: torch.optim.Optimizer, precision: str) -> None:
    """One step of training: forward, in autocast if it is of bfloat16, backward, and the optimiser."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        value = loss()
    value.backward()
    optimiser.step()
    optimiser.zero_grad()


def trainer(contestant: Contestant, shape: Shape, precisions: Sequence[str]) -> dict[str, Callable[[], None]]:
    """The step of training with AdamW on one batch, for each precision."""
    loss = partial(contestant.loss, shape.texts(shape.training), shape.images(shape.training))
    optimiser = torch.optim.AdamW(contestant.model.parameters(), lr=1e-4, fused=True)
    return {precision: partial(update, loss, optimiser, precision) for precision in precisions}


def trained(names: Iterable[str]) -> list[str]:
    """The contestants that do not only draw."""
    return [name for name in names if CONTESTANTS[name].loss is not None]


def training(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of an update with AdamW; bfloat16 is autocast."""
    rows = []
    for name in given.shapes:
        shape, works = SHAPES[name], {}
        for peer in trained(given.contestants):
            steps = trainer(CONTESTANTS[peer](shape), shape, PRECISIONS)
            works |= {f"{peer} {precision}": step for precision, step in steps.items()}
        times = timed(works, given.repetitions)
        for peer, row in told(times, [f"ours {precision}" for precision in PRECISIONS]).items():
            bound = training_bound(shape, peer.split()[-1])
            each = {"samples/s": shape.training / row["seconds"], "bound": bound, "/ bound": row["seconds"] / bound}
            rows.append({"shape": name, "batch": shape.training, "contestant": peer, **row, **each})
    return rows


def keys_read(layout: Layout, kind: str) -> float:
    """Mean over the cells."""
    return statistics.fmean(len(layout.keys(state, kind)) for state in range(layout.image.start, layout.image.stop))


def keys(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Keys that each kind of attention reads for a cell, mean over the grid, beside all that came before."""
    rows = []
    for side, kind in itertools.product(SIDES, KINDS):
        layout = Layout(TEXT, (side, side))
        read = keys_read(layout, kind)
        rows.append({"grid": f"{side} x {side}", "kind": kind, "keys": read, "share": read / keys_read(layout, "full")})
    return rows


def decoding(model: DALLE, batch: int) -> KVCache:
    """A cache for `decode`, filled to its end with whatever."""
    cache = model.prefill(torch.randint(model.config.vocab_text, (batch, model.config.text_length)))
    cache.stored.normal_()
    return cache


def decode(model: DALLE, cache: KVCache) -> None:
    """STEPS decode steps, at cells evenly spaced over the grid."""
    tokens, stride = torch.zeros(cache.rows, dtype=torch.int64), model.layout.cells // STEPS
    for cell in range(stride // 2, stride * STEPS, stride):
        cache.length = model.layout.image.start + cell
        model.step(tokens, cell, cache)


def per_step(values: Iterable[float]) -> list[float]:
    return [value / STEPS for value in values]


@torch.inference_mode()
def patterns(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a decode step, and of storing and reading K/V in it, by the paper's patterns and by full attention."""
    rows = []
    for name in given.shapes:
        models, works = {}, {}
        for about in itertools.product(("full", "paper"), SIDES):
            kind, side = about
            models[about] = packed(DALLE(replace(SHAPES[name], text=TEXT, side=side).config(kind)))
            works[about] = partial(decode, models[about], decoding(models[about], BATCH))
        clocks = {about: partial(attention_seconds, models[about], works[about]) for about in works}
        times, inside = (
            {about: per_step(values) for about, values in found.items()}
            for found in (timed(works, given.repetitions), interleaved(clocks, given.repetitions))
        )
        for about, row in told(times).items():
            (kind, side), layout = about, models[about].layout
            read = statistics.fmean(keys_read(layout, each) for each in models[about].config.kinds)
            row = {"shape": name, "patterns": kind, "grid": f"{side} x {side}", "keys": read, **row}
            row["/ full"] = ratio(times[about], times["full", side])
            row["in attention"] = statistics.median(inside[about])
            row[f"/ {SIDES[0]} x {SIDES[0]}"] = ratio(inside[about], inside[kind, SIDES[0]])
            rows.append({**row, "attention times": inside[about]})
    return rows


@torch.inference_mode()
def prefill(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds to read the texts of a batch, and of a decode step."""
    rows = []
    for name in given.shapes:
        shape = SHAPES[name]
        model = packed(DALLE(shape.config()))
        for batch in given.batches:
            step = partial(decode, model, decoding(model, batch))
            times = timed({"prefill": partial(model.prefill, shape.texts(batch)), "step": step}, given.repetitions)
            found = told({**times, "step": per_step(times["step"])}, ["step"])
            rows += [{"shape": name, "batch": batch, "what": what, **row} for what, row in found.items()]
    return rows


def largest() -> float:
    """Largest resident set of this process so far, MiB; what `resource` says includes that of the parent's start."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def peak(shape: Shape, peer: str, work: str, threads: int) -> dict[str, float]:
    """In a process of its own: MiB with the model in place, and at the height of drawing or training."""
    torch.set_num_threads(threads)
    contestant = CONTESTANTS[peer](shape)
    built = largest()
    if work == "drawing":
        contestant.draw(shape.texts(BATCH))
    else:
        step = trainer(contestant, shape, ["float32"])["float32"]
        step()  # AdamW has its moments after the first
        step()
    return {"model, MiB": built, "peak, MiB": largest()}


def memory(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of drawing a batch and of training in float32, imports and weights included."""
    rows = []
    for name, peer in itertools.product(given.shapes, given.contestants):
        works = {"drawing": BATCH, **({"training": SHAPES[name].training} if trained([peer]) else {})}
        for work, batch in works.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found = process.submit(peak, SHAPES[name], peer, work, torch.get_num_threads()).result()
            rows.append({"shape": name, "contestant": peer, "work": work, "batch": batch, **found})
    return rows


def experiment(name: str) -> dict[str, Any]:
    """Settings of the model of an experiment of stage 1 that comes with the project."""
    return yaml.safe_load((ROOT / "configs" / "dvae" / f"{name}.yaml").read_text())["model"]


def preparing(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Pictures per second of `dalle prepare` on scenes with the demo's stage 1, and of two things that it does."""
    tokenizer, outs = DVAE(DVAEConfig(**experiment("demo")["config"])), itertools.count()
    size = tokenizer.config.image_size
    pictures = open_pairs(SCENES, size).images(range(PICTURES))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/dvae")

        def whole() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                prepare(SCENES, dvae=f"{folder}/dvae", out=f"{folder}/{next(outs)}")

        @torch.inference_mode()
        def encoding() -> None:
            for some in pictures.split(64):
                tokenizer.encode(some.float() / 255)

        works = {"prepare": whole, "drawing": lambda: open_pairs(SCENES, size).keep(), "encoding": encoding}
        found = told(timed(works, given.repetitions), ["prepare"])
    return [{"what": what, "pictures/s": PICTURES / row["seconds"], **row} for what, row in found.items()]


def stage_1(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of an update of a dVAE on 16 pictures of 64 px, by memory layout and precision."""
    scenes, paper = experiment("scenes"), experiment("paper")
    paper["config"] |= {"image_size": 64, "hidden": 64}
    batch, rows = {"images": torch.randint(256, (BATCH, 3, 64, 64), dtype=torch.uint8)}, []
    for name, settings in {"scenes": scenes, "paper, hidden 64": paper}.items():
        works: dict[str, Callable[[], None]] = {}
        for layout in ("plain", "channels_last"):
            weights = [settings[name] for name in ("temperature", "kl_weight", "usage_weight")]
            schedules = [weight and Schedule(**weight) for weight in weights]
            config, optimiser = DVAEConfig(**settings["config"]), Optimiser(Schedule(1e-4))
            lit = LitDVAE(config, optimiser, *schedules, channels_last=layout == "channels_last")
            adamw, loss = lit.configure_optimizers(), lambda lit=lit: lit.step(batch, 0, 0)[0]
            works |= {f"{layout} {precision}": partial(update, loss, adamw, precision) for precision in PRECISIONS}
        found = told(timed(works, given.repetitions), [f"plain {precision}" for precision in PRECISIONS])
        for step, row in found.items():
            rows.append({"stage 1": name, "step": step, "pictures/s": BATCH / row["seconds"], **row})
    return rows


def start(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Wall seconds of a `dalle sample` of one picture with the model that comes along, imports included."""
    words = ["sample", "emoji", "woman scientist medium skin tone", "--count", "1", "--keep", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dalle", *words, "--out", folder]
        work = partial(subprocess.run, command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
        return [{"command": " ".join(["dalle", *words[:2], "..."]), **told(timed({"": work}, given.repetitions))[""]}]


PARTS = {
    "sampling": sampling,
    "training": training,
    "keys": keys,
    "patterns": patterns,
    "prefill": prefill,
    "memory": memory,
    "prepare": preparing,
    "dvae": stage_1,
    "start": start,
}

# ---------------------------------------------------------------------------------------------------------- the output


def machine() -> dict[str, Any]:
    """What this runs on and with."""
    cpu = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    peer = sys.modules.get("transformers")  # loaded if it is a contestant
    return {
        "processor": named[1] if named else platform.processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load at the start": os.getloadavg()[0],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **versions(),
        "transformers": peer and peer.__version__,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same columns, single times left out; a ratio with its least and largest in parentheses."""

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return "{:.2f} ({:.2f}-{:.2f})".format(*value)
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    columns = [name for name in rows[0] if not name.endswith("times")]
    lines = [columns, *([cell(row[name]) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def picture(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Image tokens per second over pictures at a time, a panel for each shape, under the bound: uint8 (3, H, W)."""
    points: dict[str, dict[str, list[list[float]]]] = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        panel, tokens = points.setdefault(row["shape"], {}), row["batch"] * SHAPES[row["shape"]].cells
        measured, bound = (row["seconds"], max(row["times"]), min(row["times"])), (row["bound"],) * 3
        for label, some in ((row["contestant"], measured), ("ceiling", bound)):
            panel.setdefault(label, []).append([row["batch"], *(tokens / seconds for seconds in some)])
    panels = {
        f"{shape}: image tokens per second": {label: plots.Line(*np.array(some).T) for label, some in panel.items()}
        for shape, panel in points.items()
    }
    return plots.lines(panels, "pictures at a time", binary=True)


def run(given: argparse.Namespace) -> None:
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    if {"sampling", "training", "memory"} & set(given.parts):
        check(given.contestants)
    limits = [
        {"shape": name, **{f"{limit}, G/s": rate / 1e9 for limit, rate in rates(SHAPES[name]).items()}}
        for name in given.shapes
    ]
    result = {"machine": machine(), "options": vars(given), "formulas": FORMULAS}
    result["shapes"] = {name: asdict(SHAPES[name]) for name in given.shapes}
    for about in ("machine", "formulas"):
        print("\n".join(f"{name}: {value}" for name, value in result[about].items()), end="\n\n")
    print(table(limits))
    result |= {"limits": limits, "parts": {}}
    for part in given.parts:
        rows = result["parts"][part] = PARTS[part](given)
        print(f"\n{part}. {PARTS[part].__doc__}\n{table(rows)}", flush=True)
        write_json(Path(given.out) / "speed.json", result)  # after each part, so that an interruption loses but one
        if part == "sampling":
            save(picture(rows), Path(given.out) / "speed.png")
    print(f"\nwrote {given.out}")


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="speed", help="folder for speed.json and speed.png")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    shaped = "of sampling, training, patterns, prefill and memory"
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["S", "M"], help=shaped)
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 4, 16, 64], help="of sampling and prefill")
    peers = "of sampling, training and memory"
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help=peers)
    parser.add_argument("--repetitions", type=positive, default=5, help="timed rounds; keys and memory have none")
    parser.add_argument("--threads", type=positive, help="default: as many as torch takes")
    return report(partial(run, parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
