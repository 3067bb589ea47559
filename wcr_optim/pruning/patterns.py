"""The bit patterns of weights as integers that are ordered as their magnitudes are, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from wcr_optim.parameters import DTYPES

Bits: TypeAlias = Any
"""Flat integers: an ndarray for weights on the CPU, a tensor for those on another device.

The operators that are used here mean the same for both. On the CPU numpy counts and selects at twice the speed of
torch on one thread, and does not wait for torch's threads: an operation on a chunk takes microseconds, but where other
processes keep the cores busy the wait for the last thread takes milliseconds.
"""

# Small enough for the cache, for malloc to keep the buffers, and for torch to work in the calling thread alone.
_CPU_CHUNK = 2**15
_DEVICE_CHUNK = 2**24


class Key(NamedTuple):
    """The integers of a float type's width."""

    torch: torch.dtype
    numpy: type[np.signedinteger[Any]]
    as_float: type[np.floating[Any]]
    infinity: int


KEYS = {
    torch.float32: Key(torch.int32, np.int32, np.float32, 0x7F80_0000),
    torch.float64: Key(torch.int64, np.int64, np.float64, 0x7FF0_0000_0000_0000),
}
"""The integers of the two dtypes that magnitudes are compared in; both hold the narrower dtypes exactly."""


def check_rankable(tensor: Tensor) -> None:
    """Raise TypeError unless the tensor's magnitudes can be ranked."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"magnitudes are ranked for weights in {', '.join(map(str, DTYPES))}, got {tensor.dtype}")


def chunk_size(tensor: Tensor) -> int:
    """Return how many weights are worked on at a time; a multiple of eight, so that chunks of a mask fill bytes."""
    return _CPU_CHUNK if _uses_numpy(tensor) else _DEVICE_CHUNK


def _uses_numpy(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def slabs(tensor: Tensor) -> Iterator[Tensor]:
    """Yield views that follow each other in row-major order, each of a multiple of eight elements but for the last."""
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return
    size = chunk_size(tensor)
    if tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), size)
    else:
        yield from torch.split(tensor, max(8, size // tensor[0].numel() // 8 * 8))


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's elements in row-major order, in flat pieces of a multiple of eight but for the last."""
    # Slab by slab, because reshape(-1) of a whole channels_last or transposed tensor would copy all of it.
    return (slab.reshape(-1) for slab in slabs(tensor))


def magnitude_bits(weights: Tensor, dtype: torch.dtype) -> Bits:
    """Return integers that are ordered as the magnitudes are; NaN comes after infinity.

    Args:
        weights: Floating-point tensor.
        dtype: float32 or float64, at least as wide as the weights, which makes the comparison exact.
    """
    check_rankable(weights)
    key = KEYS[dtype]
    largest = torch.iinfo(key.torch).max
    if not _uses_numpy(weights):
        return weights.to(dtype).view(key.torch) & largest
    weights = weights.detach()
    if weights.dtype is torch.bfloat16:  # the upper half of a float32; numpy has no such type
        values = (weights.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)
    else:
        values = weights.numpy()
    with np.errstate(invalid="ignore"):  # a signalling NaN is reported where it is looked for
        values = values.astype(key.as_float, copy=False)
    return values.view(key.numpy) & largest


def check_not_nan(name: str, bits: Bits) -> None:
    """Raise ValueError if the magnitudes, of which there is at least one, include NaN."""
    key = next(key for key in KEYS.values() if bits.dtype in (key.torch, key.numpy))
    if bits.max() > key.infinity:
        raise ValueError(f"{name} holds NaN, which has no rank: repair the weights before pruning")
