"""Output units whose size the network does not see, since a normalization layer stands behind them.

A unit (row) w[i] that BatchNorm follows may be multiplied by any positive number without changing the loss, so its
gradient is orthogonal to it. But pruning by magnitude does see the size. Adam lets such units shrink: once a unit is
concentrated on a few weights, nearly all of what would change its direction for the better is to make these smaller,
and Adam takes that small gradient for as large as any other. A unit that ends up far smaller than the rest of its layer
is pruned whole, however well it is concentrated.

Nor need the threshold depend on the unit. The scale-free flow's is larger where a unit's kept weights are smaller,
while Adam moves what shall stay small as far in all of them, and pruning ranks all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wcr_optim.eager_units import number_of_units, rows_at_once, rows_of
from wcr_optim.layout import as_dtensor, local, sum_over_shards
from wcr_optim.moments import Moments
from wcr_optim.precision import accumulator, compute_dtype
from wcr_optim.units import add_over_ranks, spread
from wcr_optim.uploads import upload

LEAST_ENERGY = 0.25  # of a unit, in shares of its layer's mean unit
MOST_LIFT = 1.1  # of a unit's weights in one step: what BatchNorm's running statistics bear
# Of the gradient's energy along the weights, in units of what random directions have, 1 / n: up to where a row may be
# enlarged, and up to where a layer is hidden as a whole, whose sum varies less.
ALIGNED, LAYER_ALIGNED = 1e-3, 1e-2
LEAST_ROWS = 8  # of a layer that may be hidden as a whole: a sum over one or two rows is below the line by chance
MOST_THRESHOLD = 0.5  # in units of a unit's energy-weighted mean magnitude q / mu


class Invariance(NamedTuple):
    """What the gradients tell of units whose size the loss does not see.

    Attributes:
        lifts: By what to multiply each row, shape (rows,).
        layers: Whether it holds of a layer as a whole, shape (layers,), bool.
    """

    lifts: Tensor
    layers: Tensor


@torch.no_grad()
def invariant_units(layers: Sequence[Tensor], units: Moments) -> Invariance:
    """Find layers whose rows' size the loss does not see, and by what to multiply rows there that hold little energy.

        sqrt(0.25 mean_j |w[j]|^2 / |w[i]|^2), at least 1, at most 1.1,

    for a row of n weights whose gradient g[i] is orthogonal to it,

        <w[i], g[i]>^2  <  1e-3 |w[i]|^2 |g[i]|^2 / n,

    in a layer where the same holds of the sums over rows; 1 for all others, those without a gradient among them. Rows
    before a BatchNorm are at 1e-5 / n and mostly far below, unless their outputs' variance is down at its eps; others
    at 1 / n and more, so that a single row is below the line by chance but hardly a whole layer. Gradients at other
    weights than these, such as SAM's, are seldom that orthogonal; a layer of 8 rows and more is hidden as a whole where
    the sums over its rows are below 1e-2 / n, which most layers before a BatchNorm are around SAM, too.

    Nothing here waits for a device. The ranks that hold parts of a DTensor must all call this.

    Args:
        layers: Weights of any floating dtype, shape and strides, with gradients at these weights, all on one device.
        units: Their `unit_moments`.

    Source:
        The test by orthogonality: Heo et al., "AdamP: Slowing down the slowdown for momentum optimizers on
        scale-invariant weights", ICLR 2021, there for the largest cosine over rows; the bound is ours.
    """
    products = torch.cat(add_over_ranks([_products(w) for w in layers], layers))
    energy = units.n * units.q
    aligned, both = products[:, 0].square() * units.n, energy * products[:, 1]
    by_row = torch.stack([aligned, both, energy, torch.ones_like(energy)], dim=1)
    sums = torch.stack([rows.sum(0) for rows in torch.split(by_row, [number_of_units(w) for w in layers])])
    # What lies on several ranks is added up several times, in all four sums alike.
    sums = sum_over_shards(sums, layers)
    hidden = (aligned < ALIGNED * both) & spread(sums[:, 0] < ALIGNED * sums[:, 1], layers)
    lift = (LEAST_ENERGY * spread(sums[:, 2] / sums[:, 3], layers) / energy).sqrt().clamp(1.0, MOST_LIFT)
    many = upload(tuple([int(w.ndim > 0 and w.shape[0] >= LEAST_ROWS) for w in layers]), sums.dtype, sums.device)
    return Invariance(torch.where(hidden & lift.isfinite(), lift, 1.0), sums[:, 0] < many * LAYER_ALIGNED * sums[:, 1])


@torch.no_grad()
def one_threshold(layers: Sequence[Tensor], units: Moments, threshold: Tensor, s: Tensor) -> Tensor:
    """Return one threshold for all units of all layers: the geometric mean of their own, a weight counting as one.

        min(s[i] exp(mean_j ln(threshold[j] / s[j])), q[i] / (2 mu[i]))

    Units keep the ratio of their step lengths, and a threshold of 0 stays one.

    Nothing here waits for a device. The ranks that hold parts of a DTensor must all call this.

    Args:
        layers: Weights, all on one device.
        units: Their `unit_moments`.
        threshold: What the penalty's flow gives each unit, shape (rows,).
        s: Step lengths of the flow, shape (rows,).

    """
    driven = threshold > 0
    logarithms = torch.where(driven, threshold / s, 1.0).log()
    # Each rank counts the weights that lie here, so that rows which are cut count once, as all others do.
    sizes = [number_of_units(w) for w in layers]
    lengths = tuple([local(w).numel() // max(size, 1) for w, size in zip(layers, sizes, strict=True)])
    weights = spread(upload(lengths, threshold.dtype, threshold.device), layers) * driven
    by_row = torch.stack([logarithms * weights, weights], dim=1)
    sums = sum_over_shards(torch.stack([rows.sum(0) for rows in torch.split(by_row, sizes)]), layers).sum(0)
    common = s * (sums[0] / sums[1]).exp()
    return torch.where(driven, common.minimum(MOST_THRESHOLD * units.q / units.mu), threshold)


def _products(w: Tensor) -> Tensor:
    """Return <w[i], g[i]> and |g[i]|^2 of each row that lies here, zeros where no gradient lies beside it."""
    part, gradient = local(w), _gradient(w)
    if gradient is None or not part.numel():
        return torch.zeros(number_of_units(w), 2, dtype=accumulator(part.device), device=part.device)
    result = []
    both = rows_of(part), rows_of(gradient)  # of two dtypes, maybe, so that each would be cut in its own way
    at_once = rows_at_once(both[0])
    for rows, of_gradient in zip(*(torch.split(x, at_once) for x in both), strict=True):
        x, g = (piece.to(compute_dtype(piece)).flatten(1) for piece in (rows, of_gradient))
        result.append(torch.stack([(x * g).sum(1), (g * g).sum(1)], dim=1))
    return torch.cat(result).to(accumulator(part.device))


def _gradient(w: Tensor) -> Tensor | None:
    """Return this rank's part of the gradient, None if it is sparse or lies over the ranks in another way."""
    if w.grad is None or w.grad.layout != torch.strided:
        return None
    weight, gradient = as_dtensor(w), as_dtensor(w.grad)
    if weight is not None and (gradient is None or gradient.placements != weight.placements):
        return None
    return local(w.grad)
