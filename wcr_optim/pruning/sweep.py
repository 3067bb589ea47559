"""A model's metrics at many sparsities."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wcr_optim.files import written_whole
from wcr_optim.layout import as_dtensor, local
from wcr_optim.parameters import unwrapped
from wcr_optim.pruning.apply import check_writable, weights_restored
from wcr_optim.pruning.batchnorm import Forward, recalibrate_batchnorm, statistics_restored
from wcr_optim.pruning.modes import evaluation_mode
from wcr_optim.pruning.patterns import slabs
from wcr_optim.pruning.search import check_sparsity
from wcr_optim.pruning.select import Selection, selected, weight_cuts, weight_keepers
from wcr_optim.pruning.shards import own_part, whole
from wcr_optim.pruning.threshold import Keeper, Scope
from wcr_optim.tables import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Evaluate = Callable[[nn.Module], "float | Mapping[str, float]"]


@dataclass(frozen=True)
class SweepRow:
    """A model's metrics at one sparsity.

    Attributes:
        sparsity: The sparsity asked for.
        pruned: Number of pruned weights.
        total: Number of prunable weights.
        metrics: What ``evaluate`` returned; a plain number is called ``"score"``.
    """

    sparsity: float
    pruned: int
    total: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class SweepResult:
    """A model's metrics at many sparsities, in the order in which they were asked for.

    Attributes:
        rows: One per sparsity.
        scope: ``"global"`` or ``"layer"``.
        recalibrated: Whether the running statistics were estimated anew at every sparsity.
    """

    rows: tuple[SweepRow, ...]
    scope: Scope
    recalibrated: bool

    @property
    def sparsities(self) -> list[float]:
        """The sparsities asked for."""
        return [row.sparsity for row in self.rows]

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, in the order in which they first appeared."""
        return list(dict.fromkeys(name for row in self.rows for name in row.metrics))

    def values(self, metric: str | None = None) -> list[float]:
        """Return one metric at every sparsity.

        Args:
            metric: Its name; None stands for the first one (default: None)
        """
        name = self.metrics[0] if metric is None else metric
        return [row.metrics[name] for row in self.rows]

    def table(self) -> str:
        """Return the result as readable text, one line per sparsity."""
        names = self.metrics
        head = ["sparsity", "kept", *names]
        body = [
            [f"{100 * row.sparsity:g} %", f"{row.total - row.pruned:,}"]
            + [f"{row.metrics[name]:.4g}" if name in row.metrics else "" for name in names]
            for row in self.rows
        ]
        return aligned([head, *body], left=())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the result as CSV: sparsity, pruned, total and one column per metric, in full precision.

        Args:
            path: Where to; an existing file is replaced, completely or not at all.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["sparsity", "pruned", "total", *self.metrics])
        for row in self.rows:
            writer.writerow(
                [row.sparsity, row.pruned, row.total, *(row.metrics.get(name, "") for name in self.metrics)]
            )
        with written_whole(path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8", newline="")

    def plot(
        self,
        path_or_ax: str | os.PathLike[str] | Axes | None = None,
        *,
        metric: str | None = None,
        label: str = "model",
    ) -> Axes:
        """Draw one metric over the share of pruned weights.

        For several models in one figure see `wcr_optim.plots.sparsity_accuracy`.

        Args:
            path_or_ax: A file to save the figure to, or matplotlib axes to draw on (default: None)
            metric: Which metric to draw; None stands for the first one (default: None)
            label: The curve's name in the legend (default: "model")

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from wcr_optim import plots  # brings matplotlib, an extra

        if isinstance(path_or_ax, (str, os.PathLike)):
            return plots.sparsity_accuracy({label: self}, path_or_ax, metric=metric)
        return plots.sparsity_accuracy({label: self}, ax=path_or_ax, metric=metric)

    def __str__(self) -> str:
        return self.table()


def sweep(
    model: nn.Module,
    evaluate: Evaluate,
    sparsities: Sequence[float],
    scope: Scope = "global",
    calibration: Iterable[Any] | None = None,
    *,
    exclude: Selection = (),
    include: Selection | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> SweepResult:
    """Evaluate a model pruned by magnitude to each of many sparsities.

    All thresholds come from the same passes over the weights. The model is evaluated in evaluation mode. After every
    evaluation, and after an exception, it is as before: the prunable weights bit for bit, the running statistics of
    norm layers (``evaluate`` may estimate them anew itself), training flags. What ``evaluate`` changes beyond these
    stays changed.

    Args:
        model: The model.
        evaluate: Called with the pruned model; returns a number or several by name.
        sparsities: Shares of the prunable weights to prune, each in [0, 1]; 0 evaluates the dense model.
        scope: As in `magnitude_masks` (default: "global")
        calibration: Batches to estimate running statistics with at every sparsity, as `recalibrate_batchnorm` takes
            them; None leaves the statistics as they are (default: None)
        exclude: Layers to leave dense (default: ())
        include: Prune only these; None stands for all prunable weights (default: None)
        forward: How to run a calibration batch, as in `recalibrate_batchnorm` (default: None)
        progress: Show a progress bar. None shows one on a terminal, when tqdm is installed and it takes more than two
            seconds (default: None)

    Returns:
        The metrics at each sparsity.

    Raises:
        ValueError: If there are no sparsities or one lies outside [0, 1], if ``evaluate`` returns no metrics, and as
            `magnitude_masks`.
        ImportError: If progress is True and tqdm is not installed.

    Example:
        >>> result = sweep(model, accuracy, [0, 0.5, 0.9, 0.95], calibration=train_batches)
        >>> print(result.table())
    """
    if not isinstance(sparsities, Iterable):
        raise TypeError(f"sparsities must be a sequence of numbers, got {sparsities!r}")
    sparsities = [check_sparsity(sparsity) for sparsity in sparsities]
    if not sparsities:
        raise ValueError("sparsities must name at least one sparsity to evaluate at")
    plain = unwrapped(model)
    weights = selected(plain, exclude, include)
    for name, tensor in weights.items():
        check_writable(name, tensor)
    if isinstance(calibration, Iterator):
        calibration = list(calibration)  # needed again at every sparsity
    prunings = weight_cuts(weights, sparsities, scope)
    total = sum(tensor.numel() for tensor in weights.values())
    rows = []
    with statistics_restored(plain) as restore_statistics, weights_restored(plain, weights.values()) as restore_weights:
        for sparsity, cuts in _with_progress(list(zip(sparsities, prunings, strict=True)), progress):
            restore_statistics()
            restore_weights()
            for tensor, keeper in zip(weights.values(), weight_keepers(cuts), strict=True):
                _prune_(tensor, keeper)
            with evaluation_mode(model):
                if calibration is not None:
                    recalibrate_batchnorm(plain, calibration, forward)
                found = evaluate(model)
            metrics = _metrics(found, sparsity)
            pruned = sum(cut.pruned for cut in {id(cut): cut for cut in cuts}.values())
            rows.append(SweepRow(sparsity, pruned, total, metrics))
    return SweepResult(tuple(rows), scope, calibration is not None)


def _metrics(found: float | Mapping[str, float], sparsity: float) -> dict[str, float]:
    found = found if isinstance(found, Mapping) else {"score": found}
    if not found:
        raise ValueError(f"evaluate returned no metrics at sparsity {sparsity:g}: it has to return a number or several")
    metrics = {}
    for name, value in found.items():
        try:
            metrics[name] = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"evaluate returned {value!r} for {name!r} at sparsity {sparsity:g}: it has to return a number or "
                f"several by name"
            ) from error
    return metrics


def _prune_(tensor: Tensor, keeper: Keeper) -> None:
    if as_dtensor(tensor) is not None:
        keep = torch.cat(list(keeper(whole(tensor)))).view(tensor.shape)
        local(tensor.detach()).masked_fill_(~own_part(keep, tensor), 0)
        return
    for slab, keep in zip(slabs(tensor), keeper(tensor), strict=True):
        slab.masked_fill_(~keep.view(slab.shape), 0)


def _with_progress(steps: Sequence[Any], progress: bool | None) -> Iterable[Any]:
    if progress is False or (progress is None and not sys.stderr.isatty()):
        return steps
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress:
            raise ImportError("the progress bar needs tqdm: pip install 'wcr_optim[bench]'") from error
        return steps
    shown: Iterable[Any] = tqdm(steps, desc="sweep", unit="sparsity", delay=0.0 if progress else 2.0)
    return shown
