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

from wcr_optim import backends, eager_units
from wcr_optim.eager_units import energy_gain, number_of_units
from wcr_optim.layout import as_dtensor, local
from wcr_optim.moments import Moments
from wcr_optim.precision import accumulator
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
        sums = eager_units.unit_sums(parts, threshold, cutoff)
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
        eager_units.shrink_units_(parts, gain, threshold, seed, cutoff)
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
        eager_units.shrink_units_([local(w) for w in layers], lift, threshold, seed, cutoff, energy=units.n * units.q)
        return
    left = _unit_sums(layers, backend, threshold, cutoff)[:, 1]
    # 1 without a threshold, whatever rounding makes of the sums, and NaN where it is NaN, which would leave zeros.
    gain = torch.where(threshold > 0, energy_gain(units.n * units.q, left), 1.0 + threshold)
    shrink_units_(layers, gain * lift, threshold, cutoff=cutoff, seed=seed, backend=backend)


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
