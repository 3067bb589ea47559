"""Optimizers that take the gradient at perturbed weights: SAM, ASAM, SSAM, SparseSAM and CrAM, around any optimizer."""

from wcr_optim.sharpness.cram import CrAM
from wcr_optim.sharpness.sam import SAM
from wcr_optim.sharpness.sparse_sam import SparseSAM
from wcr_optim.sharpness.ssam import SSAM

__all__ = ["SAM", "SSAM", "CrAM", "SparseSAM"]
