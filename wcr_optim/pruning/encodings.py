"""Where the zeros are, in few bytes: the encodings behind the sparse file.

Pure functions over flat integer arrays, the *bit patterns* of a tensor. An element is dropped when its pattern is
zero, so ``-0.0``, NaN payloads and infinities are ordinary values and a round trip is exact for every dtype.

| encoding | bytes for n elements, k of them kept, b bytes each | elements that one byte can stand for |
|---|---|---|
| ``dense`` | n b | 1 / b |
| ``bitmask`` | k b + ceil(n / 8) | 8 |
| ``gaps8`` | k b + (k + escapes) | 255 |
| ``gaps16`` | k b + 2 (k + escapes) | 32,768 |

A gap is the number of zeros before the next kept element. The largest value of the unsigned type, E, is an escape: E
zeros and no kept element. The zeros after the last kept element are written too, as escapes, down to a rest shorter
than E. A stream of gaps therefore accounts for the length of its tensor, and a false length is refused before anything
of that length is allocated. Indices of 16 bits within blocks of 65,536 cost what ``gaps16`` does; gaps of 8 bits halve
that up to about 99.6 % sparsity, where too many of them outgrow a byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.integer[Any]]

_GAP_TYPES: dict[str, np.dtype[Any]] = {"gaps8": np.dtype(np.uint8), "gaps16": np.dtype("<u2")}

PARTS: dict[str, tuple[str, ...]] = {
    "dense": ("dense",),
    "bitmask": ("values", "mask"),
    "gaps8": ("values", "gaps"),
    "gaps16": ("values", "gaps"),
}
"""The arrays that each encoding stores."""


def sizes(bits: Bits) -> dict[str, int]:
    """Bytes that each encoding takes for an array.

    Args:
        bits: Flat integer array of bit patterns.

    Returns:
        Bytes by encoding, densest first; gaps are left out where a bitmask is certainly smaller.
    """
    kept = int(np.count_nonzero(bits))
    values = kept * bits.itemsize
    result = {"dense": bits.nbytes, "bitmask": values + -(-bits.size // 8)}
    # A gap takes at least one byte. The test also bounds the memory: the positions are 64-bit numbers.
    if 8 * kept < bits.size:
        gaps, rest = _gaps(bits)
        for encoding, width in _GAP_TYPES.items():
            escape = np.iinfo(width).max
            entries = kept + int((gaps // escape).sum()) + rest // escape
            result[encoding] = values + entries * width.itemsize
    return result


def encode(bits: Bits, encoding: str) -> dict[str, npt.NDArray[Any]]:
    """Split an array into the parts of an encoding.

    Args:
        bits: Flat integer array of bit patterns.
        encoding: A key of `PARTS`.

    Returns:
        The arrays named in ``PARTS[encoding]``: ``values`` has the type of ``bits``, ``mask`` holds eight elements a
        byte, the first in the lowest bit, ``gaps`` is of an unsigned type.
    """
    if encoding == "dense":
        return {"dense": bits}
    kept = bits != 0
    if encoding == "bitmask":
        return {"values": bits[kept], "mask": np.packbits(kept, bitorder="little")}
    width = _GAP_TYPES[encoding]
    escape = np.iinfo(width).max
    gaps, rest = _gaps(bits)
    escapes = gaps // escape
    ends = np.cumsum(escapes + 1)  # one past the entry of each kept element
    stream = np.full((int(ends[-1]) if ends.size else 0) + rest // escape, escape, dtype=width)
    stream[ends - 1] = gaps - escapes * escape
    return {"values": bits[kept], "gaps": stream}


def decode(encoding: str, parts: Mapping[str, npt.NDArray[Any]], size: int) -> Bits:
    """Rebuild an array, or refuse parts that do not describe one of exactly that size.

    Nothing of length ``size`` is allocated before the parts, whose bytes are at hand, have accounted for it.

    Args:
        encoding: A key of `PARTS`.
        parts: Flat arrays as `encode` returns them, of the right types but otherwise untrusted.
        size: The number of elements to rebuild.

    Returns:
        Flat array of ``size`` bit patterns, of the type of the values.

    Raises:
        ValueError: If the parts disagree with each other or with ``size``.
    """
    if encoding == "dense":
        dense = parts["dense"]
        if dense.size != size:
            raise ValueError(f"{dense.size} stored elements for a tensor of {size}")
        return np.array(dense)
    values = parts["values"]
    kept = _unpack(parts["mask"], size) if encoding == "bitmask" else _positions(parts["gaps"], size)
    count = np.count_nonzero(kept) if kept.dtype == np.bool_ else kept.size
    if count != values.size:
        raise ValueError(f"{count} places for {values.size} values")
    bits = np.zeros(size, dtype=values.dtype)
    bits[kept] = values
    return bits


def _gaps(bits: Bits) -> tuple[npt.NDArray[np.int64], int]:
    """Zeros before each kept element, and the zeros after the last one."""
    positions = np.flatnonzero(bits)
    rest = bits.size - (int(positions[-1]) + 1 if positions.size else 0)
    return np.diff(positions, prepend=-1) - 1, rest


def _unpack(mask: npt.NDArray[Any], size: int) -> npt.NDArray[np.bool_]:
    if mask.size != -(-size // 8):
        raise ValueError(f"a bitmask of {mask.size} bytes for {size} elements, which take {-(-size // 8)}")
    if size % 8 and mask[-1] >> (size % 8):
        raise ValueError("the bitmask marks elements beyond the last one")
    return np.unpackbits(mask, count=size, bitorder="little").view(np.bool_)


def _positions(gaps: npt.NDArray[Any], size: int) -> npt.NDArray[np.int64]:
    escape = np.iinfo(gaps.dtype).max
    is_escape = gaps == escape
    # 64 bits cannot overflow: a file would need 2**47 entries of at most 2**16 elements each.
    ends: npt.NDArray[np.int64] = np.cumsum(gaps.astype(np.int64) + ~is_escape)
    covered = int(ends[-1]) if ends.size else 0
    if not 0 <= size - covered < escape:
        raise ValueError(f"the gaps account for {covered} to {covered + escape - 1} elements, not for {size}")
    kept: npt.NDArray[np.int64] = ends[~is_escape] - 1
    return kept
