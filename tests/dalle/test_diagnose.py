"""A diagnosis names the first stage with a fault, in words that are harmless, for any run or with a clear error."""

import json
import math
import re
import shutil

import pytest
import torch

from dalle import diagnose as room
from dalle.__main__ import main
from dalle.diagnose import (
    DATA,
    FAULT,
    FINE,
    LOOK,
    SAMPLING,
    STAGE_1,
    STAGE_2,
    UNKNOWN,
    Finding,
    Threshold,
    page,
    verdict,
)
from dvae import images


def finding(stage: str, verdict: str, check: str = "a check") -> Finding:
    return Finding(stage, check, verdict, "found", "expected", "do this")


@pytest.mark.parametrize(
    "value, up, down",
    [(0.0, FINE, FAULT), (1.0, LOOK, FAULT), (1.5, LOOK, LOOK), (2.0, FAULT, LOOK), (3.0, FAULT, FINE),
     (math.nan, FAULT, FAULT), (math.inf, FAULT, FINE), (-math.inf, FINE, FAULT)],
)  # fmt: skip
def test_thresholds_in_both_directions(value, up, down):
    assert Threshold(1, 2).judge(value) == up
    assert Threshold(2, 1, up=False).judge(value) == down


def test_every_threshold_needs_a_look_before_it_is_a_fault():
    thresholds = [value for value in vars(room).values() if isinstance(value, Threshold)]
    assert len(thresholds) > 15
    for threshold in thresholds:
        assert (threshold.look < threshold.fault) == threshold.up


def test_the_first_stage_with_a_fault_is_named():
    later = [finding(STAGE_2, FAULT), finding(SAMPLING, FAULT)]
    assert verdict([finding(DATA, LOOK), finding(STAGE_1, FINE), *later])[0] == STAGE_2
    assert verdict([finding(STAGE_1, FAULT, "it repaints pictures"), *later]) == (
        STAGE_1,
        "Look at stage 1 first. it repaints pictures: found. Next: do this.",
    )
    assert verdict([finding(SAMPLING, FAULT)])[0] == SAMPLING


def test_what_needs_a_look_is_no_alarm():
    stage, said = verdict([finding(DATA, FINE), finding(STAGE_1, LOOK), finding(STAGE_2, UNKNOWN)])
    assert stage is None and said.startswith("No stage is at fault. Worth a look, stage 1: ")
    assert verdict([finding(DATA, FINE), finding(DATA, UNKNOWN)]) == (
        None,
        "No stage is at fault, as far as these checks can see.",
    )


HOSTILE = 'x | y\n# <script>alert(1)</script> [a](javascript:1) `z` \u202e * "'


def test_names_from_outside_cannot_change_the_page(tiny_dalle, monkeypatch):
    case = room.gather(str(tiny_dalle), "scenes:train:20", "out", {}, 4, 0, 0.01)._replace(name=HOSTILE)
    text = page(case, [Finding(DATA, HOSTILE, FAULT, HOSTILE, HOSTILE, HOSTILE)], [])
    assert "<" not in text and "\u202e" not in text and re.findall(r"(?<!\\)[\[\]`]", text) == []
    assert text.count("\n# ") == 0 and text.startswith("# Diagnosis of x \\| y")
    assert all(line.count("|") - line.count("\\|") == 6 for line in text.splitlines() if line.startswith("| **fault**"))


def test_a_run_is_asked_for_all_four_stages(tiny_dalle, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["diagnose", str(tiny_dalle), "scenes:train:60", "--out", str(out), "--count", "20", "--updates", "2"]
    assert main([*args, "--temperature", "0.5"]) == 0
    printed = capsys.readouterr().out
    described = json.loads((out / "diagnosis.json").read_text())
    assert described["first"] == DATA  # 60 pairs are too few
    assert f"Look at {DATA} first. how much there is" in printed and "diagnosis.md" in printed
    assert {found["stage"] for found in described["findings"]} == {DATA, STAGE_1, STAGE_2, SAMPLING}
    text = (out / "diagnosis.md").read_text()
    for name in ("reconstructions.png", "losses.png", "samples.png"):
        assert f"![{name}]({name})" in text and images.open_image(out / name).shape[0] == 3
    assert all(found["next"] for found in described["findings"] if found["verdict"] in (FAULT, LOOK))
    assert not any(found["next"] for found in described["findings"] if found["verdict"] == FINE)


@pytest.mark.parametrize(
    "settings, fault", [({"top_k": 1}, True), ({"top_k": 1, "temperature": 1.1}, True), ({"top_p": 0.9}, False)]
)
def test_the_setting_that_leaves_nothing_to_choose_from_is_named(settings, fault, tiny_dalle):
    usual = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance": 1.0}
    case = room.gather(str(tiny_dalle), "scenes:train:60", "out", usual | settings, 20, 0, 0.01)
    (found,) = [f for f in room.examine(case)[0] if f.check == "settings: not too careful"]
    assert (found.verdict == FAULT) == fault
    assert not fault or found.next.startswith("top_k 1 draws nearly the same picture each time")


def test_the_same_run_gets_the_same_diagnosis(tiny_dalle):
    case = room.gather(str(tiny_dalle), "scenes:train:60", "out", {"temperature": 2.0}, 20, 2, 0.01)
    (first, drawn), (second, again) = room.examine(case), room.examine(case)
    assert first == second and all(torch.equal(drawn[name], again[name]) for name in drawn)


def test_a_run_of_stage_1_is_asked_for_its_data_and_itself(tiny_dvae, tmp_path):
    out = tmp_path / "out"
    assert main(["diagnose", str(tiny_dvae), "scenes:train:60", "--out", str(out)]) == 0
    described = json.loads((out / "diagnosis.json").read_text())
    assert {found["stage"] for found in described["findings"]} == {DATA, STAGE_1}
    assert sorted(path.name for path in out.iterdir()) == ["diagnosis.json", "diagnosis.md", "reconstructions.png"]


def test_a_run_leads_to_its_own_data(tiny_dalle, tiny_tokens, tmp_path):
    run = shutil.copytree(tiny_dalle, tmp_path / "run")
    (run / "config.yaml").write_text(f"data:\n  tokens: {tiny_tokens}\n")
    case = room.gather(str(run), None, "out", {}, 5, 0, 0.01)
    assert (case.train.total, case.val.total) == (64, 8)  # scenes:train:64, and scenes:val:8 to validate on
    (run / "metrics.csv").write_text("step,train/image_loss\n1,2.5\n2,9.5\n3,abc\n4,9.0\n5,9.0\n")
    assert "lower the learning rate" in room._why_not_learned(room.gather(str(run), None, "out", {}, 5, 0, 0.01))


@pytest.mark.parametrize("config", [None, "", "data: 3", "data: {tokens: nowhere}", "\x00", "data: {source: null"])
def test_a_run_that_leads_nowhere(config, tiny_dalle, tmp_path, capsys):
    run = shutil.copytree(tiny_dalle, tmp_path / "run")
    if config is not None:
        (run / "config.yaml").write_text(config)
    assert main(["diagnose", str(run), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "does not lead to the data that it was trained on" in error and "dalle diagnose" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data, code, said", [("nowhere", 3, "nowhere"), ("scenes:train:1", 3, "scenes:train:1")])
def test_data_that_cannot_be_used(data, code, said, tiny_dalle, tmp_path, capsys):
    assert main(["diagnose", str(tiny_dalle), data, "--out", str(tmp_path / "out")]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "hint: " in error


def test_no_run_at_all(tmp_path, capsys):
    assert main(["diagnose", str(tmp_path), "scenes:train:60"]) == 4
    assert "no trained dalle in" in capsys.readouterr().err


def test_a_model_trained_on_from_another_may_have_few_pairs(tiny_dalle):
    case = room.gather(str(tiny_dalle), "scenes:train:60", "out", {}, 60, 0, 0.01)
    few, tuned = (next(room._ask_data(case._replace(tuned=tuned))) for tuned in (False, True))
    assert (few.verdict, tuned.verdict) == (FAULT, FINE)
