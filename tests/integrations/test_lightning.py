"""Training by Lightning equals a plain loop; the target's callback; logging; resume, also after SIGKILL."""

import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_nets import BATCHES, FILTERS, Net, cosine, fit, plain, train_loader, trainer, val_loader
from reference import assert_same, small_batch

import wcr_optim
from wcr_optim import SAM, SSAM, WCR, CrAM, HoyerDecay, L1Decay, SparsityTarget, metrics, param_groups
from wcr_optim.integrations.lightning import ConcentrationCallback, SparsityTargetCallback

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]

OPT = torch.optim
OPTIMIZERS = {
    "wcr_sgd": lambda m: WCR(OPT.SGD(m.parameters(), lr=0.05, momentum=0.9), 1e-2),
    "wcr_adamw": lambda m: WCR(OPT.AdamW(param_groups(m), lr=1e-2), form="scale_free"),
    "adamw": lambda m: wcr_optim.AdamW(m.parameters(), lr=1e-2, weight_concentration=1e-2),
    "hoyer": lambda m: HoyerDecay(OPT.Adam(m.parameters(), lr=1e-2), 1e-3),
    "l1_lbfgs": lambda m: L1Decay(OPT.LBFGS(m.parameters(), lr=0.1, max_iter=2), 1e-3),
    "sam": lambda m: SAM(OPT.SGD(m.parameters(), lr=0.05, momentum=0.9), model=m),
    "wcr_sam": lambda m: WCR(SAM(OPT.SGD(m.parameters(), lr=0.05)), 1e-2),
    "ssam_wcr": lambda m: SSAM(WCR(OPT.AdamW(m.parameters(), lr=1e-2), 1e-2)),
    "cram": lambda m: CrAM(OPT.SGD(m.parameters(), lr=0.01), sparsities=(0.5,)),
}


def closure_step(module, optimizer, rows):
    """One step of torch's closure convention."""
    (batch,) = rows

    def closure():
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        return loss

    return optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_a_plain_loop(name):
    module = Net(OPTIMIZERS[name], cosine)
    expected, _ = plain(module, closure_step)
    fit(module)
    assert_same(module.net, expected.net)
    assert module.losses == expected.losses


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_precision(precision):
    if precision == "bf16-true":
        module = Net(lambda m: WCR(OPT.AdamW(m.parameters(), lr=1e-2), 1e-2))
        fit(module, precision=precision)
        assert all(p.dtype is torch.bfloat16 and p.isfinite().all() for p in module.parameters())
        return
    module = Net(lambda m: WCR(OPT.SGD(m.parameters(), lr=0.05), 1e-2))
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")

    def step(module, optimizer, rows):
        (batch,) = rows
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = module.training_step(batch, 0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    expected, _ = plain(module, step)
    fit(module, precision=precision)
    assert_same(module.net, expected.net)


def test_accumulated_and_clipped():
    module = Net(lambda m: WCR(OPT.SGD(m.parameters(), lr=0.05, momentum=0.9), 1e-2))

    def step(module, optimizer, rows):
        optimizer.zero_grad()
        for row in rows:
            (module.loss(row) / 3).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.3)
        optimizer.step()

    expected, _ = plain(module, step, accumulate=3)
    fit(module, accumulate_grad_batches=3, gradient_clip_val=0.3)
    assert_same(module.net, expected.net)


class Manual(Net):
    """Manual optimization: one step a batch."""

    def __init__(self, make):
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.manual_backward(loss)
        optimizer.step()
        return loss


def test_manual_optimization():
    make = OPTIMIZERS["wcr_adamw"]
    automatic, manual = Net(make), Manual(make)
    targets = [SparsityTargetCallback(0.5, every=2) for _ in range(2)]
    fit(automatic, targets[0])
    fit(manual, targets[1])
    assert_same(automatic.net, manual.net)
    assert targets[0].target.history == targets[1].target.history


def driven(m):
    return WCR(OPT.SGD(param_groups(m), lr=0.05, momentum=0.9), form="scale_free")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_target_equals_a_plain_loop(accumulate):
    module = Net(driven, cosine)
    steps = 2 * BATCHES // accumulate
    targets, losses = [], []

    def step(module, optimizer, rows):
        if not targets:
            targets.append(SparsityTarget(optimizer, 0.6, steps, tail_energy=0.05, every=2))
        optimizer.zero_grad()
        shares = [module.loss(row) / accumulate for row in rows]
        for share in shares:
            share.backward()
        optimizer.step()
        losses.append(sum(shares).detach())

    expected, _ = plain(module, step, accumulate=accumulate, after=lambda: targets[0].step(losses[-1]))
    callback = SparsityTargetCallback(0.6, tail_energy=0.05, every=2)
    run = fit(module, callback, accumulate_grad_batches=accumulate)
    assert callback.target.steps == callback.target.total_steps == steps
    assert callback.target.history == targets[0].history
    assert_same(module.net, expected.net)
    logged = run.callback_metrics
    assert float(logged["sparsity_target/tail"]) == pytest.approx(callback.target.last_tail)
    assert float(logged["sparsity_target/strength"]) == pytest.approx(max(callback.target.strengths()))


def test_target_sees_the_mean_of_an_epochs_last_batches_that_fill_no_accumulation(monkeypatch):
    seen, losses, step = [], [], SparsityTarget.step

    class Noting(Net):
        def loss(self, batch):
            found = super().loss(batch)
            if self.training:
                losses.append(found.item())
            return found

    monkeypatch.setattr(SparsityTarget, "step", lambda self, loss=None: (seen.append(float(loss)), step(self, loss)))
    fit(Noting(driven), SparsityTargetCallback(0.5, 100), accumulate_grad_batches=4)
    rows = [losses[first : first + size] for first, size in ((0, 4), (4, 2), (6, 4), (10, 2))]
    assert seen == pytest.approx([sum(row) / len(row) for row in rows])


def test_target_wants_to_know_the_number_of_steps():
    with pytest.raises(ValueError, match="total_steps"):
        fit(Net(driven), SparsityTargetCallback(0.5), max_epochs=-1, max_steps=-1, max_time="00:00:00:20")


def test_target_of_several_optimizers():
    class Two(Manual):
        def training_step(self, batch, batch_idx):
            optimizers = self.optimizers()
            for optimizer in optimizers[: 1 + batch_idx % 2]:
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self):
            halves = (self.net[0], self.net[3])
            return [WCR(OPT.SGD(half.parameters(), lr=0.05), form="scale_free") for half in halves]

    first, second = (SparsityTargetCallback(0.5, 100, optimizer=index) for index in range(2))
    measures = [ConcentrationCallback(optimizer=index) for index in range(2)]
    run = fit(Two(None), first, second, *measures)
    assert first.state_key != second.state_key
    for name, target in (("sparsity_target/tail", first), ("sparsity_target_1/tail", second)):
        assert float(run.callback_metrics[name]) == pytest.approx(target.target.last_tail)
    assert run.callback_metrics["concentration/mean"] != run.callback_metrics["concentration_1/mean"]
    assert (first.target.steps, second.target.steps) == (2 * BATCHES, BATCHES)


def test_skipped_steps_are_not_the_targets():
    class Overflowing(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.inf if batch_idx == 2 else loss

    callback = SparsityTargetCallback(0.5, 100, every=1)
    fit(Overflowing(driven), callback, precision="16-mixed")
    assert callback.target.steps == 2 * (BATCHES - 1)
    assert all(math.isfinite(loss) for *_, loss in callback.target.history)


def test_a_checkpoint_that_is_only_validated_is_nothing_to_go_on_from(tmp_path):
    callback = SparsityTargetCallback(0.5, 100)
    module = Net(driven)
    run = fit(module, callback)
    run.save_checkpoint(tmp_path / "early.ckpt")
    run.fit_loop.max_epochs = 4
    run.validate(module, val_loader(), ckpt_path=tmp_path / "early.ckpt", verbose=False, weights_only=True)
    run.fit(module, train_loader(), val_loader())
    assert callback.target.steps == 2 * BATCHES


class Saved(Callback):
    """Save a checkpoint after a batch, in an accumulation's middle if need be."""

    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 0 and batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("name", ["target", "wcr_adamw", "wcr_sam", "ssam_wcr"])
def test_resume_is_bit_exact(name, tmp_path):
    make = driven if name == "target" else OPTIMIZERS[name]

    def callbacks():
        return [SparsityTargetCallback(0.6, 4 * BATCHES, every=2, tail_energy=0.1)] if name == "target" else []

    straight, resumed = Net(make, cosine), Net(make, cosine)
    straight_callbacks, resumed_callbacks = callbacks(), callbacks()
    fit(straight, *straight_callbacks, max_epochs=4)
    saving = [ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1) for _ in range(2)]
    fit(Net(make, cosine), *callbacks(), saving[0], enable_checkpointing=True, max_epochs=2)
    saved = tmp_path / "epoch=1.ckpt"
    fit(resumed, *resumed_callbacks, saving[1], enable_checkpointing=True, max_epochs=4, ckpt_path=saved)
    assert_same(straight.net, resumed.net)
    if name == "target":
        assert straight_callbacks[0].target.state_dict() == resumed_callbacks[0].target.state_dict()


class Alternating(Manual):
    """Two optimizers in manual optimization, both stepping at every batch."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return [driven(self), OPT.SGD(self.net.parameters(), lr=0.01)]


@pytest.mark.parametrize("kind", [Net, Alternating])
def test_a_target_that_begins_at_a_checkpoint_has_the_steps_that_are_left(kind, tmp_path):
    fit(kind(driven), max_epochs=3).save_checkpoint(tmp_path / "without.ckpt")
    callback = SparsityTargetCallback(0.5, tail_energy=0.1)
    fit(kind(driven), callback, max_epochs=4, ckpt_path=tmp_path / "without.ckpt")
    assert callback.target.steps == callback.target.total_steps == BATCHES


@pytest.mark.parametrize("used", [True, False])
def test_a_checkpoint_that_was_tested_is_not_what_the_next_run_goes_on_with(used, tmp_path):
    class Tested(Net):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.loss(batch))

    def callback():
        return SparsityTargetCallback(0.6, 2 * BATCHES, every=2, tail_energy=0.1)

    first, again, fresh = callback(), callback(), callback()
    fit(Net(driven), first, Saved(tmp_path / "mid.ckpt", 3))
    again = first if used else again
    trainer(again).test(Tested(driven), val_loader(), ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
    fit(Net(driven), again)
    fit(Net(driven), fresh)
    assert again.target.state_dict() == fresh.target.state_dict()


def test_a_state_between_two_steps_is_complete(tmp_path):
    callback = SparsityTargetCallback(0.6, 100)
    fit(Net(driven), callback, Saved(tmp_path / "mid.ckpt", 2), accumulate_grad_batches=2)
    state = torch.load(tmp_path / "mid.ckpt", weights_only=True)["callbacks"][callback.state_key]
    module = Net(driven)
    assert state["batches"] == 1
    assert state["target"]["steps"] == 1
    assert state["loss"] == pytest.approx(float(_loss_after_one_step(module)), rel=1e-6)


def _loss_after_one_step(module):
    def step(module, optimizer, rows):
        optimizer.zero_grad()
        SparsityTarget(optimizer, 0.6, 100)
        for row in rows:
            (module.loss(row) / 2).backward()
        optimizer.step()

    trained, _ = plain(module, step, epochs=1, batches=2, accumulate=2)
    return trained.loss(small_batch(2)).detach() / 2


def test_a_run_that_ended_within_an_accumulation_leaves_no_loss_to_the_next():
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    fresh, used = (SparsityTargetCallback(0.5, every=1, tail_energy=0.1) for _ in range(2))
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(Fails(driven), used, accumulate_grad_batches=2)
    fit(Net(driven), used, accumulate_grad_batches=2)
    fit(Net(driven), fresh, accumulate_grad_batches=2)
    assert used.target.history == fresh.target.history


def test_nothing_stays_behind():
    module = Net(driven)
    callback = SparsityTargetCallback(0.5)
    run = fit(module, callback, max_epochs=1)
    assert not run.optimizers[0]._optimizer_step_post_hooks

    class Fails(Net):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("on purpose")

    failing = SparsityTargetCallback(0.5)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(Fails(driven), failing)
    assert failing._hook is None


class Counted(Callback):
    """Count measurements by the steps at which the monitored value changed."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        value = trainer.callback_metrics.get("concentration/mean")
        if value is not None and (not self.seen or float(value) != self.seen[-1][1]):
            self.seen.append((trainer.global_step, float(value)))


def test_concentration_is_logged(tmp_path):
    module = Net(driven)
    counted = Counted()
    logger = CSVLogger(tmp_path)
    run = fit(module, ConcentrationCallback(every=5), counted, logger=logger)
    assert [step for step, _ in counted.seen] == [5, 10]
    rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("concentration/mean")
    written = [(row.split(",")[rows[0].split(",").index("step")], row.split(",")[column]) for row in rows[1:]]
    assert [int(step) for step, value in written if value] == [4, 9]
    with torch.no_grad():
        for p in module.net.parameters():
            p.fill_(1.0)
    found = metrics.optimizer_concentration(run.optimizers[0])
    assert found.tolist() == pytest.approx([0.0, 0.0])


def test_concentration_by_the_trainers_interval():
    counted = Counted()
    fit(Net(driven), ConcentrationCallback(), counted, log_every_n_steps=3)
    assert [step for step, _ in counted.seen] == [3, 6, 9, 12]


def test_concentration_needs_a_penalty():
    with pytest.raises(ValueError, match="no decoupled penalty"):
        fit(Net(lambda m: OPT.SGD(m.parameters(), lr=0.1)), ConcentrationCallback())
    with pytest.raises(ValueError, match="every"):
        ConcentrationCallback(every=0)


KILLED = """
    import os, signal, sys
    sys.path[:0] = [{tests!r}, {here!r}]
    import torch
    torch.set_num_threads(1)
    from lightning_nets import Net, cosine, fit
    from test_lightning import driven
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from wcr_optim.integrations.lightning import SparsityTargetCallback

    class Killer(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == {at}:
                os.kill(os.getpid(), signal.SIGKILL)

    module = Net(driven, cosine)
    checkpoint = ModelCheckpoint({folder!r}, save_last=True)
    target = SparsityTargetCallback(0.6, tail_energy=0.1)
    fit(module, target, checkpoint, Killer(), enable_checkpointing=True, max_epochs=4)
"""


def test_killed_and_resumed(tmp_path):
    """SIGKILL in the third epoch; resumed here from the last checkpoint, the weights end as if nothing had been."""
    tests = Path(__file__).parents[1]
    code = textwrap.dedent(KILLED).format(
        tests=str(tests), here=str(tests / "integrations"), folder=str(tmp_path), at=2 * BATCHES + 3
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tests.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert ended.returncode == -signal.SIGKILL
    straight, resumed = Net(driven, cosine), Net(driven, cosine)
    fit(straight, SparsityTargetCallback(0.6, tail_energy=0.1), max_epochs=4)
    callback = SparsityTargetCallback(0.6, tail_energy=0.1)
    saving = ModelCheckpoint(tmp_path, save_last=True)
    last = tmp_path / "last.ckpt"
    run = fit(resumed, callback, saving, enable_checkpointing=True, max_epochs=4, ckpt_path=last)
    assert run.global_step == 4 * BATCHES
    assert_same(straight.net, resumed.net)
