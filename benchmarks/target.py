"""SparsityTarget against tuned strengths: l1, Hoyer-square, WCR in every form, on digits and language.

    python -m benchmarks target train --task digits_mlp --optimizer sgd --method hoyer --strengths grid --seeds 0,1
    python -m benchmarks target test --task digits_mlp --optimizer sgd --method none,l1,hoyer,wcr,target --seeds 0,1,2
    python -m benchmarks target report
    python -m benchmarks target cost

Every training run prunes once at rising sparsities and appends its rows to a CSV file; runs that the file already
holds are skipped, so a killed command continues where it stopped.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks import arguments, runner, tasks
from benchmarks.tasks import SPARSITIES, Task
from benchmarks.trials import check_data, read_options
from benchmarks.tuning import failed
from benchmarks.ways import mean_text
from wcr_optim import WCR, HoyerDecay, L1Decay, SparsityTarget, param_groups, pruning

OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float], Optimizer]] = {
    "sgd": lambda groups, scale: torch.optim.SGD(groups, lr=0.1 * scale, momentum=0.9),
    "adamw": lambda groups, scale: torch.optim.AdamW(groups, lr=1e-3 * scale),
}
WEIGHT_DECAY = {"sgd": 5e-4, "adamw": 1e-2}
FIXED: dict[str, Callable[[Optimizer, float], Optimizer]] = {
    "none": lambda base, strength: base,
    "l1": L1Decay,
    "hoyer": HoyerDecay,
    "wcr": WCR,
    "scale_free": lambda base, strength: WCR(base, strength, form="scale_free"),
    "relative": lambda base, strength: WCR(base, strength, form="relative"),
}
FORMS = ("l1", "hoyer", "inverse_variance", "scale_free", "per_unit", "relative")
METHODS = (*FIXED, "target", *(f"target:{form}" for form in FORMS))
OPTIONS = ("wd", *list(inspect.signature(SparsityTarget).parameters)[3:])  # beside optimizer, sparsity, total_steps
OF_TRAINING = ("strengths", "lr_scale", "batch_scale", "split")
# The lowest of ten strengths, each 10^(1/3) times the one before, chosen so that the best one lies inside.
LOWEST = {
    ("digits", "sgd"): {"l1": 3e-5, "hoyer": 1e-4, "wcr": 3e-4, "scale_free": 1e-4, "relative": 1e-1},
    ("digits", "adamw"): {"l1": 1e-3, "hoyer": 1e-2, "wcr": 1e-2, "scale_free": 1e-2, "relative": 1e0},
    ("language", "adamw"): {"l1": 3e-3, "hoyer": 1e-3, "wcr": 3e-2, "scale_free": 1e-3, "relative": 3e-1},
}


@dataclass(frozen=True)
class Trial:
    """One training run; its fields are the key by which the CSV knows it."""

    task: str
    optimizer: str
    method: str
    strength: float = 0.0
    goal: float = 0.0
    options: str = ""
    seed: int = 0
    split: str = "validation"
    lr_scale: float = 1.0
    batch_scale: int = 1

    @property
    def key(self) -> tuple[str, ...]:
        """Return the fields as a CSV file holds them."""
        return tuple(str(value) for value in asdict(self).values())


KEY = tuple(field.name for field in fields(Trial))
MEASURED = ("sparsity", "metric", "value", "tail", "last_strength", "steps", "seconds", "warned", "data_hash")
COLUMNS = (*KEY, *MEASURED)
NUMBERS = ("strength", "goal", "seed", "lr_scale", "batch_scale", "sparsity", "value", "steps")


def steps_of(trial: Trial) -> int:
    """Return how many optimizer steps a trial takes."""
    return max(1, tasks.task(trial.task).steps // trial.batch_scale)


def run_trial(trial: Trial, progress: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Train, prune at every sparsity and measure; a row for each, and one without a value of a run that diverged."""
    task = tasks.task(trial.task)
    network = task.model(trial.seed)
    decay = read_options(trial.options).get("wd", WEIGHT_DECAY[trial.optimizer])
    groups = param_groups(network, weight_decay=decay, weight_concentration=0.0, exclude=task.exclude)
    base = OPTIMIZERS[trial.optimizer](groups, trial.lr_scale)
    optimizer, target, steps = base, None, steps_of(trial)
    if trial.method in FIXED:
        optimizer = FIXED[trial.method](base, trial.strength)
    else:
        optimizer, target = _targeted(trial, base, steps)
    for group in optimizer.param_groups[1:]:  # what is not pruned
        for option in ("weight_concentration", "l1_decay", "hoyer_decay"):
            if option in group:
                group[option] = 0.0
    for option in ("weight_concentration", "l1_decay", "hoyer_decay"):
        if option in optimizer.param_groups[0] and trial.method in FIXED:
            optimizer.param_groups[0][option] = trial.strength
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    started = time.perf_counter()
    network.train()
    said = ""
    for batch in task.batches(trial.seed, steps, trial.batch_scale):
        optimizer.zero_grad()
        loss = task.loss(network, batch)
        loss.backward()
        optimizer.step()
        if not loss.isfinite():
            return [_diverged(trial, f"the loss is {loss.item()}")]
        if target is not None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                target.step(loss.detach())
            said = " ".join([said, *(str(w.message) for w in caught)]).strip()
        scheduler.step()
        progress()
    seconds = time.perf_counter() - started
    if not all(w.isfinite().all() for w in network.parameters()):
        return [_diverged(trial, "a weight is NaN or infinite at the end")]
    network.eval()
    result = pruning.sweep(
        network,
        lambda pruned: task.evaluate(pruned, trial.split),
        SPARSITIES,
        calibration=task.calibration() if task.calibration else None,
        exclude=task.exclude,
        progress=False,
    )
    common = {
        "metric": task.metric,
        "tail": "" if target is None else f"{target.last_tail:.4g}",
        "last_strength": "" if target is None else f"{max(target.strengths()):.4g}",
        "steps": steps,
        "seconds": round(seconds, 1),
        "warned": said,
        "data_hash": task.data_hash,
    }
    return [
        asdict(trial) | {"sparsity": row.sparsity, "value": round(value, 4)} | common
        for row, value in zip(result.rows, result.values(), strict=True)
    ]


def _diverged(trial: Trial, why: str) -> dict[str, Any]:
    said = {"steps": steps_of(trial), "warned": f"diverged: {why}", "data_hash": tasks.task(trial.task).data_hash}
    return asdict(trial) | dict.fromkeys(MEASURED, "") | said


def _targeted(trial: Trial, base: Optimizer, steps: int) -> tuple[Optimizer, Any]:
    _, _, form = trial.method.partition(":")
    options = read_options(trial.options)
    options.pop("wd", None)
    if form == "l1":
        optimizer: Optimizer = L1Decay(base)
    elif form == "hoyer":
        optimizer = HoyerDecay(base)
    else:
        for group in base.param_groups[:1]:
            group["weight_concentration"] = 1e-3
        optimizer = WCR(base, form=form or "per_unit")
    return optimizer, SparsityTarget(optimizer, trial.goal, steps, **options)


def grid(task: str, optimizer: str, method: str) -> list[float]:
    """Ten strengths over three decades.

    Raises:
        ValueError: If there are none for that task and optimizer.

    """
    known = LOWEST.get((task.partition("_")[0], optimizer))
    if known is None:
        raise ValueError(f"there is no grid of strengths for {task} with {optimizer}; name them with --strengths")
    lowest = known[method]
    return [float(f"{lowest * 10 ** (k / 3):.3g}") for k in range(10)]


def chosen(rows: Sequence[dict[str, str]], task: str, optimizer: str, method: str, goal: float) -> float | None:
    """Return the strength with the best mean at a sparsity on validation, of equals the one with the best dense value.

    None if no run on validation is there that did not diverge, for any seed.
    """
    values: dict[float, dict[float, list[float]]] = {}
    diverged = set()
    for row in rows:
        same = (row["task"], row["optimizer"], row["method"], row["split"]) == (task, optimizer, method, "validation")
        if not same or float(row["lr_scale"]) != 1.0 or row["batch_scale"] != "1":
            continue
        if failed(row):
            diverged.add(float(row["strength"]))
        else:
            at = values.setdefault(float(row["strength"]), {})
            at.setdefault(float(row["sparsity"]), []).append(float(row["value"]))
    values = {strength: at for strength, at in values.items() if strength not in diverged}
    if not values:
        return None
    best = tasks.task(task).best
    return best(values, key=lambda strength: tuple(statistics.mean(values[strength][at]) for at in (goal, 0.0)))


def _tested(o: argparse.Namespace, rows: Sequence[dict[str, str]]) -> Iterator[Trial]:
    """Yield the runs on the test split: strengths chosen on validation, once per sparsity, and SparsityTarget."""
    for seed, task, optimizer, method in itertools.product(o.seeds, o.task, o.optimizer, o.method):
        goals = o.goals or tasks.task(task).goals
        common: dict[str, Any] = {"seed": seed, "split": "test"}
        if method.startswith("target"):
            yield from (Trial(task, optimizer, method, goal=g, options=x, **common) for g in goals for x in o.options)
        elif method == "none":
            yield Trial(task, optimizer, method, **common)
        else:
            strengths = {chosen(rows, task, optimizer, method, goal) for goal in goals} - {None}
            if not strengths and seed == o.seeds[0]:
                print(f"{task}, {optimizer}: left out, as no run on the validation split chose a strength: {method}")
            yield from (Trial(task, optimizer, method, strength, **common) for strength in sorted(strengths))


def report(rows: Sequence[dict[str, str]]) -> str:
    """Lay out the test runs: for each task and optimizer, dense value -> value at each wanted sparsity."""
    tested = [row for row in rows if row["split"] == "test" and row["lr_scale"] == "1.0" and row["batch_scale"] == "1"]
    text = []
    for task, optimizer in dict.fromkeys((row["task"], row["optimizer"]) for row in tested):
        here = [row for row in tested if (row["task"], row["optimizer"]) == (task, optimizer)]
        goals = tasks.task(task).goals
        text += [f"**{task}, {optimizer}** ({tasks.task(task).metric})", ""]
        text += ["| method | " + " | ".join(f"{100 * goal:g} % (dense)" for goal in goals) + " |"]
        text += ["|---" * (len(goals) + 1) + "|"]
        for method, options in dict.fromkeys((row["method"], row["options"]) for row in here):
            cells = [_cell(rows, here, task, optimizer, method, options, goal) for goal in goals]
            text.append(f"| {method} {options.replace(';', ', ')} | " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def _cell(
    rows: Sequence[dict[str, str]],
    here: Sequence[dict[str, str]],
    task: str,
    optimizer: str,
    method: str,
    options: str,
    goal: float,
) -> str:
    is_target = method.startswith("target")
    strength = 0.0 if is_target or method == "none" else chosen(rows, task, optimizer, method, goal)
    found: dict[float, list[float]] = {goal: [], 0.0: []}
    diverged = 0
    for row in here:
        same = (row["method"], row["options"]) == (method, options) and float(row["strength"]) == strength
        if not same or float(row["goal"]) != (goal if is_target else 0.0):
            continue
        if failed(row):
            diverged += 1
        elif float(row["sparsity"]) in found:
            found[float(row["sparsity"])].append(float(row["value"]))
    if not found[goal] and not diverged:
        return ""
    places = tasks.task(task).places
    at = f" at {strength:g}" if strength else ""
    if not found[goal]:
        return f"diverged{at}"
    said = f", {diverged} of {diverged + len(found[goal])} diverged" if diverged else ""
    return f"{mean_text(found[goal], places)} ({statistics.mean(found[0.0]):.{places}f}){at}{said}"


def _trials(o: argparse.Namespace) -> Iterator[Trial]:
    for seed, task, optimizer, method in itertools.product(o.seeds, o.task, o.optimizer, o.method):
        if method.startswith("target"):
            goals = o.goals or tasks.task(task).goals
            settings: list[dict[str, Any]] = [
                {"goal": goal, "options": options} for goal in goals for options in o.options
            ]
        elif method == "none":
            settings = [{}]
        else:
            strengths = grid(task, optimizer, method) if o.strengths == "grid" else o.strengths
            settings = [{"strength": strength} for strength in strengths]
        for setting, lr, batch in itertools.product(settings, o.lr_scale, o.batch_scale):
            yield Trial(task, optimizer, method, seed=seed, split=o.split, lr_scale=lr, batch_scale=batch, **setting)


def cost() -> str:
    """Measure what a measurement of the tail costs in CPU time, beside a training step; a Markdown table."""
    torch.set_num_threads(1)
    lines = [
        "| model | driven weights | step (ms) | measurement (ms) | share, every 100 steps |",
        "|---|---|---|---|---|",
    ]
    for name in ("digits_cnn", "digits_mlp", "language"):
        task = tasks.task(name)
        network = task.model(0)
        groups = param_groups(network, exclude=task.exclude)
        optimizer = WCR(torch.optim.AdamW(groups), form="per_unit")
        target = SparsityTarget(optimizer, total_steps=10_000)
        batch = next(task.batches(0, 1, 1))

        def step(
            task: Task = task, network: nn.Module = network, optimizer: Optimizer = optimizer, batch: Any = batch
        ) -> None:
            optimizer.zero_grad()
            task.loss(network, batch).backward()
            optimizer.step()

        step()
        target.step(1.0)
        times = [[_cpu_time(step), _cpu_time(target._control)] for _ in range(20)]
        of_step, of_measurement = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        count = sum(p.numel() for p in groups[0]["params"])
        share = of_measurement / (100 * of_step)
        lines.append(f"| {name} | {count:,} | {of_step:.2f} | {of_measurement:.2f} | {100 * share:.2f} % |")
    return "\n".join(lines)


def _cpu_time(work: Callable[[], None]) -> float:
    started = time.process_time()  # not the clock on the wall: other work on the machine does not count
    work()
    return time.process_time() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks target", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "test", "report", "cost"))
    parser.add_argument("--task", type=arguments.names, default=["digits_mlp"], help="(default: digits_mlp)")
    parser.add_argument("--optimizer", type=arguments.some_of(OPTIMIZERS), default=["sgd"], help=",".join(OPTIMIZERS))
    parser.add_argument("--method", type=arguments.some_of(METHODS), default=["target"], help=",".join(METHODS))
    parser.add_argument("--strengths", type=strengths, default="grid", help="'grid' or numbers (default: grid)")
    parser.add_argument("--goals", type=arguments.listed(goal), help="sparsities (default: the task's)")
    parser.add_argument(
        "--options", type=options, nargs="+", default=[""], help="of SparsityTarget, as name=value;name=value"
    )
    parser.add_argument("--seeds", type=arguments.listed(int), default=[0])
    parser.add_argument("--lr-scale", type=arguments.listed(arguments.number), default=[1.0])
    parser.add_argument("--batch-scale", type=arguments.listed(arguments.count), default=[1])
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--jobs", type=arguments.count, default=1)
    parser.add_argument("--output", type=Path, default=Path("docs/results/target.csv"))
    o = parser.parse_args(argv)
    if o.what == "cost":
        print(cost())
        return 0
    results = runner.Results(o.output, COLUMNS, KEY, NUMBERS)
    try:
        rows = results.read()
        if o.what == "report":
            text = report(rows)
            if not text:
                raise ValueError(f"{o.output} has no runs on the test split; `benchmarks target test` adds them")
            print(text)
            return 0
        check_data(o.task, rows)
        given = [name for name in OF_TRAINING if getattr(o, name) != parser.get_default(name)]
        if o.what == "test" and given:
            raise ValueError(
                f"--{given[0].replace('_', '-')} is of `benchmarks target train`; what is tested was chosen on the "
                "validation split, at the usual learning rate and batch"
            )
        trials = list(_trials(o) if o.what == "train" else _tested(o, rows))
        arguments.prepare_folders(o.output.parent)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    runner.run_missing(run_trial, trials, steps_of, results, o.jobs)
    return 0


def strengths(text: str) -> str | list[float]:
    """Read the argument --strengths."""
    return text if text == "grid" else arguments.listed(arguments.number)(text)


def goal(text: str) -> float:
    """Read an entry of --goals."""
    if float(text) not in SPARSITIES[1:]:
        known = ", ".join(f"{sparsity:g}" for sparsity in SPARSITIES[1:])
        raise argparse.ArgumentTypeError(f"networks are pruned to {known}, got {text}")
    return float(text)


def options(text: str) -> str:
    """Read an entry of --options, and try it here rather than in every run."""
    found = read_options(text)
    for name, value in found.items():
        if name not in OPTIONS or value == "":
            known = ", ".join(OPTIONS)
            raise argparse.ArgumentTypeError(f"{text!r} is not name=value;name=value with names of {known}")
    try:
        groups = param_groups(nn.Linear(2, 2), weight_decay=found.pop("wd", 0.0))
        SparsityTarget(WCR(torch.optim.AdamW(groups), form="per_unit"), total_steps=10_000, **found)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return text


if __name__ == "__main__":
    sys.exit(main())
