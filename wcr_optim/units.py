"""Output units as layers of their own: the moments of every row of a weight, and a gain and a threshold for each.

A row, w[i] of a weight w, holds what one output unit (neuron, channel, attention feature) reads its inputs with. Every
sum runs within a row, so weights that are sharded by rows, as FSDP2 shards them, need no communication at all.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wcr_optim import backends
from wcr_optim.layout import as_dtensor, local
from wcr_optim.moments import Moments, accumulator, compute_dtype
from wcr_optim.rounding import Noise, round_to
from wcr_optim.shrink import DEVICE_CHUNK, PIECE
from wcr_optim.uploads import keep, upload

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MOST_GAIN = 1.1  # that gives a row its energy back in one step


@torch.no_grad()
def unit_moments(layers: Sequence[Tensor], *, backend: str = "eager") -> Moments:
    """Measure (n, mu, q) of every row of every weight.

    Args:
        layers: Weights of any floating dtype, shape and strides, at least one, all on one device. A row of a DTensor
            that lies on several ranks is summed over them: all of them must call this.
        backend: "eager", "compiled" or "triton", see `backends`; a graph of torch.compile gets plain operations
            (default: "eager").

    Returns:
        Moments of the rows that this rank holds, those of the first weight first, shape (rows,), in float64 where the
        device has it. A weight of one dimension has rows of one element.

    Raises:
        ValueError: If a DTensor holds pending partial sums.

    """
    n = _lengths(layers)
    divisor = n if all(local(w).numel() for w in layers) else n.clamp(min=1)
    mu, q = (_unit_sums(layers, backend) / divisor.unsqueeze(1)).unbind(1)
    return Moments(n, mu, q)


def _unit_sums(
    layers: Sequence[Tensor], backend: str, threshold: Tensor | None = None, cutoff: float = math.inf
) -> Tensor:
    """Sum m = |w|, or what a threshold leaves of it, and m^2 over rows, all ranks' parts of them, shape (rows, 2)."""
    parts = [local(w) for w in layers]
    if backend == "eager" or torch.compiler.is_compiling():
        sums = eager_unit_sums(parts, threshold, cutoff)
    else:
        sums = backends.unit_implementation(backend).unit_sums(parts, threshold, cutoff)
    return torch.cat(add_over_ranks(sums, layers))


@torch.no_grad()
def shrink_units_(
    layers: Sequence[Tensor],
    gain: Tensor,
    threshold: Tensor,
    *,
    cutoff: float = math.inf,
    seed: int | Tensor | None = None,
    backend: str = "eager",
) -> None:
    """Shrink every row in place: w[i] <- gain[i] * sign(w[i]) * max(|w[i]| - threshold[i], 0).

    Args:
        layers: Weights as for `unit_moments`; a DTensor's local part is written.
        gain: Factors, shape (rows,), in the order of `unit_moments`.
        threshold: Thresholds, shape (rows,), in units of a weight, not negative.
        cutoff: Magnitude from which weights are spared by the threshold: gain[i] * w[i] there (default: infinity).
        seed: Rounds bfloat16 and float16 weights stochastically, reproducibly for equal seeds; None rounds them to
            nearest (default: None). A tensor on their device is read there, by the "triton" backend without waiting.
        backend: As for `unit_moments`; each draws random bits of its own (default: "eager").

    """
    parts = [local(w) for w in layers]
    if backend == "eager" or torch.compiler.is_compiling():
        eager_shrink_units_(parts, gain, threshold, seed, cutoff)
    else:
        backends.unit_implementation(backend).shrink_units_(parts, gain, threshold, seed, cutoff)


@torch.no_grad()
def shrink_keeping_energy_(
    layers: Sequence[Tensor],
    units: Moments,
    threshold: Tensor,
    lift: Tensor,
    *,
    cutoff: float = math.inf,
    seed: int | Tensor | None = None,
    backend: str = "eager",
) -> None:
    """Shrink every row in place, however many weights that takes, and give it the energy back that it had.

        w[i] <- lift[i] min(|w[i]| / |x|, 1.1) x,    x = softshrink(w[i], threshold[i]) where |w[i]| < cutoff, else w[i]

    The closed form of the flows knows the energy beforehand, but only while no weight reaches zero. Eager does this in
    one pass, unless a row lies on several ranks; elsewhere one that reads measures what will be left.

    Args:
        layers: Weights as for `unit_moments`; a DTensor's local part is written. All ranks must call this.
        units: Their `unit_moments`.
        threshold: Thresholds, shape (rows,), in units of a weight, not negative. A row with 0 keeps its weights.
        lift: Factors, shape (rows,).
        cutoff: Magnitude from which weights are spared by the threshold (default: infinity).
        seed: As for `shrink_units_` (default: None).
        backend: As for `shrink_units_` (default: "eager").

    """
    if backend == "eager" and not any(map(_cut_by, layers)):
        eager_shrink_units_([local(w) for w in layers], lift, threshold, seed, cutoff, energy=units.n * units.q)
        return
    left = _unit_sums(layers, backend, threshold, cutoff)[:, 1]
    # 1 without a threshold, whatever rounding makes of the sums, and NaN where it is NaN, which would leave zeros.
    gain = torch.where(threshold > 0, _gain(units.n * units.q, left), 1.0 + threshold)
    shrink_units_(layers, gain * lift, threshold, cutoff=cutoff, seed=seed, backend=backend)


def _gain(before: Tensor, left: Tensor) -> Tensor:
    """Return the factor that makes up for lost energy, 1 for rows without any and those that are not finite."""
    gain = (before / left).sqrt().clamp(max=MOST_GAIN)
    return torch.where(gain.isfinite(), gain, 1.0)


def number_of_units(w: Tensor) -> int:
    """Count the rows of a weight, or of this rank's part of it; a single number is one."""
    part = local(w)
    return len(part) if part.ndim else 1


def _lengths(layers: Sequence[Tensor]) -> Tensor:
    """Return the number of weights of every row on this rank, shape (rows,); not to be written."""
    lengths, device = tuple([math.prod(w.shape[1:]) for w in layers]), local(layers[0]).device
    if torch.compiler.is_compiling():  # which cannot trace a size that stands in a tensor
        return spread(upload(lengths, accumulator(device), device), layers)
    sizes = tuple(map(number_of_units, layers))

    def of_rows() -> Tensor:
        each = torch.tensor(lengths, dtype=accumulator(device), device="cpu")
        return each.repeat_interleave(torch.tensor(sizes, device="cpu"))

    return keep(("length of unit", lengths, sizes), device, of_rows)


def spread(values: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """Repeat each weight's value for each of its rows on this rank: (layers,) becomes (rows,)."""
    sizes = tuple(map(number_of_units, layers))
    if values.device.type != "cuda" or torch.compiler.is_compiling():
        return torch.cat([x.expand(size) for x, size in zip(values.unbind(), sizes, strict=True)])

    def layer_of() -> Tensor:
        return torch.arange(len(sizes), device="cpu").repeat_interleave(torch.tensor(sizes, device="cpu"))

    # One kernel, where a cat of repeated values would be one for every layer.
    return values.index_select(0, keep(("layer of unit", sizes), values.device, layer_of))


def of_layers(values: Tensor, units: Sequence[int], index: Sequence[int]) -> Tensor:
    """Select the units of some layers out of those of all."""
    parts = torch.split(values, list(units))  # raises if there are more or fewer
    return values if len(index) == len(units) else torch.cat([parts[i] for i in index])


def eager_unit_sums(parts: Sequence[Tensor], threshold: Tensor | None = None, cutoff: float = math.inf) -> list[Tensor]:
    """Sum m = |w| and m^2 over every row of plain tensors with torch's own kernels, shape (rows, 2) for each.

    With a threshold for every row m is what it leaves of |w|: max(|w| - threshold, 0) below the cutoff.
    """
    rows = [rows_of(w) for w in parts]
    bounds = [None] * len(rows) if threshold is None else torch.split(threshold, [len(w) for w in rows])
    return [_sums(w, t, cutoff) if w.numel() else _no_sums(w) for w, t in zip(rows, bounds, strict=True)]


def eager_shrink_units_(
    parts: Sequence[Tensor],
    gain: Tensor,
    threshold: Tensor,
    seed: int | Tensor | None,
    cutoff: float = math.inf,
    energy: Tensor | None = None,
) -> None:
    """`shrink_units_` of plain tensors with torch's own kernels; `shrink_keeping_energy_` where rows have an energy."""
    rows = [rows_of(w) for w in parts]
    narrow = [piece.numel() for w in rows if w.element_size() < 4 for piece in split_rows(w)]
    noise = Noise(int(seed), max(narrow), rows[0].device) if seed is not None and narrow else None
    sizes = [len(w) for w in rows]
    energies = [None] * len(rows) if energy is None else torch.split(energy, sizes)
    columns = zip(rows, torch.split(gain, sizes), torch.split(threshold, sizes), energies, strict=True)
    for w, own_gain, own_threshold, before in columns:
        dtype, at_once = compute_dtype(w), _rows_at_once(w)
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
                factor = _gain(before[here], _sums(x)[:, 1]) * factor
            x.mul_(factor.to(dtype).view(by_row))
            if x is not piece:
                piece.copy_(round_to(x, piece.dtype, noise, piece))


def rows_of(part: Tensor) -> Tensor:
    """Return a plain tensor with its rows along the first dimension; one of fewer than two has rows of one element."""
    return part if part.ndim > 1 else part.reshape(-1, 1)


def split_rows(rows: Tensor) -> tuple[Tensor, ...]:
    """Cut a tensor into pieces of whole rows that fit the cache, at least one row each."""
    return torch.split(rows, _rows_at_once(rows))


def _rows_at_once(rows: Tensor) -> int:
    """Count the whole rows of a weight that fit a chunk, at least one."""
    chunk = PIECE if rows.device.type == "cpu" else DEVICE_CHUNK
    return max(1, chunk // max(1, math.prod(rows.shape[1:])))


def _sums(rows: Tensor, threshold: Tensor | None = None, cutoff: float = math.inf) -> Tensor:
    """Sum m = |w|, or what a threshold leaves of it, and m^2 over each row, shape (rows, 2).

    By way of m - mean(m): its sums may run in the weights' own precision, since V = q - mu^2 then cancels nothing.
    """
    columns, at_once = [], _rows_at_once(rows)
    for start, piece in enumerate(split_rows(rows)):
        m = piece.to(compute_dtype(piece)).flatten(1).abs()
        if threshold is not None:
            bound = threshold[start * at_once : start * at_once + len(piece)].to(m.dtype).unsqueeze(1)
            taken = torch.minimum(m, bound)
            m = m.sub_(taken if cutoff == math.inf else taken.mul_(m.clone().lt_(cutoff)))
        centre = m.mean(1)
        deviation = m.sub_(centre.unsqueeze(1)).sum(1)
        columns.append((centre, deviation, m.square_().sum(1)))
    n, to = math.prod(rows.shape[1:]), accumulator(rows.device)
    centre, deviation, squares = (torch.cat(column).to(to) for column in zip(*columns, strict=True))
    return torch.stack([deviation + n * centre, squares + centre * (2 * deviation + n * centre)], dim=1)


def _no_sums(rows: Tensor) -> Tensor:
    return torch.zeros(len(rows), 2, dtype=accumulator(rows.device), device=rows.device)


def add_over_ranks(sums: list[Tensor], layers: Sequence[Tensor]) -> list[Tensor]:
    """Add up the rows that are cut: one all-reduce for every mesh dimension that does so, for all weights together."""
    cut: defaultdict[tuple[DeviceMesh, int], list[int]] = defaultdict(list)
    for index, w in enumerate(layers):
        for place in _cut_by(w):
            cut[place].append(index)
    for (mesh, dim), indices in cut.items():
        together = torch.cat([sums[index] for index in indices])
        torch.distributed.all_reduce(together, group=mesh.get_group(dim))
        parts = torch.split(together, [len(sums[index]) for index in indices])
        for index, part in zip(indices, parts, strict=True):
            sums[index] = part
    return sums


def _cut_by(w: Tensor) -> list[tuple[DeviceMesh, int]]:
    """Return the mesh dimensions over which rows are cut."""
    sharded, cut = as_dtensor(w), []
    for dim, placement in enumerate(sharded.placements if sharded is not None else ()):
        if placement.is_partial():
            raise ValueError(f"weights of shape {tuple(w.shape)} hold pending partial sums; redistribute them first")
        if sharded is not None and not placement.is_replicate() and getattr(placement, "dim", None) != 0:
            cut.append((sharded.device_mesh, dim))
    return cut
