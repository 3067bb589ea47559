"""SparsityTarget around SGD with latent weights: more time, and more of a raised lr, where BatchNorm follows most."""

import copy
import itertools
import math

import pytest
import torch
from normed_network import layers_of, normed, train
from target_reference import density, plain_tail

from wcr_optim import WCR, SparsityTarget, param_groups

MOST, FEW = [(0, 0), (0, 1)], [(0, 0)]  # of the weights of normed(): two thirds, a twentieth
SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


def begun(base=SGD, latent=True, lr=0.02, steps=200, sparsity=0.8, **options):
    net = normed()
    optimizer = WCR(base(param_groups(net), lr=lr), form="per_unit", latent_weights=latent)
    return net, optimizer, SparsityTarget(optimizer, sparsity, steps, **options)


def factor_of_lost_density(net, target) -> float:
    """Concentrate the weights between two measurements, and let the loss fall for long."""
    target.step(9.0)
    first = min(density(layers_of(net)), 2 / math.pi)
    with torch.no_grad():
        for w in layers_of(net):
            w.copy_(w.abs().pow(5) * w.sign())
    lost = first / density(layers_of(net))
    assert 2.0 < lost < 10.0  # what a sparsity of 0.9 lets it be made up for
    for step in range(40):
        target.step(8.9 - 0.1 * step)
    return lost


def at(target, share, first=0.5):
    target.steps = round(share * target.total_steps)
    return target.path(first)


CASES = pytest.mark.parametrize(
    ("base", "latent", "places", "options", "end", "exponent"),
    [
        (SGD, True, MOST, {}, 0.7, 1.0),
        (SGD, True, FEW, {}, 0.4, 0.25),
        (SGD, True, [], {}, 0.4, 0.25),
        (SGD, False, MOST, {}, 0.4, 0.25),
        (SGD, True, MOST, {"end": 0.5}, 0.5, 1.0),
        (SGD, True, MOST, {"lr_exponent": 0.25}, 0.7, 0.25),
        (SGD, True, MOST, {"lr_exponent": 0.0}, 0.7, 0.0),
        (ADAMW, True, MOST, {}, 0.4, 1.0),
        (ADAMW, False, MOST, {}, 0.4, 1.0),
        (ADAMW, True, MOST, {"lr_exponent": 0.5, "end": 0.2}, 0.2, 0.5),
    ],
)


@CASES
def test_what_the_exponent_becomes(base, latent, places, options, end, exponent):
    net, optimizer, target = begun(base, latent, sparsity=0.9, every=1, tail_energy=0.1, **options)
    optimizer.scale_invariant = places
    lost = factor_of_lost_density(net, target)
    assert target.lr_factors()[0] == pytest.approx(lost**exponent, rel=1e-5)


@CASES
def test_what_the_end_becomes(base, latent, places, options, end, exponent):
    _, optimizer, target = begun(base, latent, steps=1000, **options)
    goal, optimizer.scale_invariant = target.tail_energy, places
    target.step(9.0)
    assert at(target, end / 2) == pytest.approx(math.sqrt(0.5 * goal), rel=1e-2)  # known from the first measurement on
    assert at(target, end) == pytest.approx(goal)
    assert at(target, 1.0) <= goal


@pytest.mark.parametrize("since", [0.0, 0.1, 0.39, 0.4, 0.6, 0.9])
def test_the_tail_goes_on_from_where_it_was_told_to_be(since):
    """The path written out: until it is known that there is more time the usual one, from then on an even fall."""
    _, optimizer, target = begun(steps=1000, every=10**6)
    target.step(9.0)
    target.steps = round(1000 * since) - 1
    optimizer.scale_invariant, target.every = MOST, 1
    target.step(9.0)
    told = min(since / 0.4, 1.0)
    found = []
    for share in (since, 0.3, 0.5, 0.69, 0.7, 1.0):
        if share >= since:
            way = told + (1 - told) * min((share - since) / (0.7 - since), 1.0) if told < 1.0 else 1.0
            found.append(at(target, share))
            assert found[-1] == pytest.approx(0.5 * (1e-3 / 0.5) ** way, rel=1e-6)
    assert all(after <= before for before, after in itertools.pairwise(found))


def test_a_start_that_is_given_is_kept():
    _, optimizer, target = begun(steps=1000, start=0.3)
    optimizer.scale_invariant = MOST
    target.step(9.0)
    assert at(target, 0.3) == 0.5
    assert at(target, 0.5) == pytest.approx(math.sqrt(0.5e-3))


def test_around_adam_it_falls_on_from_there():
    _, optimizer, target = begun(ADAMW, steps=1000)
    optimizer.scale_invariant = MOST
    target.step(9.0)
    assert at(target, 0.4) == pytest.approx(3e-3)
    assert at(target, 0.65) == pytest.approx(math.sqrt(3e-3 * 1e-4))
    assert at(target, 0.9) == pytest.approx(1e-4)


def test_a_layer_that_is_not_recognized_once_takes_nothing_back():
    net, optimizer, target = begun(sparsity=0.9, every=1)
    optimizer.scale_invariant = MOST
    lost = factor_of_lost_density(net, target)
    optimizer.scale_invariant = []
    target.step(1.0)
    assert target.lr_factors()[0] == pytest.approx(lost, rel=1e-5)
    resumed = begun(sparsity=0.9, every=1)[2]
    resumed.load_state_dict(target.state_dict())
    for told in (target, resumed):
        assert at(told, 0.69) > 1e-3
        assert at(told, 0.7) == pytest.approx(1e-3)


@pytest.mark.parametrize("cut", [1, 2, 45])  # the first measurement looks, the next one knows
def test_resumed_bit_for_bit(cut):
    net, optimizer, target = begun(steps=100)
    train(net, optimizer, cut, target)
    states = [copy.deepcopy(x.state_dict()) for x in (net, optimizer, target)]
    resumed = begun(steps=100)
    for x, state in zip(resumed, states, strict=True):
        x.load_state_dict(state)
    for x in ((net, optimizer, target), resumed):
        train(*x[:2], 100 - cut, x[2], first=cut)
    assert {row[0]: row[2] for row in target.history}[50] > 2e-3, "it had more time"
    assert target.history == resumed[2].history
    assert all(map(torch.equal, layers_of(net), layers_of(resumed[0])))


def test_a_state_says_nothing_to_a_target_without_latent_weights_or_with_settings_of_its_own():
    net, optimizer, target = begun(steps=200)
    train(net, optimizer, 20, target)
    state = target.state_dict()
    without, own = begun(latent=False)[2], begun(end=0.5, lr_exponent=0.5)[2]
    for other, end in ((target, 0.7), (without, 0.4), (own, 0.5)):
        other.load_state_dict(state)
        assert at(other, end - 0.02) > 1.01e-3
        assert at(other, end) == pytest.approx(1e-3)


def test_a_state_from_before_there_was_this_goes_on():
    net, optimizer, target = begun()
    train(net, optimizer, 20, target)
    state = target.state_dict()
    del state["latent_since"]
    target.load_state_dict(state)
    assert at(target, 0.4) == pytest.approx(1e-3), "as it was told"
    target.steps = 20
    train(net, optimizer, 2, target, first=20)
    assert at(target, 0.4) > 1.01e-3


def test_in_training_around_sgd():
    found = {}
    for options in ({}, {"lr_exponent": 0.25}):
        net, optimizer, target = begun(steps=150, **options)
        train(net, optimizer, 150, target)
        assert plain_tail(layers_of(net), 0.8) < 1.5e-3
        found[bool(options)] = target.lr_factors()[0]
    assert 1.0 < found[True] <= 5**0.25 < found[False] <= 5.0
