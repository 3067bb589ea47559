"""Methods against each other on the tasks of a suite: tuned on validation, pruned once, measured on test.

    python -m benchmarks vision --quick
    python -m benchmarks vision --full
    python -m benchmarks language --methods adamw,adamw+wcr,adamw+target --seeds 3

Every strength (and rho) is searched on the validation split from the same number of runs, and from more where the
largest one turns out the best, but for --quick; what it chooses is run anew from several seeds and measured on the
test split. Rows are added to OUTPUT/SUITE.csv as runs end, and runs that the
file holds are not repeated, so a killed command continues where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks import report, runner, tasks, tuning
from benchmarks.arguments import count, device, listed, names, prepare_for_pictures, sparsity
from benchmarks.methods import SHARPNESS, Method
from benchmarks.tasks import SPARSITIES
from benchmarks.trials import (
    COLUMNS,
    KEY,
    NUMBERS,
    OF_RUNS,
    Trial,
    check_data,
    check_options,
    prepare,
    read_options,
    run_trial,
    steps_of,
)
from wcr_optim import SparsityTarget

SUITES = {
    "vision": ("digits_mlp", "digits_cnn", "digits_resnet", "textures"),
    "language": ("language",),
    "segmentation": ("mosaics", "tissue"),
}
PENALTIES = ("l1", "l2", "hoyer", "wcr", "scale_free", "per_unit", "target", "target_latent")


def main(suite: str, argv: Sequence[str] | None = None) -> int:
    """Run a suite; see ``--help``."""
    o = _parse(suite, argv)
    results = runner.Results(o.output / f"{suite}.csv", COLUMNS, KEY, NUMBERS)
    work = functools.partial(_run, o.device, tuple(o.sparsities))
    lengths: dict[str, int] = {}
    for task in o.tasks:
        methods = _with_bases(o.methods) if o.methods else every_method(task, quick=o.quick)
        steps = lengths[task] = _length(task, o.share)
        searched = [method for method in methods if _is_searched(method) or method in _bases(task)]
        common: dict[str, Any] = {"steps": steps, "options": o.options}
        ready = functools.partial(prepare, task)
        if o.split in ("both", "validation"):
            print(f"{task}: strengths, on the validation split", flush=True)
            trials = tuning.searches(task, searched, o.strengths, [0], **common)
            runner.run_missing(work, trials, steps_of, results, o.jobs, ready)
            while not o.quick:
                rows = tuning.of_run(_of_task(results, task), lengths, o.options)
                trials = tuning.beyond(task, searched, o.strengths, rows, [0], steps)
                if not trials:
                    break
                print(f"{task}: searches that go on, as their best strength or rho was their largest", flush=True)
                runner.run_missing(work, trials, steps_of, results, o.jobs, ready)
        if o.split == "validation":
            driven = [method for method in methods if Method.of(method).has_goal]
            trials = tuning.searches(task, driven, 1, range(o.seeds), told=o.told, **common)
            runner.run_missing(work, trials, steps_of, results, o.jobs, ready)
            continue
        print(f"{task}: what they chose, on the test split", flush=True)
        rows = tuning.of_run(_of_task(results, task), lengths, o.options)
        trials = tuning.choices(task, methods, rows, range(o.seeds), told=o.told, **common)
        unknown = [m for m in methods if Method.of(m).searched and m not in {trial.method for trial in trials}]
        if unknown:
            print(f"{task}: left out, as no run on the validation split chose for them: {', '.join(unknown)}")
        runner.run_missing(work, trials, steps_of, results, o.jobs, ready)
    if o.split != "validation":
        rows = results.read()
        for task in {row["task"] for row in rows} - set(o.tasks):  # of earlier commands
            with suppress(OSError, ImportError, ValueError):  # it cannot be loaded, which the report says
                length = _length(task, o.share)
                if any(row["task"] == task and int(row["steps"]) == length for row in rows):
                    lengths[task] = length
        report.write(tuning.of_run(rows, lengths, o.options), o.output, suite)
        print(f"see {o.output}/{suite}.md, {suite}.json and the pictures beside them")
    return 0


def _length(task: str, share: float) -> int:
    """Return how many steps a share of a task's is, as `Trial.steps` has them."""
    whole = tasks.task(task).steps
    steps = max(1, round(whole * share))
    return 0 if steps == whole else steps


def _of_task(results: runner.Results, task: str) -> list[runner.Row]:
    """Read a task's rows: choices read what they are given for every method and sparsity."""
    return [row for row in results.read() if row["task"] == task]


def _run(device: str, sparsities: tuple[float, ...], trial: Trial, progress: Callable[[], None]) -> list[runner.Row]:
    return run_trial(trial, device, progress, sparsities)


def _is_searched(method: str) -> bool:
    """Say whether anything is chosen on validation: a strength, a radius, or what SparsityTarget is told (`told`)."""
    return Method.of(method).searched is not None or Method.of(method).is_driven


def every_method(task: str, *, quick: bool = False) -> list[str]:
    """List the methods of a task: bases and sharpness-aware ones, with and without penalties, and yardsticks.

    torchao's ProxLasso is among them where torchao is installed.
    """
    bases = _bases(task)
    if quick:
        return _with(bases[0], ("", "hoyer", "wcr", "scale_free", "target"))
    prox = ("prox",) if find_spec("torchao") else ()
    methods = [name for base in bases for name in _with(base, ("", *PENALTIES, *prox))]
    for sharpness in SHARPNESS:
        methods += _with(f"{bases[0]}+{sharpness}", ("", "wcr", "scale_free", "target"))
    return [*methods, f"{bases[0]}+random", f"{bases[0]}+gradual"]


def _bases(task: str) -> list[str]:
    return list(tasks.task(task).lr)


def _with_bases(methods: Sequence[str]) -> list[str]:
    """Add what methods are compared with: without a dense value of their base, none is within tolerance of it."""
    bases = [Method.of(method).base for method in methods]
    return list(dict.fromkeys([*bases, *methods]))


def _with(inner: str, penalties: Sequence[str]) -> list[str]:
    return [f"{inner}+{penalty}" if penalty else inner for penalty in penalties]


def _parse(suite: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {suite}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="five methods, three strengths, two seeds, half the steps")
    size.add_argument("--full", action="store_true", help="all methods, ten strengths, three seeds, into docs/results")
    parser.add_argument(
        "--tasks", type=names, default=list(SUITES[suite]), help=f"(default: {','.join(SUITES[suite])})"
    )
    parser.add_argument(
        "--methods",
        type=names,
        help="names such as sgd,sgd+wcr,adamw+sam+target, to which their bases are added (default: all; sgd+prox and "
        "adamw+prox if torchao is there)",
    )
    parser.add_argument(
        "--seeds",
        type=count,
        help="runs on the test split of each choice, and of SparsityTarget with --split validation (default: 3)",
    )
    parser.add_argument("--strengths", type=count, help="strengths of each search (default: 5)")
    parser.add_argument(
        "--sparsities",
        type=listed(sparsity),
        default=SPARSITIES,
        help="to prune at in runs that the file does not hold yet (default: 0 to 0.99)",
    )
    parser.add_argument(
        "--told",
        type=_goals,
        default=[],
        help="what SparsityTarget is told beside the sparsities that are compared; its goal is searched on the "
        "validation split, with --split validation (default: nothing)",
    )
    parser.add_argument("--share", type=_share, help="of the task's steps to train for (default: 1)")
    parser.add_argument("--options", default="", help="of SparsityTarget, as name=value;name=value")
    parser.add_argument("--split", choices=("both", "validation", "test"), default="both", help="(default: both)")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--jobs", type=count, default=os.cpu_count() or 1, help="runs at a time (default: one a core)")
    parser.add_argument("--output", type=Path, help="folder of the results (default: results)")
    o = parser.parse_args(argv)
    o.seeds = o.seeds or (2 if o.quick else 3)
    o.strengths = o.strengths or (3 if o.quick else 10 if o.full else 5)
    o.share = (0.5 if o.quick else 1.0) if o.share is None else o.share
    o.output = o.output or Path("results/quick" if o.quick else "docs/results" if o.full else "results")
    try:
        for task in o.tasks:
            known = tasks.task(task)
            if known.suite != suite:
                raise ValueError(f"task {task} belongs to another file of results: python -m benchmarks {known.suite}")
            bad = [name for name in o.methods or () if Method.of(name).base not in known.lr]
            if bad:
                raise ValueError(f"task {task} has no setting for the base of {bad[0]!r}; it has {', '.join(known.lr)}")
            for name in o.methods or ():
                tuning.grid(task, name, o.strengths)
            o.sparsities = sorted({0.0, *known.goals, *o.sparsities})
        parts = [Method.of(name) for name in o.methods or ("sgd+target",)]
        for method in parts:
            _try(method, o.options)
        if o.options and not any(method.is_driven for method in parts):
            raise ValueError(f"--options {o.options!r} are of SparsityTarget, and none of --methods has it")
        prepare_for_pictures(o.output)
        check_data(o.tasks, runner.Results(o.output / f"{suite}.csv", COLUMNS, KEY, NUMBERS).read(), o.device)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    return o


def _try(method: Method, options: str) -> None:
    """Build a method's optimizer and what follows it around a small network; raise what is wrong with them."""
    if any("=" not in option for option in options.split(";") if option):
        raise ValueError(f"--options takes name=value;name=value, got {options!r}")
    check_options(options)
    optimizer = method.optimizer(nn.Linear(4, 4), lr=0.1, weight_decay=0.0, strength=1.0)
    if method.is_driven:
        own = {name: value for name, value in read_options(options).items() if name not in OF_RUNS}
        try:
            SparsityTarget(optimizer, 0.9, 100, **own)
        except TypeError as error:
            raise ValueError(f"--options {options!r}: {error}") from error


def _share(text: str) -> float:
    share = float(text)
    if not 0.0 < share < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return share


def _goals(text: str) -> list[float]:
    values = listed(sparsity)(text)
    if {0.0, 1.0} & set(values):
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, both excluded, got {text}")
    return values
