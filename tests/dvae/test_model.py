"""The discrete VAE: the paper's sizes, honest refusals, and tokens that depend on the picture alone."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from dvae import seeds
from dvae.errors import ArtefactError, UserError
from dvae.model import DVAE, Block, DVAEConfig, ExactConv
from dvae.quantize import GumbelSoftmax
from dvae.tokenizer import load

TINY = {
    "image_size": 32, "vocab_size": 16, "hidden": 8, "groups": 2, "blocks": 1, "bottleneck": 2, "code_width": 8,
    "kernel": 6, "patch": 4,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------- the paper's own model


@pytest.fixture(scope="module")
def paper() -> DVAE:
    """Its 97.6 million weights without their numbers."""
    with torch.device("meta"):
        return DVAE(DVAEConfig())


def layers_of(module, x):
    """What a picture passes: (layer, channels in, channels out, kernel, side out) of each, blocks not opened."""
    seen, hooks = [], []

    def see(layer, inputs, output):
        kernel = layer.kernel_size[0] if isinstance(layer, nn.Conv2d) else None
        seen.append((type(layer).__name__, inputs[0].shape[1], output.shape[1], kernel, output.shape[2]))

    blocks = [m for m in module.modules() if isinstance(m, Block)]
    inside = {layer for block in blocks for layer in block.modules()} - set(blocks)
    for layer in module.modules():
        if layer not in inside and (isinstance(layer, Block) or not list(layer.children())):
            hooks.append(layer.register_forward_hook(see))
    module(x)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_papers_model_has_the_released_number_of_weights(paper):
    assert sum(p.numel() for p in paper.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in paper.decoder.parameters()) == 43_829_766
    assert (len(paper.encoder.state_dict()), len(paper.decoder.state_dict())) == (74, 76)
    assert len(paper.state_dict()) == 74 + 76
    assert paper.grid == (32, 32) and paper.vocab_size == 8192 and paper.config.factor == 8


def test_the_papers_encoder_layer_by_layer(paper):
    pictures = torch.empty(1, 3, 256, 256, device="meta")
    assert layers_of(paper.encoder, pictures) == [
        ("Conv2d", 3, 256, 7, 256),
        ("Block", 256, 256, None, 256), ("Block", 256, 256, None, 256), ("MaxPool2d", 256, 256, None, 128),
        ("Block", 256, 512, None, 128), ("Block", 512, 512, None, 128), ("MaxPool2d", 512, 512, None, 64),
        ("Block", 512, 1024, None, 64), ("Block", 1024, 1024, None, 64), ("MaxPool2d", 1024, 1024, None, 32),
        ("Block", 1024, 2048, None, 32), ("Block", 2048, 2048, None, 32),
        ("ReLU", 2048, 2048, None, 32), ("ExactConv", 2048, 8192, 1, 32),
    ]  # fmt: skip
    assert paper.logits(pictures).shape == (1, 8192, 32, 32)
    assert [(m.kernel_size, m.stride) for m in paper.encoder.modules() if isinstance(m, nn.MaxPool2d)] == [(2, 2)] * 3


def test_the_papers_decoder_layer_by_layer(paper):
    assert layers_of(paper.decoder, torch.empty(1, 8192, 32, 32, device="meta")) == [
        ("ExactConv", 8192, 128, 1, 32),
        ("Block", 128, 2048, None, 32), ("Block", 2048, 2048, None, 32), ("Upsample", 2048, 2048, None, 64),
        ("Block", 2048, 1024, None, 64), ("Block", 1024, 1024, None, 64), ("Upsample", 1024, 1024, None, 128),
        ("Block", 1024, 512, None, 128), ("Block", 512, 512, None, 128), ("Upsample", 512, 512, None, 256),
        ("Block", 512, 256, None, 256), ("Block", 256, 256, None, 256),
        ("ReLU", 256, 256, None, 256), ("Conv2d", 256, 6, 1, 256),
    ]  # fmt: skip
    assert paper.codes().shape == (8192, 128)
    scales = [(m.scale_factor, m.mode) for m in paper.decoder.modules() if isinstance(m, nn.Upsample)]
    assert scales == [(2, "nearest")] * 3


@pytest.mark.parametrize("side, kernels", [("encoder", (3, 3, 3, 1)), ("decoder", (1, 3, 3, 3))])
def test_the_papers_blocks_have_their_1x1_towards_the_relaxation(paper, side, kernels):
    blocks = [m for m in getattr(paper, side).modules() if isinstance(m, Block)]
    assert len(blocks) == 8
    for block in blocks:
        path = list(block.residual)
        assert [type(layer) for layer in path] == [nn.ReLU, nn.Conv2d] * 4
        convs = path[1::2]
        assert tuple(layer.kernel_size[0] for layer in convs) == kernels
        inputs, outputs = convs[0].in_channels, convs[-1].out_channels
        assert [layer.out_channels for layer in convs] == [outputs // 4] * 3 + [outputs]
        if inputs == outputs:
            assert isinstance(block.skip, nn.Identity)
        else:
            assert (block.skip.kernel_size, block.skip.out_channels) == ((1, 1), outputs)
        assert block.gain == 1 / 64


def test_the_papers_convolutions_keep_the_size_and_nothing_is_normalised(paper):
    convs = [m for m in paper.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == (74 + 76) / 2  # weights and biases
    for layer in convs:
        assert layer.stride == (1, 1) and layer.padding == tuple((k - 1) // 2 for k in layer.kernel_size)
        assert layer.padding_mode == "zeros" and layer.bias is not None and layer.groups == 1
    leaves = {type(m) for m in paper.modules() if not list(m.children())}
    assert leaves == {nn.Conv2d, ExactConv, nn.ReLU, nn.MaxPool2d, nn.Upsample, nn.Identity, GumbelSoftmax}


def test_weights_begin_normal_with_one_over_the_root_of_the_fan_in_and_biases_at_zero():
    """Of each layer: the standard deviation within 5 of its standard errors, and the shares of a normal distribution
    within one and two of it."""
    model = DVAE(DVAEConfig(image_size=32, vocab_size=512, hidden=32, code_width=32))
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {layer.kernel_size[0] for layer in layers} == {1, 3, 7}
    every = []
    for layer in layers:
        weights = layer.weight.detach() * math.sqrt(layer.in_channels * layer.kernel_size[0] ** 2)
        assert abs(weights.std() - 1) < 5 / math.sqrt(2 * weights.numel())
        every.append(weights.flatten())
        assert (layer.bias == 0).all()
    every = torch.cat(every).abs()
    for width, share in ((1, 0.6827), (2, 0.9545)):
        assert (every < width).float().mean().item() == pytest.approx(share, abs=0.002)


def test_beside_the_relaxation_convolutions_are_in_float32_under_autocast():
    """And the others are not; weights and input."""
    model, images = DVAE(DVAEConfig(**TINY)), torch.rand(2, 3, 32, 32)
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, logits, quantized = model(images, 1.0, seeds.generator(0))
    exact = {"encoder.output": model.encoder.output, "decoder.input": model.decoder.input}
    for name, layer in exact.items():
        read, given = seen[name]
        assert given.dtype == torch.float32
        assert torch.equal(given, F.conv2d(read.float(), layer.weight, layer.bias)), name
    assert seen["encoder.output"][0].dtype == torch.bfloat16 and seen["decoder.input"][0] is quantized.z
    assert logits.dtype == quantized.z.dtype == torch.float32
    others = {output.dtype for name, (_, output) in seen.items() if name not in exact}
    assert len(seen) > 8 and others == {torch.bfloat16}
    quantized.z.sum().backward()
    assert model.encoder.output.weight.grad.dtype == torch.float32


def test_tied_codes_have_no_such_convolutions(tied):
    """Their recipes keep the 16 bits that they were tuned with; the sphere itself is float32."""
    assert not any(isinstance(m, ExactConv) for m in tied.modules())


# ---------------------------------------------------------------------------------------------------- any architecture


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


WHOLE = [
    "image_size", "vocab_size", "hidden", "groups", "blocks", "bottleneck", "code_width", "patch", "kernel",
]  # fmt: skip
NO_FIT = "the kernel must be as large as the patch and differ from it by an even number"
REFUSED = [
    *(
        ({name: value}, f"{name} is {value!r}", f"{name} must be a whole number, at least 1")
        for name in WHOLE
        for value in (0, -4, 8.0, "8", True, None)
    ),
    ({"kernel": 7}, "kernel 7 does not fit patch 4", NO_FIT),  # one of them even, one odd
    ({"kernel": 2}, "kernel 2 does not fit patch 4", NO_FIT),
    ({"kernel": 6, "patch": 1}, "kernel 6 does not fit patch 1", NO_FIT),
    (
        {"image_size": 36},
        "image_size 36 is not a multiple of the downsampling factor 8",
        "choose a multiple of 8 = patch * 2**(groups - 1)",
    ),
    (
        {"groups": 5},
        "image_size 32 is not a multiple of the downsampling factor 64",
        "choose a multiple of 64 = patch * 2**(groups - 1)",
    ),
    (
        {"hidden": 9},
        "hidden 9 is not a multiple of bottleneck 2",
        "choose a multiple of 2: a residual path has hidden / bottleneck channels",
    ),
    *(
        (
            {"gain": gain},
            f"gain {gain} is not a positive number",
            "null means the paper's 1 / (groups * blocks)**2, here 1/4",
        )
        for gain in (0, -0.5, math.nan, math.inf)
    ),
    ({"likelihood": "x"}, "unknown likelihood 'x'", "choose logit-laplace, l2 or l1"),
    *(
        (
            {"spread": spread},
            f"spread {spread} of the likelihood is not a positive number",
            "0.1 suits pictures in [0, 1]",
        )
        for spread in (0.0, -1.0, math.nan)
    ),
]


@pytest.mark.parametrize("wrong, what, hint", REFUSED, ids=[str(wrong) for wrong, *_ in REFUSED])
def test_settings_that_contradict_each_other_are_refused(wrong, what, hint):
    with pytest.raises(UserError) as caught:
        DVAEConfig(**{**TINY, **wrong})
    assert (caught.value.what, caught.value.hint) == (what, hint)


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


def test_bytes_are_not_taken_for_floats(model):
    with pytest.raises(UserError, match=r"^images of torch.uint8 are no floats in \[0, 1\]$"):
        model.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


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
