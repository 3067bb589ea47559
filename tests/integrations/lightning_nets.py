"""A small LightningModule, the same training as a plain loop, and what every Lightning test needs."""

from __future__ import annotations

import copy

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from reference import small_batch, small_net
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

BATCHES = 6

# Lightning's own, none of them about what is tested.
FILTERS = [
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",  # Lightning 2.6 on torch >= 2.10
    "ignore:Checkpoint directory .* exists and is not empty",  # at every resume into the folder that it resumes from
    "ignore:.*does not have many workers.*",  # advice on speed, for loaders of a few rows
]


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, 2 * BATCHES)


def train_loader(batches=BATCHES):
    return DataLoader([small_batch(step) for step in range(batches)], batch_size=None)


def val_loader(batches=2, size=None):
    rows = [small_batch(1000 + step) for step in range(batches)]
    if size:  # a last batch of another size
        rows[-1] = tuple(t[:size] for t in rows[-1])
    return DataLoader(rows, batch_size=None)


class Net(LightningModule):
    """Trains `small_net`, with dropout if asked for, by an optimizer that `make(module)` makes."""

    def __init__(self, make, scheduler=None, dropout=0.0):
        super().__init__()
        self.net = small_net()
        self.dropout = nn.Dropout(dropout)
        self.make, self.scheduler = make, scheduler
        self.losses = []

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(self.dropout(x)), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        optimizer = self.make(self)
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"},
        }


def trainer(*callbacks, precision=None, **options):
    if precision == "16-mixed":  # Trainer(precision="16-mixed") becomes bf16-mixed on a CPU, with a warning
        options["plugins"] = [MixedPrecision("16-mixed", "cpu")]
    elif precision is not None:
        options["precision"] = precision
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "max_epochs": 2,
        "callbacks": list(callbacks),
    }
    return Trainer(**{**defaults, **options})


def fit(module, *callbacks, batches=BATCHES, validate=None, ckpt_path=None, **options):
    """Train a module by Lightning from a fixed random state; return the trainer."""
    torch.manual_seed(3)
    run = trainer(*callbacks, **options)
    validate = val_loader() if validate is None else validate
    run.fit(module, train_loader(batches), validate, ckpt_path=ckpt_path, weights_only=True)
    return run


def plain(module, step, epochs=2, batches=BATCHES, accumulate=1, after=None):
    """Train a copy of a module by a plain loop: step(module, optimizer, batches), the scheduler's, after()."""
    module = copy.deepcopy(module)
    module.log = lambda *_, **__: None
    optimizer = module.make(module)
    scheduler = None if module.scheduler is None else module.scheduler(optimizer)
    torch.manual_seed(3)
    for _ in range(epochs):
        rows = [small_batch(index) for index in range(batches)]
        for first in range(0, batches, accumulate):
            step(module, optimizer, rows[first : first + accumulate])
            if scheduler is not None:
                scheduler.step()
            if after is not None:
                after()
    return module, optimizer
