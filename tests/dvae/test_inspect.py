"""The commands that look into a tokenizer: what they write is true, and every mistake is told in words."""

import json
import zipfile

import pytest
import torch
from torch.export import Dim

from dvae import inspect
from dvae.codebook import usage
from dvae.data import open_source
from dvae.errors import DataError, UserError
from dvae.evaluate import psnr, ssim
from dvae.images import open_image, save
from dvae.inspect import codebook, evaluate, load_features, most, reconstruct
from dvae.model import DVAE, DVAEConfig
from dvae.tokenizer import load

DATA = "scenes:train:64"


class Means(torch.nn.Module):
    """A judge of two features: the mean brightness, and that of the upper half."""

    def forward(self, images):
        return torch.stack([images.mean((1, 2, 3)), images[:, :, : images.shape[2] // 2].mean((1, 2, 3))], 1)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "means.pt2"
    program = torch.export.export(Means().eval(), (torch.rand(2, 3, 32, 32),), dynamic_shapes=({0: Dim.DYNAMIC},))
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def pictures():
    return open_source(DATA, 32).images(range(64)).float() / 255


def one_code(folder, side=8):
    config = DVAEConfig(image_size=side, vocab_size=1, hidden=4, groups=1, blocks=1, bottleneck=2, code_width=3,
                        kernel=4, patch=4)  # fmt: skip
    DVAE(config).save(folder)
    return folder


def written(folder, capsys) -> tuple[set[str], str]:
    """The names of what lies in a folder, all of it said to be written, and what was said."""
    out = capsys.readouterr().out
    assert all(f"wrote {path}\n" in out for path in folder.iterdir())
    return {path.name for path in folder.iterdir()}, out


def test_reconstruct_writes_pairs_and_their_psnr(tmp_path, tiny_dvae, pictures, capsys):
    reconstruct(str(tiny_dvae), DATA, str(tmp_path), count=6)
    names, out = written(tmp_path, capsys)
    assert names == {"reconstructions.png", "reconstructions.json"} and "over 6 pictures" in out
    model, rows = load(tiny_dvae), [0, 10, 21, 32, 42, 53]
    expected = psnr(model.decode(model.encode(pictures[rows])), pictures[rows])
    said = json.loads((tmp_path / "reconstructions.json").read_text())
    assert [each["key"] for each in said["pictures"]] == [f"train-{row:06d}" for row in rows]
    assert [each["psnr"] for each in said["pictures"]] == pytest.approx(expected.tolist(), rel=1e-5)
    assert said["psnr"] == pytest.approx(expected.mean().item())
    grid = open_image(tmp_path / "reconstructions.png")
    assert torch.equal(grid[:, 2:34, 2:34], (pictures[0] * 255).round().to(torch.uint8))


def test_codebook_counts_what_was_encoded(tmp_path, tiny_dvae, pictures, capsys):
    codebook(str(tiny_dvae), DATA, str(tmp_path), count=20)
    names, out = written(tmp_path, capsys)
    drawn = {"usage.png", "cells.png", "atlas.png", "alone.png", "most_used.png", "codes.png"}
    assert names == drawn | {"codebook.json"}
    numbers = json.loads((tmp_path / "codebook.json").read_text())
    tokens = load(tiny_dvae).encode(pictures[[k * 64 // 20 for k in range(20)]])
    seen = usage(tokens, 16)
    assert numbers["pictures"] == 20 and numbers["codes"] == 16 and numbers["tokens_per_code"] == 20
    assert numbers["counts"] == seen.counts.tolist() and numbers["dead"] == seen.dead.tolist()
    assert numbers["used"] == pytest.approx(seen.used) and numbers["perplexity"] == pytest.approx(seen.perplexity)
    corner = usage(tokens[:, 0, 3], 16).perplexity
    assert numbers["perplexity_of_cells"][0][3] == pytest.approx(corner)
    assert f"{seen.used:.1%} of 16 codes in use over 20 pictures" in out
    for example in numbers["examples"]:
        assert len(example["in_code_space"]) == len(example["by_swap"]) == 4
        assert example["swap_effect"] == sorted(example["swap_effect"])
        assert example["code"] not in example["in_code_space"] + example["by_swap"]
    assert len(numbers["examples"]) == min(12, (usage(load(tiny_dvae).encode(pictures), 16).counts > 0).sum())


@pytest.mark.parametrize("limit", [1 << 24, 16 * 16 * 7])
def test_evaluate_measures_all_pictures_whatever_the_batches(
    limit, tmp_path, tiny_dvae, pictures, judge, monkeypatch, capsys
):
    monkeypatch.setattr(inspect, "_MOST_LOGITS", limit)
    assert most(load(tiny_dvae)) == (64 if limit > 9999 else 7)
    evaluate(str(tiny_dvae), DATA, str(tmp_path), features=str(judge))
    names, out = written(tmp_path, capsys)
    assert names == {"evaluation.json", "worst.png"}
    model = load(tiny_dvae)
    decoded = model.decode(model.encode(pictures))
    found = json.loads((tmp_path / "evaluation.json").read_text())
    each = psnr(decoded, pictures)
    assert found["pictures"] == 64 and found["psnr"] == pytest.approx(each.mean().item())
    assert found["ssim"] == pytest.approx(ssim(decoded, pictures).mean().item())
    order = each.argsort()[:12].tolist()
    assert [worst["picture"] for worst in found["worst"]] == order
    assert [worst["key"] for worst in found["worst"]] == [f"train-{row:06d}" for row in order]
    assert found["frechet"] > 0 and found["features"] == 2
    assert f"PSNR {each.mean():.2f} dB" in out and f"Frechet distance {found['frechet']:.4f} of 2 features" in out


def test_rows_of_the_worst_are_those_of_the_source(tmp_path, tiny_dvae, capsys):
    evaluate(str(tiny_dvae), DATA, str(tmp_path), count=4)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert {worst["picture"] for worst in found["worst"]} == {0, 16, 32, 48}
    assert all(worst["key"] == f"train-{worst['picture']:06d}" for worst in found["worst"])
    assert found["frechet"] is None
    said = "Frechet distance not measured: it needs --features, a module that did not learn from these codes"
    assert said in capsys.readouterr().out


def test_too_few_pictures_for_the_features_are_told(tmp_path, tiny_dvae, judge, capsys):
    evaluate(str(tiny_dvae), DATA, str(tmp_path), count=2, features=str(judge))
    assert capsys.readouterr().err == (
        "warning: the Frechet distance comes out too large: 2 pictures, 2 features\n"
        "hint: compare it with that of as many pictures only, or give more than 2\n"
    )


@pytest.mark.parametrize("command", [reconstruct, codebook, evaluate])
def test_one_picture_in_a_folder_with_a_broken_one_is_enough(command, tmp_path, tiny_dvae, capsys):
    save(torch.rand(3, 40, 50), tmp_path / "data" / "a.png")
    (tmp_path / "data" / "b.png").write_bytes(b"broken")
    command(str(tiny_dvae), str(tmp_path / "data"), str(tmp_path / "out"))
    names, _ = written(tmp_path / "out", capsys)
    assert len(names) >= 2


@pytest.mark.parametrize("command", [reconstruct, codebook, evaluate])
@pytest.mark.parametrize("side", [8, 16])
def test_one_code_and_small_pictures(command, side, tmp_path, capsys):
    command(str(one_code(tmp_path / "model", side)), "scenes:train:3", str(tmp_path / "out"))
    _, out = written(tmp_path / "out", capsys)
    if command is codebook:
        assert "100.0% of 1 codes in use" in out and "perplexity 1.0" in out
    if command is evaluate:
        assert ("SSIM not measured: it needs 11 pixels a side" in out) == (side == 8)


@pytest.mark.parametrize("command", [reconstruct, codebook, evaluate])
def test_empty_data_is_told_and_nothing_is_written(command, tmp_path, tiny_dvae):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="0 usable of 0 listed"):
        command(str(tiny_dvae), str(tmp_path / "data"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        load_features(str(path))(torch.rand(2, 3, 32, 32))
    assert error.value.code == 2 and error.value.hint
    return error.value.what


def test_features_are_those_of_the_program(judge):
    images = torch.rand(5, 3, 32, 32)
    assert torch.allclose(load_features(str(judge))(images), Means()(images), atol=1e-6)


def test_what_is_no_program_is_refused_in_words(tmp_path, capfd):
    path = tmp_path / "judge.pt2"
    assert refused(path) == f"there is no file {path}"
    path.write_bytes(b"weights")
    assert refused(path) == f"{path} is no program of torch.export"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    assert refused(path).startswith(f"{path} is no program of torch.export: ")
    assert capfd.readouterr().err == ""  # and torch prints no traceback of its own


class Broken(torch.nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def forward(self, images):
        if self.fault == "shape":
            return images
        means = images.mean((2, 3))
        return (means, means) if self.fault == "two" else means / (means - means)


@pytest.mark.parametrize(
    "fault, said",
    [
        ("shape", "gives (2, 3, 32, 32) for 2 pictures"),
        ("two", "gives tuple for 2 pictures"),
        ("nan", "gives features that are not finite"),
    ],
)
def test_what_gives_no_features_is_refused_in_words(fault, said, tmp_path):
    program = torch.export.export(Broken(fault), (torch.rand(2, 3, 32, 32),), dynamic_shapes=({0: Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "judge.pt2")
    assert refused(tmp_path / "judge.pt2") == f"{tmp_path / 'judge.pt2'} {said}"


def test_a_program_for_other_pictures_is_refused_in_words(tmp_path):
    program = torch.export.export(Means().eval(), (torch.rand(2, 3, 16, 16),))
    torch.export.save(program, tmp_path / "judge.pt2")
    assert refused(tmp_path / "judge.pt2").startswith(f"{tmp_path / 'judge.pt2'} fails on pictures (2, 3, 32, 32): ")
