"""SparseSAM's masks: exact counts, per-sample Fisher information, drop and growth, and what they leave alone."""

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from sharpness_reference import base_of, batch, closure_of, gradients_at, groups, net, plain_norm, plain_top, train
from torch import nn

from wcr_optim import WCR
from wcr_optim.sharpness import SSAM, CrAM, SparseSAM


def masks_of(optimizer):
    return [optimizer._masks.get(optimizer, p) for group in optimizer.param_groups for p in group["params"]]


def moved_in(model, optimizer, step):
    """Which entries the second pass of a step finds changed, and by how much."""
    passes = []
    evaluate = closure_of(model, optimizer, step)
    optimizer.step(lambda: passes.append([p.detach().clone() for p in model.parameters()]) or evaluate())
    return [after - before for before, after in zip(*passes, strict=True)]


@pytest.mark.parametrize("mask", ["fisher", "dynamic"])
@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.9, 0.999, 1.0])
def test_exactly_the_share_is_perturbed(mask, sparsity):
    model = net()
    optimizer = SparseSAM(base_of(model.parameters()), 0.1, sparsity, mask, update_freq=2, total_steps=20)
    total = sum(p.numel() for p in model.parameters())
    for step in range(8):
        moved = moved_in(model, optimizer, step)
        assert sum(int((e != 0).sum()) for e in moved) == total - round(sparsity * total)


@given(
    sparsity=st.floats(0, 1),
    update_freq=st.integers(1, 4),
    drop_rate=st.floats(0, 1),
    total_steps=st.none() | st.integers(1, 12),
)
@settings(max_examples=25, deadline=None)
def test_dynamic_masks_keep_their_count_whatever_the_options(sparsity, update_freq, drop_rate, total_steps):
    model = nn.Linear(7, 5).double()
    optimizer = SparseSAM(
        torch.optim.SGD(model.parameters(), lr=0.01),
        sparsity=sparsity,
        mask="dynamic",
        update_freq=update_freq,
        drop_rate=drop_rate,
        total_steps=total_steps,
    )
    x = torch.randn(6, 7, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
        assert sum(int(mask.sum()) for mask in masks_of(optimizer)) == 40 - round(sparsity * 40)


def test_perturbation_is_masked_and_not_renormalized():
    model = net()
    optimizer = SparseSAM(base_of(groups(model, (0.1, 0.3, 0.2))), sparsity=0.8)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    rhos = [group["rho"] for group in optimizer.param_groups for _ in group["params"]]
    g = gradients_at(model, params, [p.detach() for p in params], 0)
    kept = plain_top([x**2 for x in g], 0.8)
    moved = moved_in(model, optimizer, 0)
    for e, x, mask, rho in zip(moved, g, kept, rhos, strict=True):
        torch.testing.assert_close(e, mask * rho * x / (plain_norm(g) + 1e-7), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fisher_masks_of_small_gradients_whose_squares_half_precision_loses(dtype):
    w, g = torch.nn.Parameter(torch.zeros(1000, dtype=dtype)), torch.linspace(1e-5, 1e-4, 1000).to(dtype)
    optimizer = SparseSAM(torch.optim.SGD([w], lr=0.1), sparsity=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (w * g).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    masks = [optimizer._masks.get(optimizer, w).clone()]
    optimizer.update_mask([(w * g).sum()])
    masks.append(optimizer._masks.get(optimizer, w))
    for mask in masks:
        assert not mask[:490].any()
        assert mask[510:].all()


def test_fisher_mask_of_single_samples():
    """update_mask(losses) ranks by the sum of squared per-sample gradients, not by the square of their sum."""
    model = net()
    optimizer = SparseSAM(base_of(model.parameters()), sparsity=0.7, update_freq=None)
    x, y = batch(0)
    params = list(model.parameters())
    fisher = [torch.zeros_like(p) for p in params]
    for a, b in zip(x, y, strict=True):
        for total, g in zip(
            fisher,
            torch.autograd.grad((model(a[None]) - b[None]).square().mean(), params),
            strict=True,
        ):
            total += g**2
    expected = plain_top(fisher, 0.7)
    batch_mask = plain_top([g**2 for g in gradients_at(model, params, [p.detach() for p in params], 0)], 0.7)
    assert any(not torch.equal(a, b) for a, b in zip(expected, batch_mask, strict=True))
    optimizer.update_mask((model(a[None]) - b[None]).square().mean() for a, b in zip(x, y, strict=True))
    assert all(p.grad is None for p in params)
    for steps in ([0], range(1, 5)):
        for mask, e in zip(masks_of(optimizer), expected, strict=True):
            assert torch.equal(mask, e.bool())
        train(model, optimizer, steps)


def test_mask_made_before_training_is_used_until_the_first_refresh():
    model = net()
    optimizer = SparseSAM(base_of(model.parameters()), sparsity=0.7, update_freq=3, num_samples=1)
    x, y = batch(5)
    optimizer.update_mask((model(a[None]) - b[None]).square().mean() for a, b in zip(x, y, strict=True))
    made = [mask.clone() for mask in masks_of(optimizer)]
    train(model, optimizer, range(3))
    assert all(torch.equal(a, b) for a, b in zip(masks_of(optimizer), made, strict=True))
    train(model, optimizer, [3])
    assert any(not torch.equal(a, b) for a, b in zip(masks_of(optimizer), made, strict=True))


def test_update_mask_leaves_running_statistics_alone_and_the_mask_after_an_error():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).double()
    optimizer = SparseSAM(base_of(model.parameters()), model=model)
    x, y = batch(0)
    optimizer.update_mask((model(a[None]) - b[None]).square().mean() for a, b in zip(x, y, strict=True))
    assert model[1].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, torch.zeros(4, dtype=torch.float64))
    made = [mask.clone() for mask in masks_of(optimizer)]

    def failing():
        yield model(x).square().mean()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.update_mask(failing())
    with pytest.raises(ValueError, match="no losses"):
        optimizer.update_mask([])
    with pytest.raises(ValueError, match="not finite"):
        optimizer.update_mask(model(x).sum() * float("nan") for _ in range(1))
    assert model[1].num_batches_tracked == 0
    assert all(torch.equal(a, b) for a, b in zip(masks_of(optimizer), made, strict=True))
    dynamic = SparseSAM(base_of(net().parameters()), mask="dynamic")
    with pytest.raises(ValueError, match="mask='dynamic'"):
        dynamic.update_mask([])


@pytest.mark.parametrize("total_steps", [None, 10])
def test_dynamic_mask_drops_the_smallest_gradients_and_grows_elsewhere(total_steps):
    model = net()
    optimizer = SparseSAM(
        base_of(model.parameters()), sparsity=0.6, mask="dynamic", update_freq=2, drop_rate=0.4, total_steps=total_steps
    )
    params = list(model.parameters())
    previous = None
    for step in range(12):
        g = torch.cat([x.flatten().abs() for x in gradients_at(model, params, [p.detach() for p in params], step)])
        train(model, optimizer, [step])
        mask = torch.cat([m.flatten() for m in masks_of(optimizer)])
        if previous is not None and step % 2:
            assert torch.equal(mask, previous)
        elif previous is not None:
            share = 0.4 if total_steps is None else 0.4 * (1 + math.cos(math.pi * min(step / 10, 1))) / 2
            live = int(previous.sum())
            dropped = previous & ~mask
            assert int(dropped.sum()) == int((mask & ~previous).sum()) == int(share * live)
            if dropped.any():
                assert g[dropped].max() <= g[previous & mask].min()
        previous = mask


def test_dynamic_masks_go_on_when_layers_come_and_the_sparsity_falls():
    torch.manual_seed(0)
    first, second = (nn.Parameter(torch.randn(shape)) for shape in ((100, 10), (10, 10)))
    optimizer = SparseSAM(torch.optim.SGD([first], lr=0.0), 0.1, sparsity=0.2, mask="dynamic", update_freq=2)

    def step():
        for p in (first, second):
            p.grad = torch.randn_like(p)
        optimizer.first_step()
        optimizer.second_step()

    step()
    optimizer.add_param_group({"params": [second]})
    for _ in range(5):
        step()
    assert sum(int(mask.sum()) for mask in masks_of(optimizer)) == 1100 - 220
    optimizer.sparsity = 0.0
    for _ in range(4):
        step()
    assert all(mask.all() for mask in masks_of(optimizer))


@pytest.mark.parametrize("make", [SparseSAM, CrAM])
@pytest.mark.parametrize("seed", [None, 1.5, True])
def test_a_seed_that_is_no_whole_number_is_named(make, seed):
    with pytest.raises(TypeError, match=f"seed must be a whole number, got {seed}"):
        make(torch.optim.SGD(net().parameters(), lr=0.1), seed=seed)


def test_random_masks_depend_on_the_seed_alone():
    def first_mask(seed, noise):
        torch.manual_seed(noise)
        model = net()
        optimizer = SparseSAM(base_of(model.parameters()), mask="dynamic", seed=seed)
        state = torch.get_rng_state()
        train(model, optimizer, [0])
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([m.flatten() for m in masks_of(optimizer)])

    assert torch.equal(first_mask(1, 5), first_mask(1, 6))
    assert not torch.equal(first_mask(1, 5), first_mask(2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_saved_as_booleans_and_come_back_as_such(dtype):
    model = net(dtype)
    optimizer = WCR(SparseSAM(torch.optim.SGD(model.parameters(), lr=0.01)), 1e-3)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    assert all(values["sparse_sam_mask"].dtype == torch.bool for values in state["state"].values())
    other = WCR(SparseSAM(torch.optim.SGD(net(dtype).parameters(), lr=0.01)), 1e-3)
    other.load_state_dict(state)
    for values, p in zip(state["state"].values(), other.param_groups[0]["params"], strict=True):
        assert other.state[p]["sparse_sam_mask"].dtype == torch.bool
        assert torch.equal(other.state[p]["sparse_sam_mask"], values["sparse_sam_mask"])


def assert_resumes(model, optimizer, begun, steps):
    """A checkpoint of now in new objects goes on as these do, bit for bit."""
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, resumed = begun()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, steps)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("mask", ["fisher", "dynamic"])
def test_a_checkpoint_after_an_interrupted_step_resumes_bit_for_bit(mask):
    def begun():
        model = net()
        return model, SparseSAM(base_of(model.parameters()), mask=mask, update_freq=2, num_samples=2)

    model, optimizer = begun()
    train(model, optimizer, range(3))
    calls = []

    def interrupted():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return closure_of(model, optimizer, 3)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted)
    assert_resumes(model, optimizer, begun, range(3, 8))


def test_a_plain_step_after_a_pass_that_was_given_up_takes_over_no_mask():
    model = net()
    optimizer = SparseSAM(base_of(model.parameters()), update_freq=1)
    train(model, optimizer, range(2))
    before = [mask.clone() for mask in masks_of(optimizer)]
    closure_of(model, optimizer, 2)()
    optimizer.first_step()
    optimizer.gather()
    optimizer.zero_grad()  # the step is left out
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # as a checkpoint loader's probe
    for mask, other in zip(masks_of(optimizer), before, strict=True):
        assert torch.equal(mask, other)


def test_dynamic_masks_of_complex_parameters_go_by_the_gradients_magnitudes():
    w = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))
    optimizer = SparseSAM(torch.optim.SGD([w], lr=0.0), mask="dynamic", update_freq=1, drop_rate=0.5, seed=2)
    sizes = torch.arange(1.0, 17.0).reshape(4, 4)

    def closure():
        optimizer.zero_grad()
        w.grad = sizes * torch.polar(torch.ones(4, 4), sizes)
        return torch.tensor(0.0)

    optimizer.step(closure)
    (before,) = (mask.clone() for mask in masks_of(optimizer))
    optimizer.step(closure)
    (after,) = masks_of(optimizer)
    assert after.sum() == before.sum() == 8
    assert set(sizes[before].sort().values[-4:].tolist()) <= set(sizes[after].tolist())


@pytest.mark.parametrize("make", [SSAM, SparseSAM])
def test_a_base_that_clears_the_gradients_in_its_step_keeps_the_state(make):
    """Masks and perturbations are saved with the parameters that were stepped, whatever is in .grad afterwards."""

    def begun():
        model = net()
        base = torch.optim.SGD(model.parameters(), lr=0.05)
        base.register_step_post_hook(lambda optimizer, args, kwargs: optimizer.zero_grad())
        return model, make(base, rho=0.3)

    model, optimizer = begun()
    train(model, optimizer, range(3))
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))
    assert_resumes(model, optimizer, begun, range(3, 6))


@pytest.mark.parametrize("mask", ["fisher", "dynamic"])
def test_a_step_that_is_tried_again_uses_the_same_masks(mask):
    """A failed second pass does not count its gradient twice, nor draw another mask."""
    models = [net(), net()]
    optimizers = [SparseSAM(base_of(model.parameters()), mask=mask, update_freq=2, num_samples=2) for model in models]
    for step in range(6):
        calls = []

        def closure(step=step, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise ValueError("out of memory")
            return closure_of(models[0], optimizers[0], step)()

        with pytest.raises(ValueError, match="out of memory"):
            optimizers[0].step(closure)
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, [step])
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)
