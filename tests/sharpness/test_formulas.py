"""Each method's update against its formula, over 50 steps in float64, with three groups and a rho in each."""

import pytest
import torch
from sharpness_reference import (
    PlainCrAM,
    PlainFisherSAM,
    PlainSAM,
    PlainSSAM,
    assert_close,
    base_of,
    closure_of,
    groups,
    loss_of,
    net,
    train,
)

from wcr_optim.sharpness import SAM, SSAM, CrAM, SparseSAM

STEPS = range(50)


def pair(base):
    model, reference = net(), net()
    return model, base_of(groups(model), base), reference, base_of(groups(reference), base)


def compare(model, optimizer, reference, plain, closure=True):
    for step in STEPS:
        before = loss_of(reference, step).item()
        losses = train(model, optimizer, [step], closure)
        plain.step(step)
        if closure and not isinstance(optimizer, SSAM):
            assert losses == [pytest.approx(before, rel=1e-9)], "the returned loss is the clean one"
    if isinstance(optimizer, SSAM):
        optimizer.eval()
    assert_close(model, reference)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"adaptive": True, "eta": 0.01}], ids=str)
def test_sam(base, options):
    model, inner, reference, plain = pair(base)
    compare(model, SAM(inner, **options), reference, PlainSAM(reference, plain, **options))


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("closure", [True, False])
def test_ssam(base, closure):
    model, inner, reference, plain = pair(base)
    compare(model, SSAM(inner), reference, PlainSSAM(reference, plain), closure)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize(("sparsity", "update_freq", "num_samples"), [(0.5, 7, 3), (0.8, 4, 10), (0.0, 1, 1)])
def test_sparse_sam_with_fisher_mask(base, sparsity, update_freq, num_samples):
    model, inner, reference, plain = pair(base)
    optimizer = SparseSAM(inner, sparsity=sparsity, update_freq=update_freq, num_samples=num_samples)
    compare(
        model,
        optimizer,
        reference,
        PlainFisherSAM(reference, plain, sparsity, update_freq, min(num_samples, update_freq)),
    )


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("sparse_grad", [True, False])
def test_cram(base, plus, sparse_grad):
    model, inner, reference, plain = pair(base)
    optimizer = CrAM(inner, plus=plus, sparse_grad=sparse_grad)
    drawn = []
    draw = optimizer._draw
    optimizer._draw = lambda: drawn.append(draw()) or drawn[-1]  # a list that the reference reads as it grows
    compare(model, optimizer, reference, PlainCrAM(reference, plain, drawn, plus, sparse_grad))
    assert set(drawn) == {0.5, 0.7, 0.9}, "each sparsity is drawn in 50 steps"


@pytest.mark.parametrize("name", ["sam", "sparse_sam"])
def test_sharpness_of_a_quadratic(name):
    """L = w' H w / 2 with known H: e = rho g / ||g||, so the gradient is H (w + rho H w / ||H w||)."""
    curvature = torch.tensor([1.0, 4.0, 0.5, 9.0], dtype=torch.float64)
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64))
    base = torch.optim.SGD([w], lr=0.1)
    optimizer = SAM(base, rho=0.3) if name == "sam" else SparseSAM(base, rho=0.3, sparsity=0.0)
    start = w.detach().clone()
    g = curvature * start
    eps = 1e-12 if name == "sam" else 1e-7
    expected = start - 0.1 * curvature * (start + 0.3 * g / (g.norm() + eps))

    def closure():
        optimizer.zero_grad()
        loss = (curvature * w.square()).sum() / 2
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == pytest.approx(float((curvature * start.square()).sum() / 2))
    torch.testing.assert_close(w.detach(), expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(w.grad, (curvature * (start + 0.3 * g / (g.norm() + eps)))) or torch.allclose(
        w.grad, curvature * (start + 0.3 * g / (g.norm() + eps)), rtol=1e-14
    )


def test_sam_settles_where_the_closed_form_says():
    """In one dimension the perturbed gradient step is w -> w - lr h (w + rho sign(w)): two points, w* and -w*."""
    lr, h, rho = 0.5, 1.0, 0.1
    w = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = SAM(torch.optim.SGD([w], lr=lr), rho=rho)

    def closure():
        optimizer.zero_grad()
        loss = h * w.square().sum() / 2
        loss.backward()
        return loss

    for _ in range(200):
        optimizer.step(closure)
    settled = lr * h * rho / (2 - lr * h)  # -w* = w* - lr h (w* + rho)
    assert abs(float(w.detach())) == pytest.approx(settled, rel=1e-9)


def test_interval_perturbs_every_kth_step():
    model, inner, reference, plain = pair("sgd")
    optimizer = SAM(inner, interval=3)
    calls = []
    twin = PlainSAM(reference, plain)
    for step in range(20):
        evaluate = closure_of(model, optimizer, step)
        calls.clear()
        optimizer.step(lambda evaluate=evaluate: calls.append(1) or evaluate())
        assert len(calls) == (2 if step % 3 == 0 else 1)
        twin.rhos = [rho if step % 3 == 0 else 0.0 for rho in PlainSAM(reference, plain).rhos]
        twin.step(step)
    assert_close(model, reference)


def test_gradients_are_sums_over_all_groups():
    """A group's rho scales its own perturbation; the norm is of all groups, those with rho 0 included."""
    model = net()
    optimizer = SAM(base_of(groups(model)))
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 0).backward()
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    optimizer.first_step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            old = next(b for b, q in zip(before, model.parameters(), strict=True) if q is p)
            torch.testing.assert_close(p.detach() - old, group["rho"] * p.grad / total, rtol=1e-9, atol=1e-15)
            assert group["rho"] > 0 or torch.equal(p, old)


@pytest.mark.parametrize("make", [SAM, SSAM, SparseSAM, CrAM])
def test_rho_zero_is_the_base(make):
    model, reference = net(), net()
    options = {"sparsities": (0.0,), "plus": False} if make is CrAM else {}
    optimizer = make(base_of(model.parameters()), rho=0.0, **options)
    train(model, optimizer, range(10))
    train(reference, base_of(reference.parameters()), range(10), closure=False)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)
