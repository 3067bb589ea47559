"""SAM and its kin under Lightning: accumulation, clipping, half precision, dropout, logs, manual optimization."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning_nets import BATCHES, FILTERS, Net, cosine, fit, plain
from reference import assert_same
from torch import nn
from torchmetrics import MeanMetric

from wcr_optim import SAM, SSAM, WCR, CrAM, SparseSAM
from wcr_optim.integrations.lightning import SharpnessCallback

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]


def sgd(m):
    return torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9)


TWO_PASSES = {
    "sam": lambda m: SAM(sgd(m), rho=0.2),
    "asam": lambda m: SAM(sgd(m), rho=0.5, adaptive=True, eta=0.01),
    "interval": lambda m: SAM(sgd(m), rho=0.2, interval=3),
    "wcr_sam": lambda m: WCR(SAM(sgd(m), rho=0.2), 1e-2),
    "sam_wcr": lambda m: SAM(WCR(sgd(m), 1e-2), rho=0.2),
    "sparse_sam": lambda m: SparseSAM(sgd(m), rho=0.2, mask="dynamic", update_freq=2, total_steps=2 * BATCHES),
    "cram": lambda m: CrAM(sgd(m), rho=0.2, sparsities=(0.5,)),
}
ONE_PASS = {
    "ssam": lambda m: SSAM(sgd(m), rho=0.2),
    "wcr_ssam": lambda m: WCR(SSAM(sgd(m), rho=0.2), 1e-2),
}


def passes(precision):
    """Return autocast and a scaler as Lightning would use them."""
    half = precision is not None
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    return torch.autocast("cpu", dtype=dtype, enabled=half, cache_enabled=False), scaler


def sharp_step(clip=None, precision=None, losses=None):
    """Return a step of a plain loop: both passes over all batches, then unscale, clip and step."""
    autocast, scaler = passes(precision)
    where = losses if losses is not None else []

    def step(module, optimizer, rows):
        below = optimizer if hasattr(optimizer, "scaler") else optimizer.base
        if precision == "16-mixed" and hasattr(below, "scaler"):
            below.scaler = scaler

        def closure():
            optimizer.zero_grad()
            total = 0.0
            for row in rows:
                with autocast:
                    loss = module.loss(row) / len(rows)
                scaler.scale(loss).backward()
                total += loss.item()
            return total

        where.append(optimizer.gather(closure))
        scaler.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()

    return step


@pytest.mark.parametrize("precision", [None, "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", [*TWO_PASSES, *ONE_PASS])
def test_accumulated_clipped_and_in_half_precision(name, precision):
    make = {**TWO_PASSES, **ONE_PASS}[name]
    module = Net(make, cosine)
    expected, _ = plain(module, sharp_step(0.5, precision), accumulate=3)
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "precision": precision}
    fit(module, SharpnessCallback(), **options)
    assert_same(module.net, expected.net)


def test_the_wrappers_made_a_difference():
    module = Net(TWO_PASSES["sam"])
    fit(module, SharpnessCallback(), accumulate_grad_batches=3)
    other = Net(sgd)
    fit(other, accumulate_grad_batches=3)
    assert not torch.equal(module.net[0].weight, other.net[0].weight)


@pytest.mark.parametrize("name", ["sam", "cram"])
def test_without_accumulation(name):
    module = Net(TWO_PASSES[name])
    losses = []
    expected, _ = plain(module, sharp_step(0.5, losses=losses))
    seen = Outputs()
    fit(module, SharpnessCallback(), seen, gradient_clip_val=0.5)
    assert_same(module.net, expected.net)
    assert seen.losses == losses  # the first pass's, in what callbacks see and in what was logged
    assert seen.logged == losses
    assert seen.steps == 2 * BATCHES


class Outputs(Callback):
    """Note what Lightning takes for the loss of each batch, and how often it is about to step."""

    def __init__(self):
        self.losses, self.logged, self.steps = [], [], 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.logged.append(trainer.callback_metrics["train_loss"].item())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps += 1


def test_dropout_has_the_same_mask_in_both_passes():
    seen = []

    class Masked(Net):
        def loss(self, batch):
            x, y = batch
            dropped = self.dropout(torch.ones_like(x))
            seen.append(dropped)
            return nn.functional.mse_loss(self.net(x * dropped), y)

        def validation_step(self, batch, batch_idx):
            pass

    fit(Masked(TWO_PASSES["sam"], dropout=0.5), SharpnessCallback(), accumulate_grad_batches=3, max_epochs=1)
    first, second = seen[:3], seen[3:6]
    assert len(seen) == 2 * BATCHES
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[2], seen[6])


def test_metrics_count_every_batch_once():
    class Measured(Net):
        def __init__(self, make):
            super().__init__(make)
            self.mean, self.seen = MeanMetric(), []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.mean.update(loss.detach())
            return loss

        def on_train_epoch_end(self):
            self.seen.append((self.mean.compute().item(), self.mean.weight.item()))
            self.mean.reset()

    plain_net, sharp = Measured(sgd), Measured(TWO_PASSES["sam"])
    fit(plain_net, max_epochs=1)
    fit(sharp, SharpnessCallback(), max_epochs=1)
    assert sharp.seen[0][1] == plain_net.seen[0][1] == BATCHES
    assert sharp.seen[0][0] == pytest.approx(sum(sharp.losses[::2]) / BATCHES)


class Weights(Callback):
    """Note the weights at the start and at the end of every batch, and at validation."""

    def __init__(self):
        self.starts, self.ends, self.validated = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.starts.append(pl_module.net[0].weight.detach().clone())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ends.append(pl_module.net[0].weight.detach().clone())

    def on_validation_start(self, trainer, pl_module):
        self.validated.append(pl_module.net[0].weight.detach().clone())


def test_ssam_is_perturbed_within_batches_only():
    module = Net(ONE_PASS["ssam"])
    true, noted = [], Weights()

    def step(module, optimizer, rows):
        sharp_step()(module, optimizer, rows)
        true.append(module.net[0].weight.detach().clone())

    plain(module, step, accumulate=2)
    fit(module, SharpnessCallback(), noted, accumulate_grad_batches=2)
    assert all(torch.equal(a, b) for a, b in zip(noted.ends[1::2], true, strict=True))
    assert torch.equal(noted.ends[2], true[0])  # an accumulation under way: the true weights between batches
    assert not torch.equal(noted.starts[2], true[0])  # and the perturbed ones in them
    assert torch.equal(noted.validated[0], true[BATCHES // 2 - 1])


class ManualSharp(Net):
    def __init__(self, make):
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        loss = optimizer.optimizer.gather(closure)
        optimizer.step()
        return {"loss": loss.detach()}


@pytest.mark.parametrize("precision", [None, "16-mixed"])
@pytest.mark.parametrize("name", ["wcr_sam", "cram", "wcr_ssam"])
def test_manual_optimization(name, precision):
    module = ManualSharp({**TWO_PASSES, **ONE_PASS}[name])
    expected, _ = plain(module, sharp_step(precision=precision))
    run = fit(module, SharpnessCallback(), precision=precision)
    assert_same(module.net, expected.net)
    assert run.global_step == 2 * BATCHES


def test_manual_ssam_without_a_closure():
    class Plain(ManualSharp):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.zero_grad()

    module = Plain(ONE_PASS["wcr_ssam"])
    expected, _ = plain(module, sharp_step())
    fit(module, SharpnessCallback())
    assert_same(module.net, expected.net)


def test_manual_step_with_a_closure_of_ones_own():
    class Closure(ManualSharp):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    module = Closure(TWO_PASSES["wcr_sam"])
    expected, _ = plain(module, sharp_step())
    fit(module, SharpnessCallback())
    assert_same(module.net, expected.net)


def test_other_optimizers_are_left_alone():
    module, other = Net(sgd), Net(sgd)
    fit(module, SharpnessCallback(), accumulate_grad_batches=2)
    fit(other, accumulate_grad_batches=2)
    assert_same(module.net, other.net)


def test_a_training_step_that_overrides_optimizer_step():
    class Own(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            self.called = getattr(self, "called", 0) + 1
            optimizer.step(closure=lambda: optimizer_closure())

    module = Own(TWO_PASSES["wcr_sam"])
    expected, _ = plain(module, sharp_step())
    fit(module, SharpnessCallback())
    assert_same(module.net, expected.net)
    assert module.called == 2 * BATCHES


def test_an_exception_in_the_second_pass_leaves_the_true_weights():
    class Fails(Net):
        def loss(self, batch):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 4:  # the second batch of the second pass
                raise RuntimeError("on purpose")
            return super().loss(batch)

    module = Fails(TWO_PASSES["sam"])
    before = Net(sgd)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, SharpnessCallback(), accumulate_grad_batches=2)
    assert_same(module.net, before.net)
    assert "optimizer_step" not in vars(module)
    assert "log" not in vars(module)


def test_an_exception_between_accumulated_batches_leaves_the_true_weights():
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    noted, module = Weights(), Fails(ONE_PASS["ssam"])
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, SharpnessCallback(), noted, accumulate_grad_batches=2)
    assert torch.equal(module.net[0].weight, noted.ends[1])


def test_everything_is_given_back():
    module = Net(TWO_PASSES["cram"])
    run = fit(module, SharpnessCallback(), precision="16-mixed", max_epochs=1)
    assert run.optimizers[0].scaler is None
    assert not run.optimizers[0]._optimizer_step_pre_hooks
    assert "optimizer_step" not in vars(module)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_iterators_are_refused():
    class Iterating(Net):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

    with pytest.raises(RuntimeError, match="dataloader_iter"):
        fit(Iterating(TWO_PASSES["sam"]), SharpnessCallback())


@pytest.mark.parametrize("name", ["wcr_sam", "cram", "ssam"])
def test_without_the_callback_nothing_goes_wrong_silently(name):
    make = {**TWO_PASSES, **ONE_PASS}[name]

    class Stepped(ManualSharp):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch))
            self.optimizers().step()

    with pytest.raises(RuntimeError, match="SharpnessCallback"):
        fit(Net(make), accumulate_grad_batches=2)
    with pytest.raises(RuntimeError, match="SharpnessCallback"):
        fit(Stepped(make))
    if name != "ssam":  # whose steps need no closure
        with pytest.raises(RuntimeError, match="SharpnessCallback"):
            fit(Net(make), precision="16-mixed")


def test_a_module_is_copied_and_pickled_while_it_trains():
    class Copies(Callback):
        copies = ()

        def on_train_start(self, trainer, pl_module):
            self.copies = (copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module)))

    copies, module = Copies(), Net(sam_by_name)
    never_copied = copy.deepcopy(module)
    fit(never_copied, max_epochs=1)
    fit(module, SharpnessCallback(), copies, max_epochs=1)
    for copied in copies.copies:  # which Lightning steps by its own rules then
        fit(copied, max_epochs=1)
        assert_same(copied.net, never_copied.net)


def sam_by_name(module):
    return SAM(torch.optim.SGD(module.parameters(), lr=0.05))


def test_averaged_weights_of_ssam_in_manual_optimization():
    def make(module):
        return WCR(SSAM(torch.optim.SGD(module.parameters(), lr=0.0), rho=1.0), 0.0)

    class Manual(Net):
        def __init__(self):
            super().__init__(make)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.zero_grad()

    module = Manual()
    before = copy.deepcopy(module.net)
    averaging = EMAWeightAveraging(decay=0.5, update_starting_at_step=0)
    fit(module, SharpnessCallback(), averaging)
    assert_same(module.net, before)
    with pytest.raises(ValueError, match="put SharpnessCallback before EMAWeightAveraging"):
        fit(Manual(), averaging, SharpnessCallback())
