"""Shares, their intervals, and the table of candidates, on verdicts that are known beforehand."""

import math
from types import SimpleNamespace

import pytest
import torch

from dalle.candidates import Candidates, Settings, Share, diversity, draw_and_judge, fit
from dalle.pipeline import load
from dalle.sampling import Sampled
from dalle.text import Text
from dvae import scenes
from dvae.errors import UserError


@pytest.mark.parametrize(
    "hits, trials, low, high",
    [  # Newcombe 1998, table I, method 3; and Wilson's closed forms at the ends
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilsons_interval(hits, trials, low, high):
    share = Share(hits, trials)
    assert share.value == pytest.approx(hits / trials)
    assert share.interval == pytest.approx((low, high), abs=5e-5)
    mirrored = Share(trials - hits, trials).interval
    assert mirrored == pytest.approx((1 - share.interval[1], 1 - share.interval[0]))


def test_the_ends_of_the_interval_are_where_the_score_test_rejects():
    share = Share(37, 400)
    for end in share.interval:
        assert abs(share.value - end) / math.sqrt(end * (1 - end) / 400) == pytest.approx(1.959964, rel=1e-6)


def test_a_share_as_text_and_as_json():
    share = Share(81, 263)
    assert str(share) == " 30.8 % [25.5, 36.6]"
    assert share.json() == {"value": share.value, "low": share.interval[0], "high": share.interval[1], "trials": 263}


@pytest.fixture
def candidates() -> Candidates:
    exact = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]).bool()
    scores = {"good": exact.float(), "bad": -exact.float(), "flat": torch.zeros(3, 4)}
    return Candidates(["a", "b", "c"], torch.zeros(3, 4, 3, 8, 8, dtype=torch.uint8), exact, scores)


def test_shares_of_candidates(candidates):
    assert candidates.share("good") == Share(2, 3)
    assert candidates.share("bad") == Share(0, 3)
    assert candidates.ceiling() == Share(2, 3)
    assert candidates.single.value == pytest.approx(4 / 12) and candidates.single.trials == 3
    assert candidates.best("good").tolist() == [0, 0, 0] and candidates.best("bad").tolist() == [1, 0, 3]
    assert candidates.best("flat").tolist() == [0, 0, 0], "equals keep the order of drawing"


def test_best_of_fewer_is_the_mean_over_groups(candidates):
    """By hand: groups of two are (1 0)(0 0), (0 0)(0 0), (1 1)(1 0)."""
    for ranker, hits in (("good", 0.5 + 0 + 1), ("bad", 0 + 0 + 0.5), ("flat", 0.5 + 0 + 1)):
        assert candidates.share(ranker, 2) == Share(hits, 3)
        assert candidates.share(ranker, 1) == candidates.single
    assert candidates.ceiling(2) == Share(1.5, 3) and candidates.ceiling(1) == candidates.single


def test_the_gap_that_a_ranker_closes():
    exact = torch.rand(300, 8) < 0.3
    noise = torch.rand(300, 8)
    scores = {"oracle": exact.float(), "chance": noise, "half": exact.float() + (noise < 0.4), "nan": noise * math.nan}
    drawn = Candidates([""] * 300, torch.zeros(300, 8, 3, 1, 1, dtype=torch.uint8), exact, scores)
    assert drawn.gap("oracle") == (1.0, 1.0, 1.0) and drawn.gap("oracle", 4)[0] == 1.0
    value, low, high = drawn.gap("chance")
    assert low < 0 < high and low < value < high
    value, low, high = drawn.gap("half")
    expected = drawn.share("half").value - drawn.single.value
    assert value == pytest.approx(expected / (drawn.ceiling().value - drawn.single.value), abs=1e-6)
    assert 0 < low < value < high < 1
    same = Candidates(["a"] * 3, drawn.images[:3], torch.ones(3, 8).bool(), {"x": noise[:3]})
    assert same.gap("x") is None


def judged(prompts: int, weights: dict[str, float]) -> Candidates:
    """Eight candidates each, one of them true, with chances that are a softmax of the weighted sum of their scores."""
    random = torch.Generator().manual_seed(0)
    scales = {"a": 1, "b": 20, "c": 3}
    scores = {name: torch.randn(prompts, 8, generator=random) * scale for name, scale in scales.items()}
    utility = sum(weight * scores[name] for name, weight in weights.items())
    chosen = torch.multinomial(utility.softmax(1), 1, generator=random)
    exact = torch.zeros(prompts, 8, dtype=torch.bool).scatter(1, chosen, True)
    return Candidates([""] * prompts, torch.zeros(prompts, 8, 3, 1, 1, dtype=torch.uint8), exact, scores)


def test_fitted_weights_are_those_that_decided():
    """Recovered up to their common scale, whatever the scales of the scores; what does not matter is left out."""
    weights = fit([judged(1500, {"a": 2.0, "b": 0.05}), judged(1500, {"a": 2.0, "b": 0.05})], ["a", "b", "c"], ridge=0)
    assert weights["a"] == 1.0 and weights["b"] == pytest.approx(0.025, rel=0.15)
    assert weights.get("c", 0.0) < 0.02
    misled = fit([judged(1500, {"a": 1.0, "c": -0.5})], ["a", "c"], ridge=0)  # a score that misleads is not turned
    assert misled.get("c", 0.0) < 0.05 and misled["a"] == 1.0


def test_the_unit_of_a_score_does_not_decide_whether_it_counts():
    drawn = judged(500, {"a": 1.0, "c": 0.2})
    finer = Candidates(drawn.captions, drawn.images, drawn.exact, drawn.scores | {"a": drawn.scores["a"] / 1000})
    weights, finely = fit([drawn], ["a", "c"]), fit([finer], ["a", "c"])
    assert finely["c"] / finely["a"] == pytest.approx(weights["c"] / weights["a"] / 1000, rel=0.01)


def test_what_teaches_nothing_gives_no_weights():
    drawn = judged(20, {"a": 1.0})
    for exact in (torch.ones(20, 8).bool(), torch.zeros(20, 8).bool()):
        same = Candidates(drawn.captions, drawn.images, exact, drawn.scores)
        assert fit([same], ["a", "b"]) is None
        mixed = fit([same, judged(300, {"a": 1.0, "b": 0.05})], ["a", "b"])
        assert mixed == fit([judged(300, {"a": 1.0, "b": 0.05})], ["a", "b"])


def test_diversity_by_hand():
    images = torch.zeros(2, 3, 3, 32, 32, dtype=torch.uint8)
    images[0, 1] = 255  # of one prompt: black, white, black; of the other: all black
    assert diversity(images) == pytest.approx((4 / 6 + 0) / 2)
    assert math.isnan(diversity(images[:, :1]))


class Fake:
    """Draws true pictures where token 0 is 1, and of another scene elsewhere; a token's value is its candidate."""

    def __init__(self, captions: list[str], true: torch.Tensor):
        self.truth, self.model, self.tokenizer, self.text = true, None, self, Text.train(captions, 300, 24)
        self.pictures = scenes.draw([scenes.scene("val", index) for index in range(len(captions) + 1)], 32)
        self.known, self.asked, self.told = {caption: k for k, caption in enumerate(captions)}, [], []

    def sample(self, captions, count, seeds, **settings):
        self.asked.append((list(captions), count, list(seeds), settings))
        prompts = torch.tensor([self.known[caption] for caption in captions]).repeat_interleave(count)
        numbers = torch.arange(count).repeat(len(captions))
        tokens = torch.stack([prompts, numbers], 1)[:, None]  # (B, 1, 2)
        return Sampled(tokens, -numbers[:, None].float(), None)

    def decode(self, tokens):
        prompts, numbers = tokens[:, 0].unbind(1)
        wrong = (prompts + 1) % len(self.pictures)
        shown = torch.where(self.truth[prompts, numbers], prompts, wrong)
        return self.pictures[shown].float() / 255

    def evidence(self, ids, sampled):
        assert ids.shape == (1, 24) and len(sampled.tokens) == self.truth.shape[1]
        prompts = sampled.tokens[:, 0, 0]
        assert (prompts == prompts[0]).all()
        self.told.append(self.text.decode(ids))

        def score(name):
            return sampled.logprobs.sum(1) if name == "first" else self.truth[prompts, sampled.tokens[:, 0, 1]].float()

        return SimpleNamespace(score=score)


@pytest.mark.parametrize("prompts, count", [(5, 4), (5, 100)])
def test_draw_and_judge_puts_every_verdict_in_its_place(prompts, count):
    """With 100 candidates each, the prompts are drawn two at a time."""
    captions = [scenes.captions("val", index)[0] for index in range(prompts)]
    assert len(set(captions)) == prompts
    truth = torch.rand(prompts, count) < 0.4
    truth[1], truth[2, 0], truth[3, 0] = False, True, False
    fake, done = Fake(captions, truth), []
    settings = Settings(temperature=0.7, guidance=2.0)
    found = draw_and_judge(fake, captions, count, range(50, 50 + prompts), settings, ["first", "oracle"], done.append)

    assert torch.equal(found.exact, truth)
    assert found.captions == captions and fake.told == [fake.text.decode(fake.text.encode(c)) for c in captions]
    assert found.images.shape == (prompts, count, 3, 32, 32)
    assert torch.equal(found.images[2, 0], fake.pictures[2])
    assert found.best("first").tolist() == [0] * prompts
    assert found.share("first") == Share(int(truth[:, 0].sum()), prompts)
    assert found.share("oracle") == found.ceiling() == Share(int(truth.any(1).sum()), prompts)
    assert sum(done) == prompts and len(fake.asked) == len(done)
    assert [seed for _, _, seeds, _ in fake.asked for seed in seeds] == list(range(50, 50 + prompts))
    assert all(asked[3] == {"temperature": 0.7, "guidance": 2.0} for asked in fake.asked)


def test_a_real_pipeline_is_judged_by_what_it_draws_alone(tiny_dalle):
    pipeline = load(tiny_dalle)
    captions = [scenes.captions("val", index)[0] for index in range(3)]
    found = draw_and_judge(pipeline, captions, 2, [7, 8, 9], Settings(), ["half-pmi", "contrast"])
    for p, caption in enumerate(captions):
        for ranker in ("half-pmi", "contrast"):
            best = pipeline(caption, 2, 1, seed=7 + p, rerank=ranker)[0]
            assert int(found.best(ranker)[p]) == best.number
            assert torch.equal(found.images[p, best.number], best.image)
            assert found.scores[ranker][p, best.number].item() == pytest.approx(best.score, abs=1e-4)
    other = captions[1:] + captions[:1]
    wrong = draw_and_judge(pipeline, captions, 2, [7, 8, 9], Settings(), ["likelihood", "contrast"], told=other)
    assert torch.equal(wrong.images, found.images) and torch.equal(wrong.exact, found.exact)
    for p, caption in enumerate(other):
        tokens = pipeline.sample([captions[p]], 2, 7 + p).tokens
        logits = pipeline.model(pipeline.text.encode([caption] * 2), tokens).image.log_softmax(-1)
        expected = logits.gather(2, tokens.flatten(1)[..., None]).sum((1, 2))
        torch.testing.assert_close(wrong.scores["likelihood"][p], expected, atol=1e-3, rtol=0)


def test_judges_and_rankers_from_outside_see_painted_pictures(tiny_dalle):
    pipeline, seen = load(tiny_dalle), []

    def judge(pictures, captions):
        seen.append((pictures, captions))
        return (pictures.mean((1, 2, 3)) > 0.4).tolist()

    def brightness(pictures, caption):
        assert caption in ("a red circle", "a blue square")
        return pictures.mean((1, 2, 3))

    found = draw_and_judge(pipeline, ["a red circle", "a blue square"], 3, [1, 2], Settings(), ["none"], judge=judge,
                           pixel_scorers={"bright": brightness})  # fmt: skip
    assert [len(pictures) for pictures, _ in seen] == [6] and seen[0][1] == ["a red circle"] * 3 + ["a blue square"] * 3
    means = (found.images.float() / 255).mean((2, 3, 4))
    torch.testing.assert_close(found.scores["bright"], means)
    assert torch.equal(found.exact, means > 0.4)


def test_one_seed_for_each_prompt(tiny_dalle):
    with pytest.raises(UserError, match="seeds"):
        draw_and_judge(load(tiny_dalle), ["a red circle"] * 2, 2, [1], Settings(), ["none"])
