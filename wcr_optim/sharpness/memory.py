"""Arithmetic on many weights at once, in few passes over memory, and the one number that all of them share."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from wcr_optim.layout import flat, local, sum_over_shards
from wcr_optim.precision import accumulator

# Elements that a thread works on at a time, so that what is read again comes from its cache. Up to this size torch uses
# one thread.
PIECE = 2**15
# On other devices, where the launches count: elements in a bucket, which bounds its temporary.
BUCKET = 2**24
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def global_norm(norms: Sequence[Tensor], tensors: Sequence[Tensor]) -> float:
    """Combine the norms of tensors to the norm of all: || (||t||_2)_t ||_2, shards on other ranks included.

    The result is a number on the host. Reading it waits for the device once, which is what it takes to know whether a
    gradient is finite before any weight is moved by it.

    Args:
        norms: 2-norm of this rank's part of every tensor, one element each.
        tensors: The tensors.

    Returns:
        The norm; 0.0 for no tensors, infinite or NaN where a tensor is not finite.

    """
    rows: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for row, norm in enumerate(norms):
        rows[norm.device, norm.dtype].append(row)
    total = 0.0
    for (device, _), index in rows.items():
        squares = torch.stack([norms[row] for row in index]).to(accumulator(device)).square().unsqueeze(1)
        total += float(sum_over_shards(squares, [tensors[row] for row in index]).sum())
    return math.sqrt(total)


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the 2-norm of this rank's part of every tensor, in float32 at least."""
    by_dtype: defaultdict[torch.dtype, list[int]] = defaultdict(list)
    parts = [local(t) for t in tensors]
    for row, part in enumerate(parts):
        by_dtype[part.dtype].append(row)
    result = list(parts)
    for dtype, index in by_dtype.items():
        wide = None if dtype.is_complex else torch.promote_types(dtype, torch.float32)
        measured = torch._foreach_norm([parts[row] for row in index], 2, dtype=wide)
        for row, norm in zip(index, measured, strict=True):
            result[row] = norm
    return result


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of this rank's parts."""
    return [local(t).detach().clone() for t in tensors]


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy every source into its target."""
    if targets:
        torch._foreach_copy_([local(t).detach() for t in targets], [local(s).detach() for s in sources])


def add_(targets: Sequence[Tensor], sources: Sequence[Tensor], factor: float) -> None:
    """Add factor times its source to every target."""
    if any(abs(factor) > torch.finfo(t.dtype).max for t in targets if t.dtype == torch.float16):
        for t, s in zip(targets, sources, strict=True):  # a tiny gradient's factor is out of range, the product is not
            local(t).detach().add_(local(s).detach().float() * factor)
    elif targets:
        sums = [local(t).detach() for t in targets]
        torch._foreach_add_(sums, [local(s).detach() for s in sources], alpha=factor)


def scale_(targets: Sequence[Tensor], sources: Sequence[Tensor], factor: float) -> None:
    """Set every target to factor times its source."""
    for target, source in zip(targets, sources, strict=True):
        torch.mul(local(source).detach(), factor, out=local(target).detach())


def buckets(*columns: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Cut columns of equally shaped tensors into pieces that share memory with them, and gather these into buckets.

    Args:
        *columns: Lists of tensors; those in one row have the same shape.

    Yields:
        For every column the list of its pieces in this bucket.

    """
    bucket: list[tuple[Tensor, ...]] = []
    size = 0
    for whole in zip(*columns, strict=True):
        row = tuple(local(t).detach() for t in whole)
        limit = _limit(row[0].device)
        for pieces in _split(row, limit):
            bucket.append(pieces)
            size += pieces[0].numel()
            if size >= limit:
                yield tuple(list(column) for column in zip(*bucket, strict=True))
                bucket, size = [], 0
    if bucket:
        yield tuple(list(column) for column in zip(*bucket, strict=True))


def _limit(device: torch.device) -> int:
    if device.type != "cpu":
        return BUCKET
    # So many short operations gain less from a second thread than waiting for it costs on a machine that has anything
    # else to do.
    threads = torch.get_num_threads()
    return PIECE * (threads if threads > 2 else 1)


def _split(row: tuple[Tensor, ...], limit: int) -> Iterator[tuple[Tensor, ...]]:
    if row[0].numel() <= limit or any(t.stride() != row[0].stride() for t in row):
        yield row
        return
    memory = [flat(t) for t in row]
    if any(m.data_ptr() != t.data_ptr() for m, t in zip(memory, row, strict=True)):  # gaps, so that flat() had to copy
        yield row
    else:
        yield from zip(*(torch.split(m, limit) for m in memory), strict=True)


def exchange_(weights: Sequence[Tensor], perturbations: Sequence[Tensor]) -> None:
    """Perturb weights and keep them: (w, e) <- (w + e, w), in place, without a third copy.

    Interrupted, it leaves w in place of the weights; the perturbations are then undefined.
    """
    done = 0
    try:
        for ws, es in buckets(weights, perturbations):
            moved = torch._foreach_add(ws, es)
            torch._foreach_copy_(es, ws)
            done += 1
            torch._foreach_copy_(ws, moved)
    except BaseException:
        for (ws, kept), _ in zip(buckets(weights, perturbations), range(done), strict=False):
            torch._foreach_copy_(ws, kept)
        raise


def exchange_back_(perturbed: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Undo `exchange_`: (w + e, w) <- (w, e), where adding e to w again gives w + e to the last bit.

    Interrupted, it leaves w in place of the perturbed weights; the other column is then undefined.
    """
    done = 0
    try:
        for ps, ws in buckets(perturbed, weights):
            moved = [p.clone() for p in ps]
            torch._foreach_copy_(ps, ws)
            done += 1
            torch._foreach_copy_(ws, [_difference(m, p) for m, p in zip(moved, ps, strict=True)])
    except BaseException:
        for bucket, (ps, ws) in enumerate(buckets(perturbed, weights)):
            if bucket >= done:
                torch._foreach_copy_(ps, ws)
        raise


def _difference(moved: Tensor, w: Tensor) -> Tensor:
    """Return e with w + e = moved in floating-point arithmetic, given that such an e exists.

    The rounded difference is one, but where `moved` is a power of two: numbers are spaced half as wide on its side of
    zero, and the difference may have been rounded to that side. Its neighbour away from zero is the solution then.
    """
    if moved.is_complex():
        return torch.view_as_complex(_difference(torch.view_as_real(moved), torch.view_as_real(w)))
    e = moved - w
    bits = _BITS[e.element_size()]
    return torch.where(w + e == moved, e, (e.view(bits) + 1).view(e.dtype))
