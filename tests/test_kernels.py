"""Triton's kernels, in the interpreter where there is no GPU, against the slow and obvious."""

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Elsewhere, layouts, plain_moments, plain_shrink
from torch import nn
from triton_interpreter import DEVICE

from wcr_optim import WCR, HoyerDecay, L1Decay
from wcr_optim.moments import moments
from wcr_optim.shrink import shrink_

triton = pytest.importorskip("triton")
from wcr_optim import kernels  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# None is a multiple of a block, of a chunk, or of 16 bytes, but two.
SIZES = [1, 7, 0, kernels.BLOCK - 1, kernels.BLOCK, kernels.BLOCK + 1, kernels.CHUNK, kernels.SHRINK_CHUNK + 3, 40_001]


def layers(dtype, sizes=SIZES):
    return [torch.randn(n, device=DEVICE).to(dtype) for n in sizes]


def scalars(count):
    gain = torch.linspace(0.9, 1.3, count, dtype=torch.float64, device=DEVICE)
    threshold = torch.linspace(0.0, 0.3, count, dtype=torch.float64, device=DEVICE)
    return gain, threshold


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_any_size(dtype):
    ws = layers(dtype)
    measured = torch.stack(moments(ws, backend="triton"), dim=1).cpu()
    for row, w in zip(measured, ws, strict=True):
        expected = plain_moments(w.cpu()) if w.numel() else (0.0, 0.0, 0.0)
        torch.testing.assert_close(row.tolist(), list(expected), rtol=3e-7, atol=0)


def views(base):
    return [
        *layouts(base),
        base.flatten()[1:],  # no address that loads of 16 bytes could use
    ]


def test_moments_of_any_strides_and_several_dtypes_at_once():
    base = torch.randn(8, 6, 5, 4, device=DEVICE)
    ws = [*views(base), *views(base.bfloat16()), base.double(), base.half()]
    measured = torch.stack(moments(ws, backend="triton"))
    torch.testing.assert_close(measured, torch.stack(moments(ws)), rtol=3e-7, atol=0)


def test_equal_magnitudes_have_a_variance_of_rounding_noise():
    for value in (0.1, 1.7, 3e-5):
        m = moments(
            [torch.full((n,), value, device=DEVICE) for n in (2, 1000, 3 * kernels.CHUNK + 11)], backend="triton"
        )
        assert (m.variance / m.q).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_the_same_bits_every_time_and_in_any_company(dtype):
    ws = layers(dtype)
    together = kernels.sums(ws)
    assert torch.equal(together, kernels.sums(ws))
    alone = torch.cat([kernels.sums([w]) for w in reversed(ws)]).flip(0)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink_of_any_size(dtype):
    ws = layers(dtype)
    gain, threshold = scalars(len(ws))
    expected = [
        plain_shrink(w.float(), g, t).to(dtype) for w, g, t in zip(ws, gain.tolist(), threshold.tolist(), strict=True)
    ]
    shrink_(ws, gain, threshold, backend="triton")
    torch.testing.assert_close(ws, expected, rtol=1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps, atol=1e-7)


def test_shrink_of_any_strides_and_nothing_beyond_the_tensor():
    for index in range(len(views(torch.empty(8, 6, 5, 4)))):
        whole = torch.randn(8, 6, 5, 4, device=DEVICE)
        ours, plain = whole.clone(), whole.clone()
        gain, threshold = torch.tensor([1.1], device=DEVICE), torch.tensor([0.3], device=DEVICE)
        shrink_([views(ours)[index]], gain, threshold, backend="triton")
        shrink_([views(plain)[index]], gain, threshold)
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, on the way to what is clamped
def test_nan_and_inf_pass_and_are_never_made(dtype, seed):
    limit = torch.finfo(dtype).max
    w = torch.tensor([math.nan, math.inf, -math.inf, 0.0, limit, -limit], dtype=dtype, device=DEVICE)
    if dtype is torch.float32:
        w = w[:4]
    shrink_([w], torch.tensor([1.1], device=DEVICE), torch.tensor([0.1], device=DEVICE), seed=seed, backend="triton")
    assert w[0].isnan()
    assert w[1:].tolist() == [math.inf, -math.inf, 0.0, limit, -limit][: len(w) - 1]


def test_no_change_is_no_change_bit_for_bit():
    for dtype in DTYPES:
        ws = layers(dtype, [1000])
        before = ws[0].clone()
        one, zero = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
        shrink_(ws, one, zero, seed=1, backend="triton")
        assert torch.equal(ws[0], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=20, deadline=None)
@given(value=st.floats(-6e4, 6e4, width=16), gain=st.floats(0.99, 1.01), seed=st.integers(0, 2**62))
def test_stochastic_rounding_takes_a_neighbour_with_the_right_mean(dtype, value, gain, seed):
    w = torch.full((4 * kernels.BLOCK,), value, device=DEVICE).to(dtype)
    exact = w[0].double().item() * torch.tensor(gain, dtype=torch.float32).double().item()
    one = torch.tensor([gain], dtype=torch.float64, device=DEVICE)
    shrink_([w], one, torch.zeros_like(one), seed=seed, backend="triton")
    spacing = torch.finfo(dtype).eps * max(abs(exact), torch.finfo(dtype).smallest_normal)
    assert ((w.double() - exact).abs() <= 1.0001 * spacing).all()
    assert abs(w.double().mean().item() - exact) <= 5 * spacing / math.sqrt(len(w))


def draws(seed, count=2, size=3000):
    """What stochastic rounding makes of one value, halfway between neighbours, in several layers."""
    ws = [torch.ones(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(count)]
    gain = torch.full((count,), 1 + torch.finfo(torch.bfloat16).eps / 2, dtype=torch.float64, device=DEVICE)
    shrink_(ws, gain, torch.zeros_like(gain), seed=seed, backend="triton")
    return torch.stack(ws) > 1


def test_draws_depend_on_seed_layer_and_place_alone():
    up = draws(3)
    assert torch.equal(up, draws(3))
    assert torch.equal(up, draws(torch.tensor(3, device=DEVICE)))
    assert torch.equal(up[:, :2000], draws(3, size=2000))
    for other in (draws(4), draws(3 + 2**32), up.flip(0), up.roll(1, 1), up.roll(8, 1)):
        agreement = (up == other).double().mean().item()
        assert abs(agreement - 0.5) < 0.05
    assert abs(up.double().mean().item() - 0.5) < 0.05


def test_more_than_two_to_the_31_weights_by_index_arithmetic():
    """A table that places the start of a layer 2^31 weights before a small tensor, and one program beyond them."""
    far, n = 2**31, 100
    assert far % kernels.CHUNK == 0
    w = torch.randn(n, device=DEVICE)
    launch = kernels.launches([[w]])[0]
    launch = launch._replace(
        pointers=torch.tensor([w.data_ptr() - far * w.element_size()], device=DEVICE),
        table=torch.tensor([[far + n], [-(far // kernels.CHUNK)]], device=DEVICE),
    )
    partial = launch.partial()
    kernels._sum_kernel[(1,)](*launch.place, partial, 1, **launch.options)
    torch.testing.assert_close(partial[:, 0].cpu(), torch.stack([w.abs().sum(), w.square().sum()]).cpu())
    expected = plain_shrink(w, 1.5, 0.2)
    gain, threshold = torch.tensor([1.5], device=DEVICE), torch.tensor([0.2], device=DEVICE)
    kernels._shrink_kernel[(1,)](*launch.place, launch.rows, gain, threshold, None, STOCHASTIC=False, **launch.options)
    torch.testing.assert_close(w, expected)


@pytest.mark.parametrize("form", ["scale_free", "per_unit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_whose_elements_lie_elsewhere_are_left_to_torch(form, dtype):
    start = torch.randn(20, 30, device=DEVICE).to(dtype)
    finals = []
    for backend in ("eager", "triton"):
        inner, plain = start.clone(), nn.Parameter(start.clone())
        w = Elsewhere(inner).requires_grad_()
        opt = WCR(torch.optim.SGD([w, plain], lr=0.1, foreach=False), 1e-2, form=form, backend=backend)
        for step in range(3):
            plain.grad = torch.cos(plain.detach() * step)
            w.grad = Elsewhere(torch.cos(inner * step))
            opt.step()
        finals.append([inner, plain.detach()])
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(*finals, **tolerance)


def test_a_checkpoints_counter_is_a_number_as_a_fresh_optimizers_is():
    w = nn.Parameter(torch.randn(30, 40, device=DEVICE).bfloat16())
    w.grad = torch.zeros_like(w)
    opt = WCR(torch.optim.SGD([w], lr=0.1), 1e-1, backend="triton")
    assert opt.state_dict()["param_groups"][0]["rounding_seed"] == 0
    for _ in range(3):
        opt.step()
    counter = opt.state_dict()["param_groups"][0]["rounding_seed"]
    assert type(counter) is int
    assert counter == 3
    opt.step()
    assert opt.param_groups[0]["rounding_seed"].item() == 4


def test_a_seed_follows_to_the_device_of_the_weights():
    assert kernels.on_device(torch.tensor(3), torch.device("meta")).device.type == "meta"
    assert kernels.on_device(3, DEVICE).item() == 3
    assert kernels.on_device(None, DEVICE) is None


def test_versions_tell_of_the_kernels_writes():
    w = torch.randn(10, device=DEVICE)
    before = w._version
    shrink_([w], torch.tensor([1.1], device=DEVICE), torch.tensor([0.1], device=DEVICE), backend="triton")
    assert w._version > before


@pytest.mark.parametrize("wrap", [lambda o, b: WCR(o, 1e-2, backend=b), lambda o, b: HoyerDecay(o, 1e-2, backend=b),
                                  lambda o, b: L1Decay(o, 1e-2, backend=b)])  # fmt: skip
def test_a_wrapper_gives_the_same_numbers_as_with_torchs_own_kernels(wrap):
    start = torch.randn(50, 60, device=DEVICE)
    finals = []
    for backend in ("eager", "triton"):
        w = nn.Parameter(start.clone())
        opt = wrap(torch.optim.SGD([w], lr=0.1, momentum=0.9), backend)
        for step in range(5):
            w.grad = torch.cos(w.detach() * step)
            opt.step()
        finals.append(w.detach())
    torch.testing.assert_close(*finals, rtol=1e-5, atol=1e-7)


def test_the_counter_of_low_precision_runs_lives_on_the_device_and_in_checkpoints():
    def make():
        w = nn.Parameter(
            torch.randn(30, 40, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).bfloat16()
        )
        w.grad = torch.zeros_like(w)
        return w, WCR(torch.optim.SGD([w], lr=0.1), 1e-1, backend="triton")

    w, opt = make()
    for _ in range(3):
        opt.step()
    counter = opt.param_groups[0]["rounding_seed"]
    assert isinstance(counter, torch.Tensor)
    assert counter.device.type == DEVICE.type
    assert counter.item() == 3
    resumed, fresh = make()
    resumed.data.copy_(w)
    fresh.load_state_dict(opt.state_dict())
    for _ in range(3):
        opt.step()
        fresh.step()
    assert torch.equal(w, resumed)
    eager = WCR(torch.optim.SGD([resumed], lr=0.1), backend="eager")
    eager.load_state_dict(opt.state_dict())
    eager.step()
    assert eager.param_groups[0]["rounding_seed"] == 7


def test_kernels_compile_for_gpus_that_are_not_here():
    """Through to machine code, as the interpreter accepts what the compiler would refuse; and with wide loads."""
    script = """
        import re
        import triton, triton.language as tl
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from wcr_optim import kernels as K, unit_kernels as U

        POINTERS = {"pointers": "*i64", "table": "*i64", "layer_of": "*i32", "rows": "*i64", "partial": "*fp32",
                    "gains": "*fp64", "thresholds": "*fp64", "seed": "*i64", "coefficients": "*fp32", "sums": "*fp64",
                    "layers": "i32", "programs": "i32", "lengths": "*i64", "firsts": "*i64"}

        def compile(kernel, capability, num_warps=K.WARPS, **constants):
            names = kernel.arg_names
            signature = {n: "constexpr" if n in constants else POINTERS.get(n, "fp32") for n in names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
            source = ASTSource(kernel, signature, {n: constants[n] for n in names if n in constants}, aligned)
            options = {"num_warps": num_warps, "enable_fp_fusion": False}
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert made.asm["cubin"]
            return made.asm["ptx"]

        sizes = {"CHUNK": K.CHUNK, "BLOCK": K.BLOCK, "ALIGNED": True}
        fused = sizes | {"MAXIMIZE": False}
        of_shrink = sizes | {"BLOCK": K.SHRINK_BLOCK, "CHUNK": K.SHRINK_CHUNK}
        of_sums = {"CHUNK": 16 * U.WIDTH, "ALIGNED": True, "ABOVE": False, "num_warps": 1}
        of_left = of_sums | {"ABOVE": True}
        nearest = {"STOCHASTIC": False, "seed": None}
        made = [
            compile(K._sum_kernel, 90, DTYPE=tl.float32, **sizes),
            compile(K._shrink_kernel, 90, DTYPE=tl.float16, STOCHASTIC=True, **of_shrink),
            compile(K._adamw_kernel, 80, DTYPE=tl.float32, **nearest, **fused),
            compile(K._sgd_kernel, 90, DTYPE=tl.float32, NESTEROV=True, MOMENTUM=True, **nearest, **fused),
            compile(U._unit_shrink_kernel, 90, DTYPE=tl.float32, EACH=4, SPARES=True, **nearest, **of_shrink),
            compile(U._unit_shrink_kernel, 80, DTYPE=tl.float16, STOCHASTIC=True, EACH=1, SPARES=False, **of_shrink),
            compile(U._unit_sum_kernel, 90, DTYPE=tl.float32, ROWS=64, COLUMNS=64, BLOCK=512, **of_left),
            compile(U._unit_sum_kernel, 80, DTYPE=tl.bfloat16, ROWS=4, COLUMNS=U.WIDTH, BLOCK=1024, **of_sums),
        ]
        assert all(re.search(r"ld\\.global\\.v4\\.b32", ptx) for ptx in made)
        ptx = compile(K._adamw_kernel, 90, DTYPE=tl.bfloat16, STOCHASTIC=True, **fused)
        assert re.search(r"ld\\.global\\.v2\\.b32", ptx)  # four weights a thread
        of_sums["ALIGNED"] = False
        compile(U._unit_sum_kernel, 90, DTYPE=tl.float32, ROWS=4096, COLUMNS=1, BLOCK=512, **of_sums)
        compile(K._finish_kernel, 80, CHUNK=K.CHUNK, PARTIALS=K.PARTIALS)
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=True)
