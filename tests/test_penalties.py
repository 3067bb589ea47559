import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import penalty_of_weights, plain_shrink

from wcr_optim.moments import Moments, moments
from wcr_optim.penalties import L1, L2, HoyerSquare, InverseVariance, ScaleFree

UNBOUNDED = math.inf
PENALTIES = {
    "inverse_variance": InverseVariance(max_growth=UNBOUNDED),
    "scale_free": ScaleFree(max_growth=UNBOUNDED),
    "hoyer_square": HoyerSquare(max_growth=UNBOUNDED),
    "l1": L1(),
    "l2": L2(),
}
CONCENTRATING = ["inverse_variance", "scale_free", "hoyer_square"]
# A step so long that the layer changes by several percent, while no weight reaches zero.
LONG_STEP = {"inverse_variance": 3.0, "scale_free": 0.01, "hoyer_square": 0.3, "l1": 0.1, "l2": 1e-4}
each = pytest.mark.parametrize("name", PENALTIES)


def layer(*shape: int) -> torch.Tensor:
    """Weights away from zero: magnitudes of a Gaussian plus 0.5."""
    w = torch.randn(*shape, dtype=torch.float64)
    return w.sign() * (w.abs() + 0.5)


def after_flow(penalty, w, s):
    gain, threshold = penalty.flow(moments([w]), s)
    return plain_shrink(w, gain.item(), threshold.item())


@each
def test_value_is_the_tables(name):
    w = layer(20, 15)
    value = PENALTIES[name].value(moments([w]))
    torch.testing.assert_close(value[0], penalty_of_weights(PENALTIES[name], w), rtol=1e-12, atol=0)


@each
def test_flow_is_autograds_gradient_step_to_first_order(name):
    penalty, w = PENALTIES[name], layer(20, 15).requires_grad_()
    (gradient,) = torch.autograd.grad(penalty_of_weights(penalty, w), w)
    w = w.detach()
    errors = []
    for s in (1e-4, 1e-5):
        scaled = s * LONG_STEP[name]
        moved = after_flow(penalty, w, scaled) - w
        errors.append(((moved + scaled * gradient).norm() / moved.norm()).item())
    assert errors[0] < 1e-3
    # The relative error of a first-order method falls with s, down to what differences of float64 numbers resolve.
    assert errors[1] < errors[0] / 5 or errors[1] < 1e-7


@each
def test_flow_is_2000_small_gradient_steps(name):
    penalty, s, steps = PENALTIES[name], LONG_STEP[name], 2000
    start = layer(20, 15)
    w = start.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(penalty_of_weights(penalty, w), w)
        w = (w - s / steps * gradient).detach().requires_grad_()
    assert torch.equal(w.sign(), start.sign()), "the comparison holds only while no weight crosses zero"
    flowed = after_flow(penalty, start, s)
    assert (flowed - w).norm() / (w - start).norm() < 1e-3  # Euler's own error, of the change
    assert (flowed - w).norm() / w.norm() < 1e-4


@each
def test_no_step_is_exactly_no_change(name):
    gain, threshold = PENALTIES[name].flow(moments([layer(20, 15), torch.randn(40, 40)]), 0.0)
    assert gain.tolist() == [1.0, 1.0]
    assert threshold.abs().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", [*CONCENTRATING, "l1"])  # l2 takes AdamW's 1 - s for exp(-s)
def test_flow_over_a_long_step_is_the_flow_over_its_parts(name):
    penalty, w, s = PENALTIES[name], layer(20, 15), LONG_STEP[name]
    once = after_flow(penalty, w, s)
    for _ in range(7):
        w = after_flow(penalty, w, s / 7)
    torch.testing.assert_close(w, once, rtol=1e-6 if name == "inverse_variance" else 1e-12, atol=0)


@pytest.mark.parametrize("name", CONCENTRATING)
def test_invariants(name):
    penalty, w = PENALTIES[name], layer(30, 20)
    before, after = moments([w]), moments([after_flow(penalty, w, LONG_STEP[name])])
    kept = "mu" if name == "inverse_variance" else "q"
    torch.testing.assert_close(getattr(after, kept), getattr(before, kept), rtol=1e-12, atol=0)
    assert after.variance > before.variance


def test_preprints_moments_follow_the_closed_form():
    penalty, w, s = InverseVariance(eps=0.0, max_growth=UNBOUNDED), layer(30, 20), 5.0
    before, after = moments([w]), moments([after_flow(penalty, w, s)])
    torch.testing.assert_close(after.variance, (before.variance**2 + 8 * s / w.numel()).sqrt(), rtol=1e-12, atol=0)


def test_scale_free_forms_are_scale_free():
    w = layer(30, 20)
    for name in ("scale_free", "hoyer_square"):
        penalty = PENALTIES[name]
        torch.testing.assert_close(penalty.value(moments([w])), penalty.value(moments([10 * w])))
        # 100 times the step in weights 10 times as large is the same step.
        torch.testing.assert_close(10 * after_flow(penalty, w, 0.1), after_flow(penalty, 10 * w, 10.0))


def test_l1_is_ista():
    w, lr, strength = torch.randn(10, 10, dtype=torch.float64), 0.1, 0.3
    proximal = torch.nn.functional.softshrink(w, lr * strength)
    torch.testing.assert_close(after_flow(L1(), w, lr * strength), proximal)


@settings(max_examples=300, deadline=None)
@given(
    r=st.floats(1e-12, 1 - 1e-6),
    sigma=st.one_of(st.just(0.0), st.floats(1e-15, 1e5)),
)
def test_scale_frees_newton_finds_bisections_root(r, sigma):
    def f(delta):
        return delta - r * math.expm1(delta) + sigma

    low, high = -sigma - 2.0, 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if f(middle) > 0 else (middle, high)
    found = ScaleFree().log_ratio(torch.tensor([r], dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64))
    # Near r = 1 the root is a double one and float64 resolves only its square.
    assert found.item() == pytest.approx(high, rel=1e-8, abs=1e-9 if r > 0.999 else 1e-15)


@pytest.mark.parametrize("form", [InverseVariance, ScaleFree, HoyerSquare])
@settings(max_examples=100, deadline=None)
@given(s=st.floats(1e-8, 1e12), max_growth=st.floats(1e-3, 10.0), seed=st.integers(0, 100))
def test_max_growth_bounds_every_step_and_the_rest_follows_from_the_invariant(form, s, max_growth, seed):
    w = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    m = moments([w])
    gain, threshold = form(max_growth=max_growth).flow(m, s)
    assert 1.0 <= gain <= (1 + max_growth) * (1 + 1e-12)
    assert 0.0 <= threshold <= m.mu * (1 + 1e-12)
    mu, variance = gain * (m.mu - threshold), gain**2 * m.variance
    if form is InverseVariance:
        torch.testing.assert_close(mu, m.mu)
    else:
        torch.testing.assert_close(mu**2 + variance, m.q)


@pytest.mark.parametrize("name", CONCENTRATING)
@pytest.mark.parametrize(
    "w",
    {
        "equal magnitudes": torch.tensor([[0.3, -0.3], [0.3, 0.3]]),
        "many equal magnitudes": torch.full((1000, 1000), 0.1),
        "zeros": torch.zeros(3, 3),
        "one element": torch.tensor([[2.0]]),
        "empty": torch.empty(0, 4),
        "nan": torch.tensor([[1.0, math.nan]]),
        "inf": torch.tensor([[1.0, math.inf]]),
        "squares overflow": torch.tensor([[1e30, 1.0]]),
        "squares underflow": torch.tensor([[1e-30, 2e-30]]),
    }.values(),
)
def test_layers_without_a_direction_are_left_alone(name, w):
    gain, threshold = PENALTIES[name].flow(moments([w]), 0.1)
    assert (gain.item(), threshold.item()) == (1.0, 0.0)


@pytest.mark.parametrize("name", CONCENTRATING)
def test_the_largest_finite_step_makes_no_nan(name):
    gain, threshold = PENALTIES[name].flow(moments([torch.randn(8, 8) * 1e-6]), 1e308)
    assert not gain.isnan().any()
    assert not threshold.isnan().any()


@pytest.mark.parametrize("name", CONCENTRATING)
def test_one_bad_layer_does_not_touch_the_others(name):
    good = torch.randn(8, 8)
    alone = PENALTIES[name].flow(moments([good]), 1e-2)
    together = PENALTIES[name].flow(moments([torch.full((2, 2), math.nan), good, torch.zeros(4, 4)]), 1e-2)
    assert [x[1].item() for x in together] == [x[0].item() for x in alone]


def test_step_length_per_layer():
    w = layer(10, 10)
    for penalty in PENALTIES.values():
        gain, threshold = penalty.flow(moments([w, w]), torch.tensor([0.0, 0.2], dtype=torch.float64))
        single = penalty.flow(moments([w]), 0.2)
        assert (gain[0].item(), abs(threshold[0].item())) == (1.0, 0.0)
        assert (gain[1], threshold[1]) == (single[0][0], single[1][0])


def test_l2_never_flips_a_sign():
    n = torch.ones(1, dtype=torch.float64)
    assert L2().flow(Moments(n, n, n), 3.0)[0].item() == 0.0


@pytest.mark.parametrize("bad", [-1e-8, math.nan, math.inf])
def test_bad_eps_is_named(bad):
    with pytest.raises(ValueError, match="eps must be finite and not negative, got " + repr(bad)):
        InverseVariance(eps=bad)


@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan])
@pytest.mark.parametrize("form", [InverseVariance, ScaleFree, HoyerSquare])
def test_bad_max_growth_is_named(form, bad):
    with pytest.raises(ValueError, match="max_growth must be positive, got " + repr(bad)):
        form(max_growth=bad)
