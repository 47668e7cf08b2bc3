"""A training of two processes on the CPU: they see different rows, decide alike, and end together."""

import csv
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from dvae.lit import SafeCheckpoints

COMMON = {"optimiser": {"learning_rate": {"start": 0.0}, "ema": None}}  # so that no validation is better than the first
CONFIGS = {
    "dvae": {
        "model": {
            **COMMON,
            "config": {"image_size": 16, "vocab_size": 8, "hidden": 8, "groups": 1, "blocks": 1, "code_width": 4,
                       "kernel": 4, "patch": 4, "likelihood": "l2"},
            "temperature": {"start": 1.0},
            "kl_weight": {"start": 0.0},
        },
        "data": {"source": "scenes:train:32", "val": "scenes:val:4", "batch_size": 2},
    },
    "dalle": {
        "model": {**COMMON, "depth": 2, "width": 16, "heads": 2, "patterns": "paper", "checkpointing": True},
        "data": {"batch_size": 2},
    },
}  # fmt: skip
TRAINER = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2, "max_steps": 4,
           "val_check_interval": 4, "log_every_n_steps": 1, "enable_progress_bar": False}  # fmt: skip


def train(stage, folder, **trainer):
    """Exit code and stderr of `fit` in a program of its own; one that hangs is ended with all that it has begun."""
    config = {**CONFIGS[stage], "run": str(folder), "trainer": {**TRAINER, **trainer}}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    program = subprocess.Popen(
        [sys.executable, "-m", stage, "fit", "--config", str(path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        _, said = program.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        pytest.fail("the processes wait for each other")
    return program.returncode, said


@pytest.mark.parametrize("stage", CONFIGS)
def test_two_processes_end_together_although_nothing_improves(stage, tmp_path, tiny_tokens):
    CONFIGS["dalle"]["data"]["tokens"] = str(tiny_tokens)
    code, said = train(stage, tmp_path / "run")
    assert code == 0, said
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    losses = [row["val/loss"] for row in rows if row["val/loss"]]
    assert len(losses) == 2 and losses[0] == losses[1]
    folder = tmp_path / "run" / "checkpoints"
    last, best = (SafeCheckpoints().load_checkpoint(folder / f"{name}.ckpt") for name in ("last", "best"))
    assert (best["global_step"], last["global_step"]) == (2, 4)
    for name, weight in last["state_dict"].items():
        assert torch.equal(weight, best["state_dict"][name])
