"""Every backend gives the numbers of the eager one, and one that cannot run says so."""

import pytest
import torch
from torch import nn

from wcr_optim import SGD, WCR, AdamW, HoyerDecay, L1Decay, L2Decay, backends, compiled
from wcr_optim.moments import moments
from wcr_optim.shrink import shrink_

needs_compiler = pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))
WRAPPERS = {
    "inverse_variance": lambda base, **o: WCR(base, 1e-2, **o),
    "scale_free": lambda base, **o: WCR(base, 1e-4, form="scale_free", **o),
    "l1": lambda base, **o: L1Decay(base, 1e-3, **o),
    "l2": lambda base, **o: L2Decay(base, 1e-2, **o),
    "hoyer": lambda base, **o: HoyerDecay(base, 1e-4, **o),
}


def layers(dtype=torch.float32):
    """One layer above the size that is compiled, one of no round length, a small one, a bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(512, 300), (431, 409), (7, 5), (40,)]
    return [nn.Parameter((torch.randn(s, generator=generator) / 10).to(dtype)) for s in shapes]


def run(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) / 100
        optimizer.step()


@needs_compiler
@pytest.mark.parametrize("name", WRAPPERS)
def test_compiled_runs_equal_eager_ones(name):
    eager, fast = layers(), layers()
    run(WRAPPERS[name](torch.optim.AdamW(eager, lr=1e-3), backend="eager"), eager, range(5))
    run(WRAPPERS[name](torch.optim.AdamW(fast, lr=1e-3), backend="compiled"), fast, range(5))
    for p, q in zip(eager, fast, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@needs_compiler
def test_compiled_moments_and_shrink_of_any_strides():
    base = torch.randn(64, 48, 9, 9)
    views = [base, base.to(memory_format=torch.channels_last), base.transpose(0, 3), base[::2, 1:-1]]
    torch.testing.assert_close(
        torch.stack(moments(views, backend="compiled")), torch.stack(moments(views)), rtol=3e-7, atol=0
    )
    gain, threshold = torch.linspace(0.9, 1.2, 4).double(), torch.linspace(0.0, 0.3, 4).double()
    slow, fast = [v.clone() for v in views], [v.clone() for v in views]
    shrink_(slow, gain, threshold)
    shrink_(fast, gain, threshold, backend="compiled")
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=0)


def test_auto_makes_no_small_model_wait_for_a_compiler():
    small = [torch.empty(1000, 1000)]
    assert backends.choose("auto", torch.device("cpu"), small) == "eager"
    assert sum(w.numel() for w in small) < backends.COMPILE_FROM


def test_a_backend_that_cannot_run_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(compiled, "why_not", lambda: "there is no C++ compiler; choose backend='eager'")
    with pytest.raises(
        ValueError, match=r"backend 'compiled' cannot run on cpu weights here: .* choose backend='eager'"
    ):
        WCR(torch.optim.SGD(layers(), lr=0.1), backend="compiled")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        WCR(torch.optim.SGD(layers(), lr=0.1), backend="cuda")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_compiled_stochastic_rounding_repeats_and_is_unbiased(dtype):
    finals = []
    for _ in range(2):
        params = layers(dtype)
        optimizer = L2Decay(torch.optim.SGD(params, lr=1.0), 1e-4, backend="compiled")
        for _ in range(300):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        finals.append(params)
    for p, q, start in zip(*finals, layers(dtype), strict=True):
        assert torch.equal(p, q)
        if p.numel() > 1000:
            assert (p.double().norm() / start.double().norm()).item() == pytest.approx((1 - 1e-4) ** 300, abs=2e-3)


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # torch's, about its own parts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_compiled_step_rounds_low_precision_weights_as_an_eager_one(dtype):
    finals = []
    for compile_step in (False, True):
        w = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype))
        start = w.detach().clone()
        w.grad = torch.zeros_like(w)
        optimizer = L2Decay(torch.optim.SGD([w], lr=1.0), 1e-4)
        step = torch.compile(optimizer.step) if compile_step else optimizer.step
        for _ in range(20):
            step()
        finals.append(w.detach())
        assert not torch.equal(w, start)
    assert torch.equal(*finals)


# --- fused -----------------------------------------------------------------------------------------------------------

FUSED = {
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}),
}


def fused(name, params, form, **options):
    ours, _, defaults = FUSED[name]
    optimizer = ours(params, **defaults, **options, weight_concentration=1e-4, form=form)
    optimizer.backend = "compiled"
    return optimizer


@needs_compiler
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("form", ["inverse_variance", "scale_free"])
def test_fused_runs_equal_unfused_ones(name, form):
    plain, fast = layers(), layers()
    run(fused(name, plain, form), plain, range(10))
    optimizer = fused(name, fast, form, fused=True)
    run(optimizer, fast, range(5))
    with torch.no_grad():  # somebody else writes the weights: the sums that the step left behind are stale
        for p, q in zip(plain, fast, strict=True):
            p.mul_(1.0)
            q.mul_(1.0)
    run(optimizer, fast, range(5, 10))
    for p, q in zip(plain, fast, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert isinstance(optimizer.base, FUSED[name][1])


@needs_compiler
@pytest.mark.parametrize("name", FUSED)
def test_fused_notices_weights_that_others_wrote(name):
    plain, fast = layers(), layers()
    pairs = [(fused(name, plain, "scale_free"), plain), (fused(name, fast, "scale_free", fused=True), fast)]
    for optimizer, params in pairs:
        run(optimizer, params, range(3))
        with torch.no_grad():
            for p in params:
                p.mul_(3.0).add_(0.01)
        run(optimizer, params, range(3, 6))
    for p, q in zip(plain, fast, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("name", FUSED)
def test_fused_resumes_and_takes_torchs_own_checkpoints(name):
    straight, resumed = layers(), layers()
    first = fused(name, straight, "scale_free", fused=True)
    run(first, straight, range(4))
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, first.state_dict())
    with torch.no_grad():
        for p, q in zip(straight, resumed, strict=True):
            q.copy_(p)
    second = fused(name, resumed, "scale_free", fused=True)
    second.load_state_dict(saved)
    run(first, straight, range(4, 8))
    run(second, resumed, range(4, 8))
    for p, q in zip(straight, resumed, strict=True):
        assert torch.equal(p, q)
    _, torchs, options = FUSED[name]
    torchs(layers(), **options).load_state_dict(second.state_dict())
