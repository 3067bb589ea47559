"""The one operation on weights behind every penalty: w <- gain * softshrink(w, threshold)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from wcr_optim import backends
from wcr_optim.layout import local, pieces
from wcr_optim.moments import BATCH, CHUNK, SMALL, compute_dtype
from wcr_optim.packing import ROW, Packed, batches
from wcr_optim.rounding import Noise, round_to, saturate, stochastic_round

__all__ = ["eager_shrink_", "shrink_", "stochastic_round"]

# Weights of less than 32 bits have float32 values and random bits beside them, others nothing.
PIECE = 2**17
# Elsewhere than on the CPU there is no cache to fit, and a chunk only bounds the temporaries.
DEVICE_CHUNK = 2**24


@torch.no_grad()
def shrink_(
    tensors: Iterable[Tensor],
    gain: Tensor,
    threshold: Tensor,
    *,
    seed: int | Tensor | None = None,
    backend: str = "eager",
) -> None:
    """Shrink every tensor in place: w <- gain * sign(w) * max(|w| - threshold, 0).

    One pass over memory, no temporary larger than a chunk. NaN stays NaN, an infinity stays itself, and neither is
    ever created, but for a gain of 0 (l2 at lr * strength >= 1) on an infinity, or one that carries a float32 weight
    out of range. Narrower weights are computed in float32: a relative change of 1e-4 lies below bfloat16's resolution
    and would be lost to rounding each time, so they can be rounded stochastically.

    Args:
        tensors: Weights of any floating dtype, shape and strides, all on one device; a DTensor's local part is
            written.
        gain: Factors, shape (layers,).
        threshold: Thresholds, shape (layers,), in units of a weight, not negative.
        seed: Rounds bfloat16 and float16 weights stochastically, reproducibly for equal seeds; None rounds them to
            nearest (default: None). A tensor on their device is read there, by the "triton" backend without waiting.
        backend: "eager", "compiled" or "triton", see `backends` (default: "eager").

    """
    parts = [local(w) for w in tensors]
    if not parts:
        return
    if torch.compiler.is_compiling():
        traced_shrink_(parts, gain, threshold)
    elif backend == "eager":
        eager_shrink_(parts, gain, threshold, make_noise(parts, seed))
    else:
        backends.implementation(backend).shrink_(parts, gain, threshold, seed)


def eager_shrink_(parts: Sequence[Tensor], gain: Tensor, threshold: Tensor, noise: Noise | None) -> None:
    """`shrink_` of plain tensors with torch's own kernels."""
    if parts[0].device.type != "cpu":
        for w, g, t in zip(parts, gain.unbind(), threshold.unbind(), strict=True):
            for piece in pieces(w, DEVICE_CHUNK):
                shrink_piece_(piece, g, t, noise)
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
                shrink_piece_(piece, *scalars[i], noise)


def traced_shrink_(parts: Sequence[Tensor], gain: Tensor, threshold: Tensor) -> None:
    """`shrink_` as torch.compile can trace and fuse it: no numbers read, no chunks; rounds to nearest."""
    for w, g, t in zip(parts, gain.unbind(), threshold.unbind(), strict=True):
        x = w.to(compute_dtype(w))
        x = (x - x.clamp(-t, t)) * g
        w.copy_(saturate(x, w.dtype, w) if w.element_size() < 4 else x)


def make_noise(parts: Sequence[Tensor], seed: int | Tensor | None) -> Noise | None:
    """Prepare stochastic rounding where a seed asks for it and there is something to round."""
    narrow = [w.numel() for w in parts if w.element_size() < 4]
    if seed is None or not narrow:
        return None
    device = parts[0].device
    limit = PIECE if device.type == "cpu" else DEVICE_CHUNK
    # Small layers come packed together, so a request can be as large as all of them.
    return Noise(int(seed), min(limit, sum(narrow) + ROW * len(narrow)), device)


def shrink_piece_(piece: Tensor, gain: Any, threshold: Any, noise: Noise | None) -> None:
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
