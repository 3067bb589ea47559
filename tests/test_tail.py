"""The tail against a sort, and the loss's trend."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from target_reference import plain_tail

from wcr_optim.tail import tails
from wcr_optim.trend import LossTrend


def measured_tail(tensors, sparsity: float) -> float:
    pruned, total, _ = tails([tensors], sparsity)[0].tolist()
    return pruned / total


class TestTail:
    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 2**16),
        sparsity=st.sampled_from([0.3, 0.5, 0.8, 0.9, 0.95, 0.98]),
        power=st.sampled_from([1, 2, 4]),
        scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    )
    def test_within_one_percent_of_a_sort(self, seed, sparsity, power, scale):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(40, 50), (3, 7, 5, 5), (4000,)]
        tensors = [scale * torch.randn(s, generator=generator).pow(power) * (i + 1) for i, s in enumerate(shapes)]
        # Below a half so little energy is left that one draw of heavy tails in a thousand misses one percent.
        allowed = 0.01 if sparsity >= 0.5 else 0.02
        assert measured_tail(tensors, sparsity) == pytest.approx(plain_tail(tensors, sparsity), rel=allowed)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes_strides_and_several_chunks(self, dtype):
        w = torch.randn(900, 700).to(dtype).t()[:, ::2]
        big = torch.randn(2**19 + 7).to(dtype)
        assert measured_tail([w, big], 0.9) == pytest.approx(plain_tail([w, big], 0.9), rel=0.01)

    def test_mostly_zeros_and_ties(self):
        w = torch.zeros(1000)
        w[:30] = 1.0
        assert measured_tail([w], 0.98) == pytest.approx(10 / 30, rel=1e-6)
        assert 0.0 <= measured_tail([w], 0.5) < 1e-30

    def test_sets_are_ranked_apart(self):
        a, b = torch.randn(500), 100 * torch.randn(300)
        measured = tails([[a], [b]], 0.9)
        for (pruned, total, threshold), w in zip(measured.tolist(), (a, b), strict=True):
            assert pruned / total == pytest.approx(plain_tail([w], 0.9), rel=0.01)
            assert threshold == pytest.approx(w.abs().quantile(0.9).item(), rel=0.04)
            assert total == pytest.approx(w.double().square().sum().item(), rel=0.01)

    def test_threshold_of_what_is_pruned(self):
        w = torch.randn(100_000)
        for sparsity in (0.0, 0.5, 0.98, 1.0):
            wanted = w.abs().quantile(sparsity).item() if sparsity else 0.0
            assert tails([[w]], sparsity)[0, 2].item() == pytest.approx(wanted, rel=0.005 if sparsity < 1 else 0.04)
        assert 0 <= tails([[torch.zeros(10)]], 0.9)[0, 2].item() < 1e-37

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_what_is_not_finite_shows(self, bad):
        w = torch.randn(100)
        w[3] = bad
        assert not math.isfinite(tails([[w]], 0.5)[0, 1].item())


class TestLossTrend:
    def test_noise_is_no_cost_and_a_rise_is(self):
        trend = LossTrend()
        generator = torch.Generator().manual_seed(0)
        costs = [trend.update(1.0 + 0.05 * torch.randn((), generator=generator).item()) for _ in range(200)]
        assert max(costs) < 0.05
        for _ in range(30):
            cost = trend.update(1.5)
        assert 0.3 < cost < 0.6

    def test_windows_average_and_stay_on_their_device(self):
        trend = LossTrend()
        for loss in (1.0, torch.tensor(2.0), torch.tensor([[6.0]], requires_grad=True)):
            trend.add(loss)
        assert trend.window(torch.device("cpu"), torch.float64).item() == 3.0
        assert math.isnan(trend.window(torch.device("cpu"), torch.float64).item())
