"""Every shipped config is a training that runs, and every machine's settings go on top of any of them."""

import contextlib
import io
from pathlib import Path

import pytest
import yaml

from dalle.train import main as dalle
from dvae.errors import UserError
from dvae.lit import find_config
from dvae.train import main as dvae

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PROGRAMS = {"dvae": dvae, "dalle": dalle}
EXPERIMENTS = [f"{stage}/{path.stem}" for stage in PROGRAMS for path in sorted((CONFIGS / stage).glob("*.yaml"))]
MACHINES = [f"machine/{path.stem}" for path in sorted((CONFIGS / "machine").glob("*.yaml"))]

# One update of a narrow model: the shape of the recipe stays, its size goes.
SHORT = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.accelerator=cpu", "--trainer.devices=1"]
SHORT += ["--trainer.precision=32-true", "--trainer.enable_progress_bar=false", "--data.batch_size=4"]
SMALL = {
    "dvae": ["--model.config.hidden=8", "--model.config.vocab_size=16"],
    "dalle": ["--model.depth=1", "--model.width=16", "--model.heads=2", "--model.prompts=1"],
}


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
