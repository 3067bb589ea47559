"""The course of a training loss: smoothed, its best, its rise above that."""

import math

import pytest

from wcr_optim.trend import LossTrend


def costs(means) -> list[float]:
    trend = LossTrend()
    return [trend.update(mean) for mean in means]


FALLING = [1.0 - 0.02 * k for k in range(20)]


@pytest.mark.parametrize("first", [math.nan, math.inf, -math.inf])
def test_a_first_window_that_is_not_finite_hides_no_later_rise(first):
    trend = LossTrend()
    found = [trend.update(mean) for mean in [first, *FALLING, 5.0, 5.0]][1:]
    assert found == costs([*FALLING, 5.0, 5.0])
    assert found[-1] > 0.5
    assert all(math.isfinite(value) for value in trend.state_dict().values())
    assert trend.allowed(None) == pytest.approx(0.8 * (trend.first - trend.best))


def test_a_loss_beyond_all_squares_is_a_rise_and_no_error():
    found = costs([*FALLING, 1e200])
    assert found[-1] > 1e199
