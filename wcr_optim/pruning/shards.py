"""Selection over weights that are spread over a device mesh: sums of counts, and one layer gathered at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wcr_optim.layout import as_dtensor
from wcr_optim.pruning.search import Cut, RankSearch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def whole(tensor: Tensor) -> Tensor:
    """Return all of a DTensor, a collective of its mesh; any other tensor as it is."""
    sharded = as_dtensor(tensor.detach())
    return tensor.detach() if sharded is None else sharded.full_tensor()


def own_part(full: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this rank holds of a DTensor of the same shape.

    Args:
        full: The same on every rank.
        like: A DTensor, or an ordinary tensor, of which every rank holds all.

    Raises:
        ValueError: If the DTensor is laid out in a way that has no fixed parts.
    """
    sharded = as_dtensor(like)
    if sharded is None:
        return full
    mesh, coordinate = sharded.device_mesh, sharded.device_mesh.get_coordinate()
    if coordinate is None:
        return full.new_empty(sharded.to_local().shape)
    steps = []
    for dim, placement in enumerate(sharded.placements):
        if placement.is_replicate():
            continue
        split = getattr(placement, "dim", None)
        if split is None:
            raise ValueError(f"weights with placements {sharded.placements} are not sharded; redistribute them first")
        # FSDP2 over tensor parallelism: a strided shard is a part of what the other shards have left.
        steps.append((hasattr(placement, "split_factor"), dim, split))
    for _, dim, split in sorted(steps):
        parts = torch.chunk(full, mesh.size(dim), split)
        full = parts[coordinate[dim]] if coordinate[dim] < len(parts) else full.narrow(split, 0, 0)
    return full


def common_mesh(tensors: Mapping[str, Tensor]) -> DeviceMesh | None:
    """Return the largest mesh that DTensors among these are on, None when there are none.

    Raises:
        ValueError: If another is on a mesh that is no part of it.
    """
    meshes = {name: part.device_mesh for name, tensor in tensors.items() if (part := as_dtensor(tensor)) is not None}
    if not meshes:
        return None
    largest = max(meshes, key=lambda name: meshes[name].size())
    for name, mesh in meshes.items():
        if not _ranks(mesh) <= _ranks(meshes[largest]):
            raise ValueError(
                f"{name} and {largest} are held by different processes, so that their weights cannot be ranked "
                "together: prune each part of the model on its own with include="
            )
    return meshes[largest]


def find_sharded_cuts(tensors: Mapping[str, Tensor], sparsities: Sequence[float], mesh: DeviceMesh) -> list[Cut]:
    """Find cuts as `search.find_cuts` does, every rank counting the weights that it holds.

    Args:
        tensors: DTensors on the mesh or on parts of it, and ordinary tensors of which every rank holds all.
        sparsities: Shares of all weights to prune.
        mesh: To be entered by all of its ranks.

    Raises:
        ValueError: On every rank, if a weight is NaN on one.
    """
    parts = {name: part for name, tensor in tensors.items() if (part := _counted_here(tensor, mesh)) is not None}
    wide = any(tensor.dtype is torch.float64 for tensor in tensors.values())
    search = RankSearch(sparsities, torch.float64 if wide else torch.float32)
    while not search.done:
        error = None
        try:
            for name, part in parts.items():
                search.count(name, part)
        except ValueError as found:
            error = found  # raised on all ranks together: the others would wait for this one for ever
        failed = torch.tensor([[int(error is not None)]], device="cpu")
        _add_up(failed, mesh)
        if failed.item():
            raise error or ValueError("another rank's part of the weights holds NaN, which has no rank")
        _add_up(torch.from_numpy(search.counts), mesh)
        search.advance()
    return search.cuts()


def _counted_here(tensor: Tensor, mesh: DeviceMesh) -> Tensor | None:
    """Return this rank's part, None where another rank counts the same one."""
    first = int(mesh.mesh.flatten()[0])
    sharded = as_dtensor(tensor.detach())
    if sharded is None:
        return tensor.detach() if torch.distributed.get_rank() == first else None
    coordinate = sharded.device_mesh.get_coordinate()
    # A tensor on a part of the mesh, as the layers without tensor parallelism, is the same on the other parts.
    if coordinate is None or first not in _ranks(sharded.device_mesh):
        return None
    copies = [at for at, placement in zip(coordinate, sharded.placements, strict=True) if placement.is_replicate()]
    return sharded.to_local() if not any(copies) else None


def _ranks(mesh: DeviceMesh) -> set[int]:
    return set(mesh.mesh.flatten().tolist())


def _add_up(counts: Tensor, mesh: DeviceMesh) -> None:
    total = counts.to(mesh.device_type)
    for dim in range(mesh.ndim):
        if mesh.size(dim) > 1:
            torch.distributed.all_reduce(total, group=mesh.get_group(dim))
    counts.copy_(total)
