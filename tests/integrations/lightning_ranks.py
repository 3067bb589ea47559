"""A script: two ranks of pytorch_lightning, which has classes of its own, train on halves of every batch."""

import sys
import warnings

import pytorch_lightning as pl
import torch
from reference import small_batch, small_net
from torch import nn
from torch.utils.data import DataLoader

from wcr_optim import SAM, SSAM, WCR
from wcr_optim.integrations.lightning import (
    LIGHTNING,
    ConcentrationCallback,
    PrunedEvaluationCallback,
    SharpnessCallback,
    SparsityTargetCallback,
)

OPTIMIZERS = {"sam": SAM, "ssam": SSAM}


class Net(pl.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.net, self.name = small_net(), name

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self):
        base = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        return WCR(OPTIMIZERS[self.name](base, rho=0.2), form="scale_free")


def halves(rank, steps):
    """The rank's half of every batch."""
    return DataLoader([tuple(t[rank::2] for t in small_batch(step)) for step in steps], batch_size=None)


def main(rank, path):
    warnings.simplefilter("error")
    # pytorch_lightning 2.6 on torch >= 2.10; advice on speed, for loaders of a few rows
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", ".*does not have many workers")
    assert LIGHTNING == "pytorch_lightning"
    assert issubclass(SharpnessCallback, pl.Callback)
    ended = {}
    for name in OPTIMIZERS:
        target = SparsityTargetCallback(0.5, 100, every=1)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            use_distributed_sampler=False,
            max_epochs=2,
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[SharpnessCallback(), PrunedEvaluationCallback((0, 0.5)), target, ConcentrationCallback(every=2)],
        )
        module = Net(name)
        trainer.fit(module, halves(rank, range(6)), halves(rank, range(1000, 1002)))
        metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
        ended[name] = {"weights": module.net.state_dict(), "history": target.target.history, "metrics": metrics}
    torch.save(ended, f"{path}.{rank}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
