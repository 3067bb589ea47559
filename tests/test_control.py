"""SparsityTarget's feedback loop, alone with numbers."""

import math

import pytest
import torch

from wcr_optim.control import FIRST_PULL, FLOOR, MAX_CHANGE, Cost, Driven, Loop
from wcr_optim.moments import Moments
from wcr_optim.penalties import L1, InverseVariance, ScaleFree

FREE = Cost(0.0, math.inf, was_asked_for=False)


def driven(penalty=None, mu=0.8, q=1.0, steps=1000, first_energy=100.0):
    layers = Moments(*(torch.tensor([x], dtype=torch.float64) for x in (100.0, mu, q)))
    return Driven(penalty or ScaleFree(), ["0.0"], layers, [first_energy], torch.ones(1, dtype=torch.float64), steps)


def begun(of=None, tail=0.1, lr=0.1):
    loop = Loop([0], tail=tail)
    loop.begin(of or driven(), lr)
    return loop


@pytest.mark.parametrize("penalty", [ScaleFree(), L1(), InverseVariance()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("lr", [1e-4, 10.0])
def test_begins_where_a_run_pulls_by_a_few_mean_magnitudes(penalty, lr):
    of = driven(penalty)
    loop = begun(of, lr=lr)
    _, threshold = penalty.flow(of.layers, lr * loop.level * of.shares)
    assert of.total_steps * threshold.item() / 0.8 == pytest.approx(FIRST_PULL, rel=1e-3)


def test_waits_for_an_lr():
    loop = begun(lr=0.0)
    assert not loop.has_begun
    assert math.isnan(loop.level)
    loop.begin(driven(), 0.1)
    assert loop.has_begun


def test_one_change_is_bounded_either_way():
    for tail, sign in ((0.9, 1), (1e-9, -1)):
        loop = begun()
        before, loop.tail = loop.level, tail
        loop.follow(driven(), 0.1, 0.1, FREE)
        assert math.log(loop.level / before) == pytest.approx(sign * MAX_CHANGE)


def test_on_its_path_nothing_moves():
    loop = begun()
    before = loop.level
    loop.follow(driven(), loop.tail, 0.1, FREE)
    assert loop.level == before


def test_falls_to_its_floor_and_no_further():
    loop = begun()
    loop.tail = 1e-9
    for _ in range(50):
        loop.follow(driven(), 0.1, 0.1, FREE)
    assert loop.level == pytest.approx(FLOOR * loop.first_level)


def test_lr_times_strength_stays_while_the_lr_warms_up():
    loop = begun(lr=0.1)
    before = loop.level
    assert loop.keep_step_length(0.4)
    assert loop.level * 0.4 == pytest.approx(before * 0.1)
    assert not loop.keep_step_length(0.3)  # below its peak the strength follows the schedule
    assert loop.level * 0.4 == pytest.approx(before * 0.1)


def test_a_loss_that_rose_too_far_takes_the_level_back_below_a_ceiling():
    loop = begun()
    loop.tail, before = 0.9, loop.level
    loop.follow(driven(), 0.1, 0.1, Cost(2.0, 1.0, was_asked_for=True))
    assert loop.level < before
    assert loop.ceiling == before / 2
    assert "max_dense_cost=1" in loop.obstacle
    loop.follow(driven(), 0.1, 0.1, Cost(0.0, 1.0, was_asked_for=True))
    assert loop.level <= loop.ceiling < before


@pytest.mark.parametrize(
    ("of", "obstacle"),
    [
        (driven(first_energy=1e7), "parameter 0 of group 0 lost nearly all of its energy"),
        (driven(L1(), mu=1e-3, q=1e-6, steps=10**6, first_energy=1e-4), "energy of whole layers away"),
    ],
    ids=["dead", "energy"],
)
def test_does_not_rise_where_it_would_kill_a_layer(of, obstacle):
    loop = begun()
    loop.tail, before = 0.9, loop.level
    loop.follow(of, 0.1, 0.1, FREE)
    assert loop.level <= before
    assert obstacle in loop.obstacle
