"""What both trainings share of Lightning: endless batches, optimiser, validation, checkpoints, the command line.

A training is counted in updates, not in epochs: to Lightning it is one endless epoch, and the passes over the data
happen inside the order of the batches (`data.Endless`). Every random decision is a function of where it belongs
(`seeds`). So a checkpoint holds weights, optimiser, averages and counters, and a killed run that is continued ends
bit-identical to one that was never stopped.

A run folder holds config.yaml, versions.json, metrics.csv and its curves.png, samples/*.png,
checkpoints/{last,best}.ckpt and the artefact model/.
"""

import contextlib
import csv
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import platform
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from dvae import forecast, images, plots
from dvae.commands import Plain, find_config
from dvae.data import Endless
from dvae.errors import ArtefactError, DataError, EnvironmentProblem, NumericsError, Stopped, UserError, warn
from dvae.files import replacing, sweep, write_json
from dvae.forecast import fast_bfloat16
from dvae.loading import Once, deaths_told, loader
from dvae.optim import Optimiser, StepSize

# ---------------------------------------------------------------------------------------------------------- batches


def training_loader(dataset: Dataset, batch: int, seed: int, workers: int, trainer: Trainer) -> DataLoader:
    """Endless batches of `dataset`, going on where the trainer's restored counters say that it stopped."""
    start = trainer.fit_loop.epoch_loop.batch_progress.current.processed
    order = Endless(len(dataset), batch, seed, start=start, rank=trainer.global_rank, world=trainer.world_size)
    return loader(dataset, order, workers, persistent=True)


def validation_loader(dataset: Dataset, batch: int, workers: int) -> DataLoader:
    return loader(dataset, Once(len(dataset), batch), workers)


class Data(LightningDataModule):
    """Two data sets whose `__getitems__` turns a list of (epoch, index) pairs into a batch with a `rows` entry."""

    train: Dataset
    val: Dataset

    def __init__(self, batch_size: int, workers: int, seed: int):
        super().__init__()
        if batch_size < 1 or workers < 0:
            raise UserError(f"batch_size {batch_size}, workers {workers}", "at least 1 row and 0 workers are needed")
        self.batch_size, self.workers, self.seed = batch_size, workers, seed

    def identity(self) -> str:
        """Equal for equal rows; a run is not continued on others."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, str]:
        return {"identity": self.identity()}

    def load_state_dict(self, state: dict[str, str]) -> None:
        if self.trainer.state.fn == "fit" and state["identity"] != self.identity():
            raise DataError(
                f"{run_folder(self.trainer)} was begun on other data than its config names now",
                "bring the data back as they were, or begin another run with --run FOLDER",
            )

    def train_dataloader(self) -> DataLoader:
        return training_loader(self.train, self.batch_size, self.seed, self.workers, self.trainer)

    def val_dataloader(self) -> DataLoader:
        return validation_loader(self.val, self.batch_size, self.workers)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if isinstance(batch, Exception):
            raise batch
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


# ---------------------------------------------------------------------------------------------------------- training


class Lit(LightningModule):
    """A thin wrapper of a plain model. A stage says `step` (loss and numbers of one batch) and `validation_metrics`."""

    model: torch.nn.Module

    def __init__(self, optimiser: Optimiser, checkpoint_every: int, seed: int):
        super().__init__()
        self.optimiser, self.checkpoint_every, self.seed = optimiser, checkpoint_every, seed
        self.step_size = StepSize(optimiser.learning_rate, optimiser.plateau)
        self.latest: dict[str, Tensor | float] = {}

    def step(self, batch: Any, update: int, batch_index: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss of a batch and the numbers worth logging; `batch_index` counts batches from the run's start."""
        raise TypeError(f"{type(self).__name__} does not say what a step is")

    def validation_metrics(self) -> dict[str, float]:
        """What the validation that ends now has seen; `val/loss` decides which weights are the best."""
        raise TypeError(f"{type(self).__name__} does not say what a validation finds")

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the stage's artefact with the weights that the model holds now."""
        raise TypeError(f"{type(self).__name__} does not say how it is saved")

    def example(self, batch_size: int) -> dict[str, Any]:
        """A batch of the shapes and types of a training's: `dvae.forecast` counts with it what one takes."""
        raise TypeError(f"{type(self).__name__} does not say what a batch is")

    def saving(self) -> str:
        """A setting that would take less memory, with its value; "" where there is none."""
        return ""

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        loss, self.latest = self.step(batch, self.trainer.global_step, batch_index)
        if not torch.isfinite(loss):
            raise non_finite("loss", loss.item(), self.trainer.global_step, batch["rows"])
        self.rows = batch["rows"]
        return loss

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.step_size(self.trainer.global_step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # a loss scaler tries scales until none overflows, and skips these updates itself; one below 1 is not to blame
        if not torch.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            raise non_finite("gradient", norm.item(), self.trainer.global_step, self.rows)
        if self.optimiser.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.optimiser.clip, norm)
        self.latest |= {"train/gradient_norm": norm, "train/learning_rate": optimizer.param_groups[0]["lr"]}
        if scaler is not None:
            self.latest["train/loss_scale"] = scaler.get_scale()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimiser.build(self.model)

    def configure_callbacks(self) -> Sequence[Callback]:
        # the order matters: validation is judged and drawn while the averaged weights are in place, that is, before
        # the averaging callback puts the training weights back
        callbacks: list[Callback] = [Validation()]
        if self.optimiser.ema is not None:
            callbacks.append(Averaging(self.optimiser.ema, self.optimiser.ema_every))
        if self.optimiser.plateau is not None:
            callbacks.append(Halving(self.step_size))
        return [*callbacks, Pace(), Checkpoints(self.checkpoint_every)]


class Averaging(WeightAveraging):
    """Exponentially averaged weights that follow after updates 1, 1 + `every`, ..., of which the first is copied.

    Until it they are the weights before the training. All tensors move in one call, unlike in EMAWeightAveraging.
    """

    state_key = "WeightAveraging"  # as it stands in the checkpoints

    def __init__(self, decay: float, every: int):
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.every = every

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx % self.every == 0


class Halving(Callback):
    """Tells the step size each update's loss, the mean over batches and processes; keeps its state in checkpoints."""

    def __init__(self, step_size: StepSize):
        self.step_size = step_size
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, module: Lit, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(module.latest["train/loss"])
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        loss = float(trainer.strategy.reduce(torch.stack(self.losses).mean(), reduce_op="mean"))
        self.losses.clear()
        if self.step_size.see(trainer.global_step - 1, loss):
            update = trainer.global_step
            module.print(f"after update {update} the loss stopped falling: step size {self.step_size(update):.4g}")

    def state_dict(self) -> dict[str, float]:
        return self.step_size.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.step_size.load_state_dict(state)


def non_finite(what: str, value: float, update: int, rows: Sequence[tuple[int, int]]) -> NumericsError:
    named = ", ".join(str(index) for _, index in rows[:8]) + (", ..." if len(rows) > 8 else "")
    return NumericsError(
        f"the {what} of update {update} is {value}; rows of the batch: {named}",
        "the weights were not changed and the last checkpoint is good; look at those rows, or lower the learning rate",
    )


class Validation(Callback):
    """At the end of each validation: log what was found, draw, and keep the artefact of the best weights so far."""

    def __init__(self):
        self.best = math.inf
        self.improved = False

    def on_validation_epoch_end(self, trainer: Trainer, module: Lit) -> None:
        metrics = module.validation_metrics()
        module.log_dict(metrics, logger=False)
        record(trainer, metrics)
        if trainer.state.fn != "fit":
            return
        draw_curves(trainer)
        if not math.isfinite(metrics["val/loss"]):
            raise NumericsError(
                f"the validation loss after update {trainer.global_step} is {metrics['val/loss']}",
                "the kept artefact and the last checkpoint are good; lower the learning rate",
            )
        # processes must agree, for all of them write the checkpoint of what has improved, or none
        self.improved = trainer.strategy.broadcast(metrics["val/loss"] < self.best)
        if self.improved:
            self.best = metrics["val/loss"]
        if self.improved and trainer.is_global_zero:
            about = {"step": trainer.global_step, **{k: float(v) for k, v in metrics.items()}}
            module.save(run_folder(trainer) / "model", about)

    def on_test_epoch_end(self, trainer: Trainer, module: Lit) -> None:
        metrics = {name.replace("val/", "test/"): value for name, value in module.validation_metrics().items()}
        module.log_dict(metrics, logger=False)
        record(trainer, metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]


def clock(device: torch.device) -> float:
    """Seconds, read when `device` has done all that it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.monotonic()


class Pace(Callback):
    """Tells once how long the training will take, from three timed updates. The first one of a process is not timed,
    for it also prepares what the others find; validations are not, and come on top."""

    timed = 3

    def __init__(self):
        self.updates, self.seconds, self.begun = 0, 0.0, 0.0

    def on_train_batch_end(self, trainer: Trainer, module: Lit, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches or self.updates > self.timed:
            return
        now = clock(trainer.strategy.root_device)
        self.seconds += now - self.begun if self.updates else 0.0
        self.begun, self.updates = now, self.updates + 1
        left = trainer.max_steps - trainer.global_step
        if self.updates > self.timed and left > 0:
            told = forecast.to_the_end(self.seconds / self.timed, left, datetime.now())
            module.print(f"{told}; validations come on top")

    def on_validation_end(self, trainer: Trainer, module: Lit) -> None:
        self.begun = clock(trainer.strategy.root_device)


WHOLE = False  # Lightning's `weights_only` of a save: optimiser and counters are written too


def check_counts(trainer: Any, optimiser: Optimiser) -> None:
    """Refuse settings of a trainer that contradict each other, before anything is written."""
    accumulate, interval = trainer.accumulate_grad_batches, trainer.val_check_interval
    if trainer.gradient_clip_val is not None:
        raise UserError("trainer.gradient_clip_val is set", "clip with model.optimiser.clip instead")
    if trainer.max_steps < 1:
        raise UserError("trainer.max_steps is not set", "a training here is counted in updates: set max_steps")
    if trainer.check_val_every_n_epoch is not None or not isinstance(interval, int) or interval % accumulate:
        raise UserError(
            f"trainer.val_check_interval is {interval} with check_val_every_n_epoch {trainer.check_val_every_n_epoch}",
            f"set check_val_every_n_epoch to null and val_check_interval to a whole number of batches, a multiple of "
            f"accumulate_grad_batches ({accumulate})",
        )
    if trainer.max_steps * accumulate % interval:
        raise UserError(
            f"{trainer.max_steps} updates of {accumulate} batches do not end at a validation ({interval} batches)",
            f"make max_steps a multiple of {interval // accumulate}, so that the final weights are validated",
        )
    if optimiser.ema_every > interval // accumulate:
        raise UserError(
            f"optimiser.ema_every is {optimiser.ema_every}, but validations are {interval // accumulate} updates apart",
            "averaged weights that have not moved would be judged: "
            f"set ema_every to {interval // accumulate} or less, such as 1, or validate less often",
        )


def supported(precision: Any, accelerator: str) -> Any:
    """The precision to train in: the one asked for, or where the device lacks it the next best, which is told."""
    asked, tell = forecast.SHORT.get(str(precision), precision), rank_zero_only(warn)
    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    device = {"auto": gpu or "cpu", "gpu": gpu}.get(accelerator, accelerator)
    if (device, asked) == ("cpu", "16-mixed"):
        tell("16-mixed needs a GPU: this runs in bf16-mixed", "--trainer.precision 32-true would round nothing")
        return "bf16-mixed"
    if (device, asked) == ("cuda", "bf16-mixed") and not torch.cuda.is_bf16_supported(including_emulation=False):
        tell("this GPU has no bfloat16: this runs in 32-true", "--trainer.precision 16-mixed may be faster")
        return "32-true"
    if (device, asked) == ("cpu", "bf16-mixed") and not fast_bfloat16():
        tell("this CPU computes slowly in bfloat16", "--trainer.precision 32-true is likely to be faster")
    return precision


def foretell(trainer: Trainer, module: Lit, batch_size: int) -> None:
    """Say how many parameters are trained and how much memory that takes; refuse it where there is not so much.

    Raises:
        EnvironmentProblem: the memory is not enough.
    """
    parameters = list(module.parameters())
    precision, accumulate, device = trainer.precision, trainer.accumulate_grad_batches, trainer.strategy.root_device
    told = f"{sum(parameter.numel() for parameter in parameters):,} parameters"
    if precision in forecast.PRECISIONS:

        @functools.cache
        def need(pictures: int, batches: int) -> int:
            return forecast.memory(module, pictures, precision, batches > 1, module.optimiser.ema is not None)

        free = forecast.available(device)
        if free is not None:
            if device.type == "cpu":  # it holds the weights already, and what all processes need
                free = free // trainer.num_devices + sum(parameter.nbytes for parameter in parameters)
            forecast.check(need, batch_size, accumulate, trainer.val_check_interval, free, module.saving())
        told += f"; a training of {batch_size:,} pictures at a time in {precision} needs about "
        told += forecast.size(need(batch_size, accumulate)) + " on each device" * (trainer.world_size > 1)
    if trainer.is_global_zero:
        print(told)


class Checkpoints(Checkpoint):
    """Logs, saves and stops at the border of an update, where nothing is half done.

    SIGINT and SIGTERM only raise a flag; the training then ends after the running update, its state saved. A second
    Ctrl-C leaves at once, and the last checkpoint stands.
    """

    def __init__(self, every: int):
        self.every = every
        self.stop = 0  # the signal that asked for it

    def on_fit_start(self, trainer: Trainer, module: Lit) -> None:
        if trainer.is_global_zero:
            for folder in (".", "checkpoints", "samples", "model", "data", "data/val"):
                sweep(run_folder(trainer) / folder)

    def on_train_start(self, trainer: Trainer, module: Lit) -> None:
        if trainer.is_global_zero:
            keep_versions(run_folder(trainer), trainer.global_step)

        def ask(number: int, frame: Any) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = number

        with contextlib.suppress(ValueError):  # outside the main thread signals belong to somebody else
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, ask)  # Lightning restores all handlers after the training, however it ends

    def on_train_batch_end(self, trainer: Trainer, module: Lit, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, stop = trainer.global_step, self.agreed(trainer)
        if step % trainer.log_every_n_steps == 0:
            record(trainer, module.latest)
        if (batch_idx + 1) % trainer.val_check_batch and (step % self.every == 0 or stop):
            self.save(trainer, stop)

    def on_validation_end(self, trainer: Trainer, module: Lit) -> None:
        # a validation that was due belongs to its update: saved before it, it would be skipped after a resume
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            if next(c for c in trainer.callbacks if isinstance(c, Validation)).improved:
                trainer.save_checkpoint(run_folder(trainer) / "checkpoints" / "best.ckpt", WHOLE)
            self.save(trainer, self.agreed(trainer))

    def agreed(self, trainer: Trainer) -> int:
        """The signal that any of the processes was stopped by: one that stops alone leaves the others waiting."""
        strategy = trainer.strategy
        return int(strategy.reduce(torch.tensor(self.stop, device=strategy.root_device), reduce_op="max"))

    def save(self, trainer: Trainer, stop: int) -> None:
        trainer.save_checkpoint(run_folder(trainer) / "checkpoints" / "last.ckpt", WHOLE)
        if stop:
            raise Stopped(stop)


def run_folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir)


def record(trainer: Trainer, metrics: Mapping[str, Tensor | float]) -> None:
    """Give numbers to every logger, under the count of updates."""
    numbers = {name: float(value) for name, value in metrics.items()}
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=trainer.global_step)


def guests(trainer: Trainer) -> list["Guest"]:
    """The loggers that the user has chosen, which take more than numbers."""
    return [logger for logger in trainer.loggers if isinstance(logger, Guest)]


def show(trainer: Trainer, name: str, picture: Tensor) -> None:
    """Keep a uint8 picture `(3, H, W)` as samples/NAME-STEP.png, and give it to W&B and TensorBoard where chosen."""
    if not trainer.is_global_zero:
        return
    images.save(picture, run_folder(trainer) / "samples" / f"{name}-{trainer.global_step:07d}.png")
    for guest in guests(trainer):
        guest.log_picture(name, picture, trainer.global_step)


def draw_curves(trainer: Trainer) -> None:
    """Draw RUN/curves.png again, of all that metrics.csv holds."""
    path = run_folder(trainer) / "metrics.csv"
    if trainer.is_global_zero and path.is_file():
        images.save(plots.curves_picture(plots.read(path.read_text())), path.with_name("curves.png"))


# ------------------------------------------------------------------------------------------------------------- files


class SafeCheckpoints(CheckpointIO):
    """Checkpoints that are whole or not there, and that notice a flipped bit.

    The file is an ordinary torch file; its SHA-256 stands in the comment field of the zip archive that it is.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        content = buffer.getbuffer()
        assert bytes(content[-22:-18]) == b"PK\x05\x06" and bytes(content[-2:]) == b"\0\0", "not a zip without comment"
        digest = hashlib.sha256(content).hexdigest().encode()
        with replacing(path) as file:
            file.write(content[:-2])
            file.write(len(digest).to_bytes(2, "little") + digest)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        path = Path(path)
        if not path.is_file():
            raise ArtefactError(f"there is no checkpoint {path}", "leave --ckpt_path away to start from nothing")
        content = path.read_bytes()
        body, length, digest = content[:-66], content[-66:-64], content[-64:]
        if length != (64).to_bytes(2, "little") or hashlib.sha256(body + b"\0\0").hexdigest().encode() != digest:
            raise ArtefactError(
                f"the checkpoint {path} is damaged, or was not written by this project",
                "use another checkpoint of the run (best.ckpt), or start the run again",
            )
        return torch.load(io.BytesIO(content), map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class MetricsFile(Logger):
    """One row per logged step in metrics.csv; a resumed run appends, and forgets what it had logged too far ahead."""

    def __init__(self, path: Path, keep_until: int | None):
        super().__init__()
        self.path, self.rows, self.columns = path, [], ["step"]
        if keep_until is not None and path.is_file():
            text = path.read_bytes().decode()
            text = text[: text.rfind("\n") + 1]  # a power cut may have left half a row
            table = csv.DictReader(io.StringIO(text, newline=""))
            self.rows = [row for row in table if int(row["step"]) <= keep_until]
            self.columns = list(dict.fromkeys([*self.columns, *(key for row in self.rows for key in row)]))
        self.write()

    name = "metrics"
    version = ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The run's config.yaml says it all."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": str(step), **{name: f"{value:.6g}" for name, value in metrics.items()}}
        old = next((old for old in reversed(self.rows) if old["step"] == row["step"]), None)
        unknown = [name for name in row if name not in self.columns]
        if old is None:
            self.rows.append(row)
        else:
            old.update(row)
        self.columns += unknown
        if unknown or old is not None:
            self.write()
        else:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    @rank_zero_only
    def write(self) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, self.columns)
        table.writeheader()
        table.writerows(self.rows)
        with replacing(self.path) as file:
            file.write(text.getvalue().encode())


class Guest(Logger):
    """Somebody else's logger. The first time that it fails is told, then it is left alone: the training goes on.

    W&B and TensorBoard get pictures and histograms too, and W&B tables; any other logger gets the numbers.
    """

    name = "guest"
    version = ""

    def __init__(self, logger: Logger):
        super().__init__()
        self.logger, self.works = logger, True

    def give(self, send: Callable[[Any], Any]) -> None:
        if not self.works:
            return
        try:
            send(self.logger)
        except Exception as error:
            self.works = False
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            warn(
                f"{type(self.logger).__name__} has failed and gets nothing from now on: {reason}",
                "the training goes on; metrics.csv, curves.png and samples/ of the run have everything",
            )

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.give(lambda logger: logger.log_hyperparams(*args, **kwargs))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.give(lambda logger: logger.log_metrics(metrics, step=step))

    def log_picture(self, name: str, picture: Tensor, step: int) -> None:
        """A uint8 picture `(3, H, W)`."""

        def send(logger: Any) -> None:
            if isinstance(logger, WandbLogger):  # takes uint8 (H, W, 3): floats in [0, 1] would be shown as black
                logger.log_image(name, [picture.permute(1, 2, 0).numpy()], step=step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, picture.numpy(), step)

        self.give(send)

    def log_histogram(self, name: str, values: Tensor, step: int) -> None:
        """How values of any shape are distributed."""

        def send(logger: Any) -> None:
            if isinstance(logger, WandbLogger):
                from wandb import Histogram

                logger.log_metrics({name: Histogram(values.flatten().tolist())}, step=step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_histogram(name, values.numpy(), step)

        self.give(send)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Rows of texts, numbers and uint8 pictures `(3, H, W)`."""

        def send(logger: Any) -> None:
            if isinstance(logger, WandbLogger):
                from wandb import Image

                shown = [[Image(x.permute(1, 2, 0).numpy()) if isinstance(x, Tensor) else x for x in r] for r in rows]
                logger.log_table(name, columns=list(columns), data=shown, step=step)

        self.give(send)

    def save(self) -> None:
        self.give(lambda logger: logger.save())

    def finalize(self, status: str) -> None:
        self.give(lambda logger: logger.finalize(status))


class Progress(TQDMProgressBar):
    """A bar that counts to the end of the training."""

    @property
    def total_train_batches(self) -> int:
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        super().on_train_start()
        bar = self.train_progress_bar
        bar.reset(self.total_train_batches)
        bar.initial = bar.n = bar.last_print_n = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        bar.set_description("training")

    def on_train_epoch_start(self, *_: Any) -> None:
        """The one endless epoch is not begun by a run that is continued."""

    def get_metrics(self, trainer: Trainer, module: Lit) -> dict[str, Any]:
        shown = super().get_metrics(trainer, module)
        shown.pop("v_num", None)
        return shown | {"loss": f"{float(module.latest['train/loss']):.4g}"} if module.latest else shown


# ---------------------------------------------------------------------------------------------------------- commands

# settings that may differ when a run is continued: none of them changes what is computed up to a given update
FREE = {"ckpt_path", "config", "weights_only", "verbose", "run", "data.workers", "model.checkpoint_every"}
FREE |= {"model.checkpointing"}
FREE |= {f"trainer.{x}" for x in ("default_root_dir", "max_steps", "max_time", "logger")}
FREE |= {f"trainer.enable_{x}" for x in ("progress_bar", "model_summary")}


class Parser(Plain, LightningArgumentParser):
    pass


class Command(LightningCLI):
    """`fit`, `validate` and `test` of one stage; one YAML is one experiment."""

    def __init__(self, module: type[Lit], data: type[Data], args: Sequence[str]):
        super().__init__(
            module,
            data,
            save_config_callback=None,
            seed_everything_default=0,
            parser_class=Parser,
            args=spelled_out(args),
            trainer_defaults={
                "enable_checkpointing": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 50,
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {k: v for k, v in LightningCLI.subcommands().items() if k != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str | None, help="the run folder: everything that is written goes there")
        parser.link_arguments("run", "trainer.default_root_dir")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def _parse_ckpt_path(self) -> None:
        """A checkpoint brings no settings with it: the config is the whole experiment."""

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause and not isinstance(cause, ModuleNotFoundError | UserError):
                cause = cause.__cause__
            if isinstance(cause, UserError):  # of settings that may be null
                raise cause from None
            if not cause:
                raise
            raise EnvironmentProblem(
                f"a package is missing: {str(cause).splitlines()[0]}",
                'for TensorBoardLogger: pip install "trainable-dalle[tensorboard]"; other loggers need other packages',
            ) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config[self.subcommand]
        if not config.run:
            raise UserError("no run folder is given", "say where to write, for instance --run runs/first")
        run = Path(config.run)
        if self.subcommand != "fit" and config.ckpt_path is None and config.model.init_from is None:
            raise UserError(
                f"{self.subcommand} was not told which weights to take",
                "name them: --ckpt_path best, or --init_from RUN",
            )
        checkpoint = self.checkpoint(run, config.ckpt_path)
        settings = self.config_init[self.subcommand].trainer
        if settings.enable_progress_bar is not False:
            settings.callbacks = [*(settings.callbacks or []), Progress(refresh_rate=10)]
        chosen = settings.logger
        loggers = chosen if isinstance(chosen, list) else [chosen] if isinstance(chosen, Logger) else []
        loggers = [Guest(logger) for logger in loggers]
        if self.subcommand == "fit":
            check_counts(settings, self.model.optimiser)
        settings.precision = supported(settings.precision, settings.accelerator)
        self.config_init[self.subcommand].ckpt_path = None if checkpoint is None else str(checkpoint)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on the number of workers and the like
            plugins = [*(settings.plugins or []), SafeCheckpoints()]
            trainer = super().instantiate_trainer(logger=loggers, plugins=plugins, **kwargs)
        if self.subcommand == "fit":  # from here on it is written to the run folder
            foretell(trainer, self.model, self.datamodule.batch_size)
            self.keep_config(run, continues=config.ckpt_path is not None)
            step = None if checkpoint is None else saved_step(checkpoint)
            trainer.loggers = [MetricsFile(run / "metrics.csv", step), *loggers]
        return trainer

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            print(f"wrote {run_folder(self.trainer)}, {self.trainer.global_step} updates")

    def checkpoint(self, run: Path, asked: str | None) -> Path | None:
        """`last` and `best` mean the run's own; a `last` that is not there yet means to begin."""
        if asked is None:
            return None
        if asked not in ("last", "best"):
            return Path(asked)
        path = run / "checkpoints" / f"{asked}.ckpt"
        if path.is_file():
            return path
        if self.subcommand == "fit" and asked == "last":
            print(f"{run} holds no checkpoint yet: the training begins")
            return None
        raise ArtefactError(f"{run} holds no {asked} checkpoint", "train it first: fit writes one at each validation")

    def keep_config(self, run: Path, continues: bool) -> None:
        """Write config.yaml; refuse to mix two experiments in one folder."""
        path = run / "config.yaml"
        parser = self._parser(self.subcommand)
        text = parser.dump(self.config[self.subcommand], skip_unset=False)
        new = yaml.safe_load(text)
        if any((run / "checkpoints").glob("*.ckpt")):  # what failed before its first checkpoint may begin again
            usual = yaml.safe_load(parser.dump(parser.get_defaults(), skip_unset=False, skip_validation=True))
            old = laid_over(usual, yaml.safe_load(path.read_text()))  # a run may be older than a setting
            if not continues:
                raise UserError(
                    f"{run} already holds a run",
                    "continue it with --ckpt_path last, or write elsewhere with --run FOLDER",
                )
            differing = [
                f"{key}: {was} there, {now} here"
                for key, was, now in differences(old, new)
                if not any(f"{key}.".startswith(f"{free}.") for free in FREE)
            ]
            if differing:
                raise UserError(
                    f"the config differs from the one that {run} was begun with ({'; '.join(differing)})",
                    "continue with the old settings, or begin another run with --run FOLDER",
                )
        with replacing(path) as file:
            file.write(text.encode())


def versions() -> dict[str, str | None]:
    """What a training runs with; null where that is not known."""
    try:
        project = importlib.metadata.version("trainable-dalle")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
        project = None
    return {
        "project": project,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": importlib.metadata.version("lightning"),
    }


def commit() -> str | None:
    """The commit of the checkout that this file lies in, "-dirty" after it where files differ from it."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        git = ["git", "--no-optional-locks", "-C", str(root), *describe]
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def keep_versions(run: Path, update: int) -> None:
    """Note in RUN/versions.json what the training runs with from this update on; what came later is forgotten."""
    path = run / "versions.json"
    try:
        earlier = [entry for entry in json.loads(path.read_bytes()) if entry["update"] < update]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        earlier = []
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    write_json(path, [*earlier, {"update": update, "begun": now, **versions()}])


def laid_over(under: Any, over: Any) -> Any:
    """Nested configs: all of `over`, and of `under` the keys that `over` lacks."""
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    return under | {key: laid_over(under.get(key), value) for key, value in over.items()}


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves of two nested configs that are not equal: (dotted key, old value, new value)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new


def saved_step(checkpoint: Path) -> int:
    return int(SafeCheckpoints().load_checkpoint(checkpoint)["global_step"])


def spelled_out(args: Sequence[str]) -> list[str]:
    """The long form of what may be said shortly.

    `--config dvae/demo` and `--config configs/dvae/demo.yaml` mean the shipped file, from a wheel too, and
    `--init_from RUN` means `--model.init_from RUN`.
    """
    found, previous = [], ""
    for arg in with_folder(args):
        if previous in ("-c", "--config"):
            arg = str(find_config(arg))
        elif arg.startswith("--config="):
            arg = f"--config={find_config(arg.removeprefix('--config='))}"
        elif arg == "--init_from" or arg.startswith("--init_from="):
            arg = f"--model.{arg[2:]}"
        found.append(arg)
        previous = arg
    return found


def with_folder(args: Sequence[str]) -> list[str]:
    """TensorBoard's files go to the run folder where no other is given."""
    if "--trainer.logger=TensorBoardLogger" not in args or any("save_dir" in arg for arg in args):
        return list(args)
    named = [f"--run={after}" for arg, after in itertools.pairwise(args) if arg == "--run"]
    named += [arg for arg in args if arg.startswith("--run=")]
    return [*args, *(f"--trainer.logger.save_dir={arg.removeprefix('--run=')}" for arg in named[-1:])]


def run(command: type[Command], module: type[Lit], data: type[Data], args: Sequence[str]) -> Command:
    """Run `fit`, `validate` or `test` as the command line would."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # no advertisements
    with warnings.catch_warnings():
        # advice that does not fit an endless epoch, or a call from within Python
        advices = ("num_workers", "LeafSpec", "many workers", "worker processes", "IterableDataset", "args parameter")
        for advice in (*advices, "sync_dist"):  # every process validates on everything
            warnings.filterwarnings("ignore", message=f".*{advice}.*")
        died = "often for want of memory: go on with --ckpt_path last and fewer --data.workers (0: without any)"
        try:
            with deaths_told(died):
                return command(module, data, args)
        except MisconfigurationException as error:
            if "backend" in str(error) or "accelerator" in str(error):
                raise EnvironmentProblem(
                    " ".join(str(error).split()), "leave machine/gpu away, or set --trainer.accelerator cpu"
                ) from error
            raise UserError(" ".join(str(error).split()), "change that setting; fit --help lists them all") from error
        except SystemExit as end:
            if not isinstance(end.__context__, KeyboardInterrupt):
                raise
            # Lightning answers a Ctrl-C with exit code 1, deaf to the next one
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from end
