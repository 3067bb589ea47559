"""Pictures of a task's results: over sparsity, over strength, and dense values against pruned ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import tasks, tuning
from benchmarks.methods import LABELS, PENALTIES, Method, penalty_label
from wcr_optim import plots

SHOWN = 12
"""How many tolerances a strength may cost dense and still be in the picture of the trade-off."""


def draw(rows: tuning.Rows, task: str, methods: Sequence[str], folder: Path) -> None:
    """Draw a task's metric over sparsity and over strength, and what strengths cost dense against what they keep.

    Args:
        rows: Of the task.
        task: Its name.
        methods: Those that were measured on the test split, in the order in which they are drawn.
        folder: Where TASK.png, TASK_strengths.png and TASK_tradeoff.png go.
    """
    kind = tasks.task(task)
    goal = kind.middle
    curves: dict[str, dict[str | None, list[tuple[float, float]]]] = {}
    tradeoffs: dict[str | None, list[tuple[float, float]]] = {}
    searches: dict[str, dict[float, dict[float, float]]] = {}
    for method in methods:
        parts = Method.of(method)
        if parts.sharpness is not None or parts.pruning == "random" or parts.penalty == "l2":
            continue  # beside the rest they tell nothing, and hide it
        pair = tuning.chosen(rows, task, method, goal) if parts.searched else None
        for row in rows:
            if (row["task"], row["method"], row["split"], row["metric"]) != (task, method, "test", kind.metric):
                continue
            if row["scope"] != "global" or (row["recalibrated"] == "False" and kind.calibration is not None):
                continue
            same = not tuning.failed(row) and (pair is None or (float(row["strength"]), float(row["rho"])) == pair)
            if same and (not parts.has_goal or float(row["goal"]) == goal) and parts.pruning is None:
                of_base = curves.setdefault(parts.base, {})
                of_base.setdefault(parts.penalty, []).append((float(row["sparsity"]), float(row["value"])))
        means = tuning.validation_means(tuning.of_search(rows, task, method), task, method)
        if len(means) > 1 and parts.pruning is None and parts.base == next(iter(kind.lr)):
            best = kind.best(at[0.0] for at in means.values())
            rising = [means[setting] for setting in sorted(means)]  # by strength, or by what was told
            near = [at for at in rising if abs(at[0.0] - best) <= SHOWN * kind.tolerance]
            tradeoffs[parts.penalty] = [(at[0.0], at[goal]) for at in near]
            if parts.penalty is not None and not parts.is_driven:
                searches[parts.label] = {setting[0]: means[setting] for setting in sorted(means)}
    # Penalties that a picture lacks keep their place in it, so that the others have the same colour in all.
    shown = {*tradeoffs, *(penalty for of_base in curves.values() for penalty in of_base)}
    penalties = [penalty for penalty in (None, *PENALTIES, "prox") if penalty in shown]
    name = kind.metric.replace("_", " ")
    if curves:
        _draw_bases(curves, penalties, folder / f"{task}.png", name)
    if tradeoffs:
        base = next(iter(kind.lr))
        pairs = {
            Method(base, penalty=penalty).label if penalty in tradeoffs else f"_{penalty}": tradeoffs.get(
                penalty, [(math.nan, math.nan)]
            )
            for penalty in penalties
        }  # what begins with an underscore is not in the legend
        plots.trade_off(pairs, folder / f"{task}_tradeoff.png", xlabel=f"{name}, dense", ylabel=f"{name} at {goal:.0%}")
    if searches:
        _draw_searches(searches, (0.0, *kind.goals), folder / f"{task}_strengths.png", name)


def _draw_searches(
    searches: Mapping[str, Mapping[float, Mapping[float, float]]],
    sparsities: Sequence[float],
    path: Path,
    ylabel: str,
) -> None:
    """Draw a panel for each penalty: the metric over strength on the validation split, a curve for each sparsity."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(searches))
    rows = math.ceil(len(searches) / columns)
    figure = Figure(figsize=(2.8 * columns + 1.0, 2.2 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for ax in panels[len(searches) :]:
        ax.axis("off")
    colours = colormaps["viridis"]([0.9 * k / (len(sparsities) - 1) for k in range(len(sparsities))])
    for ax, (label, means) in zip(panels, searches.items(), strict=False):
        for sparsity, colour in zip(sparsities, colours, strict=True):
            values = [at.get(sparsity, math.nan) for at in means.values()]
            ax.plot(list(means), values, "o-", color=colour, markersize=3, linewidth=1, label=f"{100 * sparsity:g} %")
        ax.set_xscale("log")
        ax.set_title(label, fontsize="medium")
        ax.grid(alpha=0.3)
    figure.supylabel(ylabel, fontsize="medium")
    figure.supxlabel("strength", fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, ["dense", *labels[1:]], frameon=False, fontsize="small", loc="outside right center")
    figure.savefig(path, dpi=130)


def _draw_bases(
    curves: Mapping[str, Mapping[str | None, Sequence[tuple[float, float]]]],
    penalties: Sequence[str | None],
    path: Path,
    ylabel: str,
) -> None:
    """Draw a panel for each base, in which a penalty has the same colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(curves) + 1.8, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for ax, (base, of_base) in zip(panels, curves.items(), strict=True):
        drawn = {penalty_label(penalty): of_base.get(penalty, [(0.0, math.nan)]) for penalty in penalties}
        plots.sparsity_accuracy(drawn, ax=ax, ylabel=ylabel)
        ax.label_outer()
        ax.get_legend().remove()
        ax.set_title(LABELS[base])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize="small", loc="outside right center")
    figure.savefig(path, dpi=200)
