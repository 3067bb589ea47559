import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import plain_shrink

from wcr_optim.eager import CHUNK, SMALL
from wcr_optim.shrink import shrink_, stochastic_round


def shrink(w, gain, threshold, **options):
    shrink_([w], torch.tensor([gain], dtype=torch.float64), torch.tensor([threshold], dtype=torch.float64), **options)
    return w


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (17, 5), (2 * CHUNK + 5,)])
def test_equals_the_formula(dtype, shape):
    w = torch.randn(shape, dtype=dtype)
    expected = plain_shrink(w, 1.3, 0.2)
    rounding = torch.finfo(dtype).eps  # of the threshold: what is left of weights just beyond it is as uncertain
    torch.testing.assert_close(shrink(w.clone(), 1.3, 0.2), expected, rtol=3 * rounding, atol=0.2 * rounding)
    assert w.numel() < 2 or (expected == 0).any()


def test_every_layer_its_own_numbers_in_place():
    layers = [torch.randn(4, 4), torch.randn(3), torch.randn(2, 2, 2).double()]
    gain, threshold = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 0.1, 0.3])
    expected = [plain_shrink(w, g, t) for w, g, t in zip(layers, gain.tolist(), threshold.tolist(), strict=True)]
    addresses = [w.data_ptr() for w in layers]
    shrink_(layers, gain, threshold)
    assert [w.data_ptr() for w in layers] == addresses
    torch.testing.assert_close(layers, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [8, SMALL + 1])  # packed with others, and in pieces
def test_weights_at_the_threshold_become_zero_whatever_the_gain(dtype, size):
    for gain, threshold in torch.rand(200, 2, dtype=torch.float64).mul(2).tolist():
        w = torch.full((size,), threshold, dtype=dtype)
        w[::2] *= -1
        rounded = w[1].item()  # as a float64 threshold would not equal the weights
        assert not shrink(w, gain, rounded).any(), (gain, threshold)


@pytest.mark.parametrize("size", [8, SMALL + 1])
def test_thresholds_without_bound_take_all_and_nan_is_seen(size):
    for threshold in (1e39, math.inf):
        assert not shrink(torch.randn(size), 1.0, threshold).any()
    assert shrink(torch.randn(size), 1.0, math.nan).isnan().all()
    assert shrink(torch.randn(size), math.nan, 0.1).isnan().all()


def test_a_gain_of_zero_needs_no_threshold():
    for size in (8, SMALL + 1):
        assert not shrink(torch.randn(size), 0.0, math.inf).any()


def test_any_strides_and_nothing_beyond_the_tensor():
    base = torch.randn(6, 8, 4, 4)
    for view in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 3),
        lambda t: t[::2, 1:-1],  # gaps in memory
    ):
        whole = base.clone()
        w = view(whole)
        expected = plain_shrink(w, 1.1, 0.3)
        untouched = whole.abs().sum() - w.abs().sum()
        torch.testing.assert_close(shrink(w, 1.1, 0.3), expected)
        if w.data_ptr() == whole.data_ptr() or w._base is whole:
            torch.testing.assert_close(whole.abs().sum() - w.abs().sum(), untouched)


def test_nan_and_inf_pass_and_are_never_made():
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3e38])
    out = shrink(special.clone(), 1.0, 0.1)
    assert out[0].isnan()
    assert out[1:3].tolist() == [math.inf, -math.inf]
    assert out[3:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [5, 2 * SMALL])
@pytest.mark.parametrize("seed", [None, 3])
def test_low_precision_overflow_stays_finite(dtype, size, seed):
    limit = torch.finfo(dtype).max
    w = torch.zeros(size, dtype=dtype)
    w[:5] = torch.tensor([0.999 * limit, -limit, math.inf, -math.inf, math.nan])
    out = shrink(w, 1.1, 0.0, seed=seed)
    assert out[:4].tolist() == [limit, -limit, math.inf, -math.inf]
    assert out[4].isnan()
    assert (out[5:] == 0).all()


def test_no_change_is_no_change_bit_for_bit():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        w = torch.randn(100).to(dtype)
        assert torch.equal(shrink(w.clone(), 1.0, 0.0, seed=1), w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32_and_rounded_to_nearest_without_a_seed(dtype):
    w = torch.randn(1000).to(dtype)
    expected = plain_shrink(w.float(), 1.05, 0.01).to(dtype)
    assert torch.equal(shrink(w.clone(), 1.05, 0.01), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=200, deadline=None)
@given(value=st.floats(-6e4, 6e4, width=32))
def test_stochastic_rounding_takes_a_neighbour_with_the_right_mean(dtype, value):
    generator = torch.Generator().manual_seed(0)
    w = torch.full((4096,), value)
    rounded = stochastic_round(w, dtype, generator)
    assert torch.equal(rounded.to(dtype).float(), rounded), "on the grid"
    nearest = w[0].to(dtype)
    if nearest.float() == value:
        assert (rounded == value).all(), "what is on the grid stays"
        return
    low, high = rounded.min().item(), rounded.max().item()
    assert low <= value <= high or low == high
    info = torch.finfo(dtype)
    spacing = max(info.eps * max(abs(value), info.smallest_normal), 2.0**-126)  # below that float32 has no reciprocals
    assert abs(rounded.double().mean().item() - value) <= 5 * spacing / math.sqrt(4096)


def test_stochastic_rounding_is_reproducible_and_leaves_the_global_generator_alone():
    w = torch.randn(1000).bfloat16()
    state = torch.get_rng_state()
    a, b, c = (shrink(w.clone(), 0.999, 0.0, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_1000_decays_of_1e_4_shrink_low_precision_weights_as_they_shrink_float32(dtype):
    start = torch.randn(20000)
    exact = start.double() * (1 - 1e-4) ** 1000
    seeded, plain = start.to(dtype), start.to(dtype)
    for step in range(1000):
        shrink(seeded, 1 - 1e-4, 0.0, seed=step)
        plain.mul_(1 - 1e-4)
    assert abs(seeded.double().norm() / exact.norm() - 1) < 0.01
    assert abs((seeded.double() * exact).sum() / exact.square().sum() - 1) < 0.01
    if dtype is torch.bfloat16:
        assert torch.equal(plain, start.to(dtype)), "plain arithmetic would have left them untouched"
