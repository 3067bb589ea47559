"""What the integrations share: which numbers are logged, under which names, and pruning for a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from wcr_optim.checks import check_count
from wcr_optim.metrics import optimizer_concentration
from wcr_optim.parameters import Selector
from wcr_optim.pruning import applied, magnitude_masks, recalibrate_batchnorm
from wcr_optim.pruning.batchnorm import statistics_restored
from wcr_optim.pruning.search import check_sparsity
from wcr_optim.pruning.threshold import Scope
from wcr_optim.target import SparsityTarget

__all__ = ["check_count", "check_sparsities", "concentration_values", "metric_at", "pruned", "target_values"]


def concentration_values(optimizer: Optimizer, prefix: str = "concentration/") -> dict[str, float]:
    """Measure how concentrated the weights under a penalty are, as numbers that a logger takes.

    Args:
        optimizer: An optimizer with a decoupled penalty in its chain.
        prefix: What the names begin with (default: "concentration/")

    Returns:
        ``mean``, ``min`` and ``max`` over the layers of `wcr_optim.metrics.optimizer_concentration`, by one copy from
        the device.

    Raises:
        ValueError: If there is no penalty in the chain.
    """
    layers = optimizer_concentration(optimizer)
    mean, least, most = torch.stack([layers.mean(), layers.min(), layers.max()]).tolist()
    return {f"{prefix}mean": mean, f"{prefix}min": least, f"{prefix}max": most}


def target_values(target: SparsityTarget, prefix: str = "sparsity_target/") -> dict[str, float]:
    """Return what a target measured last, as numbers that a logger takes.

    Args:
        target: The target.
        prefix: What the names begin with (default: "sparsity_target/")

    Returns:
        ``tail``, ``wanted_tail``, and the largest ``strength`` and ``lr_factor`` of the groups; nothing before the
        first measurement.
    """
    if not target.history:
        return {}
    _, tail, wanted, strength, _ = target.history[-1]
    factor = max(target.lr_factors())
    values = {"tail": tail, "wanted_tail": wanted, "strength": strength, "lr_factor": factor}
    return {f"{prefix}{name}": value for name, value in values.items()}


def metric_at(name: str, sparsity: float) -> str:
    """Return the name of a metric of the pruned model: ``loss`` at 0.95 is ``loss_at_0.95``."""
    return f"{name}_at_{sparsity:g}"


def check_sparsities(sparsities: Sequence[float]) -> tuple[float, ...]:
    """Return sparsities as given, or raise ValueError unless there are some and each lies in [0, 1].

    Raises TypeError if they are no sequence of numbers.
    """
    try:
        given = tuple(sparsities)
    except TypeError as error:
        raise TypeError(
            f"sparsities must be a sequence of numbers, got {sparsities!r}; for one sparsity write ({sparsities!r},)"
        ) from error
    checked = tuple(check_sparsity(sparsity) for sparsity in given)
    if not checked:
        raise ValueError("sparsities must name at least one sparsity to evaluate at")
    return checked


@contextmanager
def pruned(
    model: nn.Module,
    sparsity: float,
    scope: Scope = "global",
    exclude: Iterable[Selector] | Selector = (),
    calibration: Iterable[Any] | None = None,
) -> Iterator[None]:
    """Prune a model by magnitude for a block, and have it as before afterwards, bit for bit.

    Args:
        model: The model.
        sparsity: Share of the prunable weights to prune, in [0, 1].
        scope: As in `wcr_optim.pruning.magnitude_masks` (default: "global")
        exclude: Layers to leave dense (default: ())
        calibration: Batches to estimate the running statistics of norm layers with meanwhile; None leaves the
            statistics as they are (default: None)
    """
    masks = magnitude_masks(model, sparsity, scope, exclude=exclude)
    with statistics_restored(model), applied(model, masks):
        if calibration is not None:
            recalibrate_batchnorm(model, calibration)
        yield
