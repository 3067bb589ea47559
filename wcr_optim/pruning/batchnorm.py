"""Running statistics of norm layers, estimated anew after pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from wcr_optim.parameters import hides_types, unwrapped
from wcr_optim.pruning.modes import evaluation_mode, without_compilation

Forward = Callable[[nn.Module, Any], object]


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> None:
    """Replace the running statistics of all norm layers by those of the given batches.

    Pruning shifts the activations that statistics were collected of, so that a pruned network is judged fairly only
    with statistics of its own. Each layer gets the mean over the batches of their mean and of their unbiased variance,
    every batch counting the same, as torch's ``momentum=None`` does, but summed in float64 whatever the dtype of the
    buffers. Layers that the batches do not reach keep theirs.

    Everything but these layers runs in evaluation mode (no dropout), without gradients. Training flags, momentum and
    torch's generator of the CPU, which a DataLoader draws from, are as before afterwards.

    Args:
        model: The model. Without norm layers that keep running statistics the batches are not even looked at.
        batches: Batches of training data: tensors; tuples or lists, of which the first element is the input; or
            mappings, passed as keyword arguments. Tensors are moved to the device of the model's first parameter.
        forward: Called as ``forward(model, batch)`` instead, for batches of any other form (default: None)

    Raises:
        ValueError: If there are no batches, a layer is not initialized yet, all layers are brought back to evaluation
            mode by the model or by ``forward``, or layers are not to be told from others (TorchScript, torch.export).
            As after any exception, the statistics are those from before.
    """
    model = unwrapped(model)
    if any(_hides_statistics(module) for module in model.modules()):
        raise ValueError(
            "the model has running statistics in a TorchScript or exported module, which hides what its layers are: "
            "estimate them in the eager model, then script or export it"
        )
    norms = norms_with_statistics(model)
    if not norms:
        return
    run = forward or _default_forward(model)
    momenta = [norm.momentum for norm in norms]
    before = [_statistics(norm) for norm in norms]
    averages = {norm: _Average() for norm in norms}
    unused = []  # passes through layers that the model or forward has put into evaluation mode

    def collect(norm: nn.Module, *_: object) -> None:
        assert isinstance(norm, _NormBase)
        if norm.training:
            averages[norm].add(norm)
        else:
            unused.append(norm)

    hooks = [norm.register_forward_hook(collect) for norm in norms]
    try:
        with evaluation_mode(model), without_compilation(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for norm in norms:
                norm.training = True
                norm.momentum = 1.0  # the buffers hold the statistics of one batch at a time
                if not all(bool(buffer.isfinite().all()) for buffer in _mean_and_variance(norm)):
                    norm.reset_running_stats()  # no batch would overwrite them: 0 * NaN is NaN
            empty = True
            for batch in batches:
                empty = False
                run(model, batch)
            if empty:
                raise ValueError("no batches to estimate the statistics from; an exhausted iterator gives none")
            if unused and not any(average.batches for average in averages.values()):
                raise ValueError(
                    "no statistics were estimated: the model or forward puts its norm layers into evaluation mode; "
                    "leave the modes to recalibrate_batchnorm"
                )
            for norm, statistics in zip(norms, before, strict=True):
                if averages[norm].batches:
                    averages[norm].write(norm)
                else:
                    _restore(norm, statistics)
    except BaseException:
        for norm, statistics in zip(norms, before, strict=True):
            _restore(norm, statistics)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def norms_with_statistics(model: nn.Module) -> list[_NormBase]:
    """Return the norm layers that keep running statistics: batch norms of all kinds, instance norms that track them."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.running_mean is not None]
    for norm in norms:
        if norm.running_mean is not None and is_lazy(norm.running_mean):
            raise ValueError(f"{type(norm).__name__} is not initialized yet: run one batch through the model first")
    return norms


def _hides_statistics(module: nn.Module) -> bool:
    return hides_types(module) and any(name.endswith("running_mean") for name, _ in module.named_buffers())


class _Average:
    """The mean of a layer's statistics over batches, in float64.

    torch's cumulative average is kept in the buffer itself, which in bfloat16 changes no more after 2**8 batches.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._sums: list[Tensor] = []

    def add(self, norm: _NormBase) -> None:
        """Add the statistics that the layer's buffers hold."""
        found = [
            buffer.to(torch.float32 if buffer.is_mps else torch.float64, copy=True)
            for buffer in _mean_and_variance(norm)
        ]
        self._sums = [a + b for a, b in zip(self._sums, found, strict=True)] if self.batches else found
        self.batches += 1

    def write(self, norm: _NormBase) -> None:
        """Put the mean into the layer's buffers."""
        for buffer, total in zip(_mean_and_variance(norm), self._sums, strict=True):
            buffer.copy_(total / self.batches)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(self.batches)  # InstanceNorm leaves it to others


def _mean_and_variance(norm: _NormBase) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


@contextmanager
def statistics_restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Put the running statistics back to what they are now when the block is left in whatever way.

    Yields a function that does so before.
    """
    before = [(norm, _statistics(norm)) for norm in norms_with_statistics(model)]

    def restore() -> None:
        for norm, statistics in before:
            _restore(norm, statistics)

    try:
        yield restore
    finally:
        restore()


def _statistics(norm: _NormBase) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)}


def _restore(norm: _NormBase, statistics: Mapping[str, Tensor]) -> None:
    for name, buffer in norm.named_buffers(recurse=False):
        buffer.copy_(statistics[name])


def _default_forward(model: nn.Module) -> Forward:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def run(model: nn.Module, batch: Any) -> object:
        if isinstance(batch, Mapping):
            return model(**{key: moved(value) for key, value in batch.items()})
        if isinstance(batch, (tuple, list)):
            batch = batch[0]
        return model(moved(batch))

    return run
