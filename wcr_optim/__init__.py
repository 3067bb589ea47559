"""Train PyTorch networks that survive one-shot pruning.

Weight concentration as a decoupled step inside ``optimizer.step()``, around any optimizer.
"""

from wcr_optim import metrics, penalties, plots, pruning
from wcr_optim.decoupled import WCR, Decoupled, HoyerDecay, L1Decay, L2Decay
from wcr_optim.optimizers import SGD, AdamW
from wcr_optim.parameters import param_groups
from wcr_optim.sharpness import SAM, SSAM, CrAM, SparseSAM
from wcr_optim.strength import StrengthSchedule
from wcr_optim.target import SparsityTarget
from wcr_optim.wrapper import OptimizerWrapper

__version__ = "0.1.0"

__all__ = [
    "SAM",
    "SGD",
    "SSAM",
    "WCR",
    "AdamW",
    "CrAM",
    "Decoupled",
    "HoyerDecay",
    "L1Decay",
    "L2Decay",
    "OptimizerWrapper",
    "SparseSAM",
    "SparsityTarget",
    "StrengthSchedule",
    "metrics",
    "param_groups",
    "penalties",
    "plots",
    "pruning",
]
