"""Penalties as a step of their own: what they equal, what they leave alone, what they refuse."""

import copy
import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from reference import (
    assert_same,
    make_closure,
    plain_moments,
    plain_shrink,
    small_batch,
    small_net,
    through_file,
    train,
    weights,
)
from torch import nn
from torch.optim import lr_scheduler

from wcr_optim import SGD, WCR, AdamW, Decoupled, HoyerDecay, L1Decay, L2Decay, param_groups, penalties
from wcr_optim.moments import moments

WRAPPERS = {
    "inverse_variance": (lambda base, strength: WCR(base, strength), "weight_concentration", 1e-2),
    "scale_free": (lambda base, strength: WCR(base, strength, form="scale_free"), "weight_concentration", 1e-2),
    "l1": (L1Decay, "l1_decay", 1e-2),
    "l2": (L2Decay, "l2_decay", 1e-1),
    "hoyer": (HoyerDecay, "hoyer_decay", 1e-2),
}
each = pytest.mark.parametrize("name", WRAPPERS)


def sgd(net, **options):
    return torch.optim.SGD(net.parameters(), **{"lr": 0.1, "momentum": 0.9} | options)


def wrapped(name, net, strength=None):
    make, _, default = WRAPPERS[name]
    return make(sgd(net), default if strength is None else strength)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"amsgrad": True}])
def test_adam_with_decoupled_l2_is_adamw_bit_for_bit(dtype, options):
    adamw_net, ours_net = small_net(dtype), small_net(dtype)
    adamw = torch.optim.AdamW(adamw_net.parameters(), lr=1e-2, weight_decay=0.1, **options)
    ours = Decoupled(torch.optim.Adam(ours_net.parameters(), lr=1e-2, **options), penalties.L2(), 0.1)
    train(adamw_net, adamw, range(100), lr_scheduler.CosineAnnealingLR(adamw, 100))
    train(ours_net, ours, range(100), lr_scheduler.CosineAnnealingLR(ours, 100))
    assert_same(adamw_net, ours_net)


@each
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_strength_zero_is_the_bare_base_bit_for_bit(name, base):
    bare_net, ours_net = small_net(), small_net()
    make, *_ = WRAPPERS[name]
    train(bare_net, base(bare_net.parameters(), lr=1e-2), range(30))
    train(ours_net, make(base(ours_net.parameters(), lr=1e-2), 0.0), range(30))
    assert_same(bare_net, ours_net)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD, torch.optim.SGD),
        (AdamW, torch.optim.AdamW),
    ],
)
@pytest.mark.parametrize("strength", [0.0, 1e-2])
def test_drop_ins_are_torchs_classes_with_the_penalty_around_them(ours, theirs, strength):
    shared = {"lr": 0.05, "weight_decay": 0.01, "maximize": False, "foreach": False}
    bare_net, ours_net = small_net(), small_net()
    bare = theirs(bare_net.parameters(), **shared)
    train(bare_net, WCR(bare, strength, form="scale_free") if strength else bare, range(30))
    drop_in = ours(ours_net.parameters(), **shared, weight_concentration=strength, form="scale_free")
    train(ours_net, drop_in, range(30))
    assert_same(bare_net, ours_net)
    assert isinstance(drop_in.base, theirs)


@pytest.mark.parametrize(("ours", "theirs"), [(SGD, torch.optim.SGD), (AdamW, torch.optim.AdamW)])
def test_drop_ins_take_torchs_arguments_in_torchs_order(ours, theirs):
    import inspect

    expected = list(inspect.signature(theirs).parameters.values())
    signature = list(inspect.signature(ours).parameters.values())
    assert [(p.name, p.kind, p.default) for p in signature[: len(expected)]] == [
        (p.name, p.kind, p.default) for p in expected
    ]
    assert [p.name for p in signature[len(expected) :]] == [
        "weight_concentration",
        "form",
        "latent_weights",
    ]


@each
def test_a_step_is_the_flow_then_the_bases_update_with_gradients_from_before(name):
    """The whole wrapper in plain lines, over 50 steps of a changing lr, on weights of two dimensions."""
    ours_net, plain_net = small_net(torch.float64), small_net(torch.float64)
    ours = wrapped(name, ours_net)
    base = sgd(plain_net)
    penalty = ours.penalty
    schedules = lr_scheduler.StepLR(ours, 10, 0.7), lr_scheduler.StepLR(base, 10, 0.7)
    train(ours_net, ours, range(50), schedules[0])
    for step in range(50):
        make_closure(plain_net, base, step)()
        with torch.no_grad():
            for w in plain_net.parameters():
                if w.ndim < 2 and name != "l2":
                    continue
                n, mu, q = (torch.tensor([x], dtype=torch.float64) for x in plain_moments(w))
                s = base.param_groups[0]["lr"] * WRAPPERS[name][2]
                gain, threshold = penalty.flow(penalties.Moments(n, mu, q), s)
                w.copy_(plain_shrink(w, gain.item(), threshold.item()))
        base.step()
        schedules[1].step()
    for a, b in zip(ours_net.parameters(), plain_net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["inverse_variance", "scale_free"])
def test_wcr_concentrates_100_000_gaussian_weights(form):
    """What the name says: energy gathers in the top 5 %, and the median falls, at every step."""
    w = nn.Parameter(torch.randn(100, 1000) * 0.05)
    w.grad = torch.zeros_like(w)
    strength = {"inverse_variance": 1e-1, "scale_free": 2e-5}[form]
    opt = WCR(torch.optim.SGD([w], lr=1.0), strength, form=form)
    shares, medians = [], []
    for _ in range(60):
        energy = w.detach().square().flatten().sort(descending=True).values
        shares.append((energy[: w.numel() // 20].sum() / energy.sum()).item())
        medians.append(w.detach().abs().median().item())
        opt.step()
    assert all(a < b for a, b in pairwise(shares))
    assert all(a > b or a == b == 0.0 for a, b in pairwise(medians))
    assert shares[0] < 0.3
    assert shares[-1] > 0.4
    assert medians[-1] < 0.5 * medians[0]


@each
@pytest.mark.parametrize("value", [0.0, 0.5, math.nan, math.inf])
def test_degenerate_layers(name, value):
    """Left alone by the penalties that concentrate; NaN and inf pass, and never spread."""
    w = nn.Parameter(torch.full((4, 4), value))
    other = nn.Parameter(torch.randn(4, 4))
    for p in (w, other):
        p.grad = torch.zeros_like(p)
    make, _, strength = WRAPPERS[name]
    for _ in range(3):
        opt = make(torch.optim.SGD([w, other], lr=0.1), strength)
        opt.step()
    if name in ("l1", "l2") and math.isfinite(value):
        assert (w <= value).all()
    else:
        assert torch.equal(w, torch.full((4, 4), value)) or (math.isnan(value) and w.isnan().all())
    assert other.isfinite().all()


def test_one_nan_among_good_weights_stays_the_only_one():
    for name in WRAPPERS:
        w = nn.Parameter(torch.randn(5, 5))
        w.data[2, 3] = math.nan
        w.grad = torch.zeros_like(w)
        make, _, strength = WRAPPERS[name]
        make(torch.optim.SGD([w], lr=0.1), strength).step()
        assert w.isnan().sum() == 1


def test_a_one_element_layer_is_left_alone():
    w = nn.Parameter(torch.full((1, 1), 0.7))
    w.grad = torch.zeros_like(w)
    WCR(torch.optim.SGD([w], lr=1.0), 10.0).step()
    assert w.item() == pytest.approx(0.7)


@each
def test_biases_and_norms_are_left_alone_unless_the_group_asks(name):
    net = small_net()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
        p.data += torch.randn_like(p) * 0.1  # a LayerNorm starts with equal magnitudes
    make, _, strength = WRAPPERS[name]
    before = weights(net)
    make(torch.optim.SGD(net.parameters(), lr=0.1), strength).step()
    changed = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
    # l2 is AdamW's decay, and AdamW decays everything.
    assert changed == [name == "l2" or p.ndim >= 2 for p in net.parameters()]

    before = weights(net)
    group = {"params": list(net.parameters()), "min_ndim": 0 if name != "l2" else 2}
    make(torch.optim.SGD([group], lr=0.1), strength).step()
    changed = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
    assert changed == [name != "l2" or p.ndim >= 2 for p in net.parameters()]


def test_a_bare_bases_checkpoint_does_not_take_min_ndim_away():
    net = small_net()
    bare = sgd(net)
    opt = WCR(torch.optim.SGD([{"params": list(net.parameters()), "min_ndim": 1}], lr=0.1))
    opt.load_state_dict(bare.state_dict())
    assert opt.param_groups[0]["min_ndim"] == 1


@each
def test_frozen_and_unused_parameters_are_left_alone(name):
    net = small_net()
    net[0].weight.requires_grad_(False)
    opt = wrapped(name, net)
    unused = nn.Parameter(torch.randn(3, 3))
    opt.add_param_group({"params": [unused]})
    before = [net[0].weight.clone(), unused.clone()]
    train(net, opt, range(3))
    assert torch.equal(net[0].weight, before[0])
    assert torch.equal(unused, before[1])


@each
def test_strength_per_group(name):
    make, option, strength = WRAPPERS[name]
    a, b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    for p in (a, b):
        p.grad = torch.zeros_like(p)
    before = a.detach().clone(), b.detach().clone()
    opt = make(torch.optim.SGD([{"params": [a], option: 0.0}, {"params": [b]}], lr=0.1), strength)
    assert [g[option] for g in opt.param_groups] == [0.0, strength]
    opt.step()
    assert torch.equal(a, before[0])
    assert not torch.equal(b, before[1])
    opt.param_groups[0][option] = strength  # scheduled
    opt.step()
    assert not torch.equal(a, before[0])


def test_groups_with_lr_of_their_own_get_steps_of_their_own():
    a = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    b = nn.Parameter(a.detach().clone())
    for p in (a, b):
        p.grad = torch.zeros_like(p)
    opt = L1Decay(torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}]), 0.5)
    start = a.detach().clone()
    opt.step()
    torch.testing.assert_close(a.detach(), plain_shrink(start, 1.0, 0.05))
    torch.testing.assert_close(b.detach(), plain_shrink(start, 1.0, 0.10))


def test_tied_weights_are_regularized_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.b.weight = self.a.weight

    net = Tied()
    start = net.a.weight.detach().clone()
    opt = L1Decay(torch.optim.SGD(net.parameters(), lr=0.1), 0.5)
    (net.b(net.a(torch.randn(2, 5))) * 0).sum().backward()
    opt.step()
    torch.testing.assert_close(net.b.weight.detach(), plain_shrink(start, 1.0, 0.05))


@each
def test_composition_of_two_penalties_is_both_in_turn(name):
    if name == "l1":
        return
    ours, plain = small_net(torch.float64), small_net(torch.float64)
    nested = WRAPPERS[name][0](L1Decay(sgd(ours), 1e-3), 1e-2)
    assert {"l1_decay", WRAPPERS[name][1]} <= set(nested.param_groups[0])
    train(ours, nested, range(5))
    outer_only = wrapped(name, plain, 1e-2)
    train(plain, outer_only, range(5))
    zeros = sum((p == 0).sum().item() for p in ours.parameters() if p.ndim > 1)
    assert zeros >= sum((p == 0).sum().item() for p in plain.parameters() if p.ndim > 1)
    assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


@each
def test_gradscaler_skips_the_whole_step_on_inf(name):
    net = small_net()
    opt = wrapped(name, net)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(poison: bool):
        x, y = small_batch(0)
        opt.zero_grad()
        scaler.scale((net(x) - y).square().mean()).backward()
        if poison:
            net[0].weight.grad[0, 0] = math.inf
        scaler.step(opt)
        scaler.update()

    before = weights(net)
    step(poison=True)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
    assert scaler.get_scale() == 4.0
    assert not opt.state or all("momentum_buffer" not in s for s in opt.state.values())
    step(poison=False)
    plain_net = small_net()
    train(plain_net, wrapped(name, plain_net), [0])
    for a, b in zip(net.parameters(), plain_net.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@each
def test_dcps_probing_step_changes_no_weight(name):
    """torch.distributed.checkpoint makes state by a step with lr = 0 and zero gradients."""
    net = small_net(torch.bfloat16)
    opt = wrapped(name, net)
    opt.param_groups[0]["lr"] = torch.tensor(0.0)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before, groups = weights(net), dict(opt.param_groups[0])
    opt.step(closure=None)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
    assert dict(opt.param_groups[0]) == groups, "no counter went on"


@each
def test_tensor_lr_and_tensor_strength(name):
    make, _, strength = WRAPPERS[name]
    a, b = small_net(), small_net()
    train(a, make(torch.optim.SGD(a.parameters(), lr=0.1), strength), range(5))
    base = torch.optim.SGD(b.parameters(), lr=torch.tensor(0.1, dtype=torch.float64), foreach=False)
    train(b, make(base, torch.tensor([strength], dtype=torch.float64)), range(5))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@each
def test_bf16_weights_follow_float32s_where_plain_rounding_stands_still(name):
    """1,000 steps, each far below bfloat16's resolution."""
    start = (torch.randn(64, 64) * 0.1).bfloat16()
    make, _, _ = WRAPPERS[name]
    strength = {"inverse_variance": 1e-2, "scale_free": 4e-8, "hoyer": 2e-6, "l1": 2e-5, "l2": 1e-4}[name]
    finals = {}
    for kind, dtype in {"exact": torch.float64, "ours": torch.bfloat16}.items():
        w = nn.Parameter(start.clone().to(dtype))
        w.grad = torch.zeros_like(w)
        opt = make(torch.optim.SGD([w], lr=1.0), strength)
        for _ in range(1000):
            opt.step()
        finals[kind] = w.detach().double()
    moved = (finals["exact"] - start.double()).norm()
    assert moved / start.double().norm() > 0.02, "the steps add up to something"
    # Rounding noise is unbiased: it averages out over the weights, along the direction of the exact change.
    direction = finals["exact"] - start.double()
    share = ((finals["ours"] - start.double()) * direction).sum() / direction.square().sum()
    assert share == pytest.approx(1.0, abs=0.05)


def test_stochastic_rounding_can_be_turned_off():
    w = nn.Parameter(torch.randn(32, 32).bfloat16())
    start = w.detach().clone()
    w.grad = torch.zeros_like(w)
    opt = Decoupled(torch.optim.SGD([w], lr=1.0), penalties.L2(), 1e-4, stochastic_rounding=False)
    for _ in range(10):
        opt.step()
    assert torch.equal(w, start)
    assert "rounding_seed" not in opt.param_groups[0]


def test_low_precision_runs_repeat_and_leave_the_global_generator_alone():
    finals = []
    for manual_seed in (1, 2):
        torch.manual_seed(manual_seed)
        net = small_net(torch.bfloat16)
        opt = WCR(torch.optim.SGD(net.parameters(), lr=0.1), 1e-2)
        state = torch.get_rng_state()
        train(net, opt, range(10))
        assert torch.equal(state, torch.get_rng_state())
        finals.append(net)
    assert_same(*finals)


def test_a_penalty_of_ones_own():
    class Lasso(penalties.Penalty):
        option = "lasso"

        def value(self, moments):
            return moments.n * moments.mu

        def flow(self, moments, s):
            return torch.ones_like(moments.mu), s * torch.ones_like(moments.mu)

    own, ours = small_net(), small_net()
    train(own, Decoupled(sgd(own), Lasso(), 1e-2), range(10))
    train(ours, L1Decay(sgd(ours), 1e-2), range(10))
    assert_same(own, ours)


def test_lbfgs_gets_the_penalty_after_its_step():
    plain_net, ours_net = small_net(torch.float64), small_net(torch.float64)
    plain = torch.optim.LBFGS(plain_net.parameters(), lr=0.5, max_iter=3)
    ours = L1Decay(torch.optim.LBFGS(ours_net.parameters(), lr=0.5, max_iter=3), 1e-2)
    for step in range(4):
        expected = plain.step(make_closure(plain_net, plain, step))
        loss = ours.step(make_closure(ours_net, ours, step))
        assert loss == expected
        with torch.no_grad():
            for w in plain_net.parameters():
                if w.ndim >= 2:
                    w.copy_(plain_shrink(w, 1.0, 0.5 * 1e-2))
    assert_same(plain_net, ours_net)
    with pytest.raises(ValueError, match="LBFGS needs a closure"):
        ours.step()


def test_sparse_gradients_of_dense_weights_work():
    table = nn.Embedding(10, 4, sparse=True)
    opt = L1Decay(torch.optim.SparseAdam(table.parameters(), lr=0.1), 1e-2)
    table(torch.tensor([1, 2])).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step()
    assert table.weight.isfinite().all()


# --- what is refused -------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("bad", [-1e-3, math.nan, math.inf, -math.inf, torch.tensor(-1.0), torch.tensor(math.nan)])
def test_bad_strength_is_named(name, bad):
    make, option, strength = WRAPPERS[name]
    with pytest.raises(ValueError, match=f"{option} must be finite and not negative, got .*{float(bad)}"):
        make(sgd(small_net()), bad)
    opt = make(sgd(small_net()), strength)
    with pytest.raises(ValueError, match=rf"got .*{float(bad)}.* in param_groups\[1\]"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], option: bad})
    assert len(opt.param_groups) == 1


@each
def test_tensor_of_many_strengths_is_refused(name):
    make, option, _ = WRAPPERS[name]
    with pytest.raises(ValueError, match=rf"{option} must be one number, got a tensor of shape \(2,\)"):
        make(sgd(small_net()), torch.ones(2))


@each
def test_tensor_of_a_whole_number_is_refused(name):
    make, option, _ = WRAPPERS[name]
    with pytest.raises(TypeError, match=rf"{option} must be a floating-point number, got a tensor of torch\.int64"):
        make(sgd(small_net()), torch.tensor(1))


@pytest.mark.parametrize("bad", ["1e-3", None, True, [1e-3]])
def test_strength_that_is_no_number(bad):
    with pytest.raises(TypeError, match="weight_concentration must be a number, got"):
        WCR(sgd(small_net()), bad)


@each
def test_strength_turned_bad_by_a_schedule_stops_the_step_before_any_change(name):
    net = small_net()
    opt = wrapped(name, net)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    make_closure(net, opt, 0)()
    opt.param_groups[1][WRAPPERS[name][1]] = -1.0
    before = weights(net)
    with pytest.raises(ValueError, match=r"got -1.0 in param_groups\[1\]"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))


@each
@pytest.mark.parametrize("bad", [-1e-4, math.nan, math.inf, torch.tensor(-1e-4), None, "0.1", True])
def test_a_learning_rate_gone_bad_stops_the_step_before_any_change(name, bad):
    net = small_net()
    opt = wrapped(name, net)
    make_closure(net, opt, 0)()
    opt.param_groups[0]["lr"] = bad
    before = weights(net)
    with pytest.raises((ValueError, TypeError), match=r"lr must be .* in param_groups\[0\]"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
    opt.param_groups[0] |= {WRAPPERS[name][1]: 0.0, "lr": -1e-4}  # without a penalty it is the base's to judge
    opt.step()


@each
def test_gradients_through_the_step_are_refused_where_a_penalty_acts(name):
    make, _, strength = WRAPPERS[name]
    with pytest.raises(ValueError, match=r"differentiable=True in param_groups\[0\]"):
        make(torch.optim.SGD(small_net().parameters(), lr=0.1, differentiable=True), strength)
    make(torch.optim.SGD(small_net().parameters(), lr=0.1, differentiable=True), 0.0)


@pytest.mark.parametrize("bad", [None, 1.5, math.nan, "2", True])
def test_min_ndim_that_is_no_whole_number(bad):
    with pytest.raises(TypeError, match=r"min_ndim must be a whole number, got .* in param_groups\[0\]"):
        WCR(torch.optim.SGD([{"params": small_net().parameters(), "min_ndim": bad}], lr=0.1))


@pytest.mark.parametrize("option", ["eps", "max_growth"])
@pytest.mark.parametrize("bad", [None, "1e-8", True])
def test_an_option_of_a_form_that_is_no_number(option, bad):
    with pytest.raises(TypeError, match=f"{option} must be a number, got"):
        WCR(sgd(small_net()), **{option: bad})


def test_numpys_numbers_put_into_a_group_load_again_from_a_safe_checkpoint():
    opt = wrapped("scale_free", small_net())
    opt.param_groups[0]["weight_concentration"] = np.logspace(-4, -2, 3)[1]
    opt.param_groups[0]["base_lr_factor"] = np.float64(2.0)
    (group,) = through_file(opt.state_dict())["param_groups"]
    assert (group["weight_concentration"], group["base_lr_factor"]) == (pytest.approx(1e-3), 2.0)


def test_bad_strength_in_a_checkpoint_is_refused_before_any_change():
    net = small_net()
    opt = wrapped("inverse_variance", net)
    train(net, opt, range(2))
    state = opt.state_dict()
    state["param_groups"][0] = state["param_groups"][0] | {"weight_concentration": -1.0, "lr": 5.0}
    with pytest.raises(ValueError, match=r"weight_concentration must be finite and not negative, got -1\.0"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.1


def test_unknown_form_and_backend():
    with pytest.raises(ValueError, match="unknown form 'variance'; choose 'inverse_variance'"):
        WCR(sgd(small_net()), form="variance")
    with pytest.raises(ValueError, match="unknown form 'variance'"):
        SGD(small_net().parameters(), form="variance")
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose one of 'auto', 'eager'"):
        WCR(sgd(small_net()), backend="cuda")


MADE_WITH_A_STRENGTH = [
    ("weight_concentration", lambda groups, **given: WCR(torch.optim.SGD(groups, lr=0.1), **given)),
    ("hoyer_decay", lambda groups, **given: HoyerDecay(torch.optim.SGD(groups, lr=0.1), **given)),
    ("l1_decay", lambda groups, **given: L1Decay(torch.optim.SGD(groups, lr=0.1), **given)),
    ("weight_concentration", lambda groups, **given: SGD(groups, lr=0.1, **given)),
    ("weight_concentration", lambda groups, **given: AdamW(groups, lr=0.1, **given)),
]


@pytest.mark.parametrize(("option", "make"), MADE_WITH_A_STRENGTH)
def test_a_strength_that_no_group_uses_is_told(option, make):
    first, *rest = small_net().parameters()
    with pytest.warns(UserWarning, match=rf"{option}=0.5 is used by no group, .* 0.01, 0.0: set it there") as told:
        make([{"params": [first], option: 1e-2}, {"params": rest, option: 0.0}], **{option: 0.5})
    assert told[0].filename == __file__


@pytest.mark.parametrize(("option", "make"), MADE_WITH_A_STRENGTH)
def test_a_strength_that_nobody_chose_or_some_group_takes_is_not(option, make):
    first, *rest = small_net().parameters()
    make([{"params": [first], option: 1e-2}, {"params": rest, option: 0.0}])
    make([{"params": [first], option: 1e-2}, {"params": rest, option: 0.0}], **{option: 1e-2})
    make([{"params": [first], option: 1e-2}, {"params": rest}], **{option: 0.5})


@pytest.mark.parametrize("make", [WCR, HoyerDecay, L1Decay, L2Decay])
def test_what_param_groups_leaves_out_is_left_alone_by_every_penalty(make):
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    before = copy.deepcopy(net)
    optimizer = make(torch.optim.SGD(param_groups(net, exclude="2"), lr=0.1))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True)]
    assert moved == [True, False, False, False, False, False]


def test_a_learning_rate_of_any_real_type():
    nets = [small_net(), small_net()]
    for net, lr in zip(nets, (0.5, np.float32(0.5)), strict=True):
        optimizer = WCR(torch.optim.SGD(net.parameters(), lr=0.1), 0.1)
        optimizer.param_groups[0]["lr"] = lr
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in nets), strict=True))


def test_a_penalty_class_or_a_name_instead_of_a_penalty():
    with pytest.raises(TypeError, match="got the class L1"):
        Decoupled(sgd(small_net()), penalties.L1, 0.1)
    with pytest.raises(TypeError, match="got 'l1'"):
        Decoupled(sgd(small_net()), "l1", 0.1)


def test_a_base_that_is_no_optimizer():
    with pytest.raises(TypeError, match=r"got the class SGD; write WCR\(SGD\(params, lr=...\)\)"):
        WCR(torch.optim.SGD)
    with pytest.raises(TypeError, match=r"wraps an instance of torch\.optim\.Optimizer, got generator"):
        WCR(small_net().parameters())


def test_the_same_penalty_twice_is_refused():
    with pytest.raises(ValueError, match="'weight_concentration' is already an option"):
        WCR(WCR(sgd(small_net())), form="scale_free")


@pytest.mark.parametrize(
    ("w", "what"),
    [(torch.ones(2, 2, dtype=torch.complex64), "complex"), (torch.eye(3).to_sparse(), "sparse")],
)
def test_complex_and_sparse_weights_are_refused_under_a_penalty_and_only_there(w, what):
    group = {"params": [nn.Parameter(w)]}
    with pytest.raises(TypeError, match=f"real, dense, floating weights, got a {what} tensor of shape"):
        WCR(torch.optim.SGD([group], lr=0.1))
    opt = WCR(torch.optim.SGD([group | {"weight_concentration": 0.0}], lr=0.1))
    with pytest.raises(TypeError, match=rf"weight_concentration in param_groups\[1\].* {what} "):
        opt.add_param_group({"params": [nn.Parameter(w.clone())]})


def test_a_base_without_lr_is_refused():
    class NoRate(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            return None

    with pytest.raises(ValueError, match=r"param_groups\[0\] has no 'lr'"):
        WCR(NoRate(small_net().parameters()))


def test_moments_of_the_networks_layers_are_those_that_the_penalty_sees():
    """The preprint's form keeps the mean magnitude of every layer, whatever else moves."""
    net = small_net(torch.float64)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
        p.data = p.sign() * (p.abs() + 0.5)
    layers = [p for p in net.parameters() if p.ndim >= 2]
    before = moments(layers)
    WCR(torch.optim.SGD(net.parameters(), lr=0.1), 1e-2).step()
    after = moments(layers)
    torch.testing.assert_close(after.mu, before.mu, rtol=1e-12, atol=0)
    assert (after.variance > before.variance).all()


@pytest.mark.parametrize("make", [WCR, L1Decay, L2Decay])
def test_lazy_parameters_are_taken_as_torch_takes_them(make):
    """They have no shape until the first forward."""
    net = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    optimizer = make(torch.optim.SGD(net.parameters(), lr=0.1), 1e-2)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        before = net[0].weight.detach().clone()
        optimizer.step()
    assert not torch.equal(net[0].weight, before)


def test_a_growth_whose_square_is_no_number_bounds_nothing():
    weights = [nn.Parameter(torch.linspace(-1, 1, 40).view(8, 5)) for _ in range(2)]
    for w, most in zip(weights, (1e300, math.inf), strict=True):
        w.grad = torch.zeros_like(w)
        WCR(torch.optim.SGD([w], lr=0.1), 1e3, form="scale_free", max_growth=most).step()
    assert torch.equal(*weights)
