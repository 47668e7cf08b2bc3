import math

import pytest

from dvae.schedules import Schedule


def test_half_cosine_known_values():
    temperature = Schedule(start=1.0, end=1 / 16, steps=150_000)  # the paper's, appendix A.2
    assert temperature(0) == 1.0
    assert temperature(75_000) == pytest.approx((1 + 1 / 16) / 2)
    assert temperature(50_000) == pytest.approx(1 / 16 + 15 / 16 * 0.75)  # cos(pi / 3) = 1 / 2
    assert temperature(150_000) == temperature(10**9) == 1 / 16


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
