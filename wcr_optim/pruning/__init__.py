"""One-shot pruning: exact masks, evaluation at many sparsities, statistics, reports and files."""

from wcr_optim.parameters import prunable_weights
from wcr_optim.pruning.batchnorm import recalibrate_batchnorm
from wcr_optim.pruning.masks import Masks, applied, apply_
from wcr_optim.pruning.select import magnitude_masks
from wcr_optim.pruning.sweep import SweepResult, SweepRow, sweep

__all__ = [
    "Masks",
    "SweepResult",
    "SweepRow",
    "applied",
    "apply_",
    "magnitude_masks",
    "prunable_weights",
    "recalibrate_batchnorm",
    "sweep",
]
