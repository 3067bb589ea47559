"""Putting masks on a model: for good, or for the duration of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wcr_optim.layout import as_dtensor, local
from wcr_optim.parameters import memory, refusal, unwrapped
from wcr_optim.pruning.masks import Masks, as_masks
from wcr_optim.pruning.shards import own_part


def apply_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the pruned weights of a model to zero, in place.

    The parameters stay the same objects in the same memory; nothing is added to the model, so copies, checkpoints,
    compiled and distributed wrappers are as before. Further training moves the weights away from zero again: apply
    the masks again, after every step for training with a fixed mask.

    Args:
        model: The model; ``torch.compile`` and data-parallel wrappers around it are looked through.
        masks: Masks of some or all of its parameters, or boolean tensors by name, True where a weight is kept.

    Raises:
        ValueError: If the model has no parameter of a mask's name, a mask's shape is not its parameter's, or two masks
            name the same shared parameter, or a parameter cannot be written. No weight has been changed then.
        TypeError: If a mask is not boolean.
    """
    masks = as_masks(masks)
    for target in matched(model, masks):
        _zero(target, masks)


@contextmanager
def applied(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Prune a model for the duration of a ``with`` block, and put back its exact weights at the end of it.

    Holds a copy of the masked parameters meanwhile. They come back as the same objects with the same bits, also where
    the block has put others in their places or converted them, as ``load_state_dict(assign=True)`` and ``half()`` do.

    Args:
        model: As in `apply_`.
        masks: As in `apply_`.

    Raises:
        ValueError: As `apply_`.

    Example:
        >>> with applied(model, magnitude_masks(model, 0.95)):
        ...     accuracy = evaluate(model)
    """
    masks = as_masks(masks)
    targets = matched(model, masks)
    with weights_restored(unwrapped(model), [target.parameter for target in targets]):
        for target in targets:
            _zero(target, masks)
        yield


@contextmanager
def weights_restored(model: nn.Module, tensors: Iterable[Tensor]) -> Iterator[Callable[[], None]]:
    """Put parameters back to where they are and what they hold now, bit for bit, when the block is left in any way.

    Yields a function that does so before.
    """
    copies = [(tensor, tensor.data, local(tensor.detach()).clone()) for tensor in tensors]
    wanted = {id(tensor) for tensor, _, _ in copies}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in wanted
    ]

    def restore() -> None:
        for module, name, parameter in places:
            now = module._parameters.get(name, parameter)  # which is none of them where it is parametrized by now
            by_fsdp = any(isinstance(p, Tensor) and as_dtensor(p) is not None for p in (now, parameter))
            if now is not parameter and not by_fsdp:  # which has sharded and whole ones come and go
                module._parameters[name] = parameter
        for tensor, held, copy in copies:
            if tensor.data.dtype != held.dtype or tensor.data.device != held.device:
                tensor.data = held
            local(tensor.detach()).copy_(copy)

    try:
        yield restore
    finally:
        restore()


class Target(NamedTuple):
    """A parameter and the name of its mask."""

    name: str
    parameter: nn.Parameter


def matched(model: nn.Module, masks: Masks) -> list[Target]:
    """Match masks to parameters, or raise before anything is changed."""
    model = unwrapped(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named: dict[tuple[object, ...], str] = {}
    targets = []
    for name, shape in masks.shapes.items():
        if name not in parameters:
            raise ValueError(f"{name} has a mask but cannot be pruned: {_missing(model, name)}")
        parameter = parameters[name]
        if is_lazy(parameter) or parameter.shape != shape:
            has = "no shape yet" if is_lazy(parameter) else f"shape {tuple(parameter.shape)}"
            raise ValueError(f"the mask of {name} has shape {tuple(shape)}, the parameter has {has}")
        other = named.setdefault(memory(parameter), name)
        if other != name:
            raise ValueError(f"{name} and {other} are the same parameter: keep one of the two masks")
        check_writable(name, parameter)
        targets.append(Target(name, parameter))
    return targets


def check_writable(name: str, tensor: Tensor) -> None:
    """Raise ValueError if torch will refuse to write to a tensor, before others have been written to."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name} was made under torch.inference_mode() and can be changed only there: make the model outside, "
            "or do this inside, too"
        )
    if any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"{name} is expanded, several of its elements are one place in memory: give it a copy, clone()"
        )


def _missing(model: nn.Module, name: str) -> str:
    path, _, own_name = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return "the model has no such parameter; masks belong to the model that they were made for"
    reason = refusal(owner, own_name) or refusal(owner, f"{own_name}_orig")
    return f"the weight {reason}" if reason else f"{type(owner).__name__} has no such parameter"


def _zero(target: Target, masks: Masks) -> None:
    # Written rather than multiplied: 0 * inf is NaN, and 0 * negative is -0.
    if as_dtensor(target.parameter) is not None:
        pruned = ~own_part(masks[target.name], target.parameter)
        part = local(target.parameter.detach())
        part.masked_fill_(pruned.to(part.device), 0)
        return
    for slab, pruned in masks.pruned_slabs(target.name, target.parameter):
        slab.masked_fill_(pruned, 0)
