"""The compiled kernels of units: every entry w[i] of a weight against the eager code and against the formula."""

import math

import pytest
import torch
from reference import Elsewhere, plain_moments, plain_shrink, small_batch, small_net
from torch import nn

from wcr_optim import WCR, AdamW, backends, compiled, eager_units
from wcr_optim.eager_units import number_of_units
from wcr_optim.moments import moments
from wcr_optim.shrink import shrink_
from wcr_optim.units import shrink_units_, unit_moments

pytestmark = pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))

ROW, BLOCK = compiled.ROW, compiled.BLOCK
SHAPES = [
    (3,),
    (),
    (1, 1),
    (5, 0),
    (0, 7),
    (8, 3, 3, 3),
    (700, 9),  # many units in a row
    (3000, 1),
    (40, ROW // 2),
    (21, ROW // 2 + 1),
    (40, ROW - 1),
    (40, ROW),
    (40, ROW + 1),
    (3, BLOCK),
    (3, BLOCK + 1),
    (5, 3, ROW),
    (10, 100_003),
]
DTYPES = [torch.float32, torch.bfloat16]


def views(base):
    """Weights of which the first, the second and the fifth lie as the kernels want them."""
    return [
        base,
        base.to(memory_format=torch.channels_last),
        base.transpose(0, 1),
        base[:, ::2],
        base[1:],
        base[3:, :, 1],
    ]


def layers(dtype):
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(s, generator=generator).pow(3).to(dtype) for s in SHAPES]
    others = torch.randn(50, 64, generator=generator), torch.randn(20, 30, generator=generator).half()
    base = torch.randn(8, 6, 5, 4, generator=generator).to(dtype)
    viewed = [views(base.clone())[i] for i in range(len(views(base)))]
    return [*plain, *viewed, others[0].to(dtype).t(), others[1]]


def units_of(w):
    return w.reshape(1, -1) if w.ndim == 0 else w.reshape(len(w), w[0].numel() if len(w) else 0)


def some(number):
    """Gains and thresholds; the first unit is to be left alone."""
    gain, threshold = 1 + 0.2 * torch.rand(number, dtype=torch.float64), 0.3 * torch.rand(number, dtype=torch.float64)
    gain[0], threshold[0] = 1.0, 0.0
    return gain, threshold


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments(dtype):
    weights = layers(dtype)
    found, eager = unit_moments(weights, backend="compiled"), unit_moments(weights)
    expected = [plain_moments(u) if u.numel() else (0.0, 0.0, 0.0) for w in weights for u in units_of(w)]
    torch.testing.assert_close(torch.stack(found, dim=1), torch.tensor(expected).double(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found, eager, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("cutoff", [math.inf, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_what_a_threshold_leaves(dtype, cutoff):
    weights = layers(dtype)
    _, threshold = some(sum(map(number_of_units, weights)))
    found, eager = compiled.unit_sums(weights, threshold, cutoff), eager_units.unit_sums(weights, threshold, cutoff)
    rows = [u.double().abs() for w in weights for u in units_of(w)]
    left = [torch.where(m < cutoff, (m - t).clamp(min=0), m) for m, t in zip(rows, threshold, strict=True)]
    expected = torch.stack([torch.stack([m.sum(), m.square().sum()]) for m in left])
    torch.testing.assert_close(torch.cat(found), expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(torch.cat(eager), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink(dtype):
    found, eager, plain = layers(dtype), layers(dtype), layers(dtype)
    gain, threshold = some(sum(map(number_of_units, found)))
    shrink_units_(found, gain, threshold, backend="compiled")
    shrink_units_(eager, gain, threshold)
    pairs = iter(zip(gain.tolist(), threshold.tolist(), strict=True))
    for w, e, p in zip(found, eager, plain, strict=True):
        rows = [plain_shrink(u.float(), *next(pairs)) for u in units_of(p)]
        expected = torch.cat(rows).view(p.shape).to(p.dtype) if rows else p
        rtol = 1e-6 if w.dtype == torch.float32 else torch.finfo(w.dtype).eps
        torch.testing.assert_close(w, expected, rtol=rtol, atol=1e-7)
        torch.testing.assert_close(w, e, rtol=rtol, atol=1e-7)


def test_only_what_was_asked_for_is_written():
    for index in range(len(views(torch.zeros(8, 6, 5, 4)))):
        ours, eager = (torch.arange(960.0).view(8, 6, 5, 4) for _ in range(2))
        for base, backend in ((ours, "compiled"), (eager, "eager")):
            w = views(base)[index]
            version = w._version
            shrink_units_([w], *some(len(w)), backend=backend)
            assert w._version > version
            torch.manual_seed(0)
        assert ours.flatten()[0] == 0
        torch.testing.assert_close(ours, eager)


def test_weights_that_lie_elsewhere_than_where_their_address_says():
    inner = torch.randn(30, 40)
    mu = unit_moments([Elsewhere(inner)], backend="compiled").mu
    torch.testing.assert_close(mu, inner.abs().double().mean(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_stay_in_their_unit(dtype):
    w = torch.randn(7, 9).to(dtype)
    w[1], w[2], w[3], w[4] = float("nan"), 0.0, float("inf"), -0.25
    w[5, 0] = -float("inf")
    p, before = nn.Parameter(w.clone()), w.clone()
    p.grad = torch.zeros_like(p)
    WCR(torch.optim.SGD([p], lr=0.1), 1e-2, form="per_unit", backend="compiled").step()
    torch.testing.assert_close(p.detach()[1:6], before[1:6], rtol=0, atol=0, equal_nan=True)
    for i in (0, 6):
        assert p[i].isfinite().all()
        assert not torch.equal(p[i], before[i])


def test_a_unit_that_is_left_alone_keeps_its_bits():
    w = torch.tensor([[-0.0, 1e-40, 3e38], [1.0, -0.5, 0.25]])
    before = w.view(torch.int32).clone()
    shrink_units_([w], torch.tensor([1.0, 1.1]), torch.tensor([0.0, 0.3]), backend="compiled")
    assert torch.equal(w.view(torch.int32)[0], before[0])
    torch.testing.assert_close(w[1], torch.tensor([0.77, -0.22, 0.0]))


@pytest.mark.parametrize("length", [9, 700, 3000])
def test_stochastic_rounding_is_unbiased_and_repeats(length):
    def rounded(seed):
        w = torch.full((200_000 // length, length), 0.7).bfloat16()
        gain = torch.full((len(w),), 0.9995)
        shrink_units_([w], gain, torch.zeros(len(w)), seed=seed, backend="compiled")
        return w

    assert rounded(3).double().mean().item() == pytest.approx(0.9995 * torch.tensor(0.7).bfloat16().item(), rel=5e-5)
    assert torch.equal(rounded(3), rounded(3))
    assert not torch.equal(rounded(3), rounded(4))


@pytest.mark.parametrize("length", [100, 700, 3000])
def test_no_two_units_of_two_steps_are_rounded_by_the_same_random_bits(length):
    seen = set()
    for seed in range(4):
        alike = [torch.full((25, length), 0.7).bfloat16() for _ in range(2)]
        shrink_units_(alike, torch.full((50,), 0.999), torch.zeros(50), seed=seed, backend="compiled")
        seen |= {tuple(unit.tolist()) for w in alike for unit in w}
    assert len(seen) == 4 * 50


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype):
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            weights = layers(dtype)[: len(SHAPES)]
            torch.manual_seed(0)
            shrink_units_(weights, *some(sum(map(number_of_units, weights))), seed=7, backend="compiled")
            results.append([*weights, *unit_moments(weights, backend="compiled")])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_gains_may_lie_anywhere_and_must_be_as_many_as_units():
    ones = torch.ones(4, 3)
    shrink_units_([ones], torch.tensor(2.0).expand(4), torch.zeros(8)[::2], backend="compiled")
    assert (ones == 2).all()
    with pytest.raises(RuntimeError, match="split"):
        shrink_units_([ones], torch.ones(3), torch.zeros(3), backend="compiled")


def test_a_layer_of_one_unit_is_a_layer():
    weights = [torch.randn(1, n) for n in (1, ROW + 1, BLOCK, 3 * BLOCK + 5)]
    of_units, of_layers = unit_moments(weights, backend="compiled"), moments(weights, backend="compiled")
    assert all(map(torch.equal, of_units, of_layers))
    copies = [w.clone() for w in weights]
    gain, threshold = some(len(weights))
    shrink_units_(weights, gain, threshold, backend="compiled")
    shrink_(copies, gain, threshold, backend="compiled")
    assert all(map(torch.equal, weights, copies))


# --- whole steps -----------------------------------------------------------------------------------------------------


def trained(optimizer_of, dtype=torch.float32):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 6 * 6, 40), nn.ReLU(), nn.Linear(40, 2)).to(
        dtype
    )
    net[0].to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 5)
    optimizer = optimizer_of(net.parameters())
    for _ in range(6):
        x = torch.randn(16, 3, 8, 8, generator=generator).to(dtype)
        optimizer.zero_grad()
        (net(x) - x.mean((1, 2, 3)).unsqueeze(1)).square().mean().backward()
        optimizer.step()
    return list(net.parameters())


def test_steps_equal_eager_ones():
    found, expected = (
        trained(lambda ps, b=b: WCR(torch.optim.AdamW(ps, lr=1e-2), 1e-4, form="per_unit", backend=b))
        for b in ("compiled", "eager")
    )
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_steps_on_bfloat16_repeat():
    found, again = (
        trained(
            lambda ps: WCR(torch.optim.AdamW(ps, lr=1e-2), 1e-4, form="per_unit", backend="compiled"), torch.bfloat16
        )
        for _ in range(2)
    )
    assert all(map(torch.equal, found, again))


@pytest.fixture
def calls(monkeypatch):
    """Names of the functions of the library that are called."""
    called = []
    call = compiled._call
    monkeypatch.setattr(compiled, "_call", lambda name, *a, **o: called.append(name) or call(name, *a, **o))
    return called


@pytest.mark.parametrize("fused", [False, True])
def test_auto_compiles_for_a_large_model(calls, monkeypatch, fused):
    def step():
        net = small_net()
        optimizer = AdamW(net.parameters(), lr=1e-2, weight_concentration=1e-3, form="per_unit", fused=fused)
        x, y = small_batch(0)
        (net(x) - y).square().mean().backward()
        optimizer.step()

    step()
    assert calls == []
    monkeypatch.setattr(backends, "COMPILE_FROM", 100)
    step()
    assert calls == ["wcr_sums", "wcr_shrink"]


def test_layouts_of_other_kinds_are_left_to_eager_code_and_no_others(calls, monkeypatch):
    left = []
    eager = eager_units.unit_sums
    monkeypatch.setattr(eager_units, "unit_sums", lambda parts, *bounds: left.extend(parts) or eager(parts, *bounds))
    base = torch.randn(8, 6, 5, 4)
    unit_moments(views(base), backend="compiled")
    assert [w.shape for w in left] == [views(base)[i].shape for i in (2, 3, 5)]
    assert calls == ["wcr_sums"]
