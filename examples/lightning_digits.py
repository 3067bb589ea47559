"""Lightning: SAM around a target for the sparsity, logged and validated pruned while it trains.

Needs lightning, and scikit-learn for its 1,797 real images of handwritten digits; half a minute on a CPU.
"""

import logging
import tempfile
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from wcr_optim import SAM, WCR, param_groups
from wcr_optim.integrations.lightning import (
    ConcentrationCallback,
    PrunedEvaluationCallback,
    SharpnessCallback,
    SparsityTargetCallback,
)

EPOCHS, BATCH = 30, 64
SPARSITY, SPARSITIES = 0.95, (0.9, 0.95, 0.98)


class Digits(LightningModule):
    """A small network; `configure_optimizers` is the only place that knows of concentration."""

    def __init__(self, concentrate):
        super().__init__()
        self.concentrate = concentrate
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x):
        """Return logits."""
        return self.net(x)

    def training_step(self, batch, batch_idx):
        """Return the loss."""
        x, y = batch
        return cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        """Log the accuracy, which PrunedEvaluationCallback logs of the pruned network too."""
        x, y = batch
        self.log("accuracy", 100 * (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        """Return SAM around SGD, with or without weight concentration, and a cosine schedule."""
        optimizer = SAM(torch.optim.SGD(param_groups(self), lr=0.1, momentum=0.9), rho=0.05, model=self)
        if self.concentrate:
            optimizer = WCR(optimizer, form="per_unit")
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def loaders():
    """Return batches for training and for validation."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images[order], dtype=torch.float32) / 16, torch.tensor(labels[order])
    training, held_out = TensorDataset(x[:1350], y[:1350]), TensorDataset(x[1350:], y[1350:])
    return DataLoader(training, BATCH, shuffle=True), DataLoader(held_out, len(held_out))


def train(concentrate, folder):
    """Train by Lightning; return what the last validation measured."""
    torch.manual_seed(0)
    callbacks = [
        SharpnessCallback(),
        PrunedEvaluationCallback(SPARSITIES),
        ModelCheckpoint(folder, monitor=f"accuracy_at_{SPARSITY}", mode="max"),
    ]
    if concentrate:
        callbacks += [SparsityTargetCallback(SPARSITY), ConcentrationCallback()]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        check_val_every_n_epoch=5,
        gradient_clip_val=5.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    training, held_out = loaders()
    trainer.fit(Digits(concentrate), training, held_out)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def main():
    """Train both networks and print their accuracy at every sparsity."""
    # Lightning's own: a class of torch's that it uses itself, and advice on speed.
    for message in (".*LeafSpec.* is deprecated", ".*does not have many workers"):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    print("validation accuracy in percent, after one-shot pruning to a sparsity of")
    print(f"{'':10}" + "".join(f"{100 * sparsity:8g} %" for sparsity in (0, *SPARSITIES)))
    for name, concentrate in (("SAM", False), ("SAM + WCR", True)):
        with tempfile.TemporaryDirectory() as folder:
            measured = train(concentrate, folder)
        values = [measured["accuracy"], *(measured[f"accuracy_at_{sparsity}"] for sparsity in SPARSITIES)]
        print(f"{name:10}" + "".join(f"{value:10.1f}" for value in values))
    print(f"\ntail {measured['sparsity_target/tail']:.1e}, concentration {measured['concentration/mean']:.2f}")


if __name__ == "__main__":
    main()
