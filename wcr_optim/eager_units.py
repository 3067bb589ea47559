"""Units, the rows w[i] of weights, in torch's own kernels: on any device, in pieces of whole rows that fit a cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from wcr_optim.eager import CANCELS, DEVICE_CHUNK, LENGTH, PIECE
from wcr_optim.layout import local
from wcr_optim.precision import accumulator, compute_dtype
from wcr_optim.rounding import Noise, round_to

MOST_GAIN = 1.1  # that gives a row its energy back in one step
# Weights of which copies are made at a time on the CPU, as `eager.PIECE` is for those of less than 32 bits.
CHUNK = 3 * 2**16
SHORTEST = 32  # stretch of a row of which a norm is worth its call


def unit_sums(parts: Sequence[Tensor], threshold: Tensor | None = None, cutoff: float = math.inf) -> list[Tensor]:
    """Sum m = |w| and m^2 over every row of plain tensors, shape (rows, 2) for each.

    With a threshold for every row m is what it leaves of |w|: max(|w| - threshold, 0) below the cutoff.
    """
    rows = [rows_of(w) for w in parts]
    bounds = [None] * len(rows) if threshold is None else torch.split(threshold, [len(w) for w in rows])
    return [_sums(w, t, cutoff) if w.numel() else _no_sums(w) for w, t in zip(rows, bounds, strict=True)]


def shrink_units_(
    parts: Sequence[Tensor],
    gain: Tensor,
    threshold: Tensor,
    seed: int | Tensor | None,
    cutoff: float = math.inf,
    energy: Tensor | None = None,
) -> None:
    """Apply w[i] <- gain[i] * softshrink(w[i], threshold[i]) in place, without the threshold from the cutoff on.

    With an energy for every row each is given what it had before its gain, see `units.shrink_keeping_energy_`.
    """
    rows = [rows_of(w) for w in parts]
    narrow = [piece.numel() for w in rows if w.element_size() < 4 for piece in split_rows(w)]
    noise = Noise(int(seed), max(narrow), rows[0].device) if seed is not None and narrow else None
    sizes = [len(w) for w in rows]
    energies = [None] * len(rows) if energy is None else torch.split(energy, sizes)
    columns = zip(rows, torch.split(gain, sizes), torch.split(threshold, sizes), energies, strict=True)
    for w, own_gain, own_threshold, before in columns:
        dtype, at_once = compute_dtype(w), rows_at_once(w)
        by_row = (-1, *[1] * (w.ndim - 1))
        for start, piece in enumerate(torch.split(w, at_once)):
            here = slice(start * at_once, start * at_once + len(piece))
            x, bound, factor = piece.to(dtype), own_threshold[here].to(dtype).view(by_row), own_gain[here]
            # Not clamp(x, -t, t), as torch's is slow where the bounds are tensors.
            within = torch.maximum(x, -bound)
            torch.minimum(within, bound, out=within)
            if cutoff < math.inf:
                within.mul_(x.abs().lt_(cutoff))  # in place, since torch's comparisons to bool take no vectors
            x.sub_(within)
            if before is not None and piece.numel():
                again = energy_gain(before[here], _square_sums(x.flatten(1)).to(before.dtype))
                factor = torch.where(own_threshold[here] > 0, again * factor, factor)
            x.mul_(factor.to(dtype).view(by_row))
            if x is not piece:
                piece.copy_(round_to(x, piece.dtype, noise, piece))


def energy_gain(before: Tensor, left: Tensor) -> Tensor:
    """Return the factor that makes up for lost energy, 1 for rows without any and those that are not finite."""
    gain = (before / left).sqrt().clamp(max=MOST_GAIN)
    return torch.where(gain.isfinite(), gain, 1.0)


def number_of_units(w: Tensor) -> int:
    """Count the rows of a weight, or of this rank's part of it; a single number is one."""
    part = local(w)
    return len(part) if part.ndim else 1


def of_layers(values: Tensor, units: Sequence[int], index: Sequence[int]) -> Tensor:
    """Select the units of some layers out of those of all."""
    parts = torch.split(values, list(units))  # raises if there are more or fewer
    return values if len(index) == len(units) else torch.cat([parts[i] for i in index])


def rows_of(part: Tensor) -> Tensor:
    """Return a plain tensor with its rows along the first dimension; one of fewer than two has rows of one element."""
    return part if part.ndim > 1 else part.reshape(-1, 1)


def split_rows(rows: Tensor) -> tuple[Tensor, ...]:
    """Cut a tensor into pieces of whole rows that fit the cache, at least one row each."""
    return torch.split(rows, rows_at_once(rows))


def rows_at_once(rows: Tensor) -> int:
    """Count the whole rows of a weight that fit a chunk, at least one."""
    chunk = DEVICE_CHUNK if rows.device.type != "cpu" else PIECE if rows.element_size() < 4 else CHUNK
    return max(1, chunk // max(1, math.prod(rows.shape[1:])))


def _sums(rows: Tensor, threshold: Tensor | None = None, cutoff: float = math.inf) -> Tensor:
    """Sum m = |w|, or what a threshold leaves of it, and m^2 over each row, shape (rows, 2)."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return _centred_sums(rows, threshold, cutoff)  # what rows need is not known to the host, or not yet
    sums = torch.cat([torch.stack([m.sum(1), _square_sums(m)], dim=1) for m in _magnitudes(rows, threshold, cutoff)])
    sums = sums.double()
    total, squares = sums.unbind(1)
    n = math.prod(rows.shape[1:])
    close = squares - total.square() / n < CANCELS * squares
    if n > 1 and close.any():
        for few in torch.split(close.nonzero().squeeze(1), rows_at_once(rows)):
            sums[few] = _centred_sums(rows[few], None if threshold is None else threshold[few], cutoff)
    return sums


def _centred_sums(rows: Tensor, threshold: Tensor | None, cutoff: float) -> Tensor:
    """Sum m and m^2 over each row by way of m - mean(m), whose squares are V and cancel nothing."""
    columns = []
    for m in _magnitudes(rows, threshold, cutoff):
        centre = m.mean(1)
        deviation = m.sub_(centre.unsqueeze(1)).sum(1)
        columns.append((centre, deviation, m.square_().sum(1)))
    n, to = math.prod(rows.shape[1:]), accumulator(rows.device)
    centre, deviation, squares = (torch.cat(column).to(to) for column in zip(*columns, strict=True))
    return torch.stack([deviation + n * centre, squares + centre * (2 * deviation + n * centre)], dim=1)


def _magnitudes(rows: Tensor, threshold: Tensor | None, cutoff: float) -> Iterator[Tensor]:
    """Yield |w|, or what a threshold leaves of it, a few rows at a time, shape (some rows, elements)."""
    at_once = rows_at_once(rows)
    for start, piece in enumerate(split_rows(rows)):
        m = piece.to(compute_dtype(piece)).flatten(1).abs()
        if threshold is not None:
            bound = threshold[start * at_once : start * at_once + len(piece)].to(m.dtype).unsqueeze(1)
            taken = torch.minimum(m, bound)
            m = m.sub_(taken if cutoff == math.inf else taken.mul_(m.clone().lt_(cutoff)))
        yield m


def _square_sums(m: Tensor) -> Tensor:
    """Sum the squares of each row by norms of short stretches, see `eager.LENGTH`, where it can be cut into them."""
    length = m.shape[1]
    stretch = length if length <= LENGTH else math.gcd(length, LENGTH)
    if stretch < min(length, SHORTEST):
        return m.square().sum(1)
    norms: Tensor = torch.linalg.vector_norm(m.view(len(m), -1, stretch), dim=2)
    return norms.square_().sum(1)


def _no_sums(rows: Tensor) -> Tensor:
    return torch.zeros(len(rows), 2, dtype=accumulator(rows.device), device=rows.device)
