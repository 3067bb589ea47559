"""Layers in torch's own kernels: what every device can do, and what the other backends fall back on.

On the CPU in chunks that stay in cache, small layers packed together; elsewhere as few calls as there can be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wcr_optim.layout import pieces
from wcr_optim.packing import ROW, Packed, batches
from wcr_optim.precision import accumulator, compute_dtype
from wcr_optim.rounding import Noise, round_to
from wcr_optim.uploads import upload

# On the CPU several operations in turn read a chunk, so it and the buffer beside it must fit the caches; and each
# operation must be worth its dispatch and the threads' meeting at its end. Sums run in the weights' precision within a
# chunk and in float64 across chunks: no rounding error grows with the layer.
CHUNK = 5 * 2**16
# Of the rows by which a chunk's squares are summed; a chunk is a multiple. In longer ones rounding adds up, above all
# that of bfloat16's values, whose squares have few digits: 3e-7 at 2^11.
LENGTH = 2**9
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
    gains, thresholds = gain.tolist(), threshold.tolist()
    changing = [i for i, pair in enumerate(zip(gains, thresholds, strict=True)) if pair != (1.0, 0.0)]
    scaled = {dtype: _scaled(gain, threshold, dtype) for dtype in {compute_dtype(parts[i]) for i in changing}}
    for batch in batches(parts, changing, SMALL, BATCH):
        if batch.packed:
            layers = [parts[i] for i in batch.layers]
            _shrink_packed(layers, gain[batch.layers], threshold[batch.layers], noise)
        else:
            (i,) = batch.layers
            bound = scaled[compute_dtype(parts[i])][i]
            for piece in pieces(parts[i], CHUNK if parts[i].element_size() >= 4 else PIECE):
                _scale_and_shrink_piece_(piece, gains[i], bound, noise)


def _chunk_buffer(w: Tensor, buffers: dict[torch.dtype, Tensor]) -> Tensor:
    """Return the one buffer of a chunk's size for arithmetic on a layer's chunks."""
    dtype = compute_dtype(w)
    if dtype not in buffers:
        buffers[dtype] = torch.empty(CHUNK, dtype=dtype, device="cpu")
    return buffers[dtype]


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
        m = buffer[: chunk.numel()]
        shaped = m if chunk.ndim == 1 else m.view(chunk.shape)
        if w.dtype == buffer.dtype:
            torch.abs(chunk, out=shaped)
        else:
            shaped.copy_(chunk).abs_()
        total += m.sum().item()
        squares += _square_sum(buffer, chunk.numel())
    return [total, squares]


def _square_sum(buffer: Tensor, n: int) -> float:
    """Sum the squares of the first n elements, by rows: one read, where squares and their sum take a read and a write.

    A dot product of them all would be faster still, but is wrong by 4e-6 where few weights are large.
    """
    end = -(-n // LENGTH) * LENGTH
    buffer[n:end].zero_()
    norms = torch.linalg.vector_norm(buffer[:end].view(-1, LENGTH), dim=1)
    return torch.dot(norms, norms).item()


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


def _scaled(gain: Tensor, threshold: Tensor, dtype: torch.dtype) -> list[float]:
    """Return gain * threshold as weights of that dtype are scaled, so that one at its threshold still becomes zero."""
    # A gain of 0 leaves no weight for a threshold, be it infinite; torch's softshrink takes no infinite one.
    products = (gain.to(dtype) * threshold.to(dtype)).where(gain != 0.0, 0.0)
    scaled: list[float] = products.clamp(max=torch.finfo(dtype).max).tolist()
    return scaled


def _scale_and_shrink_piece_(piece: Tensor, gain: float, scaled: float, noise: Noise | None) -> None:
    """Apply w <- softshrink(gain * w, scaled) to a piece of a layer on the CPU.

    Scaled first: the simpler the operation that reads from memory, the less time is lost in waiting for it.
    """
    dtype = compute_dtype(piece)
    w = piece if piece.dtype == dtype else piece.to(dtype)
    # In place, so that a piece is all that the two operations keep in cache.
    if gain != 1.0:
        w.mul_(gain)
    if math.isnan(scaled):
        w.mul_(scaled)  # which torch's softshrink refuses
    elif scaled != 0.0:
        torch.ops.aten.softshrink.out(w, scaled, out=w)
    if w is not piece:
        piece.copy_(round_to(w, piece.dtype, noise, piece))


def _shrink_piece_(piece: Tensor, gain: Tensor, threshold: Tensor, noise: Noise | None) -> None:
    """`shrink_` of a piece of a layer on other devices, given tensors of shape ()."""
    dtype = compute_dtype(piece)
    w = piece if piece.dtype == dtype else piece.to(dtype)
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
