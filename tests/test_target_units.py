"""The per-unit form: every row of a weight against the scale-free form on that row alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import small_batch, small_net

from wcr_optim import WCR, SparsityTarget, penalties
from wcr_optim.moments import moments
from wcr_optim.penalties import PerUnit, ScaleFree
from wcr_optim.shrink import shrink_
from wcr_optim.units import shrink_units_, spread, unit_moments

SHAPES = [(7, 40), (5, 3, 3, 3), (1, 200), (30, 1), (12,), (4, 0), (0, 5)]


def weights(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).pow(3).to(dtype) for s in SHAPES]


def rows_of(layers):
    return [row.reshape(-1) for w in layers for row in (w if w.ndim > 1 else w.unsqueeze(1))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_moments_are_those_of_every_row(dtype):
    layers = weights(dtype)
    layers.append(torch.randn(20, 30).to(dtype).t())
    layers.append(torch.randn(4, 6, 3, 3).to(dtype).to(memory_format=torch.channels_last))
    layers.append(torch.randn(3, 2**18 + 5).to(dtype))  # a row does not fit a chunk
    for found, expected in zip(unit_moments(layers), moments(rows_of(layers)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("length", [2, 6, 700, 768, 1500])
def test_rows_of_magnitudes_that_are_alike_keep_their_variance_beside_others(length):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(400, length, generator=generator)
    w[::3] = 0.1 + 0.001 * w[::3]
    w[1] = 0.1
    _, mu, q = unit_moments([w])
    expected = w.double().abs().var(1, correction=0)
    torch.testing.assert_close(q - mu.square(), expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shrink_is_that_of_every_row(dtype):
    found, expected = weights(dtype), weights(dtype)
    for layers in (found, expected):
        layers.append(torch.linspace(-1, 1, 600).view(20, 30).to(dtype).t())
        layers.append(torch.linspace(-1, 1, 216).view(4, 6, 3, 3).to(dtype).to(memory_format=torch.channels_last))
    rows = rows_of(expected)
    generator = torch.Generator().manual_seed(1)
    gain, threshold = (torch.rand(len(rows), generator=generator, dtype=torch.float64) for _ in range(2))
    shrink_units_(found, 1 + gain, threshold)
    for row, g, t in zip(rows, 1 + gain, threshold, strict=True):
        part = row.clone()
        shrink_([part], g.view(1), t.view(1))
        row.copy_(part)
    parts = iter(rows)
    for w in found:
        for row in rows_of([w]):
            torch.testing.assert_close(row, next(parts), rtol=0, atol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), strength=st.sampled_from([1e-4, 1e-2, 1.0]))
def test_a_step_is_the_scale_free_step_of_every_row(seed, strength):
    generator = torch.Generator().manual_seed(seed)
    w = torch.nn.Parameter(torch.randn(6, 4, 5, generator=generator, dtype=torch.float64).pow(3))
    rows = [torch.nn.Parameter(row.detach().clone().view(1, -1)) for row in w]
    together = WCR(torch.optim.SGD([w], lr=0.1), strength, form="per_unit")
    apart = WCR(torch.optim.SGD(rows, lr=0.1), strength, form="scale_free")
    for optimizer, ws in ((together, [w]), (apart, rows)):
        for each in ws:
            each.grad = torch.zeros_like(each)
        optimizer.step()
    torch.testing.assert_close(w.detach().view(6, -1), torch.cat([row.detach() for row in rows]))


def test_every_unit_keeps_its_energy_and_a_small_one_is_not_crowded_out():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2, 1000, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [0.1]])
    by_form = {}
    for form in ("per_unit", "scale_free"):
        p = torch.nn.Parameter(w.clone())
        optimizer = WCR(torch.optim.SGD([p], lr=1.0), 1e-3, form=form)
        for _ in range(50):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        by_form[form] = p.detach().square().sum(1) / w.square().sum(1)
    # Weights that would cross zero stop there, and what the flow keeps in them is lost: a little.
    assert by_form["per_unit"].min() > 0.7
    assert by_form["scale_free"][1] < 0.1


@pytest.mark.parametrize("kind", ["zeros", "equal", "nan", "inf"])
def test_units_with_nothing_to_tell_apart_are_left_alone(kind):
    w = torch.randn(3, 8)
    w[1] = {"zeros": 0.0, "equal": 0.3, "nan": float("nan"), "inf": float("inf")}[kind]
    before = w.clone()
    p = torch.nn.Parameter(w)
    optimizer = WCR(torch.optim.SGD([p], lr=1.0), 1e-2, form="per_unit")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach()[1], before[1], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(p.detach()[0], before[0])
    assert p.detach()[[0, 2]].isfinite().all()


def test_bfloat16_rounds_stochastically_and_repeats():
    def step(seed):
        w = torch.full((40, 1000), 1.0, dtype=torch.bfloat16)
        shrink_units_([w], torch.ones(40), torch.full((40,), 1e-3), seed=seed)
        return w

    assert step(3).float().mean().item() == pytest.approx(1 - 1e-3, abs=1e-4)
    assert torch.equal(step(3), step(3))
    assert not torch.equal(step(3), step(4))
    nearest = torch.full((40, 1000), 1.0, dtype=torch.bfloat16)
    shrink_units_([nearest], torch.ones(40), torch.full((40,), 1e-3))
    assert (nearest == 1).all()


def test_spread_gives_every_row_its_layers_value():
    assert spread(torch.tensor([1.0, 2.0]), [torch.zeros(3, 2), torch.zeros(2, 5)]).tolist() == [1, 1, 1, 2, 2]


def test_the_value_sums_over_units():
    w = weights()[:2]
    total = PerUnit().value(unit_moments(w)).sum()
    plain = sum(ScaleFree().value(moments([row])).item() for row in rows_of(w))
    assert total.item() == pytest.approx(plain)


@pytest.mark.parametrize("fused", [False, True])
def test_around_the_drop_ins(fused):
    from wcr_optim import AdamW

    nets = [small_net(), small_net()]
    groups = [{"params": [p for p in net.parameters() if p.ndim > 1]} for net in nets]
    drop_in = AdamW([groups[0]], lr=1e-2, weight_concentration=1e-3, form="per_unit", fused=fused)
    wrapped = WCR(torch.optim.AdamW([groups[1]], lr=1e-2), 1e-3, form="per_unit")
    for step in range(5):
        x, y = small_batch(step)
        for net, optimizer in zip(nets, (drop_in, wrapped), strict=True):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have their weight's dtype here")
@pytest.mark.parametrize(("dtype", "of_gradient"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_gradients_of_another_dtype_than_the_weights(dtype, of_gradient):
    w = torch.nn.Parameter(torch.randn(768, 768).to(dtype))
    w.grad_dtype = of_gradient
    optimizer = WCR(torch.optim.SGD([w], lr=1e-2), form="per_unit")
    target = SparsityTarget(optimizer, 0.9, 100)
    for _ in range(3):
        w.grad = torch.randn(768, 768).to(of_gradient)
        optimizer.step()
        target.step(1.0)
    assert w.isfinite().all()


def test_a_target_needs_no_more_of_it():
    w = torch.nn.Parameter(torch.randn(30, 50, generator=torch.Generator().manual_seed(0)))
    optimizer = WCR(torch.optim.SGD([w], lr=0.1), form="per_unit")
    assert isinstance(optimizer.penalty, penalties.PerUnit)
    target = SparsityTarget(optimizer, 0.9, 100)
    for _ in range(100):
        w.grad = torch.zeros_like(w)
        optimizer.step()
        target.step()
    assert target.last_tail < 1.5 * target.tail_energy
