"""What is said of the codes, against loops."""

import math
from collections import Counter

import pytest
import torch

from dvae.codebook import flat_share, painted_alone, painted_in_context, perplexity_bound, usage
from dvae.model import load


def test_usage_counts_and_perplexity_is_exp_of_the_entropy():
    tokens = torch.randint(0, 7, (5, 4, 4))
    seen, counts = usage(tokens, 10), Counter(tokens.flatten().tolist())
    assert seen.counts.tolist() == [counts[k] for k in range(10)]
    assert seen.used == pytest.approx(len(counts) / 10)
    entropy = -sum(n / 80 * math.log(n / 80) for n in counts.values())
    assert seen.perplexity == pytest.approx(math.exp(entropy))


def test_perplexity_goes_from_one_to_k():
    assert usage(torch.zeros(3, 2, 2, dtype=torch.int64), 8).perplexity == pytest.approx(1)
    assert usage(torch.arange(8), 8).perplexity == pytest.approx(8)


@pytest.mark.parametrize("share, kinds, codes", [(0.25, 2, 6), (0.5, 4, 16), (0.0, 3, 9), (1.0, 3, 9)])
def test_the_bound_is_the_perplexity_of_the_best_allowed_distribution(share, kinds, codes):
    p = [share / kinds] * kinds + [(1 - share) / (codes - kinds)] * (codes - kinds)
    best = math.exp(-sum(x * math.log(x) for x in p if x > 0))
    assert perplexity_bound(share, kinds, codes) == pytest.approx(best)


def test_flat_cells_are_those_of_one_colour():
    images = torch.rand(2, 3, 12, 8)
    images[0, :, :3, :4] = torch.rand(3, 1, 1)  # one colour, different channels
    images[1, :, 3:6, 4:] = 0.5
    images[1, :, 4, 5] += 0.9 / 255  # within the tolerance
    images[1, 1, 9:, :4] = 0.5  # flat in one channel only
    flat = 0
    for image in images:
        for top in range(0, 12, 3):
            for left in range(0, 8, 4):
                cell = image[:, top : top + 3, left : left + 4]
                flat += all((c.max() - c.min()).item() <= 1 / 255 for c in cell)
    assert flat == 2
    assert flat_share(images, (4, 2)) == pytest.approx(flat / 16)


def test_painted_alone_is_the_central_cell_of_a_picture_of_one_code(tiny_dvae):
    model = load(tiny_dvae)
    cells = painted_alone(model, batch=5)
    assert cells.shape == (16, 3, 8, 8)
    for code in range(16):
        picture = model.decode(torch.full((1, 4, 4), code))[0]
        assert torch.allclose(cells[code], picture[:, 16:24, 16:24], atol=1e-6)


@pytest.mark.parametrize("batch", [2, 64])
def test_painted_in_context_is_the_mean_of_the_patches_under_a_code(tiny_dvae, batch):
    model, images = load(tiny_dvae), torch.rand(5, 3, 32, 32)
    means, counts = painted_in_context(model, images, batch)
    tokens = model.encode(images)
    pictures = model.decode(tokens)
    assert counts.tolist() == usage(tokens, 16).counts.tolist() and counts.sum() == 80
    for code in range(16):
        under = [
            pictures[b, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] for b, y, x in (tokens == code).nonzero().tolist()
        ]
        expected = torch.stack(under).mean(0) if under else torch.zeros(3, 8, 8)
        assert torch.allclose(means[code], expected, atol=1e-5)
