"""The magnitudes at which sparsities cut, found by counting, without bringing the weights together.

The bit pattern of a non-negative float, read as an integer, grows with its value, so the magnitude of a given rank can
be found by counting patterns. A window of patterns that holds the rank is divided into bins, the weights in each bin
are counted in one pass, and the bin that the rank falls into is the next window, until a bin is a single pattern. A
sample proposes a first window, narrow enough that one pass mostly suffices and few weights are looked at twice; where
it was wrong, the count of weights below the window shows it, and the search goes on outside. Nothing is approximate.

Memory does not depend on the number of weights. Counts are sums: those of chunks, tensors and ranks add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wcr_optim.layout import flat
from wcr_optim.pruning.patterns import KEYS, Bits, check_not_nan, check_rankable, chunks, magnitude_bits

Stream: TypeAlias = Callable[[], Iterable[tuple[str, Tensor]]]
"""Produces the named tensors afresh, in the same order, at every call. Tensors may be dropped once consumed."""

_BINS = 2**16
_FEW_BINS = 2**8  # for tensors with fewer weights than there would be bins
_GUESS_BINS = 2**20  # of all windows together that a sample proposes
_SAMPLE_SIZE = 2**18
_SAMPLE_STEP = 251  # prime, so that the sample does not run down the columns of a matrix


def check_sparsity(sparsity: float) -> float:
    """Return a sparsity as a float in [0, 1].

    Raises:
        ValueError: If it lies outside.
        TypeError: If it is no number.
    """
    try:
        inside = 0.0 <= sparsity <= 1.0
    except TypeError as error:
        raise TypeError(f"sparsity must be a number in [0, 1], got {sparsity!r}") from error
    if not inside:
        raise ValueError(f"sparsity must lie in [0, 1], got {sparsity!r}")
    return float(sparsity)


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


def find_cuts(stream: Stream, sparsities: Sequence[float]) -> list[Cut]:
    """Find where each of several sparsities cuts, all from the same passes over the weights.

    Args:
        stream: Called for every pass: once to sample, then mostly once and at most four more times to count.
        sparsities: Shares of all weights to prune, in [0, 1], in any order.

    Returns:
        One cut per sparsity, in the order given.

    Raises:
        ValueError: If a sparsity lies outside [0, 1], a tensor holds NaN (the message names it), or the stream differs
            from one pass to the next.
        TypeError: If a tensor is of no dtype that can be ranked.
    """
    sample, total, dtype = _sample(stream)
    search = RankSearch(sparsities, dtype)
    search.guess(sample, total)
    while not search.done:
        counted = 0
        for name, tensor in stream():
            search.count(name, tensor)
            counted += tensor.numel()
            del tensor  # before the next one is made
        if counted != total:
            raise ValueError(f"the stream held {total:,} weights at first and then {counted:,}")
        search.advance()
    return search.cuts()


def _sample(stream: Stream) -> tuple[npt.NDArray[np.float64], int, torch.dtype]:
    """Return some of the magnitudes in order, the number of weights, and the dtype to compare them in."""
    sample = np.empty(_SAMPLE_SIZE)  # at once: pieces would lie between the tensors that come and go
    size, step, total, dtype = 0, _SAMPLE_STEP, 0, torch.float32
    for _, tensor in stream():
        check_rankable(tensor)
        if tensor.dtype is torch.float64:
            dtype = tensor.dtype
        total += tensor.numel()
        while size + -(-tensor.numel() // step) > len(sample):
            thinned = sample[:size:2].copy()
            size, step = len(thinned), 2 * step
            sample[:size] = thinned
        part = flat(tensor.detach())[::step].cpu().double().abs().numpy()
        sample[size : size + len(part)] = part
        size += len(part)
        del tensor, part
    return np.sort(sample[:size]), total, dtype


@dataclass(frozen=True)
class _Window:
    """A range of bit patterns, divided into bins of 2**shift patterns.

    Attributes:
        low: The first pattern.
        high: One past the last pattern.
        shift: Binary logarithm of the width of a bin.
        below: Number of weights below the window, None while it is not known.
    """

    low: int
    high: int
    shift: int
    below: int | None

    @classmethod
    def of(cls, low: int, high: int, below: int | None, bins: int) -> _Window:
        shift = 0
        while (high - low - 1) >> shift >= bins:
            shift += 1
        return cls(low, high, shift, below)

    @property
    def bounds(self) -> tuple[int, int]:
        return self.low, self.high

    @property
    def bins(self) -> int:
        return ((self.high - self.low - 1) >> self.shift) + 1


class RankSearch:
    """The state of a search for the magnitudes at which sparsities cut.

    A pass counts every tensor and then advances. Between the two, `counts` may be summed over the processes that hold
    the tensors in parts, if all of them search for the same sparsities without a guess or with the same one.

    Args:
        sparsities: Shares of all weights to prune, in [0, 1].
        dtype: The dtype to compare in, float32 or float64 (default: torch.float32)

    Raises:
        ValueError: If a sparsity lies outside [0, 1].

    Example:
        >>> search = RankSearch([0.5, 0.9])
        >>> while not search.done:
        ...     for name, tensor in tensors.items():
        ...         search.count(name, tensor)
        ...     search.advance()
        >>> half, tenth = search.cuts()
    """

    def __init__(self, sparsities: Sequence[float], dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._sparsities = [check_sparsity(sparsity) for sparsity in sparsities]
        self._key = KEYS[dtype]
        self._total: int | None = None
        self._searched: dict[int, _Window] = {}  # by rank
        self._found: dict[int, tuple[int, int, int]] = {}  # by rank: the pattern, its number, how many of it are pruned
        self._counted_once = False
        # Gathers what would not repay going through all bins. One buffer for all: a list of small pieces would leave
        # the memory in shreds that the next large tensor does not fit into.
        self._gathered = np.empty(_BINS, dtype=self._key.numpy)
        self._fill = 0
        self._open([_Window.of(0, self._key.infinity + 1, 0, _BINS)])

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Sums of the present pass, one row per window: weights below it, then weights in each of its bins."""
        self._flush()
        return self._counts

    @property
    def done(self) -> bool:
        """Whether all cuts are known."""
        return self._counted_once and not self._searched

    def guess(self, sample: npt.NDArray[np.float64], total: int) -> None:
        """Begin with windows that hold the wanted ranks if the sample is a fair one.

        Args:
            sample: Some of the magnitudes, in ascending order.
            total: Number of weights.
        """
        self._set_total(total)
        bits = np.concatenate([[0.0], sample, [np.inf]]).astype(self._key.as_float).view(self._key.numpy)
        bins = min(_GUESS_BINS // max(1, len(self._searched)), max(_FEW_BINS, total // 64))
        for rank in self._searched:
            share = rank / total
            middle = share * len(sample)
            margin = 5 * math.sqrt(len(sample) * share * (1 - share)) + 10
            low = int(bits[max(0, math.floor(middle - margin))])
            high = int(bits[min(len(bits) - 1, math.ceil(middle + margin))]) + 1
            high = min(high, self._key.infinity + 1)  # NaN, if the sample holds any
            self._searched[rank] = _Window.of(min(low, high - 1), high, None, bins)
        self._open(self._searched.values())

    def count(self, name: str, tensor: Tensor) -> None:
        """Count a tensor's magnitudes.

        Args:
            name: What to call the tensor in an error.
            tensor: Floating-point weights.

        Raises:
            ValueError: If the tensor holds NaN.
        """
        for chunk in chunks(tensor):
            bits = magnitude_bits(chunk, self.dtype)
            if not self._counted_once:
                check_not_nan(name, bits)
            bits = self._within_windows(bits)
            if len(bits) > len(self._gathered) // 2:
                self._add(bits)
                continue
            if self._fill + len(bits) > len(self._gathered):
                self._flush()
            self._gathered[self._fill : self._fill + len(bits)] = bits.cpu() if isinstance(bits, Tensor) else bits
            self._fill += len(bits)

    def advance(self) -> None:
        """Narrow the windows by what was counted.

        Raises:
            ValueError: If fewer weights were counted than in earlier passes.
        """
        counts = self.counts
        self._counted_once = True
        total = self._total
        if total is None:
            total = int(counts.sum())
            self._set_total(total)
        bins = min(_BINS, max(_FEW_BINS, total))
        rows = {window: row for row, window in enumerate(self._windows)}
        for rank, window in list(self._searched.items()):
            row = counts[rows[window]]
            below = int(row[0]) if window.below is None else window.below
            ends = below + row[1 : 1 + window.bins].cumsum()
            place = int(np.searchsorted(ends, rank, side="right"))
            if rank < below:
                self._searched[rank] = _Window.of(0, window.low, 0, bins)
            elif place == window.bins:
                if window.high > self._key.infinity:
                    raise ValueError(f"{ends[-1]:,} weights were counted where there were {total:,} before")
                self._searched[rank] = _Window.of(window.high, self._key.infinity + 1, int(ends[-1]), bins)
            else:
                low = window.low + (place << window.shift)
                before = int(ends[place - 1] if place else below)
                if window.shift:
                    self._searched[rank] = _Window.of(low, min(low + (1 << window.shift), window.high), before, bins)
                else:
                    del self._searched[rank]
                    self._found[rank] = (low, int(row[1 + place]), rank - before)
        self._open(self._searched.values())

    def cuts(self) -> list[Cut]:
        """Return one cut per sparsity, in the order given, once the search is done."""
        if not self.done or self._total is None:
            raise RuntimeError("the search is not done: count all tensors and advance")
        result = []
        for sparsity in self._sparsities:
            pruned = pruned_count(sparsity, self._total)
            if pruned == self._total:
                result.append(Cut(math.inf, pruned, 0, 0, 0, self.dtype))
                continue
            bits, ties, ties_pruned = self._found[pruned]
            threshold = torch.tensor(bits, dtype=self._key.torch, device="cpu").view(self.dtype).item()
            result.append(Cut(threshold, pruned, self._total - pruned, ties, ties - ties_pruned, self.dtype))
        return result

    def _set_total(self, total: int) -> None:
        self._total = total
        ranks = {pruned_count(sparsity, total) for sparsity in self._sparsities}
        self._searched = {rank: self._windows[0] for rank in ranks if rank < total}

    def _open(self, windows: Iterable[_Window]) -> None:
        self._windows = list(dict.fromkeys(windows))
        bins = max((window.bins for window in self._windows), default=0)
        self._counts = np.zeros((len(self._windows), 1 + bins), dtype=np.int64)

    def _within_windows(self, bits: Bits) -> Bits:
        if len(self._windows) == 1 and self._windows[0].bounds == (0, self._key.infinity + 1):
            return bits
        within: Any = bits < 0
        for row, window in enumerate(self._windows):
            reached = bits >= window.low
            if window.below is None:
                self._counts[row, 0] += len(bits) - _number(reached)
            within |= reached & (bits < window.high)
        return bits[within]

    def _flush(self) -> None:
        self._add(self._gathered[: self._fill])
        self._fill = 0

    def _add(self, bits: Bits) -> None:
        for row, window in enumerate(self._windows):
            own = bits if len(self._windows) == 1 else bits[(bits >= window.low) & (bits < window.high)]
            numbers = _bincount((own - window.low) >> window.shift)
            self._counts[row, 1 : 1 + len(numbers)] += numbers


def _number(marks: Bits) -> int:
    return int(marks.sum() if isinstance(marks, Tensor) else np.count_nonzero(marks))


def _bincount(places: Bits) -> npt.NDArray[np.int64]:
    return torch.bincount(places).cpu().numpy() if isinstance(places, Tensor) else np.bincount(places)
