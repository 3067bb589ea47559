"""The course of a training loss: smoothed, its best, its rise above that."""

import math

import pytest
import torch

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


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_loss_of_nan_hides_nothing_of_its_window(as_tensor):
    trend = LossTrend()
    for loss in (1.0, math.nan, 3.0):
        trend.add(torch.tensor(loss) if as_tensor else loss)
    resumed = LossTrend()
    resumed.load_state_dict(trend.state_dict())
    for one in (trend, resumed):
        assert float(one.window(torch.device("cpu"), torch.float64)) == 2.0
        one.add(torch.tensor(math.nan) if as_tensor else math.nan)
        assert math.isnan(float(one.window(torch.device("cpu"), torch.float64)))


def test_an_easy_first_batch_is_not_what_training_began_with():
    trend = LossTrend()
    for mean in [0.001, *FALLING]:
        trend.update(mean)
    assert trend.first == 1.0
    assert trend.allowed(None) > 0.1, "not of what that batch had"


def test_a_loss_beyond_all_squares_is_a_rise_and_no_error():
    found = costs([*FALLING, 1e200])
    assert found[-1] > 1e199
