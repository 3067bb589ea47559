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


class Pair:
    """A whole network with an unfused optimizer, and the same one sharded with a fused optimizer."""

    def __init__(self, rank):
        self.rank = rank
        self.whole, self.sharded = small_net(), small_net()
        mesh = init_device_mesh("cpu", (2,))
        for layer in (self.sharded[0], self.sharded[3]):  # 3 output rows over 2 ranks: an uneven shard
            fully_shard(layer, mesh=mesh)
        fully_shard(self.sharded, mesh=mesh)
        self.plain = AdamW(self.whole.parameters(), lr=0.01, weight_concentration=0.1)
        self.opt = AdamW(self.sharded.parameters(), lr=0.01, weight_concentration=0.1, fused=True)
        self.opt.backend = "compiled"

    def steps(self, numbers):
        for step in numbers:
            for net, optimizer, parts in ((self.whole, self.plain, 1), (self.sharded, self.opt, 2)):
                x, y = (part.tensor_split(parts)[self.rank % parts] for part in small_batch(step))
                optimizer.zero_grad()
                (net(x) - y).square().mean().backward()
                optimizer.step()

    def assert_close(self):
        for p, q in zip(self.whole.parameters(), self.sharded.parameters(), strict=True):
            assert isinstance(q, DTensor)
            torch.testing.assert_close(p.detach(), q.detach().full_tensor(), rtol=1e-4, atol=2e-6)

    def known(self):
        return [w for w in self.opt.base._known if self.opt.base._is_known(w)]


def _sharded_fused_steps_are_the_whole_unfused_ones(rank):
    pair = Pair(rank)
    pair.steps(range(12))
    assert len(pair.known()) == 2, "both weight matrices were fused"
    pair.assert_close()


def _writes_into_dtensors_are_noticed(rank):
    pair = Pair(rank)
    pair.steps(range(4))
    with torch.no_grad():
        for net in (pair.whole, pair.sharded):
            net[0].weight.mul_(0.5)
    assert pair.known() == [pair.sharded[3].weight]
    pair.steps(range(4, 6))
    assert len(pair.known()) == 2
    state = {name: 0.5 * value for name, value in pair.sharded.state_dict().items()}
    pair.sharded.load_state_dict(state)
    pair.whole.load_state_dict({name: value.full_tensor() for name, value in state.items()})
    assert not pair.known()
    pair.steps(range(6, 8))
    handle = pair.opt.base.register_step_pre_hook(lambda *_: None)  # torch's own update then runs
    pair.steps(range(8, 9))
    handle.remove()
    assert not pair.known()
    pair.steps(range(9, 12))
    pair.assert_close()


@pytest.mark.parametrize("body", [_sharded_fused_steps_are_the_whole_unfused_ones, _writes_into_dtensors_are_noticed])
def test_two_processes(body):
    run_processes(body, 2)
