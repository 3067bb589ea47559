"""A layer's few numbers in one launch, against the formulas that they repeat."""

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from triton_interpreter import DEVICE

from wcr_optim import layer_numbers
from wcr_optim.moments import Moments
from wcr_optim.penalties import L1, HoyerSquare, InverseVariance, PerUnit, Relative, ScaleFree

pytest.importorskip("triton")
from wcr_optim import layer_kernels

PENALTIES = [
    InverseVariance(), InverseVariance(eps=0.0, max_growth=0.02), ScaleFree(), ScaleFree(max_growth=3.0), PerUnit(),
    Relative(), HoyerSquare(), HoyerSquare(max_growth=1e-3), L1(),
]  # fmt: skip


def many_moments():
    """Layers of all scales and concentrations, and step lengths from none to far too long."""
    generator = torch.Generator().manual_seed(0)
    n, share, scale, s = torch.rand(4, 1000, dtype=torch.float64, generator=generator)
    n = (10 ** (7 * n)).round()
    q = 10 ** (24 * scale - 16)
    mu = (q * (1 - 10 ** (-5.5 * share))).sqrt()
    s = 10 ** (40 * s - 30)
    s[::7] = 0.0
    return Moments(*(torch.stack([n, mu, q], dim=1).to(DEVICE).unbind(1))), s.to(DEVICE)


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_a_flow_is_that_of_the_penalty(penalty):
    moments, s = many_moments()
    ours, plain = layer_kernels.flow(penalty, moments, s), penalty.flow(moments, s)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-11, atol=0)
    # Of a threshold that is far below the mean magnitude, mu - mu'/gain keeps what the difference leaves.
    torch.testing.assert_close(ours[1] / moments.mu, plain[1] / moments.mu, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("penalty", PENALTIES[:-1], ids=repr)
def test_layers_with_nothing_to_concentrate_are_left_alone(penalty):
    mu = torch.tensor([0.0, 1.0, math.nan, math.inf, 1.0, 0.5], dtype=torch.float64, device=DEVICE)
    q = torch.tensor([0.0, 1.0, math.nan, math.inf, math.inf, math.nan], dtype=torch.float64, device=DEVICE)
    gain, threshold = layer_kernels.flow(penalty, Moments(torch.full_like(mu, 5), mu, q), torch.ones_like(mu))
    assert gain.tolist() == [1.0] * 6
    assert threshold.tolist() == [0.0] * 6


@pytest.mark.parametrize("penalty", PENALTIES[:-1], ids=repr)
def test_a_step_length_that_is_no_number_does_not_pass_for_a_long_one(penalty):
    mu, q = torch.tensor([[1.0, 1.0], [2.0, 1.0]], dtype=torch.float64, device=DEVICE).unbind()
    lengths = torch.tensor([math.nan, math.nan], dtype=torch.float64, device=DEVICE)
    gain, threshold = layer_kernels.flow(penalty, Moments(torch.full_like(mu, 5), mu, q), lengths)
    assert gain.isnan().tolist() == threshold.isnan().tolist() == [True, False]


def test_no_layers_are_no_launch():
    none = torch.empty(0, dtype=torch.float64, device=DEVICE)
    gain, threshold = layer_kernels.flow(ScaleFree(), Moments(none, none, none), none)
    assert gain.shape == threshold.shape == (0,)


class Mine(ScaleFree):
    """Someone's own penalty, made out of one of ours."""

    def sigma(self, moments, s):
        """Take longer steps."""
        return 10 * super().sigma(moments, s)


def test_a_penalty_that_inherits_from_a_known_one_has_its_own_flow():
    moments, s = many_moments()
    for ours, plain in zip(layer_kernels.flow(Mine(), moments, s), Mine().flow(moments, s), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("lr", [1e-3, 1, torch.tensor(0.3)])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.99, 0.999999)])
def test_coefficients_are_those_of_torch_operations(lr, betas):
    layers = 300
    gain, threshold = torch.rand(2, layers, dtype=torch.float64, device=DEVICE)
    lr = lr.to(DEVICE) if isinstance(lr, torch.Tensor) else lr
    steps = list((10 ** torch.linspace(0, 6, layers, device=DEVICE)).round().unbind())
    ours = layer_kernels.adamw_coefficients(gain, threshold, steps, lr, 0.1, betas)
    plain = layer_numbers.adamw_coefficients(gain, threshold, steps, lr, 0.1, betas)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    ours, plain = (module.sgd_coefficients(gain, threshold, lr) for module in (layer_kernels, layer_numbers))
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)


def test_the_kernels_compile_for_gpus_that_are_not_here():
    script = """
        import math
        import triton, triton.language as tl
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from wcr_optim import layer_kernels as K

        TYPES = {"steps": "*i64", "layers": "i32", "mu_stride": "i32", "q_stride": "i32", "lr": "fp32",
                 "weight_decay": "fp32", "log_beta1": "fp32", "log_beta2": "fp32", "out": "*fp32"}

        def compile(kernel, types=TYPES, **constants):
            names = kernel.arg_names
            signature = {n: "constexpr" if n in constants else types.get(n, "*fp64") for n in names}
            source = ASTSource(kernel, signature, {n: constants[n] for n in names if n in constants})
            assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"]

        for kind in range(4):
            compile(K._flow_kernel, EPS=1e-8, MOST=0.21, MOST_LOG=0.1, KIND=kind, BLOCK=K.BLOCK)
        compile(K._coefficients_kernel, ADAM=True, LIVE=False, BLOCK=K.BLOCK)
        compile(K._coefficients_kernel, TYPES | {"lr": "*fp32"}, ADAM=True, LIVE=True, BLOCK=K.BLOCK)
        compile(K._coefficients_kernel, steps=None, ADAM=False, LIVE=False, BLOCK=K.BLOCK)
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=True)
