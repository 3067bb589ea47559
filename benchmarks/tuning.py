"""Which strengths are searched, and which one the validation split chooses."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks import tasks
from benchmarks.methods import LOWEST, REFERENCE_LR, RHO, Method
from benchmarks.trials import Trial

DECADES = 3.0
"""Of a grid of strengths, which begins at LOWEST."""
RHOS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Times a method's default."""
RHOS_BEYOND = (6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
"""Where searches go on whose best rho is the largest of those."""
DRIVEN_RHOS = (0.1, 0.3, 1.0)
"""The same beside SparsityTarget, where each is tried with every sparsity that it is told."""

Rows = Sequence[Mapping[str, str]]


def grid(task: str, method: str, count: int, *, beyond: bool = False) -> list[tuple[float, float]]:
    """Return pairs of strength and rho to search; one pair where nothing is searched.

    Args:
        task: Name of the task.
        method: Name of the method.
        count: How many.
        beyond: What lies above these, too: strengths of as many decades again, or RHOS_BEYOND (default: False)

    Raises:
        ValueError: If a penalty's strength is searched, and LOWEST does not have it.
    """
    parts = Method.of(method)
    rho = RHO.get(parts.sharpness or "", 0.0)
    if parts.searched == "strength":
        assert parts.penalty is not None
        penalty = parts.penalty.removesuffix("_explicit").removesuffix("_unguarded")
        known = LOWEST[parts.base]
        if penalty.removesuffix("_in_loss") not in known:
            raise ValueError(f"method {method!r} has no strength to begin a search at; LOWEST in methods.py holds them")
        lowest = known[penalty.removesuffix("_in_loss")]
        lowest *= REFERENCE_LR[parts.base] / tasks.task(task).lr[parts.base]  # what acts is lr * strength
        if penalty.endswith("_in_loss"):
            lowest /= 10  # momentum adds up ten steps of it
        between = max(count - 1, 1)
        number = 2 * count - 1 if beyond else count
        return [(float(f"{lowest * 10 ** (DECADES * k / between):.3g}"), rho) for k in range(number)]
    if parts.searched == "rho":
        factors = [*_radii(count), *(RHOS_BEYOND if beyond else ())]
        return [(0.0, float(f"{rho * factor:.3g}")) for factor in factors]
    if parts.is_driven and parts.sharpness is not None and count > 1:
        return [(0.0, float(f"{rho * factor:.3g}")) for factor in DRIVEN_RHOS]
    return [(0.0, rho)]


def _radii(count: int) -> list[float]:
    """Return as many of RHOS as are wanted, evenly spaced; more of them have others between, on a logarithmic scale."""
    last = len(RHOS) - 1
    if count == 1:
        return [1.0]
    places = [k * last / (count - 1) for k in range(count)]
    if count <= len(RHOS):
        return [RHOS[round(place)] for place in places]
    lower = [min(int(place), last - 1) for place in places]
    return [RHOS[k] * (RHOS[k + 1] / RHOS[k]) ** (place - k) for k, place in zip(lower, places, strict=True)]


def searches(
    task: str,
    methods: Iterable[str],
    count: int,
    seeds: Iterable[int],
    steps: int = 0,
    options: str = "",
    told: Sequence[float] = (),
) -> list[Trial]:
    """List the runs on the validation split; SparsityTarget is told `told` beside the sparsities that are compared."""
    trials = []
    for method in methods:
        for strength, rho in grid(task, method, count):
            for goal in _told(task, method, told):
                for seed in seeds:
                    trials.append(
                        Trial(task, method, seed, strength, rho, goal, _options(method, options), steps=steps)
                    )
    return trials


def beyond(
    task: str, methods: Iterable[str], count: int, rows: Rows, seeds: Iterable[int], steps: int = 0
) -> list[Trial]:
    """List the runs by which searches go on whose best strength or rho is the largest tried: one step further.

    Below a grid a penalty does next to nothing, and so does a sharpness-aware method, so no search goes on there.

    Args:
        task: Name of the task.
        methods: Names of methods.
        count: Strengths of a grid, see `grid`.
        rows: Of results.
        seeds: Of the runs.
        steps: Of the runs, as `Trial.steps` has them (default: 0)

    Returns:
        None where every search is over, at the latest as many decades beyond its grid as there are in it, or at the
        last of RHOS_BEYOND.
    """
    trials = []
    for method in methods:
        searched = Method.of(method).searched
        if searched is None:
            continue
        place = ("strength", "rho").index(searched)  # in a pair of both
        # Settings whose runs diverged are among them: beyond those nothing is to be found.
        last = max((pair[place] for pair in tried(rows, task, method)), default=math.inf)
        found = [chosen(rows, task, method, goal, careful=c) for goal in tasks.task(task).goals for c in (False, True)]
        if any(pair is not None and pair[place] == last for pair in found):
            further = [pair for pair in grid(task, method, count, beyond=True) if pair[place] > last]
            trials += [Trial(task, method, seed, *pair, steps=steps) for pair in further[:1] for seed in seeds]
    return trials


def choices(
    task: str,
    methods: Iterable[str],
    rows: Rows,
    seeds: Iterable[int],
    steps: int = 0,
    options: str = "",
    told: Sequence[float] = (),
) -> list[Trial]:
    """List the runs on the test split: with what the validation split chose, and SparsityTarget's as for `searches`."""
    trials: list[Trial] = []
    for method in methods:
        parts, ways = Method.of(method), list(itertools.product(tasks.task(task).goals, (False, True)))
        if parts.searched is None:
            rho = RHO.get(parts.sharpness or "", 0.0)
            given = [(rho, goal) for goal in _told(task, method, told)]
            found = [driven(rows, task, method, goal, careful=careful) for goal, careful in ways]
            settings = [(0.0, *pair) for pair in dict.fromkeys([*given, *found]) if pair is not None]
        else:
            both = [chosen(rows, task, method, goal, careful=careful) for goal, careful in ways]
            settings = [(*pair, 0.0) for pair in dict.fromkeys(both) if pair is not None]
        for strength, rho, goal in settings:
            for seed in seeds:
                own = _options(method, options)
                trials.append(Trial(task, method, seed, strength, rho, goal, own, split="test", steps=steps))
    return trials


def _told(task: str, method: str, told: Sequence[float]) -> tuple[float, ...]:
    """Return each sparsity that a method is told in turn, 0 for those that are told none."""
    return tuple(dict.fromkeys((*tasks.task(task).goals, *told))) if Method.of(method).has_goal else (0.0,)


def _options(method: str, options: str) -> str:
    return options if Method.of(method).is_driven else ""


def _options_in(rows: Rows, task: str, method: str) -> str:
    """Return the options that SparsityTarget has in rows of one kind of run, see `of_run`."""
    if not Method.of(method).is_driven:
        return ""
    return next((row["options"] for row in rows if (row["task"], row["method"]) == (task, method)), "")


def chosen(
    rows: Rows, task: str, method: str, goal: float, *, careful: bool = False, options: str = ""
) -> tuple[float, float] | None:
    """Return strength and rho with the best mean on the validation split at a sparsity; of equals, the best dense one.

    Args:
        rows: Of results.
        task: Name of the task.
        method: Name of the method.
        goal: The sparsity.
        careful: Choose only among those whose dense value is within the task's tolerance of the baseline's (default:
            False)
        options: Those of the runs (default: "")

    Returns:
        None if there are no runs, or none that is careful enough.
    """
    best = _best(rows, task, method, goal, careful=careful, options=options)
    return None if best is None else best[:2]


def driven(rows: Rows, task: str, method: str, goal: float, *, careful: bool = False) -> tuple[float, float] | None:
    """Return rho and what SparsityTarget is told in order to be pruned at `goal`, where those are searched.

    They are those whose run has the best value at `goal` on the validation split; rho is 0 without a sharpness-aware
    method.

    Args:
        rows: Of results.
        task: Name of the task.
        method: Name of the method.
        goal: The sparsity that it is pruned at.
        careful: Choose only among those whose dense value is within the task's tolerance of the baseline's (default:
            False)

    Returns:
        None for other methods, if there are no runs on that split, or none that is careful enough.
    """
    if not Method.of(method).is_driven:
        return None
    best = _best(rows, task, method, goal, careful=careful, options=_options_in(rows, task, method))
    return None if best is None else best[1:]


def _best(
    rows: Rows, task: str, method: str, goal: float, *, careful: bool = False, options: str = ""
) -> tuple[float, float, float] | None:
    """Return the best strength, rho and sparsity that was told, see `chosen`; by `of_search` alone."""
    base, kind = Method.of(method).base, tasks.task(task)
    rows = of_search(rows, task, method)
    values = validation_means(rows, task, method, options)
    if not values:
        return None
    if careful:
        baseline = validation_means(rows, task, base)
        if not baseline:
            return None
        dense = next(iter(baseline.values())).get(0.0)
        if dense is None:
            return None
        values = {at: means for at, means in values.items() if within_tolerance(task, means[0.0], dense)}
        if not values:
            return None
    best: tuple[float, float, float] = kind.best(values, key=lambda at: (values[at][goal], values[at][0.0]))
    return best


def tried(rows: Rows, task: str, method: str) -> set[tuple[float, float, float]]:
    """Return the trials of a search, by `of_search`: strength, rho and what was told, of runs that diverged as well."""
    known = (task, method, "validation", _options_in(rows, task, method))
    return {
        (float(row["strength"]), float(row["rho"]), float(row["goal"]))
        for row in of_search(rows, task, method)
        if (row["task"], row["method"], row["split"], row["options"]) == known
    }


def of_search(rows: Rows, task: str, method: str) -> Rows:
    """Return the rows of the seeds that the baseline of a method has on the validation split; all if it has none.

    A method that was run with more of them there would choose better than the others.
    """
    runs = (task, Method.of(method).base, "validation")
    seeds = {row["seed"] for row in rows if (row["task"], row["method"], row["split"]) == runs}
    return [row for row in rows if row["seed"] in seeds] if seeds else rows


def within_tolerance(task: str, dense: float, baseline: float) -> bool:
    """Say whether a dense value is as good as the baseline's, up to the task's tolerance."""
    kind = tasks.task(task)
    worse = baseline - dense if kind.best is max else dense - baseline
    return worse <= kind.tolerance + 1e-9


def of_run(rows: Rows, steps: Mapping[str, int], options: str = "") -> list[Mapping[str, str]]:
    """Return the rows of runs of one length and with the same options: others would be averaged with them.

    Args:
        rows: Of results.
        steps: Steps of the runs by task, as `Trial.steps` has them; the task's own for tasks that are not there.
        options: Of SparsityTarget (default: "")
    """
    return [
        row
        for row in rows
        if int(row["steps"]) == steps.get(row["task"], 0) and row["options"] == _options(row["method"], options)
    ]


def validation_means(
    rows: Rows, task: str, method: str, options: str = ""
) -> dict[tuple[float, float, float], dict[float, float]]:
    """Return the means over seeds at each sparsity, by strength, rho and goal, of the runs with the given options.

    Those of which a run diverged, for any seed, are left out. The goal is 0 for methods that are told none.
    """
    kind = tasks.task(task)
    found: dict[tuple[float, float, float], dict[float, list[float]]] = {}
    diverged = set()
    for row in rows:
        if (row["task"], row["method"], row["split"], row["options"]) != (task, method, "validation", options):
            continue
        at = (float(row["strength"]), float(row["rho"]), float(row["goal"]))
        if row["metric"] and not (row["metric"] == kind.metric and row["scope"] == "global"):
            continue
        if failed(row):
            diverged.add(at)
        else:
            found.setdefault(at, {}).setdefault(float(row["sparsity"]), []).append(float(row["value"]))
    return {
        at: {sparsity: statistics.mean(values) for sparsity, values in means.items()}
        for at, means in found.items()
        if at not in diverged  # the seeds that went well do not speak for the others
    }


def failed(row: Mapping[str, str]) -> bool:
    """Say whether a row is all that there is of a run that diverged, which names no metric, or has no number."""
    return row["value"] in ("", "nan")
