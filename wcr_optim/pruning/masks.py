"""Pruning masks at one bit per weight."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wcr_optim.files import check_shape, check_uncompressed, written_whole
from wcr_optim.pruning.patterns import chunks, slabs

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
        self._lay_out({name: mask.shape for name, mask in masks.items()})
        self._fill(chunks(mask) for mask in masks.values())

    @classmethod
    def from_chunks(cls, shapes: Mapping[str, torch.Size], chunked: Iterable[Iterable[Tensor]]) -> Masks:
        """Make masks without any of them existing in full.

        Args:
            shapes: The masks' shapes by name.
            chunked: For each in turn the flat boolean pieces that it consists of, in row-major order, each but the
                last one of a multiple of eight.
        """
        masks = cls({})
        masks._lay_out(shapes)
        masks._fill(chunked)
        return masks

    def __getitem__(self, name: str) -> Tensor:
        """Return a mask as a new boolean tensor on the CPU, True where a weight is kept."""
        shape = self._shapes[name]
        return torch.from_numpy(_unpack(self._bits[self._places[name]], shape.numel())).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # Mapping's own would unpack the mask

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self._shapes == other._shapes and all(
            np.array_equal(self._bits[self._places[name]], other._bits[other._places[name]]) for name in self
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
        return {name: int(_ONES[self._bits[place]].sum(dtype=np.int64)) for name, place in self._places.items()}

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
            "bits": torch.from_numpy(self._bits),
        }
        with written_whole(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)

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
            check_uncompressed(path)
            try:
                shapes, bits = _checked(torch.load(file, map_location="cpu", weights_only=True))
            except Exception as error:
                raise ValueError(f"{os.fspath(path)!r} is not a sound file of masks: {error}") from error
        masks = cls({})
        masks._lay_out({name: torch.Size(shape) for name, shape in shapes.items()})
        masks._bits[:] = bits
        return masks

    def pruned_slabs(self, name: str, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield views of a tensor of the mask's shape, each with a boolean tensor that is True where it is pruned."""
        bits = self._bits[self._places[name]]
        start = 0
        for slab in slabs(tensor):
            kept = _unpack(bits[start // 8 : -(-(start + slab.numel()) // 8)], slab.numel())
            yield slab, torch.from_numpy(np.logical_not(kept, out=kept)).view(slab.shape).to(slab.device)
            start += slab.numel()

    def _lay_out(self, shapes: Mapping[str, torch.Size]) -> None:
        # All masks in one piece: small ones of their own would settle between large tensors that come and go, and keep
        # the memory in between from being used again.
        self._shapes = dict(shapes)
        self._places = _places(self._shapes)
        self._bits: npt.NDArray[np.uint8] = np.zeros(_bytes(self._places), dtype=np.uint8)

    def _fill(self, chunked: Iterable[Iterable[Tensor]]) -> None:
        masks = iter(chunked)
        for place in self._places.values():
            start = place.start
            for piece in next(masks):  # without a name, so that it is gone before the next one is made
                packed = np.packbits(piece.cpu().numpy(), bitorder="little")
                self._bits[start : start + packed.size] = packed
                start += packed.size
        for _ in masks:
            raise ValueError(f"more masks than the {len(self)} shapes")


def as_masks(masks: Mapping[str, Tensor]) -> Masks:
    """Return masks as they are, and boolean tensors by name as masks.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(masks, Masks):
        return masks
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks are given as Masks or as boolean tensors by parameter name, got {masks!r}")
    return Masks(masks)


def _places(shapes: Mapping[str, Iterable[int]]) -> dict[str, slice]:
    """Return the bytes that the masks of these shapes take, each beginning at a byte of its own."""
    places = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + -(-math.prod(shape) // 8)
        places[name] = slice(start, end)
    return places


def _bytes(places: Mapping[str, slice]) -> int:
    return max((place.stop for place in places.values()), default=0)


def _unpack(bits: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(bits, count=count, bitorder="little").view(np.bool_)


def _checked(content: Any) -> tuple[dict[str, list[int]], npt.NDArray[np.uint8]]:
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it does not say {_FORMAT!r}")
    if content.get("version") != _VERSION:
        raise ValueError(f"it has version {content.get('version')!r}, this release reads {_VERSION}")
    shapes, bits = content.get("shapes"), content.get("bits")
    if not isinstance(shapes, dict) or not all(
        isinstance(name, str) and isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        for name, shape in shapes.items()
    ):
        raise ValueError("its shapes are malformed")
    for name, shape in shapes.items():
        check_shape(f"the mask of {name}", shape)
    places = _places(shapes)
    if not isinstance(bits, Tensor) or bits.dtype is not torch.uint8 or bits.shape != (_bytes(places),):
        raise ValueError(f"its shapes take {_bytes(places)} bytes of bits, it does not hold as many")
    # A tensor may claim more elements than are stored, all of them read from the same place.
    if bits.layout is not torch.strided or not bits.is_contiguous() or bits.untyped_storage().nbytes() < bits.numel():
        raise ValueError("its bits are not stored one after the other")
    flat = bits.numpy()
    for name, place in places.items():
        spare = -math.prod(shapes[name]) % 8
        if spare and int(flat[place.stop - 1]) >> (8 - spare):
            raise ValueError(f"the mask of {name} has bits beyond its last weight")
    return shapes, flat
