"""Packed matrices: the same logits up to rounding, or to a bound where they are rounded; the model stays as it is."""

import pytest
import torch
from torch import nn

from dalle import packing
from dalle.model import DALLE, DALLEConfig
from dalle.packing import Narrow, Packed, packed
from dalle.sampling import sample
from dvae.errors import UserError

T, GRID, V, K = 6, (4, 5), 21, 40
CELLS = GRID[0] * GRID[1]


@pytest.fixture(params=["full", "paper"])
def model(request) -> DALLE:
    torch.manual_seed(0)
    config = DALLEConfig(V - T, T, K, GRID, depth=4, width=64, heads=4, patterns=request.param, both_orders=True)
    model = DALLE(config)
    for parameter in model.parameters():  # far from the small initial values, so that everything matters
        nn.init.normal_(parameter, std=0.25)
    return model.requires_grad_(False)


def batch(rows: int = 5):
    return torch.randint(V, (rows, T)), torch.randint(K, (rows, *GRID))


def by_steps(model: DALLE, text, image):
    """Logits (B, N, K), drawn cell by cell."""
    cache, tokens = model.prefill(text), image.flatten(1)
    return torch.stack([model.step(tokens[:, n - 1] if n else None, n, cache) for n in range(CELLS)], 1)


def kinds(model: DALLE) -> set[type]:
    return {type(layer) for block in model.blocks for layer in (block.attention.qkv, block.mlp.out)}


@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_packed_logits_are_those_of_the_model(model, rows):
    fast, (text, image) = packed(model), batch(rows)
    assert kinds(fast) == {Packed} and kinds(model) == {nn.Linear}
    expected = model(text, image)
    assert expected.image.std() > 0.3
    torch.testing.assert_close(fast(text, image), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(by_steps(fast, text, image), expected.image, atol=2e-5, rtol=0)
    torch.testing.assert_close(fast.score(image, fast.prefill(text)), expected.image, atol=2e-5, rtol=0)
    words = fast.score_text(text, fast.prefill_image(image))
    torch.testing.assert_close(words, model(text, image, image_first=True).text, atol=2e-5, rtol=0)


def test_the_same_pictures_are_drawn(model):
    text, null = batch(3)[0], torch.arange(V - T, V)[None]
    plain, fast = (sample(each, text, 4, null_ids=null, guidance=1.5, seeds=7) for each in (model, packed(model)))
    assert torch.equal(plain.tokens, fast.tokens)
    torch.testing.assert_close(plain.logprobs, fast.logprobs, atol=2e-5, rtol=0)


def test_exact_is_bit_equal_when_packed(model):
    fast, text, null = packed(model, "bfloat16"), batch(2)[0], torch.arange(V - T, V)[None]
    alone = sample(fast, text[1:], 3, null_ids=null, exact=True, seeds=5)
    beside = sample(fast, text, 9, null_ids=null, exact=True, seeds=[4, 5])
    assert torch.equal(alone.tokens, beside.tokens[9:12]) and torch.equal(alone.logprobs, beside.logprobs[9:12])


def test_bfloat16_changes_the_probabilities_within_a_bound(model):
    """By less than autocast does, for states, keys and values stay in float32."""
    (text, image), logs = batch(16), {}
    logs["float32"] = model(text, image).image.log_softmax(-1)
    logs["bfloat16"] = by_steps(packed(model, "bfloat16"), text, image).log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        logs["autocast"] = model(text, image).image.log_softmax(-1)
    divergence = {
        name: float((logs["float32"].exp() * (logs["float32"] - other)).sum(-1).mean()) for name, other in logs.items()
    }
    assert 0 < divergence["bfloat16"] <= 1.1 * divergence["autocast"]
    assert divergence["bfloat16"] < 1e-4  # nats
    assert (logs["bfloat16"] - logs["float32"]).abs().max() < 0.1


def test_without_one_dnn_bfloat16_is_what_autocast_computes(model, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    fast, (text, image) = packed(model, "bfloat16"), batch()
    assert kinds(fast) == {Narrow} and packed(model) is model
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(text, image)
    assert all(torch.equal(*both) for both in zip(fast(text, image), expected, strict=True))
    cache = fast.prefill(text)
    assert cache.stored.dtype == torch.bfloat16
    torch.testing.assert_close(by_steps(fast, text, image), expected.image, atol=0.1, rtol=0)


def test_only_matrices_are_copied_and_nothing_of_the_model_changes(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = packed(model, "bfloat16")
    assert fast.text_embedding.weight is model.text_embedding.weight and fast.start is model.start
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert packed(model.double()) is model  # other dtypes are computed as they are


def test_a_machine_without_bfloat16_draws_in_float32_and_says_so(model, monkeypatch, capsys):
    monkeypatch.setattr(packing, "_has_bfloat16", lambda kind: False)
    fast, (text, image) = packed(model, "bfloat16"), batch()
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 2 and "bfloat16" in told[0]
    torch.testing.assert_close(fast(text, image), model(text, image), atol=2e-5, rtol=0)


def test_unknown_precisions_are_refused(model):
    with pytest.raises(UserError, match="int3"):
        packed(model, "int3")
