"""Following a training loss without waiting for it: its smoothed course, its best, and how far it is above that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wcr_optim.layout import as_dtensor
from wcr_optim.precision import accumulator

SMOOTHING = 0.2  # weight of the newest window
CONFIDENCE = 2.0  # standard errors that count as noise
# Without a cost given, the loss may give back most of what training gained, where that is much of what the loss was at
# the start; else, as in fine-tuning, it may rise by as much as it was at the start.
OF_THE_GAIN, MUCH = 0.8, 0.25
SETTLING = 10  # windows in which a rise is put down to the start of training: the penalty is still weak then


class LossTrend:
    """A training loss, averaged over windows of steps and smoothed over windows.

    Attributes:
        smooth: The smoothed loss; NaN before the first window.
        best: The lowest it has been.
        first: The largest mean of the first windows, as one batch, which the first window is, may be an easy one.
        noise: Variance of a window's mean around the smoothed loss, when that was at its best.
    """

    def __init__(self) -> None:
        self.smooth = self.best = self.first = math.nan
        self.noise = 0.0
        self._squares, self._windows = 0.0, 0
        self._sum: float | Tensor = 0.0
        self._count: int | Tensor = 0

    def add(self, loss: float | Tensor, device: torch.device | None = None) -> None:
        """Add a step's loss to the window; a tensor stays on its device.

        In a distributed run it is averaged over the ranks at once, not with the window: else ranks would see different
        costs and drive replicas apart, and a checkpoint within a window would hold one rank's part of it.

        Args:
            loss: One number.
            device: Where ranks exchange it, the weights' device; None is the CPU (default: None).

        Raises:
            TypeError: If it is no real number.
            ValueError: If it is several.
        """
        if isinstance(loss, np.ndarray):
            loss = torch.from_numpy(loss)
        if isinstance(loss, Tensor):
            sharded = as_dtensor(loss)  # as under loss_parallel()
            loss = loss if sharded is None else sharded.full_tensor()
            if loss.numel() != 1:
                raise ValueError(f"loss must be one number, got a tensor of shape {tuple(loss.shape)}; reduce it first")
            if loss.is_complex():
                raise TypeError(f"loss must be a real number, got a tensor of {loss.dtype}; reduce it first")
            loss = loss.detach().reshape(()).to(accumulator(loss.device))
        elif isinstance(loss, Real):
            loss = float(loss)
        else:
            raise TypeError(f"loss must be a real number or a tensor of one, got {loss!r}")
        loss = _over_ranks(loss, device or torch.device("cpu"))
        # A NaN, as of a batch without labels, tells nothing and shall not hide what the window's other steps tell.
        if isinstance(loss, Tensor):
            told = ~loss.isnan()
            self._sum = self._sum + torch.where(told, loss, 0.0)
            self._count = self._count + told
        elif not math.isnan(loss):
            self._sum, self._count = self._sum + loss, self._count + 1

    def window(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Close the window: return its mean, NaN if it is empty; shape ()."""
        if isinstance(self._sum, Tensor):
            total = self._sum.to(device, dtype)
        else:  # a number travels in the kernel's arguments, where a copy of it would be waited for
            total = torch.full((), self._sum, dtype=dtype, device=device)
        count = self._count if isinstance(self._count, Tensor) else torch.full_like(total, self._count)
        mean = total / count.to(device, dtype)
        self._sum, self._count = 0.0, 0
        return mean

    def update(self, mean: float) -> float:
        """Take a window's mean in; return how far the smoothed loss is above its best, noise taken off.

        Returns:
            0 if the mean is NaN because there was no loss, or none but NaN; infinity if the loss is infinite.
        """
        if math.isnan(mean):
            return 0.0
        if math.isinf(mean):  # before all else: what is above infinity would never be found out
            return math.inf
        if math.isnan(self.smooth):
            self.smooth = self.best = self.first = mean
            return 0.0
        difference = mean - self.smooth
        self._squares += SMOOTHING * (difference * difference - self._squares)  # a power would raise OverflowError
        self._windows += 1
        if self._windows <= SETTLING:
            self.first = max(self.first, mean)
        self.smooth += SMOOTHING * difference
        if self.smooth <= self.best or self._windows <= SETTLING:  # the noise of before a rise: the rise itself is none
            self.best, self.noise = self.smooth, self._squares / (1 - (1 - SMOOTHING) ** self._windows)
        error = math.sqrt(self.noise * SMOOTHING / (2 - SMOOTHING))
        return max(self.smooth - self.best - CONFIDENCE * error, 0.0)

    def allowed(self, max_cost: float | None) -> float:
        """Return how far the loss may be above its best: what was given, else what would undo the training."""
        if max_cost is not None:
            return max_cost
        gain, start = self.first - self.best, abs(self.first)
        return OF_THE_GAIN * gain if gain > MUCH * start else start

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers."""
        return {
            "smooth": self.smooth,
            "best": self.best,
            "first": self.first,
            "noise": self.noise,
            "squares": self._squares,
            "windows": self._windows,
            "sum": float(self._sum),
            "count": int(self._count),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.smooth, self.best, self.first = state_dict["smooth"], state_dict["best"], state_dict["first"]
        self.noise, self._squares, self._windows = state_dict["noise"], state_dict["squares"], state_dict["windows"]
        self._sum, self._count = state_dict["sum"], state_dict["count"]


def _over_ranks(loss: float | Tensor, device: torch.device) -> float | Tensor:
    """Average a loss over all ranks of a distributed run, without waiting for a device."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return loss
    ranks = torch.distributed.get_world_size()
    if ranks == 1:
        return loss
    # On the weights' device: NCCL moves nothing that lies on the CPU.
    mean = torch.as_tensor(loss, device=device).to(accumulator(device), copy=True)
    torch.distributed.all_reduce(mean)
    return mean / ranks
