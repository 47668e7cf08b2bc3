"""What is told before a training is what it takes: counted again on real tensors, on a made-up machine, by hand."""

import contextlib
from datetime import datetime
from pathlib import Path

import pytest
import torch

from dalle.model import DALLE, DALLEConfig
from dalle.train import LitDALLE
from dvae import forecast
from dvae.errors import EnvironmentProblem
from dvae.model import DVAEConfig
from dvae.optim import Optimiser
from dvae.schedules import Schedule
from dvae.train import LitDVAE, Revival

SIZES = {"vocab_text": 50, "text_length": 12, "vocab_image": 64, "grid": (4, 4)}
TIED = DVAEConfig(32, 64, 32, 1, 1, code_width=8, tied=True, kernel=8, patch=8, likelihood="l2")
FREE = DVAEConfig(16, 32, 16, 2, 1, code_width=8)


def module(name: str, muon: bool = False):
    optimiser = Optimiser(Schedule(1e-3), muon=muon, second_moment_clip=5.0)
    if name == "dalle":
        return LitDALLE(2, 32, 2, SIZES, optimiser, patterns="paper")
    if name == "checkpointing":
        return LitDALLE(4, 32, 2, SIZES, optimiser, checkpointing=True)
    if name == "tied":
        return LitDVAE(TIED, optimiser, Schedule(1.0), Schedule(0.0), Schedule(0.04), Revival(2, 4))
    return LitDVAE(FREE, optimiser, Schedule(1.0), Schedule(6.6), straight_through=True)


MODULES = pytest.mark.parametrize("name", ["dalle", "checkpointing", "tied", "free"])


def autocast(precision: str):
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if precision != "32-true" else (
        contextlib.nullcontext()
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- memory


def test_tensors_are_counted_once_and_as_long_as_they_live():
    with forecast.Living() as living:
        one = torch.ones(1000)
        view = one.view(10, 100)[:, 3]
        assert living.now == 4000, "a view has nothing of its own"
        other = one + 1
        one.add_(1)
        assert living.now == living.most == 8000
        del one
        assert living.now == 8000, "the view holds it"
        del view
        assert living.now == 4000
        torch.zeros(10, dtype=torch.int64)
        del other
    assert (living.now, living.most) == (0, 8000)


@MODULES
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulates", [False, True])
def test_memory_is_that_of_an_update_with_numbers(name, precision, accumulates):
    real = module(name)
    told = forecast.memory(real, 6, precision, accumulates, averages=True)
    assert all(p.grad is None for p in real.parameters()), "nothing of it is left"
    optimiser = real.configure_optimizers()

    def update():
        with autocast(precision):
            loss, _ = real.step(real.example(6), 0, 0)
        loss.backward()
        optimiser.step()

    update()  # makes the moments
    if not accumulates:
        optimiser.zero_grad()
    state = [x for of_one in optimiser.state.values() for x in of_one.values()]
    held = [*real.parameters(), *real.buffers(), *state, *(p.grad for p in real.parameters() if p.grad is not None)]
    with forecast.Living() as living:
        for tensor in held:
            living.see(tensor.untyped_storage())
        update()
    averaged = sum(tensor.nbytes for tensor in (*real.parameters(), *real.buffers()))
    assert told == pytest.approx(living.most + averaged, rel=0.01)


@pytest.mark.parametrize("name", ["dalle", "tied", "free"])
def test_memory_is_what_autograd_keeps_and_what_the_way_back_makes(name):
    real = module(name)
    own = {x.untyped_storage().data_ptr() for x in (*real.parameters(), *real.buffers())}
    held, kept = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # or its place would be given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        real.step(real.example(64), 0, 0)
    weights = sum(p.nbytes for p in real.parameters())
    least = 3 * weights + sum(kept.values())  # with AdamW's two moments
    told = forecast.memory(real, 64, "32-true", accumulates=False, averages=False)
    assert least < told < 1.6 * least


def test_muon_has_one_moment_and_averages_are_a_copy():
    plain, muon = (forecast.memory(module("dalle", muon), 1, "32-true", True, False) for muon in (False, True))
    averaged = forecast.memory(module("dalle"), 1, "32-true", True, True)
    real = module("dalle")
    matrices = sum(p.nbytes for p in real.model.blocks.parameters() if p.ndim == 2)
    assert plain - muon == pytest.approx(matrices, rel=0.1)
    assert averaged - plain == sum(x.nbytes for x in (*real.parameters(), *real.buffers()))


def test_counting_draws_no_numbers_and_changes_none():
    real = module("tied")
    before, state = {name: x.clone() for name, x in real.state_dict().items()}, torch.get_rng_state()
    forecast.memory(real, 4, "bf16-mixed", False, True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in real.state_dict().items())


def test_weights_are_counted_before_they_are_there(monkeypatch):
    config = DALLEConfig(**SIZES, depth=1, width=32, heads=2)
    torch.manual_seed(3)
    plain = DALLE(config).state_dict()
    torch.manual_seed(3)
    found = forecast.built(lambda: DALLE(config)).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in plain.items())
    monkeypatch.setattr(forecast, "available", lambda device: 50 * 2**30)
    paper = DALLEConfig(16384, 256, 8192, (32, 32), 64, 3968, 62)
    devices = []

    def make():
        model = DALLE(config if devices else paper)
        devices.append(model.start.device.type)
        return model

    forecast.built(make)
    assert devices == ["meta", "cpu"], "49 GB are less than 50 GiB"
    monkeypatch.setattr(forecast, "available", lambda device: 40 * 2**30)
    devices.clear()
    with pytest.raises(EnvironmentProblem, match=r"the weights alone take 45\.8 GiB, and 40\.0 GiB are there"):
        forecast.built(make)
    assert devices == ["meta"]


# ---------------------------------------------------------------------------------------------------------- the machine


def need(pictures: int, batches: int) -> int:
    """100 MiB and 10 for each picture, 50 more for gradients that are added up."""
    return (100 + 10 * pictures + 50 * (batches > 1)) * 2**20


@pytest.mark.parametrize(
    "free, other, hint",
    [
        (419, "", "--data.batch_size 16 --trainer.accumulate_grad_batches 2 --trainer.val_check_interval 200"),
        (250, "", "--data.batch_size 8 --trainer.accumulate_grad_batches 4 --trainer.val_check_interval 400"),
        (160, "", "--data.batch_size 1 --trainer.accumulate_grad_batches 32 --trainer.val_check_interval 3200"),
        (159, "", "smaller sizes of the model, or a machine with more memory"),
        (159, "--a.b c", "--a.b c, which takes less"),
        (160, "--a.b c", "--data.batch_size 1 --trainer.accumulate_grad_batches 32 --trainer.val_check_interval 3200 "
                         "for as many pictures an update; or --a.b c, which takes less"),
    ],
)  # fmt: skip
def test_what_fits_is_named(free, other, hint):
    with pytest.raises(EnvironmentProblem) as error:
        forecast.check(need, 32, 1, 100, free * 2**20, other)
    said = f"the memory is not enough: 32 pictures at a time need about 420 MiB, and {free} MiB are there"
    assert error.value.what == said and error.value.hint.removeprefix("give ").startswith(hint)
    assert forecast.check(need, 32, 1, 100, 420 * 2**20, other) is None


def test_a_batch_that_cannot_be_halved():
    with pytest.raises(EnvironmentProblem) as error:
        forecast.check(need, 7, 1, 100, 160 * 2**20)
    assert error.value.hint == "give smaller sizes of the model, or a machine with more memory"


CPU = torch.device("cpu")


def test_available_is_what_the_system_says(tmp_path, monkeypatch):
    assert forecast.available(CPU, tmp_path) is None, "no Linux"
    groups = tmp_path / "sys" / "fs" / "cgroup"
    (groups / "memory").mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    meminfo = tmp_path / "proc" / "meminfo"
    meminfo.write_text("MemTotal:       24684084 kB\nMemFree:             100 kB\n")
    assert forecast.available(CPU, tmp_path) is None, "too old a Linux"
    meminfo.write_text("MemTotal:       24684084 kB\nMemAvailable:     10000 kB\nCached: 5 kB\n")
    assert forecast.available(CPU, tmp_path) == 10_240_000
    (groups / "memory.max").write_text("max\n")
    (groups / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert forecast.available(CPU, tmp_path) == 10_240_000
    (groups / "memory" / "memory.limit_in_bytes").write_text("9000000\n")
    assert forecast.available(CPU, tmp_path) == 9_000_000
    (groups / "memory.max").write_text("4096\n")
    assert forecast.available(CPU, tmp_path) == 4096
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (77, 99))
    assert forecast.available(torch.device("cuda", 0), tmp_path) == 77
    assert forecast.available(torch.device("mps"), tmp_path) is None


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="this machine does not say it there")
def test_this_machine_has_some():
    assert 2**20 < forecast.available(CPU) < 2**50


# ------------------------------------------------------------------------------------------------------------ the words


def test_bytes_for_people():
    assert [forecast.size(count) for count in (0, 412 * 2**20, 9.5 * 2**30, 12.345 * 2**30)] == [
        "0 MiB", "412 MiB", "9,728 MiB", "12.3 GiB"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "seconds, updates, line",
    [
        (0.84, 1400, "0.84 s an update: 1,400 updates end in about 20 min, at 16:41"),
        (0.5, 10, "0.5 s an update: 10 updates end in about 5 s, at 16:22"),
        (1.234, 5000, "1.2 s an update: 5,000 updates end in about 2 hours, at 18:04"),
        (2.0, 20_000, "2 s an update: 20,000 updates end in about 11 hours, on 27 November 2026 at 03:28"),
        (3.0, 430_000, "3 s an update: 430,000 updates end in about 14.9 days, on 11 December 2026 at 14:42"),
        (123.0, 10, "123 s an update: 10 updates end in about 20 min, at 16:42"),
        (0.0123, 100, "0.012 s an update: 100 updates end in about 1 s, at 16:22"),
    ],
)
def test_time_to_the_end(seconds, updates, line):
    assert forecast.to_the_end(seconds, updates, datetime(2026, 11, 26, 16, 22)) == line
