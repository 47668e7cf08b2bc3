"""Packed matrices: the same logits up to rounding, or to a bound where they are rounded; the model stays as it is."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dalle import packing
from dalle.model import DALLE, DALLEConfig
from dalle.packing import PRECISIONS, Int8, Narrow, Packed, packed
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


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_exact_is_bit_equal_when_packed(model, precision):
    fast, text, null = packed(model, precision), batch(2)[0], torch.arange(V - T, V)[None]
    alone = sample(fast, text[1:], 3, null_ids=null, exact=True, seeds=5)
    beside = sample(fast, text, 9, null_ids=null, exact=True, seeds=[4, 5])
    assert torch.equal(alone.tokens, beside.tokens[9:12]) and torch.equal(alone.logprobs, beside.logprobs[9:12])


def test_rougher_precisions_change_the_probabilities_within_a_bound(model):
    """bfloat16 by less than autocast does, for states, keys and values stay in float32."""
    (text, image), logs = batch(16), {}
    expected = model(text, image).image.log_softmax(-1)
    possible = [precision for precision in PRECISIONS if packing._has(precision, model)]
    for precision in possible:
        logs[precision] = by_steps(packed(model, precision), text, image).log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        logs["autocast"] = model(text, image).image.log_softmax(-1)
    nats = {name: float((expected.exp() * (expected - other)).sum(-1).mean()) for name, other in logs.items()}
    if "bfloat16" in possible:
        assert 0 < nats["bfloat16"] <= 1.1 * nats["autocast"] and nats["bfloat16"] < 1e-4
        assert (logs["bfloat16"] - expected).abs().max() < 0.1
    if "int8" in possible:
        assert 1e-5 < nats["int8"] < 1e-3
        assert (logs["int8"] - expected).abs().max() < 0.3


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no products of int8")
def test_int8_multiplies_whole_numbers_and_knows_no_neighbours():
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 33), torch.randn(7, 2, 48) * torch.logspace(-3, 3, 14).view(7, 2, 1)
    nn.init.zeros_(linear.weight[3])  # a unit of 0 would divide by 0
    x[1, 1] = 0

    def rounded(rows):
        units = rows.double().abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return (rows.double() / units).round() * units

    fast = Int8(linear.requires_grad_(False))
    expected = rounded(x) @ rounded(linear.weight).T + linear.bias
    torch.testing.assert_close(fast(x).double(), expected, atol=0, rtol=1e-4)
    assert torch.equal(fast(x)[1, 1], linear.bias)
    assert all(torch.equal(fast(x[k : k + 1]), fast(x)[k : k + 1]) for k in range(7))
    x[2, 0, 5], x[3, 1, 4] = torch.nan, torch.inf
    finite = fast(x).isfinite().all(-1)
    assert (~finite).nonzero().tolist() == [[2, 0], [3, 1]]


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


@pytest.mark.parametrize("asked, has, used", [
    ("bfloat16", {"float32"}, "float32"), ("int8", {"float32"}, "float32"), ("bfloat16", set(PRECISIONS), "bfloat16"),
    ("int8", {"float32", "bfloat16"}, "bfloat16"),
])  # fmt: skip
def test_a_machine_without_a_precision_takes_the_one_before_and_says_so(model, asked, has, used, monkeypatch, capsys):
    monkeypatch.setattr(packing, "_has", lambda precision, model: precision in has)
    fast, (text, image) = packed(model, asked), batch()
    told = capsys.readouterr().err.strip().splitlines()
    if asked != used:
        assert len(told) == 2 and f"--precision {used}" in told[1]
        assert f"this CPU is no faster in {asked}: drawing in {used}" in told[0]
    else:
        assert told == []
    again = packed(model, used)
    assert capsys.readouterr().err == ""
    assert all(torch.equal(*both) for both in zip(fast(text, image), again(text, image), strict=True))


def test_which_precisions_there_are_is_asked_of_the_machine(model, monkeypatch):
    def found():
        return [precision for precision in PRECISIONS if packing._has(precision, model)]

    monkeypatch.setattr(packing, "fast_bfloat16", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(engine="onednn"))  # lacks this product
    assert found() == ["float32", "bfloat16"]
    torch.backends.quantized.engine = "x86"
    assert found() == ["float32", "bfloat16", "int8"]
    monkeypatch.setattr(packing, "fast_bfloat16", lambda: False)
    assert found() == ["float32", "int8"]
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert found() == ["float32"]
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert packing._has("int8", model)
    monkeypatch.setattr(packing, "_one_dnn", lambda model: False)
    assert not packing._has("int8", model)


def test_unknown_precisions_are_refused(model):
    with pytest.raises(UserError, match="int3"):
        packed(model, "int3")
