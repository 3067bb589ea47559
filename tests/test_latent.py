"""Latent weights: what they equal, what they hold at zero, and what brings it back."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from reference import assert_same, make_closure, plain_shrink, small_net, through_file, train, weights
from target_reference import driven, plain_tail, weights_of
from test_resume import BASES, halves
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.hooks import RemovableHandle

from wcr_optim import SAM, SGD, SSAM, WCR, AdamW, CrAM, Decoupled, HoyerDecay, L1Decay, SparseSAM, penalties
from wcr_optim.moments import Moments

KEY = "weight_concentration_latent"
PLAIN = [base for base in BASES if base != "lbfgs"]


def shrinkable(net):
    return [p for p in net.parameters() if p.ndim > 1]


def at_zero(net):
    zero = sum(int((p == 0).sum()) for p in shrinkable(net))
    return zero / sum(p.numel() for p in shrinkable(net))


def per_unit(base, strength=0.5):
    return WCR(base, strength, form="per_unit", latent_weights=True)


@pytest.mark.parametrize(
    "base",
    [
        lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
        lambda params: torch.optim.Adam(params, lr=1e-2),
        lambda params: torch.optim.RMSprop(params, lr=1e-2, momentum=0.9),
    ],
    ids=["sgd", "adam", "rmsprop"],
)
def test_l1_with_latent_weights_is_regularized_dual_averaging(base):
    """The twin has the base train the latent weights, and the network see them shrunk by all thresholds so far."""
    strength = 0.05
    ours, twin = small_net(torch.float64), small_net(torch.float64)
    train(ours, L1Decay(base(ours.parameters()), strength, latent_weights=True), range(150))

    plain, threshold = base(twin.parameters()), 0.0
    latent = [w.detach().clone() for w in shrinkable(twin)]
    for step in range(150):
        make_closure(twin, plain, step)()
        with torch.no_grad():
            for w, z in zip(shrinkable(twin), latent, strict=True):
                w.copy_(z)
        plain.step()
        threshold += plain.param_groups[0]["lr"] * strength
        with torch.no_grad():
            for w, z in zip(shrinkable(twin), latent, strict=True):
                z.copy_(w)
                w.copy_(plain_shrink(z, 1.0, threshold))
    assert at_zero(twin) > 0.1
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_the_form_that_sparsity_target_drives_written_out():
    """One layer under the per-unit form, SGD with momentum; every number of a step in a line of its own."""
    torch.manual_seed(0)
    w0, x = torch.randn(5, 40, dtype=torch.float64) / 6, torch.randn(300, 40, dtype=torch.float64)
    y = x[:, :5] + 0.1 * torch.randn(300, 5, dtype=torch.float64)
    lr, momentum, strength = 0.02, 0.9, 2e-3

    layer = nn.Linear(40, 5, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(w0)
    optimizer = per_unit(torch.optim.SGD(layer.parameters(), lr=lr, momentum=momentum), strength)

    w, z, reach, velocity = w0.clone(), torch.zeros_like(w0), torch.zeros(5, 1, dtype=torch.float64), None
    returned = 0
    for step in range(200):
        rows = slice(step % 10 * 30, step % 10 * 30 + 30)
        optimizer.zero_grad()
        (layer(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()

        gradient = 2 / (30 * 5) * (x[rows] @ w.T - y[rows]).T @ x[rows]
        m = w.abs()
        moments = Moments(torch.full((5,), 40.0, dtype=torch.float64), m.mean(1), m.square().mean(1))
        gain, threshold = (v.view(-1, 1) for v in penalties.PerUnit().flow(moments, lr * strength))
        shrunk = gain * w.sign() * (m - threshold).clamp(min=0)
        z = torch.where(w == 0, z, w + w.sign() * reach)
        reach = reach + threshold
        z = torch.where(shrunk == 0, z, shrunk + shrunk.sign() * reach)
        velocity = gradient if velocity is None else momentum * velocity + gradient
        z = z - lr * velocity
        before, w = w, z.sign() * (z.abs() - reach).clamp(min=0)
        returned += int(((before == 0) & (w != 0)).sum())
        z = torch.where(w == 0, z, 0.0)

        torch.testing.assert_close(layer.weight, w, rtol=1e-9, atol=1e-12)
        state = optimizer.state[layer.weight]
        torch.testing.assert_close(state[KEY], z, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(state[f"{KEY}_sum"], reach.view(-1), rtol=1e-12, atol=0.0)
    assert returned > 10
    assert (w == 0).double().mean() > 0.3


def test_a_weight_at_zero_returns_when_the_updates_outweigh_the_thresholds():
    w = nn.Parameter(torch.tensor([[0.25, 2.0, 0.75]], dtype=torch.float64))
    optimizer = L1Decay(torch.optim.SGD([w], lr=1.0), 0.5, latent_weights=True)
    seen = []
    for pull in (0.0, 0.25, 0.25, 1.25, 1.25, 0.0):
        w.grad = torch.tensor([[-pull, 0.0, 1.0]], dtype=torch.float64)
        optimizer.step()
        seen.append(w.detach()[0].tolist())
    first = [row[0] for row in seen]
    # After four steps the updates add up to 1.75, the thresholds to 2.0 less the 0.25 that it had.
    assert first == [0.0, 0.0, 0.0, 0.0, 0.75, 0.25]
    third = [row[2] for row in seen]
    # From 0.25 after its threshold an update of -1 would take it to -0.75: it stops on its way through zero.
    assert third == [0.0, -0.25, -0.75, -1.25, -1.75, -2.25]


@pytest.mark.parametrize("make", [per_unit, lambda base: WCR(base, latent_weights=True)])
def test_nothing_changes_as_long_as_no_weight_reaches_zero(make):
    ours, plain = small_net(), small_net()
    optimizer = make(BASES["sgd"](ours.parameters()))
    without = Decoupled(BASES["sgd"](plain.parameters()), optimizer.penalty, 0.0)
    for group in (*optimizer.param_groups, *without.param_groups):
        group["weight_concentration"] = 1e-7
        group["lr"] = 1e-4
    train(ours, optimizer, range(30))
    train(plain, without, range(30))
    assert at_zero(ours) == 0.0
    assert_same(ours, plain)


def test_without_latent_weights_small_weights_move_between_steps():
    """What they are for: Adam moves what the penalty takes to zero at every step."""
    ours, plain = small_net(), small_net()
    train(ours, per_unit(BASES["adamw"](ours.parameters())), range(200))
    train(plain, WCR(BASES["adamw"](plain.parameters()), 0.5, form="per_unit"), range(200))
    assert at_zero(ours) > 0.3
    assert at_zero(plain) == 0.0


@pytest.mark.parametrize("base", PLAIN)
def test_resume(base):
    halves(lambda p: per_unit(BASES[base](p), 0.1))


@pytest.mark.parametrize(
    ("base", "dtype"), [("sgd", torch.float16), ("sgd", torch.bfloat16), ("adamw", torch.bfloat16)]
)
def test_resume_in_low_precision_keeps_the_sums_in_float32(base, dtype):
    halves(lambda p: per_unit(BASES[base](p), 0.1), dtype=dtype)
    net = small_net(dtype)
    optimizer = per_unit(BASES[base](net.parameters()), 0.1)
    train(net, optimizer, range(10))
    fresh = per_unit(BASES[base](small_net(dtype).parameters()), 0.1)
    fresh.load_state_dict(through_file(optimizer.state_dict()))
    for a, b in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key.startswith(KEY):
                assert a[key].dtype == b[key].dtype == torch.float32
                assert torch.equal(a[key], b[key])


@pytest.mark.parametrize("hooked", [lambda optimizer: optimizer, lambda optimizer: optimizer.base], ids=["own", "base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hook_that_loads_into_another_order_of_parameters(hooked, dtype):
    first, second = small_net(dtype), small_net(dtype)
    optimizer = per_unit(torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9), 0.1)
    train(first, optimizer, range(20))
    other = per_unit(torch.optim.SGD(reversed([*second.parameters()]), lr=0.1, momentum=0.9), 0.1)

    def reverse(_, state_dict):
        (group,) = state_dict["param_groups"]
        last = len(group["params"]) - 1
        return {**state_dict, "state": {last - number: state for number, state in state_dict["state"].items()}}

    hooked(other).register_load_state_dict_pre_hook(reverse)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[q][key])


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("around", [per_unit, lambda base: SparseSAM(base)], ids=["latent", "sparse_sam"])
def test_gradients_that_a_hook_of_the_base_took_leave_its_state_to_the_base(around, every):
    net = small_net()
    base = torch.optim.Adam(net.parameters(), lr=1e-2)
    optimizer = around(base)
    weight = shrinkable(net)[0]

    def take(*_):
        for p in net.parameters() if every else [weight]:
            p.grad = None
        skip.remove()

    skip = base.register_step_pre_hook(take)
    train(net, optimizer, range(1), closure=True)
    assert not base.state[weight], "Adam would take it for a state of its own"
    train(net, optimizer, range(1, 4), closure=True)
    assert {"exp_avg", "exp_avg_sq", "step"} < base.state[weight].keys()


@pytest.mark.parametrize("around", [per_unit, SSAM, SparseSAM])
def test_every_hook_of_the_base_is_called_in_the_first_step(around, monkeypatch):
    for number in range(3):
        monkeypatch.setattr(RemovableHandle, "next_id", number)
        net = small_net()
        base = torch.optim.SGD(net.parameters(), lr=0.1)
        calls = []
        base.register_step_pre_hook(lambda *_: calls.append(1))  # noqa: B023
        train(net, around(base), range(2), closure=True)
        assert len(calls) == 2


@pytest.mark.parametrize(
    "around",
    [
        lambda base: base,
        per_unit,
        SSAM,
        SparseSAM,
        lambda base: SSAM(per_unit(base)),
        lambda base: per_unit(SSAM(base)),
    ],
    ids=["base", "latent", "ssam", "sparse_sam", "ssam around", "ssam within"],
)
def test_a_hook_that_the_first_step_registers_stays(around):
    net = small_net()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    calls = []

    def register(*_):
        once.remove()
        base.register_step_pre_hook(lambda *_: calls.append(1))

    once = base.register_step_post_hook(register)
    train(net, around(base), range(3), closure=True)
    assert len(calls) == 2


@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize(
    "around",
    [per_unit, SSAM, SparseSAM, lambda base: SSAM(per_unit(base))],
    ids=["latent", "ssam", "sparse_sam", "both"],
)
def test_resume_where_one_group_has_no_momentum_and_a_hook_clears_gradients(around, clears):
    def make(params):
        params = list(params)
        groups = [{"params": params[:2], "momentum": 0.0}, {"params": params[2:]}]
        base = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        if clears:
            base.register_step_post_hook(lambda base, *_: base.zero_grad())
        made.append(around(base))
        return made[-1]

    made = []
    halves(make, closure=True)
    for optimizer in made:
        keys = {key for p in optimizer.param_groups[0]["params"] if p.ndim > 1 for key in optimizer.state[p]}
        assert keys
        assert not keys & {"momentum_buffer"}


def test_a_base_that_keeps_a_count_of_its_own_in_its_state():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            self.state["steps"] = self.state.get("steps", 0) + 1
            return super().step(closure)

    net = small_net()
    optimizer = per_unit(Counting(net.parameters(), lr=0.1))
    train(net, optimizer, range(3))
    assert optimizer.state["steps"] == 3
    assert KEY in optimizer.state[shrinkable(net)[0]]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_base_without_states_goes_through_torch_distributed_checkpoint(tmp_path):
    nets = [small_net(), small_net()]
    first, second = optimizers = [per_unit(torch.optim.SGD(net.parameters(), lr=0.1)) for net in nets]
    train(nets[0], first, range(10))
    names = ("model", "optimizer")
    dcp.save(dict(zip(names, get_state_dict(nets[0], first), strict=True)), checkpoint_id=tmp_path, no_dist=True)
    template = dict(zip(names, get_state_dict(nets[1], second), strict=True))
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(nets[1], second, model_state_dict=template["model"], optim_state_dict=template["optimizer"])
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, range(10, 20))
    assert at_zero(nets[0]) > 0.3
    assert_same(*nets)


def test_a_loaded_state_is_not_the_checkpoints():
    net = small_net(torch.bfloat16)
    optimizer = per_unit(BASES["adamw"](net.parameters()), 0.1)
    train(net, optimizer, range(10))
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict["state"])
    fresh = small_net(torch.bfloat16)
    other = per_unit(BASES["adamw"](fresh.parameters()), 0.1)
    other.load_state_dict(state_dict)
    train(fresh, other, range(3))
    for name, state in before.items():
        for key in state:
            if key.startswith(KEY):
                assert torch.equal(state[key], state_dict["state"][name][key])


def test_a_step_of_length_0_holds_what_is_at_zero_and_makes_state():
    """torch.distributed.checkpoint makes the state that it loads into by such a step."""
    net = small_net()
    optimizer = per_unit(BASES["adamw"](net.parameters()))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights(net)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
    assert all(KEY in optimizer.state[p] for p in shrinkable(net))

    optimizer.param_groups[0]["lr"] = 1e-2
    train(net, optimizer, range(100))
    zero, latent = [p == 0 for p in shrinkable(net)], [optimizer.state[p][KEY].clone() for p in shrinkable(net)]
    assert at_zero(net) > 0.2
    optimizer.param_groups[0]["lr"] = 0.0
    train(net, optimizer, range(3))
    for p, held, z in zip(shrinkable(net), zero, latent, strict=True):
        assert torch.equal(p == 0, held)
        torch.testing.assert_close(optimizer.state[p][KEY], z)


def test_a_group_without_strength_has_no_latent_weights():
    net = small_net()
    first, second = shrinkable(net)
    groups = [{"params": [first]}, {"params": [second], "weight_concentration": 0.0}]
    optimizer = per_unit(torch.optim.AdamW(groups, lr=1e-2))
    for step in range(100):
        make_closure(net, optimizer, step)()
        optimizer.step()
    assert (first == 0).any()
    assert not (second == 0).any()
    assert KEY in optimizer.state[first]
    assert KEY not in optimizer.state[second]


@pytest.mark.parametrize(
    "around",
    [SAM, SSAM, SparseSAM, CrAM, lambda base: SAM(base, adaptive=True)],
    ids=lambda a: getattr(a, "__name__", "asam"),
)
@pytest.mark.parametrize("closure", [True, False])
def test_sharpness_aware_optimizers_leave_what_is_at_zero_there(around, closure):
    """They move all weights for a gradient, and bring them back to the last bit, so that none is taken for alive."""
    net = small_net()
    optimizer = per_unit(around(BASES["adamw"](net.parameters())))
    if not closure and not isinstance(optimizer.base, SSAM):
        pytest.skip("takes two passes")
    train(net, optimizer, range(150), closure=closure)
    with optimizer.true_weights():
        assert at_zero(net) > 0.2
        for w in shrinkable(net):
            latent, reach = optimizer.state[w][KEY], optimizer.state[w][f"{KEY}_sum"].view(-1, 1)
            assert torch.equal(latent == 0, w != 0)
            assert bool((latent.abs() <= reach).all())
    order = small_net()
    other = around(per_unit(BASES["adamw"](order.parameters())))
    train(order, other, range(150), closure=closure)
    with optimizer.true_weights(), other.true_weights():
        for a, b in zip(net.parameters(), order.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_a_step_that_fails_on_its_way_holds_nothing_the_next_time():
    class Fails(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("no")
            return super().step(closure)

    net = small_net()
    base = Fails(net.parameters(), lr=0.05, momentum=0.9)
    optimizer = per_unit(base)
    train(net, optimizer, range(50))
    base.fails = True
    with pytest.raises(RuntimeError, match="no"):
        train(net, optimizer, [50])
    base.fails = False
    train(net, optimizer, range(51, 100))
    for w in shrinkable(net):
        assert torch.equal(optimizer.state[w][KEY] == 0, w != 0)
        assert w.isfinite().all()


def test_a_weight_that_others_set_to_zero_is_not_brought_back_at_once():
    net = small_net()
    optimizer = per_unit(BASES["sgd"](net.parameters()))
    train(net, optimizer, range(50))
    w = shrinkable(net)[0]
    alive = w != 0
    with torch.no_grad():
        w.zero_()
    make_closure(net, optimizer, 50)()
    w.grad.zero_()
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.step()
    assert not w[alive].any()


def test_one_nan_among_good_weights_stays_the_only_one():
    net = small_net()
    optimizer = per_unit(BASES["sgd"](net.parameters()))
    train(net, optimizer, range(50))
    w = shrinkable(net)[0]
    with torch.no_grad():
        w[0, 0] = torch.nan
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert int(w.isnan().sum()) == 1


@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_drop_ins_take_it(make, fused):
    options = {"lr": 1e-2, "weight_concentration": 0.5, "form": "per_unit", "latent_weights": True, "fused": fused}
    net = small_net()
    train(net, make(net.parameters(), **options), range(150))
    assert at_zero(net) > 0.2


def test_other_penalties_take_it():
    for make in (
        lambda base: HoyerDecay(base, 0.05, latent_weights=True),
        lambda base: WCR(base, 0.05, form="scale_free", latent_weights=True),
        lambda base: L1Decay(base, 0.05, latent_weights=True),
        lambda base: L1Decay(WCR(base, 0.05, form="scale_free", latent_weights=True), 0.01, latent_weights=True),
    ):
        net = small_net()
        train(net, make(BASES["adamw"](net.parameters())), range(150))
        assert at_zero(net) > 0.2


def test_a_base_that_moves_weights_before_the_penalty_is_refused_and_left_as_it_was():
    base = BASES["lbfgs"](small_net().parameters())
    keys = set(base.param_groups[0])
    with pytest.raises(ValueError, match=r"LBFGS moves weights before the penalty's step.*leave latent_weights out"):
        per_unit(base)
    assert set(base.param_groups[0]) == keys
    with pytest.raises(ValueError, match="leave latent_weights out"):
        WCR(L1Decay(base), latent_weights=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, about its own parts
def test_inside_a_compiled_step_they_are_the_same():
    compiled, plain = small_net(), small_net()
    optimizer, other = (per_unit(BASES["sgd"](net.parameters())) for net in (compiled, plain))
    torch._dynamo.reset()  # steps compiled in other tests count towards one limit, beyond which nothing is compiled
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(30):
        make_closure(compiled, optimizer, number)()
        step()
        make_closure(plain, other, number)()
        other.step()
    torch._dynamo.reset()
    assert at_zero(plain) > 0.0
    assert_same(compiled, plain)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_driven_by_sparsity_target_pruning_takes_next_to_nothing(base):
    _, optimizer, target, loss = driven(base, lambda b: per_unit(b, 1e-3), sparsity=0.9)
    ws = weights_of(optimizer)
    assert plain_tail(ws, 0.9) < 1.5 * target.tail_energy
    assert sum(int((w == 0).sum()) for w in ws) > 0.5 * sum(w.numel() for w in ws)
    assert loss < 0.5
