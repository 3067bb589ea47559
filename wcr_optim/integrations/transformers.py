"""Hugging Face's Trainer: the weights to regularize, and callbacks that drive the strength, measure and evaluate.

`Trainer(optimizers=(optimizer, None))` takes any optimizer of this package as it is. What is here is for what the
Trainer's own arguments do not say: which weights are regularized when the Trainer makes the optimizer, a strength that
follows the training, and figures beside the loss.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import random
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wcr_optim import pruning
from wcr_optim.integrations.common import (
    check_count,
    check_sparsities,
    concentration_values,
    metric_at,
    target_values,
)
from wcr_optim.metrics import optimizer_concentration
from wcr_optim.parameters import Selector, param_groups
from wcr_optim.pruning.select import Selection
from wcr_optim.pruning.threshold import Scope
from wcr_optim.sharpness.guards import random_states, set_random_states
from wcr_optim.target import SparsityTarget

try:
    from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(
        "wcr_optim.integrations.transformers needs transformers and accelerate: pip install 'wcr_optim[transformers]'"
    ) from error


def grouped(
    make: Callable[..., Optimizer],
    *,
    weight_decay: float = 0.0,
    weight_concentration: float = 1e-3,
    exclude: Selection | None = None,
    include: Selection | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Have the Trainer make an optimizer from the groups of `wcr_optim.param_groups`.

        Trainer(..., optimizer_cls_and_kwargs=grouped(wcr_optim.AdamW, lr=1e-4, weight_concentration=1e-3))

    Two groups are the Trainer's own, with and without weight decay, and embeddings and lm_head are in the first: given
    `(wcr_optim.AdamW, {"lr": 1e-4, "weight_concentration": 1e-3})` it regularizes them like every other matrix. With
    `grouped` they stay out, like norms and biases, and the strength goes to what `wcr_optim.pruning` prunes. The
    optimizer is made when training begins, so this works with `model_init`, hyperparameter search and FSDP, where
    `optimizers=` does not.

    Args:
        make: Makes the optimizer, called as make(groups, **options): a class, or a function that wraps one.
        weight_decay: Decay of the regularized weights; the Trainer's argument of that name is not used (default: 0.0)
        weight_concentration: Their strength (default: 1e-3)
        exclude: What not to regularize, as in `wcr_optim.param_groups`; None leaves out the model's output embeddings,
            mostly called lm_head (default: None)
        include: Regularize only these, as in `wcr_optim.param_groups` (default: None)
        **options: What else `make` takes: lr, which the Trainer's learning_rate does not set here, betas and so on.

    Returns:
        The pair that `Trainer(optimizer_cls_and_kwargs=)` takes.

    Raises:
        RuntimeError: When training begins, if this version of transformers does not give the model to who makes the
            optimizer; versions 5 and later do.
        ValueError: When training begins, as `wcr_optim.param_groups`.

    Example:
        >>> def make(groups, lr):
        ...     return WCR(SSAM(torch.optim.AdamW(groups, lr=lr)), form="scale_free")
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=grouped(make, lr=1e-4, weight_concentration=3e-2))
    """

    def from_model(model: nn.Module) -> Optimizer:
        left_out = _output_embeddings(model) if exclude is None else exclude
        return make(param_groups(model, weight_decay, weight_concentration, left_out, include=include), **options)

    def factory(*given: Any) -> Callable[[nn.Module], Optimizer]:
        if given:  # what earlier versions call is the optimizer's class, with groups of their own
            raise RuntimeError(
                "this version of transformers makes optimizers from its own groups; update it to version 5 or later, "
                "or pass Trainer(optimizers=(optimizer, None)) with an optimizer of param_groups(model, ...)"
            )
        return from_model

    return factory, {}


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Return the last checkpoint folder that the Trainer wrote to its end, None if there is none.

        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))

    With resume_from_checkpoint=True the Trainer takes the last folder, whole or not. A process that is killed while it
    saves leaves one without trainer_state.json, which is written last, and that cannot be resumed from.

    Args:
        folder: The Trainer's output_dir; it need not exist.
    """
    found = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            found[int(step)] = str(path)
        except (OSError, ValueError):  # missing, cut off, or a folder of another name
            continue
    return found[max(found)] if found else None


class SparsityTargetCallback(TrainerCallback, ExportableState):
    """Drive the penalty's strength to a wanted sparsity while the Trainer trains, as `wcr_optim.SparsityTarget` does.

        Trainer(..., callbacks=[SparsityTargetCallback(sparsity=0.9)])

    The run's length is the Trainer's. The training loss that the target watches is read from the model's output,
    summed or averaged over gradient accumulation as the Trainer does, without waiting for it; where the loss is made
    outside the model (compute_loss_func, label smoothing) there is none, and the target is more careful with the lr
    (see `SparsityTarget.step`). Where a Trainer's own compute_loss makes one although the model returned one, the
    target sees the model's. The state is in every checkpoint folder, in trainer_state.json, and
    resume_from_checkpoint goes on bit for bit, whatever restore_callback_states_from_checkpoint says.

    Args:
        sparsity: Share of the driven weights that will be pruned, in (0, 1) (default: 0.95)
        **options: Further arguments of `wcr_optim.SparsityTarget`: tail_energy, max_dense_cost, scope, start, end,
            every, lr_exponent, total_steps (the Trainer's number of steps where it is not given).

    Attributes:
        target: The `wcr_optim.SparsityTarget`, made when training begins; None before.

    Raises:
        TypeError: If SparsityTarget has no such option.
        ValueError: When training begins, as `wcr_optim.SparsityTarget`; at the first step, if max_dense_cost is given
            and the model returns no loss.
    """

    def __init__(self, sparsity: float = 0.95, **options: Any) -> None:
        inspect.signature(SparsityTarget).bind_partial(None, sparsity, **options)
        self.sparsity = sparsity
        self.options = options
        self.target: SparsityTarget | None = None
        self.saved: str | None = None
        self._losses: _Losses | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the target, and go on from the checkpoint's if there is one."""
        saved, self.saved = self.saved, None
        states = cast("dict[str, Any]", state.stateful_callbacks)
        if state.global_step == 0:
            saved = None  # a new run, with this callback used before
        elif saved is None:
            saved = states.get(type(self).__name__, {}).get("attributes", {}).get("saved")
        options = {"total_steps": state.max_steps if saved else state.max_steps - state.global_step, **self.options}
        self.target = SparsityTarget(_unprepared(kwargs["optimizer"]), self.sparsity, **options)
        if saved is not None:
            self.target.load_state_dict(json.loads(saved))
        states.setdefault(type(self).__name__, self.state())  # missing in a checkpoint of a run without this callback
        if self._losses is not None:
            self._losses.remove()  # of a run that an exception ended
        self._losses = _Losses(kwargs["model"], args)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the target's step, after the optimizer's and before the scheduler's."""
        if self.target is None or self._losses is None:
            return
        loss = self._losses.take()
        if loss is None and self.target.max_dense_cost is not None:
            raise ValueError(
                f"max_dense_cost={self.target.max_dense_cost!r} needs the training loss, and the model's output holds "
                "none: the loss is made outside the model (compute_loss_func, label smoothing); leave max_dense_cost "
                "out, or have the model return its loss"
            )
        self.target.step(loss)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop reading the model's loss."""
        if self._losses is not None:
            self._losses.remove()
            self._losses = None

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes to trainer_state.json."""
        # A string, since the state holds NaN and infinity, which are no JSON.
        saved = self.saved if self.target is None else json.dumps(self.target.state_dict())
        return {"args": {"sparsity": self.sparsity, **self.options}, "attributes": {"saved": saved}}


class ConcentrationCallback(TrainerCallback):
    """Log how concentrated the weights are, through the Trainer's own log and so to TensorBoard, W&B and the rest.

        trainer.add_callback(ConcentrationCallback(trainer))

    Logs the mean, smallest and largest of `metrics.optimizer_concentration` over the layers as "concentration/mean",
    "/min" and "/max"; beside a `SparsityTargetCallback` also what that measured last: "sparsity_target/tail",
    "/wanted_tail", "/strength" and "/lr_factor". One pass over the weights and one copy of a few numbers whenever the
    Trainer logs, nothing at other steps; the training is the same with and without it.

    Args:
        trainer: The Trainer to log through.
        every: Steps between measurements; None measures whenever the Trainer logs its loss (default: None)

    Raises:
        ValueError: If every is not positive; when training begins, if the optimizer has no decoupled penalty.
    """

    def __init__(self, trainer: Trainer, every: int | None = None) -> None:
        self.trainer = trainer
        self.every = every if every is None else check_count("every", every)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fail now rather than at the first log."""
        optimizer_concentration(_unprepared(kwargs["optimizer"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log, if `every` says so."""
        if self.every is not None and state.global_step % self.every == 0:
            self._log(kwargs["optimizer"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log beside the training loss, unless `every` says otherwise."""
        if self.every is None and "loss" in kwargs["logs"]:
            self._log(kwargs["optimizer"])

    def _log(self, optimizer: Optimizer) -> None:
        logs = concentration_values(_unprepared(optimizer))
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, SparsityTargetCallback) and callback.target is not None:
                logs.update(target_values(callback.target))
        control = self.trainer.control
        asked = control.should_log
        self.trainer.log(logs)
        control.should_log = asked  # which every log answers, and this one is not the Trainer's


class PrunedEvaluationCallback(TrainerCallback):
    """At every evaluation, evaluate the model pruned as well, and put its weights back bit for bit.

        trainer.add_callback(PrunedEvaluationCallback(trainer, sparsities=(0.5, 0.9)))

    Every metric of the evaluation is there again at each sparsity, "eval_loss_at_0.9" beside "eval_loss", in the log
    and in what `trainer.evaluate()` returns, so that `metric_for_best_model="eval_loss_at_0.9"` chooses by it. One-shot
    magnitude pruning, no retraining. Costs one more evaluation for each sparsity, and a copy of the prunable weights
    meanwhile; random numbers are put back too, so the training is the same with and without it. Callbacks that read
    the metrics (EarlyStoppingCallback) see these if they are added later than this one. What runs again is
    `trainer.evaluate` as it was called, a subclass's own too, without its logs and callbacks.

    Args:
        trainer: The Trainer to evaluate with.
        sparsities: Shares of the prunable weights to prune, each in [0, 1] (default: (0.5, 0.8, 0.9))
        scope: Rank the weights of all layers together or each layer on its own, as in `pruning.magnitude_masks`
            (default: "global")
        exclude: What to leave dense, as in `pruning.magnitude_masks`; None stands for the model's output embeddings,
            mostly called lm_head (default: None)
        calibration: Batches to estimate running statistics with at every sparsity, for models with BatchNorm, as in
            `pruning.sweep` (default: None)

    Raises:
        TypeError: If sparsities is no sequence of numbers.
        ValueError: If there is no sparsity or one lies outside [0, 1], or the model cannot be pruned as it is, such as
            one with low-rank adapters (merge them first).
    """

    def __init__(
        self,
        trainer: Trainer,
        sparsities: Sequence[float] = (0.5, 0.8, 0.9),
        scope: Scope = "global",
        exclude: Selection | None = None,
        calibration: Iterable[Any] | None = None,
    ) -> None:
        self.sparsities = check_sparsities(sparsities)
        if trainer.model is not None:  # model_init makes one when training begins
            pruning.prunable_weights(trainer.model, _output_embeddings(trainer.model) if exclude is None else exclude)
        self.trainer = trainer
        self.scope, self.exclude = scope, exclude
        self.calibration = list(calibration) if isinstance(calibration, Iterator) else calibration
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        # Callbacks are not told what an evaluation was called with: its data, its prefix, the keys to ignore.
        evaluate = trainer.evaluate

        @functools.wraps(evaluate)
        def noted(*args: Any, **kwargs: Any) -> dict[str, float]:
            self._call = args, kwargs
            return evaluate(*args, **kwargs)

        trainer.evaluate = noted  # type: ignore[method-assign]

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate at every sparsity, and add to the metrics."""
        model, metrics = kwargs["model"], kwargs["metrics"]
        given, named = self._call
        prefix = named.get("metric_key_prefix", given[2] if len(given) > 2 else "eval")
        # Times and memory, which are no figures of a model.
        of_the_run = re.compile(rf"{re.escape(prefix)}_(runtime|(samples|steps)_per_second|\w+_time|mem_\w+)$|epoch$")

        def evaluate(_: nn.Module) -> Mapping[str, float]:
            with _unseen(self.trainer):
                found = self.trainer.evaluate(*given, **named)
            self._close_progress_bar(args, state, control)
            return {key: value for key, value in found.items() if not of_the_run.match(key)}

        exclude = _output_embeddings(model) if self.exclude is None else self.exclude
        with _random_numbers_kept(args.device):
            result = pruning.sweep(
                model, evaluate, self.sparsities, self.scope, self.calibration, exclude=exclude, progress=False
            )
        pruned = {metric_at(key, row.sparsity): value for row in result.rows for key, value in row.metrics.items()}
        metrics.update(pruned)
        self.trainer.log(pruned)

    def _close_progress_bar(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.on_evaluate(args, state, control)  # type: ignore[no-untyped-call]


class TrueWeightsCallback(TrainerCallback):
    """Save and end with the true weights where the optimizer trains at others (`wcr_optim.SSAM`).

        Trainer(..., optimizers=(WCR(SSAM(base)), None), callbacks=[TrueWeightsCallback()])

    SSAM's weights stay perturbed between steps. The Trainer brings the true ones into place to evaluate, and back to
    train on, but not to save: without this callback, checkpoint folders resume exactly but hold perturbed weights, and
    so does the model when training ends. Optimizers without such weights are not affected. Add it last: a callback that
    asks for a checkpoint at the end of a step has to ask before.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before a checkpoint and after the last step."""
        if control.should_save or control.should_training_stop or state.global_step >= state.max_steps:
            _to_true_weights(kwargs["optimizer"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before a checkpoint."""
        if control.should_save:
            _to_true_weights(kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """When training ends."""
        _to_true_weights(kwargs["optimizer"])


class _Losses:
    """The losses that a model returns while it trains, until they are taken; tensors that nobody has waited for."""

    def __init__(self, model: nn.Module, args: TrainingArguments) -> None:
        self._losses: list[Tensor] = []
        self._summed = False
        self._model = weakref.ref(model)
        # With the count of items over all ranks in its denominator, a rank's loss is a part of the mean, not a mean.
        self._parts = args.world_size if args.average_tokens_across_devices else 1
        self._handle = model.register_forward_hook(_Hook(self), with_kwargs=True) if args.n_gpu <= 1 else None

    def _note(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if model is not self._model() or not model.training or not torch.is_grad_enabled():
            return  # a copy of the model, or an evaluation
        loss = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach().clone())  # which the Trainer scales in place
            self._summed = kwargs.get("num_items_in_batch") is not None

    def take(self) -> Tensor | None:
        """Return the step's loss as the Trainer makes it of those of its micro-batches, and forget them."""
        losses, self._losses = self._losses, []
        if not losses:
            return None
        total = torch.stack([loss.reshape(()) for loss in losses]).sum()
        return total * self._parts if self._summed else total / len(losses)

    def remove(self) -> None:
        """Leave the model alone."""
        if self._handle is not None:
            self._handle.remove()


class _Hook:
    """A forward hook that notes losses; in a copy of the model, or a pickled one, a hook that does nothing."""

    def __init__(self, losses: _Losses) -> None:
        self._losses = losses

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph keeps no lists
    def __call__(self, *args: Any) -> None:
        self._losses._note(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _note_nothing


def _note_nothing(*_: Any) -> None:
    """Be a hook and do nothing."""


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Put the generators of torch, numpy and Python back after the block: collators and data sets draw from any."""
    states, of_python, of_numpy = random_states([device]), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        set_random_states(states)
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def _unseen(trainer: Trainer) -> Iterator[None]:
    """Have what the Trainer evaluates in a block neither logged nor told to its callbacks."""

    def untold(args: Any, state: Any, control: TrainerControl, metrics: Any) -> TrainerControl:
        return control

    with ExitStack() as undo:
        for owner, name, other in (
            (trainer, "log", lambda *_, **__: None),
            (trainer.callback_handler, "on_evaluate", untold),
        ):
            own = vars(owner).get(name)
            undo.callback(delattr, owner, name) if own is None else undo.callback(setattr, owner, name, own)
            setattr(owner, name, other)
        yield


def _output_embeddings(model: nn.Module) -> list[Selector]:
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return [head] if isinstance(head, nn.Module) else []


def _unprepared(optimizer: Any) -> Any:
    """Return the optimizer that Accelerate has prepared."""
    return optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer


def _to_true_weights(optimizer: Any) -> None:
    if hasattr(optimizer, "eval"):
        optimizer.eval()
