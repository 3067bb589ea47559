"""What each part of the method is worth: ``python -m benchmarks ablations``.

On one task, at strengths that are searched for each variant anew: the threshold's rule, the exact flow against an
explicit gradient step, a step of its own against a term in the loss, an early end or a late start, with and without
weight decay, all layers or all but the first and the last. Every run is also pruned per layer, in N:M patterns, and
quantized to int8 after pruning.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import arguments, runner, tasks, tuning, ways
from benchmarks.methods import BASES
from benchmarks.report import cell, filled
from benchmarks.trials import COLUMNS, KEY, NUMBERS, Trial, check_data, prepare, run_trial, steps_of
from wcr_optim.files import written_whole

VARIANTS: dict[str, list[tuple[str, str, str]]] = {
    "Threshold's rule": [
        ("mean magnitude (WCR)", "wcr", ""),
        ("energy-weighted mean (scale-free WCR)", "scale_free", ""),
        ("energy-weighted mean (Hoyer-square)", "hoyer", ""),
        ("the same for all (l1)", "l1", ""),
    ],
    "How the step is taken": [
        ("WCR: exact flow", "wcr", ""),
        ("WCR: exact flow, growth not bounded", "wcr_unguarded", ""),
        ("WCR: explicit gradient step", "wcr_explicit", ""),
        ("WCR: in the loss", "wcr_in_loss", ""),
        ("scale-free: exact flow", "scale_free", ""),
        ("scale-free: exact flow, growth not bounded", "scale_free_unguarded", ""),
        ("scale-free: explicit gradient step", "scale_free_explicit", ""),
        ("scale-free: in the loss", "scale_free_in_loss", ""),
    ],
    "When": [
        ("scale-free: the whole run", "scale_free", ""),
        ("the first half", "scale_free", "until=0.5"),
        ("all but the first quarter", "scale_free", "from=0.25"),
        ("the last half", "scale_free", "from=0.5"),
        ("the last quarter", "scale_free", "from=0.75"),
    ],
    "Weight decay": [
        ("WCR with weight decay", "wcr", ""),
        ("WCR without", "wcr", "wd=0"),
        ("scale-free with weight decay", "scale_free", ""),
        ("scale-free without", "scale_free", "wd=0"),
    ],
    "Which layers": [
        ("scale-free: all weights", "scale_free", ""),
        ("all but the first and the last layer", "scale_free", "layers=inner"),
        ("biases and norms too", "scale_free", "layers=all"),
    ],
}
"""Tables of names, penalties and options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ablations; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ablations", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=arguments.names, default=["digits_cnn"], help="(default: digits_cnn)")
    parser.add_argument("--base", choices=BASES, default="sgd", help="(default: sgd)")
    parser.add_argument("--seeds", type=arguments.count, default=3, help="runs on the test split (default: 3)")
    parser.add_argument("--strengths", type=arguments.count, default=7, help="of each search (default: 7)")
    parser.add_argument("--steps", type=arguments.count, default=0, help="of a run; leaves --page alone (default: all)")
    parser.add_argument("--jobs", type=arguments.count, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--device", type=arguments.device, default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder (default: docs/results)")
    parser.add_argument("--page", type=Path, help="page whose tables are renewed (default: docs/results.md)")
    o = parser.parse_args(argv)
    results = runner.Results(o.output / "ablations.csv", COLUMNS, KEY, NUMBERS)
    try:
        for task in o.tasks:
            known = tasks.task(task).lr
            if o.base not in known:
                raise ValueError(f"task {task} has no setting for --base {o.base}; it has {', '.join(known)}")
        if o.page is not None and not o.page.is_file():
            raise ValueError(f"there is no page {o.page} to renew")
        arguments.prepare_folders(o.output)
        check_data(o.tasks, results.read(), o.device)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    path = o.page or Path("docs/results.md")
    work = functools.partial(_run, o.device)
    variants = list(dict.fromkeys((penalty, options) for rows in VARIANTS.values() for _, penalty, options in rows))
    for task in o.tasks:
        ready = functools.partial(prepare, task)
        plain = [Trial(task, o.base, 0, split="validation", steps=o.steps)]
        for penalty, options in variants:
            method = f"{o.base}+{penalty}"
            for strength, rho in tuning.grid(task, method, o.strengths):
                plain.append(Trial(task, method, 0, strength, rho, options=options, steps=o.steps))
        runner.run_missing(work, plain, steps_of, results, o.jobs, ready)
        rows = _of_length(results, o.steps)
        tested = [Trial(task, o.base, seed, split="test", steps=o.steps) for seed in range(o.seeds)]
        for penalty, options in variants:
            for goal in tasks.task(task).goals:
                pair = tuning.chosen(rows, task, f"{o.base}+{penalty}", goal, options=options)
                if pair is not None:
                    tested += [
                        Trial(task, f"{o.base}+{penalty}", seed, *pair, options=options, split="test", steps=o.steps)
                        for seed in range(o.seeds)
                    ]
        runner.run_missing(work, tested, steps_of, results, o.jobs, ready)
        text = report(_of_length(results, o.steps), task, o.base)
        print(text)
        if path.exists() and not o.steps:
            first = next(iter(tasks.task(task).lr))  # which the tables without a base's name are of
            name = f"ablations {task}" if o.base == first else f"ablations {task} {o.base}"
            page = filled(path.read_text(encoding="utf-8"), name, text)
            with written_whole(path) as temporary:
                temporary.write_text(page, encoding="utf-8")
    return 0


def _of_length(results: runner.Results, steps: int) -> tuning.Rows:
    """Return the rows of runs of one length: others would be averaged with them."""
    return [row for row in results.read() if int(row["steps"]) == steps]


def _run(device: str, trial: Trial, progress: Callable[[], None]) -> list[runner.Row]:
    return run_trial(trial, device, progress)


def report(rows: tuning.Rows, task: str, base: str) -> str:
    """Lay out a table for each question, and one of the ways to prune and quantize."""
    kind = tasks.task(task)
    head = "".join(f" {100 * goal:g} % (dense) |" for goal in kind.goals)
    blocks = []
    for title, variants in VARIANTS.items():
        lines = [f"| {title} |{head}", "|---" * (len(kind.goals) + 1) + "|"]
        for name, penalty, options in variants:
            cells = [_cell(rows, task, f"{base}+{penalty}", options, goal) for goal in kind.goals]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    plain = [row for row in rows if not row["options"]]
    shown = [base, *(f"{base}+{penalty}" for penalty in ("l1", "hoyer", "wcr", "scale_free"))]
    blocks.append(ways.of_task(plain, task, shown))
    return "\n\n".join(blocks)


def _cell(rows: tuning.Rows, task: str, method: str, options: str, goal: float) -> str:
    own = [dict(row) | {"options": ""} for row in rows if (row["method"], row["options"]) == (method, options)]
    found = cell(own, task, method, goal)
    if found is None:
        return "–"
    if not found.values:
        return f"diverged at {found.strength:g}"
    failed = f", {found.failed} of {found.failed + len(found.values)} diverged" if found.failed else ""
    places = tasks.task(task).places
    return f"{ways.mean_text(found.values, places)} ({found.dense_mean:.{places}f}) at {found.strength:g}{failed}"
