"""Output units whose size the network does not see, since a normalization layer stands behind them.

A unit (row) w[i] that BatchNorm follows may be multiplied by any positive number without changing the loss, so its
gradient is orthogonal to it. But pruning by magnitude does see the size. Adam lets such units shrink: once a unit is
concentrated on a few weights, nearly all of what would change its direction for the better is to make these smaller,
and Adam takes that small gradient for as large as any other. A unit that ends up far smaller than the rest of its layer
is pruned whole, however well it is concentrated.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wcr_optim.layout import local, sum_over_shards
from wcr_optim.moments import accumulator, compute_dtype
from wcr_optim.units import add_over_ranks, number_of_units, rows_of, shrink_units_, split_rows, spread, unit_moments

STEPS = 4  # gradients that are looked at; of one alone, a layer of few rows can be orthogonal to it by chance
ALIGNED = 0.2  # in units of the cosine between random directions, 1 / sqrt(n); see docs/target.md for what was measured


class ScaleInvariance:
    """Find the weights of which every row may be multiplied by any positive number without changing the loss.

    Sums over a weight's rows w_i of n elements, their gradients g_i and the first few steps decide:

        sum <w_i, g_i>^2 / sum |w_i|^2 |g_i|^2  <  0.2^2 / n,

    where rows that are not invariant have about 1 / n or more, and rows before a BatchNorm only what rounding and its
    eps leave, 1e-6 / n. The gradients of SAM belong to other weights, which leaves 0.02 / n at its usual rho. Weights
    without gradients, or with zero ones, are not called invariant.

    Source:
        The test: Heo et al., "AdamP: Slowing down the slowdown for momentum optimizers on scale-invariant weights",
        ICLR 2021, there with half the bound, for the largest cosine over rows and at every step.
    """

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._sums: dict[str, list[float]] = {}

    def undecided(self, name: str) -> bool:
        """Return whether more gradients of a weight are wanted."""
        return self._seen.get(name, 0) < STEPS

    @torch.no_grad()
    def observe(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take note of one step's gradients; they must be those at the weights as they are.

        Every rank of a distributed run must call this with the same names.

        Args:
            named: Weights with their `.grad`, those that are decided or have none among them, under names that stay.
        """
        by_device: defaultdict[torch.device, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, w in named:
            if w.grad is not None and w.grad.layout == torch.strided and w.ndim >= 2 and self.undecided(name):
                by_device[local(w).device].append((name, w))
        for own in by_device.values():
            layers = [w for _, w in own]
            for (name, w), (aligned, both) in zip(own, _alignment(layers).tolist(), strict=True):
                sums = self._sums.setdefault(name, [0.0, 0.0])
                sums[0], sums[1] = sums[0] + aligned * math.prod(w.shape[1:]), sums[1] + both
                self._seen[name] = self._seen.get(name, 0) + 1

    def holds(self, name: str) -> bool:
        """Return whether a weight was found to be invariant, False as long as that is not decided."""
        if self.undecided(name):
            return False
        aligned, both = self._sums[name]
        return aligned < ALIGNED**2 * both < math.inf

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on exactly."""
        return {
            "seen": [[name, count] for name, count in self._seen.items()],
            "sums": [[name, list(sums)] for name, sums in self._sums.items()],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`."""
        self._seen = dict(state_dict["seen"])
        self._sums = {name: list(sums) for name, sums in state_dict["sums"]}


@torch.no_grad()
def lift_units_(layers: Sequence[Tensor], least: float) -> None:
    """Enlarge, in place, the rows that hold too little energy beside the others of their weight.

        w[i] <- w[i] max(1, sqrt(least * mean_j |w[j]|^2 / |w[i]|^2))

    Rows of zeros stay zero. Nothing here waits for a device.

    Args:
        layers: Weights of any floating dtype, shape and strides, all on one device; ranks that hold parts of a DTensor
            must all call this.
        least: Share of the mean row's energy below which no row stays, in [0, 1].
    """
    if not layers:
        return
    n, _, q = unit_moments(layers)
    energy = n * q
    sizes = [number_of_units(w) for w in layers]
    sums = torch.stack([torch.stack([e.sum(), torch.full_like(e, 1.0).sum()]) for e in torch.split(energy, sizes)])
    total, rows = sum_over_shards(sums, layers).unbind(1)
    mean = spread(total / rows.clamp(min=1), layers)
    gain = (least * mean / energy).sqrt().clamp(min=1)
    gain = torch.where((energy > 0) & gain.isfinite(), gain, 1.0)
    shrink_units_(layers, gain, torch.zeros_like(gain))


def _alignment(layers: Sequence[Tensor]) -> Tensor:
    """Return sum_i <w_i, g_i>^2 and sum_i |w_i|^2 |g_i|^2 over the rows of each weight, shape (layers, 2)."""
    products = add_over_ranks([_products(local(w), local(w.grad)) for w in layers if w.grad is not None], layers)
    sums = [torch.stack([row[:, 0].square().sum(), (row[:, 1] * row[:, 2]).sum()]) for row in products]
    # What lies on several ranks is added up several times, in both sums alike.
    return sum_over_shards(torch.stack(sums), layers)


def _products(w: Tensor, g: Tensor) -> Tensor:
    """Return <w_i, g_i>, |w_i|^2 and |g_i|^2 of each row, shape (rows, 3)."""
    result = []
    for a, b in zip(split_rows(rows_of(w)), split_rows(rows_of(g)), strict=True):
        x, y = (piece.to(compute_dtype(piece)).flatten(1) for piece in (a, b))
        result.append(torch.stack([torch.linalg.vecdot(u, v) for u, v in ((x, y), (x, x), (y, y))], dim=1))
    to = accumulator(w.device)
    return torch.cat(result).to(to) if result else torch.zeros(len(w), 3, dtype=to, device=w.device)
