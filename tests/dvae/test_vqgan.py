"""VQGAN is an image tokenizer like any other: its face, its codes, its artefact, and all of stage 2 on top of it.

That it computes what taming-transformers computes is the matter of test_importers_vqgan.py.
"""

import contextlib
import io
import json
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional as F

from dalle.__main__ import main as dalle
from dvae import artefact
from dvae.__main__ import main as dvae
from dvae.data import open_source
from dvae.errors import ArtefactError, UserError
from dvae.model import DVAE, DVAEConfig
from dvae.tokenizer import load
from dvae.vqgan import VQGAN, VQGANConfig

TINY = VQGANConfig(image_size=16, vocab_size=24, hidden=32, multipliers=(1, 2, 1), blocks=1, attention=(1, 2), latent=8,
                   code_width=6)  # fmt: skip
KINDS = pytest.mark.parametrize("quantizer", ["nearest", "gumbel"])
F16 = VQGANConfig()
F8 = VQGANConfig(vocab_size=8192, multipliers=(1, 1, 2, 4), attention=(3,), quantizer="gumbel")


@torch.no_grad()
def tokenizer(quantizer: str) -> VQGAN:
    """Untrained, with a codebook of which scenes use many codes."""
    torch.manual_seed(3)
    model = VQGAN(replace(TINY, quantizer=quantizer)).eval()
    z = model.quant_conv(model.encoder(2 * scenes(16) - 1)).movedim(1, -1).flatten(0, 2)
    model.codebook.copy_(z[torch.randperm(len(z))[: TINY.vocab_size]])
    if model.projection is not None:
        model.projection.bias -= model.projection(z.T[None, :, :, None]).mean((0, 2, 3))
    return model


def scenes(count: int) -> torch.Tensor:
    return open_source(f"scenes:train:{count}", 16).images(range(count)).float() / 255


# ------------------------------------------------------------------------------------------------------------ the face


@KINDS
@torch.inference_mode()
def test_the_face_of_a_tokenizer(quantizer):
    model, images = tokenizer(quantizer), scenes(3)
    assert (model.grid, model.vocab_size, model.config.image_size) == ((4, 4), 24, 16)
    logits, tokens = model.logits(images), model.encode(images)
    assert logits.shape == (3, 24, 4, 4) and tokens.shape == (3, 4, 4) and tokens.dtype == torch.int64
    assert torch.equal(logits.argmax(1), tokens) and len(tokens.unique()) > 5
    assert model.codes().shape == (24, 6)
    painted = model.decode(tokens)
    assert painted.shape == images.shape and painted.dtype == torch.float32
    assert 0 <= painted.min() < painted.max() <= 1
    one_hot = F.one_hot(tokens, 24).movedim(-1, 1).float()
    torch.testing.assert_close(model.decode_soft(one_hot), painted, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_nearest_code_is_the_token_and_logits_are_minus_squared_distances():
    model, images = tokenizer("nearest"), scenes(2)
    logits, tokens = model.logits(images), model.encode(images)
    z = model.quant_conv(model.encoder(2 * images - 1))
    for b, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).tolist():
        distances = (model.codes() - z[b, :, row, column]).square().sum(1)
        torch.testing.assert_close(logits[b, :, row, column], -distances, rtol=1e-5, atol=1e-5)
        assert tokens[b, row, column] == distances.argmin()


@torch.inference_mode()
def test_weights_over_codes_are_mixed_in_code_space():
    model = tokenizer("nearest")
    weights = torch.rand(1, 24, 4, 4).softmax(1)
    mixed = (weights[:, :, None] * model.codes()[None, :, :, None, None]).sum(1)
    torch.testing.assert_close(model.decode_soft(weights), model.paint(mixed), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_pictures_are_mapped_to_minus_one_to_one_and_back():
    model, seen = tokenizer("nearest"), []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.encode(torch.tensor([0.0, 0.25, 1.0]).view(1, 3, 1, 1).expand(1, 3, 16, 16))
    assert seen[0][0, :, 0, 0].tolist() == [-1.0, -0.5, 1.0]
    model.decoder[-1].weight.zero_()
    model.decoder[-1].bias.copy_(torch.tensor([-3.0, 0.5, 1.5]))
    assert model.decode(torch.zeros(1, 4, 4, dtype=torch.int64))[0, :, 7, 9].tolist() == [0.0, 0.75, 1.0]


def test_other_pictures_than_its_own_are_refused():
    with pytest.raises(UserError) as refusal:
        tokenizer("gumbel").encode(torch.rand(2, 3, 16, 32))
    assert refusal.value.what == "images of shape (2, 3, 16, 32) do not fit this model"
    assert refusal.value.hint == "it reads (batch, 3, 16, 16); dvae.images.square crops and scales a picture"
    with pytest.raises(UserError) as refusal:
        tokenizer("nearest").encode(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert refusal.value.what == "images of torch.uint8 are no floats in [0, 1]"
    assert refusal.value.hint == "divide bytes: images.float() / 255"


# ---------------------------------------------------------------------------------------------------- the architecture


@pytest.mark.parametrize(
    "config, grid, encoder, decoder, total, tensors",
    [(F16, 16, 29_298_176, 42_449_795, 76_073_859, 343),
     (replace(F16, vocab_size=1024), 16, 29_298_176, 42_449_795, 72_141_699, 343),
     (F8, 32, 26_345_728, 38_316_163, 68_995_971, 301)],
    ids=["f16-16384", "f16-1024", "gumbel-f8"],
)  # fmt: skip
def test_the_published_sizes(config, grid, encoder, decoder, total, tensors):
    with torch.device("meta"):
        model = VQGAN(config)
    parts = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder, model)]
    assert parts == [encoder, decoder, total]
    assert len(model.state_dict()) == tensors and model.grid == (grid, grid)


MISTAKES = [
    ({"blocks": 0}, "blocks is 0", "blocks must be a whole number, at least 1"),
    ({"blocks": True}, "blocks is True", "blocks must be a whole number, at least 1"),
    ({"image_size": 0}, "image_size is 0", "image_size must be a whole number, at least 1"),
    ({"latent": 8.0}, "latent is 8.0", "latent must be a whole number, at least 1"),
    ({"multipliers": ()}, "multipliers are []", "give one for each level"),
    ({"multipliers": (1, 0)}, "a multiplier is 0", "a multiplier must be a whole number, at least 1"),
    ({"multipliers": (1, 2.0)}, "a multiplier is 2.0", "a multiplier must be a whole number, at least 1"),
    (
        {"hidden": 48, "multipliers": (2, 2, 2)},
        "hidden is 48, which the 32 groups of its normalisation do not divide",
        "choose a multiple of 32",
    ),
    ({"attention": (3,)}, "attention is at levels [3], but there are 3 levels", "name levels of 0 to 2"),
    ({"attention": (1.0,)}, "attention is at levels [1.0], but there are 3 levels", "name levels of 0 to 2"),
    ({"quantizer": "soft"}, "quantizer is 'soft'", "choose one of nearest, gumbel"),
    (
        {"image_size": 18},
        "image_size 18 is not a multiple of the downsampling factor 4",
        "choose a multiple of 4 = 2**(levels - 1)",
    ),
]


@pytest.mark.parametrize("change, what, hint", MISTAKES, ids=[what for _, what, _ in MISTAKES])
def test_sizes_that_contradict_each_other_are_refused(change, what, hint):
    with pytest.raises(UserError) as refusal:
        replace(TINY, **change)
    assert (refusal.value.what, refusal.value.hint) == (what, hint)


# -------------------------------------------------------------------------------------------------------- the artefact


@KINDS
@torch.inference_mode()
def test_save_and_load_keep_the_model(tmp_path, quantizer):
    model, images = tokenizer(quantizer), scenes(2)
    digest = model.save(tmp_path / "run" / "model", {"step": 7})
    again = load(tmp_path / "run")
    assert isinstance(again, VQGAN) and again.config == model.config and not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again.logits(images), model.logits(images))
    assert torch.equal(again.decode(again.encode(images)), model.decode(model.encode(images)))
    manifest = json.loads((tmp_path / "run" / "model" / "artefact.json").read_text())
    assert (manifest["kind"], manifest["config"]["architecture"], manifest["digest"]) == ("dvae", "vqgan", digest)


def test_a_dvae_names_no_architecture_so_old_digests_stay(tmp_path):
    config = DVAEConfig(image_size=8, vocab_size=4, hidden=4, groups=1, blocks=1, bottleneck=2, code_width=3, kernel=4,
                        patch=4)  # fmt: skip
    DVAE(config).save(tmp_path)
    assert "architecture" not in json.loads((tmp_path / "artefact.json").read_text())["config"]
    assert isinstance(load(tmp_path), DVAE)


@pytest.mark.parametrize(
    "change", [{"hidden": 64}, {"hidden": "32"}, {"novel": 1}, {"quantizer": "gumbel"}, {"multipliers": 3}], ids=str
)
def test_weights_of_another_architecture_are_refused(tmp_path, change):
    config = {"architecture": "vqgan", **asdict(TINY), **change}
    artefact.save(tmp_path, "dvae", config, VQGAN(TINY).state_dict())
    with pytest.raises(ArtefactError) as refusal:
        load(tmp_path)
    assert refusal.value.what.startswith(f"{tmp_path} does not hold a VQGAN of this version: ")
    assert refusal.value.hint == "train or import it again, or use the version of this project that wrote it"


@pytest.mark.parametrize("named", ["vit-vqgan", None, ["vqgan"]], ids=str)
def test_an_architecture_of_a_later_version_is_refused(tmp_path, named):
    artefact.save(tmp_path, "dvae", {"architecture": named, **asdict(TINY)}, VQGAN(TINY).state_dict())
    with pytest.raises(ArtefactError) as refusal:
        load(tmp_path)
    assert refusal.value.what == (
        f"{tmp_path} holds an image tokenizer of the architecture {named!r}, which this version does not know"
    )
    assert refusal.value.hint == "use the version of this project that wrote it"


# ---------------------------------------------------------------------------------------------------- in all commands


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By quantizer: a folder with the tokenizer `vq`, and `dalle`, a transformer after two updates on its tokens."""
    found = {}
    for quantizer in ("nearest", "gumbel"):
        folder = tmp_path_factory.mktemp(quantizer)
        tokenizer(quantizer).save(folder / "vq" / "model", {"step": 0})
        tiny = "--model.depth 1 --model.width 32 --model.heads 2 --model.prompts 1 --data.batch_size 8 "
        tiny += "--trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.accelerator cpu "
        with contextlib.redirect_stdout(io.StringIO()):
            text, tokens = folder / "text.json", folder / "tokens"
            assert dalle(f"vocab scenes:train:32 --size 300 --length 16 --out {text}".split()) == 0
            prepare = f"prepare scenes:train:32 --val scenes:val:8 --dvae {folder / 'vq'} --text {text} --out {tokens}"
            assert dalle(prepare.split()) == 0
            fit = f"fit --config dalle/demo --data.tokens {tokens} --run {folder / 'dalle'} {tiny}"
            assert dalle([*fit.split(), "--trainer.enable_progress_bar=false"]) == 0
        found[quantizer] = folder
    return found


@pytest.mark.parametrize(
    "program, command, written",
    [
        (dalle, "sample {run}/dalle anything --count 2 --keep 1 --out {out}", "anything-seed0.png"),
        (dalle, "diagnose {run}/dalle --count 8 --updates 1 --out {out}", "diagnosis.json"),
        (dalle, "report {run}/dalle --out {out}/report.html", "report.html"),
        (dalle, "shrink {run}/dalle --out {out}", "artefact.json"),
        (dalle, "compare {run}/dalle scenes:train:32 --count 2 --candidates 2 --out {out}", "compared.json"),
        (dalle, "check scenes:train:32 --dvae {run}/vq --out {out}", "pictures.png"),
        (dvae, "reconstruct {run}/vq scenes:val:4 --out {out}", "reconstructions.png"),
        (dvae, "codebook {run}/vq scenes:val:16 --out {out}", "codebook.json"),
        (dvae, "evaluate {run}/vq scenes:val:4 --out {out}", "evaluation.json"),
    ],
    ids=["sample", "diagnose", "report", "shrink", "compare", "check", "reconstruct", "codebook", "evaluate"],
)
def test_every_command_takes_it(runs, program, command, written, tmp_path, capsys):
    assert program(command.format(run=runs["nearest"], out=tmp_path).split()) == 0, capsys.readouterr().err
    assert (tmp_path / written).is_file()


def test_it_is_not_trained_on(runs, tmp_path, capsys):
    fit = f"fit --config dvae/demo --init_from {runs['nearest']}/vq --run {tmp_path / 'run'}"
    assert dvae(fit.split()) == 2
    said = "is a VQGAN, which is read and painted with, not trained"
    assert f"error: {runs['nearest']}/vq {said}\n" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@KINDS
def test_the_transformer_carries_its_tokenizer(runs, quantizer):
    ours, carried = load(runs[quantizer] / "vq"), load(runs[quantizer] / "dalle")
    assert isinstance(carried, VQGAN) and carried.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), carried.parameters(), strict=True))
