"""What the integrations share: which numbers are logged, under which names, and pruning for a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from wcr_optim import metrics
from wcr_optim.parameters import Selector
from wcr_optim.pruning import applied, magnitude_masks, recalibrate_batchnorm
from wcr_optim.pruning.batchnorm import statistics_restored
from wcr_optim.pruning.search import check_sparsity
from wcr_optim.pruning.threshold import Scope
from wcr_optim.sharpness.checks import check_count
from wcr_optim.target import SparsityTarget

__all__ = ["check_count", "check_sparsities", "concentration_values", "metric_at", "pruned", "target_values"]


def concentration_values(
    model: nn.Module,
    exclude: Iterable[Selector] | Selector = (),
    *,
    per_layer: bool = False,
    prefix: str = "concentration/",
) -> dict[str, float]:
    """Measure how concentrated a model's prunable weights are, as numbers that a logger takes.

    Args:
        model: The model.
        exclude: Which weights to leave out, as in `wcr_optim.pruning.prunable_weights` (default: ())
        per_layer: Whether to give every layer's numbers beside the total's (default: False)
        prefix: What the names begin with (default: "concentration/")

    Returns:
        By name: ``top_1%``, ``top_5%`` and ``top_10%``, the shares of the energy in so many of the weights; ``gini``;
        ``effective_share``, the effective number of weights over their number; and ``lossless_sparsity``, see
        `wcr_optim.metrics.LayerConcentration`. A layer's names have ``/`` and its name behind them.
    """
    found = metrics.concentration(model, exclude=exclude)
    values = {}
    for row in (found.total, *(found.layers if per_layer else ())):
        suffix = "" if row is found.total else f"/{row.name}"
        numbers = {f"top_{100 * share:g}%": energy for share, energy in row.top.items()}
        numbers["gini"] = row.gini
        numbers["effective_share"] = row.effective_weights / max(row.weights, 1)
        numbers["lossless_sparsity"] = row.lossless_sparsity
        values.update({f"{prefix}{name}{suffix}": number for name, number in numbers.items()})
    return values


def target_values(target: SparsityTarget, prefix: str = "sparsity_target/") -> dict[str, float]:
    """Return what a target measured last, as numbers that a logger takes: ``tail``, ``wanted_tail``, ``strength``."""
    if not target.history:
        return {}
    _, tail, wanted, strength, _ = target.history[-1]
    return {f"{prefix}tail": tail, f"{prefix}wanted_tail": wanted, f"{prefix}strength": strength}


def metric_at(name: str, sparsity: float) -> str:
    """Return the name of a metric of the pruned model: ``loss`` at 0.95 is ``loss_at_0.95``."""
    return f"{name}_at_{sparsity:g}"


def check_sparsities(sparsities: Sequence[float]) -> tuple[float, ...]:
    """Return sparsities as given, or raise ValueError unless there are some and each lies in [0, 1]."""
    checked = tuple(check_sparsity(sparsity) for sparsity in sparsities)
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
