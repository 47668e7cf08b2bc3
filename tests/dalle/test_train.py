"""What stage 2 reads of its token files is a function of (seed, epoch, index); what its own settings do."""

import json
from dataclasses import asdict

import pytest
import torch
import yaml

from dalle.__main__ import main as dalle
from dalle.pipeline import load
from dalle.prepare import Prepared
from dalle.text import Text
from dalle.tokens import Sizes, TokenFiles, TokenWriter
from dalle.train import ImageFirst, LitDALLE, Pairs
from dvae.errors import UserError
from dvae.optim import Optimiser
from dvae.schedules import Schedule


def test_a_crop_is_chosen_anew_in_each_epoch_and_the_same_in_any_batch(tmp_path):
    tokens = torch.randint(0, 1000, (6, 4, 2, 2))
    writer = TokenWriter(tmp_path, (2, 2), 1000, crops=4)
    writer.write(tokens, [[f"caption {index}"] for index in range(6)])
    writer.close()
    pairs = Pairs(TokenFiles(tmp_path), Text.train(["caption"], 300, 8), seed=3, bpe_dropout=0.0, caption_dropout=0.0)
    seen = {index: set() for index in range(6)}
    for epoch in range(30):
        rows = [(epoch, index) for index in range(6)]
        together = pairs.__getitems__(rows)["image_tokens"]
        assert torch.equal(together, torch.cat([pairs.__getitems__([row])["image_tokens"] for row in rows]))
        for index, picked in enumerate(together):
            (crop,) = [crop for crop in range(4) if torch.equal(tokens[index, crop], picked)]
            seen[index].add(crop)
    assert all(crops == {0, 1, 2, 3} for crops in seen.values())


# ---------------------------------------------------------------------------------------------------------- settings

SIZES = {"vocab_text": 300, "text_length": 16, "vocab_image": 16, "grid": (4, 4)}


def module(**settings) -> LitDALLE:
    torch.manual_seed(0)
    return LitDALLE(depth=2, width=32, heads=2, sizes=SIZES, optimiser=Optimiser(Schedule(1e-3)), **settings)


def batch(count: int = 6) -> dict:
    """Captions of 1 to 6 words, the third one dropped."""
    ids = torch.arange(300, 316).repeat(count, 1)
    for row in range(count):
        ids[row, : row + 1] = torch.arange(10 * row, 10 * row + row + 1)
    keep = torch.tensor([row != 2 for row in range(count)])
    return {"text_ids": ids, "image_tokens": torch.randint(0, 16, (count, 4, 4)), "keep_text": keep, "rows": []}


def test_patterns_and_checkpointing_reach_the_model():
    assert module().model.config.kinds == ("full", "full") and not module().model.checkpointing
    assert module(patterns="paper").model.config.kinds == ("row", "conv")
    one = module(patterns=["column", "full"], checkpointing=True).model
    assert one.config.kinds == ("column", "full") and one.checkpointing
    with pytest.raises(UserError, match="patterns has 1 kinds and depth is 2"):
        module(patterns=["row"])


@pytest.mark.parametrize("pad_targets", [True, False])
def test_pads_are_text_targets_where_the_setting_says_so(pad_targets):
    lit, data = module(pad_targets=pad_targets), batch()
    loss, numbers = lit.step(data, 0, 0)
    log_p = lit.model(data["text_ids"], data["image_tokens"]).text.log_softmax(-1)
    each = -log_p.gather(2, data["text_ids"][..., None])[..., 0]  # (B, T)
    targets = [
        each[row, position] for row in (0, 1, 3, 4, 5) for position in range(16) if pad_targets or position <= row
    ]
    assert len(targets) == (80 if pad_targets else 18)
    expected = torch.stack(targets).mean()
    assert numbers["train/text_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx((expected / 8 + 7 / 8 * numbers["train/image_loss"]).item(), rel=1e-5)


@pytest.mark.parametrize("pad_targets", [True, False])
@torch.no_grad()
def test_a_validation_is_the_mean_over_all_its_targets_however_it_is_cut(pad_targets):
    lit, data = module(pad_targets=pad_targets), batch()
    data["keep_text"][:] = True
    found = []
    for size in (6, 4, 1):
        lit.on_validation_epoch_start()
        for first in range(0, 6, size):
            lit.validation_step({name: value[first : first + size] for name, value in data.items()}, first)
        found.append(lit.validation_metrics())
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    assert found[0]["val/text_loss"] == pytest.approx(lit.step(data, 0, 0)[1]["train/text_loss"].item(), rel=1e-5)


def test_tokens_of_other_sizes_than_the_config_was_made_for_are_refused():
    assert module(expects=Sizes(**SIZES)).model.config.grid == (4, 4)
    with pytest.raises(UserError) as error:
        module(expects=Sizes(16384, 256, 16, (32, 32)))
    assert error.value.what == (
        "the tokens have other sizes than model.expects: vocab_text 300, not 16384; text_length 16, not 256; "
        "grid (4, 4), not (32, 32)"
    )
    assert error.value.hint == (
        "set model.expects to null to train on these, or prepare others: dalle vocab --size 16384 --length 256 (few "
        "captions give fewer ids) and an image tokenizer of 16 codes on a grid of 32 x 32"
    )


def settings(tokens, run, **model) -> list[str]:
    """A run of two updates; lists and groups are given as JSON."""
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false"]
    small = {"depth": 1, "width": 32, "heads": 2, "prompts": 0, **model}
    small = [
        f"--model.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in small.items()
    ]
    return [
        "--config=dalle/demo",
        f"--run={run}",
        f"--data.tokens={tokens}",
        "--trainer.accelerator=cpu",
        *short,
        *small,
    ]


def test_the_command_line_takes_and_refuses_these_settings(tiny_tokens, tmp_path, capsys):
    def fit(name, **model) -> tuple[int, str]:
        code = dalle(["fit", *settings(tiny_tokens, tmp_path / name, **model)])
        return code, capsys.readouterr().err

    found = asdict(Prepared(tiny_tokens).sizes)
    assert fit("a", patterns=["row"], pad_targets=False, checkpointing=True, expects=found) == (0, "")
    kept = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["model"]
    assert (kept["patterns"], kept["pad_targets"], kept["checkpointing"]) == (["row"], False, True)
    assert kept["expects"] == {**found, "grid": [4, 4]}
    assert load(tmp_path / "a").model.config.kinds == ("row",)

    code, said = fit("b", expects={**found, "grid": [8, 8]})
    assert code == 2 and said.startswith(
        "error: the tokens have other sizes than model.expects: grid (4, 4), not (8, 8)\n"
    )
    code, said = fit("b", patterns=["row", "conv"])
    assert code == 2 and said.startswith("error: patterns has 2 kinds and depth is 1\n")
    code, said = fit("b", patterns=["full"], init_from=str(tmp_path / "a"))
    assert code == 2 and "has another architecture than this config" in said
    assert not (tmp_path / "b").exists()
    assert fit("b", patterns=["row"], init_from=str(tmp_path / "a")) == (0, "")


# ------------------------------------------------------------------------------------------------------- both orders


def test_a_share_of_the_batches_is_read_picture_first():
    """Which ones is a function of the seed and the batch; their loss is of the other order, with weights of its own."""
    order = ImageFirst(0.3, text_weight=0.6, image_weight=0.2)
    lit, data = module(image_first=order, pad_targets=False), batch()
    orders = []
    for index in range(400):
        loss, numbers = lit.step(data, 0, index)
        orders.append("train/caption_loss" in numbers)
        assert numbers["train/loss"] == loss
    assert 0.2 < sum(orders) / len(orders) < 0.4
    assert orders == ["train/caption_loss" in lit.step(data, 7, index)[1] for index in range(400)]
    loss, numbers = lit.step(data, 0, orders.index(True))
    logits = lit.model(data["text_ids"], data["image_tokens"], image_first=True)
    each = -logits.text.log_softmax(-1).gather(2, data["text_ids"][..., None])[..., 0]  # pads count: they end a caption
    text, picture = each[data["keep_text"]].mean(), losses_of_pictures(logits.image, data["image_tokens"])
    assert numbers["train/caption_loss"].item() == pytest.approx(text.item(), rel=1e-5)
    assert numbers["train/picture_loss"].item() == pytest.approx(picture, rel=1e-5)
    assert loss.item() == pytest.approx(0.6 * text.item() + 0.2 * picture, rel=1e-5)


def losses_of_pictures(logits, tokens) -> float:
    return -logits.log_softmax(-1).gather(2, tokens.flatten(1)[..., None]).mean().item()


def test_a_model_of_one_order_has_no_other():
    assert not module().model.config.both_orders and module(image_first=ImageFirst(0.1)).model.config.both_orders
    lit = module()
    assert all("train/caption_loss" not in lit.step(batch(), 0, index)[1] for index in range(50))


@pytest.mark.parametrize("given", [dict(share=1.0), dict(share=-0.1), dict(text_weight=0.5)])
def test_shares_that_cannot_be_and_weights_of_nothing_are_refused(given):
    with pytest.raises(UserError, match="image_first"):
        ImageFirst(**given)


def test_a_model_that_draws_learns_to_caption(tiny_dalle):
    """A fine-tuning may add the other order; what was learned stays, and the added position is one of its own."""
    drawer = load(tiny_dalle)
    c = drawer.model.config
    sizes = {name: getattr(c, name) for name in ("vocab_text", "text_length", "vocab_image", "grid")}
    given = dict(depth=c.depth, width=c.width, heads=c.heads, sizes=sizes, optimiser=Optimiser(Schedule(1e-3)))
    tuned = LitDALLE(**given, init_from=str(tiny_dalle), image_first=ImageFirst(0.5)).model
    data = {"text_ids": drawer.text.encode(["a red circle"]), "image_tokens": torch.randint(0, 16, (1, 4, 4))}
    for one, other in zip(tuned(**data), drawer.model(**data), strict=True):
        assert torch.equal(one, other)
