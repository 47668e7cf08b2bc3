"""A half-cosine at known steps, those of the paper's three schedules as they are shipped, and what is refused."""

import math
from pathlib import Path

import pytest
import yaml

from dvae.errors import UserError
from dvae.schedules import Schedule

PAPER = yaml.safe_load((Path(__file__).parents[2] / "configs" / "dvae" / "paper.yaml").read_text())["model"]
LAST = 3_000_000
DIAGONAL = math.sqrt(1 / 2)  # the cosine of an eighth of a turn
SHARES = [1, (1 + DIAGONAL) / 2, 1 / 2, (1 - DIAGONAL) / 2, 0]  # of the start, after each quarter of the way


@pytest.mark.parametrize(
    "settings, start, end, steps",
    [
        (PAPER["kl_weight"], 0, 6.6, 5_000),
        (PAPER["temperature"], 1, 1 / 16, 150_000),
        (PAPER["optimiser"]["learning_rate"], 1e-4, 1.25e-6, 1_200_000),
    ],
    ids=["kl_weight", "temperature", "learning_rate"],
)
def test_the_papers_schedules_at_their_corner_steps(settings, start, end, steps):
    """As shipped in dvae/paper: a half-cosine."""
    schedule = Schedule(**settings)
    for quarter, share in enumerate(SHARES):
        assert schedule(quarter * steps // 4) == pytest.approx(share * start + (1 - share) * end, rel=1e-12)
    assert schedule(0) == start  # no warm-up
    assert start != schedule(1) != schedule(steps - 1) != end
    assert schedule(steps) == schedule(steps + 1) == schedule(LAST) == end
    assert min(start, end) < schedule(steps - 1) < max(start, end)


@pytest.mark.parametrize("start, end", [(0.0, 6.6), (1e-4, 1.25e-6)])
def test_moves_one_way_and_stays_between_its_ends(start, end):
    values = [Schedule(start, end, steps=50)(step) for step in range(60)]
    assert values == sorted(values, reverse=start > end)
    assert (values[0], values[50:]) == (start, [end] * 10)
    assert len(set(values)) == 51


def test_without_an_end_it_is_constant():
    assert {Schedule(0.3)(step) for step in range(5)} == {0.3}


def test_zero_steps_are_at_the_end_at_once():
    assert Schedule(1.0, 0.5)(0) == 0.5


def test_warmup_rises_linearly_and_shifts_the_rest():
    plain, warm = Schedule(1.0, 0.1, steps=20), Schedule(1.0, 0.1, steps=20, warmup=4)
    assert [warm(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [warm(step + 4) for step in range(30)] == [plain(step) for step in range(30)]


def test_is_a_value():
    assert Schedule(1.0, 0.5, 10) == Schedule(1.0, 0.5, 10)
    assert all(math.isfinite(Schedule(1.0, 0.5, 1, 1)(step)) for step in range(4))


@pytest.mark.parametrize(
    "wrong, what",
    [
        ({"start": math.nan}, "start nan of a schedule is not a finite number"),
        ({"start": 1.0, "end": math.inf, "steps": 5}, "end inf of a schedule is not a finite number"),
        ({"start": 1.0, "end": 0.5, "steps": -5}, "steps -5, warmup 0 of a schedule"),
        ({"start": 1.0, "warmup": -1}, "steps 0, warmup -1 of a schedule"),
        ({"start": 1.0, "steps": 5}, "steps is 5, but end is null: the schedule stays at its start 1.0"),
    ],
    ids=str,
)
def test_schedules_that_mean_nothing_are_refused(wrong, what):
    with pytest.raises(UserError) as caught:
        Schedule(**wrong)
    assert caught.value.what == what and caught.value.hint
