"""Fused optimizers on weights sharded by FSDP2: each rank updates its shards and adds up what it wrote."""

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from reference import small_batch, small_net
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from wcr_optim import AdamW, compiled

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not())),
]


def _sharded_fused_steps_are_the_whole_unfused_ones(rank):
    mesh = init_device_mesh("cpu", (2,))
    whole, sharded = small_net(), small_net()
    for layer in (sharded[0], sharded[3]):  # 3 output rows over 2 ranks: an uneven shard
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    plain = AdamW(whole.parameters(), lr=0.01, weight_concentration=0.1)
    opt = AdamW(sharded.parameters(), lr=0.01, weight_concentration=0.1, fused=True)
    opt.backend = "compiled"
    for step in range(12):
        for net, optimizer, parts in ((whole, plain, 1), (sharded, opt, 2)):
            x, y = (part.tensor_split(parts)[rank % parts] for part in small_batch(step))
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
    assert len(opt.base._known) == 2, "both weight matrices were fused"
    for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert isinstance(q, DTensor)
        torch.testing.assert_close(p.detach(), q.detach().full_tensor(), rtol=1e-4, atol=2e-6)


def test_sharded_fused_steps_are_the_whole_unfused_ones():
    run_processes(_sharded_fused_steps_are_the_whole_unfused_ones, 2)
