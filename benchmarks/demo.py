"""From training to a pruned network: SGD, SGD + WCR and SGD + scale-free WCR on real handwritten digits.

Trains a small CNN with each method from several seeds, prunes each network once by global magnitude at rising
sparsities, estimates its BatchNorm statistics anew on training images, and measures accuracy. No retraining.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from benchmarks.methods import BASES, FORMS, Method
from benchmarks.tasks import digits
from wcr_optim import plots, pruning

SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
BATCH = 64
# Chosen on the validation images with `--split validation` from 1e-3 ... 1e-1; see the README on how to choose.
STRENGTHS = {None: 0.0, "wcr": 3e-3, "scale_free": 3e-2}


@dataclass(frozen=True)
class Trial:
    """One training run."""

    method: Method
    seed: int
    epochs: int
    split: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; see ``--help``."""
    options = _parse(argv)
    methods = _methods(options)
    trials = [Trial(method, seed, options.epochs, options.split) for seed in range(options.seeds) for method in methods]
    started = time.perf_counter()
    rows = run(trials, options.jobs)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(rows, folder / "demo.csv")
    draw(rows, methods, folder / "demo.png")
    print(table(rows, methods))
    print(
        f"\nAccuracy in percent on {options.split} images, mean ± sample standard deviation over "
        f"{options.seeds} seed{'s' if options.seeds > 1 else ''}. "
        f"One-shot global magnitude pruning of {rows[0]['prunable']:,} of {rows[0]['parameters']:,} parameters, "
        f"BatchNorm statistics estimated anew on training images, no retraining."
    )
    print(f"{len(trials)} runs in {time.perf_counter() - started:.0f} s; see {folder}/demo.png and {folder}/demo.csv")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks demo", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="sgd", help=f"bases, comma-separated, of {','.join(BASES)} (default: sgd)")
    parser.add_argument(
        "--wcr",
        choices=("both", "with", "without"),
        default="both",
        help="each base with weight concentration, without it, or both (default: both)",
    )
    parser.add_argument(
        "--forms", default=",".join(FORMS), help=f"of weight concentration (default: {','.join(FORMS)})"
    )
    parser.add_argument("--strength", type=float, help="of weight concentration (default: chosen on validation)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: 3)")
    parser.add_argument("--epochs", type=int, default=40, help="(default: 40)")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="images to measure accuracy on")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each (default: 2)")
    parser.add_argument("--output", default="results", help="folder of demo.png and demo.csv (default: results)")
    options = parser.parse_args(argv)
    for name in ("seeds", "epochs", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    for name, known in (("methods", BASES), ("forms", FORMS)):
        unknown = [entry for entry in getattr(options, name).split(",") if entry not in known]
        if unknown:
            parser.error(f"--{name}: unknown {unknown[0]!r}; choose of {', '.join(known)}")
    return options


def _methods(options: argparse.Namespace) -> list[Method]:
    forms: list[str | None] = []
    if options.wcr != "with":
        forms.append(None)
    if options.wcr != "without":
        forms += options.forms.split(",")
    return [
        Method(base, form, STRENGTHS[form] if options.strength is None or form is None else options.strength)
        for base, form in itertools.product(options.methods.split(","), forms)
    ]


def run(trials: Sequence[Trial], jobs: int) -> list[dict[str, Any]]:
    """Run trials side by side, with a progress bar over their epochs; rows in the trials' order."""
    context = multiprocessing.get_context("spawn")
    epochs_done = context.Value("i", 0)
    total = sum(trial.epochs for trial in trials)
    with (
        tqdm(total=total, unit="epoch", desc="training", dynamic_ncols=True) as bar,
        ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(epochs_done,)) as pool,
    ):
        futures = [pool.submit(run_trial, trial) for trial in trials]
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(epochs_done.value - bar.n)
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [row for future in futures for row in future.result()]


_epochs_done: Any = None


def _start(counter: Any) -> None:
    global _epochs_done
    _epochs_done = counter
    torch.set_num_threads(1)


def run_trial(trial: Trial) -> list[dict[str, Any]]:
    """Train, prune at every sparsity and measure; one row per sparsity."""
    started = time.perf_counter()
    data = digits.load()
    torch.manual_seed(trial.seed)
    model = digits.cnn()
    evaluations = train(model, trial, data["train"])
    seconds = time.perf_counter() - started
    result = pruning.sweep(
        model,
        lambda pruned: digits.accuracy(pruned, data[trial.split]),
        SPARSITIES,
        calibration=[data["train"].images],
        progress=False,
    )
    return [
        {
            "task": digits.NAME,
            "method": trial.method.name,
            "seed": trial.seed,
            "strength": trial.method.strength,
            "sparsity": row.sparsity,
            "recalibrated": result.recalibrated,
            "split": trial.split,
            "metric": "accuracy",
            "value": value,
            "seconds": round(seconds, 2),
            "gradient_evaluations": evaluations,
            "prunable": row.total,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        for row, value in zip(result.rows, result.values(), strict=True)
    ]


def train(model: torch.nn.Module, trial: Trial, split: digits.Split) -> int:
    """Train with a cosine schedule; return how many gradients of a mini-batch were computed."""
    optimizer = trial.method.optimizer(model)
    batches = len(split.images) // BATCH
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, trial.epochs * batches)
    evaluations = 0
    model.train()
    for _ in range(trial.epochs):
        for index in torch.randperm(len(split.images))[: batches * BATCH].view(batches, BATCH):
            images, labels = split.images[index], split.labels[index]

            def closure(images: torch.Tensor = images, labels: torch.Tensor = labels) -> torch.Tensor:
                nonlocal evaluations
                evaluations += 1
                optimizer.zero_grad()
                loss = cross_entropy(model(images), labels)
                loss.backward()
                return loss

            optimizer.step(closure)
            scheduler.step()
        if _epochs_done is not None:
            with _epochs_done.get_lock():
                _epochs_done.value += 1
    return evaluations


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write one line per trial and sparsity."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _values(rows: Sequence[dict[str, Any]], method: Method, sparsity: float) -> list[float]:
    return [row["value"] for row in rows if row["method"] == method.name and row["sparsity"] == sparsity]


def table(rows: Sequence[dict[str, Any]], methods: Sequence[Method]) -> str:
    """Lay out mean ± standard deviation, methods down and sparsities across."""
    width = max(len(method.label) for method in methods)
    lines = [" " * width + "".join(f"{sparsity:>13.0%}" for sparsity in SPARSITIES)]
    for method in methods:
        cells = []
        for sparsity in SPARSITIES:
            values = _values(rows, method, sparsity)
            spread = f" ±{statistics.stdev(values):5.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}".rjust(13))
        lines.append(method.label.ljust(width) + "".join(cells))
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], methods: Sequence[Method], path: Path) -> None:
    """Draw accuracy against sparsity, one line per method, with a band of one standard deviation."""
    curves = {
        method.label: [(row["sparsity"], row["value"]) for row in rows if row["method"] == method.name]
        for method in methods
    }
    plots.sparsity_accuracy(curves, path, ylabel="accuracy (%)")


if __name__ == "__main__":
    sys.exit(main())
