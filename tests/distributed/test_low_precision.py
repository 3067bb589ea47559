"""Narrow weights over ranks, and FSDP2's own mixed precision."""

import pytest
import torch
import torch.distributed as dist
from layouts import LAYOUTS, RANKS, assert_copies_equal, batch, full, network
from processes import run_in_turn, run_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from wcr_optim import WCR, AdamW, L1Decay

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def zero_gradients(*weights):
    for w in weights:
        w.grad = torch.zeros_like(w)


def _copies_of_narrow_weights_stay_equal(rank):
    """Beside shards of unequal size, before which a rank draws more random numbers than another."""
    line, plane = init_device_mesh("cpu", (RANKS,)), init_device_mesh("cpu", (2, 2))
    torch.manual_seed(0)
    layouts = [
        (line, [Shard(0)], (7, 64)),
        (line, [Replicate()], (16, 16)),
        (plane, [Replicate(), Shard(0)], (3, 64)),
        (plane, [Shard(0), Shard(1)], (5, 66)),
        (plane, [Shard(1), Replicate()], (64, 5)),
        (line, [Shard(0)], (3 * 2**17, 1)),  # chunks of its own
    ]
    weights = [nn.Parameter(distribute_tensor(torch.randn(s).bfloat16(), m, p)) for m, p, s in layouts]
    weights.append(nn.Parameter(torch.randn(16, 16).bfloat16()))
    before = [full(w).clone() for w in weights]
    optimizer = WCR(torch.optim.SGD(weights, lr=0.1), 1.0)
    for _ in range(3):
        zero_gradients(*weights)
        optimizer.step()
        assert_copies_equal(nn.ParameterList(weights))
    for w, old in zip(weights, before, strict=True):
        assert not torch.equal(full(w), old)


def _different_parts_are_rounded_by_different_draws(rank):
    mesh = init_device_mesh("cpu", (RANKS,))
    row = torch.rand(64, 64).bfloat16() + 1
    w = nn.Parameter(distribute_tensor(row.repeat(RANKS, 1), mesh, [Shard(0)]))  # the same numbers on every rank
    zero_gradients(w)
    L1Decay(torch.optim.SGD([w], lr=1.0), 2e-3).step()  # half of bfloat16's spacing there
    parts = full(w).view(RANKS, -1).float()
    moved = parts - row.flatten().float()
    for i in range(RANKS):
        for j in range(i):
            assert not torch.equal(parts[i], parts[j])
    assert moved.mean().item() == pytest.approx(-2e-3, rel=0.1)


def _narrow_training_in_every_layout(rank):
    for lay in LAYOUTS.values():
        laid = lay(torch.bfloat16)
        optimizer = AdamW(laid.net.parameters(), lr=1e-2, weight_concentration=1.0)
        for step in range(3):
            optimizer.zero_grad()
            laid.loss(step)
            optimizer.step()
            assert_copies_equal(laid.net)


def _mixed_precision_leaves_the_penalty_in_full_precision(rank):
    """The forward is in bfloat16, the shards and the penalty are in float32: a twin steps with the same gradients."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net = network(torch.float32)
    for layer in (net[0], net[2], net[4]):
        fully_shard(layer, mesh=init_device_mesh("cpu", (RANKS,)), mp_policy=policy)
    fully_shard(net, mesh=init_device_mesh("cpu", (RANKS,)), mp_policy=policy)
    twin = network(torch.float32)
    optimizers = [WCR(torch.optim.AdamW(n.parameters(), lr=1e-2), 1e-2) for n in (net, twin)]
    for step in range(6):
        x, y = batch(step, torch.float32)
        optimizers[0].zero_grad()
        (net(x.bfloat16()).float() - y).square().mean().backward()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert p.dtype == p.grad.dtype == torch.float32
            q.grad = full(p.grad)
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(full(p), q.detach(), rtol=1e-6, atol=1e-7)


def test_four_processes():
    bodies = (
        _copies_of_narrow_weights_stay_equal,
        _different_parts_are_rounded_by_different_draws,
        _narrow_training_in_every_layout,
        _mixed_precision_leaves_the_penalty_in_full_precision,
    )
    run_processes(run_in_turn, RANKS, bodies)
