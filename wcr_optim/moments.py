"""Moments of the weights' magnitudes, the only thing that a penalty needs to know of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wcr_optim import backends, eager
from wcr_optim.layout import flat, local, sum_over_shards
from wcr_optim.precision import accumulator, compute_dtype
from wcr_optim.uploads import upload


class Moments(NamedTuple):
    """The first two moments of the magnitudes m = |w|, one entry per layer.

    Attributes:
        n: Number of weights, shape (layers,); not to be written, since equal requests share it.
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


def moments(tensors: Iterable[Tensor], smoothing: float = 0.0, *, backend: str = "eager") -> Moments:
    """Measure (n, mu, q) of every tensor's magnitudes.

    The moments are sums, so they add over chunks, ranks and shards: those of a DTensor are global, and all layers
    share one all-reduce of two numbers each for every mesh dimension that shards them. Differentiable where grad is
    enabled and a tensor requires it, so that a penalty's value can stand in a loss.

    Args:
        tensors: The layers' weights, of any floating dtype and shape, all on one device.
        smoothing: Measures m = sqrt(w^2 + smoothing) instead of |w|. The preprint's loss uses 1e-8, which makes it
            differentiable at zero; the decoupled step needs none (default: 0.0).
        backend: "eager", "compiled" or "triton", see `backends` (default: "eager").

    Returns:
        Moments, in float64 where the device has it. Those of an empty tensor are zero.

    Raises:
        ValueError: If a DTensor holds pending partial sums.

    """
    layers = list(tensors)
    if not layers:
        return Moments(*torch.empty(3, 0, dtype=torch.float64, device="cpu").unbind())
    parts = [local(w) for w in layers]
    if smoothing or torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(w.requires_grad for w in parts)):
        sums = torch.stack([_differentiable_sums(flat(w), smoothing) for w in parts])
    else:
        sums = measure(parts, backend)
    return of_sums(sums, layers)


def across_devices(weights: Sequence[Tensor]) -> Moments:
    """Measure weights, at least one, wherever they are; the moments are on the first one's device, nothing waits."""
    device = local(weights[0]).device
    places: dict[torch.device, list[int]] = {}
    for index, w in enumerate(weights):
        places.setdefault(local(w).device, []).append(index)
    result = torch.empty(3, len(weights), dtype=accumulator(device), device=device)
    for indices in places.values():
        found = torch.stack(list(moments([weights[index] for index in indices])))
        result.index_copy_(1, upload(tuple(indices), torch.int64, device), found.to(result))
    return Moments(*result.unbind())


def of_sums(sums: Tensor, tensors: Sequence[Tensor]) -> Moments:
    """Make moments of this rank's sums of m and m^2, shape (layers, 2)."""
    n = counts(tensors)
    mu, q = (sum_over_shards(sums, tensors) / n.clamp(min=1).unsqueeze(1)).unbind(1)
    return Moments(n, mu, q)


def measure(parts: Sequence[Tensor], backend: str) -> Tensor:
    """Sum m and m^2 of plain tensors on one device, shape (layers, 2), in the accumulator's precision."""
    with torch.no_grad():
        if backend == "eager":
            return eager.sums(parts)
        return backends.implementation(backend).sums(parts)


def counts(tensors: Sequence[Tensor]) -> Tensor:
    """Count the weights of every tensor, shape (layers,), over all shards."""
    device = local(tensors[0]).device
    return upload(tuple([w.numel() for w in tensors]), accumulator(device), device)


def _differentiable_sums(weights: Tensor, smoothing: float) -> Tensor:
    """Sum m and m^2 over a flat tensor, shape (2,)."""
    sums = []
    for chunk in torch.split(weights, eager.CHUNK):
        w = chunk.to(compute_dtype(chunk))
        m = (w.square() + smoothing).sqrt() if smoothing else w.abs()
        sums += [m.sum(), m.square().sum()]
    return torch.stack(sums).to(accumulator(weights.device)).view(-1, 2).sum(0)
