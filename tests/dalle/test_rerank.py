"""Scores against one plain forward for each caption and picture."""

import math

import pytest
import torch

from dalle import rerank
from dalle.model import DALLE, DALLEConfig
from dalle.rerank import NAMES, log_likelihoods, nearest, rank, scorer, text_log_likelihoods
from dalle.sampling import Sampled, sample
from dvae.errors import UserError

BPE, T, K = 20, 4, 9
NULL = torch.arange(BPE, BPE + T)[None]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(vocab_text=BPE, text_length=T, vocab_image=K, grid=(2, 3), depth=2, width=16, heads=2)
    model = DALLE(DALLEConfig(**sizes, both_orders=True))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


@pytest.fixture(scope="module")
def drawn(model):
    return sample(model, caption(1, 2, 3), 7, null_ids=NULL, guidance=2.0)


def caption(*words):
    return torch.tensor([[*words, *range(BPE + len(words), BPE + T)]])


def by_forward(model, text_ids, tokens):
    """ln p(picture | caption), caption by caption, picture by picture, token by token."""
    table = torch.zeros(len(text_ids), len(tokens), dtype=torch.float64)
    with torch.no_grad():
        for p, text in enumerate(text_ids):
            for n, picture in enumerate(tokens):
                chances = model(text[None], picture[None]).image[0].softmax(-1)
                for cell, token in enumerate(picture.flatten().tolist()):
                    table[p, n] += math.log(chances[cell, token])
    return table


@pytest.mark.parametrize("room", [1, 2 * 6 * K, 2**25])  # pictures in a pass: 1, 2, all
def test_log_likelihoods_are_those_of_forward(model, drawn, room, monkeypatch):
    monkeypatch.setattr(rerank, "_LOGITS", room)
    texts = torch.cat([caption(1, 2, 3), caption(4), NULL])
    expected = by_forward(model, texts, drawn.tokens)
    found = log_likelihoods(model, texts, drawn.tokens)
    assert found.shape == (3, 7) and expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_likelihood_and_pmi(model, drawn):
    plain, null = by_forward(model, torch.cat([caption(1, 2, 3), NULL]), drawn.tokens)
    alone = drawn._replace(null=None)
    scores = {"none": plain * 0, "likelihood": plain, "pmi": plain - null, "half-pmi": plain - null / 2}
    for name, expected in scores.items():
        for sampled in (drawn, alone):
            found = scorer(name, null_ids=NULL)(model, caption(1, 2, 3), sampled)
            torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_contrast_is_the_posterior_among_the_nearest_captions(model, drawn):
    prompt = caption(1, 2, 3)
    near = [caption(3, 2, 1)] + [caption(1, 2, 3, i) for i in range(4, 7)]
    far = [caption(1, 2)] + [caption(i) for i in range(10, 20)]
    captions_ids = torch.cat([far[-1], prompt, *near, *far])
    rows = torch.cat([prompt, *near])
    table = by_forward(model, rows, drawn.tokens).exp()
    expected = (table[0] / table.mean(0)).log()
    found = scorer("contrast", captions_ids)(model, prompt, drawn)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found < math.log(5)).all() and found.std() > 0.01
    assert torch.equal(found, scorer("contrast", captions_ids)(model, prompt, drawn))


def test_contrast_without_other_captions_knows_no_difference(model, drawn):
    prompt = caption(1, 2, 3)
    assert scorer("contrast", prompt)(model, prompt, drawn).abs().max() < 1e-6


@pytest.mark.parametrize("room", [1, 2 * T * (BPE + T), 2**25])
def test_captions_are_scored_by_the_other_order(model, drawn, room, monkeypatch):
    monkeypatch.setattr(rerank, "_LOGITS", room)
    texts = torch.cat([caption(1, 2, 3), caption(4), NULL, caption(5, 6, 7, 8)])
    expected = torch.zeros(4, 7, dtype=torch.float64)
    model.requires_grad_(False)
    for p, text in enumerate(texts):
        for n, picture in enumerate(drawn.tokens):
            chances = model(text[None], picture[None], image_first=True).text[0].softmax(-1)
            ends = [place for place, i in enumerate(text.tolist()) if i >= BPE][:1]  # the first pad is told, no other
            told = [place for place, i in enumerate(text.tolist()) if i < BPE] + ends
            expected[p, n] = sum(math.log(chances[place, text[place]]) for place in told)
    assert expected.std() > 0.1
    torch.testing.assert_close(text_log_likelihoods(model, texts, drawn.tokens), expected, atol=1e-10, rtol=0)
    found = scorer("caption")(model, caption(1, 2, 3), drawn)
    torch.testing.assert_close(found, expected[0], atol=1e-10, rtol=0)


def repaint(tokens):
    return (tokens + tokens.roll(1, 2)) % K


def test_what_is_seen_is_scored_like_what_was_drawn(model, drawn):
    """Of the tokens read in the painted pictures everything is computed anew, nothing is left from sampling."""
    prompt, captions_ids = caption(1, 2, 3), torch.cat([caption(1, 2), caption(3), caption(7, 8)])
    seen = repaint(drawn.tokens)
    own, null = by_forward(model, torch.cat([prompt, NULL]), seen)
    table = by_forward(model, torch.cat([prompt, captions_ids]), seen).exp()
    expected = {
        "likelihood-seen": own,
        "pmi-seen": own - null,
        "half-pmi-seen": own - null / 2,
        "contrast-seen": (table[0] / table.mean(0)).log(),
        "caption-seen": text_log_likelihoods(model, prompt, seen)[0],
    }
    assert {name for name in NAMES if name.endswith("-seen")} == set(expected)
    for name, values in expected.items():
        found = scorer(name, captions_ids, NULL, repaint)(model, prompt, drawn)
        torch.testing.assert_close(found, values, atol=1e-6, rtol=0)


def test_combined_is_the_weighted_sum_and_repaints_once(model, drawn):
    weights, asked = {"caption-seen": 1.5, "likelihood": 0.25, "likelihood-seen": 0.5}, []

    def counted(tokens):
        asked.append(len(tokens))
        return repaint(tokens)

    given = dict(captions_ids=None, null_ids=NULL, repaint=counted)
    found = scorer("combined", **given, weights=weights)(model, caption(1, 2, 3), drawn)
    assert asked == [7]
    expected = sum(w * scorer(name, **given)(model, caption(1, 2, 3), drawn) for name, w in weights.items())
    torch.testing.assert_close(found, expected)
    for lacking in ({"contrast": 1.0}, {"likelihood": 1.0, "contrast-seen": 0.1}):
        with pytest.raises(UserError, match="nothing to rank by contrast"):
            scorer("combined", **given, weights=lacking)


def test_the_default_combination_counts_against_pictures_less_likely_than_the_mean(model, drawn):
    """In deviations, however far apart the likelihoods of a data set lie; not at all for one picture, or equal ones."""
    prompt, score = caption(1, 2, 3), scorer("combined")
    spoken = scorer("caption")(model, prompt, drawn)
    likely = scorer("likelihood")(model, prompt, drawn)
    expected = spoken + ((likely - likely.mean()) / likely.std(correction=0)).minimum(torch.tensor(0.0))
    assert 0 < (expected < spoken).sum() < len(spoken)
    torch.testing.assert_close(score(model, prompt, drawn), expected)
    stretched = Sampled(drawn.tokens, 1000 * drawn.logprobs, None)
    torch.testing.assert_close(score(model, prompt, stretched), expected, atol=1e-5, rtol=0)
    for rows in ([2], [2, 2, 2]):
        same = Sampled(drawn.tokens[rows], drawn.logprobs[rows], None)
        torch.testing.assert_close(score(model, prompt, same), spoken[rows])
    damaged = drawn.logprobs.clone()
    damaged[3, 0], damaged[5, 1] = torch.nan, -torch.inf
    order = rank(score(model, prompt, drawn._replace(logprobs=damaged))).tolist()
    left = [k for k in range(len(spoken)) if k not in (3, 5)]
    alone = rank(score(model, prompt, Sampled(drawn.tokens[left], drawn.logprobs[left], None)))
    assert order[:-2] == [left[k] for k in alone] and set(order[-2:]) == {3, 5}


def test_nearest_by_definition():
    generator = torch.Generator().manual_seed(0)
    rows = [
        caption(*torch.randint(6, (int(torch.randint(1, T + 1, (1,), generator=generator)),), generator=generator))
        for _ in range(60)
    ]
    sample_ids = torch.cat(rows)
    for prompt in (rows[0], rows[7], caption(1, 2, 3), caption(19), NULL):

        def jaccard(row, prompt=prompt):
            one, two = ({i for i in ids if i < BPE} for ids in (row.tolist(), prompt[0].tolist()))
            return len(one & two) / len(one | two) if one | two else 0

        left = []
        for row in sample_ids:
            if row.tolist() != prompt[0].tolist() and row.tolist() not in [other.tolist() for other in left]:
                left.append(row)
        expected = [left[i].tolist() for i in sorted(range(len(left)), key=lambda i: (-jaccard(left[i]), i))]
        for k in (1, 8, 1000):
            assert nearest(prompt, sample_ids, k, BPE).tolist() == expected[:k]


def test_equal_words_in_another_order_are_the_nearest():
    sample_ids = torch.cat([caption(1, 2), caption(1, 2, 4), caption(3, 2, 1), caption(1, 2, 3, 5)])
    assert nearest(caption(1, 2, 3), sample_ids, 2, BPE).tolist() == [
        caption(3, 2, 1)[0].tolist(),
        caption(1, 2, 3, 5)[0].tolist(),
    ]


def test_rank():
    scores = torch.tensor([1.0, math.nan, 3.0, -math.inf, 3.0, math.inf, math.nan])
    assert rank(scores).tolist() == [5, 2, 4, 0, 3, 1, 6]
    assert rank(torch.zeros(50)).tolist() == list(range(50))


def test_unknown_and_unfed_scorers_are_refused(model):
    with pytest.raises(UserError) as error:
        scorer("clip")
    assert all(f" {name}" in error.value.hint for name in NAMES)
    for name in ("pmi", "half-pmi", "contrast"):
        with pytest.raises(UserError, match=name):
            scorer(name)
    with pytest.raises(UserError, match="contrast"):
        scorer("contrast", torch.empty(0, T, dtype=torch.int64), NULL)
    for name in ("likelihood-seen", "contrast-seen"):
        with pytest.raises(UserError, match=name):
            scorer(name, caption(1), NULL)
    captioning = [(name, None) for name in ("caption", "caption-seen", "combined")] + [("combined", {"caption": 1.0})]
    for name, weights in captioning:
        with pytest.raises(UserError, match=f"does not caption, and {name} asks"):
            scorer(name, caption(1), NULL, repaint, weights, both_orders=False)


def test_scoring_does_not_touch_what_it_scores(model, drawn):
    before = Sampled(*(column.clone() for column in drawn))
    for name in NAMES:
        scorer(name, caption(5), NULL, repaint, {"caption": 1.0, "pmi-seen": 2.0})(model, caption(1, 2, 3), drawn)
    assert all(torch.equal(one, two) for one, two in zip(before, drawn, strict=True))
