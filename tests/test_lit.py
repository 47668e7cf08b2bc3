"""What both trainers promise: checkpoints, metrics, the run folder, refusals, stops, and what each error leaves behind.

That a killed run ends where an uninterrupted one does is test_resume.py's matter.
"""

import copy
import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import dalle.__main__
import dvae.__main__
import dvae.train
from dalle.pipeline import load as load_dalle
from dalle.prepare import prepare
from dalle.train import LitDALLE
from dvae import artefact, forecast, lit, plots
from dvae.commands import find_config
from dvae.data import open_source
from dvae.errors import ArtefactError, UserError
from dvae.images import save as to_png
from dvae.images import to_uint8
from dvae.model import DVAE, Encoder
from dvae.optim import Optimiser, Plateau, StepSize
from dvae.schedules import Schedule
from dvae.tokenizer import load as load_dvae
from dvae.train import LitDVAE

MAIN = {"dvae": dvae.__main__.main, "dalle": dalle.__main__.main}
MODULE = {"dvae": LitDVAE, "dalle": LitDALLE}
OPTIMISER = {"learning_rate": {"start": 2e-3, "end": 1e-3, "steps": 4, "warmup": 2}, "ema": 0.5}
MODEL = {
    "dvae": {
        "config": {
            **{"image_size": 32, "vocab_size": 16, "hidden": 8, "groups": 2, "blocks": 1, "bottleneck": 2},
            **{"code_width": 8, "kernel": 6, "patch": 4},
        },
        "optimiser": OPTIMISER,
        "temperature": {"start": 1.0},
        "kl_weight": {"start": 0.0},
        "checkpoint_every": 100,
    },
    "dalle": {"depth": 1, "width": 32, "heads": 2, "optimiser": OPTIMISER, "prompts": 1, "checkpoint_every": 100},
}
TRAINER = {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}
STAGES = pytest.mark.parametrize("stage", MAIN)


class Run:
    """One experiment in a folder of its own; calling it gives the exit code and what was said on stderr."""

    def __init__(self, stage: str, folder: Path, tokens: Path, capsys: pytest.CaptureFixture):
        self.stage, self.folder, self.capsys = stage, folder, capsys
        data = {"dvae": {"source": "scenes:train:24", "val": "scenes:val:8"}, "dalle": {"tokens": str(tokens)}}
        self.config = {
            "run": str(folder),
            "model": copy.deepcopy(MODEL[stage]),
            "data": {**data[stage], "batch_size": 4},
            "trainer": {**TRAINER, "accelerator": "cpu", "enable_progress_bar": False},
        }
        self.yaml = folder.parent / f"{folder.name}.yaml"

    def __call__(self, *args: str, command: str = "fit") -> tuple[int, str]:
        self.yaml.write_text(yaml.safe_dump(self.config))
        code = MAIN[self.stage]([command, "--config", str(self.yaml), *args])
        said = self.capsys.readouterr()
        self.printed = said.out
        return code, said.err

    def checkpoint(self, name: str = "last") -> dict:
        return lit.SafeCheckpoints().load_checkpoint(self.folder / "checkpoints" / f"{name}.ckpt")

    def metrics(self) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO((self.folder / "metrics.csv").read_text())))


@pytest.fixture
def new(tmp_path, tiny_tokens, capsys):
    """new(stage, name): an experiment that was not run yet."""
    return lambda stage, name="run": Run(stage, tmp_path / name, tiny_tokens, capsys)


def replace_step(patch: pytest.MonkeyPatch, module: type[lit.Lit], step) -> None:
    """Put another step in place of the module's; memory is then not told, for that takes a step without numbers."""
    patch.setattr(module, "step", step)
    patch.setattr(lit, "foretell", lambda *_: None)


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_notices_every_changed_bit_and_every_cut(tmp_path):
    path, writer = tmp_path / "a.ckpt", lit.SafeCheckpoints()
    state = {"weights": torch.arange(6.0), "step": 3, "name": "x"}
    writer.save_checkpoint(state, path)
    loaded = writer.load_checkpoint(path)
    assert torch.equal(loaded["weights"], state["weights"]) and (loaded["step"], loaded["name"]) == (3, "x")
    assert torch.equal(torch.load(path, weights_only=True)["weights"], state["weights"]), "an ordinary torch file"
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]

    whole = path.read_bytes()
    chance = random.Random(0)
    # every bit of the digest and its length, and some elsewhere
    bits = [*range(8 * (len(whole) - 66), 8 * len(whole)), *chance.sample(range(8 * len(whole)), 400)]
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ArtefactError, match=r"a\.ckpt is damaged"):
            writer.load_checkpoint(path)
    for length in [0, 1, 65, 66, 67, *chance.sample(range(len(whole)), 60), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ArtefactError, match="is damaged"):
            writer.load_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ArtefactError, match="is damaged"):
        writer.load_checkpoint(path)
    with pytest.raises(ArtefactError, match="there is no checkpoint"):
        writer.load_checkpoint(tmp_path / "b.ckpt")


def test_checkpoint_runs_no_code(tmp_path):
    # even one whose digest is right, and even when Lightning asks for everything to be unpickled
    class Bad:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    lit.SafeCheckpoints().save_checkpoint({"bad": Bad()}, tmp_path / "bad.ckpt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        lit.SafeCheckpoints().load_checkpoint(tmp_path / "bad.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_checkpoint_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    path, writer = tmp_path / "a.ckpt", lit.SafeCheckpoints()
    writer.save_checkpoint({"step": 1}, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        writer.save_checkpoint({"step": 2}, path)
    assert writer.load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


# ----------------------------------------------------------------------------------------------------------- metrics


def test_metrics_are_appended_and_forgotten_beyond_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"

    def read() -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(path.read_text())))

    log = lit.MetricsFile(path, None)
    for step in (1, 2, 9, 12):
        log.log_metrics({"loss": step / 2}, step)
    assert read() == [{"step": str(s), "loss": f"{s / 2:g}"} for s in (1, 2, 9, 12)]
    log.log_metrics({"val": 7.0}, 12)  # a new column, and more about the same step
    assert read()[-1] == {"step": "12", "loss": "6", "val": "7"} and read()[0]["val"] == ""
    whole = path.read_bytes()

    path.write_bytes(whole + b"1")  # half of a row for step 13
    again = lit.MetricsFile(path, 9)
    assert [row["step"] for row in read()] == ["1", "2", "9"]
    again.log_metrics({"loss": 6.0}, 12)
    again.log_metrics({"val": 7.0}, 12)
    assert path.read_bytes() == whole, "the same numbers again give the same file"

    lit.MetricsFile(path, None)
    assert read() == [], "a run from the start forgets everything"


# ----------------------------------------------------------------------------------------------------------- updates


def gradients_at_the_step(clip: float | None, size: float) -> tuple[list, list, float]:
    """Gradients of a small network about `size` large, the same when the optimiser gets them, and the norm logged."""
    found = lit.Lit(Optimiser(Schedule(0.01), clip=clip), 1, 0)
    found.model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
    found._trainer = SimpleNamespace(global_step=0, precision_plugin=SimpleNamespace())
    parameters = list(found.model.parameters())
    for parameter in parameters:
        parameter.grad = size * torch.randn(parameter.shape)
    before = [p.grad.clone() for p in parameters]
    found.on_before_optimizer_step(found.configure_optimizers())
    return before, [p.grad for p in parameters], found.latest["train/gradient_norm"].item()


def test_clip_limits_the_norm_of_the_whole_gradient():
    for size, expected in ((100.0, 0.5), (1e-3, None)):
        before, after, logged = gradients_at_the_step(0.5, size)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in before))
        factor = 1.0 if expected is None else expected / norm
        for gradient, clipped in zip(before, after, strict=True):
            torch.testing.assert_close(clipped, gradient * factor, rtol=1e-4, atol=0)
        assert logged == pytest.approx(norm, rel=1e-5), "as it was found"


def test_without_a_clip_gradients_are_left_alone():
    for size in (1e-3, 1e6):
        before, after, _ = gradients_at_the_step(None, size)
        assert all(torch.equal(gradient, same) for gradient, same in zip(before, after, strict=True))


def test_temperature_and_beta_are_those_of_the_update(new, monkeypatch):
    """Temperature as the model is called with it, beta as the loss holds it, of both batches of each update."""
    run, temperature, beta, used = new("dvae"), Schedule(2.0, 0.5, 5), Schedule(0.0, 6.6, 4), []
    run.config["trainer"].update(max_steps=6, accumulate_grad_batches=2, val_check_interval=12)
    run.config["model"].update(temperature=asdict(temperature), kl_weight=asdict(beta))
    forward, step = DVAE.forward, LitDVAE.step

    def called(self, images, temperature, generator):
        used.append(temperature)
        return forward(self, images, temperature, generator)

    def weighed(self, batch, update, batch_index):
        if batch_index == 0:  # an untrained encoder is nearly uniform: no KL to speak of
            with torch.no_grad():
                self.model.encoder.output.weight.mul_(20)
        loss, numbers = step(self, batch, update, batch_index)
        penalty = 4 * 4 * numbers["train/kl"] / (3 * 32 * 32)
        assert penalty > 2e-4
        used.append(((loss - numbers["train/nll"]) / penalty).item())
        return loss, numbers

    monkeypatch.setattr(DVAE, "forward", called)
    replace_step(monkeypatch, LitDVAE, weighed)
    assert run()[0] == 0
    expected = [of(update) for update in range(6) for _ in range(2) for of in (temperature, beta)]
    assert used[: len(expected)] == pytest.approx(expected, abs=0.01)  # a validation follows


@pytest.mark.parametrize("every", [1, 3])
def test_averaged_weights_are_the_loop_over_every_so_many_updates(every, new, monkeypatch):
    run, weights, validated = new("dalle"), [], []
    run.config["trainer"].update(max_steps=8, accumulate_grad_batches=2, val_check_interval=8)
    run.config["model"]["optimiser"] = {**OPTIMISER, "ema": 0.75, "ema_every": every}
    run.config["model"]["prompts"] = 0
    real, validation_step = lit.Checkpoints.on_train_batch_end, LitDALLE.validation_step

    def keep(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx % 2:
            weights.append({name: value.clone() for name, value in module.state_dict().items()})
        real(self, trainer, module, outputs, batch, batch_idx)

    def validate(self, batch, batch_index):
        if batch_index == 0:
            validated.append({name: value.clone() for name, value in self.state_dict().items()})
        validation_step(self, batch, batch_index)

    monkeypatch.setattr(lit.Checkpoints, "on_train_batch_end", keep)
    monkeypatch.setattr(LitDALLE, "validation_step", validate)
    assert run()[0] == 0
    assert len(weights) == 8
    averages = [weights[0]]
    for update in range(2, 9):
        average = averages[-1]
        if (update - 1) % every == 0:
            average = {name: 0.75 * value + 0.25 * weights[update - 1][name] for name, value in average.items()}
        averages.append(average)
    last = run.checkpoint()
    assert equal(last["current_model_state"], weights[-1])
    for found, update in ((validated[0], 4), (validated[1], 8), (last["state_dict"], 8)):
        for name, value in found.items():
            torch.testing.assert_close(value, averages[update - 1][name], rtol=1e-5, atol=1e-7)
            assert not torch.equal(value, weights[update - 1][name])


PLATEAU = {"learning_rate": {"start": 2e-3, "warmup": 1}, "plateau": {"window": 2, "patience": 1, "threshold": 0.9}}


@STAGES
def test_the_step_size_is_halved_on_a_plateau_of_the_training_loss(stage, new, monkeypatch):
    run, losses = new(stage), []
    run.config["trainer"].update(max_steps=8, accumulate_grad_batches=2, val_check_interval=16)
    run.config["model"]["optimiser"] = {**PLATEAU, "ema": None}
    real = MODULE[stage].step

    def step(self, batch, update, batch_index):
        loss, numbers = real(self, batch, update, batch_index)
        losses.append(loss.item())
        return loss, numbers

    replace_step(monkeypatch, MODULE[stage], step)
    assert run()[0] == 0
    expected, rates = StepSize(Schedule(2e-3, warmup=1), Plateau(2, 1, 0.9)), []
    for update, pair in enumerate(zip(losses[::2], losses[1::2], strict=True)):
        rates.append(expected(update))
        expected.see(update, sum(pair) / 2)
    # update 0 is the warm-up; 1 and 2 are the first window, and each window after it brings no such improvement
    assert rates == [1e-3, 2e-3, 2e-3, 2e-3, 2e-3, 1e-3, 1e-3, 5e-4]
    assert [row["train/learning_rate"] for row in run.metrics()] == [f"{rate:.6g}" for rate in rates]
    assert [line for line in run.printed.splitlines() if "stopped falling" in line] == [
        "after update 5 the loss stopped falling: step size 0.001",
        "after update 7 the loss stopped falling: step size 0.0005",
    ]
    kept = run.checkpoint()["callbacks"]["Halving"]
    assert kept.keys() == {"halved", "best", "stale", "total", "count"}
    assert kept["halved"] == 2 and kept["count"] == 1
    assert kept["total"] == pytest.approx(sum(losses[-2:]) / 2, rel=1e-6), "the open window holds the last update"


def test_the_loss_of_an_update_is_the_mean_over_batches_and_processes():
    seen, asked = [], []

    def reduce(value, reduce_op):
        asked.append(reduce_op)
        return (value + 10) / 2  # the other process has found 10

    trainer = SimpleNamespace(accumulate_grad_batches=2, global_step=7, strategy=SimpleNamespace(reduce=reduce))
    halving = lit.Halving(SimpleNamespace(see=lambda *args: seen.append(args)))
    for batch, loss in enumerate((1.0, 5.0, 2.0, 6.0)):
        halving.on_train_batch_end(
            trainer, SimpleNamespace(latest={"train/loss": torch.tensor(loss)}), None, None, batch
        )
    assert seen == [(6, (3 + 10) / 2), (6, (4 + 10) / 2)] and asked == ["mean", "mean"]


SCALED = {
    "class_path": "lightning.pytorch.plugins.MixedPrecision",
    "init_args": {
        "precision": "16-mixed",
        "device": "cpu",
        "scaler": {"class_path": "torch.amp.GradScaler", "init_args": {"device": "cpu", "init_scale": 2.0**22}},
    },
}


@pytest.mark.parametrize("muon", [False, True])
def test_a_loss_scaler_skips_what_overflows_and_the_run_goes_on_exactly(muon, new, monkeypatch):
    run, halves, weights = new("dalle"), new("dalle", "halves"), []
    for each in (run, halves):
        each.config["trainer"].update(plugins=[copy.deepcopy(SCALED)], max_steps=10, val_check_interval=5)
        each.config["model"]["optimiser"] = {**OPTIMISER, "muon": muon, "clip": 0.5, "second_moment_clip": 1e-4}
        each.config["model"]["prompts"] = 0
    real = lit.Checkpoints.on_train_batch_end

    def keep(self, trainer, module, *args):
        weights.append({name: value.clone() for name, value in module.state_dict().items()})
        real(self, trainer, module, *args)

    with monkeypatch.context() as patch:
        patch.setattr(lit.Checkpoints, "on_train_batch_end", keep)
        assert run() == (0, "")
    rows = run.metrics()
    scales, norms = ([float(row[f"train/{name}"]) for row in rows] for name in ("loss_scale", "gradient_norm"))
    skipped = sum(not math.isfinite(norm) for norm in norms)
    assert 5 < skipped < 9 and all(math.isfinite(norm) for norm in norms[skipped:])
    assert scales == pytest.approx([2.0 ** (22 - min(update, skipped)) for update in range(10)], rel=1e-5)
    assert max(norms[skipped:]) < 100, "clipped and logged without the scale"
    assert all(equal(weights[0], moved) for moved in weights[:skipped]), "a skipped update moves nothing"
    for before, after in itertools.pairwise(weights[skipped - 1 :]):
        assert not equal(before, after)
    # it counts as an update all the same: of the step size, the average and max_steps
    assert [row["step"] for row in rows] == [str(update) for update in range(1, 11)]
    rate = Schedule(**OPTIMISER["learning_rate"])
    assert [row["train/learning_rate"] for row in rows] == [f"{rate(update):.6g}" for update in range(10)]

    halves.config["trainer"]["max_steps"] = 5
    assert halves()[0] == 0
    assert halves("--ckpt_path", "last", "--trainer.max_steps", "10")[0] == 0
    one, other = run.checkpoint(), halves.checkpoint()
    assert one["MixedPrecision"] == other["MixedPrecision"]
    assert equal(one["current_model_state"], other["current_model_state"])


def test_a_loss_scaler_does_not_hide_what_no_scale_mends(new, monkeypatch):
    run = new("dalle")
    plugin = copy.deepcopy(SCALED)
    plugin["init_args"]["scaler"]["init_args"]["init_scale"] = 2.0
    run.config["trainer"]["plugins"] = [plugin]
    real = LitDALLE.step

    def step(self, data, update, batch_index):
        next(self.model.parameters()).register_hook(lambda gradient: gradient + float("inf"))
        return real(self, data, update, batch_index)

    replace_step(monkeypatch, LitDALLE, step)
    code, said = run()  # scales 2, 1, 1/2
    assert code == 6 and "error: the gradient of update 2 is" in said and "Traceback" not in said


# ------------------------------------------------------------------------------------------------------- whole runs


@STAGES
def test_a_run_from_begin_to_end(stage, new):
    run = new(stage)
    assert run("--ckpt_path", "last")[0] == 0, "a last checkpoint that is not there yet means to begin"
    there = {str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/last.ckpt", "checkpoints/best.ckpt"} <= there
    assert "model/artefact.json" in there and any(name.startswith("samples/") for name in there)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert torch.get_float32_matmul_precision() == "highest", "what stays in float32 is not rounded"

    rows = run.metrics()
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [bool(row["val/loss"]) for row in rows] == [False, True, False, True]
    rate = Schedule(**OPTIMISER["learning_rate"])
    assert [row["train/learning_rate"] for row in rows] == [f"{rate(step):.6g}" for step in range(4)]

    # the artefact holds the averaged weights of the best validation
    last, best = run.checkpoint(), run.checkpoint("best")
    lowest = min(rows, key=lambda row: float(row["val/loss"] or "inf"))
    assert best["global_step"] == int(lowest["step"]) and last["global_step"] == 4
    assert last["callbacks"].keys() == {"Validation", "WeightAveraging"}, "the names by which older runs go on"
    assert not equal(best["state_dict"], best["current_model_state"])
    kept = artefact.load(run.folder / "model", stage).tensors
    assert equal({f"model.{name}": value for name, value in kept.items()}, best["state_dict"])

    # validating and testing give the numbers of the validation that the checkpoint was saved in
    for command in ("validate", "test"):
        code, said = run(command=command)
        assert code == 2 and f"{command} was not told which weights to take" in said
    for command, loss in (("validate", "val/loss"), ("test", "test/loss")):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lit, "record", lambda trainer, metrics, seen=seen: seen.append(metrics))
            before = (run.folder / "metrics.csv").read_bytes()
            assert run("--ckpt_path", "best", command=command)[0] == 0
        assert f"{seen[0][loss]:.6g}" == lowest["val/loss"]
        assert (run.folder / "metrics.csv").read_bytes() == before

    # a finished run has nothing to do
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert run("--ckpt_path", "last")[0] == 0
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before

    # a used folder is continued or left alone; a run that was made longer is the longer run
    code, said = run()
    assert code == 2 and "already holds a run" in said and "--ckpt_path last" in said
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    longer = new(stage, "longer")
    run.config["trainer"]["max_steps"] = longer.config["trainer"]["max_steps"] = 6
    assert run("--ckpt_path", "last")[0] == longer()[0] == 0
    assert (run.folder / "metrics.csv").read_bytes() == (longer.folder / "metrics.csv").read_bytes()
    for part in ("state_dict", "current_model_state"):
        assert equal(run.checkpoint()[part], longer.checkpoint()[part])

    # another experiment is refused with both values; what changes no number is not
    run.config["model"]["optimiser"]["ema"] = 0.25
    run.config["data"]["batch_size"] = 3
    code, said = run("--ckpt_path", "last")
    assert code == 2 and "model.optimiser.ema: 0.5 there, 0.25 here" in said
    assert "data.batch_size: 4 there, 3 here" in said


def test_the_best_validation_is_remembered(new, monkeypatch):
    run, losses = new("dvae"), iter([1.0, 3.0, 2.0])
    real = LitDVAE.validation_metrics
    monkeypatch.setattr(LitDVAE, "validation_metrics", lambda self: real(self) | {"val/loss": next(losses)})
    assert run()[0] == 0
    kept = artefact.digest(run.folder / "model")
    assert run("--ckpt_path", "last", "--trainer.max_steps", "6")[0] == 0
    assert next(losses, None) is None
    assert run.checkpoint("best")["global_step"] == 2 and run.checkpoint()["global_step"] == 6
    assert artefact.digest(run.folder / "model") == kept


@STAGES
def test_settings_that_change_nothing_may_differ_and_younger_ones_be_missing(stage, new):
    run, whole = new(stage), new(stage, "whole")
    assert whole()[0] == 0
    run.config["trainer"] |= {"max_steps": 2}
    assert run()[0] == 0
    kept = yaml.safe_load((run.folder / "config.yaml").read_text())
    for name in ("second_moment_clip", "plateau", "ema_every"):
        del kept["model"]["optimiser"][name]
    if stage == "dalle":
        for name in ("patterns", "checkpointing", "pad_targets", "expects"):
            del kept["model"][name]
        run.config["model"]["checkpointing"] = True
    (run.folder / "config.yaml").write_text(yaml.safe_dump(kept))
    code, said = run("--ckpt_path", "last", "--model.optimiser.ema_every", "2")
    assert code == 2 and "(model.optimiser.ema_every: 1 there, 2 here)" in said
    run.config["trainer"] |= {"max_steps": 4}
    run.config["model"]["checkpoint_every"] = 1
    run.config["run"] = os.path.relpath(run.folder)
    assert run("--ckpt_path", "last", "--data.workers", "1")[0] == 0
    for part in ("state_dict", "current_model_state"):
        assert equal(run.checkpoint()[part], whole.checkpoint()[part])


def test_damaged_checkpoint_is_refused(new):
    run = new("dvae")
    assert run()[0] == 0
    path = run.folder / "checkpoints" / "last.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, said = run("--ckpt_path", "last")
    assert code == 4 and "last.ckpt is damaged" in said and "best.ckpt" in said


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "where, what, value, code, words",
    [
        ("trainer", "max_steps", 5, 2, "do not end at a validation"),
        ("trainer", "max_steps", -1, 2, "max_steps is not set"),
        ("trainer", "val_check_interval", 0.5, 2, "val_check_interval"),
        ("trainer", "gradient_clip_val", 1.0, 2, "gradient_clip_val"),
        ("model", "optimiser", {**OPTIMISER, "ema_every": 3}, 2, "ema_every is 3, but validations are 2 updates apart"),
        ("model", "kl_weight", {"start": 1.0, "end": -1.0}, 2, "kl_weight goes from 1.0 to -1.0"),
        ("model", "temperature", {"start": 1.0, "end": 0.0}, 2, "temperature goes from 1.0 to 0.0"),
        ("model", "optimiser", {**OPTIMISER, "muon": True}, 2, "muon is set"),
        ("model", "optimiser", {**OPTIMISER, "beta2": 1.0}, 2, "optimiser.beta2 is 1.0"),
        ("model", "optimiser", {**OPTIMISER, "plateau": {}}, 2, "optimiser.plateau halves the step size"),
        ("model", "optimiser", {**PLATEAU, "plateau": {"window": 0}}, 2, "plateau.window is 0"),
        ("trainer", "accumulate_grad_batches", 3, 2, "multiple of accumulate_grad_batches"),
        ("data", "batch_size", 0, 2, "batch_size 0"),
        ("data", "source", "nowhere/at/all", 3, "nowhere/at/all"),
        ("data", "colour", "red", 2, "colour"),
        ("model", "nonsense", 1, 2, "nonsense"),
        ("trainer", "nonsense", 1, 2, "nonsense"),
    ],
)
def test_wrong_settings_are_refused_and_may_be_mended(where, what, value, code, words, new):
    run = new("dvae")
    good = copy.deepcopy(run.config)
    run.config[where][what] = value
    found, said = run()
    assert found == code and words in said and said.startswith("error: ") and "\nhint: " in said, said
    assert "Traceback" not in said and not (run.folder / "checkpoints").exists()
    run.config = good
    run.config["trainer"]["max_steps"] = 2
    assert run()[0] == 0, "the folder is not spoilt"


def test_unknown_top_level_key_and_missing_run(new):
    run = new("dvae")
    run.config["modle"] = {"depth": 1}
    code, said = run()
    assert code == 2 and "modle" in said
    del run.config["modle"], run.config["run"]
    code, said = run()
    assert code == 2 and "no run folder" in said and "--run" in said


def test_configs_are_found_by_path_and_by_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = find_config("dvae/demo")
    assert shipped.is_file() and shipped.parts[-2:] == ("dvae", "demo.yaml")
    assert find_config("configs/dvae/demo.yaml") == find_config("dvae/demo.yaml") == shipped
    own = tmp_path / "configs" / "dvae" / "demo.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("run: x\n")
    assert find_config("configs/dvae/demo.yaml").read_text() == "run: x\n", "a file that is there comes first"
    with pytest.raises(UserError, match="there is no config dvae/dmeo") as error:
        find_config("dvae/dmeo")
    assert "dvae/demo" in error.value.hint and "dalle/demo" in error.value.hint
    found = lit.spelled_out(["fit", "--config", "dvae/demo", "-c", "dvae/demo", "--config=dvae/demo", "x"])
    assert found == ["fit", "--config", str(shipped), "-c", str(shipped), f"--config={shipped}", "x"]
    assert lit.spelled_out(["--init_from", "a"]) == ["--model.init_from", "a"]
    assert lit.spelled_out(["--init_from=a"]) == ["--model.init_from=a"]


# ----------------------------------------------------------------------------------------------------------- numerics


def poison(monkeypatch, stage: str, batch: int, where: str) -> dict[str, torch.Tensor]:
    """Make the loss or the gradient of a batch not finite; returns a place where the weights before it are put."""
    real, kept = MODULE[stage].step, {}

    def step(self, data, update, batch_index):
        loss, numbers = real(self, data, update, batch_index)
        if batch_index == batch:
            kept.update({name: value.clone() for name, value in self.state_dict().items()})
            kept["self"], kept["rows"] = self, data["rows"]
            if where == "loss":
                loss = loss * float("nan")
            else:
                next(self.model.parameters()).register_hook(lambda gradient: gradient + float("inf"))
        return loss, numbers

    replace_step(monkeypatch, MODULE[stage], step)
    return kept


@pytest.mark.parametrize("where", ["loss", "gradient"])
@STAGES
def test_non_finite_stops_before_the_weights_change(stage, where, new, monkeypatch):
    run = new(stage)
    kept = poison(monkeypatch, stage, 3, where)
    code, said = run()
    assert code == 6 and f"the {where} of update 3 is" in said
    rows = ", ".join(str(index) for _, index in kept.pop("rows"))
    assert rows in said and "weights were not changed" in said
    assert equal(kept.pop("self").state_dict(), kept)
    checkpoint = run.checkpoint()
    assert checkpoint["global_step"] == 2
    for part in ("state_dict", "current_model_state"):
        assert all(torch.isfinite(value).all() for value in checkpoint[part].values())
    assert "nan" not in (run.folder / "metrics.csv").read_text()


def test_non_finite_validation_keeps_the_artefact(new, monkeypatch):
    run, calls = new("dvae"), iter(range(9))
    real = LitDVAE.validation_metrics

    def metrics(self):
        return real(self) | ({"val/loss": float("nan")} if next(calls) else {})

    monkeypatch.setattr(LitDVAE, "validation_metrics", metrics)
    code, said = run()
    assert code == 6 and "validation loss after update 4 is nan" in said
    assert run.checkpoint()["global_step"] == 2
    model = load_dvae(run.folder).state_dict()
    assert equal({f"model.{name}": value for name, value in model.items()}, run.checkpoint("best")["state_dict"])


def test_collapsed_codebook_is_said_with_a_remedy(new, monkeypatch):
    run, real = new("dvae"), Encoder.forward
    favour = 100 * torch.eye(16)[3][:, None, None]
    monkeypatch.setattr(Encoder, "forward", lambda self, x: real(self, x) + favour)
    code, said = run()
    assert code == 0 and said.count("only 6.2% of the 16 codes are in use") == 1, "once, not at each validation"
    assert "kl_weight, or give usage_weight" in said and "temperature" in said


# ----------------------------------------------------------------------------------------------------- told beforehand


@STAGES
def test_a_training_begins_by_telling_parameters_and_memory(stage, new):
    run = new(stage)
    run.config["trainer"]["precision"] = "bf16-mixed"
    assert run()[0] == 0
    model = (load_dvae if stage == "dvae" else lambda folder: load_dalle(folder).model)(run.folder)
    parameters, need = re.match(
        r"([\d,]+) parameters; a training of 4 pictures at a time in bf16-mixed needs about (\d+) MiB\n", run.printed
    ).groups()
    assert int(parameters.replace(",", "")) == sum(p.numel() for p in model.parameters())
    assert run.printed.count("parameters") == 1 and 1 <= int(need) < 20


@STAGES
def test_too_little_memory_is_told_before_anything_is_written_with_settings_that_fit(stage, new, monkeypatch):
    run, needs, weights, real, free = new(stage), {}, [], forecast.memory, [2**40]

    def memory(module, pictures, precision, accumulates, averages):
        needs[pictures] = real(module, pictures, precision, accumulates, averages)
        weights.append(sum(p.nbytes for p in module.parameters()))
        return needs[pictures]

    monkeypatch.setattr(forecast, "memory", memory)
    monkeypatch.setattr(forecast, "available", lambda device: free[0])
    run.config["trainer"].update(accumulate_grad_batches=2, val_check_interval=4)
    assert run()[0] == 0 and [*needs] == [4] and len(weights) == 1, "counted once"
    shutil.rmtree(run.folder)
    run.config["data"]["batch_size"] = 16
    run.config["trainer"].update(accumulate_grad_batches=1, val_check_interval=2)
    free[0] = needs[4] - weights[0]  # on a CPU the weights are there before they are counted
    code, said = run()
    first, second = said.splitlines()
    assert code == 5 and not run.folder.exists() and run.printed == ""
    assert first == (
        f"error: the memory is not enough: 16 pictures at a time need about {forecast.size(needs[16])}, "
        f"and {forecast.size(needs[4])} are there"
    )
    way = "--data.batch_size 4 --trainer.accumulate_grad_batches 4 --trainer.val_check_interval 8"
    other = {"dvae": "", "dalle": "; or --model.checkpointing true, which takes less"}
    assert second == f"hint: give {way} for as many pictures an update{other[stage]}"
    assert run(*way.split())[0] == 0, "the hint is true"
    assert {row["step"] for row in run.metrics()} == set("1234")


def test_the_time_to_the_end_is_told_once_after_three_timed_updates(new, monkeypatch):
    """A batch takes 0.5 s here, the first one 60 s and a validation 1,000 s: only the first is part of the line."""
    run, now, real = new("dvae"), [0.0], LitDVAE.step
    run.config["trainer"].update(max_steps=12, accumulate_grad_batches=2, val_check_interval=4)

    def step(self, batch, update, batch_index):
        now[0] += 0.5 if now[0] else 60.0
        return real(self, batch, update, batch_index)

    def validate(self, batch, batch_index):
        now[0] += 1000.0
        validation_step(self, batch, batch_index)

    validation_step = LitDVAE.validation_step
    replace_step(monkeypatch, LitDVAE, step)
    monkeypatch.setattr(LitDVAE, "validation_step", validate)
    monkeypatch.setattr(lit, "clock", lambda device: now[0])
    line = re.compile(
        r"^1 s an update: (\d+) updates end in about \1 s, (?:at|on) .*; validations come on top$", re.MULTILINE
    )
    for args, left in (((), ["8"]), (("--trainer.max_steps", "18"), ["2"]), (("--trainer.max_steps", "22"), [])):
        assert run("--ckpt_path", "last", *args)[0] == 0
        assert line.findall(run.printed) == left and run.printed.count("an update") == len(left)


def test_precisions_that_the_device_lacks_fall_back_with_a_line(new):
    run = new("dvae")
    run.config["trainer"]["precision"] = "16-mixed"
    code, said = run()
    assert code == 0 and "at a time in bf16-mixed" in run.printed
    assert said.splitlines()[:2] == [
        "warning: 16-mixed needs a GPU: this runs in bf16-mixed",
        "hint: --trainer.precision 32-true would round nothing",
    ]
    assert said.count("16-mixed needs") == 1


@pytest.mark.parametrize(
    "precision, accelerator, gpu, fast, used, words",
    [
        ("16-mixed", "auto", None, True, "bf16-mixed", "16-mixed needs a GPU"),
        (16, "cpu", "bf16", True, "bf16-mixed", "16-mixed needs a GPU"),
        ("16-mixed", "auto", "old", True, "16-mixed", ""),
        ("16-mixed", "gpu", None, True, "16-mixed", ""),  # Lightning refuses that
        ("bf16-mixed", "auto", "old", True, "32-true", "this GPU has no bfloat16: this runs in 32-true"),
        ("bf16", "cuda", "old", True, "32-true", "this GPU has no bfloat16"),
        ("bf16-mixed", "gpu", "bf16", False, "bf16-mixed", ""),
        ("bf16-mixed", "auto", None, True, "bf16-mixed", ""),
        ("bf16-mixed", "cpu", "old", False, "bf16-mixed", "this CPU computes slowly in bfloat16"),
        ("32-true", "auto", "old", False, "32-true", ""),
        (None, "auto", None, False, None, ""),
    ],
)
def test_which_precision_a_device_takes(precision, accelerator, gpu, fast, used, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu == "bf16")
    monkeypatch.setattr(lit, "fast_bfloat16", lambda: fast)
    assert lit.supported(precision, accelerator) == used
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == (2 if words else 0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(new):
    run = new("dalle")
    code, said = run("--trainer.accelerator", "gpu")
    assert code == 5 and "No supported gpu backend found!\nhint: leave machine/gpu away" in said
    assert not run.folder.exists()


# -------------------------------------------------------------------------------------------------------------- stops


def test_the_bar_of_a_continued_run_counts_on(new):
    run = new("dvae")
    run.config["trainer"] |= {"max_steps": 2, "enable_progress_bar": True}
    assert run()[0] == 0 and "| 2/2 [" in run.printed
    run.config["trainer"]["max_steps"] = 4
    assert run("--ckpt_path", "last")[0] == 0
    assert "training:  50%" in run.printed and "| 4/4 [" in run.printed.splitlines()[-2]


@pytest.mark.parametrize("stage, number", [("dvae", signal.SIGTERM), ("dalle", signal.SIGINT)])
def test_a_signal_ends_after_the_running_update(stage, number, new, monkeypatch):
    run, whole = new(stage), new(stage, "whole")
    assert whole()[0] == 0
    real, calls = MODULE[stage].training_step, iter(range(99))

    def asking(self, batch, batch_index):
        if next(calls) == 2:
            os.kill(os.getpid(), number)
        return real(self, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(MODULE[stage], "training_step", asking)
        assert run()[0] == 128 + number
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    assert run.checkpoint()["global_step"] == 3
    assert run("--ckpt_path", "last")[0] == 0
    assert (run.folder / "metrics.csv").read_bytes() == (whole.folder / "metrics.csv").read_bytes()
    assert equal(run.checkpoint()["current_model_state"], whole.checkpoint()["current_model_state"])


@pytest.mark.parametrize("moment", ["twice", "while the data is opened"])
def test_ctrl_c_at_other_moments(moment, new, monkeypatch):
    run = new("dvae")
    owner, name = (dvae.train, "open_source") if moment == "while the data is opened" else (LitDVAE, "training_step")
    real = getattr(owner, name)

    def interrupted(*args):
        if moment == "twice" and args[-1] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        if moment == "while the data is opened" or args[-1] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(owner, name, interrupted)
    assert run()[0] == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if moment == "twice":
        assert run.checkpoint()["global_step"] == 2, "the second one does not wait for a save"


@STAGES
def test_D34_a_loading_process_that_is_killed_is_told_and_the_run_goes_on(stage, new, monkeypatch):
    whole, run, real = new(stage, "whole"), new(stage, "run"), MODULE[stage].step
    assert whole()[0] == 0
    run.config["data"]["workers"] = 1
    run.config["model"]["checkpoint_every"] = 1

    def step(self, batch, update, batch_index):
        if update == 2:
            for loader in multiprocessing.active_children():
                os.kill(loader.pid, signal.SIGKILL)
                loader.join()
        return real(self, batch, update, batch_index)

    with monkeypatch.context() as patch:
        replace_step(patch, MODULE[stage], step)
        code, said = run()
    assert code == 5 and "a loading process died" in said and "--ckpt_path last" in said
    assert run("--ckpt_path", "last")[0] == 0
    assert equal(run.checkpoint()["state_dict"], whole.checkpoint()["state_dict"])


@STAGES
def test_D31_a_run_is_not_continued_on_other_data(stage, new, tmp_path, tiny_dvae):
    """The same name means other rows now: other files, and no trace of what was examined; other tokens."""

    def make(first):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        if stage == "dalle":
            prepare(f"scenes:val:{first}", str(tiny_dvae), out=str(tmp_path / "data"), size=300, length=16)
        for n in range(first, first + 12) if stage == "dvae" else ():
            to_png(open_source("scenes:train:40", 32).image(n), tmp_path / "data" / f"{n:02d}.png")

    run = new(stage)
    run.config["data"]["source" if stage == "dvae" else "tokens"] = str(tmp_path / "data")
    make(20)
    assert run()[0] == 0
    run.config["trainer"]["max_steps"] = 6
    before = {path: path.read_bytes() for path in (run.folder / "checkpoints").iterdir()}
    make(21)
    shutil.rmtree(run.folder / "data", ignore_errors=True)
    code, said = run("--ckpt_path", "last")
    assert code == 3 and "was begun on other data" in said
    assert {path: path.read_bytes() for path in (run.folder / "checkpoints").iterdir()} == before
    make(20)
    shutil.rmtree(run.folder / "data", ignore_errors=True)
    assert run("--ckpt_path", "last")[0] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_disk_says_comes_home_whole(new, monkeypatch, workers):
    run = new("dvae")
    run.config["data"]["workers"] = workers

    def broken(*_):
        raise OSError(5, "Input/output error", "some/file")

    monkeypatch.setattr(dvae.train.Pictures, "__getitems__", broken)
    code, said = run()
    assert code == 5 and said.startswith("error: Input/output error (some/file)\nhint: ")


@pytest.mark.parametrize("workers", [0, 2])
def test_D31_a_picture_that_changes_during_the_training_is_named(new, tmp_path, monkeypatch, workers):
    for n in range(12):
        to_png(open_source("scenes:train:12", 32).image(n), tmp_path / "data" / f"{n:02d}.png")
    run, real = new("dvae"), LitDVAE.step
    run.config["data"].update(source=str(tmp_path / "data"), val="scenes:val:4", workers=workers)

    def step(self, batch, update, batch_index):
        (tmp_path / "data" / "07.png").write_bytes((tmp_path / "data" / "08.png").read_bytes())
        return real(self, batch, update, batch_index)

    with monkeypatch.context() as patch:
        replace_step(patch, LitDVAE, step)
        run.config["trainer"]["max_steps"] = 12
        code, said = run()
    assert code == 3 and "07.png changed since it was examined (other bytes)" in said
    assert said.count("\n") == 2 and "hint: bring that file back" in said
    to_png(open_source("scenes:train:12", 32).image(7), tmp_path / "data" / "07.png")
    assert run("--ckpt_path", "last")[0] == 0


# -------------------------------------------------------------------------------------------------------- fine-tuning


@STAGES
def test_init_from_starts_from_an_artefact(stage, new, monkeypatch):
    first, second = new(stage, "first"), new(stage, "second")
    first.config["trainer"]["max_steps"] = second.config["trainer"]["max_steps"] = 2
    assert first()[0] == 0
    second.config["model"]["init_from"] = str(first.folder)
    begun = {}
    real = MODULE[stage].step

    def step(self, batch, update, batch_index):
        if not begun:
            begun.update({name: value.clone() for name, value in self.state_dict().items()})
        return real(self, batch, update, batch_index)

    replace_step(monkeypatch, MODULE[stage], step)
    assert second()[0] == 0
    assert equal(begun, first.checkpoint("best")["state_dict"]), "the averaged weights of the best validation"

    other = new(stage, "other")
    other.config["model"]["init_from"] = str(first.folder)
    if stage == "dvae":
        other.config["model"]["config"]["hidden"] = 16
    else:
        other.config["model"]["width"] = 16
    code, said = other()
    assert code == 2 and "another architecture" in said and not other.folder.exists()
    other.config["model"]["init_from"] = "no/such/run"
    assert other()[0] == 4


def test_both_stages_are_fine_tuned_on_other_pictures(new, tmp_path, tiny_tokens):
    vocabulary = str(tiny_tokens / "text.json")
    grown, tuned, stranger = (new("dvae", name) for name in ("grown", "tuned", "stranger"))
    first, second = new("dalle", "first"), new("dalle", "second")
    for run in (grown, tuned, stranger, first, second):
        run.config["trainer"]["max_steps"] = 2
    stranger.config["seed_everything"] = 5
    tuned.config["data"].update(source="scenes:heldout:24", val="scenes:heldout:8")
    tuned.config["model"]["init_from"] = str(grown.folder)
    for run in (grown, tuned, stranger):
        assert run()[0] == 0
        prepare("scenes:heldout:24", str(run.folder), vocabulary, str(tmp_path / f"tokens-{run.folder.name}"))
    begun_with = artefact.digest(grown.folder / "model")
    for run in (grown, tuned):  # both go on; what the second one was begun with stays what it was
        run.config["trainer"]["max_steps"] = 4
        assert run("--ckpt_path", "last")[0] == 0
    assert artefact.digest(grown.folder / "model") != begun_with
    assert artefact.load(tuned.folder / "model", "dvae").about["started_from"] == begun_with

    first.config["data"]["tokens"] = str(tmp_path / "tokens-grown")
    assert first()[0] == 0

    second.config["model"]["init_from"] = str(first.folder)
    second.config["data"]["tokens"] = str(tmp_path / "tokens-stranger")
    code, said = second()
    assert code == 2 and "another image tokenizer" in said
    second.config["data"]["tokens"] = str(tmp_path / "tokens-tuned")
    assert second()[0] == 0, "its image tokenizer was trained on from the first one's"


def test_from_codes_starts_from_what_the_codes_look_like(new, tiny_tokens, monkeypatch):
    codes, begun, real = load_dvae(tiny_tokens / "dvae").codes(), [], LitDALLE.step

    def step(self, batch, update, batch_index):
        begun.append(self.model.image_head.weight.detach().clone())
        return real(self, batch, update, batch_index)

    replace_step(monkeypatch, LitDALLE, step)
    misfits = []
    for share in (0.0, 1.0):
        run, begun[:] = new("dalle", f"share-{share:.0f}"), []
        run.config["model"]["from_codes"], run.config["trainer"]["max_steps"] = share, 2
        assert run()[0] == 0
        centred = codes - codes.mean(0)
        best = torch.linalg.lstsq(centred, begun[0]).solution
        misfits.append(((centred @ best - begun[0]).norm() / begun[0].norm()).item())
    assert misfits[1] < 1e-5 < 0.3 < misfits[0]

    run = new("dalle", "wrong")
    run.config["model"]["from_codes"] = 1.5
    code, said = run()
    assert code == 2 and "from_codes is 1.5" in said


# ------------------------------------------------------------------------------------------------------------- extras


@pytest.mark.parametrize("stage", MAIN)
def test_wandb_gets_numbers_uint8_pictures_histograms_and_a_table(stage, new, monkeypatch):
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    numbers, pictures, tables = {}, [], []

    class Quiet(WandbLogger):  # everything up to the border of wandb itself
        experiment = None

        def log_metrics(self, metrics, step=None):
            numbers.setdefault(step, {}).update(metrics)

        def log_image(self, key, images, step=None, **_):
            pictures.append((key, step, images))

        def log_table(self, key, columns=None, data=None, step=None, **_):
            tables.append((key, columns, data, step))

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", Quiet)
    monkeypatch.setattr(lit, "WandbLogger", Quiet)
    run = new(stage)
    run.config["trainer"]["max_steps"] = 2
    run.config["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"save_dir": str(run.folder)},
    }
    code, said = run()
    assert code == 0 and "has failed" not in said
    rows = run.metrics()
    assert numbers.keys() == {1, 2} and f"{numbers[2]['val/loss']:.6g}" == rows[-1]["val/loss"]
    assert [(key, step) for key, step, _ in pictures] == {
        "dvae": [("reconstructions", 2), ("codebook", 2)],
        "dalle": [("samples", 2)],
    }[stage]
    for _, _, [picture] in pictures:
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.max() > 1
    if stage == "dvae":
        histogram = numbers[2]["codebook/cells_per_code"]
        assert isinstance(histogram, wandb.Histogram) and sum(histogram.histogram) == 16, "each code once"
        return
    ((key, columns, data, step),) = tables
    assert (key, columns, step) == ("prompts", ["prompt", "picture", "score"], 2)
    drawer = load_dalle(run.folder)
    caption = (run.folder / "samples" / "prompts.txt").read_text().partition(": ")[2].strip()
    expected = drawer(caption, count=4, keep=4, seed=0)
    assert [row[0] for row in data] == [caption] * 4 and all(isinstance(row[1], wandb.Image) for row in data)
    by_number = {picture.number: picture for picture in expected}
    for number, (_, picture, score) in enumerate(data):
        assert score == pytest.approx(by_number[number].score, abs=1e-3), "what the pipeline would rank it by"
        assert np.array_equal(np.asarray(picture.image), np.asarray(by_number[number].pil()))


def test_tensorboard_gets_numbers_pictures_and_histograms(new):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = new("dvae")
    code, said = run("--run", str(run.folder), "--trainer.logger=TensorBoardLogger")
    assert code == 0 and "has failed" not in said
    (events,) = run.folder.rglob("events.out.tfevents.*")  # in the run folder, where no other was given
    found = accumulator.EventAccumulator(str(events.parent), {"images": 0, "histograms": 0, "scalars": 0})
    found.Reload()
    losses = {event.step: f"{event.value:.5g}" for event in found.Scalars("val/loss")}
    assert losses == {int(row["step"]): f"{float(row['val/loss']):.5g}" for row in run.metrics() if row["val/loss"]}
    for name in ("reconstructions", "codebook"):
        assert [event.step for event in found.Images(name)] == [2, 4]
    shown = Image.open(io.BytesIO(found.Images("reconstructions")[-1].encoded_image_string))
    kept = Image.open(run.folder / "samples" / "reconstructions-0000004.png")
    assert np.array_equal(np.asarray(shown), np.asarray(kept))
    assert [event.histogram_value.num for event in found.Histograms("codebook/cells_per_code")] == [16, 16]


def test_a_logger_that_is_not_installed_is_an_error_before_the_training(new, monkeypatch):
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    run = new("dvae")
    code, said = run("--run", str(run.folder), "--trainer.logger=TensorBoardLogger")
    assert code == 5 and not run.folder.exists()
    assert said == (
        "error: a package is missing: Neither `tensorboard` nor `tensorboardX` is available. Try `pip install`ing "
        'either.\nhint: for TensorBoardLogger: pip install "trainable-dalle[tensorboard]"; other loggers need other '
        "packages\n"
    )


@pytest.mark.parametrize("stage", MAIN)
@pytest.mark.parametrize("when", ["at the start", "on the way"])
def test_T33_a_logger_that_fails_does_not_end_the_training(stage, when, new, monkeypatch):
    from lightning.pytorch.loggers import WandbLogger

    asked = []

    class Broken(WandbLogger):
        @property
        def experiment(self):
            asked.append(self)
            if when == "at the start" or len(asked) > 2:
                raise ConnectionError("no route to\nhost")
            return SimpleNamespace(log=lambda *_: None)

    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", Broken)
    monkeypatch.setattr(lit, "WandbLogger", Broken)
    run, quiet = new(stage), new(stage, "quiet")
    assert quiet()[0] == 0
    run.config["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"save_dir": str(run.folder), "offline": True},
    }
    code, said = run()
    assert code == 0
    assert said.count("warning: Broken has failed and gets nothing from now on: no route to host\n") == 1
    assert len(asked) == (1 if when == "at the start" else 3)
    assert (run.folder / "metrics.csv").read_bytes() == (quiet.folder / "metrics.csv").read_bytes()
    names = [sorted(path.name for path in (r.folder / "samples").iterdir()) for r in (run, quiet)]
    assert names[0] == names[1] and len(names[0]) > 1
    assert equal(run.checkpoint()["state_dict"], quiet.checkpoint()["state_dict"])


@STAGES
def test_curves_and_versions_are_kept(stage, new):
    run = new(stage)
    run.config["trainer"]["max_steps"] = 2
    assert run()[0] == 0
    first = (run.folder / "curves.png").read_bytes()
    curves = plots.read((run.folder / "metrics.csv").read_text())
    drawn = torch.from_numpy(np.array(Image.open(io.BytesIO(first)))).permute(2, 0, 1)
    assert torch.equal(drawn, plots.curves_picture(curves))
    run.config["trainer"]["max_steps"] = 4
    assert run("--ckpt_path", "last")[0] == 0
    assert (run.folder / "curves.png").read_bytes() != first
    begun, continued = json.loads((run.folder / "versions.json").read_text())
    assert (begun["update"], continued["update"]) == (0, 2)
    for entry in (begun, continued):
        assert entry["torch"] == torch.__version__ and entry["python"] == platform.python_version()
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", entry["begun"])
    if stage == "dvae":
        assert [p.name for p in sorted((run.folder / "samples").glob("codebook*"))] == [
            "codebook-0000002.png",
            "codebook-0000004.png",
        ]
    before = {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    assert run("--ckpt_path", "last", command="validate")[0] == 0
    assert before == {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}


def test_versions_of_what_cannot_be_read_begin_anew(tmp_path):
    for content in ("", "{}", "[1]", '[{"x": 1}]', "\0"):
        (tmp_path / "versions.json").write_text(content)
        lit.keep_versions(tmp_path, 7)
        (entry,) = json.loads((tmp_path / "versions.json").read_text())
        assert entry["update"] == 7


def test_show_keeps_what_it_is_given(tmp_path):
    class Trainer:
        is_global_zero, global_step, default_root_dir, loggers = True, 7, str(tmp_path), ()

    picture = to_uint8(torch.rand(3, 4, 6))
    lit.show(Trainer(), "x", picture)
    read = np.asarray(Image.open(tmp_path / "samples" / "x-0000007.png"))
    assert np.array_equal(read, picture.permute(1, 2, 0).numpy())
