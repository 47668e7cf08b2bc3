"""A training that is killed at any moment and continued ends bit for bit where an uninterrupted one ends.

Both stages, with everything that remembers or draws: Gumbel noise, augmentation, BPE and caption dropout, loading
processes, accumulated and clipped gradients, Muon beside AdamW, cut second moments, halving on plateaus, averaged
weights, validations in the middle, bf16. Each run is a fork of this process, in which torch and Lightning are loaded
already, and dies by SIGKILL: nothing of it can tidy up.

The whole campaign, for each stage 100 runs with 1 to 3 kills at random moments and 100 with a kill inside a save whose
temporary folder is on another file system (about half an hour):

    python -m pytest tests/test_resume.py -m slow
"""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

import dalle.__main__
import dalle.train
import dvae.__main__
import dvae.train
from dvae import files, lit, plots

PROGRAMS = {"dvae": dvae.__main__.main, "dalle": dalle.__main__.main}
MODULES = {"dvae": dvae.train.LitDVAE, "dalle": dalle.train.LitDALLE}
UPDATES = 12

# 64 rows in batches of 4, two batches an update: the data's first epoch ends with update 8. last.ckpt is written after
# updates 4 and 8 and by the validations after updates 3, 6, 9 and 12: the saves 1 to 6 are those of 3, 4, 6, 8, 9, 12
TRAINER = {
    "max_steps": UPDATES,
    "accumulate_grad_batches": 2,
    "val_check_interval": 6,
    "log_every_n_steps": 1,
    "accelerator": "cpu",
    "enable_progress_bar": False,
}
OPTIMISER = {"learning_rate": {"start": 3e-3, "end": 1e-4, "steps": 10, "warmup": 2}, "clip": 1.0, "ema": 0.8}
# windows of updates 3-5, 6-8 and 9-11: two halvings, and most checkpoints fall into an open window
HALVING = {
    "learning_rate": {"start": 3e-3, "warmup": 2},
    "plateau": {"window": 3, "patience": 1, "threshold": 0.5, "halvings": 2},
}
DVAE = {"image_size": 32, "vocab_size": 32, "hidden": 8, "groups": 2, "code_width": 16, "kernel": 4, "patch": 4}
CONFIGS = {
    "dvae": {
        "model": {
            "config": {**DVAE, "gain": 1.0, "likelihood": "l2", "tied": True},
            "optimiser": OPTIMISER,
            "temperature": {"start": 1.0, "end": 0.1, "steps": 10},
            "kl_weight": {"start": 0.0, "end": 0.1, "steps": 10},
            "usage_weight": {"start": 0.02},
            "revival": {"every": 2, "until": 10},
            "checkpoint_every": 4,
        },
        "data": {"source": "scenes:train:64", "val": "scenes:val:8", "batch_size": 4, "augment": True},
    },
    "dalle": {
        "model": {
            **{"depth": 1, "width": 32, "heads": 2, "prompts": 1, "checkpoint_every": 4},
            "from_codes": 0.5,
            "image_first": {"share": 0.4},
            "patterns": "paper",
            "checkpointing": True,
            "pad_targets": False,
            "optimiser": {**OPTIMISER, **HALVING, "muon": True, "second_moment_clip": 1e-4, "ema_every": 2},
        },
        "data": {"batch_size": 4, "bpe_dropout": 0.2, "caption_dropout": 0.2},
    },
}


def fit(stage: str, run: Path, tokens: Path, precision: str, workers: int = 2) -> int:
    """`fit --ckpt_path last` in this process; returns the exit code."""
    config = {**CONFIGS[stage], "run": str(run), "trainer": {**TRAINER, "precision": precision}}
    config["data"] = {**config["data"], "workers": workers, **({"tokens": str(tokens)} if stage == "dalle" else {})}
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return PROGRAMS[stage](["fit", "--config", str(path), "--ckpt_path", "last"])


def forked(work: Callable[[], int], kill_after: float | None = None) -> int:
    """Do `work` in a child, a process group of its own; returns its exit code, or minus the signal that it died of.

    A child that ends by itself must have ended its loading processes.
    """
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setpgid(0, 0)
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                code = work()
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code >= 0:
        with pytest.raises(ProcessLookupError):
            os.killpg(child, 0)
    return code


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: object, name: str, call: int, condition: Callable[..., bool] = lambda *_: True) -> None:
    """Die instead of the `call`-th call of a function (from 1) whose arguments meet the condition."""
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def deadly(*args, **kwargs):
        if condition(*args) and next(calls) == call:
            die()
        return real(*args, **kwargs)

    setattr(owner, name, deadly)


def in_the_file(save: int, share: float = 0.5) -> None:
    """Die when this share of the bytes of last.ckpt is in its temporary file, at the `save`-th save."""
    real, calls = files.replacing, iter(range(1, 10**6))

    class Cut:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            self.file.write(content[: int(len(content) * share)])
            self.file.flush()
            die()

    @contextlib.contextmanager
    def deadly(path) -> Iterator:
        with real(path) as file:
            yield Cut(file) if Path(path).name == "last.ckpt" and next(calls) == save else file

    lit.replacing = deadly


POINTS: dict[str, Callable[[str], None]] = {
    "before the first checkpoint": lambda stage: before(MODULES[stage], "training_step", 5),
    "in the first save": lambda stage: in_the_file(1),
    "in a later save": lambda stage: in_the_file(3),
    "before the rename": lambda stage: before(os, "replace", 3, lambda old, new: Path(new).name == "last.ckpt"),
    "after the rename": lambda stage: before(
        files, "sync_folder", 2, lambda folder: folder.name == "checkpoints" and (folder / "last.ckpt").exists()
    ),
    "in validation": lambda stage: before(MODULES[stage], "validation_step", 4),
    # after update 12, which is a multiple of checkpoint_every too
    "in the last validation": lambda stage: before(MODULES[stage], "validation_step", 8),
    "in the metrics": lambda stage: before(os, "replace", 5, lambda old, new: Path(new).name == "metrics.csv"),
    "in a picture": lambda stage: before(os, "replace", 1, lambda old, new: Path(new).name.endswith("-0000006.png")),
    "between artefact and best.ckpt": lambda stage: before(lit.Checkpoints, "on_validation_end", 2),
    "between best.ckpt and last.ckpt": lambda stage: before(lit.Checkpoints, "save", 3),
    "between accumulated batches": lambda stage: before(MODULES[stage], "training_step", 10),
    "in the optimiser": lambda stage: before(torch.optim.AdamW, "step", 7),
    "before an epoch's last save": lambda stage: before(lit.Checkpoints, "save", 4),
    "after an epoch's last save": lambda stage: before(lit.Lit, "on_train_batch_start", 17),
    "before the very last save": lambda stage: before(lit.Checkpoints, "save", 6),
}
HALF_WRITTEN = {"in the first save", "in a later save", "before the rename", "in the metrics", "in a picture"}
NO_CHECKPOINT = {"before the first checkpoint", "in the first save"}


def digest(value: object) -> str:
    """SHA-256 over everything in a nested checkpoint, types, shapes and every bit."""
    seen = hashlib.sha256()

    def visit(value: object) -> None:
        if isinstance(value, torch.Tensor):
            seen.update(f"{value.dtype}{tuple(value.shape)}".encode())
            seen.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                seen.update(repr(key).encode())
                visit(value[key])
        elif isinstance(value, list | tuple):
            seen.update(f"{len(value)}".encode())
            for item in value:
                visit(item)
        else:
            seen.update(repr(value).encode())

    visit(value)
    return seen.hexdigest()


PARTS = ("global_step", "state_dict", "current_model_state", "averaging_state", "optimizer_states", "callbacks")


def ends(run: Path) -> dict[str, str]:
    """What must come out equal: each part of the two checkpoints, the metrics, the artefact, the pictures."""
    found = {}
    for name in ("last", "best"):
        checkpoint = lit.SafeCheckpoints().load_checkpoint(run / "checkpoints" / f"{name}.ckpt")
        found |= {f"{name} {part}": digest(checkpoint[part]) for part in PARTS}
    kept = [run / "metrics.csv", *sorted((run / "samples").iterdir()), *sorted((run / "model").rglob("*"))]
    found |= {str(path.relative_to(run)): files.sha256_file(path) for path in kept if path.is_file()}
    return found


@pytest.fixture(scope="module")
def uninterrupted(tiny_tokens, tmp_path_factory) -> Callable[[str, str], tuple[dict[str, str], float]]:
    """What a run of this stage and precision ends with when nothing happens to it, and how many seconds it takes."""
    known: dict[tuple[str, str], tuple[dict[str, str], float]] = {}

    def run(stage: str, precision: str) -> tuple[dict[str, str], float]:
        if (stage, precision) not in known:
            folder = tmp_path_factory.mktemp("whole") / "run"
            start = time.monotonic()
            assert forked(lambda: fit(stage, folder, tiny_tokens, precision)) == 0
            rates = plots.read((folder / "metrics.csv").read_text())["train/learning_rate"].values
            assert stage == "dvae" or rates[-1] == 3e-3 / 4, "halved twice"
            known[stage, precision] = ends(folder), time.monotonic() - start
        return known[stage, precision]

    return run


def temporary(run: Path) -> list[Path]:
    return list(run.rglob(".part-*"))


# every point once, the stages and precisions in turn
CASES = [(("dvae", "dalle")[k % 2], ("32-true", "bf16-mixed")[k // 2 % 2], point) for k, point in enumerate(POINTS)]


@pytest.mark.parametrize("stage, precision, point", CASES)
def test_killed_at(stage, precision, point, tiny_tokens, uninterrupted, tmp_path):
    run, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"

    def killed() -> int:
        POINTS[point](stage)
        return fit(stage, run, tiny_tokens, precision)

    assert forked(killed) == -signal.SIGKILL, "the run must reach the point at which it is killed"
    assert last.exists() == (point not in NO_CHECKPOINT)
    if last.exists():
        lit.SafeCheckpoints().load_checkpoint(last)
    assert bool(temporary(run)) == (point in HALF_WRITTEN)
    assert forked(lambda: fit(stage, run, tiny_tokens, precision)) == 0
    assert ends(run) == uninterrupted(stage, precision)[0]
    assert not temporary(run)


@pytest.mark.parametrize("stage, number", [("dvae", signal.SIGINT), ("dalle", signal.SIGTERM)])
def test_asked_to_stop(stage, number, tiny_tokens, uninterrupted, tmp_path):
    # Ctrl-C reaches the whole group, loading processes too; the next batch is still needed to finish the update
    run = tmp_path / "run"
    real, calls = MODULES[stage].training_step, iter(range(1, 100))

    def asking(*args):
        if next(calls) == 9:
            (os.killpg if number == signal.SIGINT else os.kill)(os.getpid(), number)
        return real(*args)

    def stopped() -> int:
        MODULES[stage].training_step = asking
        return fit(stage, run, tiny_tokens, "32-true")

    assert forked(stopped) == 128 + number
    checkpoint = lit.SafeCheckpoints().load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 5, "the running update is finished and saved"
    assert forked(lambda: fit(stage, run, tiny_tokens, "32-true")) == 0
    assert ends(run) == uninterrupted(stage, "32-true")[0]


def killed_at_random(stage: str, precision: str, seed: int, run: Path, tokens: Path, seconds: float) -> int:
    """A run with 1 to 3 kills at random moments, continued to its end; returns how many kills met a living run."""
    chance = random.Random(f"{stage} {seed}")
    kills = 0
    for _ in range(chance.randint(1, 3)):
        # the first part is start-up, in which nothing can be lost
        delay = chance.uniform(0.15, 0.95) * seconds
        kills += forked(lambda: fit(stage, run, tokens, precision), delay) == -signal.SIGKILL
    assert forked(lambda: fit(stage, run, tokens, precision)) == 0
    return kills


@pytest.mark.parametrize("stage, precision", [("dvae", "bf16-mixed"), ("dalle", "32-true")])
def test_killed_at_random(stage, precision, tiny_tokens, uninterrupted, tmp_path):
    expected, seconds = uninterrupted(stage, precision)
    killed_at_random(stage, precision, 0, tmp_path / "run", tiny_tokens, seconds)
    assert ends(tmp_path / "run") == expected
    assert not temporary(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", PROGRAMS)
def test_a_hundred_killed_runs(stage, tiny_tokens, uninterrupted, tmp_path):
    for seed in range(100):
        precision = ("32-true", "bf16-mixed")[seed % 2]
        expected, seconds = uninterrupted(stage, precision)
        run, kills = tmp_path / f"run-{seed}", 0
        while not kills:  # a run that was too fast to be met says nothing
            shutil.rmtree(run, ignore_errors=True)
            kills = killed_at_random(stage, precision, seed + 1000, run, tiny_tokens, seconds)
            seconds *= 0.8
        assert ends(run) == expected and not temporary(run), seed
        shutil.rmtree(run)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder for temporary files, on another file system than the run."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if os.stat(folder).st_dev != os.stat(tmp_path).st_dev:
            monkeypatch.setenv("TMPDIR", folder)
            monkeypatch.setattr(tempfile, "tempdir", folder)
            yield Path(folder)
            return
    pytest.skip("this machine has no second file system to put temporary files on")


@pytest.mark.slow
@pytest.mark.parametrize("stage", PROGRAMS)
def test_a_hundred_kills_inside_the_save(stage, tiny_tokens, uninterrupted, elsewhere, tmp_path):
    for seed in range(100):
        chance = random.Random(f"save {stage} {seed}")
        run, save, share = tmp_path / f"run-{seed}", chance.randint(1, 6), chance.random()
        last = run / "checkpoints" / "last.ckpt"

        def killed(run=run, save=save, share=share) -> int:
            in_the_file(save, share)  # loading processes have temporary files of their own: none here
            return fit(stage, run, tiny_tokens, "32-true", workers=0)

        assert forked(killed) == -signal.SIGKILL, seed
        assert temporary(run) and last.exists() == (save > 1), seed
        if last.exists():
            lit.SafeCheckpoints().load_checkpoint(last)
        assert forked(lambda run=run: fit(stage, run, tiny_tokens, "32-true", workers=0)) == 0
        assert ends(run) == uninterrupted(stage, "32-true")[0], seed
        assert not temporary(run) and not list(elsewhere.iterdir()), seed
        shutil.rmtree(run)
