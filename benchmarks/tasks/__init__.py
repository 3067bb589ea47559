"""What is trained and measured: one small module a task or a family of them, found by the task's name.

To add a task, add a module here that has a dictionary `TASKS` of names and functions without arguments, each of which
loads its data and returns a `Task`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)


@dataclass(frozen=True)
class Task:
    """What is trained: a model, its batches and how it is measured.

    Attributes:
        name: As in the tables of results.
        suite: The benchmark that it belongs to: vision, language or segmentation.
        metric: Name of the first number that `evaluate` returns.
        best: max or min, whichever is better.
        steps: Optimizer steps of a run.
        model: Builds the model of a seed.
        batches: Yields the batches of (seed, steps, batch scale); a scale of 4 makes each four times as large.
        loss: Mean loss of (model, batch).
        evaluate: Measures (model, name of a split): validation or test. One number, or several by name.
        calibration: Batches of training inputs for BatchNorm, None where there is none.
        exclude: What is not pruned, as in `pruning.sweep`.
        goals: The sparsities at which methods are compared and strengths are chosen.
        tolerance: How much worse than the baseline's a dense value may be and still count as equal, in the metric's
            units.
        lr: Peak learning rate of each base optimizer that the task is trained with.
        weight_decay: Of each base optimizer, on the weights that are pruned.
        sharpness_batch: Draws the one batch that sharpness is measured on, None for four batches of training in one;
            second derivatives take memory.
        compiled: Whether it trains through torch.compile on a CUDA device, which is worth the wait in long runs.
        data: Where the data comes from.
        data_hash: Of data that is not the same everywhere, "" otherwise.
    """

    name: str
    suite: str
    metric: str
    best: Callable[..., Any]
    steps: int
    model: Callable[[int], nn.Module]
    batches: Callable[[int, int, int], Iterator[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[nn.Module, str], float | Mapping[str, float]]
    calibration: Callable[[], list[Tensor]] | None = None
    exclude: tuple[str, ...] = ()
    goals: tuple[float, ...] = (0.95, 0.97, 0.98)
    tolerance: float = 0.5
    lr: Mapping[str, float] = field(default_factory=lambda: {"sgd": 0.1, "adamw": 1e-3})
    weight_decay: Mapping[str, float] = field(default_factory=lambda: {"sgd": 5e-4, "adamw": 1e-2})
    sharpness_batch: Callable[[], Any] | None = None
    compiled: bool = False
    data: str = ""
    data_hash: str = ""

    @property
    def middle(self) -> float:
        """The middle one of the sparsities at which methods are compared."""
        return self.goals[len(self.goals) // 2]

    @property
    def places(self) -> int:
        """How many digits of a value stand after its point in tables."""
        return 3 if self.metric == "bits_per_byte" else 1


def names() -> dict[str, str]:
    """Return the names of all tasks and the modules that they are in.

    Raises:
        ImportError: If one of them needs a package that is not installed.

    """
    found = {}
    with _needed():
        for module in pkgutil.iter_modules(__path__, f"{__name__}."):
            found.update(dict.fromkeys(getattr(importlib.import_module(module.name), "TASKS", {}), module.name))
    return found


@contextmanager
def _needed() -> Iterator[None]:
    """Say how to install a package that the block misses."""
    try:
        yield
    except ModuleNotFoundError as missing:
        if (missing.name or "").split(".")[0] in ("benchmarks", "wcr_optim"):
            raise
        raise ImportError(f"{missing}; install it with: pip install 'wcr_optim[bench]'") from missing


@cache
def task(name: str) -> Task:
    """Load a task by its name.

    Raises:
        ValueError: If there is no task of that name.
        ImportError: If it needs a package that is not installed.

    """
    known = names()
    if name not in known:
        raise ValueError(f"there is no task {name!r}; choose one of {', '.join(known)}")
    with _needed():
        made: Task = importlib.import_module(known[name]).TASKS[name]()
    return made


def epochs(inputs: Tensor, targets: Tensor, batch: int, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of whole epochs in a new random order each, what does not fill a batch left out.

    Batches are no larger than the data.
    """
    batch = min(batch, len(inputs))  # or an epoch would have none, and this would never end
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        order = torch.randperm(len(inputs), generator=generator)
        for index in order[: len(order) // batch * batch].view(-1, batch)[: steps - done]:
            done += 1
            yield inputs[index], targets[index]
