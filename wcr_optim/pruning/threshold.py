"""Which weights are the largest: exact counts over any number of tensors, without bringing them together.

The bit pattern of a non-negative float, read as an integer, grows with its value. A radix search over these patterns
therefore finds the magnitude at which a given number of weights lies below: count the leading 16 bits of all weights,
keep the one value that the wanted rank falls into, count the next 16 bits of the weights that begin so, until no bits
are left. That is two passes over the weights for float32 and narrower types, four for float64, in memory that does
not depend on their number. Counts are sums: those of chunks, tensors and ranks add up.

Weights of equal magnitude are told apart by position: the earlier tensor, and within a tensor the earlier element in
row-major order, is kept. The number of pruned weights is exactly ``round(sparsity * n)``, and the kept set of a higher
sparsity lies inside that of a lower one.

Nothing here knows of modules: tensors come by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Scope: TypeAlias = Literal["global", "layer"]
Stream: TypeAlias = Callable[[], Iterable[tuple[str, Tensor]]]
"""Produces the named tensors afresh, in the same order, at every call. Tensors may be dropped once consumed."""

Bits: TypeAlias = Any
"""Flat integers: an ndarray for weights on the CPU, a tensor for those on another device.

The operators that are used here mean the same for both. On the CPU numpy counts and selects at twice the speed of
torch on one thread, and does not wait for torch's threads: an operation on a chunk takes microseconds, but where other
processes keep the cores busy the wait for the last thread takes milliseconds.
"""

# Small enough for the cache, for malloc to keep the buffers, and for torch to work in the calling thread alone.
_CPU_CHUNK = 2**15
_DEVICE_CHUNK = 2**24
_DIGIT_BITS = 16
_BINS = 2**_DIGIT_BITS


class _Key(NamedTuple):
    """The integers of a float type's width."""

    torch: torch.dtype
    numpy: type[np.signedinteger[Any]]
    as_float: type[np.floating[Any]]
    digits: int
    infinity: int


_KEYS = {
    torch.float32: _Key(torch.int32, np.int32, np.float32, 2, 0x7F80_0000),
    torch.float64: _Key(torch.int64, np.int64, np.float64, 4, 0x7FF0_0000_0000_0000),
}


def check_sparsity(sparsity: float) -> float:
    """Return a sparsity as a float in [0, 1].

    Raises:
        ValueError: If it lies outside.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity must lie in [0, 1], got {sparsity!r}")
    return float(sparsity)


def check_scope(scope: str) -> None:
    """Raise ValueError unless the scope is known."""
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")


def pruned_count(sparsity: float, total: int) -> int:
    """Return how many of ``total`` weights a sparsity prunes: ``round(sparsity * total)``.

    Python's rounding, in which an exact half goes to the even number: the count that torch.nn.utils.prune takes.
    """
    return round(sparsity * total)


@dataclass(frozen=True)
class Cut:
    """Where one sparsity divides weights into kept and pruned.

    Weights above the threshold are kept, weights below it pruned; of those equal to it the first `ties_kept` stay.

    Attributes:
        threshold: The smallest kept magnitude; infinity when nothing is kept.
        pruned: Number of pruned weights.
        kept: Number of kept weights.
        ties: Number of weights whose magnitude equals the threshold.
        ties_kept: How many of them are kept.
        dtype: The dtype that magnitudes are compared in, float32 or float64; both hold narrower ones exactly.
    """

    threshold: float
    pruned: int
    kept: int
    ties: int
    ties_kept: int
    dtype: torch.dtype


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
    """
    masks = {}
    for name, tensor, keeper in keepers(tensors.items, sparsity, scope):
        flat = torch.empty(tensor.numel(), dtype=torch.bool, device=tensor.device)
        start = 0
        for keep in keeper(tensor):
            flat[start : start + len(keep)] = keep
            start += len(keep)
        masks[name] = flat.view(tensor.shape)
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


def find_cuts(stream: Stream, sparsities: Sequence[float], dtype: torch.dtype | None = None) -> list[Cut]:
    """Find where each of several sparsities cuts, all from the same passes over the weights.

    Args:
        stream: Called once for every pass (two for float32 and narrower types, four for float64).
        sparsities: Shares of all weights to prune, in [0, 1], in any order.
        dtype: Compare in this dtype, float32 or float64. None takes float32 and starts over in float64 at the first
            tensor of that type (default: None)

    Returns:
        One cut per sparsity, in the order given.

    Raises:
        ValueError: If a sparsity lies outside [0, 1] or a tensor holds NaN; the message names it.
        TypeError: If a tensor is not real and floating-point.
    """
    sparsities = [check_sparsity(sparsity) for sparsity in sparsities]
    search = RadixSearch(dtype or torch.float32)
    while not search.done:
        for name, tensor in stream():
            if dtype is None and tensor.dtype is torch.float64 and search.dtype is not torch.float64:
                dtype = search.dtype
                search = RadixSearch(torch.float64)
                break
            search.count(name, tensor)
            del tensor  # before the next one is made
        else:
            search.advance(sparsities)
    return search.cuts(sparsities)


class RadixSearch:
    """The state of a search for the magnitudes at given ranks.

    A pass counts every tensor, then advances by one digit of 16 bits. Between the two, `counts` may be summed over
    the processes that hold the tensors in parts.

    Args:
        dtype: The dtype to compare in, float32 or float64 (default: torch.float32)

    Attributes:
        total: Number of weights, known after the first pass.

    Example:
        >>> search = RadixSearch()
        >>> while not search.done:
        ...     for name, tensor in tensors.items():
        ...         search.count(name, tensor)
        ...     search.advance([0.5, 0.9])
        >>> cuts = search.cuts([0.5, 0.9])
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._key = _KEYS[dtype]
        self.total = 0
        self._passes = 0
        self._prefixes = [0]
        self._targets: dict[int, tuple[int, int]] = {}  # wanted rank -> its prefix and its rank among those
        self._counts = np.zeros((1, _BINS), dtype=np.int64)
        # Gathers what would not repay going through all bins. One buffer for all: a list of small pieces would leave
        # the memory in shreds that the next large tensor does not fit into.
        self._gathered = np.empty(_BINS, dtype=self._key.numpy)
        self._fill = 0

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Weights by their next digit, shape (prefixes, 65536), a row for every prefix still of interest."""
        self._add(self._gathered[: self._fill])
        self._fill = 0
        return self._counts

    @property
    def done(self) -> bool:
        """Whether all digits are known."""
        return self._passes == self._key.digits or (self._passes > 0 and not self._targets)

    @property
    def _shift(self) -> int:
        return _DIGIT_BITS * (self._key.digits - 1 - self._passes)

    def count(self, name: str, tensor: Tensor) -> None:
        """Count the next digit of a tensor's magnitudes.

        Args:
            name: What to call the tensor in an error.
            tensor: Floating-point weights.

        Raises:
            ValueError: If the tensor holds NaN.
        """
        for chunk in chunks(tensor):
            bits = magnitude_bits(chunk, self.dtype)
            if self._passes == 0:
                check_not_nan(name, bits)
            else:
                bits = self._beginning_with_prefixes(bits)
            if len(bits) > _CPU_CHUNK:
                self._add(bits)
                continue
            if self._fill + len(bits) > _BINS:
                _ = self.counts
            self._gathered[self._fill : self._fill + len(bits)] = bits if tensor.device.type == "cpu" else bits.cpu()
            self._fill += len(bits)

    def _beginning_with_prefixes(self, bits: Bits) -> Bits:
        lead = bits >> (self._shift + _DIGIT_BITS)
        wanted = lead == self._prefixes[0]
        for prefix in self._prefixes[1:]:
            wanted |= lead == prefix
        return bits[wanted]

    def _add(self, bits: Bits) -> None:
        if self._passes == 0:
            self._counts[0] += _bincount(bits >> self._shift)
            return
        lead = bits >> (self._shift + _DIGIT_BITS)
        for row, prefix in enumerate(self._prefixes):
            self._counts[row] += _bincount(bits[lead == prefix] >> self._shift & (_BINS - 1))

    def advance(self, sparsities: Sequence[float]) -> None:
        """Fix the digit that was counted, for the ranks that these sparsities ask for."""
        counts = self.counts
        if self._passes == 0:
            self.total = int(counts.sum())
            ranks = {pruned_count(sparsity, self.total) for sparsity in sparsities}
            self._targets = {rank: (0, rank) for rank in ranks if rank < self.total}
        ends = counts.cumsum(axis=1)
        rows = {prefix: row for row, prefix in enumerate(self._prefixes)}
        for rank, (prefix, within) in self._targets.items():
            row = rows[prefix]
            digit = int(np.searchsorted(ends[row], within, side="right"))
            below = int(ends[row, digit - 1]) if digit else 0
            self._targets[rank] = (prefix * _BINS + digit, within - below)
        self._passes += 1
        if not self.done:
            self._prefixes = sorted({prefix for prefix, _ in self._targets.values()})
            self._counts = np.zeros((len(self._prefixes), _BINS), dtype=np.int64)

    def cuts(self, sparsities: Sequence[float]) -> list[Cut]:
        """Return the cuts of sparsities that the search was advanced with."""
        return [self._cut(pruned_count(sparsity, self.total)) for sparsity in sparsities]

    def _cut(self, pruned: int) -> Cut:
        if pruned == self.total:
            return Cut(float("inf"), pruned, 0, 0, 0, self.dtype)
        bits, ties_pruned = self._targets[pruned]
        row = self._prefixes.index(bits // _BINS)
        ties = int(self.counts[row, bits % _BINS])
        threshold = torch.tensor(bits, dtype=self._key.torch).view(self.dtype).item()
        return Cut(threshold, pruned, self.total - pruned, ties, ties - ties_pruned, self.dtype)


class Keeper:
    """Marks the kept weights of tensors that are given in the order in which they were counted.

    Args:
        cut: Where to cut.
    """

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self._ties_left = cut.ties_kept
        self._threshold = int(torch.tensor(cut.threshold, dtype=cut.dtype).view(_KEYS[cut.dtype].torch))

    def __call__(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield the mask of the tensor's weights in row-major order, in flat chunks, True where kept."""
        for chunk in chunks(tensor):
            yield torch.as_tensor(self._keep(magnitude_bits(chunk, self.cut.dtype)))

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


def chunk_size(tensor: Tensor) -> int:
    """Return how many weights are worked on at a time; a multiple of eight, so that chunks of a mask fill bytes."""
    return _CPU_CHUNK if tensor.device.type == "cpu" else _DEVICE_CHUNK


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
    if not weights.is_floating_point():
        raise TypeError(f"magnitudes are ranked for real floating-point weights, got {weights.dtype}")
    key = _KEYS[dtype]
    largest = torch.iinfo(key.torch).max
    if weights.device.type != "cpu":
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
    key = next(key for key in _KEYS.values() if bits.dtype in (key.torch, key.numpy))
    if bits.max() > key.infinity:
        raise ValueError(f"{name} holds NaN, which has no rank: repair the weights before pruning")


def _bincount(digits: Bits) -> npt.NDArray[np.int64]:
    if isinstance(digits, Tensor):
        return torch.bincount(digits, minlength=_BINS).cpu().numpy()
    return np.bincount(digits, minlength=_BINS)
