"""Layers in torch's own kernels: what every device can do, and what the other backends fall back on.

On the CPU in chunks that stay in cache, small layers packed together; elsewhere as few calls as there can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wcr_optim.layout import pieces
from wcr_optim.packing import ROW, Packed, batches
from wcr_optim.precision import accumulator, compute_dtype
from wcr_optim.rounding import Noise, round_to
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
# Weights of less than 32 bits have float32 values and random bits beside them, others nothing.
PIECE = 2**17
# Elsewhere than on the CPU there is no cache to fit, and a chunk only bounds the temporaries.
DEVICE_CHUNK = 2**24


def sums(parts: Sequence[Tensor]) -> Tensor:
    """Sum m = |w| and m^2 of plain tensors, shape (layers, 2), in the accumulator's precision."""
    if parts[0].device.type != "cpu":
        return foreach_sums(parts)
    result = [[0.0, 0.0]] * len(parts)
    buffers: dict[torch.dtype, Tensor] = {}
    for batch in batches(parts, range(len(parts)), SMALL, BATCH):
        if batch.packed:
            for i, pair in zip(batch.layers, _packed_sums([parts[i] for i in batch.layers]), strict=True):
                result[i] = pair
        else:
            (i,) = batch.layers
            result[i] = _chunked_sums(parts[i], _chunk_buffer(parts[i], buffers))
    for i, (w, (total, squares)) in enumerate(zip(parts, result, strict=True)):
        n = w.numel()
        if n > 1 and squares - total * total / n < CANCELS * squares:
            result[i] = _centred_sums(w, total / n)
    return torch.tensor(result, dtype=torch.float64, device="cpu")


def foreach_sums(parts: Sequence[Tensor]) -> Tensor:
    """Sum as `sums` does, where a call is dear and memory is fast: one call for each moment."""
    device, to = parts[0].device, accumulator(parts[0].device)
    result = torch.zeros(len(parts), 2, dtype=to, device=device)
    for dtype in {compute_dtype(w) for w in parts}:
        index = [i for i, w in enumerate(parts) if w.numel() and compute_dtype(w) == dtype]
        if index:
            layers = [parts[i] for i in index]
            firsts, roots = (torch.stack(torch._foreach_norm(layers, order, dtype=dtype)).to(to) for order in (1, 2))
            columns = torch.stack([firsts, roots.square()], dim=1)
            result.index_copy_(0, upload(tuple(index), torch.int64, device), columns)
    return result


def shrink_(parts: Sequence[Tensor], gain: Tensor, threshold: Tensor, seed: int | Tensor | None) -> None:
    """Apply w <- gain * softshrink(w, threshold) in place to plain tensors."""
    noise = _noise(parts, seed)
    if parts[0].device.type != "cpu":
        for w, g, t in zip(parts, gain.unbind(), threshold.unbind(), strict=True):
            for piece in pieces(w, DEVICE_CHUNK):
                _shrink_piece_(piece, g, t, noise)
        return
    # On the CPU plain numbers are free and tell which layers need no pass at all; elsewhere reading them would wait
    # for the device.
    scalars = list(zip(gain.tolist(), threshold.tolist(), strict=True))
    changing = [i for i, pair in enumerate(scalars) if pair != (1.0, 0.0)]
    for batch in batches(parts, changing, SMALL, BATCH):
        if batch.packed:
            layers = [parts[i] for i in batch.layers]
            _shrink_packed(layers, gain[batch.layers], threshold[batch.layers], noise)
        else:
            (i,) = batch.layers
            for piece in pieces(parts[i], CHUNK if parts[i].element_size() >= 4 else PIECE):
                _shrink_piece_(piece, *scalars[i], noise)


def _chunk_buffer(w: Tensor, buffers: dict[torch.dtype, Tensor]) -> Tensor:
    """Return the one buffer of a chunk's size for arithmetic on a layer's chunks."""
    dtype = compute_dtype(w)
    if dtype not in buffers:
        buffers[dtype] = torch.empty(CHUNK, dtype=dtype, device="cpu")
    return buffers[dtype]


def _shaped(buffer: Tensor, like: Tensor) -> Tensor:
    """Return the beginning of a flat buffer in the shape of a chunk."""
    return buffer if like.shape == buffer.shape else buffer[: like.numel()].view(like.shape)


def _packed_sums(layers: Sequence[Tensor]) -> list[list[float]]:
    packed = Packed(layers, compute_dtype(layers[0]))
    magnitudes = packed.rows.abs_()
    firsts = magnitudes.sum(1).double()
    by_row = torch.stack([firsts, magnitudes.square_().sum(1).double()], dim=1)
    by_layer = torch.zeros(len(layers), 2, dtype=torch.float64, device="cpu").index_add_(0, packed.layer, by_row)
    result: list[list[float]] = by_layer.tolist()
    return result


def _chunked_sums(w: Tensor, buffer: Tensor) -> list[float]:
    total = squares = 0.0
    for chunk in pieces(w, CHUNK):
        m = _shaped(buffer, chunk)
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


def _noise(parts: Sequence[Tensor], seed: int | Tensor | None) -> Noise | None:
    """Prepare stochastic rounding where a seed asks for it and there is something to round."""
    narrow = [w.numel() for w in parts if w.element_size() < 4]
    if seed is None or not narrow:
        return None
    device = parts[0].device
    limit = PIECE if device.type == "cpu" else DEVICE_CHUNK
    # Small layers come packed together, so a request can be as large as all of them.
    return Noise(int(seed), min(limit, sum(narrow) + ROW * len(narrow)), device)


def _shrink_piece_(piece: Tensor, gain: Any, threshold: Any, noise: Noise | None) -> None:
    """`shrink_` of a piece of a layer, given numbers or tensors of shape ()."""
    dtype = compute_dtype(piece)
    w = piece if piece.dtype == dtype else piece.to(dtype)
    if isinstance(threshold, float) and threshold == 0.0:
        w.mul_(gain)
    elif isinstance(threshold, float):
        # In place, so that a piece is all that the two operations keep in cache.
        torch.ops.aten.softshrink.out(w, threshold, out=w)
        if gain != 1.0:
            w.mul_(gain)
    else:
        # |w| - threshold beyond the threshold, and exactly zero within it
        w.sub_(torch.clamp(w, -threshold, threshold)).mul_(gain)
    if w is not piece:
        piece.copy_(round_to(w, piece.dtype, noise, piece))


def _shrink_packed(layers: Sequence[Tensor], gain: Tensor, threshold: Tensor, noise: Noise | None) -> None:
    dtype = compute_dtype(layers[0])
    packed = Packed(layers, dtype)
    t = threshold.to(dtype)[packed.layer].unsqueeze(1)
    before = packed.rows
    w = (before - before.clamp(-t, t)).mul_(gain.to(dtype)[packed.layer].unsqueeze(1))
    before.copy_(w if layers[0].dtype == dtype else round_to(w, layers[0].dtype, noise, before))
    packed.write_back()
