"""Fused optimizers: one pass instead of three, and nothing else that differs from the unfused ones."""

import copy
import math
import pickle

import pytest
import torch
from reference import Elsewhere, make_closure, small_batch, small_net, through_file, train, weights
from torch import nn
from torch.optim import lr_scheduler

from wcr_optim import SGD, WCR, AdamW, L1Decay, L2Decay, backends, compiled, fused
from wcr_optim.sharpness import SAM, SSAM

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def backend_params():
    why_not = compiled.why_not()
    yield pytest.param("compiled", marks=pytest.mark.skipif(why_not is not None, reason=str(why_not)))
    missing = backends.util.find_spec("triton") is None
    yield pytest.param("triton", marks=pytest.mark.skipif(missing, reason="Triton is not installed"))


@pytest.fixture(params=backend_params())
def backend(request):
    return request.param


@pytest.fixture
def net_of(backend):
    """Networks on the backend's device."""
    device = DEVICE if backend == "triton" else "cpu"
    return lambda dtype=torch.float32: small_net(dtype).to(device)


def steps(net, opt, numbers, scheduler=None):
    for step in numbers:
        gradients(net, opt, step)
        opt.step()
        if scheduler is not None:
            scheduler.step()


def gradients(net, opt, step):
    w = next(net.parameters())
    x, y = (part.to(w.device) for part in small_batch(step, w.dtype))
    opt.zero_grad()
    (net(x) - y).square().mean().backward()


def make(cls, net, backend, **options):
    opt = cls(net.parameters(), **{"lr": 0.01, "weight_concentration": 0.1, "fused": True} | options)
    opt.backend = backend
    return opt


def unfused(cls, net, **options):
    return make(cls, net, "eager", **options | {"fused": False})


def assert_close(net, other, **tolerances):
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerances or {"rtol": 1e-4, "atol": 2e-6})


CASES = [
    (AdamW, {}),
    (AdamW, {"weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-4}),
    (AdamW, {"maximize": True, "lr": 1e-3}),
    (AdamW, {"lr": torch.tensor(0.01)}),
    (AdamW, {"form": "scale_free", "weight_concentration": 1e-3}),
    (SGD, {}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.9, "dampening": 0.5, "maximize": True, "lr": 1e-3}),
]
case = pytest.mark.parametrize(("cls", "options"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))


@pytest.fixture
def measured(monkeypatch):
    """How many layers were measured apart from an update, call by call."""
    calls = []
    measure = fused.measure
    monkeypatch.setattr(fused, "measure", lambda parts, backend: calls.append(len(parts)) or measure(parts, backend))
    return calls


@case
def test_fused_steps_are_the_unfused_ones(net_of, backend, cls, options, measured):
    ours, plain = net_of(), net_of()
    opt = make(cls, ours, backend, **copy.deepcopy(options))
    steps(ours, opt, range(20))
    steps(plain, unfused(cls, plain, **copy.deepcopy(options)), range(20))
    assert_close(ours, plain)
    # Two weight matrices. A state is made by torch's own first step; after the second one, sums come with the update.
    first = 2 if cls is AdamW or options.get("momentum") else 1
    assert measured == [2] * first


@pytest.mark.skipif(not issubclass(torch.optim.AdamW, torch.optim.Adam), reason="this torch is such an older one")
def test_an_older_torchs_adamw_which_has_a_flag_among_the_lists(net_of, backend, monkeypatch):
    ours, plain = net_of(), net_of()
    steps(plain, unfused(AdamW, plain), range(4))
    # Of AdamW itself, and not of the Adam below it: importing torch._dynamo gives every optimizer a method of its own.
    theirs, fusing = torch.optim.AdamW._init_group, fused.FusedUpdate._init_group
    monkeypatch.setattr(torch.optim.AdamW, "_init_group", lambda self, *a: theirs(self, *a[:5], *a[6:]))
    monkeypatch.setattr(fused.FusedUpdate, "_init_group", lambda self, *a: fusing(self, *a[:5], False, *a[5:]))
    opt = make(AdamW, ours, backend)
    steps(ours, opt, range(4))
    assert opt.base._known
    assert_close(ours, plain)


def test_it_is_torchs_optimizer_with_torchs_state(net_of, backend):
    for cls, theirs, options in ((AdamW, torch.optim.AdamW, {}), (SGD, torch.optim.SGD, {"momentum": 0.9})):
        ours, plain = net_of(), net_of()
        opt = make(cls, ours, backend, **options)
        bare = theirs(plain.parameters(), lr=0.01, fused=True, **options)
        steps(ours, opt, range(3))
        steps(plain, bare, range(3))
        assert isinstance(opt.base, theirs)
        state, expected = opt.state_dict()["state"], bare.state_dict()["state"]
        assert state.keys() == expected.keys()
        for key in state:
            assert {k: (v.dtype, v.shape, v.device) for k, v in state[key].items()} == {
                k: (v.dtype, v.shape, v.device) for k, v in expected[key].items()
            }
        known = {"weight_concentration"}
        assert set(opt.param_groups[0]) - set(bare.param_groups[0]) == known


@pytest.mark.parametrize("source_fused", [False, True])
@pytest.mark.parametrize(("cls", "theirs"), [(AdamW, torch.optim.AdamW), (SGD, torch.optim.SGD)])
def test_checkpoints_of_torchs_own_optimizer_resume(net_of, backend, cls, theirs, source_fused):
    """Also between fused and not; as with torch's, the flag comes with the checkpoint."""
    options = {"momentum": 0.9} if cls is SGD else {}
    source, ours, plain = net_of(), net_of(), net_of()
    bare = theirs(source.parameters(), lr=0.01, fused=source_fused, **options)
    steps(source, bare, range(5))
    saved = through_file({"net": source.state_dict(), "opt": bare.state_dict()})
    opts = make(cls, ours, backend, **options), unfused(cls, plain, **options)
    for net, opt in zip((ours, plain), opts, strict=True):
        net.load_state_dict(saved["net"])
        opt.load_state_dict(copy.deepcopy(saved["opt"]))
        assert opt.param_groups[0]["fused"] is source_fused
        steps(net, opt, range(5, 15))
    assert_close(ours, plain)
    bare.load_state_dict(through_file(opts[0].state_dict()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cls", "options"), [(AdamW, {}), (SGD, {"momentum": 0.9}), (SGD, {})])
def test_resume_is_bit_exact(net_of, backend, cls, options, dtype):
    """The sums that an update leaves are, bit for bit, those that measuring its weights would find."""
    straight, resumed = net_of(dtype), net_of(dtype)
    opt = make(cls, straight, backend, **options)
    steps(straight, opt, range(7))
    saved = through_file({"net": straight.state_dict(), "opt": opt.state_dict()})
    fresh = make(cls, resumed, backend, **options)
    resumed.load_state_dict(saved["net"])
    fresh.load_state_dict(saved["opt"])
    steps(straight, opt, range(7, 14))
    steps(resumed, fresh, range(7, 14))
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))


WRITES = {
    "in place": lambda net: net[0].weight.mul_(0.5),
    "copy": lambda net: net[0].weight.copy_(torch.full_like(net[0].weight, 0.1) + net[0].weight * 0.1),
    "load_state_dict": lambda net: net[0].load_state_dict({k: 0.5 * v for k, v in net[0].state_dict().items()}),
    "new memory": lambda net: setattr(net[0].weight, "data", 0.5 * net[0].weight.data),
}


@pytest.mark.parametrize("write", WRITES)
def test_weights_written_by_others_are_measured_again(net_of, backend, write, measured):
    ours, plain = net_of(), net_of()
    opts = make(AdamW, ours, backend), unfused(AdamW, plain)
    for net, opt in zip((ours, plain), opts, strict=True):
        steps(net, opt, range(5))
        with torch.no_grad():
            WRITES[write](net)
        steps(net, opt, range(5, 6))
    assert measured[2:] == [1], "one layer of two"
    for net, opt in zip((ours, plain), opts, strict=True):
        steps(net, opt, range(6, 10))
    assert_close(ours, plain)


def test_gradscaler_skips_the_whole_step_on_inf(net_of, backend):
    nets = net_of(), net_of()
    device = next(nets[0].parameters()).device.type
    for net, opt in zip(nets, (make(AdamW, nets[0], backend), unfused(AdamW, nets[1])), strict=True):
        scaler = torch.amp.GradScaler(device, init_scale=8.0)
        for step in range(8):
            x, y = (part.to(device) for part in small_batch(step))
            opt.zero_grad()
            scaler.scale((net(x) - y).square().mean()).backward()
            if step == 4:
                net[0].weight.grad[0, 0] = math.inf
            before = weights(net)
            scaler.step(opt)
            assert step != 4 or all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
            scaler.update()
        assert scaler.get_scale() == 4.0
    assert_close(*nets)


def test_closures_and_schedulers(net_of, backend):
    if backend == "triton" and DEVICE.type != "cpu":
        pytest.skip("the closures of the reference are the CPU's")
    nets = net_of(), net_of()
    for net, opt in zip(nets, (make(AdamW, nets[0], backend), unfused(AdamW, nets[1])), strict=True):
        scheduler = lr_scheduler.OneCycleLR(opt.base, max_lr=0.02, total_steps=12)
        for step in range(12):
            evaluate = make_closure(net, opt, step)
            before = evaluate().item()
            assert opt.step(evaluate).item() == before
            scheduler.step()
    assert_close(*nets)


def test_hooks_fire_once_and_see_what_they_would_see(net_of, backend, measured):
    """A hook before the base's update is to find shrunk weights there, so it turns fusing off."""
    nets = net_of(), net_of()
    seen = [], []
    opts = make(AdamW, nets[0], backend), unfused(AdamW, nets[1])
    for net, opt, norms in zip(nets, opts, seen, strict=True):
        handle = opt.base.register_step_pre_hook(lambda *_, net=net, norms=norms: norms.append(net[0].weight.norm()))
        opt.base.register_step_post_hook(lambda *_, net=net, norms=norms: norms.append(net[0].weight.norm()))
        opt.register_step_post_hook(lambda *_, norms=norms: norms.append(torch.ones(())))
        steps(net, opt, range(5))
        handle.remove()
        steps(net, opt, range(5, 8))
    assert len(seen[0]) == 3 * 5 + 2 * 3
    assert len(seen[1]) == len(seen[0])
    for ours, plain in zip(*seen, strict=True):
        torch.testing.assert_close(ours.cpu(), plain.cpu())
    assert measured == [2] * 6
    assert_close(*nets)


def test_groups_added_later_and_groups_without_the_penalty(net_of, backend):
    nets = net_of(), net_of()
    extras = [
        nn.Parameter(torch.linspace(-1, 1, 30, device=next(nets[0].parameters()).device).view(5, 6)) for _ in nets
    ]
    opts = make(SGD, nets[0], backend, momentum=0.9), unfused(SGD, nets[1], momentum=0.9)
    for net, opt, extra in zip(nets, opts, extras, strict=True):
        steps(net, opt, range(3))
        opt.add_param_group({"params": [extra], "lr": 0.3, "weight_concentration": 0.0})
        for step in range(3, 9):
            gradients(net, opt, step)
            extra.grad = extra.detach().cos()
            if step == 6:
                opt.param_groups[1]["weight_concentration"] = 0.2
            if step == 7:
                net[3].weight.grad = None
            opt.step()
    assert_close(*nets)
    torch.testing.assert_close(*extras)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike(net_of, backend, duplicate):
    net = net_of()
    opt = make(AdamW, net, backend)
    steps(net, opt, range(4))
    other, twin = duplicate((net, opt))
    assert type(twin.base) is fused.FusedAdamW
    steps(net, opt, range(4, 8))
    steps(other, twin, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(weights(net), weights(other), strict=True))


def test_inside_sam_weights_move_between_steps_and_are_measured(net_of, backend, measured):
    nets = net_of(), net_of()
    opts = [SAM(make(AdamW, nets[0], backend), rho=0.05), SAM(unfused(AdamW, nets[1]), rho=0.05)]
    for net, opt in zip(nets, opts, strict=True):
        for step in range(5):
            opt.step(lambda net=net, opt=opt, step=step: (gradients(net, opt, step), torch.zeros(()))[1])
    assert measured == [2] * 5
    assert_close(*nets)


def test_other_penalties_around_a_fused_base(net_of, backend):
    for wrap in (
        lambda o, b: L1Decay(o, 0.01, backend=b),
        lambda o, b: WCR(L2Decay(o, 0.1, backend=b), 0.1, backend=b),
    ):
        nets = net_of(), net_of()
        steps(nets[0], wrap(fused.FusedAdamW(nets[0].parameters(), lr=0.01, fused=True), backend), range(8))
        steps(nets[1], wrap(torch.optim.AdamW(nets[1].parameters(), lr=0.01), "eager"), range(8))
        assert_close(*nets)


def test_strength_zero_is_torchs_fused_optimizer_bit_for_bit(net_of, backend):
    for cls, theirs in ((AdamW, torch.optim.AdamW), (SGD, torch.optim.SGD)):
        nets = net_of(), net_of()
        steps(nets[0], make(cls, nets[0], backend, weight_concentration=0.0), range(5))
        steps(nets[1], theirs(nets[1].parameters(), lr=0.01, fused=True), range(5))
        assert all(torch.equal(a, b) for a, b in zip(weights(nets[0]), weights(nets[1]), strict=True))


@pytest.mark.parametrize(
    ("cls", "options", "dtype"),
    [(AdamW, {"amsgrad": True}, torch.float32), (AdamW, {}, torch.float64), (SGD, {"momentum": 0.9}, torch.float64)],
)
def test_what_the_kernel_cannot_do_is_done_without_it(net_of, backend, cls, options, dtype):
    nets = net_of(dtype), net_of(dtype)
    opt = make(cls, nets[0], backend, **options)
    steps(nets[0], opt, range(6))
    steps(nets[1], unfused(cls, nets[1], **options), range(6))
    assert not opt.base._known
    assert_close(*nets)


def test_around_it_ssam_leaves_it_fused_where_a_parameter_is_not_used(net_of, backend):
    net = net_of()
    unused = nn.Parameter(torch.ones(4, 4, device=next(net.parameters()).device))
    opt = AdamW([*net.parameters(), unused], lr=0.01, weight_concentration=0.1, fused=True)
    opt.backend = backend
    steps(net, SSAM(opt), range(3))
    assert opt.base._known


@pytest.mark.parametrize("strength", [0.0, 0.1])
@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_a_layer_whose_first_gradient_comes_later(net_of, backend, cls, late, strength):
    nets = [net_of(torch.float64), net_of(torch.float64)]
    options = {"weight_concentration": strength} | ({"momentum": 0.9, "nesterov": True} if cls is SGD else {})
    for net, opt in zip(nets, (make(cls, nets[0], backend, **options), unfused(cls, nets[1], **options)), strict=True):
        for step in range(6):
            gradients(net, opt, step)
            if step < 2:
                [*net.parameters()][late].grad = None
            opt.step()
    torch.testing.assert_close(*map(weights, nets), rtol=1e-9, atol=1e-12)


def test_layers_whose_gradient_lies_otherwise_in_memory_are_left_to_torch(net_of, backend):
    if backend == "triton" and DEVICE.type == "cuda":
        pytest.skip("torch's own fused kernel refuses such gradients on CUDA")
    nets = net_of(), net_of()  # torch's own fused kernel would be no reference: it goes by no strides
    bare = torch.optim.AdamW(nets[1].parameters(), lr=0.01, foreach=False)
    opts = make(AdamW, nets[0], backend), WCR(bare, 0.1, backend="eager")
    for net, opt in zip(nets, opts, strict=True):
        for step in range(6):
            gradients(net, opt, step)
            net[0].weight.grad = net[0].weight.grad.t().contiguous().t()
            opt.step()
    assert set(opts[0].base._known) == {nets[0][3].weight}
    assert_close(*nets)


@pytest.mark.parametrize(("cls", "options"), [(AdamW, {}), (AdamW, {"amsgrad": True}), (SGD, {"momentum": 0.9})])
@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_a_state_that_lies_otherwise_in_memory(cls, options, kind):
    """That of a channels_last network in a contiguous one: torch loads it as it lies."""
    if kind == "compiled" and (why_not := compiled.why_not()) is not None:
        pytest.skip(why_not)
    start = torch.randn(8, 4, 3, 3)
    nets = [nn.ParameterList([start.clone()]) for _ in range(2)]
    nets[0] = nets[0].to(memory_format=torch.channels_last)
    saved = make(cls, nets[0], kind, **options)
    opts = make(cls, nets[0], kind, **options), make(cls, nets[1], kind, **options)

    def step(net, opt):
        net[0].grad = net[0].detach().cos()
        opt.step()

    for _ in range(2):
        step(nets[0], saved)
    nets[1].load_state_dict(nets[0].state_dict())
    for net, opt in zip(nets, opts, strict=True):
        opt.load_state_dict(copy.deepcopy(saved.state_dict()))
        for _ in range(4):
            step(net, opt)
    assert_close(*nets)


@pytest.mark.parametrize(("cls", "options"), [(AdamW, {}), (SGD, {"momentum": 0.9})])
def test_a_scaler_sees_to_layers_that_torch_updates_plainly(cls, options):
    starts = torch.randn(6, 5)
    nets = [nn.ParameterList([starts.clone()]) for _ in range(2)]
    opts = make(cls, nets[0], "eager", **options), unfused(cls, nets[1], **options)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000) for _ in nets]
    for number in range(5):
        for net, opt, scaler in zip(nets, opts, scalers, strict=True):
            loss = scaler.scale(net[0].sin().sum() * (math.inf if number == 2 else 1.0))
            net[0].grad = torch.autograd.grad(loss, net[0])[0].t().contiguous().t()
            scaler.step(opt)
            scaler.update()
    assert_close(*nets)


def test_gradients_that_lie_elsewhere_are_left_to_torch(backend):
    device = DEVICE if backend == "triton" else "cpu"
    nets = [nn.ParameterList([torch.linspace(-1, 1, 60, device=device).view(6, 10)]) for _ in range(2)]
    opts = make(SGD, nets[0], backend), unfused(SGD, nets[1])
    for net, opt, view in zip(nets, opts, (Elsewhere, lambda grad: grad), strict=True):
        for _ in range(3):
            net[0].grad = view(net[0].detach().cos())
            opt.step()
    assert not opts[0].base._known
    assert_close(*nets)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_convolutions_in_any_memory_format(backend, memory_format):
    device = DEVICE if backend == "triton" else "cpu"
    start = torch.randn(8, 4, 3, 3, device=device).to(memory_format=memory_format)
    nets = [nn.ParameterList([start.clone(memory_format=torch.preserve_format)]) for _ in range(2)]
    opts = make(AdamW, nets[0], backend), unfused(AdamW, nets[1])
    for net, opt in zip(nets, opts, strict=True):
        for _ in range(5):
            net[0].grad = net[0].detach().cos()
            opt.step()
    assert opts[0].base._known
    assert_close(*nets)


def test_once_a_step_was_captured_none_trusts_what_another_measured(net_of, backend, monkeypatch):
    nets = net_of(), net_of()
    opts = make(AdamW, nets[0], backend), unfused(AdamW, nets[1])
    for net, opt in zip(nets, opts, strict=True):
        steps(net, opt, range(3))
    assert opts[0].base._known
    with monkeypatch.context() as capture:
        capture.setattr(fused, "is_capturing", lambda device: True)
        for net, opt in zip(nets, opts, strict=True):
            steps(net, opt, [3])
    with torch.no_grad():
        for net in nets:
            net[0].weight.data.mul_(2)  # as a replay writes: no version tells
    for net, opt in zip(nets, opts, strict=True):
        steps(net, opt, [4, 5])
    assert not opts[0].base._known
    assert_close(*nets)


def test_bf16_weights_shrink_as_float32s_do_where_plain_rounding_stands_still(backend):
    device = DEVICE if backend == "triton" else "cpu"
    start = (torch.randn(60, 60, device=device) * 0.1).bfloat16()
    w = nn.Parameter(start.clone())
    w.grad = torch.zeros_like(w)
    opt = L2Decay(fused.FusedSGD([w], lr=1.0, fused=True), 1e-3, backend=backend)
    for _ in range(100):
        opt.step()
    assert opt.base._known
    exact = start.double() * (1 - 1e-3) ** 100
    assert abs((w.double() * exact).sum() / exact.square().sum() - 1) < 0.01
    assert torch.equal((start * (1 - 1e-3)).bfloat16(), start), "plain arithmetic would have left them untouched"


def test_bf16_steps_stay_within_rounding_of_the_unfused_ones(net_of, backend):
    nets = net_of(torch.bfloat16), net_of(torch.bfloat16)
    opts = make(AdamW, nets[0], backend), unfused(AdamW, nets[1])
    for net, opt in zip(nets, opts, strict=True):
        steps(net, opt, range(3))
    assert opts[0].base._known
    assert_close(*nets, rtol=0.02, atol=5e-3)


@pytest.mark.parametrize(("cls", "options"), [(AdamW, {}), (SGD, {"momentum": 0.9})])
def test_torchs_default_dtype_and_device_do_not_matter(backend, set_default, cls, options):
    device = DEVICE if backend == "triton" else "cpu"
    nets = [nn.ParameterList([torch.linspace(-1, 1, 600, device=device).view(20, 30)]) for _ in range(2)]
    for net, prepare in zip(nets, (lambda: None, set_default), strict=True):
        opt = make(cls, net, backend, **options)
        prepare()
        for _ in range(4):
            net[0].grad = net[0].detach().cos()
            opt.step()
        assert opt.base._known
    assert torch.equal(*(net[0] for net in nets))


def test_an_interrupted_step_leaves_nothing_to_the_next(net_of, backend):
    net, plain = net_of(), net_of()
    opt, reference = make(AdamW, net, backend), unfused(AdamW, plain)
    steps(net, opt, range(3))
    steps(plain, reference, range(3))
    gradients(net, opt, 3)
    step = opt.base.step
    opt.base.step = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    opt.base.step = step
    steps(net, opt, range(3, 6))
    steps(plain, reference, range(3, 6))
    assert_close(net, plain)


@pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))
@pytest.mark.parametrize("what", ["update", "shrink"])
def test_weights_of_a_write_that_was_interrupted_are_measured_again(monkeypatch, what):
    net = small_net()
    opt = make(AdamW, net, "compiled")
    steps(net, opt, range(3))
    layers = [net[0].weight, net[3].weight]
    writes = {
        "update": lambda: steps(net, opt, range(3, 4)),
        "shrink": lambda: compiled.shrink_(layers, torch.full((2,), 0.5), torch.zeros(2), None),
    }
    call = compiled._call

    def interrupted(*arguments):
        call(*arguments)
        raise KeyboardInterrupt  # Python runs the handler of Ctrl-C as soon as the library returns

    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writes[what]()
    assert torch.equal(opt.base.sums(layers, "compiled"), compiled.sums(layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_sums_of_a_fused_step_are_those_of_the_moments_bit_for_bit(backend, cls, dtype):
    """A run that goes on from a checkpoint, or in a CUDA graph, measures what the straight run knows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 1000), (64, 64), (3, 70)]  # programs that are whole, and the rest of some
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    layers = [nn.Parameter(w.to(DEVICE if backend == "triton" else "cpu", dtype)) for w in start]
    opt = cls(layers, lr=1e-2, fused=True, weight_concentration=0.1)
    opt.backend = backend
    for step in range(2):
        for w in layers:
            w.grad = torch.cos(w.detach().float() * step).to(dtype)
        opt.step()
    known = opt.base.sums(layers, backend)
    assert len(opt.base._known) == len(layers)
    opt.base._known.clear()
    assert torch.equal(known, opt.base.sums(layers, backend))


def test_no_two_layers_are_rounded_by_the_same_random_bits(backend):
    device = DEVICE if backend == "triton" else "cpu"
    alike = [nn.Parameter(torch.full((64, 64), 0.7, device=device).bfloat16()) for _ in range(6)]
    for w in alike:
        w.grad = torch.zeros_like(w)
    groups = [{"params": alike[:2]}, {"params": alike[2:4]}, {"params": alike[4:]}]
    opt = L2Decay(fused.FusedSGD(groups, lr=1.0, fused=True), 1e-3, backend=backend)
    opt.step()
    assert len(opt.base._known) == len(alike)
    assert len({tuple(w.detach().view(-1).tolist()) for w in alike}) == len(alike)


def test_auto_is_torchs_own_kernel_on_a_small_network_on_the_cpu(monkeypatch):
    monkeypatch.setattr(compiled, "adamw_", lambda *_, **__: pytest.fail("compiled"))
    net = small_net()
    train(net, AdamW(net.parameters(), weight_concentration=0.1, fused=True), range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}])
@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_low_precision_sgd_on_the_cpu_is_torchs_plain_one_where_torchs_fused_one_is_wrong(dtype, options, strength):
    """Torch 2.13's leaves whole vectors of such weights as they are; sizes below and above one, and no multiple."""
    nets = small_net(dtype), small_net(dtype)
    opts = [
        make(SGD, net, "eager", **options, fused=is_fused, lr=0.1, weight_concentration=strength)
        for net, is_fused in zip(nets, (True, False), strict=True)
    ]
    before = weights(nets[0])
    for net, opt in zip(nets, opts, strict=True):
        steps(net, opt, range(5))
    assert all(torch.equal(a, b) for a, b in zip(weights(nets[0]), weights(nets[1]), strict=True))
    assert all((a != b).float().mean() > 0.5 for a, b in zip(weights(nets[0]), before, strict=True))
    states = [through_file(opt.state_dict())["state"] for opt in opts]
    assert repr(states[0]) == repr(states[1])


@pytest.mark.parametrize("overflow", [False, True])
def test_low_precision_sgd_on_the_cpu_takes_a_gradscalers_work(overflow):
    nets = small_net(torch.bfloat16), small_net(torch.bfloat16)
    for net, is_fused in zip(nets, (True, False), strict=True):
        opt = make(SGD, net, "eager", fused=is_fused, momentum=0.9, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(3):
            gradients(net, opt, step)
            for p in net.parameters():
                p.grad *= scaler.scale(torch.ones(())).item()
            if overflow and step == 1:
                next(net.parameters()).grad[0, 0] = math.inf
            scaler.step(opt)
            scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(weights(nets[0]), weights(nets[1]), strict=True))
