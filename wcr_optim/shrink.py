"""The one operation on weights behind every penalty: w <- gain * softshrink(w, threshold)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from wcr_optim.layout import flat, in_memory_order, local
from wcr_optim.moments import CHUNK


@torch.no_grad()
def shrink_(tensors: Iterable[Tensor], gain: Tensor, threshold: Tensor, *, seed: int | None = None) -> None:
    """Shrink every tensor in place: w <- gain * sign(w) * max(|w| - threshold, 0).

    One pass over memory, no temporary larger than a chunk. NaN stays NaN, an infinity stays itself, and neither is
    ever created. Weights of less than 32 bits are computed in float32: a relative change of 1e-4 lies below bfloat16's
    resolution and would be lost to rounding each time, so they can be rounded stochastically.

    Args:
        tensors: Weights of any floating dtype, shape and strides, all on one device; a DTensor's local part is
            written.
        gain: Factors, shape (layers,).
        threshold: Thresholds, shape (layers,), in units of a weight, not negative.
        seed: Rounds bfloat16 and float16 weights stochastically, reproducibly for equal seeds; None rounds them to
            nearest (default: None).

    """
    layers = [local(w) for w in tensors]
    # On the CPU plain numbers are free and tell which layers need no pass at all; elsewhere reading them would wait
    # for the device.
    on_cpu = gain.device.type == "cpu"
    gains = gain.tolist() if on_cpu else gain.unbind()
    thresholds = threshold.tolist() if on_cpu else threshold.unbind()
    for layer, (weights, g, t) in enumerate(zip(layers, gains, thresholds, strict=True)):
        if on_cpu and g == 1.0 and t == 0.0:
            continue
        memory = flat(weights)
        generator = _generator(weights, seed, layer)
        for chunk in torch.split(memory, CHUNK):
            _shrink_chunk(chunk, g, t, generator)
        if memory.data_ptr() != weights.data_ptr():  # the memory has gaps, so flat() had to copy
            ordered = in_memory_order(weights)
            ordered.copy_(memory.view(ordered.shape))


def _shrink_chunk(chunk: Tensor, gain: Any, threshold: Any, generator: torch.Generator | None) -> None:
    w = chunk if chunk.dtype in (torch.float32, torch.float64) else chunk.float()
    if not (isinstance(threshold, float) and threshold == 0.0):
        w.sub_(w.clamp(-threshold, threshold))  # |w| - threshold beyond the threshold, exactly zero within it
    w.mul_(gain)
    if w is not chunk:
        chunk.copy_(_round(w, chunk.dtype, generator))


def _generator(weights: Tensor, seed: int | None, layer: int) -> torch.Generator | None:
    if seed is None or weights.element_size() >= 4:
        return None
    return torch.Generator(weights.device).manual_seed((seed * 1_000_003 + layer) % 2**63)


def _round(w: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Bring float32 values onto the grid of a narrower dtype, without making an infinity of a large weight."""
    limit = torch.finfo(dtype).max
    rounded = w if generator is None else stochastic_round(w, dtype, generator)
    return torch.where(w.isfinite(), rounded.clamp(-limit, limit), w).to(dtype)


def stochastic_round(w: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 values to neighbours on the grid of a narrower dtype so that the mean is kept.

    With u the spacing of the grid around w, returns u * floor(w / u + z), where z is uniform on [0, 1) in steps of the
    finest bit that dtype drops. Values on the grid stay, exactly.

    Args:
        w: Finite values, float32, any shape.
        dtype: torch.bfloat16 or torch.float16.
        generator: Source of z, on w's device.

    Returns:
        Values on dtype's grid, float32, w's shape.

    """
    info = torch.finfo(dtype)
    mantissa = -round(math.log2(info.eps))
    # Subnormal numbers are evenly spaced. The second bound keeps 2^-exponent finite in float32.
    finest = max(round(math.log2(info.smallest_normal)) - mantissa, -126)
    exponent = (torch.frexp(w).exponent - 1 - mantissa).clamp(min=finest)
    steps = 2 ** (23 - mantissa)
    z = torch.randint(steps, w.shape, generator=generator, device=w.device, dtype=torch.int32) / steps
    return torch.ldexp((torch.ldexp(w, -exponent) + z).floor(), exponent)
