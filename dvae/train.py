"""Stage 1 under Lightning: `dvae fit | validate | test`.

    dvae fit --config dvae/scenes --run runs/scenes-dvae
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from dvae import artefact, lit, plots, seeds
from dvae.codebook import usage
from dvae.data import (
    MANIFEST,
    ROWS,
    Source,
    check_names,
    check_outside,
    check_share,
    check_sides,
    examined,
    open_source,
    split,
)
from dvae.errors import UserError, warn
from dvae.forecast import built
from dvae.images import augment, grid, to_uint8
from dvae.model import DVAE, DVAEConfig
from dvae.quantize import usage_gap
from dvae.schedules import Schedule
from dvae.tokenizer import KIND, load


class Pictures(Dataset):
    """Batches of one source: uint8 images `(B, 3, size, size)` and the (epoch, index) rows they come from."""

    def __init__(self, source: Source, size: int, seed: int, augmented: bool):
        self.source, self.size, self.seed, self.augmented = source, size, seed, augmented

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, rows: list[tuple[int, int]]) -> dict[str, Any]:
        if not self.augmented:
            return {"images": self.source.images([index for _, index in rows]), "rows": rows}
        pictures = [
            augment(self.source.image(index), self.size, seeds.rng(self.seed, "augment", epoch, index))
            for epoch, index in rows
        ]
        return {"images": torch.stack(pictures), "rows": rows}


class ImageData(lit.Data):
    """The pictures of a training.

    Args:
        source: where they are: scenes:train, a folder, a listing, tars, Parquet files, a Hub data set.
        val: another such source for validation; null splits `val_share` off the first one.
        val_share: share of the rows that is validated on where `val` is null, chosen by a digest of their bytes.
        hold_out: a regular expression; the rows with a caption that it matches whole are validated on, instead.
        image_size: height and width that they are brought to, pixels (set by the model's config).
        batch_size: pictures per batch and device.
        workers: loading processes; 0 loads in the training process.
        augment: random crop, scale and flip as in the paper's listing 1, instead of a centred square.
        max_bad: share of unusable files up to which training starts.
        seed: set by seed_everything.

    A training keeps in RUN/data what it has seen of its files; once there is a checkpoint it goes on with
    just these.
    """

    def __init__(
        self,
        source: str,
        val: str | None = None,
        val_share: float = 0.05,
        hold_out: str | None = None,
        image_size: int = 256,
        batch_size: int = 32,
        workers: int = 0,
        augment: bool = False,
        max_bad: float = 0.01,
        seed: int = 0,
    ):
        super().__init__(batch_size, workers, seed)
        check_names(source, val, hold_out)
        self.source, self.val_source, self.val_share, self.hold_out = source, val, val_share, hold_out
        self.image_size, self.augmented, self.max_bad = image_size, augment, max_bad

    def setup(self, stage: str) -> None:
        run = lit.run_folder(self.trainer)
        check_outside(run, self.source, self.val_source)
        folder = run / "data"
        if stage == "fit" and not any((run / "checkpoints").glob("*.ckpt")):  # files may have been mended since
            for seen in (folder, folder / "val"):
                (seen / MANIFEST).unlink(missing_ok=True)
        train = self.open(self.source, folder, stage)
        if self.val_source is None:
            train, val = split(train, self.val_share, self.hold_out)
        else:
            val = self.open(self.val_source, folder / "val", stage)
        check_sides(train, val)
        for part in (train, val):
            part.keep()  # scenes are drawn here, once, not in each loading process
        self.train = Pictures(train, self.image_size, self.seed, self.augmented)
        self.val = Pictures(val, self.image_size, self.seed, augmented=False)

    def identity(self) -> str:
        return f"{self.train.source.identity} {self.val.source.identity}"

    def open(self, name: str, folder: Path, stage: str) -> Source:
        kept = stage == "fit" or examined(folder, name)  # a validation on other data leaves the training's alone
        source = open_source(name, self.image_size, 0, folder if kept else None)
        check_share(source, self.max_bad)
        if bad := source.listed - len(source):
            shown = [f"  {key}: {reason}" for key, reason in itertools.islice(source.skipped(), 10)]
            more = [f"  ... all of them in {folder / ROWS}"] * (kept and bad > len(shown))
            print(f"{name}: {source.listed} listed, {len(source)} used, {bad} skipped:", *shown, *more, sep="\n")
        return source


@dataclass(frozen=True)
class Revival:
    """Codes that no cell chose move beside codes whose cells are painted worst. Not in the paper; for tied codes only.

    Args:
        every: updates between two looks.
        until: the last update at which codes are moved, so that the averaged weights can follow.
    """

    every: int
    until: int


class LitDVAE(lit.Lit):
    """Trains a discrete VAE on the relaxed evidence lower bound (paper, eq. 1 and appendix A.2).

    The loss is in nats per pixel value: reconstruction summed over the picture plus `kl_weight` times the KL summed
    over the grid, both divided by H * W * 3. So beta means what it means in the paper at any size and any grid.

    Args:
        config: the architecture.
        optimiser: AdamW, its schedule, averaging.
        temperature: of the Gumbel-softmax, over updates.
        kl_weight: the paper's beta, over updates.
        usage_weight: weight of ln K minus the entropy of the batch-mean code distribution, nats, over updates; not in
            the paper; null switches it off.
        revival: of codes that are not in use; null leaves them where they are.
        straight_through: one-hot codes in the forward pass instead of the paper's soft ones.
        channels_last: memory layout of the convolutions; faster on CPUs and on GPUs with tensor cores.
        init_from: a run or artefact to start from (fine-tuning); null starts from nothing.
        checkpoint_every: updates between two writes of last.ckpt (it is also written after each validation).
        seed: set by seed_everything.
    """

    def __init__(
        self,
        config: DVAEConfig,
        optimiser: lit.Optimiser,
        temperature: Schedule,
        kl_weight: Schedule,
        usage_weight: Schedule | None = None,
        revival: Revival | None = None,
        straight_through: bool = False,
        channels_last: bool = True,
        init_from: str | None = None,
        checkpoint_every: int = 1000,
        seed: int = 0,
    ):
        super().__init__(optimiser, checkpoint_every, seed)
        if temperature.least <= 0:
            raise UserError(
                f"temperature goes from {temperature.start} to {temperature.end}", "give values above 0, such as 0.0625"
            )
        if kl_weight.least < 0:
            raise UserError(
                f"kl_weight goes from {kl_weight.start} to {kl_weight.end}", "give weights from 0 on, such as 6.6"
            )
        self.temperature, self.kl_weight, self.usage_weight = temperature, kl_weight, usage_weight
        self.revival = revival
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = built(lambda: DVAE(config, straight_through))
        self.started_from: str | None = None
        if init_from is not None:
            start = load(init_from)
            if not isinstance(start, DVAE):
                raise UserError(
                    f"{init_from} is a {type(start).__name__}, which is read and painted with, not trained",
                    "start from a run of `dvae fit` or `dvae import openai`, or leave --init_from away",
                )
            self.started_from = artefact.digest(artefact.find(init_from, KIND))
            if start.config != config:
                raise UserError(
                    f"{init_from} has another architecture than this config", f"use its own config: {start.config}"
                )
            self.model.load_state_dict(start.state_dict())
        self.model.to(memory_format=self.memory_format)
        self.collapsed = False
        if revival is not None:
            if self.model.sphere is None:
                raise UserError("revival is set, but the codes are not tied", "set config.tied, or revival to null")
            # since the last look: how often each code was chosen, and how badly its cells were painted, in all
            self.register_buffer("chosen", torch.zeros(config.vocab_size))
            self.register_buffer("badness", torch.zeros(config.vocab_size))
        self.clear()

    def example(self, batch_size: int) -> dict[str, Any]:
        side = self.model.config.image_size
        return {"images": torch.zeros(batch_size, 3, side, side, dtype=torch.uint8)}

    def pictures(self, batch: dict[str, Any]) -> Tensor:
        return (batch["images"].float() / 255).contiguous(memory_format=self.memory_format)

    def step(self, batch: dict[str, Any], update: int, batch_index: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        images = self.pictures(batch)
        temperature, beta = self.temperature(update), self.kl_weight(update)
        noise = seeds.generator(self.seed, "gumbel", batch_index, self.global_rank, device=self.device)
        raw, logits, quantized = self.model(images, temperature, noise)
        each = self.model.likelihood.nll(raw, images)
        if self.revival is not None:
            self.watch(quantized.tokens, each.detach() - each.detach().min())
        nll = each.mean()
        kl = quantized.penalty.mean()  # nats per picture
        loss = nll + beta * kl / images[0].numel()
        if self.usage_weight is None:
            gap = usage_gap(logits.detach())
        else:
            gap = usage_gap(logits)
            loss = loss + self.usage_weight(update) * gap
        cells = quantized.tokens[0].numel()
        return loss, {
            "train/loss": loss.detach(),
            "train/nll": nll.detach(),
            "train/kl": kl.detach() / cells,  # nats per token, ln K at the most
            "train/usage_gap": gap.detach(),
            "train/temperature": temperature,
            "train/kl_weight": beta,
        }

    def watch(self, tokens: Tensor, badness: Tensor) -> None:
        """Add up what tokens `(B, h, w)` and the badness of each value `(B, 3, H, W)` say of the codes."""
        per_cell = F.adaptive_avg_pool2d(badness.mean(1), tokens.shape[1:])
        self.chosen.index_add_(0, tokens.flatten(), torch.ones_like(per_cell).flatten())
        self.badness.index_add_(0, tokens.flatten(), per_cell.flatten())

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        super().on_train_batch_start(batch, batch_index)
        update, first = self.trainer.global_step, batch_index % self.trainer.accumulate_grad_batches == 0
        if self.revival is not None and first and 0 < update <= self.revival.until and not update % self.revival.every:
            self.revive(seeds.generator(self.seed, "revival", update))

    @torch.no_grad()
    def revive(self, generator: torch.Generator) -> None:
        chosen, badness = (self.trainer.strategy.reduce(x, reduce_op="sum").cpu() for x in (self.chosen, self.badness))
        dead = (chosen <= 0.05 * chosen.mean()).nonzero()[:, 0]
        if len(dead):
            beside = torch.multinomial(badness, len(dead), replacement=True, generator=generator)
            points = self.model.sphere.points().cpu()[beside]
            codes = self.model.sphere.codes
            codes[dead] = F.normalize(points + 0.1 * torch.randn(points.shape, generator=generator), dim=1).to(codes)
            for moment in self.trainer.optimizers[0].state[codes].values():
                if moment.shape == codes.shape:
                    moment[dead] = 0
        self.chosen.zero_()
        self.badness.zero_()

    def clear(self) -> None:
        self.seen: dict[str, float] = {"pictures": 0, "nll": 0.0, "relaxed_nll": 0.0, "kl": 0.0, "psnr": 0.0}
        self.counts = torch.zeros(self.model.vocab_size, dtype=torch.int64)

    def on_validation_epoch_start(self) -> None:
        self.clear()

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        images, model = self.pictures(batch), self.model
        noise = seeds.generator("validation", batch_index)  # the same in every validation, so that values compare
        temperature = self.temperature(self.trainer.global_step)
        relaxed, logits, quantized = model(images, temperature, noise)
        hard = model.paint(torch.zeros_like(logits).scatter_(1, quantized.tokens[:, None], 1.0))
        error = (model.likelihood.picture(hard) - images).square().mean((1, 2, 3))
        self.seen["pictures"] += len(images)
        self.seen["nll"] += model.likelihood.nll(hard, images).mean((1, 2, 3)).sum().item()
        self.seen["relaxed_nll"] += model.likelihood.nll(relaxed, images).mean((1, 2, 3)).sum().item()
        self.seen["kl"] += quantized.penalty.sum().item() / quantized.tokens[0].numel()
        self.seen["psnr"] += (-10 * error.clamp_min(1e-10).log10()).sum().item()
        self.counts += usage(quantized.tokens.cpu(), model.vocab_size).counts
        if batch_index == 0 and self.trainer.state.fn == "fit":
            count = min(16, len(images))
            both = torch.stack([images[:count], model.likelihood.picture(hard[:count])], 1).flatten(0, 1)
            lit.show(self.trainer, "reconstructions", grid(to_uint8(both.cpu()), columns=min(8, 2 * count)))

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn != "fit":
            return
        lit.show(self.trainer, "codebook", plots.usage_picture(self.counts))
        for guest in lit.guests(self.trainer):
            guest.log_histogram("codebook/cells_per_code", self.counts, self.trainer.global_step)

    def test_step(self, batch: dict[str, Any], batch_index: int) -> None:
        self.validation_step(batch, batch_index)

    def validation_metrics(self) -> dict[str, float]:
        """Over the whole validation set: nats per value, nats per token, dB, shares.

        `val/loss` is the negative bound with hard codes, without KL and usage terms: what stage 2 will see.
        """
        pictures = self.seen["pictures"]
        codes = usage(torch.empty(0, dtype=torch.int64), self.model.vocab_size)._replace(counts=self.counts)
        collapsed, self.collapsed = self.collapsed, codes.used < 0.1
        if self.collapsed and not collapsed:  # told once, until it has recovered
            weights = "usage_weight" if self.usage_weight else "kl_weight, or give usage_weight (0.02 is a start)"
            warn(
                f"only {codes.used:.1%} of the {self.model.vocab_size} codes are in use: the codebook has collapsed",
                f"lower the learning rate, let the temperature fall slower, or raise {weights}",
            )
        return {
            "val/loss": self.seen["nll"] / pictures,
            "val/relaxed_gap": (self.seen["nll"] - self.seen["relaxed_nll"]) / pictures,
            "val/kl": self.seen["kl"] / pictures,
            "val/psnr": self.seen["psnr"] / pictures,
            "codebook/used": codes.used,
            "codebook/perplexity": codes.perplexity,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["started_from"] = self.started_from

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.started_from = checkpoint["started_from"]  # the other run may have been trained on since

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        # lets a transformer of that tokenizer go on with the tokens of this one
        lineage = {} if self.started_from is None else {"started_from": self.started_from}
        self.model.save(folder, about | lineage)


class Command(lit.Command):
    def add_arguments_to_parser(self, parser: Any) -> None:
        super().add_arguments_to_parser(parser)
        parser.link_arguments("model.config.image_size", "data.image_size")


def main(args: Sequence[str]) -> None:
    """`dvae fit | validate | test` with these command-line arguments."""
    lit.run(Command, LitDVAE, ImageData, args)
