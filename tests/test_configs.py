"""Every shipped config is a training that runs, and every machine's settings go on top of any of them."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from dalle.__main__ import main
from dalle.demo import both_orders
from dalle.train import LitDALLE
from dalle.train import main as dalle
from dvae.commands import find_config
from dvae.errors import UserError
from dvae.train import main as dvae

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PROGRAMS = {"dvae": dvae, "dalle": dalle}
EXPERIMENTS = [f"{stage}/{path.stem}" for stage in PROGRAMS for path in sorted((CONFIGS / stage).glob("*.yaml"))]
PAPER = ["dalle/paper-12b", "dalle/paper-5.6b", "dalle/paper-2.8b", "dalle/paper-1.2b"]
MACHINES = [f"machine/{path.stem}" for path in sorted((CONFIGS / "machine").glob("*.yaml"))]

# One update of a narrow model: the shape of the recipe stays, its size goes.
SHORT = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.accelerator=cpu", "--trainer.devices=1"]
SHORT += ["--trainer.accumulate_grad_batches=1", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
SHORT += ["--data.batch_size=4", "--data.workers=0"]
SMALL = {
    "dvae": ["--model.config.hidden=8", "--model.config.vocab_size=16"],
    "dalle": ["--model.depth=1", "--model.width=16", "--model.heads=2", "--model.prompts=1", "--model.expects=null",
              "--model.optimiser.ema_every=1"],
}  # fmt: skip


@pytest.fixture
def data(tiny_tokens) -> dict[str, list[str]]:
    return {
        "dvae": ["--data.source=scenes:train:8", "--data.val=scenes:val:4", "--data.hold_out=null"],
        "dalle": [f"--data.tokens={tiny_tokens}"],
    }


def merged(stage: str, *configs: str) -> dict:
    """The settings that `--print_config` answers for configs laid over each other."""
    args = [arg for config in configs for arg in ("--config", config)]
    said = io.StringIO()
    with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(said):
        PROGRAMS[stage](["fit", *args, "--print_config"])
    assert not end.value.code
    return yaml.safe_load(said.getvalue())


def leaves(settings: dict, *above: str):
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, *above, name)
        else:
            yield (*above, name), value


def at(settings: dict, keys: tuple[str, ...]):
    for key in keys:
        settings = settings[key]
    return settings


def test_each_folder_is_covered():
    assert {name.split("/")[0] for name in EXPERIMENTS} == set(PROGRAMS)
    assert MACHINES
    assert len(EXPERIMENTS) + len(MACHINES) == len(list(CONFIGS.rglob("*.yaml")))


@pytest.mark.parametrize("name", [*EXPERIMENTS, *MACHINES])
def test_is_found_by_its_shipped_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name).read_text() == (CONFIGS / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_trains(name, data, tmp_path):
    stage, run = name.split("/")[0], tmp_path / "run"
    PROGRAMS[stage](["fit", "--config", name, f"--run={run}", *SHORT, *SMALL[stage], *data[stage]])
    assert (run / "model").is_dir() and (run / "checkpoints" / "last.ckpt").is_file()
    kept, given = (yaml.safe_load(path.read_text()) for path in (run / "config.yaml", CONFIGS / f"{name}.yaml"))
    assert kept["model"]["optimiser"]["learning_rate"]["start"] == given["model"]["optimiser"]["learning_rate"]["start"]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_machine_lies_over_experiment(name, machine):
    settings = merged(name.split("/")[0], name, machine)
    under, over = (dict(leaves(yaml.safe_load(find_config(file).read_text()))) for file in (name, machine))
    assert over and under.keys() - over.keys()
    for keys, value in (under | over).items():
        assert at(settings, keys) == value, keys
    assert {keys[0] for keys in over} == {"trainer"}, "a machine says nothing about the experiment"


@pytest.mark.parametrize("stage", PROGRAMS)
@pytest.mark.parametrize("key", ["modle", "model.optimiser.speed", "data.pictures", "trainer.gpus"])
def test_unknown_key_is_refused(stage, key, tmp_path):
    settings = yaml.safe_load((CONFIGS / stage / "demo.yaml").read_text())
    *above, last = key.split(".")
    at(settings, tuple(above))[last] = 1
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=last):
        PROGRAMS[stage](["fit", "--config", str(path), f"--run={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


AGAIN = "make the tokens again with dalle prepare"
CONTRADICTIONS = {  # what is set, in the config or in the token folder: the exit code and both lines
    "heads, width": (
        ["--model.heads=7"],
        (2, "width 16 cannot be shared by 7 heads", "choose a multiple of heads, such as 21"),
    ),
    "kinds, layers": (
        ["--model.patterns=[row, column, conv]"],
        (2, "patterns has 3 kinds and depth is 1", "give 1 kinds, one for each block"),
    ),
    "sizes that are expected, tokens": (
        ["--model.expects={vocab_text: 300, text_length: 16, vocab_image: 8192, grid: [32, 32]}"],
        (2, "the tokens have other sizes than model.expects: vocab_image 16, not 8192; grid (4, 4), not (32, 32)",
         "set model.expects to null to train on these, or prepare others: dalle vocab --size 300 --length 16 and an "
         "image tokenizer of 8192 codes on a grid of 32 x 32"),
    ),
    "text length, vocabulary": (
        {"text_length": 256},
        (4, "text_length is 256 in {}/prepared.json, 16 in {}/text.json", AGAIN),
    ),
    "text ids, vocabulary": (
        {"vocab_text": 16384},
        (4, "vocab_text is 16384 in {}/prepared.json, 300 in {}/text.json", AGAIN),
    ),
    "codes, tokenizer": ({"vocab_image": 8192}, (4, "vocab_image is 8192 in {}/prepared.json, 16 in {}/dvae", AGAIN)),
    "grid, image size": ({"grid": [32, 32]}, (4, "grid is (32, 32) in {}/prepared.json, (4, 4) in {}/dvae", AGAIN)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused_before_anything_is_written(name, tiny_tokens, tmp_path, capsys):
    change, (code, what, hint) = CONTRADICTIONS[name]
    tokens, run = shutil.copytree(tiny_tokens, tmp_path / "tokens"), tmp_path / "run"
    if isinstance(change, dict):
        manifest = json.loads((tokens / "prepared.json").read_text())
        (tokens / "prepared.json").write_text(json.dumps({**manifest, "sizes": {**manifest["sizes"], **change}}))
    given = [*SHORT, *SMALL["dalle"], f"--data.tokens={tokens}", *(change if isinstance(change, list) else [])]
    assert main(["fit", "--config", "dalle/demo", f"--run={run}", *given]) == code
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert lines[0] == f"error: {what.format(tokens, tokens)}" and lines[1].startswith(f"hint: {hint}")
    assert len(lines) == 2 and said.out == "" and not run.exists()


# ------------------------------------------------------------------------------------------------ stage 2 of the paper


def shipped(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def test_those_of_the_paper_differ_in_their_size_only():
    sizes, rest = {}, []
    for name in PAPER:
        settings = dict(leaves(shipped(name)))
        assert settings.pop(("run",)) == f"runs/{name.removeprefix('dalle/')}"
        sizes[name] = settings.pop(("model", "heads")), settings.pop(("model", "width"))
        rest.append(settings)
    assert all(settings == rest[0] for settings in rest)
    assert list(sizes.values()) == [(62, 3968), (42, 2688), (30, 1920), (19, 1216)]
    assert all(width == 64 * heads for heads, width in sizes.values())
    assert set(PAPER) == {name for name in EXPERIMENTS if name.startswith("dalle/paper")}


def test_their_batches_and_validations_come_out_even():
    settings = merged("dalle", "dalle/paper-12b", "machine/gpu")
    trainer, accumulate = settings["trainer"], settings["trainer"]["accumulate_grad_batches"]
    assert trainer["devices"] * settings["data"]["batch_size"] * accumulate == 1024
    assert trainer["val_check_interval"] == 5_000 * accumulate and trainer["max_steps"] % 5_000 == 0


@pytest.mark.parametrize("name", PAPER)
def test_those_of_the_paper_take_a_step_at_a_tenth_of_their_width(name):
    """All 64 blocks, on one picture of 1,024 tokens and 256 text ids of the paper's vocabularies."""
    settings = shipped(name)
    given, optimiser, sizes = settings["model"], settings["model"]["optimiser"], settings["model"]["expects"]
    heads = round(given["width"] / 640)
    assert abs(64 * heads - given["width"] / 10) < 32, "as near as whole heads of 64 come"
    parser = ArgumentParser()
    parser.add_class_arguments(LitDALLE, "model")
    small = {**given, "heads": heads, "width": 64 * heads, "sizes": {**sizes, "grid": tuple(sizes["grid"])}}
    module = parser.instantiate(parser.parse_object({"model": small})).model
    before = [parameter.detach().clone() for parameter in module.model.parameters()]
    assert len(module.model.blocks) == 64 and module.model.checkpointing

    ids, tokens = torch.randint(0, sizes["vocab_text"], (1, 256)), torch.randint(0, sizes["vocab_image"], (1, 32, 32))
    ids[:, 10:] = torch.arange(sizes["vocab_text"] + 10, sizes["vocab_text"] + 256)  # pads
    batch = {"text_ids": ids, "image_tokens": tokens, "keep_text": torch.tensor([True])}
    optimizer = module.configure_optimizers()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        loss, _ = module.step(batch, 0, 0)
    uniform = 0.125 * torch.tensor(16384.0 + 256).log() + 0.875 * torch.tensor(8192.0).log()
    assert loss.item() == pytest.approx(uniform.item(), abs=0.2), "an untrained model guesses"
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.model.parameters(), optimiser["clip"])
    assert torch.isfinite(norm) and norm > 0
    optimizer.step()
    for (name, parameter), old in zip(module.model.named_parameters(), before, strict=True):
        assert torch.isfinite(parameter).all() and not torch.equal(parameter, old), name


@pytest.mark.parametrize("recipe", ["demo", "scenes"])
def test_a_demo_that_reads_both_ways_draws_in_no_fewer_updates_than_without(recipe):
    config = yaml.safe_load((CONFIGS / "dalle" / f"{recipe}.yaml").read_text())
    given = dict(setting.removeprefix("--").split("=") for setting in both_orders(recipe))
    updates, interval = int(given["trainer.max_steps"]), int(given["trainer.val_check_interval"])
    assert updates * (1 - float(given["model.image_first.share"])) >= config["trainer"]["max_steps"]
    assert updates % interval == 0
    rate = config["model"]["optimiser"]["learning_rate"]
    assert int(given["model.optimiser.learning_rate.steps"]) + rate["warmup"] == updates
