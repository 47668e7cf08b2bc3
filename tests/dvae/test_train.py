"""The revival of codes: who moves, where to, and what the optimiser forgets; which files a training sees.

The loss is tested in test_model.py.
"""

from types import SimpleNamespace

import pytest
import torch

from dvae.errors import DataError, UserError
from dvae.images import save
from dvae.lit import Optimiser
from dvae.model import DVAEConfig
from dvae.schedules import Schedule
from dvae.train import ImageData, LitDVAE, Revival

TIED = {"image_size": 32, "vocab_size": 16, "hidden": 8, "groups": 1, "blocks": 1, "code_width": 4, "kernel": 8}
SCHEDULES = {"temperature": Schedule(1.0), "kl_weight": Schedule(0.0)}


def module(tied=True):
    config = DVAEConfig(**TIED, patch=8, gain=1.0, likelihood="l2", tied=tied)
    return LitDVAE(config, Optimiser(Schedule(1e-2)), **SCHEDULES, revival=Revival(every=2, until=4))


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
