"""What is kept stays, what is redrawn follows the exact posterior, and nobody sees what was masked."""

import itertools
import math

import pytest
import torch

from dalle import edit
from dalle.model import DALLE, DALLEConfig
from dalle.rerank import scorer
from dvae.errors import NumericsError, UserError

CODES, GRID = 4, (2, 3)
TEXT, NULL = torch.tensor([[1, 4, 7]]), torch.tensor([[5, 6, 7]])
KEPT = torch.tensor([[-1, 2, -1], [0, -1, 3]])  # kept cells between redrawn ones, and after the last


@pytest.fixture(scope="module")
def model():
    """Untrained; louder than at the start, so that cells depend on each other."""
    torch.manual_seed(5)
    model = DALLE(DALLEConfig(5, 3, CODES, GRID, depth=2, width=32, heads=2))
    with torch.no_grad():
        model.image_head.weight *= 6
        model.image_embedding.weight *= 60
        for block in model.blocks:
            block.attention.qkv.weight *= 2
            block.attention.out.weight *= 4
    return model.eval().requires_grad_(False)


def redraw(model, known=KEPT, count=8, **settings):
    return edit.redraw(model, TEXT, known, count, null_ids=NULL, **settings)


def by_forward(model, tokens, text=TEXT):
    """ln p of every cell, (R, N), from the pass that training uses."""
    logits = model(text.expand(len(tokens), -1), tokens).image
    return logits.log_softmax(-1).gather(2, tokens.flatten(1)[..., None])[..., 0]


def exact(model, known=KEPT, temperature=1.0, top_k=None, guidance=1.0):
    """Every way to fill the open cells (M, h, w), and its probability (M,): redrawn cells by the settings, kept ones
    by the plain model, normalised."""
    places = (known < 0).flatten()
    fillings = torch.tensor(list(itertools.product(range(CODES), repeat=int(places.sum()))))
    tokens = known.flatten().repeat(len(fillings), 1)
    tokens[:, places] = fillings
    grids = tokens.unflatten(1, GRID)
    plain, null = (model(text.expand(len(grids), -1), grids).image.double() for text in (TEXT, NULL))
    mixed = edit.filter_logits(guidance * plain + (1 - guidance) * null, temperature, top_k)
    each = torch.where(places, *(part.log_softmax(-1).gather(2, tokens[..., None])[..., 0] for part in (mixed, plain)))
    return grids, each.sum(1).softmax(0)


def distance(model, tokens, weights=None, **settings):
    """Total variation between weighted candidates and the exact posterior, 0 to 1."""
    grids, p = exact(model, **settings)
    index = {tuple(grid.flatten().tolist()): k for k, grid in enumerate(grids)}
    found = torch.zeros(len(p), dtype=torch.float64)
    weights = torch.ones(len(tokens)) / len(tokens) if weights is None else weights
    for grid, weight in zip(tokens, weights.tolist(), strict=True):
        found[index[tuple(grid.flatten().tolist())]] += weight
    return float((found - p).abs().sum() / 2)


@pytest.mark.parametrize("settings", [{}, {"guidance": 2.0}, {"passes": 2}, {"passes": 1, "guidance": 2.0, "top_k": 2}])
def test_kept_tokens_are_kept_and_every_log_probability_is_that_of_forward(model, settings):
    sampled = redraw(model, **settings)
    assert sampled.tokens.shape == (8, *GRID) and sampled.tokens.min() >= 0 and sampled.tokens.max() < CODES
    assert torch.equal(sampled.tokens[:, KEPT >= 0], KEPT[KEPT >= 0].expand(8, -1))
    torch.testing.assert_close(sampled.logprobs, by_forward(model, sampled.tokens))
    assert (sampled.null is None) == (settings.get("guidance", 1) == 1)
    if sampled.null is not None:
        torch.testing.assert_close(sampled.null, by_forward(model, sampled.tokens, NULL))


def rest(model, sampled):
    return edit.rest(model, TEXT, sampled, redrawn=KEPT < 0)


def test_the_likelihood_of_the_kept_rest_is_that_of_forward(model):
    sampled = redraw(model)
    each = by_forward(model, sampled.tokens)
    torch.testing.assert_close(rest(model, sampled), each[:, (KEPT >= 0).flatten()].sum(1))


def test_candidates_weighted_by_the_kept_rest_are_the_exact_posterior(model):
    sampled = redraw(model, count=5000, resample=False)
    assert distance(model, sampled.tokens) > 0.5  # without the weights: a model that cannot see what comes later
    assert distance(model, sampled.tokens, rest(model, sampled).softmax(0)) < 0.1


def test_resampled_candidates_need_only_the_weights_of_the_last_kept_cells(model):
    sampled = redraw(model, count=5000)
    last = by_forward(model, sampled.tokens)[:, 5]
    assert distance(model, sampled.tokens, last.softmax(0)) < 0.1
    assert distance(model, sampled.tokens) < distance(model, redraw(model, count=5000, resample=False).tokens) - 0.02


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "guidance": 1.5, "top_k": 3}], ids=str)
def test_passes_lead_to_the_exact_posterior(model, settings):
    before, after = (redraw(model, count=500, resample=False, passes=passes, **settings).tokens for passes in (0, 2))
    assert distance(model, before, **settings) > 0.5
    assert distance(model, after, **settings) < 0.17  # 500 draws of the posterior itself are at about 0.08


def test_ranking_by_likelihood_finds_the_best_filling_there_is(model):
    grids, p = exact(model)
    sampled = redraw(model, count=600)
    best = sampled.logprobs.sum(1).argmax()
    assert torch.equal(sampled.tokens[best], grids[p.argmax()])


def test_the_same_seed_draws_the_same_and_another_one_others(model):
    first, again, other = (redraw(model, count=16, seed=seed, passes=1).tokens for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_resampling_a_candidate_does_not_depend_on_how_many_there_are(model):
    assert torch.equal(redraw(model, count=5, resample=False).tokens, redraw(model, count=9, resample=False).tokens[:5])


@pytest.mark.parametrize("passes", [0, 2])
def test_progress_adds_up(model, passes):
    done = []
    redraw(model, count=5, passes=passes, progress=done.append)
    assert sum(done) == (1 + passes) * 5 * int((KEPT < 0).sum())


def test_everything_kept_is_only_scored(model):
    kept = KEPT.clamp(min=1)
    sampled = redraw(model, kept, count=2, passes=1)
    assert torch.equal(sampled.tokens, kept.expand(2, -1, -1))
    torch.testing.assert_close(sampled.logprobs, by_forward(model, sampled.tokens))


def test_logits_that_are_not_finite_are_told(model):
    broken = DALLE(model.config)
    broken.load_state_dict(model.state_dict())
    broken.image_head.weight.data[1] = math.nan
    with pytest.raises(NumericsError, match="cell 0 of picture 0"):
        redraw(broken)


def test_systematic_choice_keeps_equals_and_counts_by_weight():
    u = torch.tensor(0.3, dtype=torch.float64)
    assert edit._systematic(torch.zeros(7, dtype=torch.float64), u).tolist() == list(range(7))
    weights = torch.rand(50, dtype=torch.float64).log() * 3
    for place in (0.0, 0.5, 1 - 1e-12):
        rows = edit._systematic(weights, torch.tensor(place, dtype=torch.float64))
        due = 50 * weights.softmax(0)
        assert ((torch.bincount(rows, minlength=50) - due).abs() < 1 + 1e-6).all()


@pytest.mark.parametrize(
    "change, word",
    [
        ({"count": 0}, "count"), ({"count": 1.5}, "count"), ({"passes": -1}, "passes"), ({"passes": True}, "passes"),
        ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"), ({"temperature": math.nan}, "temperature"),
        ({"top_p": math.nan}, "top_p"), ({"guidance": math.nan}, "guidance"), ({"top_k": 5}, "top_k"),
        ({"known": KEPT[:1]}, "known"), ({"known": KEPT + 2}, "known"), ({"known": KEPT - 1}, "known"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_named(model, change, word):
    with pytest.raises(UserError, match=word):
        redraw(model, **change)


# ------------------------------------------------------------------------------------------------- what is redrawn


def test_rows_below(model):
    assert edit.below((4, 3), 1).tolist() == [[False] * 3] + [[True] * 3] * 3
    for rows in (0, 4, 5, -1, 1.0, True):
        with pytest.raises(UserError, match="rows"):
            edit.below((4, 3), rows)
    with pytest.raises(UserError, match="rows"):
        edit.below((1, 3), 1)


@pytest.mark.parametrize("size", [(8, 8), (10, 7), (3, 2), (31, 50)])
def test_a_cell_is_touched_by_any_pixel_in_its_patch(size):
    for seed in range(20):
        mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 2 / math.prod(size)
        cells = torch.zeros(4, 2, dtype=torch.bool)
        for y, x in mask.nonzero().tolist():
            for row, column in itertools.product(range(4), range(2)):  # does [y, y + 1) meet the row's part of [0, H)?
                high, wide = size[0] / 4, size[1] / 2
                level = y < (row + 1) * high and y + 1 > row * high
                cells[row, column] |= level and x < (column + 1) * wide and x + 1 > column * wide
        assert torch.equal(edit.touched(mask, (4, 2)), cells)


def test_shares_are_seeded_nested_and_whole():
    grid, before = (4, 5), torch.zeros(4, 5, dtype=torch.bool)
    for tenth in range(11):
        chosen = edit.share_of(grid, tenth / 10, 3)
        assert int(chosen.sum()) == 2 * tenth and not (before & ~chosen).any()
        before = chosen
    assert edit.share_of(grid, 0.01, 3).sum() == 1  # little is not nothing
    assert not torch.equal(edit.share_of(grid, 0.5, 3), edit.share_of(grid, 0.5, 4))
    for share in (-0.1, 1.1, math.nan, math.inf, "a", True, None):
        with pytest.raises(UserError, match="variation"):
            edit.share_of(grid, share, 0)


@pytest.mark.parametrize("side", edit.SIDES)
@pytest.mark.parametrize("grid, cells", [((4, 4), 1), ((4, 4), 2), ((4, 4), 7), ((3, 5), 4), ((1, 1), 3), ((2, 3), 9)])
def test_the_window_slides_over_every_new_cell_once_with_what_is_known_beside_it(side, grid, cells):
    tokens = torch.arange(math.prod(grid)).unflatten(0, grid)
    canvas = edit.extended(tokens, side, cells)
    across = side in ("left", "right")
    assert canvas.tokens.shape == ((grid[0], grid[1] + cells) if across else (grid[0] + cells, grid[1]))
    assert torch.equal(canvas.tokens[~canvas.redrawn], tokens.flatten())
    top, left = cells * (side == "up"), cells * (side == "left")
    assert torch.equal(canvas.tokens[top : top + grid[0], left : left + grid[1]], tokens)
    open_cells, length = canvas.redrawn.clone(), grid[1 if across else 0]
    for high, wide in canvas.windows:
        window = open_cells[high : high + grid[0], wide : wide + grid[1]]
        assert window.shape == grid and window.any()
        assert window.float().mean() <= max(1, length // 2) / length + 1e-6
        if length > 1:  # each row or column of the window continues what is known
            assert (~window).any(int(across)).all()
        window[:] = False
    assert not open_cells.any()


def test_extensions_that_make_no_sense():
    tokens = torch.zeros(2, 2, dtype=torch.int64)
    for cells in (0, -1, 1.5, True):
        with pytest.raises(UserError, match="cells"):
            edit.extended(tokens, "left", cells)
    with pytest.raises(UserError, match="extend is 'sideways'"):
        edit.extended(tokens, "sideways", 1)


def scoring(name):
    return lambda redrawn: scorer(name)


def test_one_window_is_a_redraw_with_its_scores(model):
    canvas = edit.Canvas(KEPT)
    drawn = edit.draw_canvas(model, TEXT, canvas, 8, 3, scoring("likelihood"), null_ids=NULL, seed=5)
    sampled = redraw(model, seed=5)
    assert torch.equal(drawn.tokens, sampled.tokens)
    torch.testing.assert_close(drawn.scores, sampled.logprobs.sum(1))
    assert sorted(drawn.order.tolist()) == list(range(8)) and drawn.scores[drawn.order[0]] == drawn.scores.max()
    pictures = [tuple(drawn.tokens[k].flatten().tolist()) for k in drawn.order]
    assert len(set(pictures[: len(set(pictures))])) == len(set(pictures))  # repetitions come last


@pytest.mark.parametrize("side, cells", [("right", 4), ("left", 3), ("up", 3), ("down", 2)])
def test_a_canvas_is_filled_and_what_was_there_stays(model, side, cells):
    tokens = torch.tensor([[0, 1, 2], [3, 2, 1]])
    canvas, done = edit.extended(tokens, side, cells), []
    drawn = edit.draw_canvas(model, TEXT, canvas, 7, 3, scoring("none"), null_ids=NULL, progress=done.append, seed=1)
    assert drawn.tokens.shape == (7, *canvas.tokens.shape) and drawn.tokens.min() >= 0
    assert torch.equal(drawn.tokens[:, ~canvas.redrawn], tokens.flatten().expand(7, -1))
    assert sum(done) == 7 * int(canvas.redrawn.sum())
    again = edit.draw_canvas(model, TEXT, canvas, 7, 3, scoring("none"), null_ids=NULL, seed=1)
    assert torch.equal(again.tokens, drawn.tokens)


def test_the_score_of_a_canvas_is_the_sum_over_its_windows(model):
    canvas = edit.extended(torch.tensor([[0, 1, 2], [3, 2, 1]]), "right", 3)
    drawn = edit.draw_canvas(model, TEXT, canvas, 6, 2, scoring("likelihood"), null_ids=NULL)
    parts = [
        by_forward(model, drawn.tokens[:, top : top + 2, left : left + 3].contiguous()).sum(1)
        for top, left in canvas.windows
    ]
    assert len(parts) == 3
    torch.testing.assert_close(drawn.scores, sum(parts))


def test_all_candidates_of_a_window_are_scored_together(model):
    """For a score may compare them, whichever picture they continue."""
    asked = []

    def place(model, text_ids, sampled):
        asked.append(len(sampled.tokens))
        return torch.arange(len(sampled.tokens), dtype=torch.float32)

    canvas = edit.extended(torch.tensor([[0, 1, 2], [3, 2, 1]]), "right", 3)
    drawn = edit.draw_canvas(model, TEXT, canvas, 5, 2, lambda redrawn: place, null_ids=NULL)
    assert asked == [5, 5, 5]
    # 4 and 3 go on, three and two times: places 0 to 2 are of the first and the others of the second; so again
    first = torch.tensor([4.0, 4, 4, 3, 3]) + torch.arange(5)
    best = first.sort(descending=True, stable=True).values[:2]
    assert drawn.scores.tolist() == (best[[0, 0, 0, 1, 1]] + torch.arange(5)).tolist()


@pytest.mark.parametrize("count, keep", [(0, 1), (4, 0), (4, 5), (4, None), (None, 1), (2.0, 1)])
def test_keep_and_count_of_a_canvas(model, count, keep):
    with pytest.raises(UserError, match="keep"):
        edit.draw_canvas(model, TEXT, edit.Canvas(KEPT), count, keep, scoring("none"), null_ids=NULL)


# ---------------------------------------------------------------------------------------------------------- pixels

REDRAWN = torch.tensor([[False, True, False], [False, True, True]])


def picture(seed=0, size=(12, 18)):
    return torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def patches(cells=REDRAWN):
    return cells.repeat_interleave(6, 0).repeat_interleave(6, 1)


def test_what_is_hidden_cannot_be_seen():
    one, other = picture(0), torch.where(patches(), picture(1), picture(0))
    hidden = edit.hidden(one, REDRAWN)
    assert not torch.equal(one, other) and torch.equal(hidden, edit.hidden(other, REDRAWN))
    assert torch.equal(hidden[:, ~patches()], one[:, ~patches()])
    flat = torch.full((3, 12, 18), 77, dtype=torch.uint8)
    assert torch.equal(edit.hidden(torch.where(patches(), picture(1), flat), REDRAWN), flat)
    assert edit.hidden(one, torch.ones_like(REDRAWN)).unique().tolist() == [128]


@pytest.mark.parametrize("blend", [0, 1, 3, 100])
def test_pixels_outside_the_redrawn_patches_stay_bit_for_bit(blend):
    base, painted = picture(0), torch.stack([picture(1), picture(2)])
    made = edit.paste(base, painted, REDRAWN, blend)
    assert made.shape == painted.shape and made.dtype == torch.uint8
    assert torch.equal(made[:, :, ~patches()], base[:, ~patches()].expand(2, -1, -1))
    if blend == 0:
        assert torch.equal(made[:, :, patches()], painted[:, :, patches()])


def test_blending_levels_a_step_out_over_the_given_pixels_and_no_further():
    base, painted = torch.full((3, 4, 16), 100, dtype=torch.uint8), torch.full((1, 3, 4, 16), 160, dtype=torch.uint8)
    made = edit.paste(base, painted, torch.tensor([[False, True]]), blend=3)
    assert made[0, 0, 0].tolist() == [100] * 8 + [115, 130, 145] + [160] * 5


def test_blending_does_not_look_at_what_was_masked():
    one, other = picture(0), torch.where(patches(), picture(1), picture(0))
    painted = picture(2)[None]
    assert torch.equal(edit.paste(one, painted, REDRAWN, 4), edit.paste(other, painted, REDRAWN, 4))


def test_redrawn_whole_there_is_nothing_to_blend_with():
    everything = torch.ones_like(REDRAWN)
    assert torch.equal(edit.paste(picture(0), picture(1)[None], everything, 3), picture(1)[None])
