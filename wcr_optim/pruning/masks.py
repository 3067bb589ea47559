"""Pruning masks at one bit per weight, and how they are put on a model."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wcr_optim.layout import as_dtensor, local
from wcr_optim.parameters import refusal, unwrapped
from wcr_optim.pruning.shards import own_part
from wcr_optim.pruning.threshold import chunks, slabs

_FORMAT = "wcr_optim.masks"
_VERSION = 1
_ONES = np.array([value.bit_count() for value in range(256)], dtype=np.uint8)


class Masks(Mapping[str, Tensor]):
    """Which weights of a model are kept, by the names of its parameters, at one bit per weight.

    A mapping of names to boolean tensors, True where a weight is kept, unpacked when asked for. It holds no reference
    to the model, and can be copied, pickled, compared and saved.

    Args:
        masks: Boolean tensors by parameter name, on any device.

    Raises:
        TypeError: If a mask is not boolean.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"the mask of {name} must be a boolean tensor, got {kind}")
        self._bits = {name: pack(chunks(mask), mask.numel()) for name, mask in masks.items()}
        self._shapes = {name: mask.shape for name, mask in masks.items()}

    @classmethod
    def from_bits(cls, bits: Mapping[str, Tensor], shapes: Mapping[str, Iterable[int]]) -> Masks:
        """Make masks of packed bits, without unpacking them.

        Args:
            bits: By name, uint8 tensors of ceil(n / 8) bytes; element i in row-major order is bit i % 8 of byte
                i // 8, counted from the lowest, and the bits after the last element are zero.
            shapes: By name, the shapes of the masks.

        Raises:
            ValueError: If bits and shapes do not fit each other.
        """
        masks = cls({})
        if bits.keys() != shapes.keys():
            raise ValueError(f"bits and shapes name different masks: {sorted(bits.keys() ^ shapes.keys())}")
        for name, packed in bits.items():
            shape = torch.Size(shapes[name])
            numel = shape.numel()
            if packed.dtype is not torch.uint8 or packed.shape != (-(-numel // 8),) or packed.device.type != "cpu":
                raise ValueError(
                    f"the mask of {name}, of shape {tuple(shape)}, takes {-(-numel // 8)} bytes, "
                    f"got {packed.dtype} of shape {tuple(packed.shape)}"
                )
            if numel % 8 and int(packed[-1]) >> (numel % 8):
                raise ValueError(f"the mask of {name} has bits set beyond its last weight")
            masks._bits[name] = packed
            masks._shapes[name] = shape
        return masks

    def __getitem__(self, name: str) -> Tensor:
        """Return a mask as a new boolean tensor on the CPU, True where a weight is kept."""
        shape = self._shapes[name]
        bits = np.unpackbits(self._bits[name].numpy(), count=shape.numel(), bitorder="little")
        return torch.from_numpy(bits.view(np.bool_)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __contains__(self, name: object) -> bool:
        return name in self._bits  # Mapping's own would unpack the mask

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self._shapes == other._shapes and all(
            torch.equal(bits, other._bits[name]) for name, bits in self._bits.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Masks({len(self)} tensors, {self.kept:,} of {self.total:,} weights kept, sparsity {self.sparsity:.2%})"

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The masks' shapes by name."""
        return dict(self._shapes)

    @property
    def kept_by_name(self) -> dict[str, int]:
        """The number of kept weights of each mask."""
        return {name: int(_ONES[bits.numpy()].sum(dtype=np.int64)) for name, bits in self._bits.items()}

    @property
    def kept(self) -> int:
        """The number of kept weights."""
        return sum(self.kept_by_name.values())

    @property
    def total(self) -> int:
        """The number of weights that the masks speak of, kept or not."""
        return sum(shape.numel() for shape in self._shapes.values())

    @property
    def sparsity(self) -> float:
        """The share of pruned weights among those that the masks speak of; 0 when they speak of none."""
        return 1.0 - self.kept / self.total if self.total else 0.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to a file, completely or not at all.

        Args:
            path: Where to; an existing file is replaced.

        Raises:
            OSError: If it cannot be written; an existing file is as before.
        """
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "shapes": {name: list(shape) for name, shape in self._shapes.items()},
            "bits": self._bits,
        }
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb") as file:
                torch.save(content, file)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read masks that `save` wrote. Executes nothing that the file may contain.

        Args:
            path: The file.

        Returns:
            The masks.

        Raises:
            ValueError: If the file is damaged or of another kind.
            OSError: If it cannot be read.
        """
        with open(path, "rb") as file:
            try:
                content = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:
                raise ValueError(f"{os.fspath(path)!r} is not a sound file of masks: {error}") from error
        try:
            return _from_content(content)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is not a sound file of masks: {error}") from error

    def pruned_slabs(self, name: str, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield views of a tensor of the mask's shape, each with a boolean tensor that is True where it is pruned."""
        bits = self._bits[name].numpy()
        start = 0
        for slab in slabs(tensor):
            part = bits[start // 8 : -(-(start + slab.numel()) // 8)]
            kept = np.unpackbits(part, count=slab.numel(), bitorder="little").view(np.bool_)
            yield slab, torch.from_numpy(np.logical_not(kept, out=kept)).view(slab.shape).to(slab.device)
            start += slab.numel()


def pack(flat_chunks: Iterable[Tensor], numel: int) -> Tensor:
    """Pack flat boolean chunks, each of a multiple of eight but the last, into bits, the first element lowest.

    Args:
        flat_chunks: The parts of one mask in order.
        numel: How many elements they have together.

    Returns:
        uint8 tensor of shape (ceil(numel / 8),) on the CPU.
    """
    packed = np.empty(-(-numel // 8), dtype=np.uint8)
    start = 0
    for chunk in flat_chunks:
        part = np.packbits(chunk.cpu().numpy(), bitorder="little")
        packed[start : start + part.size] = part
        start += part.size
    return torch.from_numpy(packed)


def apply_(model: nn.Module, masks: Masks) -> None:
    """Set the pruned weights of a model to zero, in place.

    The parameters stay the same objects in the same memory; nothing is added to the model, so copies, checkpoints,
    compiled and distributed wrappers are as before. Further training moves the weights away from zero again: apply
    the masks again, after every step for training with a fixed mask.

    Args:
        model: The model; ``torch.compile`` and data-parallel wrappers around it are looked through.
        masks: Masks of some or all of its parameters.

    Raises:
        KeyError: If the model has no parameter of a mask's name.
        ValueError: If a mask's shape is not its parameter's, or two masks name the same shared parameter. No weight
            has been changed then.
    """
    for target in matched(model, masks):
        _zero(target, masks)


@contextmanager
def applied(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Prune a model for the duration of a ``with`` block, and put back its exact weights at the end of it.

    Holds a copy of the masked parameters meanwhile.

    Args:
        model: As in `apply_`.
        masks: As in `apply_`.

    Raises:
        KeyError: As `apply_`.
        ValueError: As `apply_`.

    Example:
        >>> with applied(model, magnitude_masks(model, 0.95)):
        ...     accuracy = evaluate(model)
    """
    targets = matched(model, masks)
    with weights_restored([target.parameter for target in targets]):
        for target in targets:
            _zero(target, masks)
        yield


@contextmanager
def weights_restored(tensors: Iterable[Tensor]) -> Iterator[Callable[[], None]]:
    """Put tensors back to what they hold now, bit for bit, when the block is left in whatever way.

    Yields a function that does so before.
    """
    copies = [(tensor, local(tensor.detach()).clone()) for tensor in tensors]

    def restore() -> None:
        for tensor, copy in copies:
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
    named: dict[int, str] = {}
    targets = []
    for name, shape in masks.shapes.items():
        if name not in parameters:
            raise KeyError(f"{name}: {_missing(model, name)}")
        parameter = parameters[name]
        if is_lazy(parameter) or parameter.shape != shape:
            has = "no shape yet" if is_lazy(parameter) else f"shape {tuple(parameter.shape)}"
            raise ValueError(f"the mask of {name} has shape {tuple(shape)}, the parameter has {has}")
        if id(parameter) in named:
            raise ValueError(f"{name} and {named[id(parameter)]} are the same parameter: keep one of the two masks")
        named[id(parameter)] = name
        targets.append(Target(name, parameter))
    return targets


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


def _from_content(content: Any) -> Masks:
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it does not say {_FORMAT!r}")
    if content.get("version") != _VERSION:
        raise ValueError(f"it has version {content.get('version')!r}, this release reads {_VERSION}")
    bits: Any = content.get("bits")
    shapes: Any = content.get("shapes")
    sound = (
        isinstance(bits, dict)
        and isinstance(shapes, dict)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in bits.items())
        and all(
            isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
            for shape in shapes.values()
        )
    )
    if not sound:
        raise ValueError("its bits or shapes are missing or malformed")
    return Masks.from_bits(bits, shapes)
