"""The gradient's norm over training with and without a penalty: ``python -m benchmarks convergence``.

SGD without momentum on mini-batches of the digits, learning rate 0.5 / sqrt(1 + t / 100), on a convex problem
(logistic regression with a little weight decay in the loss) and a non-convex one (the MLP). Drawn is the squared norm
of the full training gradient of the *loss alone*, averaged over the last third of the steps so far: without a penalty
it falls; with a constant strength it settles where loss and penalty balance; with a strength that vanishes it goes on
falling, from higher up.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks import arguments
from benchmarks.tasks import digits, epochs
from wcr_optim import WCR, param_groups
from wcr_optim.files import written_whole

RULES = ("no penalty", "constant strength", "vanishing strength")
STRENGTH = {"convex": 3e-3, "non-convex": 1e-4}
BATCH = 64
DECAY = 1e-3
EVERY = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks convergence", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=arguments.count, default=4000, help="(default: 4000)")
    parser.add_argument("--seeds", type=arguments.count, default=3, help="(default: 3)")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="(default: docs/results)")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="(default: docs/images)")
    o = parser.parse_args(argv)
    try:
        arguments.prepare_for_pictures(o.output, o.images)
    except (ImportError, OSError) as error:
        parser.error(str(error))
    rows = [
        {
            "problem": problem,
            "rule": rule,
            "seed": seed,
            "step": step,
            "squared_norm": f"{squared:.6g}",
            "loss": f"{loss:.6g}",
        }
        for problem in STRENGTH
        for rule in RULES
        for seed in range(o.seeds)
        for step, squared, loss in descent(problem, rule, seed, o.steps)
    ]
    with written_whole(o.output / "convergence.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, o.images / "convergence.png")
    print("mean over all steps of the squared gradient norm of the loss, and over the last tenth")
    for problem in STRENGTH:
        for rule in RULES:
            found = [row for row in rows if (row["problem"], row["rule"]) == (problem, rule)]
            every = [float(row["squared_norm"]) for row in found]
            last = [float(row["squared_norm"]) for row in found if int(row["step"]) >= 0.9 * (o.steps - EVERY)]
            print(f"{problem:12}{rule:22}{sum(every) / len(every):10.2e}{sum(last) / len(last):10.2e}")
    return 0


def descent(problem: str, rule: str, seed: int, steps: int) -> list[tuple[int, float, float]]:
    """Train, and measure the squared norm of the full gradient of the loss and the loss every 20 steps."""
    torch.manual_seed(seed)
    data = digits.load()["train"]
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) if problem == "convex" else digits.mlp()
    strength = 0.0 if rule == "no penalty" else STRENGTH[problem]
    base = torch.optim.SGD(param_groups(network, weight_concentration=strength), lr=0.5)
    optimizer = WCR(base, form="scale_free") if strength else base
    weights = list(network.parameters())

    def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        decay = sum((w.square().sum() for w in weights), torch.zeros(()))
        return cross_entropy(network(images), labels) + DECAY / 2 * decay

    found = []
    for step, (images, labels) in enumerate(epochs(*data, BATCH, seed, steps)):
        if step % EVERY == 0:
            whole = loss(*data)
            squared = sum(g.square().sum().item() for g in torch.autograd.grad(whole, weights))
            found.append((step, squared, whole.item()))
        for group in optimizer.param_groups:
            group["lr"] = 0.5 / math.sqrt(1 + step / 100)
        if rule == "vanishing strength":
            optimizer.param_groups[0]["weight_concentration"] = strength / math.sqrt(1 + step / 100)
        optimizer.zero_grad()
        loss(images, labels).backward()
        optimizer.step()
    return found


def draw(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Draw the squared norm, smoothed, a panel for each problem, a reference of 1/sqrt(T) beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, squeeze=False)[0]
    for ax, problem in zip(axes, STRENGTH, strict=True):
        for rule, colour in zip(RULES, ("#0072B2", "#D55E00", "#009E73"), strict=True):
            by_step: dict[int, list[float]] = {}
            for row in rows:
                if (row["problem"], row["rule"]) == (problem, rule):
                    by_step.setdefault(int(str(row["step"])), []).append(float(str(row["squared_norm"])))
            steps = sorted(by_step)
            means = torch.tensor([sum(by_step[step]) / len(by_step[step]) for step in steps])
            running = torch.stack([means[k - k // 3 : k + 1].mean() for k in range(len(means))])
            ax.plot([step + 1 for step in steps], running, color=colour, label=rule)
            if rule == RULES[0]:
                start = max(1, len(steps) // 10)
                reference = [float(running[start]) * math.sqrt(steps[start] / step) for step in steps[start:]]
                ax.plot(steps[start:], reference, color="0.55", linestyle=":", label="1/sqrt(T)")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(f"{problem} problem", fontsize="medium")
        ax.set_xlabel("steps T")
        ax.grid(color="0.92", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("squared gradient norm of the loss,\nmean of the last third")
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=200)
