"""The transformer: one forward, the same numbers step by step, and nothing seen before its time."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn

from dalle.layout import KINDS, schedule
from dalle.model import DALLE, Attention, DALLEConfig, Logits, losses
from dvae.errors import UserError

SIZES = dict(vocab_text=11, text_length=5, vocab_image=13, grid=(3, 4), depth=3, width=24, heads=3)
T, V, K, N = 5, 16, 13, 12
WIDE = dict(grid=(6, 13), depth=1)  # wide enough for the convolution to have gaps
PATTERNS = [(kind,) for kind in KINDS] + ["paper"]


def random_model(dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    model = DALLE(DALLEConfig(**{**SIZES, **changes})).to(dtype)
    for parameter in model.parameters():  # far from the small initial values, so that everything matters
        nn.init.normal_(parameter, std=0.3)
    return model


def batch(rows=4, seed=1, grid=(3, 4)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (rows, T), generator=generator), torch.randint(K, (rows, *grid), generator=generator)


@pytest.mark.parametrize("patterns", ["full", "paper"])
def test_shapes_and_float32_logits(patterns):
    text, image = batch()
    for dtype in (torch.float32, torch.bfloat16):
        logits = random_model(dtype, patterns=patterns)(text, image)
        assert logits.text.shape == (4, T, V) and logits.image.shape == (4, N, K)
        assert logits.text.dtype == logits.image.dtype == torch.float32
    model = random_model(torch.float32, patterns=patterns)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(text, image)
        cache = model.prefill(text)
        scored = model.score(image, cache)
        first = model.step(None, 0, cache)
    assert logits.text.dtype == logits.image.dtype == scored.dtype == first.dtype == torch.float32
    assert cache.stored.dtype == torch.bfloat16
    torch.testing.assert_close(logits.image, model(text, image).image, atol=0.2, rtol=0.1)
    torch.testing.assert_close(first, model(text, image).image[:, 0], atol=0.2, rtol=0.1)


def test_logits_are_computed_in_float32_under_autocast():
    """Not rounded to 16 bits and widened afterwards."""
    model, (text, image) = random_model(torch.float32), batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(text, image)
    for found in logits:
        assert not torch.equal(found, found.bfloat16().float())


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
        torch.testing.assert_close(block(x), block(x, reads=model.layout.mask()), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    "changes",
    [
        *[{}, dict(depth=1, heads=1), dict(text_length=1, grid=(1, 1)), dict(grid=(5, 2))],
        *[dict(WIDE, patterns=patterns, depth=3 if patterns == "paper" else 1) for patterns in PATTERNS],
        *[dict(patterns=("conv", "full", "column")), dict(text_length=1, grid=(1, 1), patterns="paper")],
    ],
)
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


def test_a_step_reads_the_keys_of_its_pattern_and_no_others(monkeypatch):
    """And the text's where they stand: what is handed to the attention begins with them, in the cache's memory."""
    model, read = random_model(torch.float32, grid=(6, 13), depth=4, patterns=KINDS), []
    cache, attention = model.prefill(batch(2)[0]), nn.functional.scaled_dot_product_attention
    start = cache.stored.data_ptr()

    def spy(q, k, v, **settings):
        layer = len(read) % len(KINDS)
        assert [k.data_ptr(), v.data_ptr()] == [half.data_ptr() for half in cache.stored[layer]]
        read.append(k.shape[2])
        return attention(q, k, v, **settings)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    for cell in range(model.layout.cells):
        model.step(torch.tensor([1, 2]) if cell else None, cell, cache)
    states = range(model.layout.image.start, model.layout.states)
    assert read == [len(model.layout.keys(state, kind)) for state in states for kind in KINDS]
    assert cache.stored.data_ptr() == start


def test_a_cache_that_is_done_gives_its_memory_to_the_next():
    model, (text, image) = random_model(), batch(4)
    prefix = model.prefill(text)
    first = prefix.expand(2)
    model.step(None, 0, first)
    second = prefix.select([3, 1], into=first)
    assert second.stored.data_ptr() == first.stored.data_ptr()
    assert second.length == prefix.length and second.rows == 2
    torch.testing.assert_close(
        model.score(image[:2], second), model(text[[3, 1]], image[:2]).image, atol=1e-12, rtol=0
    )


def test_truncate_forgets():
    model, (text, image) = random_model(), batch(2)
    tokens, cache = image.flatten(1), model.prefill(text)
    for cell, held in enumerate([None, (tokens[:, 0] + 1) % K, (tokens[:, 1] + 1) % K]):  # another picture
        model.step(held, cell, cache)
    cache.truncate(model.layout.image.start + 1)
    logits = model.step(tokens[:, 0], 1, cache)
    torch.testing.assert_close(logits, model(text, image).image[:, 1], atol=1e-12, rtol=0)


BOTH = [
    *[dict(), dict(depth=1, heads=1), dict(text_length=1, grid=(1, 1)), dict(grid=(5, 2))],
    *[dict(WIDE, patterns=patterns, depth=3 if patterns == "paper" else 1) for patterns in PATTERNS],
]


@pytest.mark.parametrize("changes", BOTH)
def test_cached_logits_of_texts_after_pictures_are_the_uncached(changes):
    model = random_model(both_orders=True, **changes)
    config = model.config
    text = torch.randint(11 + config.text_length, (3, config.text_length))
    image = torch.randint(K, (3, *config.grid))
    expected = model(text, image, image_first=True).text
    assert expected.shape == (3, config.text_length, 11 + config.text_length) and expected.std() > 0.05
    cache = model.prefill_image(image)
    start = config.grid[0] * config.grid[1] + 1
    assert cache.length == start
    torch.testing.assert_close(model.score_text(text, cache), expected, atol=1e-12, rtol=0)
    assert cache.length == start
    for place in range(config.text_length):
        logits = model.step_text(text[:, place - 1] if place else None, place, cache)
        torch.testing.assert_close(logits, expected[:, place], atol=1e-12, rtol=0)
    assert cache.length == model.layout.states
    cache.truncate(start)
    swapped = cache.select([2, 0])
    torch.testing.assert_close(model.score_text(text[[2, 0]], swapped), expected[[2, 0]], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_image_first_is_the_dense_mask_of_its_layout(kind):
    """Each token is changed in turn: pictures know nothing of the words, words everything of the picture."""
    model = random_model(**WIDE, patterns=(kind,), both_orders=True)
    text, image = batch(1, grid=(6, 13))
    plain, layout = model(text, image, image_first=True), model.image_first_layout
    for k in range(T):
        other = text.clone()
        other[:, k] = (other[:, k] + 1) % V
        logits = model(other, image, image_first=True)
        assert changed(plain.text, logits.text) == [j > k for j in range(T)]
        assert not any(changed(plain.image, logits.image))
    seen = layout.mask(kind)[layout.image, layout.image]
    for cell in range(layout.cells):
        other = image.clone().flatten(1)
        other[:, cell] = (other[:, cell] + 1) % K
        logits = model(text, other.view_as(image), image_first=True)
        assert all(changed(plain.text, logits.text))  # the last token of the picture, too
        assert changed(plain.image, logits.image) == seen[: layout.cells, cell + 1].tolist()


def test_text_before_any_picture_is_that_of_the_first_order():
    for patterns in ("full", "paper"):
        model, (text, image) = random_model(patterns=patterns), batch()
        torch.testing.assert_close(model.text_logits(text), model(text, image).text, atol=1e-12, rtol=0)


def test_both_orders_are_one_row_of_positions_and_nothing_else():
    """The same weights draw the same: a model of one order is the other's without that row."""
    one, both = random_model(), random_model(both_orders=True)
    weights = both.state_dict()
    assert weights["row_position.weight"].shape == (4, 24) and one.row_position.weight.shape == (3, 24)
    one.load_state_dict({**weights, "row_position.weight": weights["row_position.weight"][:3]})
    text, image = batch()
    for a, b in zip(one(text, image), both(text, image), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(AssertionError, match="text first only"):
        one(text, image, image_first=True)
    # the row stands for the last image state alone, which no cell but all of the text reads
    plain = both(text, image, image_first=True)
    with torch.no_grad():
        both.row_position.weight[3] += torch.randn(24)
    moved = both(text, image, image_first=True)
    assert torch.equal(plain.image, moved.image) and all(changed(plain.text, moved.text))


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


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_reads_its_pattern_and_nothing_else(kind):
    """Each token is changed in turn: the cells that see it, and no other, are predicted otherwise."""
    model = random_model(**WIDE, patterns=(kind,))
    text, image = batch(1, grid=(6, 13))
    plain, layout = model(text, image), model.layout
    for k in range(T):
        other = text.clone()
        other[:, k] = (other[:, k] + 1) % V
        logits = model(other, image)
        assert changed(plain.text, logits.text) == [j > k for j in range(T)]
        assert all(changed(plain.image, logits.image))  # every cell reads all of the text, whatever the kind
    seen = layout.mask(kind)[layout.image, layout.image]
    for cell in range(layout.cells):
        other = image.clone().flatten(1)
        other[:, cell] = (other[:, cell] + 1) % K
        logits = model(text, other.view_as(image))
        assert changed(plain.text, logits.text) == [False] * T
        holder = cell + 1  # the image state that holds the token; the last token is held by none
        expected = seen[:, holder].tolist() if holder < layout.cells else [False] * layout.cells
        assert changed(plain.image, logits.image) == expected
    assert kind == "full" or not seen.tril().equal(torch.ones_like(seen).tril())


def test_weights_know_no_pattern():
    models = [random_model(patterns=patterns) for patterns in ("full", "paper", ["row", "column", "conv"])]
    assert all(model.state_dict().keys() == models[0].state_dict().keys() for model in models)
    assert not any("mask" in name for name in models[0].state_dict())
    assert [block.kind for block in models[0].blocks] == ["full"] * 3 and not list(models[0].buffers())
    assert [block.kind for block in models[1].blocks] == list(schedule(3)) == ["row", "column", "conv"]
    text, image = batch()
    one, other = models[1](text, image), models[2](text, image)
    assert torch.equal(one.image, other.image) and not torch.equal(one.image, models[0](text, image).image)


def test_the_papers_model_at_full_size_on_no_device():
    with torch.device("meta"):
        model = DALLE(DALLEConfig(16384, 256, 8192, (32, 32), 64, 3968, 62, patterns="paper"), checkpointing=True)
    kinds = [block.kind for block in model.blocks]
    assert [len(kinds), *(kinds.count(kind) for kind in KINDS)] == [64, 0, 47, 16, 1]
    assert {name: mask.shape for name, mask in model.named_buffers()} == dict.fromkeys(
        ("row_mask", "column_mask", "conv_mask"), (1281, 1281)
    )
    assert 12.0e9 < sum(p.numel() for p in model.blocks.parameters()) < 12.2e9  # 12 x 64 x 3968^2, and the biases


@pytest.mark.parametrize("patterns", ["full", "paper"])
def test_checkpointing_changes_no_number_and_keeps_less(patterns):
    text, image = batch()
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = DALLE(DALLEConfig(**SIZES, patterns=patterns), checkpointing)
        kept, parameters = {}, {p.data_ptr() for p in model.parameters()}

        def keep(tensor, kept=kept, parameters=parameters):
            if tensor.data_ptr() not in parameters:
                kept[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = sum(losses(model(text, image), text, image, torch.ones(4, dtype=torch.bool)))
        hidden = [tensor for tensor in kept.values() if tensor.shape[-1:] == (4 * 24,)]
        size = sum(tensor.numel() for tensor in kept.values())
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters()], hidden, size))
    (loss, grads, hidden, size), (loss_again, grads_again, hidden_again, size_again) = found
    assert torch.equal(loss, loss_again) and len(grads) == len(grads_again) > 20
    assert all(torch.equal(one, other) for one, other in zip(grads, grads_again, strict=True))
    assert len(hidden) >= 3 and hidden_again == []  # what is inside the blocks' MLPs
    states = 4 * model.layout.states * 24
    assert size_again + 3 * states < size / 3  # with the three that enter the blocks, which no hook sees


def test_without_gradients_checkpointing_does_nothing(monkeypatch):
    model, (text, image) = random_model(), batch()
    expected = model(text, image)
    model.checkpointing = True
    monkeypatch.setattr("dalle.model.checkpoint", lambda *_, **__: pytest.fail("checkpointed"))
    with torch.no_grad():
        assert torch.equal(model(text, image).image, expected.image)


@pytest.mark.parametrize("changes", [{}, dict(patterns="paper")])
def test_every_parameter_learns(changes):
    model = DALLE(DALLEConfig(**SIZES, **changes))
    text, image = torch.arange(V)[: 3 * T].view(3, T), torch.arange(K).repeat(3)[: 3 * N].view(3, 3, 4)
    total = sum(losses(model(text, image), text, image, torch.ones(3, dtype=torch.bool)))
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_inference_records_no_gradient():
    model, (text, image) = random_model(), batch(2)
    cache = model.prefill(text)
    assert not model.score(image, cache).requires_grad and not model.step(None, 0, cache).requires_grad


SCALE = math.sqrt(1 / 8)
INITIAL = {  # of a model 512 wide and 4 deep; one entry for each row of the table in `DALLE.init_weights`, and more
    "start": 0.013,
    "text_embedding.weight": 0.013,
    "image_embedding.weight": 0.013,
    "text_position.weight": 0.007,
    "row_position.weight": 0.007 / math.sqrt(2),
    "column_position.weight": 0.007 / math.sqrt(2),
    "text_head.weight": SCALE / math.sqrt(512),
    "image_head.weight": SCALE / math.sqrt(512),
    "attention.qkv.weight": SCALE / math.sqrt(512),
    "mlp.hidden.weight": SCALE / math.sqrt(512),
    "attention.out.weight": SCALE / math.sqrt(512) / math.sqrt(2 * 4),
    "mlp.out.weight": SCALE / math.sqrt(4 * 512) / math.sqrt(2 * 4),
}


def test_initial_values():
    config = DALLEConfig(vocab_text=50, text_length=40, vocab_image=60, grid=(30, 30), depth=4, width=512, heads=4)
    torch.manual_seed(0)
    model = DALLE(config)
    seen = set()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            name = name.split(".", 2)[-1] if name.startswith("blocks.") else name
            seen.add(name)
            bound = 4 / math.sqrt(2 * parameter.numel())  # four standard errors of a standard deviation
            assert parameter.std().item() == pytest.approx(INITIAL[name], rel=bound), name
            assert abs(parameter.mean().item()) < 4 * INITIAL[name] / math.sqrt(parameter.numel()), name
    assert seen == set(INITIAL)  # nothing is left to torch
    assert model.norm.eps == 1e-6
    assert {norm.eps for block in model.blocks for norm in (block.attention_norm, block.mlp_norm)} == {1e-5}


def test_a_new_model_knows_nothing():
    config = DALLEConfig(vocab_text=500, text_length=12, vocab_image=600, grid=(4, 4), depth=8, width=128, heads=4)
    torch.manual_seed(0)
    model = DALLE(config)
    text, image = torch.randint(512, (4, 12)), torch.randint(600, (4, 4, 4))
    first = losses(model(text, image), text, image, torch.ones(4, dtype=torch.bool))
    assert first.text.item() == pytest.approx(math.log(512), abs=0.2)
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


def test_pads_are_targets_or_not():
    """Words are ids below V - T = 11. A row of pads alone, a row without any, and rows that were dropped."""
    text = torch.tensor([[1, 2, 13, 14, 15], [11, 12, 13, 14, 15], [0, 10, 9, 8, 7], [3, 12, 13, 14, 15]])
    image = batch(4)[1]
    torch.manual_seed(0)
    logits = Logits(
        torch.randn(4, T, V, dtype=torch.float64, requires_grad=True), torch.randn(4, N, K, dtype=torch.float64)
    )
    for keep in ([True] * 4, [True, False, False, True], [False, True, False, False], [False] * 4):
        terms, grads = [], torch.zeros(4, T, dtype=torch.bool)
        for row in range(4):
            for k in range(T):
                if keep[row] and text[row, k] < 11:
                    chances = [math.exp(value) for value in logits.text[row, k].tolist()]
                    terms.append(-math.log(chances[text[row, k]] / sum(chances)))
                    grads[row, k] = True
        keep = torch.tensor(keep)
        found = losses(logits, text, image, keep, pad_targets=False)
        assert found.text.item() == pytest.approx(sum(terms) / max(1, len(terms)), abs=1e-12)
        assert found.image == losses(logits, text, image, keep).image
        (grad,) = torch.autograd.grad(found.text, logits.text)
        assert torch.equal(grad.abs().sum(-1) > 0, grads)
    words_only, keep = text[2:3], torch.tensor([True])
    some = Logits(logits.text[2:3], logits.image[2:3])
    with_pads, without = (losses(some, words_only, image[2:3], keep, pad_targets) for pad_targets in (True, False))
    torch.testing.assert_close(with_pads.text, without.text)  # where there are no pads, it makes no difference


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


def test_patterns_may_come_from_json_and_are_kept():
    for patterns, kinds in [
        ("full", ("full",) * 3),
        ("paper", ("row", "column", "conv")),
        (["full", "row", "row"], ("full", "row", "row")),
    ]:
        config = DALLEConfig(**SIZES, patterns=patterns)
        assert config.kinds == kinds
        again = DALLEConfig(**json.loads(json.dumps(asdict(config))))
        assert again == config and hash(again) == hash(config)
    old = json.loads(json.dumps(asdict(DALLEConfig(**SIZES))))
    del old["patterns"]  # as in artefacts from before there were any
    assert DALLEConfig(**old) == DALLEConfig(**SIZES) and DALLEConfig(**old).kinds == ("full",) * 3


@pytest.mark.parametrize("patterns", ["rows", "row", "", None, 3, {}])
def test_patterns_that_there_are_not(patterns):
    with pytest.raises(UserError) as error:
        DALLEConfig(**SIZES, patterns=patterns)
    assert error.value.what == f"patterns names {patterns!r}"
    assert error.value.hint == 'give "full", "paper", or a list of one of full, row, column, conv for each block'


def test_patterns_and_depth_that_contradict_each_other():
    with pytest.raises(UserError) as error:
        DALLEConfig(**SIZES, patterns=["row", "paper", "full"])
    assert error.value.what == "patterns names 'paper'"
    for kinds in ([], ["row", "conv"], ["row"] * 4):
        with pytest.raises(UserError) as error:
            DALLEConfig(**SIZES, patterns=kinds)
        assert error.value.what == f"patterns has {len(kinds)} kinds and depth is 3"
        assert error.value.hint == 'give 3 kinds, one for each block, or "full" or "paper", or change depth'


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
