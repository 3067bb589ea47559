"""Slow, obvious twins of what the package does fast, and small things that many tests need."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from wcr_optim import penalties


def plain_moments(w: Tensor) -> tuple[float, float, float]:
    """(n, mu, q) of one layer, in float64, in one line each."""
    m = w.detach().double().abs()
    return float(m.numel()), m.mean().item(), m.square().mean().item()


def plain_shrink(w: Tensor, gain: float, threshold: float) -> Tensor:
    """gain * sign(w) * max(|w| - threshold, 0), as it is written."""
    return gain * w.sign() * (w.abs() - threshold).clamp(min=0)


def penalty_of_weights(penalty: penalties.Penalty, w: Tensor) -> Tensor:
    """Each penalty as a function of the weights, from DESIGN's table; differentiable."""
    m, n = w.abs(), w.numel()
    mu, q = m.mean(), m.square().mean()
    variance = (m - mu).square().mean()
    formulas = {
        penalties.InverseVariance: lambda: 1 / (variance + getattr(penalty, "eps", 0.0)),
        penalties.ScaleFree: lambda: n * q / variance,
        penalties.HoyerSquare: lambda: m.sum() ** 2 / w.square().sum(),
        penalties.L1: lambda: m.sum(),
        penalties.L2: lambda: w.square().sum() / 2,
    }
    return formulas[type(penalty)]()


def layouts(base: torch.Tensor) -> list[torch.Tensor]:
    """Views of a tensor of four dimensions: in other orders of memory, with gaps in it, and with nothing in it."""
    return [
        base,
        base.to(memory_format=torch.channels_last),
        base.transpose(0, 2),
        base[::2, :, 1:],  # gaps in memory
        base[..., ::2],  # of one size, between all elements
        base[..., :1],
        base[:, :0],
    ]


def small_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network whose weights are the same at every call."""
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 3)).to(dtype)
    for p in net.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3)
    return net


def small_batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The batch of a step, the same at every call."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def make_closure(net: nn.Module, optimizer: torch.optim.Optimizer, step: int):
    x, y = small_batch(step, next(net.parameters()).dtype)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        return loss

    return closure


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps, scheduler=None, closure: bool = False) -> None:
    """Plain training loop over the numbered batches."""
    for step in steps:
        evaluate = make_closure(net, optimizer, step)
        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Bit for bit."""
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), f"{name} differs by up to {(p - q).abs().max()}"


def through_file(state: object) -> object:
    """What torch.save and a safe torch.load make of an object."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Elsewhere(torch.Tensor):
    """A tensor whose elements are those of another one, as quantized weights' are."""

    @staticmethod
    def __new__(cls, inner):
        like = {"dtype": inner.dtype, "strides": inner.stride(), "device": inner.device}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **like)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        plain = tree_map(lambda x: x.inner if isinstance(x, cls) else x, (arguments, options or {}))
        return function(*plain[0], **plain[1])
