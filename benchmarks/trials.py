"""One training run of a method on a task, pruned at rising sparsities and measured."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import tasks
from benchmarks.curvature import largest_eigenvalue
from benchmarks.devices import mixed_precision, settle
from benchmarks.methods import LAYERS, Method
from benchmarks.tasks import SPARSITIES, Task
from wcr_optim import pruning
from wcr_optim.pruning.select import input_dimension
from wcr_optim.pruning.sweep import Evaluate
from wcr_optim.pruning.threshold import Scope

MEASURED = (
    "sparsity",
    "scope",
    "recalibrated",
    "metric",
    "value",
    "seconds",
    "gradient_evaluations",
    "prunable",
    "parameters",
    "tail",
    "sharpness",
    "device",
    "data_hash",
    "warned",
)
RANDOM_DRAWS = 3
PATTERNS = ((2, 4), (1, 4), (1, 8))


@dataclass(frozen=True)
class Trial:
    """A training run; the fields are the key by which a file of results knows it.

    Attributes:
        task: Name of the task.
        method: Name of the method.
        seed: Of the initial weights and the order of the batches.
        strength: Of the penalty.
        rho: Of the sharpness-aware method; 0 stands for its authors' default.
        goal: Wanted sparsity, for methods that are told it.
        options: Settings of the run as name=value;name=value: lr and batch are factors, wd is the base's weight decay,
            layers says what the penalty reaches, from and until are shares of the run within which a fixed strength
            acts; anything else goes to SparsityTarget.
        split: What it is measured on: validation or test.
        steps: Optimizer steps; 0 stands for the task's.
    """

    task: str
    method: str
    seed: int = 0
    strength: float = 0.0
    rho: float = 0.0
    goal: float = 0.0
    options: str = ""
    split: str = "validation"
    steps: int = 0

    @property
    def key(self) -> tuple[str, ...]:
        """Return the fields as a CSV file holds them."""
        return tuple(str(value) for value in asdict(self).values())

    @property
    def settings(self) -> dict[str, Any]:
        """Return the options by name."""
        return read_options(self.options)


OF_RUNS = ("lr", "wd", "batch", "layers")
"""Options of a run; the others go to what follows the optimizer."""
KEY = tuple(field.name for field in fields(Trial))
COLUMNS = (*KEY, *MEASURED)
NUMBERS = ("seed", "strength", "rho", "goal", "steps", "sparsity", "value", "seconds", "gradient_evaluations")
"""Columns that hold a number or, of a run that diverged, nothing."""


class DivergedError(Exception):
    """A run's loss or weights are not finite."""


@dataclass
class Trained:
    """A trained network and what its training took."""

    network: nn.Module
    seconds: float
    gradient_evaluations: int
    tail: float
    warned: str


def steps_of(trial: Trial) -> int:
    """Return how many optimizer steps a trial takes."""
    return max(1, (trial.steps or tasks.task(trial.task).steps) // int(trial.settings.get("batch", 1)))


def check_data(names: Iterable[str], rows: Sequence[Mapping[str, str]], device: str | None = None) -> None:
    """Raise if rows of one of some tasks are of other data than is here, or from another kind of device.

    Both would be taken for runs of one kind, and on a CUDA device networks train in bfloat16.

    Args:
        names: Of the tasks.
        rows: Of results.
        device: What runs would be on, None where there is one kind only (default: None)

    Raises:
        ValueError: If they are.

    """
    for name in names:
        here = tasks.task(name).data_hash
        other = {row["data_hash"] for row in rows if row["task"] == name} - {here}
        if other:
            raise ValueError(
                f"the results hold runs of task {name} on other data (sha256 {', '.join(sorted(other))}) than is here "
                f"({here}); name another --output"
            )
        ran_on = {row["device"] for row in rows if device and row["task"] == name} - {device}
        if ran_on:
            raise ValueError(
                f"the results hold runs of task {name} on {', '.join(sorted(ran_on))}, and these would be on {device}; "
                "name another --output, or the same --device"
            )


def prepare(task: str) -> None:
    """Build a task's model once, which leaves what comes before it, such as a pre-training, in the task's cache."""
    tasks.task(task).model(0)


def train(trial: Trial, device: str = "cpu", progress: Callable[[], None] = lambda: None) -> Trained:
    """Train with a cosine schedule.

    Args:
        trial: What to train.
        device: Where (default: "cpu")
        progress: Called after every step (default: nothing)

    Raises:
        DivergedError: If the loss or a weight is not finite.
    """
    settle(device)
    task, method, settings = tasks.task(trial.task), Method.of(trial.method), trial.settings
    lr = task.lr[method.base] * settings.pop("lr", 1.0)
    weight_decay = settings.pop("wd", task.weight_decay[method.base])
    steps, scale = steps_of(trial), int(settings.pop("batch", 1))
    network = task.model(trial.seed).to(device)
    torch.manual_seed(trial.seed)  # what the method draws, such as CrAM's sparsities
    layers = settings.pop("layers", "weights")
    optimizer = method.optimizer(
        network, lr, weight_decay, trial.strength, trial.rho, exclude=task.exclude, layers=layers
    )
    follower = method.follower(optimizer, network, task, trial.goal, steps, settings)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    forward = torch.compile(network) if task.compiled and device == "cuda" else network
    evaluations, warned, started = 0, "", time.perf_counter()
    network.train()
    for batch in task.batches(trial.seed, steps, scale):
        batch = moved(batch, device)

        def closure(batch: Any = batch) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            with mixed_precision(device):
                loss = task.loss(forward, batch)
            loss.backward()
            return loss

        loss = optimizer.step(closure).item()
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at gradient {evaluations}")
        if follower is not None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                follower.step(loss)
            warned = " ".join([warned, *(str(w.message) for w in caught)]).strip()
        scheduler.step()
        progress()
    seconds = time.perf_counter() - started
    if not all(w.isfinite().all() for w in network.parameters()):
        raise DivergedError("a weight is NaN or infinite at the end")
    network.eval()
    return Trained(network, seconds, evaluations, getattr(follower, "last_tail", math.nan), warned)


def run_trial(
    trial: Trial,
    device: str = "cpu",
    progress: Callable[[], None] = lambda: None,
    sparsities: Sequence[float] = SPARSITIES,
) -> list[dict[str, Any]]:
    """Train, prune and measure.

    Returns:
        A row of COLUMNS for each sparsity and metric. A run on the test split is pruned per layer too, measured with
        and without running statistics estimated anew, and its sharpness is taken. A run that diverged has one row,
        without a value: it belongs in the table too.
    """
    try:
        trained = train(trial, device, progress)
    except DivergedError as error:
        said = {"device": device, "data_hash": tasks.task(trial.task).data_hash, "warned": f"diverged: {error}"}
        return [asdict(trial) | dict.fromkeys(MEASURED, "") | said]
    found = list(measure(trial, trained, sparsities))
    try:
        sharpness = curvature(trial, trained.network, device) if trial.split == "test" else math.nan
    except RuntimeError as error:
        # Too little memory for it is no reason to lose what was measured; on the CPU only the text says so.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        sharpness, trained.warned = math.nan, f"{trained.warned} no sharpness: {error}".strip()
    common = {
        "seconds": round(trained.seconds, 2),
        "gradient_evaluations": trained.gradient_evaluations,
        "parameters": sum(p.numel() for p in trained.network.parameters()),
        "tail": "" if math.isnan(trained.tail) else f"{trained.tail:.4g}",
        "sharpness": "" if math.isnan(sharpness) else f"{sharpness:.4g}",
        "device": device,
        "data_hash": tasks.task(trial.task).data_hash,
        "warned": trained.warned,
    }
    return [asdict(trial) | row | common for row in found]


def measure(trial: Trial, trained: Trained, sparsities: Sequence[float] = SPARSITIES) -> Iterable[dict[str, Any]]:
    """Yield sparsity, scope, whether statistics were estimated anew, metric and value."""
    task, method = tasks.task(trial.task), Method.of(trial.method)

    def evaluate(network: nn.Module) -> float | Mapping[str, float]:
        return task.evaluate(network, trial.split)

    if method.pruning == "random":
        with statistics_kept(trained.network):
            yield from _random(trial, task, trained.network, evaluate, sparsities)
        return
    calibration = None if task.calibration is None else moved(task.calibration(), _device(trained.network))
    thorough = trial.split == "test"
    sweeps: list[tuple[Scope, list[Tensor] | None]] = [("global", calibration)]
    if thorough:
        sweeps.append(("layer", calibration))
        if calibration is not None:
            sweeps.append(("global", None))
    for scope, batches in sweeps:
        result = pruning.sweep(
            trained.network, evaluate, sparsities, scope, batches, exclude=task.exclude, progress=False
        )
        for row in result.rows:
            yield from _rows(task, row.sparsity, scope, result.recalibrated, row.metrics, row.total)
    if thorough:
        with statistics_kept(trained.network):
            yield from _patterns(task, trained.network, evaluate, calibration)


def _rows(
    task: Task, sparsity: float, scope: str, recalibrated: bool, found: float | Mapping[str, float], prunable: int
) -> Iterator[dict[str, Any]]:
    metrics = found if isinstance(found, Mapping) else {"score": found}
    for metric, value in metrics.items():
        yield {
            "sparsity": sparsity,
            "scope": scope,
            "recalibrated": recalibrated,
            "metric": task.metric if metric == "score" else metric,
            "value": round(value, 4),
            "prunable": prunable,
        }


def _patterns(
    task: Task, network: nn.Module, evaluate: Evaluate, batches: list[Tensor] | None
) -> Iterator[dict[str, Any]]:
    """Yield the values of N:M patterns, and of the wanted sparsities with what is left quantized to int8."""
    ways = [(f"{n}:{m}", 1 - n / m, pruning.n_m_masks(network, n, m, exclude=task.exclude)) for n, m in PATTERNS]
    for goal in task.goals:
        ways.append(("int8", goal, pruning.magnitude_masks(network, goal, exclude=task.exclude)))
    for scope, sparsity, masks in ways:
        with pruning.applied(network, masks), torch.no_grad(), quantized(network, masks, scope == "int8"):
            if batches is not None:
                pruning.recalibrate_batchnorm(network, batches)
            yield from _rows(task, sparsity, scope, batches is not None, evaluate(network), masks.total)


@contextmanager
def quantized(network: nn.Module, masks: pruning.Masks, wanted: bool) -> Iterator[None]:
    """Round weights to 255 levels, symmetric and with a scale for each output channel, for the block only.

    w <- s round(w / s), s = max |w| of the channel / 127, which keeps zeros zero.
    """
    weights = dict(network.named_parameters())
    before = {name: weights[name].clone() for name in masks} if wanted else {}
    for name, w in before.items():
        channels = 1 - input_dimension(network, name, w)[0]  # the first, but of GPT-2's Conv1D
        others = [dim for dim in range(w.ndim) if dim != channels]
        scale = w.abs().amax(others, keepdim=True).clamp(min=1e-12) / 127
        weights[name].copy_(scale * (w / scale).round())
    try:
        yield
    finally:
        for name, w in before.items():
            weights[name].copy_(w)


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Put buffers, such as BatchNorm's statistics, back after the block."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in network.named_buffers():
            buffer.copy_(before[name])


def _random(
    trial: Trial, task: Task, network: nn.Module, evaluate: Evaluate, sparsities: Sequence[float]
) -> Iterable[dict[str, Any]]:
    """Yield the mean over a few draws: the floor that every criterion has to beat."""
    batches = None if task.calibration is None else moved(task.calibration(), _device(network))
    for sparsity in sparsities:
        drawn = []
        for draw in range(RANDOM_DRAWS):
            masks = pruning.random_masks(network, sparsity, seed=RANDOM_DRAWS * trial.seed + draw, exclude=task.exclude)
            with pruning.applied(network, masks), torch.no_grad():
                if batches is not None:
                    pruning.recalibrate_batchnorm(network, batches)
                found = evaluate(network)
            drawn.append(found if isinstance(found, Mapping) else {task.metric: found})
        means = {metric: sum(values[metric] for values in drawn) / RANDOM_DRAWS for metric in drawn[0]}
        yield from _rows(task, sparsity, "global", batches is not None, means, masks.total)


def curvature(trial: Trial, network: nn.Module, device: str) -> float:
    """Return the largest eigenvalue of the loss's Hessian at the dense weights, on one batch of training data."""
    task = tasks.task(trial.task)
    batch = next(iter(task.batches(0, 1, 4))) if task.sharpness_batch is None else task.sharpness_batch()
    batch = moved(batch, device)
    return largest_eigenvalue(network, lambda: task.loss(network, batch))


def moved(data: Any, device: Any) -> Any:
    """Return tensors, or nested tuples, lists and dictionaries of them, on a device."""
    if isinstance(data, Tensor):
        return data.to(device)
    if isinstance(data, Mapping):
        return {name: moved(value, device) for name, value in data.items()}
    return type(data)(moved(value, device) for value in data)


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def check_options(options: str) -> None:
    """Raise if an option of runs, see `OF_RUNS`, has a value that it cannot have.

    Raises:
        ValueError: If one has.

    """
    found = read_options(options)
    for name in ("lr", "wd"):
        value = found.get(name, 1.0)
        if not isinstance(value, int | float) or not 0.0 <= value < math.inf:
            raise ValueError(f"option {name} must be finite and not negative, got {value!r}")
    batch, layers = found.get("batch", 1), found.get("layers", LAYERS[0])
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"option batch must be a whole number of at least 1, got {batch!r}")
    if layers not in LAYERS:
        raise ValueError(f"option layers must be one of {', '.join(LAYERS)}, got {layers!r}")


def read_options(options: str) -> dict[str, Any]:
    """Return options by name, given as name=value;name=value."""
    return {name: _number(value) for name, _, value in (o.partition("=") for o in options.split(";") if o)}


def _number(text: str) -> Any:
    for kind in (int, float):  # numbers of steps have to be whole
        try:
            return kind(text)
        except ValueError:
            continue
    return text
