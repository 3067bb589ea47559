"""The nine rules of a wrapper that behaves as torch.optim.Optimizer does, on the wrapper's own, without a penalty."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from reference import assert_same, make_closure, small_net, through_file, train, weights
from torch.optim import lr_scheduler

from wcr_optim import WCR, L1Decay, OptimizerWrapper


class Plain(OptimizerWrapper):
    """A wrapper with an option and nothing else, and a record of its phases."""

    def __init__(self, base, pace=1.0):
        super().__init__(base, pace=pace)


class Second(OptimizerWrapper):
    def __init__(self, base, weight=1.0):
        super().__init__(base, weight=weight)


def sgd(net, **options):
    return torch.optim.SGD(net.parameters(), **{"lr": 0.1, "momentum": 0.9} | options)


@pytest.mark.parametrize("closure", [False, True])
def test_wrapping_changes_nothing(closure):
    bare, wrapped = small_net(), small_net()
    train(bare, sgd(bare), range(20))
    train(wrapped, Second(Plain(sgd(wrapped))), range(20), closure=closure)
    assert_same(bare, wrapped)


def test_is_an_optimizer_and_shows_the_bases_properties():
    net = small_net()
    base = sgd(net)
    opt = Second(Plain(base))
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state
    assert opt.defaults is base.defaults
    base.load_state_dict(base.state_dict())  # rebinds groups and state
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state
    opt.param_groups = opt.param_groups[:]
    opt.state = copy.copy(opt.state)
    opt.defaults = dict(opt.defaults)
    assert (opt.param_groups, opt.state, opt.defaults) == (base.param_groups, base.state, base.defaults)
    assert opt.param_groups is base.param_groups


def test_loss_of_the_closure_is_returned():
    net = small_net()
    opt = Second(Plain(sgd(net)))
    evaluate = make_closure(net, opt, 0)
    before = evaluate().item()
    assert opt.step(evaluate).item() == before
    assert opt.step() is None


def test_phases_run_outside_in_and_gradients_are_gathered_once():
    events = []

    class Traced(OptimizerWrapper):
        def __init__(self, base, name):
            self.name = name
            super().__init__(base)

        def gather(self, closure):
            events.append(f"{self.name} gathers")
            return super().gather(closure)

        def update(self):
            events.append(f"{self.name} updates")
            super().update()

    net = small_net()
    opt = Traced(Traced(sgd(net), "inner"), "outer")
    evaluate = make_closure(net, opt, 0)

    def closure():
        events.append("closure")
        assert torch.is_grad_enabled()
        return evaluate()

    opt.step(closure)
    assert events == ["outer gathers", "inner gathers", "closure", "outer updates", "inner updates"]


def test_every_hook_fires_once_a_step_on_every_level():
    net = small_net()
    base = sgd(net)
    inner = Plain(base)
    outer = Second(inner)
    counts: dict[str, int] = {}

    def count(key):
        def hook(*_):
            counts[key] = counts.get(key, 0) + 1

        return hook

    for name, opt in {"base": base, "inner": inner, "outer": outer}.items():
        opt.register_step_pre_hook(count(f"{name} step pre"))
        opt.register_step_post_hook(count(f"{name} step post"))
        opt.register_state_dict_pre_hook(count(f"{name} save pre"))
        opt.register_state_dict_post_hook(count(f"{name} save post"))
        opt.register_load_state_dict_pre_hook(count(f"{name} load pre"))
        opt.register_load_state_dict_post_hook(count(f"{name} load post"))
    train(net, outer, range(2))
    train(net, outer, range(2), closure=True)
    outer.load_state_dict(outer.state_dict())
    assert counts == {
        f"{name} {event}": 4 if "step" in event else 1
        for name in ("base", "inner", "outer")
        for event in ("step pre", "step post", "save pre", "save post", "load pre", "load post")
    }


def test_state_dict_hooks_can_replace_what_they_see():
    net = small_net()
    opt = Plain(sgd(net))
    opt.register_state_dict_post_hook(lambda _, state: state | {"note": "saved"})
    state = opt.state_dict()
    assert state["note"] == "saved"

    def halve(_, state):
        state["param_groups"][0]["lr"] = 0.05
        return state

    opt.register_load_state_dict_pre_hook(halve)
    opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.05


def test_step_hooks_see_the_closure_and_can_replace_it():
    net = small_net()
    opt = Plain(sgd(net))
    calls = []
    opt.register_step_pre_hook(lambda opt, args, _: ((opt, lambda: calls.append(1) or torch.tensor(7.0)), {}))
    assert opt.step(make_closure(net, opt, 0)) == 7.0
    assert calls == [1]


def test_profiler_sees_the_step():
    net = small_net()
    opt = Plain(sgd(net))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(net, opt, range(1))
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#Plain.step", "Optimizer.step#SGD.step"} <= names


SCHEDULERS = {
    "step": lambda opt: lr_scheduler.StepLR(opt, 3, gamma=0.5),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "one_cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=12),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "sequential": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 3), lr_scheduler.ExponentialLR(opt, 0.9)], milestones=[3]
    ),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, base_lr=0.01, max_lr=0.1, step_size_up=3),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("level", ["outer", "inner", "base"])
@pytest.mark.parametrize("reloaded", [False, True])
def test_schedulers_attach_anywhere_without_a_warning(scheduler, level, reloaded):
    nets = small_net(), small_net()
    reference = sgd(nets[0])
    base = sgd(nets[1])
    inner = Plain(base)
    outer = Second(inner)
    attached = {"outer": outer, "inner": inner, "base": base}[level]
    schedulers = SCHEDULERS[scheduler](reference), SCHEDULERS[scheduler](attached)
    if reloaded:
        reference.load_state_dict(reference.state_dict())
        outer.load_state_dict(outer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(nets[0], reference, range(10), schedulers[0])
        train(nets[1], outer, range(10), schedulers[1])
    assert outer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
    assert_same(*nets)


@pytest.mark.parametrize("level", ["outer", "base"])
def test_reduce_on_plateau(level):
    net = small_net()
    base = sgd(net)
    opt = Plain(base)
    plateau = lr_scheduler.ReduceLROnPlateau(opt if level == "outer" else base, factor=0.5, patience=1)
    for _ in range(6):
        train(net, opt, range(1))
        plateau.step(1.0)
    assert base.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("scheduled", [False, True])
def test_copies_keep_the_base_and_go_on_alike(duplicate, scheduled):
    net = small_net()
    opt = Second(Plain(sgd(net)))
    scheduler = SCHEDULERS["step"](opt) if scheduled else None
    train(net, opt, range(5), scheduler)
    net2, opt2 = duplicate((net, opt))
    assert type(opt2.base) is Plain
    assert type(opt2.base.base) is torch.optim.SGD
    assert opt2.param_groups[0]["params"][0] is next(net2.parameters())
    train(net, opt, range(5, 10))
    train(net2, opt2, range(5, 10))
    assert_same(net, net2)
    opt2.register_step_pre_hook(lambda *_: None)  # hook registries are there again


def test_add_param_group_fills_options_on_every_level():
    net, extra = small_net(), torch.nn.Parameter(torch.ones(2, 2))
    base = sgd(net)
    opt = Second(Plain(base, pace=0.5), weight=0.25)
    opt.add_param_group({"params": (p for p in [extra]), "lr": 0.01, "pace": 2.0})
    assert {key: opt.param_groups[1][key] for key in ("lr", "momentum", "pace", "weight")} == {
        "lr": 0.01,
        "momentum": 0.9,
        "pace": 2.0,
        "weight": 0.25,
    }
    base.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})  # behind the wrappers' back
    assert (base.param_groups[2]["pace"], base.param_groups[2]["weight"]) == (0.5, 0.25)
    extra.grad = torch.ones_like(extra)
    opt.step()
    assert torch.equal(extra, torch.full((2, 2), 0.99))


@pytest.mark.parametrize(
    ("group", "error", "match"),
    [
        ([], TypeError, "must be a dict"),
        ({"params": {torch.nn.Parameter(torch.ones(1))}}, TypeError, "ordered collections"),
        ({"params": []}, ValueError, r"param_groups\[1\] has no parameters"),
        ({"params": ["w"]}, TypeError, "can only optimize Tensors"),
    ],
)
def test_bad_groups_are_refused_before_anything_changes(group, error, match):
    opt = Plain(sgd(small_net()))
    with pytest.raises(error, match=match):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1


def test_zero_grad_is_the_bases():
    net = small_net()
    opt = Plain(sgd(net))
    make_closure(net, opt, 0)()
    opt.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in net.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_a_bare_bases_checkpoint_keeps_the_groups_present_options():
    net = small_net()
    params = list(net.parameters())
    bare = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.3)
    opt = Plain(torch.optim.SGD([{"params": params[:2], "pace": 7.0}, {"params": params[2:]}], lr=0.1), pace=3.0)
    opt.load_state_dict(through_file(bare.state_dict()))
    assert [(g["lr"], g["pace"]) for g in opt.param_groups] == [(0.3, 7.0), (0.3, 3.0)]
    opt.base.load_state_dict(bare.state_dict())  # straight into the base: defaults step in at the next use
    assert "pace" not in opt.param_groups[0]
    opt.load_state_dict(state_dict=opt.base.state_dict())
    assert [g["pace"] for g in opt.param_groups] == [3.0, 3.0]


def test_a_wrappers_checkpoint_loads_into_a_bare_base():
    net, other = small_net(), small_net()
    opt = Plain(sgd(net))
    train(net, opt, range(3))
    bare = sgd(other)
    other.load_state_dict(net.state_dict())
    bare.load_state_dict(through_file(opt.state_dict()))
    train(net, opt, range(3, 6))
    train(other, bare, range(3, 6))
    assert_same(net, other)


def test_an_exception_in_the_closure_changes_nothing():
    net = small_net()
    opt = Second(Plain(sgd(net)))
    before = weights(net)

    def closure():
        make_closure(net, opt, 0)()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
    other = small_net()
    train(net, opt, range(5))
    train(other, sgd(other), range(5))
    assert_same(net, other)


def test_train_and_eval_reach_the_base_through_every_level():
    calls = []

    class ScheduleFree(torch.optim.SGD):
        def train(self):
            calls.append("train")

        def eval(self):
            calls.append("eval")

    opt = Second(Plain(ScheduleFree(small_net().parameters(), lr=0.1)))
    opt.eval()
    opt.train()
    assert calls == ["eval", "train"]
    Plain(sgd(small_net())).eval()  # a base without modes has nothing to do


def test_a_class_or_a_model_instead_of_an_optimizer_is_explained():
    with pytest.raises(TypeError, match=r"got the class SGD; write Plain\(SGD\(params, lr=...\)\)"):
        Plain(torch.optim.SGD)
    with pytest.raises(TypeError, match="got Sequential"):
        Plain(small_net())
    with pytest.raises(TypeError, match="got list"):
        Plain(list(small_net().parameters()))


def test_the_same_option_twice_is_refused():
    base = Plain(sgd(small_net()))
    for wrap in (base, base.base):
        with pytest.raises(ValueError, match="'pace' is already an option of this"):
            Plain(wrap)


def test_an_empty_group_is_refused():
    base = torch.optim.SGD([{"params": list(small_net().parameters())}, {"params": []}], lr=0.1)
    with pytest.raises(ValueError, match=r"param_groups\[1\] has no parameters"):
        Plain(base)
    assert "pace" not in base.defaults


def test_the_scaler_cannot_take_the_wrapper_for_a_fused_optimizer():
    net = small_net()
    opt = Plain(torch.optim.AdamW(net.parameters(), fused=True))
    assert opt.base._step_supports_amp_scaling
    assert not getattr(opt, "_step_supports_amp_scaling", False)


def test_repr_names_the_wrapper_and_the_base():
    assert repr(Plain(sgd(small_net()))).startswith("Plain() around SGD (\nParameter Group 0")


@pytest.mark.parametrize("scalar", [np.float64(0.5), np.float32(0.5), np.int64(2)])
def test_numpy_scalars_become_numbers_that_a_safe_checkpoint_holds(scalar):
    net = small_net()
    opt = WCR(sgd(net), scalar)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))], "weight_concentration": scalar})
    train(net, opt, range(1))
    opt.param_groups[0]["weight_concentration"] = scalar  # as a schedule over np.linspace would set it
    train(net, opt, range(1))
    saved = through_file(opt.state_dict())
    assert [type(group["weight_concentration"]) for group in saved["param_groups"]] == [type(scalar.item())] * 2


def test_a_bad_option_on_an_inner_level_stops_the_step_before_the_outer_one_changes_a_weight():
    net = small_net()
    opt = L1Decay(WCR(sgd(net)), 1e-2)
    opt.param_groups[0]["weight_concentration"] = -1.0
    make_closure(net, opt, 0)()
    before = weights(net)
    with pytest.raises(ValueError, match=r"weight_concentration must be finite and not negative, got -1\.0"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
