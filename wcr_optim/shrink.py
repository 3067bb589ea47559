"""The one operation on weights behind every penalty: w <- gain * softshrink(w, threshold)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from wcr_optim import backends, eager
from wcr_optim.layout import local
from wcr_optim.precision import compute_dtype
from wcr_optim.rounding import saturate, stochastic_round

__all__ = ["shrink_", "stochastic_round"]


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
        _traced_shrink_(parts, gain, threshold)
    elif backend == "eager":
        eager.shrink_(parts, gain, threshold, seed)
    else:
        backends.implementation(backend).shrink_(parts, gain, threshold, seed)


def _traced_shrink_(parts: Sequence[Tensor], gain: Tensor, threshold: Tensor) -> None:
    """`shrink_` as torch.compile can trace and fuse it: no numbers read, no chunks; rounds to nearest."""
    for w, g, t in zip(parts, gain.unbind(), threshold.unbind(), strict=True):
        x = w.to(compute_dtype(w))
        x = (x - x.clamp(-t, t)) * g
        w.copy_(saturate(x, w.dtype, w) if w.element_size() < 4 else x)
