"""Moments of the weights' magnitudes, the only thing that a penalty needs to know of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wcr_optim.layout import flat, local, sum_over_shards

# Sums run in the weights' precision within a chunk and in float64 across chunks: no rounding error grows with the
# layer, and no temporary is larger than a chunk.
CHUNK = 2**19


class Moments(NamedTuple):
    """The first two moments of the magnitudes m = |w|, one entry per layer.

    Attributes:
        n: Number of weights, shape (layers,).
        mu: Mean magnitude, mean(m), shape (layers,), in units of a weight.
        q: Mean squared magnitude, mean(m^2), shape (layers,), in units of a weight squared.
    """

    n: Tensor
    mu: Tensor
    q: Tensor

    @property
    def variance(self) -> Tensor:
        """Variance of the magnitudes, V = q - mu^2, shape (layers,)."""
        return self.q - self.mu.square()


def moments(tensors: Iterable[Tensor], smoothing: float = 0.0) -> Moments:
    """Measure (n, mu, q) of every tensor's magnitudes.

    The moments are sums, so they add over chunks, ranks and shards: those of a DTensor are global, and all layers
    share one all-reduce of two numbers each for every mesh dimension that shards them. Differentiable, so that a
    penalty's value can stand in a loss.

    Args:
        tensors: The layers' weights, of any floating dtype and shape, all on one device.
        smoothing: Measures m = sqrt(w^2 + smoothing) instead of |w|. The preprint's loss uses 1e-8, which makes it
            differentiable at zero; the decoupled step needs none (default: 0.0).

    Returns:
        Moments, in float64 where the device has it. Those of an empty tensor are zero.

    Raises:
        ValueError: If a DTensor holds pending partial sums.

    """
    layers = list(tensors)
    if not layers:
        return Moments(*torch.empty(3, 0, dtype=torch.float64).unbind())
    sums = torch.stack([_sums(flat(local(w)), smoothing) for w in layers])
    sums = sum_over_shards(sums, layers)
    n = counts(layers)
    mu, q = (sums / n.clamp(min=1).unsqueeze(1)).unbind(1)
    return Moments(n, mu, q)


def counts(tensors: Sequence[Tensor]) -> Tensor:
    """Count the weights of every tensor, shape (layers,), over all shards."""
    device = local(tensors[0]).device
    return torch.tensor([w.numel() for w in tensors], dtype=accumulator(device), device=device)


def accumulator(device: torch.device) -> torch.dtype:
    """Precision of a layer's few numbers: V = q - mu^2 cancels, so float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _sums(weights: Tensor, smoothing: float) -> Tensor:
    """Sum m and m^2 over a flat tensor, shape (2,)."""
    compute = torch.promote_types(weights.dtype, torch.float32)
    sums = []
    for chunk in torch.split(weights, CHUNK):
        w = chunk.to(compute)
        m = (w.square() + smoothing).sqrt() if smoothing else w.abs()
        sums += [m.sum(), m.square().sum()]
    return torch.stack(sums).to(accumulator(weights.device)).view(-1, 2).sum(0)
