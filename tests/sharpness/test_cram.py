"""CrAM's compressed weights: exact counts, ties, patterns, draws, and which gradients are masked."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from sharpness_reference import base_of, closure_of, gradients_at, groups, net, train
from torch import nn

from wcr_optim import WCR
from wcr_optim.sharpness import CrAM, SparseSAM


def passes(model, optimizer, step):
    """The weights that the two passes of a step see."""
    seen = []
    evaluate = closure_of(model, optimizer, step)
    optimizer.step(lambda: seen.append([p.detach().clone() for p in model.parameters()]) or evaluate())
    return seen


@pytest.mark.parametrize("sparsity", [0.0, 0.1234, 0.5, 0.9, 1.0])
def test_second_pass_runs_at_exactly_the_sparsity(sparsity):
    model = net()
    optimizer = CrAM(base_of(groups(model)), sparsities=(sparsity,))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(3):
        g = gradients_at(model, params, [p.detach() for p in params], step)
        rhos = [group["rho"] for group in optimizer.param_groups for _ in group["params"]]
        moved = [p.detach() + rho * x for p, rho, x in zip(params, rhos, g, strict=True)]
        _, compressed = passes(model, optimizer, step)
        matrices = sum(p.numel() for p in params if p.ndim > 1)
        assert sum(int((w == 0).sum()) for w in compressed if w.ndim > 1) == round(sparsity * matrices)
        for w, expected in zip(compressed, moved, strict=True):
            kept = w != 0 if w.ndim > 1 else torch.ones_like(w, dtype=torch.bool)
            torch.testing.assert_close(w[kept], expected[kept], rtol=1e-12, atol=1e-15)


def test_ties_are_told_apart_by_position():
    w = torch.nn.Parameter(torch.ones(4, 5))
    optimizer = CrAM(torch.optim.SGD([w], lr=0.1), sparsities=(0.35,))
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(w.detach().clone())
        w.grad = torch.zeros_like(w)
        return torch.zeros(())

    optimizer.step(closure)
    assert torch.equal(seen[1].flatten(), torch.tensor([1.0] * 13 + [0.0] * 7))


@pytest.mark.parametrize("plus", [True, False])
def test_which_gradient_the_base_gets(plus):
    """Masked where the compressed weights are zero, dense g added, one-dimensional parameters dense."""
    model = net()
    optimizer = CrAM(base_of(groups(model)), sparsities=(0.8,), plus=plus)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    g = gradients_at(model, params, [p.detach() for p in params], 0)
    closure_of(model, optimizer, 0)()
    optimizer.first_step()
    compressed = [p.detach().clone() for p in params]
    h = gradients_at(model, params, compressed, 0)
    closure_of(model, optimizer, 0)()
    optimizer.gather()
    for p, w, x, y in zip(params, compressed, g, h, strict=True):
        expected = y * (w != 0) if p.ndim > 1 else y
        torch.testing.assert_close(p.grad, expected + x if plus else expected, rtol=1e-9, atol=1e-13)


def test_dense_second_gradient():
    model = net()
    optimizer = CrAM(base_of(groups(model)), sparsities=(0.8,), plus=False, sparse_grad=False)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    closure_of(model, optimizer, 0)()
    optimizer.first_step()
    h = gradients_at(model, params, [p.detach() for p in params], 0)
    closure_of(model, optimizer, 0)()
    optimizer.gather()
    for p, y in zip(params, h, strict=True):
        torch.testing.assert_close(p.grad, y, rtol=1e-9, atol=1e-13)


@given(
    n=st.integers(1, 8),
    m=st.integers(1, 8),
    outputs=st.integers(1, 4),
    groups_of_m=st.integers(1, 4),
    kernel=st.sampled_from([(), (3,), (2, 3)]),
    ties=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_patterns_keep_the_n_largest_of_every_m_inputs(n, m, outputs, groups_of_m, kernel, ties):
    n = min(n, m)
    w = torch.randn(outputs, m * groups_of_m, *kernel)
    w = w.sign() if ties else w
    parameter = torch.nn.Parameter(w.clone())
    optimizer = CrAM(torch.optim.SGD([parameter], lr=0.1), pattern=(n, m))
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(parameter.detach().clone())
        parameter.grad = torch.zeros_like(parameter)
        return torch.zeros(())

    optimizer.step(closure)
    inputs_last = lambda t: t.movedim(1, -1).reshape(-1, m)  # noqa: E731
    for row, kept in zip(inputs_last(w), inputs_last(seen[1]), strict=True):
        largest = sorted(range(m), key=lambda i, row=row: (-abs(row[i].item()), i))[:n]
        expected = torch.zeros_like(row)
        expected[largest] = row[largest]
        assert torch.equal(kept, expected)


def test_layers_that_no_pattern_fits_stay_dense():
    model = net()  # 2 input channels, then 16 and 8 inputs
    optimizer = CrAM(base_of(model.parameters()), pattern=(2, 4))
    _, compressed = passes(model, optimizer, 0)
    shares = [float((w == 0).double().mean()) for w in compressed if w.ndim > 1]
    assert shares == [0.0, 0.5, 0.5]


def test_sparsities_are_drawn_from_the_seed_alone():
    def draws(seed, noise, order):
        torch.manual_seed(noise)
        model = net()
        base = base_of(model.parameters())
        optimizer = CrAM(base if order == "outer" else WCR(base, 1e-2), seed=seed)
        drawn = []
        for step in range(30):
            _, compressed = passes(model, optimizer, step)
            matrices = [w for w in compressed if w.ndim > 1]
            drawn.append(sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices))
        return [round(share, 1) for share in drawn]

    assert draws(0, 1, "outer") == draws(0, 2, "inner")
    assert set(draws(0, 1, "outer")) == {0.5, 0.7, 0.9}
    assert draws(0, 1, "outer") != draws(1, 1, "outer")


def test_draws_are_even():
    optimizer = CrAM(base_of(net().parameters()), sparsities=(0.1, 0.2, 0.3))
    counts = dict.fromkeys((0.1, 0.2, 0.3), 0)
    for step in range(3000):
        optimizer.param_groups[0]["sharpness_steps"] = step
        counts[optimizer._draw()] += 1
    assert all(900 < count < 1100 for count in counts.values())


def test_weights_without_a_gradient_are_not_compressed():
    model, frozen = net(), torch.nn.Parameter(torch.ones(8, 8, dtype=torch.float64), requires_grad=False)
    optimizer = CrAM(base_of([*model.parameters(), frozen]), sparsities=(0.5,))
    seen = []
    evaluate = closure_of(model, optimizer, 0)
    optimizer.step(lambda: seen.append(frozen.clone()) or evaluate())
    assert all(torch.equal(value, torch.ones(8, 8, dtype=torch.float64)) for value in seen)


def test_a_pruned_network_learns():
    """What it is for: after CrAM, the loss of the pruned network is lower than after SGD."""

    def pruned_loss(make):
        model = net()
        optimizer = make(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
        for _ in range(150):
            train(model, optimizer, [0])
        probe = CrAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.0, sparsities=(0.7,))
        losses = []
        evaluate = closure_of(model, probe, 0)
        probe.step(lambda: losses.append(evaluate()) or losses[-1])
        return losses[1].item()

    assert pruned_loss(lambda base: CrAM(base, rho=0.05, sparsities=(0.7,))) < 0.5 * pruned_loss(lambda base: base)


def test_a_weight_that_is_nan_is_named_and_nothing_changes():
    """Where its gradient is finite: a weight that the loss does not see in this step."""
    seen, hidden = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(2, 4))
    with torch.no_grad():
        hidden[1, 2] = float("nan")
    groups = [{"params": [seen]}, {"params": [nn.Parameter(torch.ones(3)), hidden]}]
    optimizer = CrAM(torch.optim.SGD(groups, lr=0.1))
    before = [seen.detach().clone(), hidden.detach().clone()]

    def closure():
        optimizer.zero_grad()
        loss = seen.square().sum()
        loss.backward()
        hidden.grad = torch.zeros_like(hidden)
        return loss

    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[1\] of shape \(2, 4\) holds NaN"):
        optimizer.step(closure)
    assert torch.equal(seen, before[0])
    assert torch.equal(hidden.nan_to_num(7.0), before[1].nan_to_num(7.0))


def test_patterns_skip_layers_without_weights():
    empty, weight = nn.Parameter(torch.ones(0, 8)), nn.Parameter(torch.ones(2, 8))
    optimizer = CrAM(torch.optim.SGD([empty, weight], lr=0.1), pattern=(2, 4))
    (empty.sum() + weight.square().sum()).backward()
    optimizer.first_step()
    assert int((weight != 0).sum()) == 8
    optimizer.second_step()


def test_complex_parameters_are_refused_early():
    real, phases = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(2, 4, dtype=torch.complex64))
    for make in (CrAM, SparseSAM):
        with pytest.raises(TypeError, match=r"param_groups\[1\] has a torch.complex64 parameter of shape \(2, 4\)"):
            make(torch.optim.SGD([{"params": [real]}, {"params": [phases]}], lr=0.1))
        optimizer = make(torch.optim.SGD([real], lr=0.1))
        with pytest.raises(TypeError, match=r"torch\.complex64"):
            optimizer.add_param_group({"params": phases})
        assert len(optimizer.param_groups) == 1
        named = make(torch.optim.SGD([("real", real)], lr=0.1))
        with pytest.raises(TypeError, match=r"torch\.complex64"):
            named.add_param_group({"params": [("phases", phases)]})
    SparseSAM(torch.optim.SGD([phases], lr=0.1), mask="dynamic")


def test_gradients_of_another_dtype_than_their_parameter():
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).bfloat16()
    for p in layers.parameters():
        p.grad_dtype = torch.float32
    optimizer, passes = CrAM(torch.optim.SGD(layers.parameters(), lr=0.1)), []
    x = torch.ones(2, 4, dtype=torch.bfloat16)

    def closure():
        optimizer.zero_grad()
        used = layers[:1] if passes else layers  # the second only by the first pass
        passes.append(1)
        loss = sum(layer(x).float().sum() for layer in used)
        loss.backward()
        return loss

    before = layers[1].weight.detach().clone()
    optimizer.step(closure)
    assert len(passes) == 2
    assert not torch.equal(layers[1].weight, before)
