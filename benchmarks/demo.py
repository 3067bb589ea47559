"""From training to a pruned network: SGD, SGD + WCR and SGD + scale-free WCR on real handwritten digits.

Trains a small CNN with each method from several seeds, prunes each network once by global magnitude at rising
sparsities, estimates its BatchNorm statistics anew on training images, and measures accuracy. No retraining.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks import arguments, runner
from benchmarks.methods import SHARPNESS, Method
from benchmarks.tasks import SPARSITIES, digits
from wcr_optim import plots, pruning

BATCH = 64
LR = {"sgd": 0.1, "adamw": 2e-3}
WEIGHT_DECAY = 5e-4
OPTIMIZERS = [*LR, *SHARPNESS]
FORMS = ("wcr", "scale_free")
# Chosen on the validation images with `--split validation` from 1e-3 ... 1e-1; see the README on how to choose.
STRENGTHS = {None: 0.0, "wcr": 3e-3, "scale_free": 3e-2}


@dataclass(frozen=True)
class Trial:
    """One training run."""

    method: Method
    strength: float
    seed: int
    epochs: int
    split: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; see ``--help``."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        arguments.prepare_for_pictures(Path(options.output))
    except (ImportError, OSError) as error:
        parser.error(str(error))
    methods = _methods(options)
    trials = [
        Trial(method, _strength(method, options), seed, options.epochs, options.split)
        for seed in range(options.seeds)
        for method in methods
    ]
    started = time.perf_counter()
    rows = [row for rows in runner.run(run_trial, trials, _epochs, options.jobs, unit="epoch") for row in rows]
    folder = Path(options.output)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods",
        type=arguments.some_of(OPTIMIZERS),
        default=["sgd"],
        help=f"comma-separated, of {','.join(OPTIMIZERS)} (default: sgd)",
    )
    parser.add_argument(
        "--wcr",
        choices=("both", "with", "without"),
        default="both",
        help="each base with weight concentration, without it, or both (default: both)",
    )
    parser.add_argument(
        "--forms",
        type=arguments.some_of(FORMS),
        default=list(FORMS),
        help=f"of weight concentration (default: {','.join(FORMS)})",
    )
    parser.add_argument(
        "--strength", type=arguments.number, help="of weight concentration (default: chosen on validation)"
    )
    parser.add_argument("--seeds", type=arguments.count, default=3, help="runs of each method (default: 3)")
    parser.add_argument("--epochs", type=arguments.count, default=40, help="(default: 40)")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="images to measure accuracy on")
    parser.add_argument("--jobs", type=arguments.count, default=2, help="runs at a time, one core each (default: 2)")
    parser.add_argument("--output", default="results", help="folder of demo.png and demo.csv (default: results)")
    return parser


def _methods(options: argparse.Namespace) -> list[Method]:
    forms: list[str | None] = []
    if options.wcr != "with":
        forms.append(None)
    if options.wcr != "without":
        forms += options.forms
    return [
        Method("sgd", name, form) if name in SHARPNESS else Method(name, penalty=form)
        for name, form in itertools.product(options.methods, forms)
    ]


def _strength(method: Method, options: argparse.Namespace) -> float:
    if method.penalty is None or options.strength is None:
        return STRENGTHS[method.penalty]
    strength: float = options.strength
    return strength


def _name(method: Method) -> str:
    return method.name.removeprefix("sgd+") if method.sharpness else method.name  # all of them are around SGD here


def _label(method: Method) -> str:
    return method.label.removeprefix("SGD + ") if method.sharpness else method.label


def _epochs(trial: Trial) -> int:
    return trial.epochs


def run_trial(trial: Trial, progress: Callable[[], None]) -> list[dict[str, Any]]:
    """Train, prune at every sparsity and measure; one row per sparsity."""
    started = time.perf_counter()
    data = digits.load()
    torch.manual_seed(trial.seed)
    model = digits.cnn()
    evaluations = train(model, trial, data["train"], progress)
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
            "method": _name(trial.method),
            "seed": trial.seed,
            "strength": trial.strength,
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


def train(model: torch.nn.Module, trial: Trial, split: digits.Split, progress: Callable[[], None]) -> int:
    """Train with a cosine schedule; return how many gradients of a mini-batch were computed."""
    optimizer = trial.method.optimizer(model, LR[trial.method.base], WEIGHT_DECAY, trial.strength)
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
        progress()
    return evaluations


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write one line per trial and sparsity."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _values(rows: Sequence[dict[str, Any]], method: Method, sparsity: float) -> list[float]:
    return [row["value"] for row in rows if row["method"] == _name(method) and row["sparsity"] == sparsity]


def table(rows: Sequence[dict[str, Any]], methods: Sequence[Method]) -> str:
    """Lay out mean ± standard deviation, methods down and sparsities across."""
    width = max(len(_label(method)) for method in methods)
    lines = [" " * width + "".join(f"{sparsity:>13.0%}" for sparsity in SPARSITIES)]
    for method in methods:
        cells = []
        for sparsity in SPARSITIES:
            values = _values(rows, method, sparsity)
            spread = f" ±{statistics.stdev(values):5.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}".rjust(13))
        lines.append(_label(method).ljust(width) + "".join(cells))
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], methods: Sequence[Method], path: Path) -> None:
    """Draw accuracy against sparsity, one line per method, with a band of one standard deviation."""
    curves = {
        _label(method): [(row["sparsity"], row["value"]) for row in rows if row["method"] == _name(method)]
        for method in methods
    }
    plots.sparsity_accuracy(curves, path, ylabel="accuracy (%)")


if __name__ == "__main__":
    sys.exit(main())
