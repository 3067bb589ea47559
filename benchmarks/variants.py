"""Other ways to apply a penalty, to measure what the library's own way is worth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wcr_optim.moments import moments
from wcr_optim.penalties import Penalty
from wcr_optim.wrapper import OptimizerWrapper

SMOOTHING = 1e-8
OPTION = "weight_concentration"


class InLoss(OptimizerWrapper):
    """Add the penalty's gradient to the loss's, so that momentum and Adam's moments see both; no step of its own.

    Args:
        base: The optimizer to wrap.
        penalty: Whose value is differentiated, with magnitudes sqrt(w^2 + 1e-8).
        strength: What the value is multiplied by.
    """

    def __init__(self, base: Optimizer, penalty: Penalty, strength: float) -> None:
        self.penalty = penalty
        super().__init__(base, **{OPTION: strength})

    def update(self) -> None:
        """Add to the gradients, then let the base update."""
        for w, gradient, group in self._gradients():
            assert w.grad is not None
            w.grad.add_(gradient, alpha=group[OPTION])
        super().update()

    def _gradients(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for w in group["params"]:
                if group[OPTION] and w.grad is not None and w.ndim >= self.penalty.min_ndim:
                    with torch.enable_grad():
                        value = self.penalty.value(moments([w], smoothing=SMOOTHING)).sum()
                        (gradient,) = torch.autograd.grad(value, w)
                    yield w, gradient, group


class ExplicitStep(InLoss):
    """Take one explicit gradient step of length lr * strength on the penalty, decoupled, instead of its exact flow."""

    def update(self) -> None:
        """Step on the penalty, then let the base update."""
        for w, gradient, group in self._gradients():
            w.sub_(gradient, alpha=group["lr"] * group[OPTION])
        OptimizerWrapper.update(self)


class Window:
    """Apply a penalty during a part of the run only.

    Args:
        optimizer: The optimizer with the penalty.
        option: The penalty's key in the groups.
        steps: Of the run.
        start: Share of the run at which the penalty sets in (default: 0.0)
        end: Share of the run at which it ends (default: 1.0)
    """

    def __init__(self, optimizer: Optimizer, option: str, steps: int, start: float = 0.0, end: float = 1.0) -> None:
        self.optimizer, self.option = optimizer, option
        self.first, self.last = start * steps, end * steps
        self.strengths = [group[option] for group in optimizer.param_groups]
        self.done = 0
        self._set()

    def step(self, loss: Any = None) -> None:
        """Take note of one step of the optimizer."""
        self.done += 1
        self._set()

    def _set(self) -> None:
        inside = self.first <= self.done < self.last
        for group, strength in zip(self.optimizer.param_groups, self.strengths, strict=True):
            group[self.option] = strength if inside else 0.0
