"""Many small layers as one tensor, so that a network of hundreds of them costs a few operations, not thousands."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wcr_optim.layout import in_memory_order

ROW = 64


class Packed:
    """A copy of layers side by side, each from the start of a row, the rest of its last row zero.

    Attributes:
        rows: The copies, shape (rows, ROW).
        layer: The layer of every row, shape (rows,).
    """

    def __init__(self, layers: Sequence[Tensor], dtype: torch.dtype) -> None:
        lengths = [w.numel() for w in layers]
        heights = [-(-n // ROW) for n in lengths]
        self.rows = torch.zeros(sum(heights), ROW, dtype=dtype, device="cpu")
        self.layer = torch.arange(len(layers), device="cpu").repeat_interleave(torch.tensor(heights, device="cpu"))
        sizes = [k for n, h in zip(lengths, heights, strict=True) for k in (n, h * ROW - n)]
        parts = torch.split(self.rows.view(-1), sizes)
        self.sources = [w if w.is_contiguous() else in_memory_order(w) for w in layers]
        self.copies = [part.view(w.shape) for part, w in zip(parts[::2], self.sources, strict=True)]
        torch._foreach_copy_(self.copies, self.sources)

    def write_back(self) -> None:
        """Overwrite the layers by their copies."""
        torch._foreach_copy_(self.sources, self.copies)


class Batch(NamedTuple):
    """Layers of one dtype that are worked on together: small ones packed, or a large one on its own."""

    layers: list[int]
    packed: bool


def batches(parts: Sequence[Tensor], index: Iterable[int], small: int, limit: int) -> Iterator[Batch]:
    """Divide layers, given by their indices, into batches.

    Args:
        parts: All layers.
        index: Those to divide.
        small: Layers of at most so many weights are packed.
        limit: So many weights a packed batch has at most, padding included.

    Yields:
        Batches, those of one dtype in succession.

    """
    by_dtype: defaultdict[torch.dtype, list[int]] = defaultdict(list)
    for i in index:
        by_dtype[parts[i].dtype].append(i)
    for same in by_dtype.values():
        batch: list[int] = []
        weights = 0
        for i in same:
            n = parts[i].numel()
            if n > small:
                yield Batch([i], packed=False)
                continue
            padded = -(-n // ROW) * ROW
            if weights + padded > limit:
                yield Batch(batch, packed=True)
                batch, weights = [], 0
            batch.append(i)
            weights += padded
        if batch:
            yield Batch(batch, packed=True)
