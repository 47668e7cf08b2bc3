"""Stage 2 under Lightning: `dalle fit | validate | test`.

    dalle fit --config dalle/scenes --data.tokens runs/scenes-tokens --run runs/scenes-dalle
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from dalle import gpu, pipeline
from dalle.model import DALLE, DALLEConfig, losses
from dalle.prepare import Prepared
from dalle.sampling import Sampled
from dalle.scaling import BlockScales
from dalle.text import Text
from dalle.tokens import Sizes, TokenFiles
from dvae import artefact, lit, seeds
from dvae.errors import UserError
from dvae.files import write_bytes
from dvae.forecast import built
from dvae.images import grid, to_uint8
from dvae.tokenizer import load as load_dvae


class Pairs(Dataset):
    """Batches of text ids `(B, T)`, image tokens `(B, h, w)` and which captions were kept `(B,)`.

    Which crop and which of the captions of a picture are read, how the caption falls into pieces and whether it is
    dropped are functions of (seed, epoch, index).
    """

    def __init__(self, tokens: TokenFiles, text: Text, seed: int, bpe_dropout: float, caption_dropout: float):
        self.tokens, self.text, self.seed = tokens, text, seed
        self.bpe_dropout, self.caption_dropout = bpe_dropout, caption_dropout
        self.null = text.null()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitems__(self, rows: list[tuple[int, int]]) -> dict[str, Any]:
        ids, keep = [], []
        for epoch, index in rows:
            rng = seeds.rng(self.seed, "caption", epoch, index)
            captions = self.tokens.captions(index)
            caption = captions[int(rng.integers(len(captions)))]
            keep.append(rng.random() >= self.caption_dropout)
            ids.append(self.text.encode(caption, self.bpe_dropout, rng) if keep[-1] else self.null)
        crops = [int(seeds.rng(self.seed, "crop", *row).integers(self.tokens.crops)) for row in rows]
        tokens = self.tokens.tokens([index for _, index in rows], crops)
        return {"text_ids": torch.cat(ids), "image_tokens": tokens, "keep_text": torch.tensor(keep), "rows": rows}


class TokenData(lit.Data):
    """What `dalle prepare` wrote.

    Args:
        tokens: the folder; nothing else is read.
        batch_size: pairs per batch and device.
        workers: loading processes; 0 loads in the training process.
        bpe_dropout: chance of leaving out a merge (the paper: 0.1).
        caption_dropout: share of the captions replaced by the null prompt, which guidance needs.
        seed: set by seed_everything.
    """

    def __init__(
        self,
        tokens: str,
        batch_size: int = 64,
        workers: int = 0,
        bpe_dropout: float = 0.1,
        caption_dropout: float = 0.1,
        seed: int = 0,
    ):
        super().__init__(batch_size, workers, seed)
        for name, chance in (("bpe_dropout", bpe_dropout), ("caption_dropout", caption_dropout)):
            if not 0 <= chance <= 1:
                raise UserError(f"{name} is {chance}", "give a chance from 0 to 1, such as 0.1")
        self.bpe_dropout, self.caption_dropout = bpe_dropout, caption_dropout
        self.prepared = Prepared(tokens)
        self.sizes = asdict(self.prepared.sizes)

    def setup(self, stage: str) -> None:
        p = self.prepared
        self.train = Pairs(p.train, p.text, self.seed, self.bpe_dropout, self.caption_dropout)
        self.val = Pairs(p.val, p.text, self.seed, bpe_dropout=0.0, caption_dropout=0.0)

    def identity(self) -> str:
        return self.prepared.digest

    def caption_sample(self, count: int) -> list[str]:
        """Captions of the training set for the contrast score: one of each of at most `count` pictures."""
        tokens = self.prepared.train
        rows = seeds.rng("caption sample").permutation(len(tokens))[:count]
        return [tokens.captions(int(row))[0] for row in rows]


def check_sizes(found: Sizes, expected: Sizes | None) -> None:
    """Refuse tokens of other sizes than a config was made for.

    Raises:
        UserError: naming every size that differs, with both values.
    """
    if expected is None or found == expected:
        return
    was, wanted = asdict(found), asdict(expected)
    differing = [f"{name} {was[name]}, not {wanted[name]}" for name in was if was[name] != wanted[name]]
    few = " (few captions give fewer ids)" if found.vocab_text < expected.vocab_text else ""
    raise UserError(
        f"the tokens have other sizes than model.expects: {'; '.join(differing)}",
        f"set model.expects to null to train on these, or prepare others: dalle vocab --size {expected.vocab_text} "
        f"--length {expected.text_length}{few} and an image tokenizer of {expected.vocab_image} codes on a grid of "
        f"{expected.grid[0]} x {expected.grid[1]}",
    )


@dataclass(frozen=True)
class ImageFirst:
    """Batches in the other order, pictures before their words: they make the model a captioner, too. Not in the paper.

    Args:
        share: of the batches, from 0 (none) to below 1.
        text_weight: of the mean text loss there, pads counted, for they say where a caption ends: -ln p(text | image).
        image_weight: of the mean image loss there: -ln p(image).
    """

    share: float = 0.0
    text_weight: float = 7 / 8
    image_weight: float = 1 / 8

    def __post_init__(self):
        if not 0 <= self.share < 1:
            raise UserError(f"image_first.share is {self.share}", "give a share from 0 to below 1, such as 0.25")
        unused = [field.name for field in fields(self)[1:] if getattr(self, field.name) != field.default]
        if unused and not self.share:
            raise UserError(f"image_first sets {', '.join(unused)}, and share 0", "set image_first.share, such as 0.25")


class LitDALLE(lit.Lit):
    """Trains the transformer on text and image tokens (paper, 2.2).

    Args:
        depth: blocks, each one attention and one MLP.
        width: size of a state; a multiple of `heads`.
        heads: attention heads.
        sizes: vocabularies, text length and grid; set by the token folder.
        optimiser: AdamW, its schedule, averaging.
        mlp_ratio: width of the MLP's hidden layer over `width`.
        patterns: what each block attends to: full, paper, or a list of one kind for each block (full, row, column,
            conv).
        checkpointing: compute the inside of each block again on the way back instead of keeping it: less memory, more
            time, the same numbers.
        block_scaling: with precision 16-mixed, a gradient scale for each attention and each MLP in place of one for the
            loss (the paper, 2.4).
        compile: let torch compile the inside of the blocks: faster on a GPU after a minute of compiling.
        pad_targets: whether pads are text targets, too.
        expects: the sizes of the tokens that these settings were made for; others are refused. Null takes any.
        text_weight: of the mean text loss (the paper: 1/8).
        image_weight: of the mean image loss (the paper: 7/8).
        image_first: batches that read the picture before its words, and their loss weights.
        from_codes: share of the image embedding's and the image head's first values that comes from what the image
            tokenizer's codes look like, from 0 (the paper) to 1; of a training that starts from nothing.
        init_from: a run or artefact to start from (fine-tuning); null starts from nothing.
        prompts: how many validation captions are drawn at each validation, four pictures each.
        checkpoint_every: updates between two writes of last.ckpt (it is also written after each validation).
        seed: set by seed_everything.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        sizes: dict[str, Any],
        optimiser: lit.Optimiser,
        mlp_ratio: int = 4,
        patterns: str | list[str] = "full",
        checkpointing: bool = False,
        block_scaling: bool = False,
        compile: bool = False,
        pad_targets: bool = True,
        expects: Sizes | None = None,
        text_weight: float = 1 / 8,
        image_weight: float = 7 / 8,
        image_first: ImageFirst = ImageFirst(),  # noqa: B008, it is frozen
        from_codes: float = 0.0,
        init_from: str | None = None,
        prompts: int = 4,
        checkpoint_every: int = 1000,
        seed: int = 0,
    ):
        super().__init__(optimiser, checkpoint_every, seed)
        known = Sizes(**sizes)
        check_sizes(known, expects)
        config = DALLEConfig(
            **asdict(known),
            depth=depth,
            width=width,
            heads=heads,
            mlp_ratio=mlp_ratio,
            patterns=patterns,
            both_orders=image_first.share > 0,
        )
        self.text_weight, self.image_weight, self.prompts = text_weight, image_weight, prompts
        self.pad_targets, self.image_first = pad_targets, image_first
        if not 0 <= from_codes <= 1:
            raise UserError(f"from_codes is {from_codes}", "give a share from 0 to 1, such as 0.8")
        self.from_codes, self.init_from = from_codes, init_from
        self.model = built(lambda: DALLE(config, checkpointing))
        if compile and block_scaling:
            hint = "set model.compile or model.block_scaling to false: scales change, and each would be compiled anew"
            raise UserError("model.compile and model.block_scaling are both true", hint)
        self.block_scaling, self.compile_blocks = block_scaling, compile
        self.scales: BlockScales | None = None  # of a training that scales blocks
        self.lineage: dict[str, str] = {}
        if init_from is not None:
            start, self.started_from = pipeline.load_model(init_from)
            self.lineage = {"started_from": self.started_from.digest}
            if start.config not in (config, replace(config, both_orders=False)):
                raise UserError(
                    f"{init_from} has another architecture than this config and these tokens: {start.config}",
                    "use its depth, width and heads, and tokens prepared with its image tokenizer and its vocabulary",
                )
            weights = start.state_dict()
            if start.config != config:  # it has no position below the grid yet
                below = self.model.row_position.weight[-1:].detach()
                weights["row_position.weight"] = torch.cat([weights["row_position.weight"], below])
            self.model.load_state_dict(weights)

    def example(self, batch_size: int) -> dict[str, Any]:
        config = self.model.config
        return {
            "text_ids": torch.zeros(batch_size, config.text_length, dtype=torch.int64),
            "image_tokens": torch.zeros(batch_size, *config.grid, dtype=torch.int64),
            "keep_text": torch.ones(batch_size, dtype=torch.bool),
        }

    def saving(self) -> str:
        return "" if self.model.checkpointing else "--model.checkpointing true"

    def setup(self, stage: str) -> None:
        if self.from_codes and self.init_from is None:  # a checkpoint, if there is one, is read after this
            codes = load_dvae(self.trainer.datamodule.prepared.dvae).codes()
            self.model.start_from_codes(codes, self.from_codes, seeds.generator(self.seed, "codes"))
        if self.block_scaling and stage == "fit":
            if self.trainer.precision != "16-mixed":
                raise UserError(
                    f"model.block_scaling is true, and the training runs in precision {self.trainer.precision}",
                    "set trainer.precision to 16-mixed, which needs a GPU, or model.block_scaling to false: only "
                    "float16 has too few exponents",
                )
            self.trainer.precision_plugin.scaler = None  # Lightning's one scale of the loss
            self.scales = BlockScales(2 * self.model.config.depth, self.trainer.accumulate_grad_batches)

    def on_fit_start(self) -> None:
        self._check_start()
        if self.device.type == "cuda" and not gpu.succeeds("flex attention", self._attend_sparsely):
            self.model.sparse.clear()
        if self.compile_blocks:
            gpu.compiled(self.model.blocks, self._try)

    def _attend_sparsely(self) -> None:
        model, orders = self.model, (False, True) if self.model.config.both_orders else (False,)
        for image_first in orders:
            layout = model.image_first_layout if image_first else model.layout
            for kind in set(model.config.kinds) - {"full"}:
                model.sparse[kind, image_first] = gpu.sparse(layout, kind, self.device)
        if model.sparse:
            self._try()

    def _try(self) -> None:
        """The gradients of a batch of zeros, which leave no trace."""
        sizes, batch = self.model.config, self.trainer.datamodule.batch_size
        ids, tokens = ((batch, sizes.text_length), (batch, *sizes.grid))
        with self.trainer.precision_plugin.forward_context():
            logits = self.model(*(torch.zeros(size, dtype=torch.int64, device=self.device) for size in (ids, tokens)))
        torch.autograd.grad(logits.text.sum() + logits.image.sum(), list(self.model.parameters()), allow_unused=True)

    def _check_start(self) -> None:
        if self.init_from is None:
            return
        prepared, known = self.trainer.datamodule.prepared, self.started_from.parts["dvae"]
        tokenizer = artefact.verify(prepared.dvae)
        if artefact.digest(known) not in (tokenizer["digest"], tokenizer["about"].get("started_from")):
            raise UserError(
                f"{prepared.folder} was prepared with another image tokenizer than {self.init_from} draws with",
                f"prepare the tokens with --dvae {known}, or with one that was trained on from it (--init_from)",
            )
        if self.started_from.files["text"] != prepared.text.to_json():
            raise UserError(
                f"{prepared.folder} was prepared with another vocabulary than {self.init_from}",
                f"prepare the tokens with the vocabulary that {self.init_from} was trained with (--text)",
            )

    def step(self, batch: dict[str, Any], update: int, batch_index: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        ids, tokens = batch["text_ids"], batch["image_tokens"]
        image_first = seeds.rng(self.seed, "order", batch_index).random() < self.image_first.share
        logits = self.model(ids, tokens, None if self.scales is None else self.scales.values, image_first)
        text, image = losses(logits, ids, tokens, batch["keep_text"], self.pad_targets or image_first)
        if image_first:
            loss = self.image_first.text_weight * text + self.image_first.image_weight * image
            return loss, {
                "train/loss": loss.detach(),
                "train/caption_loss": text.detach(),
                "train/picture_loss": image.detach(),
            }
        loss = self.text_weight * text + self.image_weight * image
        accuracy = (logits.image.detach().argmax(-1) == tokens.flatten(1)).float().mean()
        return loss, {
            "train/loss": loss.detach(),
            "train/text_loss": text.detach(),
            "train/image_loss": image.detach(),
            "train/image_accuracy": accuracy,
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        reduce = partial(self.trainer.strategy.reduce, reduce_op="max")
        skip = self.scales is not None and self.scales.unscale(self.model.branches(), reduce)
        super().on_before_optimizer_step(optimizer)
        if skip:
            optimizer.zero_grad()  # what has no gradient is not moved, nor are its moments
        if self.scales is not None:
            self.latest |= {
                "train/block_scale_smallest": min(self.scales.values),
                "train/block_scale_largest": max(self.scales.values),
                "train/skipped_updates": self.scales.skipped / self.scales.updates,
            }

    def on_validation_epoch_start(self) -> None:
        self.seen = {"pairs": 0, "texts": 0, "text": 0.0, "image": 0.0, "accuracy": 0.0}
        self.seen |= {"caption": 0.0, "picture": 0.0}

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        ids, tokens = batch["text_ids"], batch["image_tokens"]
        logits = self.model(ids, tokens)
        text, image = losses(logits, ids, tokens, batch["keep_text"], self.pad_targets)
        accuracy = (logits.image.argmax(-1) == tokens.flatten(1)).float().mean()
        # what the batch's text loss is a mean over: captions of equal length, or words
        texts = len(ids) if self.pad_targets else int((ids < self.model.config.vocab_text).sum())
        for name, count in (("pairs", len(ids)), ("texts", texts)):
            self.seen[name] += count
        for name, value, count in (("text", text, texts), ("image", image, len(ids)), ("accuracy", accuracy, len(ids))):
            self.seen[name] += value.item() * count
        if self.model.config.both_orders:
            caption, picture = losses(self.model(ids, tokens, image_first=True), ids, tokens, batch["keep_text"])
            self.seen["caption"] += caption.item() * len(ids)
            self.seen["picture"] += picture.item() * len(ids)

    def test_step(self, batch: dict[str, Any], batch_index: int) -> None:
        self.validation_step(batch, batch_index)

    def validation_metrics(self) -> dict[str, float]:
        """Nats per token and the share of image tokens guessed right, over the whole validation set.

        `val/loss`, by which the best weights are chosen, is that of text first: of what draws.
        """
        text = self.seen["text"] / max(self.seen["texts"], 1)
        image, accuracy = (self.seen[name] / self.seen["pairs"] for name in ("image", "accuracy"))
        other = ("caption", "picture") if self.model.config.both_orders else ()
        return {
            "val/loss": self.text_weight * text + self.image_weight * image,
            "val/text_loss": text,
            "val/image_loss": image,
            "val/image_accuracy": accuracy,
            **{f"val/{name}_loss": self.seen[name] / self.seen["pairs"] for name in other},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lineage"] = self.lineage
        if self.scales is not None:
            checkpoint["block_scales"] = self.scales.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.lineage = checkpoint.get("lineage", {})  # the other run may have been trained on since
        if self.scales is not None:
            self.scales.load_state_dict(checkpoint["block_scales"])

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        data: TokenData = self.trainer.datamodule
        captions = data.caption_sample(pipeline.CAPTIONS)
        about = about | {"split": data.prepared.split, "caption_dropout": data.caption_dropout} | self.lineage
        pipeline.save(folder, self.model, data.prepared.text, captions, data.prepared.dvae, about)

    def configure_callbacks(self) -> Sequence[Callback]:
        # before the averaging callback puts the training weights back, see lit.Lit
        return [DrawPrompts(self.prompts), *super().configure_callbacks()]


class DrawPrompts(Callback):
    """Draws the same validation captions with the same seeds at each validation: one row of four for each caption."""

    def __init__(self, prompts: int):
        self.prompts = prompts

    def on_validation_epoch_end(self, trainer: Trainer, module: LitDALLE) -> None:
        if not self.prompts or trainer.state.fn != "fit":
            return
        prepared: Prepared = trainer.datamodule.prepared
        captions = [prepared.val.captions(row)[0] for row in range(min(self.prompts, len(prepared.val)))]
        knows_null = trainer.datamodule.caption_dropout > 0
        drawn = pipeline.Pipeline(
            module.model, prepared.text, load_dvae(prepared.dvae), captions, prepared.folder, knows_null
        )
        sampled = drawn.sample(captions, count=4)
        images = to_uint8(drawn.tokenizer.decode(sampled.tokens.cpu()))
        lit.show(trainer, "samples", grid(images, columns=4))
        if guests := lit.guests(trainer):
            rows = scored(drawn, captions, images, sampled)
            for guest in guests:
                guest.log_table("prompts", ("prompt", "picture", "score"), rows, trainer.global_step)
        text = "".join(f"{row + 1}: {caption}\n" for row, caption in enumerate(captions))
        write_bytes(lit.run_folder(trainer) / "samples" / "prompts.txt", text.encode())


def scored(
    drawn: pipeline.Pipeline, captions: Sequence[str], images: Tensor, sampled: Sampled
) -> list[tuple[str, Tensor, float]]:
    """Each picture with its caption and the score that the pipeline ranks by; as many for each caption."""
    score, count = drawn.scorer(drawn.ranker), len(images) // len(captions)
    rows = []
    for row, caption in enumerate(captions):
        own = slice(row * count, (row + 1) * count)
        some = Sampled(sampled.tokens[own], sampled.logprobs[own], None)
        values = score(drawn.model, drawn.text.encode(caption), some).tolist()
        rows += [(caption, image, value) for image, value in zip(images[own], values, strict=True)]
    return rows


class Command(lit.Command):
    def add_arguments_to_parser(self, parser: Any) -> None:
        super().add_arguments_to_parser(parser)
        parser.link_arguments("data.sizes", "model.sizes", apply_on="instantiate")


def main(args: Sequence[str]) -> None:
    """`dalle fit | validate | test` with these command-line arguments."""
    lit.run(Command, LitDALLE, TokenData, args)
