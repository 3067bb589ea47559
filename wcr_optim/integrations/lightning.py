"""Lightning 2.x, as ``lightning`` or as ``pytorch_lightning``: callbacks for training, logging and pruned validation.

Any optimizer of this package is returned from ``configure_optimizers`` as torch's own are; nothing else is needed for
`WCR` and its kin. The callbacks add what lives outside the optimizer.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wcr_optim.integrations.common import (
    check_count,
    check_sparsities,
    concentration_values,
    metric_at,
    pruned,
    target_values,
)
from wcr_optim.integrations.lightning_step import (
    LIGHTNING,
    SharpnessCallback,
    averaging_before,
    metrics_set_aside,
    replaced,
    state_set_aside,
    takes,
)
from wcr_optim.metrics import optimizer_concentration
from wcr_optim.parameters import Selector
from wcr_optim.pruning.threshold import Scope, check_scope
from wcr_optim.target import SparsityTarget

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["ConcentrationCallback", "PrunedEvaluationCallback", "SharpnessCallback", "SparsityTargetCallback"]

if not TYPE_CHECKING:
    Callback = SharpnessCallback.__base__


class SparsityTargetCallback(Callback):
    """Drive the strength of a decoupled penalty to a wanted sparsity, see `wcr_optim.SparsityTarget`.

        trainer = Trainer(callbacks=[SparsityTargetCallback(sparsity=0.95)])

    The target's state is saved in every checkpoint and loaded from it, so that a resumed run goes on exactly. The tail,
    the strength and the factor of the base's lr are logged whenever they were measured, as ``sparsity_target/tail``,
    ``/wanted_tail``, ``/strength`` and ``/lr_factor``; the loss that the target sees is what ``training_step`` returns.
    Of another optimizer than the first they are called ``sparsity_target_1/tail`` and so on. A callback that saves a
    checkpoint after each batch belongs after this one (Lightning puts ModelCheckpoint there by itself).

    Args:
        sparsity: Share of the driven weights that will be pruned, in (0, 1) (default: 0.95).
        total_steps: Steps that the driven optimizer takes in the whole run; None asks the trainer for its estimate, in
            a run that goes on from a checkpoint without this callback for what is left. The estimate counts a batch as
            a step and max_steps those of all optimizers together: in manual optimization give the number where the
            driven one does not step once a batch, or where there are several and max_steps (default: None).
        optimizer: Which one of ``configure_optimizers``' to drive, counted from 0 (default: 0).
        **options: The other arguments of `wcr_optim.SparsityTarget`, such as tail_energy and max_dense_cost.

    Attributes:
        target: The `wcr_optim.SparsityTarget`; None before training starts.

    Raises:
        ValueError: When training starts, as `wcr_optim.SparsityTarget`.
    """

    def __init__(
        self, sparsity: float = 0.95, total_steps: int | None = None, *, optimizer: int = 0, **options: Any
    ) -> None:
        self.sparsity, self.total_steps, self.optimizer, self.options = sparsity, total_steps, optimizer, options
        self.target: SparsityTarget | None = None
        self._loaded: dict[str, Any] | None = None
        self._loss: float | Tensor = 0.0
        self._batches = 0
        self._steps = self._global_step = 0
        self._logged = 0
        self._hook: Any = None

    @property
    def state_key(self) -> str:
        """What the state is called in a checkpoint: several callbacks may drive several optimizers."""
        return self._generate_state_key(optimizer=self.optimizer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the target, of the optimizer as it is after a checkpoint was loaded."""
        # A run that begins has nothing to go on with: what was loaded then came with a checkpoint to test or validate.
        loaded = self._loaded if trainer.global_step > 0 else None
        total: float | None = self.total_steps
        if total is None:
            total = trainer.estimated_stepping_batches - (_steps_taken(trainer) if loaded is None else 0)
        steps = None if total == math.inf else int(total)  # None: SparsityTarget has the words for it
        optimizer = trainer.optimizers[self.optimizer]
        self.target = SparsityTarget(optimizer, self.sparsity, steps, **self.options)
        if loaded is not None:
            self.target.load_state_dict(loaded)
        else:
            self._loss, self._batches = 0.0, 0  # of an accumulation in which an earlier run ended
        self._loaded = None
        self._steps, self._global_step = 0, trainer.global_step
        self._logged = len(self.target.history)
        self._hook = optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, *_: Any) -> None:
        self._steps += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the target of the optimizer's steps, if it took any."""
        assert self.target is not None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            # Of accumulated batches Lightning gives each one's share of the mean, in manual optimization the loss.
            self._loss = self._loss + loss.detach()
            self._batches += 1
        if trainer.global_step == self._global_step:
            return  # an accumulation under way
        self._global_step = trainer.global_step
        mean = self._loss
        if not pl_module.automatic_optimization:
            mean = mean / max(self._batches, 1)
        elif 0 < self._batches != trainer.accumulate_grad_batches:  # an epoch's last ones, each with its whole share
            mean = mean * (trainer.accumulate_grad_batches / self._batches)
        for _ in range(self._steps):  # none where an overflow had the step skipped
            self.target.step(mean if self._batches else None)
        self._steps, self._loss, self._batches = 0, 0.0, 0
        if len(self.target.history) > self._logged:
            self._logged = len(self.target.history)
            _log(trainer, target_values(self.target, _prefix("sparsity_target", self.optimizer)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizer as it was."""
        self._release()
        if stage != "fit":
            self._loaded = None  # what came with a checkpoint to validate or test

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizer as it was."""
        self._release()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """Return the target's state, and what is under way between two steps."""
        if self.target is None:
            return {}
        return {"target": self.target.state_dict(), "loss": float(self._loss), "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state; Lightning calls this before there is an optimizer."""
        self._loaded, self._loss, self._batches = state_dict["target"], state_dict["loss"], state_dict["batches"]


class ConcentrationCallback(Callback):
    """Log how concentrated the weights are; between measurements nothing is computed and no device is waited for.

    Logs the mean, smallest and largest of `wcr_optim.metrics.optimizer_concentration` over the layers, as
    ``concentration/mean``, ``/min`` and ``/max``; of another optimizer than the first as ``concentration_1/mean`` and
    so on.

    Args:
        every: Optimizer steps between measurements; None stands for the trainer's log_every_n_steps (default: None).
        optimizer: Which one of ``configure_optimizers``' to measure, counted from 0 (default: 0).

    Raises:
        ValueError: If every is less than 1; when training starts, if the optimizer has no decoupled penalty.
    """

    def __init__(self, every: int | None = None, *, optimizer: int = 0) -> None:
        self.every, self.optimizer = every if every is None else check_count("every", every), optimizer
        self._last = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting where the run goes on; fail now rather than at the first log."""
        self._last = trainer.global_step
        optimizer_concentration(trainer.optimizers[self.optimizer])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and log, if it is time."""
        every = self.every or max(getattr(trainer, "log_every_n_steps", 1), 1)
        if trainer.global_step // every > self._last // every:
            prefix = _prefix("concentration", self.optimizer)
            _log(trainer, concentration_values(trainer.optimizers[self.optimizer], prefix))
        self._last = trainer.global_step


class PrunedEvaluationCallback(Callback):
    """Validate the pruned model too, at every validation: ``val_loss`` gives ``val_loss_at_0.95``, and so on.

    After the validation loop, ``validation_step`` runs again over the validation batches, the model pruned once by
    magnitude at each sparsity; what it logs is logged under these names, and can be monitored
    (``ModelCheckpoint(monitor="val_loss_at_0.95")``). The weights come back bit for bit; running statistics, metrics of
    torchmetrics, random number generators and what the modules' attributes and buffers hold (numbers, tensors, lists,
    dicts, sets) are as before. Hooks around the steps are not called again: metrics have to be logged in
    ``validation_step``; a warning says so where it logs none.

        trainer = Trainer(callbacks=[PrunedEvaluationCallback(sparsities=(0.9, 0.95))])

    Args:
        sparsities: Shares of the prunable weights to prune, each in [0, 1] (default: (0.9,)).
        scope: "global" or "layer", as in `wcr_optim.pruning.magnitude_masks` (default: "global").
        exclude: Layers to leave dense (default: ()).
        calibration: Batches of training data to estimate the running statistics of norm layers with while pruned, as
            `wcr_optim.pruning.recalibrate_batchnorm` takes them; None leaves the statistics as they are
            (default: None).

    Raises:
        TypeError: If sparsities is no sequence of numbers.
        ValueError: If there are no sparsities, one lies outside [0, 1], or the scope is unknown; before fitting or
            validating, if a callback that averages weights comes first, or validation_step takes a dataloader_iter.
    """

    def __init__(
        self,
        sparsities: Sequence[float] = (0.9,),
        scope: Scope = "global",
        exclude: Iterable[Selector] | Selector = (),
        calibration: Iterable[Any] | None = None,
    ) -> None:
        check_scope(scope)
        self.sparsities, self.scope, self.exclude = check_sparsities(sparsities), scope, exclude
        self.calibration = None if calibration is None else list(calibration)
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse now what cannot be measured, rather than after an epoch of training."""
        if stage not in ("fit", "validate"):
            return
        name = averaging_before(trainer, self)
        if name is not None:
            raise ValueError(
                f"{name} comes before PrunedEvaluationCallback in the trainer's callbacks, and has put the raw "
                "weights back when the averaged ones, which were validated, should be pruned: put "
                f"PrunedEvaluationCallback before {name}"
            )
        if takes(pl_module.validation_step, "dataloader_iter", explicit=True):
            raise ValueError(
                "PrunedEvaluationCallback gives validation_step one batch at a time, and it takes a dataloader_iter: "
                "have it take batch and batch_idx"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the validation steps on the pruned model."""
        if trainer.sanity_checking:
            return
        isolate_rng = importlib.import_module(f"{LIGHTNING}.utilities.seed").isolate_rng
        for sparsity in self.sparsities:
            recorder = _Recorder()
            # Weights are written here, which inference mode, where Lightning validates, would not tell anyone.
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                isolate_rng(),
                state_set_aside(pl_module),
                metrics_set_aside(pl_module),
            ):
                with (
                    pruned(pl_module, sparsity, self.scope, self.exclude, self.calibration),
                    replaced(pl_module, "log", recorder.log),
                ):
                    for step, batch, loader in _validation_batches(trainer, pl_module):
                        recorder.begin(batch, loader)
                        trainer.strategy.validation_step(*step)
                values = recorder.values()
            if not values and not self._warned:
                self._warned = True
                warnings.warn(
                    "PrunedEvaluationCallback has nothing to report, since validation_step logs nothing, and "
                    "on_validation_epoch_end is not run again for the pruned model: call self.log in validation_step, "
                    "with a metric of torchmetrics for what is no mean over batches",
                    stacklevel=2,
                )
            for (name, suffix), (value, weight, options) in values.items():
                name = metric_at(name, sparsity) + suffix
                # Where there is nothing to average over, a weight would only round the value.
                weight = weight if trainer.world_size > 1 else 1
                pl_module.log(name, value, batch_size=weight, add_dataloader_idx=False, **options)


class _Recorder:
    """Takes the place of ``LightningModule.log`` and reduces over an epoch what is logged, as Lightning does."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], list[tuple[Any, int]]] = {}
        self._options: dict[tuple[str, str], dict[str, Any]] = {}
        self._batch: Any = None
        self._suffix = ""

    def begin(self, batch: Any, loader: int | None) -> None:
        """Go on to a batch; loader is None if there is only one."""
        self._batch = batch
        self._suffix = "" if loader is None else f"/dataloader_idx_{loader}"

    def log(self, name: str, value: Any, *_: Any, **options: Any) -> None:
        """Record a value; the arguments are those of ``LightningModule.log``."""
        size, how = options.get("batch_size"), options.get("reduce_fx", "mean")
        if size is None and how in ("mean", "avg", torch.mean) and not _reduces_itself(value):
            size = importlib.import_module(f"{LIGHTNING}.utilities.data").extract_batch_size(self._batch)
        key = (name, self._suffix if options.get("add_dataloader_idx", True) else "")
        self._seen.setdefault(key, []).append((value, int(size or 1)))
        kept = ("prog_bar", "logger", "sync_dist", "sync_dist_group", "rank_zero_only")
        self._options[key] = {option: options[option] for option in kept if option in options}
        self._options[key]["reduce_fx"] = how

    def values(self) -> dict[tuple[str, str], tuple[Tensor, int, dict[str, Any]]]:
        """Return by name and loader the value over all batches, the samples behind it, and how it was logged."""
        return {key: (*self._reduced(key), self._options[key]) for key in self._seen}

    def _reduced(self, key: tuple[str, str]) -> tuple[Tensor, int]:
        values = [value for value, _ in self._seen[key]]
        sizes = [size for _, size in self._seen[key]]
        total = sum(sizes)
        if _reduces_itself(values[-1]):
            return torch.as_tensor(values[-1].compute()), total
        tensors = [torch.as_tensor(value, dtype=torch.get_default_dtype()) for value in values]
        how = self._options[key]["reduce_fx"]
        how = how if isinstance(how, str) else how.__name__
        if how in ("mean", "avg"):
            summed = torch.zeros(())
            for tensor, size in zip(tensors, sizes, strict=True):
                summed = summed.to(tensor.device) + tensor * size
            return summed / total, total
        reduced: Tensor = getattr(torch, how)(torch.stack(tensors))
        return reduced, total


def _reduces_itself(value: Any) -> bool:
    """Whether a value is a metric of torchmetrics, which reduces over batches by itself."""
    return hasattr(value, "compute")


def _prefix(name: str, optimizer: int) -> str:
    """Return what the names of an optimizer's figures begin with."""
    return f"{name}/" if optimizer == 0 else f"{name}_{optimizer}/"


def _validation_batches(
    trainer: Trainer, pl_module: LightningModule
) -> Iterator[tuple[tuple[Any, ...], Any, int | None]]:
    """Yield the arguments of every validation_step, its batch, and its loader's index if there are several."""
    loop = trainer._evaluation_loop
    takes_index = takes(pl_module.validation_step, "batch_idx", min_args=2)
    # Lightning's own fetcher, once more: it knows every form that loaders come in, and their limits.
    assert loop._data_fetcher is not None
    for batch, index, loader in loop._data_fetcher:
        several = loader if loop._is_sequential and loop.num_dataloaders > 1 else None
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=loader)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=loader)
        step = (batch, index) if takes_index else (batch,)
        yield (step if several is None else (*step, several)), batch, several


def _steps_taken(trainer: Trainer) -> int:
    """Return how many of the steps that the trainer estimates are over."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready  # global_step has those of all optimizers


def _log(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Send numbers to the loggers at once, at the step of their other curves, and to those who monitor a metric."""
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
