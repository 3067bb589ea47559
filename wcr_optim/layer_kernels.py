# ruff: noqa: N803, N806  (Triton writes constants of a kernel in capitals)
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
"""Triton kernels for the few numbers that a layer has: a penalty's flow, an optimizer's coefficients, in one launch.

As torch's operations they are thirty launches on a hundred numbers each, which takes a GPU as long as it takes to read
a hundred million weights. The formulas are those of `penalties` and `layer_numbers`; the tests hold them against each
other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wcr_optim.moments import Moments
from wcr_optim.penalties import (
    MAX_SIGMA,
    MIN_RELATIVE_VARIANCE,
    HoyerSquare,
    InverseVariance,
    Penalty,
    PerUnit,
    Relative,
    ScaleFree,
)
from wcr_optim.uploads import on, pointers_to

BLOCK = 128  # layers, or units, of a program
INVERSE_VARIANCE, SCALE_FREE, RELATIVE, HOYER = map(tl.constexpr, range(4))
KINDS = {InverseVariance: INVERSE_VARIANCE, ScaleFree: SCALE_FREE, PerUnit: SCALE_FREE, Relative: RELATIVE,
         HoyerSquare: HOYER}  # fmt: skip
# Triton takes a number beside a tensor for a float32 one, whatever the tensor: the kernels make them float64 first.
SMALLEST = tl.constexpr(MIN_RELATIVE_VARIANCE)
LONGEST = tl.constexpr(MAX_SIGMA)
LOWEST = tl.constexpr(-1 + 2.0**-53)  # what log1p takes
NOTHING_LEFT = tl.constexpr(-800.0)  # ln of what is 0 in float64
HUGE = tl.constexpr(1e300)


@triton.jit
def _wide(number: tl.constexpr):
    return tl.full((), number, tl.float64)


@triton.jit
def _log1p(x):
    """Compute ln(1 + x), exact for small x too: the rounding error of u = 1 + x cancels (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def _expm1(x):
    """Compute e^x - 1, exact for small x too: the rounding error of u = e^x cancels (Kahan)."""
    u = tl.exp(x)
    safe = tl.where((u == 1.0) | (u - 1.0 == -1.0), 2.0, u)
    return tl.where(u == 1.0, x, tl.where(u - 1.0 == -1.0, -1.0, (safe - 1.0) * x / tl.log(safe)))


@triton.jit
def _energy_preserving(mu, q, v, s, MOST: tl.constexpr, KIND: tl.constexpr):
    x = mu * mu
    r = x / q
    sigma = tl.minimum(4.0 * s if KIND == RELATIVE else 4.0 * s / q, _wide(LONGEST))
    if KIND == HOYER:
        delta = -sigma - _log1p(r * _expm1(-sigma))
    else:
        slack = 1.0 - r
        delta = -2.0 * sigma / (slack + tl.sqrt(slack * slack + 2.0 * r * sigma))
        for _ in tl.static_range(4):
            fallen = r * _expm1(delta)
            delta = delta - (delta - fallen + sigma) / (slack - fallen)
    bound = -_wide(MOST) * v / x
    delta = tl.maximum(delta, tl.where(bound <= -1.0, NOTHING_LEFT, _log1p(tl.maximum(bound, _wide(LOWEST)))))
    log_gain = _log1p(-x / v * _expm1(delta)) / 2
    return tl.exp(log_gain), -mu * _expm1(delta / 2 - log_gain)


@triton.jit(do_not_specialize=["layers"])
def _flow_kernel(
    n, mu, q, mu_stride, q_stride, s, gain, threshold, layers,
    EPS: tl.constexpr, MOST: tl.constexpr, MOST_LOG: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < layers
    mean = tl.load(mu + at * mu_stride, mask=here, other=0.0)
    square = tl.load(q + at * q_stride, mask=here, other=0.0)
    length = tl.load(s + at, mask=here, other=0.0)
    finite = square < float("inf")
    mean, square = tl.where(finite, mean, 0.0), tl.where(finite, square, 0.0)
    variance = square - mean * mean
    spread = variance > _wide(SMALLEST) * square
    # Any numbers that give no NaN, where the result does not count
    mean, square, variance = tl.where(spread, mean, 1.0), tl.where(spread, square, 2.0), tl.where(spread, variance, 1.0)
    if KIND == INVERSE_VARIANCE:
        number = tl.load(n + at, mask=here, other=1.0)
        smoothed = variance + _wide(EPS)
        growth = 8.0 * length / (number * smoothed * smoothed)
        log_gain = tl.minimum(_log1p(tl.minimum(growth, _wide(HUGE))) / 4, _wide(MOST_LOG))
        g, t = tl.exp(log_gain), -mean * _expm1(-log_gain)
    else:
        g, t = _energy_preserving(mean, square, variance, length, MOST, KIND)
    known = length == length  # a NaN is an error elsewhere, which must not pass for a long step
    tl.store(gain + at, tl.where(spread, tl.where(known, g, length), 1.0), mask=here)
    tl.store(threshold + at, tl.where(spread, tl.where(known, t, length), 0.0), mask=here)


@triton.jit(do_not_specialize=["layers"])
def _coefficients_kernel(
    gain, threshold, steps, lr, weight_decay, log_beta1, log_beta2, out, layers,
    ADAM: tl.constexpr, LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < layers
    COLUMNS: tl.constexpr = 5 if ADAM else 3
    row = out + at * COLUMNS
    tl.store(row, tl.load(gain + at, mask=here, other=1.0).to(tl.float32), mask=here)
    tl.store(row + 1, tl.load(threshold + at, mask=here, other=0.0).to(tl.float32), mask=here)
    rate = tl.zeros((BLOCK,), tl.float64) + (tl.load(lr).to(tl.float64) if LIVE else lr)
    if ADAM:
        count = tl.load(tl.load(steps + at, mask=here, other=0).to(tl.pointer_type(tl.float32)), mask=here, other=1.0)
        t = count.to(tl.float64)
        tl.store(row + 2, (1.0 - rate * weight_decay).to(tl.float32), mask=here)
        tl.store(row + 3, (rate / -_expm1(t * log_beta1)).to(tl.float32), mask=here)
        tl.store(row + 4, (1.0 / tl.sqrt(-_expm1(t * log_beta2))).to(tl.float32), mask=here)
    else:
        tl.store(row + 2, rate.to(tl.float32), mask=here)


def flow(penalty: Penalty, moments: Moments, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return a penalty's (gain, threshold), as its own `flow` does, for moments and step lengths in float64."""
    kind = KINDS.get(type(penalty))  # what inherits from one of them may mean something else
    if kind is None or any(x.dtype != torch.float64 for x in (*moments, s)):
        return penalty.flow(moments, s)
    n, mu, q = moments
    most: float = penalty.max_growth  # type: ignore[attr-defined]
    gain, threshold = torch.empty_like(s), torch.empty_like(s)
    if len(s):
        with on(s.device):
            _flow_kernel[(-(-len(s) // BLOCK),)](
                n.contiguous(), mu, q, mu.stride(0), q.stride(0), s.contiguous(), gain, threshold, len(s),
                EPS=getattr(penalty, "eps", 0.0), MOST=most * (2 + most), MOST_LOG=math.log1p(most), KIND=kind,
                BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return gain, threshold


def adamw_coefficients(
    gain: Tensor, threshold: Tensor, steps: Sequence[Tensor], lr: float | Tensor, weight_decay: float,
    betas: tuple[float, float],
) -> Tensor:  # fmt: skip
    """Return (gain, threshold, 1 - lr weight_decay, lr / (1 - beta1^t), (1 - beta2^t)^(-1/2)), shape (layers, 5)."""
    counts = [t.to(gain.device, torch.float32) for t in steps]  # which they are, but for odd checkpoints
    addresses = pointers_to(tuple([t.data_ptr() for t in counts]), gain.device)
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in betas]
    return _coefficients(gain, threshold, addresses, lr, weight_decay, *logs)


def sgd_coefficients(gain: Tensor, threshold: Tensor, lr: float | Tensor) -> Tensor:
    """Return (gain, threshold, lr), shape (layers, 3)."""
    return _coefficients(gain, threshold, None, lr, 0.0, 0.0, 0.0)


def _coefficients(gain: Tensor, threshold: Tensor, steps: Tensor | None, lr: float | Tensor, *numbers: float) -> Tensor:
    layers, device = len(gain), gain.device
    out = torch.empty(layers, 3 if steps is None else 5, dtype=torch.float32, device=device)
    live = isinstance(lr, Tensor) and lr.device == device
    rate: Any = lr if live else float(lr)
    with on(device):
        _coefficients_kernel[(-(-layers // BLOCK),)](
            gain.contiguous(), threshold.contiguous(), steps, rate, *map(float, numbers), out, layers,
            ADAM=steps is not None, LIVE=live, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out
