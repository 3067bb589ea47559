"""Stochastic rounding of weights narrower than 32 bits, where a small change would otherwise round away every time."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

BITS = 16  # of randomness per weight: what bfloat16 drops of float32


class Noise:
    """Random bits for all the weights of one step, at a fraction of the price of drawing every one.

    One pool is drawn and every request takes it XORed with a constant of its own. Any two draws, of one request or of
    two, are then independent, so rounding errors add up over weights and steps as if every draw were fresh.

    Args:
        seed: Equal seeds give equal bits to equal requests; torch's global generators are not touched.
        size: The most bits of one request.
        device: Where they are needed.
    """

    def __init__(self, seed: int, size: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.pool = torch.randint(2**BITS, (size,), generator=generator, device=device, dtype=torch.int32)
        self._bits = torch.empty_like(self.pool)
        self._constants = random.Random(seed)

    def bits(self, like: Tensor) -> Tensor:
        """Draw uniform integers of [0, 2^16), int32, of a tensor's shape, into memory that the next draw overwrites."""
        n = like.numel()
        return torch.bitwise_xor(self.pool[:n], self.constant(), out=self._bits[:n]).view(like.shape)

    def constant(self) -> int:
        """Draw the constant of one request."""
        return self._constants.getrandbits(BITS)


def round_to(w: Tensor, dtype: torch.dtype, noise: Noise | None, before: Tensor) -> Tensor:
    """Bring float32 values onto the grid of a narrower dtype, without making an infinity of a large weight.

    Args:
        w: Any values, float32, any shape.
        dtype: torch.bfloat16 or torch.float16.
        noise: Source of stochastic rounding; None leaves rounding, to nearest, to the conversion.
        before: What the values were made of; where that is NaN or infinite, it stays.

    Returns:
        float32, w's shape.

    """
    if not w.numel():
        return w
    rounded = w if noise is None else stochastic_round(w, dtype, noise.bits(w))
    # The norm bounds every weight, at a tenth of the price of minimum and maximum; elsewhere reading it would wait.
    if w.device.type == "cpu" and torch.linalg.vector_norm(w) < torch.finfo(dtype).max:
        return rounded
    return saturate(rounded, dtype, before)


def saturate(w: Tensor, dtype: torch.dtype, before: Tensor) -> Tensor:
    """Keep what was finite before within a narrower dtype's range, and what was not as it was."""
    limit = torch.finfo(dtype).max
    return torch.where(before.isfinite(), w.clamp(-limit, limit), before)


def stochastic_round(w: Tensor, dtype: torch.dtype, source: torch.Generator | Tensor) -> Tensor:
    """Round float32 values to neighbours on the grid of a narrower dtype so that the mean is kept.

    With u the spacing of the grid around w, returns u * floor(w / u + z), where z is uniform on [0, 1) in steps of the
    finest bit that dtype drops. Values on the grid stay, exactly.

    Args:
        w: Values, float32, any shape. NaN and infinities stay themselves in bfloat16.
        dtype: torch.bfloat16 or torch.float16.
        source: A generator on w's device, or the random bits themselves, integers of [0, 2^16), int32, of w's shape;
            they are overwritten.

    Returns:
        Values on dtype's grid, float32, w's shape.

    """
    bits = source if isinstance(source, Tensor) else _draw(w, source)
    if dtype == torch.bfloat16:
        # bfloat16 is float32 without its lower half: a carry out of that half is the step to the next magnitude.
        return bits.add_(w.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
    info = torch.finfo(dtype)
    mantissa = -round(math.log2(info.eps))
    exponent_bits = 0x7F800000
    spacing = (w.view(torch.int32) & exponent_bits).view(torch.float32) * info.eps
    spacing.clamp_(min=info.smallest_normal * info.eps)  # subnormal numbers are evenly spaced
    dropped = 23 - mantissa
    z = (bits >> (BITS - dropped)).float() / 2**dropped
    return torch.floor(w / spacing + z) * spacing


def _draw(w: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2**BITS, w.shape, generator=generator, device=w.device, dtype=torch.int32)
