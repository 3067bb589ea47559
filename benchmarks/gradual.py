"""Gradual magnitude pruning during training (Zhu & Gupta 2017): what training with masks reaches, as a yardstick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from wcr_optim import pruning

UPDATES = 50
"""How often the masks are chosen anew."""


class GradualPruning:
    """Prune more and more of a network while it trains.

    The sparsity at step t of T is s (1 - (1 - t / (0.75 T))^3), s from 0.75 T on; masks are chosen by global magnitude
    50 times on the way and applied after every step of the optimizer. A weight once masked stays at zero, as in the
    source, where no gradient reaches it.

    Args:
        model: The network.
        sparsity: The sparsity s at the end, in (0, 1).
        steps: Steps T of the run.
        exclude: What stays dense, as in `pruning.magnitude_masks` (default: ())

    Source:
        Zhu & Gupta, "To prune, or not to prune", 2017, equation 1, with an initial sparsity of 0.
    """

    def __init__(self, model: nn.Module, sparsity: float, steps: int, exclude: Sequence[str] = ()) -> None:
        self.model, self.sparsity, self.exclude = model, sparsity, exclude
        self.ramp = max(1, round(0.75 * steps))
        self.done = 0
        self.masks: pruning.Masks | None = None

    def step(self, loss: Any = None) -> None:
        """Take note of one step of the optimizer and apply the masks."""
        self.done += 1
        if self.masks is not None:  # before they are chosen anew: what momentum made of a masked weight is no magnitude
            pruning.apply_(self.model, self.masks)
        every = max(1, self.ramp // UPDATES)
        if self.done <= self.ramp and (self.done % every == 0 or self.done == self.ramp):
            now = self.sparsity * (1 - (1 - self.done / self.ramp) ** 3)
            self.masks = pruning.magnitude_masks(self.model, now, exclude=self.exclude)
            pruning.apply_(self.model, self.masks)
