"""Weights spread over processes get the masks that they would get undivided."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from wcr_optim.pruning import applied, apply_, magnitude_masks, n_m_masks, random_masks, report, sweep

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape).round(decimals=1))  # many ties
    return model


def whole(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def by_fsdp2(model, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def by_hybrid_fsdp2(model, ranks):
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard")))


def by_columns_and_copies(model, ranks):
    mesh = init_device_mesh("cpu", (2, ranks // 2))
    for layer, placements in ((model[0], [Shard(1), Replicate()]), (model[2], [Replicate(), Shard(0)])):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, placements))
    return model


def by_fsdp2_over_tensor_parallelism(model, ranks):
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    with torch.no_grad():  # in this order torch shards evenly only
        model[0], model[2] = nn.Linear(12, 8), nn.Linear(8, 9)
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape).round(decimals=1))
    undivided = copy.deepcopy(model)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    return model, undivided


def _equals_the_undivided_model(rank, ranks, names):
    for name in names:
        divided, undivided = globals()[name](network(), ranks), network()
        if isinstance(divided, tuple):
            divided, undivided = divided
        names_of_shards = [key for key, p in divided.named_parameters() if isinstance(p, DTensor)]
        assert names_of_shards
        for scope in ("global", "layer"):
            for sparsity in (0.0, 0.33, 0.5, 0.9, 1.0):
                masks = magnitude_masks(divided, sparsity, scope)
                assert masks == magnitude_masks(undivided, sparsity, scope), (name, scope, sparsity)
        assert random_masks(divided, 0.5) == random_masks(undivided, 0.5)
        masks = magnitude_masks(divided, 0.6)
        assert report(divided, masks) == report(undivided, masks)
        before = {key: whole(p) for key, p in divided.named_parameters()}
        expected = copy.deepcopy(undivided)
        apply_(expected, masks)
        with applied(divided, masks):
            for (key, p), q in zip(divided.named_parameters(), expected.parameters(), strict=True):
                assert torch.equal(whole(p), q), (name, key)
        for key, p in divided.named_parameters():
            assert torch.equal(whole(p), before[key]), (name, key)

        def zeros(model):
            return float(sum((whole(p) == 0).sum() for p in model.parameters() if p.ndim == 2))

        assert sweep(divided, zeros, [0, 0.5, 0.95]) == sweep(undivided, zeros, [0, 0.5, 0.95])
        for key, p in divided.named_parameters():
            assert torch.equal(whole(p), before[key]), (name, key)


def test_every_layout_equals_the_undivided_model():
    layouts = ("by_fsdp2", "by_hybrid_fsdp2", "by_columns_and_copies", "by_fsdp2_over_tensor_parallelism")
    run_processes(_equals_the_undivided_model, 4, 4, layouts)


def _other_cases(rank):
    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(network(), mesh=mesh)
    assert n_m_masks(model, exclude=["2", "4"]) == n_m_masks(network(), exclude=["2", "4"])
    # Training goes on with the pruned weights.
    masks = magnitude_masks(model, 0.5)
    apply_(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    apply_(model, masks)
    for name, parameter in model.named_parameters():
        if name in masks:
            assert not whole(parameter)[~masks[name]].any()
    # An error on one rank is one on all of them.
    if rank == 1:
        with torch.no_grad():
            model[2].weight.to_local()[-1, -1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        magnitude_masks(model, 0.5)
    # Data parallelism: the same masks on every rank, and training goes on.
    replicated = nn.parallel.DistributedDataParallel(network())
    masks = magnitude_masks(replicated, 0.5)
    assert masks == magnitude_masks(network(), 0.5)
    apply_(replicated, masks)
    optimizer = torch.optim.SGD(replicated.parameters(), lr=0.1)
    replicated(torch.randn(4, 12) + rank).square().sum().backward()
    optimizer.step()
    apply_(replicated, masks)
    weight = replicated.module[0].weight.detach()
    assert not weight[~masks["0.weight"]].any()
    copies = [torch.empty_like(weight) for _ in range(2)]
    dist.all_gather(copies, weight)
    assert torch.equal(*copies)
    # Operations are those of a whole model.
    with pytest.raises(ValueError, match="undivided weights"):
        report(model, masks, torch.randn(1, 12))
    # Two meshes of the same processes.
    other = network()
    other[0].weight = nn.Parameter(distribute_tensor(other[0].weight.detach(), mesh, [Shard(0)]))
    pair = init_device_mesh("cpu", (2, 1))
    other[2].weight = nn.Parameter(distribute_tensor(other[2].weight.detach(), pair, [Shard(1), Replicate()]))
    assert magnitude_masks(other, 0.5) == magnitude_masks(network(), 0.5)
    # Meshes of different processes.
    alone = [DeviceMesh("cpu", [0]), DeviceMesh("cpu", [1])]
    for layer, single in zip((other[0], other[2]), alone, strict=True):
        layer.weight = nn.Parameter(DTensor.from_local(torch.randn(4, 4), single, [Shard(0)]))
    with pytest.raises(ValueError, match=r"2\.weight and 0\.weight are held by different processes"):
        magnitude_masks(other, 0.5)


def test_training_errors_and_meshes():
    run_processes(_other_cases, 2)
