"""Captions of pictures: the search finds the best of all, draws are of the right distribution, in any company."""

import itertools
import math

import pytest
import torch

from dalle.caption import beam, log_priors, sampled
from dalle.model import DALLE, DALLEConfig
from dalle.rerank import text_log_likelihoods
from dvae.errors import NumericsError, UserError

WORDS, T, K, GRID = 3, 4, 5, (2, 2)
SIZES = dict(vocab_text=WORDS, text_length=T, vocab_image=K, grid=GRID, width=16, heads=2)
PADS = list(range(WORDS, WORDS + T))
ALL = [
    [*words, *PADS[length:]] for length in range(1, T + 1) for words in itertools.product(range(WORDS), repeat=length)
]  # every caption there is, 3 + 9 + 27 + 81
PICTURES = torch.tensor([[[0, 1], [2, 3]], [[4, 4], [0, 2]], [[1, 0], [0, 4]]])


def build(depth=2, both_orders=True, **changes):
    torch.manual_seed(0)
    model = DALLE(DALLEConfig(**SIZES | changes, depth=depth, both_orders=both_orders)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def table(model):
    """ln p(caption | picture) of every caption, by one whole forward for each pair: (3, 120)."""
    found = torch.empty(len(PICTURES), len(ALL), dtype=torch.float64)
    with torch.no_grad():
        for b, picture in enumerate(PICTURES):
            for n, ids in enumerate(ALL):
                chances = model(torch.tensor([ids]), picture[None], image_first=True).text[0].softmax(-1)
                told = [place for place in range(T) if place == 0 or ids[place - 1] < WORDS]  # no pad after the first
                found[b, n] = sum(math.log(chances[place, ids[place]]) for place in told)
    return found


def keys(ids):
    return [tuple(row) for row in ids.tolist()]


def test_a_wide_beam_finds_the_best_of_all_captions_in_their_order(model, table):
    for b, found in enumerate(beam(model, PICTURES, width=200, count=200)):
        order = table[b].argsort(descending=True)
        assert keys(found.text_ids) == [tuple(ALL[n]) for n in order]
        torch.testing.assert_close(found.logprobs, table[b][order], atol=1e-10, rtol=0)
        assert found.drawn is None


def test_a_beam_of_half_the_captions_still_finds_the_best_and_a_greedy_one_is_greedy(model, table):
    for b, (wide, greedy) in enumerate(zip(beam(model, PICTURES, 40), beam(model, PICTURES, 1), strict=True)):
        assert keys(wide.text_ids) == [tuple(ALL[table[b].argmax()])]
        ids = []
        for place in range(T):  # by hand: the likeliest of what may come next
            full = torch.tensor([[*ids, *[0] * (T - place)]])
            logits = model(full, PICTURES[b : b + 1], image_first=True).text[0, place]
            may = [WORDS + place] if ids and ids[-1] >= WORDS else [*range(WORDS), *[WORDS + place] * bool(ids)]
            ids.append(max(may, key=lambda i: logits[i].item()))
        assert keys(greedy.text_ids) == [tuple(ids)]
        torch.testing.assert_close(greedy.logprobs[0], table[b][ALL.index(ids)], atol=1e-10, rtol=0)


@pytest.mark.parametrize("settings", [dict(), dict(temperature=2.0), dict(top_p=0.8), dict(top_k=2)], ids=str)
def test_log_probabilities_are_those_of_the_plain_model(model, table, settings):
    for b, found in enumerate(sampled(model, PICTURES, 50, seed=3, **settings)):
        expected = table[b][[ALL.index(list(ids)) for ids in keys(found.text_ids)]]
        torch.testing.assert_close(found.logprobs, expected, atol=1e-10, rtol=0)
        assert (found.logprobs.diff() <= 0).all() and len(set(keys(found.text_ids))) == len(found.text_ids)
        assert found.drawn.sum() == 50
        scored = text_log_likelihoods(model, found.text_ids, PICTURES[b : b + 1])[:, 0]
        torch.testing.assert_close(found.logprobs, scored, atol=1e-10, rtol=0)


def chances_by_hand(model, picture, temperature, top_k):
    """Of each caption, drawn id by id from what may stand there."""
    with torch.no_grad():
        whole = model(torch.tensor(ALL), picture[None].expand(len(ALL), -1, -1), image_first=True).text
    found = []
    for ids, logits in zip(ALL, whole.tolist(), strict=True):
        chance = 1.0
        for place, i in enumerate(ids):
            ended = place > 0 and ids[place - 1] >= WORDS
            may = [WORDS + place] if ended else [*range(WORDS), *[WORDS + place] * (place > 0)]
            may = sorted(may, key=lambda j: -logits[place][j])[:top_k]
            weights = {j: math.exp(logits[place][j] / temperature) for j in may}
            chance *= weights.get(i, 0.0) / sum(weights.values())
        found.append(chance)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.7, None), (1.5, 2)])
def test_draws_have_the_known_distribution(model, temperature, top_k):
    """Chi-square over the captions that are expected five times or more, the others together."""
    draws, picture = 3000, PICTURES[1]
    chances = chances_by_hand(model, picture, temperature, top_k)
    assert chances.sum().item() == pytest.approx(1)
    (found,) = sampled(model, picture[None], draws, temperature, top_k, seed=5, rows=3000)
    counts = torch.zeros(len(ALL), dtype=torch.float64)
    for ids, times in zip(keys(found.text_ids), found.drawn.tolist(), strict=True):
        counts[ALL.index(list(ids))] = times
    assert not counts[chances == 0].any()
    often = chances * draws >= 5
    expected = torch.cat([chances[often], chances[~often].sum()[None]]) * draws
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    kept = expected > 0
    statistic = ((seen - expected)[kept] ** 2 / expected[kept]).sum().item()
    degrees = int(kept.sum()) - 1
    # Wilson and Hilferty: the cube root of chi-square over its degrees is nearly normal; below 1 in 10,000 by chance
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    assert degrees > 5 and z < 3.7


@pytest.mark.parametrize("rows", [1, 2, 7, 500])
def test_rows_at_a_time_and_company_change_nothing(model, rows):
    for find in (
        lambda tokens, rows: beam(model, tokens, 6, 3, rows=rows),
        lambda tokens, rows: sampled(model, tokens, 9, temperature=1.3, seed=2, rows=rows),
    ):
        together = find(PICTURES, 256)
        for apart in (find(PICTURES, rows), [find(picture[None], rows)[0] for picture in PICTURES]):
            for one, other in zip(together, apart, strict=True):
                assert torch.equal(one.text_ids, other.text_ids)
                torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-12, rtol=0)


def test_a_seed_draws_the_same_and_more_draws_keep_the_first(model):
    few, many, other = (sampled(model, PICTURES, n, seed=s) for n, s in ((5, 1), (40, 1), (40, 2)))
    for a, b, again in zip(few, many, sampled(model, PICTURES, 5, seed=1), strict=True):
        assert torch.equal(a.text_ids, again.text_ids) and torch.equal(a.drawn, again.drawn)
        assert set(keys(a.text_ids)) <= set(keys(b.text_ids))
    assert any(keys(a.text_ids) != keys(b.text_ids) for a, b in zip(many, other, strict=True))


def test_no_caption_is_empty_and_after_its_end_come_the_pads_of_their_places():
    """Of a model that would rather say nothing, or a pad at the wrong place."""
    model = build()
    with torch.no_grad():
        model.text_head.weight[WORDS:] *= 20
    for found in (*beam(model, PICTURES, 30, 30), *sampled(model, PICTURES, 200)):
        assert all(list(ids) in ALL for ids in keys(found.text_ids))


@pytest.mark.parametrize("changes", [dict(text_length=1), dict(patterns="paper"), dict(vocab_text=1)], ids=str)
def test_smallest_sizes_and_patterns(changes):
    model = build(**changes)
    config = model.config
    found = beam(model, PICTURES, 500, 500)
    lengths = range(1, config.text_length + 1)
    assert all(len(each.text_ids) == sum(config.vocab_text**length for length in lengths) for each in found)
    for each, picture in zip(found, PICTURES, strict=True):
        scored = text_log_likelihoods(model, each.text_ids, picture[None])[:, 0]
        torch.testing.assert_close(each.logprobs, scored, atol=1e-10, rtol=0)


def test_the_picture_is_read_once(model, monkeypatch):
    read = []
    prefill = model.prefill_image
    monkeypatch.setattr(model, "prefill_image", lambda tokens: read.append(len(tokens)) or prefill(tokens))
    beam(model, PICTURES, 8, 4)
    sampled(model, PICTURES, 8)
    assert read == [3, 3]


def test_ln_p_of_a_text_is_that_of_the_first_order(model):
    ids = torch.tensor(ALL)
    with torch.no_grad():
        logits = model(ids, PICTURES[:1].expand(len(ALL), -1, -1)).text
    each = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    each[:, 1:][ids[:, :-1] >= WORDS] = 0  # pads after the first
    expected = each.sum(1)
    torch.testing.assert_close(log_priors(model, ids), expected, atol=1e-10, rtol=0)
    assert log_priors(build(both_orders=False), ids[:2]).shape == (2,)


@pytest.mark.parametrize(
    "find, settings, what",
    [
        (beam, dict(width=0), "width is 0"), (beam, dict(width=2, count=3), "width is 2, count 3"),
        (beam, dict(count=0), "count is 0"), (beam, dict(width=2.5), "width"), (beam, dict(rows=0), "rows"),
        (sampled, dict(count=0), "count is 0"), (sampled, dict(count=True), "count"),
        (sampled, dict(temperature=0), "temperature"), (sampled, dict(temperature=-1.0), "temperature"),
        (sampled, dict(temperature=math.nan), "temperature"), (sampled, dict(top_k=0), "top_k"),
        (sampled, dict(top_k=8), "top_k"), (sampled, dict(top_p=0.0), "top_p"), (sampled, dict(seed=-1), "seed"),
        (sampled, dict(seed=2**63), "seed"),
    ],
    ids=lambda given: getattr(given, "__name__", str(given)),
)  # fmt: skip
def test_settings_out_of_their_range(model, find, settings, what):
    with pytest.raises(UserError, match=what) as caught:
        find(model, PICTURES, **settings)
    assert caught.value.hint


@pytest.mark.parametrize("find", [beam, sampled])
def test_a_model_of_one_order_and_tokens_that_are_none(model, find):
    with pytest.raises(UserError, match="words before pictures only") as caught:
        find(build(both_orders=False), PICTURES)
    assert "--model.image_first.share 0.25" in caught.value.hint
    for tokens in (PICTURES[0], PICTURES[:, :1], PICTURES[:0], PICTURES + 1, PICTURES - 1):
        with pytest.raises(UserError, match="token"):
            find(model, tokens)


@pytest.mark.parametrize("find", [beam, sampled])
def test_logits_that_are_no_numbers(find):
    model = build()
    with torch.no_grad():
        model.text_head.weight[0, 0] = math.nan
    with pytest.raises(NumericsError, match="text id 0"):
        find(model, PICTURES)
