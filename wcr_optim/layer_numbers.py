"""The few numbers that a step needs of every layer: a penalty's gain and threshold, an optimizer's coefficients.

With torch's operations, on any device; `layer_kernels` has the same in one launch each, and `implementation` knows
which of the two a backend takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from wcr_optim.moments import Moments
from wcr_optim.penalties import Penalty


def flow(penalty: Penalty, moments: Moments, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return a penalty's (gain, threshold) of every layer for step lengths s, shape (layers,)."""
    return penalty.flow(moments, s)


def adamw_coefficients(
    gain: Tensor,
    threshold: Tensor,
    steps: Sequence[Tensor],
    lr: float | Tensor,
    weight_decay: float,
    betas: tuple[float, float],
) -> Tensor:
    """Return (gain, threshold, 1 - lr weight_decay, lr / (1 - beta1^t), (1 - beta2^t)^(-1/2)) of every layer.

    Args:
        gain: Of the layers, shape (layers,).
        threshold: Of the layers, shape (layers,).
        steps: Each layer's number of steps t, of shape (), this one included.
        lr: The group's.
        weight_decay: The group's.
        betas: The group's.

    Returns:
        Coefficients in float32, shape (layers, 5).

    """
    t = torch.stack(list(steps)).to(gain.device, gain.dtype)
    decay = torch.ones_like(t) - lr * weight_decay
    columns = [gain, threshold, decay, lr / (1 - betas[0] ** t), (1 - betas[1] ** t).rsqrt()]
    return torch.stack(columns, dim=1).float()


def sgd_coefficients(gain: Tensor, threshold: Tensor, lr: float | Tensor) -> Tensor:
    """Return (gain, threshold, lr) of every layer in float32, shape (layers, 3)."""
    return torch.stack([gain, threshold, torch.ones_like(gain) * lr], dim=1).float()


class Implementation(Protocol):
    """What works on layers' numbers: this module, or `layer_kernels`."""

    def flow(self, penalty: Penalty, moments: Moments, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return a penalty's gain and threshold of every layer."""
        ...

    def adamw_coefficients(
        self,
        gain: Tensor,
        threshold: Tensor,
        steps: Sequence[Tensor],
        lr: float | Tensor,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> Tensor:
        """Return what a fused AdamW step needs, shape (layers, 5)."""
        ...

    def sgd_coefficients(self, gain: Tensor, threshold: Tensor, lr: float | Tensor) -> Tensor:
        """Return what a fused SGD step needs, shape (layers, 3)."""
        ...


def implementation(backend: str) -> Implementation:
    """Return the module that a backend takes: with kernels where launches would cost more than they do."""
    module: Implementation = import_module("wcr_optim.layer_kernels" if backend == "triton" else __name__)
    return module
