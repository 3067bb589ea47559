"""A network over four ranks in every layout that people use, and how each feeds it its part of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from wcr_optim.layout import local

RANKS = 4


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Weights of 8, 9 and 7 rows: over four ranks 2 each; 3, 3, 3 and none; 2, 2, 2 and 1."""
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 7)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return net


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(500 + step)
    x = torch.randn(16, 12, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(16, 7, generator=generator, dtype=torch.float64).to(dtype)


class Laid(NamedTuple):
    """A network that is spread out.

    Attributes:
        net: The network.
        part: Which part of the batch this rank takes, of how many.
        average: To be called after backward, for gradients that nobody else averages.
    """

    net: nn.Module
    part: tuple[int, int] = (0, 1)
    average: Callable[[], None] = lambda: None

    def loss(self, step: int) -> Tensor:
        """Run forward and backward on this rank's part of the step's batch."""
        index, parts = self.part
        x, y = (whole.tensor_split(parts)[index] for whole in batch(step, next(self.net.parameters()).dtype))
        loss = (self.net(x) - y).square().mean()
        loss.backward()
        self.average()
        return loss

    def closure(self, optimizer: torch.optim.Optimizer, step: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            return self.loss(step)

        return closure


def by_rows(dtype: torch.dtype = torch.float64) -> Laid:
    """FSDP2, uneven shards and an empty one among them."""
    net, mesh = network(dtype), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh)
    return Laid(fully_shard(net, mesh=mesh), (dist.get_rank(), dist.get_world_size()))


def by_hybrid(dtype: torch.dtype = torch.float64) -> Laid:
    """Hybrid sharding: two replicas of two shards."""
    mesh = init_device_mesh("cpu", (2, RANKS // 2), mesh_dim_names=("replicate", "shard"))
    return Laid(fully_shard(network(dtype), mesh=mesh), (dist.get_rank(), RANKS))


def by_rows_and_columns(dtype: torch.dtype = torch.float64) -> Laid:
    """FSDP2 over tensor parallelism; the last layer has no part in the latter."""
    mesh = init_device_mesh("cpu", (2, RANKS // 2), mesh_dim_names=("data", "tensor"))
    net = network(dtype)
    parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return Laid(fully_shard(net, mesh=mesh["data"]), (mesh["data"].get_local_rank(), 2))


def by_rows_beside_copies(dtype: torch.dtype = torch.float64) -> Laid:
    """FSDP2, but one layer is a plain copy on every rank, as under DDP."""
    net, mesh = network(dtype), init_device_mesh("cpu", (RANKS,))
    copies = set(net[2].parameters())
    fully_shard(net, mesh=mesh, ignored_params=copies)

    def average() -> None:
        for p in copies:
            dist.all_reduce(p.grad)
            p.grad.div_(RANKS)

    return Laid(net, (dist.get_rank(), RANKS), average)


LAYOUTS = {
    "by_rows": by_rows,
    "by_hybrid": by_hybrid,
    "by_rows_and_columns": by_rows_and_columns,
    "by_rows_beside_copies": by_rows_beside_copies,
}


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, wherever its parts are."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_copies_equal(net: nn.Module) -> None:
    """Parts that several ranks hold are the same on all of them, bit for bit."""
    for name, p in net.named_parameters():
        placements = p.placements if isinstance(p, DTensor) else ()
        kept = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
        place = tuple(p.device_mesh.get_coordinate()[i] for i in kept) if kept else ()
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (place, local(p.detach())))
        for there, copy in everyone:
            assert there != place or torch.equal(copy, local(p.detach())), name
