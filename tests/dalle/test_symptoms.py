"""The numbers of a diagnosis against their definitions, and what they say of things that are known."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dalle import pipeline, symptoms
from dalle.model import DALLE, DALLEConfig, losses
from dvae.data import open_source
from dvae.tokenizer import load

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.1, 0.2, 0.9)}


@pytest.fixture
def coloured() -> tuple[list[str], torch.Tensor]:
    """120 noisy pictures and the words for their colours."""
    captions = [f"a {name} thing" for name, _ in zip(itertools.cycle(COLOURS), range(120), strict=False)]
    flat = torch.tensor([COLOURS[caption.split()[1]] for caption in captions])
    return captions, (flat[:, :, None, None] + 0.3 * torch.randn(120, 3, 16, 16)).clamp(0, 1)


@pytest.fixture(scope="module")
def model() -> DALLE:
    torch.manual_seed(0)
    model = DALLE(DALLEConfig(20, 4, 12, (2, 3), depth=2, width=32, heads=2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def pairs(model: DALLE, count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    c = model.config
    return torch.randint(0, c.vocab_text, (count, c.text_length)), torch.randint(0, c.vocab_image, (count, *c.grid))


def test_captions_that_belong_to_their_pictures_are_told_from_shuffled_ones(coloured):
    captions, images = coloured
    assert symptoms.dependence(captions, images) > 10
    orders = [torch.randperm(120, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    shuffled = [symptoms.dependence([captions[k] for k in order], images) for order in orders]
    assert sum(z > 3 for z in shuffled) == 0 and sum(z > 5 for z in shuffled) == 0


def test_what_does_not_vary_tells_nothing(coloured):
    captions, images = coloured
    assert math.isnan(symptoms.dependence(["the same"] * 120, images))
    assert math.isnan(symptoms.dependence(captions, torch.full((120, 3, 16, 16), 0.3)))
    assert math.isnan(symptoms.dependence([""] * 120, images))
    assert math.isnan(symptoms.dependence([f"{k}" for k in range(120)], images))  # no word stands in two captions


def test_a_picture_of_one_colour_has_no_contrast():
    images = torch.zeros(4, 3, 8, 8)
    images[0, 0], images[1], images[2, 1, :, ::2] = 1.0, 0.5, 1.0  # red, grey, green stripes, black
    assert symptoms.contrast(images).tolist() == pytest.approx([0, 0, 0.504, 0], abs=1e-3)


def test_real_scenes_are_far_above_chance():
    source = open_source("scenes:train:200", 32)
    captions = [source.captions(row)[0] for row in range(200)]
    assert symptoms.dependence(captions, source.images(range(200)).float() / 255) > 8


class Faded(nn.Module):
    """Sees the mean of each cell in 8 x 8 pixels, rounded to a half, and paints it darker and flatter than it was."""

    grid, vocab_size = (2, 2), 27

    def logits(self, images):
        levels = (F.adaptive_avg_pool2d(images, self.grid) * 2).round().long()  # 0, 1, 2 for each channel
        tokens = levels[:, 0] * 9 + levels[:, 1] * 3 + levels[:, 2]
        return 50.0 * F.one_hot(tokens, self.vocab_size).movedim(-1, 1).float()

    def decode(self, tokens):
        levels = torch.stack([tokens // 9, tokens // 3 % 3, tokens % 3], 1) / 2
        return F.interpolate(0.5 * levels + 0.1, (8, 8))

    def decode_soft(self, probabilities):
        return self.decode(probabilities.argmax(1))


def test_reconstructions_beside_a_mosaic_and_what_a_stretch_would_win():
    levels = torch.randint(0, 3, (40, 3, 2, 2)) / 2
    images = F.interpolate(levels.float(), (8, 8))
    images[:, :, ::2, ::2] += 0.02  # a texture that neither keeps
    images = images.clamp(0, 1)
    found = symptoms.reconstructed(Faded(), images)
    decoded = Faded().decode(Faded().logits(images).argmax(1))
    expected = [-10 * math.log10((a - b).square().mean()) for a, b in zip(decoded, images, strict=True)]
    assert torch.allclose(found.each, torch.tensor(expected, dtype=torch.float64), atol=1e-4)
    assert found.hard == pytest.approx(sum(expected) / 40, abs=1e-4) and found.soft == found.hard
    cells = images.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
    mosaic = cells.repeat_interleave(4, 2).repeat_interleave(4, 3)
    errors = (mosaic - images).square().mean((1, 2, 3))
    assert found.mosaic == pytest.approx(-10 * errors.log10().mean().item(), abs=1e-3)
    assert found.stretched > found.hard + 10  # the fading is undone
    assert found.tokens.shape == (40, 2, 2)


def test_a_tokenizer_of_ours_is_read_like_any_other(tiny_dvae):
    tokenizer, source = load(tiny_dvae), open_source("scenes:val:40", 32)
    images = source.images(range(40)).float() / 255
    found = symptoms.reconstructed(tokenizer, images)
    assert torch.equal(found.tokens, tokenizer.encode(images)) and len(found.each) == 40


def test_scores_are_those_of_the_plain_forward(model):
    ids, tokens = pairs(model)
    logits = model(ids, tokens)
    found = symptoms.teacher_forced(model, ids, tokens)
    text, image = logits.text.log_softmax(-1), logits.image.log_softmax(-1)
    for row, position in itertools.product((0, 7, 39), range(4)):
        target = ids[row, position]
        assert found.text[row, position].item() == pytest.approx(-text[row, position, target].item(), abs=1e-5)
    for row, cell in itertools.product((0, 7, 39), range(6)):
        target = tokens[row].flatten()[cell]
        assert found.image[row, cell].item() == pytest.approx(-image[row, cell, target].item(), abs=1e-5)


def test_unigram_counts_with_one_more_of_each():
    seen, tokens = torch.tensor([[0, 0, 1], [0, 2, 0]]), torch.tensor([0, 3, 1])
    p = [5 / 10, 1 / 10, 2 / 10]
    assert symptoms.unigram(seen, tokens, 4) == pytest.approx(-sum(map(math.log, p)) / 3)


def test_listening_is_zero_for_who_does_not_hear_and_large_for_who_does(model):
    ids, tokens = pairs(model, 60)
    deaf = copy.deepcopy(model)
    deaf.text_embedding.weight.zero_()
    heard = symptoms.listening(deaf, ids, tokens, symptoms.teacher_forced(deaf, ids, tokens).image)
    assert abs(heard.mean) < 1e-4
    keen = copy.deepcopy(model).requires_grad_(True)
    optimiser = torch.optim.AdamW(keen.parameters(), 3e-3)
    told = (ids[:, :1, None] + torch.arange(6).reshape(1, 2, 3)) % 12  # the first word says it all
    with torch.enable_grad():
        for _ in range(60):
            optimiser.zero_grad()
            losses(keen(ids, told), ids, told, torch.ones(60, dtype=torch.bool)).image.backward()
            optimiser.step()
    heard = symptoms.listening(keen, ids, told, symptoms.teacher_forced(keen, ids, told).image)
    assert heard.mean > 10 * heard.error > 0


def test_equal_captions_cannot_be_told_apart(model):
    ids, tokens = pairs(model)
    same = ids[:1].expand_as(ids)
    right = symptoms.teacher_forced(model, same, tokens).image
    assert symptoms.listening(model, same, tokens, right) == (0.0, math.inf)


def test_a_model_learns_pairs_by_heart_and_is_left_as_it_was(model):
    ids, tokens = pairs(model, 4)
    before = copy.deepcopy(model.state_dict())
    seen = symptoms.memorised(model, ids, tokens, 200)
    assert seen[0] > 1 and min(seen) < 0.1 * math.log(12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_cache_error_is_that_of_the_worst_cell(tiny_dalle):
    drawer = pipeline.load(tiny_dalle)
    sampled = drawer.sample(["a red circle", "a blue square"], 3)
    ids = drawer.text.encode(["a red circle", "a blue square"]).repeat_interleave(3, 0)
    assert symptoms.cache_error(drawer.model, ids, sampled.tokens, sampled.logprobs) < 1e-4
    wrong = sampled.logprobs.clone()
    wrong[4, 9] -= 0.7
    assert symptoms.cache_error(drawer.model, ids, sampled.tokens, wrong) == pytest.approx(0.7, abs=1e-3)


def test_histogram_distance():
    a, b = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 3])
    assert symptoms.histogram_distance(a, a.flip(0), 4) == pytest.approx(0)
    assert symptoms.histogram_distance(a, b, 4) == pytest.approx(1)
    half = symptoms.histogram_distance(torch.tensor([0, 1]), torch.tensor([0, 2]), 3)
    assert half == pytest.approx(0.5)  # one of two codes is shared
    assert half == symptoms.histogram_distance(torch.tensor([0, 2]), torch.tensor([0, 1]), 3)


def test_agreement_is_over_all_pairs_of_candidates():
    tokens = torch.tensor([[[[0, 1]], [[0, 2]], [[0, 1]]]])  # 1 caption, 3 candidates, 1 x 2 cells
    assert symptoms.agreement(tokens) == pytest.approx((1 + 1 / 3) / 2)
    assert symptoms.agreement(torch.zeros(5, 4, 2, 2, dtype=torch.int64)) == 1
