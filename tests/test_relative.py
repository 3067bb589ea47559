"""The relative form of WCR: the scale-free flow with a step in units of the layer's own energy."""

import pytest
import torch

from wcr_optim import WCR, penalties
from wcr_optim.moments import Moments, moments
from wcr_optim.penalties import Relative, ScaleFree


def layers(scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(n, generator=generator, dtype=torch.float64).pow(3) for n in (50, 400, 3000)]


@pytest.mark.parametrize("s", [0.0, 1e-4, 0.03, 1.0, 100.0])
def test_it_is_the_scale_free_flow_at_q_times_the_step(s):
    m = moments(layers())
    for found, expected in zip(Relative().flow(m, s), ScaleFree().flow(m, s * m.q), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_the_step_does_not_depend_on_the_weights_scale(scale):
    gain, threshold = Relative().flow(moments(layers()), 0.05)
    scaled_gain, scaled_threshold = Relative().flow(moments(layers(scale)), 0.05)
    torch.testing.assert_close(scaled_gain, gain)
    torch.testing.assert_close(scaled_threshold, scale * threshold)


def test_a_small_step_takes_twice_its_length_off_the_mean_magnitude():
    """threshold = mu (1 - e^(delta/2) / gain) with delta = -4 s / (1 - r) to first order, so 2 s mu / (1 - r)^2."""
    n, mu, q = (torch.tensor([x], dtype=torch.float64) for x in (1000.0, 0.1, 1.0))
    _, threshold = Relative().flow(Moments(n, mu, q), 1e-5)
    r = 0.01
    assert threshold.item() == pytest.approx(0.1 * 2e-5 / (1 - r) ** 2, rel=1e-3)


def test_it_is_a_form_of_wcr():
    w = torch.nn.Parameter(torch.randn(20, 30))
    before = w.detach().clone()
    optimizer = WCR(torch.optim.SGD([w], lr=0.1), 0.5, form="relative")
    assert isinstance(optimizer.penalty, penalties.Relative)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    gain, threshold = Relative().flow(moments([before]), 0.05)
    torch.testing.assert_close(
        w.detach(), gain.float() * before.sign() * (before.abs() - threshold.float()).clamp(min=0)
    )


def test_an_unknown_form_names_all():
    with pytest.raises(ValueError, match="'relative'"):
        WCR(torch.optim.SGD([torch.nn.Parameter(torch.randn(3, 3))], lr=0.1), form="absolute")
