"""Backends give the same numbers, refuse what they cannot do, and take no memory to speak of."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import make_closure, plain_moments, plain_shrink, small_net, train
from torch import nn

from wcr_optim import WCR, Decoupled, HoyerDecay, L1Decay, L2Decay, backends, compiled, penalties, toolchain
from wcr_optim.moments import CHUNK, SMALL, counts, foreach_sums, moments
from wcr_optim.shrink import shrink_

needs_compiler = pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))
BACKENDS = ["eager", pytest.param("compiled", marks=needs_compiler)]
each = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROW, BLOCK = 512, 2**14  # native.cpp's
SIZES = [
    0,
    1,
    2,
    63,
    64,
    65,
    ROW - 1,
    ROW,
    ROW + 1,
    BLOCK - 1,
    BLOCK,
    BLOCK + 1,
    SMALL + 1,
    CHUNK,
    CHUNK + 3,
    3 * CHUNK,
]


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_any_size(backend, dtype):
    layers = [torch.randn(n).to(dtype) for n in SIZES]
    measured = torch.stack(moments(layers, backend=backend), dim=1)
    for row, w in zip(measured.tolist(), layers, strict=True):
        expected = plain_moments(w) if w.numel() else (0.0, 0.0, 0.0)
        torch.testing.assert_close(row, list(expected), rtol=3e-7, atol=0)


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink_of_any_size(backend, dtype):
    layers = [torch.randn(n).to(dtype) for n in SIZES]
    gain = torch.linspace(0.9, 1.3, len(SIZES), dtype=torch.float64)
    threshold = torch.linspace(0.0, 0.3, len(SIZES), dtype=torch.float64)
    expected = [
        plain_shrink(w.to(torch.promote_types(dtype, torch.float32)), g, t).to(dtype)
        for w, g, t in zip(layers, gain.tolist(), threshold.tolist(), strict=True)
    ]
    shrink_(layers, gain, threshold, backend=backend)
    rtol = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(layers, expected, rtol=rtol, atol=1e-7)


def views(base):
    return [
        base,
        base.to(memory_format=torch.channels_last),
        base.transpose(0, 2),
        base[::2, :, 1:],  # gaps in memory
        base.flatten()[1:],  # an odd address
        base[:, :0],
        base[0, 0, 0, 0],
    ]


@each
@pytest.mark.parametrize("scale", [1, 40])
def test_any_strides_and_nothing_beyond_the_tensor(backend, scale):
    shape = (8 * scale, 6, 5 * scale, 4)
    base = torch.randn(shape)
    measured = torch.stack(moments([*views(base), base.expand(2, *shape)], backend=backend), dim=1)
    for row, w in zip(measured.tolist(), [*views(base), base.expand(2, *shape)], strict=True):
        expected = plain_moments(w) if w.numel() else (0.0, 0.0, 0.0)
        torch.testing.assert_close(row, list(expected), rtol=3e-7, atol=0)
    for index in range(len(views(base))):
        ours, plain = base.clone(), base.clone()
        shrink_([views(ours)[index]], torch.tensor([1.1]), torch.tensor([0.3]), backend=backend)
        w = views(plain)[index]
        w.copy_(plain_shrink(w, 1.1, 0.3))
        torch.testing.assert_close(ours, plain)


@each
@settings(max_examples=30, deadline=None)
@given(value=st.floats(2**-14, 2**14, width=32), size=st.sampled_from([2, 1000, SMALL + 1, 3 * CHUNK + 11]))
def test_equal_magnitudes_have_a_variance_of_rounding_noise(backend, value, size):
    w = torch.full((size,), value)
    w[::2] *= -1
    m = moments([w], backend=backend)
    assert abs(m.variance / m.q) < penalties.MIN_RELATIVE_VARIANCE


@each
def test_nearly_equal_magnitudes_keep_the_variance_they_have(backend):
    w = torch.full((3 * CHUNK,), 0.1)
    w[::2] += 1e-3
    exact = w.double().abs().var(correction=0)
    m = moments([w], backend=backend)
    assert m.variance.item() == pytest.approx(exact.item(), rel=1e-2)


@each
def test_special_values(backend):
    w = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, 3e38])
    assert moments([w[1:]], backend=backend).q.isinf()
    assert moments([w], backend=backend).q.isnan()
    assert moments([torch.full((4, 4), 1e30)], backend=backend).q.isinf()
    shrink_([w], torch.tensor([1.0]), torch.tensor([0.1]), backend=backend)
    assert w[0].isnan()
    assert w[1:3].tolist() == [float("inf"), float("-inf")]
    assert w[3:].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("seed", [None, 3])
def test_low_precision_compiled(seed):
    """To nearest it is torch's rounding bit for bit; stochastically it takes neighbours, with the right mean."""
    w = torch.randn(200_000).bfloat16()
    w[:5] = torch.tensor([float("nan"), float("inf"), float("-inf"), 3.38e38, -3.38e38])
    one, gain = torch.zeros(1), torch.tensor([1.05], dtype=torch.float64)
    out = w.clone()
    shrink_([out], gain, one + 0.01, seed=seed, backend="compiled")
    exact = plain_shrink(w.float(), 1.05, 0.01)
    assert out[0].isnan()
    limit = torch.finfo(torch.bfloat16).max
    assert out[1:5].tolist() == [float("inf"), float("-inf"), limit, -limit]
    if seed is None:
        assert torch.equal(out[5:], exact.bfloat16()[5:])
        return
    error = (out.float() - exact)[5:]
    spacing = torch.finfo(torch.bfloat16).eps * exact[5:].abs()
    assert (error.abs() <= spacing + 1e-38).all()
    assert abs((error / spacing.clamp(min=1e-30)).mean()) < 5 / len(error) ** 0.5


@needs_compiler
def test_draws_depend_on_seed_layer_and_place_alone():
    def draws(seed, count=2, size=30_000):
        layers = [torch.ones(size, dtype=torch.bfloat16) for _ in range(count)]
        gain = torch.full((count,), 1 + torch.finfo(torch.bfloat16).eps / 2, dtype=torch.float64)
        shrink_(layers, gain, torch.zeros_like(gain), seed=seed, backend="compiled")
        return torch.stack(layers) > 1

    up = draws(3)
    assert torch.equal(up, draws(3))
    assert torch.equal(up[:, :2000], draws(3, size=2000))
    for other in (draws(4), draws(3 + 2**32), up.flip(0), up.roll(1, 1), up.roll(256, 1), up.roll(ROW, 1)):
        agreement = (up == other).double().mean().item()
        assert abs(agreement - 0.5) < 0.02
    assert abs(up.double().mean().item() - 0.5) < 0.02


@needs_compiler
def test_sums_are_the_same_bits_whatever_the_number_of_threads():
    layers = [torch.randn(n) for n in SIZES]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(compiled.sums(layers))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


WRAPPERS = {
    "inverse_variance": lambda base, backend: WCR(base, 1e-2, backend=backend),
    "scale_free": lambda base, backend: WCR(base, 1e-2, form="scale_free", backend=backend),
    "hoyer": lambda base, backend: HoyerDecay(base, 1e-2, backend=backend),
    "l1": lambda base, backend: L1Decay(base, 1e-3, backend=backend),
    "l2": lambda base, backend: L2Decay(base, 1e-2, backend=backend),
    "own": lambda base, backend: Decoupled(base, penalties.L1(), 1e-3, backend=backend),
}


@needs_compiler
@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper_takes_the_same_steps(name):
    nets = small_net(), small_net()
    for net, backend in zip(nets, ("eager", "compiled"), strict=True):
        train(net, WRAPPERS[name](torch.optim.AdamW(net.parameters(), lr=1e-2), backend), range(20))
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_foreach_sums_are_the_same():
    """The path of devices other than the CPU, on the CPU."""
    layers = [*views(torch.randn(8, 6, 5, 4)), torch.randn(100).bfloat16(), torch.randn(100).double()]
    n = counts(layers)
    sums = foreach_sums(layers)
    torch.testing.assert_close(sums, torch.stack(moments(layers)[1:], dim=1) * n.unsqueeze(1), rtol=1e-6, atol=0)


# --- which one runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")


@pytest.fixture
def watched(monkeypatch):
    """Backends of moments as they are asked for."""
    asked = []
    measure = backends.implementation
    monkeypatch.setattr(backends, "implementation", lambda name: asked.append(name) or measure(name))
    return asked


def test_auto_never_compiles_for_a_small_network(monkeypatch):
    monkeypatch.setattr(toolchain, "load", lambda: pytest.fail("compiled"))
    net = small_net()
    train(net, WCR(torch.optim.SGD(net.parameters(), lr=0.1)), range(2))


@needs_compiler
def test_auto_compiles_for_a_large_one(monkeypatch, watched):
    monkeypatch.setattr(backends, "COMPILE_FROM", 100)
    net = small_net()
    train(net, WCR(torch.optim.SGD(net.parameters(), lr=0.1)), range(2))
    assert set(watched) == {"compiled"}


def test_auto_does_without_a_compiler_and_without_a_word(monkeypatch, watched, no_compiler, recwarn, capfd):
    monkeypatch.setattr(backends, "COMPILE_FROM", 100)
    net = small_net()
    train(net, WCR(torch.optim.SGD(net.parameters(), lr=0.1)), range(2))
    assert watched == []
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_a_backend_asked_for_that_cannot_run_is_refused_with_the_way_out(no_compiler, monkeypatch):
    base = torch.optim.SGD(small_net().parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"'compiled' cannot run on cpu weights here: .*'no-such-compiler'; install one"
    ):
        WCR(base, backend="compiled")
    assert "weight_concentration" not in base.defaults | base.param_groups[0]
    monkeypatch.setattr(backends.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"'triton' cannot run on cpu weights here: .*pip install triton"):
        WCR(base, backend="triton")


def test_compiled_is_for_the_cpu():
    base = torch.optim.SGD([nn.Parameter(torch.empty(3, 3, device="meta"))], lr=0.1)
    with pytest.raises(ValueError, match="'compiled' cannot run on meta weights here: it is for weights on the CPU"):
        WCR(base, backend="compiled")


def test_triton_without_a_gpu_is_refused():
    """In a process of its own, as this one's Triton may run in the interpreter."""
    script = """
import torch
from wcr_optim import WCR
try:
    WCR(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1), backend="triton")
except ValueError as error:
    assert "'triton' cannot run on cpu weights here" in str(error), error
else:
    raise AssertionError("accepted")
"""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@needs_compiler
def test_a_failing_compiler_is_reported_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("WCR_OPTIM_CACHE", str(tmp_path))
    monkeypatch.setattr(toolchain, "FLAGS", (*toolchain.FLAGS, "-no-such-flag"))
    with pytest.raises(ValueError, match=r"failed: .*no-such-flag"):
        WCR(torch.optim.SGD(small_net().parameters(), lr=0.1), backend="compiled")
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_the_library_is_built_once_and_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("WCR_OPTIM_CACHE", str(tmp_path / "new"))
    first = toolchain.load()
    assert isinstance(first, ctypes.CDLL)
    (library,) = (tmp_path / "new").iterdir()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    toolchain._load.cache_clear()
    toolchain.load()
    assert [library] == list((tmp_path / "new").iterdir())


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("WCR_OPTIM_CACHE", str(file / "folder"))
    toolchain.load()


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_of(step):
    """Bytes that a step holds at most beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRAPPERS)
def test_at_most_4_mebibytes_of_extra_memory(backend, dtype, name):
    sizes = [(2500, 2000), *[(30, 50)] * 200]
    weights = [nn.Parameter((torch.randn(size) * 0.02).to(dtype)) for size in sizes]
    for w in weights:
        w.grad = torch.zeros_like(w)
    base = torch.optim.SGD(weights, lr=1e-3, fused=True)
    opt = WRAPPERS[name](base, backend)
    opt.step()
    assert peak_of(opt.step) - peak_of(base.step) <= 4 * 2**20


# --- torch.compile of the whole step ---------------------------------------------------------------------------------


jit_deprecated = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, on the way


@jit_deprecated
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", ["inverse_variance", "scale_free", "l1"])
def test_a_compiled_step_breaks_no_graph_and_compiles_no_more_as_lr_changes(name, tensor_lr):
    """torch breaks the graph at the start of its optimizers' steps itself; ours adds no other place."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    nets = small_net(torch.float64), small_net(torch.float64)
    bases = [
        torch.optim.SGD(net.parameters(), lr=torch.tensor(0.1), foreach=False)
        if tensor_lr
        else torch.optim.AdamW(net.parameters(), lr=0.1)
        for net in nets
    ]
    opts = [WRAPPERS[name](base, "auto") for base in bases]
    compiled_step = torch.compile(lambda: opts[0].step(), backend="aot_eager")
    graphs = []
    counters.clear()
    for step in range(6):
        for net, opt in zip(nets, opts, strict=True):
            make_closure(net, opt, step)()
            if tensor_lr:
                opt.param_groups[0]["lr"].fill_(0.1 / (step + 1))
            else:
                opt.param_groups[0]["lr"] = 0.1 / (step + 1)
        compiled_step()
        opts[1].step()
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(graphs) == 6
    assert graphs[-1] == graphs[2], f"compiled anew: {graphs}"
    assert all("torch._dynamo.graph_break()" in reason for reason in counters["graph_break"]), counters["graph_break"]
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(
            a, b, rtol=0, atol=1e-10 if tensor_lr else 1e-5
        )  # a compiled AdamW counts in float32


@jit_deprecated
def test_a_compiled_step_rounds_low_precision_weights_outside_of_the_graph():
    torch._dynamo.reset()
    nets = small_net(torch.bfloat16), small_net(torch.bfloat16)
    opts = [WCR(torch.optim.SGD(net.parameters(), lr=0.1), 1e-2) for net in nets]
    compiled_step = torch.compile(lambda: opts[0].step(), backend="aot_eager")
    for step in range(4):
        for net, opt in zip(nets, opts, strict=True):
            make_closure(net, opt, step)()
        compiled_step()
        opts[1].step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
