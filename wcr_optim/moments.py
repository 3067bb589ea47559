"""Moments of the weights' magnitudes, the only thing that a penalty needs to know of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wcr_optim import backends
from wcr_optim.layout import flat, local, pieces, sum_over_shards
from wcr_optim.packing import Packed, batches
from wcr_optim.uploads import upload

# On the CPU several operations in turn read a chunk, so it and the buffer beside it must fit the caches; and each
# operation must be worth its dispatch and the threads' meeting at its end. The float32 buffer takes 3 of the 4 MiB that
# a step may hold. Sums run in the weights' precision within a chunk and in float64 across chunks: no rounding error
# grows with the layer.
CHUNK = 12 * 2**16
# Layers up to this size are packed together, as many as fit a batch: their operations would cost more in dispatch than
# in memory.
SMALL = 2**14
BATCH = 2**16
# Where V falls below this share of q, the rounding errors of mu and q show in V = q - mu^2.
CANCELS = 1e-2


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


def of_sums(sums: Tensor, tensors: Sequence[Tensor]) -> Moments:
    """Make moments of this rank's sums of m and m^2, shape (layers, 2)."""
    n = counts(tensors)
    mu, q = (sum_over_shards(sums, tensors) / n.clamp(min=1).unsqueeze(1)).unbind(1)
    return Moments(n, mu, q)


def measure(parts: Sequence[Tensor], backend: str) -> Tensor:
    """Sum m and m^2 of plain tensors on one device, shape (layers, 2), in the accumulator's precision."""
    with torch.no_grad():
        if backend == "eager":
            return eager_sums(parts)
        return backends.implementation(backend).sums(parts)


def counts(tensors: Sequence[Tensor]) -> Tensor:
    """Count the weights of every tensor, shape (layers,), over all shards."""
    device = local(tensors[0]).device
    return upload(tuple([w.numel() for w in tensors]), accumulator(device), device)


def accumulator(device: torch.device) -> torch.dtype:
    """Precision of a layer's few numbers: V = q - mu^2 cancels, so float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def eager_sums(parts: Sequence[Tensor]) -> Tensor:
    """`measure` with torch's own kernels: in chunks on the CPU, one foreach call for each moment elsewhere."""
    if parts[0].device.type != "cpu":
        return foreach_sums(parts)
    sums = [[0.0, 0.0]] * len(parts)
    buffers: dict[torch.dtype, Tensor] = {}
    for batch in batches(parts, range(len(parts)), SMALL, BATCH):
        if batch.packed:
            for i, pair in zip(batch.layers, _packed_sums([parts[i] for i in batch.layers]), strict=True):
                sums[i] = pair
        else:
            (i,) = batch.layers
            sums[i] = _chunked_sums(parts[i], chunk_buffer(parts[i], buffers))
    for i, (w, (total, squares)) in enumerate(zip(parts, sums, strict=True)):
        n = w.numel()
        if n > 1 and squares - total * total / n < CANCELS * squares:
            sums[i] = _centred_sums(w, total / n)
    return torch.tensor(sums, dtype=torch.float64, device="cpu")


def foreach_sums(parts: Sequence[Tensor]) -> Tensor:
    """`measure` where a call is dear and memory is fast."""
    device, to = parts[0].device, accumulator(parts[0].device)
    result = torch.zeros(len(parts), 2, dtype=to, device=device)
    for dtype in {compute_dtype(w) for w in parts}:
        index = [i for i, w in enumerate(parts) if w.numel() and compute_dtype(w) == dtype]
        if index:
            layers = [parts[i] for i in index]
            sums, roots = (torch.stack(torch._foreach_norm(layers, order, dtype=dtype)).to(to) for order in (1, 2))
            result.index_copy_(0, upload(tuple(index), torch.int64, device), torch.stack([sums, roots.square()], dim=1))
    return result


def compute_dtype(w: Tensor) -> torch.dtype:
    """Precision of arithmetic on weights: their own, at least float32."""
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def chunk_buffer(w: Tensor, buffers: dict[torch.dtype, Tensor]) -> Tensor:
    """Return the one buffer of a chunk's size for arithmetic on a layer's chunks."""
    dtype = compute_dtype(w)
    if dtype not in buffers:
        buffers[dtype] = torch.empty(CHUNK, dtype=dtype, device="cpu")
    return buffers[dtype]


def shaped(buffer: Tensor, like: Tensor) -> Tensor:
    """Return the beginning of a flat buffer in the shape of a chunk."""
    return buffer if like.shape == buffer.shape else buffer[: like.numel()].view(like.shape)


def _packed_sums(layers: Sequence[Tensor]) -> list[list[float]]:
    packed = Packed(layers, compute_dtype(layers[0]))
    magnitudes = packed.rows.abs_()
    sums = magnitudes.sum(1).double()
    by_row = torch.stack([sums, magnitudes.square_().sum(1).double()], dim=1)
    by_layer = torch.zeros(len(layers), 2, dtype=torch.float64, device="cpu").index_add_(0, packed.layer, by_row)
    result: list[list[float]] = by_layer.tolist()
    return result


def _chunked_sums(w: Tensor, buffer: Tensor) -> list[float]:
    total = squares = 0.0
    for chunk in pieces(w, CHUNK):
        m = shaped(buffer, chunk)
        if chunk.dtype == m.dtype:
            torch.abs(chunk, out=m)
        else:
            m.copy_(chunk).abs_()
        total += m.sum().item()
        squares += m.square_().sum().item()
    return [total, squares]


def _centred_sums(w: Tensor, mu: float) -> list[float]:
    """Sum m and m^2 by way of m - mu, whose squares are V and cancel nothing."""
    n, total, squares = w.numel(), 0.0, 0.0
    for chunk in pieces(w, CHUNK):
        deviation = chunk.abs().to(compute_dtype(w)).sub_(mu)
        total += deviation.sum().item()
        squares += deviation.square_().sum().item()
    return [total + n * mu, squares + 2 * mu * total + n * mu * mu]


def _differentiable_sums(weights: Tensor, smoothing: float) -> Tensor:
    """Sum m and m^2 over a flat tensor, shape (2,)."""
    sums = []
    for chunk in torch.split(weights, CHUNK):
        w = chunk.to(compute_dtype(chunk))
        m = (w.square() + smoothing).sqrt() if smoothing else w.abs()
        sums += [m.sum(), m.square().sum()]
    return torch.stack(sums).to(accumulator(weights.device)).view(-1, 2).sum(0)
