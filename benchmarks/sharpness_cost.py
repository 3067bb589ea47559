"""A training step of SAM, SSAM and their relatives, beside the same step of their base alone.

All methods train a network of their own, a CIFAR-sized ResNet-18 of 11 million parameters, on the same random images in
one process. They take turns, one step each, in an order that rotates from round to round, so that whatever else the
machine does hits all of them alike; a ratio is that of two steps of one round. A step is everything from zero_grad to
the updated weights.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wcr_optim.sharpness import SAM, SSAM, CrAM, SparseSAM

Make = Callable[[Optimizer, nn.Module], Optimizer]

METHODS: dict[str, Make] = {
    "base": lambda base, model: base,
    "ssam": lambda base, model: SSAM(base),
    "ssam-closure": lambda base, model: SSAM(base),
    "sam": lambda base, model: SAM(base, model=model),
    "asam": lambda base, model: SAM(base, rho=0.5, adaptive=True, eta=0.01, model=model),
    "sparse-sam": lambda base, model: SparseSAM(base, model=model),
    "cram": lambda base, model: CrAM(base, model=model),
}
PLAIN = ("base", "ssam")  # stepped without a closure
BASES: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, the basic block of ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual + shortcut)."""
        result: Tensor = torch.relu(self.residual(x) + self.shortcut(x))
        return result


def resnet18(classes: int = 10, width: int = 64) -> nn.Sequential:
    """ResNet-18 in its form for 32x32 images; 11,173,962 parameters at width 64.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """
    blocks: list[nn.Module] = []
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        blocks += [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inputs, classes),
    )


@dataclass
class Run:
    """One method's network, and the seconds that its steps took.

    Attributes:
        seconds: Of whole steps.
        own: Of what was not forward and backward.
    """

    name: str
    model: nn.Module
    optimizer: Optimizer
    seconds: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take one training step."""
        passes = 0.0

        def closure() -> Tensor:
            nonlocal passes
            began = time.perf_counter()
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            passes += time.perf_counter() - began
            return loss

        start = time.perf_counter()
        if self.name in PLAIN:
            closure()
            self.optimizer.step()
        else:
            self.optimizer.step(closure)
        self.seconds.append(time.perf_counter() - start)
        self.own.append(self.seconds[-1] - passes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement and print a table."""
    options = _arguments(argv)
    torch.set_num_threads(options.threads)
    names = ["base", *(name for name in options.methods if name != "base")]
    runs = [_run(name, options) for name in names]
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    print(
        f"{parameters:,} parameters, batches of {options.batch} images of 32x32, {options.base} below, "
        f"{options.rounds} rounds after {options.warmup} to warm up\n",
        flush=True,
    )
    generator = torch.Generator().manual_seed(0)
    for number in range(options.warmup + options.rounds):
        x = torch.randn(options.batch, 3, 32, 32, generator=generator)
        y = torch.randint(10, (options.batch,), generator=generator)
        first = number % len(runs)
        for run in runs[first:] + runs[:first]:
            run.step(x, y)
        if sys.stderr.isatty():
            print(f"\rround {number + 1} of {options.warmup + options.rounds}", end="", file=sys.stderr)
    for run in runs:
        del run.seconds[: options.warmup], run.own[: options.warmup]
    _print(runs)
    return 0


def _run(name: str, options: argparse.Namespace) -> Run:
    torch.manual_seed(0)
    model = resnet18(width=options.width)
    return Run(name, model, METHODS[name](BASES[options.base](model), model))


def _print(runs: Sequence[Run]) -> None:
    print(f"\n{'':14}{'step, s':>9}{'of it own, s':>14}{'ratio to base: median':>24}{'quartiles':>16}{'range':>16}")
    base = runs[0]
    for run in runs:
        step, own = statistics.median(run.seconds), statistics.median(run.own)
        line = f"{run.name:14}{step:9.3f}{own:14.3f}"
        if run is not base:
            ratios = sorted(mine / theirs for mine, theirs in zip(run.seconds, base.seconds, strict=True))
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            line += f"{middle:24.3f}{f'{low:.3f}-{high:.3f}':>16}{f'{ratios[0]:.3f}-{ratios[-1]:.3f}':>16}"
        print(line)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks sharpness-cost", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--methods",
        default="ssam,ssam-closure,sam",
        help=f"comma-separated, of {','.join(METHODS)} (default: %(default)s)",
    )
    parser.add_argument("--base", choices=sorted(BASES), default="sgd", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images a step (default: %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each method (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    options = parser.parse_args(argv)
    options.methods = options.methods.split(",")
    for name in options.methods:
        if name not in METHODS:
            parser.error(f"--methods: unknown {name!r}; choose of {', '.join(METHODS)}")
    for name, least in (("batch", 2), ("width", 1), ("rounds", 2), ("warmup", 0), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    return options
