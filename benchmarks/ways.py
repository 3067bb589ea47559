"""Tables of other ways to prune than once, globally, with BatchNorm's statistics estimated anew."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks import tasks, tuning
from benchmarks.methods import BRIEF, LABELS, Method, penalty_label
from benchmarks.trials import PATTERNS

BRIEF_HEAD = (
    "| task, base, sparsity | " + " | ".join(map(penalty_label, BRIEF)) + " |",
    "|---" * (len(BRIEF) + 1) + "|",
)
"""Of the tables of all tasks."""
Rows = Sequence[Mapping[str, str]]


def of_task(rows: Rows, task: str, methods: Sequence[str]) -> str:
    """Lay out methods down and ways to prune across, each with what was chosen for the middle wanted sparsity.

    Those are: globally; per layer; globally, BatchNorm's statistics left as the dense network had them, where there
    are any; globally, at the first sparsity that was measured beyond those that are wanted, if one was; N:M patterns;
    and int8 after pruning.
    """
    kind = tasks.task(task)
    goal, fresh = kind.middle, str(kind.calibration is not None)
    measured = {float(row["sparsity"]) for row in rows if (row["task"], row["scope"]) == (task, "global")}
    beyond = min((sparsity for sparsity in measured if sparsity > max(kind.goals)), default=1.0)
    columns = [
        ("dense", "global", 0.0, fresh),
        (f"{100 * goal:g} % global", "global", goal, fresh),
        (f"{100 * goal:g} % per layer", "layer", goal, fresh),
        (f"{100 * goal:g} % global, statistics kept", "global", goal, "False"),
        (f"{100 * beyond:g} % global", "global", beyond, fresh),
        *((f"{n}:{m} ({100 * (1 - n / m):g} %)", f"{n}:{m}", 1 - n / m, fresh) for n, m in PATTERNS),
        (f"{100 * goal:g} % global, int8", "int8", goal, fresh),
    ]
    without = {f"{100 * goal:g} % global, statistics kept"} if kind.calibration is None else set()
    columns = [column for column in columns if column[0] not in without and column[2] < 1.0]
    head = " | ".join(name for name, *_ in columns)
    lines = [f"| How it is pruned | {head} |", "|---" * (len(columns) + 1) + "|"]
    for method in methods:
        found, failed, count = _measured(rows, task, method)
        if not count:
            continue
        said = f", {failed} of {count} diverged" if failed else ""
        texts = [mean_text(found.get((scope, at, estimated), []), kind.places) for _, scope, at, estimated in columns]
        lines.append(f"| {Method.of(method).label}{said} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def kept(rows: Rows) -> str:
    """Lay out tasks and bases down and penalties across, BatchNorm's statistics left as the dense network had them.

    At each task's middle wanted sparsity, what was chosen for it with statistics estimated anew; those values stand in
    parentheses. Tasks without such statistics have no row.
    """
    lines = [*BRIEF_HEAD]
    for task in dict.fromkeys(row["task"] for row in rows):
        kind, own = tasks.task(task), [row for row in rows if row["task"] == task]
        goal = kind.middle
        if kind.calibration is None:
            continue
        for base in kind.lr:
            pairs = []
            for penalty in BRIEF:
                found, _, _ = _measured(own, task, f"{base}+{penalty}" if penalty else base)
                pairs.append([found.get(("global", goal, estimated), []) for estimated in ("False", "True")])
            means = [statistics.mean(values) for values, _ in pairs if values]
            if not means:
                continue
            best = f"{kind.best(means):.{kind.places}f}"
            texts = []
            for values, estimated in pairs:
                text = mean_text(values, kind.places)
                text = f"**{best}**{text.removeprefix(best)}" if text.split(" ")[0] == best else text
                texts.append(f"{text} ({statistics.mean(estimated):.{kind.places}f})" if estimated else text)
            lines.append(f"| {task}, {LABELS[base]}, {100 * goal:g} % | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _measured(rows: Rows, task: str, method: str) -> tuple[dict[tuple[str, float, str], list[float]], int, int]:
    """Collect the values of a method on the test split, with what was chosen for the middle wanted sparsity.

    Returns:
        Values of the task's metric by scope, sparsity and `recalibrated`; how many runs diverged; and how many there
        were.
    """
    kind, parts = tasks.task(task), Method.of(method)
    goal, fresh = kind.middle, str(kind.calibration is not None)
    pair = tuning.chosen(rows, task, method, goal) if parts.searched else (0.0, 0.0)
    own = [
        row
        for row in rows
        if (row["task"], row["method"], row["split"]) == (task, method, "test")
        and row["metric"] in ("", kind.metric)
        and (float(row["strength"]), float(row["rho"])) == pair
        and float(row["goal"]) == (goal if parts.has_goal else 0.0)
    ]
    # Those of which the first table has no value; where there is none in another way to prune, it is left out.
    shown = [row for row in own if not row["metric"] or (row["scope"], row["recalibrated"]) == ("global", fresh)]
    failed = {row["seed"] for row in shown if tuning.failed(row)}
    found: dict[tuple[str, float, str], list[float]] = {}
    for row in own:
        if row["seed"] not in failed and not tuning.failed(row):
            at = (row["scope"], float(row["sparsity"]), row["recalibrated"])
            found.setdefault(at, []).append(float(row["value"]))
    return found, len(failed), len({row["seed"] for row in own})


def mean_text(values: Sequence[float], places: int = 1) -> str:
    """Write a mean and, of several values, their sample standard deviation."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{spread}"
