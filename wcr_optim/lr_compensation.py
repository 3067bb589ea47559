"""Make up in the base's learning rate for the density that concentrated weights have lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wcr_optim.moments import Moments
from wcr_optim.strength import Strengths
from wcr_optim.wrapper import LR_FACTOR

# By base: around one whose updates have a size of their own, such as Adam, and around SGD, whose have the gradient's.
NORMALIZED, PLAIN = 1.0, 0.25
UNCONDITIONAL = 0.5  # exponent up to which the loss has no say: it keeps the angle by which a unit turns
RISE, EASE, FALL = 1.1, 0.9, 0.8  # of a factor, at most: loss falls, loss does not, loss is not well
EVEN = 2 / math.pi  # effective density of Gaussian weights: none that starts denser has more to lose


class LrCompensation:
    """The factor of each driven group's lr in the base's update, which rises as the group's weights lose density.

        (density at the start / density now) ^ exponent,    at least 1, at most (1 / (1 - sparsity)) ^ exponent

    with density = mu^2 / q in the geometric mean over the group's layers; `SparsityTarget` says when less of it.

    Args:
        strengths: The groups.
        sparsity: That the weights shall be pruned to: calls for a factor of 1 / (1 - sparsity) at most.
        exponent: Of the density, in [0, 1]; 0 touches nothing. Another may be set later, but not from or to 0.
    """

    def __init__(self, strengths: Strengths, sparsity: float, exponent: float) -> None:
        self._strengths, self._most, self.exponent = strengths, 1 / (1 - sparsity), exponent
        self._first_density: dict[int, float] = {}  # of each group
        self._undoes = False
        for index in strengths.driven() if exponent else ():
            self._set(index, 1.0)  # from the start: a checkpoint loaded through a template finds a place

    def values(self) -> list[float]:
        """Return every group's present factor."""
        return [float(group.get(LR_FACTOR, 1.0)) for group in self._strengths.groups]

    def update(self, layers: Moments, groups: Sequence[int], *, well: bool, falling: bool) -> None:
        """Move the factors towards what the density calls for.

        Args:
            layers: Moments of layers.
            groups: The group of each.
            well: Whether the loss is near its best; where it is not, the factors fall, since they may be the reason.
            falling: Whether the loss falls; where it does not, exponents above 1/2 count as 1/2.

        """
        if not self.exponent:
            return
        # A mean of logarithms: a group has one lr, and layers that stay dense bear no factor that sparse ones call for.
        densities = layers.mu.square() / layers.q
        logarithms = torch.where((densities > 0) & densities.isfinite(), densities, math.nan).log()
        for index in dict.fromkeys(groups):
            density = math.exp(float(logarithms[[i for i, group in enumerate(groups) if group == index]].nanmean()))
            if math.isnan(density):
                continue  # nothing but NaN, zeros or overflow
            first = self._first_density.setdefault(index, min(density, EVEN))
            lost = min(max(first / density, 1.0), self._most)
            wanted, least = lost**self.exponent, lost ** min(self.exponent, UNCONDITIONAL)
            present = float(self._strengths.groups[index].get(LR_FACTOR, 1.0))
            if not well:
                factor = min(wanted, FALL * present)
            elif falling:
                factor = min(wanted, RISE * present)
            else:
                factor = max(min(wanted, EASE * present), min(least, RISE * present))
            self._set(index, max(factor, 1.0))

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs, in lists of numbers."""
        return {"first_density": [list(pair) for pair in self._first_density.items()], "lr_factors": self.values()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state, that of an earlier version without compensation too."""
        self._first_density = dict(state_dict.get("first_density", ()))
        factors = state_dict.get("lr_factors", ())
        # What an exponent had raised, nothing would move again. The optimizer's own state may come after this one.
        self._undoes = not self.exponent and bool(self._first_density)
        for index in self._strengths.driven():
            if index < len(factors) and (self.exponent or LR_FACTOR in self._strengths.groups[index]):
                self._set(index, 1.0 if self._undoes else factors[index])

    def undo(self) -> None:
        """Without an exponent, take back once more what the state that was loaded had raised."""
        for index in self._strengths.driven() if self._undoes else ():
            self._set(index, 1.0)
        self._undoes = False

    def _set(self, index: int, factor: float) -> None:
        present = self._strengths.groups[index].get(LR_FACTOR, 1.0)
        if isinstance(present, Tensor):
            present.fill_(factor)
        else:
            self._strengths.groups[index][LR_FACTOR] = factor


def follows_the_gradient(optimizer: Optimizer) -> bool:
    """Say whether the updates of the optimizer at the end of a chain have the gradient's size, and none of their own.

    SGD's do, known by the name of any of its classes.
    """
    return any("SGD" in name and "Sign" not in name for name in _kinds(optimizer))


def usual_exponent(optimizer: Optimizer) -> float:
    """Return the exponent for the optimizer at the end of a chain."""
    if "LBFGS" in _kinds(optimizer):
        return 0.0  # a quasi-Newton step finds its own length
    return PLAIN if follows_the_gradient(optimizer) else NORMALIZED


def _kinds(optimizer: Optimizer) -> list[str]:
    """Return the names of the classes that the optimizer at the end of the chain is of."""
    below: Any = optimizer
    while below is not None:
        optimizer = below
        # A wrapper of ours, what ZeroRedundancyOptimizer runs on each rank, or what Accelerate has prepared.
        below = next((getattr(below, name) for name in ("base", "optim", "optimizer") if hasattr(below, name)), None)
    return [kind.__name__ for kind in type(optimizer).__mro__]
