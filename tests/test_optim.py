"""What moves the weights: AdamW against its formulas, its groups, Muon beside it, and the step size on plateaus."""

import math
import random
import re

import pytest
import torch
from torch import nn

from dalle.model import DALLE, DALLEConfig
from dvae.errors import UserError
from dvae.model import DVAE, DVAEConfig
from dvae.optim import Optimiser, Plateau, StepSize, Together
from dvae.schedules import Schedule

BLOCK = "blocks.0.weight"


def network(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    """Matrices and vectors inside blocks and outside: the one matrix under `blocks.` is Muon's."""
    torch.manual_seed(5)
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 4)]), "head": nn.Linear(4, 3)}).to(dtype)


def build(model: nn.Module, **settings) -> torch.optim.Optimizer:
    return Optimiser(Schedule(0.01), weight_decay=0.1, beta1=0.8, **settings).build(model)


def set_gradients(model: nn.Module, number: int) -> None:
    chance = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=chance).to(parameter)


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------------- AdamW


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("largest", [None, 0.02])
def test_adamw_is_the_formula_and_its_second_moment_is_cut_after_each_update(largest, muon):
    model, beta1, beta2, rate, eps = network(torch.float64), 0.8, 0.9, 0.01, 1e-3
    names = [name for name in model.state_dict() if not (muon and name == BLOCK)]
    weights = {name: model.state_dict()[name].clone() for name in names}
    mean, square = ({name: torch.zeros_like(weights[name]) for name in names} for _ in range(2))
    optimiser, cut = build(model, beta2=beta2, eps=eps, second_moment_clip=largest, muon=muon), 0
    for update in range(1, 8):
        set_gradients(model, update)
        optimiser.step()
        for name in names:
            gradient = model.get_parameter(name).grad
            mean[name] = beta1 * mean[name] + (1 - beta1) * gradient
            square[name] = beta2 * square[name] + (1 - beta2) * gradient**2
            root = (square[name] / (1 - beta2**update)).sqrt()
            decay = 0.1 if gradient.ndim > 1 else 0.0
            weights[name] -= rate * decay * weights[name]
            weights[name] -= rate * mean[name] / (1 - beta1**update) / (root + eps)
            if largest is not None:
                cut += int((square[name] > largest).sum())
                square[name] = square[name].clamp(max=largest)
            torch.testing.assert_close(model.state_dict()[name], weights[name], rtol=1e-12, atol=1e-14)
            held = optimiser.state[model.get_parameter(name)]["exp_avg_sq"]
            torch.testing.assert_close(held, square[name], rtol=1e-12, atol=1e-14)
    assert (cut > 50) == (largest is not None)


def test_a_second_moment_below_its_limit_is_left_alone_bit_for_bit():
    plain, limited = network(), network()
    for model, largest in ((plain, None), (limited, 100.0)):
        optimiser = build(model, second_moment_clip=largest)
        for update in range(4):
            set_gradients(model, update)
            optimiser.step()
    assert equal(plain.state_dict(), limited.state_dict())


def test_a_parameter_without_a_gradient_has_no_second_moment_to_cut():
    model = network()
    set_gradients(model, 0)
    model["head"].bias.grad = None
    before = model["head"].bias.clone()
    build(model, second_moment_clip=1e-3).step()
    assert torch.equal(model["head"].bias, before)


def test_matrices_and_embeddings_are_decayed_biases_and_gains_are_not():
    sizes = {"vocab_text": 20, "text_length": 4, "vocab_image": 9, "grid": (2, 3)}
    transformer = DALLE(DALLEConfig(**sizes, depth=1, width=16, heads=2))
    autoencoder = DVAE(DVAEConfig(image_size=16, vocab_size=8, hidden=8, groups=2, code_width=4))
    for model, some in (
        (transformer, {"text_embedding.weight", "row_position.weight", "image_head.weight", "start"}),
        (autoencoder, {"encoder.output.weight", "decoder.input.weight"}),
    ):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        build(model).step()
        decayed = {name for name, p in model.named_parameters() if torch.allclose(p, torch.tensor(1 - 0.01 * 0.1))}
        spared = {name for name, p in model.named_parameters() if (p == 1).all()}
        assert decayed | spared == dict(model.named_parameters()).keys()
        assert all(name.endswith(".bias") or re.search(r"norm\.weight$", name) for name in spared)
        assert not any(name.endswith(".bias") or "norm" in name for name in decayed)
        assert spared and some <= decayed


# -------------------------------------------------------------------------------------------------------------- Muon


def test_together_steps_as_its_parts_would_alone():
    one, other = network(), network()
    together = build(one, muon=True)
    named = dict(other.named_parameters())
    groups = [
        {"params": [named["head.weight"]], "weight_decay": 0.1},
        {"params": [named["blocks.0.bias"], named["head.bias"]], "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon([named[BLOCK]], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.999), fused=True)
    assert isinstance(together, Together)
    start = network().state_dict()
    for update in range(4):
        for optimiser in (together, muon, adamw):
            for group in optimiser.param_groups:
                group["lr"] = 0.01 / (update + 1)
        set_gradients(one, update)
        set_gradients(other, update)
        together.step()
        muon.step()
        adamw.step()
        assert equal(one.state_dict(), other.state_dict())
    assert all((one.state_dict()[name] - start[name]).abs().max() > 1e-3 for name in start)


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("largest", [None, 1e-4])
def test_an_optimiser_is_saved_and_goes_on_bit_for_bit(muon, largest, tmp_path):
    def updates(model, optimiser, numbers):
        for number in numbers:
            for group in optimiser.param_groups:
                group["lr"] = 0.01 / (number + 1)
            set_gradients(model, number)
            optimiser.step()

    settings = {"muon": muon, "second_moment_clip": largest}
    whole, half, rest = network(), network(), network()
    updates(whole, build(whole, **settings), range(6))
    optimiser = build(half, **settings)
    updates(half, optimiser, range(3))
    torch.save([half.state_dict(), optimiser.state_dict()], tmp_path / "saved")
    weights, state = torch.load(tmp_path / "saved", weights_only=True)
    rest.load_state_dict(weights)
    again = build(rest, **settings)
    again.load_state_dict(state)
    assert again.state.keys() == set(rest.parameters())
    updates(rest, again, range(3, 6))
    assert equal(rest.state_dict(), whole.state_dict()) and not equal(half.state_dict(), whole.state_dict())


def test_muon_moves_the_matrices_of_the_blocks_alone():
    model = DALLE(DALLEConfig(vocab_text=20, text_length=4, vocab_image=9, grid=(2, 3), depth=2, width=16, heads=2))
    muon, adamw = build(model, muon=True).parts
    names = {parameter: name for name, parameter in model.named_parameters()}
    moved, others = ([names[p] for group in part.param_groups for p in group["params"]] for part in (muon, adamw))
    assert sorted(moved + others) == sorted(names.values())
    assert moved and set(moved) == {n for p, n in names.items() if p.ndim == 2 and n.startswith("blocks.")}
    assert isinstance(build(model), torch.optim.AdamW)


# --------------------------------------------------------------------------------------------------------- step size

PAPER = Schedule(4.5e-4, warmup=5000)


def halvings(step_size: StepSize, losses: list[float]) -> list[int]:
    """The updates, from 0, after which the step size is halved."""
    return [update for update, loss in enumerate(losses) if step_size.see(update, loss)]


def test_the_papers_step_size():
    step_size = StepSize(PAPER, Plateau(window=10, patience=2))
    assert step_size(0) == pytest.approx(4.5e-4 / 5001) and step_size(4999) == pytest.approx(4.5e-4 * 5000 / 5001)
    assert step_size(5000) == step_size(429_999) == 4.5e-4
    assert len(halvings(step_size, [7.0] * 6000)) == 5, "no sixth one"
    assert step_size(430_000) == 4.5e-4 / 32 == 1.40625e-5
    assert StepSize(PAPER, None)(7000) == 4.5e-4 and not halvings(StepSize(PAPER, None), [7.0] * 6000)


def test_a_loss_that_stands_still_halves_after_the_patience_and_never_during_warm_up():
    # the first window after the warm-up is the best so far; then three in a row without an improvement
    found = halvings(StepSize(Schedule(1.0, warmup=7), Plateau(window=4, patience=3, threshold=0.0)), [2.0] * 60)
    assert found == [7 + 4 * 4 - 1, 7 + 4 * 7 - 1, 7 + 4 * 10 - 1, 7 + 4 * 13 - 1]
    assert halvings(StepSize(Schedule(1.0, warmup=60), Plateau(1, 1, 0.0)), [2.0] * 60) == []
    assert halvings(StepSize(Schedule(1.0), Plateau(1, 1, 0.0, halvings=2)), [2.0] * 60) == [1, 2]


@pytest.mark.parametrize("sign", [1, -1])
def test_only_an_improvement_above_the_threshold_counts(sign):
    best = 8.0 * sign
    for step, improves in ((1.0, False), (1.0 + 2**-20, True)):  # the threshold is an eighth of 8
        losses = [best, best - step, best - step]
        found = halvings(StepSize(Schedule(1.0), Plateau(window=1, patience=1, threshold=1 / 8)), losses)
        assert found == ([2] if improves else [1, 2])


def test_small_improvements_add_up_within_the_patience():
    losses = [100 * 0.995**k for k in range(40)]  # a step of half the threshold, two of them below it
    assert halvings(StepSize(Schedule(1.0), Plateau(window=1, patience=3, threshold=0.01)), losses) == []
    assert halvings(StepSize(Schedule(1.0), Plateau(window=1, patience=2, threshold=0.01)), losses)[0] == 2


def test_what_came_before_a_rise_stays_the_best():
    losses = [1.0, 5.0, 4.0, 3.0, 2.0, 0.5, 9.0, 9.0]
    assert halvings(StepSize(Schedule(1.0), Plateau(window=1, patience=4, threshold=0.0)), losses) == [4]
    assert halvings(StepSize(Schedule(1.0), Plateau(window=1, patience=5, threshold=0.0)), losses) == []


@pytest.mark.parametrize("seed", range(6))
def test_halves_when_torchs_scheduler_would_on_the_means_of_the_windows(seed):
    chance = random.Random(seed)
    window, patience, warmup = chance.randint(1, 5), chance.randint(1, 4), chance.randint(0, 9)
    threshold, times = chance.choice([0.0, 0.01, 0.1]), chance.randint(1, 5)
    losses = [3 / (1 + update / 40) + chance.random() for update in range(600)]
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        theirs, factor=0.5, patience=patience - 1, threshold=threshold, min_lr=0.5**times, eps=0.0
    )
    ours = StepSize(Schedule(1.0, warmup=warmup), Plateau(window, patience, threshold, times))
    for update, loss in enumerate(losses):
        ours.see(update, loss)
        read = losses[warmup : update + 1]
        if read and len(read) % window == 0:
            scheduler.step(sum(read[-window:]) / window)
        assert ours(update + 1) == theirs.param_groups[0]["lr"] or update + 1 < warmup
    assert ours.halved == times


def test_a_step_size_goes_on_from_any_update():
    losses = [3 + math.sin(update) for update in range(120)]
    plateau = Plateau(window=7, patience=2, threshold=0.01)
    whole = halvings(StepSize(Schedule(1.0, warmup=5), plateau), losses)
    assert len(whole) == 5
    for stop in range(len(losses)):
        first, second = (StepSize(Schedule(1.0, warmup=5), plateau) for _ in range(2))
        found = [update for update in range(stop) if first.see(update, losses[update])]
        second.load_state_dict(first.state_dict())
        found += [update for update in range(stop, len(losses)) if second.see(update, losses[update])]
        assert found == whole


# ---------------------------------------------------------------------------------------------------------- refusals

RATE = Schedule(1e-3)


@pytest.mark.parametrize(
    "settings, what, hint",
    [
        ({"weight_decay": -0.1}, "weight_decay is -0.1", "give a number from 0 on, such as 1e-4"),
        ({"beta1": 1.0}, "beta1 is 1.0", "give a number from 0 to below 1, such as 0.9"),
        ({"beta2": -0.5}, "beta2 is -0.5", "give a number from 0 to below 1, such as 0.999"),
        ({"eps": math.nan}, "eps is nan", "give a number from 0 on, such as 1e-8"),
        ({"clip": 0.0}, "clip is 0.0", "give a number above 0, such as 4, or null"),
        ({"second_moment_clip": 0.0}, "second_moment_clip is 0.0", "give a number above 0, such as 5, or null"),
        ({"ema": 1.0}, "ema is 1.0", "give a number from 0 to below 1, such as 0.999, or null"),
        ({"ema_every": 0}, "ema_every is 0", "give a whole number from 1 on"),
        (
            {"ema": None, "ema_every": 25},
            "ema_every is 25, but optimiser.ema is null: no weights are averaged",
            "set ema, such as 0.99, or leave ema_every away",
        ),
        (
            {"learning_rate": Schedule(-1e-3)},
            "learning_rate goes from -0.001 to None",
            "give step sizes from 0 on",
        ),
        (
            {"learning_rate": Schedule(1e-3, 1e-5, 100), "plateau": Plateau()},
            "plateau halves the step size, and learning_rate.end 1e-05 lets it fall as well",
            "set learning_rate.end to null and its steps to 0 (constant after the warm-up), or plateau to null",
        ),
    ],
)
def test_wrong_and_contradictory_settings_are_refused(settings, what, hint):
    with pytest.raises(UserError) as error:
        Optimiser(**{"learning_rate": RATE, **settings})
    assert (error.value.what, error.value.hint) == (f"optimiser.{what}", hint)


@pytest.mark.parametrize("name", ["window", "patience", "halvings"])
def test_a_plateau_counts_from_one(name):
    with pytest.raises(UserError) as error:
        Plateau(**{name: 0})
    assert (error.value.what, error.value.hint) == (f"plateau.{name} is 0", "give a whole number from 1 on")


@pytest.mark.parametrize("threshold", [-0.1, 1.0, math.nan])
def test_a_threshold_is_a_share(threshold):
    with pytest.raises(UserError) as error:
        Plateau(threshold=threshold)
    assert error.value.what == f"plateau.threshold is {threshold}"
    assert error.value.hint == "give a share from 0 to below 1, such as 0.001"


def test_muon_needs_blocks():
    with pytest.raises(UserError) as error:
        build(nn.Linear(2, 2), muon=True)
    assert error.value.what == "muon is set, but this model has no matrices inside blocks"
    assert error.value.hint == "set optimiser.muon to false"
