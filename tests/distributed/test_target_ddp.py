"""SparsityTarget over several processes: the tail of sharded weights is whole, and replicas stay replicas."""

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from reference import small_batch, small_net
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from wcr_optim import WCR, SparsityTarget, compiled
from wcr_optim.invariance import invariant_units, one_threshold
from wcr_optim.penalties import PerUnit
from wcr_optim.tail import tails
from wcr_optim.units import shrink_units_, unit_moments

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def _counts_add_up(rank):
    mesh, plane = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    a, b = torch.randn(31, 17), torch.randn(64).pow(3)
    whole = tails([[a, b]], 0.9)
    layouts = [
        [distribute_tensor(a, mesh, [Shard(0)]), distribute_tensor(b, mesh, [Shard(0)])],
        [distribute_tensor(a, mesh, [Replicate()]), distribute_tensor(b, mesh, [Shard(0)])],
        [distribute_tensor(a, plane, [Replicate(), Shard(1)]), distribute_tensor(b, mesh, [Shard(0)])],
        [distribute_tensor(a, plane, [Shard(0), Shard(1)]), b],
    ]
    for tensors in layouts:
        torch.testing.assert_close(tails([tensors], 0.9), whole, rtol=0, atol=0)
        apart = torch.cat([tails([[a], [b]], 0.9)])
        torch.testing.assert_close(tails([[w] for w in tensors], 0.9), apart, rtol=0, atol=0)


def test_counts_of_shards_add_up():
    run_processes(_counts_add_up, 4)


def _units(rank, dtype=torch.float64, backend="eager"):
    """Rows that are held whole need no other rank; rows that are cut are summed over those that hold a part."""
    mesh, plane = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    a, b = torch.randn(6, 17, dtype=dtype), torch.randn(9, 2, 3, dtype=dtype).pow(3)
    whole = torch.stack(list(unit_moments([a, b])))
    shrunk = a.clone(), b.clone()
    gain, threshold = torch.linspace(1, 2, 15), torch.linspace(0, 1, 15)
    shrink_units_(shrunk, gain, threshold)
    for placed in (
        [distribute_tensor(a, mesh, [Shard(0)]), distribute_tensor(b, mesh, [Shard(1)])],
        [distribute_tensor(a, plane, [Shard(1), Shard(0)]), distribute_tensor(b, plane, [Shard(0), Shard(2)])],
        [distribute_tensor(a, plane, [Replicate(), Shard(1)]), distribute_tensor(b, mesh, [Replicate()])],
    ):
        rows = torch.cat([_rows_here(w, first) for w, first in zip(placed, (0, 6), strict=True)])
        found = torch.stack(list(unit_moments(placed, backend=backend)))
        torch.testing.assert_close(found, whole[:, rows], rtol=1e-6, atol=0)
        shrink_units_(placed, gain[rows], threshold[rows], backend=backend)
        for w, expected in zip(placed, shrunk, strict=True):
            torch.testing.assert_close(w.full_tensor(), expected)


def _rows_here(w, first):
    """Find the rows that this rank holds by sharding their numbers alike."""
    numbers = torch.arange(first, first + w.shape[0]).view(-1, *[1] * (w.ndim - 1)).expand(w.shape).contiguous()
    by_rows = [
        p if p.is_shard(0) else Replicate() for p in w.placements
    ]  # a rank without columns has rows all the same
    return distribute_tensor(numbers, w.device_mesh, by_rows).to_local().flatten(1)[:, 0]


def test_units_over_ranks():
    run_processes(_units, 4)


def _lifts(rank):
    """Which rows are lifted, how far, and what threshold all have, does not depend on where they lie."""
    mesh, plane = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    weights = [torch.randn(10, 17, dtype=torch.float64), torch.randn(9, 2, 4, dtype=torch.float64)]
    gradients = []
    for w in weights:
        w[: len(w) // 2] *= 0.3
        g = torch.randn_like(w)
        rows, of_gradient = w.flatten(1), g.flatten(1)
        along = (rows * of_gradient).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
        gradients.append((of_gradient - along * rows).view_as(w))

    def found(places, gradients=gradients):
        layers = []
        for w, g, to in zip(weights, gradients, places, strict=True):
            layers.append(torch.nn.Parameter(w if to is None else distribute_tensor(w, *to)))
            layers[-1].grad = g if to is None else distribute_tensor(g, *to)
        units = unit_moments(layers)
        hidden = invariant_units(layers, units)
        assert hidden.layers.all()
        lengths = torch.full_like(units.n, 1e-2)
        own = PerUnit().flow(units, lengths)[1]
        common = one_threshold(layers, units, own, lengths)
        assert not len(own) or not torch.equal(common, own)
        return layers, torch.stack([hidden.lifts, common], dim=1)

    _, both = found([None, None])
    whole = both[:, 0]
    assert min(whole[:10].max(), whole[10:].max()) > whole.min() == 1
    for places in (
        [(mesh, [Shard(0)]), (mesh, [Shard(1)])],
        [(plane, [Shard(1), Shard(0)]), (plane, [Shard(0), Shard(2)])],
        [(plane, [Replicate(), Shard(1)]), (mesh, [Replicate()])],
    ):
        layers, here = found(places)
        rows = torch.cat([_rows_here(w, first) for w, first in zip(layers, (0, 10), strict=True)])
        torch.testing.assert_close(here, both[rows])
    layers, _ = found([(mesh, [Shard(0)]), (mesh, [Shard(0)])])
    for w in layers:  # gradients that lie otherwise tell nothing, on all ranks alike
        w.grad = None
        w.grad = distribute_tensor(torch.ones(w.shape, dtype=w.dtype), mesh, [Replicate()])
    found_none = invariant_units(layers, unit_moments(layers))
    assert (found_none.lifts == 1).all()
    assert not found_none.layers.any()


def test_lifts_over_ranks():
    run_processes(_lifts, 4)


def _compiled_units(rank):
    _units(rank, torch.float32, "compiled")


@pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))
def test_compiled_units_over_ranks():
    run_processes(_compiled_units, 4)


def _run(net, steps, rank=0, world_size=1, form="per_unit", latent=False):
    groups = [{"params": [p for p in net.parameters() if p.ndim > 1]}]
    base = torch.optim.SGD(groups, lr=1e-2, momentum=0.9) if latent else torch.optim.AdamW(groups, lr=1e-2)
    optimizer = WCR(base, form=form, latent_weights=latent)
    target = SparsityTarget(optimizer, 0.7, steps, tail_energy=0.1, max_dense_cost=5.0, every=2)
    optimizer.scale_invariant = [(0, 0), (0, 1)] if latent else []  # as if the first measurement had found them
    for step in range(steps):
        x, y = (part.tensor_split(world_size)[rank] for part in small_batch(step, torch.float64))
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        target.step(loss)  # of this rank's part alone
    return target


def _sharded(rank):
    mesh = init_device_mesh("cpu", (2,))
    for latent in (False, True):
        whole, sharded = small_net(torch.float64), small_net(torch.float64)
        for layer in (sharded[0], sharded[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        expected, found = _run(whole, 40, latent=latent), _run(sharded, 40, rank, 2, latent=latent)
        assert found.last_tail == pytest.approx(expected.last_tail, rel=1e-6)
        assert found.strengths() == pytest.approx(expected.strengths(), rel=1e-6)
        assert found.lr_factors() == pytest.approx(expected.lr_factors(), rel=1e-6)
        assert found.history[-1][4] < 5
        assert (found.history[10][2] > 0.11) == latent  # half of the run is over: more time


def test_fsdp2_drives_as_one_process_does():
    run_processes(_sharded, 2)


def _alike(rank):
    """Units that share a threshold share it over all ranks, and keep their energy on each."""
    whole, sharded = small_net(torch.float64), small_net(torch.float64)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(sharded, mesh=mesh, shard_placement_fn=lambda w: Shard(1) if w.shape == (3, 12) else None)
    for net, size in ((whole, 1), (sharded, 2)):
        matrices = [p for p in net.parameters() if p.ndim > 1]
        optimizer = WCR(torch.optim.AdamW([{"params": matrices}], lr=1e-2), 0.02, form="per_unit")
        optimizer.scale_invariant, optimizer.cutoff = [(0, 0), (0, 1)], 0.2
        for step in range(5):
            x, y = (part.tensor_split(size)[rank % size] for part in small_batch(step, torch.float64))
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
    for w, v in zip(whole.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(v.full_tensor(), w)


def test_one_threshold_over_ranks():
    run_processes(_alike, 2)


def _replicas(rank):
    net = small_net(torch.float64)
    target = _run(DistributedDataParallel(net), 40, rank, 2)
    seen = [None, None]
    dist.all_gather_object(seen, repr(target.state_dict()["history"]))
    assert seen[0] == seen[1]
    everyone = [torch.empty_like(net[0].weight) for _ in range(2)]
    dist.all_gather(everyone, net[0].weight.detach())
    assert torch.equal(*everyone)


def test_replicas_see_the_same_loss_and_stay_the_same():
    run_processes(_replicas, 2)


def _vocabulary_parallel(rank):
    mesh = init_device_mesh("cpu", (2,))
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    parallelize_module(net, mesh, {"2": ColwiseParallel(use_local_output=False)})
    optimizer = WCR(torch.optim.AdamW(net.parameters(), lr=1e-3, foreach=False), form="per_unit")
    target = SparsityTarget(optimizer, 0.9, 10)
    x, y = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    with loss_parallel():
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
    optimizer.step()
    target.step(loss)
    assert target.history[0][4] == pytest.approx(float(loss.detach().full_tensor()))


def test_a_loss_that_is_spread_over_ranks():
    run_processes(_vocabulary_parallel, 2)
