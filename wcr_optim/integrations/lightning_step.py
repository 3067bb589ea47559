"""What Lightning's own step cannot do for sharpness-aware optimizers, and what its callbacks here have in common."""

from __future__ import annotations

import copy
import importlib
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from wcr_optim.sharpness import SSAM
from wcr_optim.sharpness.guards import RandomStates, random_states, set_random_states
from wcr_optim.sharpness.two_pass import TwoPass
from wcr_optim.wrapper import OptimizerWrapper

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer


def _lightning() -> str:
    """Return which of the two packages is in use: the one that is imported already, else the one that is installed."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        return name
    raise ImportError("the Lightning callbacks need Lightning: pip install 'wcr_optim[lightning]'")


LIGHTNING = _lightning()
if not TYPE_CHECKING:
    Callback = importlib.import_module(LIGHTNING).Callback
# Parameters, submodules, hooks: nothing that a step collects.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_buffers"}
_DICTS = (dict, OrderedDict, defaultdict, Counter)
_EMPTY_CLOSURE = importlib.import_module(f"{LIGHTNING}.core.optimizer").do_nothing_closure


class _MicroBatch(NamedTuple):
    """A batch of an accumulation, its number, and the random numbers that its first pass drew from."""

    batch: Any
    number: int
    states: RandomStates


class SharpnessCallback(Callback):
    """Step `SAM`, `SSAM`, `SparseSAM` and `CrAM` by their own rules under Lightning's.

        trainer = Trainer(callbacks=[SharpnessCallback()], accumulate_grad_batches=4, precision="16-mixed")

    Without it, Lightning hands the optimizer a closure that runs the last batch only: that is right for a plain step in
    full or bfloat16 precision, and not with accumulated batches, not with 16-mixed (where Lightning runs the closure
    itself), and what is logged is the second pass. With it, in automatic optimization,

    - the second pass runs over all batches of an accumulation, with each one's own random numbers, so that dropout has
      the same mask (where the optimizer has same_dropout),
    - clipping, unscaling and ``on_before_optimizer_step`` act once, on the final gradient at the true weights,
    - overflow in either pass skips the step, and CrAM knows the scaler,
    - what ``training_step`` logs, returns and feeds to metrics is the first pass's, at the true weights,
    - with SSAM every batch of an accumulation is seen at the perturbed weights, and the true ones are in place between
      batches, for validation and checkpoints.

    ``training_step`` runs twice and must not change what it is given. The batches of an accumulation are kept until its
    step. In *manual optimization*, gather and then step, at any precision:

        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        loss = optimizer.optimizer.gather(closure)
        optimizer.step()

    and with SSAM do as with any other optimizer: ``manual_backward``, ``step``, ``zero_grad``.

    Raises:
        RuntimeError: If training_step takes a dataloader_iter: its batches cannot be run a second time.
        ValueError: In manual optimization with SSAM, if a callback that averages weights comes first, which would see
            the perturbed ones.
    """

    def __init__(self) -> None:
        self._automatic = True
        self._batches: list[_MicroBatch] = []
        self._undo = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the step over."""
        self._automatic = pl_module.automatic_optimization
        name = averaging_before(trainer, self)
        if name is not None and any(_seen_between_steps(trainer, pl_module)):
            raise ValueError(
                f"{name} comes before SharpnessCallback in the trainer's callbacks, and would average the weights that "
                f"SSAM perturbed: put SharpnessCallback before {name}"
            )
        for optimizer in trainer.optimizers:
            below = _sharpness_of(optimizer)
            if below is None:
                continue
            self._undo.callback(optimizer.register_step_pre_hook(self._before_step).remove)
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if isinstance(below, TwoPass) and below.scaler is None and scaler is not None:
                below.scaler = scaler
                self._undo.callback(setattr, below, "scaler", None)
        if pl_module.automatic_optimization and _sharpness_of(trainer.optimizers[0]) is not None:
            if takes(pl_module.training_step, "dataloader_iter", explicit=True):
                raise RuntimeError("SharpnessCallback runs a batch twice, and training_step takes a dataloader_iter")
            step = _Step(partial(self._optimizer_step, trainer, pl_module, pl_module.optimizer_step))
            self._undo.enter_context(replaced(pl_module, "optimizer_step", step))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch for the second pass; bring SSAM's perturbed weights into place."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._batches = []
        below = _sharpness_of(trainer.optimizers[0])
        if pl_module.automatic_optimization and isinstance(below, TwoPass):
            devices = {p.device for group in below.param_groups for p in group["params"]}
            self._batches.append(_MicroBatch(batch, batch_idx, random_states(devices) if below.same_dropout else []))
        for optimizer in _seen_between_steps(trainer, pl_module):
            optimizer.train()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Bring the true weights into place."""
        for optimizer in _seen_between_steps(trainer, pl_module):
            optimizer.eval()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the step back."""
        self._undo.close()
        self._batches = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the step back, with the true weights in place."""
        self._undo.close()
        self._batches = []
        for optimizer in trainer.optimizers:
            if _sharpness_of(optimizer) is not None:
                optimizer.eval()  # type: ignore[attr-defined]

    def _optimizer_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        original: Callable[..., Any],
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Take LightningModule.optimizer_step's place: its closure becomes the gathering of the final gradient."""
        wrapper = getattr(optimizer, "optimizer", optimizer)
        first: list[Any] = []

        def closure() -> Any:
            if optimizer_closure is not None and not first:
                first.append(optimizer_closure())
            else:
                self._second_pass(trainer, pl_module, wrapper)
            return first[0]

        original(epoch, batch_idx, optimizer, partial(wrapper.gather, closure))
        self._batches = []

    def _second_pass(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Run all batches of the accumulation again, unseen by logs and metrics."""
        below = _sharpness_of(optimizer)
        takes_number = takes(pl_module.training_step, "batch_idx", min_args=2)
        with replaced(pl_module, "log", _ignore), metrics_set_aside(pl_module):
            for place, (batch, number, states) in enumerate(self._batches, 1):
                if isinstance(below, TwoPass) and below.same_dropout:
                    set_random_states(states)
                with nullcontext() if place == len(self._batches) else _without_reduction(trainer):
                    output = trainer.strategy.training_step(*((batch, number) if takes_number else (batch,)))
                    loss = output["loss"] if isinstance(output, Mapping) else output
                    if isinstance(loss, Tensor):
                        trainer.strategy.backward(loss / trainer.accumulate_grad_batches, optimizer)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Run Lightning's closure before the step, which is then one without a closure.

        In automatic optimization it gathers, see `_optimizer_step`, and then clips. In manual optimization it is the
        user's own, unless ``step`` came without one and Lightning put an empty one in its place.
        """
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        innermost = closure
        while isinstance(innermost, partial) and innermost.args:
            innermost = innermost.args[-1]
        if closure is None or not (self._automatic or innermost is _EMPTY_CLOSURE):
            return None
        closure()
        return args[:1], {}


class _Step:
    """What stands in the module for its optimizer_step; in a copy of the module, or a pickled one, Lightning's own."""

    def __init__(self, step: Callable[..., None]) -> None:
        self._step = step

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._step(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Step, (_plain_step,)


def _plain_step(epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None) -> None:
    optimizer.step(closure=optimizer_closure)


def averaging_before(trainer: Trainer, callback: Callback) -> str | None:
    """Return the name of a callback that averages weights and is called before another one, None if there is none."""
    averaging = getattr(importlib.import_module(f"{LIGHTNING}.callbacks"), "WeightAveraging", ())
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    before = takewhile(lambda other: other is not callback, callbacks)
    return next((type(other).__name__ for other in before if isinstance(other, averaging)), None)


@contextmanager
def metrics_set_aside(module: nn.Module) -> Iterator[None]:
    """Have the metrics of torchmetrics in a module start anew for a block, and then be what they were."""
    from torchmetrics import Metric  # comes with Lightning

    saved = []
    for metric in module.modules():
        if isinstance(metric, Metric):
            state = dict(vars(metric))
            for name, value in metric.metric_state.items():
                if isinstance(value, list):
                    setattr(metric, name, [])  # reset would empty the list that is kept here
            saved.append((metric, state))
            metric.reset()
    try:
        yield
    finally:
        for metric, state in saved:
            vars(metric).update(state)


@contextmanager
def state_set_aside(module: nn.Module) -> Iterator[None]:
    """Have what a module's steps collect be after a block what it was: attributes, buffers, and what these contain.

    Numbers, tensors, arrays, lists, dicts and sets, one in another too, are put back in place, since others may hold
    them: DDP the buffers, a hook the list that it appends to. Not parameters, metrics of torchmetrics
    (`metrics_set_aside`), or what other objects hold.
    """
    from torchmetrics import Metric, MetricCollection

    with ExitStack() as undo:
        seen: dict[int, Any] = {}
        for part in module.modules():
            if isinstance(part, (Metric, MetricCollection)):
                continue
            attributes = vars(part)
            before = dict(attributes)
            undo.callback(_refill, attributes, before)
            for name in before.keys() - _OF_EVERY_MODULE:
                attributes[name] = _keep(before[name], undo, seen)
        yield


def _keep(value: Any, undo: ExitStack, seen: dict[int, Any]) -> Any:
    """Have the contents of a value put back by undo; return what takes its place until then, mostly itself."""
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = value
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        if value.is_inference():  # which nothing may write outside inference mode
            seen[id(value)] = value.clone()
        else:
            undo.callback(_rewrite, value, value._version, value.detach().clone())
    elif type(value) is np.ndarray and value.flags.writeable:
        undo.callback(np.copyto, value, value.copy())
    elif type(value) in (list, deque, *_DICTS):  # a subclass may do more than hold
        before = copy.copy(value)
        undo.callback(_refill, value, before)
        for place, item in before.items() if isinstance(before, dict) else enumerate(before):
            value[place] = _keep(item, undo, seen)
    elif type(value) is set:
        undo.callback(_refill, value, set(value))
    elif isinstance(value, tuple):
        for item in value:
            _keep(item, undo, seen)
    return seen[id(value)]


def _refill(container: Any, before: Any) -> None:
    container.clear()
    (container.update if isinstance(before, (dict, set)) else container.extend)(before)


def _rewrite(tensor: Tensor, version: int, before: Tensor) -> None:
    if tensor._version != version:  # an expanded tensor cannot be written, and has not been
        tensor.copy_(before)


@contextmanager
def replaced(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Have another function in a module's method's place for a block."""
    own = vars(module).get(name)
    setattr(module, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


def _sharpness_of(optimizer: Optimizer) -> TwoPass | SSAM | None:
    """Return the sharpness-aware wrapper in an optimizer's chain."""
    while isinstance(optimizer, OptimizerWrapper):
        if isinstance(optimizer, (TwoPass, SSAM)):
            return optimizer
        optimizer = optimizer.base
    return None


def _seen_between_steps(trainer: Trainer, pl_module: LightningModule) -> Iterator[OptimizerWrapper]:
    """Yield the optimizers with SSAM whose forward passes are not all in the closure of their step."""
    for optimizer in trainer.optimizers:
        below = _sharpness_of(optimizer)
        if isinstance(below, SSAM) and (trainer.accumulate_grad_batches > 1 or not pl_module.automatic_optimization):
            yield below


def takes(method: Callable[..., Any], parameter: str, **options: Any) -> bool:
    """Whether Lightning would pass a parameter to a step."""
    signatures = importlib.import_module(f"{LIGHTNING}.utilities.signature_utils")
    return bool(signatures.is_param_in_hook_signature(method, parameter, **options))


def _ignore(*_: Any, **__: Any) -> None:
    """Log nothing."""


def _without_reduction(trainer: Trainer) -> AbstractContextManager[None]:
    """Keep a backward pass from reducing gradients over ranks, where the strategy can."""
    block: Callable[[], AbstractContextManager[None]] = getattr(trainer.strategy, "block_backward_sync", nullcontext)
    return block()
