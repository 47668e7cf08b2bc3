"""What is said of the codes, against loops."""

import math
from collections import Counter

import pytest
import torch

from dvae import inspect
from dvae.codebook import (
    flat_share,
    grid_alone,
    neighbours,
    observe,
    painted_alone,
    patches,
    perplexity,
    perplexity_bound,
    pixels_that_change,
    pixels_that_move,
    soft_walk,
    spread,
    swap_effect,
    token_walk,
    usage,
    usage_by_cell,
)
from dvae.drawings import sheet
from dvae.model import DVAE, DVAEConfig
from dvae.tokenizer import load
from dvae.vqgan import VQGAN, VQGANConfig


@pytest.fixture(scope="module")
def model(tiny_dvae):
    return load(tiny_dvae)


@pytest.fixture(scope="module")
def one_code():
    small = DVAEConfig(image_size=16, vocab_size=1, hidden=4, groups=1, blocks=1, bottleneck=2, code_width=3, kernel=4,
                       patch=4)  # fmt: skip
    return DVAE(small).eval().requires_grad_(False)


def pixels(row: int, column: int) -> tuple[slice, slice]:
    """Of a cell of the tiny tokenizer."""
    return slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)


def test_usage_counts_and_perplexity_is_exp_of_the_entropy():
    tokens = torch.randint(0, 7, (5, 4, 4))
    seen, counts = usage(tokens, 10), Counter(tokens.flatten().tolist())
    assert seen.counts.tolist() == [counts[k] for k in range(10)]
    assert seen.used == pytest.approx(len(counts) / 10)
    assert seen.dead.tolist() == [k for k in range(10) if counts[k] == 0]
    entropy = -sum(n / 80 * math.log(n / 80) for n in counts.values())
    assert seen.perplexity == pytest.approx(math.exp(entropy))


def test_perplexity_goes_from_one_to_k():
    assert usage(torch.zeros(3, 2, 2, dtype=torch.int64), 8).perplexity == pytest.approx(1)
    assert usage(torch.arange(8), 8).perplexity == pytest.approx(8)
    assert usage(torch.zeros(0, dtype=torch.int64), 8).perplexity == 1


def test_usage_by_cell_counts_each_cell_alone():
    tokens = torch.randint(0, 5, (20, 2, 3))
    counts = usage_by_cell(tokens, 6)
    assert counts.shape == (6, 2, 3) and counts.dtype == torch.int64
    found = perplexity(counts)
    for row in range(2):
        for column in range(3):
            alone = usage(tokens[:, row, column], 6)
            assert torch.equal(counts[:, row, column], alone.counts)
            assert found[row, column].item() == pytest.approx(alone.perplexity)


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


@pytest.mark.parametrize("length, count, places", [(5, 9, [0, 1, 2, 3, 4]), (9, 3, [0, 3, 6]), (0, 3, []), (4, 0, [])])
def test_spread_is_even_and_never_too_long(length, count, places):
    assert spread(length, count).tolist() == places


def test_patches_come_cell_by_cell():
    images = torch.rand(2, 3, 6, 8)
    cells = patches(images, (3, 2))
    assert cells.shape == (12, 3, 2, 4)
    for place, (b, row, column) in enumerate((b, r, c) for b in range(2) for r in range(3) for c in range(2)):
        assert torch.equal(cells[place], images[b, :, 2 * row : 2 * row + 2, 4 * column : 4 * column + 4])


def test_painted_alone_is_the_central_cell_of_a_picture_of_one_code(model):
    cells = painted_alone(model, batch=5)
    assert cells.shape == (16, 3, 8, 8)
    for code in range(16):
        picture = model.decode(torch.full((1, 4, 4), code))[0]
        assert torch.allclose(cells[code], picture[:, 16:24, 16:24], atol=1e-6)
    assert torch.allclose(painted_alone(model, torch.tensor([9, 3])), cells[[9, 3]], atol=1e-6)


def cells_of_18(model) -> torch.Tensor:
    """The central pixel of the whole grid and of 8 x 8 cells, each of one code, `(2, 5, 3, 1, 1)`."""
    assert model.grid == (18, 18) and grid_alone(model) == (8, 8)
    with torch.inference_mode():
        cells = [torch.cat([model.decode(torch.full((1, side, side), code)) for code in range(5)]) for side in (18, 8)]
        return torch.stack([cells[0][:, :, 9:10, 9:10], cells[1][:, :, 4:5, 4:5]])


def test_painted_alone_on_a_large_grid_is_what_stands_in_the_middle_of_it_if_no_edge_is_in_sight():
    model = DVAE(DVAEConfig(image_size=18, vocab_size=5, hidden=8, groups=1, blocks=1, code_width=4, patch=1, kernel=3))
    whole, some = cells_of_18(model.eval())
    assert torch.allclose(whole, some, atol=1e-6) and torch.allclose(painted_alone(model), some, atol=1e-6)


def test_painted_alone_on_a_large_grid_is_8_x_8_cells_of_it_where_the_decoder_sees_farther():
    model = VQGAN(VQGANConfig(image_size=18, vocab_size=5, hidden=32, multipliers=(1,), attention=(0,), latent=4))
    whole, some = cells_of_18(model.eval())
    assert not torch.allclose(whole, some, atol=1e-3) and torch.allclose(painted_alone(model), some, atol=1e-6)


def test_the_sheet_says_how_many_cells_were_painted(model, tiny_dvae, tmp_path, monkeypatch):
    titles = []

    def noted(rows, side, title):
        titles.append(title)
        return sheet(rows, side, title)

    monkeypatch.setattr(inspect, "sheet", noted)
    inspect.codebook(str(tiny_dvae), "scenes:val:2", str(tmp_path))
    assert grid_alone(model) == model.grid == (4, 4)
    assert [title.split(";")[0] for title in titles] == ["alone: 4 x 4 cells of it"]


@pytest.mark.parametrize("sizes", [[5], [2, 2, 1]])
def test_observed_are_the_means_and_the_surest_patches_under_each_code(model, sizes):
    images = torch.rand(5, 3, 32, 32)
    seen = observe(model, images.split(sizes), typical=3)
    tokens, probabilities = model.encode(images), model.logits(images).softmax(1)
    pictures = model.decode(tokens)
    assert torch.equal(seen.counts, usage_by_cell(tokens, 16))
    assert torch.equal(seen.usage.counts, usage(tokens, 16).counts) and seen.usage.counts.sum() == 80
    few = 0
    for code in range(16):
        under = [(b, *pixels(y, x)) for b, y, x in (tokens == code).nonzero().tolist()]
        for mean, source in ((seen.data, images), (seen.painted, pictures)):
            there = [source[b, :, rows, columns] for b, rows, columns in under]
            assert torch.allclose(mean[code], torch.stack(there).mean(0) if there else torch.zeros(3, 8, 8), atol=1e-5)
        sure = [
            (probabilities[b, code, y, x].item(), images[b, :, pixels(y, x)[0], pixels(y, x)[1]])
            for b, y, x in (tokens == code).nonzero().tolist()
        ]
        best = sorted(sure, key=lambda pair: -pair[0])[:3]
        few += len(best) < 3
        best += [(0.0, torch.zeros(3, 8, 8))] * (3 - len(best))
        assert seen.probability[code].tolist() == pytest.approx([p for p, _ in best])
        assert torch.equal(seen.typical[code], torch.stack([patch for _, patch in best]))
    assert 0 < few < 16  # both kinds of codes were tried


def test_neighbours_are_the_nearest_other_codes(model):
    found = neighbours(model, torch.tensor([3, 0]), 5)
    space = model.codes()
    for row, code in enumerate([3, 0]):
        distances = {other: (space[other] - space[code]).norm().item() for other in range(16) if other != code}
        nearest = sorted(distances, key=distances.get)[:5]
        assert found.codes[row].tolist() == nearest
        assert found.distances[row].tolist() == pytest.approx([distances[other] for other in nearest], rel=1e-5)
    assert neighbours(model, torch.tensor([1]), 99).codes.shape == (1, 15)


def test_the_swap_effect_is_the_change_of_the_picture_over_real_contexts(model):
    tokens = model.encode(torch.rand(3, 3, 32, 32))
    code = usage(tokens, 16).counts.argmax().item()
    places = (tokens == code).nonzero().tolist()
    assert len(places) > 3
    others = torch.tensor([code, 1, 2, 15])
    found = swap_effect(model, tokens, code, others, contexts=len(places), batch=3)
    for k, other in enumerate(others.tolist()):
        squares = []
        for b, y, x in places:
            changed = tokens[b].clone()
            changed[y, x] = other
            change = model.decode(changed[None]) - model.decode(tokens[b : b + 1])
            squares.append(change.double().square().sum().item() / (3 * 8 * 8))
        assert found[k].item() == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-4, abs=1e-6)
    assert found[0] < 1e-6 and (found[1:] > 1e-3).sum() >= 2
    few = swap_effect(model, tokens, code, others, contexts=2)
    assert few.shape == (4,) and not torch.equal(few, found)


def test_the_swap_effect_of_a_code_that_is_nowhere_is_not_known(model):
    assert swap_effect(model, torch.zeros(1, 4, 4, dtype=torch.int64), 5, torch.tensor([1, 2])).isnan().all()


def test_pixels_that_move_a_cell_are_those_of_the_gradient(model):
    images, cell = torch.rand(2, 3, 32, 32), (1, 2)
    found = pixels_that_move(model, images, cell)
    assert found.shape == (32, 32) and (found >= 0).all() and found.max() > 0 and not found.requires_grad

    def excess(pictures):
        logits = exact.logits(pictures)[:, :, 1, 2]
        return logits.max(1).values - logits.mean(1)

    exact, doubled = DVAE(model.config).double(), images.double()
    exact.load_state_dict(model.state_dict())
    for y, x in ((12, 20), (9, 17), (31, 0)):
        slopes = []
        for channel in range(3):
            moved = doubled.clone()
            moved[:, channel, y, x] += 1e-6
            slopes.append((excess(moved) - excess(doubled)) / 1e-6)
        assert found[y, x].item() == pytest.approx(torch.stack(slopes).abs().mean().item(), rel=1e-3, abs=1e-6)
    with torch.inference_mode():  # also where notebooks have switched gradients off
        assert torch.equal(pixels_that_move(model, images, cell), found)


def test_pixels_that_change_are_those_of_the_difference(model):
    tokens, others = torch.randint(0, 16, (3, 4, 4)), torch.tensor([2, 7])
    total = torch.zeros(32, 32)
    for grid in tokens:
        for other in others:
            changed = grid.clone()
            changed[2, 1] = other
            total += (model.decode(changed[None]) - model.decode(grid[None]))[0].abs().mean(0)
    found = pixels_that_change(model, tokens, (2, 1), others)
    assert torch.allclose(found, total / 6, atol=1e-6)
    inside = found[pixels(2, 1)].mean()
    assert inside > found[pixels(0, 3)].mean()


def test_a_token_walk_changes_one_cell_at_a_time_in_a_seeded_order():
    start, end = torch.randint(0, 3, (4, 5)), torch.randint(0, 3, (4, 5))
    different = (start != end).sum().item()
    walk = token_walk(start, end, torch.Generator().manual_seed(1))
    assert walk.shape == (different + 1, 4, 5) and 5 < different < 20
    assert torch.equal(walk[0], start) and torch.equal(walk[-1], end)
    assert ((walk[1:] != walk[:-1]).sum((1, 2)) == 1).all()
    assert torch.equal(walk, token_walk(start, end, torch.Generator().manual_seed(1)))
    assert not torch.equal(walk, token_walk(start, end, torch.Generator().manual_seed(2)))
    assert torch.equal(token_walk(start, start, torch.Generator()), start[None])


def test_a_soft_walk_is_a_straight_line_from_one_hot_to_one_hot(model):
    start, end = torch.randint(0, 16, (2, 4, 4))
    walk = soft_walk(start, end, 16, 5)
    assert walk.shape == (5, 16, 4, 4) and torch.allclose(walk.sum(1), torch.ones(5, 4, 4))
    assert torch.equal(walk[0].argmax(0), start) and torch.equal(walk[-1].argmax(0), end)
    for step in range(5):
        for y, x in ((0, 0), (3, 1)):
            weights = torch.zeros(16)
            weights[start[y, x]] += 1 - step / 4
            weights[end[y, x]] += step / 4
            assert torch.allclose(walk[step, :, y, x], weights)
    ends = model.decode_soft(walk[[0, -1]])
    assert torch.allclose(ends, model.decode(torch.stack([start, end])), atol=1e-6)
    points = torch.einsum("skhw,kd->sdhw", walk, model.codes())
    assert torch.allclose(points[1:] - points[:-1], (points[1] - points[0]).expand(4, -1, -1, -1), atol=1e-5)


def test_a_codebook_of_one_code_is_described_too(one_code):
    images = torch.rand(2, 3, 16, 16)
    seen = observe(one_code, [images])
    assert seen.usage.used == 1 and seen.usage.perplexity == 1 and seen.usage.dead.tolist() == []
    assert torch.allclose(seen.data[0], patches(images, (4, 4)).mean(0), atol=1e-6)
    assert painted_alone(one_code).shape == (1, 3, 4, 4)
    assert neighbours(one_code, torch.tensor([0]), 4).codes.shape == (1, 0)
    tokens = one_code.encode(images)
    assert swap_effect(one_code, tokens, 0, torch.tensor([], dtype=torch.int64)).shape == (0,)
    assert pixels_that_move(one_code, images, (0, 0)).max() == 0
    assert token_walk(tokens[0], tokens[1], torch.Generator()).shape == (1, 4, 4)
