"""With penalties in either order, with LR schedulers on any level, as an optimizer among torch's."""

import copy
import functools
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from sharpness_reference import (
    OPTIMIZERS,
    TWO_PASS,
    assert_close,
    base_of,
    batch,
    closure_of,
    groups,
    loss_of,
    net,
    train,
)
from torch.optim import lr_scheduler

from wcr_optim import WCR, HoyerDecay, L2Decay
from wcr_optim.sharpness import SAM, SSAM, CrAM, SparseSAM

ALL = sorted(OPTIMIZERS)
PENALTIES = {
    "wcr": lambda base: WCR(base, 1e-2),
    "scale_free": lambda base: WCR(base, 1e-2, form="scale_free"),
    "hoyer": lambda base: HoyerDecay(base, 1e-2),
    "l2": lambda base: L2Decay(base, 1e-1),
}


def manual(model, optimizer, steps):
    for step in steps:
        evaluate = closure_of(model, optimizer, step)
        evaluate()
        optimizer.first_step()
        evaluate()
        optimizer.second_step()


def assert_equal(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("name", "closure"), [*((name, True) for name in ALL), ("ssam", False)])
@pytest.mark.parametrize("penalty", sorted(PENALTIES))
def test_either_order_gives_the_same_weights(name, closure, penalty):
    models = [net(), net(), net()]
    bases = [base_of(groups(model)) for model in models]
    outer = PENALTIES[penalty](OPTIMIZERS[name](bases[0]))
    inner = OPTIMIZERS[name](PENALTIES[penalty](bases[1]))
    bare = OPTIMIZERS[name](bases[2])
    for model, optimizer in zip(models, (outer, inner, bare), strict=True):
        train(model, optimizer, range(40), closure)
        optimizer.eval()
    assert_equal(models[0], models[1])
    with pytest.raises(AssertionError):
        assert_close(models[0], models[2], 1e-6)  # the penalty did something


@pytest.mark.filterwarnings("ignore")  # torch's, about its own parts
@pytest.mark.parametrize(("name", "closure"), [*((name, True) for name in ALL), ("ssam", False)])
def test_a_compiled_step_is_the_step(name, closure):
    torch._dynamo.reset()
    models = [net(), net(), net()]
    for model, compiled in zip(models, (False, True, None), strict=True):
        base = base_of(groups(model))
        around = base if compiled is None else OPTIMIZERS[name](base)
        optimizer = WCR(around, 1e-2, form="scale_free", latent_weights=True)
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend="eager")
        train(model, optimizer, range(4), closure)
        optimizer.eval()
    assert_close(models[0], models[1], 1e-6)
    with pytest.raises(AssertionError):
        assert_close(models[0], models[2], 1e-4)  # the perturbation did something


@pytest.mark.parametrize("name", TWO_PASS)
def test_compiled_passes_are_the_passes(name):
    torch._dynamo.reset()
    models = [net(), net()]
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = OPTIMIZERS[name](base_of(groups(model)))
        if compiled:
            optimizer.first_step = torch.compile(optimizer.first_step, backend="eager")
            optimizer.second_step = torch.compile(optimizer.second_step, backend="eager")
        manual(model, optimizer, range(4))
    assert_close(*models, 1e-6)


@pytest.mark.parametrize("name", TWO_PASS)
def test_manual_loops_equal_closures_in_either_order(name):
    models = [net() for _ in range(3)]
    bases = [base_of(groups(model)) for model in models]
    train(models[0], WCR(OPTIMIZERS[name](bases[0]), 1e-2), range(20))
    manual(models[1], WCR(OPTIMIZERS[name](bases[1]), 1e-2), range(20))
    manual(models[2], OPTIMIZERS[name](WCR(bases[2], 1e-2)), range(20))
    assert_equal(models[0], models[1])
    assert_equal(models[0], models[2])


def test_ssam_without_closures_equals_ssam_with_them():
    models = [net(), net()]
    optimizers = [WCR(SSAM(base_of(groups(model))), 1e-2) for model in models]
    train(models[0], optimizers[0], range(30), closure=True)
    train(models[1], optimizers[1], range(30), closure=False)
    optimizers[1].eval()
    assert_equal(*models)
    assert optimizers[0].state_dict()["param_groups"] == optimizers[1].state_dict()["param_groups"]


@pytest.mark.parametrize("name", ALL)
def test_the_penalty_sees_the_true_weights(name):
    """A penalty that records what it sees: the weights that the last step left, never perturbed ones."""
    seen = []

    class Recorder(L2Decay):
        def _regularize(self):
            seen.append([p.detach().clone() for group in self.param_groups for p in group["params"]])
            super()._regularize()

    for closure in (True, False) if name == "ssam" else (True,):
        for order in ("outer", "inner"):
            model = net()
            base = base_of(groups(model))
            wrapped = OPTIMIZERS[name](base) if order == "outer" else Recorder(base, 0.1)
            optimizer = Recorder(wrapped, 0.1) if order == "outer" else OPTIMIZERS[name](wrapped)
            for step in range(4):
                with optimizer.true_weights():
                    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
                seen.clear()
                train(model, optimizer, [step], closure)
                assert len(seen) == 1
                assert all(torch.equal(a, b) for a, b in zip(seen[0], before, strict=True))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_schedulers_on_any_level_without_a_warning(name, level):
    model = net()
    base = base_of(groups(model))
    middle = OPTIMIZERS[name](base)
    outer = WCR(middle, 1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = lr_scheduler.StepLR((base, middle, outer)[level], step_size=2, gamma=0.5)
        for step in range(4):
            train(model, outer, [step])
            scheduler.step()
    assert [group["lr"] for group in outer.param_groups] == [pytest.approx(0.05 / 4)] * 3


@pytest.mark.parametrize("name", ALL)
def test_a_scheduled_rho_is_used_and_checked(name):
    model, other = net(), net()
    optimizer = OPTIMIZERS[name](base_of(model.parameters()), rho=0.5)
    fixed = OPTIMIZERS[name](base_of(other.parameters()), rho=0.5)
    train(model, optimizer, [0, 1])
    train(other, fixed, [0, 1])
    optimizer.param_groups[0]["rho"] = 0.01
    train(model, optimizer, [2, 3])
    train(other, fixed, [2, 3])
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    before = [p.detach().clone() for p in model.parameters()]
    for bad, error in [(-0.1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("big", TypeError)]:
        optimizer.param_groups[0]["rho"] = bad
        with pytest.raises(error, match=f"{bad!r} in param_groups"):
            train(model, optimizer, [4])
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("make", [SAM, SSAM, SparseSAM, CrAM])
def test_bad_options_are_refused_before_anything_changes(make):
    model = net()
    base = base_of(model.parameters())
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="rho must be finite and not negative"):
            make(base, rho=bad)
    assert "rho" not in base.param_groups[0]
    assert "rho" not in base.defaults
    with pytest.raises(TypeError, match="LBFGS, which evaluates its closure itself"):
        make(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match="LBFGS, which evaluates its closure itself"):
        make(WCR(torch.optim.LBFGS(model.parameters())))
    with pytest.raises(ValueError, match="Adadelta has a 'rho' of its own"):
        make(torch.optim.Adadelta(model.parameters()))
    with pytest.raises(ValueError, match="wrap it once"):
        make(SAM(base_of(model.parameters())))
    with pytest.raises(TypeError, match=f"write {make.__name__}\\(SGD"):
        make(torch.optim.SGD)
    optimizer = make(base, rho=0.1)
    with pytest.raises(ValueError, match=r"-2.0 in param_groups\[1\]"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "rho": -2.0})
    assert len(optimizer.param_groups) == 1
    state = optimizer.state_dict()
    state["param_groups"][0]["rho"] = -3.0
    with pytest.raises(ValueError, match=r"got -3\.0"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["rho"] == 0.1


def test_bad_options_of_single_methods():
    base = base_of(net().parameters())
    for make, options, error, words in [
        (SAM, {"eta": -1.0}, ValueError, "eta must be finite and not negative, got -1.0"),
        (SAM, {"interval": 0}, ValueError, "interval must be at least 1, got 0"),
        (SAM, {"interval": 1.5}, TypeError, "interval must be a whole number, got 1.5"),
        (SAM, {"model": "net"}, TypeError, "takes the model as model="),
        (SparseSAM, {"sparsity": 1.5}, ValueError, "sparsity must lie in \\[0, 1\\], got 1.5"),
        (SparseSAM, {"mask": "random"}, ValueError, "unknown mask 'random'"),
        (SparseSAM, {"update_freq": 0}, ValueError, "update_freq must be at least 1"),
        (SparseSAM, {"drop_rate": -0.5}, ValueError, "drop_rate must lie in"),
        (CrAM, {"sparsities": ()}, ValueError, "sparsities is empty"),
        (CrAM, {"sparsities": 0.5}, TypeError, "must be a list of numbers"),
        (CrAM, {"sparsities": (0.5, 2.0)}, ValueError, "sparsity must lie in"),
        (CrAM, {"pattern": (5, 4)}, ValueError, "n must not be above m"),
        (CrAM, {"pattern": 4}, TypeError, "pattern must be two numbers"),
    ]:
        with pytest.raises(error, match=words):
            make(base, **options)
    assert "rho" not in base.defaults


@pytest.mark.parametrize("name", ALL)
def test_deepcopy_and_pickle_go_on_alike(name):
    model = net()
    optimizer = WCR(OPTIMIZERS[name](base_of(groups(model))), 1e-2)
    train(model, optimizer, range(5))
    copied = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    results = []
    for m, o in ((model, optimizer), copied, pickled):
        train(m, o, range(5, 10))
        results.append(m)
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


def test_ssam_copied_while_perturbed_keeps_the_true_weights():
    model = net()
    optimizer = SSAM(base_of(groups(model)))
    train(model, optimizer, range(5), closure=False)
    copied_model, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(5, 8), closure=False)
    train(copied_model, copied, range(5, 8), closure=False)
    optimizer.eval()
    copied.eval()
    assert_equal(model, copied_model)


@pytest.mark.parametrize("name", ALL)
def test_hooks_of_every_level_fire_once_a_step(name):
    model = net()
    base = base_of(groups(model))
    middle = OPTIMIZERS[name](base)
    outer = WCR(middle, 1e-2)
    fired = []
    for label, level in (("base", base), ("middle", middle), ("outer", outer)):
        level.register_step_pre_hook(lambda *_, label=label: fired.append(("pre", label)))
        level.register_step_post_hook(lambda *_, label=label: fired.append(("post", label)))
    train(model, outer, [0])
    assert fired == [
        ("pre", "outer"),
        ("pre", "middle"),
        ("pre", "base"),
        ("post", "base"),
        ("post", "middle"),
        ("post", "outer"),
    ]


@pytest.mark.parametrize("name", TWO_PASS)
def test_repr_and_no_amp_flag(name):
    optimizer = OPTIMIZERS[name](base_of(net().parameters()))
    assert repr(optimizer).startswith(type(optimizer).__name__)
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


def test_one_pass_optimizers_have_no_manual_loop():
    optimizer = WCR(base_of(net().parameters()))
    with pytest.raises(RuntimeError, match="SGD takes one pass"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="SGD takes one pass"):
        optimizer.second_step()


@pytest.mark.parametrize("name", ALL)
def test_a_rho_of_numpy_goes_into_safe_checkpoints(name):
    model = net()
    optimizer = WCR(OPTIMIZERS[name](base_of(model.parameters()), rho=np.float64(0.1)), 1e-2)
    for rho in (None, np.float64(0.2), np.float32(0.25)):  # as schedules set it: after the step, before saving
        train(model, optimizer, range(2))
        if rho is not None:
            optimizer.param_groups[0]["rho"] = rho
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)["param_groups"][0]["rho"]
        assert type(loaded) is float
        assert loaded == (0.1 if rho is None else rho)


@pytest.mark.parametrize("name", TWO_PASS)
def test_only_norm_layers_are_copied_and_pickled_with_the_optimizer(name):
    """And copied together with the model, they are the copy's."""

    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4, momentum=0.9), torch.nn.Embedding(1000, 64)
        )

    def step(model, optimizer, number):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))

        def closure():
            optimizer.zero_grad()
            loss = (model[1](model[0](x)) - x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    model = make()
    optimizer = OPTIMIZERS[name](torch.optim.SGD(model[:2].parameters(), lr=0.1, momentum=0.9), rho=1.0, model=model)
    step(model, optimizer, 0)
    assert len(pickle.dumps(optimizer)) < 64_000 < len(pickle.dumps(model))
    copied_model, copied = copy.deepcopy((model, optimizer))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), (copied_model, copied), (pickled_model, pickled)):
        step(m, o, 1)
    for other in (copied_model, pickled_model):
        for key, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("order", ["outer", "inner"])
def test_concentration_is_that_of_the_true_weights(order):
    model = net()
    base = base_of(model.parameters())
    optimizer = WCR(SSAM(base, rho=2.0), 1e-2) if order == "outer" else SSAM(WCR(base, 1e-2), rho=2.0)
    train(model, optimizer, range(2), closure=False)
    moved = [p.detach().clone() for p in model.parameters()]
    found = optimizer.concentration()
    for p, before in zip(model.parameters(), moved, strict=True):
        assert torch.equal(p, before)
    optimizer.eval()
    assert torch.equal(found, optimizer.concentration())
    optimizer.train()
    weights = [p for p in model.parameters() if p.ndim > 1]
    there = torch.stack([1 - w.detach().abs().mean().square() / w.detach().square().mean() for w in weights])
    assert not torch.allclose(found.double(), there.double(), rtol=1e-3)


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("name", [*ALL, "asam"])
def test_what_a_base_maximizes_is_perturbed_downhill(name, closure):
    """The perturbation looks for the worst neighbour: f minimized is -f maximized, in one group or in all."""
    make = functools.partial(SAM, adaptive=True) if name == "asam" else OPTIMIZERS[name]

    def trained(sign, maximize):
        model = net()
        given = [{**group, "maximize": at} for group, at in zip(groups(model), maximize, strict=True)]
        optimizer = make(base_of(given))
        for step in range(5):

            def evaluate(step=step):
                optimizer.zero_grad()
                loss = sign * loss_of(model, step)
                loss.backward()
                for group in optimizer.param_groups:  # a group that maximizes has the gradient of what it maximizes
                    for p in group["params"]:
                        if group["maximize"] != (sign < 0):
                            p.grad.neg_()
                return loss

            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                if name != "ssam":
                    optimizer.first_step()
                    evaluate()
                    optimizer.second_step()
                else:
                    optimizer.step()
        return model

    plain = trained(1.0, (False, False, False))
    assert_equal(trained(-1.0, (True, True, True)), plain)
    assert_equal(trained(1.0, (False, True, False)), plain)


@pytest.mark.parametrize("closure", [True, False])
def test_ssam_keeps_the_true_weights_of_a_model_that_is_cast_in_its_new_precision(closure):
    models = []
    for wrap in (lambda base: base, lambda base: SSAM(base, rho=0.0)):
        model = net(torch.bfloat16)
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=1e-3))
        train(model, optimizer, [0], closure)
        for change in (getattr(optimizer, "eval", int), model.float, getattr(optimizer, "train", int)):
            change()
        train(model, optimizer, range(1, 6), closure)
        getattr(optimizer, "eval", int)()
        models.append(model)
    assert_equal(*models)


def test_dynamic_masks_do_not_depend_on_torchs_defaults(set_default):
    models = []
    for prepare in (lambda: None, set_default):
        model, batches = net(), [batch(step) for step in range(5)]
        prepare()
        optimizer = SparseSAM(torch.optim.SGD(model.parameters(), lr=0.05), mask="dynamic", update_freq=2)
        for x, y in batches:

            def closure(model=model, optimizer=optimizer, x=x, y=y):
                optimizer.zero_grad()
                loss = (model(x) - y).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
        models.append(model)
    assert_equal(*models)
