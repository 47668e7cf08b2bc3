"""Maps of the cells: each number is what its definition says, from the logits and from the attention itself."""

import math

import pytest
import torch
from torch import nn

from dalle import maps
from dalle.model import DALLE, DALLEConfig
from dalle.rerank import scorer
from dalle.sampling import Sampled
from dalle.text import Text

SIZES = dict(vocab_text=11, text_length=5, vocab_image=13, grid=(3, 4), depth=3, width=24, heads=3)
CHANGES = [{}, dict(text_length=1), dict(grid=(1, 1)), dict(text_length=1, grid=(1, 1), depth=1, heads=1)]
CHANGES += [dict(patterns="paper", depth=4, grid=(3, 13)), dict(patterns=["column", "full", "row"])]


def random_model(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = DALLE(DALLEConfig(**{**SIZES, **changes})).to(dtype)
    for parameter in model.parameters():  # far from the small initial values, so that everything matters
        nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def batch(model, rows):
    c, generator = model.config, torch.Generator().manual_seed(1)
    text = torch.randint(c.vocab_text + c.text_length, (rows, c.text_length), generator=generator)
    return text, torch.randint(c.vocab_image, (rows, *c.grid), generator=generator)


def null(model):
    return model.config.vocab_text + torch.arange(model.config.text_length)[None]


# -------------------------------------------------------------------------------------------------------------- cells


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("rows", [1, 3])
def test_cells_are_the_softmax_of_the_forward_pass(changes, rows):
    model = random_model(**changes)
    text, tokens = batch(model, rows)
    found = maps.cells(model, text, tokens, null(model), k=4)
    h, w = model.config.grid
    assert found.entropy.shape == found.logprobs.shape == found.baseline.shape == (rows, h, w)
    assert found.codes.shape == found.chances.shape == (rows, h, w, 4) and found.codes.dtype == torch.int64
    logits = model(text, tokens).image
    without = model(null(model).expand_as(text), tokens).image
    for b in range(rows):
        for row in range(h):
            for column in range(w):
                at, token = (b, row, column), tokens[b, row, column]
                p, q = (table[b, row * w + column].exp() for table in (logits, without))
                p, q = p / p.sum(), q / q.sum()
                assert found.entropy[at].item() == pytest.approx(-sum(x * math.log(x) for x in p.tolist()))
                assert found.logprobs[at].item() == pytest.approx(math.log(p[token]))
                assert found.baseline[at].item() == pytest.approx(math.log(q[token]))
                assert found.explained[at].item() == pytest.approx(math.log(p[token] / q[token]))
                best = sorted(range(len(p)), key=lambda code: -p[code])[:4]
                assert found.codes[at].tolist() == best
                torch.testing.assert_close(found.chances[at], p[best])


def test_what_the_words_explain_sums_to_the_score_pmi():
    model = random_model(torch.float32)
    text, tokens = batch(model, 3)
    for one in text:
        found = maps.cells(model, one.expand(3, -1), tokens, null(model))
        sampled = Sampled(tokens, found.logprobs.flatten(1), None)
        expected = scorer("pmi", null_ids=null(model))(model, one[None], sampled)
        torch.testing.assert_close(found.explained.sum((1, 2)), expected, atol=1e-5, rtol=0)
        assert expected.abs().max() > 0.01


def test_the_baseline_may_be_a_caption_of_each_picture():
    model = random_model()
    text, tokens = batch(model, 3)
    found = maps.cells(model, text, tokens, text.roll(1, 0))
    torch.testing.assert_close(found.baseline, maps.cells(model, text.roll(1, 0), tokens, text).logprobs)
    assert torch.equal(maps.cells(model, text, tokens, text).explained, torch.zeros(3, 3, 4, dtype=torch.float64))


def test_many_pictures_are_as_one_by_one():
    model = random_model()
    text, tokens = batch(model, maps._AT_ONCE + 3)
    together = maps.cells(model, text, tokens, null(model))
    alone = [maps.cells(model, text[b : b + 1], tokens[b : b + 1], null(model)) for b in range(len(text))]
    for column, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(column, torch.cat(parts))


def test_one_code_and_float32_even_of_16_bits():
    model = random_model(torch.bfloat16, vocab_image=1)
    text, tokens = batch(model, 2)
    found = maps.cells(model, text, tokens, null(model))
    assert found.codes.shape == (2, 3, 4, 1)
    assert found.entropy.dtype == torch.float32
    assert not any(table.any() for table in (found.entropy, found.logprobs, found.codes)) and (found.chances == 1).all()


# ---------------------------------------------------------------------------------------------------------- attention


def over_states(seen):
    """(B, D, H, N, S): the parts put back where the sequence has them."""
    return torch.cat([seen.starts[..., :1], seen.text, seen.starts[..., 1:], seen.cells[..., :-1]], -1)


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("rows", [1, 3])
def test_weights_times_values_are_the_attention_of_each_block(changes, rows):
    model = random_model(**changes)
    text, tokens = batch(model, rows)
    seen = maps.attention(model, text, tokens)
    c, cells = model.config, model.layout.cells
    assert seen.text.shape == (rows, c.depth, c.heads, cells, c.text_length)
    assert seen.cells.shape == (rows, c.depth, c.heads, cells, cells)
    assert seen.starts.shape == (rows, c.depth, c.heads, cells, 2)

    passed = []
    for block in model.blocks:
        block.attention.register_forward_hook(lambda _, given, out: passed.append((given[0], out)))
    model(text, tokens)
    assert len(passed) == c.depth
    size = c.width // c.heads
    for layer, (x, expected) in enumerate(passed):
        attention = model.blocks[layer].attention
        values = attention.qkv(x)[..., 2 * c.width :]
        mixed = torch.empty(rows, cells, c.width, dtype=torch.float64)
        for head in range(c.heads):
            own = slice(head * size, (head + 1) * size)
            mixed[..., own] = over_states(seen)[:, layer, head] @ values[..., own]
        torch.testing.assert_close(attention.out(mixed), expected[:, model.layout.image], atol=1e-12, rtol=0)


@pytest.mark.parametrize("changes", CHANGES)
def test_rows_are_probabilities_of_what_came_before(changes):
    model = random_model(**changes)
    seen = maps.attention(model, *batch(model, 2))
    every = over_states(seen)
    torch.testing.assert_close(every.sum(-1), torch.ones_like(every[..., 0]), atol=1e-12, rtol=0)
    for layer, kind in enumerate(model.config.kinds):
        found = every[:, layer] > 0
        assert torch.equal(found, model.layout.mask(kind)[model.layout.image].expand_as(found))
    assert torch.equal(seen.cells.triu(), torch.zeros_like(seen.cells))


def test_a_later_cell_moves_no_earlier_map():
    model = random_model()
    text, tokens = batch(model, 2)
    other = tokens.clone()
    other[:, 1, 1] = (other[:, 1, 1] + 1) % 13  # cell 5, which is read from cell 6 on
    one, two = (over_states(maps.attention(model, text, grid)) for grid in (tokens, other))
    assert torch.equal(one[..., :6, :], two[..., :6, :])
    assert ((one - two)[..., 6:, :].abs().amax(-1) > 1e-9).all()


def test_looking_leaves_no_trace():
    model = random_model()
    text, tokens = batch(model, 2)
    before = model(text, tokens).image
    first = maps.attention(model, text, tokens)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(text, tokens).image, before)
    assert torch.equal(over_states(first), over_states(maps.attention(model, text, tokens)))
    with pytest.raises(IndexError):
        maps.attention(model, text + 1000, tokens)
    assert not any(module._forward_pre_hooks for module in model.modules())


# -------------------------------------------------------------------------------------------------------------- words


def test_pieces_are_named_and_pads_are_one():
    text = Text.train(["red circle", "red square"], 300, 6)
    weights = torch.rand(2, 3, 6)
    names, merged = maps.by_piece(text, text.encode("Red  circle")[0], weights)
    assert names == ["red", "circle", "pads"]
    torch.testing.assert_close(merged[..., :2], weights[..., :2])
    torch.testing.assert_close(merged[..., 2], weights[..., 2:].sum(-1))

    names, merged = maps.by_piece(text, text.null()[0], weights)
    assert names == ["pads"] and merged.shape == (2, 3, 1)
    names, merged = maps.by_piece(text, text.encode("red " * 9)[0], weights)
    assert names == ["red"] * 6 and torch.equal(merged, weights)
    names, _ = maps.by_piece(text, text.encode("é ")[0], weights)  # a space, and the two bytes of the letter
    assert names == ["␣", "\ufffd", "\ufffd", "pads"]


def test_selectivity_of_known_cases():
    eye = torch.eye(4, dtype=torch.float64)
    assert maps.selectivity(eye).item() == pytest.approx(math.log(4))  # each cell has a word of its own
    assert maps.selectivity(0.1 * eye).item() == pytest.approx(0.1 * math.log(4))  # mostly looks elsewhere
    same = torch.tensor([0.7, 0.1, 0.0, 0.1], dtype=torch.float64)
    assert maps.selectivity(same.expand(9, 4)).item() == pytest.approx(0, abs=1e-12)
    # more or less of the same words is no choice between words
    assert maps.selectivity(torch.rand(9, 1, dtype=torch.float64) * same).item() == pytest.approx(0, abs=1e-12)
    assert maps.selectivity(torch.zeros(2, 3, 9, 4)).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert maps.selectivity(torch.zeros(9, 0)).item() == 0  # an empty caption
    assert 0 < maps.selectivity(1e-36 * torch.eye(4)).item() < 1e-35  # a sharp head that looks elsewhere


def test_selectivity_is_mutual_information_times_the_share():
    weights = torch.rand(2, 7, 5, dtype=torch.float64) / 6
    for one, found in zip(weights, maps.selectivity(weights), strict=True):
        share = one.sum() / 7
        joint = one / one.sum()
        expected = sum(
            joint[c, p] * math.log(joint[c, p] / (joint[c].sum() * joint[:, p].sum()))
            for c in range(7)
            for p in range(5)
        )
        assert found.item() == pytest.approx((share * expected).item())
        assert found > 0.001
