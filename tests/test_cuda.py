"""On a GPU: the same numbers as on the CPU, nothing that waits for the device, and steps that a CUDA graph can hold."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from triton_interpreter import nothing_waits

from wcr_optim import (
    SAM,
    SGD,
    SSAM,
    WCR,
    AdamW,
    HoyerDecay,
    L1Decay,
    L2Decay,
    SparsityTarget,
    backends,
    param_groups,
    pruning,
)  # fmt: skip
from wcr_optim.tail import tails

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BACKENDS = ("eager", "triton")
SHAPES = [(300, 200), (64, 3, 3, 3), (10, 64), (1000,), (17, 5, 2), (1, 1)]


def parameters(device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def fill_gradients(ps, step):
    """Give parameters gradients that are a function of them, with nothing that rounds much."""
    for index, p in enumerate(ps):
        gradient = (p.detach().float() * (0.5 + index) + step).to(p.dtype) * 0.1
        if p.grad is None:
            p.grad = gradient
        else:
            p.grad.copy_(gradient)


def run(opt, ps, steps, first=0):
    for step in range(first, first + steps):

        def closure(step=step):
            opt.zero_grad()
            fill_gradients(ps, step)
            return ps[0].detach().square().mean()

        opt.step(closure)


def sgd(ps):
    return torch.optim.SGD(ps, lr=0.05, momentum=0.9)


def adamw(ps):
    return torch.optim.AdamW(ps, lr=0.01)


def adamw_fused(ps):
    return torch.optim.AdamW(ps, lr=0.01, fused=True)


PENALTIES = {
    "wcr": lambda base, **o: WCR(base, 1e-2, **o),
    "scale_free": lambda base, **o: WCR(base, 1e-3, form="scale_free", **o),
    "relative": lambda base, **o: WCR(base, 1e-1, form="relative", **o),
    "per_unit": lambda base, **o: WCR(base, 1e-4, form="per_unit", **o),
    "hoyer": lambda base, **o: HoyerDecay(base, 1e-2, **o),
    "l1": lambda base, **o: L1Decay(base, 1e-1, **o),
    "l2": lambda base, **o: L2Decay(base, 1e-1, **o),
}
penalty = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)


@penalty
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", [sgd, adamw_fused, lambda ps: SAM(adamw(ps)), lambda ps: SSAM(sgd(ps))])
def test_steps_are_those_on_the_cpu(penalty, backend, base):
    finals = []
    for device, own in (("cpu", "eager"), ("cuda", backend)):
        ps = parameters(device)
        run(penalty(base(ps), backend=own), ps, 8)
        finals.append([p.detach().cpu() for p in ps])
    torch.testing.assert_close(*finals, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [
    lambda ps, form, backend: WCR(adamw_fused(ps), 1e-2, form=form, backend=backend),
    lambda ps, form, backend: WCR(SAM(sgd(ps)), 1e-2, form=form, backend=backend),
    lambda ps, form, backend: WCR(SSAM(adamw_fused(ps)), 1e-2, form=form, backend=backend),
])  # fmt: skip
@pytest.mark.parametrize("form", ["inverse_variance", "scale_free", "per_unit"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_waits_for_the_device(make, form, backend, dtype):
    if dtype == torch.bfloat16 and backend == "eager":
        pytest.skip("the seed of eager stochastic rounding is a number of the host")
    ps = parameters("cuda", dtype)
    opt = make(ps, form, backend)
    run(opt, ps, 3)
    with nothing_waits("warn") as caught:
        run(opt, ps, 3)
    # SAM and SSAM read one norm a step, to know of a gradient that is not finite before any weight moves.
    allowed = 0 if isinstance(opt.base, torch.optim.AdamW) else 3
    assert sum("called a synchronizing" in str(w.message) for w in caught) <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
def test_units_of_one_threshold_wait_for_nothing_and_move_as_on_the_cpu(backend):
    finals = []
    for device, own in (("cpu", "eager"), ("cuda", backend)):
        ps = parameters(device)
        opt = WCR(adamw_fused(ps), 1e-4, form="per_unit", backend=own)
        opt.scale_invariant, opt.cutoff = [(0, place) for place in range(0, len(ps), 2)], 0.05
        run(opt, ps, 3)
        with nothing_waits() if device == "cuda" else nullcontext():
            run(opt, ps, 5)
        finals.append([p.detach().cpu() for p in ps])
    torch.testing.assert_close(*finals, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [AdamW, SGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_fused_step_waits_for_the_device(cls, dtype):
    ps = parameters("cuda", dtype)
    opt = cls(ps, lr=0.01, weight_concentration=1e-2, fused=True)
    opt.backend = "triton"
    run(opt, ps, 3)
    with nothing_waits():
        run(opt, ps, 3)


def test_sparsity_target_waits_once_a_measurement():
    ps = parameters("cuda")
    opt = WCR(adamw_fused(ps), form="per_unit")
    target = SparsityTarget(opt, 0.9, total_steps=100, every=5)
    waits = []
    for step in range(40):
        run(opt, ps, 1, step)
        loss = ps[0].detach().square().mean()
        with nothing_waits("warn") as caught:
            target.step(loss)
        waits.append(sum("called a synchronizing" in str(w.message) for w in caught))
    assert max(waits[5:]) <= 1
    assert sum(waits[5:]) <= 35 / 5 + 1


@pytest.mark.filterwarnings("ignore:pruning at sparsity")
def test_sparsity_target_drives_as_on_the_cpu():
    strengths = []
    for device in ("cpu", "cuda"):
        ps = parameters(device)
        opt = WCR(adamw_fused(ps), form="per_unit")
        target = SparsityTarget(opt, 0.5, total_steps=60, every=5, tail_energy=0.05)
        for step in range(60):
            run(opt, ps, 1, step)
            target.step(1.0 / (step + 1))
        strengths.append((target.strengths()[0], target.last_tail))
    assert strengths[1] == pytest.approx(strengths[0], rel=0.02)


def test_auto_takes_tritons_kernels_for_all_but_small_networks():
    for side, taken in ((100, "eager"), (1100, "triton")):
        w = torch.empty(side, side, device="cuda")
        assert backends.choose("auto", w.device, [w]) == taken


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


def lr_of(value):
    return torch.tensor(value, device="cuda")


def triton(opt):
    opt.backend = "triton"
    return opt


def graphed(make, dtype):
    """Return weights after three plain steps and four replays, with another lr at each, and after plain steps alone."""
    finals = []
    for in_graph in (True, False):
        ps, lr = parameters("cuda", dtype), lr_of(0.01)
        opt = make(ps, lr)
        fill_gradients(ps, 1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                opt.step()
        torch.cuda.current_stream().wait_stream(stream)
        step = opt.step
        if in_graph:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                opt.step()
            step = graph.replay
        for rate in (0.01, 0.02, 0.001, 0.05):
            lr.fill_(rate)
            step()
        torch.cuda.synchronize()
        finals.append([p.detach().clone() for p in ps])
    return finals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [
    lambda ps, lr: WCR(torch.optim.AdamW(ps, lr=lr, fused=True, capturable=True), 1e-2, backend="triton"),
    lambda ps, lr: WCR(torch.optim.AdamW(ps, lr=lr, fused=True, capturable=True), 1e-3, "per_unit", backend="triton"),
    lambda ps, lr: L1Decay(torch.optim.AdamW(ps, lr=lr, fused=True, capturable=True), 1e-2, backend="triton"),
    lambda ps, lr: WCR(torch.optim.SGD(ps, lr=lr, momentum=0.9, fused=True), 1e-2, "scale_free", backend="triton"),
    lambda ps, lr: triton(AdamW(ps, lr=lr, weight_concentration=1e-2, fused=True, capturable=True)),
    lambda ps, lr: triton(SGD(ps, lr=lr, momentum=0.9, weight_concentration=1e-2, fused=True)),
], ids=["AdamW", "per unit", "l1", "SGD", "fused AdamW", "fused SGD"])  # fmt: skip
def test_replays_are_the_plain_steps_bit_for_bit(make, dtype):
    replayed, plain = graphed(make, dtype)
    for a, b in zip(replayed, plain, strict=True):
        assert torch.equal(a, b)


# --- the rest of a run -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions, a normalization and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 36, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("make", [
    lambda groups: WCR(torch.optim.AdamW(groups, lr=1e-3, fused=True), form="per_unit"),
    lambda groups: AdamW(groups, lr=1e-3, fused=True, form="scale_free"),
    lambda groups: WCR(SAM(torch.optim.SGD(groups, lr=0.05, momentum=0.9)), form="per_unit"),
])  # fmt: skip
def test_a_network_trains_under_a_target_is_pruned_and_goes_on_from_a_checkpoint(make, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8, device="cuda")
    y = torch.arange(64, device="cuda") % 10
    net = Net().cuda()
    opt = make(param_groups(net))
    target = SparsityTarget(opt, 0.8, total_steps=120, every=4)

    def train(net, opt, target, steps):
        for _ in range(steps):

            def closure():
                opt.zero_grad()
                loss = nn.functional.cross_entropy(net(x), y)
                loss.backward()
                return loss

            target.step(opt.step(closure))

    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        train(net, opt, target, 100)
    torch.save([net.state_dict(), opt.state_dict(), target.state_dict()], tmp_path / "at100.pt")
    resumed = Net().cuda()
    opt2 = make(param_groups(resumed))
    target2 = SparsityTarget(opt2, 0.8, total_steps=120, every=4)
    saved = torch.load(tmp_path / "at100.pt", weights_only=True)
    for thing, state in zip((resumed, opt2, target2), saved, strict=True):
        thing.load_state_dict(state)
    assert target2.strengths() == target.strengths()
    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        train(net, opt, target, 20)
        train(resumed, opt2, target2, 20)
    torch.testing.assert_close(list(resumed.parameters()), list(net.parameters()), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        before = (net(x).argmax(1) == y).float().mean().item()
        on_cpu = pruning.magnitude_masks(copy.deepcopy(net).cpu(), 0.8)
        masks = pruning.magnitude_masks(net, 0.8)
        for name in masks:
            assert torch.equal(masks[name].cpu(), on_cpu[name])
        with pruning.applied(net, masks):
            after = (net(x).argmax(1) == y).float().mean().item()
    assert before == 1.0
    assert after > 0.9


def test_tails_are_those_on_the_cpu():
    ps = parameters("cpu")
    there = [p.detach().cuda() for p in ps]
    for sparsity in (0.5, 0.9, 0.99):
        ours, plain = (tails([sets[:3], sets[3:]], sparsity).cpu() for sets in (there, ps))
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=0)


def test_a_grad_scaler_unscales_and_skips():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)).cuda()
    for opt in (WCR(adamw_fused(net.parameters()), 1e-3), AdamW(net.parameters(), lr=1e-2, fused=True)):
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)  # overflows at first
        x = torch.randn(128, 32, device="cuda")
        losses = []
        for _ in range(60):
            opt.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = (net(x) - x[:, :4]).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_thousand_small_steps_shrink_bfloat16_as_float32(backend):
    ps = [nn.Parameter(torch.randn(400, 300, device="cuda").to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    ps[0].data.copy_(ps[1])
    for p in ps:
        p.grad = torch.zeros_like(p)
        opt = L2Decay(torch.optim.SGD([p], lr=0.1), 1e-3, backend=backend)
        for _ in range(1000):
            opt.step()
    assert ps[1].float().norm().item() == pytest.approx(ps[0].norm().item(), rel=0.01)
