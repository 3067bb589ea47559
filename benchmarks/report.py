"""Tables and pictures of stored results: ``python -m benchmarks report``.

Reads docs/results/{vision,language,segmentation}.csv, of which runs of full length and without options count, draws the
pictures in docs/images and renews the tables between the markers ``<!-- table: TASK -->`` and ``<!-- end -->`` in
docs/results.md: a task's, that of all tasks, named brief, which is in README.md as well, and kept, of networks pruned
without training data.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import arguments, pictures, runner, tasks, tuning, ways
from benchmarks.methods import BRIEF, LABELS, OURS, PENALTIES, PRUNING, RHO, SHARPNESS, Method
from benchmarks.trials import COLUMNS, KEY, NUMBERS
from wcr_optim.files import written_whole

SUITES = ("vision", "language", "segmentation")
GOAL_SEARCHED = ", goal searched"
BOTH_SEARCHED = ", goal and rho searched"
Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Cell:
    """What a method reaches at a sparsity on the test split.

    Attributes:
        values: One for each seed, dense values of the same runs beside them.
        dense: As values.
        strength: That of the penalty, or rho where that was searched; None where nothing was.
        cost: Means of seconds, gradient evaluations and sharpness.
        failed: How many more runs diverged or raised, and have no value.
        told: The sparsity that the method was told, None if none or the one that it was pruned to.
        rho: Beside SparsityTarget, where it was searched and is not its authors'; None otherwise.
        trials: Among how many settings the validation split chose, 0 where nothing was chosen.
    """

    values: tuple[float, ...]
    dense: tuple[float, ...]
    strength: float | None
    cost: Mapping[str, float]
    failed: int = 0
    told: float | None = None
    rho: float | None = None
    trials: int = 0

    @property
    def mean(self) -> float:
        """Mean over seeds, NaN if all runs failed."""
        return statistics.mean(self.values or (math.nan,))

    @property
    def spread(self) -> float:
        """Sample standard deviation over seeds, 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def dense_mean(self) -> float:
        """Mean of the dense values."""
        return statistics.mean(self.dense or (math.nan,))


def cell(
    rows: Rows, task: str, method: str, goal: float, *, careful: bool = False, search: bool = False
) -> Cell | None:
    """Collect what a method reaches at a sparsity, with what the validation split chose for it.

    Args:
        rows: Of results.
        task: Name of the task.
        method: Name of the method.
        goal: The sparsity.
        careful: Take the strength that was chosen among those within tolerance of the baseline's dense value, and
            return nothing if the dense value on test is not (default: False)
        search: Have the validation split choose what SparsityTarget was told and the rho beside it, too, see
            `tuning.driven`, and return nothing if those are the sparsity itself and the authors' (default: False)
    """
    parts, kind = Method.of(method), tasks.task(task)
    given = (RHO.get(parts.sharpness or "", 0.0), goal)
    setting = tuning.driven(rows, task, method, goal, careful=careful) if search else given
    if setting is None or (search and setting == given):
        return None
    rho, told = setting
    pair = None
    if parts.searched is not None:
        pair = tuning.chosen(rows, task, method, goal, careful=careful)
        if pair is None:
            return None
    runs: dict[str, dict[float, Mapping[str, str]]] = {}
    failed = set()
    for row in rows:
        if (row["task"], row["method"], row["split"]) != (task, method, "test"):
            continue
        if pair is not None and (float(row["strength"]), float(row["rho"])) != pair:
            continue
        if parts.has_goal and (float(row["rho"]), float(row["goal"])) != setting:
            continue
        as_wanted = row["recalibrated"] != "False" or kind.calibration is None
        if row["metric"] and not (row["metric"] == kind.metric and row["scope"] == "global" and as_wanted):
            continue
        if tuning.failed(row):
            failed.add(row["seed"])
        else:
            runs.setdefault(row["seed"], {})[float(row["sparsity"])] = row
    whole = [run for seed, run in runs.items() if goal in run and 0.0 in run and seed not in failed]
    if not whole and not failed:
        return None
    cost = {
        name: statistics.mean([float(run[goal][name]) for run in whole if run[goal][name]] or [float("nan")])
        for name in ("seconds", "gradient_evaluations", "sharpness")
    }
    searched = None if pair is None else pair[0] if parts.searched == "strength" else pair[1]
    values, dense = (tuple(float(run[at]["value"]) for run in whole) for at in (goal, 0.0))
    found = Cell(
        values,
        dense,
        searched,
        cost,
        len(failed),
        told=told if told != goal else None,
        rho=rho if rho != given[0] else None,
        trials=len(tuning.tried(rows, task, method)) if pair is not None or search else 0,
    )
    if careful:
        baseline = cell(rows, task, parts.base, goal)
        if baseline is None or not tuning.within_tolerance(task, found.dense_mean, baseline.dense_mean):
            return None
    return found


Cells = Mapping[tuple[str, bool], Sequence[Cell | None]]
"""By method and whether `search` chose, one for each of a task's wanted sparsities."""


def cells(rows: Rows, task: str, *, careful: bool = False) -> Cells:
    """Collect the `cell` of each measured method at each wanted sparsity, without and with `search`.

    A cell depends on the rows of its method and of its base alone. It is given no others: there are a hundred times as
    many, and every cell reads what it is given several times.
    """
    by_method: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        if row["task"] == task:
            by_method.setdefault(row["method"], []).append(row)
    found: dict[tuple[str, bool], list[Cell | None]] = {}
    for method in tested(rows, task):
        near = [row for name in dict.fromkeys([method, Method.of(method).base]) for row in by_method.get(name, ())]
        for search in (False, True):
            found[method, search] = [
                cell(near, task, method, goal, careful=careful, search=search) for goal in tasks.task(task).goals
            ]
    return found


def table(rows: Rows, task: str, *, careful: bool = False) -> str:
    """Lay out methods down and wanted sparsities across, as Markdown; the best of each column in bold."""
    return _table(rows, task, cells(rows, task, careful=careful))


def _table(rows: Rows, task: str, laid_out: Cells) -> str:
    kind = tasks.task(task)
    one_shot = [row for (m, _), row in laid_out.items() if Method.of(m).pruning is None]
    best = []
    for column in zip(*one_shot, strict=True):
        means = [found.mean for found in column if found is not None and found.values]
        best.append(kind.best(means) if means else None)
    head = [f"{100 * goal:g} % (dense)" for goal in kind.goals]
    lines = [
        "| method | " + " | ".join([*head, "trials", "gradients", "seconds", "sharpness"]) + " |",
        "|---" * (len(head) + 5) + "|",
    ]
    for (method, search), row in laid_out.items():
        if not any(row):
            continue
        tops = best if Method.of(method).pruning is None else [None] * len(best)  # yardsticks are not compared
        texts = [_cell_text(kind, found, top) for found, top in zip(row, tops, strict=True)]
        lines.append(f"| {_label(rows, task, method, search)} | " + " | ".join([*texts, *_costs(row)]) + " |")
    return "\n".join(lines)


def brief(rows: Rows) -> str:
    """Lay out tasks and bases down and penalties across, at each task's highest wanted sparsity, as Markdown."""
    lines = [*ways.BRIEF_HEAD]
    for task in dict.fromkeys(row["task"] for row in rows):
        kind, of_task = tasks.task(task), [row for row in rows if row["task"] == task]
        goal = kind.goals[-1]
        for base in kind.lr:
            row = [cell(of_task, task, f"{base}+{penalty}" if penalty else base, goal) for penalty in BRIEF]
            means = [found.mean for found in row if found is not None and found.values]
            if not means:
                continue
            texts = [_cell_text(kind, found, kind.best(means), short=True) for found in row]
            lines.append(f"| {task}, {LABELS[base]}, {100 * goal:g} % | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def tested(rows: Rows, task: str) -> list[str]:
    """List the methods that were measured on the test split: by base, then by what is around it, then by penalty."""
    names = {row["method"] for row in rows if row["task"] == task and row["split"] == "test"}
    bases = list(tasks.task(task).lr)

    def place(name: str) -> tuple[int, ...]:
        parts = Method.of(name)
        rooms = ((parts.sharpness, SHARPNESS), (parts.pruning, PRUNING), (parts.penalty, [*PENALTIES, "prox"]))
        return bases.index(parts.base), *([None, *known].index(part) for part, known in rooms)

    return sorted(names, key=place)


def _label(rows: Rows, task: str, method: str, search: bool) -> str:
    label = Method.of(method).label
    if not search:
        return label
    radii = {row["rho"] for row in rows if (row["task"], row["method"], row["split"]) == (task, method, "validation")}
    return label + (BOTH_SEARCHED if len(radii) > 1 else GOAL_SEARCHED)


def _cell_text(kind: tasks.Task, found: Cell | None, best: float | None, *, short: bool = False) -> str:
    if found is None:
        return "–"
    places = kind.places
    value = f"{found.mean:.{places}f}"
    value = f"**{value}**" if best is not None and value == f"{best:.{places}f}" else value
    at = "" if found.strength is None else f" at {found.strength:g}"
    at = at if found.rho is None else f" at {found.rho:g}"
    at = at if found.told is None else f"{at} told {100 * found.told:g} %"
    at = "" if short else at
    if not found.values:
        return f"diverged{at}"
    failed = f", {found.failed} of {found.failed + len(found.values)} diverged" if found.failed else ""
    return f"{value}{_spread(found, places)} ({found.dense_mean:.{places}f}){at}{failed}"


def _spread(found: Cell, places: int) -> str:
    return f" ± {found.spread:.{places}f}" if len(found.values) > 1 else ""


def _costs(row: Sequence[Cell | None]) -> list[str]:
    found = [cell.cost for cell in row if cell is not None]
    trials = max(cell.trials for cell in row if cell is not None)
    texts = [str(trials or "–")]
    for name, form in (("gradient_evaluations", "{:.0f}"), ("seconds", "{:.1f}"), ("sharpness", "{:.3g}")):
        values = [cost[name] for cost in found if cost[name] == cost[name]]
        texts.append(form.format(statistics.mean(values)) if values else "–")
    return texts


def verdict(rows: Rows, task: str, careful: Cells) -> str:
    """Say for each wanted sparsity which of the careful cells is best, and by how much."""
    kind = tasks.task(task)
    places = kind.places
    one_shot = {m: row for m, row in careful.items() if Method.of(m[0]).pruning is None}
    lines = []
    for place, goal in enumerate(kind.goals):
        found = {m: c for m, row in one_shot.items() if (c := row[place]) is not None}
        ours = {m: c for m, c in found.items() if Method.of(m[0]).penalty in OURS}
        others = {m: c for m, c in found.items() if m not in ours}
        if not ours or not others:
            continue
        one = kind.best(ours, key=lambda m: ours[m].mean)
        other = kind.best(others, key=lambda m: others[m].mean)
        gap = ours[one].mean - others[other].mean
        gap = gap if kind.best is max else -gap
        spread = max(ours[one].spread, others[other].spread)
        word = "ahead of" if gap > spread else "behind" if gap < -spread else "level with"
        pair = ((one, ours[one]), (other, others[other]))
        named = [f"{_label(rows, task, m, search)} {c.mean:.{places}f}{_spread(c, places)}" for (m, search), c in pair]
        if min(len(c.values) for _, c in pair) > 1:
            lines.append(f"- {100 * goal:g} %: {named[0]} is **{word}** {named[1]}")
        else:
            lines.append(f"- {100 * goal:g} %: {named[0]} beside {named[1]}: one seed says nothing of the difference")
    return "\n".join(lines)


def _shares(rows: Rows, task: str) -> str:
    """Say what share of all parameters the wanted sparsities are: they count the weights that are pruned at all."""
    counts = {
        (int(row["prunable"]), int(row["parameters"]))
        for row in rows
        if row["task"] == task and row["scope"] == "global" and row["prunable"] and row["parameters"]
    }
    if len(counts) != 1:
        return ""
    ((prunable, parameters),) = counts
    goals = tasks.task(task).goals
    wanted, shares = (
        ", ".join(f"{100 * factor * goal:.3g}" for goal in goals) for factor in (1.0, prunable / parameters)
    )
    return f" Of {parameters:,} parameters {prunable:,} are pruned, so {wanted} % are {shares} % of all."


def section(rows: Rows, task: str) -> str:
    """Lay out all that is known of a task."""
    kind = tasks.task(task)
    careful = cells(rows, task, careful=True)
    goal = kind.middle
    unit = {"bits_per_byte": "bits per byte, lower is better"}.get(kind.metric, f"{kind.metric} in percent")
    said = [
        f"Data: {kind.data}{_hashes(rows, task)}. {_steps(rows, kind)} steps. {unit[0].upper() + unit[1:]}; mean ± "
        f"sample standard deviation over {_seeds(rows, task)} on the test split, dense value in parentheses, then the "
        f"strength (or rho) that the validation split chose at that sparsity, and among how many trials. Gradients, "
        f"seconds and sharpness (the eigenvalue of largest magnitude of the loss's Hessian) are means over the row."
        f"{_shares(rows, task)}",
        table(rows, task),
        f"Only strengths, and results, whose dense value is within {kind.tolerance:g} of the baseline's:",
        _table(rows, task, careful),
        verdict(rows, task, careful),
        f"Other ways to prune, each with what the validation split chose for {100 * goal:g} % pruned globally:",
        ways.of_task(rows, task, [f"{base}+{name}" if name else base for base in kind.lr for name in BRIEF]),
    ]
    return "\n\n".join(text for text in said if text)


def _seeds(rows: Rows, task: str) -> str:
    """Say over how many seeds the methods were measured, which may not be as many for all of them."""
    seen = {(row["method"], row["seed"]) for row in rows if row["task"] == task and row["split"] == "test"}
    counts = Counter(method for method, _ in seen).values()
    least, most = min(counts, default=0), max(counts, default=0)
    return f"{least} to {most} seeds" if least < most else f"{most} seed{'s' if most != 1 else ''}"


def _hashes(rows: Rows, task: str) -> str:
    """Name the data that was measured on, which need not be what this machine has."""
    found = sorted({row["data_hash"] for row in rows if row["task"] == task} - {""})
    return f", sha256 {', '.join(found)}" if found else ""


def _steps(rows: Rows, kind: tasks.Task) -> str:
    """Say how many steps the runs took, which may have been less than the task's."""
    taken = {int(row["steps"]) or kind.steps for row in rows if row["task"] == kind.name}
    return " and ".join(map(str, sorted(taken)))


def summary(rows: Rows) -> dict[str, Any]:
    """Collect all cells by task, method and sparsity."""
    found: dict[str, Any] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        both = {careful: cells(rows, task, careful=careful) for careful in (False, True)}
        for method in tested(rows, task):
            for place, goal in enumerate(tasks.task(task).goals):
                for careful, search in itertools.product((False, True), repeat=2):
                    one = both[careful][method, search][place]
                    if one is not None:
                        entry = {
                            "mean": round(one.mean, 4) if one.values else None,
                            "standard_deviation": round(one.spread, 4) if one.values else None,
                            "values": one.values,
                            "dense": one.dense,
                            "strength": one.strength,
                            "told": one.told,
                            "rho": one.rho,
                            "diverged": one.failed,
                        }
                        kind = ("goal_searched_" if search else "") + ("within_tolerance" if careful else "best")
                        found.setdefault(task, {}).setdefault(method, {}).setdefault(f"{goal:g}", {})[kind] = entry
    return found


def write(rows: Rows, folder: Path, suite: str) -> None:
    """Write a suite's Markdown table, JSON summary and pictures into a folder.

    Left out, and told, are tasks that cannot be loaded, such as those of a folder of one's own that is elsewhere now.
    """
    rows = _loaded(rows, f"{folder / suite}.md and {suite}.json")
    names = [task for task in dict.fromkeys(row["task"] for row in rows) if tested(rows, task)]
    text = "\n\n".join(f"## {task}\n\n{section(rows, task)}" for task in names)
    with written_whole(folder / f"{suite}.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    with written_whole(folder / f"{suite}.json") as temporary:
        temporary.write_text(json.dumps(summary(rows), indent=1) + "\n", encoding="utf-8")
    for task in names:
        of_task = [row for row in rows if row["task"] == task]
        pictures.draw(of_task, task, tested(of_task, task), folder)


def _loaded(rows: Rows, where: str) -> Rows:
    """Leave out, and tell, the rows of tasks that cannot be loaded here."""
    for task in dict.fromkeys(row["task"] for row in rows):
        try:
            tasks.task(task)
        except (OSError, ImportError, ValueError) as error:
            print(f"{task}: left out of {where}, as it cannot be loaded: {error}")
            rows = [row for row in rows if row["task"] != task]
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Renew docs/results.md and its pictures; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="(default: docs/results)")
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"), help="(default: docs/results.md)")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="(default: README.md)")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="(default: docs/images)")
    o = parser.parse_args(argv)
    for path in (o.page, o.readme):
        if not path.is_file():
            parser.error(f"there is no page {path} to renew")
    try:
        arguments.prepare_for_pictures(o.images)
        rows = stored(o.results)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    page = o.page.read_text(encoding="utf-8")
    readme = o.readme.read_text(encoding="utf-8")
    missing = {name for name in tasks.names() if _has_table(page, name) or _has_row(readme, name)}
    missing -= {row["task"] for row in rows}
    if missing:
        parser.error(
            f"{o.results} has no runs of full length of task {min(missing)}, which is in {o.page} or {o.readme}: it "
            f"would vanish from the tables of all tasks; run it with --full --output {o.results}, or name the folder "
            "that has them all"
        )
    rows = _loaded(rows, f"{o.page} and {o.readme}")
    page = filled(page, "brief", brief(rows))
    page = filled(page, "kept", ways.kept(rows))
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        if tested(of_task, task):
            page = filled(page, task, section(of_task, task))
            pictures.draw(of_task, task, tested(of_task, task), o.images)
    readme = filled(readme, "brief", brief(rows))
    for path, text in ((o.page, page), (o.readme, readme)):
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return 0


def stored(folder: Path) -> Rows:
    """Read all suites' rows of runs of full length and without options."""
    return [
        row
        for suite in SUITES
        for row in tuning.of_run(runner.Results(folder / f"{suite}.csv", COLUMNS, KEY, NUMBERS).read(), {})
    ]


def _has_table(page: str, task: str) -> bool:
    return f"<!-- table: {task} -->" in page


def _has_row(page: str, task: str) -> bool:
    return re.search(rf"^\| {re.escape(task)}, ", page, re.MULTILINE) is not None


def filled(page: str, name: str, text: str) -> str:
    """Put text between a page's markers of a name; a page without them stays as it is."""
    marked = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page)
