"""Two replicas under DistributedDataParallel, and FSDP2: local perturbations, equal replicas, whole-model equality."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from processes import run_in_turn, run_processes
from sharpness_reference import base_of, batch, groups, net, plain_norm
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from wcr_optim import WCR
from wcr_optim.sharpness import SAM, SSAM, CrAM, SparseSAM

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

MAKE = {
    "sam": SAM,
    "interval": lambda base: SAM(base, interval=2),
    "fisher": lambda base: SparseSAM(base, update_freq=2),
    "dynamic": lambda base: SparseSAM(base, mask="dynamic", update_freq=2),
    "cram": CrAM,
    "cram_dense": lambda base: CrAM(base, plus=False, sparse_grad=False),
    "ssam": SSAM,
}


def replica(name):
    model = net()
    inner = MAKE[name](base_of(groups(model)))
    return model, DistributedDataParallel(model), inner, WCR(inner, 1e-2)


def my_part(step, rank):
    return tuple(part.chunk(2)[rank] for part in batch(step))


def ddp_closure(ddp, optimizer, inner, step, rank):
    x, y = my_part(step, rank)

    def closure():
        optimizer.zero_grad()
        with contextlib.nullcontext() if getattr(inner, "needs_reduction", True) else ddp.no_sync():
            loss = (ddp(x) - y).square().mean()
            loss.backward()
        return loss

    return closure


def assert_replicas_equal(model):
    for name, p in model.named_parameters():
        both = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(both, p.detach())
        assert torch.equal(both[0], both[1]), name


def _replicas_stay_equal(rank):
    for name in MAKE:
        model, ddp, inner, optimizer = replica(name)
        sums, moved = [], []
        for step in range(6):
            before = [p.detach().clone() for p in model.parameters()]
            evaluate = ddp_closure(ddp, optimizer, inner, step, rank)
            moved.clear()

            def closure(model=model, moved=moved, evaluate=evaluate):
                moved.append([p.detach().clone() for p in model.parameters()])
                return evaluate()

            optimizer.step(closure)
            assert_replicas_equal(model)
            far = torch.stack([(a - b).abs().sum() for a, b in zip(moved[-1], before, strict=True)]).sum()
            both = [torch.empty_like(far) for _ in range(2)]
            dist.all_gather(both, far)
            sums.append(both)
        local = any(not torch.equal(a, b) for a, b in sums)
        assert local == (name not in ("cram", "ssam")), f"{name}: perturbed by the gradients of its own data"


def _sam_is_m_sharpness(rank):
    """The reference: each half of the batch perturbs for itself, the gradients are averaged."""
    model, ddp, inner, optimizer = replica("sam")
    twin = net()
    plain = WCR(base_of(groups(twin)), 1e-2)
    params = [p for group in plain.param_groups for p in group["params"]]
    rhos = [group["rho"] for group in plain.param_groups for _ in group["params"]]
    for step in range(5):
        optimizer.step(ddp_closure(ddp, optimizer, inner, step, rank))
        w = [p.detach().clone() for p in params]
        halves = []
        for half in range(2):
            g = half_gradients(twin, params, w, step, half)
            scale = 1 / (plain_norm(g) + 1e-12)
            moved = [v + rho * x * scale for v, rho, x in zip(w, rhos, g, strict=True)]
            halves.append(half_gradients(twin, params, moved, step, half))
        for p, a, b in zip(params, *halves, strict=True):
            p.grad = (a + b) / 2
        plain.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def half_gradients(model, params, values, step, half):
    names = {id(p): name for name, p in model.named_parameters()}
    given = {names[id(p)]: v.clone().requires_grad_() for p, v in zip(params, values, strict=True)}
    x, y = my_part(step, half)
    loss = (torch.func.functional_call(model, given, (x,)) - y).square().mean()
    return list(torch.autograd.grad(loss, list(given.values())))


def _overflow_on_one_rank_skips_the_step_on_all(rank):
    for name in ("sam", "fisher", "cram"):
        for failing in (1, 2):
            model = net(torch.float32)
            ddp = DistributedDataParallel(model)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            make = {"sam": SAM, "fisher": SparseSAM, "cram": CrAM}[name]
            optimizer = make(base_of(model.parameters(), "adamw"), scaler=scaler)
            x, y = (part.float() for part in my_part(0, rank))
            calls = []

            def closure(ddp=ddp, optimizer=optimizer, scaler=scaler, x=x, y=y, calls=calls, failing=failing):
                calls.append(1)
                optimizer.zero_grad()
                with contextlib.nullcontext() if optimizer.needs_reduction else ddp.no_sync():
                    loss = (ddp(x) - y).square().mean()
                    bad = rank == 0 and len(calls) == failing
                    scaler.scale(loss * float("inf") if bad else loss).backward()
                return loss

            before = [p.detach().clone() for p in model.parameters()]
            optimizer.gather(closure)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == 2.0**9
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
            assert not optimizer.state
            calls.append(1)
            optimizer.gather(closure)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == 2.0**9
            assert not torch.equal(next(model.parameters()), before[0])
            assert_replicas_equal(model)


def sharded_step(model, optimizer, step, rank=0, world_size=1):
    x, y = (part.tensor_split(world_size)[rank] for part in batch(step))

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return closure


SHARDED = {
    "sam": SAM,
    "asam": lambda base: SAM(base, adaptive=True, eta=0.01),
    "ssam": SSAM,
    "cram": CrAM,
    "cram_pattern": lambda base: CrAM(base, pattern=(2, 4)),
    "all_perturbed": lambda base: SparseSAM(base, sparsity=0.0),
}


def shard(model, mesh):
    for layer in (model[0], model[3], model[6]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _sharded_run_equals_the_whole_one(rank):
    mesh = init_device_mesh("cpu", (2,))
    for name, make in SHARDED.items():
        whole, sharded = net(), shard(net(), mesh)
        one, other = WCR(make(base_of(groups(whole))), 1e-2), WCR(make(base_of(groups(sharded))), 1e-2)
        for step in range(10):
            one.step(sharded_step(whole, one, step))
            other.step(sharded_step(sharded, other, step, rank, 2))
        for p, q in zip(whole.parameters(), sharded.parameters(), strict=True):
            assert isinstance(q, DTensor)
            torch.testing.assert_close(p.detach(), q.detach().full_tensor(), rtol=1e-9, atol=1e-11, msg=name)


def _sharded_resume_is_bit_exact(rank):
    """Through torch.distributed.checkpoint's state dicts, from either state of SSAM."""
    mesh = init_device_mesh("cpu", (2,))
    for name in ("sam", "ssam", "ssam_plain"):
        models = [shard(net(), mesh) for _ in range(2)]
        make = SAM if name == "sam" else SSAM
        first, fresh = (WCR(make(base_of(groups(model), "adamw")), 1e-2) for model in models)

        def steps(model, optimizer, numbers, name=name):
            for step in numbers:
                evaluate = sharded_step(model, optimizer, step, rank, 2)
                if name == "ssam_plain":
                    evaluate()
                    optimizer.step()
                else:
                    optimizer.step(evaluate)

        steps(models[0], first, range(4))
        saved = copy.deepcopy(get_optimizer_state_dict(models[0], first))
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            q.data.copy_(p.data)
        set_optimizer_state_dict(models[1], fresh, saved)
        for model, optimizer in zip(models, (first, fresh), strict=True):
            steps(model, optimizer, range(4, 8))
            optimizer.eval()
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local()), name


def _weights_loaded_into_shards_are_taken_as_the_true_ones(rank):
    model = shard(net(), init_device_mesh("cpu", (2,)))
    optimizer = SSAM(base_of(groups(model)))
    for step in range(3):
        sharded_step(model, optimizer, step, rank, 2)()
        optimizer.step()
    loaded = {name: p.detach() + 1 for name, p in model.named_parameters()}
    model.load_state_dict(loaded, strict=False)
    with pytest.warns(UserWarning, match=f"{len(loaded)} parameters were written while they held"):
        optimizer.eval()
    for name, p in model.named_parameters():
        assert torch.equal(p.to_local(), loaded[name].to_local())


def _norms_of_sequence_parallelism(rank):
    """Their gradients are left as sums that are still to be taken over the ranks."""
    mesh = init_device_mesh("cpu", (2,))
    plan = {"0": SequenceParallel(sequence_dim=0), "1": ColwiseParallel(input_layouts=Shard(0)), "3": RowwiseParallel()}
    for name, make in SHARDED.items():
        torch.manual_seed(0)
        whole = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double()
        divided = parallelize_module(copy.deepcopy(whole), mesh, plan)
        x = torch.randn(6, 8, dtype=torch.float64)
        pairs = []
        for model, data in ((whole, x), (divided, x.chunk(2)[rank])):
            optimizer = WCR(make(torch.optim.SGD(model.parameters(), lr=0.1)), 1e-2)

            def closure(model=model, data=data, optimizer=optimizer):
                optimizer.zero_grad()
                loss = model(data).square().mean()
                loss.backward()
                return loss

            pairs.append((optimizer, closure))
        for _ in range(4):
            for optimizer, closure in pairs:
                optimizer.step(closure)
        for p, q in zip(whole.parameters(), divided.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), q.detach().full_tensor(), rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize(
    "bodies",
    [
        (_replicas_stay_equal, _sam_is_m_sharpness, _overflow_on_one_rank_skips_the_step_on_all),
        (
            _sharded_run_equals_the_whole_one,
            _sharded_resume_is_bit_exact,
            _weights_loaded_into_shards_are_taken_as_the_true_ones,
            _norms_of_sequence_parallelism,
        ),
    ],
    ids=["ddp", "sharded"],
)
def test_two_processes(bodies):
    """Starting processes takes longer than what they do, so each pair does several things."""
    run_processes(run_in_turn, 2, bodies)
