"""The transformer: one forward, the same numbers step by step, and nothing seen before its time."""

import math

import pytest
import torch
from torch import nn

from dalle.model import DALLE, Attention, DALLEConfig, Logits, losses
from dvae.errors import UserError

SIZES = dict(vocab_text=11, text_length=5, vocab_image=13, grid=(3, 4), depth=3, width=24, heads=3)
T, V, K, N = 5, 16, 13, 12


def random_model(dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    model = DALLE(DALLEConfig(**{**SIZES, **changes})).to(dtype)
    for parameter in model.parameters():  # far from the small initial values, so that everything matters
        nn.init.normal_(parameter, std=0.3)
    return model


def batch(rows=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (rows, T), generator=generator), torch.randint(K, (rows, 3, 4), generator=generator)


def test_shapes_and_float32_logits():
    text, image = batch()
    for dtype in (torch.float32, torch.bfloat16):
        logits = random_model(dtype)(text, image)
        assert logits.text.shape == (4, T, V) and logits.image.shape == (4, N, K)
        assert logits.text.dtype == logits.image.dtype == torch.float32
    model = random_model(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(text, image)
        cache = model.prefill(text)
        scored = model.score(image, cache)
    assert logits.text.dtype == logits.image.dtype == scored.dtype == torch.float32
    assert cache.keys.dtype == torch.bfloat16
    torch.testing.assert_close(logits.image, model(text, image).image, atol=0.2, rtol=0.1)


def test_attention_is_softmax_over_what_came_before():
    torch.manual_seed(0)
    attention = Attention(6, 2).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    q, k, v = (attention.qkv(x)[..., 6 * i : 6 * (i + 1)] for i in range(3))
    expected = torch.zeros_like(x)
    for head in (slice(0, 3), slice(3, 6)):
        for state in range(5):
            affinity = (q[:, state, None, head] * k[:, : state + 1, head]).sum(-1) / math.sqrt(3)
            expected[:, state, head] = (affinity.softmax(-1)[..., None] * v[:, : state + 1, head]).sum(1)
    torch.testing.assert_close(attention(x), attention.out(expected), atol=1e-12, rtol=0)


def test_causal_attention_is_the_dense_mask_of_the_layout():
    model = random_model()
    x = torch.randn(2, model.layout.states, 24, dtype=torch.float64)
    for block in model.blocks:
        torch.testing.assert_close(block(x, 0), block(x, 0, mask=model.layout.mask()), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("changes", [{}, dict(depth=1, heads=1), dict(text_length=1, grid=(1, 1)), dict(grid=(5, 2))])
def test_cached_logits_are_the_uncached(dtype, tolerance, changes):
    model = DALLE(DALLEConfig(**{**SIZES, **changes})).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    config = model.config
    text = torch.randint(11 + config.text_length, (3, config.text_length))
    image = torch.randint(K, (3, *config.grid))
    expected = model(text, image).image
    assert expected.std() > 0.05

    cache = model.prefill(text)
    assert cache.length == model.layout.image.start
    torch.testing.assert_close(model.score(image, cache), expected, atol=tolerance, rtol=0)
    assert cache.length == model.layout.image.start  # a score leaves the cache as it was
    tokens = image.flatten(1)
    for cell in range(model.layout.cells):
        logits = model.step(tokens[:, cell - 1] if cell else None, cell, cache)
        torch.testing.assert_close(logits, expected[:, cell], atol=tolerance, rtol=0)
    assert cache.length == model.layout.states
    cache.truncate(model.layout.image.start)
    torch.testing.assert_close(model.step(None, 0, cache), expected[:, 0], atol=tolerance, rtol=0)


def test_prefill_is_shared_by_copies():
    model, (text, image) = random_model(), batch(6)
    shared = model.prefill(text[:2])
    expanded, apart = shared.expand(3), model.prefill(text[:2].repeat_interleave(3, 0))
    selected = shared.select([1, 0, 1])
    expected = model(text[[1, 0, 1]], image[:3]).image
    assert torch.equal(model.score(image, expanded), model.score(image, apart))
    torch.testing.assert_close(model.score(image[:3], selected), expected, atol=1e-12, rtol=0)
    # what is written into a copy is not seen by the others
    before = model.step(None, 0, shared.select([0, 1]))
    model.step(None, 0, expanded)
    assert torch.equal(model.step(None, 0, shared), before)
    # in the middle of a picture: rows change places, and drawing goes on
    model.step(image.flatten(1)[:2, 0], 1, shared)
    swapped = shared.select(torch.tensor([1, 0]))
    logits = model.step(image.flatten(1)[[1, 0], 1], 2, swapped)
    torch.testing.assert_close(logits, model(text[:2], image[:2]).image[[1, 0], 2], atol=1e-12, rtol=0)


def test_truncate_forgets():
    model, (text, image) = random_model(), batch(2)
    tokens, cache = image.flatten(1), model.prefill(text)
    for cell, held in enumerate([None, (tokens[:, 0] + 1) % K, (tokens[:, 1] + 1) % K]):  # another picture
        model.step(held, cell, cache)
    cache.truncate(model.layout.image.start + 1)
    logits = model.step(tokens[:, 0], 1, cache)
    torch.testing.assert_close(logits, model(text, image).image[:, 1], atol=1e-12, rtol=0)


def changed(before, after):
    """bool (n,): at which positions logits (B, n, K) differ."""
    return ((before - after).abs().amax((0, 2)) > 1e-9).tolist()


def test_each_prediction_depends_on_all_before_it_and_on_nothing_else():
    model, (text, image) = random_model(), batch(2)
    plain = model(text, image)
    for k in range(T):
        other = text.clone()
        other[:, k] = (other[:, k] + 1) % V
        logits = model(other, image)
        assert changed(plain.text, logits.text) == [j > k for j in range(T)]
        assert changed(plain.image, logits.image) == [True] * N  # one caption token reaches every cell
    for cell in range(N):
        other = image.clone().flatten(1)
        other[:, cell] = (other[:, cell] + 1) % K
        logits = model(text, other.view_as(image))
        assert changed(plain.text, logits.text) == [False] * T
        assert changed(plain.image, logits.image) == [j > cell for j in range(N)]


def test_every_parameter_learns():
    model = DALLE(DALLEConfig(**SIZES))
    text, image = torch.arange(V)[: 3 * T].view(3, T), torch.arange(K).repeat(3)[: 3 * N].view(3, 3, 4)
    total = sum(losses(model(text, image), text, image, torch.ones(3, dtype=torch.bool)))
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_inference_records_no_gradient():
    model, (text, image) = random_model(), batch(2)
    cache = model.prefill(text)
    assert not model.score(image, cache).requires_grad and not model.step(None, 0, cache).requires_grad


def test_initial_values():
    config = DALLEConfig(vocab_text=500, text_length=12, vocab_image=600, grid=(4, 4), depth=8, width=128, heads=4)
    torch.manual_seed(0)
    model = DALLE(config)
    scale = math.sqrt(0.125)
    block = model.blocks[3]
    expected = {
        model.text_embedding.weight: 0.013,
        model.image_embedding.weight: 0.013,
        model.text_position.weight: 0.007,
        model.row_position.weight: 0.007 / math.sqrt(2),
        model.column_position.weight: 0.007 / math.sqrt(2),
        model.text_head.weight: scale / math.sqrt(128),
        block.attention.qkv.weight: scale / math.sqrt(128),
        block.mlp.hidden.weight: scale / math.sqrt(128),
        block.attention.out.weight: scale / math.sqrt(128) / 4,
        block.mlp.out.weight: scale / math.sqrt(512) / 4,
    }
    for parameter, std in expected.items():
        assert parameter.std().item() == pytest.approx(std, rel=0.12)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    text, image = torch.randint(512, (4, 12)), torch.randint(600, (4, 4, 4))
    first = losses(model(text, image), text, image, torch.ones(4, dtype=torch.bool))
    assert first.text.item() == pytest.approx(math.log(512), abs=0.2)  # knows nothing yet
    assert first.image.item() == pytest.approx(math.log(600), abs=0.2)


def test_losses_are_means_over_their_own_tokens():
    text, image = batch(4)
    torch.manual_seed(0)
    logits = Logits(torch.randn(4, T, V, dtype=torch.float64), torch.randn(4, N, K, dtype=torch.float64))
    for keep in ([True] * 4, [True, False, False, True], [False] * 4):
        terms = []
        for row in range(4):
            for k in range(T):
                chances = [math.exp(value) for value in logits.text[row, k].tolist()]
                if keep[row]:
                    terms.append(-math.log(chances[text[row, k]] / sum(chances)))
        cells = []
        for row in range(4):
            for cell, token in enumerate(image[row].flatten().tolist()):
                chances = [math.exp(value) for value in logits.image[row, cell].tolist()]
                cells.append(-math.log(chances[token] / sum(chances)))
        found = losses(logits, text, image, torch.tensor(keep))
        assert found.text.item() == pytest.approx(sum(terms) / len(terms) if terms else 0, abs=1e-12)
        assert found.image.item() == pytest.approx(sum(cells) / len(cells), abs=1e-12)


def test_a_dropped_caption_teaches_no_text():
    text, image = batch(2)
    logits = Logits(torch.randn(2, T, V, requires_grad=True), torch.randn(2, N, K, requires_grad=True))
    found = losses(logits, text, image, torch.tensor([True, False]))
    (found.text + found.image).backward()
    assert logits.text.grad[0].abs().sum() > 0 and logits.text.grad[1].abs().sum() == 0
    assert (logits.image.grad.abs().sum((1, 2)) > 0).all()


def test_config_is_checked_and_may_come_from_json():
    assert DALLEConfig(**{**SIZES, "grid": [3, 4]}) == DALLEConfig(**SIZES)
    wrong = dict(width=25, heads=0, depth=-1, vocab_text=0, vocab_image=True, text_length=2.0, mlp_ratio=0)
    for name, value in wrong.items():
        with pytest.raises(UserError, match=name):
            DALLEConfig(**{**SIZES, name: value})
    for grid in ((3,), (3, 4, 5), (0, 4), (3.0, 4)):
        with pytest.raises(UserError, match="grid"):
            DALLEConfig(**{**SIZES, "grid": grid})


@torch.no_grad()
def test_codes_that_look_alike_start_alike():
    codes = torch.randn(13, 40, generator=torch.Generator().manual_seed(0))
    codes[1] = codes[0] + 0.01  # twins
    models = [random_model(torch.float32) for _ in range(3)]
    before = models[0].image_embedding.weight.clone(), models[0].image_head.weight.clone()
    for model, share in zip(models, (0.0, 0.5, 1.0), strict=True):
        model.start_from_codes(codes, share, torch.Generator().manual_seed(1))
    nothing, half, everything = models
    for name, old in zip(("image_embedding", "image_head"), before, strict=True):
        assert torch.equal(getattr(nothing, name).weight, old)
        for model in models:
            weight = getattr(model, name).weight
            assert weight.std() == pytest.approx(old.std(), rel=0.25)
        twins = [(w[0] - w[1]).norm() / w.norm(dim=1).mean() for w in (getattr(m, name).weight for m in models)]
        assert twins[2] < 0.05 < 0.5 < twins[1] < twins[0]
    # with nothing but the codes, both are one map of them: the products of their rows are those of the codes
    expected = half.image_embedding.weight * math.sqrt(2) - before[0]
    torch.testing.assert_close(expected, everything.image_embedding.weight, atol=1e-5, rtol=0)
    scale = everything.image_head.weight.std() / everything.image_embedding.weight.std()
    torch.testing.assert_close(everything.image_head.weight, scale * everything.image_embedding.weight)
