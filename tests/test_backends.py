"""Every backend gives the numbers of the eager one, and one that cannot run says so."""

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from reference import Elsewhere, layouts, make_closure, plain_moments, plain_shrink, small_net, train
from torch import nn

from benchmarks.overhead import peak_of
from wcr_optim import WCR, HoyerDecay, L1Decay, L2Decay, backends, compiled, penalties
from wcr_optim.eager import CHUNK, PIECE, SMALL, foreach_sums
from wcr_optim.moments import counts, moments
from wcr_optim.shrink import shrink_

needs_compiler = pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))
WRAPPERS = {
    "inverse_variance": lambda base, **o: WCR(base, 1e-2, **o),
    "scale_free": lambda base, **o: WCR(base, 1e-4, form="scale_free", **o),
    "per_unit": lambda base, **o: WCR(base, 1e-3, form="per_unit", **o),
    "l1": lambda base, **o: L1Decay(base, 1e-3, **o),
    "l2": lambda base, **o: L2Decay(base, 1e-2, **o),
    "hoyer": lambda base, **o: HoyerDecay(base, 1e-4, **o),
}


def layers(dtype=torch.float32):
    """Layers of round and of odd length, a small one, a bias."""
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


def test_auto_makes_no_small_model_wait_for_a_compiler():
    small = [torch.empty(1000, 1000)]
    assert backends.choose("auto", torch.device("cpu"), small) == "eager"
    assert sum(w.numel() for w in small) < backends.COMPILE_FROM


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


def test_no_two_rows_of_two_steps_are_rounded_by_the_same_random_bits(backend):
    rows = set()
    for seed in range(4):
        alike = [torch.full((3, ROW), 0.7).bfloat16() for _ in range(2)]
        shrink_(alike, torch.full((2,), 0.999), torch.zeros(2), seed=seed, backend=backend)
        rows |= {tuple(row.tolist()) for w in alike for row in w}
    assert len(rows) == 4 * 2 * 3


# --- sizes, strides, dtypes, values ----------------------------------------------------------------------------------

ROW = 1024  # of native.cpp
BLOCK = compiled.BLOCK
SIZES = [
    0,
    1,
    2,
    ROW - 1,
    ROW,
    ROW + 1,
    3 * ROW - 1,
    BLOCK - 1,
    BLOCK,
    BLOCK + 1,
    SMALL + 1,
    PIECE,
    PIECE + 1,
    CHUNK,
    2 * CHUNK + 3,
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["eager", pytest.param("compiled", marks=needs_compiler)])
def backend(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_any_size(backend, dtype):
    layers = [torch.randn(n).to(dtype) for n in SIZES]
    measured = torch.stack(moments(layers, backend=backend), dim=1)
    for row, w in zip(measured.tolist(), layers, strict=True):
        expected = plain_moments(w) if w.numel() else (0.0, 0.0, 0.0)
        torch.testing.assert_close(row, list(expected), rtol=3e-7, atol=0)


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
        *layouts(base),
        base.flatten()[1:],  # an odd address
        base[0, 0, 0, 0],
    ]


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


@pytest.mark.parametrize("size", [2, 1000, SMALL + 1, 3 * CHUNK + 11])
def test_equal_magnitudes_have_a_variance_of_rounding_noise(backend, size):
    for value in torch.rand(10).mul(20).sub(10).exp2().tolist():
        w = torch.full((size,), value)
        w[::2] *= -1
        m = moments([w], backend=backend)
        assert abs(m.variance / m.q) < penalties.MIN_RELATIVE_VARIANCE


def test_nearly_equal_magnitudes_keep_the_variance_they_have(backend):
    w = torch.full((3 * CHUNK,), 0.1)
    w[::2] += 1e-3
    exact = w.double().abs().var(correction=0)
    m = moments([w], backend=backend)
    assert m.variance.item() == pytest.approx(exact.item(), rel=1e-2)


def test_layers_that_lie_elsewhere_than_where_their_address_says(backend):
    inner = torch.randn(30, 40)
    assert moments([Elsewhere(inner)], backend=backend).mu == pytest.approx(plain_moments(inner)[1])


def test_special_values(backend):
    w = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, 3e38])
    assert moments([w[1:]], backend=backend).q.isinf()
    assert moments([w], backend=backend).q.isnan()
    q = moments([torch.full((4, 4), 1e30)], backend=backend).q.item()
    assert q == math.inf or q == pytest.approx(1e60)  # sums in float64 hold it, squares in float32 do not
    shrink_([w], torch.tensor([1.0]), torch.tensor([0.1]), backend=backend)
    assert w[0].isnan()
    assert w[1:3].tolist() == [float("inf"), float("-inf")]
    assert w[3:].isfinite().all()


def test_foreach_sums_are_the_same():
    """The path of devices other than the CPU, on the CPU."""
    layers = [*views(torch.randn(8, 6, 5, 4)), torch.randn(100).bfloat16(), torch.randn(100).double()]
    n = counts(layers)
    sums = foreach_sums(layers)
    torch.testing.assert_close(sums, torch.stack(moments(layers)[1:], dim=1) * n.unsqueeze(1), rtol=1e-6, atol=0)


def test_torchs_default_dtype_and_device_do_not_matter(backend, set_default):
    finals = []
    for prepare in (lambda: None, set_default):
        params = [p for dtype in DTYPES for p in layers(dtype)]
        grads = [p.detach().cos() for p in params]
        optimizer = WCR(torch.optim.SGD(params, lr=0.1), 1e-2, backend=backend)
        prepare()
        for _ in range(3):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            optimizer.step()
        finals.append(params)
    assert all(map(torch.equal, *finals))


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
    monkeypatch.setattr(compiled, "why_not", lambda: pytest.fail("compiled"))
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
    backends._why_no_kernels.cache_clear()
    with pytest.raises(ValueError, match=r"'triton' cannot run on cpu weights here: .*pip install triton"):
        WCR(base, backend="triton")
    monkeypatch.undo()
    backends._why_no_kernels.cache_clear()


def test_a_triton_that_cannot_be_imported_is_no_reason_to_fail(monkeypatch):
    def broken(name):
        raise ImportError("its driver is from elsewhere")

    monkeypatch.setattr(backends.util, "find_spec", lambda _: True)
    monkeypatch.setattr(backends, "import_module", broken)
    backends._why_no_kernels.cache_clear()
    with pytest.raises(ValueError, match=r"imported \(ImportError: its driver is from elsewhere\); choose"):
        WCR(torch.optim.SGD(small_net().parameters(), lr=0.1), backend="triton")
    monkeypatch.undo()
    backends._why_no_kernels.cache_clear()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'native.cpp:1: error: no such thing' >&2; exit 1", "failed: native.cpp:1: error: no such thing"),
        ("exit 1", "failed: it says nothing"),
        ("exit 0", "makes no library that loads"),
        ('while [ "$1" != -o ]; do shift; done; echo junk > "$2"', "makes no library that loads"),
    ],
)
def test_a_compiler_that_fails_is_named_and_auto_does_without(script, reason, tmp_path, monkeypatch, watched):
    compiler = tmp_path / "broken-compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(backends, "COMPILE_FROM", 100)
    with pytest.raises(ValueError, match=f"broken-compiler {reason}.*choose backend='eager'"):
        WCR(torch.optim.SGD(small_net().parameters(), lr=0.1), backend="compiled")
    net = small_net()
    train(net, WCR(torch.optim.SGD(net.parameters(), lr=0.1)), range(2))
    assert watched == []


@needs_compiler
def test_the_compiler_may_come_with_arguments(monkeypatch):
    command = next(filter(shutil.which, compiled.COMPILERS))
    monkeypatch.setenv("CXX", f"{os.environ.get('CXX', command)} -DSOME_MACRO='1'")
    assert compiled.why_not() is None
    assert compiled.sums([torch.ones(3)]).tolist() == [[3.0, 3.0]]


def test_cxx_may_be_a_path_with_blanks_or_no_command_at_all(tmp_path, monkeypatch):
    compiler = tmp_path / "my compilers" / "broken"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    assert compiled.why_not().startswith(f"{compiler} failed")
    monkeypatch.setenv("CXX", "c++ 'no end")
    assert compiled.why_not().startswith('there is no C++ compiler "c++ \'no end"')


@needs_compiler
def test_compiled_sums_and_rounding_do_not_depend_on_the_number_of_threads():
    weights = [torch.randn(n) for n in SIZES]
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            narrow = [w.bfloat16() for w in weights]
            shrink_(narrow, *torch.tensor([[0.999], [1e-4]]).expand(2, len(SIZES)), seed=7, backend="compiled")
            results.append((compiled.sums(weights), narrow))
    finally:
        torch.set_num_threads(threads)
    for sums, narrow in results[1:]:
        assert torch.equal(sums, results[0][0])
        assert all(map(torch.equal, narrow, results[0][1]))


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


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["scale_free", "l1"])
def test_at_most_4_mebibytes_of_extra_memory(backend, dtype, name):
    sizes = [(2500, 2000), *[(30, 50)] * 200]
    weights = [nn.Parameter((torch.randn(size) * 0.02).to(dtype)) for size in sizes]
    for w in weights:
        w.grad = torch.zeros_like(w)
    base = torch.optim.SGD(weights, lr=1e-3, fused=True)
    opt = WRAPPERS[name](base, backend=backend)
    opt.step()
    assert peak_of(opt.step, "cpu") - peak_of(base.step, "cpu") <= 4 * 2**20


# --- torch.compile of the whole step ---------------------------------------------------------------------------------


jit_deprecated = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, on the way


@jit_deprecated
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", ["inverse_variance", "scale_free", "per_unit", "l1"])
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
    opts = [WRAPPERS[name](base, backend="auto") for base in bases]
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
@needs_compiler
@pytest.mark.parametrize("backend", ["auto", "compiled"])
def test_a_compiled_step_of_a_large_model_breaks_no_graph_for_our_kernels(backend, monkeypatch):
    monkeypatch.setattr(backends, "COMPILE_FROM", 100)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    nets = small_net(torch.float64), small_net(torch.float64)
    opts = [WCR(torch.optim.SGD(net.parameters(), lr=0.1), 1e-2, backend=backend) for net in nets]
    compiled_step = torch.compile(lambda: opts[0].step(), backend="aot_eager")
    for step in range(3):
        for net, opt in zip(nets, opts, strict=True):
            make_closure(net, opt, step)()
        compiled_step()
        opts[1].step()
    assert all("torch._dynamo.graph_break()" in reason for reason in counters["graph_break"]), counters["graph_break"]
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


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
