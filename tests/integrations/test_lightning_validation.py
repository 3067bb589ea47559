"""Validation of the pruned model: the same figures as by hand, and everything as it was afterwards."""

import importlib
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from lightning_nets import FILTERS, Net, fit, trainer, val_loader
from reference import assert_same, small_batch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection, R2Score

from wcr_optim import SSAM, WCR, pruning
from wcr_optim.integrations.lightning import PrunedEvaluationCallback, SharpnessCallback

pytestmark = [pytest.mark.filterwarnings(f) for f in FILTERS]


def make(m):
    return WCR(torch.optim.SGD(m.parameters(), lr=0.05), form="scale_free")


def mean_loss(module, rows):
    with torch.no_grad():
        return sum(module.loss(row).item() * len(row[0]) for row in rows) / sum(len(row[0]) for row in rows)


def test_batches_of_ones_own_whose_size_nobody_needs():
    class Batch:
        def __init__(self, rows):
            self.x, self.y = rows

    class Own(Net):
        def __init__(self, make):
            super().__init__(make)
            self.metric = MeanMetric()

        def training_step(self, batch, batch_idx):
            return self.loss((batch.x, batch.y))

        def validation_step(self, batch, batch_idx):
            loss = self.loss((batch.x, batch.y))
            self.metric(loss)
            self.log("val", self.metric)
            self.log("largest", loss, reduce_fx="max")

    rows = DataLoader([small_batch(index) for index in range(3)], batch_size=None, collate_fn=Batch)
    run = trainer(PrunedEvaluationCallback((0,)), max_epochs=1)
    run.fit(Own(make), rows, rows)
    for name in ("val", "largest"):
        assert run.callback_metrics[f"{name}_at_0"] == run.callback_metrics[name]


def test_the_same_figures_as_by_hand():
    module = Net(make)
    loader = val_loader(3, size=5)
    run = fit(module, PrunedEvaluationCallback((0, 0.5, 0.9)), validate=loader)
    module.eval()
    found = {name: value.item() for name, value in run.callback_metrics.items()}
    rows = list(loader)
    assert found["val_loss_at_0"] == found["val_loss"] == pytest.approx(mean_loss(module, rows))
    for sparsity in (0.5, 0.9):
        with pruning.applied(module, pruning.magnitude_masks(module, sparsity)):
            assert found[f"val_loss_at_{sparsity:g}"] == pytest.approx(mean_loss(module, rows))
    assert len({found["val_loss_at_0.9"], found["val_loss_at_0.5"], found["val_loss"]}) == 3


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_scope_and_exclude(scope):
    module = Net(make)
    run = fit(module, PrunedEvaluationCallback((0.5,), scope, exclude="net.3"), validate=val_loader())
    masks = pruning.magnitude_masks(module, 0.5, scope, exclude="net.3")
    with pruning.applied(module, masks):
        expected = mean_loss(module.eval(), list(val_loader()))
    assert run.callback_metrics["val_loss_at_0.5"].item() == pytest.approx(expected)


def rows_loader(shuffle):
    x, y = (torch.cat(parts) for parts in zip(*(small_batch(step) for step in range(4)), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=10, shuffle=shuffle)


def test_training_goes_on_as_without_it():
    """Dropout and shuffling draw random numbers in training, loaders and steps do so in validation."""

    class Random(Net):
        def validation_step(self, batch, batch_idx):
            self.log("noise", torch.randn(()))
            super().validation_step(batch, batch_idx)

    modules = []
    for callbacks in ((), (PrunedEvaluationCallback((0.5, 0.9)),)):
        torch.manual_seed(5)
        module = Random(make, dropout=0.3)
        run = trainer(*callbacks, max_epochs=3)
        run.fit(module, rows_loader(shuffle=True), rows_loader(shuffle=False))
        modules.append(module)
    assert_same(modules[0].net, modules[1].net)
    assert modules[0].losses == modules[1].losses


class WithMetrics(Net):
    """Logs metrics of torchmetrics, one that keeps lists among them, and reductions of every kind."""

    def __init__(self, make):
        super().__init__(make)
        self.r2 = R2Score(multioutput="uniform_average")
        self.both = MetricCollection({"first": MeanMetric(), "second": MeanMetric()})
        self.unlogged = MeanMetric()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        loss = nn.functional.mse_loss(out, y)
        self.r2.update(out, y)
        self.both.update(loss)
        self.unlogged.update(loss)
        self.log("r2", self.r2, prog_bar=True)
        self.log_dict(self.both)
        self.log("largest", loss, reduce_fx="max")
        self.log("total", loss, reduce_fx=torch.sum)
        self.log("weighted", loss, batch_size=1)
        self.log("count", 1.0 * batch_idx, reduce_fx="sum")


def test_every_kind_of_logging():
    module = WithMetrics(make)
    run = fit(module, PrunedEvaluationCallback((0.0, 0.9)), validate=val_loader(3, size=5))
    found = {name: value.item() for name, value in run.callback_metrics.items()}
    names = {"r2", "first", "second", "largest", "total", "weighted", "count"}
    assert {name for name in found if "at" not in name.split("_")} == names | {"train_loss"}
    for name in names:
        assert found[f"{name}_at_0"] == found[name]
    assert found["count_at_0.9"] == 3.0
    assert found["r2_at_0.9"] != found["r2"]
    assert found["largest_at_0.9"] != found["largest"]
    assert module.unlogged.weight.item() == 2 * 3  # of two dense validations


def test_several_loaders_and_limits():
    class Several(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch, batch_idx)
            self.log("same", self.loss(batch), add_dataloader_idx=False) if dataloader_idx == 0 else None

    module = Several(make)
    loaders = [val_loader(4), DataLoader([small_batch(7)], batch_size=None)]
    run = fit(module, PrunedEvaluationCallback((0.5,)), validate=loaders, limit_val_batches=2)
    found = run.callback_metrics
    with pruning.applied(module, pruning.magnitude_masks(module, 0.5)):
        first, second = mean_loss(module, list(val_loader(2))), mean_loss(module, [small_batch(7)])
    assert found["val_loss_at_0.5/dataloader_idx_0"].item() == pytest.approx(first)
    assert found["val_loss_at_0.5/dataloader_idx_1"].item() == pytest.approx(second)
    assert found["same_at_0.5"].item() == pytest.approx(first)


def loaders_of(form):
    long, short = val_loader(4), DataLoader([small_batch(7), small_batch(8)], batch_size=None)
    if form == "nested":
        return [long, [short, long]]
    named = {"a": long, "b": short}
    return named if form == "dict" else CombinedLoader(named, form)


@pytest.mark.parametrize("form", ["dict", "nested", "sequential", "min_size", "max_size", "max_size_cycle"])
def test_every_form_of_loaders(form):
    class Any(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            for name, part in batch.items() if isinstance(batch, dict) else [("loss", batch)]:
                if part is not None:  # an exhausted loader's
                    self.log(f"val_{name}", self.loss(part), batch_size=len(part[0]))
            self.log("batches", 1.0, reduce_fx="sum", batch_size=1)

    run = fit(Any(make), PrunedEvaluationCallback((0, 0.5)), validate=loaders_of(form), limit_val_batches=3)
    found = {name: value.item() for name, value in run.callback_metrics.items() if name != "train_loss"}
    dense = {name for name in found if "_at_" not in name}
    assert any(name.startswith("batches") for name in dense)
    for name in dense:
        name, loader, index = name.partition("/")
        assert found[f"{name}_at_0{loader}{index}"] == found[f"{name}{loader}{index}"]
        assert f"{name}_at_0.5{loader}{index}" in found
    assert len(found) == 3 * len(dense)


class Collects(Net):
    """Computes metrics when the epoch ends, of what the steps have collected in every way there is."""

    def __init__(self, make):
        super().__init__(make)
        self.outputs, self.nested = [], {"losses": []}
        self.register_buffer("hits", torch.zeros(()), persistent=False)

    def on_validation_epoch_start(self):
        self.count, self.sum, self.sums, self.array = 0, torch.zeros(()), {"loss": torch.zeros(())}, np.zeros(1)
        self.reached, self.hits = set(), torch.zeros(())

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.outputs.append(loss)
        self.nested["losses"].append(loss)
        self.hits += loss
        self.count += 1
        self.sum += loss
        self.sums["loss"] += loss
        self.array += loss.item()
        self.reached.add(loss.item())
        if (self.net[0].weight == 0).any():
            self.pruned = True
        self.log("val_loss", loss)

    def on_validation_epoch_end(self):
        assert not hasattr(self, "pruned")
        self.log("list", torch.stack(self.outputs).mean())
        self.log("nested", torch.stack(self.nested["losses"]).mean())
        self.log("size", float(len(self.nested["losses"])))
        self.log("distinct", float(len(self.reached)))
        for name, total in {"buffer": self.hits, "tensor": self.sum, "dict": self.sums["loss"]}.items():
            self.log(name, total / self.count)
        self.log("array", self.array.item() / self.count)
        self.outputs.clear()
        self.nested["losses"] = []


@pytest.mark.parametrize("how", ["fit", "validate"])
def test_what_the_module_collects_is_of_the_dense_model(how):
    found = []
    for callbacks in ((), (PrunedEvaluationCallback((0.5, 0.9)),)):
        torch.manual_seed(3)
        module, run = Collects(make), trainer(*callbacks)
        if how == "fit":
            run.fit(module, rows_loader(shuffle=False), val_loader(3))
        else:
            run.validate(module, val_loader(3), verbose=False)
        found.append({name: value.item() for name, value in run.callback_metrics.items()})
    dense, both = found
    assert dense["size"] == dense["distinct"] == 3.0
    assert {name: value for name, value in both.items() if "_at_" not in name} == dense
    assert "val_loss_at_0.9" in both


def test_what_others_hold_too_is_put_back_in_place():
    class Held(Net):
        def __init__(self, make):
            super().__init__(make)
            self.outputs = []
            self.register_buffer("hits", torch.zeros(()))
            self.held = (self.outputs, self.hits)

        def validation_step(self, batch, batch_idx):
            outputs, hits = self.held
            outputs.append(batch_idx)
            hits += 1
            self.log("val_loss", self.loss(batch))

    module = Held(make)
    outputs, hits = module.held
    fit(module, PrunedEvaluationCallback((0.5,)), max_epochs=1)
    assert module.outputs is outputs
    assert module.hits is hits
    assert outputs == [0, 1]
    assert hits == 2


def test_nothing_logged_is_said_once():
    class Silent(Collects):
        def log(self, name, *args, **options):
            if name != "val_loss":
                super().log(name, *args, **options)

        def validation_step(self, batch, batch_idx):
            self.outputs.append(self.loss(batch))

        def on_validation_epoch_end(self):
            self.log("epoch_loss", torch.stack(self.outputs).mean())
            self.outputs.clear()

    with pytest.warns(UserWarning, match=r"validation_step logs nothing.*call self\.log in validation_step") as caught:
        run = fit(Silent(make), PrunedEvaluationCallback((0.5, 0.9)))
    assert sum("validation_step" in str(warning.message) for warning in caught) == 1
    assert "epoch_loss" in run.callback_metrics


def test_averaged_weights():
    pruned, averaging = PrunedEvaluationCallback((0, 0.5)), EMAWeightAveraging(decay=0.5)
    run = fit(Net(make), pruned, averaging)
    assert run.callback_metrics["val_loss_at_0"] == run.callback_metrics["val_loss"]
    with pytest.raises(ValueError, match="put PrunedEvaluationCallback before EMAWeightAveraging"):
        fit(Net(make), averaging, pruned)
    with pytest.raises(ValueError, match="put PrunedEvaluationCallback before EMAWeightAveraging"):
        trainer(averaging, pruned).validate(Net(make), val_loader(), verbose=False)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_steps_that_fetch_batches_themselves_are_refused():
    class Fetches(Net):
        def validation_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            self.log("val_loss", self.loss(batch), batch_size=1)

    with pytest.raises(ValueError, match="takes a dataloader_iter: have it take batch and batch_idx"):
        fit(Fetches(make), PrunedEvaluationCallback((0.5,)))


def test_running_statistics():
    class Normed(Net):
        def __init__(self, make):
            super().__init__(make)
            self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))

        def forward(self, x):
            return self.net(x)

    class Kept(Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            self.before = {name: t.clone() for name, t in pl_module.state_dict().items()}

        def on_validation_end(self, trainer, pl_module):
            assert all(torch.equal(t, self.before[name]) for name, t in pl_module.state_dict().items())
            self.checked = True

    calibration = [small_batch(step) for step in range(3)]
    kept, module = Kept(), Normed(make)
    callbacks = (PrunedEvaluationCallback((0.8,), calibration=calibration), kept)
    run = fit(module, *callbacks)
    assert kept.checked
    module.eval()
    with pruning.applied(module, pruning.magnitude_masks(module, 0.8)):
        pruning.recalibrate_batchnorm(module, calibration)
        expected = mean_loss(module, list(val_loader()))
    assert run.callback_metrics["val_loss_at_0.8"].item() == pytest.approx(expected)


def test_checkpoints_can_choose_by_it(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val_loss_at_0.5", mode="min")
    run = fit(Net(make), PrunedEvaluationCallback((0.5,)), best, enable_checkpointing=True, max_epochs=3)
    assert best.best_model_score is not None
    assert float(best.best_model_score) <= run.callback_metrics["val_loss_at_0.5"].item()


def test_ssam_is_validated_at_its_true_weights():
    module = Net(lambda m: SSAM(torch.optim.SGD(m.parameters(), lr=0.05), rho=0.5))
    run = fit(module, SharpnessCallback(), PrunedEvaluationCallback((0,)), accumulate_grad_batches=2)
    expected = mean_loss(module, list(val_loader()))
    assert run.callback_metrics["val_loss_at_0"].item() == pytest.approx(expected)


def test_half_precision_and_trainer_validate():
    module = Net(make)
    run = trainer(PrunedEvaluationCallback((0, 0.9)), precision="bf16-mixed")
    (found,) = run.validate(module, val_loader(), verbose=False)
    assert found["val_loss_at_0"] == found["val_loss"] != found["val_loss_at_0.9"]


def test_nothing_in_the_sanity_check():
    class Noted(Callback):
        seen = None

        def on_sanity_check_end(self, trainer, pl_module):
            self.seen = set(trainer.callback_metrics)

    noted = Noted()
    fit(Net(make), PrunedEvaluationCallback((0.5,)), noted, num_sanity_val_steps=1)
    assert noted.seen == {"val_loss"}


def test_an_exception_restores_everything():
    class Fails(Net):
        def validation_step(self, batch, batch_idx):
            if (self.net[0].weight == 0).any():
                self.outputs.append(batch_idx)
                raise RuntimeError("on purpose")
            self.weight = self.net[0].weight.clone()
            self.outputs = []
            super().validation_step(batch, batch_idx)

    module = Fails(make)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, PrunedEvaluationCallback((0.5,)))
    assert torch.equal(module.net[0].weight, module.weight)
    assert module.outputs == []
    assert "log" not in vars(module)


def test_bad_arguments():
    with pytest.raises(ValueError, match="sparsity must lie in"):
        PrunedEvaluationCallback((0.5, 1.5))
    with pytest.raises(ValueError, match="at least one"):
        PrunedEvaluationCallback(())
    with pytest.raises(ValueError, match="scope"):
        PrunedEvaluationCallback((0.5,), scope="all")
    with pytest.raises(TypeError, match=r"sparsities must be a sequence of numbers, got 0\.9; .* write \(0\.9,\)"):
        PrunedEvaluationCallback(0.9)


def test_without_lightning(monkeypatch):
    step = importlib.import_module("wcr_optim.integrations.lightning_step")
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"wcr_optim\[lightning\]"):
        step._lightning()
