"""How weights lie in memory and over ranks, so that no other module has to ask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wcr_optim.uploads import select, upload

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

_LINE = 64  # elements; pieces begin where vectors and cache lines do


PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors that are whole and lie where they say."""


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """Return the tensor when it is sharded or replicated over a device mesh, else None."""
    if type(tensor) in PLAIN or not torch.distributed.is_available():
        return None  # spares the import of torch.distributed.tensor to those who do without
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, sharing its memory; any other tensor is its own part."""
    sharded = as_dtensor(tensor)
    return tensor if sharded is None else sharded.to_local()


def stamp(tensor: Tensor) -> tuple[int, ...]:
    """Return what changes when a tensor is written or its memory is replaced; a write through .data goes unnoticed."""
    part = local(tensor)
    # An operation on a DTensor counts as a version of it alone, one on its local part as a version of that part.
    return tensor._version, part._version, part.data_ptr()


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return a view whose dimensions run from the largest stride to the smallest."""
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))


def flat(tensor: Tensor) -> Tensor:
    """Return a 1-D view in memory order, or a copy where there is none; gaps of one size leave a view with a stride.

    Penalties ask only for sums over a layer and for elementwise writes, so the order of the elements is free, and
    channels_last or transposed weights need no copy.
    """
    return tensor.view(-1) if tensor.is_contiguous() else in_memory_order(tensor).reshape(-1)


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill a stretch of memory without gaps, in any order: `flat` then copies nothing."""
    return tensor.is_contiguous() or in_memory_order(tensor).is_contiguous()


def holds_rows_together(tensor: Tensor) -> bool:
    """Return whether the entries w[i] lie in memory one after the other, each without gaps and in any order inside."""
    one = tensor.ndim == 0 or len(tensor) < 2
    return is_dense(tensor) and (one or tensor.stride(0) == tensor.numel() // len(tensor))


def has_address(tensor: Tensor) -> bool:
    """Return whether the elements themselves lie where `data_ptr` says, for a kernel that asks nobody else.

    A subclass may keep them elsewhere, as quantized weights do, or a gradient that is still on its way.
    """
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def pieces(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """Cut a tensor into views of at most `limit` elements, in memory order; 1-D ones where the memory has no gaps."""
    if is_dense(tensor):
        yield from torch.split(flat(tensor), _even(tensor.numel(), limit))
        return
    ordered = in_memory_order(tensor)
    if ordered.numel() <= limit:
        yield ordered
        return
    for part in torch.split(ordered, max(1, limit // ordered[0].numel())):
        yield from pieces(part[0] if part.shape[0] == 1 else part, limit)


def _even(n: int, limit: int) -> int:
    """Return the size of the fewest pieces of at most `limit`, nearly alike: a short last one costs as many calls."""
    count = max(1, -(-n // limit))
    return min(limit, -(-n // (count * _LINE)) * _LINE) or 1


def sum_over_shards(sums: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Add up the rows that belong to sharded tensors over the ranks that hold their shards.

    One all-reduce for every group of ranks that shards anything, for all tensors together: one with FSDP2 alone, two
    with tensor parallelism beside it. A mesh dimension over which a tensor is replicated already holds its sum.

    Args:
        sums: Local sums, shape (layers, k), one row per tensor.
        tensors: The tensors that they were taken of.

    Returns:
        Global sums, shape (layers, k).

    Raises:
        ValueError: If a DTensor holds pending partial sums.

    """
    # By group, not by mesh: with FSDP2 over tensor parallelism, norms lie on a mesh of one dimension and matrices on
    # one of two, whose first has the same ranks.
    rows: defaultdict[ProcessGroup, list[int]] = defaultdict(list)
    for row, tensor in enumerate(tensors):
        sharded = as_dtensor(tensor)
        if sharded is None:
            continue
        for dim, placement in enumerate(sharded.placements):
            if placement.is_partial():
                raise ValueError(
                    f"weights with placements {sharded.placements} hold pending partial sums; redistribute them first"
                )
            if not placement.is_replicate() and sharded.device_mesh.size(dim) > 1:
                rows[sharded.device_mesh.get_group(dim)].append(row)
    for group, index in rows.items():
        part = select(sums, index).clone()
        torch.distributed.all_reduce(part, group=group)
        sums = sums.index_copy(0, upload(tuple(index), torch.int64, sums.device), part)
    return sums


def random_streams(tensors: Sequence[Tensor]) -> list[tuple[int, list[int]]]:
    """Divide tensors so that ranks draw the same random numbers exactly where they hold the same elements.

    Copies on several ranks would drift apart if they were rounded by different draws, and the rounding errors of
    different parts would add up if they were rounded by equal ones. What is drawn for a tensor depends on the sizes of
    those before it, so only tensors of one layout may share a stream: ranks that hold the same part of one of them hold
    the same parts of all.

    Returns:
        The number of each layout's stream, which is this rank's own where it holds a part of its own, and the indices
        of its tensors. A process that holds everything has stream 0 alone.

    """
    layouts: defaultdict[object, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        sharded = as_dtensor(tensor)
        layouts[None if sharded is None else (sharded.device_mesh, sharded.placements)].append(index)
    streams, first = [], 0
    for members in layouts.values():
        part, parts = _part(tensors[members[0]])
        streams.append((first + part, members))
        first += parts
    return streams


def _part(tensor: Tensor) -> tuple[int, int]:
    """Return which of how many different parts of a tensor this rank holds."""
    sharded = as_dtensor(tensor)
    part, parts = 0, 1
    if sharded is not None:
        for dim, placement in enumerate(sharded.placements):
            if not placement.is_replicate():
                size = sharded.device_mesh.size(dim)
                part, parts = part * size + sharded.device_mesh.get_local_rank(dim), parts * size
    return part, parts
