"""Which weights are the largest: exactly as many as asked for, among any number of tensors.

Weights of equal magnitude are told apart by position: the earlier tensor, and within a tensor the earlier element in
row-major order, is kept. The number of pruned weights is exactly ``round(sparsity * n)``, and the kept set of a higher
sparsity lies inside that of a lower one.

Nothing here knows of modules: tensors come by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from wcr_optim.pruning.patterns import KEYS, Bits, chunks, magnitude_bits
from wcr_optim.pruning.search import Cut, Stream, check_sparsity, find_cuts, pruned_count

__all__ = ["Keeper", "Scope", "check_scope", "check_sparsity", "keep_masks", "keepers", "pruned_count"]

Scope: TypeAlias = Literal["global", "layer"]


def check_scope(scope: str) -> None:
    """Raise ValueError unless the scope is known."""
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")


def keep_masks(tensors: Mapping[str, Tensor], sparsity: float, scope: Scope = "global") -> dict[str, Tensor]:
    """Mark the weights of largest magnitude.

    Args:
        tensors: Weights by name, floating-point, any shapes, dtypes and devices.
        sparsity: Share of all weights to prune, in [0, 1].
        scope: Rank all weights together (``"global"``) or each tensor on its own (``"layer"``) (default: "global")

    Returns:
        Boolean tensors by name, of the weights' shapes and on their devices, True where a weight is kept.

    Raises:
        ValueError: If the sparsity lies outside [0, 1], the scope is unknown, or a tensor holds NaN.
        TypeError: If a tensor is of no dtype that can be ranked.
    """
    masks = {}
    for name, tensor, keeper in keepers(tensors.items, sparsity, scope):
        mask = torch.empty(tensor.numel(), dtype=torch.bool, device=tensor.device)
        start = 0
        for keep in keeper(tensor):
            mask[start : start + len(keep)] = keep
            start += len(keep)
        masks[name] = mask.view(tensor.shape)
    return masks


def keepers(stream: Stream, sparsity: float, scope: Scope = "global") -> Iterator[tuple[str, Tensor, Keeper]]:
    """Yield every tensor with the `Keeper` that marks it; to be consumed in order."""
    check_scope(scope)
    if scope == "global":
        (cut,) = find_cuts(stream, (sparsity,))
        keeper = Keeper(cut)
        for name, tensor in stream():
            yield name, tensor, keeper
    else:
        for name, tensor in stream():
            (cut,) = find_cuts({name: tensor}.items, (sparsity,))
            yield name, tensor, Keeper(cut)


class Keeper:
    """Marks the kept weights of tensors that are given in the order in which they were counted.

    Args:
        cut: Where to cut.
    """

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self._ties_left = cut.ties_kept
        self._threshold = int(torch.tensor(cut.threshold, dtype=cut.dtype, device="cpu").view(KEYS[cut.dtype].torch))

    def __call__(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield the mask of the tensor's weights in row-major order, in flat chunks, True where kept."""
        for chunk in chunks(tensor):
            yield torch.as_tensor(self._keep(magnitude_bits(chunk, self.cut.dtype)), device=chunk.device)

    def _keep(self, bits: Bits) -> Any:
        if self.cut.kept == 0:
            return bits < 0
        if self.cut.ties_kept == self.cut.ties:
            return bits >= self._threshold
        keep = bits > self._threshold
        if self._ties_left:
            tied = (bits == self._threshold).nonzero()
            first = tied[0][: self._ties_left] if isinstance(tied, tuple) else tied[: self._ties_left, 0]
            keep[first] = True
            self._ties_left -= len(first)
        return keep
