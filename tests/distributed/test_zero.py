"""ZeroRedundancyOptimizer: around it every rank regularizes all weights, inside it each rank its own."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from processes import run_in_turn, run_processes
from reference import small_batch, small_net
from torch.nn.parallel import DistributedDataParallel

import wcr_optim
from benchmarks.scaling import Collectives
from wcr_optim import SAM, SSAM, WCR, HoyerDecay, SparseSAM, SparsityTarget

with warnings.catch_warnings():  # of torch's own import, for torch.jit.script
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
MAKE = {
    "wcr": lambda base: WCR(base, 1e-2),
    "scale_free": lambda base: WCR(base, 1e-2, form="scale_free"),
    "two": lambda base: HoyerDecay(WCR(base, 1e-2), 1e-3),
    "sam": lambda base: WCR(SAM(base), 1e-2),
}


def matrices_and_rest(net):
    return [{"params": [p for p in net.parameters() if (p.ndim > 1) == matrix]} for matrix in (True, False)]


def sharded(params, optimizer_class=torch.optim.AdamW, **options):
    return ZeroRedundancyOptimizer(params, optimizer_class=optimizer_class, **{**ADAMW, **options})


def steps(net, optimizer, numbers, rank=0, ranks=1, target=None):
    for step in numbers:
        x, y = (part.tensor_split(ranks)[rank] for part in small_batch(step, torch.float64))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        if target is not None:
            target.step(loss)


def assert_close(whole, net):
    for p, q in zip(whole.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
        both = [torch.empty_like(q) for _ in range(2)]
        dist.all_gather(both, q.detach())
        assert torch.equal(*both)


def _around_it(rank):
    for make in MAKE.values():
        whole, net = small_net(torch.float64), small_net(torch.float64)
        ddp = DistributedDataParallel(net)
        one, other = make(torch.optim.AdamW(matrices_and_rest(whole), **ADAMW)), make(sharded(matrices_and_rest(net)))
        schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 3) for optimizer in (one, other)]
        for part in range(2):
            steps(whole, one, range(3 * part, 3 * part + 3))
            steps(ddp, other, range(3 * part, 3 * part + 3), rank, 2)
            for schedule in schedules:
                schedule.step()
        assert_close(whole, net)


def _resumes_bit_for_bit(rank):
    net, again = small_net(torch.float64), small_net(torch.float64)
    first, fresh = (MAKE["wcr"](sharded(matrices_and_rest(n))) for n in (net, again))
    first.param_groups[0]["weight_concentration"] = 3e-2
    steps(DistributedDataParallel(net), first, range(4), rank, 2)
    with pytest.raises(RuntimeError, match="consolidate_state_dict"):
        first.state_dict()
    first.base.consolidate_state_dict(to=0)
    saved = [copy.deepcopy(first.state_dict()) if rank == 0 else None]
    dist.broadcast_object_list(saved)
    again.load_state_dict(net.state_dict())
    fresh.load_state_dict(saved[0])
    assert fresh.param_groups[0]["weight_concentration"] == 3e-2
    for model, optimizer in ((net, first), (again, fresh)):
        steps(DistributedDataParallel(model), optimizer, range(4, 8), rank, 2)
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def _driven_around_it(rank):
    whole, net = small_net(torch.float64), small_net(torch.float64)
    optimizers = [WCR(torch.optim.AdamW(matrices_and_rest(whole), **ADAMW), 1e-3, form="scale_free")]
    optimizers.append(WCR(sharded(matrices_and_rest(net)), 1e-3, form="scale_free"))
    targets = [SparsityTarget(optimizer, 0.7, 60, tail_energy=0.1, every=2) for optimizer in optimizers]
    steps(whole, optimizers[0], range(10), target=targets[0])
    steps(DistributedDataParallel(net), optimizers[1], range(10), rank, 2, targets[1])
    assert targets[1].strengths() == pytest.approx(targets[0].strengths(), rel=1e-9)
    assert_close(whole, net)


def _inside_it(rank, **options):
    whole, net = small_net(torch.float64), small_net(torch.float64)
    one = wcr_optim.AdamW(matrices_and_rest(whole), weight_concentration=1e-2, **ADAMW, **options)
    other = sharded(matrices_and_rest(net), wcr_optim.AdamW, weight_concentration=1e-2, **options)
    ddp = DistributedDataParallel(net)
    for part in range(2):
        for optimizer in (one, other):
            optimizer.param_groups[0]["weight_concentration"] = 1e-2 * (1 + part)
        steps(whole, one, range(3 * part, 3 * part + 3))
        steps(ddp, other, range(3 * part, 3 * part + 3), rank, 2)
    assert_close(whole, net)
    assert sum(len(group["params"]) for group in other.optim.param_groups) < 6, "each rank has a part"
    # A group of one parameter, of which one rank has no part.
    few = small_net(torch.float64)
    alone = sharded([{"params": [p]} for p in few.parameters()], wcr_optim.AdamW, weight_concentration=1e-2)
    assert any(not group["params"] for group in alone.optim.param_groups)
    steps(DistributedDataParallel(few), alone, range(6), rank, 2)
    one_group = small_net(torch.float64)
    steps(one_group, wcr_optim.AdamW(one_group.parameters(), weight_concentration=1e-2, **ADAMW), range(6))
    assert_close(one_group, few)
    with Collectives() as collectives:
        alone.step()
    assert {call.name for call in collectives.calls} == {"broadcast_"}, "moments of whole layers need no exchange"


def _latent_weights_inside_it(rank):
    _inside_it(rank, latent_weights=True, form="scale_free")


def _what_it_cannot_keep_is_refused(rank):
    for make in (SSAM, SparseSAM, lambda base: SSAM(WCR(base)), lambda base: WCR(SAM(base), latent_weights=True)):
        with pytest.raises(TypeError, match=r"ZeroRedundancyOptimizer saves what its own.*fully_shard"):
            make(sharded(small_net().parameters()))
    with pytest.raises(ValueError, match=r"ZeroRedundancyOptimizer has no decoupled penalty .* WCR\(ZeroRedundancy"):
        SparsityTarget(sharded(small_net().parameters(), wcr_optim.AdamW, weight_concentration=1e-3), 0.9, 10)


def test_two_processes():
    bodies = (
        _around_it,
        _resumes_bit_for_bit,
        _driven_around_it,
        _inside_it,
        _latent_weights_inside_it,
        _what_it_cannot_keep_is_refused,
    )
    run_processes(run_in_turn, 2, bodies)
