"""Output units whose size the network does not see, since a normalization layer stands behind them.

A unit (row) w[i] that BatchNorm follows may be multiplied by any positive number without changing the loss, so its
gradient is orthogonal to it. But pruning by magnitude does see the size. Adam lets such units shrink: once a unit is
concentrated on a few weights, nearly all of what would change its direction for the better is to make these smaller,
and Adam takes that small gradient for as large as any other. A unit that ends up far smaller than the rest of its layer
is pruned whole, however well it is concentrated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wcr_optim.layout import as_dtensor, local, sum_over_shards
from wcr_optim.moments import Moments, accumulator, compute_dtype
from wcr_optim.units import add_over_ranks, number_of_units, rows_of, split_rows, spread

LEAST_ENERGY = 0.25  # of a unit, in shares of its layer's mean unit
MOST_LIFT = 1.1  # of a unit's weights in one step: what BatchNorm's running statistics bear
ALIGNED = 1e-3  # of the gradient's energy along the weights, in units of what random directions have, 1 / n


@torch.no_grad()
def lifts(layers: Sequence[Tensor], units: Moments) -> Tensor:
    """Return by what to multiply the rows that hold little energy beside their layer, where the loss does not see it.

        sqrt(0.25 mean_j |w[j]|^2 / |w[i]|^2), at least 1, at most 1.1,

    for a row of n weights whose gradient g[i] is orthogonal to it,

        <w[i], g[i]>^2  <  1e-3 |w[i]|^2 |g[i]|^2 / n,

    in a layer where the same holds of the sums over rows; 1 for all others, those without a gradient among them. Rows
    before a BatchNorm are at 1e-5 / n and mostly far below, unless their outputs' variance is down at its eps; others
    at 1 / n and more, so that a single row is below the line by chance but hardly a whole layer. Gradients at other
    weights than these, such as SAM's, are seldom orthogonal enough.

    Nothing here waits for a device. The ranks that hold parts of a DTensor must all call this.

    Args:
        layers: Weights of any floating dtype, shape and strides, with gradients at these weights, all on one device.
        units: Their `unit_moments`.

    Returns:
        Factors, shape (rows,).

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
    of_layer = [spread(column, layers) for column in sum_over_shards(sums, layers).unbind(1)]
    hidden = (aligned < ALIGNED * both) & (of_layer[0] < ALIGNED * of_layer[1])
    lift = (LEAST_ENERGY * of_layer[2] / of_layer[3] / energy).sqrt().clamp(1.0, MOST_LIFT)
    return torch.where(hidden & lift.isfinite(), lift, 1.0)


def _products(w: Tensor) -> Tensor:
    """Return <w[i], g[i]> and |g[i]|^2 of each row that lies here, zeros where no gradient lies beside it."""
    part, gradient = local(w), _gradient(w)
    if gradient is None or not part.numel():
        return torch.zeros(number_of_units(w), 2, dtype=accumulator(part.device), device=part.device)
    result = []
    for rows, of_gradient in zip(split_rows(rows_of(part)), split_rows(rows_of(gradient)), strict=True):
        x, g = (piece.to(compute_dtype(piece)).flatten(1) for piece in (rows, of_gradient))
        result.append(torch.stack([torch.linalg.vecdot(x, g), torch.linalg.vecdot(g, g)], dim=1))
    return torch.cat(result).to(accumulator(part.device))


def _gradient(w: Tensor) -> Tensor | None:
    """Return this rank's part of the gradient, None if it is sparse or lies over the ranks in another way."""
    if w.grad is None or w.grad.layout != torch.strided:
        return None
    weight, gradient = as_dtensor(w), as_dtensor(w.grad)
    if weight is not None and (gradient is None or gradient.placements != weight.placements):
        return None
    return local(w.grad)
