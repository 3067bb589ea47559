"""What happens around the passes: exceptions, norm statistics, dropout, manual loops, accumulation, clipping."""

import copy

import pytest
import torch
from sharpness_reference import (
    OPTIMIZERS,
    TWO_PASS,
    PlainSAM,
    assert_close,
    assert_same,
    base_of,
    batch,
    closure_of,
    groups,
    loss_of,
    net,
    train,
)
from torch import nn

from wcr_optim import WCR
from wcr_optim.sharpness import SAM, SSAM, CrAM

ALL = sorted(OPTIMIZERS)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_weights(model, expected):
    for (name, p), e in zip(model.named_parameters(), expected, strict=True):
        assert torch.equal(p, e), f"{name} differs by {(p - e).abs().max()}"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_true_weights_and_the_next_step_works(name, failing, when, error):
    if name == "ssam":
        failing = 0  # it has no second pass
    model, twin = net(), net()
    optimizer = WCR(OPTIMIZERS[name](base_of(groups(model))), 1e-2)
    same = WCR(OPTIMIZERS[name](base_of(groups(twin))), 1e-2)
    train(model, optimizer, range(3))
    train(twin, same, range(3))
    before, calls = weights(model), []

    def closure():
        calls.append(1)
        fails = len(calls) == failing + 1
        if fails and when == "before":
            raise error
        optimizer.zero_grad()
        loss = loss_of(model, 3)
        if fails and when == "between":
            raise error
        loss.backward()
        if fails and when == "after":
            raise error
        return loss

    with pytest.raises(error):
        optimizer.step(closure)
    assert len(calls) == failing + 1
    assert_weights(model, before)
    train(model, optimizer, range(3, 8))
    train(twin, same, range(3, 8))
    assert_weights(model, weights(twin))


@pytest.mark.parametrize("name", ALL)
def test_an_exception_in_the_update_leaves_the_true_weights(name):
    model = net()
    base = base_of(groups(model))
    optimizer = OPTIMIZERS[name](base)
    train(model, optimizer, range(3))
    before = weights(model)

    def refuse(*_):
        raise RuntimeError("not now")

    handle = base.register_step_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="not now"):
        train(model, optimizer, [3])
    assert_weights(model, before)
    handle.remove()
    train(model, optimizer, [3])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("gradients", ["zero", "none"])
def test_zero_and_missing_gradients_change_nothing(name, gradients):
    model = net()
    optimizer = OPTIMIZERS[name](torch.optim.SGD(groups(model), lr=0.1, momentum=0.9))
    before = weights(model)

    def closure():
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if gradients == "zero" else None
        return torch.zeros(())

    for _ in range(3):
        optimizer.step(closure)
        assert_weights(model, before)
    if name == "ssam":
        closure()
        optimizer.step()
        assert_weights(model, before)


@pytest.mark.parametrize("name", ALL)
def test_parameters_without_a_gradient_are_left_alone(name):
    model, unused = net(), nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    frozen = nn.Parameter(torch.ones(3, 3, dtype=torch.float64), requires_grad=False)
    optimizer = OPTIMIZERS[name](torch.optim.AdamW([*model.parameters(), unused, frozen], lr=0.01))
    seen = []

    def closure():
        seen.append((unused.detach().clone(), frozen.clone()))
        return closure_of(model, optimizer, 0)()

    for _ in range(3):
        optimizer.step(closure)
    for values in [*seen, (unused, frozen)]:
        assert all(torch.equal(v, torch.ones(3, 3, dtype=torch.float64)) for v in values)
    assert unused not in optimizer.state
    assert frozen not in optimizer.state
    unused.grad = torch.ones_like(unused)  # thawed: the base finds no state that others left
    if name == "ssam":
        optimizer.step()
    else:
        optimizer.first_step()
        optimizer.second_step()
    assert "exp_avg" in optimizer.state[unused]


@pytest.mark.parametrize("name", ALL)
def test_sparse_gradients_are_refused(name):
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = OPTIMIZERS[name](torch.optim.SGD(table.parameters(), lr=0.1))
    before = weights(table)

    def closure():
        optimizer.zero_grad()
        loss = table(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match="sparse=False"):
        optimizer.step(closure)
    assert_weights(table, before)


class Norms(nn.Module):
    """Every kind of norm layer with running statistics."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(4),
                nn.BatchNorm2d(4, momentum=None),
                nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
                nn.SyncBatchNorm(4).eval(),  # which trains on GPUs only
                Replacing(),
            ]
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x)
        for norm in self.norms:
            x = norm(x)
        return self.head(x.mean((2, 3)))


class Replacing(nn.Module):
    """A home-made norm layer that replaces its buffer instead of writing to it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_scale", torch.ones(4))

    def forward(self, x):
        if self.training:
            self.running_scale = 0.9 * self.running_scale + 0.1 * x.detach().std((0, 2, 3))
        return x / self.running_scale.view(1, -1, 1, 1)


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("name", TWO_PASS)
@pytest.mark.parametrize("manual", [False, True])
def test_running_statistics_come_from_the_clean_pass(name, manual):
    torch.manual_seed(0)
    model = Norms().double()
    twin = Norms().double()
    twin.load_state_dict(model.state_dict())
    optimizer = OPTIMIZERS[name](base_of(model.parameters()), model=model, rho=0.5)
    buffers = dict(model.named_buffers())
    for step in range(3):
        twin.load_state_dict(model.state_dict())
        twin(batch(step)[0])  # one clean pass
        evaluate = closure_of(model, optimizer, step)
        if manual:
            evaluate()
            optimizer.first_step()
            evaluate()
            optimizer.second_step()
        else:
            optimizer.step(evaluate)
        after = statistics(model)
        for key, value in statistics(twin).items():
            assert torch.equal(after[key], value), key
    for key, buffer in model.named_buffers():
        assert buffer is buffers[key] or "running_scale" in key


def test_without_model_both_passes_count():
    torch.manual_seed(0)
    model = Norms().double()
    optimizer = SAM(base_of(model.parameters()))
    train(model, optimizer, [0])
    assert model.norms[0].num_batches_tracked == 2


@pytest.mark.parametrize("failing", [1, 2])
def test_running_statistics_after_an_exception_are_those_of_the_clean_pass(failing):
    torch.manual_seed(0)
    model = Norms().double()
    twin = Norms().double()
    twin.load_state_dict(model.state_dict())
    optimizer = SAM(base_of(model.parameters()), rho=0.5, model=model)
    calls = []

    def closure():
        calls.append(1)
        loss = closure_of(model, optimizer, 0)()
        if len(calls) == failing:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    twin(batch(0)[0])
    for key, value in statistics(twin).items():
        assert torch.equal(statistics(model)[key], value), key


@pytest.mark.parametrize("name", TWO_PASS)
@pytest.mark.parametrize("same", [True, False])
def test_dropout_masks(name, same):
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    optimizer = OPTIMIZERS[name](base_of(model.parameters()), same_dropout=same)
    masks, drawn = [], []
    model[2].register_forward_hook(lambda _module, given, result: masks.append(result == 0))

    def closure():
        loss = closure_of(model, optimizer, 0)()
        drawn.append(torch.get_rng_state())
        return loss

    optimizer.step(closure)
    zeros = [mask.sum() for mask in masks]
    assert len(masks) == 2
    assert all(60 < z < 132 for z in zeros)
    assert torch.equal(masks[0], masks[1]) == same
    # Where the clean pass left it, or where two passes did.
    assert torch.equal(torch.get_rng_state(), drawn[0] if same else drawn[1])


def test_random_state_after_an_exception_in_the_second_pass_is_that_of_the_clean_pass():
    model = net()
    optimizer = SAM(base_of(model.parameters()))
    drawn = []

    def closure():
        loss = closure_of(model, optimizer, 0)()
        torch.rand(5)
        if drawn:
            raise ValueError("second pass")
        drawn.append(torch.get_rng_state())
        return loss

    with pytest.raises(ValueError, match="second pass"):
        optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), drawn[0])


@pytest.mark.parametrize("name", TWO_PASS)
def test_misuse_of_manual_loops_is_refused_before_anything_changes(name):
    model = net()
    optimizer = OPTIMIZERS[name](base_of(groups(model)))
    outer = WCR(optimizer, 1e-2)
    before = weights(model)
    evaluate = closure_of(model, outer, 0)
    for level in (optimizer, outer):
        with pytest.raises(RuntimeError, match="call that first"):
            level.second_step()
    evaluate()
    for level in (optimizer, outer):
        with pytest.raises(RuntimeError, match="without a closure would be a step of SGD alone"):
            level.step()
    assert_weights(model, before)
    assert outer.first_step()
    moved = weights(model)
    for level in (optimizer, outer):
        with pytest.raises(RuntimeError, match="waits for its second_step"):
            level.first_step()
        with pytest.raises(RuntimeError, match="waits for its second_step"):
            level.step(evaluate)
    assert_weights(model, moved)
    evaluate()
    outer.second_step()
    with pytest.raises(RuntimeError, match="call that first"):
        outer.second_step()


@pytest.mark.parametrize("name", TWO_PASS)
def test_between_the_passes_evaluation_and_checkpoints_see_the_last_step(name):
    models = [net(), net()]
    optimizers = [WCR(OPTIMIZERS[name](base_of(groups(model))), 1e-2) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(3))
    model, optimizer = models[0], optimizers[0]
    before, saved = weights(model), copy.deepcopy(optimizer.state_dict())
    evaluate = closure_of(model, optimizer, 3)
    evaluate()
    optimizer.first_step()
    moved = weights(model)
    optimizer.eval()
    optimizer.eval()
    assert_weights(model, before)
    between = optimizer.state_dict()
    assert_same(between, saved)
    optimizer.train()
    optimizer.train()
    assert_weights(model, moved)
    with optimizer.true_weights():
        assert_weights(model, before)
        with optimizer.true_weights():
            assert_weights(model, before)
        assert_weights(model, before)
    assert_weights(model, moved)
    evaluate()
    optimizer.eval()  # and second_step straight from there
    optimizer.second_step()
    train(models[1], optimizers[1], [3])
    assert_weights(model, weights(models[1]))


@pytest.mark.parametrize("name", TWO_PASS)
def test_giving_up_a_second_pass(name):
    model = net()
    optimizer = OPTIMIZERS[name](base_of(groups(model)))
    before = weights(model)
    closure_of(model, optimizer, 0)()
    optimizer.first_step()
    optimizer.gather()
    assert_weights(model, before)
    train(model, optimizer, [0])


def test_first_step_says_whether_a_second_pass_is_due():
    model, twin = net(), net()
    optimizer, same = (SAM(base_of(groups(m)), interval=3) for m in (model, twin))
    due = []
    for step in range(7):
        evaluate = closure_of(model, optimizer, step)
        evaluate()
        due.append(optimizer.first_step())
        if due[-1]:
            evaluate()
        optimizer.second_step()
    train(twin, same, range(7))
    assert due == [True, False, False, True, False, False, True]
    assert_weights(model, weights(twin))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("manual", [False, True])
def test_accumulated_micro_batches_equal_one_large_batch(name, manual):
    """Four micro-batches in each pass; with manual loops, SSAM's is the usual one without a closure."""
    models = [net(), net()]
    whole, parts = (WCR(OPTIMIZERS[name](base_of(groups(model))), 1e-2) for model in models)

    def backward(step):
        x, y = batch(step)
        total = 0.0
        for a, b in zip(x.chunk(4), y.chunk(4), strict=True):
            loss = (models[1](a) - b).square().mean() / 4
            loss.backward()
            total += loss.item()
        return total

    for step in range(15):
        [expected] = train(models[0], whole, [step])
        if not manual:
            loss = parts.step(lambda step=step: parts.zero_grad() or backward(step))
        elif name == "ssam":
            parts.zero_grad(set_to_none=step % 2 == 0)
            loss = backward(step)
            parts.step()
        else:
            parts.zero_grad()
            loss = backward(step)
            parts.first_step()
            parts.zero_grad()
            backward(step)
            parts.second_step()
        assert loss == pytest.approx(expected, rel=1e-9)
    parts.eval()
    assert_close(models[0], models[1], 1e-9)


@pytest.mark.parametrize("way", ["hook", "gather", "manual"])
@pytest.mark.parametrize("name", TWO_PASS)
def test_clipping_acts_on_the_final_gradient_at_the_true_weights(name, way):
    """The reference clips in a wrapper's own update, below everything."""

    class Clipped(torch.optim.SGD):
        def step(self, closure=None):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            return super().step(closure)

    model = net()
    optimizer = OPTIMIZERS[name](Clipped(groups(model), lr=0.1, momentum=0.9))
    train(model, optimizer, range(5))
    expected = weights(model)
    model = net()
    base = torch.optim.SGD(groups(model), lr=0.1, momentum=0.9)
    optimizer = OPTIMIZERS[name](base)
    true = []

    def clip(*_):
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1, "there is something to clip"
        true.append(weights(model))

    if way == "hook":
        base.register_step_pre_hook(clip)
    for step in range(5):
        before, evaluate = weights(model), closure_of(model, optimizer, step)
        if way == "hook":
            optimizer.step(evaluate)
        elif way == "gather":
            optimizer.gather(evaluate)
            clip()
            optimizer.step()
        else:
            evaluate()
            optimizer.first_step()
            evaluate()
            optimizer.gather()
            clip()
            optimizer.second_step()
        assert all(torch.equal(a, b) for a, b in zip(true[-1], before, strict=True))
    assert_weights(model, expected)


@pytest.mark.parametrize("closure", [True, False])
def test_clipping_with_ssam(closure):
    """Clipping by the norm does not change the perturbation, only the step."""
    models = [net(), net()]
    bases = [torch.optim.SGD(groups(model), lr=0.1, momentum=0.9) for model in models]
    bases[0].register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(models[0].parameters(), 0.1) and None)
    hooked, clipped = (SSAM(base) for base in bases)
    for step in range(10):
        train(models[0], hooked, [step], closure)
        closure_of(models[1], clipped, step)()
        torch.nn.utils.clip_grad_norm_(models[1].parameters(), 0.1)
        clipped.step()
    hooked.eval()
    clipped.eval()
    assert_close(models[0], models[1], 1e-9)


def test_zero_grad_to_zeros_does_not_lose_anything():
    """CrAM's first gradient and SSAM's last one are the optimizer's own, whatever happens to .grad."""
    for make in (CrAM, SSAM, SAM):
        results = []
        for to_none in (True, False):
            model = net()
            optimizer = make(base_of(groups(model)))
            for step in range(5):

                def closure(model=model, optimizer=optimizer, step=step, to_none=to_none):
                    optimizer.zero_grad(set_to_none=to_none)
                    loss = loss_of(model, step)
                    loss.backward()
                    return loss

                optimizer.step(closure)
            results.append(weights(model))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_closures_that_leave_zero_grad_to_the_loop(name):
    models = [net(), net()]
    optimizers = [OPTIMIZERS[name](base_of(groups(model))) for model in models]
    for step in range(5):
        train(models[0], optimizers[0], [step])

        def closure(step=step):
            loss = loss_of(models[1], step)
            loss.backward()
            return loss

        optimizers[1].step(closure)
        optimizers[1].zero_grad()
    assert_weights(models[1], weights(models[0]))


def test_checkpoint_loaders_probe_changes_no_weight_and_no_counter():
    """torch.distributed.checkpoint has the base make its state by a step with lr = 0 and zero gradients."""
    for name in ALL:
        model = net()
        optimizer = WCR(OPTIMIZERS[name](base_of(groups(model), "adamw")), 1e-2)
        before, groups_before = weights(model), optimizer.state_dict()["param_groups"]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        assert_weights(model, before)
        assert optimizer.state_dict()["param_groups"] == groups_before
        assert all("exp_avg" in optimizer.state[p] for p in model.parameters())


@pytest.mark.parametrize("name", TWO_PASS)
def test_gradients_that_are_not_finite_reach_the_base(name):
    """Without a scaler somebody else has to decide what becomes of such a step, and must be able to see it."""
    for failing in (1, 2):
        model = net()
        base = base_of(groups(model))
        optimizer = OPTIMIZERS[name](base)
        train(model, optimizer, [0])
        before, calls = weights(model), []

        def closure(model=model, optimizer=optimizer, calls=calls, failing=failing):
            loss = closure_of(model, optimizer, 1)()
            calls.append([p.detach().clone() for p in model.parameters()])
            if len(calls) == failing:
                next(model.parameters()).grad.view(-1)[0] = float("inf")
            return loss

        optimizer.gather(closure)
        assert_weights(model, before)
        assert not all(p.grad.isfinite().all() for p in model.parameters())
        assert all(torch.isfinite(w).all() for w in calls[1]), "no pass runs at weights that are not finite"


def test_plain_reference_of_clean_loss():
    """The loss that comes back is that of the weights before the step."""
    model, twin = net(), net()
    optimizer = SAM(base_of(groups(model)))
    reference = PlainSAM(twin, base_of(groups(twin)))
    for step in range(5):
        expected = loss_of(twin, step).item()
        assert train(model, optimizer, [step]) == [pytest.approx(expected, rel=1e-12)]
        reference.step(step)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("way", ["skipped", "failed"])
def test_a_step_that_was_not_taken_leaves_nothing_for_the_next(name, way):
    """Gradients that gather() left, and that no step took, do not vouch for others that come after them."""
    model, twin = net(), net()
    base = base_of(groups(model))
    optimizer, same = OPTIMIZERS[name](base), OPTIMIZERS[name](base_of(groups(twin)))
    for m, o in ((model, optimizer), (twin, same)):
        train(m, o, range(2))
    if way == "skipped":  # as by a scaler
        optimizer.gather(closure_of(model, optimizer, 2))
    else:

        def refuse(*_):
            raise RuntimeError("not now")

        handle = base.register_step_pre_hook(refuse)
        with pytest.raises(RuntimeError, match="not now"):
            train(model, optimizer, [2])
        handle.remove()
    before = weights(model)
    if name == "ssam":  # takes one pass: the plain step must perturb by its gradient, as any
        same.gather(closure_of(twin, same, 2))
        for m, o in ((model, optimizer), (twin, same)):
            closure_of(m, o, 3)()
            o.step()
        with optimizer.true_weights():
            here = weights(model)
        assert any(not torch.equal(p, h) for p, h in zip(model.parameters(), here, strict=True))
        return
    if way == "skipped":
        closure_of(model, optimizer, 3)()
    with pytest.raises(RuntimeError, match="without a closure would be a step of SGD alone"):
        optimizer.step()
    assert_weights(model, before)


@pytest.mark.parametrize("name", TWO_PASS)
@pytest.mark.parametrize("outer", [False, True])
def test_zero_grad_in_manual_loops(name, outer):
    models = [net(), net()]
    optimizers = [OPTIMIZERS[name](base_of(groups(model))) for model in models]
    if outer:
        optimizers = [WCR(optimizer, 1e-2) for optimizer in optimizers]
    train(models[0], optimizers[0], range(3))
    for step in range(3):
        loss_of(models[1], step).backward()
        assert optimizers[1].first_step(zero_grad=True)
        assert all(p.grad is None for p in models[1].parameters())
        loss_of(models[1], step).backward()
        optimizers[1].second_step(zero_grad=True)
        assert all(p.grad is None for p in models[1].parameters())
    assert_weights(models[1], weights(models[0]))


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("spectral_norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_power_iterations_come_from_the_clean_pass(spectral_norm):
    torch.manual_seed(0)
    model = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 1))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=1.0, model=model)
    x, after = torch.randn(8, 4), []

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        after.append({key: value.clone() for key, value in model.named_buffers()})
        return loss

    optimizer.step(closure)
    assert {key[-2:] for key in after[0]} == {"_u", "_v"}
    for key, value in model.named_buffers():
        assert torch.equal(value, after[0][key])
        assert not torch.equal(value, after[1][key])


def test_ssam_leaves_the_true_weights_of_embeddings_that_every_forward_writes():
    """max_norm= counts as a write even where no row is too long."""
    torch.manual_seed(0)
    embedding = nn.Embedding(6, 4, max_norm=100.0)
    optimizer = SSAM(torch.optim.SGD(embedding.parameters(), lr=0.0), rho=0.5)
    before = embedding.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = embedding(torch.arange(6)).sum()
        loss.backward()
        return loss

    clean = optimizer.step(closure).item()
    for _ in range(3):
        assert optimizer.step(closure).item() > clean, "at w + e"
    assert torch.equal(embedding.weight, before)

    def fails():
        closure()
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        optimizer.step(fails)
    assert torch.equal(embedding.weight, before)
