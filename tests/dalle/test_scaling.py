"""Per-resblock gradient scaling: gradients stay what they are, float16 keeps them, overflows stay where they are."""

import copy
import csv
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from dalle.__main__ import main as dalle
from dalle.model import DALLE, DALLEConfig, losses
from dalle.scaling import BlockScales, scaled
from dalle.train import LitDALLE
from dvae import lit
from dvae.errors import NumericsError
from dvae.optim import Optimiser
from dvae.schedules import Schedule

# --------------------------------------------------------------------------------------------------------- gradients

CONFIG = DALLEConfig(20, 4, 12, (4, 4), depth=4, width=32, heads=2, patterns="paper")


def backward(model: DALLE, scales: list[float] | None, times: float = 1.0, float16: bool = False) -> None:
    """The gradients of `times` the loss of always the same pairs."""
    model.zero_grad()
    draw = torch.Generator().manual_seed(1)
    ids, tokens = torch.randint(20, (3, 4), generator=draw), torch.randint(12, (3, 4, 4), generator=draw)
    with torch.autocast("cpu", torch.float16, enabled=float16):
        text, image = losses(model(ids, tokens, scales), ids, tokens, torch.ones(3, dtype=torch.bool))
    (times * (text + image)).backward()


def gradients(model: DALLE) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def alone(overflows: torch.Tensor) -> torch.Tensor:
    """What one process reduces."""
    return overflows


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_scales_change_no_gradient(checkpointing, dtype, rounding):
    model, scales = DALLE(CONFIG, checkpointing).to(dtype), BlockScales(8)
    backward(model, None)
    expected = gradients(model)
    scales.values = [2.0**7 * 3.1**branch for branch in range(8)]
    backward(model, scales.values)
    raw, owner = gradients(model), {id(p): k for k, branch in enumerate(model.branches()) for p in branch}
    assert len(owner) == 4 * 12, "all parameters inside blocks, each once"
    for name, parameter in model.named_parameters():
        assert (id(parameter) in owner) == name.startswith("blocks.")
        factor = scales.values[owner[id(parameter)]] if id(parameter) in owner else 1.0
        error = (raw[name] / factor - expected[name]).norm() / expected[name].norm()
        assert error < rounding and raw[name].norm() > 0, name
    assert not scales.unscale(model.branches(), alone)
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() < rounding * expected[name].norm(), name


def test_branches_are_in_the_order_in_which_they_are_read():
    model = DALLE(CONFIG)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [{".".join(names[id(p)].split(".")[1:3]).removesuffix("_norm") for p in b} for b in model.branches()]
    assert found == [{f"{layer}.{kind}"} for layer in range(4) for kind in ("attention", "mlp")]


def test_gradients_too_small_for_float16_survive():
    model, times = DALLE(CONFIG), 1e-8
    backward(model, None, times)
    expected = gradients(model)
    backward(model, None, times, float16=True)
    lost = {name for name, gradient in gradients(model).items() if not gradient.any()}
    assert lost == {name for name in expected if name.startswith("blocks.")}, "nothing is left of them without scales"

    scales = BlockScales(8)
    scales.values = [2.0**24] * 8
    backward(model, scales.values, times, float16=True)
    assert not scales.unscale(model.branches(), alone)
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 5e-3 * expected[name].norm(), name


def test_each_branch_is_saved_by_its_own_scale():
    """Gradients fall from branch to branch by more than float16 spans: no one scale keeps them all."""
    torch.manual_seed(0)
    x, branches = torch.randn(4, 8), [nn.Linear(8, 8) for _ in range(3)]
    falls = [1.0, 1e-6, 1e-12]  # of the gradient that comes back to each of the branches

    def run(scales: list[float | None], float16: bool) -> list[torch.Tensor]:
        for branch in branches:
            branch.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=float16):
            total = 0.0
            for branch, scale, fall in zip(branches, scales, falls, strict=True):
                total = total + fall * scaled(branch, x.requires_grad_(), scale).sum()
        total.backward()
        return [branch.weight.grad / (scale or 1.0) for branch, scale in zip(branches, scales, strict=True)]

    def kept(scales: list[float | None]) -> list[bool]:
        return [torch.allclose(a, b, rtol=5e-3, atol=0) for a, b in zip(run(scales, True), exact, strict=True)]

    exact = run([None] * 3, float16=False)
    assert kept([None] * 3) == [True, False, False]
    assert [kept([2.0**power] * 3) for power in (10, 20, 34)] == [
        [True, True, False],
        [False, True, False],
        [False, False, True],
    ]
    assert kept([2.0**7, 2.0**20, 2.0**34]) == [True, True, True]


def test_an_overflow_stays_in_its_branch():
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    branches = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4)]
    first, parameters = nn.Linear(8, 8), [[*branch.parameters()] for branch in branches]

    def run(read) -> list[torch.Tensor]:
        """The gradients of the first layer and of all branches, where `read` says how branch k is read."""
        for module in (first, *branches):
            module.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y = first(x).float()
            for k, branch in enumerate(branches):
                y = y + read(k, branch, y)
        y.square().mean().backward()
        return [p.grad.clone() for p in (first.weight, *itertools.chain(*parameters))]

    # as if nothing came back from branch 2
    expected = run(lambda k, branch, y: branch(y.detach() if k == 2 else y))
    scales = BlockScales(4)
    scales.values[2] = 2.0**40
    found = run(lambda k, branch, y: scaled(branch, y, scales.values[k]))
    assert not found[1 + 4 * 2 + 2].isfinite().any(), "the weights of branch 2 see infinities"
    assert scales.unscale(parameters, alone), "the update is to be skipped"
    for k, branch in enumerate(parameters):
        for p, wanted in zip(branch, expected[1 + 4 * k : 5 + 4 * k], strict=True):
            if k == 2:
                assert p.grad is None
            else:
                assert (p.grad - wanted).norm() < 5e-3 * wanted.norm() > 0
    assert (found[0] - expected[0]).norm() < 5e-3 * expected[0].norm()


# ------------------------------------------------------------------------------------------------------------- rules


def test_scales_start_at_two_to_the_13_for_each_part():
    assert BlockScales(3).values == [8192.0] * 3 and BlockScales(2, parts=5).values == [5 * 8192.0] * 2


def test_a_thousand_clean_updates_double_a_scale():
    scales = BlockScales(2)
    for _ in range(1000):
        scales.move([0.0, 0.0])
    assert scales.values == pytest.approx([2.0**14] * 2) and (scales.updates, scales.skipped) == (1000, 0)


def test_a_scale_is_divided_at_once_and_not_again_for_125_updates():
    scales, seen = BlockScales(2), []
    for _ in range(251):
        scales.move([1.0, 0.0])
        seen.append(scales.values[0])
    # divided after updates 0, 125 and 250
    expected = [2 ** (13 - 0.5 * (1 + update // 125)) for update in range(251)]
    assert seen == pytest.approx(expected) and (scales.updates, scales.skipped) == (251, 251)
    assert scales.values[1] == pytest.approx(2 ** (13 + 251 / 1000)), "each has a history of its own"

    scales = BlockScales(1)
    for update in range(126):
        scales.move([float(update in (0, 124))])
    assert scales.values[0] == pytest.approx(2 ** (13 - 0.5 + 124 / 1000)), "at 124 it is left alone"
    scales.move([1.0])
    assert scales.values[0] == pytest.approx(2 ** (13 - 1 + 124 / 1000)) and scales.skipped == 3


@pytest.mark.parametrize("parts", [1, 6])
def test_scales_stay_in_their_range(parts):
    scales = BlockScales(2, parts)
    for _ in range(12 * 1000):
        scales.move([0.0, 1.0])
    assert scales.values == [parts * 2.0**24, parts * 2.0**7]
    scales.move([0.0, 0.0])
    assert scales.values == [parts * 2.0**24, pytest.approx(parts * 2 ** (7 + 1 / 1000))]


def one_parameter(gradient: float) -> list[nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([gradient, 1.0])
    return [parameter]


@pytest.mark.parametrize("fault", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_taken_away_until_the_scale_is_the_smallest(fault):
    scales = BlockScales(2)
    (bad,), (good,) = branches = [one_parameter(fault), one_parameter(8192.0)]
    assert scales.unscale(branches, alone) and bad.grad is None and good.grad.tolist() == [1.0, 1 / 8192]

    scales.values = [128.0, 128.0]
    (bad,), (good,) = branches = [one_parameter(fault), one_parameter(128.0)]
    assert scales.unscale(branches, alone) and not bad.grad.isfinite().all() and good.grad[0] == 1
    assert scales.values[0] == 128


def test_all_processes_skip_what_one_of_them_skips():
    scales, asked = BlockScales(3), []

    def reduce(overflows: torch.Tensor) -> torch.Tensor:
        asked.append(overflows.tolist())
        return torch.maximum(overflows, torch.tensor([0.0, 1.0, 0.0]))  # of the other process

    branches = [one_parameter(math.inf), one_parameter(1.0), one_parameter(1.0)]
    assert scales.unscale(branches, reduce) and asked == [[1.0, 0.0, 0.0]]
    assert [parameter.grad is None for (parameter,) in branches] == [True, True, False]
    assert scales.values == pytest.approx([2**12.5, 2**12.5, 2 ** (13 + 1 / 1000)])


# ---------------------------------------------------------------------------------------------------------- training


def test_the_largest_over_processes_is_asked_for():
    asked = []

    def reduce(value, reduce_op):
        asked.append(reduce_op)
        return value

    module = LitDALLE(
        1, 32, 2, {"vocab_text": 20, "text_length": 4, "vocab_image": 12, "grid": (4, 4)}, Optimiser(Schedule(1e-3))
    )
    strategy, plugin = SimpleNamespace(reduce=reduce), SimpleNamespace(scaler=None)
    module._trainer = SimpleNamespace(strategy=strategy, precision_plugin=plugin, global_step=3)
    module.scales, module.rows = BlockScales(2), [(0, 0)]
    optimizer = module.configure_optimizers()

    backward(module.model, module.scales.values)
    module.on_before_optimizer_step(optimizer)
    assert asked == ["max"] and all(p.grad is not None for p in module.parameters())

    backward(module.model, module.scales.values)
    module.model.blocks[0].mlp.out.bias.grad[0] = math.inf
    module.on_before_optimizer_step(optimizer)
    assert all(p.grad is None for p in module.parameters()) and math.isfinite(module.latest["train/gradient_norm"])

    # outside the branches there is no scale that could be to blame
    backward(module.model, module.scales.values)
    module.model.text_head.weight.grad[0, 0] = math.nan
    with pytest.raises(NumericsError, match="the gradient of update 3 is nan"):
        module.on_before_optimizer_step(optimizer)


FLOAT16 = {
    "class_path": "lightning.pytorch.plugins.MixedPrecision",
    "init_args": {
        **{"precision": "16-mixed", "device": "cpu"},
        "scaler": {"class_path": "torch.amp.GradScaler", "init_args": {"device": "cpu", "init_scale": 2.0**22}},
    },
}


@pytest.fixture
def fit(tmp_path, tiny_tokens, capsys):
    """fit(name, trainer settings, model settings, arguments): a training of 6 updates; the exit code and stderr."""

    def run(name: str, trainer: dict, model: dict | None = None, *args: str) -> tuple[int, str]:
        optimiser = {"learning_rate": {"start": 3e-3, "warmup": 2}, "clip": 0.5, "second_moment_clip": 1e-2}
        config = {
            "run": str(tmp_path / name),
            "model": {
                **{"depth": 2, "width": 32, "heads": 2, "patterns": "paper", "prompts": 0},
                "optimiser": {**optimiser, "ema": 0.5, "ema_every": 2},
                **(model or {}),
            },
            "data": {"tokens": str(tiny_tokens), "batch_size": 4},
            "trainer": {
                **{"max_steps": 6, "val_check_interval": 6, "accumulate_grad_batches": 2, "log_every_n_steps": 1},
                **{"accelerator": "cpu", "enable_progress_bar": False},
                **copy.deepcopy(trainer),
            },
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        code = dalle(["fit", "--config", str(path), *args])
        return code, capsys.readouterr().err

    return run


def numbers(folder, name: str) -> list[float]:
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row[f"train/{name}"]) for row in csv.DictReader(file)]


def checkpoint(folder) -> dict:
    return lit.SafeCheckpoints().load_checkpoint(folder / "checkpoints" / "last.ckpt")


def test_a_training_in_float16_follows_the_one_in_float32(fit, tmp_path):
    assert fit("exact", {}) == (0, "")
    assert fit("float16", {"plugins": [FLOAT16]}, {"block_scaling": True, "checkpointing": True}) == (0, "")
    exact, found = tmp_path / "exact", tmp_path / "float16"
    for name, rounding in (("loss", 1e-3), ("gradient_norm", 3e-2)):
        assert numbers(found, name) != numbers(exact, name), "float16 rounds"
        assert numbers(found, name) == pytest.approx(numbers(exact, name), rel=rounding)
    # two batches are accumulated: M is 2
    grown = [2 ** (14 + update / 1000) for update in range(1, 7)]
    for name in ("block_scale_smallest", "block_scale_largest"):
        assert numbers(found, name) == pytest.approx(grown, rel=1e-5)
    assert numbers(found, "skipped_updates") == [0.0] * 6
    header = (found / "metrics.csv").read_text().splitlines()[0]
    assert "train/loss_scale" not in header and "block" not in (exact / "metrics.csv").read_text()
    kept = checkpoint(found)
    assert not kept.get("MixedPrecision") and "block_scales" not in checkpoint(exact)
    assert kept["state_dict"].keys() == checkpoint(exact)["state_dict"].keys()


@pytest.mark.parametrize("muon", [False, True])
def test_a_skipped_update_moves_nothing_and_a_continued_run_ends_the_same(muon, fit, tmp_path, monkeypatch):
    def overflow(self):
        if self.trainer.global_step in (0, 3):
            self.model.blocks[0].mlp.out.bias.grad[0] = math.inf

    monkeypatch.setattr(LitDALLE, "on_after_backward", overflow)
    real, states = lit.Checkpoints.on_train_batch_end, []

    def keep(self, trainer, module, outputs, batch, batch_index):
        if batch_index % 2:
            states.append(copy.deepcopy((module.state_dict(), trainer.optimizers[0].state_dict()["state"])))
        real(self, trainer, module, outputs, batch, batch_index)

    optimiser = {"learning_rate": {"start": 3e-3, "warmup": 2}, "clip": 0.5, "muon": muon, "ema": 0.5}
    settings = {"block_scaling": True, "optimiser": optimiser}
    with monkeypatch.context() as patch:
        patch.setattr(lit.Checkpoints, "on_train_batch_end", keep)
        assert fit("whole", {"plugins": [FLOAT16]}, settings) == (0, "")
    assert states[0][1] == {}, "the first update was skipped: there are no moments yet"
    same = [bool(equal(before, after)) for before, after in itertools.pairwise(states)]
    assert len(states) == 6 and same == [False, False, True, False, False]
    assert numbers(tmp_path / "whole", "skipped_updates") == pytest.approx([1, 1 / 2, 1 / 3, 2 / 4, 2 / 5, 2 / 6])
    divided = [2 ** (13.5 + update / 1000) for update in (0, 1, 2, 2, 3, 4)]
    assert numbers(tmp_path / "whole", "block_scale_smallest") == pytest.approx(divided, rel=1e-5)

    half = {"max_steps": 3, "plugins": [FLOAT16]}
    assert fit("halves", half, settings)[0] == 0
    assert fit("halves", half, settings, "--ckpt_path", "last", "--trainer.max_steps", "6")[0] == 0
    one, other = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "halves")
    assert one["block_scales"]["skipped"] == 2 and one["block_scales"] == other["block_scales"]
    for key in ("state_dict", "current_model_state"):
        assert equal(one[key], other[key])
    assert equal(one["optimizer_states"][0]["state"], other["optimizer_states"][0]["state"])


def equal(one, other) -> bool:
    """Of nested dicts and tuples of tensors, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return one == other if not isinstance(one, tuple) else all(map(equal, one, other))


# on a CPU Lightning turns 16-mixed into bf16-mixed
@pytest.mark.parametrize("asked, runs", [("32-true",) * 2, ("bf16-mixed",) * 2, ("16-mixed", "bf16-mixed")])
def test_other_precisions_are_refused(asked, runs, fit):
    code, said = fit("run", {"precision": asked}, {"block_scaling": True})
    assert code == 2 and said.endswith(
        f"error: model.block_scaling is true, and the training runs in precision {runs}\n"
        "hint: set trainer.precision to 16-mixed, which needs a GPU, or model.block_scaling to false: only float16 has "
        "too few exponents\n"
    )
