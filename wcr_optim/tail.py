"""The tail of weights: how much of their energy the smallest of them hold, from one pass that only counts.

The bit pattern of a non-negative float grows with its value. Its leading 13 bits, all of the exponent and 5 bits of the
mantissa, sort magnitudes into buckets at most 1/32 wide relative to the magnitude. How many weights fall into each
bucket tells the energy of any number of the smallest ones to a fraction of a percent, in memory that does not depend on
the number of weights; and counts are sums, which add over chunks, tensors and ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wcr_optim.layout import as_dtensor, flat, local, sum_over_shards
from wcr_optim.precision import accumulator
from wcr_optim.uploads import keep, upload

_CHUNK = 2**18  # weights of which copies are made at a time, for the CPU's caches
_DEVICE_CHUNK = 2**22  # elsewhere, where they take 12 bytes for each weight
_DROPPED_BITS = 18
_BUCKETS = 2 ** (31 - _DROPPED_BITS)
_INFINITE = 0x7F80_0000 >> _DROPPED_BITS  # the first bucket that holds no finite number


def tails(sets: Sequence[Sequence[Tensor]], sparsity: float) -> Tensor:
    """Measure the energy (sum of squares) that pruning by magnitude would take from each of several sets of weights.

    Nothing here waits for a CUDA device; what is returned has to be copied by whoever reads it.

    Args:
        sets: Sets of weights that are ranked together, of any floating dtypes, shapes and devices. The parts of a
            DTensor are counted where they lie and added up: all ranks of its mesh must call this.
        sparsity: Share of each set that is pruned, in [0, 1].

    Returns:
        The energies of the pruned weights and of all weights, in units of a weight squared, and the magnitude below
        which weights are pruned, shape (sets, 3), on the device of the first weight; the energies are not finite for
        a set that holds NaN or infinity.

    """
    owners, rows, examples = [], [], []
    for owner, tensors in enumerate(sets):
        for alike in _by_layout(tensors).values():
            counts = torch.zeros(_BUCKETS, dtype=torch.int64, device=local(alike[0]).device)
            for w in alike:
                _count(w.detach(), counts)
            owners.append(owner)
            rows.append(counts)
            examples.append(alike[0])
    device = rows[0].device
    rows_of_all = sum_over_shards(torch.stack([row.to(device) for row in rows]), examples)
    counts = torch.zeros(len(sets), _BUCKETS, dtype=torch.int64, device=device)
    counts.index_add_(0, upload(tuple(owners), torch.int64, device), rows_of_all)
    return _tails(counts.to(accumulator(device)), sparsity)


def _by_layout(tensors: Sequence[Tensor]) -> dict[Any, list[Tensor]]:
    """Divide tensors into those whose counts can be added before they are added over ranks."""
    alike = defaultdict(list)
    for w in tensors:
        sharded = as_dtensor(w)
        layout = None if sharded is None else (sharded.device_mesh, sharded.placements)
        alike[local(w).device, layout].append(w)
    return alike


def _count(weights: Tensor, counts: Tensor) -> None:
    for chunk in torch.split(flat(local(weights)), _CHUNK if counts.device.type == "cpu" else _DEVICE_CHUNK):
        bucket = (chunk.float().view(torch.int32) & 0x7FFF_FFFF) >> _DROPPED_BITS
        if bucket.device.type == "cpu":
            counts += torch.from_numpy(np.bincount(bucket.numpy(), minlength=_BUCKETS))
        else:  # torch.bincount would wait for the device to learn the largest value
            counts.scatter_add_(
                0, bucket.long(), torch.ones(1, dtype=counts.dtype, device=counts.device).expand_as(bucket)
            )


def _tails(counts: Tensor, sparsity: float) -> Tensor:
    """Sum energy over buckets, taking the weights of one bucket as spread evenly over it."""
    below = counts.cumsum(1)
    wanted = (sparsity * below[:, -1:]).round()
    pruned = (wanted - (below - counts)).clamp(min=0).minimum(counts)
    edges, squares = keep("buckets", counts.device, lambda: _buckets().to(counts.dtype)).unbind()
    energies = [torch.where(n > 0, n * squares, 0.0).sum(1) for n in (pruned, counts)]
    last = (below < wanted).sum(1, keepdim=True).clamp(max=_BUCKETS - 2)  # the bucket that is pruned in part
    low, high = edges[last], edges[last + 1]
    share = pruned.gather(1, last) / counts.gather(1, last).clamp(min=1)
    return torch.stack([*energies, (low + share * (high - low)).squeeze(1)], dim=1)


def _buckets() -> Tensor:
    """Return every bucket's lower edge and the mean square of magnitudes spread evenly over it, shape (2, buckets).

    Both are infinite beyond the finite numbers.
    """
    bits = np.arange(_INFINITE + 1, dtype=np.int32) << _DROPPED_BITS
    edges = bits.view(np.float32).astype(np.float64)
    edges[-1] = 2.0**128
    low, high = edges[:-1], edges[1:]
    buckets = np.full((2, _BUCKETS), np.inf)
    buckets[0, : _INFINITE + 1] = edges
    buckets[1, :_INFINITE] = (low * low + low * high + high * high) / 3
    return torch.from_numpy(buckets)
