"""Released tokenizers of others: files of their layout, written here, against their published description."""

import contextlib
import functools
import importlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
import warnings
import zipfile
from collections import Counter, OrderedDict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from dalle.__main__ import main as dalle
from dvae import artefact, files, importers, lit
from dvae.__main__ import main
from dvae.artefact import find, verify
from dvae.data import open_source
from dvae.errors import ArtefactError
from dvae.evaluate import psnr
from dvae.foreign import read, tensors
from dvae.model import DVAEConfig
from dvae.tokenizer import load

ROOT = Path(__file__).resolve().parent.parent.parent
HIDDEN, CODES, WIDTH, SIDE = 64, 512, 16, 32  # the smallest that the release's classes admit, on small pictures


# ------------------------------------------------------------------------------------------------------ such files

KEPT = {  # what a module of torch 1.7 has in its __dict__
    "training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_backward_hooks", "_forward_hooks",
    "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_modules",
}  # fmt: skip


def old(module, **fields):
    """`module` as an old torch and the release's classes left it: no newer attributes, the class's own fields first."""
    state = {name: value for name, value in vars(module).items() if name in KEPT}
    vars(module).clear()
    vars(module).update(fields | state)
    return module


class Release:
    """Modules with the names, fields and keys of the release; they compute nothing."""

    def __init__(self, generator):
        self.generator, self.classes = generator, {}
        for name in ("encoder.Encoder", "encoder.EncoderBlock", "decoder.Decoder", "decoder.DecoderBlock"):
            self.classes[name.split(".")[1]] = self.stand_in(name)
        self.classes["Conv2d"] = self.stand_in("utils.Conv2d")

    @staticmethod
    def stand_in(name):
        room, kind = name.split(".")
        return type(kind, (nn.Module,), {"__module__": f"dall_e.{room}"})

    def __enter__(self):
        """While files are written, there is a package dall_e."""
        self.rooms = {
            f"dall_e{room}": types.ModuleType(f"dall_e{room}") for room in ("", ".encoder", ".decoder", ".utils")
        }
        for name, kind in self.classes.items():
            setattr(self.rooms[kind.__module__], name, kind)
        sys.modules.update(self.rooms)
        return self

    def __exit__(self, *_):
        for name in self.rooms:
            del sys.modules[name]

    def conv(self, inputs, outputs, kernel, exact=False):
        made = self.classes["Conv2d"]()
        made.w = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel), requires_grad=False)
        made.b = nn.Parameter(torch.empty(outputs), requires_grad=False)
        made.w.normal_(std=2 * (inputs * kernel**2) ** -0.5, generator=self.generator)  # residual paths are to matter
        made.b.normal_(std=0.1, generator=self.generator)
        fields = dict(n_in=inputs, n_out=outputs, kw=kernel, use_float16=not exact)
        return old(made, **fields, device=torch.device("cpu"), requires_grad=False)

    def chain(self, **parts):
        return old(nn.Sequential(OrderedDict(parts)))

    def block(self, kind, inputs, outputs, layers):
        inner, last = outputs // 4, kind == "EncoderBlock"
        kernels = (3, 3, 3, 1) if last else (1, 3, 3, 3)
        widths = (inputs, inner, inner, inner, outputs)
        parts = {}
        for k in range(4):
            parts[f"relu_{k + 1}"] = old(nn.ReLU(), inplace=False)
            parts[f"conv_{k + 1}"] = self.conv(widths[k], widths[k + 1], kernels[k])
        made = self.classes[kind]()
        made.id_path = old(nn.Identity()) if inputs == outputs else self.conv(inputs, outputs, 1)
        made.res_path = self.chain(**parts)
        return old(made, n_in=inputs, n_out=outputs, n_layers=layers, device=torch.device("cpu"), requires_grad=False,
                   n_hid=inner, post_gain=1 / layers**2)  # fmt: skip

    def groups(self, kind, start, widths, blocks, between):
        parts = {}
        for g, width in enumerate(widths):
            each = {}
            for b in range(blocks):
                each[f"block_{b + 1}"] = self.block(kind, start, width, len(widths) * blocks)
                start = width
            if g < len(widths) - 1:
                each |= between()
            parts[f"group_{g + 1}"] = self.chain(**each)
        return parts

    def encoder(self, hidden=HIDDEN, codes=CODES, blocks=2):
        widths = [hidden * k for k in (1, 2, 4, 8)]

        def pool():
            fields = dict(kernel_size=2, stride=2, padding=0, dilation=1, return_indices=False, ceil_mode=False)
            return {"pool": old(nn.MaxPool2d(2), **fields)}

        made = self.classes["Encoder"]()
        output = self.chain(relu=old(nn.ReLU(), inplace=False), conv=self.conv(widths[-1], codes, 1, exact=True))
        groups = self.groups("EncoderBlock", hidden, widths, blocks, pool)
        made.blocks = self.chain(input=self.conv(3, hidden, 7), **groups, output=output)
        fields = dict(n_hid=hidden, n_blk_per_group=blocks, input_channels=3, vocab_size=codes)
        return old(
            made, group_count=4, **fields, device=torch.device("cpu"), requires_grad=False, use_mixed_precision=True
        )

    def decoder(self, hidden=HIDDEN, codes=CODES, blocks=2, width=WIDTH):
        widths = [hidden * k for k in (8, 4, 2, 1)]

        def upsample():
            fields = dict(name="Upsample", size=None, scale_factor=2.0, mode="nearest", align_corners=None)
            return {"upsample": old(nn.Upsample(scale_factor=2), **fields)}

        made = self.classes["Decoder"]()
        output = self.chain(relu=old(nn.ReLU(), inplace=False), conv=self.conv(hidden, 6, 1))
        groups = self.groups("DecoderBlock", width, widths, blocks, upsample)
        made.blocks = self.chain(input=self.conv(codes, width, 1, exact=True), **groups, output=output)
        fields = dict(n_init=width, n_hid=hidden, n_blk_per_group=blocks, output_channels=3, vocab_size=codes)
        return old(
            made, group_count=4, **fields, device=torch.device("cpu"), requires_grad=False, use_mixed_precision=True
        )


def weights(module, prefix=""):
    """The tensors of such a module by their keys."""
    found = {prefix + name: tensor.data for name, tensor in module._parameters.items()}
    for name, child in module._modules.items():
        found |= weights(child, f"{prefix}{name}.")
    return found


def levelled(encoder, side):
    """The encoder with codes that are about equally often the largest; random weights alone would choose but two."""
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(1))
    encoder.blocks.output.conv.b -= logits_of(weights(encoder), images).mean((0, 2, 3))
    return encoder


LAYOUTS = ("archive", "legacy", "state dict", "safetensors")


def save(value, path, layout="archive"):
    if layout == "safetensors":
        safetensors.torch.save_file(value, path)
        return
    with warnings.catch_warnings():  # the stand-ins have no source that the legacy format could keep
        warnings.simplefilter("ignore")
        torch.save(value, path, _use_new_zipfile_serialization=layout != "legacy")


class Files:
    """Both halves in each layout, `names[layout]`, and their weights, `encoder` and `decoder`."""

    def __init__(self, folder):
        self.names = {}
        with Release(torch.Generator().manual_seed(0)) as release:
            halves = {"encoder": levelled(release.encoder(), SIDE), "decoder": release.decoder()}
            self.encoder, self.decoder = (weights(half) for half in halves.values())
            for layout in LAYOUTS:
                ending = {"archive": "pkl", "legacy": "pkl", "state dict": "pt", "safetensors": "safetensors"}[layout]
                self.names[layout] = [folder / f"{layout}-{half}.{ending}" for half in halves]
                for module, path in zip(halves.values(), self.names[layout], strict=True):
                    save(module if ending == "pkl" else weights(module), path, layout)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    """A run of the published layout."""
    run = tmp_path_factory.mktemp("runs") / "openai"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(arguments(published.names["archive"], run)) == 0
    return run


def arguments(names, out, side=SIDE):
    return ["import", "openai", *map(str, names), "--out", str(out), "--image_size", str(side)]


# ------------------------------------------------------------------------------------------------------ what they say


def convolved(weights, name, x):
    w = weights[f"{name}.w"]
    return F.conv2d(x, w, weights[f"{name}.b"], padding=w.shape[-1] // 2)


def through_blocks(weights, x, between):
    groups, blocks = 4, 2
    for g in range(1, groups + 1):
        for b in range(1, blocks + 1):
            name, y = f"blocks.group_{g}.block_{b}", x
            for k in (1, 2, 3, 4):
                y = convolved(weights, f"{name}.res_path.conv_{k}", F.relu(y))
            skip = convolved(weights, f"{name}.id_path", x) if f"{name}.id_path.w" in weights else x
            x = skip + y / (groups * blocks) ** 2
        x = between(x) if g < groups else x
    return convolved(weights, "blocks.output.conv", F.relu(x))


def logits_of(weights, images):
    """The published description of the encoder, on images in [0, 1]."""
    x = convolved(weights, "blocks.input", 0.8 * images + 0.1)
    return through_blocks(weights, x, lambda x: F.max_pool2d(x, 2))


def painted_by(weights, z):
    """The published description of the decoder, and what its sample notebook shows of it."""
    x = convolved(weights, "blocks.input", z)
    raw = through_blocks(weights, x, lambda x: F.interpolate(x, scale_factor=2, mode="nearest"))
    return ((torch.sigmoid(raw[:, :3]) - 0.1) / 0.8).clamp(0, 1)


def agrees(model, encoder, decoder, images):
    logits = logits_of(encoder, images)
    assert len(logits.argmax(1).unique()) > 3
    torch.testing.assert_close(model.logits(images), logits, rtol=1e-4, atol=1e-4)
    tokens = model.encode(images)
    assert torch.equal(tokens, logits.argmax(1)) and tokens.shape[1:] == model.grid
    hard = F.one_hot(tokens, model.vocab_size).movedim(-1, 1).float()
    picture = painted_by(decoder, hard)
    assert 0.05 < picture.std() and picture.shape == images.shape
    torch.testing.assert_close(model.decode(tokens), picture, rtol=0, atol=1e-5)
    soft = logits.softmax(1)
    torch.testing.assert_close(model.decode_soft(soft), painted_by(decoder, soft), rtol=0, atol=1e-5)
    assert not torch.equal(model.decode_soft(soft), model.decode(tokens))
    torch.testing.assert_close(model.codes(), decoder["blocks.input.w"][:, :, 0, 0].t())


def test_it_computes_what_the_published_description_says(imported, published):
    model = load(imported)
    assert model.grid == (4, 4) and model.vocab_size == CODES and model.config.residual_gain == 1 / 64
    agrees(model, published.encoder, published.decoder, torch.rand(3, 3, SIDE, SIDE))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_all_layouts_give_the_same_model(layout, published, imported, tmp_path):
    assert main(arguments(published.names[layout], tmp_path)) == 0
    assert verify(tmp_path / "model")["digest"] == verify(imported / "model")["digest"]


def test_every_key_of_the_published_files_is_read(published):
    for half, count in (("encoder", 74), ("decoder", 76)):
        theirs = getattr(published, half)
        for names in published.names.values():
            (path,) = [path for path in names if half in path.name]
            found = tensors(path, read(path))
            assert len(found) == count and found.keys() == theirs.keys()
            assert all(torch.equal(found[key], theirs[key]) for key in theirs)


def test_the_full_size_is_the_papers(tmp_path):
    names = [tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"]
    with Release(torch.Generator().manual_seed(0)) as release:
        halves = [levelled(release.encoder(256, 8192), 64), release.decoder(256, 8192, width=128)]
        for half, path in zip(halves, names, strict=True):
            save(half, path)
    theirs = [weights(half) for half in halves]
    assert [sum(tensor.numel() for tensor in half.values()) for half in theirs] == [53_786_240, 43_829_766]
    assert main(arguments(names, tmp_path / "run", 64)) == 0
    model = load(tmp_path / "run")
    assert model.config == replace(DVAEConfig(), image_size=64)
    agrees(model, *theirs, torch.rand(1, 3, 64, 64))
    shutil.rmtree(tmp_path)


def test_other_pictures_are_read_by_the_same_weights(published, tmp_path):
    assert main(arguments(published.names["archive"], tmp_path, 40)) == 0
    model = load(tmp_path)
    assert model.grid == (5, 5)
    agrees(model, published.encoder, published.decoder, torch.rand(2, 3, 40, 40))


def test_other_depths_are_inferred(tmp_path):
    with Release(torch.Generator().manual_seed(0)) as release:
        for half, made in (("encoder", release.encoder(blocks=1)), ("decoder", release.decoder(blocks=1, width=24))):
            save(made, tmp_path / half)
    assert main(arguments([tmp_path / "encoder", tmp_path / "decoder"], tmp_path / "run")) == 0
    config = load(tmp_path / "run").config
    assert (config.groups, config.blocks, config.code_width, config.residual_gain) == (4, 1, 24, 1 / 16)


def test_half_precision_is_widened(published, tmp_path):
    names = []
    for half in ("encoder", "decoder"):
        names.append(tmp_path / f"{half}.pt")
        save({key: tensor.half() for key, tensor in getattr(published, half).items()}, names[-1])
    assert main(arguments(names, tmp_path / "run")) == 0
    state = artefact.load(tmp_path / "run" / "model", "dvae").tensors
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["decoder.input.weight"], published.decoder["blocks.input.w"].half().float())


def test_strided_and_shared_numbers_are_read(published, tmp_path):
    flat = torch.cat([tensor.flatten() for tensor in published.encoder.values()])
    parts = flat.split([tensor.numel() for tensor in published.encoder.values()])
    views = {key: part.view(theirs.shape) for part, (key, theirs) in zip(parts, published.encoder.items(), strict=True)}
    views["blocks.input.w"] = published.encoder["blocks.input.w"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    save(views, tmp_path / "encoder.pt")
    found = tensors("", read(tmp_path / "encoder.pt"))
    assert all(torch.equal(found[key], tensor) for key, tensor in published.encoder.items())


def test_what_is_written_and_said(published, tmp_path, capsys):
    names = published.names["archive"]
    assert main(arguments(names, tmp_path / "run")) == 0
    run = tmp_path / "run"
    assert capsys.readouterr().out == (
        f"wrote {run / 'model'}: 32 x 32 pixels <-> 4 x 4 cells of 512 codes\n"
        f"next: dvae reconstruct {run} IMAGES --out pictures\n"
        f"      dalle prepare IMAGES --dvae {run} --out tokens\n"
    )
    about = verify(run / "model")["about"]
    for half, path in zip(("encoder", "decoder"), names, strict=True):
        assert about[half] == {"file": path.name, "sha256": files.sha256_file(path)}
    assert "openai/DALL-E" in about["imported"] and "say that the model was used" in about["licence"]


def test_it_is_stage_one_of_everything(imported, tmp_path, capsys):
    """Tokens are prepared with it, stage 2 learns them and draws, and every command looks into it."""
    out = {name: str(tmp_path / name) for name in ("tokens", "dalle", "drawn", "dvae", "diagnosis", "report.html",
                                                   "compared", "small", "checked")}  # fmt: skip
    train = {"model.depth": 1, "model.width": 32, "model.heads": 2, "model.prompts": 1, "data.batch_size": 4,
             "data.tokens": out["tokens"], "run": out["dalle"], "trainer.max_steps": 2, "trainer.val_check_interval": 2,
             "trainer.precision": "32-true"}  # fmt: skip
    prepare = ["prepare", "scenes:train:16", "--val", "scenes:val:4", "--size", "300", "--length", "16"]
    for program, args in [
        (dalle, [*prepare, "--dvae", imported, "--out", out["tokens"]]),
        (dalle, ["fit", "--config", "dalle/demo", *(part for k, v in train.items() for part in (f"--{k}", v))]),
        (dalle, ["sample", out["dalle"], "a red circle", "--count", 2, "--keep", 1, "--out", out["drawn"]]),
        (main, ["reconstruct", imported, "scenes:val", "--count", 2, "--out", out["dvae"]]),
        (main, ["codebook", imported, "scenes:val", "--count", 2, "--out", out["dvae"]]),
        (main, ["evaluate", imported, "scenes:val", "--count", 2, "--out", out["dvae"]]),
        (dalle, ["diagnose", out["dalle"], "--count", 4, "--updates", 0, "--out", out["diagnosis"]]),
        (dalle, ["report", imported, "--out", out["report.html"]]),
        (
            dalle,
            ["compare", out["dalle"], "scenes:train:16", "--count", 2, "--candidates", 2, "--out", out["compared"]],
        ),
        (dalle, ["shrink", out["dalle"], "--out", out["small"]]),
        (dalle, ["sample", out["small"], "a red circle", "--count", 2, "--keep", 1, "--out", out["drawn"]]),
        (dalle, ["check", "scenes:train:16", "--dvae", imported, "--out", out["checked"]]),
    ]:
        assert program([str(arg) for arg in args]) == 0, (args[0], capsys.readouterr().err)
    for name in ("drawn/a-red-circle-seed0.png", "diagnosis/diagnosis.md", "report.html", "compared/seen.png",
                 "compared/heldout.png", "checked/pictures.png"):  # fmt: skip
        assert (tmp_path / name).stat().st_size > 1000
    shown = {"reconstructions.png", "codebook.json", "atlas.png", "evaluation.json"}
    assert shown <= {path.name for path in (tmp_path / "dvae").iterdir()}
    carried = find(out["dalle"], "dvae")
    assert verify(carried)["digest"] == verify(imported / "model")["digest"] and "imported" in verify(carried)["about"]
    assert "modified MIT licence" in (tmp_path / "report.html").read_text()


def test_it_goes_on_training(imported, tmp_path, monkeypatch, capsys):
    """It is validated as it is, and two updates later it is another model of the same architecture."""
    start = load(imported)
    settings = {
        "model": {"config": asdict(start.config), "revival": None, "usage_weight": {"start": 0.0}},
        "data": {"source": "scenes:train:16", "val": "scenes:val:4", "batch_size": 4},
        "trainer": {"max_steps": 2, "val_check_interval": 2, "precision": "32-true", "accelerator": "cpu"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    configs = ["--config", "dvae/demo", "--config", str(tmp_path / "mine.yaml"), "--init_from", str(imported)]
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(lit, "record", lambda trainer, metrics: seen.append(metrics))
        assert main(["validate", *configs, "--run", str(tmp_path / "looked")]) == 0, capsys.readouterr().err
    images = open_source("scenes:val:4", SIDE).images(range(4)).float() / 255
    found = psnr(start.decode(start.encode(images)), images).mean().item()
    assert [metrics["val/psnr"] for metrics in seen] == [pytest.approx(found, rel=1e-4)]
    assert main(["fit", *configs, "--run", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    trained = load(tmp_path / "run")
    assert trained.config == start.config
    moved = [not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True)]
    assert all(moved) and len(moved) == 150


# ------------------------------------------------------------------------------------------------------ mistakes


def refused(capsys, names, out, code=4, side=SIDE):
    """Runs a mistake, which writes nothing; returns its two lines without their first words."""
    assert main(arguments(names, out, side)) == code
    said = capsys.readouterr()
    match = re.fullmatch(r"error: (.+)\nhint: (.+)\n", said.err)
    assert match and said.out == "" and not out.exists(), said.err
    return match.groups()


FETCH = "fetch the file again from those who published it, and compare its size with theirs"


@pytest.mark.parametrize(
    "content, what",
    [
        (None, "there is no file {}"),
        (b"", "{} is empty"),
        (b"\n <!DOCTYPE html><html>Not found</html>", "{} is a web page"),
        (bytes(range(256)) * 40, "{} is no file of torch or safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\n", "{} is no file of torch or safetensors"),
        (b"PK\x03\x04" + bytes(100), "{} is damaged: it was cut or changed since it was written"),
    ],
    ids=["missing", "empty", "web page", "bytes", "pointer", "zip"],
)
@pytest.mark.parametrize("half", [0, 1])
def test_files_that_are_no_weights(content, what, half, published, tmp_path, capsys):
    names = list(published.names["archive"])
    names[half] = tmp_path / "file"
    if content is not None:
        names[half].write_bytes(content)
    said, hint = refused(capsys, names, tmp_path / "run")
    assert said == what.format(names[half])
    assert hint == ("name a file that you have fetched" if content is None else FETCH)


def test_a_folder_is_no_file(published, tmp_path, capsys):
    assert "there is no file" in refused(capsys, [tmp_path, published.names["archive"][1]], tmp_path / "run")[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_files_that_are_cut(layout, quarter, published, tmp_path, capsys):
    whole = published.names[layout][1]
    cut = tmp_path / whole.name
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) * quarter // 4])
    what, hint = refused(capsys, [published.names[layout][0], cut], tmp_path / "run")
    assert what in (
        f"{cut} is damaged: it was cut or changed since it was written",
        f"{cut} was not read: it declares more numbers than it holds",
    )
    assert hint == FETCH


def test_a_file_that_is_cut_by_a_byte(published, tmp_path, capsys):
    for layout in LAYOUTS:
        cut = tmp_path / published.names[layout][1].name
        cut.write_bytes(published.names[layout][1].read_bytes()[:-1])
        assert refused(capsys, [published.names[layout][0], cut], tmp_path / "run")[0].startswith(str(cut))


def test_the_name_of_a_file_says_nothing_of_its_layout(published, tmp_path):
    for layout, name in (("safetensors", "a.SAFETENSORS"), ("safetensors", "a.bin"), ("archive", "a.safetensors")):
        shutil.copy(published.names[layout][0], tmp_path / name)
        assert tensors("", read(tmp_path / name)).keys() == published.encoder.keys()


def test_a_file_that_changes_while_it_is_read(published, tmp_path, monkeypatch, capsys):
    """The run must not name the digest of other bytes than those that it was made of."""
    path = tmp_path / "encoder.pt"

    def read_and_changed(name):
        tree = read(name)
        if name == str(path):
            save({"another": torch.zeros(1)}, path)
        return tree

    shutil.copy(published.names["state dict"][0], path)
    monkeypatch.setattr(importers, "read", read_and_changed)
    what, hint = refused(capsys, [path, published.names["archive"][1]], tmp_path / "run")
    assert (what, hint) == (f"{path} was changed while it was read", "wait until it is written, and import it again")


def test_nothing_is_left_in_the_file_that_was_read(published, tmp_path):
    """Or what is changed later would be written under the digest of what was there."""
    for layout in LAYOUTS:
        shutil.copy(published.names[layout][0], tmp_path / "file")
        found = tensors("", read(tmp_path / "file"))
        (tmp_path / "file").write_bytes(bytes((tmp_path / "file").stat().st_size))
        assert all(torch.equal(found[key], tensor) for key, tensor in published.encoder.items())


def test_tensors_that_share_numbers_are_no_larger_than_the_file(published, tmp_path, capsys):
    """Or a small file would become a large run."""
    flat = torch.zeros(max(tensor.numel() for tensor in published.encoder.values()), dtype=torch.float16)
    views = {key: flat[: tensor.numel()].view(tensor.shape) for key, tensor in published.encoder.items()}
    save(views, tmp_path / "encoder.pt")
    made = sum(view.nbytes for view in views.values())
    assert (tmp_path / "encoder.pt").stat().st_size < made / 2
    what, hint = refused(capsys, [tmp_path / "encoder.pt", published.names["archive"][1]], tmp_path / "run")
    assert what == f"{tmp_path / 'encoder.pt'} was not read: its tensors are larger than the file" and hint == FETCH
    some, held = {}, (tmp_path / "encoder.pt").stat().st_size
    for key, view in sorted(views.items(), key=lambda item: item[1].nbytes):
        held -= view.nbytes
        some |= {key: view} if held > 0 else {}
    save(some, tmp_path / "some.pt")
    assert tensors("", read(tmp_path / "some.pt")).keys() == some.keys() and 10 < len(some) < len(views)


@pytest.mark.parametrize("layout", ["archive", "legacy"])
def test_numbers_with_a_sign_beside_them(layout, published, tmp_path, capsys):
    """torch keeps that a tensor is to be read negated, beside numbers that are not."""
    save({"a": torch._neg_view(torch.ones(3))}, tmp_path / "encoder.pt", layout)
    assert torch.load(tmp_path / "encoder.pt", weights_only=True)["a"].tolist() == [-1] * 3
    what, _ = refused(capsys, [tmp_path / "encoder.pt", published.names["archive"][1]], tmp_path / "run")
    assert what == f"{tmp_path / 'encoder.pt'} was not read: a tensor is more than its numbers"


def test_more_blocks_than_tensors(published, tmp_path, capsys):
    """Names alone would make a model of thousands of layers."""
    one, names = torch.zeros(1), []
    for half in ("encoder", "decoder"):
        names.append(tmp_path / f"{half}.pt")
        forged = {f"blocks.group_1.block_{k}.x": one for k in range(1, 1001)}
        save(getattr(published, half) | forged, names[-1])
    what, _ = refused(capsys, names, tmp_path / "run")
    count = len(published.encoder) + 1000
    assert what == (
        f"{names[0]} is no encoder of OpenAI's dVAE: {count} tensors are too few for 4 groups of 1000 blocks"
    )


def test_sizes_beyond_all_measure(published, tmp_path, monkeypatch, capsys):
    wide = published.encoder | {"blocks.input.w": torch.zeros(1).expand(HIDDEN, 3, 2**31 + 1, 1)}
    monkeypatch.setattr(importers, "read", lambda path: wide if path == str(names[0]) else published.decoder)
    names = published.names["state dict"]
    assert refused(capsys, names, tmp_path / "run") == (f"{names[0]} has the shapes of no model", FETCH)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_of_torchscript(published, tmp_path, capsys):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    what, _ = refused(capsys, [tmp_path / "program.pt", published.names["archive"][1]], tmp_path / "run")
    assert what.startswith(f"{tmp_path / 'program.pt'} was not read: it names ")


def test_a_zip_that_is_no_checkpoint(published, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    what, _ = refused(capsys, [tmp_path / "some.zip", published.names["archive"][1]], tmp_path / "run")
    assert what == f"{tmp_path / 'some.zip'} was not read: it is a zip archive, but no checkpoint of torch"


def test_a_record_that_is_compressed(published, tmp_path, capsys):
    source, target = published.names["archive"][0], tmp_path / "packed.pkl"
    with zipfile.ZipFile(source) as old_one, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new_one:
        for name in old_one.namelist():
            new_one.writestr(name, old_one.read(name))
    what, _ = refused(capsys, [target, published.names["archive"][1]], tmp_path / "run")
    assert what == f"{target} was not read: it is compressed, or larger than it can be"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_wrong_order(layout, published, tmp_path, capsys):
    encoder, decoder = published.names[layout]
    what, hint = refused(capsys, [decoder, encoder], tmp_path / "run")
    assert what == f"{decoder} is no encoder of OpenAI's dVAE, but its decoder" and "in this order" in hint
    what, _ = refused(capsys, [encoder, encoder], tmp_path / "run")
    assert what == f"{encoder} is no decoder of OpenAI's dVAE, but its encoder"


@pytest.mark.parametrize(
    "other, name",
    [({"codes": 1024}, "vocab_size is 512"), ({"hidden": 128}, "hidden is 64"), ({"blocks": 1}, "blocks is 2")],
)
def test_halves_that_do_not_belong_together(other, name, published, tmp_path, capsys):
    with Release(torch.Generator().manual_seed(0)) as release:
        save(release.decoder(**other), tmp_path / "decoder.pkl")
    names = [published.names["archive"][0], tmp_path / "decoder.pkl"]
    what, _ = refused(capsys, names, tmp_path / "run")
    (value,) = other.values()
    assert what == f"{names[0]} and {names[1]} do not belong together: {name} in the encoder and {value} in the decoder"


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda s: s.pop("blocks.group_2.block_1.id_path.w"), "lacks blocks.group_2.block_1.id_path.w"),
        (lambda s: s.update(more=torch.zeros(1)), "has unknown keys: more"),
        (lambda s: s.update({f"a{k}": torch.zeros(1) for k in range(5)}), "has unknown keys: a0, a1, a2 and 2 more"),
        (lambda s: s.update({"a\x1b[31m": torch.zeros(1)}), r"has unknown keys: a\x1b[31m"),
        (lambda s: s.pop("blocks.input.w"),
         "is no encoder of OpenAI's dVAE: it has no weights blocks.input.w of four dimensions"),
        (lambda s: s.update({"blocks.group_1.block_1.res_path.conv_1.w": torch.zeros(8, 64, 3, 3)}),
         "blocks.group_1.block_1.res_path.conv_1.w has the shape (8, 64, 3, 3), and (16, 64, 3, 3) fits the others"),
        (lambda s: s["blocks.input.b"].__setitem__(3, torch.nan), "blocks.input.b holds values that are not finite"),
        (lambda s: s["blocks.input.b"].__setitem__(3, torch.inf), "blocks.input.b holds values that are not finite"),
        (lambda s: s.update({"blocks.input.b": s["blocks.input.b"].double()}), "blocks.input.b is of the type float64"),
        (lambda s: s.update({"blocks.input.b": s["blocks.input.b"].long()}), "blocks.input.b is of the type int64"),
        (lambda s: s.update(epoch=3), "holds neither a module nor a state dict"),
        (lambda s: s.clear(), "holds neither a module nor a state dict"),
        (lambda s: [inside := dict(s), s.clear(), s.update(state_dict=inside, epoch=3)],
         "is a checkpoint of a training, with a state dict among other things"),
        (lambda s: [s.pop(key) for key in list(s) if "group_4" in key],
         "is no encoder of OpenAI's dVAE: its width does not double from group to group"),
        (lambda s: [s.pop(key) for key in list(s) if "group_" in key],
         "is no encoder of OpenAI's dVAE: its width does not double from group to group"),
    ],
    ids=range(15),
)  # fmt: skip
def test_state_dicts_that_do_not_fit(change, what, published, tmp_path, capsys):
    state = {key: tensor.clone() for key, tensor in published.encoder.items()}
    change(state)
    path = tmp_path / "encoder.pt"
    save(state, path)
    said, _ = refused(capsys, [path, published.names["archive"][1]], tmp_path / "run")
    assert said in (f"{path} {what}", f"{path}: {what}")


def test_sizes_that_make_no_model(published, tmp_path, capsys):
    save(published.encoder | {"blocks.input.w": torch.zeros(HIDDEN, 3, 6, 6)}, tmp_path / "encoder.pt")
    names = [tmp_path / "encoder.pt", published.names["archive"][1]]
    what, _ = refused(capsys, names, tmp_path / "run")
    assert what == f"{names[0]} and {names[1]} make no dVAE: kernel 6 does not fit patch 1"


def test_a_state_dict_of_another_model(published, tmp_path, capsys):
    save(nn.Conv2d(3, 4, 3).state_dict(), tmp_path / "other.pt")
    what, _ = refused(capsys, [tmp_path / "other.pt", published.names["archive"][1]], tmp_path / "run")
    assert what.endswith("is no encoder of OpenAI's dVAE: it has no weights blocks.input.w of four dimensions")


def test_a_module_of_another_kind(published, tmp_path, capsys):
    save(nn.Conv2d(3, 4, 3), tmp_path / "other.pkl")
    what, _ = refused(capsys, [tmp_path / "other.pkl", published.names["archive"][1]], tmp_path / "run")
    assert what.endswith("was not read: it names torch.nn.modules.conv.Conv2d, which no checkpoint of this kind needs")


def test_another_weight_of_the_residual_paths(published, tmp_path, capsys):
    with Release(torch.Generator().manual_seed(0)) as release:
        made = release.encoder()
        made.blocks.group_2.block_1.__dict__["post_gain"] = 0.5
        save(made, tmp_path / "encoder.pkl")
    what, _ = refused(capsys, [tmp_path / "encoder.pkl", published.names["archive"][1]], tmp_path / "run")
    gain = "blocks.group_2.block_1.post_gain is not 0.015625, as the number of its blocks asks for"
    assert what == f"{tmp_path / 'encoder.pkl'}: {gain}"


@pytest.mark.parametrize("side, what", [(20, "image_size 20 is not a multiple of"), (0, "image_size is 0")])
def test_a_picture_size_that_does_not_fit(side, what, published, tmp_path, capsys):
    assert refused(capsys, published.names["archive"], tmp_path / "run", 2, side)[0].startswith(what)


def test_a_run_that_is_not_empty(published, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(arguments(published.names["archive"], tmp_path)) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} is not empty\nhint: choose another folder with --out, or remove that one\n"
    )
    assert main(arguments(published.names["archive"], tmp_path / "mine.txt")) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/mine.txt is a file\nhint: name a folder with --out, new or empty\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_is_full_leaves_nothing(there, published, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    if there:
        run.mkdir()
    monkeypatch.setattr(files, "write_json", full)  # the last write of an artefact
    assert main(arguments(published.names["archive"], run)) == 5
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == ([run] if there else [])


# ------------------------------------------------------------------------------------------------------ hostile files


class Calls:
    """Pickled: a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """What a call returns may be called."""


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def programs(canary):
    """Pickles which, read by a plain unpickler, make the file `canary`/NAME; by their names."""
    made = {}

    def python(name):
        return f"open({str(canary / name)!r}, 'w').close()"

    for protocol in range(6):
        name = f"system{protocol}"
        made[name] = pickle.dumps(Calls(os.system, f"touch {canary / name}"), protocol)
    calls = {
        "eval": lambda name: Calls(eval, python(name)),
        "exec": lambda name: Calls(exec, python(name)),
        "open": lambda name: Calls(open, str(canary / name), "w"),
        "mkdir": lambda name: Calls(os.mkdir, str(canary / name)),
        "subprocess": lambda name: Calls(subprocess.call, ["touch", str(canary / name)]),
        "getattr": lambda name: Calls(Calls(getattr, Calls(__import__, "os"), "mkdir"), str(canary / name)),
        "import": lambda name: Calls(Calls(getattr, Calls(importlib.import_module, "os"), "mkdir"), str(canary / name)),
        "partial": lambda name: Calls(functools.partial(os.mkdir, str(canary / name))),
        "nested": lambda name: Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, str(canary / name)))),
        "in a list": lambda name: [1, [2, Calls(os.mkdir, str(canary / name))]],
        "in a tuple": lambda name: (1, Calls(os.mkdir, str(canary / name))),
        "in a state dict": lambda name: OrderedDict({"blocks.input.w": Calls(os.mkdir, str(canary / name))}),
        "as a state": lambda name: types.SimpleNamespace(a=Calls(os.mkdir, str(canary / name))),
    }
    made |= {name: pickle.dumps(call(name), 2) for name, call in calls.items()}
    spelled = {  # as no pickler writes them
        "inst": lambda shell: b"\x80\x02(" + shell + b"ios\nsystem\n.",
        "obj": lambda shell: b"\x80\x02(cos\nsystem\n" + shell + b"o.",
        "lines": lambda shell: b"cos\nsystem\n(" + shell + b"tR.",
        "memo": lambda shell: b"\x80\x02cos\nsystem\nq\x070h\x07" + shell + b"\x85R.",
        "long memo": lambda shell: b"\x80\x02cos\nsystem\nr\x00\x10\x00\x000j\x00\x10\x00\x00" + shell + b"\x85R.",
        "stack global": lambda shell: b"\x80\x04" + text("os") + text("system") + b"\x93" + shell + b"\x85R.",
        "no protocol": lambda shell: text("os") + text("system") + b"\x93" + shell + b"\x85R.",
        "before it is popped": lambda shell: b"\x80\x02cos\nsystem\n" + shell + b"\x85R0}.",
        "dotted": lambda shell: b"\x80\x04" + text("os") + text("path.os.system") + b"\x93" + shell + b"\x85R.",
        "another name of it": lambda shell: b"\x80\x02cposix\nsystem\n" + shell + b"\x85R.",
    }
    return made | {name: pickled(text(f"touch '{canary / name}'")) for name, pickled in spelled.items()}


GOOD = "two numbers in a state dict"


def oddities():
    """Pickles that run nothing, but all but `GOOD` lie, break rules, or ask for much; by their names."""
    floats, here = text("storage") + b"ctorch\nFloatStorage\n", text("0") + text("cpu")
    storage = b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n((" + floats
    end, beside = b"tQ%b\x89}tRs.", floats + here
    whole, square = b"K\x00K\x02\x85K\x01\x85", b"K\x00K\x02K\x02\x86K\x02K\x01\x86"
    most = b"\x8a\x08" + (2**62).to_bytes(8, "little")
    module, made = b"\x80\x02(" + text("module"), b"cdall_e.encoder\nEncoder\n)\x81"
    twice = b"}(" + text("a") + b"h\x00" + text("b") + b"h\x00u"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((" + beside + b"K\x02tQ" + whole + b"\x89}tR"
    names = [text(f"{k:04}") for k in range(2000)]
    large = b"}q\x01(" + b"".join(b"M" + k.to_bytes(2, "little") + b"N" for k in range(60_000)) + b"u"
    child = b"h\x02)\x81h\x01b"
    return {
        GOOD: storage + here + b"K\x02" + end % whole,
        "extension": b"\x80\x02\x82\x01.",
        "text id": b"\x80\x02Pos.system\n.",
        "a module that it is not": module + b"cos\nsystem\nNNtQ.",
        "an id that is no tuple": b"\x80\x02" + text("storage") + b"Q.",
        "an id of what": b"\x80\x02(" + text("file") + b"ctorch\nFloatStorage\n" + here + b"K\x02tQ.",
        "a storage of what": b"\x80\x02(" + text("storage") + b"cos\nsystem\n" + here + b"K\x02tQ.",
        "a storage by a class": b"\x80\x02(" + text("storage") + b"cdall_e.encoder\nEncoder\n" + here + b"K\x02tQ.",
        "a key that is a number": storage + b"K\x00" + text("cpu") + b"K\x02" + end % whole,
        "huge storage": storage + here + most + end % whole,
        "negative storage": storage + here + b"J\xff\xff\xff\xff" + end % whole,
        "two lengths": b"\x80\x02(" + beside + b"K\x02tQ(" + beside + b"K\x01tQt.",
        "larger than its numbers": storage + here + b"K\x02" + end % square,
        "behind its numbers": storage + here + b"K\x02" + end % b"K\x01K\x02\x85K\x01\x85",
        "before its numbers": storage + here + b"K\x02" + end % b"J\xff\xff\xff\xffK\x02\x85K\x01\x85",
        "huge steps": storage + here + b"K\x02" + end % (b"K\x00K\x02\x85" + most + b"\x85"),
        "repeated": storage + here + b"K\x02" + end % (b"K\x00" + most + b"\x85K\x00\x85"),
        "many dimensions": storage + here + b"K\x02" + end % (b"K\x00(" + 99 * b"K\x01" + b"t(" + 99 * b"K\x01" + b"t"),
        "no shape": storage + here + b"K\x02" + end % (b"K\x00" + text("shape") + b"K\x01\x85"),
        "called class": b"\x80\x02cdall_e.encoder\nEncoder\n)R.",
        "made function": b"\x80\x02ctorch._utils\n_rebuild_parameter\n)\x81.",
        "made with arguments": b"\x80\x02cdall_e.encoder\nEncoder\nK\x01\x85\x81.",
        "a part of a class": b"\x80\x02cdall_e.encoder\nEncoder.__init__\n)R.",
        "slots": b"\x80\x02cdall_e.encoder\nEncoder\n)\x81N}\x86b.",
        "built text": b"\x80\x02" + text("a") + b"}b.",
        "called text": b"\x80\x02" + text("a") + b")R.",
        "appended to a dict": b"\x80\x02}K\x01a.",
        "set in a list": b"\x80\x02]K\x00K\x01s.",
        "uneven": b"\x80\x02}(K\x00u.",
        "nothing on the stack": b"\x80\x02.",
        "no mark": b"\x80\x02t.",
        "not in the memo": b"\x80\x02h\x01.",
        "far in the memo": b"\x80\x02}r\xff\xff\xff\xff.",
        "no end": b"\x80\x02}",
        "huge text": b"\x80\x02X\xff\xff\xff\xffabc.",
        "text that is none": b"\x80\x02X\x01\x00\x00\x00\xff.",
        "only a mark": b"\x80\x02(.",
        "a loop": b"\x80\x02" + made + b"q\x00}" + text("_modules") + b"}" + text("a") + b"h\x00ssb.",
        "a long name": b"\x80\x02}" + text("a" * 1000) + b"Ns.",
        "deep": b"\x80\x02)" + b"\x85" * 100_000 + b".",
        "deep key": b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",
        "deep gain": b"\x80\x02" + made + b"}" + text("post_gain") + b")" + b"\x85" * 100_000 + b"sb.",
        "built twice": b"\x80\x02" + made + b"}" + text("a") + b"Nsq\x00bh\x00b.",
        "one state of many": b"\x80\x02" + large + b"cdall_e.encoder\nEncoder\nq\x02"
        + b"](" + child * 20_000 + b"e.",
        "one dict of many": b"\x80\x02" + tensor + b"q\x00}q\x01(" + text("_modules") + b"}" + text("_parameters")
        + b"}(" + b"".join(name + b"h\x00" for name in names) + b"uucdall_e.encoder\nEncoder\nq\x02)\x81}"
        + text("_modules") + b"}(" + b"".join(name + child for name in names) + b"usb.",
        "a key below 0": b"\x80\x02}J\xff\xff\xff\xffNs.",
        "a large key": b"\x80\x02}\x8a\x05\x00\x00\x00\x80\x00Ns.",
        "colliding keys": b"\x80\x02}("
        + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 60_000)) + b"u.",
        "attributes of a tensor": storage + here + b"K\x02tQ" + whole + b"\x89}}" + text("neg") + b"\x88stRs.",
        "an unknown argument of a tensor": storage + here + b"K\x02tQ" + whole + b"\x89}}NtRs.",
        "doubling": b"\x80\x02)" + b"q\x00h\x00\x86" * 20_000 + b".",
        "doubling modules": b"\x80\x02" + made + b"}" + text("_modules") + b"}sbq\x00"
        + (made + b"}" + text("_modules") + twice + b"sbq\x00") * 60 + b".",
    }  # fmt: skip


def contained(pickled, layout):
    """A file of torch around a pickle, with two numbers under the key 0 beside it."""
    if layout == "legacy":
        parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        head = b"".join(pickle.dumps(part, 2) for part in parts)
        return head + pickled + pickle.dumps(["0"], 2) + (2).to_bytes(8, "little") + bytes(8)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(8))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


READS = """
import json, resource, sys
from pathlib import Path
from dvae.errors import ArtefactError
from dvae.foreign import read, tensors
names = sorted(Path(sys.argv[1]).iterdir())
for path in names:
    if path.name in sys.argv[2:]:
        tensors(path, read(path))  # all that reading imports is imported now
seen, said, before = [], {}, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sys.addaudithook(lambda event, args: seen.append([event, *map(str, args[:2])]))
for path in names:
    try:
        tensors(path, read(path))
        said[path.name] = "read"
    except ArtefactError as error:
        said[path.name] = error.what.replace(str(path), "it")
print(json.dumps([said, seen, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""
UNPICKLES = """
import contextlib, pickle, sys
from pathlib import Path
for path in Path(sys.argv[1]).iterdir():
    with contextlib.suppress(Exception):
        pickle.loads(path.read_bytes())
"""


def python(program, *args):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_hostile_files_run_nothing(tmp_path):
    folders = {name: tmp_path / name for name in ("canary", "plain", "contained")}
    for folder in folders.values():
        folder.mkdir()
    canary, plain = folders["canary"], folders["plain"]
    hostile = programs(canary)
    for name, pickled in hostile.items():
        (plain / name).write_bytes(pickled)
    python(UNPICKLES, plain)
    assert {path.name for path in canary.iterdir()} == hostile.keys() and len(hostile) >= 29
    for path in canary.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()

    every, good = hostile | oddities(), (f"{GOOD}, archive", f"{GOOD}, legacy")
    for name, pickled in every.items():
        (folders["contained"] / f"{name}, bare").write_bytes(pickled)
        for layout in ("archive", "legacy"):
            (folders["contained"] / f"{name}, {layout}").write_bytes(contained(pickled, layout))
    said, seen, kilobytes = json.loads(python(READS, folders["contained"], *good))
    assert list(canary.iterdir()) == []
    others = [event for event in seen if event[0] != "builtins.id"]
    assert {(event, Path(path).parent, mode) for event, path, mode in others} == {("open", folders["contained"], "r")}
    assert len(said) == 3 * len(every) > 200 and kilobytes < 100_000
    for name in every:
        assert said.pop(f"{name}, bare") == "it is no file of torch or safetensors", name
    assert [said.pop(name) for name in good] == ["read", "read"]
    words = "it was not read: |it is damaged: |it holds neither a module nor a state dict$|it holds no tree of modules$"
    assert {name: what for name, what in said.items() if not re.match(words, what)} == {}
    for name, what in {
        "another name of it": "it names posix.system, which no checkpoint of this kind needs",
        "in a state dict": "it names posix.mkdir, which no checkpoint of this kind needs",
        "stack global": "it is a pickle of protocol 4, and torch writes protocol 2",
        "inst": "its pickle has the opcode INST, which no checkpoint of this kind needs",
        "called class": "it calls dall_e.encoder.Encoder",
        "huge storage": "it declares more numbers than it holds",
        "larger than its numbers": "a tensor is larger than its numbers",
        "repeated": "its tensors are larger than the file",
        "built twice": "it fills an object twice",
        "a key below 0": "its pickle has a dict with keys that are no names",
        "a large key": "its pickle has a dict with keys that are no names",
        "colliding keys": "its pickle has a dict with keys that are no names",
        "attributes of a tensor": "a tensor is more than its numbers",
    }.items():
        assert {said[f"{name}, {layout}"] for layout in ("archive", "legacy")} == {f"it was not read: {what}"}, name
    assert said["one dict of many, archive"] == "it holds no tree of modules"
    assert said["one state of many, archive"] == "it holds neither a module nor a state dict"


def test_an_old_file_without_its_numbers(tmp_path):
    content = contained(oddities()[GOOD], "legacy")
    head = content[: content.index(pickle.dumps(["0"], 2))]
    (tmp_path / "file").write_bytes(head + pickle.dumps([], 2))
    with pytest.raises(ArtefactError, match="was not read: it does not hold all numbers that it declares"):
        read(tmp_path / "file")


def test_damaged_files_are_refused_or_read_whole(tmp_path):
    """Whatever byte is changed: words, never a traceback."""
    whole, random = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}, np.random.default_rng(0)
    for layout in ("archive", "legacy"):
        save(whole, tmp_path / layout, layout)
        content = (tmp_path / layout).read_bytes()
        ended = Counter()
        for _ in range(300):
            place = random.integers(len(content))
            (tmp_path / "file").write_bytes(content[:place] + bytes([random.integers(256)]) + content[place + 1 :])
            try:
                tensors("", read(tmp_path / "file"))
                ended["read"] += 1
            except ArtefactError:
                ended["refused"] += 1
        assert ended["refused"] > 30
