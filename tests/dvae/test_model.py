"""The discrete VAE: the paper's sizes, honest refusals, and tokens that depend on the picture alone."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from dvae import seeds
from dvae.errors import ArtefactError, UserError
from dvae.model import DVAE, Block, DVAEConfig
from dvae.tokenizer import load

TINY = {
    "image_size": 32, "vocab_size": 16, "hidden": 8, "groups": 2, "blocks": 1, "bottleneck": 2, "code_width": 8,
    "kernel": 6, "patch": 4,
}  # fmt: skip


def test_the_papers_model_has_the_released_number_of_parameters():
    with torch.device("meta"):
        model = DVAE(DVAEConfig())
    assert sum(p.numel() for p in model.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in model.decoder.parameters()) == 43_829_766
    assert model.grid == (32, 32) and model.vocab_size == 8192 and model.config.factor == 8
    assert model.config.residual_gain == 1 / 64
    assert model.logits(torch.empty(1, 3, 256, 256, device="meta")).shape == (1, 8192, 32, 32)
    assert model.codes().shape == (8192, 128)


@pytest.mark.parametrize("groups, patch, factor", [(1, 1, 1), (4, 1, 8), (2, 2, 4), (2, 4, 8), (3, 4, 16)])
@pytest.mark.parametrize("name", ["logit-laplace", "l1"])
def test_shapes_follow_the_factor(groups, patch, factor, name):
    config = DVAEConfig(**{**TINY, "groups": groups, "patch": patch, "kernel": patch + 2, "likelihood": name})
    assert config.factor == factor and config.grid == (32 // factor, 32 // factor)
    model, images = DVAE(config), torch.rand(2, 3, 32, 32)
    raw, logits, quantized = model(images, 1.0, seeds.generator(0))
    assert raw.shape == (2, model.likelihood.channels, 32, 32)
    assert logits.shape == quantized.z.shape == (2, 16, *config.grid)
    assert model.encode(images).shape == (2, *model.grid)
    pictures = model.decode(model.encode(images))
    assert pictures.shape == images.shape and 0 <= pictures.min() and pictures.max() <= 1


@pytest.mark.parametrize(
    "wrong",
    [{name: 0} for name in TINY]
    + [{"image_size": 36}, {"hidden": 9}, {"kernel": 7}, {"kernel": 2}, {"likelihood": "x"}, {"spread": -1.0}],
    ids=str,
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError) as caught:
        DVAEConfig(**{**TINY, **wrong})
    assert next(iter(wrong)) in caught.value.what and caught.value.hint


@pytest.fixture
def model(tiny_dvae) -> DVAE:
    return load(tiny_dvae)


def test_encode_is_the_argmax_of_the_logits(model):
    images = torch.rand(8, 3, 32, 32)
    tokens = model.encode(images)
    assert tokens.dtype == torch.int64 and len(tokens.unique()) > 3
    assert torch.equal(tokens, model.logits(images).argmax(1))
    torch.rand(10)
    assert torch.equal(tokens, model.encode(images))


def test_tokens_do_not_depend_on_company(model):
    images = torch.rand(8, 3, 32, 32)
    together = model.encode(images)
    for batch in (1, 3):
        assert torch.equal(together, torch.cat([model.encode(some) for some in images.split(batch)]))


def test_the_encoder_sees_the_mapped_picture(model):
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.logits(images), model.encoder(0.8 * images + 0.1))


def test_decoding_tokens_is_decoding_one_hot_weights(model):
    tokens = torch.randint(16, (3, 4, 4))
    one_hot = F.one_hot(tokens, 16).movedim(-1, 1).float()
    assert torch.equal(model.decode(tokens), model.decode_soft(one_hot))
    assert not torch.equal(model.decode(tokens), model.decode((tokens + 1) % 16))


def test_codes_are_what_the_decoder_reads(model):
    codes, tokens = model.codes(), torch.arange(16).view(1, 4, 4)
    assert codes.shape == (16, 8)
    read = model.decoder.input(F.one_hot(tokens, 16).movedim(-1, 1).float()) - model.decoder.input.bias[:, None, None]
    assert torch.allclose(read[0].flatten(1).t(), codes, atol=1e-6)


# -------------------------------------------------------------------------------------------------- one shared codebook


@pytest.fixture
def tied() -> DVAE:
    """Codes of any length, which must not matter, and a sharpness of its own."""
    model = DVAE(DVAEConfig(**TINY, tied=True))
    with torch.no_grad():
        model.sphere.codes.mul_(torch.rand(16, 1) + 0.5)
        model.sphere.log_sharpness.fill_(1.5)
    return model


def unit(vector: list[float]) -> list[float]:
    return [v / math.sqrt(sum(w * w for w in vector)) for v in vector]


def test_tied_logits_are_sharpened_cosines(tied):
    images = torch.rand(2, 3, 32, 32)
    logits, directions = tied.logits(images), tied.encoder(0.8 * images + 0.1)
    assert directions.shape == (2, 8, 4, 4) and logits.shape == (2, 16, 4, 4) and logits.std() > 0.1
    codes = [unit(code) for code in tied.sphere.codes.tolist()]
    for b in range(2):
        for y in range(4):
            for x in range(4):
                direction = unit(directions[b, :, y, x].tolist())
                cosines = [sum(v * w for v, w in zip(direction, code, strict=True)) for code in codes]
                expected = torch.tensor([math.exp(1.5) * cosine for cosine in cosines])
                assert torch.allclose(logits[b, :, y, x], expected, atol=1e-5)


def test_the_tied_decoder_reads_mixed_unit_codes(tied):
    z = torch.randn(2, 16, 4, 4).softmax(1)
    mixed = tied.sphere.mix(z)
    codes = torch.tensor([unit(code) for code in tied.sphere.codes.tolist()])
    assert mixed.shape == (2, 8, 4, 4)
    for b in range(2):
        for y in range(4):
            for x in range(4):
                expected = math.sqrt(8) * sum(z[b, k, y, x] * codes[k] for k in range(16))
                assert torch.allclose(mixed[b, :, y, x], expected, atol=1e-5)
    raw = rearrange(tied.decoder.body(mixed), "b (c p q) h w -> b c (h p) (w q)", p=4, q=4)
    assert torch.equal(tied.paint(z), raw)
    assert torch.allclose(tied.codes(), codes, atol=1e-6) and tied.codes().shape == (16, 8)


def test_tied_tokens_weights_and_pictures_agree(tied):
    images = torch.rand(3, 3, 32, 32)
    tokens = tied.encode(images)
    assert torch.equal(tokens, tied.logits(images).argmax(1)) and len(tokens.unique()) > 1
    one_hot = F.one_hot(tokens, 16).movedim(-1, 1).float()
    assert torch.equal(tied.decode(tokens), tied.decode_soft(one_hot))
    assert torch.allclose(tied.sphere.mix(one_hot).movedim(1, -1), math.sqrt(8) * tied.codes()[tokens], atol=1e-6)
    assert not torch.equal(tied.decode(tokens), tied.decode((tokens + 1) % 16))


def test_tied_logits_are_float32_under_autocast(tied):
    directions = torch.randn(2, 8, 4, 4)
    expected = tied.sphere.logits(directions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tied.sphere.logits(directions), expected)
        assert tied.logits(torch.rand(1, 3, 32, 32)).dtype == torch.float32


def test_tied_codes_learn_from_both_sides(tied):
    """Every code, from reading alone and from painting alone; and every other weight."""
    codes, images = tied.sphere.codes, torch.rand(4, 3, 32, 32)
    target = torch.randn(4, 16, 4, 4)
    for side in ((tied.logits(images) * target).sum(), tied.decode_soft(target.softmax(1)).square().sum()):
        (gradient,) = torch.autograd.grad(side, codes)
        assert (gradient.norm(dim=1) > 0).all()
        along = (gradient * codes).sum(1).abs()  # length means nothing
        assert (along < 1e-3 * gradient.norm(dim=1) * codes.norm(dim=1) + 1e-6).all()
    raw, _, quantized = tied(images, 1.0, seeds.generator(0))
    (tied.likelihood.nll(raw, images).mean() + quantized.penalty.mean()).backward()
    still = [name for name, p in tied.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_save_and_load_keep_a_tied_model(tmp_path, tied):
    tied.save(tmp_path, {"step": 7})
    again, images = load(tmp_path), torch.rand(2, 3, 32, 32)
    assert again.config == tied.config and again.config.tied
    assert torch.equal(again.logits(images), tied.logits(images)) and torch.equal(again.codes(), tied.codes())
    assert torch.equal(again.decode(again.encode(images)), tied.decode(tied.encode(images)))


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 3, 32, 16), (1, 1, 32, 32), (3, 32, 32)])
def test_a_picture_of_another_size_is_refused(model, shape):
    with pytest.raises(UserError, match="do not fit"):
        model.encode(torch.rand(shape))


def test_pixels_of_a_patch_go_where_they_came_from():
    """`patch` is undone in reading order: with the last convolution's bias alone, each pixel shows its own channel."""
    model = DVAE(DVAEConfig(**{**TINY, "likelihood": "l2"}))
    last = model.decoder.body[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.arange(3 * 4 * 4))
    raw = model.decoder(torch.zeros(1, 16, 4, 4))
    for channel in range(3):
        tile = 16 * channel + torch.arange(16.0).view(4, 4)
        assert torch.equal(raw[0, channel], tile.repeat(8, 8))


@pytest.mark.parametrize("gain, expected", [(None, 1 / 4), (0.3, 0.3)])
def test_a_block_is_skip_plus_gain_times_residual(gain, expected):
    """Null is the paper's 1 / layers**2, here of 2 groups with 1 block each."""
    config, x = DVAEConfig(**TINY, gain=gain), torch.randn(2, 8, 4, 4)
    for outputs in (8, 16):
        block = Block(8, outputs, config, (3, 3, 3, 1))
        skip = x if outputs == 8 else block.skip(x)
        assert torch.allclose(block(x), skip + expected * block.residual(x), atol=1e-6)
        assert [layer.kernel_size for layer in block.residual[1::2]] == [(3, 3), (3, 3), (3, 3), (1, 1)]


def test_training_moves_every_weight():
    model = DVAE(DVAEConfig(**TINY))
    images = torch.rand(4, 3, 32, 32)
    raw, _, quantized = model(images, 1.0, seeds.generator(0))
    (model.likelihood.nll(raw, images).mean() + quantized.penalty.mean()).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_save_and_load_keep_the_model(tmp_path, model):
    digest = model.save(tmp_path / "run" / "model", {"step": 7})
    again = load(tmp_path / "run")
    images = torch.rand(2, 3, 32, 32)
    assert again.config == model.config and not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again.logits(images), model.logits(images))
    assert torch.equal(again.decode(again.encode(images)), model.decode(model.encode(images)))
    assert json.loads((tmp_path / "run" / "model" / "artefact.json").read_text())["digest"] == digest


def test_a_corrupted_artefact_is_refused(tmp_path, model):
    model.save(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtefactError, match="damaged"):
        load(tmp_path)


@pytest.mark.parametrize("change", [{"hidden": 16}, {"hidden": "8"}, {"novel": 1}, {"kernel": 7}], ids=str)
def test_weights_of_another_architecture_are_refused(tmp_path, model, change):
    from dataclasses import asdict

    from dvae import artefact

    artefact.save(tmp_path, "dvae", {**asdict(model.config), **change}, model.state_dict())
    with pytest.raises(ArtefactError, match="dVAE of this version"):
        load(tmp_path)


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(ArtefactError, match="no trained dvae"):
        load(tmp_path / "nowhere")
