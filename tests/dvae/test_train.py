"""The paper's recipe as a whole; the revival of codes: who moves, where to, and what the optimiser forgets; which files
a training sees.

The loss is tested in test_quantize.py, the model in test_model.py.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.nn import functional as F

from dvae import lit, seeds
from dvae.errors import DataError, UserError
from dvae.images import save
from dvae.lit import Optimiser
from dvae.model import DVAEConfig
from dvae.schedules import Schedule
from dvae.tokenizer import load
from dvae.train import ImageData, LitDVAE, Revival, main

TIED = {"image_size": 32, "vocab_size": 16, "hidden": 8, "groups": 1, "blocks": 1, "code_width": 4, "kernel": 8}
SCHEDULES = {"temperature": Schedule(1.0), "kl_weight": Schedule(0.0)}


def module(tied=True):
    config = DVAEConfig(**TIED, patch=8, gain=1.0, likelihood="l2", tied=tied)
    return LitDVAE(config, Optimiser(Schedule(1e-2)), **SCHEDULES, revival=Revival(every=2, until=4))


# ------------------------------------------------------------------------------------------------- the paper's recipe

CONFIGS = Path(__file__).parents[2] / "configs" / "dvae"


def test_the_papers_recipe_trains_the_papers_model_on_512_pictures_an_update():
    """`DVAEConfig()` is what test_model.py compares with the released code, layer by layer."""
    recipe = yaml.safe_load((CONFIGS / "paper.yaml").read_text())
    assert DVAEConfig(**recipe["model"]["config"]) == DVAEConfig()
    trainer = recipe["trainer"]
    assert recipe["data"]["batch_size"] * trainer["accumulate_grad_batches"] == 512
    assert trainer["val_check_interval"] == 10_000 * trainer["accumulate_grad_batches"]
    assert trainer["max_steps"] % 10_000 == 0


def test_accumulated_batches_are_one_update_of_their_mean_loss(tmp_path, monkeypatch):
    """One update of two batches by the trainer, and the same by hand."""
    seen, step = [], LitDVAE.step

    def record(module, batch, update, batch_index):
        if not seen:
            seen.append({name: value.clone() for name, value in module.model.state_dict().items()})
        seen.append((batch, update, batch_index))
        return step(module, batch, update, batch_index)

    monkeypatch.setattr(LitDVAE, "step", record)
    monkeypatch.setattr(lit, "foretell", lambda *_: None)  # it takes a step without numbers
    settings = "image_size=32 vocab_size=8 hidden=8 groups=3 blocks=1 code_width=4"
    main(
        ["fit", "--config", "dvae/paper", f"--run={tmp_path / 'run'}"]
        + [f"--model.config.{setting}" for setting in settings.split()]
        + ["--model.optimiser.ema=null", "--model.optimiser.learning_rate.start=0.01", "--data.batch_size=3"]
        + ["--data.workers=0"]
        + ["--data.source=scenes:train:8", "--data.val=scenes:val:2", "--trainer.accelerator=cpu"]
        + ["--trainer.precision=32-true", "--trainer.accumulate_grad_batches=2", "--trainer.max_steps=1"]
        + ["--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false"]
    )
    trained = load(tmp_path / "run").state_dict()
    start, *batches = seen
    assert [(len(batch["images"]), update, index) for batch, update, index in batches] == [(3, 0, 0), (3, 0, 1)]
    recipe = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]
    config = DVAEConfig(**recipe["config"])
    module = LitDVAE(config, Optimiser(Schedule(1.0)), Schedule(**recipe["temperature"]), Schedule(0.0))
    module.model.load_state_dict(start)
    sum(step(module, *batch)[0] for batch in batches).div(2).backward()
    parameters = list(module.model.parameters())
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim == 4]},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4,
    )  # fmt: skip
    adamw.step()
    for name, expected in module.model.state_dict().items():
        assert not torch.equal(trained[name], start[name]), name
        torch.testing.assert_close(trained[name], expected, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("sharpness", [1.0, 1e4])
def test_the_relaxed_gap_is_what_hard_codes_lose(sharpness):
    """Over a validation of two batches; nothing, where the temperature is 1/16 and the encoder is certain."""
    sizes = {"image_size": 32, "vocab_size": 8, "hidden": 8, "groups": 3, "blocks": 1, "code_width": 4}
    config = DVAEConfig(**sizes, likelihood="l2", spread=1.0)
    module = LitDVAE(config, Optimiser(Schedule(1.0)), Schedule(1 / 16), Schedule(0.0))
    module._trainer = SimpleNamespace(global_step=7, state=SimpleNamespace(fn="validate"))
    model, gap = module.model.requires_grad_(False), 0.0
    model.encoder.output.weight *= 5 * sharpness
    model.decoder.input.weight *= 5
    module.on_validation_epoch_start()
    for number, count in enumerate((3, 2)):
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        module.validation_step({"images": images}, number)
        images = images / 255
        relaxed, *_ = model(images, 1 / 16, seeds.generator("validation", number))
        hard = model.paint(F.one_hot(model.encode(images), 8).movedim(-1, 1).float())
        gap += sum((model.likelihood.nll(raw, images)).sum().item() * sign for raw, sign in ((hard, 1), (relaxed, -1)))
    expected = gap / (5 * 3 * 32 * 32)
    assert module.validation_metrics()["val/relaxed_gap"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 1e-3 if sharpness == 1 else abs(expected) < 1e-5


# -------------------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("low", [Schedule(0.0), Schedule(1.0, 0.0, 10), Schedule(-1.0, 1.0, 10)])
def test_a_temperature_that_reaches_zero_is_refused_before_it_does(low):
    with pytest.raises(UserError, match="^temperature goes from"):
        LitDVAE(DVAEConfig(image_size=32, vocab_size=4, hidden=8), Optimiser(Schedule(1e-3)), low, Schedule(0.0))


def test_untied_codes_are_not_revived():
    with pytest.raises(UserError, match="not tied"):
        module(tied=False)


def test_watching_adds_up_choices_and_badness_of_each_code():
    lit = module()
    tokens, badness = torch.randint(0, 16, (3, 4, 4)), torch.rand(3, 3, 32, 32)
    lit.watch(tokens, badness)
    lit.watch(tokens, badness)
    for code in range(16):
        chosen, bad = 0, 0.0
        for b in range(3):
            for row in range(4):
                for column in range(4):
                    if tokens[b, row, column] == code:
                        chosen += 2
                        patch = badness[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                        bad += 2 * patch.mean().item()
        assert lit.chosen[code] == chosen
        assert lit.badness[code].item() == pytest.approx(bad, rel=1e-5)


def test_dead_codes_move_beside_the_badly_painted_and_forget_their_moments():
    lit = module()
    codes = lit.model.sphere.codes
    optimiser = torch.optim.AdamW([codes], lr=1e-3)
    codes.grad = torch.ones_like(codes)
    optimiser.step()
    lit._trainer = SimpleNamespace(
        strategy=SimpleNamespace(reduce=lambda x, reduce_op: x.clone()), optimizers=[optimiser]
    )
    lit.chosen += 10
    lit.chosen[[2, 5]] = 0  # dead
    lit.badness[7] = 3.0  # the only ones that are painted badly
    before = lit.model.sphere.points().detach().clone()
    lit.revive(torch.Generator().manual_seed(0))
    after = lit.model.sphere.points().detach()
    assert (before @ before[7])[[2, 5]].max() < 0.9, "a bad start for this test"
    assert ((after @ before[7])[[2, 5]] > 0.9).all()
    others = [code for code in range(16) if code not in (2, 5)]
    assert torch.equal(after[others], before[others])
    moments = optimiser.state[codes]["exp_avg"]
    assert (moments[[2, 5]] == 0).all() and (moments[others] != 0).all()
    assert lit.chosen.sum() == 0 and lit.badness.sum() == 0


# ------------------------------------------------------------------------------------------------------ data


def prepared(run, stage, source, **options):
    pictures = ImageData(str(source), image_size=8, **options)
    pictures.trainer = SimpleNamespace(default_root_dir=str(run))
    pictures.setup(stage)
    return pictures


def test_a_run_sees_the_same_files_as_soon_as_it_has_a_checkpoint(tmp_path):
    photos, run, other = tmp_path / "photos", tmp_path / "run", tmp_path / "other"
    for n in range(6):
        save(torch.full((3, 8, 8), n / 8), photos / f"{n}.png")
        save(torch.full((3, 8, 8), n / 9), other / f"{n}.png")
    (photos / "bad.png").touch()
    with pytest.raises(DataError, match="1 of 7 cannot"):
        prepared(run, "fit", photos)
    (photos / "bad.png").unlink()  # what is mended is seen
    assert len(prepared(run, "fit", photos, val=str(other)).train) == 6
    assert sorted(path.name for path in run.rglob("manifest.json")) == ["manifest.json"] * 2
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    for folder in (photos, other):
        save(torch.ones(3, 8, 8), folder / "new.png")
    for stage in ("fit", "validate", "test"):
        seen = prepared(run, stage, photos, val=str(other))
        assert (len(seen.train), len(seen.val)) == (6, 6)
    elsewhere = prepared(run, "validate", other, val=str(photos))  # and leaves the run's own lists alone
    assert (len(elsewhere.train), len(elsewhere.val)) == (7, 7)
    assert len(prepared(run, "fit", photos, val=str(other)).train) == 6
