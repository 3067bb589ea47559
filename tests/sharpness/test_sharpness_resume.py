"""Checkpoints: 20 steps, a file, and 20 more in new objects are the 40 steps, bit for bit."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sharpness_reference import OPTIMIZERS, TWO_PASS, base_of, batch, closure_of, groups, net, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict

from wcr_optim import WCR
from wcr_optim.sharpness import SAM, SSAM, CrAM, SparseSAM

MAKE = {
    "sam": SAM,
    "sam_interval": lambda base: SAM(base, interval=3),
    "asam": lambda base: SAM(base, adaptive=True, eta=0.01),
    "ssam": SSAM,
    "fisher": lambda base: SparseSAM(base, update_freq=8, num_samples=6, sparsity=0.7),  # saved within a window
    "dynamic": lambda base: SparseSAM(base, mask="dynamic", update_freq=3, total_steps=40, sparsity=0.7),
    "cram": CrAM,
    "cram_pattern": lambda base: CrAM(base, pattern=(2, 4)),
}


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def make(name, base, order="outer", dropout=False):
    model = net()
    if dropout:
        model = nn.Sequential(*model[:-1], nn.Dropout(0.3), model[-1])
    bare = base_of(groups(model), base)
    if order == "outer":
        return model, WCR(MAKE[name](bare), 1e-2)
    return model, MAKE[name](WCR(bare, 1e-2))


def assert_equal(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), f"{name} differs by {(p - q).abs().max()}"


@pytest.mark.parametrize("name", sorted(MAKE))
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("order", ["outer", "inner"])
def test_twenty_and_twenty_are_forty(name, base, order):
    model, optimizer = make(name, base, order)
    train(model, optimizer, range(40))
    first, early = make(name, base, order)
    train(first, early, range(20))
    saved = through_file({"model": first.state_dict(), "optimizer": early.state_dict()})
    second, late = make(name, base, order)
    second.load_state_dict(saved["model"])
    late.load_state_dict(saved["optimizer"])
    train(second, late, range(20, 40))
    assert_equal(model, second)


@pytest.mark.parametrize("name", ["sam", "fisher", "cram"])
def test_with_the_random_state_dropout_resumes_too(name):
    model, optimizer = make(name, "sgd", dropout=True)
    torch.manual_seed(7)
    train(model, optimizer, range(40))
    first, early = make(name, "sgd", dropout=True)
    torch.manual_seed(7)
    train(first, early, range(20))
    saved = through_file(
        {"model": first.state_dict(), "optimizer": early.state_dict(), "random": torch.get_rng_state()}
    )
    torch.manual_seed(99)
    second, late = make(name, "sgd", dropout=True)
    second.load_state_dict(saved["model"])
    late.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"])
    train(second, late, range(20, 40))
    assert_equal(model, second)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("state", ["train", "eval", "true_weights"])
@pytest.mark.parametrize("order", ["outer", "inner"])
@pytest.mark.parametrize("model_first", [True, False])
def test_ssam_without_closures_resumes_from_either_state(base, state, order, model_first):
    model, optimizer = make("ssam", base, order)
    train(model, optimizer, range(40), closure=False)
    first, early = make("ssam", base, order)
    train(first, early, range(20), closure=False)
    if state == "true_weights":
        with early.true_weights():
            saved = through_file({"model": first.state_dict(), "optimizer": early.state_dict()})
    else:
        if state == "eval":
            early.eval()
        saved = through_file({"model": first.state_dict(), "optimizer": early.state_dict()})
    second, late = make("ssam", base, order)
    if model_first:
        second.load_state_dict(saved["model"])
    late.load_state_dict(saved["optimizer"])
    if not model_first:
        second.load_state_dict(saved["model"])
    late.train()
    train(second, late, range(20, 40), closure=False)
    assert_equal(model, second)
    early.train()  # and the run that was saved goes on alike
    train(first, early, range(20, 40), closure=False)
    assert_equal(model, first)
    for each in (optimizer, late, early):
        each.eval()
    assert_equal(model, second)
    assert_equal(model, first)


def test_ssam_saved_without_and_resumed_with_closures():
    model, optimizer = make("ssam", "adamw")
    train(model, optimizer, range(10))
    first, early = make("ssam", "adamw")
    train(first, early, range(5), closure=False)
    second, late = make("ssam", "adamw")
    second.load_state_dict(through_file(first.state_dict()))
    late.load_state_dict(through_file(early.state_dict()))
    train(second, late, range(5, 10))
    assert_equal(model, second)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_bare_bases_checkpoint_is_taken(name):
    source = net()
    bare = base_of(source.parameters())
    train(source, bare, range(5), closure=False)
    model = net()
    optimizer = WCR(OPTIMIZERS[name](base_of(model.parameters()), rho=0.3), 1e-2)
    train(model, optimizer, range(3), closure=name != "ssam")
    model.load_state_dict(source.state_dict())
    optimizer.load_state_dict(through_file(bare.state_dict()))
    assert optimizer.param_groups[0]["rho"] == 0.3
    fresh = net()
    other = WCR(OPTIMIZERS[name](base_of(fresh.parameters()), rho=0.3), 1e-2)
    fresh.load_state_dict(source.state_dict())
    other.load_state_dict(bare.state_dict())
    for m, o in ((model, optimizer), (fresh, other)):
        train(m, o, range(5, 10))
    assert_equal(model, fresh)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_bare_base_takes_our_checkpoint(name):
    model = net()
    optimizer = OPTIMIZERS[name](base_of(model.parameters(), "adamw"))
    train(model, optimizer, range(5))
    base = base_of(model.parameters(), "adamw")
    base.load_state_dict(through_file(optimizer.state_dict()))
    train(model, base, range(5, 8), closure=False)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_hook_may_put_another_state_in_place_before_it_is_loaded(name):
    model = net()
    optimizer = OPTIMIZERS[name](base_of(groups(model)))
    train(model, optimizer, range(3))
    wrapped = {"optimizer": optimizer.state_dict(), "epoch": 1}
    other = OPTIMIZERS[name](base_of(groups(net())))
    other.register_load_state_dict_pre_hook(lambda _, state: state["optimizer"])
    other.load_state_dict(wrapped)
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_an_interruption_before_ssam_has_moved_anything_loses_nothing(monkeypatch):
    model = net()
    optimizer = SSAM(base_of(model.parameters()), 0.1)
    train(model, optimizer, range(2), closure=False)
    with optimizer.true_weights():
        true = [p.detach().clone() for p in model.parameters()]

    def interrupted(*columns):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("wcr_optim.sharpness.ssam.exchange_back_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.eval()
    assert not torch.equal(next(model.parameters()), true[0])
    optimizer.eval()
    for p, w in zip(model.parameters(), true, strict=True):
        assert torch.equal(p, w)


@pytest.mark.parametrize("name", sorted(MAKE))
def test_a_failed_load_changes_nothing(name):
    model, optimizer = make(name, "sgd")
    twin, same = make(name, "sgd")
    for m, o in ((model, optimizer), (twin, same)):
        train(m, o, range(5), closure=name != "ssam")
    state = optimizer.state_dict()
    state["param_groups"] = state["param_groups"][:2]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state)
    assert_equal(model, twin)
    for m, o in ((model, optimizer), (twin, same)):
        train(m, o, range(5, 10), closure=name != "ssam")
    assert_equal(model, twin)


def test_a_copy_of_ssam_notices_edits_of_perturbed_weights():
    model = net()
    optimizer = SSAM(base_of(model.parameters()), 0.1)
    train(model, optimizer, range(2), closure=False)
    copied, its_optimizer = copy.deepcopy((model, optimizer))
    weight = next(copied.parameters())
    with torch.no_grad():
        weight.zero_()
    with pytest.warns(UserWarning, match="1 parameters were written"), its_optimizer.true_weights():
        assert not weight.any()
    assert next(model.parameters()).any()


def test_ssam_rolled_back_in_place():
    """Weights and state of an earlier step, loaded into the running objects in any order."""
    model, optimizer = make("ssam", "adamw")
    train(model, optimizer, range(5), closure=False)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(5, 10), closure=False)
    expected = copy.deepcopy(model)
    for order in (("model", "optimizer"), ("optimizer", "model")):
        train(model, optimizer, range(20, 23), closure=False)
        for part in order:
            # Torch's optimizers go on to write to the tensors that they were given.
            {"model": model, "optimizer": optimizer}[part].load_state_dict(copy.deepcopy(saved[part]))
        train(model, optimizer, range(5, 10), closure=False)
        assert_equal(model, expected)


def test_ssam_goes_on_from_a_bare_checkpoint_loaded_while_perturbed():
    """The optimizer's state alone is loaded: the true weights come back before it goes."""
    model, optimizer = make("ssam", "sgd")
    train(model, optimizer, range(5), closure=False)
    with optimizer.true_weights():
        expected = [p.detach().clone() for p in model.parameters()]
    optimizer.load_state_dict(base_of(groups(net())).state_dict())
    assert all(torch.equal(p, e) for p, e in zip(model.parameters(), expected, strict=True))
    optimizer.eval()
    assert all(torch.equal(p, e) for p, e in zip(model.parameters(), expected, strict=True))


class TestWritingPerturbedWeights:
    """What the docstring says of weights that are loaded or edited without bringing the true ones into place."""

    def setup_method(self):
        self.model = net()
        self.optimizer = WCR(SSAM(base_of(self.model.parameters())), 0.0)
        train(self.model, self.optimizer, range(3), closure=False)
        self.other = {key: value + 1 for key, value in net().state_dict().items()}

    def assert_holds(self, expected):
        for key, value in self.model.state_dict().items():
            assert torch.equal(value, expected[key])

    def test_eval_takes_them_as_the_true_ones_with_a_warning(self):
        self.model.load_state_dict(self.other)
        with pytest.warns(UserWarning, match="8 parameters were written while they held"):
            self.optimizer.eval()
        self.assert_holds(self.other)
        self.optimizer.train()
        self.assert_holds(self.other)  # and knows of no perturbation of theirs

    def test_a_step_does_too(self):
        expected = net()
        expected.load_state_dict(self.other)
        bare = base_of(expected.parameters())
        bare.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        self.model.load_state_dict(self.other)
        with pytest.warns(UserWarning, match="were written"):
            train(self.model, self.optimizer, [3], closure=False)
        train(expected, bare, [3], closure=False)
        self.optimizer.eval()
        self.assert_holds(expected.state_dict())

    def test_only_those_that_were_written(self):
        with self.optimizer.true_weights():
            expected = {key: value.clone() for key, value in self.model.state_dict().items()}
        bias = self.model[6].bias
        with torch.no_grad():
            bias.zero_()
        with pytest.warns(UserWarning, match="1 parameters were written"):
            self.optimizer.eval()
        self.assert_holds(expected | {"6.bias": torch.zeros_like(bias)})

    def test_edits_of_the_true_weights_get_the_perturbation_added(self):
        perturbed = {key: value.clone() for key, value in self.model.state_dict().items()}
        with self.optimizer.true_weights():
            true = {key: value.clone() for key, value in self.model.state_dict().items()}
            with torch.no_grad():
                for p in self.model.parameters():
                    p.mul_(p.abs() > 0.1)  # pruned, say
            edited = {key: value.clone() for key, value in self.model.state_dict().items()}
        for key, value in self.model.state_dict().items():
            expected = edited[key] + (perturbed[key] - true[key])
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
        self.optimizer.eval()
        self.assert_holds(edited)

    def test_replaced_memory_is_seen(self):
        with self.optimizer.true_weights():
            expected = {key: value.clone() for key, value in self.model.state_dict().items()}
        bias = self.model[6].bias
        bias.data = torch.zeros_like(bias)
        with pytest.warns(UserWarning, match="1 parameters were written"):
            self.optimizer.eval()
        self.assert_holds(expected | {"6.bias": torch.zeros_like(bias)})

    def test_twice_and_alone(self):
        perturbed = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.optimizer.train()
        self.assert_holds(perturbed)
        self.optimizer.eval()
        true = {key: value.clone() for key, value in self.model.state_dict().items()}
        assert any(not torch.equal(true[key], perturbed[key]) for key in true)
        self.optimizer.eval()
        self.assert_holds(true)
        with self.optimizer.true_weights():
            self.assert_holds(true)
        self.assert_holds(true)
        for _ in range(3):
            self.optimizer.train()
            self.assert_holds(perturbed)
            self.optimizer.eval()
            self.assert_holds(true)

    def test_a_new_optimizer_has_nothing_to_perturb(self):
        model = net()
        optimizer = SSAM(base_of(model.parameters()))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for change in (optimizer.train, optimizer.eval, optimizer.train):
            change()
            for key, value in model.state_dict().items():
                assert torch.equal(value, before[key])

    def test_a_closure_after_plain_steps_starts_from_the_perturbed_weights(self):
        twin = net()
        same = WCR(SSAM(base_of(twin.parameters())), 0.0)
        train(twin, same, range(3))
        train(self.model, self.optimizer, range(3, 6))
        train(twin, same, range(3, 6))
        self.assert_holds(twin.state_dict())


@pytest.mark.parametrize("name", TWO_PASS)
def test_a_parameter_group_added_later(name):
    model, extra = net(), nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = OPTIMIZERS[name](base_of(model.parameters()), rho=0.3)
    train(model, optimizer, range(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    assert optimizer.param_groups[1]["rho"] == 0.3
    x, y = batch(3)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(extra.detach().clone())
        loss = (model(x) - y).square().mean() + extra.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not torch.equal(seen[0], seen[1]) or name == "sparse_sam"
    assert not torch.equal(extra, torch.ones_like(extra))
    assert closure_of(model, optimizer, 4)() is not None


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("name", "closure"), [*((name, True) for name in sorted(MAKE)), ("ssam", False)])
@pytest.mark.parametrize("base", ["sgd", "adamw", "plain"])
def test_resume_through_distributed_checkpoints(name, base, closure, tmp_path):
    """They load what a new optimizer has after a step with zero gradients, and drop all other keys."""

    def new():
        model = net(torch.float32)
        bare = torch.optim.SGD(groups(model), lr=0.05) if base == "plain" else base_of(groups(model), base)
        return model, MAKE[name](bare)

    model, optimizer = new()
    train(model, optimizer, range(11), closure)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    train(model, optimizer, range(11, 22), closure)

    second, late = new()
    template = dict(zip(("model", "optimizer"), get_state_dict(second, late), strict=True))
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    third, later = new()  # beside the one whose tensors were loaded in place
    for m, o, loaded in ((third, later, copy.deepcopy(template)), (second, late, template)):
        set_state_dict(m, o, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        train(m, o, range(11, 22), closure)
        assert_equal(model, m)
    expected, found = optimizer.state_dict(), late.state_dict()
    assert expected["param_groups"] == found["param_groups"]
    assert [sorted(s) for s in expected["state"].values()] == [sorted(s) for s in found["state"].values()]


@pytest.mark.parametrize("mask", ["fisher", "dynamic"])
def test_a_checkpoint_loaders_probe_makes_no_masks(mask):
    """Training after it is training without it, also where a parameter never gets a gradient."""
    results = []
    for probed in (False, True):
        model, unused = net(), nn.Parameter(torch.ones(5, 5, dtype=torch.float64))
        base = torch.optim.SGD([*model.parameters(), unused], lr=0.05, momentum=0.9)  # which itself forgets the probe
        optimizer = SparseSAM(base, mask=mask, update_freq=3)
        if probed:
            get_optimizer_state_dict(nn.ModuleDict({"net": model, "unused": nn.ParameterList([unused])}), optimizer)
            assert optimizer.state[unused]["sparse_sam_mask"].dtype == torch.bool
        train(model, optimizer, range(10))
        results.append((model, optimizer.state[next(model.parameters())]["sparse_sam_mask"]))
    assert_equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


class TestLoadingBetweenThePasses:
    """A checkpoint that is loaded between first_step() and second_step() is there afterwards."""

    def begin(self, name, finite=True, in_eval=False):
        model = Norms()
        optimizer = WCR(OPTIMIZERS[name](torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)), 1e-2)
        inner = optimizer.base
        inner.step(model.closure(optimizer, 0))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        inner.step(model.closure(optimizer, 1))
        before = copy.deepcopy(model.state_dict())
        model.closure(optimizer, 2)()
        if not finite:
            next(model.parameters()).grad.fill_(float("nan"))
        optimizer.first_step()
        if in_eval:
            optimizer.eval()
        return model, optimizer, saved, before

    def goes_on(self, name, model, optimizer, saved):
        """Training from here is training from the checkpoint in new objects."""
        fresh = Norms()
        other = WCR(OPTIMIZERS[name](torch.optim.SGD(fresh.parameters(), lr=0.05, momentum=0.9)), 1e-2)
        fresh.load_state_dict(copy.deepcopy(saved[0]))
        other.load_state_dict(copy.deepcopy(saved[1]))
        for m, o in ((model, optimizer), (fresh, other)):
            for step in range(3, 6):
                o.step(m.closure(o, step))
        for key, value in fresh.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key

    @pytest.mark.parametrize("name", TWO_PASS)
    @pytest.mark.parametrize("order", [("model", "optimizer"), ("optimizer", "model")])
    @pytest.mark.parametrize("options", [{}, {"finite": False}, {"in_eval": True}])
    def test_model_and_optimizer(self, name, order, options):
        model, optimizer, saved, _ = self.begin(name, **options)
        for part in order:
            if part == "model":
                model.load_state_dict(saved[0])
            else:
                optimizer.load_state_dict(copy.deepcopy(saved[1]))
        for key, value in model.state_dict().items():
            assert torch.equal(value, saved[0][key]), key
        with pytest.raises(RuntimeError, match="call that first"):
            optimizer.second_step()
        self.goes_on(name, model, optimizer, saved)

    @pytest.mark.parametrize("name", TWO_PASS)
    def test_weights_that_nobody_wrote_come_back(self, name):
        model, optimizer, saved, before = self.begin(name)
        with torch.no_grad():
            model.linear.bias.fill_(3.0)
        optimizer.load_state_dict(saved[1])
        assert torch.equal(model.linear.bias, torch.full((4,), 3.0))
        assert torch.equal(model.linear.weight, before["linear.weight"])
        assert torch.equal(model.norm.weight, before["norm.weight"])

    @pytest.mark.parametrize("name", TWO_PASS)
    def test_a_copy_made_between_the_passes_knows_its_weights(self, name):
        model, optimizer, saved, before = self.begin(name)
        model, optimizer = copy.deepcopy((model, optimizer))
        optimizer.load_state_dict(saved[1])
        for key, p in model.named_parameters():
            assert torch.equal(p, before[key])

    @pytest.mark.parametrize("name", TWO_PASS)
    def test_a_copy_made_after_an_overflow_knows_of_it(self, name):
        model, optimizer, *_ = self.begin(name, finite=False)
        for here, there in ((model, optimizer), copy.deepcopy((model, optimizer))):
            here.closure(there, 2)()
            there.gather()
            assert all(p.grad.isnan().all() for p in here.parameters())

    @pytest.mark.parametrize("name", TWO_PASS)
    def test_a_failed_load_leaves_the_pass_under_way(self, name):
        model, optimizer, _, before = self.begin(name)
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict({"state": {}, "param_groups": []})
        model.closure(optimizer, 2)()
        optimizer.gather()
        for key, p in model.named_parameters():
            assert torch.equal(p, before[key])


class Norms(nn.Module):
    """A network with running statistics and its own data."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def closure(self, optimizer, step):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))

        def evaluate():
            optimizer.zero_grad()
            loss = (self.norm(self.linear(x)) - x).square().mean()
            loss.backward()
            return loss

        return evaluate
