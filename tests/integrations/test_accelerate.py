"""Accelerate: prepared optimizers, accumulation, folders of save_state, two processes."""

import os

import pytest
import torch
from distributed.processes import run_processes
from reference import assert_same
from tiny_language import BATCH, batches, network, plain_loop, text
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from wcr_optim import SAM, SSAM, WCR, SparsityTarget, metrics, param_groups

accelerate = pytest.importorskip("accelerate")
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

STEPS = 12


@pytest.fixture(autouse=True)
def _own_state():
    """Accelerate keeps one state for the process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def make(model, kind="wcr"):
    groups = param_groups(model, weight_decay=0.1, weight_concentration=1e-2, exclude="lm_head")
    base = torch.optim.AdamW(groups, lr=3e-3)
    chains = {"wcr": lambda: base, "ssam": lambda: SSAM(base), "sam": lambda: SAM(base)}
    optimizer = WCR(chains[kind](), form="scale_free")
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / STEPS)


def loader(data=None, size=BATCH):
    return DataLoader(data or text(), batch_size=size)


def train(accelerator, model, optimizer, data, scheduler, target=None, accumulate=1, clip=None):
    """Accelerate's loop, as its documentation writes it."""
    model.train()
    optimizer.train()
    losses = []
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            losses.append(loss.detach())
            accelerator.backward(loss)
            if accelerator.sync_gradients and clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if accelerator.sync_gradients:
                if target is not None:
                    target.step(torch.stack(losses).mean())
                losses.clear()
            scheduler.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", ["wcr", "ssam"])
def test_a_prepared_optimizer_is_a_plain_loop(kind, precision):
    plain, prepared = network(), network()
    optimizer, scheduler = make(plain, kind)
    target = SparsityTarget(optimizer, 0.8, 40, tail_energy=0.05, every=1)
    for batch in batches(text(), STEPS):
        plain_loop(plain, optimizer, [batch], scheduler, target, clip=1.0, autocast=precision == "bf16")
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    own, scheduler = make(prepared, kind)
    model, optimizer_of_loop, data, scheduler = accelerator.prepare(prepared, own, loader(), scheduler)
    driven = SparsityTarget(optimizer_of_loop, 0.8, 40, tail_energy=0.05, every=1)
    train(accelerator, model, optimizer_of_loop, data, scheduler, driven, clip=1.0)
    assert_same(plain, prepared)
    assert str(driven.history) == str(target.history)
    found = metrics.optimizer_concentration(optimizer_of_loop)
    assert torch.equal(found, metrics.optimizer_concentration(optimizer))


def test_gradient_accumulation():
    plain, prepared = network(), network()
    optimizer, scheduler = make(plain)
    plain_loop(plain, optimizer, batches(text(), STEPS), scheduler, accumulate=2, clip=1.0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, data, scheduler = accelerator.prepare(prepared, make(prepared)[0], loader(), None)
    scheduler = accelerator.prepare(LambdaLR(optimizer, lambda step: 1 - step / STEPS))
    train(accelerator, model, optimizer, data, scheduler, accumulate=2, clip=1.0)
    for (name, p), q in zip(plain.named_parameters(), prepared.parameters(), strict=True):
        # Two losses of a half each here, one sum over the items of both there.
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_two_passes_with_a_closure():
    plain, prepared = network(), network()
    models, optimizers = [plain, prepared], []
    accelerator = Accelerator(cpu=True)
    for model in models:
        optimizer, _ = make(model, "sam")
        optimizers.append(accelerator.prepare(optimizer) if model is prepared else optimizer)
    for batch in batches(text(), STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):

            def closure(model=model, optimizer=optimizer, batch=batch):
                optimizer.zero_grad()
                loss = model(**batch).loss
                accelerator.backward(loss)
                return loss

            optimizer.step(closure)
    assert_same(plain, prepared)


@pytest.mark.parametrize("kind", ["wcr", "ssam"])
def test_resumes_bit_for_bit_from_a_folder(kind, tmp_path):
    def start():
        accelerator = Accelerator(cpu=True)
        model = network(dropout=0.1)
        own, scheduler = make(model, kind)
        target = SparsityTarget(own, 0.8, 40, tail_energy=0.05, every=1)
        accelerator.register_for_checkpointing(target)
        prepared = accelerator.prepare(model, own, loader(), scheduler)
        return accelerator, *prepared, target

    accelerator, straight, optimizer, data, scheduler, target = start()
    train(accelerator, straight, optimizer, list(data)[:5], scheduler, target)
    accelerator.save_state(str(tmp_path / "folder"))
    train(accelerator, straight, optimizer, list(data)[5:], scheduler, target)
    AcceleratorState._reset_state(True)
    accelerator, resumed, optimizer, data, scheduler, target_resumed = start()
    accelerator.load_state(str(tmp_path / "folder"))
    train(accelerator, resumed, optimizer, list(accelerator.skip_first_batches(data, 5)), scheduler, target_resumed)
    assert_same(straight, resumed)
    assert str(target_resumed.history) == str(target.history)


def test_eval_and_train_bring_the_true_weights_and_the_perturbed_ones():
    accelerator = Accelerator(cpu=True)
    model = network()
    own, scheduler = make(model, "ssam")
    model, optimizer, data, scheduler = accelerator.prepare(model, own, loader(), scheduler)
    train(accelerator, model, optimizer, data, scheduler)
    perturbed = model.lm_head.weight.clone()
    optimizer.eval()
    assert not torch.equal(model.lm_head.weight, perturbed)
    optimizer.train()
    assert torch.equal(model.lm_head.weight, perturbed)


def _environment(rank, world_size):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")


def two_accelerated(rank, folder):
    _environment(rank, 2)
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    model = network()
    own, scheduler = make(model)
    target = SparsityTarget(own, 0.8, 40, tail_energy=0.05, every=1)
    prepared, optimizer, data, scheduler = accelerator.prepare(model, own, loader(size=BATCH // 2), scheduler)
    assert accelerator.num_processes == 2
    train(accelerator, prepared, optimizer, data, scheduler, target)
    same_everywhere_and_close_to_one_process(rank, model, target)


def two_trained(rank, folder):
    from tiny_language import arguments
    from transformers import Trainer

    from wcr_optim.integrations.transformers import (
        ConcentrationCallback,
        PrunedEvaluationCallback,
        SparsityTargetCallback,
    )

    _environment(rank, 2)
    model = network()
    callback = SparsityTargetCallback(0.8, total_steps=40, tail_energy=0.05, every=1)
    trainer = Trainer(
        model,
        arguments(
            folder,
            per_device_train_batch_size=BATCH // 2,
            eval_strategy="steps",
            eval_steps=6,
            ddp_find_unused_parameters=False,
        ),
        train_dataset=text(),
        eval_dataset=text(16, seed=2),
        optimizers=make(model),
        callbacks=[callback],
    )
    trainer.add_callback(ConcentrationCallback(trainer))
    trainer.add_callback(PrunedEvaluationCallback(trainer, [0.5]))
    trainer.train()
    assert trainer.args.world_size == 2
    assert any("eval_loss_at_0.5" in row for row in trainer.state.log_history)
    same_everywhere_and_close_to_one_process(rank, model, callback.target)


def same_everywhere_and_close_to_one_process(rank, model, target):
    alone = network()
    optimizer, scheduler = make(alone)
    expected = SparsityTarget(optimizer, 0.8, 40, tail_energy=0.05, every=1)
    plain_loop(alone, optimizer, batches(text(), STEPS), scheduler, expected)
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        here = p.detach().clone()
        torch.distributed.broadcast(here, 0)
        assert torch.equal(here, p), f"{name} differs between ranks"
    for row, other in zip(target.history, expected.history, strict=True):
        assert row == pytest.approx(other, rel=1e-3)


def two_processes(rank, folder):
    two_accelerated(rank, folder)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    two_trained(rank, folder)


def test_two_processes_train_as_one(tmp_path):
    run_processes(two_processes, 2, str(tmp_path))
