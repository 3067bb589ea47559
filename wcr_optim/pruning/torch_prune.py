"""Masks to and from torch.nn.utils.prune."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from wcr_optim.parameters import memory, unwrapped
from wcr_optim.pruning.apply import matched
from wcr_optim.pruning.masks import Masks, as_masks


def to_torch_prune(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put masks on a model the way ``torch.nn.utils.prune`` does, in place.

    Every masked ``weight`` becomes a parameter ``weight_orig``, a buffer ``weight_mask`` and a hook that multiplies
    the two before each forward pass. Shared parameters are masked wherever they are held.

    ``out_proj`` of ``nn.MultiheadAttention`` has no forward pass of its own, so its hook never runs, as with torch's
    own methods: its weight stays what it is now, whatever happens to ``weight_orig``. Leave it out where training goes
    on.

    Args:
        model: The model.
        masks: Masks of some or all of its parameters.

    Raises:
        ValueError: As `apply_`.
    """
    custom_from_mask: Callable[..., nn.Module] = prune.custom_from_mask
    model = unwrapped(model)
    masks = as_masks(masks)
    for name, parameter in matched(model, masks):
        mask = masks[name].to(parameter.device)
        places = [
            (module, own_name)
            for module in model.modules()
            for own_name, held in module._parameters.items()
            if held is not None and memory(held) == memory(parameter)
        ]
        for module, own_name in places:
            custom_from_mask(module, own_name, mask)


def from_torch_prune(model: nn.Module) -> Masks:
    """Read the masks that ``torch.nn.utils.prune`` has put on a model, and leave it as it is.

    They have the names that the parameters get back from ``torch.nn.utils.prune.remove``.

    Args:
        model: The model.

    Returns:
        Its masks; that of a shared parameter under its first name.

    Raises:
        ValueError: If the model has no such masks, or a shared parameter has different ones.
    """
    found: dict[str, Tensor] = {}
    names: dict[tuple[object, ...], str] = {}
    for path, module in unwrapped(model).named_modules():
        for own_name, original in module._parameters.items():
            stem = own_name.removesuffix("_orig")
            mask = module._buffers.get(f"{stem}_mask")
            if original is None or mask is None or stem == own_name:
                continue
            name = f"{path}.{stem}" if path else stem
            kept = mask != 0
            first = names.setdefault(memory(original), name)
            if first == name:
                found[name] = kept
            elif not torch.equal(found[first], kept):
                raise ValueError(f"{first} and {name} are one shared parameter with two different masks")
    if not found:
        raise ValueError("the model has no masks of torch.nn.utils.prune")
    return Masks(found)
