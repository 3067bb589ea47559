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
    parts = [local(w) for w in layers]
    if backend == "eager" or torch.compiler.is_compiling():
        sums = eager_unit_sums(parts)
    else:
        sums = backends.unit_implementation(backend).unit_sums(parts)
    sums = add_over_ranks(sums, layers)
    device = parts[0].device
    n = spread(upload(tuple([math.prod(w.shape[1:]) for w in layers]), accumulator(device), device), layers)
    mu, q = (torch.cat(sums) / n.clamp(min=1).unsqueeze(1)).unbind(1)
    return Moments(n, mu, q)


@torch.no_grad()
def shrink_units_(
    layers: Sequence[Tensor],
    gain: Tensor,
    threshold: Tensor,
    *,
    seed: int | Tensor | None = None,
    backend: str = "eager",
) -> None:
    """Shrink every row in place: w[i] <- gain[i] * sign(w[i]) * max(|w[i]| - threshold[i], 0).

    Args:
        layers: Weights as for `unit_moments`; a DTensor's local part is written.
        gain: Factors, shape (rows,), in the order of `unit_moments`.
        threshold: Thresholds, shape (rows,), in units of a weight, not negative.
        seed: Rounds bfloat16 and float16 weights stochastically, reproducibly for equal seeds; None rounds them to
            nearest (default: None). A tensor on their device is read there, by the "triton" backend without waiting.
        backend: As for `unit_moments`; each draws random bits of its own (default: "eager").

    """
    parts = [local(w) for w in layers]
    if backend == "eager" or torch.compiler.is_compiling():
        eager_shrink_units_(parts, gain, threshold, seed)
    else:
        backends.unit_implementation(backend).shrink_units_(parts, gain, threshold, seed)


def number_of_units(w: Tensor) -> int:
    """Count the rows of a weight, or of this rank's part of it; a single number is one."""
    part = local(w)
    return len(part) if part.ndim else 1


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


def eager_unit_sums(parts: Sequence[Tensor]) -> list[Tensor]:
    """Sum m = |w| and m^2 over every row of plain tensors with torch's own kernels, shape (rows, 2) for each."""
    return [_sums(rows) if rows.numel() else _no_sums(rows) for rows in map(rows_of, parts)]


def eager_shrink_units_(parts: Sequence[Tensor], gain: Tensor, threshold: Tensor, seed: int | Tensor | None) -> None:
    """`shrink_units_` of plain tensors with torch's own kernels."""
    rows = [rows_of(w) for w in parts]
    narrow = [piece.numel() for w in rows if w.element_size() < 4 for piece in split_rows(w)]
    noise = Noise(int(seed), max(narrow), rows[0].device) if seed is not None and narrow else None
    sizes = [len(w) for w in rows]
    for w, *columns in zip(rows, torch.split(gain, sizes), torch.split(threshold, sizes), strict=True):
        dtype, at_once = compute_dtype(w), _rows_at_once(w)
        g, t = (torch.split(x.to(dtype).view(-1, *[1] * (w.ndim - 1)), at_once) for x in columns)
        for piece, piece_gain, bound in zip(torch.split(w, at_once), g, t, strict=True):
            x = piece.to(dtype)
            # Not clamp(x, -t, t), as torch's is slow where the bounds are tensors.
            within = torch.maximum(x, -bound)
            torch.minimum(within, bound, out=within)
            x = x.sub_(within).mul_(piece_gain)
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


def _sums(rows: Tensor) -> Tensor:
    """Sum m = |w| and m^2 over each row, shape (rows, 2).

    By way of m - mean(m): its sums may run in the weights' own precision, since V = q - mu^2 then cancels nothing.
    """
    columns = []
    for piece in split_rows(rows):
        m = piece.to(compute_dtype(piece)).flatten(1).abs()
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
        sharded = as_dtensor(w)
        for dim, placement in enumerate(sharded.placements if sharded is not None else ()):
            if placement.is_partial():
                raise ValueError(
                    f"weights of shape {tuple(w.shape)} hold pending partial sums; redistribute them first"
                )
            if sharded is not None and not placement.is_replicate() and getattr(placement, "dim", None) != 0:
                cut[sharded.device_mesh, dim].append(index)
    for (mesh, dim), indices in cut.items():
        together = torch.cat([sums[index] for index in indices])
        torch.distributed.all_reduce(together, group=mesh.get_group(dim))
        parts = torch.split(together, [len(sums[index]) for index in indices])
        for index, part in zip(indices, parts, strict=True):
            sums[index] = part
    return sums
