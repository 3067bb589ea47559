"""Figures: where the energy of the weights lies, and what pruning costs.

Drawn on figures of their own, without pyplot: no display, no global state. Colours are those of Okabe and Ito, which
people with any common colour blindness can tell apart; markers tell curves apart in print.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import nn

from wcr_optim.metrics import TAIL_ENERGY, Concentration, EnergyCurve, concentration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")  # as many as have no factor in common with the colours
_LINES = ("-", "--", ":")  # the next one when the colours begin anew
_INSIDE = 6  # curves whose legend finds room inside the axes


@runtime_checkable
class Sweep(Protocol):
    """What is drawn of a sweep, as `pruning.SweepResult` has it."""

    @property
    def sparsities(self) -> list[float]:
        """The sparsities asked for."""

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics."""

    def values(self, metric: str | None = None) -> list[float]:
        """Return one metric at every sparsity, the first one if none is named."""


def energy_curves(
    models: Mapping[str, nn.Module | Concentration | EnergyCurve],
    path: str | os.PathLike[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw which share of their energy the largest weights of several models hold.

    The further to the upper left a curve runs, the more its model can be pruned. The dotted line is a model whose
    weights are all of one magnitude; the dashed one is the energy that `wcr_optim.metrics` expects a model to need.

    Args:
        models: Models, or what `wcr_optim.metrics.concentration` returned for them, by the name for the legend.
        path: Where to save the figure, in the format of its suffix (default: None)
        ax: Axes to draw on; None makes a new figure (default: None)

    Returns:
        The axes; their figure is ``ax.figure``.

    Raises:
        ValueError: If there are no models.
        ImportError: If matplotlib is not installed.

    Example:
        >>> plots.energy_curves({"SGD": baseline, "WCR": model}, "energy.png")
    """
    if not models:
        raise ValueError("models must name at least one model to draw")
    curves = {name: _curve(model) for name, model in models.items()}
    ax = _axes(ax, len(curves))
    for (name, curve), style in zip(curves.items(), _styles(), strict=False):
        ax.plot(100 * np.array(curve.density), 100 * np.array(curve.energy), label=name, markevery=20, **style)
    density = np.logspace(-3, 0, 100)
    reference: dict[str, Any] = {"color": "0.55", "linewidth": 1.2, "zorder": 1}
    ax.plot(100 * density, 100 * density, linestyle=":", label="all magnitudes equal", **reference)
    ax.axhline(enough := 100 * (1 - TAIL_ENERGY), linestyle="--", label=f"{enough:g} % of the energy", **reference)
    ax.set_xscale("log")
    ax.set_xlim(0.1, 100)
    ax.set_ylim(0, 103)
    ax.set_xticks(ticks := [0.1, 0.3, 1, 3, 10, 30, 100], labels=[f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel("largest weights (% of all)")
    ax.set_ylabel("share of the energy (%)")
    return _finished(ax, len(curves), path)


def sparsity_accuracy(
    results: Mapping[str, Sweep | Sequence[Sweep] | Sequence[tuple[float, float]]],
    path: str | os.PathLike[str] | None = None,
    ax: Axes | None = None,
    *,
    metric: str | None = None,
    ylabel: str | None = None,
) -> Axes:
    """Draw a metric over the share of pruned weights, for several methods.

    Lines are means, bands one sample standard deviation to both sides, over the results given for one name. The
    horizontal axis is logarithmic in the weights that remain, so that 80 to 99 % take up half of it.

    Args:
        results: By the name for the legend: the result of a sweep, or those of several seeds, or pairs of a sparsity
            and a value, those of several seeds one after the other.
        path: Where to save the figure, in the format of its suffix (default: None)
        ax: Axes to draw on; None makes a new figure (default: None)
        metric: Which metric of a sweep to draw; None stands for its first one (default: None)
        ylabel: Label of the vertical axis; None stands for the metric's name (default: None)

    Returns:
        The axes; their figure is ``ax.figure``.

    Raises:
        ValueError: If there are no results, if one is empty, or if a sparsity lies outside [0, 1].
        KeyError: If a sweep has no such metric.
        ImportError: If matplotlib is not installed.

    Example:
        >>> plots.sparsity_accuracy({"SGD": [sweep(m, accuracy, grid) for m in models]}, "accuracy.png")
    """
    curves = {name: _statistics(name, _pairs(result, metric)) for name, result in results.items()}
    if not curves:
        raise ValueError("results must name at least one result to draw")
    ax = _axes(ax, len(curves))
    floor = _scale_by_density(ax, sorted({float(sparsity) for curve in curves.values() for sparsity in curve[0]}))
    for (name, (sparsity, mean, deviation)), style in zip(curves.items(), _styles(), strict=False):
        sparsity = np.minimum(sparsity, 1 - floor)
        ax.plot(sparsity, mean, label=name, **style)
        if deviation.any():
            ax.fill_between(sparsity, mean - deviation, mean + deviation, color=style["color"], alpha=0.18, linewidth=0)
    ax.set_xlabel("pruned weights (%)")
    names = [result.metrics[0] for result in _sweeps(results.values())]
    ax.set_ylabel(ylabel or metric or (names[0] if names else "score"))
    return _finished(ax, len(curves), path)


def trade_off(
    results: Mapping[str, Sequence[tuple[float, float]]],
    path: str | os.PathLike[str] | None = None,
    ax: Axes | None = None,
    *,
    xlabel: str = "dense",
    ylabel: str = "pruned",
) -> Axes:
    """Draw what several methods keep when they are pruned against what they reach dense, a point for each strength.

    The points of a method are joined in the order in which they are given, that of rising strength.

    Args:
        results: Pairs of a dense and a pruned value, by the name for the legend.
        path: Where to save the figure, in the format of its suffix (default: None)
        ax: Axes to draw on; None makes a new figure (default: None)
        xlabel: Label of the horizontal axis (default: "dense")
        ylabel: Label of the vertical axis (default: "pruned")

    Returns:
        The axes; their figure is ``ax.figure``.

    Raises:
        ValueError: If there are no results, or one is empty.
        ImportError: If matplotlib is not installed.

    Example:
        >>> plots.trade_off({"WCR": [(98.0, 91.5), (97.1, 95.0)]}, "trade_off.png")
    """
    empty = [name for name, pairs in results.items() if not len(pairs)]
    if not results or empty:
        raise ValueError(f"{empty[0]!r} has no values to draw" if empty else "results must name at least one result")
    ax = _axes(ax, len(results))
    for (name, pairs), style in zip(results.items(), _styles(), strict=False):
        dense, pruned = np.array(pairs, dtype=float).T
        ax.plot(dense, pruned, label=name, **style | {"linewidth": 0.8})
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    return _finished(ax, len(results), path)


def training_curves(
    history: Sequence[Sequence[float]],
    path: str | os.PathLike[str] | None = None,
    accuracy: Sequence[tuple[int, float]] | None = None,
    *,
    goal: float | None = None,
) -> Figure:
    """Draw what `wcr_optim.SparsityTarget` measured over training: tail and path, strength, smoothed loss.

    Args:
        history: Rows of step, tail, wanted tail, strength and smoothed loss (NaN without one).
        path: Where to save the figure, in the format of its suffix (default: None)
        accuracy: Pairs of a step and an accuracy, for a panel of its own (default: None)
        goal: Tail at the end of the path, drawn as a line (default: None)

    Returns:
        The figure.

    Raises:
        ValueError: If nothing was measured.
        ImportError: If matplotlib is not installed.
    """
    if not history:
        raise ValueError("nothing was measured yet: take a step first")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'wcr_optim[plot]'") from error
    step, tail, wanted, strength, loss = np.array(history, dtype=float).T
    panels = [("tail (share of energy)", step, tail), ("strength", step, strength)]
    if np.isfinite(loss).any():
        panels.append(("training loss", step, loss))
    if accuracy:
        panels.append(("accuracy", *np.array(accuracy, dtype=float).T))
    figure = Figure(figsize=(6.4, 1.8 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for ax, (label, x, y), colour in zip(axes, panels, _COLOURS, strict=False):
        ax.plot(x, y, color=colour, linewidth=1.6, zorder=3, label="measured")
        ax.set_ylabel(label)
        ax.grid(color="0.92", linewidth=0.8, zorder=0)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[:2]:
        if (np.array([line.get_ydata() for line in ax.lines]) > 0).any():
            ax.set_yscale("log", nonpositive="mask")
    axes[0].plot(step, wanted, color="0.55", linewidth=1.2, linestyle="--", zorder=2, label="wanted")
    if goal is not None:
        axes[0].axhline(goal, color="0.55", linewidth=1.2, linestyle=":", zorder=1, label=f"goal {goal:g}")
    axes[0].legend(edgecolor="none", framealpha=0.9, fontsize="small")
    axes[-1].set_xlabel("step")
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def _curve(model: nn.Module | Concentration | EnergyCurve) -> EnergyCurve:
    if isinstance(model, nn.Module):
        model = concentration(model)
    return model.total.curve if isinstance(model, Concentration) else model


def _sweeps(results: Iterable[Any]) -> Iterator[Sweep]:
    for result in results:
        if isinstance(result, Sweep):
            yield result
        else:
            yield from (part for part in result if isinstance(part, Sweep))


def _pairs(
    result: Sweep | Sequence[Sweep] | Sequence[tuple[float, float]], metric: str | None
) -> list[tuple[float, float]]:
    if isinstance(result, Sweep):
        return list(zip(result.sparsities, result.values(metric), strict=True))
    pairs = []
    for part in result:
        pairs += _pairs(part, metric) if isinstance(part, Sweep) else [part]
    return pairs


def _statistics(
    name: str, pairs: Sequence[tuple[float, float]]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Compute sparsities, means and sample standard deviations."""
    values: dict[float, list[float]] = {}
    for sparsity, value in pairs:
        if not 0.0 <= sparsity <= 1.0:
            raise ValueError(f"sparsities of {name!r} must lie in [0, 1], got {sparsity!r}")
        values.setdefault(round(float(sparsity), 9), []).append(float(value))
    if not values:
        raise ValueError(f"{name!r} has no values to draw")
    sparsities = sorted(values)
    means = [np.mean(values[sparsity]) for sparsity in sparsities]
    deviations = [np.std(seeds, ddof=1) if len(seeds := values[sparsity]) > 1 else 0.0 for sparsity in sparsities]
    return np.array(sparsities), np.array(means), np.array(deviations)


def _styles() -> Iterator[dict[str, Any]]:
    for i in count():
        yield {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": _LINES[i // len(_COLOURS) % len(_LINES)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 5,
            "linewidth": 1.6,
            "markeredgewidth": 0,
            "zorder": 3,
        }


def _scale_by_density(ax: Axes, sparsities: Sequence[float]) -> float:
    """Lay out the horizontal axis as -log10(1 - sparsity), with ticks at the sparsities that have room for a label.

    A logarithm has no place for a sparsity of 1: it goes where the density that is returned would be, half of the
    smallest other one.
    """
    floor = min((1.0 - sparsity for sparsity in sparsities if sparsity < 1.0), default=1.0) / 2

    def forward(sparsity: npt.ArrayLike) -> npt.NDArray[np.float64]:
        place: npt.NDArray[np.float64] = -np.log10(np.maximum(1.0 - np.asarray(sparsity, dtype=np.float64), 1e-12))
        return place

    def inverse(place: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return 1.0 - 10.0 ** -np.asarray(place, dtype=np.float64)

    places = {sparsity: float(forward(min(sparsity, 1.0 - floor))) for sparsity in sparsities}
    low, high = places[sparsities[0]], places[sparsities[-1]]
    span = max(high - low, 0.3)
    ticks = {low: sparsities[0], high: sparsities[-1]}
    for sparsity, place in reversed(places.items()):  # the high sparsities are what the figure is about
        if min(abs(place - other) for other in ticks) > 0.045 * span:
            ticks[place] = sparsity
    ax.set_xscale("function", functions=(forward, inverse))
    ax.set_xticks(inverse(list(ticks)), labels=[f"{100 * sparsity:.6g}" for sparsity in ticks.values()])
    ax.minorticks_off()
    ax.set_xlim(*inverse([low - 0.03 * span, high + 0.03 * span]))
    return floor


def _axes(ax: Axes | None, curves: int) -> Axes:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'wcr_optim[plot]'") from error
    if ax is None:
        figure = Figure(figsize=(6.4 if curves <= _INSIDE else 8.6, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
    return ax


def _finished(ax: Axes, curves: int, path: str | os.PathLike[str] | None) -> Axes:
    ax.grid(color="0.92", linewidth=0.8, zorder=0)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if curves <= _INSIDE:
        ax.legend(edgecolor="none", framealpha=0.9, fontsize="small")
    else:
        ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    if path is not None:
        ax.figure.canvas.figure.savefig(path, dpi=200)
    return ax
