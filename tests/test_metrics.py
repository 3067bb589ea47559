"""Measures of concentration against their definitions."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from wcr_optim import SAM, WCR, L2Decay, metrics
from wcr_optim.metrics import concentration


def top_share(magnitudes, share):
    """Energy of the largest weights, one after the other, and a fraction of the last one."""
    ordered = sorted(magnitudes, reverse=True)
    whole, part = divmod(share * len(ordered), 1)
    energies = [m * m for m in ordered]
    held = sum(energies[: int(whole)]) + (part * energies[int(whole)] if part else 0.0)
    return held / sum(energies)


BUCKET = 2.0**-16  # width relative to the magnitudes in it


def gini(magnitudes):
    """Mean absolute difference of all pairs over twice the mean."""
    n = len(magnitudes)
    differences = sum(abs(a - b) for a in magnitudes for b in magnitudes)
    return differences / (2 * n * sum(magnitudes))


def effective(magnitudes):
    return sum(m**2 for m in magnitudes) ** 2 / sum(m**4 for m in magnitudes)


def lossless(magnitudes, tail):
    energies = sorted(m * m for m in magnitudes)
    budget = tail * sum(energies)
    return max(k for k in range(len(energies) + 1) if sum(energies[:k]) <= budget * (1 + 1e-9)) / len(energies)


def check(row, magnitudes, tail=metrics.TAIL_ENERGY, rel=1e-6):
    assert row.weights == len(magnitudes)
    assert row.nonzero == sum(m != 0 for m in magnitudes)
    assert row.gini == pytest.approx(gini(magnitudes), abs=rel)
    assert row.effective_weights == pytest.approx(effective(magnitudes), rel=rel)
    assert row.lossless_sparsity == pytest.approx(lossless(magnitudes, tail), abs=1.01 / len(magnitudes))
    for share, energy in row.top.items():
        assert energy == pytest.approx(top_share(magnitudes, share), rel=rel, abs=1e-9)
    for share, energy in list(zip(row.curve.density, row.curve.energy, strict=True))[::20]:
        assert energy == pytest.approx(top_share(magnitudes, share), rel=rel, abs=1e-9)


weights = st.lists(
    st.floats(-100, 100, width=16) | st.sampled_from([0.0, -0.0, 1.0, -1.0]) | st.floats(-1e3, 1e3, width=32),
    min_size=1,
    max_size=40,
).filter(any)


@given(st.lists(weights, min_size=1, max_size=3), st.floats(0, 1), st.sampled_from([0.0, 3e-3, 0.1, 1.0]))
@settings(deadline=None)
def test_measures_are_what_their_definitions_say(layers, share, tail):
    ordered = sorted({abs(w) for layer in layers for w in layer})
    assume(all(b - a > 2 * BUCKET * b for a, b in itertools.pairwise(ordered)))  # within a bucket they count as equal
    tensors = {str(i): torch.tensor(layer, dtype=torch.float64) for i, layer in enumerate(layers)}
    result = concentration(tensors, top=(share, 0.05), tail_energy=tail)
    for row, layer in zip(result.layers, layers, strict=True):
        check(row, [abs(w) for w in layer], tail)
    check(result.total, [abs(w) for layer in layers for w in layer], tail)
    assert result.tail_energy == tail


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_any_dtype_and_layout(dtype):
    weight = torch.randn(15, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    for view in (weight, weight.t(), weight.view(5, 3, 4, 5).to(memory_format=torch.channels_last)):
        check(concentration({"w": view}).total, weight.double().abs().flatten().tolist())


def test_magnitudes_of_one_bucket_count_as_equal():
    near = [8.46875, 8.468865394592285]
    check(concentration({"w": torch.tensor(near, dtype=torch.float64)}).total, near, rel=BUCKET)


def test_large_weights_are_measured_in_chunks(monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK", 32)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(10, 30, generator=generator),
        "b": 3 * torch.randn(5, 7, generator=generator).bfloat16(),
    }
    result = concentration(tensors)
    magnitudes = [tensor.double().abs().flatten().tolist() for tensor in tensors.values()]
    for row, values in zip(
        (*result.layers, result.total), (*magnitudes, [*magnitudes[0], *magnitudes[1]]), strict=True
    ):
        check(row, values)


def test_what_is_nearly_equal_is_counted_together_within_the_stated_error():
    # The worst case: everything in one run, with the largest possible spread inside it.
    weight = 1 + torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2.0**-16
    check(concentration({"w": weight}).total, weight.tolist(), rel=2.0**-15)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (torch.ones(8), {"gini": 0.0, "effective_weights": 8.0, "lossless_sparsity": 0.0}),
        (torch.eye(1, 8), {"gini": 7 / 8, "effective_weights": 1.0, "lossless_sparsity": 7 / 8}),
        (torch.tensor([3.0, -3.0] + [0.0] * 6), {"gini": 6 / 8, "effective_weights": 2.0, "lossless_sparsity": 6 / 8}),
        (torch.zeros(8), {"gini": 0.0, "effective_weights": 0.0, "lossless_sparsity": 1.0, "nonzero": 0}),
        (torch.zeros(0, 3), {"gini": 0.0, "effective_weights": 0.0, "lossless_sparsity": 1.0, "weights": 0}),
    ],
)
def test_extremes(weight, expected):
    row = concentration({"w": weight}).total
    for name, value in expected.items():
        assert getattr(row, name) == pytest.approx(value)
    if not row.nonzero:
        assert set(row.top.values()) == set(row.curve.energy) == {1.0}
    assert all(0 <= energy <= 1 for energy in (*row.top.values(), *row.curve.energy))
    assert list(row.curve.energy) == sorted(row.curve.energy)
    assert (row.curve.density[0], row.curve.density[-1]) == pytest.approx((1e-4, 1.0))


@pytest.mark.parametrize("scale", [1e-200, 1e-44, 1e38, 1e200])
def test_the_scale_of_the_weights_does_not_matter(scale):
    weight = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    row, scaled = concentration({"w": weight}).total, concentration({"w": weight * scale}).total
    assert scaled.gini == pytest.approx(row.gini, rel=1e-4)
    assert scaled.effective_weights == pytest.approx(row.effective_weights, rel=1e-4)
    assert scaled.top == pytest.approx(row.top, rel=1e-4)


def test_the_prunable_weights_of_a_model():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 2))
    model[3].weight = model[1].weight
    result = concentration(model, exclude="4")
    assert [row.name for row in result.layers] == ["1.weight"]
    check(result.total, model[1].weight.double().abs().flatten().tolist())


def test_pruning_the_predicted_share_costs_the_stated_energy():
    weight = torch.randn(100, 100, generator=torch.Generator().manual_seed(0)) ** 5
    row = concentration({"w": weight}).total
    pruned = weight.abs().flatten().sort().values[: round(row.lossless_sparsity * weight.numel())]
    lost = float(pruned.double().square().sum() / weight.double().square().sum())
    assert 0.9 * metrics.TAIL_ENERGY < lost <= metrics.TAIL_ENERGY * (1 + 1e-6)


def test_the_table_and_the_dictionary():
    result = concentration({"first": torch.eye(4), "second": torch.ones(2, 2)}, top=(0.25, 0.125))
    lines = str(result).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert "top 25 %" in lines[0]
    assert "top 12.5 %" in lines[0]
    assert lines[2].split() == [
        "first",
        "16",
        "25.0",
        "%",
        "100.0",
        "%",
        "50.0",
        "%",
        "0.750",
        "25.00",
        "%",
        "75.0",
        "%",
    ]
    assert lines[-2].startswith("total")
    assert "at most 0.003 of the energy" in lines[-1]
    dictionary = json.loads(json.dumps(result.to_dict()))
    assert dictionary["layers"][0]["top"] == {"0.25": 1.0, "0.125": 0.5}
    assert dictionary["total"]["weights"] == 20
    assert len(dictionary["total"]["curve"]["energy"]) == len(result.total.curve.density)
    assert math.isclose(dictionary["tail_energy"], 3e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": {"w": torch.tensor([1.0, float("nan")])}}, "w holds NaN"),
        ({"model": {"w": torch.tensor([1.0, float("inf")])}}, "w holds NaN, infinity"),
        ({"model": {"w": torch.ones(3, dtype=torch.int32)}}, "w has no magnitudes to rank: dtype torch.int32"),
        ({"model": {"w": torch.eye(3).to_sparse()}}, "torch.sparse_coo"),
        ({"model": {"w": torch.empty(3, device="meta")}}, "on meta"),
        ({"model": {"w": torch.ones(3)}, "top": (1.5,)}, r"top must lie in \[0, 1\], got 1.5"),
        ({"model": {"w": torch.ones(3)}, "tail_energy": -1}, r"tail_energy must lie in \[0, 1\], got -1"),
        ({"model": {"w": torch.ones(3)}, "exclude": "w"}, "exclude applies to a module"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        concentration(**arguments)


def test_a_single_share_is_asked_for_as_a_sequence():
    with pytest.raises(TypeError, match=r"top must be a sequence of shares such as \(0\.05,\), got 0\.05"):
        concentration({"w": torch.ones(3)}, top=0.05)


class TestOptimizer:
    def net(self):
        net = nn.Sequential(nn.Linear(400, 300), nn.LayerNorm(300), nn.Linear(300, 10), nn.Linear(10, 10))
        with torch.no_grad():
            net[0].weight.normal_()
            net[2].weight.zero_()
            net[2].weight[0] = -0.5
            net[3].weight.zero_()
        return net

    def test_is_what_its_formula_says(self):
        net = self.net()
        optimizer = WCR(torch.optim.SGD(net.parameters(), lr=0.1))
        found = metrics.optimizer_concentration(optimizer)
        assert torch.equal(optimizer.concentration(), found)
        assert torch.equal(SAM(optimizer).concentration(), found), "through the chain"
        m = net[0].weight.detach().double().abs()
        assert found[0].item() == pytest.approx((m.var(correction=0) / m.square().mean()).item(), rel=1e-6)
        assert found[0].item() == pytest.approx(1 - 2 / math.pi, abs=5e-3)
        assert found[1].item() == pytest.approx(1 - 1 / 10, rel=1e-12)
        assert found[2].item() == 0.0, "no energy"

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_weights_that_are_not_finite_are_told_from_those_without_energy(self, value):
        net = self.net()
        with torch.no_grad():
            net[0].weight[3, 5] = value
        found = metrics.optimizer_concentration(WCR(torch.optim.SGD(net.parameters(), lr=0.1)))
        assert found[0].isnan()
        assert found[1].item() == pytest.approx(0.9)
        assert found[2].item() == 0.0

    def test_which_weights(self):
        net = self.net()
        groups = [
            {"params": [net[0].weight], "weight_concentration": 0.0},
            {"params": [net[3].weight, net[2].weight, net[1].weight, net[1].bias]},
        ]
        net[3].weight.requires_grad_(False)
        optimizer = L2Decay(SAM(WCR(torch.optim.SGD(groups, lr=0.1))))
        assert metrics.optimizer_concentration(optimizer).tolist() == [pytest.approx(0.9)]
        groups[1]["weight_concentration"] = 0.0
        without = WCR(torch.optim.SGD(groups, lr=0.1))
        assert len(metrics.optimizer_concentration(without)) == 2, "all weights, to compare with"

    def test_follows_the_penalty(self):
        net = self.net()
        optimizer = WCR(torch.optim.SGD(net.parameters(), lr=0.1), weight_concentration=1e3)
        first = metrics.optimizer_concentration(optimizer)[0]
        net(torch.randn(4, 400)).sum().backward()
        net[0].weight.grad.zero_()
        optimizer.step()
        assert metrics.optimizer_concentration(optimizer)[0] > first

    def test_what_it_refuses(self):
        net = self.net()
        with pytest.raises(ValueError, match="SGD has no decoupled penalty"):
            metrics.optimizer_concentration(torch.optim.SGD(net.parameters(), lr=0.1))
        with pytest.raises(ValueError, match="L2Decay has no decoupled penalty"):
            metrics.optimizer_concentration(L2Decay(torch.optim.SGD(net.parameters(), lr=0.1)))
        with pytest.raises(ValueError, match="no weights under its penalty"):
            metrics.optimizer_concentration(WCR(torch.optim.SGD([net[1].weight], lr=0.1)))
