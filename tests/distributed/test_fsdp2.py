"""Weights sharded by FSDP2: the penalty sees whole layers, in one all-reduce, and writes only its own shards."""

import copy

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from reference import small_batch, small_net
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from wcr_optim import WCR, HoyerDecay, L1Decay, L2Decay
from wcr_optim.moments import moments

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

WRAPPERS = {
    "inverse_variance": lambda base: WCR(base, 1e-2),
    "scale_free": lambda base: WCR(base, 1e-2, form="scale_free"),
    "l1": lambda base: L1Decay(base, 1e-3),
    "l2": lambda base: L2Decay(base, 1e-2),
    "hoyer": lambda base: HoyerDecay(base, 1e-3),
}


def make(name, net):
    return WRAPPERS[name](torch.optim.AdamW(net.parameters(), lr=1e-2))


def steps(net, opt, numbers, rank=0, world_size=1):
    """Each rank takes its part of the same global batch."""
    for step in numbers:
        x, y = (part.tensor_split(world_size)[rank] for part in small_batch(step, torch.float64))
        opt.zero_grad()
        (net(x) - y).square().mean().backward()
        opt.step()


def _sharded_run_equals_the_whole_one(rank, names):
    mesh = init_device_mesh("cpu", (2,))
    for name in names:
        whole, sharded = small_net(torch.float64), small_net(torch.float64)
        for layer in (sharded[0], sharded[3]):  # 3 output rows over 2 ranks: an uneven shard
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        opt = make(name, sharded)
        steps(whole, make(name, whole), range(20))
        steps(sharded, opt, range(20), rank, 2)
        for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
            assert isinstance(q, DTensor)
            torch.testing.assert_close(p.detach(), q.detach().full_tensor(), rtol=1e-9, atol=1e-11)


def test_sharded_run_equals_the_whole_one():
    run_processes(_sharded_run_equals_the_whole_one, 2, tuple(WRAPPERS))


def _resume_through_dcp_is_bit_exact(rank):
    mesh = init_device_mesh("cpu", (2,))
    nets = [fully_shard(small_net(torch.float64), mesh=mesh) for _ in range(2)]
    first, fresh = (make("scale_free", net) for net in nets)
    steps(nets[0], first, range(5), rank, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(nets[0], first))  # a state_dict shares the tensors of the state
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        q.data.copy_(p.data)
    before = [p.detach().full_tensor().clone() for p in nets[1].parameters()]
    set_optimizer_state_dict(nets[1], fresh, saved)  # probes the fresh optimizer by a step with lr = 0
    for p, q in zip(before, nets[1].parameters(), strict=True):
        assert torch.equal(p, q.detach().full_tensor()), "the probing step changed a weight"
    for net, opt in zip(nets, (first, fresh), strict=True):
        steps(net, opt, range(5, 10), rank, 2)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())


def test_resume_through_dcp_is_bit_exact():
    run_processes(_resume_through_dcp_is_bit_exact, 2)


def _moments_of_any_placement(rank):
    """Shards, replicas, a 2-D mesh and an empty shard in one call, each layer as if it were whole."""
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(0)
    full = [torch.randn(s, dtype=torch.float64) for s in [(6, 4), (5, 3), (1, 7), (8, 8), (3, 3)]]
    placements = [
        (Shard(0), Replicate()),
        (Shard(0), Shard(1)),
        (Shard(0), Shard(0)),  # one row over four ranks: three empty shards
        (Replicate(), Shard(1)),
        (Replicate(), Replicate()),
    ]
    layers = [distribute_tensor(w, mesh, p) for w, p in zip(full, placements, strict=True)]
    layers.append(full[0])  # a plain tensor among them
    calls = []
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(args[0].shape), original(*args, **kwargs))[1]
    try:
        measured = moments(layers)
    finally:
        dist.all_reduce = original
    torch.testing.assert_close(torch.stack(measured), torch.stack(moments([*full, full[0]])), rtol=1e-12, atol=0)
    assert calls == [(3, 2), (3, 2)], "two numbers per layer, one all-reduce for each mesh dimension that shards"


def test_moments_of_any_placement():
    run_processes(_moments_of_any_placement, 4)
